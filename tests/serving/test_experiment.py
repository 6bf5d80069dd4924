"""An A/B in production: who is counted, what the numbers allow, and that a decision takes effect once, whoever dies on the way."""

import itertools
import json
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from prometheus_client import REGISTRY
from support import private

from mlops_lib.data.synthetic import generate_inbox
from mlops_lib.data.tables import add_label
from mlops_lib.events.bus import Bus, connect
from mlops_lib.events.history import History
from mlops_lib.events.transport import BusError, ConsumerExists
from mlops_lib.registry import gates, tracking
from mlops_lib.serving import experiment as ab
from mlops_lib.serving.experiment import (
    ARMS,
    Analyst,
    Definition,
    ExperimentError,
    ExperimentExposed,
    ExperimentMeasured,
    ExperimentOutcome,
    Load,
    Route,
    State,
    Tally,
    Traffic,
    Verdict,
    conclude,
    curves,
    evidence,
    judge,
    record,
    report,
    running,
    start,
    status,
    stop,
    tally,
)
from mlops_lib.training import train

HALF = {"champion": 0.5, "challenger": 0.5}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A store with one registered model of two versions, to be copied for each test."
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    store = tracking.open_store(f"sqlite:///{path}")
    rows = add_label(generate_inbox(n_reviews=300, seed=5).review.dropna(subset=["stars", "text"]))[["text", "label"]]
    run = tracking.log_run(train("baseline", rows, "label"), rows, store=store)
    for _ in range(2):  # two that say the same: it is the registry that matters here
        tracking.register(run, "inbox", store=store)
    gates.promote(1, name="inbox", force="somebody has to begin", store=store)
    return path


@pytest.fixture
def store(trained: Path, tmp_path: Path) -> MlflowClient:
    return copied(trained, tmp_path)


def copied(trained: Path, folder: Path) -> MlflowClient:
    with closing(sqlite3.connect(trained)) as old, closing(sqlite3.connect(folder / "mlflow.db")) as new:
        old.backup(new)
    return tracking.open_store(f"sqlite:///{folder}/mlflow.db")


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[Bus]:
    with connect(f"sqlite:///{tmp_path}/bus.db", lease=2.0) as one:
        yield one


@pytest.fixture
def analyst(bus: Bus, store: MlflowClient) -> Iterator[Analyst]:
    one = Analyst(every=3_600, store=store).start(bus)
    yield one
    one.stop()


@pytest.fixture
def traffic(bus: Bus, store: MlflowClient) -> Iterator[Traffic]:
    one = Traffic("inbox@champion", store=store, bus=bus, every=3_600).start()
    yield one
    one.close()


def begin(store: MlflowClient, name: str = "polite", **about: Any) -> ab.Status:
    return start(name, "inbox", **{"arms": HALF, "max_users": 4_000, "store": store, **about})


Chances = dict[str, float]


def day(
    traffic: Traffic, bus: Bus, analyst: Analyst, right: Chances, *, users: int = 4_000, group: int = 400,
    seconds: Chances | None = None, fails: Chances | None = None, counted: Callable[[Route], bool] = lambda route: True, seed: int = 1,
) -> int:  # fmt: skip
    "Users come, are answered and say whether that was right, until nobody asks any more."
    rng = random.Random(seed)
    traffic.refresh()
    for n in range(users):
        route = traffic.route(f"u{n}")
        if counted(route):
            traffic.exposed(route)
        traffic.observe(route, (seconds or {}).get(route.arm, 0.01), rng.random() >= (fails or {}).get(route.arm, 0.0))
        traffic.outcome(f"u{n}", rng.random() < right[route.arm])
        if n % group == group - 1:
            traffic.flush()
            bus.drain()
            analyst.look()
            traffic.refresh()
            if not traffic.versions:
                return n + 1
    return users


def said(history: History, kind: str) -> list[Any]:
    return [e.payload for e in history.latest(f"experiment.{kind}")]


def lost(kind: str) -> float:
    return REGISTRY.get_sample_value("experiment_lost_total", {"kind": kind}) or 0.0


# ---- the definition


