"""Classic kinds: what they learn from, what they refuse, and that nothing of the test rows reaches the fit."""

import pickle

import numpy as np
import pandas as pd
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from mlops_lib.training.classic import (
    KINDS,
    TEXT_DEFAULTS,
    ClassicError,
    Ordered,
    PriorShift,
    best_weights,
    build_pipeline,
    check_frame,
    cluster_texts,
    column_roles,
    fit_classic,
    grid_search,
    inbox_features,
    make_features,
    mark_negation,
    resample,
    resolve_params,
)
from mlops_lib.training.metrics import train_with

GOOD, BAD, SO = "great lovely friendly happy perfect", "awful rude broken never slow", "okay average fine but usual"
QUICK = {"chars": 0, "thirds": False}


@pytest.fixture(scope="module")
def messages():
    rng = np.random.default_rng(0)
    label = rng.choice([0, 1, 2], 240, p=[0.3, 0.15, 0.55])
    words = [w.split() for w in (BAD, SO, GOOD)]
    common = ["the", "shop", "was", "when", "we", "came", "on", "a", "day", "and", "said", "so"]
    text = [" ".join([*rng.choice(common, 8), *rng.choice(words[k], 2)]) for k in label]
    return pd.DataFrame({
        "review_id": [f"r{i}" for i in range(240)], "text": text, "stars": label * 2.0 + 1, "useful": 0,
        "word_count": rng.integers(5, 9, 240), "label": label,
    })  # fmt: skip


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(1)
    x = rng.normal(size=250)
    return pd.DataFrame({
        "id": [f"{i:05d}-X" for i in range(250)], "x": [" " if i % 11 == 0 else f"{v:.3f}" for i, v in enumerate(x)],
        "plan": rng.choice(["a", "b", None], 250), "town": [f"t{i}" for i in rng.integers(60, size=250)],
        "since": pd.Timestamp("2020-01-01") + pd.to_timedelta(rng.integers(900, size=250), unit="D"),
        "flat": 1, "gone": np.nan, "active": rng.random(250) > 0.5, "z": x * 2 + rng.normal(size=250) * 0.3 + 10,
        "y": np.where(x + rng.normal(size=250) * 0.3 > 0, "yes", "no"),
    })  # fmt: skip


def test_roles_of_columns(table):
    assert column_roles(table.drop(columns="y")) == {
        "id": "ignored", "x": "number", "plan": "category", "town": "high", "since": "date", "flat": "ignored",
        "gone": "ignored", "active": "category", "z": "number",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "role"),
    [
        ([None] * 30, "ignored"), ([5] * 30, "ignored"), (["", " ", "n/a"] * 10, "ignored"), (list(range(30)), "number"),
        (["1", "2.5", "?"] * 10, "number"), (["2024-01-02", "2024-03-04"] * 15, "category"),
        ([f"2024-01-{d:02d}" for d in range(1, 31)], "date"), ([True, False] * 15, "category"),
        ([f"the message number {i} is about nothing at all" for i in range(30)], "text"),
        (pd.array([1, None, 3] * 10, dtype="Int64"), "number"), (pd.Categorical(["a", "b", "c"] * 10), "category"),
    ],
)  # fmt: skip
def test_role_of_a_column(values, role):
    assert column_roles(pd.DataFrame({"c": values}))["c"] == role


def test_a_number_called_id_is_ignored_only_when_each_row_has_its_own():
    frame = pd.DataFrame({"customer_id": range(50), "shop_id": [1, 2] * 25})
    assert column_roles(frame) == {"customer_id": "ignored", "shop_id": "number"}


