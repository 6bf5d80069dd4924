"A consumer's promises one by one, over a broker that fails in the worst moments."

import asyncio
import functools
import inspect
import random
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support import an_event

from mlops_lib.events.bus import Bus, connect
from mlops_lib.events.consumer import Lanes, takes_transaction, wait_before
from mlops_lib.events.outbox import Ledger, LedgerError
from mlops_lib.events.sqlite import SqliteTransport
from mlops_lib.events.transport import BusError, BusUnavailable, Delivery, Message


@pytest.fixture
def bus() -> Iterator[Bus]:
    with connect("memory://") as one:
        yield one


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    "Wait for what has to come; fails when it does not."
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not after {seconds:g} s: {inspect.getsource(condition).strip()}"
        threading.Event().wait(0.005)


# ---- lanes


class LanesMachine(RuleBasedStateMachine):
    "Lanes against a plain list that is searched from the beginning each time."

    exclusive = True

    def __init__(self) -> None:
        super().__init__()
        self.lanes = Lanes(self.exclusive)
        self.waiting: list[tuple[int, int, str]] = []  # -priority, number, story: in the order of their turns
        self.running: list[tuple[str, Delivery]] = []
        self.count = 0

    @rule(story=st.sampled_from("abc"), priority=st.integers(0, 2))
    def push(self, story: str, priority: int) -> None:
        self.count += 1
        event = an_event(self.count, story)
        message = Message(event.event_id, event.event_type, story, b"", priority)
        self.lanes.push(Delivery("q", message, event=event))
        self.waiting = sorted([*self.waiting, (-priority, self.count, story)])

    @rule()
    def pop(self) -> None:
        busy = {story for story, _ in self.running} if self.exclusive else set()
        right = next((w for w in self.waiting if w[2] not in busy), None)
        got = self.lanes.pop()
        assert (got and got.event.payload.num_samples) == (right and right[1])
        if got and right:
            self.waiting.remove(right)
            self.running.append((right[2], got))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        _, delivery = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.lanes.finish(delivery)

    @rule()
    def clear(self) -> None:
        got = sorted(d.event.payload.num_samples for d in self.lanes.clear())
        assert got == sorted(number for _, number, _ in self.waiting), "what was not begun is given back, all of it"
        self.waiting = []

    @invariant()
    def it_knows_whether_something_waits(self) -> None:
        assert bool(self.lanes) == bool(self.waiting)

    @invariant()
    def never_two_of_a_story(self) -> None:
        stories = [story for story, _ in self.running]
        assert not self.exclusive or len(stories) == len(set(stories))


class OneLaneMachine(LanesMachine):
    "A single worker: nothing is held back."

    exclusive = False


LanesMachine.TestCase.settings = OneLaneMachine.TestCase.settings = settings(max_examples=60, deadline=None)
TestLanes = LanesMachine.TestCase
TestOneLane = OneLaneMachine.TestCase


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 2)), max_size=30), st.randoms())
def test_lanes_lose_nothing_and_keep_the_order_of_a_story(pushed: list[tuple[str, int]], rng: random.Random) -> None:
    lanes, running, done = Lanes(), [], []
    for number, (story, priority) in enumerate(pushed):
        event = an_event(number, story)
        lanes.push(Delivery("q", Message(event.event_id, event.event_type, story, b"", priority), event=event))
    while lanes:
        if running and rng.random() < 0.5 or not (delivery := lanes.pop()):
            lanes.finish(running.pop(rng.randrange(len(running))))
        else:
            running.append(delivery)
            done.append(delivery)
    assert sorted(d.event.payload.num_samples for d in done) == list(range(len(pushed)))
    for story in "abcd":
        turns = [(-d.message.priority, d.event.payload.num_samples) for d in done if d.event.correlation_id == story]
        assert turns == sorted(turns)


# ---- how long to wait


@given(st.integers(1, 100_000), st.floats(0, 1e6), st.floats(0, 1e6))
def test_a_wait_is_doubled_and_bounded(attempt: int, base: float, most: float) -> None:
    whole = min(most, base * 2.0 ** min(attempt - 1, 60))
    assert whole / 2 <= wait_before(attempt, base, most) <= whole


def test_waits_differ() -> None:
    assert len({wait_before(3) for _ in range(50)}) > 40


# ---- handlers


class Callable_:  # noqa: N801
    def __call__(self, event: Any) -> None: ...

    def with_tx(self, event: Any, tx: Any) -> None: ...


@pytest.mark.parametrize(
    ("handler", "with_tx"),
    [
        (lambda event: None, False),
        (lambda event, tx: None, True),
        (lambda event, retries=3: None, False),
        (lambda *events: None, False),
        ([].append, False),
        (print, False),
        (Callable_(), False),
        (Callable_().with_tx, True),
        (functools.partial(lambda name, event, tx: None, "x"), True),
    ],
)
def test_the_two_kinds_of_handler(handler: Callable[..., Any], with_tx: bool) -> None:
    assert takes_transaction(handler) is with_tx


