"""Loading: what is read, what is put aside and why, and that nothing is lost between the two."""

import gzip
import json
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pandas as pd
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_lib.data import tables
from mlops_lib.data.tables import (
    BUSINESS,
    REVIEW,
    TableError,
    add_label,
    as_table,
    label_from_stars,
    load_businesses,
    load_example,
    load_reviews,
    load_table,
    load_users,
    parse_date,
    parse_dates,
    parse_line,
    scan_reviews,
    scan_rows,
)

SHARED = Path(__file__).parents[3] / "shared" / "data"
GOOD = {
    "review_id": "r", "user_id": "u", "business_id": "b", "stars": 4.0, "useful": 1, "funny": 0, "cool": 2,
    "text": "Fine.", "date": "2024-03-01 08:15:00",
}


def review(i: int, **changes) -> str:
    return json.dumps(GOOD | {"review_id": f"r{i}"} | changes)


def write(folder: Path, *lines: str | bytes, name: str = "review.json") -> Path:
    path = folder / name
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n")
    return path


def quarantined(frame: pd.DataFrame) -> dict[int, str]:
    lines = Path(frame.attrs["quarantine_file"]).read_text(encoding="utf-8").splitlines()
    return {entry["line"]: entry["reason"] for entry in map(json.loads, lines)}


# ---------------------------------------------------------------- lines


@settings(max_examples=60, deadline=None)
@given(lines=st.lists(st.one_of(
    st.binary(max_size=40),
    st.builds(lambda i, s, t: review(i, stars=s, text=t).encode(), st.integers(0, 9), st.floats() | st.text(max_size=5), st.text(max_size=20)),
), max_size=12))
def test_every_line_is_loaded_or_in_quarantine(lines, tmp_path_factory):
    content = b"\n".join(lines)
    path = tmp_path_factory.mktemp("lines") / "f.json"
    path.write_bytes(review(0).encode() + b"\n" + content)
    frame = load_reviews(path)
    expected = 1 + sum(bool(line.strip()) for line in content.split(b"\n"))
    assert len(frame) + frame.attrs["quarantined"] == expected
    assert list(frame.columns) == list(REVIEW)


def test_quarantine_keeps_line_number_reason_and_row(tmp_path):
    path = write(tmp_path, review(1), "", '{"review_id": "r2", ', review(3, stars="five"), "[1]", review(5))
    frame = load_reviews(path)
    assert frame["review_id"].tolist() == ["r1", "r5"]
    reasons = quarantined(frame)
    assert sorted(reasons) == [3, 4, 5], "blank lines count as lines"
    assert "broken JSON" in reasons[3]
    assert reasons[4] == "stars: 'five' is not a number"
    assert "not a JSON object" in reasons[5]
    kept = Path(frame.attrs["quarantine_file"]).read_text(encoding="utf-8")
    assert '{\\"review_id\\": \\"r2\\",' in kept, "the broken line itself is kept"
    assert "Fine." in kept, "and so is the row of a wrong type"


def test_a_broken_line_in_a_later_batch(tmp_path):
    lines = [review(i) for i in range(1000)]
    lines[707] = lines[707][:50]
    batches = list(scan_reviews(write(tmp_path, *lines), batch_rows=100))
    assert [len(b) for b in batches] == [100] * 7 + [99] + [100] * 2


def test_batch_size_changes_nothing(tmp_path):
    path = write(tmp_path, *[review(i, date="3/1/2024" if i % 7 == 0 else "2024-03-01") for i in range(500)])
    whole = pl.concat(scan_reviews(path))
    for rows in (1, 13, 499, 10_000):
        assert pl.concat(scan_reviews(path, batch_rows=rows)).equals(whole)


def test_text_of_one_megabyte_is_loaded_whole(tmp_path):
    frame = load_reviews(write(tmp_path, review(1, text="x" * 2**20)))
    assert frame["text"].str.len().tolist() == [2**20]


def test_batches_are_bounded_in_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_BATCH", 50_000)
    path = write(tmp_path, *[review(i, text="x" * 10_000) for i in range(20)])
    assert max(len(b) for b in scan_reviews(path)) <= 6
    frame = pl.concat(scan_reviews(path))
    frame.write_parquet(tmp_path / "review.parquet")
    batches = list(scan_reviews(tmp_path / "review.parquet"))
    assert sum(map(len, batches)) == 20


