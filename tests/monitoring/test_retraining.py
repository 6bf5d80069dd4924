"""Continuous training: no storms, decisions that survive a death, models that are refused, tried out and taken back."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import short

from mlops_lib.data.features import clean_text, create_features
from mlops_lib.data.layers import save
from mlops_lib.data.quality import remove_duplicates, validate
from mlops_lib.data.synthetic import Drift, generate_inbox
from mlops_lib.data.tables import add_label
from mlops_lib.events.bus import Bus, connect
from mlops_lib.events.history import History
from mlops_lib.events.schema import DataValidated, DriftDetected, Event, TrainingFailed, TrainingRequested
from mlops_lib.monitoring.retraining import (
    Candidates,
    Policy,
    Retraining,
    RetrainingError,
    decide,
    does_worse,
    gather,
    order_of,
)
from mlops_lib.registry import gates
from mlops_lib.registry.tracking import fingerprints, log_run, register
from mlops_lib.serving import experiment
from mlops_lib.serving.workers import Deploy, Registry, Training, make_worker, planned
from mlops_lib.training import train

HOUR = 3600.0
QUICK: dict[str, Any] = {"chars": 0, "thirds": False}


class Clock:
    now = 1_750_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module")
def months() -> dict[str, pd.DataFrame]:
    "Eight months; from May on words mean the contrary."
    inbox = generate_inbox(3_200, 5, start="2024-01-01", end="2024-09-01", drift=Drift("concept", "2024-05-01", 2.0)).review
    rows = create_features(add_label(clean_text(validate(remove_duplicates(inbox), max_bad_share=0.2).good))).sort_values("date")
    return {str(month): part.reset_index(drop=True) for month, part in rows.groupby(rows["date"].dt.to_period("M"))}


@pytest.fixture
def model(months: dict[str, pd.DataFrame]) -> str:
    "A registered model with a champion that knows the time before May."
    name = f"r{uuid.uuid4().hex[:8]}"
    rows, aside = gates.hold_out(pd.concat([part for month, part in months.items() if month < "2024-05"], ignore_index=True), ["text"])
    save(rows, "model_input", "training", latest=False)
    gates.freeze_exam(aside, "label", name)
    register(log_run(train("logistic", rows, params=QUICK, targets={}), rows, tags={"dataset": "first"}), name)
    gates.promote(1, name=name)
    return name


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[Bus]:
    with connect(f"sqlite:///{tmp_path}/bus.db", lease=2.0) as one:
        yield one


@pytest.fixture
def asked(bus: Bus) -> list[TrainingRequested]:
    found: list[TrainingRequested] = []
    bus.subscribe("asked", ["training.requested"], found.append)
    return found


def alarm(k: int = 0, severity: str = "high", **more: Any) -> DriftDetected:
    payload = {"drift_type": "data_drift", "metric_name": f"column {k}", "current_value": 0.4, "baseline_value": 0.1, "threshold": 0.2}
    return DriftDetected(source_service="monitor", payload={**payload, "severity": severity, **more})


def window(frame: pd.DataFrame, path: Path) -> DataValidated:
    frame.to_parquet(path)
    payload = {"dataset_id": path.stem, "dataset_path": str(path), "num_samples": len(frame), "passed": True}
    return DataValidated(source_service="validation", payload=payload)


def settle(bus: Bus, *looking: Any) -> None:
    for _ in range(3):
        bus.drain(120)
        for one in looking:
            one.look()
    bus.drain(120)


# ---- the policy


@given(st.lists(st.floats(0, 400), max_size=30), st.integers(1, 5), st.floats(0, 30))
def test_no_order_of_alarms_breaks_the_policy(hours: list[float], per_day: int, cooldown: float) -> None:
    policy, asked = Policy(cooldown_hours=cooldown, per_day=per_day), list[float]()
    for at in sorted(hours):
        if decide(policy, at * HOUR, asked)[0]:
            asked.append(at * HOUR)
    assert all(b - a >= cooldown * HOUR - 1e-6 for a, b in zip(asked, asked[1:], strict=False))
    assert all(sum(0 <= b - a < 24 * HOUR for a in asked) <= per_day for b in asked)
    assert not hours or asked, "the first alarm is heard"


@pytest.mark.parametrize("how", [{"busy": "x"}, {"busy": "x", "force": True}, {"severity": "low"}, {"asked": [99.5 * HOUR]}, {"asked": [100.5 * HOUR]}])
def test_what_the_policy_forbids_is_refused_with_a_reason(how: dict[str, Any]) -> None:
    yes, why = decide(Policy(severity="medium"), 100 * HOUR, **how)
    assert not yes and why


def test_a_clock_that_was_wrong_does_not_stop_retraining_for_ever() -> None:
    assert decide(Policy(), 100 * HOUR, [1e9 * HOUR])[0]


@pytest.mark.parametrize("wrong", [{"cooldown_hours": -1}, {"schedule_hours": 0}, {"severity": "red"}, {"per_day": -1}, {"max_rows": 0}, {"patience_hours": float("nan")}, {"backoff": 0.5}])
def test_a_policy_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RetrainingError, match="got Policy"):
        Policy(**wrong)


# ---- storms and deaths


def test_a_thousand_alarms_in_a_minute_lead_to_one_retraining(bus: Bus, asked: list[Event], clock: Clock, model: str) -> None:
    service = Retraining(model, Policy(min_new=0), every=None, clock=clock).start(bus)
    alarms = [alarm(k) for k in range(1_000)]
    for k in range(0, 1_000, 100):
        bus.publish_many(alarms[k : k + 100])
        bus.publish_many(alarms[k : k + 100 : 3])
        settle(bus, service)
        clock.now += 6
    books = service.decisions()
    assert len(asked) == 1 and asked[0].event_id and asked[0].correlation_id == alarms[0].correlation_id
    assert len(books) == 1_000 and (books["outcome"] == "asked").sum() == 1 and (books["reason"] != "").all()


def test_after_the_end_comes_the_cool_down_then_the_budget(bus: Bus, asked: list[TrainingRequested], clock: Clock, model: str) -> None:
    service = Retraining(model, Policy(min_new=0, cooldown_hours=2, per_day=3), every=None, clock=clock).start(bus)
    for k in range(48):
        bus.publish(alarm(k))
        settle(bus, service)
        if asked:  # each fails
            about = {"experiment_id": "x", "run_id": asked[-1].event_id, "error": "out of memory", "error_type": "MemoryError"}
            bus.publish(asked[-1].reply(TrainingFailed, about, "training"))
            settle(bus)
        clock.now += HOUR / 2
    books = service.decisions()
    assert len(asked) == 3 and set(books[books["outcome"] == "asked"]["became"]) == {"failed"}
    reasons = " ".join(books["reason"])
    assert "cooling down" in reasons and "budget" in reasons


SCRIPT = """
import os, signal, sys
from mlops_lib.events.bus import connect
from mlops_lib.monitoring import retraining
from mlops_lib.monitoring.retraining import Policy, Retraining
where, model, url = sys.argv[1:]
bus = connect(url, lease=2.0)

