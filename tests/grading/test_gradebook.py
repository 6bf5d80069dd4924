"""nbgrader reads what our grader found: its API, its exporter, its pages, its own command."""

import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from nbgrader import api
from nbgrader.apps import NbGraderAPI
from nbgrader.plugins import CsvExportPlugin
from support import until
from traitlets.config import Config, PyFileConfigLoader

from mlops_lib.course.gradebook import as_run, close_parents, write_gradebook
from mlops_lib.course.grading import Exercise, Graded, Mark, Submission, plan
from mlops_lib.course.reports import Late, parse_due, with_penalties

from .conftest import ROOT, answers, exercise, handed_in
from .test_honest import HONEST

NAMES = ("0_start/00_settings", "1_data/10_tables")
DUE = parse_due("2026-11-30T12:00+01:00")


@pytest.fixture(scope="module")
def exercises() -> list[Exercise]:
    return [exercise(name) for name in NAMES]


def work(student: str, one: Exercise, share: int, when: str = "2026-11-30T10:00:00+00:00") -> tuple[Submission, Graded]:
    "A notebook in which the first tests got their points."
    marks = tuple(Mark(c.grade_id, c.points, c.points, "ok") if i < share else Mark(c.grade_id, 0, c.points, "wrong", "<b>no</b>") for i, c in enumerate(one.tests))
    path, score = f"{one.name}.ipynb", sum(m.points for m in marks)
    body = json.dumps(handed_in(answers(one.name) if share else {}, one.name)).encode()
    return Submission(student, path, body, when=when, clock="file"), Graded(student, one.name, score, 10, marks[-1].reason, "", marks, (), path)


def class_of(exercises: list[Exercise]) -> tuple[list[Submission], list[Graded]]:
    one, two = exercises
    late = "2026-12-01T12:00:00+00:00"
    pairs = [work("anna", one, 3), work("anna", two, 3), work("ben, <i>", one, 1, late), work("carl", two, 0)]
    submissions, results = [p[0] for p in pairs], [p[1] for p in pairs]
    submissions.append(Submission("dora", "x.ipynb", b"{", when=late, clock="file"))
    results.append(Graded("dora", one.name, 0, 10, "unreadable", "no notebook", path="x.ipynb"))
    results.append(Graded("eve", "y.ipynb", 0, 0, "unreadable", "belongs to no exercise", path="y.ipynb"))
    return submissions, with_penalties(results, submissions, Late(DUE, 0.25))


def exported(folder: Path) -> str:
    with api.Gradebook(f"sqlite:///{folder / 'gradebook.db'}") as book:
        CsvExportPlugin(to=str(folder / "export.csv")).export(book)
    return (folder / "export.csv").read_text()


def test_nbgrader_reads_the_points(tmp_path: Path, exercises: list[Exercise]) -> None:
    submissions, results = class_of(exercises)
    write_gradebook(tmp_path, results, submissions, exercises, ROOT, DUE)
    with api.Gradebook(f"sqlite:///{tmp_path / 'gradebook.db'}") as book:
        assert {a.name: [n.name for n in a.notebooks] for a in book.assignments} == {"0_start": ["00_settings"], "1_data": ["10_tables"]}
        assert len(book.students) == 5
        ben = book.find_submission("0_start", next(s.id for s in book.students if s.id.startswith("ben")))
        assert (ben.score, ben.max_score, ben.late_submission_penalty, ben.needs_manual_grade) == (2, 10, 1, False), "25 hours late: two days begun"
        assert ben.total_seconds_late == 25 * 3600
        assert [(g.name, g.auto_score, g.failed_tests) for g in ben.notebooks[0].grades] == [("test-1", 2, False), ("test-2", 0, True), ("test-3", 0, True)]
        assert book.find_submission("0_start", "dora").score == 0
        assert book.average_assignment_score("1_data") == 5
    rows = [line.split(",") for line in exported(tmp_path).splitlines()]
    assert len(rows) == 1 + 2 * 5
    anna = next(r for r in rows if r[0] == "0_start" and r[3] == "anna")
    assert anna[1:3] == ["2026-11-30 11:00:00", "2026-11-30 10:00:00"], "UTC, as nbgrader keeps times"
    assert anna[7:] == ["10.0", "0.0", "10.0", "10.0"]


