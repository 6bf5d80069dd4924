"""Hostile code in a sandbox: nothing changes outside, nothing is read, nothing is left."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops_lib.course.sandbox import KINDS, Limits, Outcome, Sandbox, SandboxError, read_answer

ROOT = Path(__file__).parents[2]
SMALL = Limits(seconds=2, memory=400 << 20)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    folder.chmod(0o755)
    (folder / "secret.txt").write_text("the-answer-is-42")
    (folder / "shown.txt").write_text("the task")
    return folder


@pytest.fixture(scope="module")
def sandbox(world: Path) -> Iterator[Sandbox]:
    try:
        made = Sandbox(visible=[world / "shown.txt"], limits=SMALL, strict=True)
    except SandboxError as e:
        pytest.skip(f"not run: {e}")
    with made:
        yield made


LIBC = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\ndef call(name, *a):\n    if getattr(libc, name)(*a) < 0: raise OSError(ctypes.get_errno(), name)\n"
REFUSED = {
    "read a secret": "open({secret!r})",
    "read the solutions": "open('{root}/solutions/0_start/00_settings.ipynb')",
    "read the history of the course": "open('{root}/.git/HEAD')",
    "read the tests": "open('{root}/tests/conftest.py')",
    "read by /proc/1/root": "open('/proc/1/root{secret}')",
    "read by an open file": "import os\nfor f in os.listdir('/proc/self/fd'): os.open(f'/proc/self/fd/{{f}}/../../../..{secret}', os.O_RDONLY)\nopen({secret!r})",
    "link to a secret": "import os\nos.symlink({secret!r}, 's'); open('s').read()",
    "hard link": "import os\nos.link('/etc/passwd', 'p')",
    "write what is shown": "open({shown!r}, 'w')",
    "delete what is shown": "import os\nos.unlink({shown!r})",
    "write in Python's packages": "import json\nopen(json.__file__, 'a')",
    "write at the root": "import os\nos.mkdir('/new')",
    "write /etc": "open('/etc/passwd', 'a')",
    "write a device": "open('/dev/sda', 'wb')",
    "make a device": "import os\nos.mknod('d', 0o020666, os.makedev(1, 1)); open('d', 'rb')",
    "remount": LIBC + "call('mount', None, b'/', None, 32 | 4096, None)",
    "unmount": LIBC + "call('umount2', b'/tmp', 2)",
    "mount over": LIBC + "call('mount', b'tmpfs', b'/tmp/home', b'tmpfs', 0, None)",
    "another user namespace": LIBC + "call('unshare', 0x10000000)",
    "pivot back": LIBC + "call('pivot_root', b'.', b'.')",
    "chroot": "import os\nos.chroot('/tmp')",
    "become root": "import os\nos.setuid(0)",
    "become another group": "import os\nos.setgroups([0])",
    "raise its limits": "import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (10**6, 10**6))",
    "kill the watcher": "import os\nos.kill(os.getppid(), 9)\nos.kill(2**22 - 7, 9)",
    "trace the first": LIBC + "call('ptrace', 16, 1, 0, 0)",
    "memory of the first": "open('/proc/1/mem', 'rb')",
    "environment of the first": "open('/proc/1/environ', 'rb').read()",
    "network": "import socket\nsocket.create_connection(('192.0.2.1', 80), 2)",
    "name server": "import socket\nsocket.getaddrinfo('example.org', 80)",
    "raw socket": "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)",
    "big file": "open('/tmp/f', 'wb').write(bytes(100 << 20))",
    "full disk": "for i in range(9): open(f'/tmp/{{i}}', 'wb').write(bytes(30 << 20))",
    "many files": "for i in range(30_000): open(f'/tmp/{{i}}', 'w')",
    "many open files": "import os\nfor i in range(10_000): os.dup(1)",
    "kernel settings": "open('/proc/sys/kernel/core_pattern', 'w')",
    "change the clock": "import time\ntime.clock_settime(time.CLOCK_REALTIME, 0)",
    "the name of the machine": "import socket\nsocket.sethostname('x')",
    "priority": "import os\nos.setpriority(os.PRIO_PROCESS, 0, -10)",
}
ENDED = {
    "loop": ("while True: pass", "time-out"),
    "loop that catches everything": ("while True:\n    try:\n        while True: pass\n    except BaseException: pass", "time-out"),
    "ignored signals": ("import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n    except OSError: pass\nwhile True: pass", "time-out"),
    "alarm is no way out": ("import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass", "time-out"),
    "sleep": ("import time\ntime.sleep(99)", "time-out"),
    "stopped": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", "time-out"),
    "fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "time-out"),
    "thread bomb": ("import threading, time\nwhile True:\n    try: threading.Thread(target=time.sleep, args=(99,)).start()\n    except (RuntimeError, MemoryError): pass", "time-out"),
    "endless output": ("while True: print('x' * 100_000)", "time-out"),
    "one big block": ("x = bytearray(40 << 30)", "memory"),
    "many blocks": ("x = []\nwhile True: x.append(bytearray(10 << 20))", "memory"),
    "blocks of many": ("import os, time\nfor i in range(6):\n    if os.fork() == 0:\n        x = bytearray(b'x') * (200 << 20); time.sleep(99)\ntime.sleep(99)", "memory"),
    "shared memory": ("import mmap, os\nm = mmap.mmap(-1, 700 << 20)\nfor i in range(0, 700 << 20, 4096): m[i] = 1\nwhile True: pass", "memory"),
    "exit": ("import os\nos._exit(0)", "crash"),
    "abort": ("import os\nos.abort()", "crash"),
    "kill itself": ("import os\nos.kill(os.getpid(), 9)", "crash"),
    "bad pointer": ("import ctypes\nctypes.string_at(1)", "crash"),
    "close all files": ("import os\nos.closerange(0, 500)", "crash"),
    "deep recursion": ("import sys\nsys.setrecursionlimit(10**9)\nf = lambda: f()\nf()", "memory"),
    "program in its place": ("import os\nos.execv('/bin/sh', ['sh', '-c', 'exit 0'])", "crash"),
    "exit handler": ("import atexit, time\natexit.register(time.sleep, 99)\nraise SystemExit", "error"),
    "no memory for a name": ("class E(Exception):\n    def __str__(self): raise E\nraise E", "error"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, sandbox: Sandbox, world: Path) -> None:
    code = REFUSED[name].format(secret=str(world / "secret.txt"), shown=str(world / "shown.txt"), root=ROOT)
    with sandbox.box() as box:
        outcome = box.run(code)
        printed = box.printed
    assert outcome.kind == "error", outcome
    assert outcome.error[0] in {"FileNotFoundError", "PermissionError", "OSError", "ValueError", "ProcessLookupError", "NotADirectoryError", "BlockingIOError", "gaierror", "AttributeError"}
    assert "42" not in printed + outcome.error[1]
    assert (world / "secret.txt").read_text() == "the-answer-is-42"
    assert (world / "shown.txt").read_text() == "the task"


@pytest.mark.parametrize("name", ENDED)
def test_ended(name: str, sandbox: Sandbox) -> None:
    code, kind = ENDED[name]
    with sandbox.box() as box:
        outcome = box.run(code)
        assert len(box.printed) <= SMALL.output
    assert outcome.kind == kind, outcome
    assert not psutil.Process(sandbox._parent.pid).children(), "nothing is left"
    with sandbox.box() as box:
        assert box.run("1 + 1").kind == "ok", "the next one is not affected"


@pytest.mark.parametrize(
    "code",
    [
        "import os\nif os.fork() == 0:\n    os.setsid()\n    os.fork()\n    import time; time.sleep(3600)",
        "import subprocess\nsubprocess.Popen(['sleep', '3600'], start_new_session=True)",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(3600,)).start()",
        "import multiprocessing as m, time\nm.get_context('fork').Process(target=time.sleep, args=(3600,), daemon=True).start()",
    ],
)
def test_no_daemon_outlives_its_box(code: str, sandbox: Sandbox) -> None:
    with sandbox.box() as box:
        assert box.run(code).kind == "ok"
        inside = psutil.Process(sandbox._parent.pid).children(recursive=True)
        assert len(inside) >= 3
    assert not psutil.Process(sandbox._parent.pid).children(), "watcher, first, worker and daemons are gone"
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in inside)


def test_a_box_sees_nothing_of_another(sandbox: Sandbox) -> None:
    with sandbox.box() as one, sandbox.box() as other:
        one.run("import builtins\nbuiltins.len = lambda x: 3\nopen('/tmp/mine', 'w').write('x')")
        other.run("import os\ndef see(): return [len('ab'), sorted(os.listdir('/tmp')), [p for p in os.listdir('/proc') if p.isdigit()]]")
        length, files, processes = other.run("", "plain", call="see").value
        assert length == 2
        assert "mine" not in files
        assert processes == ["1", "2"]


def test_the_environment_of_the_grader_stays_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    with Sandbox(limits=SMALL) as fresh, fresh.box() as box:
        box.run("import os\nprint(open('/proc/self/environ').read(), dict(os.environ))")
        assert "PATH" in box.printed
        assert "s3cret" not in box.printed


def test_boxes_side_by_side(sandbox: Sandbox) -> None:
    told: dict[int, Outcome] = {}

    def one(number: int) -> None:
        with sandbox.box() as box:
            box.run(f"def f(): return {number}")
            told[number] = box.run("", "plain", call="f")

    threads = [threading.Thread(target=one, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {n: o.value for n, o in told.items()} == {n: n for n in range(12)}


def test_an_ended_box_says_so(sandbox: Sandbox) -> None:
    with sandbox.box() as box:
        assert box.run("import os\nos._exit(7)").error[1].endswith("exit code 7")
        assert not box.alive
        with pytest.raises(SandboxError, match="new one"):
            box.run("1")


def test_no_files_of_the_grader_stay_open(sandbox: Sandbox) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for code in ("1", "import os; os._exit(1)", "while True: pass"):
        with sandbox.box(Limits(seconds=0.5)) as box:
            box.run(code)
    assert len(os.listdir("/proc/self/fd")) == before


JSON = st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=9), lambda x: st.lists(x) | st.dictionaries(st.sampled_from(["id", "value", "error", "x"]), x))


@given(JSON)
def test_whatever_is_answered_is_of_a_known_kind(answer: object) -> None:
    outcome = read_answer(answer, "asked")
    assert outcome.kind in KINDS
    if not (isinstance(answer, dict) and answer.get("id") == "asked"):
        assert outcome.kind == "tampering"


@given(JSON, JSON)
def test_an_answer_to_the_question(value: object, error: object) -> None:
    outcome = read_answer({"id": "asked", "value": value, "error": error}, "asked")
    assert outcome.kind in ("ok", "error", "tampering", "memory")
    assert outcome.value is None or error is None



ANYWHERE = """
import os, sys, warnings
warnings.simplefilter("ignore")
from mlops_lib.course.sandbox import Limits, Sandbox, SandboxError
secret, strict = sys.argv[1], sys.argv[2] == "strict"
try:
    sandbox = Sandbox(limits=Limits(seconds=20, memory=400 << 20), strict=strict)
