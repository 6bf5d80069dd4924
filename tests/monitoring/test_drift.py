"""A change is found, its absence is not; and no window breaks the monitor."""

import json
from contextlib import suppress
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from scipy import stats

from mlops_lib.events.schema import parse_event
from mlops_lib.monitoring.drift import (
    FLOORS,
    MAX_GAUGES,
    DriftError,
    Reference,
    ad_pvalue,
    anderson_darling,
    detect,
    kind_of,
    numeric_profile,
    severity_of,
    shares_test,
    wasserstein,
)

RNG = np.random.default_rng(7)
GOOD = pd.DataFrame(
    {
        "minutes": RNG.gamma(4, 2, 600),
        "channel": RNG.choice(["mail", "chat", "phone"], 600, p=[0.5, 0.3, 0.2]),
        "level": 1.0,
        "urgent": RNG.random(600) < 0.2,
        "when": pd.date_range("2024-01-01", periods=600, freq="h"),
    }
)
THEN = Reference(GOOD)


def fresh(n: int = 400, seed: int = 0) -> pd.DataFrame:
    "A window in which nothing has changed."
    return GOOD.sample(n, replace=True, random_state=seed).assign(when=pd.date_range("2025-01-01", periods=n, freq="h"))


def words(rng: np.random.Generator, n: int, of: str) -> list[str]:
    return [" ".join(rng.choice(of.split(), 8)) for _ in range(n)]


def bag(texts: list[str]) -> np.ndarray:
    "An encoder that costs nothing: which letters a text has."
    made = np.array([[text.count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts], dtype=float)
    return made / np.linalg.norm(made, axis=1, keepdims=True).clip(1e-9)


# The tests behind the verdict


@pytest.mark.parametrize(("statistic", "p"), [(1.933, 0.1), (2.492, 0.05), (3.070, 0.025), (3.857, 0.01)])
def test_anderson_darling_has_the_published_critical_values(statistic: float, p: float) -> None:
    assert ad_pvalue(statistic) == pytest.approx(p, rel=0.03)


def test_the_pvalue_falls_without_a_jump_and_never_leaves_its_range() -> None:
    p = [ad_pvalue(z) for z in np.r_[0, np.linspace(0.01, 60, 6_000), 1e6]]
    assert all(0 <= b <= a * 1.08 + 1e-12 <= 1.1 for a, b in zip(p, p[1:], strict=False))
    assert p[0] == pytest.approx(1)
    assert p[-1] == 0


def test_the_profile_gives_the_statistics_that_whole_samples_give() -> None:
    x, y = RNG.normal(size=900), RNG.normal(0.3, 1.2, 700)
    then = numeric_profile(x)
    a2, _, gap = anderson_darling(then, numeric_profile(y, then.edges))
    pooled, m, n = np.sort(np.r_[x, y]), len(x), len(y)
    rank, of_x = np.arange(1, m + n), np.searchsorted(np.sort(x), pooled, side="right")[:-1]
    whole = ((of_x * (m + n) - m * rank) ** 2 / (rank * (m + n - rank))).sum() / (m * n)  # Pettitt 1976
    assert a2 == pytest.approx(whole, rel=0.02)
    assert gap == pytest.approx(stats.ks_2samp(x, y).statistic, abs=0.002)


def test_the_distance_is_in_standard_deviations_and_an_outlier_does_not_set_the_scale() -> None:
    x = RNG.normal(50, 10, 20_000)
    then = numeric_profile(np.r_[x, 1e9])
    assert wasserstein(then, numeric_profile(x + 5, then.edges)) == pytest.approx(0.5, rel=0.1)
    assert wasserstein(then, numeric_profile(RNG.normal(50, 10, 20_000), then.edges)) < 0.02


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=12))
@examples(max_examples=60)
def test_counts_of_any_kind_give_a_probability_and_a_share(cells: list[tuple[int, int]]) -> None:
    a, b = (np.array(column) for column in zip(*cells, strict=True))
    if a.sum() and b.sum():
        _, statistic, p, effect = shares_test(a, b, dealt=199)
        assert 0 <= p <= 1
        assert 0 <= effect <= 1
        assert statistic >= 0
        assert shares_test(a * 2, a, dealt=199)[2] > 0.5, "the same shares do not differ"


def test_few_counts_are_dealt_and_two_cells_are_fishers() -> None:
    a, b = np.array([30, 8, 2]), np.array([5, 1, 4])
    assert shares_test(a, b)[0] == "exact"
    test, _, p, _ = shares_test(np.array([40, 2]), np.array([10, 6]))
    assert (test, p) == ("Fisher", pytest.approx(stats.fisher_exact([[40, 2], [10, 6]]).pvalue))
    large = np.array([400, 300, 300]), np.array([100, 120, 80])
    assert shares_test(*large)[2] == pytest.approx(stats.chi2_contingency(np.array(large)).pvalue)


