"""`mlops drift check` as it is typed: three ways to end, and files of all sorts."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from support import until

from mlops_lib.cli import cli
from mlops_lib.cli_monitoring import read_table
from mlops_lib.events.bus import connect
from mlops_lib.monitoring.telemetry import Sample, TelemetryError, scrape
from mlops_lib.settings import settings

RNG = np.random.default_rng(11)
TABLE = pd.DataFrame({"minutes": RNG.gamma(4, 2, 800), "channel": RNG.choice(["mail", "chat"], 800)})


def call(*args: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli, ["drift", "check", *map(str, args)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    paths = {name: tmp_path / name for name in ("then.parquet", "same.csv", "same.jsonl", "same.csv.gz", "other.parquet")}
    TABLE.to_parquet(paths["then.parquet"])
    same = TABLE.sample(300, replace=True, random_state=0)
    same.to_csv(paths["same.csv"], index=False)
    same.to_csv(paths["same.csv.gz"], index=False)
    same.to_json(paths["same.jsonl"], orient="records", lines=True)
    same.assign(minutes=same["minutes"] * 2).to_parquet(paths["other.parquet"])
    return paths


@pytest.mark.parametrize("name", ["same.csv", "same.jsonl", "same.csv.gz"])
def test_files_of_other_forms_that_say_the_same_have_not_drifted(files: dict[str, Path], name: str) -> None:
    code, out, err = call(files["then.parquet"], files[name])
    assert (code, err) == (0, "")
    assert out.startswith("No drift (800 rows then, 300 now)")


def test_drift_is_three_in_words_in_json_and_as_a_page(files: dict[str, Path], tmp_path: Path) -> None:
    code, out, _ = call(files["then.parquet"], files["other.parquet"])
    assert code == 3
    assert "minutes" in out.splitlines()[1]
    page = tmp_path / "report.html"
    code, out, _ = call(files["then.parquet"], files["other.parquet"], "--json", "--html", page)
    told = json.loads(out)
    assert code == 3
    assert [f["name"] for f in told["features"] if f["drifted"]] == ["minutes"]
    assert "<svg" in page.read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert call(files["then.parquet"], files["other.parquet"], "--column", "channel")[0] == 0


def test_findings_are_published_and_nothing_is_where_nothing_was_found(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sqlite:///{tmp_path}/bus.db"
    monkeypatch.setattr("mlops_lib.settings.settings", settings.model_copy(update={"bus_url": url}))
    heard = []
    with connect(url) as bus:
        bus.subscribe("watch", ["drift.detected"], heard.append)
        assert call(files["then.parquet"], files["same.csv"], "--publish")[0] == 0
        assert call(files["then.parquet"], files["other.parquet"], "--publish")[0] == 3
        bus.drain()
    assert [event.payload.metric_name.split(":")[0] for event in heard] == ["minutes"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.csv", b"", "is empty"),
        ("head.csv", b"minutes,channel\n", "empty"),
        ("cut.parquet", b"PAR1 and no more", "cannot be read as parquet"),
        ("cut.jsonl", b'{"a": 1}\n{"a":', "cannot be read as jsonl"),
        ("latin.csv", b"minutes\n\xff\xfe\n", "cannot be read as csv"),
        ("table.xlsx", b"PK", "no table that is known"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_a_failure_and_never_drift(files: dict[str, Path], tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    code, out, err = call(files["then.parquet"], path)
    assert (code, out) == (1, "")
    assert said in err
    assert "Traceback" not in err


def test_a_command_that_is_typed_wrongly_is_two(files: dict[str, Path], tmp_path: Path) -> None:
    then, same = files["then.parquet"], files["same.csv"]
    for args in ((then,), (then, tmp_path / "missing.csv"), (then, same, "--alpha", 0), (then, same, "--column", "weather"), (then, same, "--rows", 3)):
        assert call(*args)[0] == 2, args


def test_a_long_file_is_thinned_evenly_and_that_is_said(files: dict[str, Path], tmp_path: Path) -> None:
    long = tmp_path / "long.csv"
    pd.DataFrame({"n": range(1_000)}).to_csv(long, index=False)
    frame, whole = read_table(long, rows=300)
    assert (whole, len(frame)) == (1_000, 250)
    assert frame["n"].diff().dropna().eq(4).all()
    assert "250 of 1,000" in call(long, long, "--rows", 300)[2]


@contextmanager
def command(folder: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    "`mlops …` as a process, and its log; it ends on SIGTERM with exit code 0."
    about = {"MLOPS_DATA_DIR": str(folder / "data"), "MLOPS_MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    log = folder / f"{words[0]}-{words[1]}.log"
    with log.open("w") as out:
        words = (*words, "--bus", f"sqlite:///{folder}/bus.db")
        process = subprocess.Popen([Path(sys.executable).parent / "mlops", *words], env=os.environ | about, stdout=out, stderr=out, text=True)
    try:
        yield process, log
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0, log.read_text()[-3_000:]
    finally:
        process.kill()
        process.wait()


def test_the_exporter_shows_the_bus_and_is_found(tmp_path: Path) -> None:
    with command(tmp_path, "exporter", "--port", "0", "--targets", str(tmp_path / "targets")) as (_, log):
        until(lambda: "serving" in log.read_text(), "it serves", log)
        address = log.read_text().partition("serving ")[2].split("/metrics")[0]
        until(lambda: Sample("bus_up", {}, 1.0) in scrape(address), "it knows the bus", log)
        (path,) = until(lambda: list((tmp_path / "targets").glob("*.yml")), "Prometheus is told", log)
        assert address.removeprefix("http://") in path.read_text()
    assert not list((tmp_path / "targets").iterdir())


@pytest.mark.parametrize(
    ("name", "options", "queues"),
    [
        ("monitor", {"text": False}, {"monitor", "monitor-counts"}),
        ("retraining", {"policy": {"cooldown_hours": 1}}, {"retraining"}),
        ("classifying", {"library": "here"}, {"classifying"}),
        ("indexing", {"library": "here"}, {"indexing"}),
    ],
)
def test_services_of_later_lessons_are_workers_that_show_their_numbers(name: str, options: dict[str, Any], queues: set[str], tmp_path: Path) -> None:
    given = options | ({"library": str(tmp_path / "library")} if "library" in options else {})
    with command(tmp_path, "worker", name, "--metrics-port", "0", "--options", json.dumps(given)) as (_, log):
        until(lambda: "at work" in log.read_text(), "it is at work", log)
        with connect(f"sqlite:///{tmp_path}/bus.db") as bus:
            assert queues <= set(bus.queues())
        port = int(log.read_text().partition("port=")[2].split()[0])
        assert any(s.name.startswith("process_cpu") for s in scrape(f"http://127.0.0.1:{port}"))
    with pytest.raises(TelemetryError, match="No answer"):
        scrape(f"http://127.0.0.1:{port}", timeout=2)
