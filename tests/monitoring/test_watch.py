"""The monitor: what a window is compared with, how often it is wrong, what it makes of bad input, and that it counts once."""

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops_lib.data.features import clean_text, create_features
from mlops_lib.data.layers import save
from mlops_lib.data.quality import remove_duplicates, validate
from mlops_lib.data.synthetic import Drift, generate_inbox
from mlops_lib.data.tables import add_label
from mlops_lib.events.bus import Bus, connect
from mlops_lib.events.schema import DataValidated, DriftDetected, ExperimentOutcome, ModelDeployed, PredictionCompleted
from mlops_lib.monitoring.watch import (
    Monitor,
    MonitorError,
    Watched,
    dataset_of,
    decay,
    judge_window,
    reference_rows,
    share_alarms,
    watched,
)
from mlops_lib.registry import gates
from mlops_lib.registry.tracking import fingerprints, log_run, register
from mlops_lib.serving.workers import make_worker
from mlops_lib.training import train

MODEL = f"watch{uuid.uuid4().hex[:6]}"


@pytest.fixture(scope="module")
def months() -> dict[str, pd.DataFrame]:
    "Eight months; from July on words mean something else."
    inbox = generate_inbox(2_400, 5, start="2024-01-01", end="2024-09-01", drift=Drift("concept", "2024-07-01", 2.0)).review
    rows = create_features(add_label(clean_text(validate(remove_duplicates(inbox), max_bad_share=0.2).good))).sort_values("date")
    return {str(month): part.reset_index(drop=True) for month, part in rows.groupby(rows["date"].dt.to_period("M"))}


@pytest.fixture(scope="module")
def then(months: dict[str, pd.DataFrame]) -> Watched:
    rows = pd.concat([part for name, part in months.items() if name < "2024-05"], ignore_index=True)
    save(rows, "model_input", "training", latest=False)
    result = train("logistic", rows, params={"chars": 0, "thirds": False}, targets={})
    register(log_run(result, rows, tags={"dataset": "first"}), MODEL)
    gates.set_alias("champion", 1, "the first", name=MODEL)
    return watched(gates.find("champion", MODEL), text=False)


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[Bus]:
    with connect(f"sqlite:///{tmp_path}/bus.db") as one:
        yield one


@pytest.fixture
def heard(bus: Bus) -> list[DriftDetected]:
    found: list[DriftDetected] = []
    bus.subscribe("heard", ["drift.detected"], found.append)
    return found


@pytest.fixture
def monitor(bus: Bus, heard: list[DriftDetected], then: Watched) -> Iterator[Monitor]:
    one = Monitor(MODEL, size=50, text=False, every=None).start(bus)
    yield one
    one.stop()


def window(frame: pd.DataFrame, path: Path, name: str = "w", **more: Any) -> DataValidated:
    frame.to_parquet(path)
    payload = {"dataset_id": name, "dataset_path": str(path), "num_samples": len(frame), "passed": True, **more}
    return DataValidated(source_service="test", payload=payload)


def answer(label: object, version: object = 1) -> PredictionCompleted:
    payload = {"request_id": uuid.uuid4().hex, "prediction": label, "latency_ms": 1.0, "model_version": str(version)}
    return PredictionCompleted(source_service="test", payload=payload)


# ---- shares and marks


@pytest.mark.parametrize("size", [20, 100, 500])
@pytest.mark.parametrize("shares", [(0.15, 0.85), (0.099, 0.901), (0.25, 0.099, 0.651)])
def test_shares_that_did_not_move_seldom_raise_an_alarm(size: int, shares: tuple[float, ...]) -> None:
    rng = np.random.default_rng(size)
    as_counts = lambda row: dict(zip("abc", row.tolist(), strict=False))
    labels, said = as_counts((2_000 * np.array(shares)).astype(int)), as_counts(rng.multinomial(400, shares))
    alarms = [bool(share_alarms(as_counts(row), labels, said)) for row in rng.multinomial(size, shares, 1_000)]
    assert np.mean(alarms) <= 0.015


def test_a_model_that_says_one_thing_only_is_found() -> None:
    labels = {"a": 200, "b": 300, "c": 500}
    found = share_alarms({"a": 0, "b": 1, "c": 99}, labels, labels)
    assert {p["metric_name"] for p in found} == {"share of class a", "share of class b", "share of class c"}
    for told in found:
        DriftDetected(source_service="test", payload=told)


