"""The feature store: what was known at a moment is the same in training, in serving and in plain Python."""

import atexit
import contextlib
import functools
import importlib.util
import tempfile
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import not_run, private

from mlops_lib.data import store as s
from mlops_lib.data.store import Feature, FeatureStore, FeatureView, RedisOnline, SQLiteOnline, StoreError

START = datetime(2024, 1, 1)
VIEW = FeatureView(
    "history",
    "user_id",
    (
        Feature("n", "count"),
        Feature("mean_stars", "mean", "stars"),
        Feature("mean_stars_7d", "mean", "stars", days=7),
        Feature("sum_stars_7d", "sum", "stars", days=7),
        Feature("n_30d", "count", days=30),
    ),
    max_age_days=60,
)

hours = st.integers(0, 24 * 120)
stars = st.one_of(st.none(), st.integers(1, 5))
event = st.tuples(st.sampled_from("abc"), hours, stars)
ask = st.tuples(st.sampled_from("abcd"), hours)


def frame(events: list[tuple]) -> pl.DataFrame:
    rows = [(u, START + timedelta(hours=h), None if x is None else float(x)) for u, h, x in events]
    schema = {"user_id": pl.String, "date": pl.Datetime("us"), "stars": pl.Float64}
    return pl.DataFrame(rows, schema=schema, orient="row")


def by_hand(events: list[tuple], view: FeatureView, user: str, hour: int) -> list[float | None]:
    "The same features, from the events themselves: slow and obvious."
    past = [(h, x) for u, h, x in events if u == user and h < hour]
    if not past or (view.max_age_days and hour - max(h for h, _ in past) > view.max_age_days * 24):
        return [None] * len(view.features)
    found: list[float | None] = []
    for f in view.features:
        window = [(h, x) for h, x in past if f.days is None or h >= hour - f.days * 24]
        values = [float(x) for _, x in window if x is not None]
        if f.kind == "count":
            found.append(float(len(window)))
        else:
            total = float(sum(values))
            found.append(total if f.kind == "sum" else total / len(values) if values else None)
    return found


def same(left: list, right: list) -> bool:
    return all(a == b or (a is not None and b is not None and abs(a - b) < 1e-9) for a, b in zip(left, right, strict=True))


