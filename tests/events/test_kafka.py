"""What is special to Kafka: a log with offsets instead of a queue, groups that share partitions, a cluster that goes away."""

import contextlib
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import an_event

from mlops_lib.events import kafka
from mlops_lib.events.bus import Bus, connect
from mlops_lib.events.kafka import KafkaTransport, LocalCluster
from mlops_lib.events.outbox import Transaction
from mlops_lib.events.schema import DataIngested
from mlops_lib.events.transport import (
    UNROUTABLE,
    BusError,
    BusRefused,
    BusUnavailable,
    ConsumerExists,
    Delivery,
    Failure,
    Message,
    PublishError,
)
from mlops_lib.servers import free_port

# This cluster's fetches do not notice what arrives while they wait.
QUICK = {"join": 2.0, "conf": {"fetch.wait.max.ms": 10}}
Open = Callable[..., KafkaTransport]


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster() as one:
        yield one


@pytest.fixture
def transport(cluster: LocalCluster) -> Iterator[Open]:
    with contextlib.ExitStack() as opened:

        def make(**options: object) -> KafkaTransport:
            one = KafkaTransport(cluster.url, **(QUICK | options))
            opened.callback(one.close)
            return one

        yield make


@pytest.fixture
def make_bus(cluster: LocalCluster, tmp_path: Path) -> Iterator[Callable[..., Bus]]:
    with contextlib.ExitStack() as opened:

        def make(**options: object) -> Bus:
            bus = connect(cluster.url, ledger=tmp_path / "ledger.db", **(QUICK | options))
            opened.callback(bus.close, 10)
            return bus

        yield make


def messages(count: int, key: str = "one story", kind: str = "a.b", priority: int = 1) -> list[Message]:
    return [Message(f"{kind}-{priority}-{n}", kind, key.format(n), b"{}", priority) for n in range(count)]


def take(one: KafkaTransport, count: int, seconds: float = 20) -> list[Delivery]:
    "Receive until there are so many."
    got: list[Delivery] = []
    deadline = time.monotonic() + seconds
    while len(got) < count and time.monotonic() < deadline:
        got += one.receive("q", count - len(got), 0.5)
    return got


def ids(got: list[Delivery]) -> list[str]:
    return [d.message.event_id for d in got]


# ---- bad input, and a cluster that is not there


@pytest.mark.parametrize("url", ["kafka://", "kafka://host:port", "kafka://,"])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(BusError, match="names no Kafka server"):
        connect(url)


def test_nobody_answers_at_the_start() -> None:
    with pytest.raises(BusUnavailable, match="refused") as caught:
        connect(f"kafka://anna:geheim@127.0.0.1:{free_port()}")
    assert "geheim" not in str(caught.value)


def test_a_login_that_is_not_accepted(cluster: LocalCluster) -> None:
    with pytest.raises(BusRefused, match="user") as caught:
        connect(cluster.url.replace("//", "//anna:geheim@"), conf={"security.protocol": "SASL_PLAINTEXT"})
    assert "geheim" not in str(caught.value)


def test_a_user_that_may_not_write(cluster: LocalCluster, transport: Open) -> None:
    one = transport()
    one.bind("q", ["#"])
    cluster.refuse(0, 29)  # Produce: topic authorization failed
    (error,) = one.publish(messages(1))
    assert isinstance(error, BusRefused)
    assert one.publish(messages(1)) == [None]
    assert len(take(one, 1)) == 1


@pytest.mark.parametrize("names", [{"namespace": "a.b"}, {"namespace": "naïve"}, {"namespace": ""}])
def test_a_namespace_that_is_none(cluster: LocalCluster, names: dict) -> None:
    with pytest.raises(BusError):
        connect(cluster.url, **names)


def test_a_message_that_is_too_big_fails_alone(transport: Open) -> None:
    one = transport()
    one.bind("q", ["#"])
    small = messages(2)
    big = small[0]._replace(event_id="big", body=b"x" * 3_000_000)
    results = one.publish([small[0], big, small[1]])
    assert (results[0], results[2]) == (None, None)
    assert isinstance(results[1], BusError)
    assert not isinstance(results[1], BusUnavailable)
    assert ids(take(one, 2)) == ids([Delivery("q", m) for m in small])