except SandboxError as e:
    print("refused", e)
    raise SystemExit
with sandbox, sandbox.box() as box:
    box.run(f"def f():\\n import os\\n try: open({secret!r}).read(); seen = True\\n except OSError: seen = False\\n return [1 + 1, os.getuid(), seen]")
    print("isolated" if sandbox.isolated else "limits", *box.run("", "plain", call="f").value)
"""
# nobody, who can read the Python that root has installed in root's home
AS_NOBODY = "mount --make-rprivate / && mkdir {1} && mount --bind {0} {1} && mount -t tmpfs -o mode=755 tmpfs /root && mkdir -p {0} && mount --bind {1} {0} && "
NOBODY = "import os, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534); os.environ['HOME'] = '/tmp'; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"


def run_as(how: list[str]) -> list[str]:
    done = subprocess.run(how, capture_output=True, text=True, cwd="/", timeout=300)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"not run: {done.stderr.strip()[:200]}")
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(not shutil.which("unshare"), reason="not run: there is no program unshare")
@pytest.mark.parametrize("how", ["strict", "fall back"])
def test_where_namespaces_are_forbidden_strict_refuses(how: str, world: Path) -> None:
    forbid = 'echo 0 > /proc/sys/user/max_user_namespaces; exec "$@"'
    told = run_as(["unshare", "--user", "--map-root-user", "sh", "-c", forbid, "sh", sys.executable, "-c", ANYWHERE, str(world / "secret.txt"), how])
    assert told[0] == ("refused" if how == "strict" else "limits"), told


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("unshare"), reason="not run: only root can become another user; without root all tests here are this one")
def test_without_root_a_box_is_isolated_or_refused(world: Path) -> None:
    for folder in (world, *world.parents):
        if "pytest" in folder.name:
            folder.chmod(0o755)
    home = Path(sys.base_prefix)
    prepare = AS_NOBODY.format(home, world / "python") if home.is_relative_to("/root") else ""
    program = ["sh", sys.executable, "-c", NOBODY, "-c", ANYWHERE, str(world / "secret.txt"), "strict"]
    told = run_as(["unshare", "--mount", "sh", "-c", f'{prepare}exec "$@"', *program])
    assert told[0] == "refused" or told == ["isolated", "2", "65534", "False"], told
