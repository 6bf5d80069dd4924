"""What the bus promises, the same over every transport. A transport is right when this file passes unchanged."""

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Callable

import pytest
from support import an_event

from mlops_lib.events.bus import Bus, connect
from mlops_lib.events.schema import DataIngested, DriftDetected, EventError, ModelDeployed, ModelRegistered
from mlops_lib.events.transport import UNROUTABLE, BusError, ConsumerExists, Message, PublishError, Reject, Unroutable

MakeBus = Callable[..., Bus]


def registered() -> ModelRegistered:
    payload = {"model_id": "inbox", "model_version": 1, "run_id": "r1"}
    return ModelRegistered(source_service="test", payload=payload)


def deployed() -> ModelDeployed:
    payload = {"model_id": "inbox", "model_version": 1, "deployment_env": "dev", "endpoint_url": "http://127.0.0.1"}
    return ModelDeployed(source_service="test", payload=payload)


def drift(severity: str = "low") -> DriftDetected:
    numbers = {"current_value": 0.3, "baseline_value": 0.1, "threshold": 0.2}
    payload = {"drift_type": "data_drift", "metric_name": "psi", "severity": severity, **numbers}
    return DriftDetected(source_service="test", payload=payload)


# ---- delivery and routing


def test_an_event_arrives_as_it_was_sent(bus: Bus) -> None:
    got: list = []
    bus.subscribe("q", "data.*", got.append)
    sent = bus.publish(an_event(7))
    bus.drain()
    assert got == [sent]
    assert type(got[0]) is DataIngested


def test_each_queue_gets_what_it_wants(bus: Bus) -> None:
    got = defaultdict(list)
    for queue, keys in {"models": "model.*", "all": "#", "two": ["drift.detected", "model.deployed"], "last": "#.deployed"}.items():
        bus.subscribe(queue, keys, lambda e, queue=queue: got[queue].append(e.event_type))
    bus.publish_many([registered(), deployed(), drift()])
    bus.drain()
    assert got["models"] == ["model.registered", "model.deployed"]
    assert got["all"] == ["model.registered", "model.deployed", "drift.detected"]
    assert got["two"] == ["model.deployed", "drift.detected"]
    assert got["last"] == ["model.deployed"]


def test_a_pattern_that_matches_twice_delivers_once(bus: Bus) -> None:
    got: list = []
    bus.subscribe("q", ["model.*", "#", "model.deployed"], got.append)
    bus.publish(deployed())
    bus.drain()
    assert len(got) == 1


def test_what_was_published_while_nobody_listened_waits(make_bus: MakeBus) -> None:
    first, second = make_bus(), make_bus()
    first.subscribe("q", "data.*", lambda e: None).close()
    first.publish_many(an_event(i) for i in range(20))
    got: list = []
    second.subscribe("q", "data.*", got.append)
    second.drain()
    assert [e.payload.num_samples for e in got] == list(range(20))


def test_no_queue_wants_it(make_bus: MakeBus) -> None:
    strict = make_bus(unroutable="raise")
    strict.subscribe("q", "model.*", lambda e: None)
    with pytest.raises(Unroutable, match="data.ingested"):
        strict.publish(an_event())
    with pytest.raises(PublishError) as caught:
        strict.publish_many([registered(), an_event(1), deployed(), an_event(2)])
    assert [e.payload.num_samples for e, _ in caught.value.failed] == [1, 2]
    patient = make_bus()
    lost = patient.publish(an_event(5))
    (letter,) = patient.dead_letters(UNROUTABLE)
    assert letter.event == lost
    assert patient.replay(UNROUTABLE) == 0 or not patient.dead_letters("q"), "still nobody wants it"
    got: list = []
    patient.subscribe("late", "data.*", got.append)
    patient.replay(UNROUTABLE)
    patient.drain()
    assert got == [lost]
    assert patient.dead_letters(UNROUTABLE) == []


def test_a_dropped_queue_is_gone_with_all_that_is_in_it(make_bus: MakeBus) -> None:
    bus = make_bus(unroutable="raise")
    keep = bus.subscribe("keep", "model.*", lambda e: None)
    work = bus.subscribe("old", "data.*", lambda e: 1 / 0, retries=0)
    bus.publish(an_event(1))
    bus.drain()
    with pytest.raises(BusError, match="close"):
        bus.drop("old")
    work.close()
    bus.publish(an_event(2))
    bus.drop("old")
    assert bus.queues() == ["keep"]
    assert bus.depth("old") == {"ready": 0, "delayed": 0, "dead": 0}
    with pytest.raises(Unroutable):
        bus.publish(an_event(3))
    got: list = []
    bus.subscribe("old", "data.*", got.append)
    bus.publish_many([an_event(4), deployed()])
    bus.drain()
    assert [e.payload.num_samples for e in got] == [4]
    assert keep.handled == 1