def test_severity_is_a_matter_of_the_effect() -> None:
    for kind, (low, medium, high) in FLOORS.items():
        assert [severity_of(kind, e) for e in (0.9 * low, low, medium, high, 9)] == ["none", "low", "medium", "high", "high"]


# The verdict


def test_a_clean_window_is_quiet_and_each_change_is_found_in_its_column() -> None:
    assert not detect(THEN, fresh()).drifted
    changes = {
        "minutes": fresh().assign(minutes=lambda f: f["minutes"] + 2),
        "channel": fresh().assign(channel=lambda f: f["channel"].where(f["channel"] != "phone", "bot")),
        "urgent": fresh().assign(urgent=lambda f: f["urgent"] | (np.arange(len(f)) % 3 == 0)),
        "level": fresh().assign(level=lambda f: np.where(np.arange(len(f)) % 4 == 0, 2.0, 1.0)),
    }
    for name, window in changes.items():
        report = detect(THEN, window)
        assert [f.name for f in report.findings if f.name != "(together)"] == [name], repr(report)
        assert report.features[name].severity in ("low", "medium", "high")
        assert report.features[name].effect >= report.features[name].floor
    assert "'bot'" in detect(THEN, changes["channel"]).features["channel"].note


@pytest.mark.parametrize("change", ["scale", "tail", "lower", "holes"])
def test_what_a_mean_does_not_see_is_found(change: str) -> None:
    rng = np.random.default_rng(3)
    then, now = pd.DataFrame({"x": rng.normal(size=2_000)}), rng.normal(size=1_000)
    made = {
        "scale": now * 1.4,
        "tail": np.where(rng.random(1_000) < 0.05, now * 8, now),
        "lower": np.where(rng.random(1_000) < 0.1, -50.0, now),
        "holes": np.where(rng.random(1_000) < 0.05, np.nan, now),
    }
    assert detect(then, pd.DataFrame({"x": made[change]})).drifted


def test_a_shift_that_is_certain_but_tiny_is_no_drift() -> None:
    rng = np.random.default_rng(1)
    then, now = ({"x": rng.normal(shift, 1, 100_000)} for shift in (0, 0.02))
    feature = detect(then, now).features["x"]
    assert feature.p < 0.001
    assert not feature.drifted


def test_few_false_alarms_in_small_windows_and_a_small_shift_is_found() -> None:
    "The short form of benchmarks/drift.py. The bounds are those that a right monitor misses once in 10,000 runs."
    seeds, names = 40, [f"x{k}" for k in range(10)]
    clean, moved = [], []
    for seed in range(seeds):
        rng = np.random.default_rng([5, seed])
        then = Reference(pd.DataFrame(rng.normal(size=(5_000, 10)), columns=names))
        clean.append(detect(then, pd.DataFrame(rng.normal(size=(200, 10)), columns=names)).drifted)
        now = pd.DataFrame(rng.normal(size=(1_000, 10)), columns=names)
        now["x3"] += 0.2
        moved.append(detect(then, now, joint=False).features["x3"].drifted)
    assert sum(clean) <= stats.binom.ppf(0.9999, seeds, 0.05)
    assert sum(moved) >= stats.binom.ppf(0.0001, seeds, 0.9)


def test_a_flipped_correlation_is_found_and_named() -> None:
    rng = np.random.default_rng(2)
    draw = lambda n, r: pd.DataFrame(rng.multivariate_normal([0, 0, 0], [[1, r, 0], [r, 1, 0], [0, 0, 1]], n), columns=["a", "b", "c"])
    then = Reference(draw(1_000, 0.6))
    report = detect(then, draw(500, -0.6))
    assert report.joint.drifted
    assert "a and b" in report.joint.note
    assert not any(f.drifted for f in report.features)
    assert not detect(then, draw(500, 0.6)).drifted
    assert detect(then, draw(500, -0.6), joint=False).joint is None


