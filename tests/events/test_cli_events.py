"""`mlops events`: what a person at a terminal, or a script, gets to know of a bus."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support import an_event

from mlops_lib.cli import cli
from mlops_lib.events.bus import connect
from mlops_lib.events.schema import DataValidated


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    address = f"sqlite:///{tmp_path}/bus.db"
    monkeypatch.setattr("mlops_lib.events.history.settings", _settings(tmp_path))
    return address


def _settings(folder: Path):
    from mlops_lib.settings import settings

    return settings.model_copy(update={"data_dir": folder, "redis_url": None})


def mlops(*args: str) -> Result:
    return CliRunner().invoke(cli, ["events", *args])


def test_tail_show_and_story(url: str, tmp_path: Path) -> None:
    with connect(url) as bus:
        bus.subscribe("history", "#", lambda event: None).close()
        first = bus.publish(an_event(7, "monday"))
        payload = first.payload.model_dump() | {"passed": True}
        second = bus.publish(first.reply(DataValidated, payload, "validation"))
    told = mlops("tail", "--bus", url, "--json")
    assert told.exit_code == 0, told.output
    assert [json.loads(line)["event_id"] for line in told.stdout.splitlines()] == [first.event_id, second.event_id]
    assert mlops("tail", "data.validated", "--bus", url).stdout.count("monday") == 1
    shown = mlops("show", first.event_id.upper(), "--bus", url)
    assert json.loads(shown.stdout)["payload"]["num_samples"] == 7
    story = mlops("story", "monday", "--bus", url, "--html", str(tmp_path / "story.html"))
    assert "  data.validated (validation)" in story.stdout, "an effect stands under its cause"
    assert "<svg" in (tmp_path / "story.html").read_text()


def test_dead_letters_and_another_chance(url: str) -> None:
    with connect(url) as bus:
        bus.subscribe("q", "data.*", lambda event: 1 / 0, retries=0)
        sent = bus.publish(an_event())
        bus.drain()
    (letter,) = json.loads(mlops("dlq", "q", "--bus", url, "--json").stdout)
    assert (letter["event_id"], letter["error_type"]) == (sent.event_id, "ZeroDivisionError")
    assert json.loads(mlops("dlq", "--bus", url, "--json").stdout)["q"] == {"ready": 0, "delayed": 0, "dead": 1}
    assert json.loads(mlops("replay", "q", "--bus", url, "--json").stdout)["replayed"] == 1
    again = mlops("replay", "q", sent.event_id, "--bus", url)
    assert again.exit_code == 1
    assert "not among the dead letters" in again.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["show", "no-such-id"], "No event"),
        (["story", "no-such-story"], "no story"),
        (["dlq", "a queue"], "not a queue's name"),
        (["tail", "a..b"], "not a routing pattern"),
        (["tail", "--bus", "http://example.org"], "no address of a bus"),
        (["dlq", "--bus", "redis://:secret@127.0.0.1:1"], "127.0.0.1:1"),
    ],
)
def test_mistakes_are_one_sentence(url: str, args: list[str], said: str) -> None:
    result = mlops(*args, *([] if "--bus" in args else ["--bus", url]))
    assert result.exit_code == 1
    assert said in result.stderr
    assert "Traceback" not in result.output
    assert "secret" not in result.output
