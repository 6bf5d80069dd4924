"""kill -9, at random moments, of broker, publisher and consumer: no confirmed event is lost, no effect happens twice.

A broker is one more line in BROKERS.
"""

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import private, short, until

from mlops_lib.events.bus import connect
from mlops_lib.events.schema import DataIngested
from mlops_lib.events.transport import PublishError
from mlops_lib.servers import Server

ROUNDS = short(1, 20)
BROKERS: dict[str, tuple[str | None, dict]] = {  # name -> the server that it needs, options of its transport
    "sqlite": (None, {"lease": 2.0}),
    "rabbitmq": ("rabbitmq", {"namespace": "kill"}),
    "redis": ("redis", {"namespace": "kill", "lease": 2.0}),
}
CASES = [(name, victim) for name, (needs, _) in BROKERS.items() for victim in ("broker", "publisher", "consumer") if needs or victim != "broker"]


# ---- what runs in processes of its own


def open_bus(name: str, url: str, folder: Path):
    needs, options = BROKERS[name]
    return connect(url, unroutable="raise", ledger=folder / "ledger.db" if needs else None, **options)


def publisher(name: str, url: str, folder: Path) -> None:
    "Publish until the file `stop` is there, and note what was confirmed, and only that."
    rng = random.Random()
    with (folder / "confirmed").open("a") as note, open_bus(name, url, folder) as bus:
        while not (folder / "stop").exists():
            events = [_event() for _ in range(rng.randint(1, 50))]
            failed = set()
            try:
                bus.publish_many(events)
            except PublishError as e:
                failed = {event.event_id for event, _ in e.failed}
                print(e, flush=True)
            note.write("".join(f"{e.event_id}\n" for e in events if e.event_id not in failed))
            note.flush()
            bus.stopped.wait(rng.uniform(0, 0.02))


def _event() -> DataIngested:
    payload = {"dataset_id": "d", "dataset_path": "d.parquet", "num_samples": 1}
    return DataIngested(source_service="kill", correlation_id=f"story-{random.randrange(20)}", payload=payload)


def consumer(name: str, url: str, folder: Path) -> None:
    "One row for each event; one in fifty fails after its row was written, and has to be tried again."
    rng = random.Random()
    bus = open_bus(name, url, folder)

    def handle(event: DataIngested, tx) -> None:
        tx.execute("insert into effect values (?)", (event.event_id,))
        if rng.random() < 0.02:
            raise OSError("not this time")

    bus.subscribe("q", "data.*", handle, retries=1_000, backoff=0.05, max_backoff=0.5, concurrency=2, prefetch=50)
    while not (folder / "end").exists():
        bus.stopped.wait(0.05)
    bus.close()


# ---- the experiment


class Part:
    "A process that can be killed and started again."

    def __init__(self, role: str, name: str, url: str, folder: Path):
        self.command = [sys.executable, __file__, role, name, url, str(folder)]
        self.log = folder / f"{role}.log"
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            paths = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, env=paths)

    def kill(self) -> None:
        assert self.process.poll() is None, f"ended by itself:\n{self.log.read_text()[-3_000:]}"
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(20)


def confirmed(folder: Path) -> list[str]:
    path = folder / "confirmed"
    text = path.read_text() if path.exists() else ""
    return text[: text.rfind("\n") + 1].split()  # a killed publisher may leave half a line


def effects(folder: Path, what: str = "event_id") -> list:
    with contextlib.closing(sqlite3.connect(folder / "ledger.db", timeout=30)) as db:
        return [row[0] for row in db.execute(f"select {what} from effect")]  # noqa: S608


@contextlib.contextmanager
def running(name: str, folder: Path) -> Iterator[tuple[Server | None, str]]:
    needs = BROKERS[name][0]
    if needs is None:
        yield None, f"sqlite:///{folder}/ledger.db"
        return
    with private(needs, folder / "server") as one:
        yield one, one.url


@pytest.mark.parametrize(("name", "victim"), CASES)
def test_nothing_confirmed_is_lost_and_nothing_happens_twice(
    name: str, victim: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(f"{name}-{victim}")
    with running(name, tmp_path) as (server, url), open_bus(name, url, tmp_path) as bus:
        with bus.transaction() as tx:
            tx.execute("create table effect(event_id text)")  # nothing here forbids a second row
        bus.transport.bind("q", ["data.*"])
        parts = {role: Part(role, name, url, tmp_path) for role in ("consumer", "publisher")}
        logs = [part.log for part in parts.values()]
        try:
            for number in range(ROUNDS):
                before = len(confirmed(tmp_path)), effects(tmp_path, "count(*)")[0]
                until(
                    lambda before=before: len(confirmed(tmp_path)) > before[0] and effects(tmp_path, "count(*)")[0] > before[1],
                    f"events go through in round {number + 1}",
                    *logs,
                )
                time.sleep(rng.uniform(0, 0.3))  # the moment of death
                if victim == "broker" and server:
                    server.kill()
                    server.start()
                else:
                    parts[victim].kill()
                    parts[victim].start()
            (tmp_path / "stop").touch()
            until(lambda: parts["publisher"].process.poll() is not None, "the publisher ends", *logs)
            sure = confirmed(tmp_path)
            until(lambda: set(sure) <= set(effects(tmp_path)), "every confirmed event has its effect", *logs)
            (tmp_path / "end").touch()
            until(lambda: parts["consumer"].process.poll() is not None, "the consumer ends", *logs)
        finally:
            for part in parts.values():
                if part.process.poll() is None:
                    part.kill()
        happened = Counter(effects(tmp_path))
        lost, twice = set(sure) - set(happened), [i for i, n in happened.items() if n > 1]
        with capsys.disabled():
            print(
                f"\nkill -9 {name}/{victim}: {ROUNDS} rounds, {len(sure):,} confirmed, {len(happened):,} with an effect, "
                f"{len(lost)} lost, {len(twice)} twice"
            )
        assert len(set(sure)) == len(sure) >= ROUNDS
        assert not lost
        assert not twice
        assert bus.dead_letters("q") == []


if __name__ == "__main__":
    role, name, url, folder = sys.argv[1:]
    {"publisher": publisher, "consumer": consumer}[role](name, url, Path(folder))
