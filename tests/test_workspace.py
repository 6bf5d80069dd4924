"""The workspace's files agree with each other, and what is generated is what the notebooks generate."""

import ast
import configparser
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from mlops_lib.course.exercises import release_all
from mlops_lib.course.graph import dependencies, read_course
from mlops_lib.settings import Settings, load_settings

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GENERATED = ("mlops_lib", "exercises")
SOURCES = ("notebooks", "solutions")


def requirements() -> list[Requirement]:
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    return [Requirement(line) for line in [*PROJECT["dependencies"], *extras]]


def locked() -> dict[str, str]:
    pairs = (line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def test_every_pin_can_be_installed_on_the_least_python() -> None:
    (least,) = (s.version for s in SpecifierSet(PROJECT["requires-python"]) if s.operator == ">=")
    found = {d.metadata["Name"].lower().replace("_", "-"): d.metadata.get("Requires-Python") for d in distributions()}
    pins = {name: found[name] for name in locked() if found.get(name)}
    assert len(pins) > 200
    tight = {name: wants for name, wants in pins.items() if not SpecifierSet(wants).contains(f"{least}.0")}
    assert not tight, f"pip would search for minutes on Python {least}.0, and give up: {tight}"


def differences(left: Path, right: Path) -> list[str]:
    compared = filecmp.dircmp(left, right, ignore=["__pycache__", ".ipynb_checkpoints", "inbox_grammar.txt", "portal.html"])
    _, different, unread = filecmp.cmpfiles(left, right, compared.common_files, shallow=False)
    here = [str(left / name) for name in [*different, *unread, *compared.left_only, *compared.right_only]]
    return here + [found for sub in compared.common_dirs for found in differences(left / sub, right / sub)]


def test_clean_export_and_exercises_leave_no_difference(tmp_path: Path) -> None:
    for name in (*SOURCES, *GENERATED):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("pyproject.toml", "settings.ini", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    tools = Path(sys.executable).parent
    for command in (["nbdev-clean"], ["nbdev-clean", "--fname", "solutions"], ["nbdev-export"]):
        subprocess.run([tools / command[0], *command[1:]], cwd=tmp_path, env=environment, check=True, capture_output=True)
    release_all(tmp_path)
    changed = [path for name in (*SOURCES, *GENERATED) for path in differences(ROOT / name, tmp_path / name)]
    assert not changed, f"run `make export` and commit: {changed}"


def test_every_lesson_has_an_exercise_and_the_parts_of_a_lesson() -> None:
    for lesson in read_course(ROOT):
        assert (ROOT / "exercises" / f"{lesson.name}.ipynb").is_file(), f"{lesson.name} has no exercise"
        assert "profile" in lesson.parameters, f"{lesson.name} has no parameter `profile`"
        text = lesson.path.read_text()
        for needed in ('"headline"', "## Summary", "**What breaks at scale.**", f"exercises/{lesson.name}.ipynb"):
            assert needed in text, f"{lesson.name} lacks {needed}"


def test_no_lesson_needs_a_later_part() -> None:
    needs = dependencies(read_course(ROOT))
    late = [(a, b) for a, others in needs.items() for b in others if b.split("/")[0] > a.split("/")[0]]
    assert not late


def test_a_test_that_a_lesson_points_to_exists() -> None:
    known = {name for path in (ROOT / "tests").rglob("test_*.py") for name in [path.name, *re.findall(r"def (test_\w+)", path.read_text())]}
    for path in (ROOT / "notebooks").glob("*/*.ipynb"):
        prose = ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "markdown"]
        named = set(re.findall(r"`(?:[\w/]*/)?(test_\w+(?:\.py)?)`", "\n".join(prose)))
        assert named <= known, f"{path.name} points to {sorted(named - known)}"


@pytest.mark.parametrize("folder", ["notebooks", "solutions", "exercises"])
def test_every_notebook_names_its_kernel(folder: str) -> None:
    "Without it papermill refuses the notebook, and with it the whole run."
    found = {p: json.loads(p.read_text())["metadata"].get("kernelspec", {}) for p in (ROOT / folder).glob("*/*.ipynb")}
    assert not [p.name for p, kernel in found.items() if (kernel.get("name"), kernel.get("language")) != ("python3", "python")]


def test_no_exercise_holds_a_solution_or_a_hidden_test() -> None:
    for path in (ROOT / "exercises").glob("*/*.ipynb"):
        text = path.read_text()
        for mark in ("BEGIN SOLUTION", "BEGIN HIDDEN", "def compare", "def driver", "hidden_test(driver"):
            assert mark not in text, f"{path} holds {mark!r}"


def test_solutions_import_only_what_their_lesson_may() -> None:
    course = {lesson.name: lesson for lesson in read_course(ROOT)}
    needs = {lesson.module: lesson.name for lesson in course.values() if lesson.module}
    for path in (ROOT / "solutions").glob("*/*.ipynb"):
        name = f"{path.parent.name}/{path.stem}"
        for module in set(re.findall(r"from (mlops_lib[\w.]*) import", path.read_text())) - {"mlops_lib.course.exercises"}:
            assert needs.get(module, "") <= name, f"{name} imports {module}, which is taught later"


def test_the_lock_covers_and_satisfies_every_dependency() -> None:
    versions = locked()
    for requirement in requirements():
        name = requirement.name.lower().replace("_", "-")
        if name == "mlops-lib":
            continue
        assert name in versions, f"{name} is not in constraints.txt: run `make lock`"
        assert requirement.specifier.contains(versions[name], prereleases=True), f"{requirement} but {versions[name]} is locked"
    assert not [name for name, version in versions.items() if "+" in version], "a local version cannot be installed elsewhere"


def test_the_library_imports_only_declared_dependencies() -> None:
    modules = {"sklearn": "scikit-learn", "yaml": "pyyaml", "xgboost": "xgboost-cpu", "tensorflow": "tensorflow-cpu", "IPython": "ipython"}
    modules |= {"pythonjsonlogger": "python-json-logger", "sentence_transformers": "sentence-transformers", "Stemmer": "PyStemmer", "opentelemetry": "opentelemetry-sdk"}
    declared = {requirement.name.lower().replace("_", "-") for requirement in requirements()}
    indirect = {"nbformat", "traitlets", "tokenizers", "transformers"}
    for path in (ROOT / "mlops_lib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"mlops_lib", "__future__"}:
                name = modules.get(top, top).lower().replace("_", "-")
                assert name in declared | indirect, f"{path.name} imports {top}, which pyproject.toml does not declare"


def test_environment_and_project_agree() -> None:
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    python = next(d.split("=")[1] for d in conda if isinstance(d, str) and d.startswith("python="))
    assert SpecifierSet(PROJECT["requires-python"]).contains(python)
    pip = next(d["pip"] for d in conda if isinstance(d, dict))
    makefile = (ROOT / "Makefile").read_text()
    extras = re.search(r"\[([\w,]+)\]", " ".join(pip))
    assert extras
    assert f".[{extras[1]}]" in makefile, "conda and make install different extras"
    assert set(extras[1].split(",")) <= set(PROJECT["optional-dependencies"])
    assert "-c constraints.txt" in pip


def test_the_devcontainer_agrees_with_the_project() -> None:
    folder = ROOT / ".devcontainer"
    text = re.sub(r"(?m)^\s*//.*$", "", (folder / "devcontainer.json").read_text())
    made = json.loads(text)
    image, version = re.fullmatch(r"(.+):([\d.]+)-\w+", made["image"]).groups()  # type: ignore[union-attr]
    assert image.endswith("/python")
    assert SpecifierSet(PROJECT["requires-python"]).contains(version)
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert f"python={version}" in conda
    script = made["postCreateCommand"].split()[-1]
    assert (ROOT / script).stat().st_mode & 0o100
    assert f"python{version}" in (ROOT / script).read_text()
    makefile = (ROOT / "Makefile").read_text()
    wanted = re.findall(r"(?m)^make (\S+)", (ROOT / script).read_text())
    assert wanted
    assert all(f"{target}:" in makefile or f"READY := {target}" in makefile for target in wanted)
    assert set(map(str, made["forwardPorts"])) == set(made["portsAttributes"])
    assert urlsplit(load_settings("stack", root=ROOT, environ={}).mlflow_tracking_uri).port in made["forwardPorts"]


def test_the_devcontainer_installs_what_ci_installs() -> None:
    ci, container = ((ROOT / name).read_text() for name in (".ci/run", ".devcontainer/post-create.sh"))
    packages = {word for words in re.findall(r"missing\+=\(([^)]+)\)", ci) for word in words.split()} - {"python3.11-venv"}
    assert packages <= set(container.split())


@pytest.mark.parametrize("profile", ["embedded", "stack"])
def test_settings_file_has_both_profiles_and_only_known_names(profile: str) -> None:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "settings.ini")
    assert set(parser[profile]) <= set(Settings.model_fields)
    assert load_settings(profile, root=ROOT, environ={}).profile == profile


def test_settings_file_and_defaults_agree() -> None:
    from_file = load_settings("embedded", root=ROOT, environ={})
    assert from_file == Settings(root=ROOT), "a service without a settings.ini should behave as the workspace does"


def test_no_output_is_committed_without_need() -> None:
    for path in [*ROOT.glob("notebooks/*/*.ipynb"), *ROOT.glob("solutions/*/*.ipynb")]:
        assert path.stat().st_size < 150_000, f"{path} is large: were outputs committed?"
