"""Laws of cleaning and features: idempotent, the same by row, batch and table, equal to a plain Python version."""

import html.entities
import re
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_lib.data import features as f
from mlops_lib.data.features import (
    FEATURES,
    CategoryEncoder,
    FeatureError,
    category_bucket,
    clean_text,
    create_features,
    main_category,
    select_features,
)

PIECES = [
    "<b>", "</b>", "<br/>", "<", ">", "<!--", "-->", "<script>", "</script>", "&amp;", "&lt;", "&gt;", "&", "amp;", "lt;",
    "&#38;", "&#x3c;", "&eacute;", "http://", "https://x.org/a?b=c", "www.", "a@b.co", "@", ".com", "555-123-4567",
    "(555) ", "123-4567", "+49 170 123", "4567", "\u00e9", "e\u0301", "\ufb01", "\uff1c", "\uff21", "\u200b", "\u2019",
    "\u2026", "\u00a0", "\x00", "\x1f", "\x85", "\t", "\r\n", "  ", " ", "!!!!!", "aaaaaa", "AAAA", "1000000", "not", "don't",
    "but", "I", "[url]", "\u0130", "\u00df", "\U0001f600", "\u2028", "\ufeff", ".", "?", "-----",
]
texts = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
inbox_row = st.fixed_dictionaries({
    "text": st.none() | texts,
    "business_id": st.sampled_from(["b1", "b2", "b3", None]),
    "date": st.none() | st.datetimes(min_value=pd.Timestamp("1990-01-01"), max_value=pd.Timestamp("2090-01-01")),
})
BUSINESS = pd.DataFrame({"business_id": ["b1", "b2", "b2"], "categories": ["Food, Thai", None, "twice"]})


def clean(*values: str | None) -> list[str]:
    return clean_text(pl.DataFrame({"text": list(values)}, schema={"text": pl.String}))["text"].to_list()


def python_clean(text: str | None) -> str:
    "The same rules as a plain Python function."
    text, rules = (text or "").strip(), [(re.compile(p.replace("(?-u:", "(?a:")), r) for p, r in f.RULES]
    while True:
        before, text = text, f._rare(unicodedata.normalize("NFKC", text))
        for pattern, replacement in rules:
            text = pattern.sub(replacement, text)
        text = text.strip()
        if text == before:
            return text


@given(texts)
def test_cleaning_twice_changes_nothing(text: str) -> None:
    (once,) = clean(text)
    assert clean(once) == [once]


@given(texts.filter(lambda text: text.count("<") + text.count("&") < 6 and not set(text) & set("\x1c\x1d\x1e\x1f")))
@settings(deadline=None)
def test_cleaning_is_what_plain_python_does(text: str) -> None:
    # both use Unicode tables of their own version: characters that only one of them knows are left out
    if all(unicodedata.category(c) != "Cn" for c in text):
        assert clean(text) == [python_clean(text)]


@given(texts)
def test_the_short_cut_skips_nothing(text: str) -> None:
    "A row that is not picked as unusual would not change in a full round."
    stripped = pl.Series([text]).str.strip_chars()
    many = f._unusual(stripped.new_from_index(0, 40))
    assert len(f._unusual(stripped)) == stripped.str.contains(f._UNUSUAL).sum() == len(many) / 40, "for a row and for many"
    if not stripped.str.contains(f._UNUSUAL).item():
        assert f._once(stripped).item() == stripped.item()


@given(texts)
def test_clean_text_has_no_markup_controls_or_double_spaces(text: str) -> None:
    (once,) = clean(text)
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u200b\ufeff]|  |^ | $|</?[A-Za-z][^<>]*>", once)


