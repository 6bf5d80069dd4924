"""Explanations add up where their method says so, point at what the model uses, beat chance, and are safe to show."""

import re
from html import unescape

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_lib.training.boosting import fit_boosting
from mlops_lib.training.classic import FittedModel, fit_classic
from mlops_lib.training.explain import (
    METHODS,
    ExplainError,
    Explanation,
    explain,
    faithfulness,
    importance,
    plot_faithfulness,
    plot_importance,
)
from mlops_lib.training.pytorch import fit_pytorch

GOOD, BAD = ("lovely", "great", "kind", "fresh"), ("rude", "cold", "dirty", "broken")
FILLER = ("the", "waiter", "brought", "our", "soup", "while", "we", "sat", "outside", "this", "evening", "again")


def letters(n: int = 240, seed: int = 0) -> tuple[pd.DataFrame, pd.Series]:
    "Messages of filler with one or two words that decide."
    rng = np.random.default_rng(seed)
    y = pd.Series(np.where(rng.random(n) < 0.5, "happy", "unhappy"), name="mood")
    texts = []
    for mood in y:
        words = [*rng.choice(FILLER, 7), *rng.choice(GOOD if mood == "happy" else BAD, 2)]
        texts.append(" ".join(rng.permutation(words)))
    return pd.DataFrame({"text": texts, "length": rng.normal(30, 5, n).round(1)}), y


def cells(n: int = 300, seed: int = 0) -> tuple[pd.DataFrame, pd.Series]:
    rng = np.random.default_rng(seed)
    data = pd.DataFrame(
        {"price": rng.normal(50, 15, n), "noise": rng.normal(size=n), "land": rng.choice(["AT", "CH"], n)}
    )
    data.loc[::9, "price"] = np.nan
    score = (data["price"].fillna(50) - 50) / 15 + (data["land"] == "CH") + rng.normal(0, 0.4, n)
    return data, pd.Series(np.where(score > 0.5, "late", "ok"), name="state")


@pytest.fixture(scope="module")
def words() -> FittedModel:
    data, y = letters()
    return fit_classic("logistic", data[["text"]], y)  # with character runs, thirds, pairs and the shift


@pytest.fixture(scope="module")
def network() -> FittedModel:
    data, y = letters()
    return fit_pytorch("pytorch_cnn", data[["text"]], y, params={"epochs": 3, "length": 32, "width": 16})


@pytest.fixture(scope="module")
def trees() -> FittedModel:
    return fit_boosting("xgboost", *cells(), params={"rounds": 60})


TEXT = "The waiter was rude, the soup was COLD; still: a lovely evening!"


@pytest.mark.parametrize("method", ["shap", "linear", "kernel"])
@pytest.mark.parametrize("label", ["happy", "unhappy"])
def test_shares_add_up_to_the_prediction(words, method, label):
    found = explain(words, TEXT, method, label)
    assert abs(found.gap) < 1e-6
    assert len(found.words) == len(found.weights) == 12
    assert found.words[4] == "the" and found.words[3] == "rude"  # without the comma
    assert [TEXT[a:b] for a, b in found.spans] == found.words


def test_two_labels_are_each_others_opposite(words):
    one, other = (explain(words, TEXT, "linear", label) for label in ("happy", "unhappy"))
    assert np.allclose(one.weights, -other.weights)
    assert one.prediction == pytest.approx(-other.prediction)
    assert one.unit == "log-odds"


def test_linear_shares_are_those_of_shap(words):
    import shap

    row = pd.DataFrame({"text": [TEXT]})
    X = words.pipeline[:-1].transform(row).toarray()
    inner = words.pipeline[-1].base_
    explainer = shap.LinearExplainer((inner.coef_[0], inner.intercept_[0]), shap.maskers.Independent(np.zeros_like(X)))
    found = explain(words, TEXT, "linear", "unhappy")
    assert found.weights.sum() + found.rest == pytest.approx(explainer.shap_values(X).sum(), abs=1e-5)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("trees", "gradients")])