def test_a_line_without_end_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_LINE", 10_000)
    frame = load_reviews(write(tmp_path, review(1), b"x" * 55_000, review(3)))
    assert frame["review_id"].tolist() == ["r1", "r3"]
    assert quarantined(frame) == {2: "the line has 55,001 bytes, the limit is 10,000"}


def test_wrong_encoding(tmp_path):
    frame = load_reviews(write(tmp_path, review(1), '{"review_id": "r2", "text": "café"}'.encode("latin-1")))
    assert len(frame) == 1
    assert "not UTF-8: byte 0xe9" in quarantined(frame)[2]


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "bom.json"
    path.write_bytes(b"\xef\xbb\xbf" + review(1).encode() + b"\r\n\r\n" + review(2).encode())
    assert load_reviews(path)["review_id"].tolist() == ["r1", "r2"]


def test_gzip_is_recognised_by_its_content(tmp_path):
    path = tmp_path / "review.json"  # no .gz
    path.write_bytes(gzip.compress("\n".join(review(i) for i in range(5)).encode()))
    assert len(load_reviews(path)) == 5


def test_line_parser_survives_depth_and_long_numbers():
    for line in (b"[" * 100_000, b'{"a": ' + b"9" * 6_000 + b"}"):
        with pytest.raises(TableError):
            parse_line(line)


# ---------------------------------------------------------------- whole files


@pytest.mark.parametrize(("content", "words"), [
    (b"", "is empty"),
    (b"\n \n\n", "no row that can be read"),
    (b"Dear all,\nhello\n", "line 1: broken JSON"),
    (b'[{"review_id": "r1"}]', "one JSON array"),
    ("{}".encode("utf-16"), "UTF-16"),
    (gzip.compress(b"x" * 100_000, mtime=0)[:60], "damaged or cut off"),
    (b"PAR1 and then nothing", "damaged or cut off"),
    (b'{"id": 1, "message": "hi"}', "no column 'review_id' with values. Columns there: id, message"),
    (b'{"review_id": "r1", "body": "hi"}', "no column 'text' with values. Columns there: review_id, body"),
])
def test_useless_files_are_one_clear_error(tmp_path, content, words):
    path = tmp_path / "review.json"
    path.write_bytes(content)
    with pytest.raises(TableError, match="review.json") as caught:
        load_reviews(path)
    assert words in str(caught.value)


def test_missing_file_and_folder_fail_before_the_first_batch(tmp_path):
    with pytest.raises(TableError, match="There is no file"):
        scan_reviews(tmp_path / "nowhere.json")
    with pytest.raises(TableError, match="is a folder"):
        load_reviews(tmp_path)


def test_unknown_columns_and_repeated_ids_are_reported(tmp_path):
    path = write(tmp_path, review(1, mood="up"), review(1), review(2), review(1))
    frame = load_reviews(path)
    assert frame.attrs["unknown_columns"] == ["mood"]
    assert "mood" not in frame
    assert frame.attrs["repeated_ids"] == 2
    assert len(frame) == 4, "repeated rows are kept"


def test_loading_again_writes_the_same_quarantine(tmp_path):
    path = write(tmp_path, review(1), "{")
    first, second = load_reviews(path), load_reviews(path)
    assert first.attrs == second.attrs
    folder = Path(first.attrs["quarantine_file"]).parent
    assert len(list(folder.glob(f"{path.name}-*"))) >= 1
    assert not list(folder.glob(".*")), "nothing half-written is left"


def test_an_interrupted_scan_leaves_nothing_half_written(tmp_path):
    path = write(tmp_path, "{", *[review(i) for i in range(50)])
    complete = load_reviews(path).attrs["quarantine_file"]
    whole = Path(complete).read_text()
    scan = scan_reviews(path, batch_rows=10)
    next(scan)
    scan.close()
    assert Path(complete).read_text() == whole
    assert not list(Path(complete).parent.glob(".*"))


# ---------------------------------------------------------------- types


