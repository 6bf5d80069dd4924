"""Batch scoring: every row once or set aside, the same bytes whatever dies on the way, memory that does not grow."""

import csv
import gzip
import io
import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import psutil
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from support import until

from mlops_lib.data.quality import read_quarantine
from mlops_lib.data.synthetic import generate_inbox
from mlops_lib.data.tables import add_label, load_example
from mlops_lib.registry.gates import find, set_alias
from mlops_lib.registry.tracking import log_run, register
from mlops_lib.serving import batch
from mlops_lib.serving.batch import (
    BatchError,
    Chunk,
    Journal,
    Progress,
    Source,
    csv_rows,
    cut,
    forks,
    json_rows,
    local_cluster,
    score,
)
from mlops_lib.serving.predictor import load_version
from mlops_lib.training import train

QUICK: dict[str, Any] = {"chars": 0, "thirds": False, "shift": False, "max_features": 500}


def registered(kind: str, frame: pd.DataFrame, target: str, versions: int = 1, **params: Any) -> str:
    name = f"b{uuid.uuid4().hex[:8]}"
    result = train(kind, frame, target, params=params)
    for _ in range(versions):
        register(log_run(result, frame), name)
    set_alias("champion", 1, "for the tests", name=name)
    return name


@pytest.fixture(scope="module")
def messages() -> pd.DataFrame:
    found = generate_inbox(n_reviews=400, seed=5).review
    return found[found["text"].notna() & found["stars"].notna() & (found["text"].str.strip() != "")].reset_index(drop=True)


@pytest.fixture(scope="module")
def inbox(messages: pd.DataFrame) -> str:
    return registered("logistic", add_label(messages)[["text", "label"]], "label", versions=2, **QUICK)


@pytest.fixture(scope="module")
def numbers() -> tuple[str, pd.DataFrame]:
    "A model on numbers alone, which costs next to nothing, and rows for it."
    frame = load_example("wine").frame
    return registered("logistic", frame, "target"), frame.drop(columns="target")


@pytest.fixture
def rows(messages: pd.DataFrame) -> pd.DataFrame:
    return messages[["review_id", "text", "useful"]].head(60)


@pytest.fixture
def source(rows: pd.DataFrame, tmp_path: Path) -> Path:
    "Sixty good rows and three bad ones."
    path = tmp_path / "in.csv"
    rows.to_csv(path, index=False)
    with path.open("a") as file:
        file.write("bad1,,1\nbad2,too,many,values\nbad3,  ,2\n")
    return path


def read(path: Path) -> pl.DataFrame:
    if path.suffix == ".csv":
        return pl.read_csv(path)
    return pl.read_ndjson(path) if path.suffix == ".jsonl" else pl.read_parquet(path)


def aside(path: Path) -> pd.DataFrame:
    "What was set aside of a file."
    found = read_quarantine("scored")
    return found[found["source"] == str(path)].reset_index(drop=True)


def scoring(out: Path) -> Path:
    return out.with_name(f".{out.name}.scoring")


# ---- what goes in, what comes out


@pytest.mark.parametrize("out", ["out.csv", "out.jsonl", "out.parquet", "out"])
@pytest.mark.parametrize("form", ["csv", "csv.gz", "jsonl", "jsonl.gz", "parquet", "folder"])
def test_any_form_to_any_form(form: str, out: str, rows: pd.DataFrame, inbox: str, tmp_path: Path) -> None:
    path = tmp_path / ("in" if form == "folder" else f"in.{form}")
    if form == "folder":
        path.mkdir()
        for number, part in enumerate((rows[:25], rows[25:])):
            part.to_csv(path / f"{number}.csv", index=False)
        (path / "_SUCCESS").touch()
        (path / "2.csv").touch()  # an empty part
    elif form == "parquet":
        rows.to_parquet(path)
    elif form.startswith("csv"):
        rows.to_csv(path, index=False)
    else:
        rows.to_json(path, orient="records", lines=True)
    result = score(path, tmp_path / out, f"{inbox}@champion", chunk_rows=17)
    found = read(tmp_path / out)
    expected = load_version(find(1, inbox), fast=False).predict([{"text": t} for t in rows["text"]])
    assert (result.rows, result.scored, result.bad, result.version) == (60, 60, 0, 1)
    assert found.columns == ["review_id", "text", "useful", "prediction", "confidence", "model_version"]
    assert found["review_id"].to_list() == rows["review_id"].to_list()
    assert found["text"].to_list() == rows["text"].to_list(), "the input stays as it is: cleaning is for the model"
    assert [int(u) for u in found["useful"]] == rows["useful"].to_list()
    assert found["prediction"].to_list() == [e["prediction"] for e in expected]
    assert np.allclose(found["confidence"], [e["confidence"] for e in expected], atol=1e-6)
    assert set(found["model_version"]) == {1}
    assert not scoring(tmp_path / out).exists()


