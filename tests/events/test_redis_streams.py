"""What is special to Redis: its log, its memory, its leases, its errors."""

import contextlib
import logging
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from support import an_event, private

from mlops_lib.events.bus import connect
from mlops_lib.events.redis_streams import RedisTransport, _explained
from mlops_lib.events.transport import (
    UNROUTABLE,
    BusError,
    BusFull,
    BusRefused,
    BusUnavailable,
    ConsumerExists,
    Failure,
    Message,
    PublishError,
    Unroutable,
)
from mlops_lib.servers import HOST, Server, free_port

Link = Callable[..., RedisTransport]
WHY = Failure("ValueError", "no", "tb", 1)


@pytest.fixture
def link(redis_server: Server) -> Iterator[Link]:
    "Transports on one namespace, as if of several services."
    namespace = f"t{uuid.uuid4().hex[:10]}"
    with contextlib.ExitStack() as opened:

        def make(**options: object) -> RedisTransport:
            one = RedisTransport(redis_server.url, **({"namespace": namespace, "lease": 30.0} | options))
            opened.callback(one.close)
            return one

        yield make


@pytest.fixture
def db(redis_server: Server) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_server.url, protocol=2) as client:
        yield client


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Server]:
    "A server that the test may kill and fill."
    with private("redis", tmp_path / "own") as one:
        yield one


def a_message(number: int = 0, kind: str = "data.ingested", priority: int = 1, size: int = 10) -> Message:
    return Message(f"{number:08d}-0000-4000-8000-000000000000", kind, "story", b"x" * size, priority)


def numbers(deliveries: list) -> list[int]:
    return [int(d.message.event_id[:8]) for d in deliveries]


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.01)


# ---- errors


