"""What students get: checks at once, hints in steps, progress that is not lost."""

import json
import multiprocessing
import os
import signal
import sqlite3
import threading
import time
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell
from support import short

from mlops_lib.course.exercises import hint_problems, release, solutions
from mlops_lib.course.grading import LIMITS, Submission, grade, parent_for, read_exercise
from mlops_lib.course.pipeline import ENVIRONMENT, ipc_config
from mlops_lib.course.students import (
    Exercise,
    Mark,
    Note,
    Question,
    Standing,
    check,
    hint,
    next_step,
    open_record,
    plain,
    progress,
    read_exercises,
    read_standings,
    record_marks,
    run_check,
    run_checks,
    suggest,
    time_limit,
)
from mlops_lib.settings import Settings

ROOT = Path(__file__).parents[2]
NAME = "0_demo/1_double"
TEST = 'assert double(2) == 4, "double(2) should be 4"'


@pytest.fixture
def workspace(tmp_path: Path) -> Settings:
    "A workspace with one exercise of two questions."
    questions = [
        {"id": "test-1", "points": 2, "title": "Twice", "task": "task-1", "source": TEST},
        {"id": "test-2", "points": 3, "title": "Half", "task": "task-2", "source": "x = half(4)\nassert x == 2, 'half of 4 is 2'"},
    ]
    (tmp_path / "exercises").mkdir()
    checks = {NAME: {"title": "Double", "questions": questions, "names": {"double": "task-1", "half": "task-2"}}}
    (tmp_path / "exercises" / "checks.json").write_text(json.dumps(checks))
    (tmp_path / "exercises" / "hints.json").write_text(json.dumps({NAME: {"test-1": ["one", "two", "three"]}}))
    return Settings(root=tmp_path)


def ask(code: str, test: str = TEST, seconds: float = 20) -> Mark:
    "What a check says of a student's code."
    space: dict = {"__name__": "__main__"}
    exec(code, space)
    exercise = Exercise(NAME, "", (Question("test-1", 2, "", "task-1", test),), {"double": "task-1"})
    return run_checks(exercise, space, seconds)[0]


@pytest.mark.parametrize(
    ("code", "reason", "words"),
    [
        ("double = lambda x: 2 * x", "ok", ""),
        ("double = lambda x: x", "wrong", "double(2) should be 4"),
        ("def double(x): raise NotImplementedError('Not solved yet: replace this line with your code.')", "not solved", "not solved yet"),
        ("", "not run", "run the cell task-1"),
        ("def double(x):\n\n    return x / 0", "error", "in double(), line 3"),
        ("double = None", "error", "when this was checked: assert double(2)"),
        ("def double(x): raise SystemExit(3)", "error", "SystemExit: 3"),
        ("def double(x): return double(x)", "error", "without an end"),
        ("def double(x): return dubble(x)", "error", "'dubble' is not defined in double()"),
        ("def double(x): raise KeyboardInterrupt", "stopped", "you stopped it"),
        ("class E(Exception):\n    def __str__(self): raise self\ndef double(x): raise E", "error", "cannot be shown"),
        ("def double(x): raise ValueError('\\x1b[31m' + 'x' * 9999 + '\\n<b>')", "error", "ValueError: xxx"),
    ],
)
def test_every_end_of_a_check_has_a_reason_and_words(code: str, reason: str, words: str) -> None:
    mark = ask(code)
    assert (mark.reason, words in mark.message) == (reason, True), mark
    assert len(mark.message) <= 301
    assert "\x1b" not in mark.message
    assert mark.points == (2 if reason == "ok" else 0)


@pytest.mark.parametrize("loop", ["pass", "try: int('x')\n  except Exception: pass", "try: sum([1])\n  except: pass", "import time; time.sleep(60)"])
def test_a_loop_without_an_end_is_ended(loop: str) -> None:
    assert ask(f"def double(x):\n while True:\n  {loop}", seconds=0.3).reason == "time"
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_an_awaiting_loop_is_ended_and_the_notebooks_loop_goes_on() -> None:
    import asyncio

    test = "import asyncio\nwhile True:\n    await asyncio.sleep(0)"

    async def notebook() -> tuple[str, str]:
        return ask("", test, seconds=0.3).reason, ask("", "import asyncio\nassert await asyncio.sleep(0, 5) == 5").reason

    assert asyncio.run(notebook()) == ("time", "ok")


def test_outside_the_main_thread_there_is_no_bell_and_no_failure() -> None:
    ended = []

    def work() -> None:
        with time_limit(0.01):
            ended.append(ask("double = lambda x: 2 * x").reason)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended == ["ok"]