def test_a_full_send_buffer_waits(transport: Open) -> None:
    one = transport(conf=QUICK["conf"] | {"queue.buffering.max.messages": 10})
    one.bind("q", ["#"])
    assert one.publish(messages(400)) == [None] * 400
    assert len(take(one, 400)) == 400


def test_the_cluster_goes_away_and_comes_back(cluster: LocalCluster, make_bus: Callable[..., Bus], tmp_path: Path) -> None:
    bus, confirmed, waited = make_bus(), [], threading.Event()
    with bus.transaction() as tx:
        tx.execute("create table done(number integer)")
    bus.subscribe("q", "data.*", lambda e, tx: tx.execute("insert into done values (?)", (e.payload.num_samples,)) and None)

    def publish() -> None:
        for start in range(0, 3_000, 100):
            bus.publish_many(an_event(n) for n in range(start, start + 100))
            confirmed.extend(range(start, start + 100))
            waited.wait(0.02)

    sender = threading.Thread(target=publish)
    sender.start()
    for _ in range(3):
        seen = len(confirmed)
        while len(confirmed) < seen + 300 and sender.is_alive():
            time.sleep(0.01)
        cluster.down()
        before = len(confirmed)
        waited.wait(0.5)
        assert len(confirmed) <= before + 100, "nothing is confirmed by nobody"
        cluster.up()
    sender.join(60)
    bus.drain(60)
    with sqlite3.connect(tmp_path / "ledger.db") as db:
        done = [row[0] for row in db.execute("select number from done")]
    assert len(confirmed) == 3_000
    assert sorted(done) == confirmed, "all of it, once"


def test_away_for_longer_than_publishing_waits(cluster: LocalCluster, make_bus: Callable[..., Bus]) -> None:
    bus, got = make_bus(timeout=1.0), []
    bus.subscribe("q", "data.*", lambda e: got.append(e.payload.num_samples))
    bus.publish(an_event(0))
    bus.drain()
    cluster.down()
    with pytest.raises(PublishError, match="BusUnavailable") as caught:
        bus.publish_many([an_event(1), an_event(2)])
    with pytest.raises(BusUnavailable):
        bus.transport.bind("other", ["#"])
    cluster.up()
    deadline = time.monotonic() + 30
    left = [event for event, _ in caught.value.failed]
    while left and time.monotonic() < deadline:
        try:
            left = left[bus.publish_many(left) :]
        except PublishError as e:
            left = [event for event, _ in e.failed]
    bus.drain()
    assert sorted(got) == [0, 1, 2]


# ---- offsets