CLASSIFIERS = [k for k, spec in KINDS.items() if "classification" in spec.tasks and "embedding" not in spec.defaults]
REGRESSORS = [k for k, spec in KINDS.items() if "regression" in spec.tasks]
FAST = {"forest": {"n_estimators": 20}, "forest_regressor": {"n_estimators": 20}, "histgb": {"max_iter": 20}}


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_every_kind_classifies_a_table_with_everything_in_it(kind, table):
    r = train_with(fit_classic, kind, table, "y", params=FAST.get(kind), seed=0)
    assert r.classes == ["no", "yes"] and set(r.y_pred) <= {"no", "yes"}
    assert r.proba.shape == (50, 2) and np.allclose(r.proba.sum(axis=1), 1)
    assert "id" not in r.features and "flat" not in r.features and "gone" not in r.features
    assert kind == "baseline" or r.metrics["auc_roc"] > 0.8


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_every_kind_reads_messages(kind, messages):
    params = (QUICK if kind != "baseline" else {}) | FAST.get(kind, {}) | ({"text_components": 20} if KINDS[kind].dense else {})
    rows = messages[:120] if kind == "hybrid" else messages  # its encoder reads each text, and its parts
    r = train_with(fit_classic, kind, rows, "label", features=["text"], params=params, seed=0)
    assert r.model.features == ["text"] and r.classes == [0, 1, 2]
    assert kind == "baseline" or r.metrics["f1_macro"] > 0.8


@pytest.mark.parametrize("kind", REGRESSORS)
def test_every_regressor_predicts_a_quantity(kind, table):
    r = train_with(fit_classic, kind, table.drop(columns="y"), "z", params=FAST.get(kind), seed=0)
    assert r.task == "regression" and r.proba is None
    assert kind == "baseline" or r.metrics["r2"] > 0.5
    with pytest.raises(ClassicError, match="no probabilities"):
        r.model.predict_proba(table)


def test_the_same_seed_gives_the_same_model(messages):
    a, b = (train_with(fit_classic, "logistic", messages, "label", features=["text"], seed=3) for _ in range(2))
    assert a.metrics == b.metrics and np.array_equal(a.proba, b.proba)


def test_the_vocabulary_comes_from_training_rows_only(messages):
    marked = messages.assign(text=messages["text"] + " " + pd.Series([f"row{i}x row{i}x" for i in range(len(messages))]))
    params = {"min_df": 1, "words": 1, "chars": 0, "thirds": False, "shift": False, "negation": False}
    r = train_with(fit_classic, "logistic", marked, "label", features=["text"], params=params)
    words = r.model.pipeline[0].named_transformers_["text_text"]["union"].transformer_list
    vocabulary = set(dict(words)["words"].vocabulary_)
    test = {f"row{i}x" for i in r.test_index}
    assert not vocabulary & test and len([w for w in vocabulary if w.startswith("row")]) == len(marked) - len(test)


def test_random_labels_stay_unpredictable(table):
    rng = np.random.default_rng(5)
    noise = pd.DataFrame({"town": [f"t{i}" for i in rng.integers(150, size=600)], "y": rng.integers(2, size=600)})
    r = train_with(fit_classic, "logistic", noise, "y", seed=0)
    assert r.metrics["auc_roc"] < 0.62 and r.train_metrics["auc_roc"] < 0.9


def test_new_values_blanks_and_other_types_are_no_surprise(table):
    model = fit_classic("logistic", table.drop(columns="y"), table["y"], seed=0)
    odd = table.head(4).assign(x=["n/a", "inf", None, "7"], plan="new", town=None, since=["?", None, "2021-05-06", "soon"], active=None)
    proba = model.predict_proba(odd)
    assert np.isfinite(proba).all() and np.allclose(proba.sum(axis=1), 1)
    assert list(model.predict(pl.from_pandas(table.head(3)))) == list(model.predict(table.head(3)))


def test_columns_in_any_order_and_more_of_them_give_the_same_answer(table):
    model = fit_classic("logistic", table.drop(columns="y"), table["y"], seed=0)
    assert np.array_equal(model.predict_proba(table[table.columns[::-1]].assign(extra=1)), model.predict_proba(table))


def test_missing_columns_and_things_that_are_no_frame_are_refused(table):
    model = fit_classic("logistic", table[["x", "plan"]], table["y"], seed=0)
    with pytest.raises(ClassicError, match=r"lack the columns \['plan'\]"):
        model.predict(table[["x"]])
    with pytest.raises(ClassicError, match="takes a data frame, got list"):
        check_frame([1, 2], ["x"])
    assert model.predict(table.head(0)).shape == (0,) and model.predict_proba(table.head(0)).shape == (0, 2)