@pytest.mark.parametrize(("raw", "wanted"), [
    ("<p>Fine &amp; <b>good</b></p>", "Fine & good"),
    ("a&amp;lt;br&amp;gt;b", "a b"),
    ("see https://a.org/x?y=1, ok", "see [url], ok"),
    ("WWW.shop.example/x!", "[url]!"),
    ("Mail jo.doe+x@mail.example.org.", "Mail [email]."),
    ("call (555) 123-4567 or 555.123.4567 or +1 555 123 4567", "call [phone] or [phone] or [phone]"),
    ("call +49 170 1234567 now", "call [phone] now"),
    ("12-15-2008, 1000000 times, order 48213", "12-15-2008, 1000000 times, order 48213"),
    ("soooooo good!!!!!!", "sooo good!!!"),
    ("I <3 it, 5 < 6 and 7 > 6, AT&T", "I <3 it, 5 < 6 and 7 > 6, AT&T"),
    ("\ufeffcafe\u0301\u00a0 \u201cquoted\u201d\x00", "caf\u00e9 \"quoted\""),
    ("\u2764\ufe0f \U0001f600", "\u2764\ufe0f \U0001f600"),
    ("<script>alert('x')</script>hi<!-- a > b -->", "hi"),
    ("", ""), (None, ""), (" \t\r\n", ""),
])
def test_cleaning_by_example(raw: str | None, wanted: str) -> None:
    assert clean(raw) == [wanted]


@pytest.mark.parametrize("text", [
    "x" * 1_000_000, "word " * 200_000, "&" + "amp;" * 250_000, "<" * 500_000 + "b" + ">" * 500_000, "<b" * 300_000,
    "a@" * 400_000, "http://" * 140_000, "1-" * 500_000, "\u0301" * 300_000, "<!--" * 250_000, "<script>" * 120_000,
])
def test_a_text_of_a_megabyte_is_cleaned(text: str) -> None:
    (once,) = clean(text)
    assert clean(once) == [once]


def test_every_entity_of_the_standard_is_known() -> None:
    names = [f"&{name}" for name in html.entities.html5 if name.endswith(";")]
    left = [name for name, text in zip(names, clean(*names), strict=True) if text == name]
    assert not left


def test_pandas_and_polars_give_the_same() -> None:
    pandas = pd.DataFrame({"text": ["<b>A</b>!", None, "don't"], "date": pd.to_datetime(["2024-02-29 23:59", None, "2024-03-01 00:00"])})
    polars = pl.from_pandas(pandas)
    a, b = create_features(clean_text(pandas)), create_features(clean_text(polars))
    assert isinstance(a, pd.DataFrame)
    assert isinstance(b, pl.DataFrame)
    pd.testing.assert_frame_equal(a[FEATURES], b.select(FEATURES).to_pandas())
    assert a.text.tolist() == b["text"].to_list()


def test_a_pandas_frame_keeps_index_attrs_and_its_other_columns() -> None:
    df = pd.DataFrame({"text": ["one", "two"], "extra": [object(), object()]}, index=[7, 7])
    df.attrs["quarantined"] = 3
    out = create_features(clean_text(df))
    assert list(out.index) == [7, 7]
    assert out.attrs == {"quarantined": 3}
    assert out.extra.tolist() == df.extra.tolist()
    assert list(df.columns) == ["text", "extra"], "the input is not changed"


@given(st.lists(inbox_row, min_size=1, max_size=12), st.integers(1, 5))
@settings(deadline=None, max_examples=50)
def test_one_row_a_batch_and_the_table_give_the_same(rows: list[dict], size: int) -> None:
    df = pl.DataFrame(rows, schema={"text": pl.String, "business_id": pl.String, "date": pl.Datetime("us")})
    encoder = CategoryEncoder({"Food": 1})
    for how in (None, encoder):
        whole = create_features(clean_text(df), BUSINESS, how)
        parts = [create_features(clean_text(df[i : i + size]), BUSINESS, how) for i in range(0, len(df), size)]
        assert pl.concat(parts).equals(whole)
    one = create_features(clean_text(pd.DataFrame(rows[:1])), BUSINESS)
    assert one[FEATURES].iloc[0].tolist() == list(create_features(clean_text(df), BUSINESS).select(FEATURES).row(0))


