"""Copies are found, however they are disguised; honest work is not."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops_lib.course.grading import Submission
from mlops_lib.course.similarity import RUN, WINDOW, compare, fingerprints, own_code, tokens, write_similarity

from .conftest import NAME, answers, exercise, handed_in

ONE = answers()["task-3"] + "\n\n\n" + answers()["task-1"]
RENAMED = {"read_text": "source", "self.shares": "self.parts", "new": "fresh", "changed": "others", "share": "portion", "parser": "p", "words": "w", "value": "v", "flags": "found", "name": "key"}


def disguised(code: str) -> str:
    for old, new in RENAMED.items():
        code = code.replace(old, new)
    lines = [f"{line}  # mine" if line.strip() and not line.rstrip().endswith(("\\", '"""')) else line for line in code.splitlines()]
    return "\n\n# all by myself\n".join("\n".join(lines).split("\n\n"))


OTHER = '''class Flags:
    def __init__(self, read_text):
        self._load = read_text
        self.error, self._table = None, dict(read_flags(read_text()))

    def on(self, name, customer):
        try:
            limit = self._table[name]
        except KeyError:
            known = ", ".join(self._table)
            raise KeyError(f"{name} is unknown, known are {known}") from None
        else:
            return is_on(name, customer, limit)

    def refresh(self):
        before = dict(self._table)
        try:
            self._table.clear()
            self._table.update(read_flags(self._load()))
            self.error = None
        except Exception as problem:
            self._table.update(before)
            self.error = repr(problem)
        result = []
        for name in set(before) | set(self._table):
            if before.get(name, -1) != self._table.get(name, -1):
                result.append(name)
        result.sort()
        return result


def read_flags(text):
    section, result = None, {}
    for line in text.splitlines():
        if line.startswith("["):
            section = line.strip("[] ")
        elif "=" in line and section == "flags":
            left, right = (part.strip() for part in line.split("=", 1))
            result[left] = 1.0 if right.lower() == "on" else 0.0 if right.lower() == "off" else float(right)
    return result
'''
SHORT = "def total(xs):\n    result = 0\n    for x in xs:\n        result += x\n    return result\n"


def pairs(work: dict[str, str]) -> list[tuple[str, str]]:
    return [(p.student, p.other) for p in compare("x", work)]


def test_a_disguised_copy_is_found_and_honest_work_is_not() -> None:
    functions = disguised(ONE).split("\n\n# all by myself\n")
    copy = "\n\n".join([functions[-1], *functions[:-1]])
    assert pairs({"anna": ONE, "ben": copy, "carl": OTHER}) == [("anna", "ben")]


def test_the_short_obvious_answer_is_no_copy() -> None:
    assert pairs({f"s{i}": SHORT.replace("result", f"r{i}") for i in range(3)}) == []


def test_what_most_of_the_class_wrote_is_no_copy() -> None:
    class_ = {f"s{i:02}": ONE for i in range(12)}
    assert pairs(class_) == []
    assert pairs({"s00": ONE, "s01": ONE, **{f"s{i:02}": OTHER for i in range(2, 12)}}) == [("s00", "s01")]


def test_released_code_is_no_copy() -> None:
    assert compare("x", {"anna": ONE, "ben": ONE}, released=ONE) == []


def test_half_a_copy_is_about_a_half() -> None:
    one, other = answers()["task-1"], answers()["task-3"]
    (pair,) = compare("x", {"anna": one + "\n" + other, "ben": one + "\n" + OTHER}, alike=0.1)
    assert 0.1 < pair.likeness < 0.8


@given(st.lists(st.sampled_from(["a = 1", "b = a + 2", "print(a)", "if a: b = 3", "x.append(b)", "c = [a, b]", "del a", "f(a)(b)", "a, b = b, a"]), min_size=WINDOW + RUN, max_size=30), st.text("ab\n #=", max_size=30))
def test_a_common_piece_leaves_a_common_fingerprint(lines: list[str], noise: str) -> None:
    code = "\n".join(lines) + "\n"
    assert fingerprints(code).keys() & fingerprints(f"z = 0\n{code}z = z // 3 ** z\n").keys()


@given(st.text(max_size=200))
def test_anything_can_be_read(text: str) -> None:
    assert all(t.text and t.line >= 0 for t in tokens(text))
    fingerprints(text)


@pytest.mark.parametrize("code", ["(" * 50_000, "x" * 300_000, "-" * 100_000 + "1", "\x00", "f'{" * 1000, "if x:\n" * 200 + "pass", "'''" + "a" * 100_000])
def test_hostile_text_is_read_as_far_as_it_goes(code: str) -> None:
    fingerprints(code)


def test_a_page_with_both_sides(tmp_path: Path) -> None:
    one = exercise()
    copy = {key: disguised(source) for key, source in answers().items()} | {"task-1": answers()["task-1"] + "\nx = '<script>alert(1)</script>'"}
    class_ = [Submission(who, f"{NAME}.ipynb", json.dumps(handed_in(given)).encode()) for who, given in (("anna", answers()), ("ben <b>", copy), ("carl", {}))]
    class_ += [Submission("dora", "x.ipynb", b"{"), Submission("eve", "y.ipynb", problem="a link")]
    assert own_code(class_[2], one) == "", "what was released is nobody's own"
    first = {n: p.read_bytes() for n, p in write_similarity(class_, [one], tmp_path / "one").items()}
    assert {n: p.read_bytes() for n, p in write_similarity(class_[::-1], [one], tmp_path / "two").items()} == first
    (pair,) = json.loads(first["similarity.json"])["pairs"]
    assert (pair["student"], pair["other"], pair["exercise"]) == ("anna", "ben <b>", NAME)
    page = first["similarity.html"].decode()
    assert "<mark>" in page
    assert "<script>" not in page
    assert "ben <b>" not in page