@pytest.mark.parametrize(
    ("columns", "y", "words"),
    [
        (["x"], [1] * 250, "is 1 in every row"),
        (["x"], [0, None] * 125, "has 125 missing values"),
        (["id", "flat", "gone"], [0, 1] * 125, "none of the columns"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused(table, columns, y, words):
    with pytest.raises(ClassicError, match=words):
        fit_classic("logistic", table[columns], pd.Series(y))
    with pytest.raises(ClassicError, match="there is no row"):
        fit_classic("logistic", table[columns].head(0), pd.Series([], dtype=float))


def test_texts_without_a_common_word_are_refused():
    text = [" ".join(chr(0x4E00 + 40 * i + j) + "x" * i for j in range(6)) for i in range(300)]
    with pytest.raises(ClassicError, match="No word occurs in two texts"):
        fit_classic("logistic", pd.DataFrame({"text": text}), pd.Series([0, 1] * 150), params=QUICK)


@pytest.mark.parametrize(
    ("kind", "task", "params", "words"),
    [
        ("logistik", "classification", {}, "Did you mean .logistic."),
        ("ridge", "classification", {}, "does regression"),
        ("svm", "regression", {}, "does classification"),
        ("logistic", "classification", {"c": 1}, "no setting 'c'"),
        ("logistic", "classification", {"balance": "more"}, "balance is"),
        ("naive_bayes", "classification", {"embedding": 1.0}, "not negative"),
    ],
)
def test_wrong_kinds_and_settings_are_refused(kind, task, params, words):
    with pytest.raises(ClassicError, match=words):
        resolve_params(kind, task, params, 0)


def test_settings_reach_the_estimator_and_the_record():
    chosen, estimator = resolve_params("logistic", "classification", {"C": 0.5, "balance": "weights"}, 7)
    assert estimator.C == chosen["C"] == 0.5 and estimator.class_weight == chosen["class_weight"] == "balanced"
    assert resolve_params("svm", "classification", {"C": 9}, 0)[1].estimator.C == 9


def test_negation_is_marked_up_to_the_next_stop():
    assert mark_negation("NOT good, very good.") == "not not_good, very good."
    assert mark_negation("Café wasn't nice") == "cafe wasn't not_nice"
    assert mark_negation("nothing") == "nothing" and mark_negation("") == ""


@given(st.text(max_size=200))
@settings(max_examples=60, deadline=None)
def test_any_text_can_be_marked(text):
    assert isinstance(mark_negation(text), str)


def test_settings_of_text_change_the_features(messages):
    size = lambda **p: make_features({"text": "text"}, TEXT_DEFAULTS | p, 240).fit_transform(messages[["text"]]).shape[1]
    assert size(words=1, chars=0, thirds=False) < size(words=2, chars=0, thirds=False) < size(chars=0) < size()
    assert size(text_components=15) == 15


def test_the_order_of_classes_is_used():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 3))
    y = np.digitize(x[:, 0] + rng.normal(size=600) * 0.3, [-0.3, 0.3])
    model = Ordered().fit(x, y)
    proba = model.predict_proba(x)
    assert np.allclose(proba.sum(axis=1), 1) and (proba > 0).all()
    assert (model.predict(x) == y).mean() > 0.75
    two = Ordered().fit(x, y > 0)
    assert two.predict_proba(x).shape == (600, 2) and set(two.predict(x)) == {False, True}


@given(st.integers(0, 500))
@settings(max_examples=15, deadline=None)
def test_weights_never_make_the_rows_they_were_chosen_on_worse(seed):
    rng = np.random.default_rng(seed)
    classes = np.array(["a", "b", "c"])
    k = rng.choice(3, 200, p=[0.25, 0.1, 0.65])
    proba = rng.dirichlet([1, 0.5, 2], 200) * 0.7 + 0.3 * np.eye(3)[k]
    y = classes[k]
    score = lambda w: sum(f1_score(y, classes[(proba * w).argmax(1)], average=a, labels=classes) for a in ("weighted", "macro"))
    weights = best_weights(y, proba, classes)
    assert weights.max() == 1 and (weights > 0).all() and score(weights) >= score(np.ones(3)) - 1e-12


def test_a_shift_finds_more_of_the_rare_class_and_keeps_the_ranking():
    rng = np.random.default_rng(0)
    y = (rng.random(1500) < 0.1).astype(int)
    x = rng.normal(size=(1500, 1)) + y[:, None]
    plain, _ = resolve_params("logistic", "classification", None, 0)
    base = resolve_params("logistic", "classification", {"shift": False}, 0)[1].fit(x, y)
    shifted = PriorShift(resolve_params("logistic", "classification", None, 0)[1]).fit(x, y)
    recall = lambda m: (m.predict(x)[y == 1] == 1).mean()
    assert recall(shifted) > recall(base) and plain["shift"]
    assert (np.argsort(base.predict_proba(x)[:, 1]) == np.argsort(shifted.predict_proba(x)[:, 1])).mean() > 0.99
    tiny = PriorShift(resolve_params("logistic", "classification", None, 0)[1]).fit(x[:3], [0, 1, 1])
    assert (tiny.weights_ == 1).all(), "one row of a class is too few to hold any out"


@pytest.mark.parametrize(("how", "size"), [("under", 20), ("over", 70)])
def test_resampling_makes_classes_equal(how, size):
    y = pd.Series([0] * 70 + [1] * 20 + [2] * 30)
    data, labels = resample(pd.DataFrame({"row": range(120)}), y, how)
    assert set(labels.value_counts()) == {size} and (labels.to_numpy() == y.to_numpy()[data["row"]]).all()
    assert how == "over" or data["row"].is_unique
    assert how == "under" or set(data["row"]) == set(range(120)), "oversampling keeps every row"


def test_only_training_rows_are_resampled(messages):
    r = train_with(
        fit_classic, "logistic", messages, "label", features=["text"], params=QUICK | {"balance": "over", "shift": False}
    )
    assert len(r.y_true) == 48 and r.params["balance"] == "over"
    with pytest.raises(ClassicError, match="'under' or 'over'"):
        resample(messages, messages["label"], "sideways")


def test_grid_search_scores_every_combination(messages):
    found = grid_search("svm", messages[["text"]], messages["label"], {"C": [0.01, 1.0]}, params=QUICK)
    assert set(found.best_params_) == {"model__estimator__C"} and len(found.cv_results_["params"]) == 2
    with pytest.raises(ClassicError, match="no setting 'D'"):
        grid_search("svm", messages[["text"]], messages["label"], {"D": [1]})


def test_clusters_find_groups_that_are_there():
    rng = np.random.default_rng(0)
    topics = ["pizza pasta oven cheese", "haircut colour stylist salon", "brakes engine garage tyre"]
    texts = [" ".join(rng.choice(topics[i % 3].split(), 6)) for i in range(120)]
    found = cluster_texts(texts, k=(2, 3, 5))
    assert found.silhouette > 0.5 and found.tried.keys() == {2, 3, 5}
    three = cluster_texts(texts, k=3).labels
    assert all(len(set(three[i::3])) == 1 for i in range(3)) and len(set(three)) == 3
    for wrong, words in ((texts[:3], "cannot be put"), ([f"w{i}" for i in range(50)], "share no words")):
        with pytest.raises(ClassicError, match=words):
            cluster_texts(wrong, k=4)


def test_the_answer_is_not_among_the_inbox_features(messages):
    assert inbox_features(messages) == ["text", "word_count"]
    with pytest.raises(ClassicError, match="no column 'text'"):
        inbox_features(messages[["stars"]])


def test_a_model_can_be_sent_to_another_process(messages):
    model = fit_classic("ordinal", messages[["text"]], messages["label"], params=QUICK, seed=0)
    again = pickle.loads(pickle.dumps(model))
    assert np.array_equal(again.predict_proba(messages), model.predict_proba(messages))
    assert len(model.importance(7)) == 7 and model.importance(7).is_monotonic_decreasing
    assert build_pipeline("ordinal", {"text": "text"}, 240).steps[-1][0] == "model"