@pytest.mark.parametrize("url", ["redis://:secret@127.0.0.1:no", "redis://:secret@127.0.0.1:99999/0"])
def test_a_wrong_address(url: str) -> None:
    with pytest.raises(BusError) as caught:
        RedisTransport(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("options", [{"timeout": 0}, {"lease": 0}, {"namespace": "a b"}])
def test_wrong_options(options: dict) -> None:
    with pytest.raises(BusError):
        RedisTransport("redis://127.0.0.1", **options)


@pytest.mark.parametrize("scheme", ["redis", "rediss"])
def test_nobody_answers(scheme: str) -> None:
    with pytest.raises(BusUnavailable, match="does not answer") as caught:
        RedisTransport(f"{scheme}://:secret@{HOST}:{free_port()}/0")
    assert "secret" not in str(caught.value)


def test_tls_where_there_is_none(redis_server: Server) -> None:
    with pytest.raises(BusUnavailable):
        RedisTransport(redis_server.url.replace("redis://", "rediss://"))


def test_a_wrong_password_and_a_user_without_rights(tmp_path: Path) -> None:
    right = f"redis://:correct@{HOST}:{free_port()}/0"
    with private("redis", tmp_path, right), redis.Redis.from_url(right) as admin:
        RedisTransport(right).close()
        for wrong in (right.replace("correct", "hunter2"), right.replace(":correct@", "")):
            with pytest.raises(BusRefused) as caught:
                RedisTransport(wrong)
            assert "hunter2" not in str(caught.value)
        admin.acl_setuser("guest", enabled=True, passwords=["+guest"], commands=["+ping", "+info", "+get", "+hgetall", "+multi", "+exec"], keys=["*"])
        with contextlib.closing(RedisTransport(right.replace(":correct", "guest:guest"))) as guest:
            assert guest.durable is None, "CONFIG is forbidden, so nobody can tell"
            with pytest.raises(BusRefused):
                guest.bind("q", ["#"])
            (refused,) = guest.publish([a_message()])
            assert isinstance(refused, BusRefused)


@pytest.mark.parametrize("text", ["MISCONF Errors writing to the AOF file: No space left on device", "command not allowed when used memory > 'maxmemory'."])
def test_no_room_in_the_words_of_redis(text: str) -> None:
    with pytest.raises(BusFull, match="make room"), _explained("redis://:secret@h"):
        raise redis.ResponseError(text)


def test_a_full_server_refuses_and_can_still_be_emptied(own: Server) -> None:
    with contextlib.closing(RedisTransport(own.url)) as bus, redis.Redis.from_url(own.url) as admin:
        bus.bind("q", ["#"])
        admin.config_set("maxmemory", str(int(admin.info("memory")["used_memory"] + 3_000_000)))
        stored, refused = 0, None
        while not refused and stored < 100:
            (refused,) = bus.publish([a_message(stored, size=100_000)])
            stored += refused is None
        assert isinstance(refused, BusFull)
        assert stored > 5
        seen = []
        while got := bus.receive("q", 10, 0):
            seen += numbers(got)
            bus.ack(got)
        assert seen == list(range(stored)), "what was confirmed is there, what was refused is not"
        assert bus.publish([a_message(1)]) == [None]


def test_a_server_that_drops_keys_is_no_bus(own: Server, caplog: pytest.LogCaptureFixture) -> None:
    with redis.Redis.from_url(own.url) as admin:
        admin.config_set("maxmemory", "100mb")
        admin.config_set("maxmemory-policy", "allkeys-lru")
        with pytest.raises(BusError, match="noeviction"):
            RedisTransport(own.url)
        admin.config_set("maxmemory-policy", "volatile-lru")
        with caplog.at_level(logging.WARNING):
            RedisTransport(own.url).close()
        assert "may drop keys" in caplog.text


def test_what_a_server_keeps_is_told(own: Server, caplog: pytest.LogCaptureFixture) -> None:
    with redis.Redis.from_url(own.url) as admin, caplog.at_level(logging.WARNING):
        told = []
        for aof, fsync in (("yes", "always"), ("yes", "everysec"), ("no", "always")):
            admin.config_set("appendfsync", fsync)
            admin.config_set("appendonly", aof)
            caplog.clear()
            bus = RedisTransport(own.url)
            told.append((bus.durable, [r.message for r in caplog.records]))
            bus.close()
    assert told == [
        (True, []),
        (False, ["a crash of this Redis may lose the last second"]),
        (False, ["a crash of this Redis may lose all since its last snapshot"]),
    ]


# ---- the server goes away


def test_a_server_that_is_down_for_a_while(own: Server) -> None:
    with contextlib.closing(RedisTransport(own.url, timeout=0.3)) as hasty, contextlib.closing(RedisTransport(own.url)) as patient:
        hasty.bind("q", ["#"])
        assert hasty.publish([a_message(1)]) == [None]
        own.kill()
        results = hasty.publish([a_message(2), a_message(3)])
        assert [type(r) for r in results] == [BusUnavailable] * 2
        for act in (lambda: hasty.receive("q", 1, 5), lambda: hasty.bind("r", ["#"]), lambda: hasty.depth("q"), lambda: hasty.dead("q")):
            with pytest.raises(BusUnavailable):
                act()
        result: list = []
        waiting = threading.Thread(target=lambda: result.extend(patient.publish([a_message(4)])))
        waiting.start()
        own.start()
        waiting.join(30)
        assert result == [None], "it went on trying"
        assert sorted(numbers(hasty.receive("q", 10, 5))) == [1, 4]


def test_kill_9_of_the_server_in_mid_stream(own: Server, tmp_path: Path) -> None:
    options = {"ledger": tmp_path / "ledger.db", "lease": 2.0}
    handled: Counter = Counter()
    with connect(own.url, **options) as sender, connect(own.url, **options) as receiver:
        receiver.subscribe("q", "data.*", lambda e: handled.update([e.event_id]), prefetch=20)
        sure: list[str] = []

        def send() -> None:
            for i in range(60):
                events = [an_event(i * 50 + k) for k in range(50)]
                failed: set[str] = set()
                try:
                    sender.publish_many(events)
                except PublishError as e:
                    failed = {event.event_id for event, _ in e.failed}
                sure.extend(e.event_id for e in events if e.event_id not in failed)

        sending = threading.Thread(target=send)
        sending.start()
        for share in (0.2, 0.5):
            until(lambda share=share: len(sure) > 3_000 * share)
            own.kill()
            own.start()
        sending.join(60)
        until(lambda: set(sure) <= set(handled))
        receiver.drain()
    assert len(sure) == 3_000
    assert set(handled.values()) == {1}


def test_a_retry_waits_through_a_crash_of_the_server(own: Server) -> None:
    with contextlib.closing(RedisTransport(own.url)) as bus:
        bus.bind("q", ["#"])
        bus.publish([a_message(7), a_message(8)])
        first, second = bus.receive("q", 2, 5)
        bus.retry(first, 1.0, Failure("OSError", "later", attempts=2))
        bus.bury(second, WHY)
        own.kill()
        own.start()
        assert bus.depth("q") == {"ready": 0, "delayed": 1, "dead": 1}
        (again,) = bus.receive("q", 2, 30)
        assert (numbers([again]), again.attempts) == ([7], 2)
        assert [letter.error_type for letter in bus.dead("q")] == ["ValueError"]


def test_what_was_lent_in_an_answer_that_got_lost_comes_at_once(own: Server) -> None:
    with contextlib.closing(RedisTransport(own.url, lease=600)) as bus, redis.Redis.from_url(own.url, protocol=2) as admin:
        bus.bind("q", ["#"])
        bus.publish([a_message(i) for i in range(5)])
        known = bus.receive("q", 2, 5)
        admin.xreadgroup("bus", bus._me, {"mlops:queue:q:normal": ">"}, count=2)  # lent, and the answer went astray
        assert bus.depth("q")["ready"] == 3, "one that nobody has, two that nobody knows to have"
        own.kill()
        with pytest.raises(BusUnavailable):
            bus.receive("q", 10, 5)
        with pytest.raises(BusUnavailable):
            bus.ack(known[:1])
        own.start()
        assert sorted(numbers(bus.receive("q", 10, 0))) == [0, 2, 3, 4], "1 is known to be held; whether 0 was acknowledged is not"
        assert bus.depth("q") == {"ready": 0, "delayed": 0, "dead": 0}
        assert bus.receive("q", 10, 0) == []


def test_a_server_that_forgot_everything(own: Server, caplog: pytest.LogCaptureFixture) -> None:
    with contextlib.closing(RedisTransport(own.url)) as bus, redis.Redis.from_url(own.url) as admin, caplog.at_level(logging.WARNING):
        bus.bind("q", ["#"])
        assert bus.publish([a_message()]) == [None]
        admin.flushall()
        (lost,) = bus.publish([a_message()])
        assert isinstance(lost, Unroutable), "nothing is confirmed into a queue that is not there"
        assert bus.receive("q", 1, 0) == []
        assert bus.publish([a_message(5)]) == [None]
        assert numbers(bus.receive("q", 1, 5)) == [5]
    assert "made again" in caplog.text


# ---- routing


def test_a_binding_counts_from_the_moment_it_is_made(link: Link) -> None:
    sender, receiver = link(), link()
    sender.bind("other", ["model.*"])
    assert isinstance(sender.publish([a_message()])[0], Unroutable)
    receiver.bind("q", ["data.*"])
    assert sender.publish([a_message(1)]) == [None], "what the sender knew was out of date"
    receiver.bind("q", ["drift.*"])
    assert isinstance(sender.publish([a_message(2)])[0], Unroutable)
    assert numbers(receiver.receive("q", 5, 5)) == [1], "what was in the queue stays there"
    assert sender.queues() == ["other", "q"]


def test_while_queues_are_bound_nothing_slips_between(link: Link) -> None:
    sender, receiver = link(), link()
    sender.bind("q0", ["data.*"])
    binding = threading.Thread(target=lambda: [receiver.bind(f"q{i}", ["data.*"]) for i in range(1, 30)])
    sent = 0
    binding.start()
    while binding.is_alive() or sent < 100:
        assert sender.publish([a_message(sent)]) == [None]
        sent += 1
    got = [numbers(receiver.receive(f"q{i}", sent, 0)) for i in range(30)]
    assert got[0] == list(range(sent))
    assert all(some == got[0][sent - len(some) :] for some in got), "a queue has all from its binding on"


def test_namespaces_are_apart(link: Link) -> None:
    ours, theirs = link(), link(namespace="theirs")
    ours.bind("q", ["#"])
    assert isinstance(theirs.publish([a_message()])[0], Unroutable)
    assert theirs.queues() == []


def test_many_and_large_ones_travel_in_several_steps(link: Link) -> None:
    bus = link()
    bus.bind("q", ["#"])
    many = [a_message(i, size=50_000) for i in range(250)] + [a_message(i, size=1) for i in range(250, 1_500)]
    assert bus.publish(many) == [None] * 1_500
    assert numbers(bus.receive("q", 2_000, 5)) == list(range(1_500))
    assert bus.publish([]) == []


# ---- leases


def test_what_a_dead_consumer_held_comes_back(link: Link) -> None:
    dead, alive = link(lease=0.5), link(lease=0.5)
    dead.bind("q", ["#"])
    dead.publish([a_message(i, priority=i % 3) for i in range(9)])
    held = dead.receive("q", 9, 5)
    assert numbers(held) == [2, 5, 8, 1, 4, 7, 0, 3, 6]
    dead.extend(held[:1])
    again: list = []
    until(lambda: again.extend(alive.receive("q", 9, 0.1)) or len(again) == 9)
    assert sorted(numbers(again)) == list(range(9))
    assert {d.attempts for d in again} == {0}, "nobody failed"


def test_who_lives_and_says_so_keeps_it(link: Link) -> None:
    slow, other = link(lease=0.5), link(lease=0.5)
    slow.bind("q", ["#"])
    slow.publish([a_message(1)])
    held = slow.receive("q", 1, 5)
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        slow.extend(held)
        assert other.receive("q", 1, 0.05) == []
    slow.ack(held)
    assert slow.depth("q") == {"ready": 0, "delayed": 0, "dead": 0}


def test_a_retry_that_a_dead_consumer_held_comes_back(link: Link) -> None:
    dead, alive = link(lease=0.5), link(lease=0.5)
    dead.bind("q", ["#"])
    dead.publish([a_message(3)])
    dead.retry(dead.receive("q", 1, 5)[0], 0.01, Failure("OSError", "x", attempts=2))
    (held,) = dead.receive("q", 1, 5)
    assert held.attempts == 2
    again: list = []
    until(lambda: again.extend(alive.receive("q", 1, 0.1)) or again)
    assert (numbers(again), again[0].attempts) == ([3], 2)


@pytest.mark.parametrize("act", ["ack", "retry", "release", "bury", "extend"])
def test_a_receipt_that_is_out_of_date_is_ignored(link: Link, act: str) -> None:
    slow, quick = link(lease=0.3), link(lease=0.3)
    slow.bind("q", ["#"])
    slow.publish([a_message(1)])
    (stale,) = slow.receive("q", 1, 5)
    held: list = []
    until(lambda: held.extend(quick.receive("q", 1, 0.1)) or held)
    late = {
        "ack": lambda: slow.ack([stale]),
        "retry": lambda: slow.retry(stale, 0, WHY),
        "release": lambda: slow.release([stale]),
        "bury": lambda: slow.bury(stale, WHY),
        "extend": lambda: slow.extend([stale]),
    }
    quick.extend(held)
    late[act]()
    assert slow.depth("q") == {"ready": 0, "delayed": 0, "dead": 0}
    quick.retry(held[0], 60, WHY)
    assert quick.depth("q") == {"ready": 0, "delayed": 1, "dead": 0}, "it was still lent to the other one"


def test_what_is_given_back_keeps_its_place(link: Link) -> None:
    bus = link()
    bus.bind("q", ["#"])
    bus.publish([a_message(i) for i in range(300)])
    got = bus.receive("q", 200, 5)
    bus.release(got[150:])
    bus.release(got[:150])
    assert bus.depth("q") == {"ready": 300, "delayed": 0, "dead": 0}
    assert numbers(bus.receive("q", 40, 5)) == list(range(40)), "although many were stored in the same millisecond"
    assert numbers(bus.receive("q", 500, 5)) == list(range(40, 300))


def test_closing_gives_back_and_leaves_no_name(link: Link, db: redis.Redis) -> None:
    first, second = link(), link()
    first.bind("q", ["#"])
    first.publish([a_message(i) for i in range(5)])
    first.receive("q", 3, 5)
    first.close()
    assert numbers(second.receive("q", 5, 0)) == [0, 1, 2, 3, 4]
    (left,) = db.xinfo_consumers(f"{second.namespace}:queue:q:normal", "bus")
    assert left["pending"] == 5


# ---- memory


def test_what_is_done_is_gone_and_nothing_else(link: Link, db: redis.Redis) -> None:
    bus = link()
    for queue in ("quick", "slow", "never"):
        bus.bind(queue, ["#"])
    for start in range(0, 2_000, 500):
        assert bus.publish([a_message(i, priority=i % 3) for i in range(start, start + 500)]) == [None] * 500
    while got := bus.receive("quick", 100, 0):
        bus.ack(got)
    slow = bus.receive("slow", 700, 0)
    bus.ack(slow[:600])
    streams = {q: sum(db.xlen(f"{bus.namespace}:queue:{q}:{level}") for level in ("high", "normal", "low")) for q in ("quick", "slow", "never")}
    assert streams == {"quick": 0, "slow": 1_400, "never": 2_000}
    assert [db.memory_usage(f"{bus.namespace}:queue:quick:{level}") < 2_000 for level in ("high", "normal", "low")] == [True] * 3
    bus.release(slow[600:])
    rest = [d for _ in range(20) for d in bus.receive("slow", 100, 0)]
    assert sorted(numbers(rest) + numbers(slow[:600])) == list(range(2_000)), "nothing that was not done is gone"


def test_the_notes_of_a_retry_go_with_it(link: Link, db: redis.Redis) -> None:
    bus = link()
    bus.bind("q", ["#"])
    bus.publish([a_message(i) for i in range(3)])
    for delivery in bus.receive("q", 3, 5):
        bus.retry(delivery, 0, WHY)
    one, two, three = bus.receive("q", 3, 5)
    bus.ack([one])
    bus.bury(two, WHY)
    bus.retry(three, 0, WHY)
    bus.ack(bus.receive("q", 1, 5))
    assert bus.replay("q", None) == 1
    bus.ack(bus.receive("q", 1, 5))
    kept = {key.decode().removeprefix(f"{bus.namespace}:") for key in db.scan_iter(f"{bus.namespace}:*")}
    assert not {key for key in kept if key.endswith((":late", ":tries"))}
    assert bus.depth("q") == {"ready": 0, "delayed": 0, "dead": 0}


# ---- waiting


def test_a_wake_up_call(link: Link) -> None:
    bus = link()
    bus.bind("q", ["#"])
    got: list = []
    waiting = threading.Thread(target=lambda: got.append(bus.receive("q", 1, 300)))
    waiting.start()
    until(lambda: bus._asleep)
    bus.wake()
    waiting.join(30)
    assert got == [[]]


def test_who_waits_asks_seldom_and_hears_at_once(link: Link, db: redis.Redis) -> None:
    bus, sender = link(), link()
    bus.bind("q", ["#"])
    sender.publish([a_message(1)])
    bus.ack(bus.receive("q", 1, 0))
    got: list = []
    waiting = threading.Thread(target=lambda: got.extend(bus.receive("q", 5, 300)))
    before = db.info("commandstats")["cmdstat_evalsha"]["calls"]
    waiting.start()
    until(lambda: bus._asleep)
    sender.publish([a_message(4)])
    waiting.join(30)
    assert numbers(got) == [4]
    asked = db.info("commandstats")["cmdstat_evalsha"]["calls"] - before
    assert asked == 2, "one look, one event published; no asking again and again"


# ---- dead letters


def test_replay_takes_what_was_dead_when_it_began(link: Link) -> None:
    bus = link()
    bus.bind("q", ["#"])
    bus.publish([a_message(i) for i in range(250)])
    for delivery in bus.receive("q", 250, 5):
        bus.bury(delivery, WHY)
    pages = bus._pages("q")
    next(pages)
    bus.publish([a_message(999)])
    bus.bury(bus.receive("q", 1, 5)[0], WHY)
    assert sum(len(page) for page in pages) == 150
    assert bus.replay("q", [a_message(3).event_id, a_message(200).event_id]) == 2
    assert numbers(bus.receive("q", 300, 0)) == [3, 200]
    assert bus.replay("q", None) == 249
    assert bus.depth("q") == {"ready": 249, "delayed": 0, "dead": 0}


def test_a_dead_letter_keeps_its_priority_and_its_bytes(link: Link) -> None:
    bus = link()
    bus.bind("q", ["#"])
    sent = Message("11111111-0000-4000-8000-000000000000", "data.ingested", "naïve key", bytes(range(256)), 2)
    bus.publish([sent])
    bus.bury(bus.receive("q", 1, 5)[0], WHY)
    bus.replay("q", None)
    (back,) = bus.receive("q", 1, 5)
    assert (back.message, back.attempts) == (sent, 0)


def test_what_is_still_unroutable_stays_parked(link: Link) -> None:
    bus = link()
    for i, kind in enumerate(("data.ingested", "drift.detected")):
        bus.park(a_message(i, kind), WHY)
    bus.bind("q", ["drift.*"])
    assert bus.replay(UNROUTABLE, None) == 1
    assert [letter.routing_key for letter in bus.dead(UNROUTABLE)] == ["data.ingested"]
    assert numbers(bus.receive("q", 5, 0)) == [1]


def test_what_somebody_wrote_by_hand_is_a_dead_letter(redis_server: Server, db: redis.Redis, tmp_path: Path) -> None:
    with connect(redis_server.url, namespace="hand", ledger=tmp_path / "ledger.db") as bus:
        bus.subscribe("q", "data.*", lambda e: None)
        db.xadd("hand:queue:q:normal", {"hello": b"\xff"})
        bus.drain()
        (letter,) = bus.dead_letters("q")
        assert letter.error_type == "EventError"


# ---- who is at work


def test_a_consumers_id_is_kept_while_it_lives_and_free_when_it_is_dead(link: Link, db: redis.Redis) -> None:
    first, second = link(lease=0.6), link(lease=0.6)
    first.claim("trainer")
    key = f"{first.namespace}:consumer:trainer"
    left = [db.pttl(key)]
    for _ in range(4):  # the time that is left grows again: somebody renews it
        until(lambda: left.append(db.pttl(key)) or left[-1] > left[-2])
    with pytest.raises(ConsumerExists, match="trainer"):
        second.claim("trainer")
    with pytest.raises(ConsumerExists):
        first.claim("trainer")
    first._ended.set()  # no more heartbeats, as after kill -9

    def free() -> bool:
        with contextlib.suppress(ConsumerExists):
            second.claim("trainer")
            return True
        return False

    until(free)
    second.unclaim("trainer")
    link().claim("trainer")


def test_an_id_survives_a_crash_of_the_server(own: Server) -> None:
    with contextlib.closing(RedisTransport(own.url, lease=1.0)) as first, contextlib.closing(RedisTransport(own.url, lease=1.0)) as second:
        first.claim("trainer")
        own.kill()
        own.start()
        with redis.Redis.from_url(own.url) as db:
            until(lambda: db.pttl("mlops:consumer:trainer") > 900)
        with pytest.raises(ConsumerExists):
            second.claim("trainer")


def test_two_namespaces_share_no_inbox(redis_server) -> None:
    heard: list[tuple[str, str]] = []
    event = an_event()
    for namespace in (f"n{uuid.uuid4().hex[:8]}", f"n{uuid.uuid4().hex[:8]}"):
        with connect(redis_server.url, namespace=namespace) as bus:
            bus.subscribe("q", "#", lambda e, namespace=namespace: heard.append((namespace, e.event_id)))
            bus.publish(event)
            bus.drain(30)
    assert len(set(heard)) == 2, "an event that was handled in one namespace is new in another"