async def coroutine_with_tx(event: Any, tx: Any) -> None: ...


def generator(event: Any) -> Iterator[None]:
    yield


async def async_generator(event: Any) -> Any:
    yield


@pytest.mark.parametrize(
    "handler",
    [lambda: None, lambda a, b, c: None, lambda *, event: None, coroutine_with_tx, generator, async_generator],
    ids=["none", "three", "keyword", "coroutine with tx", "generator", "async generator"],
)
def test_what_cannot_handle_an_event_is_refused_at_once(bus: Bus, handler: Callable[..., Any]) -> None:
    with pytest.raises(BusError, match="handler"):
        bus.subscribe("q", "#", handler)
    assert not bus.subscriptions


@pytest.mark.parametrize("options", [{"retries": -1}, {"concurrency": 0}, {"prefetch": 0}, {"retries": 1.5}])
def test_impossible_numbers_are_refused(bus: Bus, options: dict[str, Any]) -> None:
    with pytest.raises(BusError, match=next(iter(options))):
        bus.subscribe("q", "#", print, **options)


class AsyncCallable:
    def __init__(self) -> None:
        self.got: list[int] = []

    async def __call__(self, event: Any) -> None:
        await asyncio.sleep(0)
        self.got.append(event.payload.num_samples)


@pytest.mark.parametrize("wrap", [lambda h: h, lambda h: lambda e: h(e), functools.partial], ids=["object", "lambda", "partial"])
def test_a_coroutine_is_awaited_however_it_comes(bus: Bus, wrap: Callable[[Any], Any]) -> None:
    handler = AsyncCallable()
    bus.subscribe("q", "#", wrap(handler))
    bus.publish_many(an_event(n) for n in range(3))
    bus.drain()
    assert handler.got == [0, 1, 2]


def test_a_coroutine_does_not_run_inside_a_transaction(bus: Bus) -> None:
    bus.subscribe("q", "#", lambda event, tx: coroutine_with_tx(event, tx), retries=0)
    bus.publish(an_event())
    bus.drain()
    (letter,) = bus.dead_letters("q")
    assert letter.error_type == "BusError"
    assert "coroutine" in letter.error


class Panic(BaseException):
    "As raised by libraries that are written in Rust."


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, Panic, asyncio.CancelledError, GeneratorExit])
@pytest.mark.parametrize("kind", ["plain", "tx", "coroutine"])
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_nothing_that_a_handler_raises_ends_the_consumer(bus: Bus, error: type[BaseException], kind: str) -> None:
    got = []

    def plain(event: Any) -> None:
        if event.payload.num_samples == 0:
            raise error("the handler's")
        got.append(event.payload.num_samples)

    def tx(event: Any, tx: Any) -> None:
        plain(event)

    async def coroutine(event: Any) -> None:
        plain(event)

    bus.subscribe("q", "#", locals()[kind], retries=1, backoff=0.01)
    bus.publish_many(an_event(n) for n in range(3))
    bus.drain()
    assert got == [1, 2]
    (letter,) = bus.dead_letters("q")
    assert letter.attempts == 2
    assert kind == "coroutine" or letter.error_type == error.__name__


def test_a_coroutine_that_hangs_is_cancelled(bus: Bus) -> None:
    got, cancelled = [], threading.Event()

    async def handle(event: Any) -> None:
        try:
            if event.payload.num_samples == 0:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        got.append(event.payload.num_samples)

    bus.subscribe("q", "#", handle, retries=0, timeout=0.2)
    bus.publish_many([an_event(0), an_event(1)])
    bus.drain()
    assert cancelled.wait(10)
    assert got == [1]
    (letter,) = bus.dead_letters("q")
    assert (letter.error_type, letter.attempts) == ("HandlerTimeout", 1)


def test_a_transaction_that_hangs_leaves_nothing(bus: Bus) -> None:
    release, over, late = threading.Event(), threading.Event(), []
    with bus.transaction() as tx:
        tx.execute("create table effect(number)")
    replies: list[Any] = []
    bus.subscribe("replies", "model.*", replies.append)

    def handle(event: Any, tx: Any) -> None:
        tx.execute("insert into effect values (1)")
        if not over.is_set():
            release.wait(60)
            try:
                tx.execute("insert into effect values (2)")
            except sqlite3.Error as e:
                late.append(e)
                raise
            finally:
                over.set()

    work = bus.subscribe("q", "data.*", handle, retries=0, timeout=0.2)
    sent = bus.publish(an_event())
    bus.drain()
    (letter,) = bus.dead_letters("q")
    assert letter.error_type == "HandlerTimeout"
    release.set()
    assert over.wait(10)
    with bus.transaction() as tx:
        assert tx.execute("select * from effect").fetchall() == []
    assert late, "what the handler still tries is refused"
    assert bus.replay("q") == 1
    bus.drain()
    with bus.transaction() as tx:
        assert tx.execute("select number from effect").fetchall() == [(1,)], "another chance, and this time in time"
    assert bus.ledger.seen("q", [sent.event_id])
    assert (work.handled, work.buried) == (1, 1)


