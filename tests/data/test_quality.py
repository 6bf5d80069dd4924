"""Validation loses no row, says why, and gives back the kind of frame it got; one of each duplicate is kept."""

import json
from datetime import datetime, timedelta
from pathlib import Path

import pandas as pd
import pandera.polars as pa
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlops_lib.data.quality import (
    BUSINESS_SCHEMA,
    MAX_TEXT,
    REVIEW_SCHEMA,
    SCHEMAS,
    USER_SCHEMA,
    QualityError,
    check_file,
    find_duplicates,
    read_quarantine,
    remove_duplicates,
    rules,
    validate,
    write_quarantine,
)
from mlops_lib.data.synthetic import generate_inbox

REAL = Path(__file__).parents[3] / "shared" / "data" / "real_reviews.jsonl"
STARTED = datetime(2024, 5, 1)
LIMIT = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def reviews(n: int = 4, **columns: list) -> pd.DataFrame:
    base = {
        "review_id": [f"r{i}" for i in range(n)], "user_id": ["u"] * n, "business_id": ["b"] * n, "stars": [4.0] * n,
        "useful": [0] * n, "funny": [0] * n, "cool": [0] * n, "text": [f"message {i}" for i in range(n)],
        "date": [STARTED + timedelta(days=i) for i in range(n)],
    }
    return pd.DataFrame(base | columns)


def reasons(df: pd.DataFrame, schema: pa.DataFrameSchema = REVIEW_SCHEMA, **options: object) -> dict[int, str]:
    bad = validate(df, schema, max_bad_share=1.0, **options).quarantine
    return dict(zip(bad["row"].tolist(), bad["reasons"].tolist(), strict=True))


values = {
    "review_id": st.sampled_from(["r1", "r2", "r3", "r4", "", None, "x" * 65]),
    "user_id": st.sampled_from(["u1", "u2", None, "stranger"]),
    "business_id": st.sampled_from(["b1", None]),
    "stars": st.sampled_from([1.0, 3.0, 5.0, 9.0, 2.5, None, float("nan"), float("inf")]),
    "useful": st.sampled_from([0, 7, -1, None]),
    "funny": st.just(0),
    "cool": st.just(1),
    "text": st.sampled_from(["good", "Good!", " ", "", None, "y" * (MAX_TEXT + 1)]),
    "date": st.sampled_from([STARTED, STARTED + timedelta(days=1), datetime(1970, 1, 1), datetime(2999, 1, 1), None]),
}
TYPES = {"stars": pl.Float64, "useful": pl.Int64, "funny": pl.Int64, "cool": pl.Int64, "date": pl.Datetime("us")}


@st.composite
def frames(draw: st.DrawFn) -> pl.DataFrame:
    rows = draw(st.lists(st.fixed_dictionaries(values), max_size=12))
    return pl.DataFrame(rows, schema={name: TYPES.get(name, pl.String) for name in values})


@LIMIT
@given(frames())
def test_nothing_is_lost_and_good_stays_good(df: pl.DataFrame) -> None:
    tables = {"user": pl.DataFrame({"user_id": ["u1", "u2"]})}
    for frame in (df, df.to_pandas()):
        v = validate(frame, max_bad_share=1.0, tables=tables)
        assert type(v.good) is type(v.quarantine) is type(frame)
        bad = v.quarantine["row"].to_list()
        assert bad == sorted(set(bad)), "rows are in order, each once"
        kept = [i for i in range(len(df)) if i not in bad]
        assert pl.DataFrame(v.good)["review_id"].to_list() == df["review_id"].gather(kept).to_list()
        assert pl.DataFrame(v.quarantine)["text"].to_list() == df["text"].gather(bad).to_list()
        assert len(v.good) == v.report.rows - v.report.bad
        assert all(v.quarantine["reasons"].to_list()), "every bad row has a reason"
        assert not validate(v.good, tables=tables).report.bad, "what is good stays good"