def test_sharing_a_queue_is_competing(make_bus: MakeBus) -> None:
    got: list[list] = [[], []]
    both = threading.Barrier(2, timeout=20)

    def handler(mine: list) -> Callable:
        def handle(event: DataIngested) -> None:
            if not mine:
                both.wait()  # neither may take everything before the other has begun
            mine.append(event.payload.num_samples)

        return handle

    buses = [make_bus(), make_bus()]
    for bus, mine in zip(buses, got, strict=True):
        bus.subscribe("q", "data.*", handler(mine), prefetch=5)
    buses[0].publish_many(an_event(i) for i in range(60))
    for bus in buses:
        bus.drain()
    assert got[0]
    assert got[1]
    assert sorted(got[0] + got[1]) == list(range(60))


# ---- order, priority, concurrency


def test_events_of_one_story_keep_their_order(bus: Bus) -> None:
    got = defaultdict(list)
    lock, most, now = threading.Lock(), [0], set()

    def handle(event: DataIngested) -> None:
        with lock:
            assert event.correlation_id not in now, "two of one story side by side"
            now.add(event.correlation_id)
            most[0] = max(most[0], len(now))
        threading.Event().wait(0.001)
        with lock:
            now.discard(event.correlation_id)
            got[event.correlation_id].append(event.payload.num_samples)

    bus.subscribe("q", "data.*", handle, concurrency=4)
    bus.publish_many(an_event(i, f"story-{i % 7}") for i in range(140))
    bus.drain()
    assert all(numbers == sorted(numbers) for numbers in got.values())
    assert sum(map(len, got.values())) == 140
    assert most[0] > 1, "four workers should work side by side"


def test_the_urgent_first(make_bus: MakeBus) -> None:
    sender = make_bus()
    sender.subscribe("q", "#", lambda e: None).close()
    sender.publish_many((an_event(i) for i in range(5)), priority="low")
    sender.publish_many(an_event(i) for i in range(5, 10))
    sender.publish(an_event(99), priority="high")
    got: list = []
    receiver = make_bus()
    receiver.subscribe("q", "#", lambda e: got.append(e.payload.num_samples))
    receiver.drain()
    assert got == [99, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4]


def test_an_unknown_priority_is_refused(bus: Bus) -> None:
    with pytest.raises(EventError, match="urgent"):
        bus.publish(an_event(), priority="urgent")  # type: ignore[arg-type]


# ---- trying again, giving up, another chance


def test_a_handler_that_fails_is_tried_again(bus: Bus) -> None:
    seen: list = []

    def handle(event: DataIngested) -> None:
        seen.append(event.event_id)
        if len(seen) < 3:
            raise OSError("not yet")

    work = bus.subscribe("q", "data.*", handle, retries=3, backoff=0.02)
    sent = bus.publish(an_event())
    bus.drain()
    assert seen == [sent.event_id] * 3
    assert (work.handled, work.retried, work.buried) == (1, 2, 0)
    assert bus.dead_letters("q") == []


def test_a_poison_message_becomes_a_dead_letter_and_can_be_replayed(bus: Bus) -> None:
    healed = threading.Event()
    tried, done = [], []

    def handle(event: DataIngested) -> None:
        if event.payload.num_samples == 3 and not healed.is_set():
            tried.append(event.event_id)
            raise ValueError(f"cannot read {event.payload.dataset_path}")
        done.append(event.payload.num_samples)

    bus.subscribe("q", "data.*", handle, retries=2, backoff=0.02)
    bus.publish_many(an_event(i) for i in range(6))
    bus.drain()
    assert sorted(done) == [0, 1, 2, 4, 5], "the others go on"
    assert len(tried) == 3
    (letter,) = bus.dead_letters("q")
    assert (letter.error_type, letter.error, letter.attempts) == ("ValueError", "cannot read d.parquet", 3)
    assert "in handle" in letter.traceback
    assert letter.event.payload.num_samples == 3
    assert bus.depth("q")["dead"] == 1
    healed.set()
    assert bus.replay("q", ["00000000-0000-0000-0000-000000000000"]) == 0
    assert bus.replay("q", [letter.event_id]) == 1
    bus.drain()
    assert sorted(done) == list(range(6))
    assert bus.dead_letters("q") == []