def test_words_that_decide_weigh_most(words, method):
    found = explain(words, "we sat outside while the rude waiter brought dirty soup", method, "unhappy")
    weights = dict(zip(found.words, found.weights, strict=True))
    top = sorted(weights, key=weights.get)[-2:]
    assert set(top) == {"rude", "dirty"}


def test_lime_and_kernel_repeat_themselves_and_leave_the_generator_alone(words):
    np.random.seed(7)  # noqa: NPY002
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    for method in ("kernel", "lime"):
        assert (explain(words, TEXT, method, seed=3).weights == explain(words, TEXT, method, seed=3).weights).all()
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002


def test_few_words_are_exact(words):
    text = "rude lovely cold"
    found = explain(words, text, "kernel", "unhappy")
    value = lambda s: words.predict_proba(pd.DataFrame({"text": [s]}))[0, 1]
    lone = value("rude  ") - value("  ")
    pairs = (value("rude lovely ") - value(" lovely ") + value("rude  cold") - value("  cold")) / 6
    last = value(text) - value(" lovely cold")
    assert found.weights[0] == pytest.approx(lone / 3 + pairs + last / 3, abs=1e-6)


def test_one_word_has_everything(words):
    found = explain(words, "rude", "kernel")
    assert found.weights[0] == pytest.approx(found.prediction - found.base)


def test_gradients_are_complete(network):
    for label in ("happy", "unhappy"):
        found = explain(network, TEXT, "gradients", label)
        assert abs(found.gap) < 0.01 * max(1, abs(found.prediction - found.base))
        weights = dict(zip(found.words, found.weights, strict=True))
        assert (weights["lovely"] > weights["rude"]) == (label == "happy")


def test_gradients_of_a_bag_are_its_sum():
    data, y = letters()
    bag = fit_pytorch("pytorch_bag", data[["text"]], y, params={"epochs": 2, "length": 16})
    found = explain(bag, "rude rude waiter", "gradients")
    assert abs(found.gap) < 1e-4
    assert found.weights[0] == pytest.approx(found.weights[1], abs=1e-5)


def test_text_beyond_what_the_network_reads_has_no_weight(network):
    found = explain(network, "rude " + "the " * 40 + "lovely", "gradients")
    assert len(found.weights) == 42 and found.weights[-1] == 0


def test_gradients_leave_the_network_as_it_was(network):
    before = network.predict_proba(letters(20, 3)[0])
    explain(network, TEXT, "gradients")
    assert (network.predict_proba(letters(20, 3)[0]) == before).all()
    assert not network.pipeline[-1].network_.embedding._forward_hooks


def test_trees_are_exact_for_the_raw_columns(trees):
    data, _ = cells()
    for row in (0, 1, 9):
        found = explain(trees, data.iloc[row])
        assert found.method == "trees" and found.unit == "log-odds"
        assert abs(found.gap) < 1e-4
        assert [w.split(" = ")[0] for w in found.words] == ["price", "noise", "land"]


def test_several_classes_add_up_too():
    data, _ = cells(400)
    y = pd.Series(np.select([data["price"] < 40, data["price"] < 55], ["cheap", "middle"], "dear"))
    for kind, fit in (("xgboost", fit_boosting), ("logistic", fit_classic), ("forest", fit_classic)):
        model = fit(kind, data, y, params={"shift": False} if fit is fit_classic else {"rounds": 20})
        for label in model.classes:
            found = explain(model, data.iloc[[3]], label=label)
            assert abs(found.gap) < 1e-4, kind
            assert found.method == ("linear" if kind == "logistic" else "trees")


def test_a_regression_is_explained_in_its_own_unit():
    data, _ = cells()
    y = pd.Series(data["price"].fillna(50) * 2)
    model = fit_boosting("xgboost", data, y, task="regression", params={"rounds": 40})
    found = explain(model, data.iloc[1])
    assert found.unit == "value" and found.label is None
    assert found.base + found.weights.sum() == pytest.approx(model.predict(data.iloc[[1]])[0], abs=1e-2)
    with pytest.raises(ExplainError, match="no labels"):
        explain(model, data.iloc[1], label="late")