def test_texts_and_vectors_are_compared_by_what_they_say() -> None:
    rng = np.random.default_rng(4)
    mail = "parcel late refund invoice broken kettle angry please help order"
    texts = pd.DataFrame({"text": words(rng, 300, mail)})
    then = Reference(texts, encode=bag)
    assert then.kinds["text"] == "text"
    assert not detect(then, pd.DataFrame({"text": words(rng, 200, mail)})).drifted
    other = [text.translate(str.maketrans("abcdefghijklm", "nopqrstuvwxyz")) for text in words(rng, 200, mail)]
    found = detect(then, pd.DataFrame({"text": other})).features["text"]
    assert (found.drifted, found.test, found.severity) == (True, "MMD", "high")
    longer = pd.DataFrame({"text": [f"{a} {b}" for a, b in zip(*(words(rng, 200, mail) for _ in "ab"), strict=True)]})
    assert "length" in detect(then, longer).features["text"].test
    vectors = pd.DataFrame({"v": list(rng.normal(size=(200, 16)))})
    assert sum(detect(vectors, pd.DataFrame({"v": list(rng.normal(size=(100, 16)))})).drifted for _ in range(10)) <= 3
    assert detect(vectors, pd.DataFrame({"v": list(rng.normal(0.5, 1, (100, 16)))})).features["v"].kind == "vectors"
    with pytest.raises(DriftError, match="another encoder"):
        detect(vectors, pd.DataFrame({"v": list(rng.normal(size=(100, 8)))}))
    with pytest.raises(DriftError, match="same length"):
        detect(vectors, pd.DataFrame({"v": [[1.0, 2.0], [1.0]] * 20}))


# What a monitor has to bear


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (GOOD[:0], "empty"),
        (pd.DataFrame(), "empty"),
        (None, "not NoneType"),
        ([1, 2, 3], "not list"),
        (np.zeros(4), "not ndarray"),
        (GOOD.set_axis(["a", "a", *GOOD.columns[2:]], axis=1), "same name"),
    ],
)
def test_a_window_that_is_none_is_refused_with_the_reason(window: Any, message: str) -> None:
    with pytest.raises(DriftError, match=message):
        detect(THEN, window)
    with pytest.raises(DriftError, match=message):
        Reference(window)


@pytest.mark.parametrize("knobs", [{"alpha": 0}, {"alpha": 1.5}, {"drift_type": "weather"}, {"seed": 3}])
def test_wrong_knobs_are_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(DriftError):
        detect(THEN, GOOD, **knobs)


def test_a_kind_that_is_not_one_is_refused() -> None:
    with pytest.raises(DriftError, match="numeric, categorical"):
        Reference(GOOD, kinds={"minutes": "magic"})
    with pytest.raises(DriftError, match="hours"):
        Reference(GOOD, kinds={"hours": "numeric"})


@pytest.mark.parametrize(
    ("window", "column", "drifted", "said"),
    [
        (fresh(1), "minutes", False, "at least 20"),
        (fresh(19), "minutes", False, "at least 20"),
        (fresh().assign(minutes=np.nan), "minutes", True, "now 100.0%"),
        (fresh().assign(minutes=None), "minutes", True, "now 100.0%"),
        (fresh().assign(channel=None), "channel", True, "now 100.0%"),
        (fresh().assign(minutes="many"), "minutes", True, "type changed: was numeric"),
        (fresh().assign(minutes=lambda f: f["minutes"].astype(str)), "minutes", True, "type changed"),
        (fresh().assign(minutes=lambda f: f["when"]), "minutes", True, "type changed"),
        (fresh().assign(minutes=[[1.0, 2.0]] * 400), "minutes", True, "type changed"),
        (fresh().assign(channel=[[1.0, 2.0]] * 400), "channel", True, "type changed"),
        (fresh().assign(minutes=lambda f: f["minutes"].where(f["minutes"] < 10, np.inf)), "minutes", True, "infinite"),
        (fresh().assign(minutes=np.inf), "minutes", True, "400 infinite"),
        (fresh().assign(minutes=1e308), "minutes", True, "median"),
        (fresh().assign(level=5.0), "level", True, "now 5"),
        (fresh().assign(level=0.0), "level", True, "now 0"),
        (fresh(), "level", False, "median 1, now 1"),
        (fresh().assign(channel=[f"c{k}" for k in range(400)]), "channel", True, "400 new"),
        (fresh().drop(columns="channel"), "channel", True, "is missing"),
        (fresh().assign(when=GOOD["when"][:400].to_numpy()), "when", False, "out of order"),
    ],
)
def test_any_window_gets_a_stated_verdict(window: pd.DataFrame, column: str, drifted: bool, said: str) -> None:
    feature = (report := detect(THEN, window)).features[column]
    assert (feature.drifted, said in feature.note) == (drifted, True), feature
    json.dumps(report.to_dict(), allow_nan=False)
    assert len(report.to_html().encode()) < 500_000


