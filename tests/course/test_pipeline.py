"""The runner under what really happens: a kill, a dead kernel, a notebook that is none."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from support import until

from mlops_lib.course import graph, kernels, pipeline


def write_lesson(root: Path, name: str, *sources: str) -> None:
    path = root / "notebooks" / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [new_markdown_cell(f"# {name}"), *(new_code_cell(source) for source in sources)]
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), path)


def parameter_cell(source: str):
    return new_code_cell(source, metadata={"tags": ["parameters"]})


def test_a_killed_run_is_taken_up_and_leaves_no_half_written_file(tmp_path: Path) -> None:
    write_lesson(tmp_path, "0_a/00_first", "1 + 1")
    marker = tmp_path / "started"
    slow = f"import pathlib, time\nonce = pathlib.Path({str(marker)!r})\nif not once.exists():\n    once.touch()\n    time.sleep(600)"
    write_lesson(tmp_path, "0_a/01_second", slow)
    script = (
        "from pathlib import Path; from mlops_lib.course.graph import read_course; from mlops_lib.course.pipeline import run_course;"
        f"run_course(read_course(Path({str(tmp_path)!r})), runs=Path({str(tmp_path / 'runs')!r}), jobs=1)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    while not marker.exists():
        assert process.poll() is None, "the run ended before its second lesson started"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()

    record = pipeline.run_course(graph.read_course(tmp_path), runs=tmp_path / "runs")
    assert [(o.status, o.kept) for o in record.outcomes] == [("ok", True), ("ok", False)]
    assert not list((tmp_path / "runs").rglob("*.part*"))
    for path in (tmp_path / "runs").rglob("*.json"):
        json.loads(path.read_text())


def test_an_edit_invalidates_what_an_interrupted_run_had_done(tmp_path: Path) -> None:
    write_lesson(tmp_path, "0_a/00_first", "1 + 1")
    first = pipeline.run_course(graph.read_course(tmp_path), runs=tmp_path / "runs")
    write_lesson(tmp_path, "0_a/00_first", "1 + 2")
    again = pipeline.run_course(graph.read_course(tmp_path), runs=tmp_path / "runs")
    assert first.outcomes[0].key != again.outcomes[0].key
    assert not again.outcomes[0].kept


def test_every_lesson_has_its_page_when_the_run_has_ended_even_if_the_run_before_died_without_it(tmp_path: Path) -> None:
    write_lesson(tmp_path, "0_a/00_first", "1 + 1")
    write_lesson(tmp_path, "0_a/01_second", "2 + 2")
    first = pipeline.run_course(graph.read_course(tmp_path), runs=tmp_path / "runs")
    assert {p.name for p in first.folder.glob("0*.html")} == {"00_first.html", "01_second.html"}
    (first.folder / "00_first.html").unlink()
    again = pipeline.run_course(graph.read_course(tmp_path), runs=tmp_path / "runs")
    assert [o.kept for o in again.outcomes] == [True, True]
    assert {p.name for p in again.folder.glob("0*.html")} == {"00_first.html", "01_second.html"}
    assert "1 + 1" in nbformat.reads((again.folder / "00_first.ipynb").read_text(), 4).cells[1].source


def test_parameters_and_profile_reach_the_lesson(tmp_path: Path) -> None:
    path = tmp_path / "notebooks" / "0_a" / "00_takes.ipynb"
    path.parent.mkdir(parents=True)
    source = "import os\nassert (n, profile, os.environ['MLOPS_PROFILE']) == (7, 'stack', 'stack'), (n, profile)"
    cells = [new_markdown_cell("# Takes"), parameter_cell("n = 1\nprofile = 'embedded'"), new_code_cell(source)]
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), path)
    record = pipeline.run_course(graph.read_course(tmp_path), runs=tmp_path / "runs", profile="stack", parameters={"n": 7})
    assert not record.failed, record.outcomes[0].error


def test_a_kernel_that_dies_is_a_failed_lesson(tmp_path: Path) -> None:
    write_lesson(tmp_path, "0_a/00_dies", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    write_lesson(tmp_path, "0_a/01_lives", "'alive'")
    record = pipeline.run_course(graph.read_course(tmp_path), runs=tmp_path / "runs")
    assert [o.status for o in record.outcomes] == ["failed", "ok"]
    assert "kernel died" in record.outcomes[0].error


def test_the_lesson_limit_counts_all_cells_together(tmp_path: Path) -> None:
    write_lesson(tmp_path, "0_a/00_slow", *["import time\ntime.sleep(3)"] * 20)
    limits = pipeline.Limits(lesson=6, cell=30)
    outcome = pipeline.run_lesson(graph.read_course(tmp_path)[0], tmp_path / "out", limits=limits)
    assert outcome.status == "failed"
    assert outcome.error.startswith("time limit")


def test_lessons_that_need_nothing_run_side_by_side_and_each_in_its_own_folder(tmp_path: Path) -> None:
    "Each waits for the other: one after the other, both would fail."
    for name, other in (("0_a/00_one", "two"), ("1_b/10_two", "one")):
        source = (
            "import os, pathlib, time\n"
            f"here = pathlib.Path({str(tmp_path)!r}, {name.rpartition('_')[2]!r})\n"
            f"here.touch()\nother = pathlib.Path({str(tmp_path)!r}, {other!r})\n"
            "until = time.monotonic() + 100\n"
            "while not other.exists():\n    assert time.monotonic() < until, 'nobody came'\n    time.sleep(0.05)\n"
            f"assert os.getcwd().endswith({name.split('/')[0]!r}), os.getcwd()"
        )
        write_lesson(tmp_path, name, source)
    here = os.getcwd()
    record = pipeline.run_course(graph.read_course(tmp_path), runs=tmp_path / "runs", jobs=2)
    assert [(o.name, o.status) for o in record.outcomes] == [("0_a/00_one", "ok"), ("1_b/10_two", "ok")], [o.error for o in record.outcomes]
    assert os.getcwd() == here


def test_an_interruption_ends_the_kernels_that_run_and_the_next_run_goes_on(tmp_path: Path) -> None:
    write_lesson(tmp_path, "0_a/00_quick", "1 + 1")
    once, pid = tmp_path / "once", tmp_path / "pid"
    write_lesson(tmp_path, "0_a/01_long", f"import os, pathlib, time\nif not pathlib.Path({str(once)!r}).exists():\n    pathlib.Path({str(once)!r}).touch()\n    pathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\n    time.sleep(600)")

    class Interrupt(pipeline.Watcher):
        def lesson_ended(self, outcome: pipeline.Outcome) -> None:
            until(lambda: pid.exists() and pid.read_text(), "the long lesson is at work")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.run_course(graph.read_course(tmp_path), runs=tmp_path / "runs", watcher=Interrupt(), jobs=2)
    until(lambda: not psutil.pid_exists(int(pid.read_text())) or psutil.Process(int(pid.read_text())).status() == "zombie", "its kernel has ended", seconds=60)
    record = pipeline.run_course(graph.read_course(tmp_path), runs=tmp_path / "runs")
    assert [(o.status, o.kept) for o in record.outcomes] == [("ok", True), ("ok", False)]


def test_older_runs_can_be_deleted(tmp_path: Path) -> None:
    write_lesson(tmp_path, "0_a/00_first", "1 + 1")
    first = pipeline.run_course(graph.read_course(tmp_path), runs=tmp_path / "runs")
    second = pipeline.run_course(graph.read_course(tmp_path), runs=tmp_path / "runs")
    shutil.rmtree(first.folder)
    third = pipeline.run_course(graph.read_course(tmp_path), runs=tmp_path / "runs")
    for record in (second, third):
        assert [o.kept for o in record.outcomes] == [True]
        assert "00_first.html" in (record.folder / "index.html").read_text() and "kept" in (record.folder / "index.html").read_text()
        assert (record.folder / "00_first.html").is_file() and (record.folder / "00_first.ipynb").is_file()


def test_the_graph_runs_on_a_dask_cluster(tmp_path: Path) -> None:
    write_lesson(tmp_path, "0_a/00_good", "#| default_exp demo.good\n1 + 1")
    write_lesson(tmp_path, "0_a/01_bad", "#| default_exp demo.bad\n1 / 0")
    write_lesson(tmp_path, "0_a/02_needs_bad", "from mlops_lib.demo.bad import x")
    write_lesson(tmp_path, "0_a/03_last", "2 + 2")
    python, log = [sys.executable, "-m", "distributed.cli.dask_scheduler"], tmp_path / "log"
    note = tmp_path / "scheduler.json"
    environment = os.environ | {"DASK_DISTRIBUTED__ADMIN__EVENT_LOOP": "asyncio"}
    with log.open("wb") as out:
        about = {"stdout": out, "stderr": out, "env": environment, "cwd": tmp_path}
        local = ["--host", "127.0.0.1", "--no-dashboard"]
        scheduler = subprocess.Popen([*python, *local, "--port", "0", "--scheduler-file", str(note)], **about)
        worker = subprocess.Popen([sys.executable, "-m", "distributed.cli.dask_worker", "--no-dashboard", "--nthreads", "2", "--no-nanny", "--host", "127.0.0.1", "--scheduler-file", str(note)], **about)
    try:
        address = until(lambda: note.exists() and json.loads(note.read_text())["address"], "the scheduler is up", log)
        told: list[str] = []
        watcher = pipeline.Watcher()
        watcher.lesson_ended = lambda outcome: told.append(outcome.name)  # type: ignore[method-assign]
        course = graph.read_course(tmp_path)
        record = pipeline.run_course(course, runs=tmp_path / "runs", dask=address, watcher=watcher, fresh=True)
        assert [o.status for o in record.outcomes] == ["ok", "failed", "skipped", "ok"], [o.error for o in record.outcomes]
        assert "ZeroDivisionError" in record.outcomes[1].error and record.outcomes[2].error == "needs 0_a/01_bad"
        assert {p.name for p in record.folder.glob("0*.html")} == {"00_good.html", "01_bad.html", "03_last.html"}
        assert sorted(told) == [lesson.name for lesson in course]
    finally:
        for process in (worker, scheduler):
            process.terminate()
            process.wait(60)


def test_a_cluster_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import distributed

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("Timed out trying to connect")

    monkeypatch.setattr(distributed, "Client", refuse)
    write_lesson(tmp_path, "0_a/00_good", "1 + 1")
    with pytest.raises(ConnectionError, match="No Dask scheduler answers at tcp://127.0.0.1:9"):
        pipeline.run_course(graph.read_course(tmp_path), runs=tmp_path / "runs", dask="tcp://127.0.0.1:9")


def test_how_many_lessons_run_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    free = {"available": 6e9}
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), free))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert pipeline.how_many() == 2, "6 GB are room for two"
    free["available"] = 1e9
    assert pipeline.how_many() == 1, "one runs in any case"
    free["available"] = 1e12
    assert [pipeline.how_many(), pipeline.how_many(3), pipeline.how_many(30)] == [8, 3, 30]
    assert pipeline.how_many(8, "stack") == 1, "its servers are shared"


def test_magics_and_awaits_do_not_hide_imports(tmp_path: Path) -> None:
    write_lesson(tmp_path, "0_a/00_magic", "%matplotlib inline\n!echo hi\nfrom mlops_lib.data.tables import (\n    load_reviews,\n)", "await f()")
    assert graph.read_course(tmp_path)[0].imports == {"mlops_lib.data.tables.load_reviews"}


@pytest.mark.parametrize("content", ["", "{", '{"nbformat": 4}', "\x00\xff"])
def test_a_file_that_is_no_notebook_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "notebooks" / "0_a" / "00_broken.ipynb"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(ValueError, match="00_broken.ipynb is not a notebook"):
        graph.read_course(tmp_path)


def test_the_report_escapes_what_a_lesson_says() -> None:
    record = pipeline.RunRecord(Path("run"), "embedded", {"reviews": "<script>"})
    record.outcomes = [pipeline.Outcome("0_a/00_x", "<b>", "failed", error="<script>", traceback="<script>")]
    assert "<script>" not in pipeline.report_html(record)


class FakeServer:
    "Answers kernels.connect as told: None stands for a server that is ready."

    def __init__(self, *answers: str | None) -> None:
        self.answers = list(answers)

    def __call__(self, names: list[str], environ: dict[str, str]):
        if answer := self.answers.pop(0):
            raise kernels.KernelServerError(answer)
        return socket.socket()


def test_a_run_takes_forked_kernels_as_soon_as_there_are_any_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lesson(tmp_path, "0_a/00_light", "1 + 1")
    write_lesson(tmp_path, "0_a/01_heavy", "import mlops_lib.settings")
    light, heavy = graph.read_course(tmp_path)
    monkeypatch.setattr(kernels, "install", lambda environ: ["numpy"])
    monkeypatch.setattr(kernels, "connect", FakeServer("the server is starting", "the server is importing numpy", None, None, "the server is starting"))
    told: list[tuple[str, str]] = []
    choose = pipeline.KernelChoice("embedded", lambda kernel, why: told.append((kernel, why)))
    chosen = [choose(lesson) for lesson in (light, heavy, heavy, heavy, light, heavy)]
    assert chosen == ["python3", "python3", "python3", "mlops", "mlops", "python3"]
    assert told == [("python3", "the server is starting"), ("mlops", ""), ("python3", "the server is starting")]


def test_a_fresh_run_and_one_without_a_place_for_the_kernel_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    lesson = graph.Lesson(Path("0_a/00_x.ipynb"), "x", None, frozenset({"mlops_lib.settings"}), (), "")
    assert pipeline.KernelChoice("embedded", lambda kernel, why: told.append(why), fresh=True)(lesson) == "python3"

    def refuse(environ: dict[str, str]) -> list[str]:
        raise PermissionError(13, "read-only", "/usr/share/jupyter")

    monkeypatch.setattr(kernels, "install", refuse)
    assert pipeline.KernelChoice("embedded", lambda kernel, why: told.append(why))(lesson) == "python3"
    assert told[0] == "asked for"
    assert "/usr/share/jupyter" in told[1]
