"""The queue in a file: many processes, one owner at a time, nothing lost on a full disk, and wrong addresses refused."""

# ruff: noqa: PT012 - a loop that runs until it is refused is more than one statement

import itertools
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from small_disk import small_disk
from support import an_event

from mlops_lib.events import sqlite
from mlops_lib.events.bus import connect
from mlops_lib.events.sqlite import SqliteTransport
from mlops_lib.events.transport import (
    UNROUTABLE,
    BusError,
    BusFull,
    BusUnavailable,
    ConsumerExists,
    Delivery,
    Failure,
    Message,
    Unroutable,
)

WHY = Failure("OSError", "no such file", attempts=1)
MakeTransport = Callable[..., SqliteTransport]


def message(key: str = "a.x", priority: int = 1, size: int = 2) -> Message:
    return Message(str(uuid.uuid4()), key, "story", b"x" * size, priority)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeTransport]:
    "As many users of one file as a test wants."
    made: list[SqliteTransport] = []

    def one(**options: object) -> SqliteTransport:
        made.append(SqliteTransport(f"sqlite:///{tmp_path}/bus.db", **options))  # type: ignore[arg-type]
        return made[-1]

    yield one
    for transport in made:
        transport.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    "The clock of all transports of this process: set `now`."
    real = sqlite.time
    fake = SimpleNamespace(ahead=0.0)
    monkeypatch.setattr(sqlite, "time", SimpleNamespace(time=lambda: real.time() + fake.ahead, monotonic=real.monotonic))
    return fake


def ids(deliveries: list[Delivery]) -> list[str]:
    return [d.message.event_id for d in deliveries]


# ---- a model in memory that says what has to be where


@dataclass
class Row:
    queue: str
    number: int  # in the order of publishing
    message: Message
    state: str = "ready"  # or lent, delayed, dead
    attempts: int = 0
    due: float = 0.0
    owner: tuple[int, int] | None = None  # who has it, and by which taking