def test_the_bell_of_somebody_else_is_put_back() -> None:
    def mine(*_: object) -> None: ...

    before = signal.signal(signal.SIGALRM, mine)
    try:
        assert ask("double = lambda x: 2 * x").reason == "ok"
        assert signal.getsignal(signal.SIGALRM) is mine
    finally:
        signal.signal(signal.SIGALRM, before)


def test_names_are_left_as_they_were_and_prints_are_not_shown(capfd: pytest.CaptureFixture[str]) -> None:
    test = "import sys\nhelper = 1\nx = 'changed'\nprint('loud')\nprint('loud', file=sys.stderr)\ndel kept"
    space = {"x": "mine", "kept": "also mine"}
    marks = run_checks(Exercise(NAME, "", (Question("test-1", 1, "", "", test),), {}), space)
    assert marks[0].reason == "ok"
    assert {k: v for k, v in space.items() if k != "__builtins__"} == {"x": "mine", "kept": "also mine"}
    assert capfd.readouterr() == ("", "")


def test_a_later_check_may_use_what_an_earlier_one_made() -> None:
    first, second = Question("test-1", 1, "", "", "def helper(): return x"), Question("test-2", 1, "", "", "assert helper() == 5")
    assert [m.reason for m in run_checks(Exercise(NAME, "", (first, second), {}), {"x": 5})] == ["ok", "ok"]
    assert run_check(second, Exercise(NAME, "", (), {}), {}).reason == "error"