@given(st.lists(event, max_size=25), st.lists(ask, min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_join_is_what_the_past_says(events: list[tuple], asked: list[tuple]) -> None:
    rows = pl.DataFrame(
        [(u, START + timedelta(hours=h)) for u, h in asked],
        schema={"user_id": pl.String, "date": pl.Datetime("us")},
        orient="row",
    )
    known = s.point_in_time(rows, s.history(frame(events), VIEW), VIEW).rows()
    for (user, hour), row in zip(asked, known, strict=True):
        assert same(list(row), by_hand(events, VIEW, user, hour)), (user, hour)


@pytest.fixture(params=["sqlite", "redis"])
def online(request: pytest.FixtureRequest, tmp_path: Path):
    if request.param == "sqlite":
        yield SQLiteOnline(tmp_path / "online.db")
        return
    redis = redis_or_skip()
    yield redis
    forget(redis)


def forget(redis: RedisOnline) -> None:
    for key in redis.db.scan_iter("features:*"):
        redis.db.delete(key)


def redis_or_skip() -> RedisOnline:
    if importlib.util.find_spec("redis") is None:
        not_run("Redis not tested: the package `redis` is not installed")
    return RedisOnline(redis_url())


@functools.cache
def redis_url() -> str:
    "A server for all tests here."
    ending = contextlib.ExitStack()
    atexit.register(ending.close)
    folder = ending.enter_context(tempfile.TemporaryDirectory())
    return ending.enter_context(private("redis", Path(folder))).url


@given(st.lists(event, max_size=25), hours)
@settings(max_examples=25, deadline=None)
def test_online_is_offline_sqlite(events: list[tuple], hour: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check_online_is_offline(FeatureStore(folder, SQLiteOnline(Path(folder) / "o.db")), events, hour)


@given(st.lists(event, max_size=25), hours)
@settings(max_examples=10, deadline=None)
def test_online_is_offline_redis(events: list[tuple], hour: int) -> None:
    online = redis_or_skip()
    with tempfile.TemporaryDirectory() as folder:
        try:
            check_online_is_offline(FeatureStore(folder, online), events, hour)
        finally:
            forget(online)


def check_online_is_offline(store: FeatureStore, events: list[tuple], hour: int) -> None:
    "materialize(at) then get_online(at) equals the offline join at that moment, bit for bit, known entity or not."
    now = START + timedelta(hours=hour)
    key = store.build(VIEW, frame(events))
    store.materialize([key], at=now)
    users = pl.DataFrame({"user_id": ["a", "b", "c", "stranger", None]})
    offline = store.get_offline(users.with_columns(date=pl.lit(now)), [key]).drop("date")
    assert store.get_online(users, [key], at=now).equals(offline)


def test_values_online_are_replaced_whole(online: s.Online) -> None:
    online.write("v@1", "2024-01-01T00:00:00", {"a": "1", "b": "2"})
    online.write("v@1", "2024-01-02T00:00:00", {"b": "3"})
    assert online.read("v@1", ["b", "a", "b"]) == ["3", None, "3"]
    assert online.written("v@1") == "2024-01-02T00:00:00"
    assert online.written("never@1") is None
    online.write("v@1", "2024-01-03T00:00:00", {})
    assert online.read("v@1", ["b"]) == [None]
    assert online.read("v@1", []) == []


def test_readers_see_one_generation(tmp_path: Path) -> None:
    online = SQLiteOnline(tmp_path / "online.db")
    entities = [f"e{i}" for i in range(200)]
    online.write("v@1", "x", dict.fromkeys(entities, "0"))
    done = threading.Event()

    def write() -> None:
        for generation in range(1, 15):
            online.write("v@1", "x", dict.fromkeys(entities, str(generation)))
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    generations = []
    while not done.is_set():
        found = set(online.read("v@1", entities))
        assert len(found) == 1, f"a reader saw two generations at once: {found}"
        generations.append(int(found.pop() or -1))
    writer.join()
    assert generations == sorted(generations)


def test_an_event_does_not_see_itself() -> None:
    events = frame([("a", 5, 1), ("a", 5, 5), ("a", 9, 3)])
    known = s.point_in_time(events, s.history(events, VIEW), VIEW)
    assert known["mean_stars"].to_list() == [None, None, 3.0], "two events at one moment see neither each other nor themselves"


def test_pandas_and_polars_rows_keep_their_kind_and_order(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    events = frame([("a", 1, 5), ("b", 2, 1), ("a", 30, 3)])
    store.build(VIEW, events.to_pandas())
    rows = pd.DataFrame({"user_id": ["b", "a"], "date": [START + timedelta(days=3)] * 2, "text": ["x", "y"]}, index=[7, 3])
    joined = store.get_offline(rows, ["history"])
    assert list(joined.index) == [7, 3]
    assert joined["text"].tolist() == ["x", "y"]
    assert joined["mean_stars"].tolist() == [1.0, 4.0]
    again = store.get_offline(pl.from_pandas(rows), ["history"])
    assert isinstance(again, pl.DataFrame)
    assert again["mean_stars"].to_list() == [1.0, 4.0]


def test_number_ids_and_time_zones(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    at = pd.Timestamp("2024-01-01 12:00", tz="Europe/Zurich")  # 11:00 UTC
    view = replace(VIEW, entity="customer")
    store.build(view, pd.DataFrame({"customer": [1, 2], "date": [at, at], "stars": [5, 1]}))
    rows = pd.DataFrame({"customer": [1, 1], "date": pd.to_datetime(["2024-01-01 11:00", "2024-01-01 11:01"])})
    assert store.get_offline(rows, ["history"])["n"].fillna(0).tolist() == [0.0, 1.0]
    store.materialize(["history"], at=datetime(2024, 1, 1, 11, 1, tzinfo=UTC))
    assert store.get_online(rows[["customer"]], ["history"], at="2024-01-02")["n"].tolist() == [1.0, 1.0]


def test_versions_live_side_by_side(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    events = frame([("a", 1, 5), ("a", 24 * 10, 1)])
    old = store.build(VIEW, events)
    store.materialize([old], at=START + timedelta(days=11))
    changed = replace(VIEW, features=(*VIEW.features[:2], Feature("mean_stars_7d", "mean", "stars", days=20)))
    new = store.build(changed, events)
    assert old != new
    assert store.versions("history") == [new, old]
    assert store.view("history") == changed
    assert store.view(old) == VIEW
    rows = pl.DataFrame({"user_id": ["a"]})
    at = START + timedelta(days=11)
    assert store.get_online(rows, [old], at=at)["mean_stars_7d"].to_list() == [1.0]
    with pytest.raises(StoreError, match="not online"):
        store.get_online(rows, ["history"], at=at)
    store.materialize([new], at=at)
    assert store.get_online(rows, ["history"], at=at)["mean_stars_7d"].to_list() == [3.0]
    assert store.get_online(rows, [old], at=at)["mean_stars_7d"].to_list() == [1.0], "the old model keeps its own"


def test_building_again_changes_nothing(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    events = frame([("b", 9, 2), ("a", 1, 5), ("a", 24 * 10, 1)])
    key = store.build(VIEW, events)
    first = (tmp_path / "views" / "history" / f"{VIEW.version}.parquet").read_bytes()
    assert store.build(VIEW, events.reverse()) == key
    assert (tmp_path / "views" / "history" / f"{VIEW.version}.parquet").read_bytes() == first, "order of events must not matter"


def test_freshness(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    key = store.build(VIEW, frame([("a", 0, 5), ("b", 24 * 50, 1)]))
    at = START + timedelta(days=70)
    row = s.freshness(store, at=at).iloc[0]
    assert (row["view"], row["entities"], row["stale"], row["state"]) == (key, 2, 1, "not online")
    assert row["age"] == timedelta(days=20)
    store.materialize([key], at=at)
    assert s.freshness(store, at=at).iloc[0]["state"] == "ok"
    late = s.freshness(store, at=at + timedelta(days=90)).iloc[0]
    assert late["state"] == "stale"
    assert late["online lag"] == timedelta(days=90)
    assert s.freshness(FeatureStore(tmp_path / "empty")).empty


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Feature("x", "median"), "not count, mean or sum"),
        (lambda: Feature("x", "mean"), "needs a column"),
        (lambda: Feature("x", "count", "stars"), "takes no column"),
        (lambda: Feature("x", "count", days=0), "1 or more"),
        (lambda: FeatureView("a/b", "user_id", (Feature("x", "count"),)), "letters, digits"),
        (lambda: FeatureView("a", "user_id", ()), "needs features"),
        (lambda: FeatureView("a", "user_id", (Feature("x", "count"),) * 2), "different names"),
    ],
)
def test_wrong_definitions(make, says: str) -> None:
    with pytest.raises(StoreError, match=says):
        make()


def test_wrong_calls(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    events = frame([("a", 1, 5)])
    with pytest.raises(StoreError, match="has: none"):
        store.view("history")
    with pytest.raises(StoreError, match="no column 'stars'"):
        store.build(VIEW, events.drop("stars"))
    with pytest.raises(StoreError, match="must hold dates"):
        store.build(VIEW, events.cast({"date": pl.String}))
    store.build(VIEW, events)
    with pytest.raises(StoreError, match=r"history@deadbeef.*it has: history@"):
        store.view("history@deadbeef")
    rows = pl.DataFrame({"user_id": ["a", "a"], "date": [None, START]}, schema_overrides={"date": pl.Datetime("us")})
    with pytest.raises(StoreError, match="1 of 2 rows have no 'date'"):
        store.get_offline(rows, ["history"])
    with pytest.raises(StoreError, match="already have a column 'n'"):
        store.get_offline(events.with_columns(n=pl.lit(1)), ["history"])
    store.materialize(["history"])
    with pytest.raises(StoreError, match="no column 'user_id'"):
        store.get_online(events.drop("user_id"), ["history"])


def test_redis_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "redis", None)
    with pytest.raises(StoreError, match="pip install redis"):
        RedisOnline("redis://127.0.0.1:6379/0")


def test_nothing_half_written(tmp_path: Path) -> None:
    target = tmp_path / "f.txt"
    target.write_text("old")

    def interrupted() -> None:
        with s.atomic(target) as part:
            part.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [p.name for p in tmp_path.iterdir()] == ["f.txt"]
    assert target.read_text() == "old"