class Queues(RuleBasedStateMachine):
    "Two users of one file do whatever they like, in any order; the file and the model never differ."

    def __init__(self) -> None:
        super().__init__()
        self.now, self._real = 1_000_000.0, sqlite.time
        sqlite.time = SimpleNamespace(time=lambda: self.now, monotonic=lambda: self.now)  # type: ignore[assignment]
        self.url = f"memory://{uuid.uuid4()}"
        self.users = [SqliteTransport(self.url, lease=10), SqliteTransport(self.url, lease=25)]
        self.rows: list[Row] = []
        self.taken: list[tuple[int, Delivery, Row, tuple[int, int]]] = []  # all that was ever lent
        self.numbers = itertools.count()

    @initialize()
    def bind(self) -> None:
        self.users[0].bind("q", ["a.*"])
        self.users[1].bind("p", ["*.x", "a.#"])

    def teardown(self) -> None:
        for user in self.users:
            user.close()
        sqlite.time = self._real

    @rule(who=st.integers(0, 1), sorts=st.lists(st.tuples(st.sampled_from(["a.x", "b.x", "c.y"]), st.integers(0, 2)), max_size=5))
    def publish(self, who: int, sorts: list[tuple[str, int]]) -> None:
        messages = [message(key, priority) for key, priority in sorts]
        wanted = {"a.x": ["p", "q"], "b.x": ["p"], "c.y": []}
        for m, error in zip(messages, self.users[who].publish(messages), strict=True):
            assert isinstance(error, Unroutable) if not wanted[m.routing_key] else error is None
            self.rows += [Row(queue, next(self.numbers), m) for queue in wanted[m.routing_key]]

    @rule(who=st.integers(0, 1))
    def park(self, who: int) -> None:
        m = message("c.y")
        self.users[who].park(m, WHY)
        self.rows.append(Row(UNROUTABLE, next(self.numbers), m, "dead"))

    @rule(who=st.integers(0, 1), queue=st.sampled_from("pq"), limit=st.integers(1, 4))
    def receive(self, who: int, queue: str, limit: int) -> None:
        got = self.users[who].receive(queue, limit, wait=0)
        for row in self.rows:
            if row.state in ("lent", "delayed") and row.due <= self.now:
                row.state, row.owner = "ready", None
        ready = [r for r in self.rows if r.queue == queue and r.state == "ready"]
        right = sorted(ready, key=lambda r: (-r.message.priority, r.number))[:limit]
        assert [(d.message, d.attempts) for d in got] == [(r.message, r.attempts) for r in right]
        name = who, len(self.taken)
        for row, delivery in zip(right, got, strict=True):
            row.state, row.owner, row.due = "lent", name, self.now + self.users[who].lease
            self.taken.append((who, delivery, row, name))

    def one(self, data: st.DataObject) -> tuple[SqliteTransport, Delivery, Row | None]:
        "Anything that was ever lent; the row only if it is still lent by that taking."
        who, delivery, row, name = data.draw(st.sampled_from(self.taken[-12:]))
        return self.users[who], delivery, row if row in self.rows and row.owner == name else None

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def ack(self, data: st.DataObject) -> None:
        user, delivery, row = self.one(data)
        user.ack([delivery])
        if row:
            self.rows.remove(row)

    @precondition(lambda self: self.taken)
    @rule(data=st.data(), delay=st.sampled_from([0, 3, 30]), failed=st.booleans())
    def retry(self, data: st.DataObject, delay: float, failed: bool) -> None:
        user, delivery, row = self.one(data)
        user.retry(delivery, delay, Failure("OSError", "again", attempts=delivery.attempts + 1) if failed else None)
        if row:
            row.state, row.owner, row.due, row.attempts = "delayed", None, self.now + delay, row.attempts + failed

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        user, delivery, row = self.one(data)
        user.release([delivery])
        if row:
            row.state, row.owner = "ready", None

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        user, delivery, row = self.one(data)
        user.extend([delivery])
        if row:
            row.due = self.now + user.lease

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def bury(self, data: st.DataObject) -> None:
        user, delivery, row = self.one(data)
        user.bury(delivery, WHY)
        if row:
            row.state, row.owner, row.attempts = "dead", None, WHY.attempts

    @rule(who=st.integers(0, 1), queue=st.sampled_from("pq"), data=st.data())
    def replay(self, who: int, queue: str, data: st.DataObject) -> None:
        dead = [r for r in self.rows if r.queue == queue and r.state == "dead"]
        some = data.draw(st.none() | st.lists(st.sampled_from([r.message.event_id for r in dead] or ["none"]), unique=True))
        chosen = [r for r in dead if some is None or r.message.event_id in some]
        assert self.users[who].replay(queue, some) == len(chosen)
        for row in chosen:
            row.state, row.attempts = "ready", 0

    @rule(seconds=st.sampled_from([1, 5, 10, 25, 60]))
    def time_goes_by(self, seconds: float) -> None:
        self.now += seconds

    @rule(who=st.integers(0, 1))
    def leave_and_return(self, who: int) -> None:
        lease = self.users[who].lease
        self.users[who].close()
        self.users[who] = SqliteTransport(self.url, lease=lease)
        for row in self.rows:
            if row.owner and row.owner[0] == who:
                row.state, row.owner = "ready", None

    @invariant()
    def the_file_is_as_the_model_says(self) -> None:
        user = self.users[0]
        there = user._read("select queue, event_id, state, attempts from message order by id")
        number = {"ready": 0, "lent": 1, "delayed": 1, "dead": 2}
        attempts = {id(r): WHY.attempts if r.state == "dead" and r.queue != UNROUTABLE else r.attempts for r in self.rows}
        right = [(r.queue, r.message.event_id, number[r.state], attempts[id(r)]) for r in sorted(self.rows, key=lambda r: r.number)]
        assert [(q, i, s, 0 if q == UNROUTABLE else a) for q, i, s, a in there] == right, "nothing lost, nothing twice"
        for queue in ("p", "q", UNROUTABLE):
            states = [r.state for r in self.rows if r.queue == queue]
            assert user.depth(queue) == {s: states.count(s) for s in ("ready", "delayed", "dead")}
            dead = [r.message.event_id for r in sorted(self.rows, key=lambda r: r.number) if r.queue == queue and r.state == "dead"]
            assert [letter.event_id for letter in user.dead(queue)] == dead


TestQueues = Queues.TestCase
TestQueues.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)


# ---- several processes


