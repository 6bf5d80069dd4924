"""Metrics agree with scikit-learn, splits do not leak, targets cannot be bent."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from mlops_lib.training import metrics
from mlops_lib.training.metrics import (
    TARGET_DEFAULTS,
    Custom,
    MetricError,
    bootstrap,
    check_target,
    compute_metrics,
    confusion,
    data_version,
    declare_targets,
    split,
    train_with,
)


@given(st.integers(2, 5), st.integers(5, 60), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_classification_agrees_with_scikit_learn(classes, rows, seed):
    rng = np.random.default_rng(seed)
    y, p = rng.integers(classes, size=rows), rng.integers(classes, size=rows)
    labels = list(range(classes))
    got = compute_metrics("classification", y, p, classes=labels)
    assert got["accuracy"] == pytest.approx(sk.accuracy_score(y, p))
    for average in ("weighted", "macro"):
        expected = sk.f1_score(y, p, average=average, labels=labels, zero_division=0)
        assert got[f"f1_{average}"] == pytest.approx(expected)
    precision, recall, f1, _ = sk.precision_recall_fscore_support(y, p, labels=labels, zero_division=0)
    for k in labels:
        assert [got[f"{m}_{k}"] for m in ("precision", "recall", "f1")] == pytest.approx([precision[k], recall[k], f1[k]])
    assert (confusion(y, p, labels).to_numpy() == sk.confusion_matrix(y, p, labels=labels)).all()


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_probabilities_agree_with_scikit_learn(classes):
    rng = np.random.default_rng(classes)
    y, proba = rng.integers(classes, size=200), rng.dirichlet(np.ones(classes), 200)
    got = compute_metrics("classification", y, proba.argmax(1), proba)
    scores = proba[:, 1] if classes == 2 else proba
    assert got["auc_roc"] == pytest.approx(sk.roc_auc_score(y, scores, multi_class="ovr", average="weighted"))
    assert got["log_loss"] == pytest.approx(sk.log_loss(y, proba))


def test_labels_may_be_text_and_a_class_may_be_absent():
    proba = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.6, 0.1]])
    got = compute_metrics("classification", ["a", "b", "a"], ["a", "b", "b"], proba, classes=["a", "b", "c"])
    assert got["f1_c"] == 0 and 0.5 <= got["auc_roc"] <= 1
    alone = compute_metrics("classification", ["a", "a"], ["a", "a"], proba[:2], classes=["a", "b", "c"])
    assert "auc_roc" not in alone, "one class alone has no AUC"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("classification", [], []), "no row"),
        (("classification", [0, 1], [0]), "2 true values and 1"),
        (("classification", [0, 5], [0, 1], None, [0, 1]), r"hold \[5\]"),
        (("classification", [0, 1], [0, 7], None, [0, 1]), "predictions hold"),
        (("classification", [0, 1], [0, 1], np.ones((2, 3)) / 3), "shape"),
        (("classification", [0, 1], [0, 1], np.ones((2, 2))), "add up to 1"),
        (("regression", [1, np.nan], [1, 2]), "missing"),
        (("ranking", [0, 0], [1, 2]), "No query"),
        (("ranking", [-1, 0], [1, 2]), "relevance"),
        (("clustering", [0], [0]), "no task"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, words):
    with pytest.raises(MetricError, match=words):
        compute_metrics(*arguments)


@given(st.integers(2, 50), st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_regression_agrees_with_scikit_learn(rows, seed):
    rng = np.random.default_rng(seed)
    y, p = rng.normal(5, 1, rows) + 10, rng.normal(5, 1, rows)
    got = compute_metrics("regression", y, p)
    expected = {
        "r2": sk.r2_score(y, p), "mae": sk.mean_absolute_error(y, p),
        "rmse": sk.root_mean_squared_error(y, p), "mape": sk.mean_absolute_percentage_error(y, p),
    }  # fmt: skip
    assert got == pytest.approx(expected)


def test_undefined_regression_metrics_are_left_out():
    assert "r2" not in compute_metrics("regression", [2, 2], [1, 3])
    assert "mape" not in compute_metrics("regression", [0, 2], [1, 3])


def test_direction_is_that_of_the_move_from_the_last_true_value():
    got = compute_metrics("timeseries", [10, 12, 11, 11], [0, 11, 13, 11])
    assert got["directional_accuracy"] == pytest.approx(2 / 3)


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_ranking_agrees_with_the_definitions(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 15, 4)
    groups = np.repeat(np.arange(4), sizes)
    rel, score = rng.integers(0, 2, sizes.sum()), rng.permutation(sizes.sum())
    rel[0] = 1
    got = compute_metrics("ranking", rel, score, groups=groups, k=100)
    kept = [g for g in range(4) if rel[groups == g].any()]
    ndcg = [sk.ndcg_score([rel[groups == g]], [score[groups == g]], k=100) for g in kept]
    precision = [sk.average_precision_score(rel[groups == g], score[groups == g]) for g in kept]
    assert got == pytest.approx({"ndcg@100": np.mean(ndcg), "map@100": np.mean(precision)})


def test_defaults_are_those_of_the_workspace():
    assert TARGET_DEFAULTS["classification"] == {"accuracy": 0.85, "f1_weighted": 0.80, "auc_roc": 0.85}
    assert TARGET_DEFAULTS["regression"] == {"r2": 0.75, "mape": 0.10}
    assert TARGET_DEFAULTS["timeseries"]["directional_accuracy"] == 0.60
    assert TARGET_DEFAULTS["ranking"] == {"ndcg@10": 0.7, "map@10": 0.5}
    for task, expected in TARGET_DEFAULTS.items():
        assert dict(declare_targets(task).values) == expected


def test_targets_know_their_direction_and_what_was_not_measured():
    late = Custom(lambda y, p, proba: float(np.mean(y != p)), 0.2, better="lower")
    goals = declare_targets("classification", {"f1": 0.8, "log_loss": 0.5, "auc_roc": 0.9, "late": late})
    metrics = {"f1_weighted": 0.8, "log_loss": 0.7} | goals.measure([0, 1], [0, 0])
    assert goals.met(metrics) == {"f1_weighted": True, "log_loss": False, "auc_roc": False, "late": False}
    margins = goals.margins(metrics)
    assert margins["log_loss"] == pytest.approx(-0.2) and margins["late"] == pytest.approx(-0.3)
    assert np.isnan(margins["auc_roc"])
    with pytest.raises(TypeError):
        goals.values["f1_weighted"] = 0.1


@pytest.mark.parametrize("wrong", [{"acuracy": 0.9}, {"f1": 80}, {"r2": 0.5}, {"f1": "high"}, {"f1": True}, {"f1": np.inf}])
def test_targets_that_cannot_be_meant_are_refused(wrong):
    with pytest.raises(MetricError):
        declare_targets("classification", wrong)


@pytest.mark.parametrize(
    "name", ["f1_wieghted", "f1_Weighted", "f1_weightd", "precision_macor", "recall_macro", "f1_micro", "f1_"]
)
def test_a_misspelt_average_is_no_class(name):
    with pytest.raises(MetricError, match=name):
        declare_targets("classification", {name: 0.8})


def test_a_misspelt_average_is_answered_with_the_right_one():
    for classes in (None, [0, 1, 2], ["bad", "good"]):
        with pytest.raises(MetricError, match="Did you mean 'f1_weighted'"):
            declare_targets("classification", {"f1_wieghted": 0.8}, classes)


def test_where_the_classes_are_known_only_theirs_are_metrics():
    assert declare_targets("classification", {"f1_neutral": 0.5}).values == {"f1_neutral": 0.5}
    wanted = {"f1_neutral": 0.5, "recall_marco": 0.5, "f1": 0.8}  # Marco is a class here, not a typo
    assert set(declare_targets("classification", wanted, ["marco", "neutral"]).values) == {*wanted} - {"f1"} | {"f1_weighted"}
    with pytest.raises(MetricError, match="Did you mean 'f1_neutral'"):
        declare_targets("classification", {"f1_neutrel": 0.5}, ["negative", "neutral"])
    early = declare_targets("classification", {"recall_3": 0.5, "late": Custom(lambda y, p, q: 0.0, 1.0)})
    with pytest.raises(MetricError, match="recall_3"):
        declare_targets("classification", early, [0, 1, 2])


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    return pd.DataFrame({
        "x": rng.normal(size=300), "customer": rng.integers(60, size=300),
        "when": pd.Timestamp("2024-01-01") + pd.to_timedelta(rng.integers(50, size=300), unit="D"),
        "y": rng.choice([0, 1, 2], 300, p=[0.3, 0.1, 0.6]),
    })  # fmt: skip


@given(st.integers(0, 1000), st.sampled_from([0.1, 0.2, 0.3, 0.5]))
@settings(max_examples=20, deadline=None)
def test_a_stratified_split_keeps_shares_and_loses_no_row(seed, size):
    frame = pd.DataFrame({"y": [0] * 60 + [1] * 10 + [2] * 130})
    s = split(frame, "y", seed=seed, test_size=size)
    assert sorted([*s.train, *s.test]) == list(range(200))
    shares = frame["y"].iloc[s.test].value_counts(normalize=True)
    assert abs(shares[1] - 0.05) <= 0.5 / len(s.test) + 1e-9


def test_groups_stay_whole_and_time_goes_forward(table):
    s = split(table, "y", group="customer")
    assert not set(table["customer"].iloc[s.train]) & set(table["customer"].iloc[s.test])
    t = split(table, "y", time="when")
    assert table["when"].iloc[t.train].max() < table["when"].iloc[t.test].min()
    assert table["when"].iloc[t.test].is_monotonic_increasing
    for parts in (s, t):
        assert sorted([*parts.train, *parts.test]) == list(range(300))
        assert 0.12 < len(parts.test) / 300 < 0.28


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        ({}, {"group": "nobody"}, "no column 'nobody'"),
        ({}, {"group": "customer", "time": "when"}, "not both"),
        ({}, {"test_size": 20}, "share between 0 and 1"),
        ({"when": pd.NaT}, {"time": "when"}, "missing"),
        ({"when": pd.Timestamp("2024-01-01")}, {"time": "when"}, "one moment"),
        ({"customer": 1}, {"group": "customer"}, "one group"),
        ({"y": [3] + [0] * 299}, {}, "has one row"),
    ],
)
def test_splits_that_make_no_sense_are_refused(table, change, arguments, words):
    with pytest.raises(MetricError, match=words):
        split(table.assign(**change), "y", **arguments)


def test_the_interval_is_reproducible_and_shrinks_with_rows():
    rng = np.random.default_rng(0)
    y = rng.integers(2, size=1000)
    p = np.where(rng.random(1000) < 0.8, y, 1 - y)
    accuracy = lambda a, b: float(np.mean(a == b))
    whole, part = bootstrap(accuracy, y, p, seed=1), bootstrap(accuracy, y[:50], p[:50], seed=1)
    again = bootstrap(accuracy, y, p, seed=1)
    assert (again.low, again.high) == (whole.low, whole.high)
    assert whole.low < whole.value < whole.high and whole.high - whole.low < part.high - part.low
    assert whole.high - whole.low == pytest.approx(2 * 1.96 * np.sqrt(0.8 * 0.2 / 1000), rel=0.25)


def test_data_version_is_the_content():
    frame = pd.DataFrame({"a": [1, 2], "b": ["x", None], "c": [[1], [2]]})
    assert data_version(frame) == data_version(frame.copy().set_axis([7, 8]))
    assert data_version(frame) != data_version(frame.assign(a=[1, 3]))
    assert data_version(frame) != data_version(frame.rename(columns={"a": "z"}))


class Mean:
    history, params = {}, {}

    def __init__(self, data, y):
        self.features, self.rows = list(data.columns), len(data)
        self.value = y.mean()

    def predict(self, data):
        return np.full(len(data), self.value) + data["x"].to_numpy() * 0.01


def fit_mean(kind, data, y, *, task, params, seed):
    assert task == "regression", "a forecast and a relevance are numbers too"
    return Mean(data, y)


def test_the_fit_sees_training_rows_only(table):
    r = train_with(fit_mean, "mean", table.assign(y=table["x"] * 3), "y", features=["x"])
    assert r.model.rows == 240 == 300 - len(r.test_index) and r.task == "regression"
    assert np.array_equal(r.y_true, table["x"].to_numpy()[r.test_index] * 3)
    assert "mape" in r.targets and r.classes is None
    assert "targets met" in repr(r) and "<table>" in r._repr_html_()


def test_time_series_and_ranking_go_through_the_same_door(table):
    numbers = table.assign(y=table["x"].abs() + 1)
    r = train_with(fit_mean, "mean", numbers, "y", task="timeseries", time="when", features=["x"])
    assert {"mape", "directional_accuracy"} <= set(r.metrics) and set(r.met) == {"mape", "directional_accuracy"}
    relevance = table.assign(y=(table["x"] > 0).astype(int))
    r = train_with(
        fit_mean, "mean", relevance, "y", task="ranking", group="customer", features=["x"],
        targets={"ndcg@3": 0.9, "map@5": 0.9},
    )  # fmt: skip
    assert r.met == {"ndcg@3": True, "map@5": True}, "x ranks by itself"
    for task in ("timeseries", "ranking"):
        with pytest.raises(MetricError, match="needs"):
            train_with(fit_mean, "mean", relevance, "y", task=task, features=["x"])


@pytest.mark.parametrize(
    ("values", "words"),
    [([1] * 6, "in every row"), ([1, None] * 3, "3 of 6"), ([1.0, np.inf] * 3, "missing"), ([], "no row")],
)
def test_a_target_that_cannot_be_learnt_is_refused(values, words):
    with pytest.raises(MetricError, match=words):
        check_target(pd.DataFrame({"target": values}), "target")


def test_the_task_follows_from_the_target():
    kinds = {"label": ["a", "b"] * 20, "flag": [True, False] * 20, "stars": [1, 2, 3, 4] * 10, "price": np.arange(40) / 7}
    frame = pd.DataFrame(kinds)
    assert [check_target(frame, c) for c in frame] == ["classification"] * 3 + ["regression"]
    with pytest.raises(MetricError, match="Did you mean 'price'"):
        check_target(frame, "prise")
    with pytest.raises(MetricError, match="needs numbers"):
        check_target(frame, "label", "regression")


def test_a_result_escapes_what_it_shows(table):
    class Guess(Mean):
        def predict(self, data):
            return np.full(len(data), "<b>")

        def predict_proba(self, data):
            return np.tile([0.9, 0.1], (len(data), 1))

    data = table.assign(y=np.where(table["x"] > 0, "<b>", "<i>"))
    fit = lambda kind, data, y, **_: Guess(data, pd.Series([0.0]))
    r = train_with(fit, "<script>", data, "y", features=["x"], targets={"f1": 0.1, "log_loss": 9})
    html = r._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;" in html and "<i>" not in html
    assert r.confusion.to_numpy().sum() == len(r.y_true) and r.report()["rows"].sum() == len(r.y_true)
    i = r.interval("accuracy", n=50)
    assert i.low <= i.value <= i.high


@pytest.mark.parametrize("early", [False, True])
def test_training_refuses_a_target_of_a_class_that_is_not_there(table, early):
    def never(*_, **__):
        raise AssertionError("nothing may be trained")

    targets = {"recall_nutral": 0.5}
    targets = declare_targets("classification", targets) if early else targets
    with pytest.raises(MetricError, match="recall_nutral"):
        train_with(never, "any", table, "y", features=["x"], targets=targets)


# --- what an answer costs


class Counting:
    "Answers nothing, and notes the rows that it is asked for."

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def predict(self, rows: pd.DataFrame) -> None:
        self.asked.append(rows.index.tolist())


def test_rows_are_asked_for_alone_each_time_the_next_one():
    model = Counting()
    assert metrics.row_ms(model, pd.DataFrame({"a": [1, 2, 3]}), times=4) >= 0
    assert model.asked == [[0], [1], [2], [0], [1]], "the first call fills caches and does not count"
    with pytest.raises(MetricError, match="no row"):
        metrics.row_ms(model, pd.DataFrame({"a": []}))


def test_the_median_ignores_the_first_and_a_slow_call(monkeypatch):
    ticks = iter([0, 1, 10, 12, 20, 23, 30, 130, 200, 204])  # seconds: calls of 1, 2, 3, 100 and 4
    monkeypatch.setattr(metrics, "clock", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert metrics.median_ms(lambda: None, times=5) == 3_000


def test_the_size_is_that_of_what_is_shipped():
    whole = SimpleNamespace(weights=b"x" * 50_000)
    assert 48 < metrics.size_kb(whole) < 52
    assert metrics.size_kb(SimpleNamespace(weights=b"x" * 50_000, shipped=b"x" * 2_000)) == metrics.size_kb(b"x" * 2_000) < 3


def test_an_unknown_name_is_answered_with_the_nearest_and_all():
    assert metrics.unknown("kind", "logistc", ["logistic", "svm"]) == (
        "There is no kind 'logistc'. Did you mean 'logistic'? Known: logistic, svm."
    )
    assert metrics.unknown("column", 7, ["a", 70]) == "There is no column 7. Did you mean '70'? Known: a, 70."
    assert metrics.did_you_mean("zzz", ["logistic"]) == ""