def test_the_registry_has_it_for_everybody_to_see(store: MlflowClient) -> None:
    begun = begin(store, metric={"name": "right", "window_hours": 24}, guardrails={"slow_ms": 50}, alpha=0.01)
    assert begun.phase == "running" and begun.weights == HALF and begun.definition.versions == (1, 2)
    elsewhere = tracking.open_store(store.tracking_uri)
    found = running("inbox", store=elsewhere)
    assert found is not None and found.definition == begun.definition
    told = json.loads(status("polite", store=elsewhere).model_dump_json())
    assert told["definition"]["schema_version"] == 1 and told["definition"]["metric"]["window_hours"] == 24
    assert "polite (ab) of inbox: version 1 against 2, running" in str(begun) and "<pre>" in begun._repr_html_()


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"name": "Not Nice"}, "name"),
        ({"arms": {"champion": 1.0}}, "two arms"),
        ({"arms": {"champion": 0.7, "challenger": 0.7}}, "add up to 1"),
        ({"arms": {"challenger": 0.5, "champion": 0.5}}, "The first arm is version 2, but the champion"),
        ({"arms": {"champion": 0.5, "1": 0.5}}, "both arms are version 1"),
        ({"arms": {"champion": 0.5, "77": 0.5}}, "no version '77'"),
        ({"arms": {"champion": 1.0, "challenger": 0.0}}, "weight 0"),
        ({"mode": "abc"}, "mode"),
        ({"mode": "canary", "steps": (0.5, 0.1)}, "rising"),
        ({"mode": "canary", "steps": (0.5, 1.0)}, "steps"),
        ({"guardrails": {"speed": 1}}, "guardrails.speed"),
        ({"metric": {"kind": "median"}}, "metric.kind"),
        ({"min_users": 3_000}, "max_users"),
        ({"max_days": 0}, "max_days"),
        ({"colour": "red"}, "colour"),
        ({"model": "nobody"}, "no version"),
    ],
)
def test_what_would_go_wrong_later_is_refused_now(store: MlflowClient, about: dict[str, Any], words: str) -> None:
    given = {"name": "polite", "model": "inbox", "arms": HALF, "max_users": 4_000, **about}
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        start(**given, store=store)
    assert running("inbox", store=store) is None