def test_new_columns_are_named_and_do_not_alarm() -> None:
    report = detect(THEN, fresh().assign(shiny=1))
    assert not report.drifted
    assert "shiny" in report.notes[0]


def test_ten_thousand_categories_are_compared_by_those_that_repeat() -> None:
    rng = np.random.default_rng(9)
    draw = lambda n, shift=0: pd.DataFrame({"city": [f"c{k + shift}" for k in rng.zipf(1.4, n).clip(max=10_000)]})
    then = Reference(draw(30_000))
    assert not detect(then, draw(3_000)).drifted
    assert detect(then, draw(3_000, shift=1)).drifted
    ids = pd.DataFrame({"id": [f"id-{k}" for k in range(10_000)]})
    told = detect(ids, ids.map(lambda v: f"new-{v}")).features["id"]
    assert not told.drifted
    assert "identifier" in told.note


def test_a_column_without_a_value_then_is_no_secret() -> None:
    then = Reference(GOOD.assign(minutes=np.nan))
    assert detect(then, fresh()).features["minutes"].drifted
    assert not detect(then, fresh().assign(minutes=np.nan)).features["minutes"].drifted


CELLS = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=30), st.binary(max_size=3), st.dates(), st.lists(st.floats(), max_size=3))


@given(st.lists(CELLS, min_size=1, max_size=45), st.lists(CELLS, min_size=1, max_size=45))
@examples(max_examples=60)
def test_columns_of_anything_never_crash_the_monitor(then: list[Any], now: list[Any]) -> None:
    report = None
    with suppress(DriftError):
        report = detect({"x": pd.Series(then, dtype=object)}, {"x": pd.Series(now, dtype=object)}, encode=lambda texts: np.ones((len(texts), 2)))
    if report:
        json.dumps(report.to_dict(), allow_nan=False)
        report.to_html()


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, 2, 3], "numeric"), ([1.5, None], "numeric"), (pd.array([1, None], dtype="Int64"), "numeric"), ([True, False], "categorical"),
        (["a", "b"], "categorical"), (["one two three four five", "six seven eight nine ten"], "text"), ([None, None], "nothing"), ([[1.0], [2.0]], "vectors"),
        (pd.to_datetime(["2024-01-01"]), "time"), (pd.Categorical(["a"]), "categorical"), ([2**80, 3], "numeric"), ([{"a": 1}], "categorical"),
    ],
)  # fmt: skip
def test_kinds_are_guessed(values: Any, kind: str) -> None:
    assert kind_of(pd.Series(values)) == kind


# To the others


def test_each_finding_is_an_event_that_can_be_read_again() -> None:
    report = detect(THEN, fresh().assign(minutes=lambda f: f["minutes"] + 9).drop(columns="channel"), drift_type="model_drift")
    events = report.to_events("watcher", correlation_id="today")
    assert len(events) == len(report.findings) >= 2
    for event in events:
        assert parse_event(event.to_json()) == event
        assert (event.source_service, event.correlation_id, event.payload.drift_type) == ("watcher", "today", "model_drift")
        assert event.payload.current_value >= event.payload.threshold
    assert detect(THEN, fresh()).to_events() == []


def test_prometheus_reads_the_last_report() -> None:
    detect(THEN, fresh().assign(minutes=lambda f: f["minutes"] + 9)).to_metrics()
    assert REGISTRY.get_sample_value("drift_score", {"feature": "minutes"}) > 1
    assert REGISTRY.get_sample_value("drift_detected", {"drift_type": "data_drift"}) == 1
    wide = pd.DataFrame(RNG.normal(size=(50, MAX_GAUGES + 50))).add_prefix("w")
    detect(wide, wide, joint=False).to_metrics()
    assert REGISTRY.get_sample_value("drift_score", {"feature": "minutes"}) is None, "columns of an earlier report are gone"
    assert REGISTRY.get_sample_value("drift_detected", {"drift_type": "data_drift"}) == 0
    scores = [s for metric in REGISTRY.collect() if metric.name == "drift_score" for s in metric.samples]
    assert len(scores) == MAX_GAUGES


def test_a_report_is_reproducible_and_frames_of_other_libraries_are_taken() -> None:
    import polars as pl

    window = fresh().drop(columns="when")
    once, again = (detect(GOOD.drop(columns="when"), window).to_dict() for _ in range(2))
    assert once == again
    assert detect(pl.from_pandas(GOOD.drop(columns="when")), pl.from_pandas(window)).to_dict() == once
    assert detect(RNG.normal(size=(100, 2)), RNG.normal(size=(100, 2))).features[1].name == "x1"