def test_check_reads_the_released_checks_and_counts_a_try(workspace: Settings) -> None:
    told = check("double", {"double": lambda x: 2 * x, "half": lambda x: x}, at=workspace)
    assert [m.points for m in told.marks] == [2, 0]
    assert "half of 4 is 2" in repr(told)
    assert 'hint("test-2")' in told.below[0]
    done = check("double", {"double": lambda x: 2 * x, "half": lambda x: x // 2}, at=workspace)
    assert "All visible checks pass" in done.below[0]
    check("double", {}, at=workspace)
    shown = progress(workspace)
    assert shown.rows[1] == (NAME, "5 of 5", "3", "0"), "what was solved once stays solved"


@pytest.mark.parametrize("damage", [None, "", "{", "[]", '{"0_demo/1_double": {}}'])
def test_without_released_checks_all_three_say_so(workspace: Settings, damage: str | None) -> None:
    path = workspace.root / "exercises" / "checks.json"
    path.unlink() if damage is None else path.write_text(damage)
    for told in (check("double", {}, at=workspace), hint("test-1", "double", at=workspace), progress(workspace)):
        assert "mlops exercises release" in told.title


def test_what_a_students_code_says_cannot_become_html(workspace: Settings) -> None:
    def double(x: int) -> int:
        raise ValueError("<script>alert('x')</script><img src=x onerror=alert(1)>")

    seen = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            seen.append(tag)

    Tags().feed(check("double", {"double": double}, at=workspace)._repr_html_() + check("<img src=x>", {}, at=workspace)._repr_html_())
    assert "table" in seen
    assert not {"script", "img"} & set(seen)


@given(st.text())
def test_plain_is_one_short_line(text: str) -> None:
    told = plain(text)
    assert len(told) <= 301
    assert not set(told) & set("\x1b\x00\n\r\t")


def test_hints_come_in_steps_and_are_remembered(workspace: Settings) -> None:
    seen = [[row[1] for row in hint("test-1", "double", at=workspace).rows[1:]] for _ in range(4)]
    assert seen == [["one"], ["one", "two"], ["one", "two", "three"], ["one", "two", "three"]]
    assert f"notebooks/{NAME}.ipynb" in hint("task-1", "double", at=workspace).below[-1]
    assert "no hints" in hint("test-2", "double", at=workspace).below[-1]
    listed = hint(None, "double", at=workspace)
    assert [row[1] for row in listed.rows[1:]] == ["3 of 3 hints seen", "0 of 0 hints seen"]
    (workspace.root / "exercises" / "hints.json").write_text("{")
    assert "no hints" in hint("test-1", "double", at=workspace).title


def write(folder: Path, times: int) -> None:
    for _ in range(times):
        db, _ = open_record(folder)
        with closing(db):
            record_marks(db, NAME, [Mark("test-1", 2, "ok")])
            next_step(db, NAME, "test-1", 1_000)


def test_notebooks_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    several, times = 4, short(10, 100)
    spawn = multiprocessing.get_context("fork")
    processes = [spawn.Process(target=write, args=(tmp_path, times)) for _ in range(several)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    db, said = open_record(tmp_path)
    with closing(db):
        assert db.execute("select count(distinct run) from tries").fetchone() == (several * times,)
        assert db.execute("select count(*), max(step) from hints").fetchone() == (several * times, several * times)
    assert said == ""


def test_a_notebook_that_is_killed_while_it_writes_breaks_nothing(tmp_path: Path) -> None:
    counted = 0
    for _ in range(short(3, 20)):
        process = multiprocessing.get_context("fork").Process(target=write, args=(tmp_path, 10_000))
        process.start()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            db, said = open_record(tmp_path)
            with closing(db):
                now = db.execute("select count(*) from tries").fetchone()[0]
            if now > counted + 3:
                break
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        db, said = open_record(tmp_path)
        with closing(db):
            after = db.execute("select count(*) from tries").fetchone()[0]
        assert (said, after >= now) == ("", True)
        counted = after


@pytest.mark.parametrize("damage", [b"rubbish " * 100, None])
def test_a_broken_record_is_kept_aside_and_said(workspace: Settings, damage: bytes | None) -> None:
    check("double", {}, at=workspace)
    record = workspace.data_dir / "progress.db"
    broken = damage or record.read_bytes()[: record.stat().st_size // 2]
    for number in (1, 2):
        record.write_bytes(broken)
        told = check("double", {"double": lambda x: 2 * x}, at=workspace)
        aside = workspace.data_dir / f"progress-broken-{number}.db"
        assert aside.read_bytes() == broken
        assert str(aside) in repr(told)
    assert progress(workspace).rows[1][2] == "1", "the new record goes on"


def test_a_record_that_cannot_be_written_is_said_and_stops_nothing(workspace: Settings) -> None:
    (workspace.data_dir / "progress.db").mkdir(parents=True)
    told = check("double", {"double": lambda x: 2 * x}, at=workspace)
    assert told.marks[0].reason == "ok"
    assert "not recorded" in told.below[-1]
    assert hint("test-1", "double", at=workspace).rows, "hints are shown without a record, too"
    assert "0 of 5 points" in progress(workspace).title
    elsewhere = workspace.model_copy(update={"data_dir": workspace.root / "exercises" / "checks.json" / "data"})
    assert "could not be written" in progress(elsewhere).below[-1]


def test_the_page_is_the_whole_course_and_loads_nothing(tmp_path: Path) -> None:
    mine = Settings(root=ROOT, data_dir=tmp_path)
    progress(mine)
    page = (tmp_path / "progress.html").read_text()
    for name in read_exercises(ROOT):
        assert f"exercises/{name}.ipynb" in page
        assert f"notebooks/{name}.ipynb" in page
    assert not [word for word in ("http", "<script", "src=", "url(", "@import") if word in page]
    links = [link.split("'")[0] for link in page.split("<a href='")[1:]]
    assert all((tmp_path / link).exists() for link in links)


@given(st.lists(st.booleans(), min_size=6, max_size=6), st.lists(st.sets(st.integers(0, 5)), min_size=6, max_size=6))
def test_a_suggestion_is_open_and_ready_where_one_is(solved: list[bool], wants: list[set[int]]) -> None:
    course = [Exercise(f"0_a/{i}_x", "", (Question("q", 1, "", "", ""),), {}) for i in range(6)]
    needs = {e.name: [course[j].name for j in wants[i]] for i, e in enumerate(course)}
    found = suggest([Standing(e, int(s)) for e, s in zip(course, solved, strict=True)], needs)
    still = [i for i in range(6) if not solved[i]]
    ready = [i for i in still if all(solved[j] for j in wants[i])]
    assert (found and found[0]) == (course[(ready or still)[0]].name if still else None)


def test_points_of_a_question_that_is_gone_do_not_count(tmp_path: Path) -> None:
    exercise = Exercise(NAME, "", (Question("test-1", 2, "", "", ""),), {})
    db, _ = open_record(tmp_path)
    with closing(db):
        record_marks(db, NAME, [Mark("test-1", 9, "ok"), Mark("gone", 5, "ok")])
        assert [s.points for s in read_standings(db, {NAME: exercise})] == [2]


def run_cells(path: Path, data: Path, cells: list[str], sockets: Path) -> list[str]:
    "Run an exercise with more cells at its end in a real kernel; what those showed."
    notebook = nbformat.read(path, as_version=4)
    notebook.cells += [new_code_cell(c) for c in cells]
    env = os.environ | ENVIRONMENT | {"MLOPS_DATA_DIR": str(data), "JPY_SESSION_NAME": str(ROOT / "exercises" / path.parent.name / path.name)}
    where = {"metadata": {"path": str(ROOT / "exercises" / path.parent.name)}}
    NotebookClient(notebook, timeout=120, allow_errors=True, resources=where, config=ipc_config(sockets)).execute(env=env)
    return ["".join(o.get("text", "") or o.get("data", {}).get("text/plain", "") or str(o.get("evalue")) for o in c.outputs) for c in notebook.cells[-len(cells) :]]


@pytest.mark.parametrize("name", ["0_start/00_settings", "9_course/102_students"])
def test_a_student_checks_before_and_after_solving(name: str, tmp_path: Path) -> None:
    solution = ROOT / "solutions" / f"{name}.ipynb"
    unsolved = release(solution, tmp_path / name.split("/")[0] / solution.name)
    code = ["from mlops_lib.course.students import check, hint, progress", "check()", 'hint("test-1")', "progress()"]
    _, before, hinted, _ = run_cells(unsolved, tmp_path / "data", code, tmp_path)
    _, after, _, shown = run_cells(solution, tmp_path / "data", code, tmp_path)
    print(before, hinted, after, shown, sep="\n\n")
    most = read_exercises(ROOT)[name].points
    assert before.startswith(f"{name}: 0 of {most:g} points")
    assert after.startswith(f"{name}: {most:g} of {most:g} points")
    assert "All visible checks pass" in after
    assert "Traceback" not in before + hinted + after + shown
    assert "1 of 3" in hinted
    assert [line.split() for line in shown.splitlines() if line.startswith(name)] == [[name, f"{most:g}", "of", f"{most:g}", "2", "2"]]


def test_every_solved_exercise_passes_its_visible_checks_again_and_again(tmp_path: Path) -> None:
    code = ["from mlops_lib.course import students", "first = students.check(); first.marks", "second = students.check(); print(second); second.marks"]
    for solution in solutions(ROOT)[:: short(24, 1)]:
        *_, told = run_cells(solution, tmp_path / "data", code, tmp_path)
        print(told.splitlines()[0])
        assert "All visible checks pass" in told, f"{solution.stem}: {told}"


def test_every_exercise_says_how_to_get_help_and_can_be_found() -> None:
    for name in read_exercises(ROOT):
        last = json.loads((ROOT / "exercises" / f"{name}.ipynb").read_text())["cells"][-1]
        text = "".join(last["source"])
        assert (last["cell_type"], last["metadata"]) == ("markdown", {})
        assert f'check("{name}")' in text
    monitoring = json.loads((ROOT / "exercises" / "9_course" / "99_cli_monitoring.ipynb").read_text())["cells"][-1]
    assert "students.check()" in "".join(monitoring["source"]), "it has a `check` of its own"


def test_hints_give_no_line_away() -> None:
    wrong = {s.stem: problems for s in solutions(ROOT) if (problems := hint_problems(s)[1])}
    assert not wrong


def test_a_note_shows_itself_in_both_forms() -> None:
    note = Note("A & B", (("x", "y"), ("1", "<2>")), ("below",))
    assert repr(note) == "A & B\nx  y\n1  <2>\nbelow"
    assert "A &amp; B" in note._repr_html_()
    assert "&lt;2&gt;" in note._repr_html_()


def test_the_record_of_a_newer_sqlite_error_is_no_traceback(workspace: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(*_: object) -> None:
        raise sqlite3.OperationalError("database is locked")

    monkeypatch.setattr("mlops_lib.course.students.record_marks", locked)
    assert "database is locked" in check("double", {}, at=workspace).below[-1]


def test_a_notebook_that_is_handed_in_with_its_checks_costs_nothing() -> None:
    name = "0_start/00_settings"
    exercise = read_exercise(ROOT / "solutions" / f"{name}.ipynb", ROOT / "exercises" / f"{name}.ipynb")
    notebook = nbformat.read(ROOT / "solutions" / f"{name}.ipynb", as_version=4)
    helped = "from mlops_lib.course.students import check, hint, progress\nassert all((check(), hint('test-1'), progress()))"
    notebook.cells += [new_code_cell(helped), *nbformat.read(ROOT / "exercises" / f"{name}.ipynb", as_version=4).cells[-1:]]
    with parent_for(exercise, ROOT, LIMITS) as sandbox:
        graded = grade(Submission("s", "x.ipynb", nbformat.writes(notebook).encode()), exercise, sandbox)
    assert (graded.score, graded.reason) == (graded.max_score, "ok"), graded
