"Lesson 103: mutants, and the tests that catch them"

import ast
import json
import random
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_lib.cli import cli
from mlops_lib.course.grading import GradingError
from mlops_lib.course.mutation import Mutant, equivalents, mutants, mutate, report, sample, without_asserts

ROOT = Path(__file__).parents[2]
SETTINGS = ROOT / "solutions" / "0_start" / "00_settings.ipynb"


def afters(source, **more):
    return [m.after for m in mutants(source, **more)]


@pytest.mark.parametrize(
    ("source", "kind", "after"),
    [
        ("x = a < b", "comparison", "x = a >= b"),
        ("x = a < b", "boundary", "x = a <= b"),
        ("x = a not in b", "comparison", "x = a in b"),
        ("x = (a) - (b)", "arithmetic", "x = (a) + (b)"),
        ("x = 'a' + b", "arithmetic", "x = b"),
        ("x += 2", "arithmetic", "x -= 2"),
        ("x = -a", "arithmetic", "x = a"),
        ("x = a or b", "and-or", "x = a and b"),
        ("x = (a and b) or c", "condition", "x = (a and b)"),
        ("x = not a", "not", "x = a"),
        ("x = 7", "constant", "x = 6"),
        ("x = False", "constant", "x = True"),
        ("x = 'é' if a else b", "constant", "x = '' if a else b"),
        ("f(a, key=1)", "argument", "f(a)"),
        ("x = d.get(a, b)", "argument", "x = d.get(a)"),
        ("f(a, b)", "order", "f(b, a)"),
        ("x = min(a, b)", "call", "x = max(a, b)"),
        ("x = sorted(a, key=b)", "call", "x = list(a)"),
        ("x = a.strip().lower()", "call", "x = a.strip()"),
        ("x = [a for a in b if a]", "branch", "x = [a for a in b if True]"),
        ("if a: f()", "branch", "if False: f()"),
        ("while a: f()", "branch", "while False: f()"),
        ("x = a if b else c", "branch", "x = (c)"),
        ("x = a[1:b]", "slice", "x = a[1:]"),
        ("f()", "statement", "pass"),
        ("a.b = c", "statement", "pass"),
        ("raise E", "raise", "pass"),
        ("for a in b: break", "loop", "for a in b: continue"),
        ("try: f()\nexcept (A, B): pass", "except", "except A: pass"),
        ("try: f()\nexcept A: pass", "except", "except Exception: pass"),
        ("def f(a, b):\n    return b", "return", "return a"),
        ("def f(a, b):\n    return b", "return", "return None"),
    ],
)
def test_each_kind_of_change(source, kind, after):
    assert (kind, after) in {(m.kind, m.after) for m in mutants(source)}


@pytest.mark.parametrize(
    "source",
    [
        '"Words."',
        "x: Literal['a', 1] = None",
        "def f(a: int = None) -> list[3]: pass",
        "log.info('so many: %s', n)",
        "print('done', end='')",
        "class A:\n    __slots__ = ('a', 'b')",
        "x = f(timeout=3)",
        "x = dict[str, 1]()",
    ],
)
def test_what_no_test_should_see_is_left_alone(source):
    assert afters(source) == []


def test_texts_of_errors_count_only_where_they_are_read():
    source = "raise ValueError(f'{a} is wrong')"
    assert afters(source) == ["pass"]
    assert 'raise ValueError("")' in afters(source, messages=True)
    assert "raise Wait(a - b)" in afters("raise Wait(a + b)"), "a number in an error is no text"


def test_between_the_markers_only():
    source = "a = 1\n### BEGIN SOLUTION\nb = 2\n### END SOLUTION\nc = 3\n### BEGIN SOLUTION\nd = 4\n### END SOLUTION"
    assert {m.before for m in mutants(source)} == {"b = 2", "d = 4"}


def test_a_cell_that_is_no_python_has_none():
    assert mutants("%%bash\nls") == []


def test_top_level_await_is_python_in_a_notebook():
    assert "x = await f(b, a)" in afters("x = await f(a, b)")


def test_what_compiles_to_the_same_is_no_mutant():
    assert "if True:" not in afters("if True:\n    f()")


SOURCES = st.sampled_from([
    "def f(a, b=2):\n    'doc'\n    while a < b and not a:\n        a += 1\n        if a == 7: break\n    return sorted(x for x in (a, b) if x)\n",
    "class A:\n    n = 0\n    def g(self, é):\n        self.n, t = é[1:], 'ü'\n        try:\n            raise KeyError(t)\n        except (KeyError, OSError) as e:\n            return min(t, 'b', key=len)\n",
    "x = (\n    1 +  # one\n    2\n) * 3\ny = f(x,\n      z=4)\n",
])  # fmt: skip


@given(SOURCES, st.integers(1, 60), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_every_mutant_is_another_program_and_the_choice_repeats(source, most, seed):
    found = mutants(source, most, seed)
    assert found == mutants(source, most, seed)
    assert len({m.source for m in found}) == len(found) <= most
    original = ast.dump(ast.parse(source))
    assert all(ast.dump(ast.parse(m.source)) != original for m in found)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["x", "y"])), max_size=40), st.integers(0, 30))
@settings(max_examples=50, deadline=None)
def test_a_sample_is_spread_over_cells_and_kinds(pairs, most):
    found = [Mutant(cell, kind, i, "", "", str(i)) for i, (kind, cell) in enumerate(pairs)]
    random.Random(1).shuffle(found)
    chosen = sample(found, most)
    assert len(chosen) == min(most, len(found))
    counts = {key: sum((m.kind, m.cell) == key for m in chosen) for key in set(pairs)}
    have = {key: pairs.count(key) for key in set(pairs)}
    full = [counts[k] for k in counts if counts[k] < have[k]]
    assert all(max(counts.values()) - n <= 1 for n in full), "who has more to give is at most one behind"