@LIMIT
@given(frames())
def test_pandas_and_polars_are_judged_alike(df: pl.DataFrame) -> None:
    a, b = validate(df, max_bad_share=1.0), validate(df.to_pandas(), max_bad_share=1.0)
    assert a.quarantine["reasons"].to_list() == b.quarantine["reasons"].to_list()
    assert a.quarantine["row"].to_list() == b.quarantine["row"].to_list()


@LIMIT
@given(frames())
def test_the_flags_are_those_of_pandera(df: pl.DataFrame) -> None:
    "pandera itself, run on the good rows, has nothing to say; on all rows it fails exactly when there are bad ones."
    v = validate(df, max_bad_share=1.0)
    REVIEW_SCHEMA.validate(v.good, lazy=True)
    if v.report.bad:
        with pytest.raises((pa.errors.SchemaErrors, pa.errors.SchemaError)):
            REVIEW_SCHEMA.validate(df.with_columns(pl.col("stars").fill_nan(None)), lazy=True)


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("review_id", "r0", "review_id: occurs in an earlier row"),
        ("review_id", None, "review_id: is missing"),
        ("user_id", "", "user_id: is not 1 to 64 characters long"),
        ("stars", 6.0, "stars: is not 1, 2, 3, 4 or 5"),
        ("stars", 4.5, "stars: is not 1, 2, 3, 4 or 5"),
        ("stars", None, "stars: is missing"),
        ("useful", -1, "useful: is below 0"),
        ("text", " \n", "text: is blank"),
        ("text", "x" * 1_000_000, "text: is longer than 10,000 characters"),
        ("text", None, "text: is missing"),
        ("date", None, "date: is missing"),
        ("date", datetime(1999, 12, 31), "date: is before the year 2000"),
        ("date", datetime(2999, 1, 1), "date: is in the future"),
    ],
)
def test_each_rule_has_its_reason(column: str, value: object, reason: str) -> None:
    df = reviews()
    data = df[column].tolist()
    data[2] = value
    assert reasons(df.assign(**{column: data})) == {2: reason}


def test_a_row_has_all_its_reasons() -> None:
    df = reviews(stars=[4.0, None, 4.0, 4.0], text=["a", "", "c", "d"])
    assert reasons(df) == {1: "stars: is missing; text: is blank"}


def test_types_are_read_where_nothing_is_lost() -> None:
    df = reviews(6, stars=[4, "5", " 3 ", "five", None, 4.0], useful=["1", 2, "2.5", 3, None, 0])
    assert reasons(df) == {2: "useful: is not a whole number", 3: "stars: is not a number", 4: "stars: is missing"}
    good = validate(df, max_bad_share=1.0).good
    assert good["stars"].tolist() == [4.0, 5.0, 4.0]
    assert good["useful"].tolist() == [1, 2, 0]


def test_dates_are_read() -> None:
    texts = ["2024-05-01 10:00:00", "2024-05-02T10:00:00Z", "2024-05-03", "yesterday"]
    v = validate(reviews(date=texts), max_bad_share=1.0)
    assert v.good["date"].tolist() == [pd.Timestamp(t).tz_localize(None) for t in texts[:3]]
    assert v.quarantine["reasons"].tolist() == ["date: is not a date"]
    zoned = reviews(date=pd.to_datetime(["2024-05-01 02:00"] * 4).tz_localize("Europe/Vienna"))
    assert validate(zoned).good["date"].tolist() == [pd.Timestamp("2024-05-01")] * 4


def test_a_type_that_cannot_be_read_is_wrong_in_every_row() -> None:
    with pytest.raises(QualityError, match="text: is not text"):
        validate(reviews(text=[1.5, 2.5, 3.5, 4.5]))


def test_categories_and_whole_numbers_are_ids() -> None:
    df = reviews(user_id=pd.Categorical(["a", "b", "a", "b"]), business_id=[1, 2, 3, 4])
    good = validate(df).good
    assert good["user_id"].tolist() == ["a", "b", "a", "b"]
    assert good["business_id"].tolist() == ["1", "2", "3", "4"]