def dying(name, after):
    act = getattr(Retraining, name)
    def die(self, *args, **kwargs):
        if after:
            act(self, *args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(Retraining, name, die)

if where == "while it decides":
    dying("_decide", True)
elif where == "before it asks":
    dying("_request", False)
elif where == "while it asks":
    dying("_move", True)
elif where == "after it asked":
    dying("_request", True)
service = Retraining(model, Policy(min_new=0), every=0.1).start(bus)
bus.stopped.wait(60)
"""


@pytest.mark.parametrize("where", short(["while it decides", "while it asks"], ["while it decides", "before it asks", "while it asks", "after it asked"]))
def test_a_death_neither_loses_nor_doubles_a_retraining(where: str, tmp_path: Path, model: str) -> None:
    url = f"sqlite:///{tmp_path}/bus.db"
    with connect(url, lease=2.0) as bus:
        asked: list[Event] = []
        Retraining(model, every=None).start(bus).stop()  # its queue is there
        bus.subscribe("asked", ["training.requested"], asked.append)
        bus.publish(alarm())
        dead = subprocess.run([sys.executable, "-c", SCRIPT, where, model, url], env=dict(os.environ), timeout=120, check=False)
        assert dead.returncode == -signal.SIGKILL
        successor = Retraining(model, Policy(min_new=0), every=None).start(bus)
        until = time.monotonic() + 60
        while not asked and time.monotonic() < until:  # what the dead one held is delivered again when its lease has ended
            time.sleep(0.1)
            settle(bus, successor)
        books = successor.decisions()
        assert len(asked) == 1 and books["outcome"].tolist() == ["asked"] and books["became"].tolist() == ["asked"]


def test_the_same_alarm_after_a_refusal_waits_longer_unless_answers_are_worse(bus: Bus, asked: list[TrainingRequested], clock: Clock, model: str) -> None:
    service = Retraining(model, {"min_new": 0, "cooldown_hours": 2, "backoff": 2, "per_day": 24}, every=None, clock=clock).start(bus)
    hours = []
    for hour in range(32):
        bus.publish(alarm(hour, drift_type="concept_drift") if hour == 31 else alarm(hour))
        settle(bus, service)
        if asked and len(asked) > len(hours):
            hours.append(hour)
            with bus.transaction() as tx:  # the gate lets none of them through
                tx.execute("update retrain_job set state = 'refused'")
        clock.now += HOUR
    assert hours == [0, 4, 12, 28, 31], "after 2 x 2, 2 x 4, 2 x 8 hours; and at once where the answers have become worse, after the cool-down"
    assert "refused since" in " ".join(service.decisions()["reason"])


def test_two_services_on_one_file_ask_once(bus: Bus, asked: list[Event], clock: Clock, model: str) -> None:
    one = Retraining(model, Policy(min_new=0), every=None, clock=clock).start(bus)
    bus.publish(alarm())
    bus.drain()
    other, request = Retraining(model, Policy(min_new=0), every=None, clock=clock), one._request
    other.bus = bus

    def meanwhile(job: Any) -> None:
        other._request(job)
        request(job)

    one._request = meanwhile  # type: ignore[method-assign]
    settle(bus, one)
    assert len(asked) == 1


def test_what_nobody_finishes_is_given_up(bus: Bus, asked: list[Event], clock: Clock, model: str) -> None:
    service = Retraining(model, Policy(min_new=0, patience_hours=24), every=None, clock=clock).start(bus)
    bus.publish(alarm(1))
    settle(bus, service)
    clock.now += 25 * HOUR
    settle(bus, service)
    bus.publish(alarm(2))
    settle(bus, service)
    assert service.decisions()["became"].tolist() == ["lost", "asked"] and len(asked) == 2


# ---- other triggers


def test_schedule_by_hand_and_weak_alarms(bus: Bus, asked: list[Event], clock: Clock, model: str) -> None:
    clock.now = pd.Timestamp.now().timestamp()
    policy = Policy(min_new=0, severity="medium", schedule_hours=240, patience_hours=1)
    service = Retraining(model, policy, every=None, clock=clock).start(bus)
    bus.publish(alarm(severity="low"))
    bus.publish(alarm(model_id="another"))
    settle(bus, service)
    assert asked == [] and service.decisions()["outcome"].tolist() == ["refused"]
    clock.now += 241 * HOUR
    settle(bus, service)
    assert len(asked) == 1 and "schedule" in service.decisions()["cause"].iloc[-1]
    clock.now += 2 * HOUR
    settle(bus, service)
    assert service.ask("new products", who="Ada")[0] is False
    assert service.ask("new products", who="Ada", force=True)[0] is True
    settle(bus, service)
    assert len(asked) == 2 and service.decisions()["cause"].iloc[-1] == "Ada: new products"
    with pytest.raises(RetrainingError, match="Say why"):
        service.ask(" ")


def test_without_a_champion_or_new_rows_it_is_withdrawn(bus: Bus, asked: list[Event], clock: Clock, model: str) -> None:
    for name in ("nobody", model):
        service = Retraining(name, every=None, clock=clock).start(bus)
        assert service.ask("why not")[0]
        settle(bus, service)
        assert service.decisions()["became"].tolist() == ["withdrawn"]
        service.stop()
    assert asked == []


# ---- what is asked for


def test_the_same_algorithm_with_the_same_settings(model: str, months: dict[str, pd.DataFrame]) -> None:
    version = gates.champion(model)
    assert version
    payload = {"dataset_id": "d", "dataset_path": "d", **order_of(version)}
    plan = planned(TrainingRequested(source_service="t", payload=payload).payload)
    assert (plan["kind"], plan["seed"], plan["targets"]) == ("logistic", 42, {})
    assert train(data=months["2024-01"], **plan).params == version.model.params


@pytest.mark.parametrize("kind", ["xgboost", "naive_bayes", "svm"])
def test_settings_of_other_kinds_can_be_trained_again(kind: str, months: dict[str, pd.DataFrame]) -> None:
    rows, name = months["2024-01"], f"k{uuid.uuid4().hex[:8]}"
    params = {"rounds": 20} if kind == "xgboost" else {"chars": 0}
    register(log_run(train(kind, rows, params=params, targets={}), rows), name)
    order = order_of(gates.find(1, name))
    plan = planned(TrainingRequested(source_service="t", payload={"dataset_id": "d", "dataset_path": "d", **order}).payload)
    assert train(data=rows, **plan).kind == kind


def test_new_rows_each_once_the_newest_and_never_those_of_the_exam(model: str, months: dict[str, pd.DataFrame]) -> None:
    version = gates.champion(model)
    assert version
    windows = [months["2024-05"], months["2024-05"], months["2024-06"]]
    found = gather(version, windows)
    names = fingerprints(found.train, ["text"])
    assert len(set(names)) == len(names) and not set(names) & set(fingerprints(found.exam, ["text"]))
    assert 0 < found.new <= len(months["2024-05"]) + len(months["2024-06"])
    few = gather(version, windows, max_rows=100).train
    assert len(few) == 100 and few["date"].min() >= pd.Timestamp("2024-06-01")
    assert gather(version, []).new == 0 and gather(version, []).exam.empty


# ---- to the users, or not


@pytest.fixture
def history(bus: Bus, tmp_path: Path) -> Iterator[History]:
    one = History(f"sqlite:///{tmp_path}/history.db")
    one.follow(bus)
    yield one
    one.close()


def crew(bus: Bus, model: str, folder: Path, registry: Any = Registry, **gate: Any) -> None:
    for worker in (Training(folder=folder), registry(model, gate=gate), Deploy(model)):
        worker.start(bus)


def test_one_story_from_the_alarm_to_the_new_champion(
    bus: Bus, history: History, clock: Clock, model: str, months: dict[str, pd.DataFrame], tmp_path: Path
) -> None:
    crew(bus, model, tmp_path)
    service = Retraining(model, Policy(max_rows=800), every=None, clock=clock).start(bus)
    for name in ("2024-05", "2024-06", "2024-07"):
        bus.publish(window(months[name], tmp_path / f"{name}.parquet"))
    cause = bus.publish(alarm())
    settle(bus, service)
    now = gates.champion(model)
    assert now and now.version == 2
    told = [e.event_type for e in history.story(cause.correlation_id)]
    chain = ["training.requested", "training.started", "training.completed", "model.registered", "model.validated", "model.deployed"]
    assert told == ["drift.detected", *chain]
    assert service.decisions()[["outcome", "became", "version"]].to_numpy().tolist() == [["asked", "accepted", "2"]]
    # it is on probation: where the old world comes back, so does the old champion
    clock.now += HOUR
    bus.publish(window(months["2024-04"].iloc[::-1], tmp_path / "back.parquet"))
    p = does_worse(now, gates.find(1, model), months["2024-04"])
    settle(bus, service)
    back = gates.champion(model)
    assert p is not None and p < 0.01 and back and back.version == 1
    assert service.decisions()["became"].tolist() == ["rolled back"]


def test_a_refused_model_changes_nothing_that_is_served(
    bus: Bus, clock: Clock, model: str, months: dict[str, pd.DataFrame], tmp_path: Path
) -> None:
    crew(bus, model, tmp_path, metric="f1_weighted", margin=0.5)
    deployed: list[Event] = []
    bus.subscribe("deployed", ["model.deployed", "experiment.#"], deployed.append)
    before = gates.champion(model)
    assert before
    answers = before.model.predict_proba(months["2024-06"])
    service = Retraining(model, every=None, clock=clock).start(bus)
    for name in ("2024-05", "2024-06"):
        bus.publish(window(months[name], tmp_path / f"{name}.parquet"))
    bus.publish(alarm())
    settle(bus, service)
    after = gates.champion(model)
    assert after and (after.version, after.run_id, after.aliases) == (before.version, before.run_id, before.aliases)
    assert (after.model.predict_proba(months["2024-06"]) == answers).all() and deployed == []
    books = service.decisions()
    assert books["became"].tolist() == ["refused"] and books["because"].iloc[0]
    assert gates.decisions(model)["outcome"].tolist()[-1] == "refused"


@pytest.mark.parametrize(("rollout", "decision", "version", "became"), [("canary", "promote", 2, "accepted"), ("ab", "rollback", 1, "refused")])
def test_a_trial_comes_before_the_champion(
    rollout: Any, decision: Any, version: int, became: str, bus: Bus, clock: Clock, model: str, months: dict[str, pd.DataFrame], tmp_path: Path
) -> None:
    crew(bus, model, tmp_path, Candidates)
    analyst = experiment.Analyst(every=3_600).start(bus)
    trial = {"steps": (0.1, 0.5), "min_users": 100} if rollout == "canary" else {"min_users": 100}
    service = Retraining(model, Policy(max_rows=800), rollout=rollout, trial=trial, every=None, clock=clock).start(bus)
    for name in ("2024-05", "2024-06", "2024-07"):
        bus.publish(window(months[name], tmp_path / f"{name}.parquet"))
    bus.publish(alarm(1))
    settle(bus, service)
    state, now = experiment.running(model), gates.champion(model)
    assert state and now and (state.definition.mode, state.definition.versions) == (rollout, (1, 2))
    assert now.version == 1 and service.decisions()["became"].tolist() == ["on trial"]
    clock.now += 30 * 24 * HOUR
    bus.publish(alarm(2))
    settle(bus, service)
    assert service.decisions()["outcome"].tolist() == ["asked", "refused"], "a trial under way is a retraining under way"
    experiment.stop(state.definition.name, decision, "a test")
    analyst.look()
    settle(bus, service)
    now = gates.champion(model)
    assert now and now.version == version and service.decisions()["became"].iloc[0] == became
    analyst.stop()


def test_candidates_refuse_and_begin_as_a_registry_does(bus: Bus, model: str, months: dict[str, pd.DataFrame], clock: Clock, tmp_path: Path) -> None:
    crew(bus, model, tmp_path, Candidates, margin=0.5)
    service = Retraining(model, rollout="ab", every=None, clock=clock).start(bus)
    bus.publish(window(months["2024-05"], tmp_path / "w.parquet"))
    bus.publish(alarm())
    settle(bus, service)
    assert service.decisions()["became"].tolist() == ["refused"] and experiment.running(model) is None
    with pytest.raises(RetrainingError, match="rollout"):
        Retraining(model, rollout="slowly")  # type: ignore[arg-type]
    assert isinstance(make_worker("retraining", model=model), Retraining)

@pytest.mark.long
def test_alarms_keep_most_of_the_gain_for_half_of_the_trainings() -> None:
    "The short form of benchmarks/retraining.py: one drift, one seed."
    script = Path(__file__).parents[2] / "benchmarks" / "retraining.py"
    spec = importlib.util.spec_from_file_location("retraining_benchmark", script)
    assert spec and spec.loader
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    found = benchmark.simulate(benchmark.drift_of("sudden concept"), 0, 32, Policy(cooldown_hours=14 * 24))
    assert found["whole"] > 0
    assert found["gain"] >= 0.8 * found["whole"]
    assert found["trainings"] <= found["windows"] / 2
