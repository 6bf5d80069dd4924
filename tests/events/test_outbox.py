"""The ledger: rows, events and notes are stored together or not at all, and what is in the outbox gets out."""

# ruff: noqa: PT012 - a block that is undone holds more than one statement

import contextlib
import json
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_disk import small_disk
from support import an_event

from mlops_lib.events import outbox
from mlops_lib.events.bus import Bus, connect
from mlops_lib.events.outbox import Ledger, LedgerError, LedgerFull, Transaction, inherit
from mlops_lib.events.schema import DriftDetected, Event, EventError
from mlops_lib.events.sqlite import SqliteTransport
from mlops_lib.events.transport import BusUnavailable, Message


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    one = Ledger(tmp_path / "ledger.db")
    with one.transaction() as tx:
        tx.execute("create table account(name text primary key, money integer check (money >= 0))")
        tx.execute("insert into account values ('anna', 100), ('ben', 0)")
    yield one
    one.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    "The ledger's clock: set `now`."
    fake = SimpleNamespace(now=1_000_000.0)
    real = outbox.time
    monkeypatch.setattr(outbox, "time", SimpleNamespace(time=lambda: fake.now, monotonic=real.monotonic, sleep=real.sleep))
    return fake


def stored(ledger: Ledger) -> tuple[dict[str, int], int]:
    with ledger.transaction() as tx:
        return dict(tx.execute("select name, money from account").fetchall()), ledger.outbox_size()


BEFORE = {"anna": 100, "ben": 0}, 0
AFTER = {"anna": 70, "ben": 30}, 2
STEPS: list[Callable[[Transaction], object]] = [
    lambda tx: tx.execute("update account set money = money - 30 where name = 'anna'"),
    lambda tx: tx.publish(an_event(1)),
    lambda tx: tx.execute("update account set money = money + 30 where name = :who", {"who": "ben"}),
    lambda tx: tx.publish(an_event(2), "high"),
]


class Killed(BaseException):
    "Not even an Exception: as SystemExit and KeyboardInterrupt are not."


# ---- together or not at all


@pytest.mark.parametrize("crash_at", range(len(STEPS) + 1))
@pytest.mark.parametrize("error", [ZeroDivisionError, Killed, SystemExit])
def test_rows_and_events_together_or_not_at_all(ledger: Ledger, crash_at: int, error: type[BaseException]) -> None:
    with pytest.raises(error), ledger.transaction() as tx:
        for step in STEPS[:crash_at]:
            step(tx)
        raise error
    assert stored(ledger) == BEFORE
    with ledger.transaction() as tx:
        for step in STEPS:
            step(tx)
        assert tx.published == 2
        with pytest.raises(LedgerError, match="locked"):
            raise_if_locked(ledger)
    assert stored(ledger) == AFTER


def raise_if_locked(ledger: Ledger) -> None:
    "A second writer has to wait; here it does not want to."
    db = sqlite3.connect(ledger.path, timeout=0, isolation_level=None)
    try:
        db.execute("begin immediate")
    except sqlite3.OperationalError as e:
        raise LedgerError(str(e)) from e
    finally:
        db.close()


def test_a_statement_that_fails_undoes_all_unless_it_is_caught(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="CHECK"), ledger.transaction() as tx:
        STEPS[1](tx)
        tx.execute("update account set money = -1")
    assert stored(ledger) == BEFORE
    with ledger.transaction() as tx:
        for step in STEPS:
            step(tx)
        with contextlib.suppress(sqlite3.IntegrityError):
            tx.execute("update account set money = -1")
    assert stored(ledger) == AFTER


@pytest.mark.parametrize("word", ["commit", "END", "Rollback", "begin", "savepoint a", "release a", "attach 'x' as y", "detach y", "pragma x", "vacuum"])
@pytest.mark.parametrize("lead", ["", " \n\t", "/* x */ ", "-- x\n", ";", "\ufeff", "/**/--;\n;/* ' */ /* -- */\n", "-- a\r\n -- /*\n", "/* a\n b */"])
def test_how_it_ends_is_not_for_the_code_inside(ledger: Ledger, lead: str, word: str) -> None:
    with pytest.raises(LedgerError, match=word.split()[0].upper()), ledger.transaction() as tx:
        STEPS[0](tx)
        tx.execute(lead + word)
    assert stored(ledger) == BEFORE


