"""Edits, and exactly the lessons that they make run again: on a small workspace through real runs, and on the course by its keys."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops_lib.course import graph, pipeline

ROOT = Path(__file__).parents[2]
LESSONS = {  # name -> its code cells; the first is that of the parameters
    "0_a/00_alone": ["profile = 'embedded'", "1 + 1"],
    "0_a/01_direct": ["profile = 'embedded'\nsize = 3", "#| default_exp direct", "from mlops_lib.direct import f\nf()"],
    "1_b/10_far": ["profile = 'embedded'", "from mlops_lib.part.far import g", "g()"],
    "1_b/11_lazy": ["profile = 'embedded'", "def h():\n    from mlops_lib.lazy import x\n    return x\nh()"],
    "1_b/12_string": ["profile = 'embedded'", "import importlib\nimportlib.import_module('mlops_lib.named')"],
    "2_c/20_command": ["profile = 'embedded'", "['mlops', 'go']"],
    "2_c/100_reads": ["profile = 'embedded'\nreviews = None", "open('table.csv')\nimport mlops_lib.part.page"],
}
MODULES = {
    "__init__": "",
    "direct": "from mlops_lib.base import x\n\n\ndef f():\n    return x\n",
    "base": "x = 1\n",
    "lazy": "x = 2\n",
    "named": "x = 3\n",
    "unrelated": "x = 4\n",
    "cli": "from importlib import import_module\n\nCOMMANDS = {'go': 'cli_go'}\n\n\ndef go(name):\n    return import_module(f'mlops_lib.{COMMANDS[name]}')\n",
    "cli_go": "from . import named\n",
    "part/__init__": "from ..lazy import x\n\n\ndef later():\n    from ..named import x\n    return x\n",
    "part/far": "def g():\n    from mlops_lib.direct import f\n    return f()\n",
    "part/page": "PAGE = 'page.html'\n",
}
EVERY = set(LESSONS)


def write_lesson(root: Path, name: str, cells: list[str], title: str = "A lesson") -> None:
    path = root / "notebooks" / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    code = [
        {"cell_type": "code", "metadata": {"tags": [] if n else ["parameters"]}, "source": s, "outputs": [], "execution_count": None}
        for n, s in enumerate(cells)
    ]
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}
    text = [{"cell_type": "markdown", "metadata": {}, "source": f"# {title}"}]
    path.write_text(json.dumps({"cells": text + code, "metadata": kernel, "nbformat": 4, "nbformat_minor": 4}))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    "A workspace of seven lessons with a package and data of its own."
    for name, cells in LESSONS.items():
        write_lesson(tmp_path, name, cells)
    for name, text in MODULES.items():
        path = tmp_path / "mlops_lib" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "mlops_lib" / "part" / "page.html").write_text("<p>")
    (tmp_path / "mlops_lib" / "part" / "grammar.txt").write_text("a b")  # named by nobody: it belongs to its folder
    (tmp_path / "notebooks" / "2_c" / "table.csv").write_text("a,b\n")
    (tmp_path / "mine.jsonl").write_text("{}\n")
    (tmp_path / "settings.ini").write_text("[embedded]\n")
    return tmp_path


class Runs:
    "Runs a workspace with a lesson's kernel left out, through all the rest: keys, plan, record."

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.broken, self.ran = root, set[str](), list[str]()
        monkeypatch.setattr(pipeline, "run_lesson", self.work)
        monkeypatch.setattr(pipeline, "KernelChoice", lambda *about: lambda lesson: "python3")
        monkeypatch.setattr(pipeline, "write_html", lambda notebook: notebook.with_suffix(".html").write_text("page"))

    def work(self, lesson: graph.Lesson, out: Path, **how: Any) -> pipeline.Outcome:
        self.ran.append(lesson.name)
        shutil.copy(lesson.path, out / f"{lesson.path.stem}.ipynb")
        how["render"](out / f"{lesson.path.stem}.ipynb")
        status = "failed" if lesson.name in self.broken else "ok"
        return pipeline.Outcome(lesson.name, lesson.title, status)

    def __call__(self, **how: Any) -> set[str]:  # the lessons that ran
        self.ran.clear()
        for path in [*self.root.glob("notebooks/**/*"), *self.root.glob("mlops_lib/**/*")]:
            stat = path.stat()
            if path.is_file() and time.time() - stat.st_mtime < 60:  # a minute older: its notes are trusted
                os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns - 60 * 10**9))
        record = pipeline.run_course(graph.read_course(self.root), runs=self.root / "runs", **{"profile": "embedded", "jobs": 2} | how)
        self.record = record
        assert set(self.ran) == {o.name for o in record.outcomes if not o.kept and o.status != "skipped"}
        return set(self.ran)


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    runs = Runs(place, monkeypatch)
    assert runs() == EVERY, "nothing is known: all run"
    assert runs() == set(), "nothing changed: none runs"
    return runs


def lesson(name: str, *cells: str, title: str = "A lesson") -> Callable[[Path], Any]:
    return lambda root: write_lesson(root, name, list(cells or LESSONS[name]), title)


def module(name: str, text: str) -> Callable[[Path], Any]:
    return lambda root: (root / "mlops_lib" / name).write_text(text)


def file(name: str, text: str) -> Callable[[Path], Any]:
    return lambda root: (root / name).write_text(text)


DIRECT = {"0_a/01_direct", "1_b/10_far"}
EDITS: dict[str, tuple[Callable[[Path], Any], set[str]]] = {
    "markdown of a lesson": (lesson("0_a/00_alone", title="Another title"), set()),
    "comment in a lesson": (lesson("0_a/00_alone", "profile = 'embedded'", "1 + 1  # is 2"), set()),
    "line breaks in a lesson": (lesson("0_a/00_alone", "profile = 'embedded'", "(1\n + 1)"), set()),
    "code of a lesson": (lesson("0_a/00_alone", "profile = 'embedded'", "1 + 2"), {"0_a/00_alone"}),
    "a new cell": (lesson("0_a/00_alone", "profile = 'embedded'", "1 + 1", "3"), {"0_a/00_alone"}),
    "a cell split in two": (lesson("1_b/10_far", "profile = 'embedded'", "from mlops_lib.part.far import g\ng()"), {"1_b/10_far"}),
    "default of a parameter": (lesson("0_a/01_direct", "profile = 'embedded'\nsize = 4", *LESSONS["0_a/01_direct"][1:]), {"0_a/01_direct"}),
    "a cell that is no Python": (lesson("0_a/00_alone", "profile = 'embedded'", "1 +"), {"0_a/00_alone"}),
    "module imported directly": (module("direct.py", MODULES["direct"].replace("return x", "return -x")), DIRECT),
    "module imported by that": (module("base.py", "x = 10\n"), DIRECT),
    "module imported in a function, and by a package as it is run": (module("lazy.py", "x = 20\n"), {"1_b/11_lazy", "1_b/10_far", "2_c/100_reads"}),
    "module named by a string, and reached by the command": (module("named.py", "x = 30\n"), {"1_b/12_string", "2_c/20_command"}),
    "module of a command": (module("cli_go.py", "from . import named, base\n"), {"2_c/20_command"}),
    "the command itself": (module("cli.py", MODULES["cli"] + "y = 1\n"), {"2_c/20_command"}),
    "comment in a module": (module("base.py", "# one\nx = 1\n"), set()),
    "line breaks in a module": (module("base.py", "x = (\n    1\n)\n"), set()),
    "docstring of a module": (module("base.py", '"One."\nx = 1\n'), DIRECT),
    "module that nobody imports": (module("unrelated.py", "x = 40\n"), set()),
    "new module that nobody imports": (module("other.py", "x = 50\n"), set()),
    "module with a mistake": (module("base.py", "x = = 1\n"), DIRECT),
    "the package's first file": (module("__init__.py", "x = 1\n"), EVERY - {"0_a/00_alone"}),
    "a page of the package": (module("part/page.html", "<b>"), {"2_c/100_reads"}),
    "data of a package that nobody names": (module("part/grammar.txt", "c"), {"1_b/10_far", "2_c/100_reads"}),
    "data beside a lesson": (file("notebooks/2_c/table.csv", "a,b\n1,2\n"), {"2_c/100_reads"}),
    "a file of the workspace that nobody names": (file("README.md", "text"), set()),
    "settings, where no lesson imports them": (file("settings.ini", "[embedded]\nseed = 1\n"), set()),
    "a new lesson": (lesson("1_b/13_new", "profile = 'embedded'", "'new'"), {"1_b/13_new"}),
    "a lesson with another name": (lambda root: (root / "notebooks/0_a/00_alone.ipynb").rename(root / "notebooks/0_a/02_still_alone.ipynb"), set()),
    "a lesson that is gone": (lambda root: (root / "notebooks/0_a/00_alone.ipynb").unlink(), set()),
    "times only": (lambda root: [os.utime(p) for p in root.rglob("*.*") if p.is_file()], set()),
    "an old time on a new text": (lambda root: (module("base.py", "x = 99\n")(root), os.utime(root / "mlops_lib/base.py", (1e9, 1e9))), DIRECT),
    "a notebook of an earlier run deleted": (lambda root: [p.unlink() for p in root.glob("runs/*/00_alone.ipynb")], {"0_a/00_alone"}),
    "a page of an earlier run deleted": (lambda root: [p.unlink() for p in root.glob("runs/*/00_alone.html")], set()),
    "all earlier runs deleted": (lambda root: shutil.rmtree(root / "runs"), EVERY),
    "a record that is cut off": (lambda root: sorted(root.glob("runs/*/results.json"))[-1].write_text('{"state": "do'), set()),
    "notes that are cut off": (file("runs/.notes.json", '{"files'), set()),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_makes_exactly_what_depends_on_it_run(run: Runs, edit: str) -> None:
    change, again = EDITS[edit]
    change(run.root)
    assert run() == again
    assert run() == set()
    names = {o.name.split("/")[1] for o in run.record.outcomes}
    assert {p.stem for p in run.record.folder.glob("*.html")} == names | {"index"}, "every report is whole"


def test_an_edit_that_is_taken_back_runs_nothing(run: Runs) -> None:
    module("base.py", "x = 5\n")(run.root)
    assert run() == DIRECT
    module("base.py", MODULES["base"])(run.root)
    assert run() == set()


@pytest.mark.parametrize(
    ("how", "again"),
    [
        ({"parameters": {"size": 4}}, {"0_a/01_direct"}),
        ({"parameters": {"reviews": "mine.jsonl"}}, {"2_c/100_reads"}),
        ({"profile": "stack"}, EVERY),
        ({"fresh": True}, EVERY),
    ],
    ids=["a given parameter", "a given file", "profile", "fresh"],
)
def test_what_is_asked_for_differently_runs(run: Runs, how: dict[str, Any], again: set[str]) -> None:
    assert run(**how) == again
    assert run(**how) == (EVERY if how.get("fresh") else set())
    assert run() == set(), "and the first is still known"


def test_a_file_given_as_a_parameter_counts_by_its_content(run: Runs) -> None:
    given = {"parameters": {"reviews": str(run.root / "mine.jsonl")}}
    assert run(**given) == {"2_c/100_reads"}
    (run.root / "mine.jsonl").write_text("{}\n")
    assert run(**given) == set()
    (run.root / "mine.jsonl").write_text('{"text": "new"}\n')
    assert run(**given) == {"2_c/100_reads"}
    shutil.copy(run.root / "mine.jsonl", run.root / "moved.jsonl")
    assert run(parameters={"reviews": str(run.root / "moved.jsonl")}) == set()


def test_other_libraries_another_kernel_and_another_environment_run_everything(run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as other:
        other.setattr(pipeline, "installed", lambda: "numpy 3")
        assert run() == EVERY
    with monkeypatch.context() as other:
        other.setenv("MLOPS_SEED", "7")
        assert run() == EVERY
    with monkeypatch.context() as other:
        other.setenv("MLOPS_LONG", "1")
        assert run() == set(), "how long tests are is nothing to a lesson"
    plain = pipeline.conditions(fresh=True), pipeline.conditions()
    assert plain[0]["kernel"] != plain[1]["kernel"]


def test_only_what_failed_and_what_needs_it_run_again(run: Runs) -> None:
    module("base.py", "x = 7\n")(run.root)
    write_lesson(run.root, "1_b/14_user", ["profile = 'embedded'", "import mlops_lib.direct"])
    run.broken = {"0_a/01_direct"}
    assert run() == {"0_a/01_direct", "1_b/10_far"}, "10 needs the module, and no lesson exports it under that name"
    run.broken = set()
    assert run() >= {"0_a/01_direct"}
    assert run() == set()


def test_a_failure_skips_what_needs_it_and_both_run_again(run: Runs) -> None:
    write_lesson(run.root, "0_a/03_exports", ["profile = 'embedded'", "#| default_exp direct\n'now'"])
    run.broken = {"0_a/03_exports"}
    module("base.py", "x = 8\n")(run.root)
    assert "0_a/03_exports" in run()
    skipped = {o.name: o.error for o in run.record.outcomes if o.status == "skipped"}
    assert skipped == {"1_b/10_far": "needs 0_a/03_exports"} or not skipped
    left = {o.name for o in run.record.failed}
    run.broken = set()
    assert run() == left, "what was green is kept"
    assert run() == set()


def test_an_interrupted_run_is_taken_up(run: Runs) -> None:
    module("base.py", "x = 9\n")(run.root)
    seen: list[str] = []

    class Interrupt(pipeline.Watcher):
        def lesson_started(self, name: str, number: int, total: int) -> None:
            seen.append(name)
            if number == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(watcher=Interrupt(), jobs=1)
    assert run() == DIRECT - {seen[0]}


def test_lessons_without_a_known_time_start_by_number_and_else_the_longest_chain_first(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, started = Runs(place, monkeypatch), list[str]()
    watcher = pipeline.Watcher()
    watcher.lesson_started = lambda name, number, total: started.append(name)  # type: ignore[method-assign]
    runs(watcher=watcher, jobs=1)
    assert started == [item.name for item in graph.read_course(place)]
    assert started[-1] == "2_c/100_reads", "by number, not by letter"


# ---- the course itself: keys only


def keys(root: Path, **how: Any) -> dict[str, str]:
    return graph.lesson_keys(graph.read_course(root), graph.Library(root), **how)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, graph.Notes, dict[str, str]]:
    "A copy of the course, and its keys."
    root = tmp_path_factory.mktemp("course")
    for name in ("notebooks", "mlops_lib", "solutions", "exercises", "deploy"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, root)
    past = time.time() - 3600
    for path in root.rglob("*"):
        os.utime(path, (past, past))
    notes = graph.Notes()
    return root, notes, graph.lesson_keys(graph.read_course(root, notes), graph.Library(root, notes))


def after(copy: tuple[Path, graph.Notes, dict[str, str]], path: str, edit: Callable[[str], str]) -> set[str]:
    root, notes, before = copy
    original = (root / path).read_text()
    stat = (root / path).stat()
    try:
        (root / path).write_text(edit(original))
        assert (root / path).read_text() != original
        found = graph.lesson_keys(graph.read_course(root, notes), graph.Library(root, notes))
        return {name for name in before if found[name] != before[name]}
    finally:
        (root / path).write_text(original)
        os.utime(root / path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def imports(root: Path, module: str) -> set[str]:
    "The lessons in whose process a module is loaded when all that they import is imported, as Python itself sees it."
    code = "import json, sys\nbefore = set(sys.modules)\n"
    code += f"import {module}\nprint(json.dumps(sorted(m for m in sys.modules if m.startswith('mlops_lib'))))"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def by_number(names: set[str]) -> set[int]:
    return {int(name.split("/")[1].split("_")[0]) for name in names}


def test_a_comment_in_any_module_changes_no_key_of_a_lesson(copy: tuple[Path, graph.Notes, dict[str, str]]) -> None:
    for path in ("settings.py", "logs.py", "data/tables.py", "events/bus.py", "training/__init__.py", "cli.py"):
        assert after(copy, f"mlops_lib/{path}", lambda text: f"# said\n{text}\n# more\n") == set(), path


def test_an_edit_in_a_part_leaves_the_parts_before_it_alone(copy: tuple[Path, graph.Notes, dict[str, str]]) -> None:
    more = lambda text: f"{text}\nADDED = 1\n"
    parts = {
        "rag/hybrid.py": 64, "serving/api.py": 52, "monitoring/watch.py": 74, "training/keras.py": 20, "registry/cards.py": 32, "events/kafka.py": 40,
    }  # fmt: skip
    for path, first in parts.items():
        found = by_number(after(copy, f"mlops_lib/{path}", more))
        assert found, path
        assert min(found) >= first, (path, sorted(found))
    assert {23, 21, 20} & by_number(after(copy, "mlops_lib/training/keras.py", more)) == set()
    assert len(after(copy, "mlops_lib/settings.py", more)) > 0.9 * len(copy[2])
    assert by_number(after(copy, "mlops_lib/cli_rag.py", more)) >= {95, 98}
    assert {10, 21, 41, 62} & by_number(after(copy, "mlops_lib/cli_rag.py", more)) == set()


def test_data_counts_for_those_that_read_it(copy: tuple[Path, graph.Notes, dict[str, str]]) -> None:
    more = lambda text: f"{text}\n"
    assert by_number(after(copy, "notebooks/6_rag/documents.jsonl", more)) >= {65, 66}
    assert min(by_number(after(copy, "notebooks/6_rag/documents.jsonl", more))) >= 60
    assert by_number(after(copy, "mlops_lib/rag/portal.html", more)) >= {67}
    assert {60, 61, 62} & by_number(after(copy, "mlops_lib/rag/portal.html", more)) == set()
    assert by_number(after(copy, "params.yaml", lambda text: text.replace("rows", "seed", 1))) >= {18}
    assert by_number(after(copy, "docker-compose.yml", more)) >= {3}
    assert after(copy, "README.md", more) <= {n for n in copy[2] if n.startswith("9_")}
    assert after(copy, "settings.ini", lambda text: text.replace("# the inbox", "# an inbox")) == set()
    assert len(after(copy, "settings.ini", lambda text: text.replace("seed = 42", "seed = 43"))) > 0.9 * len(copy[2])


def test_markdown_counts_only_where_lessons_are_read(copy: tuple[Path, graph.Notes, dict[str, str]]) -> None:
    edit = lambda text: text.replace("## Summary", "## The summary")
    found = by_number(after(copy, "notebooks/2_training/21_classic.ipynb", edit))
    assert 21 not in found and {63, 105} <= found, "these read the course's text"
    assert not {10, 20, 41, 52, 62, 70, 90} & found


def test_every_module_that_a_lesson_loads_is_in_its_key() -> None:
    "What Python itself loads at import is never missing; what functions load is found in the text."
    library = graph.Library(ROOT)
    for module in ("mlops_lib.data.tables", "mlops_lib.events.bus", "mlops_lib.serving.workers", "mlops_lib.cli"):
        assert imports(ROOT, module) <= library.reach([module]), module


# ---- the parts


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 50))))
def test_the_critical_path_is_the_longest_chain_and_the_greatest_urgency(rows: list[tuple[int, int, int]]) -> None:
    waiting: dict[str, set[str]] = {str(n): set() for n in range(10)}
    for a, b, _ in rows:
        if a < b:
            waiting[str(b)] |= {str(a)}
    seconds = {str(n): float(sum(s for a, _, s in rows if a == n)) for n in range(10)}
    path, total = graph.critical_path(waiting, seconds)
    assert all(a in waiting[b] for a, b in zip(path, path[1:], strict=False))
    assert total == sum(seconds[name] for name in path) == max(graph.urgency(waiting, seconds).values())


def test_notes_trust_a_file_only_when_time_and_size_are_as_noted(tmp_path: Path) -> None:
    path, read = tmp_path / "a.txt", []
    look = lambda p: read.append(1) or p.read_text()
    path.write_text("one")
    os.utime(path, (1e9, 1e9))
    notes = graph.Notes(tmp_path / "notes.json")
    assert [notes(path, "text", look), notes(path, "text", look)] == ["one", "one"] and len(read) == 1
    notes.save()
    assert graph.Notes(tmp_path / "notes.json")(path, "text", look) == "one" and len(read) == 1
    path.write_text("two")
    assert graph.Notes(tmp_path / "notes.json")(path, "text", look) == "two"
    path.write_text("six")  # within the same tick of a coarse clock, perhaps
    assert graph.Notes(tmp_path / "notes.json")(path, "text", look) == "six"


def test_a_lesson_says_what_it_reads_and_is_then_not_guessed_at(place: Path) -> None:
    write_lesson(place, "0_a/00_alone", ["profile = 1", "#| reads: nothing\nopen('table.csv')"])
    write_lesson(place, "0_a/02_all", ["profile = 1", "#| reads: notebooks/1_b"])
    before = keys(place)
    (place / "notebooks" / "2_c" / "table.csv").write_text("new")
    assert {n for n, k in keys(place).items() if k != before[n]} == {"2_c/100_reads"}
    write_lesson(place, "1_b/11_lazy", LESSONS["1_b/11_lazy"], title="Other words")
    assert {n for n, k in keys(place).items() if k != before[n]} == {"2_c/100_reads", "0_a/02_all"}


def test_magics_and_commands_do_not_hide_what_a_lesson_needs(place: Path) -> None:
    write_lesson(place, "0_a/00_alone", ["profile = 1", "%matplotlib inline\n!mlops go\nfrom mlops_lib.data import (\n    x,\n)", "await f()"])
    found = graph.read_course(place)[0]
    assert found.imports == {"mlops_lib.data.x"} and found.names == ("mlops_lib.cli",)
