"""The doctor on machines that were broken on purpose: what it finds, the command it gives, and that nothing stops it; the map is up to date."""

import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_disk import small_disk

from mlops_lib.course import doctor
from mlops_lib.course.doctor import (
    LEVELS,
    Finding,
    Machine,
    Report,
    course_map,
    draw_parts,
    examine,
    here,
    read_map,
    redact,
    write_index,
)

ROOT = Path(__file__).parents[2]
PROJECT = '[project]\nname = "x"\nrequires-python = "{python}"\ndependencies = [{needs}]\n[project.optional-dependencies]\n'


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    "A small, healthy workspace."
    (tmp_path / "pyproject.toml").write_text(PROJECT.format(python=">=3.11", needs='"numpy>=2"'))
    (tmp_path / "constraints.txt").write_text(f"numpy=={importlib.metadata.version('numpy')}\n")
    (tmp_path / "settings.ini").write_text("[embedded]\n[stack]\n")
    return tmp_path


def machine(root: Path, **facts: object) -> Machine:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("MLOPS_") and not k.endswith("_URL")}
    return replace(Machine(root, environ), **({"distribution": "debian", "admin": False} | facts))


def only(findings: object, level: str) -> Finding:
    "The one finding of a level."
    (found,) = [f for f in findings if f.level == level]
    return found


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def mlops(*args: str, root: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    tool = Path(sys.executable).parent / "mlops"
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MLOPS_")}
    return subprocess.run([tool, *args], cwd=root, env=clean | environ, capture_output=True, text=True)


# packages and Python


def test_a_healthy_workspace_has_nothing_wrong_with_its_packages(workspace: Path) -> None:
    assert [f.level for f in doctor.check_packages(machine(workspace))] == ["ok"]


def test_a_package_that_is_not_what_was_tested_is_a_note_with_pip_s_command(workspace: Path) -> None:
    (workspace / "constraints.txt").write_text("numpy==1.0.0\npip==0.1\nnot-installed==1\n")
    found = only(doctor.check_packages(machine(workspace)), "note")
    assert f"numpy {importlib.metadata.version('numpy')} (tested: 1.0.0)" in found.text
    assert found.mend == f"cd {workspace} && {sys.executable} -m pip install -c constraints.txt -e '.[all,dev]'"


def test_missing_and_wrong_packages_are_wrong(workspace: Path) -> None:
    (workspace / "pyproject.toml").write_text(PROJECT.format(python=">=3.11", needs='"numpy>=99", "no.Such_package", "gone; python_version < \'3\'"'))
    missing, old = (f for f in doctor.check_packages(machine(workspace)) if f.level == "wrong")
    assert missing.text == "missing: no-such-package"
    assert "numpy" in old.text
    assert ">=99" in old.text
    assert "pip install" in old.mend


def test_the_lock_of_this_workspace_is_what_is_compared() -> None:
    assert all(f.about == "packages" for f in doctor.check_packages(machine(ROOT)))


@pytest.mark.parametrize(
    ("facts", "mend"),
    [({"distribution": "debian"}, "apt-get install -y --no-install-recommends python3.11-venv && make clean run PYTHON=python3.11"), ({"system": "darwin"}, "brew install python@3.11 && make clean run PYTHON=python3.11")],
)
def test_a_python_that_is_too_old(workspace: Path, facts: dict[str, str], mend: str) -> None:
    found = only(doctor.check_python(machine(workspace, python="3.10.4", **facts)), "wrong")
    assert "3.10.4" in found.text
    assert ">=3.11" in found.text
    assert found.mend.endswith(mend)


def test_another_workspace_s_library_is_wrong(workspace: Path) -> None:
    (workspace / "mlops_lib").mkdir()
    found = only(doctor.check_python(machine(workspace)), "wrong")
    assert found.about == "mlops_lib"
    assert "pip install" in found.mend


# servers and ports


@pytest.mark.parametrize(
    ("facts", "command"),
    [
        ({}, "sudo apt-get update && sudo apt-get install -y --no-install-recommends redis-server"),
        ({"admin": True}, "apt-get update && apt-get install -y --no-install-recommends redis-server"),
        ({"system": "darwin"}, "brew install redis"),
        ({"distribution": "arch"}, "docker compose up -d redis"),
    ],
)
def test_a_path_without_redis(workspace: Path, tmp_path: Path, facts: dict[str, object], command: str) -> None:
    (workspace / "settings.ini").write_text(f"[embedded]\n[stack]\nredis_url = redis://127.0.0.1:{free_port()}/0\nchroma_host =\n")
    found = only(doctor.check_servers(machine(workspace, environ={"PATH": str(tmp_path)}, **facts)), "note")
    assert "redis-server" in found.text
    assert found.mend == command
    wanted = only(doctor.check_servers(machine(workspace, environ={"PATH": str(tmp_path)}, profile="stack", **facts)), "wrong")
    assert wanted.mend == command


def test_postgres_on_a_mac_is_linked_too(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlops_lib.servers.PLACES", [])
    (workspace / "settings.ini").write_text(f"[embedded]\n[stack]\ndatabase_url = postgresql://a:b@127.0.0.1:{free_port()}/x\n")
    found = only(doctor.check_servers(machine(workspace, environ={"PATH": str(tmp_path)}, system="darwin")), "note")
    assert found.mend == "brew install postgresql@17 && brew link --force postgresql@17"


def test_a_port_that_somebody_else_holds(workspace: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        (workspace / "settings.ini").write_text(f"[embedded]\n[stack]\nprometheus_url = http://127.0.0.1:{port}\n")
        found = only(doctor.check_servers(machine(workspace)), "note")
        assert only(doctor.check_servers(machine(workspace, profile="stack")), "wrong").about == "prometheus"
    assert f"port {port} is held by " in found.text
    assert found.mend in (f"kill {os.getpid()}", f"sudo kill $(sudo lsof -t -i tcp:{port} -s tcp:listen)")


def test_a_server_on_another_machine_that_does_not_answer(workspace: Path) -> None:
    (workspace / "settings.ini").write_text("[embedded]\n[stack]\nprometheus_url = http://me:hunter2@no-such-host.invalid:9090\n")
    found = only(doctor.check_servers(machine(workspace)), "note")
    assert found.mend == "nc -vz no-such-host.invalid 9090"
    assert "hunter2" not in found.text


# room, folders, settings, text, clock, tools


@pytest.mark.parametrize(("free", "level"), [(1_400_000_000, "wrong"), (1_600_000_000, "note"), (2_600_000_000, "ok")])
def test_memory(workspace: Path, free: int, level: str) -> None:
    memory, disk = doctor.check_room(machine(workspace, free_memory=free))
    assert (memory.about, memory.level, disk.level) == ("memory", level, "ok")
    assert bool(memory.mend) == (level != "ok")
    if level == "wrong":
        assert memory.mend.endswith("sudo swapon /swapfile")


@pytest.mark.parametrize(("free", "level"), [(900_000_000, "wrong"), (4_000_000_000, "note"), (6_000_000_000, "ok")])
def test_disk(workspace: Path, free: int, level: str) -> None:
    _, disk = doctor.check_room(machine(workspace, free_disk=free))
    assert disk.level == level
    assert disk.mend == ("" if level == "ok" else f"{sys.executable} -m pip cache purge")


def test_a_folder_that_is_a_file(workspace: Path) -> None:
    (workspace / "data").touch()
    found = only(doctor.check_folders(machine(workspace)), "wrong")
    assert found.mend == f"mv {workspace}/data {workspace}/data.old"


def test_a_folder_on_a_full_disk(workspace: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path, 64) as full:
        one = machine(workspace)
        found = only(doctor.check_folders(replace(one, environ={**one.environ, "MLOPS_RUNS_DIR": str(full)})), "wrong")
    assert found.about == "runs"
    assert "No space left" in found.text
    assert found.mend == 'export MLOPS_RUNS_DIR="$HOME/mlops-runs"'


def test_a_folder_that_cannot_be_written_to(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", refuse)  # root may write everywhere
    found = list(doctor.check_folders(machine(workspace)))
    assert [f.mend for f in found] == [f'sudo chown -R "$(id -u)" {workspace}'] * 2


def test_nothing_is_left_in_a_folder_that_is_well(workspace: Path) -> None:
    before = sorted(workspace.iterdir())
    assert [f.level for f in doctor.check_folders(machine(workspace))] == ["ok", "ok"]
    assert sorted(workspace.iterdir()) == before


def test_a_wrong_setting_in_the_file_and_in_the_environment(workspace: Path) -> None:
    one = machine(workspace)
    assert only(doctor.check_settings(one), "ok")
    found = only(doctor.check_settings(replace(one, environ={**one.environ, "MLOPS_SEED": "many"})), "wrong")
    assert found.mend == "unset MLOPS_SEED"
    assert "'many'" in found.text
    (workspace / "settings.ini").write_text("[embedded]\nsede = 1\n[stack]\n")
    assert only(doctor.check_settings(one), "wrong").mend == "git checkout settings.ini"


def test_a_terminal_that_is_not_utf_8(workspace: Path) -> None:
    one = machine(workspace)
    found = only(doctor.check_text(replace(one, environ={**one.environ, "PYTHONIOENCODING": "latin-1"})), "wrong")
    assert found.mend == "unset PYTHONIOENCODING"
    assert only(doctor.check_text(replace(one, environ={**one.environ, "PYTHONUTF8": "1"})), "ok")


def test_a_clock_that_is_behind(workspace: Path) -> None:
    assert only(doctor.check_clock(machine(workspace)), "ok")
    late = time.time() + 48 * 3600
    os.utime(workspace / "settings.ini", (late, late))
    found = only(doctor.check_clock(machine(workspace)), "wrong")
    assert "48 h behind" in found.text
    assert found.mend == "sudo timedatectl set-ntp true"


def test_no_git_and_no_make(workspace: Path, tmp_path: Path) -> None:
    found = list(doctor.check_tools(machine(workspace, environ={"PATH": str(tmp_path)})))
    assert [(f.about, f.level) for f in found] == [("git", "note"), ("make", "note")]
    assert found[1].mend.endswith("install -y --no-install-recommends make")


def program(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def test_git_refuses_a_workspace_of_another_user(workspace: Path, tmp_path: Path) -> None:
    program(tmp_path, "git", "echo 'fatal: detected dubious ownership in repository' >&2; exit 128")
    found = only(doctor.check_tools(machine(workspace, environ={"PATH": f"{tmp_path}:/usr/bin:/bin"})), "wrong")
    assert found.mend == f"git config --global --add safe.directory {workspace}"


@pytest.mark.parametrize(
    ("body", "mend"),
    [
        ("echo 'permission denied while trying to connect to the Docker daemon socket' >&2; exit 1", 'sudo usermod -aG docker "$USER" && newgrp docker'),
        ("echo 'Cannot connect to the Docker daemon' >&2; exit 1", "start"),
        ('[ "$1" = version ] && echo 28.1 || exit 1', "docker-compose-plugin"),
        ("echo 28.1", ""),
    ],
)
def test_docker(workspace: Path, tmp_path: Path, body: str, mend: str) -> None:
    program(tmp_path, "docker", body)
    (found,) = doctor.check_docker(machine(workspace, environ={"PATH": f"{tmp_path}:/usr/bin:/bin"}))
    assert mend in found.mend
    assert bool(mend) == (found.level == "note")


def test_a_docker_that_hangs_is_given_up(workspace: Path, tmp_path: Path) -> None:
    program(tmp_path, "docker", "exec sleep 600")
    (found,) = doctor.check_docker(machine(workspace, environ={"PATH": f"{tmp_path}:/usr/bin:/bin"}, limit=3.0))
    assert found.level == "note"


def test_a_kernel_that_does_not_start(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = machine(workspace, limit=60.0)
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    found = [f for f in doctor.check_kernel(replace(one, environ={**one.environ, "PYTHONHOME": str(workspace)})) if f.about == "kernel"]
    assert only(found, "wrong").mend.endswith("ipykernel")


def test_a_kernel_that_starts(workspace: Path) -> None:
    assert [f.about for f in doctor.check_kernel(machine(workspace, limit=120.0)) if f.level == "ok"][:1] == ["kernel"]


def test_too_little_memory_for_forked_kernels(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))  # no server of ours is there
    found = [f for f in doctor.check_kernel(machine(workspace, limit=120.0, free_memory=1)) if f.about == "fork server"]
    assert only(found, "note").mend == "mlops stack down"
    (tmp_path / "mlops-kernels").chmod(0o777)
    found = [f for f in doctor.check_kernel(machine(workspace, limit=120.0)) if f.about == "fork server"]
    assert only(found, "wrong").mend == 'chmod 700 "${XDG_RUNTIME_DIR:-$HOME/.cache}/mlops-kernels"'


def test_no_sandbox(workspace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mlops_lib.course import sandbox

    def refuse(**_: object) -> None:
        raise sandbox.SandboxError("a box cannot be made here")

    monkeypatch.setattr(sandbox, "Sandbox", refuse)
    (tmp_path / "clone").write_text("0\n")
    monkeypatch.setattr(doctor, "FORBIDS", {str(tmp_path / "clone"): ("0", "sysctl -w kernel.unprivileged_userns_clone=1")})
    assert only(doctor.check_sandbox(machine(workspace)), "note").mend == "sudo sysctl -w kernel.unprivileged_userns_clone=1"
    (tmp_path / "clone").write_text("1\n")
    assert "seccomp=unconfined" in only(doctor.check_sandbox(machine(workspace)), "note").mend


# all of them


def test_what_a_check_does_wrong_is_a_finding(workspace: Path) -> None:
    def check_import(_: Machine) -> list[Finding]:
        raise ModuleNotFoundError("No module named 'pydantic'")

    def check_late(_: Machine) -> list[Finding]:
        return threading.Event().wait() or []

    report = examine(machine(workspace, limit=1.0), [check_import, check_late, doctor.check_clock])
    lost, late, clock = report.findings
    assert (lost.about, lost.level, clock.level) == ("import", "wrong", "ok")
    assert "pip install" in lost.mend
    assert (late.text, late.mend) == ("no answer within 1 s", "mlops doctor --limit 3")
    assert not report.well


def test_a_workspace_without_anything_is_examined_too(tmp_path: Path) -> None:
    report = examine(machine(tmp_path, limit=60.0), [c for c in doctor.CHECKS if c is not doctor.check_kernel])
    assert report.findings
    assert all(f.mend for f in report.findings if f.level == "wrong")


def test_the_whole_of_it_on_this_machine() -> None:
    report = examine(here(ROOT, limit=120.0))
    assert {f.level for f in report.findings} <= set(LEVELS)
    assert all(f.mend for f in report.findings if f.level == "wrong")
    assert str(report).splitlines()[-1].endswith("wrong")
    assert report._repr_html_().count("<tr>") == len(report.findings) + 1


def test_what_is_shown_in_a_notebook_is_text() -> None:
    assert "<b>" not in Report((Finding("<b>", "ok", "<b>", "<b>"),))._repr_html_()


@given(st.text(alphabet="abcXYZ019@:%!", min_size=1, max_size=20), st.sampled_from(["redis", "amqp", "postgresql+psycopg"]))
def test_no_password_of_an_address_is_shown(password: str, scheme: str) -> None:
    assert redact(f"no answer from {scheme}://me:{password}@host:1/x now", {}) == f"no answer from {scheme}://me:***@host:1/x now"


def test_keys_of_the_environment_are_masked() -> None:
    environ = {"OPENAI_API_KEY": "sk-12345", "GRAFANA_PASSWORD": "hunter2", "HOME": "/root"}
    assert redact("sk-12345, hunter2, /root", environ) == "***, ***, /root"


# the command


def test_the_command_gives_json_and_its_exit_code(workspace: Path) -> None:
    result = mlops("doctor", "--json", "--limit", "120", root=workspace)
    found = json.loads(result.stdout)
    assert result.returncode == (0 if found["well"] else 1)
    (workspace / "pyproject.toml").write_text(PROJECT.format(python=">=3.11", needs='"no-such-package"'))
    result = mlops("doctor", "--limit", "120", root=workspace, REDIS_URL="redis://:hunter2@no-such-host.invalid:6379/0")
    assert result.returncode == 1, result.stderr
    assert "missing: no-such-package" in result.stdout
    assert "$ cd " not in result.stdout  # it is where the command works
    assert f"$ {sys.executable} -m pip install" in result.stdout
    assert "hunter2" not in result.stdout + result.stderr


def test_the_command_works_where_the_library_s_packages_are_missing(workspace: Path, tmp_path: Path) -> None:
    lost = tmp_path / "lost"
    for name in ("pydantic", "pythonjsonlogger", "psutil", "packaging"):
        (lost / name).mkdir(parents=True)
        (lost / name / "__init__.py").write_text(f"raise ModuleNotFoundError(\"No module named '{name}'\", name='{name}')")
    result = mlops("doctor", "--json", "--limit", "120", root=workspace, PYTHONPATH=str(lost))
    assert result.returncode == 1, result.stderr
    assert any("pydantic" in f["text"] and "pip install" in f["mend"] for f in json.loads(result.stdout)["findings"])


def test_asked_wrongly_is_2(workspace: Path) -> None:
    assert mlops("doctor", "--limit", "0", root=workspace).returncode == 2
    assert mlops("doctor", "--profile", "prod", root=workspace).returncode == 2


# the map


def test_the_map_is_up_to_date() -> None:
    text = json.dumps(course_map(ROOT), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    assert (ROOT / "notebooks" / "index.ipynb").read_text() == text, "run `mlops index` and commit"


def test_the_map_has_every_lesson_in_the_order_of_its_number() -> None:
    stops = read_map(ROOT)
    assert {s.name for s in stops} == {f"{p.parent.name}/{p.stem}" for p in (ROOT / "notebooks").glob("[0-9]*/[0-9]*.ipynb")}
    assert [(s.part, int(s.number)) for s in stops] == sorted((s.part, int(s.number)) for s in stops)
    assert all(set(s.needs) <= {x.name for x in stops} for s in stops)
    assert all(s.read > 0 and s.solve > 0 for s in stops)


def test_the_map_is_the_same_again_and_is_a_notebook(tmp_path: Path) -> None:
    import nbformat

    lesson = tmp_path / "notebooks" / "1_data" / "10_a.ipynb"
    lesson.parent.mkdir(parents=True)
    cell = "# A | B\n\n> One | two.\n\n**Time** 7 minutes to read, 9 for the exercise. **Needs** nothing."
    lesson.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": cell}]}))
    first = write_index(tmp_path).read_bytes()
    assert write_index(tmp_path).read_bytes() == first
    nbformat.validate(nbformat.reads(first.decode(), as_version=4))
    assert "One \\\\| two." in first.decode()


def test_arrows_that_follow_from_others_are_left_out() -> None:
    stop = doctor.Stop("0_a/00_x", "X", "x", 1, 1, "", ())
    second = replace(stop, name="1_b/10_y", needs=("0_a/00_x",))
    third = replace(stop, name="2_c/20_z", needs=("0_a/00_x", "1_b/10_y"))
    arrows = [line.strip() for line in draw_parts([stop, second, third]).splitlines() if "-->" in line]
    assert arrows == ["p0 --> p1", "p1 --> p2"]