@pytest.mark.parametrize(
    "sql", ["-- commit\nselect 1", "/* commit; */ select 1", "select 'commit'", "with ended(a) as (select 1) select a from ended", "-- a\n" * 5_000 + "select 1", "/**/" * 5_000 + "select 1"]
)
def test_what_only_looks_like_an_end(ledger: Ledger, sql: str) -> None:
    with ledger.transaction() as tx:
        assert tx.execute(sql).fetchone() in ((1,), ("commit",))


def undo_by_conflict(tx: Transaction) -> None:
    with contextlib.suppress(sqlite3.IntegrityError):
        tx.execute("insert or rollback into account values ('anna', 5)")


def undo_by_trigger(tx: Transaction) -> None:
    tx.execute("create table log(x)")
    tx.execute("create trigger no after insert on log begin select raise(rollback, 'no'); end")
    with contextlib.suppress(sqlite3.IntegrityError):
        tx.execute("insert into log values (1)")


def commit_by_cursor(tx: Transaction) -> None:
    tx.execute("select 1").connection.commit()


@pytest.mark.parametrize("end", [undo_by_conflict, undo_by_trigger, commit_by_cursor])
def test_what_ends_it_all_the_same_is_noticed(ledger: Ledger, end: Callable[[Transaction], None]) -> None:
    "Otherwise the statements that follow would be committed one by one."
    with pytest.raises(LedgerError, match="from inside"), ledger.transaction() as tx:
        end(tx)
    for further in STEPS[:2]:
        with ledger.transaction() as tx:
            assert stored_within(tx) == BEFORE
        with pytest.raises(LedgerError, match="from inside"), ledger.transaction() as tx:
            end(tx)
            further(tx)
    assert stored(ledger) == BEFORE


def stored_within(tx: Transaction) -> tuple[dict[str, int], int]:
    rows = dict(tx.execute("select name, money from account").fetchall())
    return rows, tx.execute("select count(*) from outbox").fetchone()[0]


def test_it_is_over_when_it_is_over(ledger: Ledger) -> None:
    with ledger.transaction() as tx:
        pass
    db = ledger.open()
    with ledger.unit(db, "q", "event-1") as unit:
        assert unit is not None
    for late in (tx, unit):
        for step in STEPS:
            with pytest.raises(LedgerError, match="over"):
                step(late)
    db.close()
    assert stored(ledger) == BEFORE


def test_events_that_do_not_travel(ledger: Ledger) -> None:
    big = an_event().payload.model_copy(update={"features": ["x" * 20_000_000]})
    with ledger.transaction() as tx:
        STEPS[0](tx)
        with pytest.raises(EventError, match="20,"):
            tx.publish(an_event().model_copy(update={"payload": big}))
        with pytest.raises(EventError, match="urgent"):
            tx.publish(an_event(), "urgent")
    assert stored(ledger) == ({"anna": 70, "ben": 0}, 0)


# ---- the outbox


def fill(ledger: Ledger, number: int) -> list[str]:
    events = [an_event(i) for i in range(number)]
    with ledger.transaction() as tx:
        for event in events:
            tx.publish(event)
    return [e.event_id for e in events]


def test_two_relays_do_not_take_the_same_events(ledger: Ledger) -> None:
    ids = fill(ledger, 200)
    taken: list[list[str]] = [[], []]
    both = threading.Barrier(2)

    def take(mine: list[str]) -> None:
        one = Ledger(ledger.path)
        both.wait(20)
        while rows := one.take_outbox(limit=7):
            assert [row[0] for row in rows] == sorted(row[0] for row in rows)
            mine += [row[1] for row in rows]
            one.drop_outbox([row[0] for row in rows])
        one.close()

    threads = [threading.Thread(target=take, args=(mine,)) for mine in taken]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert sorted(taken[0] + taken[1]) == sorted(ids)
    assert all(mine == [i for i in ids if i in set(mine)] for mine in taken), "each in order"
    assert ledger.outbox_size() == 0