def child(code: str, *args: object) -> "subprocess.Popen[str]":
    start = "import os, signal, sys\nfrom mlops_lib.events.sqlite import SqliteTransport\nfrom mlops_lib.events.transport import *\n"
    command = [sys.executable, "-c", start + code, *map(str, args)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout
    assert process.stderr
    return process.stdout.readline().strip() or process.stderr.read()


def test_another_process_publishes_and_the_consumer_wakes(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/bus.db"
    code = """
from mlops_lib.events.bus import connect
from mlops_lib.events.schema import DataIngested
bus = connect(sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    bus.publish(DataIngested(source_service="child", payload={"dataset_id": "d", "dataset_path": "d", "num_samples": int(line)}))
"""
    got: list[int] = []
    changed = threading.Condition()

    def handle(event: object) -> None:
        with changed:
            got.append(event.payload.num_samples)  # type: ignore[attr-defined]
            changed.notify_all()

    with connect(url) as bus, child(code, url) as process:
        bus.subscribe("q", "data.*", handle)
        assert line(process) == "ready"
        for number in (1, 2, 3):
            assert process.stdin
            process.stdin.write(f"{number}\n")
            process.stdin.flush()
            with changed:
                assert changed.wait_for(lambda number=number: got[-1:] == [number], timeout=30)  # type: ignore[misc]
        process.stdin.close()
        assert process.wait(30) == 0
    assert got == [1, 2, 3]


@pytest.mark.parametrize("by", ["publish", "release", "replay", "wake"])
def test_in_one_process_nobody_has_to_look(make: MakeTransport, by: str) -> None:
    waiting, other = make(poll=3_600), make()
    other.bind("q", ["#"])
    other.publish([message()])
    (held,) = other.receive("q", 1, 10)
    if by == "replay":
        other.bury(held, WHY)
    got: list[list[Delivery]] = []
    thread = threading.Thread(target=lambda: got.append(waiting.receive("q", 10, 3_600)), daemon=True)
    thread.start()
    while thread.is_alive() and not waiting._wake.condition._waiters:  # type: ignore[attr-defined]
        thread.join(0.001)
    {
        "publish": lambda: other.publish([message()]),
        "release": lambda: other.release([held]),
        "replay": lambda: other.replay("q", None),
        "wake": other.wake,
    }[by]()
    thread.join(30)
    assert not thread.is_alive()
    assert [len(g) for g in got] == [0 if by == "wake" else 1]


def test_several_processes_make_the_file_and_fill_it(tmp_path: Path) -> None:
    code = """
print("ready", flush=True)
sys.stdin.readline()
t = SqliteTransport(sys.argv[1])
t.bind("q", ["#"])
for i in range(40):
    assert t.publish([Message(f"{sys.argv[2]}-{i}-{k}", "a.x", "k", b"{}") for k in range(3)]) == [None] * 3
t.close()
"""
    url = f"sqlite:///{tmp_path}/new/folder/bus.db"
    processes = [child(code, url, number) for number in range(4)]
    assert [line(p) for p in processes] == ["ready"] * 4
    for p in processes:
        assert p.stdin
        p.stdin.write("go\n")
        p.stdin.flush()
    assert [p.communicate(timeout=120)[1] for p in processes] == [""] * 4
    transport = SqliteTransport(url)
    got = ids(transport.receive("q", 1_000, 10))
    transport.close()
    assert sorted(got) == sorted(f"{n}-{i}-{k}" for n in range(4) for i in range(40) for k in range(3))
    for n in range(4):
        mine = [i for i in got if i.startswith(f"{n}-")]
        assert mine == [f"{n}-{i}-{k}" for i in range(40) for k in range(3)], "each in the order in which it was published"


def test_what_a_dead_process_held_comes_back(make: MakeTransport, tmp_path: Path, clock: SimpleNamespace) -> None:
    transport = make()
    transport.bind("q", ["#"])
    sent = [message() for _ in range(3)]
    transport.publish(sent)
    code = "t = SqliteTransport(sys.argv[1], lease=10)\nassert len(t.receive('q', 2, 10)) == 2\nos.kill(os.getpid(), signal.SIGKILL)"
    process = child(code, f"sqlite:///{tmp_path}/bus.db")
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == -signal.SIGKILL
    third = transport.receive("q", 10, 0)
    assert ids(third) == [sent[2].event_id], "two are lent, for ten seconds"
    transport.ack(third)
    clock.ahead += 11
    back = transport.receive("q", 10, 10)
    assert [d.message for d in back] == sent[:2]


def test_the_id_of_a_dead_consumer_is_free(make: MakeTransport, tmp_path: Path) -> None:
    transport = make()
    code = "t = SqliteTransport(sys.argv[1])\nt.claim('trainer')\nprint('claimed', flush=True)\nsys.stdin.read()"
    with child(code, f"sqlite:///{tmp_path}/bus.db") as process:
        assert line(process) == "claimed"
        with pytest.raises(ConsumerExists, match="trainer"):
            transport.claim("trainer")
        process.kill()
        process.wait(30)
        transport.claim("trainer")
        with pytest.raises(ConsumerExists):
            transport.claim("trainer")
        transport.unclaim("trainer")
        transport.claim("trainer")


# ---- owners


SAYINGS: dict[str, Callable[[SqliteTransport, Delivery], object]] = {
    "ack": lambda t, d: t.ack([d]),
    "retry": lambda t, d: t.retry(d, 0, WHY),
    "bury": lambda t, d: t.bury(d, WHY),
    "release": lambda t, d: t.release([d]),
    "extend": lambda t, d: t.extend([d]),
}


@pytest.mark.parametrize("saying", SAYINGS)
@pytest.mark.parametrize("same", [False, True], ids=["another user", "the same user"])
def test_a_stale_owner_has_no_say(make: MakeTransport, clock: SimpleNamespace, saying: str, same: bool) -> None:
    slow = make()
    quick = slow if same else make()
    slow.bind("q", ["#"])
    slow.publish([message()])
    (late,) = slow.receive("q", 1, 0)
    clock.ahead += 11
    (again,) = quick.receive("q", 1, 0)
    before = slow._read("select * from message")
    SAYINGS[saying](slow, late)
    assert slow._read("select * from message") == before
    quick.ack([again])
    assert slow._read("select count(*) from message") == [(0,)]
    slow.publish([message()])  # SQLite gives the number of the row that is gone to the next one
    (new,) = slow.receive("q", 1, 0)
    before = slow._read("select * from message")
    SAYINGS[saying](slow, late)
    assert slow._read("select * from message") == before, "of another message still less"
    slow.ack([new])


def test_late_but_still_the_owner(make: MakeTransport, clock: SimpleNamespace) -> None:
    one = make()
    one.bind("q", ["#"])
    one.publish([message()])
    (mine,) = one.receive("q", 1, 0)
    clock.ahead += 100  # and nobody else has taken it
    one.ack([mine])
    assert one.receive("q", 1, 0) == []


def test_a_queue_that_another_process_binds_is_heard_of(make: MakeTransport) -> None:
    a, b = make(), make()
    assert isinstance(a.publish([message()])[0], Unroutable)
    b.bind("q", ["a.*"])
    assert a.publish([message()]) == [None]
    b.bind("q", ["b.*"])
    assert isinstance(a.publish([message()])[0], Unroutable), "the last word counts"
    assert a.publish([message("b.x")]) == [None]
    assert len(a.receive("q", 10, 0)) == 2


# ---- no room


def test_a_full_queue_can_be_emptied(make: MakeTransport) -> None:
    one, other = make(max_mb=0.3), make()
    one.bind("q", ["#"])
    kept: list[str] = []
    error: Exception | None = None
    while error is None and len(kept) < 1_000:
        batch = [message(size=5_000) for _ in range(4)]
        results = one.publish(batch)
        assert len({type(r) for r in results}) == 1, "all of a batch or nothing"
        error = results[0]
        kept += [] if error else [m.event_id for m in batch]
    assert isinstance(error, BusFull)
    assert "0.3 MB" in str(error)
    assert other.publish([message(size=5_000)]) == [None], "the limit is of the one who set it"
    kept.append(other._read("select event_id from message order by id desc limit 1")[0][0])
    first, second, *rest = one.receive("q", 1_000, 0)
    assert ids([first, second, *rest]) == kept
    one.retry(first, 0, WHY)
    one.bury(second, WHY)
    one.ack(rest)
    assert one.replay("q", None) == 1
    assert one.publish([message()]) == [None]
    assert {first.message.event_id, second.message.event_id} < set(ids(one.receive("q", 10, 0)))


def test_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with small_disk(tmp_path, 20_000) as disk:
        ballast = disk / "ballast"
        ballast.write_bytes(b"x" * 10_000_000)  # SQLite's log grows to 4 MB before it is emptied
        url = f"sqlite:///{disk}/bus.db"
        one, other = (SqliteTransport(url, lease=0) for _ in range(2))
        one.bind("q", ["#"])
        held = message(size=10_000)
        assert one.publish([held]) == [None]
        assert ids(one.receive("q", 1, 0)) == [held.event_id]
        kept = [held.event_id]
        error: Exception | None = None
        while error is None and len(kept) < 10_000:
            batch = [message(size=10_000) for _ in range(10)]
            results = one.publish(batch)
            assert len({type(r) for r in results}) == 1, "all of a batch or nothing"
            error = results[0]
            kept += [] if error else [m.event_id for m in batch]
        assert isinstance(error, BusFull), error
        assert "make room" in str(error)
        with (disk / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="space"):
            while True:
                file.write(b"x" * 100)  # to the last byte
        assert other.depth("q") == {"ready": len(kept) - 1, "delayed": 0, "dead": 0}
        with pytest.raises(BusFull, match=r"another\.db"):
            SqliteTransport(f"sqlite:///{disk}/another.db")
        with pytest.raises(BusFull):
            one.receive("q", 1_000, 0)
        one.close()  # what it holds cannot be given back now: the end of its lease does that
        assert "end of its lease" in caplog.text
        db = sqlite3.connect(disk / "bus.db")
        assert [row[0] for row in db.execute("select event_id from message order by id")] == kept
        db.close()
        ballast.unlink()
        more = message()
        assert other.publish([more]) == [None]
        got: list[str] = []
        while some := other.receive("q", 50, 0):
            other.ack(some)
            got += ids(some)
        assert got == [*kept, more.event_id]
        other.close()


# ---- addresses


def test_memory_is_shared_by_its_name() -> None:
    a, b, alone = SqliteTransport("memory://shared"), SqliteTransport("memory://shared"), SqliteTransport("memory://")
    assert len({a.path, b.path, alone.path}) == 2
    a.bind("q", ["#"])
    a.publish([message()])
    a.close()
    a.close()
    assert len(b.receive("q", 10, 0)) == 1
    assert alone.queues() == []
    folder = b.path.parent
    b.close()
    assert not folder.exists()
    assert alone.path.exists()
    fresh = SqliteTransport("memory://shared")
    assert fresh.queues() == []
    for one in (fresh, alone):
        one.close()
        assert not one.path.parent.exists()
    assert "closed" in str(b.publish([message()])[0])
    with pytest.raises(BusError, match="closed"):
        b.depth("q")


def test_what_is_lent_returns_when_its_user_leaves(make: MakeTransport) -> None:
    a, b = make(), make()
    a.bind("q", ["#"])
    a.publish([message(), message()])
    a.receive("q", 1, 0)
    (other,) = b.receive("q", 1, 0)
    a.close()
    assert len(b.receive("q", 10, 0)) == 1
    b.ack([other])


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///", "sqlite://relative.db", "sqlite://relative/bus.db", "sqlite:////", "sqlite:///{here}", "sqlite:///{here}/text.db", "sqlite:///{here}/text.db/bus.db", "sqlite:////proc/none/bus.db"])
def test_addresses_that_are_none(url: str, tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("a list of things to buy, and no database at all\n" * 100)
    with pytest.raises(BusError, match="sqlite://"):
        connect(url.format(here=tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["text.db"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        for path in ("bus.db", "below/bus.db"):
            with pytest.raises(BusUnavailable):
                connect(f"sqlite:///{tmp_path}/{path}")
    finally:
        tmp_path.chmod(0o700)


def test_a_file_that_was_damaged(tmp_path: Path) -> None:
    path = tmp_path / "bus.db"
    one = SqliteTransport(f"sqlite:///{path}")
    one.bind("q", ["#"])
    one.publish([message(size=1_000) for _ in range(200)])
    one.close()
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * (size - 4096))
    with pytest.raises(BusUnavailable, match="bus.db"):  # on opening, or as soon as a page is read
        SqliteTransport(f"sqlite:///{path}").receive("q", 10, 0)


def test_a_relative_address_is_of_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with connect("sqlite:///events/bus.db") as bus:
        got: list = []
        bus.subscribe("q", "data.*", got.append)
        monkeypatch.chdir("/")
        sent = an_event(1)
        with bus.transaction() as tx:
            tx.publish(sent)
        bus.drain()
    assert got == [sent]
    assert (tmp_path / "events" / "bus.db").exists()
