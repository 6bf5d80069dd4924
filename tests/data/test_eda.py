"""EDA functions against hand-made tables with known answers, and against scipy; plots are complete and readable."""

import numpy as np
import pandas as pd
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from scipy import stats

from mlops_lib.data import eda
from mlops_lib.data.synthetic import generate_inbox
from mlops_lib.data.tables import add_label


@pytest.fixture(scope="module")
def inbox() -> pd.DataFrame:
    raw = generate_inbox(800, seed=4).review
    keep = raw["stars"].between(1, 5) & raw["text"].notna() & (raw["date"] < pd.Timestamp("2030-01-01"))
    return add_label(raw[keep]).reset_index(drop=True)


def test_profile_tells_kinds_gaps_and_extremes() -> None:
    df = pd.DataFrame({
        "n": [1.0, 2.0, None, -5.0] * 10, "flag": [True, False] * 20, "day": pd.date_range("2024-01-01", periods=40),
        "kind": ["a", "b"] * 20, "key": [f"k{i}" for i in range(40)], "words": [f"some text {i}" for i in range(40)],
        "nested": [{"a": 1}] * 40, "empty": [None] * 40,
    })
    p = eda.profile(df)
    kinds = {"n": "number", "flag": "flag", "day": "date", "kind": "category", "key": "id", "words": "text"}
    assert p.table["kind"].to_dict() | kinds == p.table["kind"].to_dict()
    assert (p.table.loc["n", "missing"], p.table.loc["n", "low"], p.table.loc["n", "high"]) == (0.25, "-5", "2")
    assert p.table.loc["day", "high"] == "2024-02-09"
    assert p.table.loc["empty", "missing"] == 1.0
    assert p.table.loc["kind", "unique"] == 2
    html = p._repr_html_()
    assert html.count("<svg") == len(df.columns)


def test_profile_escapes_what_it_shows() -> None:
    assert "<script>" not in eda.profile(pd.DataFrame({"<script>": ["<script> alert"] * 3}))._repr_html_()


def test_profile_of_no_rows() -> None:
    p = eda.profile(pd.DataFrame({"a": pd.Series([], dtype="float64"), "b": pd.Series([], dtype="str")}))
    assert p.rows == 0
    assert "0 rows" in p._repr_html_()


def test_missingness_counts_gaps_that_stand_alone() -> None:
    table = eda.missingness(pd.DataFrame({"a": [1, None, None], "b": [None, None, 3], "c": [1, 2, 3]}))
    assert table.to_dict("index") == {
        "a": {"missing": 2, "share": 2 / 3, "alone": 1}, "b": {"missing": 2, "share": 2 / 3, "alone": 1}
    }


def test_balance_keeps_the_order_of_the_classes() -> None:
    table = eda.class_balance(pd.DataFrame({"label": [2, 2, 0, 1]}))
    assert table.index.tolist() == ["negative", "neutral", "positive"]
    assert table["share"].tolist() == [0.25, 0.25, 0.5]
    assert eda.class_balance(pd.DataFrame({"label": [2, 2]})).index.tolist() == ["positive"]
    other = eda.class_balance(pd.DataFrame({"team": ["b", "a", "b"]}), "team")
    assert other["rows"].to_dict() == {"b": 2, "a": 1}
    assert eda.class_names(pd.Series([7, 8])).tolist() == ["7", "8"], "numbers that are no labels stay numbers"


def test_text_is_measured() -> None:
    df = pd.DataFrame({"text": ["ABC def!", "", "é É"], "label": [0, 0, 2]}, index=[5, 6, 7])
    m = eda.measure_text(df)
    assert m.index.tolist() == [5, 6, 7]
    assert m["characters"].tolist() == [8, 0, 3]
    assert m["words"].tolist() == [2, 0, 2]
    assert m["exclamations"].tolist() == [1, 0, 0]
    assert m["capitals"].tolist() == [0.5, 0.0, 0.5]
    assert eda.text_statistics(df).loc["negative", "messages"] == 2


def test_words_are_counted_once_for_each_message() -> None:
    df = pd.DataFrame({"text": ["Bad bad BAD", "don't be bad", "good"], "label": [0, 0, 2]})
    counts = eda.count_words(df)
    assert counts.loc["bad"].to_dict() == {"negative": 2, "positive": 0}
    assert counts.loc["don't", "negative"] == 1


def test_log_odds_as_in_the_paper() -> None:
    df = pd.DataFrame({"text": ["x y", "x", "y z", "z", "z"], "label": [0, 0, 2, 2, 2]})
    found = eda.distinguishing_words(df, k=3, prior=10).set_index(["class", "word"])["z"]
    counts = {"x": (2, 0), "y": (1, 1), "z": (0, 3)}
    n0, n2, total = 3, 4, 7
    for word, (y0, y2) in counts.items():
        a = 10 * (y0 + y2) / total
        delta = np.log((y0 + a) / (n0 + 10 - y0 - a)) - np.log((y2 + a) / (n2 + 10 - y2 - a))
        z = delta / np.sqrt(1 / (y0 + a) + 1 / (y2 + a))
        assert found["negative", word] == pytest.approx(z)
        assert found["positive", word] == pytest.approx(-z), "with two classes, one mirrors the other"


def test_a_rare_word_does_not_win() -> None:
    texts = ["awful service"] * 60 + ["lovely service"] * 60 + ["awful hapax"]
    found = eda.distinguishing_words(pd.DataFrame({"text": texts, "label": [0] * 60 + [2] * 60 + [0]}), k=1)
    assert found["word"].tolist() == ["awful", "lovely"]


numbers = st.lists(st.integers(0, 6), min_size=30, max_size=60)


