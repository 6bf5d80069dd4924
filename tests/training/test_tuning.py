"""Searches that resume, test rows that stay out of reach, and comparisons that go on when one candidate fails."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from mlops_lib.training import tuning as t
from mlops_lib.training.metrics import MetricError

SPACE = {"x": FloatDistribution(0.01, 100, log=True), "n": IntDistribution(1, 9), "on": CategoricalDistribution([True, False])}
QUICK = {"shift": False}


def bowl(params, fold):
    return -((np.log10(params["x"]) - 1) ** 2) - abs(params["n"] - 4) / 9 + params["on"] + fold / 100


class Threshold:
    "A classifier of one column, with one setting; it notes the rows that it was trained on."

    history: dict = {}

    def __init__(self, data, y, cut, seen):
        self.features, self.params, self.cut = list(data), {"cut": cut}, cut
        seen.append(set(data.index))

    def predict(self, data):
        return (data["a"] > self.cut).astype(int).to_numpy()

    def predict_proba(self, data):
        one = np.where(self.predict(data) == 1, 0.9, 0.1)
        return np.column_stack([1 - one, one])


@pytest.fixture
def frame():
    rng = np.random.default_rng(0)
    a = rng.normal(size=200)
    return pd.DataFrame({"a": a, "label": (a + rng.normal(0, 0.5, 200) > 0.3).astype(int)})


@pytest.fixture
def threshold():
    seen = []

    def fit(kind, data, y, *, task, params, seed):
        return Threshold(data, y, (params or {}).get("cut", -1.0), seen)

    fit.seen = seen
    return fit


def same(a, b):
    pd.testing.assert_frame_equal(t.trials_table(a).drop(columns="seconds"), t.trials_table(b).drop(columns="seconds"))


@pytest.mark.parametrize("stop", [0, 3, 11])  # before anything, by chance still, and when it has begun to learn
@pytest.mark.parametrize("prune", [True, False])
def test_an_interrupted_search_ends_as_if_it_had_not_been(tmp_path, stop, prune):
    calls = []

    def cut_off(params, fold):
        if fold == 0 and calls.count(0) == stop:
            raise KeyboardInterrupt
        calls.append(fold)
        return bowl(params, fold)

    rules = {"trials": 13, "folds": 2, "prune": prune, "seed": 5, "name": "s"}
    with pytest.raises(KeyboardInterrupt):
        t.search(cut_off, SPACE, storage=tmp_path / "s.db", **rules)
    same(t.search(bowl, SPACE, storage=tmp_path / "s.db", **rules), t.search(bowl, SPACE, **rules))


def test_a_finished_search_is_not_repeated(tmp_path):
    file = tmp_path / "new" / "s.db"
    first = t.search(bowl, SPACE, trials=3, folds=1, storage=file)

    def never(params, fold):
        raise AssertionError("everything was done already")

    same(first, t.search(never, SPACE, trials=3, folds=1, storage=file))
    assert len(t.search(bowl, SPACE, trials=4, folds=1, storage=file).trials) == 4


def test_the_seed_decides_and_nothing_else():
    a, b, c = (t.search(bowl, SPACE, trials=14, folds=1, seed=s) for s in (1, 1, 2))
    same(a, b)
    assert a.best_params != c.best_params


def test_a_search_that_learns_beats_its_own_random_start():
    table = t.trials_table(t.search(bowl, SPACE, trials=40, folds=1, prune=False))
    assert table.score[:10].max() < table.score.max()
    assert table.score[30:].mean() > table.score[:10].mean()


def test_pruned_trials_have_fewer_folds_and_are_never_the_best():
    study = t.search(bowl, SPACE, trials=30, folds=5)
    table = t.trials_table(study)
    assert set(table.state) == {"complete", "pruned"}
    assert (table.folds[table.state == "pruned"] < 5).all()
    assert table.score[table.state == "complete"].max() == pytest.approx(study.best_value)


def test_a_setting_that_is_refused_does_not_end_the_search():
    def picky(params, fold):
        if params["on"]:
            raise ValueError("not this one")
        return bowl(params, fold)

    table = t.trials_table(t.search(picky, SPACE, trials=12, folds=2))
    assert len(table) == 12
    assert set(table.state) >= {"fail", "complete"}
    with pytest.raises(t.TuningError, match="no luck"):
        t.search(lambda p, f: (_ for _ in ()).throw(ValueError("no luck")), SPACE, trials=2)


@pytest.mark.parametrize("wrong", [{"trials": 0}, {"space": {}}])
def test_a_search_needs_trials_and_settings(wrong):
    with pytest.raises(t.TuningError):
        t.search(bowl, **({"space": SPACE, "trials": 2} | wrong))


def test_no_test_row_is_touched_while_tuning(frame, threshold):
    space = {"cut": FloatDistribution(-2, 2)}
    tuning = t.tune("threshold", frame, "label", fit=threshold, space=space, trials=12, folds=4)
    test = set(tuning.result.test_index)
    assert all(not rows & test for rows in threshold.seen)
    assert tuning.result.metrics["accuracy"] > tuning.default.metrics["accuracy"]
    assert set(tuning.summary.index) == {"default", "tuned"}


def test_where_no_setting_is_better_the_default_stays(frame):
    def stubborn(kind, data, y, *, task, params, seed):
        return Threshold(data, y, 0.3 if not params else 5.0, [])

    tuning = t.tune("x", frame, "label", fit=stubborn, space={"cut": FloatDistribution(0, 1)}, trials=4, folds=3)
    assert tuning.params == {}
    assert tuning.score == tuning.default_score


def test_tuning_resumes_only_the_same_search(frame, threshold, tmp_path):
    rules = {"fit": threshold, "space": {"cut": FloatDistribution(-2, 2)}, "folds": 3, "storage": tmp_path / "t.db"}
    first = t.tune("x", frame, "label", trials=2, **rules)
    fits = len(threshold.seen)
    again = t.tune("x", frame, "label", trials=2, **rules)
    assert again.params == first.params
    assert len(threshold.seen) - fits == 3 + 2, "the default's folds and two final fits; no trial"
    other = t.tune("x", frame.assign(a=-frame.a), "label", trials=2, **rules)
    assert other.score != first.score, "other rows are another search"


def test_the_direction_follows_the_metric():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(120, 3))
    data = pd.DataFrame(x, columns=list("abc")).assign(y=x @ [1, 2, 0] + rng.normal(0, 0.1, 120))
    tuning = t.tune("ridge", data, "y", trials=6, folds=3)
    complete = tuning.trials[tuning.trials.state == "complete"].score
    assert tuning.metric == "rmse"
    assert tuning.score == min(complete.min(), tuning.default_score)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [({"metric": "acuracy"}, "accuracy"), ({"kind": "logstic"}, "logistic"), ({"metric": "f1_lable"}, "f1"), ({"folds": 1}, "folds")],
)
def test_what_is_asked_wrongly_is_answered_with_what_is_near(frame, wrong, near):
    with pytest.raises(t.TuningError, match=near):
        t.tune(**({"kind": "logistic", "data": frame, "target": "label", "trials": 2} | wrong))


def test_a_kind_without_a_space_says_so(frame, threshold):
    with pytest.raises(t.TuningError, match="space"):
        t.tune("mine", frame, "label", fit=threshold, trials=2)


@given(n=st.integers(20, 80), folds=st.integers(2, 5), seed=st.integers(0, 99))
@hypothesis_settings(max_examples=25, deadline=None)
def test_each_row_is_scored_once_and_never_by_a_model_that_saw_it(n, folds, seed):
    rng = np.random.default_rng(seed)
    data = pd.DataFrame({"a": rng.normal(size=n), "g": rng.integers(0, 12, n), "label": np.arange(n) % 2})
    for group in (None, "g"):
        cuts = t.make_folds(t.Problem(data, "label", group=group, seed=seed), folds)
        assert sorted(np.concatenate([test for _, test in cuts])) == list(range(n))
        for train, test in cuts:
            assert not set(train) & set(test)
            assert group is None or not set(data.g.iloc[train]) & set(data.g.iloc[test])


@given(times=st.lists(st.integers(0, 30), min_size=30, max_size=60))
@hypothesis_settings(max_examples=40, deadline=None)
def test_time_folds_never_train_on_the_present(times):
    data = pd.DataFrame({"when": times, "label": np.arange(len(times)) % 2})
    try:
        cuts = t.make_folds(t.Problem(data, "label", time="when"), 3)
    except t.TuningError:
        assert data.when.nunique() < 10
        return
    for train, test in cuts:
        assert data.when.iloc[train].max() < data.when.iloc[test].min()


def test_folds_that_cannot_be_cut_say_why():
    few = pd.DataFrame({"a": range(43), "g": 1, "label": ["x"] * 40 + ["rare"] * 3})
    with pytest.raises(t.TuningError, match="'rare' has 3 rows"):
        t.make_folds(t.Problem(few, "label"))
    with pytest.raises(t.TuningError, match="1 groups"):
        t.make_folds(t.Problem(few, "label", group="g"))
    with pytest.raises(t.TuningError, match="too few different times"):
        t.make_folds(t.Problem(few, "label", time="g"))


def test_cross_validation_is_the_mean_of_its_folds(frame):
    cv = t.cross_validate("logistic", frame, "label", params=QUICK, folds=4)
    assert len(cv.folds) == 4
    assert cv.mean["accuracy"] == pytest.approx(cv.folds.accuracy.mean())
    assert cv.sd["accuracy"] == pytest.approx(cv.folds.accuracy.std())
    assert min(cv.fit_s, cv.predict_ms, cv.size_kb) > 0
    assert "mean ± sd" in cv._repr_html_()


def test_a_leaderboard_survives_a_candidate_that_fails(frame, threshold):
    kinds = {"cut": threshold, "logistic": "logistic", "broken": "xgbost"}
    table = t.leaderboard(kinds, frame, "label", params={"logistic": QUICK}, folds=3)
    assert table.index[0] == "logistic"
    assert table.attrs["metric"] == "auc_roc"
    assert "xgboost" in table.problem["broken"]
    assert not table.front["broken"]
    with pytest.raises(t.TuningError, match="No candidate"):
        t.leaderboard({"broken": "xgbost"}, frame, "label")


def test_the_table_and_the_picture_show_every_candidate(frame, threshold):
    table = t.leaderboard({"cut": threshold, "logistic": "logistic"}, frame, "label", params={"logistic": QUICK}, folds=3)
    figure = t.plot_leaderboard(table)
    assert {a.get_text() for a in figure.axes[0].get_yticklabels()} == {"cut", "logistic"}
    assert len(figure.axes) == 1 + len(t.COSTS)


def test_a_leaderboard_over_seeds_is_what_repeated_splits_give(frame):
    table = t.leaderboard(["logistic"], frame, "label", params={"logistic": QUICK}, seeds=(5, 6))
    splits = t.repeat_splits("logistic", frame, "label", params=QUICK, seeds=(5, 6))
    assert table.auc_roc["logistic"] == pytest.approx(splits.mean["auc_roc"])
    assert table.attrs["over"] == "2 splits"
    assert splits.folds.index.tolist() == [5, 6]
    assert min(splits.fit_s, splits.predict_ms, splits.alone_ms) > 0


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_every_row_off_the_front_is_beaten_by_one_on_it(points):
    table = pd.DataFrame(points, columns=["good", "cost"])
    front = t.pareto(table, {"good": True, "cost": False})
    assert front.any()
    for i in table.index[~front]:
        on = table[front]
        beats = (on.good >= table.good[i]) & (on.cost <= table.cost[i])
        assert beats.any()


def test_selection_measures_the_winner_on_rows_that_no_candidate_saw(frame, threshold):
    chosen = t.select({"cut": threshold, "logistic": "logistic"}, frame, "label", params={"logistic": QUICK}, folds=3)
    assert chosen.kind == chosen.candidates.index[0] == "logistic"
    assert all(not rows & set(chosen.test_index) for rows in threshold.seen)
    assert "Chosen from" in chosen._repr_html_()


def test_unknown_columns_and_rules_are_refused(frame):
    with pytest.raises(MetricError, match="label"):
        t.cross_validate("logistic", frame, "lable")
    with pytest.raises(TypeError, match="sed"):
        t.cross_validate("logistic", frame, "label", sed=3)


class Scaled:
    history = {}

    def __init__(self, features, params):
        self.features, self.params = features, params

    def predict(self, data):
        return data["x"].to_numpy() * self.params.get("factor", -1.0)


def test_a_ranking_is_tuned_query_by_query():
    rng = np.random.default_rng(0)
    rows = pd.DataFrame({"query": np.repeat(np.arange(40), 12), "x": rng.normal(size=480)})
    rows["relevant"] = (rows.groupby("query")["x"].rank(ascending=False) <= 2).astype(int)
    rows["x"] += 100 * rows["query"]  # only within a query does x rank: across queries the late ones are on top

    def fit(kind, data, y, *, task, params, seed):
        return Scaled(["x"], params)

    found = t.tune(
        "scaled", rows, "relevant", fit=fit, space={"factor": FloatDistribution(0.1, 1)}, task="ranking", group="query",
        features=["x"], targets={"ndcg@10": 0.9}, trials=2, folds=3, prune=False,
    )  # fmt: skip
    assert found.metric == "ndcg@10" and found.params["factor"] > 0
    assert found.score == pytest.approx(1) and found.result.metrics["ndcg@10"] == pytest.approx(1)
    assert found.default_score < 0.6


def test_a_target_that_no_class_has_is_refused_before_the_search(frame, threshold):
    def never(*_, **__):
        raise AssertionError("nothing may be trained")

    for wrong in ("f1_wieghted", "recall_2"):
        with pytest.raises(MetricError, match=wrong):
            t.tune("any", frame, "label", space={"cut": FloatDistribution(0, 1)}, targets={wrong: 0.8}, fit=never)
        with pytest.raises(MetricError, match=wrong):
            t.select({"any": never}, frame, "label", targets={wrong: 0.8})