def test_what_a_dead_relay_held_is_taken_after_its_time(ledger: Ledger, clock: SimpleNamespace) -> None:
    ids = fill(ledger, 5)
    other = Ledger(ledger.path)
    first = ledger.take_outbox(limit=3, hold=30)
    assert [row[1] for row in first] == ids[:3]
    assert [row[1] for row in other.take_outbox(hold=5)] == ids[3:]
    clock.now += 29.9
    assert [row[1] for row in other.take_outbox()] == ids[3:], "only those whose time is up"
    clock.now += 0.2
    assert [row[1] for row in other.take_outbox()] == ids[:3]
    assert other.outbox_size() == 5
    other.free_outbox([first[1][0]])
    assert [row[1] for row in ledger.take_outbox()] == [ids[1]], "what is given back can be taken at once"
    ledger.drop_outbox(row[0] for row in first)
    ledger.drop_outbox([])
    assert ledger.outbox_size() == 2
    other.close()


class Flaky(SqliteTransport):
    "A broker that is down now and then: it says so, as it should, or the transport breaks."

    answers: list[Exception | None] | None = None  # for each message of the next calls
    broken: Exception | None = None

    def publish(self, messages: Sequence[Message]) -> list[Exception | None]:
        if self.broken:
            raise self.broken
        if self.answers is None:
            return super().publish(messages)
        answers = [self.answers[i % len(self.answers)] for i in range(len(messages))]
        good = super().publish([m for m, a in zip(messages, answers, strict=True) if a is None])
        return [good.pop(0) if a is None else a for a in answers]


@pytest.fixture
def flaky(tmp_path: Path) -> Iterator[Bus]:
    with Bus(Flaky(f"sqlite:///{tmp_path}/broker.db"), Ledger(tmp_path / "ledger.db")) as bus:
        yield bus


@pytest.mark.parametrize("how", ["answers", "broken"])
def test_the_relay_goes_on_when_the_broker_is_back(flaky: Bus, how: str) -> None:
    got: list[Event] = []
    flaky.subscribe("q", "#", got.append)
    down = BusUnavailable("the broker is down")
    setattr(flaky.transport, how, down if how == "broken" else [down])
    events = [an_event(i) for i in range(20)]
    for event in events:
        with flaky.transaction() as tx:
            tx.publish(event)
    assert flaky.relay() == 0
    assert flaky.ledger.outbox_size() == 20
    assert got == []
    setattr(flaky.transport, how, None)
    flaky.drain()  # the bus tries again by itself
    assert got == events
    assert flaky.ledger.outbox_size() == 0


def test_only_what_failed_stays(flaky: Bus) -> None:
    flaky.transport.bind("q", ["#"])
    assert isinstance(flaky.transport, Flaky)
    flaky.transport.answers = [None, BusUnavailable("no confirmation"), None]
    ids = fill(flaky.ledger, 9)
    assert flaky.relay() == 6
    assert [row[1] for row in flaky.ledger.take_outbox()] == ids[1::3]


# ---- processes that die, and processes that know less


CHILD = """
import os, signal, sys
from typing import Literal
from mlops_lib.events.bus import connect
from mlops_lib.events.schema import DataIngested, Event, Payload

class ShopOpened(Event):
    class Payload(Payload):
        city: str
    event_type: Literal["shop.opened"] = "shop.opened"
    payload: Payload

bus = connect(sys.argv[1])
bus.relay = lambda: os.kill(os.getpid(), signal.SIGKILL)  # this is where it dies: committed, and not published
with bus.transaction() as tx:
    tx.execute("create table shop(city text)")
    tx.execute("insert into shop values ('Tartu')")
    if sys.argv[2] == "shop":
        tx.publish(ShopOpened(source_service="child", payload={"city": "Tartu"}))
    else:
        bus.publish(DataIngested(source_service="child", payload={"dataset_id": "d", "dataset_path": "d", "num_samples": 7}))
"""