# ---- a broker that fails


class Faulty(SqliteTransport):
    "Before or after the work is done, a call fails now and then: the answer, too, can get lost."

    share, faults = 0.0, 0
    only: tuple[str, ...] = ("receive", "ack", "retry", "bury", "release", "extend")
    rng = random.Random(0)

    def _perhaps(self, name: str, *args: Any) -> Any:
        luck = self.rng.random() if name in self.only else 1.0
        if luck < self.share / 2:
            self.faults += 1
            raise BusUnavailable(f"{name}: the connection was lost on the way there")
        result = getattr(super(), name)(*args)
        if luck < self.share:
            self.faults += 1
            raise BusUnavailable(f"{name}: the connection was lost on the way back")
        return result

    def receive(self, *args: Any) -> Any:
        return self._perhaps("receive", *args)

    def ack(self, *args: Any) -> Any:
        return self._perhaps("ack", *args)

    def retry(self, *args: Any) -> Any:
        return self._perhaps("retry", *args)

    def bury(self, *args: Any) -> Any:
        return self._perhaps("bury", *args)

    def release(self, *args: Any) -> Any:
        return self._perhaps("release", *args)

    def extend(self, *args: Any) -> Any:
        return self._perhaps("extend", *args)


@pytest.mark.parametrize("only", [("receive",), ("ack",), Faulty.only], ids=["receive", "ack", "all"])
@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_broker_that_fails_loses_nothing_and_brings_nothing_twice(tmp_path: Path, only: tuple[str, ...], concurrency: int) -> None:
    transport = Faulty(f"sqlite:///{tmp_path}/bus.db", lease=0.4)
    transport.only, transport.rng = only, random.Random(concurrency)
    handled: Counter[int] = Counter()

    def handle(event: Any) -> None:
        number = event.payload.num_samples
        if number == 7:
            raise ValueError("never")
        handled[number] += 1

    with Bus(transport) as bus:
        bus.subscribe("q", "#", handle, retries=2, backoff=0.01, prefetch=4, concurrency=concurrency)
        transport.share = 0.4
        bus.publish_many(an_event(n, f"story {n % 5}") for n in range(40))
        rows = sqlite3.connect(tmp_path / "bus.db")
        left = "select count(*) from message where state != 2"
        until(lambda: len(handled) == 39)
        transport.share = 0.0
        until(lambda: rows.execute(left).fetchone() == (0,))
        rows.close()
        assert transport.faults, "the broker has not failed at all"
        assert handled == {n: 1 for n in range(40) if n != 7}, "each once, and only once"
        assert [letter.event.payload.num_samples for letter in bus.dead_letters("q")] == [7]


def test_a_ledger_that_fails_loses_nothing(tmp_path: Path) -> None:
    class Forgetful(Ledger):
        faults = 3

        def seen(self, *args: Any) -> set[str]:
            if self.faults:
                self.faults -= 1
                raise LedgerError("the disk is away for a moment")
            return super().seen(*args)

    transport = SqliteTransport(f"sqlite:///{tmp_path}/bus.db", lease=3_600)  # nothing comes back by itself
    got: list[int] = []
    with Bus(transport, Forgetful(tmp_path / "ledger.db")) as bus:
        bus.subscribe("q", "#", lambda e: got.append(e.payload.num_samples))
        bus.publish_many(an_event(n) for n in range(5))
        until(lambda: len(got) == 5)
        bus.drain()
        assert sorted(got) == list(range(5))


def test_drain_waits_for_what_is_on_its_way_to_the_handler(tmp_path: Path) -> None:
    class Slow(SqliteTransport):
        def receive(self, *args: Any) -> Any:
            got = super().receive(*args)
            if got:
                threading.Event().wait(0.1)  # lent, and nowhere to be seen
            return got

    got: list[int] = []
    with Bus(Slow(f"sqlite:///{tmp_path}/bus.db")) as bus:
        bus.subscribe("q", "#", lambda e: got.append(e.payload.num_samples))
        for n in range(5):
            bus.publish(an_event(n))
            bus.drain()
            assert got == list(range(n + 1))


def test_what_is_received_while_a_subscription_closes_is_given_back(tmp_path: Path) -> None:
    received, go_on = threading.Event(), threading.Event()

    class Late(SqliteTransport):
        "Its answer arrives after the consumer has been told to stop."

        def receive(self, queue: str, limit: int, wait: float) -> list[Delivery]:
            got = super().receive(queue, limit, wait)
            if got:
                received.set()
                go_on.wait(30)
            return got

    handled: list[Any] = []
    with Bus(Late(f"sqlite:///{tmp_path}/bus.db", lease=600.0)) as one:
        work = one.subscribe("q", "#", handled.append)
        one.publish(an_event())
        assert received.wait(30)
        closing = threading.Thread(target=work.close)
        closing.start()
        until(lambda: work._closing)
        go_on.set()
        closing.join(30)
        assert handled == []
        assert one.depth("q")["ready"] == 1, "not begun, so it is there for others, at once"