def test_a_rejected_event_is_not_tried_again(bus: Bus) -> None:
    tried: list = []

    def handle(event: DataIngested) -> None:
        tried.append(event)
        raise Reject("no such data set")

    bus.subscribe("q", "data.*", handle, retries=5)
    bus.publish(an_event())
    bus.drain()
    assert len(tried) == 1
    assert bus.dead_letters("q")[0].error == "no such data set"


@pytest.mark.parametrize("body", [b"\xff\x00", b"{}", b'{"event_type": "no.such"}', b"[" * 3_000])
def test_bytes_that_are_no_event_do_not_stop_the_consumer(bus: Bus, body: bytes) -> None:
    got: list = []
    bus.subscribe("q", "data.*", got.append)
    foreign = Message("00000000-0000-4000-8000-000000000000", "data.ingested", "k", body)
    assert bus.transport.publish([foreign]) == [None]
    sent = bus.publish(an_event())
    bus.drain()
    assert got == [sent]
    (letter,) = bus.dead_letters("q")
    assert letter.body == body
    assert letter.error_type == "EventError"


def test_a_handler_that_never_returns_is_given_up(bus: Bus) -> None:
    release = threading.Event()
    got: list = []

    def handle(event: DataIngested) -> None:
        if event.payload.num_samples == 0:
            release.wait(60)
        got.append(event.payload.num_samples)

    work = bus.subscribe("q", "data.*", handle, retries=0, timeout=0.3)
    bus.publish_many([an_event(0), an_event(1)])
    bus.drain()
    try:
        assert got == [1], "the next event has a worker of its own"
        (letter,) = bus.dead_letters("q")
        assert letter.error_type == "HandlerTimeout"
        assert (work.handled, work.buried) == (1, 1)
    finally:
        release.set()


# ---- once


def test_the_same_event_twice_is_handled_once(bus: Bus) -> None:
    got: list = []
    work = bus.subscribe("q", "data.*", got.append)
    sent = bus.publish(an_event())
    bus.publish(sent)
    bus.drain()
    bus.publish(sent)
    bus.drain()
    assert got == [sent]
    assert work.duplicates >= 1


def test_each_queue_has_its_own_memory(bus: Bus) -> None:
    got: list = []
    bus.subscribe("a", "data.*", got.append)
    bus.subscribe("b", "data.*", got.append)
    bus.publish(an_event())
    bus.drain()
    assert len(got) == 2


def test_a_transaction_keeps_effect_and_event_together(bus: Bus) -> None:
    replies: list = []
    with bus.transaction() as tx:
        tx.execute("create table seen(number integer)")

    def handle(event: DataIngested, tx) -> None:
        tx.execute("insert into seen values (?)", (event.payload.num_samples,))
        bus.publish(event.reply(DriftDetected, drift().payload))
        if event.payload.num_samples == 1 and len(replies) == 0:
            raise OSError("after the effect, before the end")

    bus.subscribe("replies", "drift.*", replies.append)
    bus.subscribe("q", "data.*", handle, backoff=0.05)
    events = [an_event(0), an_event(1)]
    bus.publish_many(events + events)
    bus.drain()
    with bus.ledger.transaction() as tx:
        assert sorted(tx.execute("select number from seen").fetchall()) == [(0,), (1,)]
    assert sorted(r.causation_id for r in replies) == sorted(e.event_id for e in events), "an undone reply is not published"


def test_a_transaction_of_the_application(bus: Bus) -> None:
    got: list = []
    bus.subscribe("q", "data.*", got.append)
    with pytest.raises(ZeroDivisionError), bus.transaction() as tx:  # noqa: PT012
        tx.publish(an_event(1))
        raise ZeroDivisionError
    with bus.transaction() as tx:
        tx.execute("create table if not exists orders(id)")
        tx.publish(an_event(2))
    bus.drain()
    assert [e.payload.num_samples for e in got] == [2]
    with pytest.raises(Exception, match="COMMIT"), bus.transaction() as tx:
        tx.execute("commit")


# ---- consumers come and go


def test_a_long_handler_is_not_redelivered(make_bus: MakeBus) -> None:
    bus = make_bus()
    started, go_on, got = threading.Event(), threading.Event(), []

    def handle(event: DataIngested) -> None:
        got.append(event.payload.num_samples)
        started.set()
        go_on.wait(60)

    bus.subscribe("q", "data.*", handle)
    other = make_bus()
    bus.publish(an_event(1))
    assert started.wait(20)
    seen: list = []
    other.subscribe("q", "data.*", seen.append)
    end = time.monotonic() + min(bus.transport.lease * 1.5, 4)
    while time.monotonic() < end and not seen:
        other.stopped.wait(0.05)
    assert seen == [], "it is being worked on"
    go_on.set()
    bus.drain()
    other.drain()
    assert (got, seen) == ([1], [])


