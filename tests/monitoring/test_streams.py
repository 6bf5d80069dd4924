"""Alarms come when an error rises and not before, labels may come late, and clocks may be wrong."""

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from scipy import stats

from mlops_lib.events.schema import parse_event
from mlops_lib.monitoring.streams import Delayed, ErrorWatch, StreamError, TimeWindows, prediction_drift


def stream(seed: int, changes: bool, n: int = 4_000, at: int = 2_000) -> np.ndarray:
    rate = np.where((np.arange(n) >= at) & changes, 0.3, 0.2)
    return (np.random.default_rng([17, seed]).random(n) < rate).astype(int)


def first_alarm(errors: np.ndarray) -> int | None:
    watch = ErrorWatch()
    return next((n for n, wrong in enumerate(errors) if watch.update(wrong)), None)


def test_clean_streams_are_quiet_and_a_rise_is_noticed_soon() -> None:
    "The short form of benchmarks/drift.py streams."
    clean = [first_alarm(stream(k, False)) for k in range(30)]
    assert sum(n is not None for n in clean) <= stats.binom.ppf(0.9999, 30, 1 / 30)
    found = [n - 2_000 for k in range(30, 60) if (n := first_alarm(stream(k, True))) is not None and n >= 2_000]
    assert len(found) >= 24
    assert np.median(found) <= 500


def test_an_error_that_falls_is_no_alarm() -> None:
    watch = ErrorWatch()
    assert not [a for wrong in np.r_[stream(1, False), np.zeros(2_000)] if (a := watch.update(wrong))]
    assert watch.error < 0.05


def test_an_alarm_tells_how_far_and_becomes_an_event() -> None:
    watch = ErrorWatch()
    with pytest.raises(StreamError, match="no alarm"):
        watch.to_event()
    for wrong in np.r_[np.zeros(1_000), np.ones(400)]:
        watch.update(wrong)
    last = watch.alarms[-1]
    assert 1_000 < watch.alarms[0].case <= 1_100
    assert last.now > last.before
    event = watch.to_event("watcher", correlation_id="c")
    assert parse_event(event.to_json()) == event
    assert event.payload.drift_type == "concept_drift"


@pytest.mark.parametrize("error", [-0.1, 1.1, float("nan"), "1", float("inf")])
def test_what_is_no_error_is_refused_and_changes_nothing(error: Any) -> None:
    watch = ErrorWatch()
    with pytest.raises(StreamError, match="between 0"):
        watch.update(error)
    assert watch.cases == 0


@pytest.mark.parametrize("wrong", [lambda: ErrorWatch(0), lambda: ErrorWatch(1.0), lambda: Delayed(most=0), lambda: TimeWindows(timedelta(0)), lambda: TimeWindows(timedelta(1), lateness=timedelta(-1))])
def test_wrong_knobs_are_refused(wrong: Any) -> None:
    with pytest.raises(StreamError):
        wrong()


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=60), st.integers(1, 5))
@examples(max_examples=60)
def test_every_prediction_is_labelled_waiting_or_forgotten(steps: list[tuple[bool, int]], most: int) -> None:
    late = Delayed(most=most)
    for is_label, key in steps:
        late.labelled(key, 1) if is_label else late.predicted(key, 1)
    c = late.counts
    assert c["predicted"] == c["labelled"] + c["forgotten"] + len(late.waiting)
    assert c["labelled"] + c["unknown"] + c["predicted"] + c["repeated"] == len(steps)
    assert len(late.waiting) <= most
    assert late.watch.cases == c["labelled"]


def test_labels_out_of_order_give_the_same_error() -> None:
    late = Delayed()
    for k in range(200):
        late.predicted(k, k % 2)
    for k in np.random.default_rng(0).permutation(200):
        late.labelled(int(k), 0)
    assert late.watch.error == pytest.approx(0.5)


MINUTES = st.integers(0, 600)


@given(st.lists(MINUTES, min_size=1, max_size=80), st.integers(1, 90), st.integers(0, 120))
@examples(max_examples=80)
def test_every_row_is_in_its_window_once_or_counted(minutes: list[int], length: int, lateness: int) -> None:
    epoch = datetime(2024, 1, 1, tzinfo=UTC)
    windows = TimeWindows(timedelta(minutes=length), lateness=timedelta(minutes=lateness))
    closed = [w for m in minutes for w in windows.add(epoch + timedelta(minutes=m), {"at": epoch + timedelta(minutes=m)})]
    starts = [start for start, _ in closed]
    assert starts == sorted(set(starts)), "windows close in order, each once"
    closed += windows.close()
    for start, frame in closed:
        assert all(start <= at < start + timedelta(minutes=length) for at in pd.to_datetime(frame["at"]))
    assert sum(len(frame) for _, frame in closed) == windows.counts["rows"]
    assert windows.counts["rows"] + windows.counts["late"] == len(minutes)
    if lateness >= 600:
        assert not windows.counts["late"]


def test_a_clock_from_the_future_closes_nothing() -> None:
    windows = TimeWindows(timedelta(days=1))
    windows.add("2024-01-01", {"n": 1})
    assert windows.add("2099-01-01", {"n": 2}) == []
    assert windows.counts["refused"] == 1
    assert windows.add("2024-01-02T00:00:00+00:00", {"n": 3})[0][1]["n"].tolist() == [1]


@pytest.mark.parametrize("moment", ["soon", None, "", float("nan"), pd.NaT, [1]])
def test_what_is_no_time_is_refused(moment: Any) -> None:
    with pytest.raises(StreamError, match="no time"):
        TimeWindows(timedelta(days=1)).add(moment, {})


def test_windows_have_bounded_memory() -> None:
    windows = TimeWindows(timedelta(days=1), most=10)
    for n in range(10):
        windows.add("2024-01-01", {"n": n})
    with pytest.raises(StreamError, match="10 rows wait"):
        windows.add("2024-01-01", {})


def test_predictions_of_any_form_are_compared() -> None:
    rng = np.random.default_rng(3)
    labels, more = rng.choice(3, 2_000, p=[0.2, 0.1, 0.7]), rng.choice(3, 500, p=[0.4, 0.1, 0.5])
    report = prediction_drift(labels, more)
    assert report.drifted
    assert report.drift_type == "model_drift"
    assert report.features[0].kind == "categorical"
    assert not prediction_drift(labels, rng.choice(3, 500, p=[0.2, 0.1, 0.7])).drifted
    chances = rng.dirichlet([2, 1, 7], 2_000)
    assert prediction_drift(chances, rng.dirichlet([4, 1, 5], 500)).drifted
    assert not prediction_drift(chances, rng.dirichlet([2, 1, 7], 500)).drifted
    assert prediction_drift(rng.normal(size=500), rng.normal(1, 1, 500)).features[0].kind == "numeric"