def test_a_class_that_the_model_never_said_much_is_no_news() -> None:
    labels, said = {"a": 150, "b": 850}, {"a": 4, "b": 196}
    assert share_alarms({"a": 5, "b": 195}, labels, said) == []
    assert share_alarms({"a": 5, "b": 195}, labels, {}), "against the labels alone it would be"


@given(st.lists(st.integers(0, 500), min_size=2, max_size=5), st.lists(st.integers(0, 500), min_size=5, max_size=5))
def test_within_the_bounds_nothing_is_said(counts: list[int], labels: list[int]) -> None:
    now = {str(k): n for k, n in enumerate(counts)}
    trained = {str(k): n for k, n in enumerate(labels[: len(counts)])}
    for told in share_alarms(now, trained, {}):
        assert told["current_value"] < 0.1 or told["current_value"] > 0.9


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 300), st.integers(0, 300))
def test_only_a_loss_is_a_decay(k: int, wrong: int, right: int, missed: int) -> None:
    told = decay((k, k + wrong), (right, right + missed))
    if told:
        assert told["current_value"] < told["baseline_value"] - 0.03 + 1e-12 and told["p_value"] <= 0.01


@pytest.mark.parametrize("wrong", [((5, 3), (1, 2)), ((1, 2), (5, 3)), ((-1, 3), (1, 2))])
def test_counts_that_cannot_be_are_refused(wrong: tuple[tuple[int, int], tuple[int, int]]) -> None:
    with pytest.raises(MonitorError, match="more right answers"):
        decay(*wrong)


def test_empty_counts_say_nothing() -> None:
    assert share_alarms({}, {"a": 1, "b": 2}, {}) == [] and share_alarms({"a": 5}, {}, {}) == []
    assert decay((0, 0), (3, 4)) is None and decay((0, 5), (0, 0)) is None


# ---- the reference


def test_the_reference_is_what_the_champion_learnt(then: Watched) -> None:
    version = then.version
    rows = reference_rows(version)
    assert set(fingerprints(rows, ["text"])) == set(version.training_rows)
    assert len(dataset_of(version)) == sum(version.report["rows"].values()) > len(rows)


