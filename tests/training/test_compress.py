"""A converted model answers as the original or not at all; smaller models are really smaller; the comparison is honest."""

import joblib
import numpy as np
import onnx
import pandas as pd
import pytest

from mlops_lib.training import compress
from mlops_lib.training.boosting import fit_boosting
from mlops_lib.training.classic import ClassicError, FittedModel, fit_classic
from mlops_lib.training.compress import (
    STUDENT,
    CompressError,
    FastModel,
    compare_models,
    distill,
    fast_model,
    parity,
    plot_tradeoff,
    prune,
    quantize,
    size_kb,
    to_onnx,
)
from mlops_lib.training.pytorch import fit_pytorch

GOOD, BAD, MEH = ("lovely", "great", "kind"), ("rude", "cold", "dirty"), ("plain", "usual", "average")
FILLER = ("the", "waiter", "brought", "our", "soup", "while", "we", "sat", "outside", "this", "evening", "again", "not")


def letters(n: int = 260, seed: int = 0) -> tuple[pd.DataFrame, pd.Series]:
    rng = np.random.default_rng(seed)
    y = pd.Series(rng.integers(0, 3, n), name="mood")
    words = lambda k: rng.permutation([*rng.choice(FILLER, 9), *rng.choice((BAD, MEH, GOOD)[k], 2)])
    texts = [" ".join(words(k)) + rng.choice(["!", ".", "?!", ""]) for k in y]
    data = pd.DataFrame({"text": texts, "length": rng.normal(30, 5, n).round(1), "land": rng.choice(["AT", "CH", "DE"], n)})
    data.loc[::13, "length"] = np.nan
    return data, y


def shop(n: int = 300, seed: int = 0) -> tuple[pd.DataFrame, pd.Series]:
    "A number with gaps, a whole number, a category, one of many values, a date, a yes or no."
    rng = np.random.default_rng(seed)
    data = pd.DataFrame(
        {
            "price": rng.normal(50, 15, n),
            "items": rng.integers(1, 9, n),
            "land": rng.choice(["AT", "CH", "DE"], n),
            "shop": rng.choice([f"s{i}" for i in range(60)], n),
            "day": pd.Timestamp("2026-01-01") + pd.to_timedelta(rng.integers(0, 300, n), "D"),
            "gift": rng.random(n) < 0.3,
        }
    )
    score = (data["price"] - 50) / 15 + (data["land"] == "CH") + rng.normal(0, 0.5, n)
    data.loc[::11, "price"] = np.nan
    data.loc[::17, "land"] = None
    return data, pd.Series(np.where(score > 0.3, "late", "ok"), name="state")


ODD_TEXTS = ["", "   ", "!!!", "Ärger über dirty soup", "don´t", "not rude, lovely", "unknown qwzx", "ﬁne ½", "a\nb\tc", "x" * 3000]


def odd_letters() -> pd.DataFrame:
    return pd.DataFrame(
        {"text": [*ODD_TEXTS, None], "length": [np.nan, np.inf, -np.inf, 0, 1e9, -5, 3, 3, 3, 3, 3], "land": ["AT", None, "XX", *["CH"] * 8]}
    )  # fmt: skip


def odd_shop() -> pd.DataFrame:
    data = shop()[0].head(4).copy()
    data["price"], data["items"] = [np.nan, np.inf, 1e12, -3.0], [1, 100, 0, 5]
    data["land"], data["shop"] = ["XX", None, "", "AT"], ["s1", "new", None, "s2"]
    return data


