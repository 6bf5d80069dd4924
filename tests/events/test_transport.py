"Routing rules against a brute force and against RabbitMQ itself; names and patterns from a fuzzer."

import random
import re
import uuid
from itertools import product
from pathlib import Path, PurePath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import an_event

from mlops_lib.events.bus import connect
from mlops_lib.events.outbox import Ledger
from mlops_lib.events.schema import EventError
from mlops_lib.events.transport import BusError, DeadLetter, PublishError, check_name, check_pattern, matches
from mlops_lib.servers import Server
from mlops_lib.settings import settings

WORDS = st.sampled_from(["a", "b", "c-1", "d_2"])
KEYS = st.lists(WORDS, min_size=1, max_size=6).map(".".join)
PATTERNS = st.lists(WORDS | st.sampled_from(["*", "#"]), min_size=1, max_size=5).map(".".join)

# ---- matches


def by_brute_force(pattern: str, key: str) -> bool:
    "Write every # out as no, one, two ... words, and compare word by word."
    words = key.split(".")
    parts = [[["*"] * n for n in range(len(words) + 1)] if w == "#" else [[w]] for w in pattern.split(".")]
    written_out = (sum(choice, []) for choice in product(*parts))
    return any(len(w) == len(words) and all(p in ("*", k) for p, k in zip(w, words, strict=True)) for w in written_out)


@given(PATTERNS, KEYS)
def test_matches_is_what_its_words_say(pattern: str, key: str) -> None:
    assert matches(pattern, key) == by_brute_force(pattern, key)


@given(KEYS, KEYS)
def test_a_pattern_without_wildcards_is_the_key_itself(pattern: str, key: str) -> None:
    assert matches(pattern, key) == (pattern == key)
    assert matches("#", key)
    assert matches("*", key) == ("." not in key)


@given(PATTERNS, PATTERNS, KEYS, KEYS)
def test_what_matches_piece_by_piece_matches_as_a_whole(p: str, q: str, k: str, m: str) -> None:
    if matches(p, k) and matches(q, m):
        assert matches(f"{p}.{q}", f"{k}.{m}")
    assert matches(f"{p}.#", f"{k}.{m}") >= matches(p, k)
    assert matches(f"#.{q}", f"{k}.{m}") >= matches(q, m)


@given(PATTERNS, KEYS)
def test_hashes_side_by_side_are_one(pattern: str, key: str) -> None:
    assert matches(pattern.replace("#", "#.#"), key) == matches(pattern, key)
    assert matches(f"*.#.{pattern}", key) == matches(f"#.*.{pattern}", key)


@pytest.mark.parametrize("pattern", ["#." * 99 + "z", "#.a." * 49 + "z", "*.#." * 49 + "z", "#"])
@pytest.mark.parametrize("words", [127, 5_000])
def test_no_pattern_is_too_hard_and_no_key_too_long(pattern: str, words: int) -> None:
    assert matches(check_pattern(pattern), "a." * (words - 1) + "z")
    assert matches(pattern, "a." * (words - 1) + "b") == (pattern == "#")


def test_the_rules_are_rabbitmqs_own(rabbitmq_server: Server) -> None:
    import pika

    rng = random.Random(11)
    words = ["a", "b", "model", "é"]
    patterns = {".".join(rng.choice([*words[:3], "*", "#"]) for _ in range(rng.randint(1, 6))) for _ in range(150)}
    keys = {".".join(rng.choice(words) for _ in range(rng.randint(1, 6))) for _ in range(150)}
    keys |= {"a..b", ".a", "a.", ".", "*", "#", "a.*", "A"}
    got: dict[str, set[str]] = {p: set() for p in sorted(patterns)}
    done = []
    with pika.BlockingConnection(pika.URLParameters(rabbitmq_server.url)) as connection:
        channel = connection.channel()
        channel.exchange_declare("routing", "topic", auto_delete=True)

        def take(pattern: str, body: bytes) -> None:
            if body == b"\x00":
                done.append(pattern)
            else:
                got[pattern].add(body.decode())

        queues = []
        for pattern in got:
            queue = channel.queue_declare("", exclusive=True).method.queue
            channel.queue_bind(queue, "routing", pattern)
            channel.basic_consume(queue, lambda _c, _m, _p, body, pattern=pattern: take(pattern, body), auto_ack=True)
            queues.append(queue)
        for key in sorted(keys):
            channel.basic_publish("routing", key, key.encode())
        for queue in queues:  # after all that the exchange has sent there
            channel.basic_publish("", queue, b"\x00")
        while len(done) < len(got):
            before = len(done) + sum(map(len, got.values()))
            connection.process_data_events(time_limit=20)
            assert len(done) + sum(map(len, got.values())) > before, "RabbitMQ delivers no more"
    wrong = [(p, k, k in got[p]) for p, k in product(got, sorted(keys)) if matches(p, k) != (k in got[p])]
    assert not wrong, f"{len(wrong)} of {len(got) * len(keys)} pairs differ, (pattern, key, RabbitMQ delivers): {wrong[:5]}"
    assert sum(map(len, got.values())) > 500, "too few matches to prove anything"


