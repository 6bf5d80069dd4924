"""Two real exercises, and a grader for them."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlops_lib.course.grading import Exercise, Graded, Submission, grade, parent_for, read_exercise
from mlops_lib.course.sandbox import Limits, SandboxError

ROOT = Path(__file__).parents[2]
NAME = "0_start/00_settings"


def notebook(folder: str, name: str = NAME) -> dict[str, Any]:
    return json.loads((ROOT / folder / f"{name}.ipynb").read_text())


def grade_id(cell: dict[str, Any]) -> str:
    return cell["metadata"].get("nbgrader", {}).get("grade_id", "")


def answers(name: str = NAME) -> dict[str, str]:
    "The solved cells."
    return {grade_id(c): "".join(c["source"]) for c in notebook("solutions", name)["cells"] if c["metadata"]["nbgrader"]["solution"]}


def handed_in(given: dict[str, str], name: str = NAME) -> dict[str, Any]:
    "The released notebook with these cells filled in."
    made = copy.deepcopy(notebook("exercises", name))
    for cell in made["cells"]:
        cell["source"] = given.get(grade_id(cell), cell["source"])
    return made


def exercise(name: str = NAME) -> Exercise:
    return read_exercise(ROOT / "solutions" / f"{name}.ipynb", ROOT / "exercises" / f"{name}.ipynb")


@pytest.fixture(scope="session")
def graded() -> Iterator[Callable[[dict[str, Any]], Graded]]:
    "Grades a notebook of the first exercise."
    one = exercise()
    try:
        sandbox = parent_for(one, ROOT, Limits(seconds=3, memory=500 << 20), strict=True)
    except SandboxError as e:
        pytest.skip(f"not run: {e}")
    with sandbox:
        yield lambda made: grade(Submission("anna", "00_settings.ipynb", json.dumps(made).encode()), one, sandbox)