def test_one_at_a_time_and_no_name_twice(store: MlflowClient) -> None:
    outcomes: list[Any] = []

    def race(name: str) -> None:
        try:
            outcomes.append(begin(store, name))
        except ExperimentError as e:
            outcomes.append(e)

    threads = [threading.Thread(target=race, args=(f"e{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(not isinstance(o, ExperimentError) for o in outcomes) == 1
    first = running("inbox", store=store)
    assert first is not None
    stop(first.definition.name, store=store)
    with pytest.raises(ExperimentError, match="choose another name"):
        begin(store, first.definition.name)
    with pytest.raises(ExperimentError, match="ended already"):
        stop(first.definition.name, store=store)
    with pytest.raises(ExperimentError, match=f"no experiment 'e9'; there is: {first.definition.name}"):
        status("e9", store=store)
    with pytest.raises(ExperimentError, match="no name"):
        status("x' or '1' = '1", store=store)
    begin(store, "next")
    with pytest.raises(ExperimentError, match="not in 'perhaps'"):
        stop("next", "perhaps", store=store)  # type: ignore[arg-type]


@pytest.mark.parametrize("tag", ["{}", "nonsense", '{"definition": {"schema_version": 2}}'])
def test_a_tag_that_cannot_be_read_leaves_the_champion(store: MlflowClient, bus: Bus, analyst: Analyst, tag: str) -> None:
    begin(store)
    store.set_registered_model_tag("inbox", ab.TAG, tag)
    with Traffic("inbox", store=store, bus=bus, every=3_600) as traffic:
        assert traffic.route("ann") == Route() and "Update mlops_lib" in (traffic.problem or "")
    analyst.look()  # an experiment that it cannot read is not ended by it
    assert store.get_registered_model("inbox").tags[ab.TAG] == tag
    assert store.search_runs([tracking.experiment_id(store, ab.RUNS)])[0].info.status == "RUNNING"


# ---- traffic


def test_routes_are_sticky_and_need_a_user(store: MlflowClient, traffic: Traffic, bus: Bus) -> None:
    assert traffic.route("ann") == Route() and traffic.versions == set()
    begin(store)
    assert traffic.refresh() and not traffic.refresh()
    with Traffic("inbox", store=store, bus=bus, every=3_600) as other:
        arms = [(traffic.route(f"u{n}"), other.route(f"u{n}")) for n in range(300)]
    assert all(one == two for one, two in arms) and {one.arm for one, _ in arms} == set(ARMS)
    assert all(one.version == (1, 2)[one.arm == "challenger"] for one, _ in arms)
    for nobody in (None, "", "a\nb", "x" * 201, "\ud800", 7):
        assert traffic.route(nobody) == Route()  # type: ignore[arg-type]
    outside = REGISTRY.get_sample_value("experiment_requests_total", {"experiment": "polite", "arm": "outside"})
    assert outside == 6


def test_a_shadow_answers_nobody(store: MlflowClient, traffic: Traffic, bus: Bus, analyst: Analyst, history: History) -> None:
    begin(store, arms={"champion": 1.0, "challenger": 0.0}, mode="shadow", max_users=200)
    traffic.refresh()
    for n in range(200):
        route = traffic.route(f"u{n}")
        assert (route.arm, route.version, route.shadow) == ("champion", 1, (2,))
        traffic.exposed(route)
        traffic.observe(route, 0.01)
        traffic.shadowed(route, 0.02, True, agreed=n % 4 != 0)
    traffic.flush()
    bus.drain()
    analyst.look()
    done = status("polite", store=store)
    assert done.verdict is not None and done.verdict.decision == "keep" and "75.0% of 200 answers agree" in done.verdict.reason
    assert gates.find("champion", "inbox", store=store).version == 1


def test_a_version_is_loaded_before_anybody_is_sent_to_it(store: MlflowClient, bus: Bus) -> None:
    begin(store)
    loaded: list[int] = []

    def load(version: int) -> None:
        if version == 2 and not loaded.count(2) and len(loaded) < 2:
            loaded.append(-2)
            raise OSError("no room for it")
        loaded.append(version)

    with Traffic("inbox", store=store, bus=bus, every=3_600, prepare=load) as traffic:
        assert traffic.route("ann") == Route() and "no room for it" in (traffic.problem or "")
        assert traffic.refresh() and traffic.problem is None
        assert traffic.versions == {1, 2} and loaded[-2:] == [1, 2]


def test_the_registry_may_be_away(store: MlflowClient, traffic: Traffic, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(store)
    traffic.refresh()
    before = [traffic.route(f"u{n}") for n in range(50)]

    def away(*_: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(MlflowClient, "get_registered_model", away)
    traffic._work()
    assert [traffic.route(f"u{n}") for n in range(50)] == before


class Moody:
    "A bus that is away until it is said to be back."

    def __init__(self, bus: Bus):
        self.bus, self.away = bus, True

    def publish_many(self, events: Any) -> int:
        if self.away:
            raise BusError("away")
        return self.bus.publish_many(events)


def test_nothing_is_lost_silently(store: MlflowClient, bus: Bus, history: History, analyst: Analyst, caplog: pytest.LogCaptureFixture) -> None:
    begin(store)
    moody, before = Moody(bus), lost("exposure")
    traffic = Traffic("inbox", store=store, every=3_600, buffer=100)
    traffic.bus = traffic._given = moody  # type: ignore[assignment]
    traffic.refresh()
    for n in range(150):
        traffic.exposed(traffic.route(f"u{n}"))
    for _ in range(3):
        with pytest.raises(BusError):
            traffic.flush()
    assert lost("exposure") - before == 50 and "facts of an experiment were lost" in caplog.text
    moody.away = False
    for n in range(150):  # they come again: those who were not noted are noted now
        traffic.exposed(traffic.route(f"u{n}"))
    traffic.close()
    bus.drain()
    analyst.look()
    assert status("polite", store=store).numbers["users_champion"] + status("polite", store=store).numbers["users_challenger"] == 150
    assert len({e.event_id for e in history.latest("experiment.exposed")}) == len(history.latest("experiment.exposed")) == 2


def test_what_cannot_be_sent_at_the_end_is_counted(store: MlflowClient) -> None:
    begin(store)
    traffic = Traffic("inbox", store=store, every=3_600)
    traffic.bus = traffic._given = Moody(None)  # type: ignore[arg-type, assignment]
    traffic.refresh()
    before = {kind: lost(kind) for kind in ("exposure", "outcome", "measure")}
    for n in range(30):
        route = traffic.route(f"u{n}")
        traffic.exposed(route)
        traffic.observe(route, 0.1)
        traffic.outcome(f"u{n}", True)
    traffic.close(patience=0)
    assert {kind: lost(kind) - was for kind, was in before.items()} == {"exposure": 30, "outcome": 30, "measure": 1}


def test_users_are_noted_once_and_in_bounded_memory(store: MlflowClient, bus: Bus, history: History) -> None:
    begin(store)
    with Traffic("inbox", store=store, bus=bus, every=3_600, seen=100) as traffic:
        for _ in range(3):
            for n in range(90):
                traffic.exposed(traffic.route(f"u{n}"))
        for n in range(1_000):
            traffic.exposed(traffic.route(f"v{n}"))
        assert len(traffic._buffer.seen) == 100
        traffic.flush()
    bus.drain()
    assert sum(len(p.exposures) for p in said(history, "exposed")) == 1_090


@pytest.mark.parametrize(("user", "value"), [("", 1), ("a\0", 1), (None, 1), ("ann", "1"), ("ann", float("nan")), ("ann", 0.5), ("ann", 10**400)], ids=lambda x: f"{x!r:.20}")
def test_an_outcome_that_is_none(store: MlflowClient, traffic: Traffic, user: Any, value: Any) -> None:
    begin(store)
    traffic.refresh()
    with pytest.raises(ExperimentError):
        traffic.outcome(user, value)
    assert traffic.outcome("ann", True) and not traffic.outcome("ann", 1, metric="another")


def test_threads_share_it(store: MlflowClient, traffic: Traffic, bus: Bus, analyst: Analyst) -> None:
    begin(store, guardrails={"slow": None, "errors": None})
    traffic.refresh()

    def ask(offset: int) -> None:
        for n in range(500):
            route = traffic.route(f"u{(n + offset) % 500}")
            traffic.exposed(route)
            traffic.observe(route, 0.001)
            if n % 50 == 0:
                traffic.flush()

    threads = [threading.Thread(target=ask, args=(100 * k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    traffic.flush()
    bus.drain()
    analyst.look()
    n = status("polite", store=store).numbers
    assert n["users_champion"] + n["users_challenger"] == 500 and n["requests_champion"] + n["requests_challenger"] == 2_000


# ---- counting


def state_of(**about: Any) -> State:
    d = {"name": "polite", "model": "inbox", "versions": (1, 2), "steps": (0.5,), "salt": "s", "max_users": 4_000, **about}
    return State(definition=Definition(**d), run_id="r", started=1_000.0, begun=(1_000.0,))


def counted(events: list[Any], state: State | None = None) -> Tally:
    with connect(f"memory://{uuid.uuid4().hex}") as bus:
        with bus.transaction() as tx:
            for table in ab.TABLES:
                tx.execute(table)
            for event in events:
                record(event, tx)
        with closing(bus.ledger.open()) as db:
            return tally(db, state or state_of())


def exposed(*who: tuple[str, str, float]) -> ExperimentExposed:
    rows = [(user, arm, 0, at) for user, arm, at in who]
    return ExperimentExposed(source_service="t", payload={"experiment": "polite", "exposures": rows})


def outcome(*what: tuple[str, float, float], metric: str = "outcome", model: str = "inbox") -> ExperimentOutcome:
    return ExperimentOutcome(source_service="t", payload={"model_id": model, "metric": metric, "outcomes": what})


def measured(**loads: dict[str, Any]) -> ExperimentMeasured:
    return ExperimentMeasured(source_service="t", payload={"experiment": "polite", "arms": loads})


ANN, BOB = exposed(("ann", "champion", 1_000)), exposed(("bob", "challenger", 1_000))


@pytest.mark.parametrize(
    ("events", "champion", "more"),
    [
        ([ANN, outcome(("ann", 1, 1_001))], (1, 1, 1), {}),
        ([outcome(("ann", 1, 1_001)), ANN], (1, 1, 1), {}),  # it arrives first
        ([ANN, outcome(("ann", 1, 1_001)), outcome(("ann", 0, 1_002))], (1, 1, 1), {}),  # twice: the first
        ([ANN, outcome(("ann", 0, 1_002)), outcome(("ann", 1, 1_001))], (1, 1, 1), {}),
        ([ANN, outcome(("ann", 1, 900))], (0, 0, 0), {}),  # before she saw anything
        ([ANN, outcome(("ann", 0, 900)), outcome(("ann", 1, 1_001))], (1, 1, 1), {}),
        ([ANN, outcome(("ann", 1, 999))], (1, 1, 1), {}),  # two machines' clocks
        ([ANN, outcome(("eve", 1, 1_001))], (0, 0, 0), {"strangers": 1}),
        ([ANN, exposed(("ann", "challenger", 1_500)), outcome(("ann", 1, 2_000))], (1, 1, 1), {"crossed": 1}),
        ([exposed(("ann", "challenger", 1_500)), ANN, outcome(("ann", 1, 2_000))], (1, 1, 1), {"crossed": 1}),
        ([ANN, ANN, exposed(("ann", "champion", 3_000))], (0, 0, 0), {"crossed": 0}),
        ([ANN, outcome(("ann", 1, 1_001), metric="clicks")], (0, 0, 0), {}),
        ([ANN, outcome(("ann", 1, 1_001), model="another")], (0, 0, 0), {}),
        ([ANN, outcome(("ann", 7, 1_001)), outcome(("ann", 1, 1_002))], (1, 1, 1), {}),  # 7 is no share
    ],
)
def test_the_rules_of_the_join(events: list[Any], champion: tuple[float, ...], more: dict[str, int]) -> None:
    found = counted(events)
    assert found.outcomes["champion"] == champion and found.outcomes["challenger"] == (0, 0, 0)
    assert sum(found.users.values()) == 1
    assert {name: getattr(found, name) for name in more} == more


def test_windows_and_ends() -> None:
    late = [ANN, outcome(("ann", 1, 1_000 + 3_600))]
    assert counted(late, state_of(metric={"window_hours": 1.0})).outcomes["champion"][0] == 0
    assert counted(late, state_of(metric={"window_hours": 1.1})).outcomes["champion"][0] == 1
    ended = state_of().model_copy(update={"ended": 2_000.0})
    after = [ANN, outcome(("ann", 1, 2_001)), exposed(("bob", "challenger", 2_001))]
    assert counted(after, ended) == counted([ANN], ended), "what comes after the end changes nothing"
    assert counted([ANN, outcome(("ann", 2.5, 1_001))], state_of(metric={"kind": "mean"})).outcomes["champion"] == (1, 2.5, 6.25)


USER, AT = st.sampled_from("abc"), st.integers(990, 1_020).map(float)
FACT = st.one_of(
    st.builds(lambda u, a, t: exposed((u, a, t)), USER, st.sampled_from(ARMS), AT),
    st.builds(lambda u, v, t: outcome((u, v, t)), USER, st.sampled_from([0.0, 1.0]), AT),
    st.builds(lambda a, n: measured(**{a: {"requests": n, "times": [n] * (len(ab.BOUNDS) + 1)}}), st.sampled_from(ARMS), st.integers(0, 5)),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(FACT, max_size=12), st.randoms(use_true_random=False))
def test_the_order_of_arrival_is_nothing(facts: list[Any], rng: random.Random) -> None:
    shuffled = rng.sample(facts, len(facts))
    assert counted(shuffled) == counted(facts)


# ---- judging


def found_for(state: State, users: tuple[int, int], hits: tuple[float, float], **loads: tuple[int, int]) -> dict[str, float]:
    def load(k: int) -> Load:
        more = {name: value[k] for name, value in loads.items()}
        return Load(**{"requests": users[k], "times": [users[k]] + [0] * len(ab.BOUNDS), **more})  # type: ignore[arg-type]

    each = {arm: k for k, arm in enumerate(ARMS)}
    sums = {arm: (users[k], hits[k], hits[k]) for arm, k in each.items()}
    return evidence(state, Tally({(arm, state.step): users[k] for arm, k in each.items()}, sums, {arm: load(k) for arm, k in each.items()}))


DAY = 86_400


@pytest.mark.parametrize(
    ("users", "hits", "loads", "days", "decision"),
    [
        ((1_000, 1_000), (600, 700), {}, 1, "promote"),
        ((1_000, 1_000), (700, 600), {}, 1, "rollback"),
        ((1_000, 1_000), (600, 605), {}, 1, None),
        ((1_000, 1_000), (600, 605), {}, 15, "keep"),
        ((2_000, 2_000), (1_200, 1_210), {}, 1, "keep"),
        ((1_000, 1_000), (600, 700), {"errors": (5, 90)}, 1, "rollback"),
        ((1_000, 1_000), (600, 700), {"slow": (5, 200)}, 1, "rollback"),
        ((1_000, 1_000), (600, 605), {"errors": (5, 12)}, 1, None),
        ((2_000, 1_500), (1_000, 1_400), {}, 1, None),  # the shares cannot be true
        ((2_000, 1_500), (1_000, 1_400), {}, 15, "stop"),
        ((2_000, 1_500), (1_000, 1_400), {"errors": (5, 300)}, 1, "rollback"),  # harm is harm
        ((40, 40), (0, 40), {}, 1, None),
        ((0, 0), (0, 0), {}, 1, None),
        ((0, 0), (0, 0), {}, 15, "keep"),
    ],
)
def test_what_the_numbers_allow(users: Any, hits: Any, loads: Any, days: float, decision: str | None) -> None:
    state = state_of()
    verdict = judge(state, found_for(state, users, hits, **loads), state.started + days * DAY)
    assert (verdict and verdict.decision) == decision
    if verdict and verdict.decision != "stop" and users[0]:
        assert verdict.numbers["users_champion"] == users[0] and verdict.reason


def test_fewer_can_be_better() -> None:
    state = state_of(metric={"name": "complaints", "better": "lower"})
    decide = lambda hits: judge(state, found_for(state, (1_000, 1_000), hits), state.started)
    assert decide((300, 200)).decision == "promote" and decide((200, 300)).decision == "rollback"  # type: ignore[union-attr]


def test_means_are_compared() -> None:
    state = state_of(metric={"kind": "mean"})
    loads = {arm: Load(requests=0) for arm in ARMS}  # type: ignore[call-arg]
    sums = {"champion": (500, 5_000.0, 52_000.0), "challenger": (500, 5_500.0, 62_500.0)}  # 10 ± 2 against 11 ± 2
    found = evidence(state, Tally({(arm, 0): 500 for arm in ARMS}, sums, loads))
    assert found["effect"] == 1 and 0 < found["low"] < 1 < found["high"]
    verdict = judge(state, found, state.started)
    assert verdict is not None and verdict.decision == "promote"
    same = dict.fromkeys(ARMS, (500, 500.0, 500.0))  # no spread at all
    assert judge(state, evidence(state, Tally({(arm, 0): 500 for arm in ARMS}, same, loads)), state.started) is None


def test_each_step_of_a_canary_has_its_own_shares() -> None:
    state = state_of(mode="canary", steps=(0.1, 0.5), min_users=100).model_copy(update={"begun": (1_000.0, 2_000.0)})
    loads = {arm: Load(requests=900) for arm in ARMS}  # type: ignore[call-arg]
    users = {("champion", 0): 900, ("challenger", 0): 100, ("champion", 1): 500, ("challenger", 1): 500}
    found = evidence(state, Tally(users, dict.fromkeys(ARMS, (0, 0, 0)), loads))
    assert found["srm_p"] > 0.1 and found["users_challenger"] == 600
    wrong = {**users, ("challenger", 1): 300}
    assert evidence(state, Tally(wrong, dict.fromkeys(ARMS, (0, 0, 0)), loads))["srm_p"] < ab.SRM


# ---- the whole


def test_better_is_promoted(store: MlflowClient, traffic: Traffic, bus: Bus, analyst: Analyst, history: History) -> None:
    begin(store, metric="right")
    users = day(traffic, bus, analyst, {"champion": 0.6, "challenger": 0.75})
    bus.drain()
    assert users < 4_000 and gates.find("champion", "inbox", store=store).version == 2
    last = gates.decisions("inbox", store=store).iloc[-1]
    assert "experiment polite: right 0." in last.reason and (last.who, last.version, last.before) == ("experiment", 2, 1)
    [decided] = said(history, "decided")
    assert decided.decision == "promote" and decided.numbers["users_champion"] + decided.numbers["users_challenger"] == users
    assert running("inbox", store=store) is None and traffic.route("u1") == Route()
    story = [e.event_type for e in history.story("experiment polite")]
    assert story.count("experiment.started") == story.count("experiment.decided") == 1 and story[-1] != "experiment.started"
    drawn = curves("polite", store=store)
    assert drawn.low.iloc[-1] > 0 and drawn.index.is_monotonic_increasing


def test_no_difference_keeps_the_champion(store: MlflowClient, traffic: Traffic, bus: Bus, analyst: Analyst, history: History) -> None:
    begin(store, max_users=2_000)
    assert day(traffic, bus, analyst, {"champion": 0.6, "challenger": 0.6}) == 2_000
    bus.drain()
    assert said(history, "decided")[0].decision == "keep" and gates.find("champion", "inbox", store=store).version == 1
    assert len(gates.decisions("inbox", store=store)) == 1


@pytest.mark.parametrize("harm", [{"seconds": {"champion": 0.01, "challenger": 0.3}}, {"fails": {"champion": 0.01, "challenger": 0.2}}])
def test_harm_is_taken_back(store: MlflowClient, traffic: Traffic, bus: Bus, analyst: Analyst, history: History, harm: dict[str, Any]) -> None:
    begin(store)
    users = day(traffic, bus, analyst, {"champion": 0.6, "challenger": 0.8}, **harm)
    bus.drain()
    assert said(history, "decided")[0].decision == "rollback" and users < 2_000
    assert gates.find("champion", "inbox", store=store).version == 1 and traffic.route("u1") == Route()


def test_a_canary_grows_until_it_is_champion(store: MlflowClient, traffic: Traffic, bus: Bus, analyst: Analyst, history: History) -> None:
    begin(store, mode="canary", steps=(0.1, 0.3, 0.5), min_users=80)
    day(traffic, bus, analyst, {"champion": 0.6, "challenger": 0.6}, group=300)
    bus.drain()
    assert sorted((p.step, p.weight) for p in said(history, "stepped")) == [(1, 0.3), (2, 0.5)]
    assert said(history, "decided")[0].decision == "promote" and gates.find("champion", "inbox", store=store).version == 2
    assert sorted(set(curves("polite", store=store).weight)) == [0.1, 0.3, 0.5]


def test_users_that_are_missing_stop_every_conclusion(store: MlflowClient, traffic: Traffic, bus: Bus, analyst: Analyst, history: History) -> None:
    begin(store)
    rng = random.Random(3)
    day(traffic, bus, analyst, {"champion": 0.5, "challenger": 0.9}, users=2_400, counted=lambda r: r.arm == "champion" or rng.random() < 0.7)
    bus.drain()
    now = status("polite", store=store)
    assert now.phase == "running" and "not the shares that were asked for" in now.alarm
    assert not said(history, "decided") and len(said(history, "alarmed")) == 1
    assert "ALARM" in str(now) and "Alarm" in report("polite", store=store)
    stop("polite", reason="a bug in the API", who="ann", store=store)
    analyst.look()
    bus.drain()
    assert said(history, "decided")[0].decision == "stop" and gates.find("champion", "inbox", store=store).version == 1


def test_outcomes_may_come_from_elsewhere(store: MlflowClient, traffic: Traffic, bus: Bus, analyst: Analyst) -> None:
    begin(store)
    traffic.refresh()
    traffic.exposed(traffic.route("ann"))
    traffic.flush()
    bus.publish(outcome(("ann", 1, time.time())))
    bus.drain()
    analyst.look()
    n = status("polite", store=store).numbers
    assert n["outcomes_champion"] + n["outcomes_challenger"] == 1


# ---- deaths


class Died(BaseException):
    "kill -9, for a thread."


STORE_CALLS = ["set_registered_model_tag", "set_registered_model_alias", "create_run", "set_tag", "delete_registered_model_tag", "set_terminated"]


def test_death_at_any_line_of_a_decision(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Whatever call to the registry is the last one of a process: the next one finishes it, once."
    deaths = 0
    for nth, after in itertools.product(range(12), (False, True)):
        folder = tmp_path / f"{nth}{after}"
        folder.mkdir()
        store = copied(trained, folder)
        state = begin(store)
        calls = itertools.count()

        def mortal(real: Callable[..., Any], nth: int = nth, after: bool = after, calls: Iterator[int] = calls) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                mine = next(calls)
                if mine > nth or mine == nth and not after:  # the dead do not tidy up
                    raise Died
                found = real(*args, **kwargs)
                if mine == nth:
                    raise Died
                return found

            return call

        died = False
        with monkeypatch.context() as patch:
            for name in STORE_CALLS:
                patch.setattr(store, name, mortal(getattr(store, name)))
            try:
                conclude(state, Verdict(decision="promote", reason="it is better"), store=store)
            except Died:
                died = True
        deaths += died
        with connect(f"memory://{uuid.uuid4().hex}") as bus:
            history = History(f"sqlite:///{folder}/history.db")
            history.follow(bus)
            if died and nth == 0 and not after:
                conclude(state, Verdict(decision="promote", reason="it is better"), store=store)
            for _ in range(2):
                worker = Analyst(every=3_600, store=store).start(bus)
                worker.look()
                bus.drain()
                worker.stop()
            assert [p.decision for p in said(history, "decided")] == ["promote"], (nth, after)
            history.close()
        table = gates.decisions("inbox", store=store)
        assert gates.find("champion", "inbox", store=store).version == 2 and running("inbox", store=store) is None
        done = table[table.version.eq(2) & ~table.outcome.isin(["broken off"])]
        assert len(done) == 1, (nth, after, table)
        assert status("polite", store=store).phase == "ended"
        if not died:
            break
    assert deaths >= 8


def test_a_start_that_was_cut_off_is_tidied_up(store: MlflowClient, bus: Bus, analyst: Analyst, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr(store, "set_registered_model_tag", die)
        with pytest.raises(Died):
            begin(store)
    assert running("inbox", store=store) is None
    analyst.look()
    assert store.search_runs([tracking.experiment_id(store, ab.RUNS)])[0].info.status == "KILLED"
    begin(store, "another")


def test_the_first_verdict_wins(store: MlflowClient) -> None:
    state = begin(store)
    ended = [conclude(state, Verdict(decision=d, reason=d), store=store) for d in ("keep", "promote")]  # type: ignore[arg-type]
    assert [e.verdict and e.verdict.decision for e in ended] == ["keep", "keep"]
    assert gates.find("champion", "inbox", store=store).version == 1


def test_a_champion_from_elsewhere_ends_it(store: MlflowClient, traffic: Traffic, bus: Bus, analyst: Analyst) -> None:
    begin(store)
    gates.promote(2, name="inbox", force="somebody was in a hurry", store=store)
    analyst.look()
    done = status("polite", store=store)
    assert done.verdict is not None and done.verdict.decision == "stop" and "version 2 is champion now" in done.verdict.reason


def test_two_analysts_would_each_count_a_half(store: MlflowClient, bus: Bus, analyst: Analyst) -> None:
    with pytest.raises(ConsumerExists):
        Analyst(store=store).start(bus)


WORK = """
import sys, threading
from mlops_lib.events.bus import connect
from mlops_lib.serving.experiment import Analyst
from mlops_lib.registry.tracking import open_store
url, ledger, namespace, store = sys.argv[1:]
more = {"namespace": namespace, "ledger": ledger} if url.startswith("amqp") else {"lease": 2.0}
Analyst(every=3600, store=open_store(store)).start(connect(url, **more))
print("at work", flush=True)
threading.Event().wait()
"""


@pytest.fixture(params=["sqlite", "amqp"])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/bus.db", {"lease": 2.0}
        return
    with private("rabbitmq", tmp_path / "rabbitmq") as one:
        yield one.url, {"namespace": "ab", "ledger": tmp_path / "ledger.db"}


def test_kill_9_of_the_worker_counts_exactly(store: MlflowClient, broker: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    url, more = broker
    begin(store, max_users=100_000, guardrails={"errors": None, "slow": None})
    about = [url, str(tmp_path / "ledger.db"), "ab", store.tracking_uri]
    with connect(url, **more) as bus:
        bus.transport.bind(Analyst.name, Analyst.keys)
        with Traffic("inbox", store=store, bus=bus, every=3_600) as traffic:
            right: dict[str, int] = dict.fromkeys(ARMS, 0)
            users: dict[str, int] = dict.fromkeys(ARMS, 0)
            for n in range(2_000):
                route = traffic.route(f"u{n}")
                traffic.exposed(route)
                traffic.observe(route, 0.001)
                traffic.outcome(f"u{n}", n % 3 == 0)
                users[route.arm] += 1
                right[route.arm] += n % 3 == 0
                if n % 20 == 19:
                    traffic.flush()
        process = subprocess.Popen([sys.executable, "-c", WORK, *about], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None and "at work" in process.stdout.readline()
            deadline = time.monotonic() + 60
            while bus.depth(Analyst.name)["ready"] > 150 and time.monotonic() < deadline:
                time.sleep(0.001)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(30)
        deadline, worker = time.monotonic() + 60, Analyst(every=3_600, store=store)
        while True:
            try:  # the broker frees a dead consumer's id when it notices
                worker.start(bus)
                break
            except ConsumerExists:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        expected = {f"users_{arm}": users[arm] for arm in ARMS} | {f"requests_{arm}": users[arm] for arm in ARMS}
        expected |= {f"outcomes_{arm}": users[arm] for arm in ARMS} | {f"mean_{arm}": right[arm] / users[arm] for arm in ARMS}
        numbers: dict[str, float] = {}
        while not expected.items() <= numbers.items() and time.monotonic() < deadline:
            bus.drain(60)
            worker.look()
            numbers = status("polite", store=store).numbers
            time.sleep(0.1)
        worker.stop()
    assert {k: numbers.get(k) for k in expected} == expected


# ---- the report


def test_the_report_stands_alone_and_escapes(store: MlflowClient, traffic: Traffic, bus: Bus, analyst: Analyst) -> None:
    begin(store, metric="<b>right</b> $x_{")
    day(traffic, bus, analyst, {"champion": 0.6, "challenger": 0.62}, users=800)
    stop("polite", reason="<script>alert(1)</script>", who="ann & bob", store=store)
    page = report("polite", store=store)
    assert "<script" not in page and "<b>right" not in page and "&lt;script&gt;" in page and "ann &amp; bob" in page
    assert page.count("<svg") == 1 and "difference" in page and 'src="' not in page
    assert "srcdoc" in page._repr_html_()


def test_a_report_of_nothing_yet(store: MlflowClient) -> None:
    begin(store)
    assert "running" in report("polite", store=store) and curves("polite", store=store).empty
    assert isinstance(curves("polite", store=store), pd.DataFrame)