def test_any_model_of_a_table_is_explained_by_other_rows():
    data, y = cells()
    model = fit_classic("svm", data, y)
    found = explain(model, data.iloc[2], background=data)
    assert found.method == "kernel" and abs(found.gap) < 1e-6
    assert abs(dict(zip(model.features, found.weights, strict=True))["noise"]) < np.abs(found.weights).max()
    for method in ("kernel", "lime"):
        with pytest.raises(ExplainError, match="background="):
            explain(model, data.iloc[2], method)


def test_a_text_among_other_columns_needs_the_whole_row():
    data, y = letters()
    model = fit_classic("logistic", data, y, params={"chars": 0})
    with pytest.raises(ExplainError, match="length"):
        explain(model, "rude")
    found = explain(model, data.iloc[0])
    assert abs(found.gap) < 1e-6 and len(found.words) == 9
    assert explain(model, dict(data.iloc[0])).weights == pytest.approx(found.weights)


def test_what_cannot_be_explained_is_refused_in_words(words, network, trees):
    refused = [
        (words, "", {}, "no word to explain in ''"),
        (words, " ... !!! ", {}, "no word"),
        (words, None, {}, "NoneType"),
        (words, ["a", "b"], {}, "list"),
        (words, "fine", {"label": "sad"}, "'sad'.*'happy', 'unhappy'"),
        (words, "zzyzx qq", {"method": "linear"}, "none of the 2 words"),
        (words, "fine", {"method": "sharp"}, "'sharp'.*shap"),
        (words, "fine", {"method": "gradients"}, "LogisticRegression has no gradients"),
        (words, "fine", {"method": "trees"}, "table"),
        (network, "zzyzx qq", {"method": "gradients"}, "none of the 2 words"),
        (network, "fine", {"method": "linear"}, "logistic"),
        (trees, "a text", {}, "reads no text"),
        (trees, cells()[0].head(2), {}, "got 2"),
        (trees, {"price": 3.0}, {}, "noise"),
        (trees, cells()[0].iloc[0], {"method": "gradients"}, "no gradients"),
    ]
    for model, text, options, message in refused:
        with pytest.raises(ExplainError, match=message):
            explain(model, text, **options)


def test_a_missing_text_is_no_text(words):
    with pytest.raises(ExplainError, match="no word to explain"):
        explain(words, {"text": None})


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=60))
def test_what_is_shown_is_the_text_and_nothing_else(text):
    from mlops_lib.training.explain import _find_words

    spans = _find_words(text)
    made = Explanation([text[a:b] for a, b in spans], np.linspace(-1, 1, len(spans)), 0.1, 0.9, "<b>", "lime", "probability", text=text, spans=spans)  # fmt: skip
    page = made._repr_html_()
    tags = set(re.findall(r"</?([a-zA-Z]+)", page))
    assert tags <= {"div", "p", "b", "mark", "small"}
    body = re.search(r"padding:.4em\">(.*)</p><p><small>", page, re.DOTALL)[1]
    assert unescape(re.sub(r"</?mark[^>]*>", "", body)) == text


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=80), st.data())
def test_deleting_words_leaves_the_rest(text, data):
    from mlops_lib.training.explain import _find_words, _keep

    spans = _find_words(text)
    assert len(spans) == sum(1 for piece in text.split() if re.search(r"\w", piece))
    keep = data.draw(st.lists(st.booleans(), min_size=len(spans), max_size=len(spans)))
    assert _keep(text, spans, [True] * len(spans)) == text
    left = _keep(text, spans, keep)
    assert len(left) == len(text) - sum(b - a for (a, b), k in zip(spans, keep, strict=True) if not k)


def test_hostile_text_is_escaped_everywhere(trees, words):
    evil = "<img src=x onerror=alert(1)> rude\"><script>alert('x')</script> & more"
    page = explain(words, evil)._repr_html_()
    assert "<script" not in page and "<img" not in page and "onerror=alert(1)>" not in page
    named = fit_boosting("xgboost", cells()[0].rename(columns={"price": "<script>"}), cells()[1], params={"rounds": 5})
    row = cells()[0].rename(columns={"price": "<script>"}).assign(land="<img>").iloc[0]
    assert "<script" not in (page := explain(named, row)._repr_html_()) and "<img" not in page


