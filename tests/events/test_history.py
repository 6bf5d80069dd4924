"""A history keeps each event once, finds it by three questions, forgets it wholly, and tells it again; over both stores."""

import re
import socket
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import private

from mlops_lib.events.bus import connect
from mlops_lib.events.history import _LATEST, _NEXT_TYPE, History, HistoryError, SqliteStore, Story
from mlops_lib.events.schema import DataIngested, Event, Payload, TrainingFailed, TrainingRequested
from mlops_lib.events.transport import BusError
from mlops_lib.servers import Server

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
ASKED = {"dataset_id": "d", "dataset_path": "p", "framework": "sklearn"}
BROKEN = {"experiment_id": "e", "run_id": "r", "error": "boom", "error_type": "MemoryError"}


def at(seconds: float = 0, kind: type[Event] = DataIngested, **more: Any) -> Event:
    payloads: dict[Any, dict] = {TrainingRequested: ASKED, TrainingFailed: BROKEN}
    payload = payloads.get(kind, {"dataset_id": "d", "dataset_path": "p", "num_samples": 1})
    return kind(**{"source_service": "test", "timestamp": NOON + timedelta(seconds=seconds), "payload": payload} | more)


@pytest.fixture(params=["sqlite", "redis"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/a folder/history.db"
    import redis

    url = re.sub(r"/\d*$", "/7", request.getfixturevalue("redis_server").url)  # a database of its own
    with redis.Redis.from_url(url) as db:
        db.flushdb()
    return url


@pytest.fixture
def history(address: str) -> Iterator[History]:
    one = History(address, retention=timedelta(days=30))
    yield one
    one.close()


def everything(history: History) -> list[Event]:
    return history.latest(limit=1_000_000)


# ---- kept, once


def test_what_is_kept_comes_back(history: History) -> None:
    events = [at(0), at(1, TrainingFailed, region="eu"), at(2, TrainingRequested)]
    assert (len(history), history.latest(), history.story("none")) == (0, [], [])
    assert history.add() == 0
    assert history.add(*events) == 3
    assert len(history) == 3
    for event in events:
        assert history.get(event.event_id) == event
        assert history.story(event.correlation_id) == [event]
    with pytest.raises(KeyError, match="'17'"):
        history.get("17")


def test_twice_is_once(history: History, address: str) -> None:
    event = at()
    assert history.add(event, event) == 1
    other = History(address)  # another process, or this one after a restart
    assert other.add(event, at(5)) == 1
    assert len(history) == len(other) == 2
    other.close()


def test_what_is_known_is_left_as_it_is(history: History) -> None:
    "An event never changes, so another one under its id is a forgery: it gets into no index."
    event = at(0, correlation_id="mine")
    forged = at(50, TrainingFailed, event_id=event.event_id, correlation_id="theirs")
    history.add(event)
    assert history.add(forged) == 0
    assert history.get(event.event_id) == event
    assert history.story("theirs") == []
    assert history.latest("training.*") == []
    assert everything(history) == [event]
    assert history.store.types() == ["data.ingested"]


def test_several_at_once(history: History, address: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    events = [at(i) for i in range(115)]
    stores = [history, History(address)]
    with ThreadPoolExecutor(6) as pool:
        new = list(pool.map(lambda i: stores[i % 2].add(*events[i % 100 : i % 100 + 20]), range(0, 300, 5)))
    assert sum(new) == len(history) == 115
    stores[1].close()


# ---- the three questions


def test_a_story_in_its_order(history: History) -> None:
    first = at(10, correlation_id="s")
    rest = [at(10 + i, correlation_id="s") for i in (3, 1, 2)]
    history.add(*rest, at(11, correlation_id="other"), first)
    assert [e.timestamp.second for e in history.story("s")] == [10, 11, 12, 13]


def test_no_event_before_its_cause() -> None:
    cause = at(10, correlation_id="s")
    early = cause.reply(TrainingRequested, ASKED).model_copy(update={"timestamp": NOON})  # a clock that is 10 s late
    same = early.reply(TrainingFailed, BROKEN).model_copy(update={"timestamp": NOON})
    later = at(11, correlation_id="s", causation_id=str(uuid.uuid4()))  # a cause from another story
    for order in ([same, early, later, cause], [cause, early, same, later], [later, cause, same, early]):
        assert list(Story(order)) == [cause, early, same, later]
    assert "-10" in Story([cause, early]).to_html()
    assert Story([cause, early]).to_text().splitlines()[1].startswith("   -10.000 s    training.requested")


def test_a_circle_of_causes_ends() -> None:
    ids = [str(uuid.uuid4()) for _ in range(4)]
    circle = [at(i, event_id=ids[i], causation_id=ids[(i + 1) % 3]) for i in range(3)]
    alone = at(9, event_id=ids[3], causation_id=ids[3])
    story = Story([*circle, alone])
    assert sorted(e.event_id for e in story) == sorted(ids)
    assert story.to_html().count("<circle") == 4
    assert story.to_text().count("\n") == 3


def test_the_last_ones_of_a_type(history: History) -> None:
    events = [at(i, kind) for i, kind in enumerate([DataIngested, TrainingFailed, TrainingRequested] * 4)]
    history.add(*reversed(events))
    newest = events[::-1]
    assert history.latest(limit=100) == newest
    assert history.latest("training.*", limit=5) == [e for e in newest if e.event_type.startswith("training")][:5]
    assert history.latest("*.failed") == [e for e in newest if e.event_type == "training.failed"]
    assert history.latest("model.#") == []
    assert len(history.latest(limit=1)) == 1
    assert history.latest(before=NOON + timedelta(seconds=2)) == [events[1], events[0]]
    assert history.latest(before=(NOON + timedelta(seconds=2)).astimezone(timezone(timedelta(hours=5)))) == [events[1], events[0]]
    with pytest.raises(BusError, match="pattern"):
        history.latest("training..")
    with pytest.raises(ValueError, match="not 0"):
        history.latest(limit=0)
    with pytest.raises(ValueError, match="time zone"):
        history.latest(before=datetime(2026, 3, 1))


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from([DataIngested, TrainingFailed, TrainingRequested])), max_size=25),
    st.integers(1, 6),
    st.sampled_from(["#", "training.*"]),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pages_have_no_gaps(history: History, made: list, size: int, pattern: str) -> None:
    "Even where many events share a microsecond: each one is on exactly one page."
    history.store.prune("a")
    events = [at(moment / 1_000_000, kind) for moment, kind in made]
    history.add(*events)
    seen: list[Event] = []
    while page := history.latest(pattern, size, before=seen[-1] if seen else None):
        assert len(page) <= size
        assert len(seen) < len(events), "a page came twice"
        seen += page
    wanted = [e for e in events if pattern == "#" or e.event_type.startswith("training")]
    assert seen == sorted(wanted, key=lambda e: (e.timestamp, e.event_id), reverse=True)


def test_no_question_reads_the_whole_table(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "h.db")
    store.add([at(i) for i in range(50)])
    questions = {_LATEST: ("x", "a", 3), _NEXT_TYPE: ("x",), "select body from event where correlation_id = ? order by place": ("x",),
                 "select body from event where event_id = ?": ("x",), "delete from event where place < ?": ("x",)}  # fmt: skip
    for sql, parameters in questions.items():
        plan = " ".join(row[-1] for row in store._all(f"explain query plan {sql}", *parameters))
        assert "SEARCH event" in plan, sql
        assert not re.search("SCAN|TEMP B-TREE", plan), f"{sql}: {plan}"
    store.close()


# ---- forgotten


def test_dropped_from_every_index(history: History, address: str) -> None:
    old = [at(-31 * 86_400 + i, TrainingFailed, correlation_id="both") for i in range(3)]
    new = [at(-29 * 86_400, correlation_id="both"), at(0, TrainingRequested)]
    history.add(*old, *new)
    assert history.prune(now=NOON) == 3
    assert history.prune(now=NOON) == 0
    assert len(history) == 2
    assert everything(history) == new[::-1]
    assert history.story("both") == new[:1]
    assert history.latest("training.failed") == []
    assert history.store.types() == ["data.ingested", "training.requested"]
    for event in old:
        with pytest.raises(KeyError):
            history.get(event.event_id)
    assert history.add(*old) == 3, "what was dropped can be kept again"
    history.retention = timedelta(0)
    assert history.prune(now=NOON + timedelta(days=1)) == 5
    assert (len(history), history.store.types()) == (0, [])
    if address.startswith("redis"):
        assert history.store._db.keys("*") == [], "nothing is left behind"


def test_the_edge_of_the_retention(history: History) -> None:
    history.retention = timedelta(seconds=10)
    events = [at(-10.000001), at(-10), at(0)]
    history.add(*events)
    assert history.prune(now=NOON) == 1
    assert everything(history) == [events[2], events[1]]
    with pytest.raises(ValueError, match="time zone"):
        history.prune(now=datetime(2026, 3, 1))
    history.retention = None
    assert history.prune(now=NOON + timedelta(days=9_999)) == 0


def test_a_thousand_are_dropped(history: History) -> None:
    history.add(*(at(i / 100, correlation_id=f"s{i % 7}") for i in range(1_234)))
    assert history.prune(now=NOON + timedelta(days=31)) == 1_234
    assert len(history) == 0


def test_prune_uses_the_clock(history: History) -> None:
    history.add(at(0, timestamp=datetime.now(UTC) - timedelta(days=31)), at(0, timestamp=datetime.now(UTC) - timedelta(days=29)))
    assert history.prune() == 1


# ---- kept by following, told again


@pytest.fixture
def told(history: History) -> list[Event]:
    "A story of three in the history."
    first = at(0, correlation_id="s")
    second = first.reply(TrainingRequested, ASKED, "validation")
    third = second.reply(TrainingFailed, BROKEN, "trainer")
    history.add(third, first, second)
    return [first, second, third]


def test_everything_on_a_bus_is_recorded(history: History) -> None:
    with connect(f"memory://{uuid.uuid4().hex}") as bus:
        history.follow(bus)
        bus.subscribe("work", "data.*", lambda e: bus.publish(e.reply(TrainingRequested, ASKED)))
        sent = [bus.publish(at(i)) for i in range(30)]
        bus.drain()
        assert len(history) == 60
        for event in sent:
            assert [e.event_type for e in history.story(event.correlation_id)] == ["data.ingested", "training.requested"]
        assert bus.dead_letters("history") == []


def test_what_happened_while_nobody_followed(history: History) -> None:
    with connect(f"memory://{uuid.uuid4().hex}") as bus:
        history.follow(bus).close()
        sent = bus.publish(at())
        assert len(history) == 0
        history.follow(bus)
        bus.drain()
        assert everything(history) == [sent]


def test_the_same_again_reaches_only_those_who_have_not_handled_it(history: History, told: list[Event]) -> None:
    old: list[Event] = []
    new: list[Event] = []
    with connect(f"memory://{uuid.uuid4().hex}") as bus:
        history.follow(bus)
        bus.subscribe("old", "#", old.append)
        bus.publish_many(told)
        bus.drain()
        bus.subscribe("new", "training.*", new.append)
        assert history.replay(bus, "s") == 3
        bus.drain()
        assert old == told
        assert new == told[1:], "in the order of the story"
        assert len(history) == 3
        with pytest.raises(KeyError, match="'nothing'"):
            history.replay(bus, "nothing")


def test_as_new_it_happens_again(history: History, told: list[Event]) -> None:
    heard: list[Event] = []
    with connect(f"memory://{uuid.uuid4().hex}") as bus:
        bus.subscribe("q", "#", heard.append)
        bus.publish_many(told)
        assert [history.replay(bus, "s", as_new=True) for _ in range(2)] == [3, 3]
        bus.drain()
    assert heard[:3] == told
    one, two = heard[3:6], heard[6:]
    assert len({e.event_id for e in heard}) == 9
    for copies in (one, two):
        assert [type(e) for e in copies] == [type(e) for e in told]
        assert [e.causation_id for e in copies] == [None, copies[0].event_id, copies[1].event_id]
        assert [e.replay_of for e in copies] == [e.event_id for e in told]
        assert [e.payload for e in copies] == [e.payload for e in told]
        (name,) = {e.correlation_id for e in copies}
        assert name.startswith("s-replay-")
    assert one[0].correlation_id != two[0].correlation_id
    history.add(*one)
    assert len(history.story("s")) == 3, "the copies are a story of their own"


def test_a_long_name_can_be_replayed(history: History) -> None:
    history.add(at(correlation_id="x" * 200))
    with connect(f"memory://{uuid.uuid4().hex}") as bus:
        history.follow(bus)
        history.replay(bus, "x" * 200, as_new=True)
        bus.drain()
    assert len(history) == 2


# ---- what the history does not understand


def test_a_type_that_this_program_does_not_know(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    "A history is read by programs that do not have every class: it shows the event, and the others with it."
    known = at(0, correlation_id="s")
    with monkeypatch.context() as patch:
        patch.setattr(Event, "types", dict(Event.types))

        class Escalated(Event):
            class Payload(Payload):
                hours: int

            event_type: Literal["complaint.escalated"] = "complaint.escalated"
            payload: Payload

        theirs = Escalated(source_service="x", correlation_id="s", payload={"hours": 3})
        history.add(known, theirs)
    from mlops_lib.events.schema import _parser

    _parser.cache_clear()
    seen = history.story("s")[1]
    assert type(seen) is Event
    assert seen.to_json() == theirs.to_json()
    assert history.get(theirs.event_id).payload.hours == 3
    assert history.latest("complaint.*") == [seen]
    assert history.prune(now=datetime.now(UTC) + timedelta(days=31)) == 2
    assert len(history) == 0


def test_what_is_no_event_is_told(history: History, address: str) -> None:
    event = at()
    history.add(event)
    store: Any = history.store
    if address.startswith("redis"):
        store._db.hset(f"{store._key}:event:{event.event_id}", "body", b"{}")
    else:
        store._all("update event set body = '{}'")
    with pytest.raises(HistoryError, match="no event"):
        history.get(event.event_id)


# ---- drawn


HOSTILE = "</title><script>alert('1')</script><img src=x onerror=\"alert(2)\">&'\""


class Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        assert not any(name.startswith("on") for name, _ in attrs)
        self.seen.add(tag)

    handle_startendtag = handle_starttag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_timeline_trusts_nobody() -> None:
    payload = {"dataset_id": HOSTILE, "dataset_path": HOSTILE, "num_samples": 1, HOSTILE: HOSTILE}
    event = at(source_service=HOSTILE, correlation_id=HOSTILE, payload=payload)
    page = Tags(Story([event, event.reply(TrainingFailed, BROKEN)]).to_html())
    assert page.seen == {"div", "svg", "defs", "marker", "path", "line", "text", "circle", "title"}
    assert HOSTILE in page.text, "and shows what it was given"
    strange = Event(event_type=HOSTILE, source_service="<script>", payload={})
    assert "<script" not in Story([strange]).to_html()


def test_the_timeline() -> None:
    first = at(0)
    second = first.reply(TrainingFailed, BROKEN | {"error": "x" * 100_000}, "trainer")
    html = Story([second, first])._repr_html_()
    assert html.count("<circle") == 2
    assert html.count("marker-end") == 1, "one arrow, from the cause to its effect"
    assert html.count(">trainer<") == 1
    assert len(html) < 10_000, "a long payload is cut"
    assert Story([]).to_html() == "<p>No events.</p>"
    assert Story([second, first]).services == ["test", "trainer"]


def test_a_very_long_chain_as_text() -> None:
    chain = [at(0)]
    for i in range(2_000):
        chain.append(chain[-1].reply(TrainingRequested, ASKED).model_copy(update={"timestamp": NOON + timedelta(seconds=i)}))
    assert max(map(len, Story(chain).to_text().splitlines())) < 100


# ---- addresses and servers


@pytest.mark.parametrize("url", ["mysql://u:secret@h/x", "sqlite:///", "sqlite://x.db", "history.db", "redis", "redis://localhost:port"])
def test_a_wrong_address(url: str) -> None:
    with pytest.raises(HistoryError, match="no address of a history") as caught:
        History(url)
    assert "secret" not in str(caught.value)


def test_no_server_there() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))  # bound, and nobody listens
        with pytest.raises(HistoryError, match=r"127\.0\.0\.1.*mlops stack up redis") as caught:
            History(f"redis://:secret@127.0.0.1:{s.getsockname()[1]}/0")
    assert "secret" not in str(caught.value)