def test_checks_are_taken_out_and_what_a_driver_needs_stays():
    visible = "import os\nclock = Clock()\ndef helper():\n    assert clock\n    return clock\nx = solve()\ntry:\n    solve(0)\nexcept ValueError:\n    pass\nelse:\n    raise AssertionError('no')"
    kept = without_asserts(visible, {"helper"})
    assert "clock = Clock()" in kept
    assert "def helper" in kept
    assert "assert" not in kept
    assert "solve" not in kept
    assert "solve(0)" in without_asserts(visible)


def test_equivalent_mutants_do_not_count():
    made = [Mutant("c", "k", i, "before", f"after {i}", "") for i in range(4)]
    told = report("e", 9, made, ["wrong", "", "", "error"], accepted=["after 1", "after 3"])
    assert (told.mutants, told.caught, told.equivalent) == (3, 2, 1), "one that was caught counts as caught, whatever the list says"
    assert [m.after for m in told.survivors] == ["after 2"]
    assert told.to_json()["survivors"] == [{"cell": "c", "kind": "k", "line": 2, "before": "before", "after": "after 2"}]


def notebook(path, hidden, body="return a + b", visible="assert plus(1, 1) == 2", markers=("### BEGIN SOLUTION", "### END SOLUTION")):
    "A small exercise: solutions/p/x.ipynb, or what is released of it."
    meta = {"schema_version": 3, "task": False}
    code = {"cell_type": "code", "execution_count": None, "outputs": []}
    solved = f"def plus(a, b):\n    {markers[0]}\n    {body}\n    {markers[1]}"
    test = f"{visible}\n### BEGIN HIDDEN TESTS\n{hidden}\n### END HIDDEN TESTS\n"
    cells = [
        code | {"id": "a", "metadata": {"nbgrader": meta | {"grade": False, "grade_id": "task-1", "solution": True, "locked": False}}, "source": solved},
        code | {"id": "b", "metadata": {"nbgrader": meta | {"grade": True, "grade_id": "test-1", "solution": False, "locked": True, "points": 2}}, "source": test},
    ]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return path


def workspace(folder, hidden, **more):
    notebook(folder / "exercises" / "p" / "x.ipynb", hidden, **more | {"body": "raise NotImplementedError"})
    return notebook(folder / "solutions" / "p" / "x.ipynb", hidden, **more)


WEAK = "def driver():\n    return [plus(2, 2)]\n\n\ndef compare(got):\n    assert got == [4]"


def test_only_hidden_tests_count(tmp_path):
    visible = "assert plus(1, 1) == 2\nassert plus(3, -1) == 2\nassert plus(0, 5) == 5"
    told = mutate(workspace(tmp_path, WEAK, body="return a * b", visible=visible), tmp_path)
    assert told.mutants == told.caught == 3, "times is right for the hidden test: its mutants are caught, though the visible checks are red"


def test_a_survivor_is_listed_and_can_be_declared_equivalent(tmp_path):
    body = "return sum([a, b] if a < b else [b, a])"
    told = mutate(workspace(tmp_path / "one", WEAK, body=body), tmp_path / "one")
    lines = {m.after for m in told.survivors}
    assert "return sum([a, b] if a <= b else [b, a])" in lines
    assert told.rate < 0.95
    declared = f"EQUIVALENT = {tuple(lines)!r}\n{WEAK}"
    judged = mutate(workspace(tmp_path / "two", declared, body=body), tmp_path / "two")
    assert (judged.rate, judged.equivalent, judged.caught) == (1, len(lines), told.caught)


def test_a_mutant_that_runs_for_ever_is_caught(tmp_path):
    body = "n = 0\n    while n < b:\n        n += 1\n    return a + n"
    told = mutate(workspace(tmp_path, WEAK, body=body), tmp_path)
    assert told.reasons.get("time-out")
    assert not [m for m in told.survivors if m.after == "pass"]


def test_what_was_caught_is_known_again_until_its_test_changes(tmp_path):
    database = tmp_path / "caught.db"
    solution = workspace(tmp_path, WEAK)
    first, again = (mutate(solution, tmp_path, database=database) for _ in range(2))
    assert (first.caught, first.reasons) == (again.caught, again.reasons)
    blind = WEAK.replace("assert got == [4]", "assert got")
    assert mutate(workspace(tmp_path, blind), tmp_path, database=database).caught < first.caught


def test_a_solution_that_fails_its_own_test_is_refused(tmp_path):
    with pytest.raises(GradingError, match="test-1"):
        mutate(workspace(tmp_path, WEAK, body="return a - b"), tmp_path)


def test_a_bad_list_of_equivalents_is_refused(tmp_path):
    with pytest.raises(GradingError, match="EQUIVALENT"):
        equivalents(workspace(tmp_path, f"EQUIVALENT = (' x = 1',)\n{WEAK}"))


def test_the_command_on_a_real_exercise():
    called = CliRunner().invoke(cli, ["exercises", "mutate", str(SETTINGS), "--most", "8", "--json", "--fresh"])
    told = json.loads(called.stdout)
    assert told[0]["exercise"] == "0_start/00_settings"
    assert told[0]["mutants"] + told[0]["equivalent"] == 8
    assert called.exit_code == (0 if told[0]["rate"] >= 0.95 else 1)
    assert bool(told[0]["survivors"]) == (told[0]["rate"] < 1)
