"""What lateness costs, and what is handed back."""

from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops_lib.course.grading import Graded, GradingError, Mark, Submission
from mlops_lib.course.reports import Late, parse_due, parse_share, safe_name, table, with_penalties, write_exports

SHARES = st.floats(0, 1)
SCORES = st.floats(0, 1000).map(lambda x: round(x, 2))
SECONDS = st.integers(-(10**7), 10**8)
ZONES = st.integers(-14 * 60, 14 * 60).map(lambda m: timezone(timedelta(minutes=m)))
DUE = st.datetimes(datetime(2020, 1, 1), datetime(2030, 1, 1), timezones=ZONES)  # noqa: DTZ001


def at(due: datetime, seconds: int, zone: timezone = UTC) -> str:
    return (due + timedelta(seconds=seconds)).astimezone(zone).isoformat()


@given(DUE, SHARES, SHARES, SCORES, SECONDS, SECONDS, ZONES)
def test_the_law(due: datetime, share: float, most: float, score: float, one: int, other: int, zone: timezone) -> None:
    late = Late(due, share, most)
    early, after = sorted((one, other))
    first, second = late.penalty(score, at(due, early)), late.penalty(score, at(due, after))
    assert 0 <= first <= second <= score, "monotone and bounded"
    assert second <= score * most + 0.005
    assert late.penalty(score, at(due, min(early, 0))) == 0, "nothing when on time"
    assert late.penalty(score, at(due, after, zone)) == second, "the zone in which a time is written does not matter"
    assert late.penalty(score, "") == 0


@given(DUE, SCORES, st.integers(0, 40), st.integers(1, 86_400))
def test_a_day_begun_is_a_day(due: datetime, score: float, days: int, seconds: int) -> None:
    late = Late(due, 0.01)
    assert late.penalty(score, at(due, days * 86_400 + seconds)) == pytest.approx(score * (days + 1) / 100, abs=0.0051)
    naive = (due + timedelta(days=days, seconds=seconds)).replace(tzinfo=None).isoformat()
    assert late.days(naive) == days + 1, "a time without a zone is on the clock of the due time"


@pytest.mark.parametrize("text", ["", "tomorrow", "10.11.2026", "2026-13-01"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(GradingError, match="is no time"):
        parse_due(text)


@pytest.mark.parametrize(("text", "share"), [("10%/day", 0.1), ("10 % / day", 0.1), ("0.25", 0.25), ("100%", 1), ("0", 0)])
def test_shares(text: str, share: float) -> None:
    assert parse_share(text) == share


@pytest.mark.parametrize("text", ["-1%", "101%", "ten", "10%/week", "", "nan"])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(GradingError, match="is no share"):
        parse_share(text)


def test_due_times() -> None:
    assert parse_due("2026-11-30").isoformat() == "2026-11-30T23:59:59+00:00"
    assert parse_due("2026-11-30T12:00+01:00").utcoffset() == timedelta(hours=1)
    with pytest.raises(GradingError, match="zone"):
        Late(datetime(2026, 1, 1))  # noqa: DTZ001


def graded(student: str, points: float = 4, audit: tuple[str, ...] = ()) -> Graded:
    marks = (Mark("test-1", points, 4, "ok" if points == 4 else "wrong", "look <here>"), Mark("test-2", 0, 6, "error", "NameError: x"))
    return Graded(student, "part/name", points, 10, "error", "NameError: x", marks, audit, "name.ipynb")


def test_raw_penalty_and_final_are_in_every_file(tmp_path: Path) -> None:
    found = [Submission("anna", "name.ipynb", when="2026-12-01T00:00:00+00:00", clock="zip"), Submission("ben", "name.ipynb", when="2026-11-01T00:00:00", clock="file")]
    results = with_penalties([graded("anna"), graded("ben"), graded("carl")], found, Late(parse_due("2026-11-30T12:00"), 0.5))
    texts = {name: path.read_text() for name, path in write_exports(results, tmp_path).items()}
    assert texts["grades.csv"].splitlines() == ["student,part/name test-1,part/name test-2,total,penalty,final,clock", "anna,4,0,4,2,2,zip", "ben,4,0,4,0,4,file", "carl,4,0,4,0,4,"]
    assert texts["lms.csv"].splitlines()[1] == "anna,20.00"
    assert '"penalty": 2.0' in texts["grades.json"]
    assert '"final": 2.0' in texts["grades.json"]
    assert "less 2 because it came late" in texts["feedback/anna.html"]
    assert "came late" not in texts["feedback/ben.html"]


def test_changed_cells_are_listed_and_told_kindly(tmp_path: Path) -> None:
    audit = ("test-1 was changed; the original was used", "imports was missing; it was put back", "task-1 is there more than once")
    texts = {name: path.read_text() for name, path in write_exports([graded("anna", audit=audit), graded("ben")], tmp_path).items()}
    assert texts["audit.csv"].splitlines() == [
        "student,exercise,cell,what",
        "anna,part/name,test-1,was changed; the original was used",
        "anna,part/name,imports,was missing; it was put back",
        "anna,part/name,task-1,is there more than once",
    ]
    assert "That cost no points" in texts["feedback/anna.html"]
    assert "That cost no points" not in texts["feedback/ben.html"]
    assert "look <here>" not in texts["feedback/anna.html"], "messages are text"


def test_the_page_tells_the_first_hint_of_what_is_not_right(tmp_path: Path) -> None:
    hints = {"part/name": {"test-1": ["not <asked> for", "second"], "test-2": ["define <x> first", "second"]}, "part/other": {"test-2": ["of another"]}}
    page = write_exports([graded("anna")], tmp_path, hints)["feedback/anna.html"].read_text()
    assert "Hint: define &lt;x&gt; first" in page
    assert not [text for text in ("not <asked>", "not &lt;asked", "second", "of another") if text in page]


NAMES = st.text(min_size=1, max_size=80)


@given(NAMES)
def test_a_name_is_no_path(name: str) -> None:
    safe = safe_name(name)
    assert Path("x", safe).parent == Path("x")
    assert safe not in (".", "..")
    assert not safe.startswith(".")
    assert len(safe.encode(errors="replace")) < 255
    assert safe == name or "-" in safe


@given(NAMES, NAMES)
def test_names_that_differ_give_files_that_differ(one: str, other: str) -> None:
    assert (safe_name(one) == safe_name(other)) == (one == other)


@given(st.lists(st.text(max_size=9), min_size=1, max_size=4))
def test_no_cell_is_a_formula(cells: list[str]) -> None:
    import csv
    import io

    read = next(csv.reader(io.StringIO(table([[*cells, 1]]), newline="")))
    assert len(read) == len(cells) + 1
    assert not any(c[:1] in tuple("=+-@\t\r") for c in read[:-1] if c)
