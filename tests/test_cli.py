"""The command line as a script sees it: exit codes, streams, JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mlops_lib.cli import Command, cli, every_command

ROOT = Path(__file__).parents[1]


def call(*args: object):
    return CliRunner().invoke(cli, [str(a) for a in args])


@pytest.mark.parametrize(("path", "command"), list(every_command(cli)), ids=lambda x: " ".join(x) if isinstance(x, tuple) else "")
def test_every_command_has_help_with_an_example_that_names_it(path: tuple[str, ...], command: click.Command) -> None:
    result = call(*path[1:], "--help")
    assert result.exit_code == 0
    assert isinstance(command, Command)
    assert f"Example: {' '.join(path)}" in " ".join(result.output.split())


@pytest.mark.parametrize(
    "args",
    [
        ("run", "--only", "no-such-lesson"),
        ("run", "--profile", "prod"),
        ("run", "-p", "no_such_parameter", "1"),
        ("run", "--reviews", "no-such-file.jsonl"),
        ("no-such-command",),
    ],
)
def test_asking_wrongly_is_exit_code_2(args: tuple[str, ...]) -> None:
    assert call(*args).exit_code == 2


def test_a_wrong_setting_is_one_sentence_and_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nseed = many\n[embedded]\n[stack]\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLOPS_")}
    tool = Path(sys.executable).parent / "mlops"
    result = subprocess.run([tool, "run"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stdout == ""
    assert "seed" in result.stderr
    assert "'many'" in result.stderr
    assert "Traceback" not in result.stderr


def test_run_gives_json_for_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    result = call("run", "--only", "00", "--json")
    data = json.loads(result.stdout)
    assert result.exit_code == 0
    assert data["green"] is True
    assert data["lessons"][0]["name"] == "0_start/00_settings"
    assert (Path(data["folder"]) / "index.html").is_file()


def test_a_failing_lesson_is_exit_code_1_and_shows_its_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    lesson = tmp_path / "notebooks" / "0_a" / "00_bad.ipynb"
    lesson.parent.mkdir(parents=True)
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Bad"), new_code_cell("price['pear']")], metadata=kernel), lesson)
    (tmp_path / "settings.ini").write_text("[embedded]\n[stack]\n")
    monkeypatch.chdir(tmp_path)
    result = call("run")
    assert result.exit_code == 1
    assert "NameError" in result.output
    assert "price['pear']" in result.output
    assert "NameError" in result.output[result.output.index("Report:") :], "said once more at the end, where a log that is cut still has it"


@pytest.mark.parametrize(
    "args",
    [
        ("worker", "trainer"),
        ("worker", "registry", "--framework", "pytorch"),
        ("worker", "training", "--options", "{no json"),
        ("worker", "--options", '{"folder": "here"}'),
        ("train", "--all", "--kind", "svm"),
        ("registry", "declare"),
    ],
)
def test_a_service_that_is_not_there_and_options_that_do_not_fit_are_exit_code_2(args: tuple[str, ...]) -> None:
    assert call(*args).exit_code == 2


def test_a_worker_ends_on_sigterm_with_exit_code_0(tmp_path: Path) -> None:
    import signal

    environment = os.environ | {"MLOPS_DATA_DIR": str(tmp_path)}
    command = [Path(sys.executable).parent / "mlops", "worker", "ingress", "history", "--bus", f"sqlite:///{tmp_path / 'bus.db'}"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr
    said = []
    for line in process.stderr:
        said.append(line)
        if "at work" in line:
            break
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0, "".join(said)


def test_train_all_shows_every_kind_and_draws_it(tmp_path: Path) -> None:
    import numpy as np
    import pandas as pd

    rng = np.random.default_rng(0)
    x = rng.normal(size=(150, 2))
    frame = pd.DataFrame(x, columns=["a", "b"]).assign(y=np.where(x[:, 0] + 0.3 * rng.normal(size=150) > 0, "yes", "no"))
    frame.to_csv(tmp_path / "table.csv", index=False)
    plot = tmp_path / "board.svg"
    result = call("train", "--all", "--table", tmp_path / "table.csv", "--target", "y", "--cv", "2", "--plot", plot, "--json")
    told = json.loads(result.stdout)
    found = {row["candidate"]: row for row in told["leaderboard"]}
    assert result.exit_code == 0
    assert {"baseline", "logistic", "xgboost", "forest"} <= set(found)
    assert found["logistic"]["auc_roc"] > found["baseline"]["auc_roc"]
    assert all(row["fit_s"] > 0 and row["alone_ms"] > 0 and row["size_kb"] > 0 for row in found.values())
    assert "<svg" in plot.read_text()