def test_foreign_keys_are_checked_where_the_table_is_given() -> None:
    df = reviews(user_id=["u", "v", "w", None], business_id=["b", "b", "b", "c"])
    users = pd.DataFrame({"user_id": ["u", "v", None]})
    expected = {2: "user_id: is not in user.user_id", 3: "user_id: is missing"}
    assert reasons(df, tables={"user": users, "business": None}) == expected
    notes = validate(df, max_bad_share=1.0, tables={"user": users}).report.notes
    assert len(notes) == 1
    assert "business_id" in notes[0]
    with pytest.raises(QualityError, match="no column 'user_id'"):
        validate(df, tables={"user": users.rename(columns={"user_id": "id"})})


def test_columns_missing_and_unknown() -> None:
    with pytest.raises(QualityError, match=r"'text' \(is it 'txt'\?\)"):
        validate(reviews().rename(columns={"text": "txt"}))
    assert not validate(reviews().drop(columns=["useful", "funny", "cool"])).report.bad, "votes need not be there"
    v = validate(reviews().assign(language="en"))
    assert v.good["language"].tolist() == ["en"] * 4
    assert any("language" in note for note in v.report.notes)
    strict = pa.DataFrameSchema({"a": pa.Column(pl.Int64)}, strict=True, name="small")
    with pytest.raises(QualityError, match="strict and does not know b"):
        validate(pd.DataFrame({"a": [1], "b": [2]}), strict)


def test_the_batch_fails_only_past_the_share() -> None:
    df = reviews(20, stars=[9.0] + [4.0] * 19)
    assert validate(df, max_bad_share=0.05).report.bad == 1, "exactly the share is still allowed"
    with pytest.raises(QualityError, match="1 of 20 rows are bad") as e:
        validate(df, max_bad_share=0.04)
    assert len(e.value.validation.good) == 19
    assert e.value.validation.quarantine["row"].tolist() == [0]


def test_no_rows_are_no_problem() -> None:
    v = validate(reviews().head(0))
    assert (v.report.rows, v.report.bad, len(v.good), len(v.quarantine)) == (0, 0, 0, 0)
    assert {"row", "reasons"} <= set(v.quarantine.columns)


def test_an_index_of_the_callers_own_does_not_matter() -> None:
    df = reviews(stars=[4.0, 9.0, 4.0, 4.0]).set_index(pd.Index([7, 7, 8, 9]))
    v = validate(df, max_bad_share=1.0)
    assert v.quarantine["row"].tolist() == [1]
    assert v.good.index.tolist() == [0, 1, 2]
    assert df.index.tolist() == [7, 7, 8, 9], "what was given is not changed"


def test_a_schema_of_ones_own() -> None:
    order = pa.Check(lambda d: d.lazyframe.select(pl.col("low") <= pl.col("high")), error="low above high")
    enough = pa.Check(lambda d: d.lazyframe.select(pl.len() > 2), error="has too few rows")
    even = pa.Check(lambda x: x % 2 == 0, element_wise=True, error="is odd")
    columns = {"low": pa.Column(pl.Int64, even), "high": pa.Column(int, pa.Check.in_range(0, 9))}
    schema = pa.DataFrameSchema(columns, checks=[order, enough], name="ranges")
    df = pd.DataFrame({"low": [2, 4, 3], "high": [5, 3, 12]})
    assert reasons(df, schema) == {1: "row: low above high", 2: "low: is odd; high: in_range(0, 9)"}
    assert reasons(df.head(1), schema) == {0: "row: has too few rows"}


def test_schemas_fit_what_the_generator_makes() -> None:
    inbox = generate_inbox(400, seed=3, duplicates=0, missing=0, invalid=0)
    tables = {"user": inbox.user, "business": inbox.business}
    for name, schema in SCHEMAS.items():
        v = validate(getattr(inbox, name), schema, tables=tables)
        assert v.report.bad == 0, str(v.report)
        assert v.report.notes == [], f"the schema {name} knows all columns"


