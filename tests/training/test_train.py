"""One door for every kind: what it takes, what it refuses, and what it promises."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest

import mlops_lib.training as training
from mlops_lib.data.tables import TableError, as_table, load_example
from mlops_lib.training import (
    KINDS,
    TrainError,
    cross_validate,
    find_fit,
    leaderboard,
    read_rows,
    repeat_splits,
    train,
)

TELCO = Path(__file__).parents[3] / "shared" / "data" / "telco_churn.csv"
QUICK = {"shift": False, "chars": 0}


@pytest.fixture
def inbox():
    rng = np.random.default_rng(0)
    words = {1: "awful broken refund late", 3: "fine okay average usual", 5: "great lovely perfect fast"}
    stars = rng.choice([1.0, 3.0, 5.0], 240)
    text = [" ".join(rng.permutation(f"{words[s]} order number {i} came today".split())) for i, s in enumerate(stars)]
    date = pd.Timestamp("2024-01-01") + pd.to_timedelta(np.arange(240), unit="h")
    ids = {f"{name}_id": [f"{name}{i}" for i in range(240)] for name in ("review", "user", "business")}
    return pd.DataFrame({**ids, "stars": stars, "useful": 0, "text": text, "date": date})


@pytest.fixture(scope="module")
def cells():
    return load_example("breast_cancer")


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, mlops_lib.training; print([m for m in ('numpy', 'pandas', 'sklearn', 'optuna') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_name_in_the_table_leads_to_a_function_and_no_kind_is_left_out():
    from mlops_lib.training import classic

    assert set(classic.KINDS) <= set(KINDS)
    assert all(callable(find_fit(kind)) for kind in KINDS)
    assert all(kind in KINDS for kinds in training.AUTO.values() for kind in kinds)


def test_an_unknown_kind_is_answered_before_any_data_is_read():
    with pytest.raises(TrainError, match="Did you mean 'xgboost'"):
        train("xgbost", "no/such/file.csv", "y")


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(KINDS, "far", "no_such_package.module:fit")
    with pytest.raises(TrainError, match="no_such_package"):
        find_fit("far")


def test_an_inbox_needs_no_target_and_gives_no_answer_away(inbox):
    rows = read_rows(inbox)
    assert (rows.target, rows.task) == ("label", "classification")
    assert rows.features == ["text"]
    result = train("logistic", inbox, params=QUICK)
    assert result.metrics["f1_weighted"] > 0.9
    assert list(result.model.predict(inbox[["text"]].head(2))) == list(result.model.predict(inbox.head(2)))


def test_the_same_rows_from_a_frame_a_file_and_polars_give_the_same_model(inbox, tmp_path):
    table = pd.DataFrame({"a": np.arange(60.0), "b": np.tile([1.0, 2, 3], 20), "y": np.tile(["no", "yes"], 30)})
    table.to_csv(tmp_path / "t.csv", index=False)
    sources = [table, pl.from_pandas(table), tmp_path / "t.csv", str(tmp_path / "t.csv"), as_table(table, "y")]
    results = [train("logistic", data, "y", params=QUICK) for data in sources]
    assert len({r.data_version for r in results}) == 1
    assert all(np.array_equal(r.proba, results[0].proba) for r in results)


def test_stars_can_be_predicted_as_a_number_without_the_label(inbox):
    rows = read_rows(inbox.assign(label=1), "stars")
    assert rows.task == "regression"
    assert not {"label", "useful"} & set(rows.features)


def test_repeated_texts_are_reported(inbox, caplog):
    with caplog.at_level("WARNING", logger="mlops_lib"):
        read_rows(pd.concat([inbox, inbox.head(3)]))
    assert "repeated texts" in caplog.text


@pytest.mark.parametrize(
    ("data", "target", "error"),
    [
        (42, "y", TrainError),
        (pd.DataFrame({"a": [1, 2]}), None, TrainError),
        (pd.DataFrame({"a": [1, 2], "y": [0, 1]}), "z", TableError),
        (pd.DataFrame({"a": [1, 2], "y": [1, 1]}), "y", TableError),
        (pd.DataFrame({"a": [1, 2], "y": [1, None]}), "y", TableError),
        ("no/such/file.csv", "y", TableError),
    ],
)
def test_what_cannot_be_learnt_is_refused(data, target, error):
    with pytest.raises(error):
        train("logistic", data, target)


@pytest.mark.parametrize(
    "wrong",
    [
        {"targets": {"f1_wieghted": 0.8}},
        {"targets": {"accuracy": 85}},
        {"targets": {"rmse": 1}},
        {"params": {"depth": 3}},
        {"group": "patient"},
        {"time": "when"},
        {"kind": "ridge"},
        {"kind": "auto", "params": {"C": 1}},
        {"test_size": 1.5},
    ],
)
def test_what_is_asked_wrongly_is_a_value_error(cells, wrong):
    with pytest.raises(ValueError, match="."):
        train(**({"kind": "logistic", "data": cells} | wrong))


def test_targets_are_declared_before_and_reported_after(cells):
    result = train("logistic", cells, targets={"accuracy": 0.9, "recall_0": 1.0, "log_loss": 5}, params=QUICK)
    assert set(result.met) == {"accuracy", "recall_0", "log_loss"}
    assert result.met["accuracy"]
    assert not result.succeeded or result.metrics["recall_0"] == 1.0
    assert set(train("logistic", cells, params=QUICK).met) == {"accuracy", "f1_weighted", "auc_roc"}


@pytest.mark.parametrize("kind", ["logistic", "forest", "xgboost"])
def test_the_same_seed_gives_the_same_result(cells, kind):
    params = {"logistic": QUICK, "forest": {"n_estimators": 20, "shift": False}, "xgboost": {"rounds": 20}}[kind]
    a, b, c = (train(kind, cells, params=params, seed=s) for s in (7, 7, 8))
    assert np.array_equal(a.proba, b.proba)
    assert a.metrics == b.metrics
    assert a.data_version == b.data_version != c.data_version
    assert not np.array_equal(a.test_index, c.test_index)


def test_groups_stay_on_one_side_and_are_no_feature():
    rng = np.random.default_rng(0)
    data = pd.DataFrame({"who": rng.integers(0, 40, 400), "a": rng.normal(size=400), "y": rng.integers(0, 2, 400)})
    result = train("logistic", data, "y", group="who", params=QUICK)
    test = set(data.who.iloc[result.test_index])
    assert not test & set(data.who.drop(data.index[result.test_index]))
    assert result.features == ["a"]


def test_by_time_the_test_comes_last(inbox):
    shuffled = inbox.sample(frac=1, random_state=1)
    result = train("logistic", shuffled, time="date", params=QUICK)
    assert shuffled.date.iloc[result.test_index].min() > shuffled.date.drop(shuffled.index[result.test_index]).max()


def test_a_series_is_measured_by_direction():
    day = np.arange(200)
    y = pd.Series(np.sin(day) + 10)
    data = pd.DataFrame({"day": day, "y": y, "before": y.shift(1), "before_that": y.shift(2)}).dropna()
    result = train("ridge", data, "y", time="day", task="timeseries")
    assert set(result.met) == {"mape", "directional_accuracy"}
    assert result.metrics["directional_accuracy"] > 0.9


def test_auto_takes_the_best_by_cross_validation(cells, monkeypatch):
    monkeypatch.setitem(training.AUTO, "classification", ("baseline", "logistic"))
    result = train("auto", cells, folds=3)
    assert result.kind == result.candidates.index[0] == "logistic"


def test_auto_goes_on_without_a_package(cells, monkeypatch):
    monkeypatch.setitem(KINDS, "far", "no_such_package.module:fit")
    monkeypatch.setitem(training.AUTO, "classification", ("far", "logistic"))
    assert list(training.candidates(read_rows(cells))) == ["logistic"]


def test_tuned_through_the_door(cells):
    result = train("logistic", cells, params=QUICK, tune=3, folds=3)
    assert result.kind == "logistic"
    assert "C" in result.params


def test_a_kind_of_ones_own(cells, monkeypatch):
    asked = {}

    def fit_mine(kind, data, y, **how):
        asked.update(how)
        return find_fit("logistic")("logistic", data, y, **how)

    monkeypatch.setitem(KINDS, "mine", fit_mine)
    assert train("mine", cells, params=QUICK, seed=3).kind == "mine"
    assert asked == {"task": "classification", "params": QUICK, "seed": 3}
    table = leaderboard(cells, kinds=["mine", "baseline"], folds=3, params={"mine": QUICK})
    assert list(table.index) == ["mine", "baseline"]


def test_cross_validation_takes_the_same_data(inbox, cells):
    assert cross_validate("logistic", inbox, params=QUICK, folds=3).mean["f1_weighted"] > 0.9
    assert len(cross_validate("logistic", cells, params=QUICK, folds=4).folds) == 4


def test_repeated_splits_are_what_train_reaches_with_each_seed(inbox, cells):
    for data, params in ((inbox, {"chars": 0}), (cells, QUICK)):
        table = repeat_splits("logistic", data, params=params, seeds=(7, 8)).folds
        assert table.index.tolist() == [7, 8]
        for seed in (7, 8):
            assert table.loc[seed].to_dict() == train("logistic", data, params=params, seed=seed).metrics


def test_repeated_splits_keep_groups_apart(monkeypatch):
    rng, seen = np.random.default_rng(0), []
    data = pd.DataFrame({"who": rng.integers(0, 40, 400), "a": rng.normal(size=400), "y": rng.integers(0, 2, 400)})

    def fit_spy(kind, rows, y, **how):
        seen.append((set(data.who[rows.index]), set(data.who.drop(rows.index)), list(rows)))
        return find_fit("logistic")("logistic", rows, y, **how)

    monkeypatch.setitem(KINDS, "spy", fit_spy)
    assert len(repeat_splits("spy", data, "y", params=QUICK, group="who", seeds=(1, 2)).folds) == 2
    assert all(not train & test and columns == ["a"] for train, test, columns in seen)


@pytest.mark.parametrize("wrong", [{"seeds": ()}, {"seeds": (1, 2, 1)}, {"task": "timeseries"}, {"kind": "logistik"}])
def test_repeated_splits_that_make_no_sense_are_refused(cells, wrong):
    with pytest.raises(ValueError, match=r"Every seed|time|logistic"):
        repeat_splits(**({"kind": "logistic", "data": cells} | wrong))


@pytest.mark.skipif(not TELCO.is_file(), reason=f"{TELCO} is not here")
def test_telco_reaches_its_mark():
    cv = cross_validate("logistic", TELCO, "Churn", params=QUICK)
    assert cv.mean["auc_roc"] >= 0.84
