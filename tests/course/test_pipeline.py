"""The runner under what really happens: a kill, a dead kernel, a notebook that is none."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from mlops_lib.course import pipeline


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
        "from pathlib import Path; from mlops_lib.course.pipeline import *;"
        f"run_course(read_course(Path({str(tmp_path)!r})), runs=Path({str(tmp_path / 'runs')!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    while not marker.exists():
        assert process.poll() is None, "the run ended before its second lesson started"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()

    record = pipeline.run_course(pipeline.read_course(tmp_path), runs=tmp_path / "runs")
    assert [(o.status, o.kept) for o in record.outcomes] == [("ok", True), ("ok", False)]
    assert not list((tmp_path / "runs").rglob("*.part*"))
    for path in (tmp_path / "runs").rglob("*.json"):
        json.loads(path.read_text())


def test_an_edit_invalidates_what_an_interrupted_run_had_done(tmp_path: Path) -> None:
    write_lesson(tmp_path, "0_a/00_first", "1 + 1")
    first = pipeline.run_course(pipeline.read_course(tmp_path), runs=tmp_path / "runs")
    write_lesson(tmp_path, "0_a/00_first", "1 + 2")
    again = pipeline.run_course(pipeline.read_course(tmp_path), runs=tmp_path / "runs", resume=True)
    assert first.outcomes[0].key != again.outcomes[0].key
    assert not again.outcomes[0].kept


def test_every_lesson_has_its_page_when_the_run_has_ended_even_if_the_run_before_died_without_it(tmp_path: Path) -> None:
    write_lesson(tmp_path, "0_a/00_first", "1 + 1")
    write_lesson(tmp_path, "0_a/01_second", "2 + 2")
    first = pipeline.run_course(pipeline.read_course(tmp_path), runs=tmp_path / "runs")
    assert {p.name for p in first.folder.glob("0*.html")} == {"00_first.html", "01_second.html"}
    (first.folder / "00_first.html").unlink()
    again = pipeline.run_course(pipeline.read_course(tmp_path), runs=tmp_path / "runs", resume=True)
    assert [o.kept for o in again.outcomes] == [True, True]
    assert {p.name for p in again.folder.glob("0*.html")} == {"00_first.html", "01_second.html"}
    assert "1 + 1" in nbformat.reads((again.folder / "00_first.ipynb").read_text(), 4).cells[1].source


def test_the_key_of_a_file_parameter_is_its_content(tmp_path: Path) -> None:
    path = tmp_path / "notebooks" / "0_a" / "00_reads.ipynb"
    path.parent.mkdir(parents=True)
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Reads"), parameter_cell("reviews = None")]), path)
    lesson, data = pipeline.read_lesson(path), tmp_path / "r.jsonl"
    data.write_text("a")
    before = pipeline.lesson_key(lesson, "embedded", {"reviews": str(data)})
    data.write_text("b")
    assert pipeline.lesson_key(lesson, "embedded", {"reviews": str(data)}) != before
    assert pipeline.lesson_key(lesson, "embedded", {"other": 1}) == pipeline.lesson_key(lesson, "embedded", {})


def test_parameters_and_profile_reach_the_lesson(tmp_path: Path) -> None:
    path = tmp_path / "notebooks" / "0_a" / "00_takes.ipynb"
    path.parent.mkdir(parents=True)
    source = "import os\nassert (n, profile, os.environ['MLOPS_PROFILE']) == (7, 'stack', 'stack'), (n, profile)"
    cells = [new_markdown_cell("# Takes"), parameter_cell("n = 1\nprofile = 'embedded'"), new_code_cell(source)]
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), path)
    record = pipeline.run_course(pipeline.read_course(tmp_path), runs=tmp_path / "runs", profile="stack", parameters={"n": 7})
    assert not record.failed, record.outcomes[0].error


def test_a_kernel_that_dies_is_a_failed_lesson(tmp_path: Path) -> None:
    write_lesson(tmp_path, "0_a/00_dies", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    write_lesson(tmp_path, "0_a/01_lives", "'alive'")
    record = pipeline.run_course(pipeline.read_course(tmp_path), runs=tmp_path / "runs")
    assert [o.status for o in record.outcomes] == ["failed", "ok"]
    assert "kernel died" in record.outcomes[0].error


def test_the_lesson_limit_counts_all_cells_together(tmp_path: Path) -> None:
    write_lesson(tmp_path, "0_a/00_slow", *["import time\ntime.sleep(3)"] * 20)
    limits = pipeline.Limits(lesson=6, cell=30)
    outcome = pipeline.run_lesson(pipeline.read_course(tmp_path)[0], tmp_path / "out", limits=limits)
    assert outcome.status == "failed"
    assert outcome.error.startswith("time limit")


def test_magics_and_awaits_do_not_hide_imports(tmp_path: Path) -> None:
    write_lesson(tmp_path, "0_a/00_magic", "%matplotlib inline\n!echo hi\nfrom mlops_lib.data.tables import (\n    load_reviews,\n)", "await f()")
    assert pipeline.read_course(tmp_path)[0].imports == {"mlops_lib.data.tables.load_reviews"}


@pytest.mark.parametrize("content", ["", "{", '{"nbformat": 4}', "\x00\xff"])
def test_a_file_that_is_no_notebook_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "notebooks" / "0_a" / "00_broken.ipynb"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(ValueError, match="00_broken.ipynb is not a notebook"):
        pipeline.read_course(tmp_path)


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
            raise pipeline.kernels.KernelServerError(answer)
        return socket.socket()


def test_a_run_takes_forked_kernels_as_soon_as_there_are_any_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lesson(tmp_path, "0_a/00_light", "1 + 1")
    write_lesson(tmp_path, "0_a/01_heavy", "import mlops_lib.settings")
    light, heavy = pipeline.read_course(tmp_path)
    monkeypatch.setattr(pipeline.kernels, "install", lambda environ: ["numpy"])
    monkeypatch.setattr(pipeline.kernels, "connect", FakeServer("the server is starting", "the server is importing numpy", None, None, "the server is starting"))
    told: list[tuple[str, str]] = []
    choose = pipeline.KernelChoice("embedded", lambda kernel, why: told.append((kernel, why)))
    chosen = [choose(lesson) for lesson in (light, heavy, heavy, heavy, light, heavy)]
    assert chosen == ["python3", "python3", "python3", "mlops", "mlops", "python3"]
    assert told == [("python3", "the server is starting"), ("mlops", ""), ("python3", "the server is starting")]


def test_a_fresh_run_and_one_without_a_place_for_the_kernel_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    lesson = pipeline.Lesson(Path("0_a/00_x.ipynb"), "x", None, frozenset({"mlops_lib.settings"}), (), "")
    assert pipeline.KernelChoice("embedded", lambda kernel, why: told.append(why), fresh=True)(lesson) == "python3"

    def refuse(environ: dict[str, str]) -> list[str]:
        raise PermissionError(13, "read-only", "/usr/share/jupyter")

    monkeypatch.setattr(pipeline.kernels, "install", refuse)
    assert pipeline.KernelChoice("embedded", lambda kernel, why: told.append(why))(lesson) == "python3"
    assert told[0] == "asked for"
    assert "/usr/share/jupyter" in told[1]