@given(texts)
@settings(deadline=None)
def test_counts_are_what_plain_python_counts(text: str) -> None:
    (text,) = clean(text)
    row = create_features(pl.DataFrame({"text": [text]})).row(0, named=True)
    words = text.split()
    letters = sum(map(len, words))
    assert row["text_length"] == len(text)
    assert row["word_count"] == len(words)
    assert row["exclamation_count"] == text.count("!")
    assert row["question_count"] == text.count("?")
    assert row["digit_count"] == sum(c in "0123456789" for c in text)
    assert row["average_word_length"] == (letters / len(words) if words else 0)
    assert row["upper_share"] == (sum(unicodedata.category(c) == "Lu" for c in text) / letters if letters else 0)


@pytest.mark.parametrize(("text", "name", "wanted"), [
    ("Not good. I don't like it, never did", "negation_count", 3),
    ("NO! nothing, dont", "negation_count", 3),
    ("notable knots cannot", "negation_count", 1),
    ("Good but slow; however fine. butter", "contrast_count", 2),
    ("One. Two! Three?! four", "sentence_count", 4),
    ("version 3.5 is out", "sentence_count", 1),
    ("", "sentence_count", 0),
    ("  two \t words ", "word_count", 2),
    ("\u00c9T\u00c9 5", "upper_share", 0.75),
])
def test_counts_by_example(text: str, name: str, wanted: float) -> None:
    assert create_features(pd.DataFrame({"text": [text]}))[name].item() == wanted


def test_time_is_utc_and_missing_is_minus_one() -> None:
    naive = pd.DataFrame({"text": "x", "date": pd.to_datetime(["2024-03-04 23:30:00", None])})  # a Monday
    assert create_features(naive)[["hour_of_day", "day_of_week"]].to_numpy().tolist() == [[23, 0], [-1, -1]]
    aware = naive.assign(date=naive.date.dt.tz_localize("UTC").dt.tz_convert("Asia/Tokyo"))
    assert create_features(aware).hour_of_day.tolist() == [23, -1]
    for frame in (naive[["text"]], naive[["text"]].assign(date=None)):
        assert create_features(frame).hour_of_day.tolist() == [-1, -1]
    with pytest.raises(FeatureError, match="not dates"):
        create_features(naive.assign(date="2024-03-04"))


def test_categories_come_from_the_business_table() -> None:
    df = pd.DataFrame({"text": "x", "business_id": ["b1", "b2", "b9", None]})
    assert main_category(df, BUSINESS).to_list() == ["Food", None, None, None]
    assert create_features(df, BUSINESS).category_encoded.tolist() == [category_bucket("Food"), 0, 0, 0]
    assert create_features(df).category_encoded.tolist() == [0, 0, 0, 0], "no table: nothing is known"
    assert create_features(df, BUSINESS.head(0)).category_encoded.tolist() == [0, 0, 0, 0]
    assert main_category(df.assign(categories="A & B, C")).to_list() == ["A & B"] * 4
    assert category_bucket("Restaurants") == 52, "the number may never change: models have learned it"


def test_the_encoder_knows_training_rows_only() -> None:
    train = pd.DataFrame({"text": "x", "categories": ["A"] * 20 + ["B"] * 30 + ["C"] * 3})
    encoder = CategoryEncoder.fit(train)
    assert encoder.codes == {"B": 1, "A": 2}
    new = pd.DataFrame({"text": "x", "categories": ["A", "B", "C", "D", None]})
    assert create_features(new, encoder=encoder).category_encoded.tolist() == [2, 1, 0, 0, 0]
    assert CategoryEncoder(codes={}).encode(pl.Series(["A"])).to_list() == [0]