def test_a_regression_has_values_and_no_confidence(tmp_path: Path) -> None:
    frame = load_example("diabetes").frame
    name = registered("ridge", frame, "target")
    frame.drop(columns="target").to_csv(tmp_path / "in.csv", index=False)
    score(tmp_path / "in.csv", tmp_path / "out.jsonl", name)
    found = read(tmp_path / "out.jsonl")
    expected = load_version(find(1, name), fast=False).model.predict(frame)
    assert np.allclose(found["prediction"], expected)
    assert found["confidence"].is_null().all()


def test_a_row_that_cannot_be_answered_is_set_aside_with_its_number_and_the_reason(inbox: str, tmp_path: Path) -> None:
    lines = [
        b"\xef\xbb\xbfid;text;note\r\n",
        b'1;"Nice; really\r\nnice";a\r\n',
        b"2;Fine\r\n",  # too few
        b'3;Fine 5" thing;b\r\n',
        b"4;Caf\xe9;c\r\n",
        b"\r\n",
        b'5;"never closed;d\r\n',
        b"6;Good;e\r\n",
        b'7;"closed" too early;f\r\n',
        b"8;" + b"x" * 2_000_000 + b";g\r\n",
        b"9;" + b"y" * 30_000 + b";h\r\n",
        b"10;;i\r\n",
        b"11;Bad;\r\n",
        b'12;"the last one, never closed',
    ]
    path = tmp_path / "in.csv"
    path.write_bytes(b"".join(lines))
    result = score(path, tmp_path / "out.csv", inbox, chunk_rows=3, max_bad_share=0.9)
    found, bad = read(tmp_path / "out.csv"), aside(path)
    assert found["id"].to_list() == [1, 3, 6, 11]
    assert found["text"].to_list() == ["Nice; really\r\nnice", 'Fine 5" thing', "Good", "Bad"]
    assert found["note"].to_list() == ["a", "b", "e", None]
    assert (result.rows, result.scored, result.bad) == (12, 4, 8)
    assert bad["row"].to_list() == [2, 4, 5, 7, 8, 9, 10, 12]
    assert dict(zip(bad["row"], bad["reasons"], strict=True)) == {
        2: "2 values for 3 columns",
        4: "not UTF-8: byte 0xe9",
        5: "a quote is not closed, or text follows it",
        7: "a quote is not closed, or text follows it",
        8: "the line has 2,000,006 bytes, the limit is 1,048,576",
        9: "text has 30,000 characters; at most 20,000 are read",
        10: "text must not be missing",
        12: "a quote is not closed, or text follows it",
    }
    assert bad["content"][0] == "2;Fine"
    assert bad["content"].str.len().max() <= 2_000


