"""dvc.yaml over the data steps: a fresh clone runs, a second run does nothing, an edit runs what depends on it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mlops_lib.data.steps import PARAMS, STEPS

ROOT = Path(__file__).parents[2]
FILES = ["dvc.yaml", "params.yaml", "settings.ini", ".dvcignore", ".gitignore", ".dvc/config", ".dvc/.gitignore"]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]

pytest.importorskip("dvc", reason="DVC not tested: it is not installed")


class Workspace:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in FILES:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        code = Path("mlops_lib") / "data"
        shutil.copytree(ROOT / code, folder / code, ignore=shutil.ignore_patterns("__pycache__"))
        self.change("params.yaml", r"rows: 4000", "rows: 200")
        subprocess.run(["git", "init", "-q"], cwd=folder, check=True)

    def change(self, file: str, old: str, new: str) -> None:
        text, count = re.subn(old, new, (self.folder / file).read_text())
        assert count == 1, f"{old!r} is not in {file}"
        (self.folder / file).write_text(text)

    def dvc(self, *args: str) -> str:
        env = {k: v for k, v in os.environ.items() if not k.startswith("MLOPS_")}
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
        command = [sys.executable, "-m", "dvc", *args]
        done = subprocess.run(command, cwd=self.folder, env=env, text=True, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def ran(self, *args: str) -> list[str]:
        return re.findall(r"Running stage '(\w+)'", self.dvc("repro", *args))

    def stale(self) -> set[str]:
        "The steps that DVC would look into; `embed` has not run here and is left out."
        return set(json.loads(self.dvc("status", "--json"))) - {"embed"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    w = Workspace(tmp_path_factory.mktemp("clone"))
    assert w.ran("create_features") == list(STEPS)[:5], "in a fresh clone, every step runs, in order"
    return w


def test_dvc_yaml_has_every_step_and_every_knob() -> None:
    assert list(STAGES) == list(STEPS)
    assert all(stage["cmd"] == f"mlops data step {name}" for name, stage in STAGES.items())
    watched = {p for stage in STAGES.values() for p in stage.get("params", [])}
    known = {f"{k}.{n}" for k, v in PARAMS.items() if isinstance(v, dict) for n in v} | {k for k, v in PARAMS.items() if not isinstance(v, dict)}
    assert watched == known


def test_what_a_step_reads_is_declared() -> None:
    "Each step's inputs, as the manifest noted them in the chain, are among its deps."
    made = {next(iter(o)) if isinstance(o, dict) else o: name for name, stage in STAGES.items() for o in stage["outs"]}
    for name, stage in STAGES.items():
        inputs = [d for d in stage["deps"] if d.startswith("data/")]
        assert name == "extract" or inputs
        assert all(d in made for d in inputs), f"{name} reads something that no step makes"
        assert all((ROOT / d).is_file() for d in stage["deps"] if d.startswith("mlops_lib/")), name


def test_config_is_quiet() -> None:
    text = (ROOT / ".dvc" / "config").read_text()
    assert "analytics = false" in text
    assert "check_update = false" in text
    assert "remote" not in text


def test_second_repro_does_nothing(workspace: Workspace) -> None:
    said = workspace.dvc("repro", "create_features")
    assert "up to date" in said
    assert "Running" not in said
    assert workspace.stale() == set()


@pytest.mark.parametrize(
    ("file", "old", "new", "stale"),
    [
        ("params.yaml", "max_bad_share: 0.05", "max_bad_share: 0.06", {"validate"}),
        ("params.yaml", "seed: 42", "seed: 43", {"extract"}),
        ("params.yaml", "rows: 1000", "rows: 999", set()),
        ("mlops_lib/data/features.py", r"\Z", "\n# an edit\n", {"clean_text", "create_features"}),
        ("mlops_lib/data/steps.py", r"\Z", "\n# an edit\n", set(list(STEPS)[:5])),
        ("mlops_lib/data/store.py", r"\Z", "\n# an edit\n", set()),
    ],
)
def test_an_edit_concerns_what_depends_on_it(workspace: Workspace, file: str, old: str, new: str, stale: set[str]) -> None:
    before = (workspace.folder / file).read_text()
    try:
        workspace.change(file, old, new)
        assert workspace.stale() == stale
    finally:
        (workspace.folder / file).write_text(before)


def test_versions_and_dvc_do_not_fight(workspace: Workspace) -> None:
    "A knob whose turn changes no output: one step runs, the next ones are skipped; turned back, DVC takes it from its cache."
    data = workspace.folder / "data"
    latest = (data / "intermediate" / "validated.parquet").read_bytes()
    workspace.change("params.yaml", "max_bad_share: 0.05", "max_bad_share: 0.2")
    assert workspace.ran("create_features") == ["validate"]
    assert (data / "intermediate" / "validated.parquet").read_bytes() == latest
    versions = list((data / "intermediate" / "versions").glob("validated-*.parquet"))
    assert [v.read_bytes() for v in versions] == [latest], "one content, one version; DVC has not touched it"
    workspace.change("params.yaml", "max_bad_share: 0.2", "max_bad_share: 0.05")
    assert workspace.ran("create_features") == [], "the run cache knows this run"
    assert workspace.stale() == set()