def test_types_are_those_declared(tmp_path):
    frame = load_reviews(write(tmp_path, review(1, stars="3", useful="7", date=1709280900)))
    row = frame.iloc[0]
    assert (row["stars"], row["useful"], row["date"]) == (3.0, 7, pd.Timestamp("2024-03-01 08:15:00"))
    assert str(frame["date"].dtype) == "datetime64[us]"
    assert frame["date"].dt.tz is None


@pytest.mark.parametrize(("name", "value", "loaded"), [
    ("stars", "five", False), ("stars", True, False), ("stars", [4], False), ("stars", "4,5", False),
    ("stars", None, True), ("stars", " ", True), ("stars", "NaN", True), ("stars", "Infinity", False), ("stars", 9, True),
    ("useful", 1.5, False), ("useful", 10**30, False), ("useful", "12", True), ("useful", 1.0, True),
    ("date", "3/1/2024", False), ("date", "soon", False), ("date", "2024-02-30", False), ("date", "", True),
    ("text", 12345, True), ("text", None, True),
])
def test_wrong_types_go_to_quarantine(tmp_path, name, value, loaded):
    frame = load_reviews(write(tmp_path, review(1), review(2, **{name: value})))
    assert ("r2" in frame["review_id"].tolist()) == loaded
    if not loaded:
        assert quarantined(frame)[2].startswith(f"{name}: ")


def test_bare_nan_is_a_missing_value(tmp_path):
    frame = load_reviews(write(tmp_path, review(1), review(2, stars=float("nan"))))
    assert frame["stars"].isna().tolist() == [False, True]


@given(st.datetimes(datetime(1971, 1, 1), datetime(2100, 1, 1)), st.integers(-12 * 60, 14 * 60))
def test_dates_with_a_zone_become_utc(moment, minutes):
    moment = moment.replace(microsecond=0)
    zone = timezone(timedelta(minutes=minutes))
    there = moment.replace(tzinfo=UTC).astimezone(zone)
    for text in (there.isoformat(), f"{moment}", f"{moment.isoformat()}Z", f"{moment:%b %d, %Y %H:%M:%S}"):
        assert parse_date(text) == moment, text


@given(st.dates(datetime(1990, 1, 1).date(), datetime(2050, 1, 1).date()))
def test_a_date_is_read_right_or_refused(day):
    for style in ("%d/%m/%Y", "%m/%d/%Y", "%d-%m-%Y"):
        text = day.strftime(style)
        if day.day <= 12 and day.day != day.month:
            with pytest.raises(ValueError, match="two days"):
                parse_date(text)
        else:
            assert parse_date(text).date() == day
    assert parse_date(day.strftime("%d.%m.%Y")).date() == day


@given(st.lists(st.none() | st.text(max_size=12) | st.datetimes(datetime(1971, 1, 1), datetime(2100, 1, 1)).map(str)))
def test_a_column_of_dates_agrees_with_one_date_at_a_time(texts):
    dates, wrong = parse_dates(pl.Series("d", texts, dtype=pl.String))
    for i, text in enumerate(texts):
        if text is None or not text.strip():
            assert dates[i] is None
            assert i not in wrong
            continue
        try:
            assert dates[i] == parse_date(text)
        except (ValueError, OverflowError, OSError):
            assert dates[i] is None
            assert i in wrong


# ---------------------------------------------------------------- the other tables, Parquet


def test_users_and_businesses_of_the_real_schema(tmp_path):
    user = {
        "user_id": "u1", "name": "Ann", "review_count": 3, "yelping_since": "2010-05-02 01:29:57", "useful": 1, "funny": 0,
        "cool": 0, "elite": "2015,2016", "friends": "u2, u3", "fans": 1, "average_stars": 3.67, "compliment_hot": 4,
    }
    old = user | {"user_id": "u2", "friends": ["u1"], "elite": []}
    users = load_users(write(tmp_path, json.dumps(user), json.dumps(old), name="user.json"))
    assert users["friends"].tolist() == ["u2, u3", '["u1"]']
    assert users.attrs["unknown_columns"] == ["compliment_hot"]
    business = {
        "business_id": "b1", "name": "Cafe", "latitude": 39.5, "longitude": -119.8, "stars": 4.5, "review_count": 9,
        "is_open": 1, "attributes": {"WiFi": "u'free'", "Parking": {"lot": True}}, "categories": "Food", "hours": None,
    }
    frame = load_businesses(write(tmp_path, json.dumps(business), name="business.json"))
    assert json.loads(frame["attributes"][0]) == business["attributes"]
    assert frame["hours"].isna().all()