KINDS = {
    "logistic": (fit_classic, {"chars": 3}),
    "ordinal": (fit_classic, {"chars": 3}),
    "svm": (fit_classic, {"chars": 0}),
    "naive_bayes": (fit_classic, {"chars": 0}),
    "forest": (fit_classic, {"chars": 0, "n_estimators": 20, "text_components": 15, "shift": False}),
    "xgboost": (fit_boosting, {"rounds": 30, "text_components": 15}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [["text"], ["text", "length", "land"]], ids=["text", "mixed"])
def test_text_models_convert_and_answer_the_same(kind, columns):
    fit, params = KINDS[kind]
    data, y = letters()
    model = fit(kind, data[columns], y, params=params)
    rows = pd.concat([letters(60, 1)[0], odd_letters()], ignore_index=True)
    fast = fast_model(model, rows)
    assert fast.runtime == "onnx", fast.reason
    assert "71 of 71" in fast.reason
    found = parity(model, fast, rows)
    assert found.passed and found.delta <= 1e-5
    assert np.allclose(fast.predict_proba(rows).sum(axis=1), 1, atol=1e-12)
    assert fast.classes == model.classes == [0, 1, 2]


@pytest.mark.parametrize("kind", ["logistic", "svm", "forest", "xgboost", "naive_bayes"])
def test_tables_convert_and_answer_the_same(kind):
    data, y = shop()
    fit = KINDS[kind][0]
    params = {"forest": {"n_estimators": 20}, "xgboost": {"rounds": 30}}.get(kind)
    model = fit(kind, data, y, params=params)
    rows = pd.concat([shop(80, 1)[0], odd_shop()], ignore_index=True)
    fast = fast_model(model, rows)
    assert fast.runtime == "onnx", fast.reason
    assert (fast.predict(rows) == model.predict(rows)).all()
    assert np.abs(fast.predict_proba(rows) - model.predict_proba(rows)).max() <= 1e-5


@pytest.mark.parametrize("kind", ["ridge", "forest_regressor", "xgboost"])
def test_regressions_convert(kind):
    data, _ = shop()
    y = pd.Series(data["price"].fillna(50) * 2 + data["items"])
    fit = fit_boosting if kind == "xgboost" else fit_classic
    params = {"rounds": 30} if kind == "xgboost" else {"n_estimators": 15} if "forest" in kind else None
    model = fit(kind, data, y, task="regression", params=params)
    fast = fast_model(model, data)
    assert fast.runtime == "onnx", fast.reason
    assert fast.predict(data) == pytest.approx(model.predict(data), rel=1e-4)
    with pytest.raises(ClassicError, match="no probabilities"):
        fast.predict_proba(data)


@pytest.mark.parametrize("kind", ["pytorch_bag", "pytorch_cnn"])
def test_networks_convert_and_shrink(kind):
    data, y = letters()
    model = fit_pytorch(kind, data[["text"]], y, params={"epochs": 2, "length": 20, "width": 256})
    before = model.predict_proba(data)
    rows = pd.concat([data.head(40), odd_letters()], ignore_index=True)
    fast = fast_model(model, rows)
    assert fast.runtime == "onnx", fast.reason
    assert (model.predict_proba(data) == before).all(), "exporting leaves the network as it was"
    small = quantize(fast)
    assert small.runtime == "onnx" and "int8" in small.reason
    assert size_kb(small) < size_kb(fast) and len(small.graph) < 0.6 * len(fast.graph)
    assert np.abs(small.predict_proba(rows) - fast.predict_proba(rows)).max() < 0.1


@pytest.fixture(scope="module")
def words() -> FittedModel:
    data, y = letters()
    return fit_classic("ordinal", data[["text"]], y)


@pytest.fixture(scope="module")
def fast(words) -> FastModel:
    return fast_model(words, letters(60, 1)[0])


def test_rows_come_as_a_frame_or_as_mappings(words, fast):
    data = letters(5, 2)[0]
    wanted = words.predict_proba(data)
    for rows in (data, data[["land", "text"]], data.to_dict("records"), tuple(data.to_dict("records"))):
        assert np.abs(fast.predict_proba(rows) - wanted).max() < 1e-5
        assert (fast.predict(rows) == words.predict(data)).all()
    one = fast.predict_proba([{"text": data["text"].iloc[3]}])
    assert one.shape == (1, 3) and np.abs(one[0] - wanted[3]).max() < 1e-5


def test_rows_among_others_answer_as_alone(fast):
    data = pd.concat([letters(20, 2)[0], odd_letters()], ignore_index=True)
    together = fast.predict_proba(data)
    alone = np.vstack([fast.predict_proba(data.iloc[[i]]) for i in range(len(data))])
    assert np.abs(together - alone).max() < 1e-6


@pytest.mark.parametrize("rows", [letters(0)[0], []], ids=["frame", "list"])
def test_no_rows_give_no_answers(words, fast, rows):
    for model in (fast, FastModel(words)):
        assert model.predict(rows).shape == (0,) and model.predict_proba(rows).shape == (0, 3)


def test_a_missing_column_is_named(fast):
    for rows in (pd.DataFrame({"txt": ["a"]}), [{"txt": "a"}]):
        with pytest.raises(ClassicError, match="text"):
            fast.predict(rows)
    with pytest.raises(ClassicError, match="ndarray"):
        fast.predict_proba(np.arange(3))


def test_what_does_not_convert_stays_native_with_the_reason():
    data, y = shop()
    for model in (fit_classic("histgb", data, y, params={"max_iter": 5, "shift": False}), fit_classic("baseline", data, y)):
        fast = fast_model(model, data)
        name = type(model.pipeline[-1]).__name__
        assert fast.runtime == "native" and fast.graph is None
        assert name in fast.reason and "no ONNX form" in fast.reason
        assert (fast.predict_proba(data) == model.predict_proba(data)).all()
        assert (fast.predict(data.to_dict("records")) == model.predict(data)).all()
        with pytest.raises(CompressError, match=name):
            to_onnx(model)
        with pytest.raises(CompressError, match="native"):
            quantize(fast)


def test_the_gate_refuses_other_probabilities(words):
    strict = fast_model(words, letters(40, 1)[0], tolerance=1e-12)
    assert strict.runtime == "native" and "gate" in strict.reason and "40 of 40" in strict.reason


def test_the_gate_refuses_other_labels(words, monkeypatch):
    real = compress._linear

    def turned(model):
        found = real(model)
        return compress._Linear(-found.weights, found.start, found.head)

    monkeypatch.setattr(compress, "_linear", turned)
    refused = fast_model(words, letters(40, 1)[0])
    assert refused.runtime == "native"
    assert (refused.predict(letters(40, 1)[0]) == words.predict(letters(40, 1)[0])).all()


def test_a_reader_that_errs_gives_way_to_the_fitted_features(words, monkeypatch):
    monkeypatch.setattr(compress, "_lean_shape", lambda part: lambda texts: np.zeros((len(texts), 5)))
    second = fast_model(words, letters(40, 1)[0])
    assert second.runtime == "onnx" and "fitted pipeline" in second.reason
    assert parity(words, second, letters(40, 1)[0]).passed


def test_not_a_number_never_passes(words):
    class Broken:
        classes = words.classes

        def predict(self, rows):
            return words.predict(rows)

        def predict_proba(self, rows):
            return words.predict_proba(rows) * np.nan

    assert not parity(words, Broken(), letters(10, 1)[0], tolerance=1e9).passed


def test_the_gate_needs_rows_and_a_model(words):
    for call in (lambda: fast_model(words, letters(0)[0]), lambda: parity(words, words, letters(0)[0])):
        with pytest.raises(CompressError, match="none"):
            call()
    with pytest.raises(CompressError, match="str"):
        to_onnx("model")


def test_the_file_is_valid_onnx_with_one_output(words):
    model = onnx.load_from_string(to_onnx(words))
    onnx.checker.check_model(model)
    assert [o.name for o in model.graph.output] == ["out"]
    assert {i.name for i in model.graph.input} == {"ids", "values"}


def test_pruning_keeps_what_weighs_most(words):
    data, y = letters()
    rows = letters(100, 4)
    whole = prune(words, 1.0)
    assert np.abs(whole.predict_proba(data) - words.predict_proba(data)).max() < 1e-12
    small = prune(words, 0.1, data[["text"]], y)
    assert size_kb(small) < size_kb(words) / 2
    assert (small.predict(rows[0]) == rows[1]).mean() > 0.9
    names = {n.split("__")[-1] for n in small.pipeline[:-1].get_feature_names_out()}
    assert {*GOOD, *BAD} <= names
    assert len(small.pipeline[:-1].get_feature_names_out()) == small.pipeline[-1].base_.coef_.shape[1]
    assert fast_model(small, data).runtime == "onnx"
    copy = prune(words, 0.5)
    assert len(words.pipeline[:-1].get_feature_names_out()) > len(copy.pipeline[:-1].get_feature_names_out())


def test_pruning_with_columns_beside_the_text():
    data, y = letters()
    model = fit_classic("logistic", data, y, params={"shift": False})
    small = prune(model, 0.2)
    assert (small.predict(data) == y).mean() > 0.8
    assert {"number__length", "category__land_AT"} <= set(small.pipeline[:-1].get_feature_names_out())
    assert small.importance(5).size == 5 and fast_model(small, data).runtime == "onnx"


def test_a_pruned_model_survives_a_file(words, tmp_path):
    small = prune(words, 0.2)
    joblib.dump(small, tmp_path / "m")
    assert (joblib.load(tmp_path / "m").predict(letters(30, 3)[0]) == small.predict(letters(30, 3)[0])).all()


def test_pruning_refuses_what_it_cannot_do(words):
    for keep in (0, 1.1, -1):
        with pytest.raises(CompressError, match=str(keep)):
            prune(words, keep)
    forest = fit_classic("forest", *shop(), params={"n_estimators": 3})
    with pytest.raises(CompressError, match="RandomForest"):
        prune(forest, 0.5)


def test_a_student_agrees_with_its_teacher_and_is_smaller(words):
    student = distill(words, letters(400, 5)[0])
    new, y = letters(150, 6)
    assert (student.predict(new) == words.predict(new)).mean() > 0.9
    assert size_kb(student) < size_kb(words) / 2 and student.classes == words.classes
    assert fast_model(student, new).runtime == "onnx"
    assert student.params["max_features"] == STUDENT["max_features"]


def test_soft_labels_carry_doubt():
    "A student of probabilities is as unsure as its teacher, where hard labels would have made it sure."
    data, y = letters(300)

    class Unsure:
        classes, features, task = [0, 1, 2], ["text"], "classification"

        def predict_proba(self, rows):
            proba = np.full((len(rows), 3), 0.2)
            bad = rows["text"].str.contains("rude|cold|dirty").to_numpy()
            proba[np.arange(len(rows)), np.where(bad, 0, 2)] = 0.6
            return proba

    student = distill(Unsure(), data)
    assert 0.5 < np.sort(student.predict_proba(data), axis=1)[:, -1].mean() < 0.7


def test_distillation_refuses_what_it_cannot_do(words):
    regression = fit_classic("ridge", shop()[0], pd.Series(shop()[0]["items"].astype(float)), task="regression")
    for call, message in [
        (lambda: distill(words, letters(3)[0]), "got 3"),
        (lambda: distill(regression, shop()[0]), "values"),
        (lambda: distill(words, letters(50)[0], params={"wrds": 2}), "'wrds'"),
        (lambda: distill(words, pd.DataFrame({"text": [f"a rude letter number {i} of many" for i in range(30)]})), "nothing to learn"),
    ]:
        with pytest.raises(CompressError, match=message):
            call()


def test_the_comparison_has_quality_size_and_time(words, fast):
    new, y = letters(80, 7)
    table = compare_models({"native": words, "onnx": fast}, new, y, times=3)
    assert list(table.index) == ["native", "onnx"] and list(table["runtime"]) == ["native", "onnx"]
    assert {"accuracy", "f1_weighted", "f1_macro", "size_kb", "one_ms", "batch_ms"} <= set(table)
    assert table.loc["native", "accuracy"] == table.loc["onnx", "accuracy"] == (words.predict(new) == y).mean()
    assert (table[["size_kb", "one_ms", "batch_ms"]] > 0).all(axis=None)
    assert len(plot_tradeoff(table)) == 2
    for bad in ({}, {"native": words}):
        with pytest.raises(CompressError, match="are needed"):
            compare_models(bad, new, y.head(3 if bad else 80))


def test_explanations_take_a_fast_model(fast):
    from mlops_lib.training.explain import explain

    found = explain(fast, "the rude waiter brought dirty soup", label=0)
    assert found.method == "kernel" and abs(found.gap) < 1e-6
    assert set(found.top(2).index) == {"rude", "dirty"}


def test_a_network_that_is_not_converted_answers_itself():
    from sklearn.dummy import DummyClassifier
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import FunctionTransformer

    from mlops_lib.data.tokens import join_texts

    data, y = letters(60)
    steps = [("texts", FunctionTransformer(join_texts)), ("model", DummyClassifier(strategy="prior"))]
    model = FittedModel(Pipeline(steps).fit(data[["text"]], y), ["text"], "classification", [0, 1, 2], {}, {"text": "text"})
    fast = fast_model(model, data)
    assert fast.runtime == "native" and "DummyClassifier has no ONNX form" in fast.reason
    assert (fast.predict_proba(data.to_dict("records")) == model.predict_proba(data)).all()