def test_the_report_shows_itself() -> None:
    report = validate(reviews(text=["<b>", " ", " ", "d"]), max_bad_share=1.0).report
    assert "2 of 4 rows are bad (50.0%)" in str(report)
    assert "text: is blank (2)" in str(report)
    html = report._repr_html_()
    assert "text: is blank" in html
    assert json.loads(json.dumps(report.to_dict()))["reasons"] == [
        {"reason": "text: is blank", "rows": 2, "first_row": 1, "example": "' '"}
    ]
    table = rules(BUSINESS_SCHEMA)
    assert table.loc["is_open", "holds"] == "a whole number"
    assert table.loc["attributes", "holds"] == "anything"
    assert "between -90 and 90" in table.loc["latitude", "is refused when it"]
    assert "occurs in an earlier row" in rules(USER_SCHEMA).loc["user_id", "is refused when it"]


# duplicates


def test_of_one_id_the_newest_is_kept() -> None:
    dates = [STARTED, STARTED + timedelta(days=2), STARTED + timedelta(days=1), STARTED]
    df = reviews(review_id=["a", "a", "a", "b"], date=dates)
    assert find_duplicates(df).values.tolist() == [[0, 1, "same id"], [2, 1, "same id"]]
    kept = remove_duplicates(df)
    assert kept["text"].tolist() == ["message 1", "message 3"]
    assert kept.attrs["duplicates"] == {"same id": 2}


def test_of_one_message_the_oldest_is_kept() -> None:
    df = reviews(text=["Cold food!!", "cold  FOOD", "cold food.", "warm food"], user_id=["u", "u", "v", "u"],
                 date=[STARTED + timedelta(days=1), STARTED, STARTED, STARTED])
    found = find_duplicates(df)
    assert found.values.tolist() == [[0, 1, "sent again"]], "another user's short text is no copy"


def test_a_long_text_of_two_users_is_a_copy() -> None:
    long = "The same long story, word for word, sent in by two people who never met, which does not happen by itself."
    df = reviews(text=[long, long.upper(), "short", "short"], user_id=["u", "v", "w", "x"], business_id=["b", "c", "d", "e"])
    assert find_duplicates(df).values.tolist() == [[1, 0, "copied from another user"]]


def test_what_is_missing_is_no_duplicate() -> None:
    df = reviews(review_id=[None, None, "a", "b"], text=[None, None, " ", "!"], user_id=["u", "u", "u", None])
    assert len(find_duplicates(df)) == 0


def test_duplicates_need_their_columns() -> None:
    with pytest.raises(QualityError, match="missing: text, date"):
        find_duplicates(reviews().drop(columns=["text", "date"]))


@LIMIT
@given(frames(), st.randoms(use_true_random=False))
def test_one_of_each_is_kept(df: pl.DataFrame, random: object) -> None:
    kept, found = remove_duplicates(df), find_duplicates(df)
    assert len(kept) + len(found) == len(df)
    assert remove_duplicates(kept).equals(kept), "a second time changes nothing"
    assert len(find_duplicates(kept)) == 0
    gone = set(found["row"])
    assert len(gone) == len(found), "each row is reported once"
    ids = df["review_id"].drop_nulls()
    assert set(kept["review_id"].drop_nulls()) <= set(ids)
    pandas = remove_duplicates(df.to_pandas())
    assert pandas["text"].fillna("?").tolist() == kept["text"].fill_null("?").to_list(), "pandas is treated alike"


@LIMIT
@given(frames(), st.integers(0, 2**16))
def test_the_order_of_rows_does_not_decide(df: pl.DataFrame, seed: int) -> None:
    "With ids and dates that differ, the same reviews are kept however the rows come."
    n = len(df)
    df = df.with_columns(
        review_id=pl.Series([f"r{i // 2}" for i in range(n)], dtype=pl.String),
        date=pl.Series([STARTED + timedelta(hours=i) for i in range(n)], dtype=pl.Datetime("us")),
    )
    shuffled = df.sample(fraction=1.0, shuffle=True, seed=seed)
    assert set(remove_duplicates(shuffled)["date"]) == set(remove_duplicates(df)["date"])


# quarantine and files


