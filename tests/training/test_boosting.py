"""Boosted trees stop by training rows only, repeat themselves, and refuse what they cannot learn from in words."""

import json
import subprocess
import sys
from functools import partial

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import clone

from mlops_lib.training.boosting import (
    DEFAULTS,
    NETWORK_BOUNDS,
    NETWORK_DEFAULTS,
    BoostingError,
    EarlyStopped,
    check_settings,
    fit_boosting,
    plot_history,
)
from mlops_lib.training.classic import ClassicError, FittedModel

QUICK = {"threads": 1, "rounds": 120}


def shop(n: int = 300, seed: int = 0) -> tuple[pd.DataFrame, pd.Series]:
    "Orders with numbers, a category and gaps; the target follows from two of them, with noise."
    rng = np.random.default_rng(seed)
    data = pd.DataFrame(
        {"price": rng.normal(50, 15, n), "items": rng.integers(1, 9, n), "land": rng.choice(["AT", "CH", "DE"], n)}
    )
    score = (data["price"] - 50) / 15 + (data["land"] == "CH") + rng.normal(0, 0.7, n)
    data.loc[::11, "price"] = np.nan
    return data, pd.Series(np.where(score > 0.3, "late", "on time"), name="state")


def rare(n: int, seed: int) -> tuple[pd.DataFrame, pd.Series]:
    "One row in twelve is of the rare class, and overlaps with the rest."
    rng = np.random.default_rng(seed)
    y = (rng.random(n) < 1 / 12).astype(int)
    return pd.DataFrame({"a": rng.normal(y * 1.2, 1), "b": rng.normal(y * 0.8, 1)}), pd.Series(y)


@pytest.fixture(scope="module")
def fitted() -> FittedModel:
    return fit_boosting("xgboost", *shop(), params=QUICK, seed=3)


def test_the_same_seed_gives_the_same_predictions(fitted):
    data, y = shop()
    again = fit_boosting("xgboost", data, y, params=QUICK, seed=3)
    other = fit_boosting("xgboost", data, y, params=QUICK, seed=4)
    assert (again.predict_proba(data) == fitted.predict_proba(data)).all()
    assert (other.predict_proba(data) != fitted.predict_proba(data)).any()
    assert again.params == fitted.params


def test_early_stopping_keeps_the_best_number_of_trees(fitted):
    losses = fitted.history["validation"]
    assert len(fitted.history["train"]) == len(losses)
    assert fitted.params["trees"] == int(np.argmin(losses)) + 1 < QUICK["rounds"]
    assert len(losses) <= fitted.params["trees"] + DEFAULTS["patience"]


def test_predictions_use_the_trees_that_were_kept(fitted):
    data, y = shop()
    trees = fitted.params["trees"]
    short = fit_boosting("xgboost", data, y, params={**QUICK, "rounds": trees}, seed=3)
    assert short.params["trees"] == trees
    assert np.allclose(short.predict_proba(data), fitted.predict_proba(data))


def test_fewer_rounds_than_progress_are_all_used():
    model = fit_boosting("xgboost", *shop(), params={**QUICK, "rounds": 3, "learning_rate": 0.01})
    assert model.params["trees"] == len(model.history["validation"]) == 3


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_the_rows_held_back_come_from_the_training_rows(task, monkeypatch):
    seen = {}

    class Spy:
        def __init__(self, **settings):
            seen["settings"] = settings

        def fit(self, X, y, *, eval_set, **_):
            seen["fit"], seen["sets"] = X, [part for part, _ in eval_set]
            return self

        def evals_result(self):
            return {"validation_0": {"loss": [1.0]}, "validation_1": {"loss": [1.0]}}

    name = "XGBClassifier" if task == "classification" else "XGBRegressor"
    monkeypatch.setattr(f"xgboost.{name}", Spy)
    X = np.arange(100.0)[:, None]
    EarlyStopped(task, seed=1, validation=0.2).fit(X, np.arange(100) % 2)
    fit, check = (set(part.ravel()) for part in seen["sets"])
    assert set(seen["fit"].ravel()) == fit
    assert fit | check == set(X.ravel())
    assert not fit & check
    assert len(check) == 20
    assert seen["settings"]["early_stopping_rounds"] == DEFAULTS["patience"]


def test_every_class_is_on_both_sides():
    y = np.repeat(["a", "b", "c"], [60, 30, 4])
    X = np.random.default_rng(0).normal(size=(len(y), 2))
    model = EarlyStopped(rounds=3, threads=1).fit(X, y)
    assert model.classes_.tolist() == ["a", "b", "c"]
    assert model.predict_proba(X).shape == (94, 3)


