"""What is special to RabbitMQ: a server that is away, full or killed; retries, dead letters and ids that outlive it."""

import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pika
import pytest
from support import an_event

from mlops_lib.events.bus import connect
from mlops_lib.events.rabbitmq import RabbitTransport
from mlops_lib.events.transport import (
    UNROUTABLE,
    BusError,
    BusFull,
    BusRefused,
    BusUnavailable,
    ConsumerExists,
    Delivery,
    Failure,
    Message,
    Unroutable,
)
from mlops_lib.servers import Server, find_program, free_port

Make = Callable[..., RabbitTransport]


@pytest.fixture
def make(rabbitmq_server: Server, tmp_path: Path) -> Iterator[Make]:
    opened, namespace = [], f"t{uuid.uuid4().hex[:10]}"

    def transport(**options: object) -> RabbitTransport:
        opened.append(RabbitTransport(rabbitmq_server.url, **({"namespace": namespace, "claims": tmp_path / "claims.db"} | options)))
        return opened[-1]

    yield transport
    for one in opened:
        one.close()


def message(number: int = 0, routing_key: str = "data.x", **more: object) -> Message:
    return Message(f"id-{number}", routing_key, **({"key": "k", "body": b"%d" % number} | more))


def receive(transport: RabbitTransport, count: int, queue: str = "q", seconds: float = 20) -> list[Delivery]:
    got: list[Delivery] = []
    deadline = time.monotonic() + seconds
    while len(got) < count and time.monotonic() < deadline:
        got += transport.receive(queue, count - len(got), 0.5)
    assert len(got) == count
    return got


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


FAILURE = Failure("ValueError", "no", "in handle", 1)


# ---- a server that is not there, or does not let us in


def test_no_server() -> None:
    began = time.monotonic()
    with pytest.raises(BusUnavailable, match="127.0.0.1") as caught:
        connect(f"amqp://someone:secret@127.0.0.1:{free_port()}/")
    assert "secret" not in str(caught.value)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("change", [("guest:guest", "guest:secret"), ("guest:guest", "nobody:secret"), ("/", "/nowhere")])