def test_quarantine_is_kept_and_read_back(tmp_path: Path) -> None:
    first = validate(reviews(stars=[4.0, 9.0, None, 1.0]), max_bad_share=1.0)
    other = validate(pl.from_pandas(reviews(text=["", "b", "c", "d"])), max_bad_share=1.0)
    path = write_quarantine(first, tmp_path)
    assert write_quarantine(first, tmp_path) == path, "the same rows are written once"
    write_quarantine(other, tmp_path)
    back = read_quarantine("review", tmp_path)
    assert sorted(back["reasons"]) == ["stars: is missing", "stars: is not 1, 2, 3, 4 or 5", "text: is blank"]
    assert set(back.columns) >= {"review_id", "row", "reasons", "file"}
    assert not list(tmp_path.glob(".*")), "no half-written file is left"
    assert write_quarantine(validate(reviews()), tmp_path) is None
    assert read_quarantine("user", tmp_path).empty


def test_quarantine_takes_mixed_and_nested_columns(tmp_path: Path) -> None:
    df = reviews(stars=[4.0, "x", 9.0, None]).assign(extra=[{"a": 1}, [1], "t", None])
    write_quarantine(validate(df, max_bad_share=1.0), tmp_path)
    assert read_quarantine("review", tmp_path)["stars"].fillna("").tolist() == ["x", "9.0", ""]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    v = validate(reviews(stars=[9.0, 4.0, 4.0, 4.0]), max_bad_share=1.0)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlops_lib.data.quality.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_quarantine(v, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_pieces_is_judged_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    df = generate_inbox(500, seed=5, missing=0.02, duplicates=0, invalid=0.01).review
    df.to_parquet(tmp_path / "r.parquet")
    whole = validate(df, max_bad_share=1.0).report
    from mlops_lib.data import quality, tables

    monkeypatch.setattr(quality, "scan_reviews", lambda path: tables.scan_reviews(path, batch_rows=60))
    pieces = check_file(tmp_path / "r.parquet", max_bad_share=1.0)
    assert (pieces.rows, pieces.bad) == (whole.rows, whole.bad)
    key = ["reason", "rows", "first_row"]
    assert sorted(pieces.reasons[key].values.tolist()) == sorted(whole.reasons[key].values.tolist())
    rows = read_quarantine("review")
    assert pieces.bad <= len(rows)


def test_an_id_that_comes_back_in_a_later_piece_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reviews(4, review_id=["a", "b", "c", "a"]).to_parquet(tmp_path / "r.parquet")
    from mlops_lib.data import quality, tables

    monkeypatch.setattr(quality, "scan_reviews", lambda path: tables.scan_reviews(path, batch_rows=2))
    assert any("1 rows repeat the id" in note for note in check_file(tmp_path / "r.parquet").notes)


def test_check_file_refuses(tmp_path: Path) -> None:
    reviews(4, stars=[9.0, 9.0, 9.0, 4.0]).to_parquet(tmp_path / "r.parquet")
    with pytest.raises(QualityError, match="3 of 4 rows are bad"):
        check_file(tmp_path / "r.parquet")
    with pytest.raises(QualityError, match="no schema 'orders'"):
        check_file(tmp_path / "r.parquet", kind="orders")


def test_check_file_takes_users(tmp_path: Path) -> None:
    path = tmp_path / "user.json"
    path.write_text('{"user_id": "a", "average_stars": 3.5}\n{"user_id": "b", "average_stars": 7}\n')
    report = check_file(path, kind="user", max_bad_share=0.5)
    assert report.bad == 1
    assert report.reasons["reason"].tolist() == ["average_stars: is not between 0 and 5"]


@pytest.mark.skipif(not REAL.is_file(), reason="the real reviews are not here")
def test_real_reviews() -> None:
    from mlops_lib.data.tables import load_reviews

    df = load_reviews(REAL)
    kept = remove_duplicates(df)
    assert kept.attrs["duplicates"] == {"copied from another user": 10}
    v = validate(kept)
    assert len(v.good) == 2008
    assert v.quarantine["reasons"].tolist() == ["text: is blank"]