def test_hostile_json_lines(inbox: str, tmp_path: Path) -> None:
    big = 2**90
    lines = [
        json.dumps({"id": big, "text": "Good ☕", "more": {"a": [1, None, 0.1]}}),
        "{broken",
        "[1, 2]",
        '{"id": 4, "text": NaN}',
        "[" * 100_000,
        '{"id": 6, "text": "half \\ud83d"}',
        json.dumps({"id": 7, "text": 5}),
        json.dumps({"id": 8, "text": ["a"]}),
        json.dumps({"id": 9}),
        json.dumps({"id": 10, "text": "Bad", "prediction": "mine"}),
        '{"id": ' + "9" * 5_000 + "}",
        "",
        json.dumps({"id": 12, "text": "Bad"}),
    ]
    path = tmp_path / "in.jsonl"
    good = [json.dumps({"id": f"g{n}", "text": "Fine"}) for n in range(1_000)]  # the keys of the first thousand are seen at once
    path.write_text("\n".join(good + lines))
    result = score(path, tmp_path / "out.jsonl", inbox)
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()][1_000:]
    assert [f["id"] for f in found] == [big, 7, 12], "a number of ninety bits is not rounded; a number is read as text"
    assert found[0]["more"] == {"a": [1, None, 0.1]}
    assert found[0]["text"] == "Good ☕"
    bad = aside(path)
    assert (bad["row"] - 1_000).to_list() == [2, 3, 4, 5, 6, 8, 9, 10, 11]
    assert bad["reasons"].str.len().min() > 5
    assert "of its own" in bad["reasons"][7]
    assert result.rows == 1_012 == result.scored + result.bad


def test_keys_without_a_column_are_named(inbox: str, tmp_path: Path) -> None:
    good = [json.dumps({"id": n, "text": "Fine", "tags": [n]}) for n in range(1_000)]
    (tmp_path / "in.jsonl").write_text("\n".join([*good, json.dumps({"text": "Fine", "late": 1})]))
    result = score(tmp_path / "in.jsonl", tmp_path / "out.csv", inbox)
    assert result.left_out == ["late"]
    found = pl.read_csv(tmp_path / "out.csv", infer_schema=False)
    assert found.row(3)[:3] == ("3", "Fine", "[3]")
    assert found.row(1_000)[0] is None


def test_columns_can_be_chosen(source: Path, inbox: str, tmp_path: Path) -> None:
    score(source, tmp_path / "out.csv", inbox, keep=["useful", "review_id"])
    assert read(tmp_path / "out.csv").columns[:2] == ["useful", "review_id"]
    with pytest.raises(BatchError, match="Did you mean 'useful'"):
        score(source, tmp_path / "two.csv", inbox, keep=["usefull"])
    with pytest.raises(BatchError, match="'prediction' already.*keep="):
        score(tmp_path / "out.csv", tmp_path / "two.csv", inbox)
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": 1, "text": "Good", "x": 2}))
    score(tmp_path / "in.jsonl", tmp_path / "three.jsonl", inbox, keep=["id"])
    assert set(json.loads((tmp_path / "three.jsonl").read_text())) == {"id", "prediction", "confidence", "model_version"}


def test_files_without_rows(inbox: str, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("id,text\n")
    pd.DataFrame({"id": [1], "text": ["a"]}).head(0).to_parquet(tmp_path / "in.parquet")
    for name in ("in.csv", "in.parquet"):
        result = score(tmp_path / name, tmp_path / f"out-{name}", inbox)
        assert (result.rows, read(result.out).shape) == (0, (0, 5))


def test_types_of_parquet_stay(rows: pd.DataFrame, inbox: str, tmp_path: Path) -> None:
    frame = rows.assign(at=pd.Timestamp("2026-01-02 03:04:05"), kind=pd.Categorical(["a", "b"] * 30), many=[[1, 2]] * 60)
    frame.to_parquet(tmp_path / "in.parquet")
    score(tmp_path / "in.parquet", tmp_path / "out.parquet", inbox, chunk_rows=7)
    found = pd.read_parquet(tmp_path / "out.parquet")
    pd.testing.assert_frame_equal(found[list(frame.columns)], pd.read_parquet(tmp_path / "in.parquet"))
    score(tmp_path / "in.parquet", tmp_path / "out.csv", inbox)
    assert pl.read_csv(tmp_path / "out.csv")["many"][0] == "[1, 2]"


# ---- where rows end


@given(
    table=st.lists(st.tuples(*[st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), max_size=12)] * 2), min_size=1, max_size=9),
    mark=st.sampled_from(batch.MARKS),
)
@examples(max_examples=150, deadline=None)
def test_whatever_csv_writes_is_read_back(table: list[tuple[str, str]], mark: str) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=mark, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows(table)
    found = list(csv_rows(io.BytesIO(text.getvalue().encode()), mark))
    assert all(not problem for _, problem, _ in found)
    assert [tuple(next(csv.reader([c.decode()], delimiter=mark))) for c, _, _ in found] == table