def killed_before_the_relay(url: str, what: str) -> None:
    done = subprocess.run([sys.executable, "-c", CHILD, url, what], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_killed_between_commit_and_relay(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/bus.db"
    killed_before_the_relay(url, "data")
    got: list[Event] = []
    with connect(url) as bus:
        assert bus.ledger.outbox_size() == 1
        bus.subscribe("q", "#", got.append)
        bus.drain()
        with bus.transaction() as tx:
            assert tx.execute("select city from shop").fetchall() == [("Tartu",)]
    assert [e.payload.num_samples for e in got] == [7]


def test_a_type_that_this_process_does_not_know_is_relayed(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/bus.db"
    killed_before_the_relay(url, "shop")
    assert "shop.opened" not in Event.types
    with connect(url) as bus:
        bus.transport.bind("q", ["shop.*"])
        assert bus.relay() == 1
        (delivery,) = bus.transport.receive("q", 10, 10)
    event = json.loads(delivery.message.body)
    assert delivery.message.routing_key == event["event_type"] == "shop.opened"
    assert event["payload"] == {"city": "Tartu"}


# ---- publishing inside


def test_publishing_inside_a_transaction_joins_it(tmp_path: Path) -> None:
    with connect(f"sqlite:///{tmp_path}/bus.db") as bus:
        bus.transport.bind("q", ["#"])
        with pytest.raises(ZeroDivisionError), bus.transaction():
            bus.publish(an_event(1))
            raise ZeroDivisionError
        with bus.transaction():
            bus.publish(an_event(2))
            bus.publish_many([an_event(3), an_event(4)])
            with pytest.raises(LedgerError, match="already"), bus.transaction():
                pass
            assert bus.depth("q")["ready"] == 0
        assert [d.event for d in parsed(bus)] == [2, 3, 4]
        bus.publish(an_event(5))
        assert [d.event for d in parsed(bus)] == [5], "outside again"


def parsed(bus: Bus) -> list:
    got = bus.transport.receive("q", 10, 10)
    for d in got:
        d.event = json.loads(d.message.body)["payload"]["num_samples"]
    bus.transport.ack(got)
    return got


def test_a_handler_that_fails_publishes_nothing(tmp_path: Path) -> None:
    "To a second bus with a ledger of its own it publishes at once: two files are not changed in one commit."
    with connect(f"sqlite:///{tmp_path}/bus.db") as bus, connect(f"sqlite:///{tmp_path}/other.db") as other:
        other.transport.bind("q", ["#"])
        replies: list[Event] = []
        tried: list[int] = []

        def handle(event: Event, tx: Transaction) -> None:
            tried.append(1)
            numbers = {"current_value": 0.3, "baseline_value": 0.1, "threshold": 0.2}
            payload = {"drift_type": "data_drift", "metric_name": "psi", "severity": "low", **numbers}
            bus.publish(event.reply(DriftDetected, payload))
            bus.publish_many([event.reply(DriftDetected, payload)])
            other.publish(event)
            if len(tried) < 3:
                raise OSError("after publishing")

        bus.subscribe("replies", "drift.*", replies.append)
        bus.subscribe("q", "data.*", handle, backoff=0.01)
        bus.publish(an_event())
        bus.drain()
        assert len(tried) == 3
        assert len(replies) == 2
        assert other.depth("q")["ready"] == 3


# ---- the inbox


def test_one_effect_however_many_try(ledger: Ledger) -> None:
    both = threading.Barrier(4)
    new: list[bool] = []

    def handle() -> None:
        db = ledger.open()
        for number in range(10):
            both.wait(20)
            with ledger.unit(db, "q", f"event-{number}") as tx:
                new.append(tx is not None)
                if tx:
                    tx.execute("update account set money = money + 1 where name = 'ben'")
        db.close()

    threads = [threading.Thread(target=handle) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert sorted(new) == [False] * 30 + [True] * 10
    assert stored(ledger)[0]["ben"] == 10


def test_a_failed_attempt_leaves_no_note(ledger: Ledger) -> None:
    db = ledger.open()
    for _ in range(2):
        with pytest.raises(OSError, match="no"), ledger.unit(db, "q", "event-1") as tx:
            assert tx is not None
            raise OSError("no")
    assert ledger.seen("q", ["event-1"]) == set()
    with ledger.unit(db, "q", "event-1") as tx:
        assert tx is not None
    assert ledger.seen("q", ["event-1", "event-2"]) == {"event-1"}
    assert ledger.seen("p", ["event-1"]) == set(), "another queue has a memory of its own"
    db.close()


def test_forget(ledger: Ledger, clock: SimpleNamespace) -> None:
    ledger.record("q", ["a", "b"])
    clock.now += 100
    ledger.record("q", ["b", "c"])  # b keeps its first time
    assert ledger.forget(older_than=100) == 0
    assert ledger.forget(older_than=99) == 2
    assert ledger.seen("q", "abc") == {"c"}
    assert ledger.seen("q", []) == set()


# ---- files that are none, and disks that are full


def test_files_that_are_no_ledger(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("a list of things to buy, and no database at all\n" * 100)
    (tmp_path / "folder.db").mkdir()
    for path in ("text.db", "folder.db", "text.db/below/ledger.db"):
        with pytest.raises(LedgerError, match="text.db|folder.db"):
            Ledger(tmp_path / path)


def test_a_file_that_was_damaged(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    one = Ledger(path)
    ids = fill(one, 300)
    one.close()
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * (size - 4096))
    with pytest.raises(LedgerError, match="ledger.db"):  # on opening, or as soon as a page is read
        broken = Ledger(path)
        try:
            broken.seen("q", ids[:3])
            broken.take_outbox()
        finally:
            broken.close()


def test_full_is_a_matter_of_the_disk(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="no such table: full") as caught, ledger.transaction() as tx:
        tx.execute("select * from full")
    assert not isinstance(caught.value, LedgerFull)


def test_a_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path, 1_000) as disk:
        ballast = disk / "ballast"
        ballast.write_bytes(b"x" * 300_000)
        ledger = Ledger(disk / "ledger.db")
        with ledger.transaction() as tx:
            tx.execute("create table thing(event_id text, body text)")
        done: list[str] = []

        def add() -> None:
            event = an_event(len(done))
            with ledger.transaction() as tx:
                tx.execute("insert into thing values (?, ?)", (event.event_id, "x" * 5_000))
                tx.publish(event)
            done.append(event.event_id)

        with pytest.raises(LedgerFull, match="nothing of this change"):
            while len(done) < 1_000:
                add()
        assert done

        def both() -> tuple[list[str], list[str]]:
            db = sqlite3.connect(ledger.path)
            try:
                return [r[0] for r in db.execute("select event_id from thing")], [r[0] for r in db.execute("select event_id from outbox")]
            finally:
                db.close()

        assert both() == (done, done), "what was committed is there, and nothing else"
        with pytest.raises(LedgerFull):
            for _ in range(100):
                ledger.record("q", [f"{i:036d}" for i in range(100)])
        ballast.unlink()
        add()
        assert both() == (done, done)
        ledger.close()


# ---- a ledger that begins with what another one holds


def test_of_many_heirs_at_once_one_gets_what_waits_and_each_gets_the_notes(tmp_path: Path) -> None:
    old = Ledger(tmp_path / "old.db")
    with old.transaction() as tx:
        for n in range(20):
            tx.publish(an_event(n))
    old.record("q", ["before"])
    paths = [tmp_path / f"{n % 4}.db" for n in range(12)]  # three of each
    start = threading.Barrier(len(paths))

    def heir(path: Path) -> None:
        start.wait()
        inherit(old.path, path)

    threads = [threading.Thread(target=heir, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    heirs = [Ledger(path) for path in sorted(set(paths))]
    assert sorted(one.outbox_size() for one in (old, *heirs)) == [0, 0, 0, 0, 20]
    assert all(one.seen("q", ["before"]) for one in heirs)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")], "no part is left behind"
    for one in (old, *heirs):
        one.close()


def test_an_heir_that_is_killed_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = Ledger(tmp_path / "old.db"), tmp_path / "new.db"
    with old.transaction() as tx:
        tx.publish(an_event(1))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            inherit(old.path, new)
    assert old.outbox_size() == 1 and [path.name for path in tmp_path.iterdir() if "new" in path.name] == []
    inherit(old.path, new)
    inherit(old.path, new)
    assert old.outbox_size() == 0 and Ledger(new).outbox_size() == 1
    old.close()


def test_a_file_that_is_no_ledger_is_named(tmp_path: Path) -> None:
    (tmp_path / "old.db").write_bytes(b"no database at all" * 99)
    with pytest.raises(LedgerError, match=r"old.db: file is not a database"):
        inherit(tmp_path / "old.db", tmp_path / "new.db")
    assert not (tmp_path / "new.db").exists()
    inherit(tmp_path / "missing.db", tmp_path / "new.db")
    assert not (tmp_path / "new.db").exists(), "nothing to begin with"