@pytest.mark.parametrize(("df", "message"), [
    (pd.DataFrame({"text": ["fine", 3.5]}), "row 1: float 3.5 is not text"),
    (pd.DataFrame({"message": ["fine"]}), "no column 'text'"),
    (pl.DataFrame({"text": [1, 2]}), "Int64, not text"),
])
def test_what_is_no_text_is_refused(df: pd.DataFrame, message: str) -> None:
    for function in (clean_text, create_features):
        with pytest.raises(FeatureError, match=message):
            function(df)


def test_broken_unicode_and_empty_frames() -> None:
    broken = pd.DataFrame({"text": pd.Series(["a\ud800b", pd.NA, float("nan")], dtype=object)})
    assert clean_text(broken).text.tolist() == ["a?b", "", ""]
    for empty in (pd.DataFrame({"text": []}), pd.DataFrame({"text": pd.Series([], dtype="str")})):
        assert list(create_features(clean_text(empty)).columns) == ["text", *FEATURES]
    assert create_features(clean_text(pl.DataFrame({"text": []}))).shape == (0, 1 + len(FEATURES))


def _table(n: int = 1200) -> tuple[pd.DataFrame, np.ndarray]:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, n)
    return pd.DataFrame({
        "signal": y + rng.normal(0, 1, n), "weak": (y == 2) + rng.normal(0, 3, n), "noise": rng.random(n),
        "flag": rng.integers(0, 2, n), "constant": 5, "empty": np.nan,
    }).assign(copy=lambda d: -2 * d.signal + 1), y


def test_selection_drops_constants_copies_and_noise() -> None:
    df, y = _table()
    selection = select_features(df, y, list(df.columns))
    assert "signal" in selection.kept
    assert {"constant", "empty"} == {name for name, reason in selection.dropped.items() if reason == "constant"}
    assert selection.dropped["copy"] == "correlates 1.00 with signal"
    assert set(selection.kept) | set(selection.dropped) == set(df.columns)
    assert "signal" in selection._repr_html_()
    again = select_features(pl.from_pandas(df), pl.Series(y), list(df.columns))
    pd.testing.assert_frame_equal(again.table, selection.table)


def test_noise_is_kept_about_as_often_as_promised() -> None:
    df, y = _table(400)
    kept = 0
    for seed in range(3):
        rng = np.random.default_rng(seed)
        noise = pd.DataFrame({f"noise_{i}": rng.random(len(df)) for i in range(10)}).assign(signal=df.signal)
        kept += sum(name.startswith("noise") for name in select_features(noise, y, list(noise.columns), seed=seed).kept)
    assert kept <= 6, "of 30 columns of noise one or two may pass"


def test_selection_with_missing_values_and_bad_input() -> None:
    df, y = _table()
    df.loc[::3, "signal"] = np.nan
    assert "signal" in select_features(df, y, ["signal", "noise"]).kept
    assert select_features(df, y, ["constant"]).kept == []
    with pytest.raises(FeatureError, match="no column nonsense"):
        select_features(df, y, ["signal", "nonsense"])
    with pytest.raises(FeatureError, match="1200 rows and 3 labels"):
        select_features(df, y[:3], ["signal"])


def test_importing_features_does_not_import_scikit_learn(pytestconfig: pytest.Config) -> None:
    import subprocess
    import sys

    code = "import sys, mlops_lib.data.features; sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=pytestconfig.rootpath).returncode == 0


def test_real_reviews() -> None:
    path = Path(__file__).parents[3] / "shared" / "data" / "real_reviews.jsonl"
    if not path.is_file():
        pytest.skip("the real reviews are not on this machine")
    from mlops_lib.data.tables import add_label, load_reviews

    df = create_features(clean_text(add_label(load_reviews(path))))
    assert not df[FEATURES].isna().any().any()
    assert clean_text(df).text.tolist() == df.text.tolist()
    kept = select_features(df, df.label).kept
    assert "negation_count" in kept, "who says not, never and nothing is less content"
    assert not {"hour_of_day", "day_of_week", "category_encoded"} & set(kept), "made-up dates, no business table"