def test_probabilities_sum_to_one_and_agree_with_the_labels(fitted):
    data, _ = shop(200, seed=9)
    proba = fitted.predict_proba(data)
    assert fitted.classes == ["late", "on time"]
    assert np.allclose(proba.sum(axis=1), 1, atol=1e-12)
    assert ((proba >= 0) & (proba <= 1)).all()
    assert (np.array(fitted.classes)[proba.argmax(axis=1)] == fitted.predict(data)).all()


def test_it_learns_what_can_be_learnt(fitted):
    data, y = shop(400, seed=9)
    assert (fitted.predict(data) == y).mean() > y.value_counts(normalize=True).max() + 0.1


def test_unseen_categories_and_missing_values_are_predicted(fitted):
    odd = pd.DataFrame({"price": [np.nan, np.inf, 40.0], "items": [None, 2, 3], "land": ["XX", None, "AT"]})
    assert set(fitted.predict(odd)) <= {"late", "on time"}
    assert np.isfinite(fitted.predict_proba(odd)).all()


def test_a_missing_column_is_named(fitted):
    with pytest.raises(ClassicError, match="land"):
        fitted.predict(shop()[0].drop(columns="land"))


def test_the_order_of_columns_and_further_columns_do_not_matter(fitted):
    data, _ = shop(50, seed=2)
    mixed = data[["land", "items", "price"]].assign(note="x")
    assert (fitted.predict(mixed) == fitted.predict(data)).all()
    assert len(fitted.predict(data.head(0))) == 0


def test_regression():
    rng = np.random.default_rng(0)
    data = pd.DataFrame({"x": rng.uniform(0, 6, 300), "noise": rng.normal(size=300)})
    y = pd.Series(np.sin(data["x"]) * 10 + rng.normal(0, 0.5, 300))
    train, test = slice(0, 240), slice(240, 300)
    model = fit_boosting("xgboost", data[train], y[train], task="regression", params=QUICK)
    error = np.abs(model.predict(data[test]) - y[test]).mean()
    assert model.classes is None
    assert error < np.abs(y[test] - y[train].mean()).mean() / 3
    assert model.importance().index[0] == "x"
    with pytest.raises(ClassicError, match="no probabilities"):
        model.predict_proba(data)


def test_weights_raise_the_recall_of_a_rare_class():
    data, y = rare(600, seed=0)
    new, truth = rare(600, seed=1)
    recall = {}
    for balance in (None, "weights"):
        model = fit_boosting("xgboost", data, y, params={**QUICK, "balance": balance})
        recall[balance] = (model.predict(new)[truth == 1] == 1).mean()
    assert recall["weights"] > recall[None] + 0.2


@pytest.mark.parametrize("kind", [int, bool, str])
def test_classes_come_back_as_they_were(kind):
    data, y = shop(120)
    y = (y == "late").map(kind)
    model = fit_boosting("xgboost", data, y, params=QUICK)
    assert model.classes == sorted(y.unique())
    assert set(model.predict(data)) <= set(y)


def test_a_class_with_one_row_is_refused():
    data, y = shop(60)
    y.iloc[0] = "lost"
    with pytest.raises(BoostingError, match=r"\[\d+, 1, \d+\] rows"):
        fit_boosting("xgboost", data, y, params=QUICK)


def test_too_few_rows_for_a_regression_are_refused():
    data = pd.DataFrame({"x": np.arange(9) / 7.0})
    with pytest.raises(BoostingError, match="^9 rows are too few"):
        fit_boosting("xgboost", data, data["x"], task="regression", params=QUICK)


def test_missing_targets_are_counted():
    data, y = shop(60)
    y.iloc[[1, 5]] = None
    with pytest.raises(BoostingError, match="60 rows: the target has 2 missing"):
        fit_boosting("xgboost", data, y, params=QUICK)


def test_one_class_and_no_rows_are_refused():
    data, y = shop(60)
    with pytest.raises(BoostingError, match="is late in every row"):
        fit_boosting("xgboost", data, pd.Series(["late"] * 60), params=QUICK)
    with pytest.raises(BoostingError, match="on 0 rows"):
        fit_boosting("xgboost", data.head(0), y.head(0), params=QUICK)


def test_an_unknown_setting_is_named_with_the_nearest():
    with pytest.raises(BoostingError, match="'max_dept'.*max_depth"):
        fit_boosting("xgboost", *shop(60), params={"max_dept": 3})
    with pytest.raises(BoostingError, match="'zzz'.*rounds"):
        fit_boosting("xgboost", *shop(60), params={"zzz": 3})


def test_columns_that_say_nothing_are_refused_by_name():
    data = pd.DataFrame({"same": [1] * 40, "empty": [None] * 40, "code": [f"A-{i}" for i in range(40)]})
    with pytest.raises(BoostingError, match=r"\['same', 'empty', 'code'\]"):
        fit_boosting("xgboost", data, pd.Series([0, 1] * 20), params=QUICK)