def test_a_data_set_that_is_gone_is_named(then: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlops_lib.monitoring.watch.entries", lambda layer: [])
    with pytest.raises(MonitorError, match="pruned"):
        dataset_of(then.version)


# ---- windows


def test_a_changed_meaning_is_seen_by_labels_and_by_nothing_else(then: Watched, months: dict[str, pd.DataFrame]) -> None:
    assert judge_window(then, months["2024-05"]) == []
    told = {p["metric_name"]: p for p in judge_window(then, months["2024-08"])}
    assert told["accuracy"]["drift_type"] == "concept_drift" and told["accuracy"]["current_value"] < told["accuracy"]["baseline_value"]
    assert judge_window(then, months["2024-08"].drop(columns="label")) == []


def test_rows_that_were_learnt_do_not_count(then: Watched) -> None:
    assert judge_window(then, reference_rows(then.version)) == []


def test_a_detector_can_be_given(then: Watched, months: dict[str, pd.DataFrame]) -> None:
    class Report:
        def to_events(self) -> list[DriftDetected]:
            payload = {"drift_type": "data_drift", "metric_name": "mine", "current_value": 1, "baseline_value": 0, "threshold": 0, "severity": "low"}
            return [DriftDetected(source_service="test", payload=payload)]

    found = judge_window(then, months["2024-05"], detect=lambda then, now, alpha: Report())
    assert [p["metric_name"] for p in found] == ["mine"]


def spoiled(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return {
        "one row": rows.head(1), "empty": rows.head(0), "new column": rows.assign(more=1), "missing column": rows.drop(columns="word_count"),
        "constant": rows.assign(word_count=3), "infinite": rows.assign(upper_share=np.inf), "all missing": rows.assign(upper_share=np.nan),
        "type changed": rows.assign(word_count="many"), "no label yet": rows.assign(label=np.nan), "backwards": rows.iloc[::-1],
        "10,000 categories": rows.assign(label=[f"c{k}" for k in range(len(rows))]),
    }  # fmt: skip


@pytest.mark.parametrize("case", sorted(spoiled(pd.DataFrame({"word_count": [1], "upper_share": [0.1], "label": [0]}))))
def test_bad_windows_get_a_verdict_or_a_reason_and_the_monitor_goes_on(
    case: str, monitor: Monitor, bus: Bus, heard: list[DriftDetected], months: dict[str, pd.DataFrame], tmp_path: Path
) -> None:
    bad = window(spoiled(months["2024-05"])[case], tmp_path / "bad.parquet", case)
    bus.publish(bad)
    bus.publish(window(months["2024-08"], tmp_path / "good.parquet", "good"))
    bus.drain()
    for letter in bus.dead_letters("monitor"):
        assert letter.event_id == bad.event_id and "cannot be judged" in letter.error
    assert {e.payload.dataset_id for e in heard} >= {"good"}


# ---- the service


def test_an_alarm_belongs_to_the_story_of_its_window(
    monitor: Monitor, bus: Bus, heard: list[DriftDetected], months: dict[str, pd.DataFrame], tmp_path: Path
) -> None:
    came = window(months["2024-08"], tmp_path / "w.parquet")
    bus.publish(came)
    bus.drain()
    assert heard and all((e.correlation_id, e.causation_id) == (came.correlation_id, came.event_id) for e in heard)
    ids = [e.event_id for e in heard]
    monitor.handle(came)
    bus.drain()
    assert [e.event_id for e in heard] == ids, "said twice, heard once"


def test_what_is_no_news_is_left_alone(monitor: Monitor, bus: Bus, heard: list[DriftDetected], months: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    bus.publish(window(months["2024-08"], tmp_path / "a.parquet", "refused", passed=False))
    bus.publish(window(months["2024-08"], tmp_path / "b.parquet", "first"))  # that the champion was made from
    bus.drain()
    stranger = Monitor("nobody", every=None)
    stranger.bus = bus
    stranger.handle(window(months["2024-08"], tmp_path / "c.parquet"))
    bus.drain()
    assert heard == []


def test_answers_are_counted_once_and_by_version(monitor: Monitor, bus: Bus, heard: list[DriftDetected]) -> None:
    events = [answer(2) for _ in range(50)] + [answer(2, version=7) for _ in range(49)]
    bus.publish_many([*events, *events])
    bus.drain()
    assert monitor.look() == 1 and monitor.look() == 0
    bus.drain()
    assert {e.payload.drift_type for e in heard} == {"model_drift"} and all(e.payload.model_id == MODEL for e in heard)


def test_two_that_look_say_it_once(monitor: Monitor, bus: Bus, heard: list[DriftDetected]) -> None:
    bus.publish_many(answer(2) for _ in range(50))
    bus.drain()
    told: list[Any] = []
    judge = monitor._judge

    def slow(what: str, counts: dict[str, int]) -> list[dict[str, Any]]:
        if not told:
            told.append(what)
            monitor.look()  # another process, in the middle of it
        return judge(what, counts)

    monitor._judge = slow  # type: ignore[method-assign]
    monitor.look()
    bus.drain()
    assert len(heard) == len({e.event_id for e in heard}) > 0 and len({e.payload.metric_name for e in heard}) == len(heard)


def test_outcomes_tell_of_decay_and_begin_anew_with_a_new_champion(monitor: Monitor, bus: Bus, heard: list[DriftDetected]) -> None:
    def outcomes(values: list[int], model: str = MODEL) -> ExperimentOutcome:
        payload = {"model_id": model, "metric": "correct", "outcomes": [[f"u{k}", v, 1.0] for k, v in enumerate(values)]}
        return ExperimentOutcome(source_service="test", payload=payload)

    bus.publish(outcomes([0] * 49))
    bus.publish(outcomes([0] * 500, "other"))
    about = {"model_id": MODEL, "model_version": "2", "deployment_env": "dev", "endpoint_url": "bus:inference"}
    bus.publish(ModelDeployed(source_service="test", payload=about))
    bus.publish(outcomes([0] * 40))
    bus.drain()
    assert monitor.look() == 0, "those before belong to another model"
    bus.publish(outcomes([0] * 10))
    bus.drain()
    assert monitor.look() == 1
    bus.drain()
    assert [e.payload.metric_name for e in heard] == ["accuracy"]


@pytest.mark.parametrize("wrong", [{"size": 3}, {"alpha": 0.7}])
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(MonitorError, match="window has 20"):
        Monitor(MODEL, **wrong)


def test_a_monitor_is_a_worker_like_others() -> None:
    assert isinstance(make_worker("monitor", model=MODEL), Monitor)