def test_parquet_gives_the_same_table(tmp_path):
    frame = load_reviews(write(tmp_path, *[review(i, useful=None if i == 3 else i) for i in range(10)]))
    frame.to_parquet(tmp_path / "review.parquet")
    again = load_reviews(tmp_path / "review.parquet")
    pd.testing.assert_frame_equal(frame, again)
    zoned = frame.assign(date=frame["date"].dt.tz_localize("America/New_York"), stars=frame["stars"].astype("str"))
    zoned.loc[2, "stars"] = "five"
    zoned.assign(extra=1).to_parquet(tmp_path / "zoned.parquet")
    other = load_reviews(tmp_path / "zoned.parquet")
    assert other.attrs["quarantined"] == 1
    assert quarantined(other) == {3: "stars: 'five' is not a number"}
    assert other["date"][0] == pd.Timestamp("2024-03-01 13:15:00")
    assert other.attrs["unknown_columns"] == ["extra"]


def test_parquet_with_nested_columns(tmp_path):
    frame = pl.DataFrame({"business_id": ["b1", "b2"], "attributes": [{"a": "1"}, None], "is_open": [1, 0]})
    frame.write_parquet(tmp_path / "b.parquet")
    loaded = pl.concat(scan_rows(tmp_path / "b.parquet", BUSINESS))
    assert json.loads(loaded["attributes"][0]) == {"a": "1"}
    assert loaded["attributes"][1] is None


# ---------------------------------------------------------------- labels


def test_labels():
    assert [label_from_stars(s) for s in (1, 2, 3, 4, 5)] == [0, 0, 1, 2, 2]
    frame = pd.DataFrame({"stars": [5.0, 1.0, 3.0]}, index=[7, 8, 9])
    labelled = add_label(frame)
    assert labelled["label"].tolist() == [2, 0, 1]
    assert labelled["label"].dtype == "int64"
    assert labelled.index.tolist() == [7, 8, 9]
    assert "label" not in frame


def test_missing_stars_have_no_label():
    with pytest.raises(TableError, match="1 of 2 rows have no stars"):
        add_label(pd.DataFrame({"stars": [None, 3.0]}))
    with pytest.raises(TableError, match="no column 'stars'"):
        add_label(pd.DataFrame({"text": ["a"]}))
    with pytest.raises(TableError):
        label_from_stars(None)


# ---------------------------------------------------------------- any table


def csv(tmp_path: Path, text: str, encoding: str = "utf-8") -> Path:
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize(("text", "target", "words"), [
    ("a,Churn\n1,x\n2,y\n", "churn", "Did you mean 'Churn'?"),
    ("a,b\n1,x\n2,x\n", "b", "in every row"),
    ("a,b\n1,x\n2,\n3,y\n", "b", "1 of 3 rows have no 'b'"),
    ("a,b\n1,x\n2, \n3,y\n", "b", "1 of 3 rows have no 'b'"),
    ("a,b\n1,x\n2,y\n", "b", "names the rows"),
    ("a,b,a\n1,2,3\n", "b", "more than one column 'a'"),
    ("a,b\n", "b", "no rows"),
    ("a,b\n1,2,3\n4,5,6\n", "b", "more values than its first line has columns (2)"),
    ("a,b\n1,2\n3,4,5\n", "b", "line 3"),
    ("", "b", "is empty"),
])
def test_bad_tables_are_one_clear_error(tmp_path, text, target, words):
    with pytest.raises(TableError) as caught:
        load_table(csv(tmp_path, text), target)
    assert words in str(caught.value)


def test_table_errors_about_the_file(tmp_path):
    with pytest.raises(TableError, match="There is no file"):
        load_table(tmp_path / "nowhere.csv", "y")
    path = csv(tmp_path, "name,y\ncafé,1\nbar,0\nthé,1\n", "latin-1")
    with pytest.raises(TableError, match="not utf-8"):
        load_table(path, "y")
    assert load_table(path, "y", encoding="latin-1").frame["name"][0] == "café"


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_separators_and_byte_order_mark(tmp_path, mark, start):
    table = load_table(csv(tmp_path, start + f"a{mark}y\n1{mark}x\n1{mark}z\n2{mark}x\n"), "y")
    assert table.features == ["a"]
    assert table.task == "classification"
    packed = tmp_path / "t.csv.gz"
    packed.write_bytes(gzip.compress((tmp_path / "t.csv").read_bytes()))
    assert load_table(packed, "y").frame.equals(table.frame)