QUESTIONS: list[Callable[[History], Any]] = [
    len, lambda h: h.add(at()), lambda h: h.get("x"), lambda h: h.story("x"), lambda h: h.latest(), lambda h: h.prune(now=NOON)
]  # fmt: skip


def test_the_server_goes_down(tmp_path: Path) -> None:
    with private("redis", tmp_path) as server:
        history = History(server.url, retention=timedelta(days=1))
        kept = at(0)
        history.add(kept)
        history.store._db.save()
        server.kill()
        for ask in QUESTIONS:
            with pytest.raises(HistoryError, match="mlops stack up redis"):
                ask(history)
        server.start()
        assert history.get(kept.event_id) == kept
        history.close()


def test_the_file_is_no_history(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is not a database" * 100)
    (tmp_path / "folder.db").mkdir()
    for name in ("text.db", "folder.db", "text.db/inside.db"):
        with pytest.raises(HistoryError, match=name):
            History(f"sqlite:///{tmp_path}/{name}")


def test_a_file_that_is_damaged_later(tmp_path: Path) -> None:
    history = History(f"sqlite:///{tmp_path}/h.db", retention=timedelta(days=1))
    history.store._all("drop table event")
    for ask in QUESTIONS:
        with pytest.raises(HistoryError, match="event"):
            ask(history)
    history.close()
    with pytest.raises(HistoryError, match="closed"):
        len(history)


def test_without_an_address_it_is_in_the_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, redis_server: Server) -> None:
    from mlops_lib.events import history as module

    monkeypatch.setattr(module, "settings", module.settings.model_copy(update={"data_dir": tmp_path, "redis_url": None}))
    History().close()
    assert (tmp_path / "events" / "history.db").is_file()
    monkeypatch.setattr(module, "settings", module.settings.model_copy(update={"redis_url": redis_server.url}))
    one = History()
    assert type(one.store).__name__ == "RedisStore"
    one.close()