def test_closing_finishes_what_is_held_and_gives_back_the_rest(make_bus: MakeBus) -> None:
    bus, other, got, started = make_bus(), make_bus(), [], threading.Event()

    def handle(event: DataIngested) -> None:
        started.set()
        threading.Event().wait(0.05)
        got.append(event.payload.num_samples)

    bus.subscribe("q", "data.*", handle)
    bus.publish_many(an_event(i) for i in range(200))
    assert started.wait(20)
    bus.close()
    first = list(got)
    assert 0 < len(first) < 200
    other.subscribe("q", "data.*", lambda e: got.append(e.payload.num_samples))
    other.drain()
    assert sorted(got) == list(range(200)), "nothing lost, nothing twice"


def test_one_living_consumer_for_each_id(make_bus: MakeBus) -> None:
    a, b = make_bus(), make_bus()
    work = a.subscribe("q", "data.*", lambda e: None, consumer_id="trainer-1")
    with pytest.raises(ConsumerExists, match="trainer-1"):
        b.subscribe("q", "data.*", lambda e: None, consumer_id="trainer-1")
    b.subscribe("q", "data.*", lambda e: None, consumer_id="trainer-2")
    work.close()
    b.subscribe("q", "data.*", lambda e: None, consumer_id="trainer-1")


@pytest.mark.parametrize("name", ["with space", "", "a/b", "-x", "x" * 101, "naïve\n", "unroutable", 7])
def test_queue_names(bus: Bus, name: object) -> None:
    with pytest.raises(BusError):
        bus.subscribe(name, "data.*", lambda e: None)  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", ["", "a b", "a..b", "model.**", "a#", []])
def test_patterns(bus: Bus, pattern: object) -> None:
    with pytest.raises(BusError):
        bus.subscribe("q", pattern, lambda e: None)  # type: ignore[arg-type]


def test_what_is_too_big_is_refused(bus: Bus) -> None:
    bus.subscribe("q", "data.*", lambda e: None)
    big = an_event()
    big = big.model_copy(update={"payload": big.payload.model_copy(update={"features": ["x" * 20_000_000]})})
    with pytest.raises(EventError, match="20,"):
        bus.publish(big)
    bus.drain()


def test_a_closed_bus_says_so(bus: Bus) -> None:
    bus.close()
    bus.close()
    with pytest.raises(BusError, match="closed"):
        bus.publish(an_event())


# ---- the same for coroutines


def test_coroutines(make_bus: MakeBus) -> None:
    got: list = []

    async def handle(event: DataIngested) -> None:
        await asyncio.sleep(0)
        if event.payload.num_samples == 3:
            raise Reject("three")
        got.append(event.payload.num_samples)

    async def main() -> None:
        async with make_bus() as bus:
            await bus.asubscribe("q", "data.*", handle)
            await asyncio.gather(*(bus.apublish(an_event(i)) for i in range(50)))
            await bus.apublish_many([an_event(50)])
            await bus.adrain()
            assert [letter.error for letter in await bus.adead_letters("q")] == ["three"]
            assert await bus.areplay("q") == 1
            await bus.adrain()

    asyncio.run(main())
    assert sorted(got) == [i for i in range(51) if i != 3]


def test_many_threads_publish(bus: Bus) -> None:
    got: list = []
    bus.subscribe("q", "data.*", lambda e: got.append(e.payload.num_samples), concurrency=2)
    threads = [threading.Thread(target=lambda k=k: [bus.publish(an_event(100 * k + i)) for i in range(25)]) for k in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    bus.drain()
    assert sorted(got) == sorted(100 * k + i for k in range(6) for i in range(25))


def test_what_is_handled_at_one_broker_is_new_to_the_next(address, tmp_path, request) -> None:
    url, options = address
    other = {"memory": f"{url}x", "sqlite": f"sqlite:///{tmp_path}/other.db", "redis": f"{url.rstrip('0')}1"}
    name = options.get("namespace", "mlops")
    elsewhere = other.get(url.partition(":")[0]) or request.getfixturevalue("redis_server").url  # the namespace is the same
    with connect(url, **options) as here, connect(elsewhere, **({"namespace": name} if "redis" in elsewhere else {})) as there:
        event, got = an_event(1), []
        for n, bus in enumerate((here, there)):
            bus.subscribe("q", "data.*", lambda e, n=n: got.append((n, e.event_id)))
            bus.publish_many([event, event])
            bus.drain()
        assert got == [(0, event.event_id), (1, event.event_id)], "once at each, not once in all"
        assert here.ledger.path != there.ledger.path