def test_a_server_that_refuses(rabbitmq_server: Server, change: tuple[str, str]) -> None:
    head, _, tail = rabbitmq_server.url.partition("guest:guest")
    url = rabbitmq_server.url.rstrip("/") + "/nowhere" if change[0] == "/" else f"{head}{change[1]}{tail}"
    with pytest.raises(BusRefused) as caught:
        connect(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["amqp://guest:secret@localhost:port/", "amqp://h/?heartbeat=often"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(BusError) as caught:
        connect(url)
    assert "secret" not in str(caught.value)


def test_the_server_goes_away_and_comes_back(make: Make, rabbitmq_server: Server) -> None:
    patient, hasty = make(timeout=60), make(timeout=0.5)
    patient.bind("q", ["data.*"])
    patient.claim("trainer-1")
    assert patient.publish([message(1)]) == [None]
    (held,) = receive(patient, 1)
    rabbitmq_server.kill()
    assert isinstance(hasty.publish([message(2)])[0], BusUnavailable)
    with pytest.raises(BusUnavailable):
        hasty.depth("q")
    results: list = []
    waiting = threading.Thread(target=lambda: results.extend(patient.publish([message(n) for n in range(10, 20)])))
    waiting.start()
    rabbitmq_server.start()
    waiting.join(60)
    assert results == [None] * 10, "published when the server was back"
    patient.ack([held])  # from before: no longer valid, and delivered again
    ids = {d.message.event_id for d in receive(patient, 11)}
    assert ids == {"id-1"} | {f"id-{n}" for n in range(10, 20)}
    with pytest.raises(ConsumerExists, match="trainer-1"):
        make().claim("trainer-1")


def test_killed_in_the_middle_of_a_stream(rabbitmq_server: Server, tmp_path: Path) -> None:
    options = {"namespace": f"t{uuid.uuid4().hex[:10]}", "ledger": tmp_path / "ledger.db", "timeout": 60}
    with connect(rabbitmq_server.url, **options) as bus:
        got: list = []
        bus.subscribe("q", "data.*", lambda e: got.append(e.payload.num_samples))
        sent = threading.Thread(target=lambda: bus.publish_many((an_event(i) for i in range(6_000)), window=100))
        sent.start()
        until(lambda: len(got) > 200)
        rabbitmq_server.kill()
        rabbitmq_server.start()
        sent.join(60)
        bus.drain(60)
        assert set(got) == set(range(6_000))


def test_a_server_without_room(make: Make, rabbitmq_server: Server) -> None:
    transport = make(timeout=1.0)
    transport.bind("q", ["data.*"])
    transport.publish([message(1)])
    assert rabbitmq_server.process

    def limit(share: str) -> None:
        command = [find_program("rabbitmqctl") or "rabbitmqctl", "-n", "mlops@localhost", "set_vm_memory_high_watermark", share]
        subprocess.run(command, env=rabbitmq_server.process.environ(), check=True, capture_output=True, timeout=60)

    limit("0.000001")
    try:
        until(lambda: isinstance(transport.publish([message(2)])[0], BusFull))
        transport.ack(receive(transport, 1))  # consumers go on
        until(lambda: transport.depth("q")["ready"] == 0)
    finally:
        limit("0.6")
    until(lambda: transport.publish([message(3)]) == [None])


# ---- windows, routes


def test_each_message_of_a_window_has_its_own_result(make: Make) -> None:
    transport = make()
    transport.bind("q", ["data.*"])
    window = [message(n % 100, "data.x" if n % 3 else "nobody.wants") for n in range(500)]
    window[7] = message(7, "data.x", key="\x00" * 10)
    window[8] = Message("x" * 300, "data.x", "k", b"")  # an id that AMQP cannot carry
    results = transport.publish(window)
    for n, result in enumerate(results):
        expected = BusError if n == 8 else type(None) if n % 3 else Unroutable
        assert type(result) is expected, n
    assert transport.depth("q")["ready"] == sum(r is None for r in results)


def test_a_second_bind_takes_back_patterns(make: Make) -> None:
    one, two = make(), make()
    one.bind("q", ["data.*", "model.*"])
    two.bind("q", ["model.*", "drift.#"])
    kinds = [type(r) for r in one.publish([message(1, "data.x"), message(2, "model.x"), message(3, "drift.a.b")])]
    assert kinds == [Unroutable, type(None), type(None)]
    assert one.queues() == ["q"]
    with pytest.raises(BusError, match="dead"):
        one.bind("q.dead", ["#"])


def test_what_a_message_carries(make: Make, rabbitmq_server: Server) -> None:
    transport = make()
    transport.bind("q", ["#"])
    story = "é" * 200  # longer than AMQP's own field holds
    sent = message(1, key=story, priority=2)
    transport.publish([sent])
    connection = pika.BlockingConnection(pika.URLParameters(rabbitmq_server.url))
    connection.channel().basic_publish(transport._name("events"), "data.foreign", b"plain")
    connection.close()
    mine, foreign = sorted(receive(transport, 2), key=lambda d: -d.message.priority)
    assert mine.message == sent
    assert (foreign.message.routing_key, foreign.message.body) == ("data.foreign", b"plain")
    transport.retry(mine, 0.01, FAILURE)
    (again,) = receive(transport, 1)
    assert (again.message, again.attempts) == (sent, 1)


def test_unroutable_is_published_again_when_somebody_wants_it(make: Make) -> None:
    transport = make()
    for n, key in enumerate(["data.x", "model.x", "data.y"]):
        transport.park(message(n, key), Failure("Unroutable", "no queue"))
    transport.bind("q", ["data.*"])
    assert transport.replay(UNROUTABLE, None) == 2
    assert [letter.routing_key for letter in transport.dead(UNROUTABLE)] == ["model.x"]
    assert transport.depth("q")["ready"] == 2


# ---- what outlives consumers and the broker


def test_retries_and_dead_letters_outlive_the_server(make: Make, rabbitmq_server: Server) -> None:
    transport = make()
    transport.bind("q", ["data.*"])
    transport.publish([message(n) for n in range(3)])
    first, second, third = receive(transport, 3)
    transport.retry(first, 60, FAILURE)
    transport.retry(second, 0.5, FAILURE)
    transport.bury(third, FAILURE)
    assert transport.depth("q") == {"ready": 0, "delayed": 2, "dead": 1}
    transport.close()
    rabbitmq_server.kill()
    rabbitmq_server.start()
    other = make()
    # An ack that the server had in memory only is lost with it: some of the three may come once more, as new.
    due = (second.message, 1)
    until(lambda: due in [(d.message, d.attempts) for d in other.receive("q", 10, 0.5)])  # not behind the long one
    assert other.depth("q")["delayed"] == 1
    (letter,) = other.dead("q")
    assert (letter.event_id, letter.error_type, letter.error, letter.traceback) == ("id-2", "ValueError", "no", "in handle")


def test_dead_letters_keep_their_order_whoever_looks(make: Make) -> None:
    transport = make()
    transport.bind("q", ["data.*"])
    transport.publish([message(n) for n in range(300)])
    for delivery in receive(transport, 300):
        transport.bury(delivery, FAILURE)
    expected = [f"id-{n}" for n in range(300)]
    seen: list[list[str]] = []
    threads = [threading.Thread(target=lambda: seen.append([d.event_id for d in transport.dead("q")])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert seen == [expected] * 4
    assert transport.replay("q", ["id-7", "id-9", "other"]) == 2
    assert [d.event_id for d in transport.dead("q")] == [i for i in expected if i not in ("id-7", "id-9")]


def test_what_a_slow_consumer_has_not_begun_goes_to_others(make: Make) -> None:
    slow, other = make(), make()
    slow.bind("q", ["data.*"])
    slow.publish([message(n) for n in range(10)])
    assert receive(slow, 1) and slow.receive("q", 5, 1)[:1]
    held = 10 - slow.depth("q")["ready"]
    assert held < 10
    until(lambda: other.depth("q")["ready"] >= 4)  # given back without being asked
    assert receive(other, 4)


def test_after_wake_nothing_is_kept(make: Make) -> None:
    one, other = make(), make()
    one.bind("q", ["data.*"])
    assert one.receive("q", 10, 0.1) == []
    one.wake()
    one.publish([message(n) for n in range(20)])
    assert [d.message.event_id for d in receive(other, 20)] == [f"id-{n}" for n in range(20)]


# ---- handlers that take longer than RabbitMQ waits

LONG = """
import os, sys, time
from mlops_lib.events.rabbitmq import RabbitTransport
t = RabbitTransport(sys.argv[1], namespace=sys.argv[2], claims=sys.argv[3], claim_after=0.05)
(d,) = t.receive("q", 1, 20)
end = time.monotonic() + 20
while not isinstance(d.receipt, int) and time.monotonic() < end:
    t.extend([d])
assert t.depth("q")["ready"] == 0
print(d.message.event_id, flush=True)
sys.stdin.read()
"""


def test_a_long_delivery_is_kept_here_and_found_again(make: Make, rabbitmq_server: Server, tmp_path: Path) -> None:
    transport = make()
    transport.bind("q", ["data.*"])
    transport.publish([message(1)])
    args = [sys.executable, "-c", LONG, rabbitmq_server.url, transport.namespace, str(tmp_path / "claims.db")]
    with subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout and worker.stdout.readline() == "id-1\n"
        assert transport.receive("q", 1, 0.3) == [], "its consumer lives"
        worker.kill()
        worker.wait(20)
    heir = make()
    (delivery,) = receive(heir, 1)
    assert delivery.message.event_id == "id-1"
    heir.retry(delivery, 0.01, FAILURE)
    (again,) = receive(heir, 1)
    assert again.attempts == 1
    heir.ack([again])
    heir.close()
    assert make().receive("q", 1, 0.3) == []


def test_a_long_delivery_ends_like_any_other(make: Make) -> None:
    transport = make(claim_after=0.01)
    transport.bind("q", ["data.*"])
    transport.publish([message(n) for n in range(4)])
    deliveries = receive(transport, 4)

    def claimed() -> bool:
        transport.extend(deliveries)
        return all(isinstance(d.receipt, int) for d in deliveries)

    until(claimed)
    done, again, hopeless, unbegun = deliveries
    transport.ack([done])
    transport.bury(hopeless, FAILURE)
    transport.release([unbegun])
    transport.close()  # `again` was lent and not acked
    other = make()
    assert {d.message.event_id for d in receive(other, 2)} == {again.message.event_id, unbegun.message.event_id}
    assert other.depth("q")["dead"] == 1


def test_closing_ends_the_waiting_of_other_threads(make: Make, rabbitmq_server: Server) -> None:
    transport, told = make(timeout=60), []

    def publish() -> None:
        try:
            transport.publish([message(1)])
        except BusError as e:
            told.append(str(e))

    rabbitmq_server.kill()
    try:
        waiting = threading.Thread(target=publish)
        waiting.start()
        until(lambda: bool(transport._out._unsent))
        transport.close()
        waiting.join(10)
        assert told == ["This bus was closed."]
    finally:
        rabbitmq_server.start()