def test_columns_that_say_nothing_beside_others_are_left_out():
    data, y = shop(120)
    model = fit_boosting("xgboost", data.assign(same=1), y, params=QUICK)
    assert model.features == ["price", "items", "land"]


def test_fitting_changes_neither_data_nor_settings():
    data, y = shop(100)
    copy, target, params = data.copy(), y.copy(), dict(QUICK)
    fit_boosting("xgboost", data, y, params=params)
    pd.testing.assert_frame_equal(data, copy)
    pd.testing.assert_series_equal(y, target)
    assert params == QUICK


def test_texts_are_learnt_from():
    rng = np.random.default_rng(1)
    filler = np.array(["the", "order", "came", "to", "our", "house", "this", "morning", "with", "two", "boxes"])
    y = pd.Series(rng.integers(0, 2, 160))
    texts = [" ".join([*rng.choice(filler, 6), "broken" if bad else "lovely"]) for bad in y]
    data = pd.DataFrame({"text": texts})
    model = fit_boosting("xgboost", data, y, params={**QUICK, "text_components": 10})
    assert model.roles == {"text": "text"}
    assert (model.predict(data) == y).mean() > 0.8


def test_plot_history_shows_both_losses_and_where_it_stopped(fitted):
    ax = plot_history(fitted)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["train", "validation", f"kept: {fitted.params['trees']} trees"]
    assert len(ax.lines[1].get_xdata()) == len(fitted.history["validation"])


@pytest.mark.parametrize(
    "params", [{"rounds": 0}, {"validation": 1.5}, {"max_depth": -1}, {"balance": "under"}], ids=lambda p: next(iter(p))
)
def test_settings_outside_their_range_are_named(params: dict) -> None:
    data = pd.DataFrame({"x": np.arange(40.0)})
    name, value = next(iter(params.items()))
    with pytest.raises(BoostingError, match=name) as e:
        fit_boosting("xgboost", data, data["x"] > 20, params=params)
    assert repr(value) in str(e.value)


def test_an_infinite_target_is_refused() -> None:
    data = pd.DataFrame({"x": np.arange(40.0)})
    with pytest.raises(BoostingError, match="infinite in 1 rows"):
        fit_boosting("xgboost", data, data["x"].replace(3.0, np.inf), task="regression")


def test_a_setting_that_scikit_learn_changes_is_changed(fitted):
    model = EarlyStopped("classification", 3, **QUICK)
    assert model.set_params(rounds=7, seed=4) is model
    assert model.params["rounds"] == 7 and model.seed == 4 and model.get_params()["rounds"] == 7
    assert not hasattr(model, "rounds"), "not beside the settings"
    pipeline = clone(fitted.pipeline).set_params(model__max_depth=1)
    assert pipeline[-1].params == {**fitted.pipeline[-1].params, "max_depth": 1}
    trained = fitted.pipeline[-1].model_
    assert fitted.pipeline[-1].set_params().model_ is trained, "what was learnt stays"


@pytest.mark.parametrize("params", [{"rounds": 2.5}, {"subsample": 0}, {"learning_rate": "fast"}, {"threads": True}], ids=str)
def test_settings_of_the_wrong_kind_are_named(params):
    name, value = next(iter(params.items()))
    with pytest.raises(BoostingError, match=f"{name} must be .*{value!r}"):
        fit_boosting("xgboost", *shop(60), params=params)


@given(
    name=st.sampled_from(sorted(NETWORK_BOUNDS)),
    value=st.one_of(
        st.integers(-10, 10**7), st.floats(allow_nan=True), st.integers(-10, 10**5).map(np.int64), st.booleans(), st.none(),
        st.floats(0, 100, width=32).map(np.float32), st.booleans().map(np.bool_), st.text(max_size=3),
    ),
)  # fmt: skip
def test_a_setting_is_in_its_bounds_and_plain_or_refused(name, value):
    whole, (low, high) = isinstance(NETWORK_DEFAULTS[name], int), NETWORK_BOUNDS[name]
    number = isinstance(value, (int, np.integer) if whole else (int, float, np.integer, np.floating))
    check = partial(check_settings, "a network", {name: value}, NETWORK_DEFAULTS, NETWORK_BOUNDS, BoostingError)
    if isinstance(value, bool) or not number or not low <= value <= high:
        with pytest.raises(BoostingError, match=name) as e:
            check()
        assert repr(value) in str(e.value)
    else:
        chosen = check()
        assert chosen == {**NETWORK_DEFAULTS, name: value}
        assert type(chosen[name]) is (int if whole else float) and json.dumps(chosen)


def test_what_the_networks_share_needs_no_library_of_theirs():
    code = "import sys, mlops_lib.training.boosting; print(sorted({'torch', 'tensorflow', 'keras', 'xgboost'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