def test_colour_is_not_the_only_sign(words):
    page = explain(words, TEXT, label="unhappy")._repr_html_()
    assert "solid" in page and "dashed" in page and "For:" in page and "Against:" in page
    assert "lovely" in page.split("Against:")[1]


def test_contrast_of_letters_and_background_is_enough():
    from mlops_lib.training.explain import _mark

    def luminance(rgb):
        c = np.array(rgb) / 255
        c = np.where(c <= 0.03928, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        return float(c @ [0.2126, 0.7152, 0.0722])

    for weight in (1.0, -1.0):
        rgb = [int(v) for v in re.search(r"background:rgb\((\d+),(\d+),(\d+)\)", _mark("x", weight, 1.0)).groups()]
        assert (luminance(rgb) + 0.05) / 0.05 > 4.5  # black letters: WCAG AA


def test_columns_that_are_used_matter_and_noise_does_not(trees):
    new, y = cells(300, seed=5)
    table = importance(trees, new, y)
    assert list(table.columns) == ["drop", "sd", "low", "high"]
    assert table.index[0] == "price" and table.loc["price", "drop"] > 0.1 > abs(table.loc["noise", "drop"])
    assert (table["low"] <= table["drop"]).all() and (table["drop"] <= table["high"]).all()
    pd.testing.assert_frame_equal(table, importance(trees, new, y))


def test_metrics_where_less_is_better_are_turned_round(trees):
    new, y = cells(300, seed=5)
    assert importance(trees, new, y, metric="log_loss").loc["price", "drop"] > 0.1
    assert importance(trees, new, y, metric="auc_roc").index[0] == "price"
    with pytest.raises(ExplainError, match="'f2'.*f1_weighted"):
        importance(trees, new, y, metric="f2")


def test_regressions_have_importance():
    data, _ = cells()
    y = pd.Series(data["price"].fillna(50) * 2)
    model = fit_boosting("xgboost", data, y, task="regression", params={"rounds": 40})
    assert importance(model, data, y).index[0] == "price"
    assert set(importance(model, data, y, of="blocks").index) == {"number", "category"}


def test_words_and_blocks(words):
    new, y = letters(200, seed=4)
    table = importance(words, new[["text"]], y, of="words", top=6, metric="log_loss")
    assert set(table.index) <= {*GOOD, *BAD} and (table["drop"] > 0).all()
    blocks = importance(words, new[["text"]], y, of="blocks")
    assert blocks.index.name == "block" and {"text: words", "text: chars", "text: shape"} <= set(blocks.index)
    assert plot_importance(table).get_xlabel().startswith("lost")


def test_importance_refuses_what_it_cannot_do(words, trees):
    new, y = letters(30)
    for call, message in [
        (lambda: importance(words, new, y, of="letters"), "'letters'"),
        (lambda: importance(words, new.head(0), y.head(0)), "0 rows"),
        (lambda: importance(words, new, y.head(3)), "30 rows and 3"),
        (lambda: importance(trees, *cells(40), of="words"), "reads no text"),
    ]:
        with pytest.raises(ExplainError, match=message):
            call()


def test_explanations_beat_random_deletion(words, network):
    new = letters(8, seed=8)[0][["text"]]
    for model, methods in ((words, ("shap", "kernel", "lime", "removal")), (network, ("gradients", "kernel"))):
        curves = faithfulness(model, new, methods, steps=4)
        assert curves.index.tolist() == [0, 0.25, 0.5, 0.75, 1]
        assert curves.iloc[0].round(6).nunique() == 1 and curves.iloc[-1].round(6).nunique() == 1
        assert (curves[list(methods)].mean() < curves["random"].mean() - 0.03).all()
    assert len(plot_faithfulness(curves).lines) == 3
    with pytest.raises(ExplainError, match="no row"):
        faithfulness(words, new.head(0))


def test_letters_that_fall_apart_are_sampled_instead(words):
    text = "don´t rude waiter"  # the accent becomes a blank when it is taken off
    assert explain(words, text).method == "kernel"
    with pytest.raises(ExplainError, match="shared out"):
        explain(words, text, "linear")
