"""Odd but right submissions: full marks."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from mlops_lib.course.grading import Graded

from .conftest import answers, grade_id, handed_in, notebook

Notebook = dict[str, Any]
SOLVED = answers()


def cell(source: str, kind: str = "code") -> dict[str, Any]:
    return {"cell_type": kind, "metadata": {}, "source": source, **({"outputs": [], "execution_count": None} if kind == "code" else {})}


def index(made: Notebook, name: str) -> int:
    return next(i for i, c in enumerate(made["cells"]) if grade_id(c) == name)


def before(source: str) -> Notebook:
    return handed_in(SOLVED | {"task-1": source + "\n" + SOLVED["task-1"]})


def after(source: str) -> Notebook:
    return handed_in(SOLVED | {"task-1": SOLVED["task-1"] + "\n" + source})


def inside(source: str) -> Notebook:
    "Before each answer of read_flags."
    return handed_in(SOLVED | {"task-1": SOLVED["task-1"] + f"\n\n_right = read_flags\ndef read_flags(text):\n    {source}\n    return _right(text)\n"})


def extra(place: str, source: str, kind: str = "code", shift: int = 1) -> Notebook:
    made = handed_in(SOLVED)
    made["cells"].insert(index(made, place) + shift, cell(source, kind))
    return made


def copied(name: str, source: str | None = None, place: int | None = None) -> Notebook:
    made = handed_in(SOLVED)
    twin = copy.deepcopy(made["cells"][index(made, name)])
    twin["source"] = twin["source"] if source is None else source
    made["cells"].insert(index(made, name) + 1 if place is None else place, twin)
    return made


def without(*names: str) -> Notebook:
    made = handed_in(SOLVED)
    made["cells"] = [c for c in made["cells"] if grade_id(c) not in names]
    return made


def moved(name: str, to: int) -> Notebook:
    made = handed_in(SOLVED)
    one = made["cells"].pop(index(made, name))
    made["cells"].insert(to if to >= 0 else len(made["cells"]), one)
    return made


def changed(edit: Callable[[dict[str, Any]], Any], only: str = "") -> Notebook:
    made = handed_in(SOLVED)
    for one in made["cells"]:
        if not only or grade_id(one) == only:
            edit(one)
    return made


def as_new_cell(name: str) -> Notebook:
    "Deleted, and written into a cell of one's own."
    made = handed_in(SOLVED)
    made["cells"][index(made, name)] = cell(SOLVED[name])
    return made


def helper_below() -> Notebook:
    "Works in the order in which it was run: the helper stands at the end."
    body = SOLVED["task-1"].replace("configparser.ConfigParser", "make_parser")
    made = handed_in(SOLVED | {"task-1": body})
    made["cells"].append(cell("def make_parser(**kw):\n    return configparser.ConfigParser(**kw)"))
    return made


def no_ids(one: dict[str, Any]) -> None:
    one.pop("id", None)


def no_metadata(one: dict[str, Any]) -> None:
    one["metadata"] = {}


def outputs(one: dict[str, Any]) -> None:
    if one["cell_type"] == "code":
        one["outputs"] = [{"output_type": "stream", "name": "stderr", "text": "x" * 10_000}]


def as_list(one: dict[str, Any]) -> None:
    one["source"] = "".join(one["source"]).splitlines(keepends=True)


def windows(one: dict[str, Any]) -> None:
    one["source"] = "".join(one["source"]).replace("\n", "\r\n")


def old_format() -> Notebook:
    made = changed(no_ids)
    made["nbformat_minor"] = 2
    return made


HONEST: dict[str, Callable[[], Notebook]] = {
    "as it should be": lambda: handed_in(SOLVED),
    "warnings": lambda: inside("import warnings; warnings.warn('old')"),
    "error stream": lambda: inside("import sys; print('debug', file=sys.stderr)"),
    "log lines": lambda: inside("import logging; logging.warning('hm')"),
    "progress bar": lambda: before("from tqdm import tqdm\nfor i in tqdm(range(1000)): pass"),
    "much output": lambda: before("for i in range(2000): print('x' * 200)"),
    "output of bytes": lambda: before("import sys\nsys.stdout.write('\\x00\\xff ä\\n')"),
    "a display": lambda: before("from IPython.display import HTML, display\ndisplay(HTML('<b>x</b>'))"),
    "a plot": lambda: before("%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.plot([1, 2]); plt.show()"),
    "magic": lambda: before("%time x = 1\n%config InlineBackend.figure_format = 'retina'"),
    "cell magic": lambda: extra("task-1", "%%time\ny = 2"),
    "shell line": lambda: before("!echo hello"),
    "await": lambda: before("import asyncio\nawait asyncio.sleep(0)"),
    "a task in the background": lambda: before("import asyncio\nasync def tick():\n    while True: await asyncio.sleep(0.01)\nticker = asyncio.create_task(tick())"),
    "a thread in the background": lambda: before("import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()"),
    "a process": lambda: before("import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'print(1)'], check=True)"),
    "a pool": lambda: before("from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(2) as p: list(p.map(abs, [1, -2]))"),
    "files of one's own": lambda: before("open('notes.txt', 'w').write('x')\nimport tempfile\ntempfile.mkdtemp()"),
    "loopback": lambda: before("import socket\ns = socket.create_server(('127.0.0.1', 0)); s.close()"),
    "random numbers": lambda: before("import random\nrandom.seed(7); random.random()"),
    "other imports": lambda: before("import pandas as pd\nimport numpy as np\nnp.zeros(3)"),
    "more functions": lambda: after("def helper(x):\n    return x\n\nclass Mine: pass"),
    "other names of arguments": lambda: after("_f = read_flags\ndef read_flags(words): return _f(words)"),
    "a lambda": lambda: after("_g = read_flags\nread_flags = lambda text: _g(text)"),
    "a class with __call__": lambda: after("_h = read_flags\nclass Reader:\n    def __call__(self, text): return _h(text)\nread_flags = Reader()"),
    "a cache": lambda: after("import functools\nread_flags = functools.lru_cache(read_flags)"),
    "another kind of dict": lambda: after("from collections import OrderedDict\n_k = read_flags\ndef read_flags(text): return OrderedDict(_k(text))"),
    "an extra cell": lambda: extra("task-1", "print(read_flags('[flags]\\na = 1\\n'))"),
    "an extra cell that fails": lambda: extra("task-1", "read_flags('[flags]\\na = 7\\n')"),
    "an extra cell that is no Python": lambda: extra("task-2", "this is not python ("),
    "an extra cell that ends the process": lambda: extra("task-2", "import os\nos._exit(1)"),
    "an extra cell that never ends": lambda: extra("test-2", "while True: pass"),
    "an extra cell of text": lambda: extra("task-1", "# My thoughts", "markdown"),
    "an extra cell at the beginning": lambda: extra("intro", "mine = 1", shift=0),
    "exit at the end": lambda: extra("test-3", "exit()"),
    "an empty cell": lambda: extra("task-3", ""),
    "a copied solution": lambda: copied("task-1"),
    "a copy left unsolved below": lambda: copied("task-1", "".join(next(c for c in notebook("exercises")["cells"] if grade_id(c) == "task-1")["source"])),
    "a copied test": lambda: copied("test-1"),
    "a test copied to the top": lambda: copied("test-2", place=1),
    "deleted tests": lambda: without("test-1", "test-2", "test-3"),
    "deleted imports": lambda: without("imports"),
    "deleted texts": lambda: without("intro", "task-1-text", "task-2-text", "task-3-text"),
    "a test that was changed": lambda: changed(lambda c: c.update(source="assert False"), "test-1"),
    "imports that were changed": lambda: changed(lambda c: c.update(source="import numpy"), "imports"),
    "a solution below its test": lambda: moved("task-1", -1),
    "tests first": lambda: moved("test-3", 0),
    "a solution in a new cell": lambda: as_new_cell("task-2"),
    "a helper at the end": helper_below,
    "no cell ids": lambda: changed(no_ids),
    "no metadata": lambda: changed(no_metadata),
    "outputs": lambda: changed(outputs),
    "sources as lists": lambda: changed(as_list),
    "line ends of Windows": lambda: changed(windows),
    "an older format": old_format,
    "points in the metadata": lambda: changed(lambda c: c["metadata"]["nbgrader"].update(points=99), "test-1"),
}  # fmt: skip


@pytest.mark.parametrize("name", HONEST)
def test_full_marks(name: str, graded: Callable[[dict[str, Any]], Graded]) -> None:
    result = graded(HONEST[name]())
    assert (result.score, result.max_score, result.reason) == (10, 10, "ok"), result


@pytest.mark.parametrize(("task", "code", "reason"), [("task-3", "import os\nos._exit(3)", "crash"), ("task-3", "while True: pass", "time-out"), ("task-3", "x = bytearray(1 << 40)", "memory"), ("task-3", "def (", "error")])
def test_a_bad_question_costs_nothing_on_the_others(task: str, code: str, reason: str, graded: Callable[[dict[str, Any]], Graded]) -> None:
    result = graded(handed_in(SOLVED | {task: code}))
    assert [m.points for m in result.marks] == [2, 3, 0]
    assert result.reason in (reason, "error")