def test_the_same_results_give_the_same_export_and_people_s_points_stay(tmp_path: Path, exercises: list[Exercise]) -> None:
    submissions, results = class_of(exercises)
    for name in ("one", "two"):
        write_gradebook(tmp_path / name, results[:: 1 if name == "one" else -1], submissions, exercises, ROOT, DUE)
    assert exported(tmp_path / "one") == exported(tmp_path / "two")
    files = [{str(p.relative_to(tmp_path / n)): p.read_bytes() for p in (tmp_path / n).rglob("*.*") if p.suffix != ".db"} for n in ("one", "two")]
    assert files[0] == files[1]
    assert "autograded/anna/0_start/00_settings.ipynb" in files[0]
    url = f"sqlite:///{tmp_path / 'one' / 'gradebook.db'}"
    with api.Gradebook(url) as book:
        book.find_grade("test-3", "00_settings", "0_start", "anna").manual_score = 4
        book.find_comment("task-1", "00_settings", "0_start", "anna").manual_comment = "Well done."
        book.db.commit()
    write_gradebook(tmp_path / "one", results, submissions, exercises, ROOT, DUE)
    write_gradebook(tmp_path / "one", [g for g in results if g.student == "carl"], submissions, exercises, ROOT, DUE)
    with api.Gradebook(url) as book:
        assert book.find_submission("0_start", "anna").score == 9
        assert book.find_comment("task-1", "00_settings", "0_start", "anna").comment == "Well done."


@pytest.mark.parametrize("name", [*HONEST][::4])
def test_the_notebook_as_run_is_the_same_work(name: str, exercises: list[Exercise]) -> None:
    made = HONEST[name]()
    again = as_run(made["cells"], exercises[0])
    assert [s.source for s in plan(again["cells"], exercises[0])[0]] == [s.source for s in plan(made["cells"], exercises[0])[0]]
    assert len({c["id"] for c in again["cells"]}) == len(again["cells"])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_formgrader_shows_the_class(tmp_path: Path, exercises: list[Exercise]) -> None:
    submissions, results = class_of(exercises)
    write_gradebook(tmp_path, results, submissions, exercises, ROOT, DUE)
    port = free_port()
    url = f"http://127.0.0.1:{port}/formgrader"
    options = ["--allow-root", "--no-browser", f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=t", f"--ServerApp.root_dir={tmp_path}"]
    extension = "--ServerApp.jpserver_extensions={'nbgrader.server_extensions.formgrader': True}"
    home = {k: str(tmp_path / ".jupyter" / k) for k in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")}

    def get(path: str) -> Any:
        request = urllib.request.Request(f"{url}/{path}", headers={"Authorization": "token t"})  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
                text = answer.read().decode()
        except urllib.error.HTTPError as e:
            return f"{e.code} {e.read()[:2000]!r}"
        except OSError:
            return None
        return json.loads(text) if path.startswith("api") else text

    with (tmp_path / "server.log").open("wb") as log:
        environment = os.environ | home | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        server = subprocess.Popen([sys.executable, "-m", "jupyter_server", *options, extension], cwd=tmp_path, env=environment, stdout=log, stderr=log)
    try:
        found = until(lambda: get("api/submissions/0_start"), "formgrader answers", tmp_path / "server.log", seconds=180)
        assert isinstance(found, list), found
        shown = {s["student"]: (s["score"], s["max_score"], s["autograded"], s["needs_manual_grade"]) for s in found if s["submitted"]}
        assert shown["anna"] == (10, 10, True, False)
        assert sorted(s[:2] for s in shown.values()) == [(0, 10), (2, 10), (10, 10)]
        notebooks = get("api/submitted_notebooks/0_start/00_settings")
        (ben,) = (n for n in notebooks if n["student"].startswith("ben"))
        page = get(f"submissions/{ben['id']}/")
        assert "nbgrader-test-2" in page or "test-2" in page
        assert "<b>no</b>" not in page, "what a student's process said is text"
        assert {a["name"] for a in get("api/assignments")} >= {"0_start", "1_data"}
    finally:
        server.terminate()
        server.wait(60)


def test_nbgrader_autograde_uses_the_sandbox(tmp_path: Path, exercises: list[Exercise]) -> None:
    hostile = handed_in(answers() | {"task-3": "import sys\nprint('noise', file=sys.stderr)\n" + answers()["task-3"], "task-1": "import os\nos.abort()"})
    hostile["cells"].append(dict(hostile["cells"][3]))  # nbgrader alone gives up on a cell that is there twice
    submission = Submission("ben", "00_settings.ipynb", json.dumps(hostile).encode())
    zero = Graded("ben", NAMES[0], 0, 10, "wrong", "", tuple(Mark(c.grade_id, 0, c.points, "wrong") for c in exercises[0].tests), (), submission.path)
    write_gradebook(tmp_path, [zero], [submission], exercises, ROOT)
    config: Config = PyFileConfigLoader("nbgrader_config.py", str(tmp_path)).load_config()
    config.CourseDirectory.root = str(tmp_path)
    try:
        told = NbGraderAPI(config=config).autograde("0_start", "ben")
    finally:
        close_parents()
    assert told["success"], told
    with api.Gradebook(f"sqlite:///{tmp_path / 'gradebook.db'}") as book:
        scores = {g.name: g.auto_score for g in book.find_submission("0_start", "ben").notebooks[0].grades}
    assert scores["test-1"] == 0
    assert scores["test-2"] == 3, "a crash in question 1 costs nothing on question 2"
