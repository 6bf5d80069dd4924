"""Forked kernels under what really happens: interrupts, crashes, another user, edited code, a server that is gone."""

import json
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import nbformat
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jupyter_client import KernelManager
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from mlops_lib.course import kernels, pipeline
from mlops_lib.course.kernels import KernelServerError
from mlops_lib.servers import free_port

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux only")
NAMES = [*kernels.ALWAYS, "numpy"]
THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("k", numbered=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(folder))
        patch.setenv("JUPYTER_PATH", str(folder))
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        kernels.install(THREADS, NAMES, folder)
        yield folder
        kernels.stop_servers()


@pytest.fixture
def server(place: Path) -> dict:
    "The server with NAMES, ready; whatever the test before did to it."
    kernels.wait_for_server(NAMES, os.environ | THREADS)
    with kernels.connect(NAMES, os.environ | THREADS) as conn:
        pid = kernels.peer(conn)[0]
    return next(s for s in kernels.servers() if s["pid"] == pid)


class Kernel:
    def __init__(self, manager: KernelManager) -> None:
        self.manager, self.client = manager, manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    @property
    def process(self):
        return self.manager.provisioner.process

    def run(self, code: str) -> str:
        said: list[str] = []
        reply = self.client.execute_interactive(code, output_hook=lambda m: said.append(m["content"].get("text", "")), timeout=60)
        assert reply["content"]["status"] == "ok", reply["content"]
        return "".join(said).strip()


@contextmanager
def kernel(place: Path, **kwargs) -> Iterator[Kernel]:
    manager = KernelManager(kernel_name="mlops", transport="ipc", ip=f"{place}/{time.monotonic_ns()}")
    manager.start_kernel(**kwargs)
    started = Kernel(manager)
    try:
        yield started
    finally:
        started.client.stop_channels()
        manager.shutdown_kernel(now=True)


def ended(pid: int, seconds: float = 20) -> bool:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    gone = kernels._readable(pidfd, seconds)
    os.close(pidfd)
    return gone


def test_a_kernel_is_a_fork_with_what_was_imported_and_nothing_of_the_library(place: Path, server: dict) -> None:
    with kernel(place) as k:
        said = k.run("import os, sys, json; print(json.dumps([os.getppid(), 'numpy' in sys.modules, [m for m in sys.modules if m.startswith('mlops_lib')], os.getpgid(0) == os.getpid()]))")
        assert json.loads(said) == [server["pid"], True, [], True]
        assert k.process.pid in next(s["kernels"] for s in kernels.servers() if s["pid"] == server["pid"])