# ---- names and patterns

ANYTHING: st.SearchStrategy[Any] = st.text() | st.binary() | st.none() | st.integers() | st.lists(st.text())
NEARLY = st.text(alphabet="aZ09._-é٣ﬀ", max_size=105) | st.text(alphabet="aZ09._-*#/ \n\\é٣ﬀ:", max_size=210)


def is_refused(check: Any, value: Any) -> bool:
    try:
        assert check(value) is value
    except BusError as e:
        return len(str(e)) < 300 and repr(value)[:20] in str(e)  # the value seen, and not at full length
    return False


@given(ANYTHING | NEARLY)
def test_a_name_is_safe_as_a_queue_a_file_and_a_word_of_a_shell(name: Any) -> None:
    if not is_refused(check_name, name):
        assert 1 <= len(name.encode()) <= 100, "AMQP counts bytes, and takes 255 of them"
        assert name.isascii()
        assert PurePath(name).name == name
        assert not set(name) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")
        assert name[0] not in "-.", "no option, no hidden file"


@given(ANYTHING | NEARLY | PATTERNS)
def test_a_pattern_is_words_with_dots_between(pattern: Any) -> None:
    if not is_refused(check_pattern, pattern):
        assert len(pattern.encode()) <= 200
        assert all(w and (w in "*#" or w.replace("-", "_").isidentifier() or w[0] in "0123456789-") for w in pattern.split("."))
        assert not set(pattern) & set(" \n/\\:")


@given(PATTERNS)
def test_a_right_pattern_is_taken(pattern: str) -> None:
    assert check_pattern(pattern) is pattern


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", fullmatch=True))
def test_a_right_name_is_taken(name: str) -> None:
    assert check_name(name) is name


# ---- what is told of failures


def test_a_publish_error_names_each_reason_once() -> None:
    events = [an_event(n) for n in range(4)]
    error = PublishError([(e, BusError("no room")) for e in events], 9)
    assert [e for e, _ in error.failed] == events
    assert str(error) == "4 of 9 events were not published. BusError: no room"


def test_a_dead_letter_may_hold_any_bytes() -> None:
    from datetime import UTC, datetime

    event = an_event(3)
    facts = ("q", event.event_id, "data.ingested")
    why = ("ValueError", "no", "", 1, datetime.now(UTC))
    assert DeadLetter(*facts, event.to_json(), *why).event == event
    with pytest.raises(EventError):
        _ = DeadLetter(*facts, b"\xff", *why).event


# ---- the ledger


def ledger_of(url: str, **options: Any) -> Path:
    with connect(url, **options) as bus:
        assert not re.search(r"guest|@|\?", bus.transport.broker), "no user, password or option"
        return bus.ledger.path


def test_a_brokers_ledger_is_named_by_its_address_however_it_is_written(redis_server: Server, rabbitmq_server: Server) -> None:
    redis = redis_server.url.removesuffix("/0")
    first = ledger_of(redis, namespace="one")
    for same in (f"{redis}/0", f"{redis}?socket_timeout=3", redis.replace("127.0.0.1", "localhost")):
        assert ledger_of(same, namespace="one") == first
    rabbit = ledger_of(rabbitmq_server.url, namespace="one")
    assert ledger_of(rabbitmq_server.url.rstrip("/") + "/%2F", namespace="one") == rabbit
    others = {ledger_of(f"{redis}/1", namespace="one"), ledger_of(redis, namespace="two"), rabbit}
    assert len(others | {first}) == 4


def test_what_an_older_ledger_holds_is_published_once_and_its_notes_are_kept(redis_server: Server) -> None:
    space = f"old{uuid.uuid4().hex[:8]}"
    old = Ledger(settings.data_dir / "events" / f"ledger-{space}.db")
    waits, handled, got = an_event(1), an_event(2), []
    with old.transaction() as tx:
        tx.publish(waits)
        tx.execute("create table claim(what text)")  # and what else a bus or its user keeps there
        tx.execute("insert into claim values ('an hour of work')")
    old.record("q", [handled.event_id])
    for number in (0, 1):
        with connect(f"{redis_server.url.removesuffix('/0')}/{number}", namespace=space) as bus:
            bus.subscribe("q", "data.*", lambda e, n=number: got.append((n, e)))
            bus.publish(handled)
            bus.drain()
            with bus.ledger.transaction() as tx:
                assert tx.execute("select what from claim").fetchone() == ("an hour of work",)
    assert got == [(0, waits)], "sent by the first that came; what was handled is not handled again"
    assert old.outbox_size() == 0
    old.close()