@given(content=st.lists(st.sampled_from([b'"', b",", b"\n", b"\r\n", b"a", b'""', b" ", b"\xff"]), max_size=60).map(b"".join), rows=st.integers(1, 4))
@examples(max_examples=200, deadline=None)
def test_any_bytes_are_cut_so_that_each_chunk_can_be_read_again_by_itself(tmp_path_factory: Any, content: bytes, rows: int) -> None:
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(b"a,b\n" + content)
    source = Source(str(path), "csv", False, ",", ("a", "b"), 4, path.stat().st_size, "")
    chunks = list(cut([source], rows))
    lines = [line for line in content.splitlines() if line.strip(b" ")]  # bad or good, no byte of a row is lost
    assert b"".join(r[0] for c in chunks for r in c.data).split() == b"\n".join(lines).split()
    for chunk in chunks:
        alone = Chunk(**{**vars(chunk), "data": None})
        assert batch._values(alone) == batch._values(chunk)
    assert [c.row for c in chunks] == list(np.cumsum([1, *(c.rows for c in chunks)])[:-1])


def test_one_quote_costs_one_row_and_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO(b'1,"open\n' + b"2,fine\n" * 300_000)
    found = list(csv_rows(file))
    assert [problem != "" for _, problem, _ in found] == [True] + [False] * 300_000
    assert sum(size for _, _, size in found) == len(file.getvalue())
    assert len(list(json_rows(io.BytesIO(b"\n\n{}\n \n{}")))) == 2


# ---- refused at once


def test_what_cannot_be_scored_is_refused_with_advice(source: Path, inbox: str, tmp_path: Path) -> None:
    def refused(match: str, where: object = source, out: str = "out.csv", **how: Any) -> None:
        with pytest.raises(BatchError, match=match):
            score(where, tmp_path / out, inbox, **how)  # type: ignore[arg-type]

    folder = tmp_path / "folder"
    folder.mkdir()
    refused("nothing to score", tmp_path / "none.csv")
    refused("nothing to score", folder)
    refused("among the files that are read", source, "in.csv")
    refused("among the files that are read", f"{tmp_path}/*.csv", "all.csv")
    refused("not 'out.xls'", out="out.xls")
    refused("1 or more", chunk_rows=0)
    refused("No Dask scheduler answers", dask="nonsense://x")
    (folder / "a.csv").write_text("id,text\n1,a\n")
    (tmp_path / "dir.csv").mkdir()
    refused("is a folder already", out="dir.csv")
    (folder / "b.csv").write_text("id,words\n1,a\n")
    refused("differ: in the columns text, words", folder)
    (folder / "b.csv").write_text('{"id": 1}\n')
    refused("differ: csv and json", folder)
    (folder / "b.csv").write_text("id,id\n1,a\n")
    refused("more than one column 'id'", folder)
    (folder / "b.csv").write_bytes("id,text".encode("utf-16"))
    refused("UTF-16", folder)
    (folder / "b.csv").write_text("\n\n")
    refused("does not begin with the names of its columns", folder)
    cut_off = tmp_path / "cut.csv.gz"
    cut_off.write_bytes(gzip.compress(os.urandom(200_000).hex().encode())[:90_000])
    refused("cannot be read|cut off", cut_off)
    (tmp_path / "out").write_text("mine")
    refused("is a file already", out="out")
    (tmp_path / "foreign.csv").write_text("mine")
    refused("did not put it there as it is.*restart=True", out="foreign.csv")
    assert (tmp_path / "foreign.csv").read_text() == "mine"
    assert score(source, tmp_path / "foreign.csv", inbox, restart=True).rows == 63
    with (tmp_path / "foreign.csv").open("a") as file:
        file.write("by hand\n")
    refused("did not put it there as it is", out="foreign.csv")
    with pytest.raises(ValueError, match="has no version"):
        score(source, tmp_path / "out.csv", f"{inbox}/9")