def test_it_has_the_environment_the_folder_and_the_mask_of_its_request(place: Path, server: dict, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        environ = os.environ | {"ONLY_MINE": "s3cret", "TZ": "Asia/Tokyo"}
        with kernel(place, env=environ, cwd=str(tmp_path)) as k:
            said = k.run("import os, time; print([os.environ['ONLY_MINE'], os.getcwd(), time.tzname[0], os.getenv('OMP_NUM_THREADS')]); open('made', 'w').close()")
    finally:
        os.umask(before)
    assert said == str(["s3cret", str(tmp_path), "JST", "1"])
    assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o640
    assert b"s3cret" not in Path(f"/proc/{server['pid']}/environ").read_bytes()
    with kernel(place) as k:
        assert k.run("import os; print('ONLY_MINE' in os.environ, os.getcwd())") == f"False {os.getcwd()}"


def test_what_the_process_says_as_it_crashes_goes_where_it_was_sent(place: Path, server: dict, tmp_path: Path) -> None:
    with (tmp_path / "noise").open("wb") as noise, kernel(place, stderr=noise) as k:
        k.client.execute("import faulthandler, os, signal; faulthandler.enable(); os.kill(os.getpid(), signal.SIGSEGV)")
        assert k.process.wait(30) == -signal.SIGSEGV
    assert "Segmentation fault" in (tmp_path / "noise").read_text()


def test_no_two_kernels_draw_the_same_numbers(place: Path, server: dict) -> None:
    code = "import random, numpy, uuid, multiprocessing; print(random.random(), numpy.random.random(), uuid.uuid4(), bytes(multiprocessing.current_process().authkey).hex())"
    drawn = []
    for _ in range(2):
        with kernel(place) as k:
            drawn.append(k.run(code).split())
    assert not set(drawn[0]) & set(drawn[1])


def test_an_interrupt_ends_the_cell_and_a_restart_forgets(place: Path, server: dict) -> None:
    with kernel(place) as k:
        k.run("kept = 1")
        message = k.client.execute("print('begun', flush=True)\nwhile True: pass", stop_on_error=False)
        while k.client.get_iopub_msg(timeout=30)["content"].get("text") != "begun\n":
            continue
        k.manager.interrupt_kernel()
        reply = k.client.get_shell_msg(timeout=30)
        assert (reply["parent_header"]["msg_id"], reply["content"]["ename"]) == (message, "KeyboardInterrupt")
        assert k.run("print(kept)") == "1"
        old = k.process.pid
        k.manager.restart_kernel()
        k.client.wait_for_ready(timeout=60)
        assert k.run("print('kept' in globals())") == "False"
        assert k.process.pid != old
        assert ended(old)


@pytest.mark.parametrize(("code", "exit_code"), [("import os; os._exit(7)", 7), ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", -11)])
def test_a_crash_is_reported_as_it_was_and_the_server_goes_on(place: Path, server: dict, code: str, exit_code: int) -> None:
    with kernel(place) as k:
        k.client.execute(code)
        assert k.process.wait(30) == exit_code
    with kernel(place) as k:
        assert k.run("import os; print(os.getppid())") == str(server["pid"])


def test_atexit_and_threads_are_waited_for_at_the_usual_end(place: Path, server: dict, tmp_path: Path) -> None:
    code = f"""
import atexit, pathlib, threading
folder = pathlib.Path({str(tmp_path)!r})
atexit.register((folder / "atexit").touch)
go = threading.Event()
atexit.register(go.set)
threading.Thread(target=lambda: (folder / "thread").touch()).start()
"""
    with kernel(place) as k:
        k.run(code)
        process = k.process
        k.client.shutdown()
        assert process.wait(30) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"atexit", "thread"}


CLIENT = """
import time
from jupyter_client import KernelManager
manager = KernelManager(kernel_name="mlops", transport="ipc", ip="{place}/c{number}")
manager.start_kernel()
client = manager.client()
client.wait_for_ready(timeout=60)
print(manager.provisioner.process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("server_dies_first", [False, True])
def test_a_kernel_ends_with_its_client_with_or_without_the_server(place: Path, server: dict, server_dies_first: bool) -> None:
    script = CLIENT.format(place=place, number=time.monotonic_ns())
    client = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert client.stdout
    pid = int(client.stdout.readline())
    if server_dies_first:
        os.kill(server["pid"], signal.SIGKILL)
        assert ended(server["pid"])
    assert psutil.pid_exists(pid)
    client.kill()
    client.communicate()
    assert ended(pid)


def test_a_running_kernel_outlives_its_server_and_the_next_one_is_plain_and_says_why(place: Path, server: dict) -> None:
    with kernel(place) as k:
        assert kernels.stop_servers() >= 1
        assert ended(server["pid"], 0)
        assert k.run("print(6 * 7)") == "42"
        with kernel(place) as plain:
            assert plain.manager.provisioner.why_plain == "the server is starting"
            assert plain.run("import os; print(os.getppid())") == str(os.getpid())
        kernels.wait_for_server(NAMES, os.environ | THREADS)  # the lock of the old server is free
        k.client.shutdown()
        assert k.process.wait(30) == -1  # nobody is there who knows


def test_what_may_be_edited_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "my_features.py").write_text("version = 1")
    environ = os.environ | THREADS | {"PYTHONPATH": str(tmp_path)}
    with pytest.raises(KernelServerError, match="refusing my_features"):
        kernels.wait_for_server(["my_features"], environ)
    with pytest.raises(KernelServerError, match="refusing my_features"):  # and is not tried again at every request
        kernels.connect(["my_features"], environ)


def test_edited_code_of_the_library_is_read_anew(place: Path, server: dict, tmp_path: Path) -> None:
    for version in (1, 2):
        (tmp_path / "edited.py").write_text(f"version = {version}")
        with kernel(place, cwd=str(tmp_path)) as k:
            assert k.run("import edited; print(edited.version)") == str(version)


def test_a_broken_import_is_left_out_and_named(place: Path) -> None:
    kernels.wait_for_server(["json.tool", "no_such_package"], os.environ | THREADS)
    left_out = [s["left_out"] for s in kernels.servers() if s["state"] == "ready" and s["left_out"]]
    assert left_out == [{"no_such_package": "ModuleNotFoundError: No module named 'no_such_package'"}]


def test_an_idle_server_ends(place: Path) -> None:
    environ = os.environ | THREADS
    kernels.wait_for_server(["json.tool"], environ, idle=0.05)
    path = kernels.server_path(["json.tool"], environ)
    assert ended(json.loads(path.with_suffix(".json").read_text())["pid"])
    assert not path.exists()


def test_two_requests_at_once_start_one_server(place: Path) -> None:
    names, environ = ["json.tool", "html"], os.environ | THREADS
    threads = [threading.Thread(target=kernels.wait_for_server, args=(names, environ)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum('"html"' in Path(f"/proc/{s['pid']}/cmdline").read_text() for s in kernels.servers()) == 1


@pytest.mark.parametrize("garbage", [b"", b"\n", b"[]\n", b"{}\n", b'{"env": 1}\n', b"\xff\n", b"{" * 100])
def test_garbage_on_the_socket_ends_nothing(place: Path, server: dict, garbage: bytes) -> None:
    with kernels.connect(NAMES, os.environ | THREADS) as conn:
        conn.sendall(garbage)
        if garbage != b"{" * 100:
            with suppress(ConnectionResetError):
                assert conn.recv(1) == b""
    kernels.connect(NAMES, os.environ | THREADS).close()
    assert not ended(server["pid"], 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can try it as another user")
def test_another_user_gets_no_kernel(place: Path, server: dict) -> None:
    path = kernels.server_path(NAMES, os.environ | THREADS)
    script = (
        "import os, socket, sys; os.setgroups([]); os.setgid(65534); os.setuid(int(sys.argv[2]))\n"
        "s = socket.socket(socket.AF_UNIX); s.settimeout(20)\n"
        "try:\n    s.connect(sys.argv[1])\n    s.sendall(b'{\"argv\": [], \"env\": {}, \"cwd\": \"/\", \"umask\": 0}\\n')\n    print(s.recv(10))\n"
        "except OSError as e:\n    print(type(e).__name__)"
    )
    command = [sys.executable, "-c", script, str(path), str(pwd.getpwnam("nobody").pw_uid)]
    assert subprocess.run(command, capture_output=True, text=True).stdout.strip() == "PermissionError"
    opened = {folder: folder.stat().st_mode for folder in (path, *path.parents[:-1]) if folder.stat().st_uid == 0}
    try:
        for folder in opened:  # even where the folder lets others in, the server asks who they are
            folder.chmod(0o777)
        assert subprocess.run(command, capture_output=True, text=True).stdout.strip() in ("b''", "ConnectionResetError", "BrokenPipeError")
    finally:
        for folder, mode in opened.items():
            folder.chmod(mode)


def test_a_folder_that_others_can_enter_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    folder = kernels.runtime_folder()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o750)
    with pytest.raises(KernelServerError, match="nobody else can enter"):
        kernels.runtime_folder()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(KernelServerError, match="nobody else can enter"):
        kernels.runtime_folder()


def test_an_upgraded_package_means_another_server(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_site_folders", lambda: [str(tmp_path)])
    (tmp_path / "numpy-2.4.0.dist-info").mkdir()
    before = kernels.server_path(["numpy"], {})
    assert kernels.server_path(["numpy"], {}) == before
    (tmp_path / "numpy-2.4.0.dist-info").rename(tmp_path / "numpy-2.4.1.dist-info")
    assert kernels.server_path(["numpy"], {}) != before


@pytest.mark.parametrize(("name", "value", "why"), [("NEEDED", 1e18, "GB of memory are free"), ("sys.platform", "darwin", "darwin cannot fork")])
def test_where_no_server_can_be_the_kernel_is_plain(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: object, why: str) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(f"mlops_lib.course.kernels.{name}", value)
    with pytest.raises(KernelServerError, match=why):
        kernels.connect(NAMES, os.environ | THREADS)


def test_a_server_that_dies_while_importing_is_not_started_at_every_request(place: Path, tmp_path: Path) -> None:
    (tmp_path / "deadly.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    environ = os.environ | THREADS | {"PYTHONPATH": str(tmp_path)}
    with pytest.raises(KernelServerError, match="ended importing deadly; see .*log"):
        kernels.wait_for_server(["deadly"], environ)


def ask(url: str, method: str = "GET", **body: object) -> object:
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(url, data, {"Authorization": "token t"}, method=method)
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.loads(reply.read() or "null")


def test_jupyterlab_starts_interrupts_restarts_and_deletes_it(place: Path, server: dict) -> None:
    kernels.install(THREADS, NAMES, place, name="python3")  # as `mlops lab` may do it: before all others
    port = free_port()
    command = [sys.executable, "-m", "jupyter_server", "--no-browser", "--allow-root", "--IdentityProvider.token=t", f"--ServerApp.root_dir={place}", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    url = f"http://127.0.0.1:{port}"
    lab = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while True:
            assert lab.poll() is None
            with suppress(OSError):
                ask(f"{url}/api/kernels")
                break
        seen = set()
        for name in ("mlops", "python3"):
            kernel = ask(f"{url}/api/kernels", "POST", name=name)["id"]
            forked = next(s["kernels"] for s in kernels.servers() if s["pid"] == server["pid"])
            assert len(forked) == 1
            ask(f"{url}/api/kernels/{kernel}/interrupt", "POST", now=True)
            ask(f"{url}/api/kernels/{kernel}/restart", "POST", now=True)
            again = next(s["kernels"] for s in kernels.servers() if s["pid"] == server["pid"])
            assert len(again) == 1
            assert again != forked
            seen |= {*forked, *again}
            ask(f"{url}/api/kernels/{kernel}", "DELETE")
        assert len(seen) == 4
        assert all(ended(pid) for pid in seen)
    finally:
        shutil.rmtree(place / "kernels" / "python3")
        lab.terminate()
        lab.wait(30)


def test_papermill_gets_a_fork_and_its_pictures(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "notebooks" / "0_a" / "00_draws.ipynb"
    path.parent.mkdir(parents=True)
    sources = ["import os\nprint(os.getppid())", "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"]
    kernelspec = {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}
    cells = [new_markdown_cell("# Draws"), *(new_code_cell(source) for source in sources)]
    nbformat.write(new_notebook(cells=cells, metadata=kernelspec), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MPLBACKEND", raising=False)
        kernels.wait_for_server(NAMES, pipeline.lesson_environment("embedded"))
        outcome = pipeline.run_lesson(pipeline.read_lesson(path), tmp_path / "out", kernel="mlops")
    assert (outcome.status, outcome.kernel) == ("ok", "mlops"), outcome.error
    executed = nbformat.read(tmp_path / "out" / "00_draws.ipynb", as_version=4)
    parent, picture = (cell.outputs for cell in executed.cells[1:3])
    assert int(parent[0].text) in {s["pid"] for s in kernels.servers()}
    assert any("image/png" in output.get("data", {}) for output in picture)


def test_what_the_library_imports_does_not_depend_on_where_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = kernels.course_imports()
    monkeypatch.chdir(tmp_path)
    assert kernels.course_imports() == here
    assert {"numpy", "matplotlib.pyplot"} <= set(here)
    assert not [n for n in here if n.startswith(("mlops_lib", "matplotlib_inline"))]


STATEMENTS = ["import numpy", "import os.path", "from mlflow.models import Model as M", "from . import x", "from mlops_lib.data import tables"]


@given(st.lists(st.sampled_from(STATEMENTS)))
def test_imports_are_found_wherever_they_stand(lines: list[str]) -> None:
    inside = "def f():\n" + "".join(f"    {line}\n" for line in [*lines, "return 1"])
    wanted = {"numpy": STATEMENTS[0], "mlflow.models.Model": STATEMENTS[2]}
    assert kernels.third_party(inside) == {name for name, line in wanted.items() if line in lines}


def test_a_long_message_arrives_whole() -> None:
    here, there = socket.socketpair()
    message = {"env": {"A": "ä\udcff" * 300_000}}
    with here, there:
        sender = threading.Thread(target=kernels.send, args=(here, message))
        sender.start()
        assert kernels.receive(there) == (message, [])
        sender.join()
