"""A class from end to end: two real exercises, files that cannot be read, the same bytes again."""

import io
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mlops_lib.course.grading import (
    GradingError,
    Submission,
    find_submissions,
    grade_class,
    guessable,
    read_exercises,
    split_test,
    which_exercise,
)
from mlops_lib.course.reports import safe_name, write_exports
from mlops_lib.course.sandbox import Limits

from .conftest import ROOT, answers, exercise, handed_in

REAL = ("0_start/00_settings", "1_data/10_tables")
LIMITS = Limits(seconds=10)


@pytest.fixture
def class_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "class"
    for name in REAL:
        for student, given in (("solved", answers(name)), ("unsolved", {})):
            path = folder / student / f"{name}.ipynb"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(handed_in(given, name)))
    return folder


def test_solved_gets_all_and_unsolved_nothing_and_a_reason(class_folder: Path, tmp_path: Path) -> None:
    exercises = [exercise(name) for name in REAL]
    found = find_submissions(class_folder)
    results = grade_class(found, exercises, ROOT, tmp_path / "grades.db", LIMITS)
    assert [(g.student, g.exercise, g.score, g.max_score, g.reason) for g in results] == [
        ("solved", REAL[0], 10, 10, "ok"),
        ("solved", REAL[1], 10, 10, "ok"),
        ("unsolved", REAL[0], 0, 10, "unsolved"),
        ("unsolved", REAL[1], 0, 10, "unsolved"),
    ]
    assert all("Not solved yet" in m.message for g in results if g.student == "unsolved" for m in g.marks)
    first = {n: p.read_bytes() for n, p in write_exports(results, tmp_path / "one").items()}
    told: list[object] = []
    assert grade_class(found, exercises, ROOT, tmp_path / "grades.db", LIMITS, tell=told.append) == results
    assert not told, "everything was in the database"
    again = grade_class(list(reversed(found)), exercises, ROOT, tmp_path / "grades.db", LIMITS, workers=3, regrade=True)
    assert {n: p.read_bytes() for n, p in write_exports(again, tmp_path / "two").items()} == first
    assert first["lms.csv"] == b"username,grade\nsolved,100.00\nunsolved,0.00\n"
    submissions = json.loads(first["grades.json"])["submissions"]
    assert {"student", "score", "max_score", "reason"} <= submissions[0].keys()
    table = first["grades.csv"].decode().splitlines()
    assert len(table[0].split(",")) == 2 + 6, "a column for each question"


def test_an_interrupted_run_goes_on_where_it_stopped(class_folder: Path, tmp_path: Path) -> None:
    exercises, found = [exercise(name) for name in REAL], find_submissions(class_folder)
    done: list[str] = []

    def stop(graded: object) -> None:
        done.append(str(graded))
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grade_class(found, exercises, ROOT, tmp_path / "grades.db", LIMITS, workers=1, tell=stop)
    rest: list[object] = []
    assert len(grade_class(found, exercises, ROOT, tmp_path / "grades.db", LIMITS, tell=rest.append)) == 4
    assert len(rest) == 2


GRADER = """
import os, sys
from pathlib import Path
from mlops_lib.course.grading import find_submissions, grade_class, read_exercise
from mlops_lib.course.reports import write_exports
from mlops_lib.course.sandbox import Limits
root, folder, out, names, stop = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4].split(), int(sys.argv[5])
told = []
def tell(graded):
    told.append(graded)
    if len(told) == stop:
        os.kill(os.getpid(), 9)
exercises = [read_exercise(root / "solutions" / f"{n}.ipynb", root / "exercises" / f"{n}.ipynb") for n in names]
write_exports(grade_class(find_submissions(folder), exercises, root, out / "grades.db", Limits(seconds=20), workers=1, tell=tell), out)
print(len(told))
"""


def test_killed_and_begun_again_gives_the_same_files(class_folder: Path, tmp_path: Path) -> None:
    (class_folder / "gina.ipynb").write_text("no notebook")

    def run(out: str, stop: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", GRADER, str(ROOT), str(class_folder), str(tmp_path / out), " ".join(REAL), str(stop)]
        return subprocess.run(command, capture_output=True, text=True)

    assert run("killed", 2).returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "grades.csv").exists()
    again, whole = run("killed", 0), run("whole", 0)
    assert (again.returncode, whole.returncode) == (0, 0), again.stderr + whole.stderr
    assert (again.stdout, whole.stdout) == ("2\n", "4\n"), "what was graded is not graded again"
    files = [{str(p.relative_to(tmp_path / out)): p.read_bytes() for p in (tmp_path / out).rglob("*") if p.is_file() and "grades.db" not in p.name} for out in ("killed", "whole")]
    assert files[0] == files[1]
    assert len(files[0]) == 4 + 3


def zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, body in files.items():
            archive.writestr(name, body)
    return out.getvalue()


def test_what_is_handed_in_is_found(tmp_path: Path) -> None:
    body = json.dumps(handed_in({})).encode()
    (tmp_path / "deep" / "0_start").mkdir(parents=True)
    (tmp_path / "deep" / "0_start" / "00_settings.ipynb").write_bytes(body)
    (tmp_path / "deep" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "deep" / ".ipynb_checkpoints" / "00_settings-checkpoint.ipynb").write_bytes(body)
    (tmp_path / "flat.ipynb").write_bytes(body)
    (tmp_path / "packed.zip").write_bytes(zipped({"../../etc/x.ipynb": body, "__MACOSX/._x.ipynb": b"", "notes.txt": b""}))
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 no zip")
    (tmp_path / "bomb.zip").write_bytes(zipped({"b.ipynb": bytes(30 << 20)}))
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "00_settings.ipynb").symlink_to(ROOT / "solutions/0_start/00_settings.ipynb")
    (tmp_path / "thief").symlink_to(tmp_path / "deep")
    found = {s.student: s for s in find_submissions(tmp_path)}
    assert set(found) == {"deep", "flat", "packed", "broken", "bomb", "linked"}
    assert found["deep"].body == found["flat"].body == found["packed"].body == body
    assert all(found[who].problem and not found[who].body for who in ("broken", "bomb", "linked"))
    assert found["deep"].clock == found["packed"].clock == "file"
    (tmp_path / "deep" / "timestamp.txt").write_text("2026-11-30 20:00:00.250000 UTC\n")
    os.utime(tmp_path / "flat.ipynb", (0, 0))
    found = {s.student: s for s in find_submissions(tmp_path)}
    assert (found["deep"].when, found["deep"].clock) == ("2026-11-30T20:00:00.250000+00:00", "timestamp.txt")
    assert (found["flat"].when, found["flat"].clock) == ("1970-01-01T00:00:00+00:00", "file")
    whole = tmp_path / "class.zip"
    whole.write_bytes(zipped({"anna/0_start/00_settings.ipynb": body, "ben.ipynb": body}))
    assert [s.student for s in find_submissions(whole)] == ["anna", "ben"]
    assert {s.clock for s in find_submissions(whole)} == {"zip"}


def test_nothing_to_grade_is_said(tmp_path: Path) -> None:
    with pytest.raises(GradingError, match="no notebook"):
        find_submissions(tmp_path)
    with pytest.raises(GradingError, match="no folder or zip"):
        find_submissions(tmp_path / "nowhere")


def test_a_renamed_notebook_is_known_by_its_cells() -> None:
    exercises = [exercise(name) for name in REAL]
    for name in REAL:
        body = json.dumps(handed_in(answers(name), name)).encode()
        found = which_exercise(Submission("x", "Untitled (3).ipynb", body), exercises)
        assert found is not None
        assert found.name == name
    assert which_exercise(Submission("x", "y.ipynb", b'{"cells": []}'), exercises) is None


def test_names_of_students_are_no_paths_and_no_formulas(tmp_path: Path) -> None:
    from mlops_lib.course.grading import Graded, Mark

    names = ["../../x", "=1+2", "a/b", "a_b", "Ü", "<script>"]
    assert len({safe_name(n) for n in names}) == len(names)
    results = [Graded(n, "e", 1, 1, "ok", marks=(Mark("q", 1, 1, "ok"),)) for n in sorted(names)]
    written = write_exports(results, tmp_path / "out")
    assert all(p.parent in (tmp_path / "out", tmp_path / "out" / "feedback") for p in written.values())
    assert "\n'=1+2," in written["grades.csv"].read_text()
    assert not any("<script>" in p.read_text() for n, p in written.items() if n.endswith(".html"))


def test_every_exercise_of_the_course_can_be_graded() -> None:
    exercises = read_exercises(ROOT)
    assert len(exercises) > 50
    assert all(e.tests and all(t.driver and t.compare and t.points for t in e.tests) for e in exercises)


def test_a_test_without_hidden_parts_is_refused() -> None:
    with pytest.raises(GradingError, match="forged"):
        split_test("assert f(1) == 2", "x")
    assert guessable([True, {"a": None}])
    assert not guessable(["x"])