def test_blanks_become_missing_numbers_and_ids_are_ignored(tmp_path):
    text = "customerID,plan,charges,empty,y\n" + "".join(f"{i:03}-AB,{'xy'[i % 2]},{i * 1.5 if i else ' '},,{i % 2}\n" for i in range(30))
    table = load_table(csv(tmp_path, text), "y")
    assert table.ignored == ["customerID", "empty"]
    assert table.features == ["plan", "charges"]
    assert table.frame["charges"].dtype == "float64"
    assert table.frame["charges"].isna().sum() == 1
    assert "customerID" in table.frame, "the column stays in the frame"


@pytest.mark.parametrize(("name", "values", "expected"), [
    ("user_id", [3, 1, 2], True), ("userId", ["c", "a", "b"], True), ("ID", [9, 7, 8], True), ("index", [0, 2, 1], True),
    ("Unnamed: 0", [0, 1, 2], True), ("row", [10, 11, 12], True), ("code", ["x1", "x2", "x3"], True),
    ("paid", [3, 1, 2], False), ("user_id", [1, 1, 2], False), ("text", ["a b", "c d", "e"], False), ("price", [1.5, 2.5, 3.5], False),
    ("amount", [5, 9, 7], False),
])
def test_what_counts_as_an_id(name, values, expected):
    assert tables.is_id(name, pd.Series(values)) is expected


@pytest.mark.parametrize(("values", "task"), [
    ([0, 1] * 20, "classification"), ([True, False] * 20, "classification"), (["a", "b"] * 20, "classification"),
    ([1.5, 2.0] * 20, "regression"), (list(range(40)), "regression"), ([1.0, 2.0] * 20, "classification"),
])
def test_the_task_follows_from_the_target(values, task):
    assert as_table(pd.DataFrame({"x": [1, 2] * 20, "y": values}), "y").task == task


def test_the_task_can_be_declared():
    frame = pd.DataFrame({"x": [1, 2] * 3, "y": [1, 2, 3, 1, 2, 3]})
    assert as_table(frame, "y", "regression").task == "regression"
    with pytest.raises(TableError, match="needs a column of numbers"):
        as_table(frame.assign(y=list("abcabc")), "y", "regression")


def test_parquet_tables(tmp_path):
    frame = pd.DataFrame({"id": [3, 1, 2, 9], "x": [1.0, 2.0, 1.0, 2.0], "y": ["a", "b", "a", "b"]})
    frame.to_parquet(tmp_path / "t.parquet")
    assert load_table(tmp_path / "t.parquet", "y").features == ["x"]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(TableError):
        load_table(tmp_path / "bad.parquet", "y")


def test_a_table_shows_itself():
    html = as_table(pd.DataFrame({"<b>": [1, 2, 1], "y": list("aba")}), "y")._repr_html_()
    assert "&lt;b&gt;" in html
    assert "classification" in html


def test_examples():
    assert {name: load_example(name).task for name in ("breast_cancer", "wine", "diabetes")} == {
        "breast_cancer": "classification", "wine": "classification", "diabetes": "regression",
    }


# ---------------------------------------------------------------- real files


def test_real_reviews():
    path = SHARED / "real_reviews.jsonl"
    if not path.exists():
        pytest.skip(f"the real reviews are not at {path}")
    frame = load_reviews(path)
    assert len(frame) == 2019
    assert frame.attrs["quarantined"] == 0
    assert add_label(frame)["label"].value_counts().to_dict() == {2: 1393, 0: 426, 1: 200}


def test_real_churn_table():
    path = SHARED / "telco_churn.csv"
    if not path.exists():
        pytest.skip(f"the Telco table is not at {path}")
    table = load_table(path, "Churn")
    assert table.ignored == ["customerID"]
    assert table.task == "classification"
    assert len(table.frame) == 7043
    assert table.frame["TotalCharges"].isna().sum() == 11