@settings(max_examples=40, deadline=None)
@given(numbers, st.integers(0, 2**16))
def test_association_is_symmetric_and_bounded(values: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    a = pd.Series(values)
    b = pd.Series(rng.integers(0, 4, len(a)))
    for left, right in ((a, b), (a.astype("str"), b), (a.astype("str"), b.astype("str"))):
        one, two = eda.association(left, right), eda.association(right, left)
        assert one == pytest.approx(two, nan_ok=True)
        assert np.isnan(one) or -1 - 1e-9 <= one <= 1 + 1e-9


def test_association_of_known_pairs() -> None:
    rng = np.random.default_rng(0)
    a, b = pd.Series(rng.normal(size=300)), pd.Series(rng.normal(size=300))
    assert eda.association(a, a + b) == pytest.approx(stats.spearmanr(a, a + b).statistic)
    group = pd.Series(rng.choice(list("pqr"), 300))
    assert eda.association(group, group) == pytest.approx(1)
    assert eda.association(group, group.map({"p": 1.0, "q": 2.0, "r": 3.0})) == pytest.approx(1)
    assert eda.association(group, b) < 0.2
    assert np.isnan(eda.association(a, pd.Series([1.0] * 300))), "a constant goes with nothing"
    assert eda.association(pd.Series([1, 2, None, 4]), pd.Series([2, 4, 9, 8])) == pytest.approx(1), "gaps are left out"


def test_cramers_v_against_scipy() -> None:
    rng = np.random.default_rng(1)
    a = pd.Series(rng.choice(list("xyz"), 2000))
    b = a.where(rng.random(2000) < 0.5, pd.Series(rng.choice(list("xyz"), 2000)))
    plain = stats.contingency.association(pd.crosstab(a, b).to_numpy(), method="cramer")
    assert eda.association(a, b) == pytest.approx(plain, abs=0.01), "the correction is small for many rows"


def test_correlations_choose_columns() -> None:
    df = pd.DataFrame({"n": range(60), "k": ["a", "b", "c"] * 20, "key": [f"i{i}" for i in range(60)], "t": ["x y z"] * 60})
    table = eda.correlations(df)
    assert {"n", "k"} <= set(table.index)
    assert "key" not in table.index
    assert np.allclose(np.diag(table), 1)


def test_over_time_sums_up(inbox: pd.DataFrame) -> None:
    months = eda.over_time(inbox)
    assert months["messages"].sum() == len(inbox)
    shares = months[["negative", "neutral", "positive"]].sum(axis=1)
    assert np.allclose(shares[months["messages"] > 0], 1)
    first = inbox[inbox["date"].dt.to_period("M") == months.index[0].to_period("M")]
    assert months["stars"].iloc[0] == pytest.approx(first["stars"].mean())


def test_message_keys() -> None:
    long = "a long story " * 10
    df = pd.DataFrame({
        "user_id": ["u", "u", "v", "v", None, "w", "w"], "business_id": ["b"] * 7,
        "text": ["Hi!", "hi", "hi", long, long.upper(), None, " "],
    })
    keys = eda.message_keys(df).to_list()
    assert keys[0] == keys[1] != keys[2], "a short text belongs to its user"
    assert keys[3] == keys[4], "a long text is a copy whoever sent it"
    assert keys[5] is None
    assert keys[6] is None
    assert eda.message_keys(pl.from_pandas(df)).to_list() == keys


def test_warnings_name_what_is_there(inbox: pd.DataFrame) -> None:
    found = eda.warn(inbox)["warning"].tolist()
    assert "stars gives label away" in found
    assert "repeated messages" in found
    clean = inbox.drop(columns="stars").drop_duplicates("user_id").reset_index(drop=True)
    assert eda.warn(clean).empty
    twice = pd.concat([clean.head(1), clean.head(1).assign(label=(clean["label"].iloc[0] + 1) % 3), clean.tail(50)], ignore_index=True)
    assert "copies with different labels" in eda.warn(twice)["warning"].tolist()


def test_a_column_that_predicts_is_found() -> None:
    rng = np.random.default_rng(2)
    target = pd.Series(rng.integers(0, 3, 600))
    assert eda.accuracy_alone(target * 10.0 + rng.random(600), target) > 0.9
    assert eda.accuracy_alone(pd.Series(rng.random(600)), target) < 0.5
    assert eda.accuracy_alone(pd.Series([f"i{i}" for i in range(600)]), target) < 0.5, "an id is not a giveaway"


def test_plots_have_title_and_labels(inbox: pd.DataFrame) -> None:
    periods = eda.over_time(inbox)
    drawn = [
        eda.plot_balance(eda.class_balance(inbox)), eda.plot_lengths(inbox), eda.plot_volume(periods),
        eda.plot_words(eda.distinguishing_words(inbox, k=4)), eda.plot_ratings(periods),
        eda.plot_correlations(eda.correlations(inbox, ["stars", "useful", "label"])),
    ]
    for ax in drawn:
        assert ax.get_title()
        assert ax.get_xlabel()
        assert ax.get_ylabel()
        ax.figure.canvas.draw()
    _, mine = plt.subplots()
    assert eda.plot_balance(eda.class_balance(inbox), mine) is mine, "an Axes that is given is drawn on"
    plt.close("all")


def test_classes_keep_their_colours(inbox: pd.DataFrame) -> None:
    few = inbox[inbox["label"] != 1]
    ax = eda.plot_balance(eda.class_balance(few))
    colours = [patch.get_facecolor()[:3] for patch in ax.patches]
    expected = [plt.matplotlib.colors.to_rgb(eda.COLORS[c]) for c in ("negative", "positive")]
    assert np.allclose(colours, expected)
    plt.close("all")