def test_a_queue_begins_where_it_was_bound(transport: Open) -> None:
    one, other = transport(), transport()
    one.bind("early", ["#"])
    one.publish(messages(20, "{}", "before.it"))
    threads = [threading.Thread(target=t.bind, args=("q", ["#"])) for t in (one, other)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert one.publish(messages(20, "{}", "after.it")) == [None] * 20
    other.close()
    assert sorted(ids(take(one, 20))) == sorted(f"after.it-1-{n}" for n in range(20))
    assert one.receive("q", 10, 0.3) == []


def test_new_patterns_hold_from_the_moment_of_binding(transport: Open) -> None:
    one, other = transport(), transport()
    one.bind("all", ["#"])
    one.bind("q", ["old.*"])
    one.publish(messages(5, "{}", "old.kind") + messages(5, "{}", "new.kind"))
    other.bind("q", ["new.*"])  # `one` reads on, and is not told
    one.publish(messages(3, "{}", "new.kind")[2:] + messages(3, "{}", "old.kind")[2:])
    other.close()
    assert sorted(ids(take(one, 6))) == sorted([f"old.kind-1-{n}" for n in range(5)] + ["new.kind-1-2"])
    assert one.receive("q", 10, 0.3) == []


def test_what_another_service_wants_is_known_at_once(transport: Open) -> None:
    one, other = transport(), transport()
    one.bind("all", ["x.*"])
    assert str(one.publish(messages(1))[0]) == "No queue wants 'a.b'."
    other.bind("q", ["a.*"])
    assert one.publish(messages(1)) == [None]
    assert len(take(other, 1)) == 1


def test_an_unfinished_event_holds_the_offset_back(transport: Open) -> None:
    one = transport()
    one.bind("q", ["#"])
    one.publish(messages(10))
    got = take(one, 10)
    one.ack(got[:2] + got[3:])
    one.close()
    other = transport()
    other.bind("q", ["#"])
    assert ids(take(other, 8)) == [f"a.b-1-{n}" for n in range(2, 10)], "the ledger knows that 3 to 9 are done"


def test_what_this_process_forgot_is_delivered_again(transport: Open) -> None:
    one = transport(lease=0.3)
    one.bind("q", ["#"])
    one.publish(messages(1))
    (first,) = take(one, 1)
    (second,) = take(one, 1)
    one.ack([first])
    assert one.depth("q")["ready"] == 1, "the first receipt is no longer valid"
    one.extend([second])
    one.ack([second])
    assert one.depth("q") == {"ready": 0, "delayed": 0, "dead": 0}


def test_a_backlog_that_does_not_fit_into_memory(transport: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka, "_MOST", 100)
    one = transport()
    one.bind("all", ["#"])
    one.bind("q", ["a.b"])
    for priority in (0, 1, 2):
        one.publish(messages(1_500, "{}", priority=priority) + messages(200, "{}", "other.kind", priority))
    got = []
    while len(got) < 4_500:
        assert (some := take(one, 300))
        one.ack(some)
        got += some
    assert len(set(ids(got))) == 4_500
    late = [d.message.priority for d in got[-500:]]
    assert late == [0] * 500, "the least urgent last"


# ---- consumers that die


CONSUMER = """
import sys, threading
from mlops_lib.events.bus import connect
url, ledger = sys.argv[1:]
bus = connect(url, ledger=ledger, join=2.0, conf={"fetch.wait.max.ms": 10})
def handle(event, tx):
    tx.execute("insert into done values (?)", (event.payload.num_samples,))
    if event.payload.num_samples % 25 == 0:
        print(event.payload.num_samples, flush=True)
bus.subscribe("q", "data.*", handle)
threading.Event().wait()
"""


def test_a_consumer_killed_in_the_middle(cluster: LocalCluster, make_bus: Callable[..., Bus], tmp_path: Path) -> None:
    bus = make_bus()
    with bus.transaction() as tx:
        tx.execute("create table done(number integer)")
    bus.subscribe("q", "data.*", lambda e: None).close()
    bus.publish_many(an_event(n, f"story-{n % 9}") for n in range(2_000))
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", CONSUMER, cluster.url, tmp_path / "ledger.db"], stdout=subprocess.PIPE)
        assert process.stdout
        for _ in range(4):
            assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    with sqlite3.connect(tmp_path / "ledger.db") as db:
        half = db.execute("select count(*) from done").fetchone()[0]
        assert 0 < half < 2_000, "killed in the middle"
        bus.subscribe("q", "data.*", lambda e, tx: tx.execute("insert into done values (?)", (e.payload.num_samples,)) and None)
        bus.drain(60)
        done = [row[0] for row in db.execute("select number from done")]
    assert sorted(done) == list(range(2_000)), "nothing lost, nothing twice"


def test_a_retry_outlives_its_consumer(transport: Open) -> None:
    one = transport()
    one.bind("q", ["#"])
    one.publish(messages(1))
    due = time.time() + 1.5
    one.retry(take(one, 1)[0], 1.5, Failure("E", "not yet", attempts=2))
    assert one.depth("q") == {"ready": 0, "delayed": 1, "dead": 0}
    one.close()
    other = transport()
    other.bind("q", ["#"])
    (again,) = take(other, 1)
    assert time.time() >= due
    assert (again.attempts, again.message) == (2, messages(1)[0])


def test_dead_letters_are_kept_and_replayed_once(transport: Open) -> None:
    one = transport()
    one.bind("q", ["a.*"])
    one.publish(messages(3, "{}"))
    for d in take(one, 3):
        one.bury(d, Failure("ValueError", d.message.event_id, "trace", 4))
    one.park(messages(1, kind="nobody.wants")[0], Failure("Unroutable", "nobody"))
    one.close()
    other, third = transport(), transport()
    assert [letter.error for letter in other.dead("q")] == [f"a.b-1-{n}" for n in range(3)]
    assert other.depth("q")["dead"] == 3
    assert other.replay("q", ["a.b-1-1"]) == 1
    assert other.replay("q", ["a.b-1-1"]) == 0
    assert [letter.error for letter in third.dead("q")] == ["a.b-1-0", "a.b-1-2"]
    assert third.dead(UNROUTABLE)[0].routing_key == "nobody.wants"
    third.bind("q", ["a.*"])
    (again,) = take(third, 1)
    assert (again.message, again.attempts) == (messages(3, "{}")[1], 0)


def test_a_retry_that_cannot_be_stored_comes_again(cluster: LocalCluster, transport: Open) -> None:
    one = transport(lease=2.0, timeout=0.5)
    one.bind("q", ["#"])
    one.publish(messages(1))
    (lent,) = take(one, 1)
    cluster.down()
    with pytest.raises(BusUnavailable):
        one.retry(lent, 0, Failure("E", "e", attempts=1))
    cluster.up()
    (again,) = take(one, 1)
    assert again.message == lent.message


def test_events_of_the_schema_travel(make_bus: Callable[..., Bus]) -> None:
    bus, got = make_bus(namespace="other-course"), []
    bus.subscribe("a.queue_with-all.signs", "data.*", got.append)
    sent = bus.publish(an_event(1))
    bus.drain()
    assert got == [sent] and type(got[0]) is DataIngested
    assert bus.transport.queues() == ["a.queue_with-all.signs"]


CLAIMS = """
import sys, threading
from mlops_lib.events.kafka import KafkaTransport
one = KafkaTransport(sys.argv[1])
one.claim("trainer-1")
print("claimed", flush=True)
threading.Event().wait()
"""


def test_the_id_of_a_killed_consumer_is_free_after_its_session(cluster: LocalCluster, transport: Open) -> None:
    one = transport(join=0.5)
    process = subprocess.Popen([sys.executable, "-c", CLAIMS, cluster.url], stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == b"claimed\n"
    with pytest.raises(ConsumerExists, match="trainer-1"):
        one.claim("trainer-1")
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 30
    while True:
        try:
            one.claim("trainer-1")
            break
        except ConsumerExists:
            assert time.monotonic() < deadline


def test_consumers_come_and_go_while_events_flow(make_bus: Callable[..., Bus], tmp_path: Path) -> None:
    bus, stop, insert = make_bus(), threading.Event(), "insert into done values (?, ?)"
    with bus.transaction() as tx:
        tx.execute("create table done(number integer, story text)")

    def handle(event: DataIngested, tx: Transaction) -> None:
        tx.execute(insert, (event.payload.num_samples, event.correlation_id))

    def churn(stay: float) -> None:
        while not stop.is_set():
            other = make_bus()
            other.subscribe("q", "data.*", handle, prefetch=20)
            stop.wait(stay)
            other.close()

    bus.subscribe("q", "data.*", handle).close()
    others = [threading.Thread(target=churn, args=(stay,)) for stay in (0.4, 0.7)]
    for t in others:
        t.start()
    for start in range(0, 3_000, 50):
        bus.publish_many(an_event(n, f"story-{n % 13}") for n in range(start, start + 50))
        stop.wait(0.05)
    stop.set()
    for t in others:
        t.join()
    bus.subscribe("q", "data.*", handle)
    bus.drain(60)
    with sqlite3.connect(tmp_path / "ledger.db") as db:
        rows = db.execute("select story, number from done order by rowid").fetchall()
    assert sorted(n for _, n in rows) == list(range(3_000)), "nothing lost, nothing twice"
    for story in {s for s, _ in rows}:
        numbers = [n for s, n in rows if s == story]
        assert numbers == sorted(numbers), "a story keeps its order when its partition moves"