def test_a_gzip_file_that_ends_too_early_gives_no_result(rows: pd.DataFrame, inbox: str, tmp_path: Path) -> None:
    packed = gzip.compress(rows.to_csv(index=False).encode())
    (tmp_path / "in.csv.gz").write_bytes(packed[:-50])
    with pytest.raises(BatchError, match="damaged or cut off"):
        score(tmp_path / "in.csv.gz", tmp_path / "out.csv", inbox, chunk_rows=10)
    assert not (tmp_path / "out.csv").exists()


def test_the_wrong_file_is_noticed_early(inbox: str, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("id,words\n" + "1,a\n" * 100)
    seen: list[Progress] = []
    with pytest.raises(BatchError, match="None of the first 10 rows.*Row 1 of .*in.csv: text is missing"):
        score(tmp_path / "in.csv", tmp_path / "out.csv", inbox, chunk_rows=10, progress=seen.append)
    assert len(seen) == 1, "it stopped after the first chunk"
    assert score(tmp_path / "in.csv", tmp_path / "out.csv", inbox, chunk_rows=10, max_bad_share=1).scored == 0


def test_too_many_bad_rows_give_no_result_but_what_is_done_is_kept(source: Path, inbox: str, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    with pytest.raises(BatchError, match="3 of 63 rows cannot be answered"):
        score(source, out, inbox, max_bad_share=0.04)
    assert not out.exists()
    assert score(source, out, inbox, max_bad_share=0.05).resumed == 63


# ---- once, whatever happens


class Death(BaseException):
    "The process ends here: nothing that follows is done."


@pytest.mark.parametrize("out", ["out.csv", "out"])
def test_it_may_die_at_any_step(out: str, source: Path, inbox: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Everything that outlives a process goes through fsync or a rename: die at the first of them, at the second, ..."
    whole = tmp_path / "whole" / out
    score(source, whole, f"{inbox}/1", chunk_rows=40)
    left = 0

    def mortal(act: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Death
            return act(*args, **more)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, mortal(getattr(os, name)))
    monkeypatch.setattr(batch.shutil, "rmtree", mortal(batch.shutil.rmtree))
    deaths = 0
    while True:
        place = tmp_path / f"life{deaths}" / out
        left = deaths
        try:
            score(source, place, f"{inbox}/1", chunk_rows=40)
            break
        except Death:
            deaths += 1
        left = 10**9
        result = score(source, place, f"{inbox}/1", chunk_rows=40)
        assert (result.rows, result.scored, result.bad) == (63, 60, 3)
        files = lambda p: sorted(p.iterdir()) if p.is_dir() else [p]
        assert [f.read_bytes() for f in files(place)] == [f.read_bytes() for f in files(whole)], f"after death {deaths}"
        assert not scoring(place).exists()
    assert deaths > 12
    assert len(aside(source)) == 3, "the same rows are set aside in the same file, however often"


def test_half_a_line_in_the_journal_counts_for_nothing(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    notes = Journal(path)
    notes.begin({"chunk": 0})
    for number in (1, 2):
        notes.add({"chunk": number})
    whole = path.read_bytes()
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        again = Journal(path)
        assert [e["chunk"] for e in again.entries] == list(range(whole[:end].count(b"\n")))
        again.add({"chunk": 9})
        assert Journal(path).entries[-1] == {"chunk": 9}
    path.write_bytes(b"nonsense\n" + whole)
    with pytest.raises(BatchError, match="damaged.*restart=True"):
        Journal(path)


def interrupted(source: Path, out: Path, model: str, after: int = 2, **how: Any) -> None:
    "Score until some chunks are done."
    def stop(p: Progress) -> None:
        if p.chunk and p.chunk["chunk"] + 1 >= after:
            raise Death

    with pytest.raises(Death):
        score(source, out, model, progress=stop, **how)


def test_a_job_keeps_its_version_and_refuses_to_mix(source: Path, inbox: str, tmp_path: Path) -> None:
    out, spec = tmp_path / "out.csv", f"{inbox}@champion"
    interrupted(source, out, spec, chunk_rows=20)
    for how, match in (({"chunk_rows": 30}, "chunk_rows was 20 and is 30"), ({"keep": ["text"]}, "columns was"), ({"fast": True}, "fast was False")):
        with pytest.raises(BatchError, match=match):
            score(source, out, spec, **{"chunk_rows": 20, **how})  # type: ignore[arg-type]
    set_alias("champion", 2, "meanwhile", name=inbox)
    try:
        shown: list[Progress] = []
        result = score(source, out, spec, chunk_rows=20, progress=shown.append)
        assert (result.version, result.resumed) == (1, 40)
        assert set(read(out)["model_version"]) == {1}
        assert shown[0].rows == 40
        with pytest.raises(BatchError, match="version was .*/1' and is .*/2'.*restart=True"):
            score(source, out, spec, chunk_rows=20)
        assert score(source, out, spec, chunk_rows=20, restart=True).version == 2
        assert set(read(out)["model_version"]) == {2}
    finally:
        set_alias("champion", 1, "as it was", name=inbox)


def test_a_source_that_changes_is_noticed(source: Path, inbox: str, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    interrupted(source, out, inbox, chunk_rows=20)
    text = source.read_text()
    source.write_text(text.replace("bad1", "bad9"))
    with pytest.raises(BatchError, match="in.csv has changed since.*restart=True"):
        score(source, out, inbox, chunk_rows=20)
    with pytest.raises(BatchError, match="has changed while it was scored"):
        score(source, out, inbox, chunk_rows=20, restart=True, progress=lambda p: source.write_text(text + "x,More,1\n") and None if p.rows else None)
    assert not out.exists()
    assert score(source, out, inbox, chunk_rows=20, restart=True).scored == 61


def test_parts_that_are_gone_are_made_again(source: Path, inbox: str, tmp_path: Path) -> None:
    score(source, tmp_path / "whole.csv", inbox, chunk_rows=20)
    out = tmp_path / "out.csv"
    interrupted(source, out, inbox, after=3, chunk_rows=20)
    parts = sorted(scoring(out).glob("parts/*"))
    parts[0].unlink()
    parts[1].write_bytes(b"half")
    assert score(source, out, inbox, chunk_rows=20).resumed == 20
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_two_do_not_write_to_one_place(source: Path, inbox: str, tmp_path: Path) -> None:
    told: list[str] = []

    def another(p: Progress) -> None:
        def run() -> None:
            try:
                score(source, tmp_path / "out.csv", inbox, restart=True)
            except BatchError as e:
                told.append(str(e))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    assert score(source, tmp_path / "out.csv", inbox, progress=another).rows == 63
    assert len(told) == 2
    assert all("Another process is scoring" in t for t in told)


def test_what_is_done_is_not_done_again(source: Path, inbox: str, tmp_path: Path) -> None:
    out, seen = tmp_path / "out.csv", list[Progress]()
    first = score(source, out, inbox, chunk_rows=10, progress=seen.append)
    assert [p.rows for p in seen] == [*range(0, 70, 10)][:7] + [63]
    assert [p.share for p in seen] == sorted(p.share for p in seen)
    assert (seen[0].share, seen[-1].share, seen[-1].bad) == (0, 1, 3)
    before = out.stat().st_mtime_ns
    again = score(source, out, inbox, chunk_rows=10, progress=lambda p: pytest.fail("nothing is left to do"))
    assert (again.rows, again.resumed, again.quarantine, out.stat().st_mtime_ns) == (63, 63, first.quarantine, before)
    assert "63 rows" in str(again)
    assert "inbox" in again._repr_html_() or inbox in again._repr_html_()
    other = score(source, tmp_path / "other.csv", inbox, chunk_rows=10)
    assert other.out.read_bytes() == out.read_bytes(), "scored twice: the same bytes"


# ---- processes that are killed


def lines(out: Path) -> list[dict[str, Any]]:
    path = scoring(out) / "journal.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()][1:]


@pytest.fixture
def long(messages: pd.DataFrame, tmp_path: Path) -> Path:
    "Rows that keep somebody busy for a while."
    path = tmp_path / "long.csv"
    pd.concat([messages[["review_id", "text"]]] * 5, ignore_index=True).to_csv(path, index=False)
    return path


def test_kill_9(long: Path, inbox: str, tmp_path: Path) -> None:
    model, out = f"{inbox}/1", tmp_path / "out.csv"
    score(long, tmp_path / "whole.csv", model, chunk_rows=25)
    for workers, room, chunks in ((1, 2, 2), (2, 4, 6)):
        reports = forks().Queue(room)  # nobody listens: when it is full, the leader waits, and its workers go on
        how = {"chunk_rows": 25, "workers": workers, "progress": reports.put}
        leader = forks().Process(target=score, args=(long, out, model), kwargs=how)
        leader.start()
        until(lambda leader=leader, chunks=chunks: len(lines(out)) == chunks or not leader.is_alive(), "some chunks are done")
        assert leader.is_alive()
        leader.kill()
        leader.join()
        assert leader.exitcode == -signal.SIGKILL
        assert not out.exists()
    crew = {int(line["by"].rpartition(":")[2]) for line in lines(out)} - {os.getpid()}
    until(lambda: not any(psutil.pid_exists(pid) for pid in crew), "its workers end with the leader", seconds=120)
    resumed = score(long, out, model, chunk_rows=25)
    assert resumed.resumed == 6 * 25 < resumed.rows == resumed.scored
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_a_worker_process_that_is_killed(long: Path, inbox: str, tmp_path: Path) -> None:
    def kill(p: Progress) -> None:
        if p.chunk:
            os.kill(int(p.chunk["by"].rpartition(":")[2]), signal.SIGKILL)

    out, how = tmp_path / "out.jsonl", {"chunk_rows": 25}
    with pytest.raises(BatchError, match="run the same command again, with fewer workers"):
        score(long, out, f"{inbox}/1", workers=2, progress=kill, **how)  # type: ignore[arg-type]
    assert not out.exists()
    assert score(long, out, f"{inbox}/1", **how).resumed > 0  # type: ignore[arg-type]
    score(long, tmp_path / "whole.jsonl", f"{inbox}/1", **how)  # type: ignore[arg-type]
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_dask_with_a_worker_that_is_killed(long: Path, inbox: str, tmp_path: Path) -> None:
    dead: list[str] = []
    score(long, tmp_path / "whole.parquet", f"{inbox}/1", chunk_rows=25)

    def kill(p: Progress) -> None:
        if p.chunk and not dead:
            dead.append(p.chunk["by"])
            os.kill(int(p.chunk["by"].rpartition(":")[2]), signal.SIGKILL)

    with local_cluster(2) as address:
        result = score(long, tmp_path / "out.parquet", f"{inbox}/1", chunk_rows=25, dask=address, progress=kill)
    assert dead
    assert result.rows == result.scored
    assert result.out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_a_cluster_without_workers_is_refused(source: Path, inbox: str, tmp_path: Path) -> None:
    with local_cluster(0) as address, pytest.raises(BatchError, match="has no workers"):
        score(source, tmp_path / "out.csv", inbox, dask=address)


# ---- memory


MEMORY = """
import sys
import psutil
from mlops_lib.serving.batch import score

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024

score(sys.argv[2], sys.argv[4] + "/small.jsonl", sys.argv[1], chunk_rows=500)
small = peak()
score(sys.argv[3], sys.argv[4] + "/large.jsonl", sys.argv[1], chunk_rows=500)
print(small, peak())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_ten_times_the_rows_take_no_more_memory(numbers: tuple[str, pd.DataFrame], tmp_path: Path) -> None:
    name, frame = numbers
    small = pd.concat([frame] * 12, ignore_index=True)
    small.to_csv(tmp_path / "small.csv", index=False)
    pd.concat([small] * 10).to_csv(tmp_path / "large.csv", index=False)
    args = [name, str(tmp_path / "small.csv"), str(tmp_path / "large.csv"), str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", MEMORY, *args], stdout=subprocess.PIPE, text=True, check=True)
    before, after = map(float, done.stdout.split())
    size = (tmp_path / "large.csv").stat().st_size / 2**20
    assert len(read(tmp_path / "large.jsonl")) == 10 * len(small)
    assert after - before < 15, f"{before:.0f} MB for {len(small):,} rows, {after:.0f} MB for ten times as many ({size:.1f} MB)"
