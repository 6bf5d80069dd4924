"""Versions in memory: what they refuse, that they answer as the model does, and what is answered while they are exchanged."""

import asyncio
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import until

from mlops_lib.data.features import FEATURES, clean_text, create_features
from mlops_lib.data.synthetic import generate_inbox
from mlops_lib.data.tables import add_label, load_reviews
from mlops_lib.registry import tracking
from mlops_lib.registry.gates import RegistryError, find, set_alias
from mlops_lib.registry.tracking import TRUSTED, log_run, model_uri, open_store, register
from mlops_lib.servers import free_port
from mlops_lib.serving import predictor
from mlops_lib.serving.predictor import (
    Batcher,
    Loaded,
    NoModel,
    Overloaded,
    PredictError,
    Predictor,
    load_version,
    made_up_rows,
)
from mlops_lib.training import train

REAL = Path(__file__).parents[3] / "shared" / "data" / "real_reviews.jsonl"
QUICK: dict[str, Any] = {"chars": 0, "thirds": False, "shift": False}


def registered(frame: pd.DataFrame, kind: str = "ordinal", name: str | None = None, data: bool = True, **how: Any) -> str:
    "Train, record and register; the model's name."
    name = name or f"m{uuid.uuid4().hex[:8]}"
    params = {**(QUICK if "text" in frame else {}), **how.pop("params", {})}
    result = train(kind, frame, params=params, **how)
    register(log_run(result, frame if data else None), name)
    return name


def loaded(name: str, version: int = 1, **how: Any) -> Loaded:
    return load_version(find(version, name), **how)


@pytest.fixture(scope="module")
def messages() -> pd.DataFrame:
    reviews = generate_inbox(n_reviews=500, seed=5).review.drop_duplicates("text").dropna(subset="stars")
    made = create_features(add_label(clean_text(reviews)))
    return made[made.text != ""].reset_index(drop=True)


@pytest.fixture(scope="module")
def trained(messages: pd.DataFrame) -> list[Any]:
    return [train(kind, messages, params=QUICK) for kind in ("ordinal", "naive_bayes", "logistic")]


def with_versions(trained: list[Any], messages: pd.DataFrame) -> str:
    "A model with a version of each; the first one is champion."
    name = f"m{uuid.uuid4().hex[:8]}"
    for result in trained:
        register(log_run(result, messages), name)
    set_alias("champion", 1, "the first one", name=name)
    return name


@pytest.fixture(scope="module")
def inbox(trained: list[Any], messages: pd.DataFrame) -> str:
    return with_versions(trained, messages)


@pytest.fixture(scope="module")
def customers() -> pd.DataFrame:
    rng, n = np.random.default_rng(1), 400
    frame = pd.DataFrame({
        "tenure": rng.integers(0, 72, n), "charges": rng.normal(60, 10, n).round(2),
        "contract": rng.choice(["Month-to-month", "One year", "Two year"], n), "paperless": rng.random(n) < 0.5,
        "total": rng.choice(["12.5", "700", " ", "88"], n), "since": pd.Timestamp("2024-01-01") + pd.to_timedelta(rng.integers(0, 9_000, n), "h"),
        "visits": rng.integers(0, 9, n).astype(float),
    })  # fmt: skip
    frame.loc[::7, "visits"] = np.nan
    return frame.assign(churn=np.where(frame.tenure + rng.normal(0, 9, n) < 30, "yes", "no"))


@pytest.fixture(scope="module")
def churn(customers: pd.DataFrame) -> Loaded:
    return loaded(registered(customers, "forest", target="churn", params={"n_estimators": 30}))


@pytest.fixture(scope="module")
def text(inbox: str) -> Loaded:
    return loaded(inbox)


ROW = {
    "tenure": 5, "charges": 61.5, "contract": "One year", "paperless": True, "total": "700",
    "since": "2024-05-01T12:00:00", "visits": 3,
}  # fmt: skip


# ---- the same features, the same answers


def test_a_request_in_a_bad_moment_is_no_model_without_a_contract(inbox: str, monkeypatch: pytest.MonkeyPatch) -> None:
    "The report is there, but cannot be read just now: the version is not taken, rather than taken without its checks."
    version = find(1, inbox)
    monkeypatch.setattr(type(version), "_file", lambda *_: (_ for _ in ()).throw(RegistryError("the server hiccups")))
    with pytest.raises(RegistryError, match="hiccups"):
        load_version(version)


def test_a_message_has_the_features_that_it_had_in_training(text: Loaded, messages: pd.DataFrame) -> None:
    reviews = load_reviews(REAL).head(150) if REAL.exists() else generate_inbox(n_reviews=150, seed=9).review
    reviews = reviews[reviews.text.str.strip() != ""].assign(categories="Restaurants, Thai")
    assert set(text.features) >= {"text", "word_count", "hour_of_day"}
    wanted = create_features(clean_text(reviews))[text.features].to_dict("records")
    given: Any = reviews[["text", "date", "categories"]].to_dict("records")
    assert [text.read([row])[0] for row in given] == wanted, "one by one"
    assert text.read(given) == wanted, "and together"
    model = find(text.version, text.name).model
    frame = pd.DataFrame(wanted)
    said = text.predict(given)
    assert [a["prediction"] for a in said] == model.predict(frame).tolist()
    found = np.array([list(a["probabilities"].values()) for a in said])
    assert np.abs(found - model.predict_proba(frame)).max() < 1e-5 and text.runtime == "onnx"


@pytest.mark.parametrize("version", [1, 2, 3])
def test_onnx_and_native_give_the_model_s_answers(inbox: str, version: int, messages: pd.DataFrame) -> None:
    model = find(version, inbox).model
    rows = messages.tail(60)
    records: Any = rows.to_dict("records")
    for fast in (True, False):
        one = loaded(inbox, version, fast=fast)
        assert one.runtime == ("onnx" if fast else "native") and (one.name, one.version) == (inbox, version)
        said = one.answer([{name: row[name] for name in one.features} for row in records])
        assert [a["prediction"] for a in said] == model.predict(rows).tolist() and said.version == version
        assert [list(map(str, model.classes))] * 60 == [list(a["probabilities"]) for a in said]
        best = [(a["confidence"], a["probabilities"][str(a["prediction"])]) for a in said]
        assert all(c == p <= 1 for c, p in best) and all(abs(sum(a["probabilities"].values()) - 1) < 1e-6 for a in said)


def test_a_table_s_rows_are_answered_as_the_model_does(churn: Loaded, customers: pd.DataFrame) -> None:
    frame = customers.drop(columns="churn")
    model = find(churn.version, churn.name).model
    rows: Any = [{k: None if v is pd.NaT or v != v else v for k, v in row.items()} for row in frame.to_dict("records")]
    assert [a["prediction"] for a in churn.predict(rows)] == model.predict(frame).tolist()
    as_json = json.loads(frame.to_json(orient="records", date_format="iso"))
    assert churn.read(as_json) == churn.read(rows) and not any("warnings" in a for a in churn.predict(as_json))


def test_a_regression_answers_with_values(customers: pd.DataFrame) -> None:
    one = loaded(registered(customers.drop(columns="total"), "ridge", target="charges"))
    row = {k: v for k, v in ROW.items() if k not in ("total", "charges")} | {"churn": "no"}
    said = one.predict([row, row])
    assert said[0] == said[1] and isinstance(said[0]["prediction"], float) and said[0]["confidence"] is said[0]["probabilities"] is None
    assert one.task == "regression" and one.classes is None


def test_texts_are_cleaned_only_where_the_training_s_were(messages: pd.DataFrame) -> None:
    raw = messages.assign(text="<b>" + messages.text + "</b>  see https://example.org")[["text", "label"]]
    one = loaded(registered(raw))
    asked = "<b>Good!</b>  see https://example.org"
    assert one.read([asked]) == [{"text": asked}] and not one.clean
    given = messages.assign(word_count=messages.word_count * 2 + messages.index % 3)  # not what lesson 15 makes
    own = loaded(registered(given))
    with pytest.raises(PredictError, match="word_count is missing"):
        own.predict(["Good!"])
    assert own.read([{"text": "Good!  ", "word_count": 9}])[0]["word_count"] == 9


def test_a_model_that_says_little_of_itself(messages: pd.DataFrame) -> None:
    "No signature, no example, no report of the rows: as runs were logged without their data."
    one = loaded(registered(messages, data=False))
    assert one.runtime == "onnx" and one.predict(["So good!"])[0]["prediction"] in (0, 1, 2)
    with pytest.raises(PredictError, match="txet is not known; did you mean 'text'"):
        one.predict([{"text": "fine", "txet": "fine"}])


# ---- what is refused


@pytest.mark.parametrize(("change", "problem"), [
    ({"tenure": "5"}, "tenure should be a whole number, is '5'"), ({"tenure": 5.5}, "tenure should be a whole number, is 5.5"),
    ({"tenure": True}, "tenure should be a whole number, is True"), ({"tenure": None}, "tenure must not be missing"),
    ({"tenure": float("nan")}, "tenure must not be missing"), ({"charges": math.inf}, "charges is no number of a usable size: inf"),
    ({"charges": 10**400}, "charges is no number of a usable size"), ({"charges": [1]}, r"charges should be a number, is \[1\]"),
    ({"contract": 1}, "contract should be text, is 1"), ({"contract": "x" * 301}, "contract has 301 characters; at most 300"),
    ({"paperless": "yes"}, "paperless should be true or false, is 'yes'"), ({"since": "someday"}, "since is no date: 'someday'"),
    ({"since": 5}, "since is no date: 5"), ({"since": "9" * 99}, "since is no date"), ({"total": {}}, "total should be a number"),
    ({"tenur": 5}, "tenur is not known; did you mean 'tenure'?"), ({"x" * 5_000: 1}, "x{100} is not known"), ({5: 1}, "5 is not known"),
])  # fmt: skip
def test_a_row_that_cannot_be_answered(churn: Loaded, change: dict, problem: str) -> None:
    with pytest.raises(PredictError, match=problem) as e:
        churn.predict([ROW, {**ROW, **change}])
    assert [p["row"] for p in e.value.problems] == [1] and e.value.count == 1 and len(str(e.value)) < 500


@pytest.mark.parametrize(("row", "problem"), [
    ("", "text is blank"), ("\n\t ", "text is blank"), ("x" * 20_001, "text has 20,001 characters"), (5, "is no row but 5"),
    (None, "is no row but None"), (["text"], "is no row"), ({}, "text is missing"), ({"txt": "x"}, "text is missing; did you mean it by 'txt'?"),
    ({"text": "a", "date": "03/04/2024"}, "date is no date"), ({"text": "a", "word_count": -1.5}, "word_count should be a whole number"),
])  # fmt: skip
def test_a_message_that_cannot_be_answered(text: Loaded, row: Any, problem: str) -> None:
    with pytest.raises(PredictError, match=problem):
        text.predict([row])


def test_all_that_is_wrong_is_told_up_to_a_limit(churn: Loaded) -> None:
    with pytest.raises(PredictError) as e:
        churn.predict([{**ROW, "tenure": "x", "charges": "y"}] * 50)
    assert (len(e.value.problems), e.value.count) == (20, 100) and "and 99 more" in str(e.value)
    assert e.value.problems[1] == {"row": 0, "field": "charges", "problem": "should be a number, is 'y'"}


def test_what_may_be_missing_is_what_was_missing(churn: Loaded) -> None:
    "Blanks among the totals were missing numbers; visits had gaps; the rest is required."
    assert {f.name for f in churn.signature if not f.required} == {"total", "visits"}
    for row in ({**ROW, "total": None, "visits": float("nan")}, {k: v for k, v in ROW.items() if k not in ("total", "visits")}, {**ROW, "total": " "}):
        assert churn.predict([row])[0]["prediction"] in ("yes", "no")


def test_what_is_far_from_the_training_is_answered_with_a_warning(churn: Loaded, text: Loaded) -> None:
    assert churn.predict([{**ROW, "tenure": 900, "contract": "One yaer"}])[0]["warnings"] == [
        "tenure 900 is far outside what the model was trained on",
        "contract 'One yaer' was not there in training; did you mean 'One year'?",
    ]
    assert "warnings" not in churn.predict([{**ROW, "tenure": 100}])[0], "a little outside is no news"
    assert any("text_length" in w for w in text.predict(["good " * 3_000])[0]["warnings"])


def test_cells_of_a_file_are_read_as_what_they_mean(churn: Loaded) -> None:
    cells = {k: str(v) for k, v in ROW.items()} | {"more": "columns"}
    assert churn.check([cells], loose=True) == churn.check([ROW])
    with pytest.raises(PredictError, match="tenure should be a whole number, is 'five'"):
        churn.check([{**cells, "tenure": "five"}], loose=True)


def test_dates_are_read_as_in_training(churn: Loaded, text: Loaded) -> None:
    "A table's clock is the one on the wall; a message's is in UTC."
    noon = [{**ROW, "since": since} for since in ("2024-05-01 12:00", datetime(2024, 5, 1, 12), "2024-05-01T12:00+05:00", np.datetime64("2024-05-01T12:00"))]
    assert len({str(row["since"]) for row in churn.read(noon)}) == 1
    sent = [{"text": "a", "date": date} for date in ("2024-05-01T12:00Z", "2024-05-01T14:00+02:00", datetime(2024, 5, 1, 12, tzinfo=UTC), "1714564800")]
    assert {row["hour_of_day"] for row in text.read(sent)} == {12} and text.read(["a"])[0]["hour_of_day"] == -1


def answered(loaded: Loaded, rows: list) -> tuple[list, list | None]:
    "Answers, or what is wrong."
    try:
        return loaded.predict(rows), None
    except PredictError as e:
        return [], e.problems


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3), max_leaves=5,
)  # fmt: skip


@given(st.lists(anything | st.fixed_dictionaries({"text": st.text(max_size=40)}, optional={"date": anything, "word_count": anything}), max_size=3))
@settings(deadline=None, max_examples=60)
def test_whatever_comes_is_answered_or_refused(text: Loaded, rows: list) -> None:
    said, problems = answered(text, rows)
    if problems is not None:
        assert {p["row"] for p in problems} <= set(range(len(rows)))
        return
    assert len(said) == len(rows) and all(0 < a["confidence"] <= 1 for a in said)
    json.dumps(said, allow_nan=False)


@given(st.fixed_dictionaries({name: anything | st.just(value) for name, value in ROW.items()}))
@settings(deadline=None, max_examples=60)
def test_whatever_a_table_s_row_holds(churn: Loaded, row: dict) -> None:
    said, problems = answered(churn, [row])
    assert {p["field"] for p in problems or ()} <= set(row) | {""}
    json.dumps(said, allow_nan=False)


def test_many_threads_get_their_own_answers(text: Loaded, messages: pd.DataFrame) -> None:
    texts = messages.text.head(60).tolist()
    alone = [text.predict([t])[0] for t in texts]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda t: text.predict([t])[0], texts)) == alone
    assert text.predict([]) == []


def test_rows_are_made_up_without_quoting_anybody(text: Loaded, churn: Loaded, customers: pd.DataFrame) -> None:
    for one in (text, churn):
        model = find(one.version, one.name).model
        rows = made_up_rows(model, one.signature, rows=40)
        assert rows == made_up_rows(model, one.signature, rows=40) and all(list(r) == one.features for r in rows)
        assert len(one.predict(rows)) == 40
    assert any(row["visits"] is None for row in rows) and all(0 <= row["tenure"] <= 72 for row in rows)


# ---- batches that wait for no clock


class Slow:
    "Work that lasts until it is let go; it notes what came together."

    def __init__(self) -> None:
        self.gate, self.batches = threading.Event(), list[tuple[Any, list]]()

    def __call__(self, key: Any, rows: list) -> list:
        self.batches.append((key, rows))
        assert self.gate.wait(60)
        if "bad" in rows:
            raise ValueError("a bad row")
        return [row * 2 for row in rows]


async def started(slow: Slow) -> None:
    while not slow.batches:
        await asyncio.sleep(0.001)


def test_what_arrives_while_a_batch_is_computed_makes_the_next() -> None:
    slow = Slow()
    batcher = Batcher(slow)

    async def run() -> list:
        first = asyncio.create_task(batcher.ask([1]))
        await started(slow)
        rest = [asyncio.create_task(batcher.ask([n, n + 1])) for n in range(10, 20)]
        await asyncio.sleep(0)
        slow.gate.set()
        return await asyncio.gather(first, *rest)

    assert asyncio.run(run()) == [[2], *([2 * n, 2 * n + 2] for n in range(10, 20))]
    assert [len(rows) for _, rows in slow.batches] == [1, 20]
    slow.batches.clear()
    assert asyncio.run(batcher.ask([4])) == [8], "another event loop, later"
    batcher.close()
    with pytest.raises(RuntimeError):
        asyncio.run(batcher.ask([4]))


def test_batches_are_bounded_and_keys_do_not_mix() -> None:
    slow = Slow()
    batcher = Batcher(slow, max_rows=4)

    async def run() -> list:
        first = asyncio.create_task(batcher.ask([0], "a"))
        await started(slow)
        asked = [([1, 2, 3], "a"), ([4], "b"), ([5], "a"), ([6, 7], "a"), (list(range(9)), "b")]
        rest = [asyncio.create_task(batcher.ask(rows, key)) for rows, key in asked]
        await asyncio.sleep(0)
        slow.gate.set()
        return await asyncio.gather(first, *rest)

    assert [len(a) for a in asyncio.run(run())] == [1, 3, 1, 1, 2, 9]
    assert slow.batches[1:] == [("a", [1, 2, 3, 5]), ("b", [4]), ("a", [6, 7]), ("b", list(range(9)))]
    batcher.close()


def test_one_caller_s_error_is_one_caller_s() -> None:
    slow = Slow()
    batcher = Batcher(slow)

    async def run() -> list:
        first = asyncio.create_task(batcher.ask([0]))
        await started(slow)
        rest = [asyncio.create_task(batcher.ask(rows)) for rows in ([1], ["bad"], [2, 3])]
        await asyncio.sleep(0)
        slow.gate.set()
        return await asyncio.gather(first, *rest, return_exceptions=True)

    first, one, bad, two = asyncio.run(run())
    assert (first, one, two) == ([0], [2], [4, 6]) and str(bad) == "a bad row"
    batcher.close()


def test_whoever_goes_is_not_computed_and_hurts_nobody() -> None:
    slow = Slow()
    batcher = Batcher(slow, max_waiting=5)

    async def run() -> list:
        first = asyncio.create_task(batcher.ask([0]))
        await started(slow)
        gone, stays = [asyncio.create_task(batcher.ask([n] * 2)) for n in (1, 2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="4 rows wait already") as e:
            await batcher.ask([3, 3])
        assert e.value.retry_after >= 1
        gone.cancel()
        first.cancel()
        slow.gate.set()
        return await asyncio.gather(first, gone, stays, return_exceptions=True)

    first, gone, stays = asyncio.run(run())
    assert isinstance(first, asyncio.CancelledError) and isinstance(gone, asyncio.CancelledError) and stays == [4, 4]
    assert slow.batches[1:] == [(None, [2, 2])]
    batcher.close()


@pytest.mark.parametrize("fast", [True, False])
def test_asked_at_once_and_asked_alone(inbox: str, messages: pd.DataFrame, fast: bool) -> None:
    texts = messages.text.head(24).tolist()

    async def run(p: Predictor) -> list:
        asked = [p.apredict([t]) for t in texts] + [p.apredict(["ok", " "]), p.apredict(texts)]
        return await asyncio.gather(*asked, return_exceptions=True)

    for inline in (0.0, 60.0):
        with Predictor(f"{inbox}/1", fast=fast, inline=inline) as p:
            *single, refused, together = asyncio.run(run(p))
            assert isinstance(refused, PredictError) and refused.problems[0]["row"] == 1
            labels = [a["prediction"] for a in p.predict(texts)]
            assert [a[0]["prediction"] for a in single] == [a["prediction"] for a in together] == labels
            assert {a.version for a in single} == {together.version} == {1}


# ---- a predictor follows its alias


def test_versions_are_exchanged_under_load(inbox: str) -> None:
    "No request fails; whoever asks after an answer of version n is answered by version n or a later one."
    failures, seen, stop = list[BaseException](), list[tuple[float, float, int]](), threading.Event()

    def client(p: Predictor) -> None:
        while not stop.is_set():
            begin = time.perf_counter()
            try:
                said = p.predict(["Wonderful staff!"])
                seen.append((begin, time.perf_counter(), said.version))
            except BaseException as e:
                failures.append(e)

    async def clients(p: Predictor) -> None:
        async def one() -> None:
            while not stop.is_set():
                begin = time.perf_counter()
                said = await p.apredict(["Terrible, never again."])
                seen.append((begin, time.perf_counter(), said.version))

        await asyncio.gather(*(one() for _ in range(4)))

    set_alias("champion", 1, "begin", name=inbox)
    changes: list[int] = []
    with Predictor(f"{inbox}@champion", every=0.05, inline=0.0) as p, ThreadPoolExecutor(3) as threads:
        p.on_change += [lambda loaded: changes.append(loaded.version), lambda loaded: 1 / 0]
        jobs = [threads.submit(client, p), threads.submit(client, p), threads.submit(asyncio.run, clients(p))]
        try:
            for version in (2, 3):
                enough = len(seen) + 20
                until(lambda enough=enough: len(seen) >= enough, "there is load")  # type: ignore[misc]
                set_alias("champion", version, "next", name=inbox)
                until(lambda version=version: seen[-1][2] == version, f"version {version} answers")  # type: ignore[misc]
        finally:
            stop.set()
        for job in jobs:
            job.result(60)
    assert not failures and changes == [2, 3] and {v for *_, v in seen} == {1, 2, 3}
    newest, ends = 0, sorted((end, version) for _, end, version in seen)
    for begin, _, version in sorted(seen):
        while ends and ends[0][0] < begin:
            newest = max(newest, ends.pop(0)[1])
        assert version >= newest, "an old version answered after a new one had"


@pytest.fixture
def moving(trained: list[Any], messages: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Predictor, Path]]:
    "A predictor, and the files of a version that comes next."
    name = with_versions(trained[:2], messages)
    monkeypatch.setattr(predictor, "RETRY", (0.0, 0.0))
    with Predictor(f"{name}@champion", every=600) as p:
        assert p.current.version == 1
        yield p, Path(model_uri(f"{name}/2", open_store()).removeprefix("file://"))


def break_files(files: Path) -> None:
    shutil.rmtree(files)


def break_model(files: Path) -> None:
    (files / "model.skops").write_bytes(b"not a model")


def break_trust(files: Path) -> None:
    path = files / "MLmodel"
    path.write_text(path.read_text().replace("serialization_format: skops", "serialization_format: cloudpickle"))


@pytest.mark.parametrize(("damage", "problem"), [
    (break_files, "are not at"), (break_model, "cannot be taken"), (break_trust, "only 'skops' runs no code"),
])  # fmt: skip
def test_a_bad_version_leaves_the_old_one_in_service(
    moving: tuple[Predictor, Path], damage: Callable[[Path], None], problem: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    p, files = moving
    shutil.copytree(files, tmp_path / "whole")
    damage(files)
    set_alias("champion", 2, "next", name=p.name)
    with caplog.at_level(logging.WARNING, logger=predictor.log.name):
        assert [p.refresh() for _ in range(3)] == [False] * 3
    assert p.problem and problem in p.problem and f"{p.name} 2" in p.problem
    assert p.predict(["fine"]).version == 1 and p.loaded == [1]
    assert len([r for r in caplog.records if "stays" in r.getMessage()]) == 1, "told once"
    shutil.rmtree(files, ignore_errors=True)
    shutil.copytree(tmp_path / "whole", files)
    assert p.refresh() and p.problem is None and p.predict(["fine"]).version == 2
    assert p.get(1).version == 1, "whoever was told of it a moment ago may still ask"


def test_a_version_that_cannot_answer_is_not_taken(moving: tuple[Predictor, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    p, _ = moving
    real, calls = predictor.read_model, []

    def mute(*args: Any) -> Any:
        calls.append(args)
        model = real(*args)
        model.predict_proba = lambda rows: 1 / 0
        return model

    monkeypatch.setattr(predictor, "read_model", mute)
    monkeypatch.setattr(predictor, "RETRY", (600.0, 600.0))
    set_alias("champion", 2, "next", name=p.name)
    assert not p.refresh() and not p.refresh() and len(calls) == 1, "not tried again at once"
    assert not p.refresh(again=True) and len(calls) == 2, "unless asked to"
    assert "ZeroDivisionError" in (p.problem or "") and p.current.version == 1


def test_a_registry_that_is_gone_leaves_everything_as_it_is(moving: tuple[Predictor, Path]) -> None:
    p, _ = moving
    store, nobody = p.store, f"http://127.0.0.1:{free_port()}"
    p._store, p._given = None, nobody
    assert not p.refresh() and "No MLflow server answers" in (p.problem or "")
    assert p.predict(["fine"]).version == 1
    p._store = store
    assert not p.refresh() and p.problem is None
    with Predictor(f"{p.name}@champion", store=nobody) as other, pytest.raises(NoModel, match="No MLflow server answers"):
        other.predict(["fine"])


def test_an_alias_that_is_taken_away_or_comes_late(moving: tuple[Predictor, Path]) -> None:
    p, _ = moving
    p.store.delete_registered_model_alias(p.name, "champion")
    assert not p.refresh() and "has no version 'champion'" in (p.problem or "") and p.current.version == 1
    with Predictor(f"{p.name}@later", every=0.02) as late:
        with pytest.raises(NoModel, match="has no version 'later'"):
            late.current  # noqa: B018
        p.store.set_registered_model_alias(p.name, "later", "2")
        assert until(lambda: late.loaded, "it comes") == [2] and late.problem is None


def test_more_versions_are_kept_beside_the_current_one(inbox: str) -> None:
    with Predictor(f"{inbox}/1", keep=1) as p:
        two = p.load(2)
        assert p.load(1) is p.current and p.get(2) is two is p.load(2) and p.loaded == [1, 2]
        assert p.predict(["fine"], version=2).version == 2 and asyncio.run(p.apredict(["fine"], version=2)).version == 2
        p.load(3)
        assert p.loaded == [1, 3]
        with pytest.raises(NoModel, match=rf"{inbox} 2 is not loaded here; there is \[1, 3\]"):
            p.predict(["fine"], version=2)
        with pytest.raises(ValueError, match="no version '77'"):
            p.load(77)


@pytest.mark.parametrize("name", ["inbox@", "@champion", "inbox/latest", "/3"])
def test_a_name_that_says_nothing(name: str) -> None:
    with pytest.raises(PredictError, match="inbox@champion"):
        Predictor(name)


def test_a_registered_name_alone_means_its_champion(inbox: str) -> None:
    assert (Predictor(inbox).name, Predictor(inbox).where) == (inbox, "champion")
    assert Predictor("a/b@c").name == "a/b" and Predictor(f"{inbox}/2").where == 2


# ---- MLflow's own server


def test_mlflow_serves_the_same_versions_with_the_same_answers(text: Loaded, messages: pd.DataFrame, tmp_path: Path) -> None:
    "It knows the model, but not lesson 15: it wants a row as `read` makes it."
    port, out = free_port(), tmp_path / "serve.log"
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/{text.name}/{text.version}"]
    command += ["-h", "127.0.0.1", "-p", str(port), "--env-manager", "local"]
    environ = {**os.environ, "MLFLOW_TRACKING_URI": os.environ["MLOPS_MLFLOW_TRACKING_URI"]}
    environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"

    def ask(rows: list[dict]) -> tuple[int, Any]:
        frame = {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]}
        body = json.dumps({"dataframe_split": frame}).encode()
        asked = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(asked, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as e:
            return e.code, json.load(e)

    def up() -> bool:
        assert process.poll() is None, out.read_text()[-2_000:]
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).status == 200
        except OSError:
            return False

    with out.open("w") as log:
        process = subprocess.Popen(command, env=environ, stdout=log, stderr=log, start_new_session=True)
        try:
            until(up, "mlflow models serve")
            texts = messages.text.tail(40).tolist()
            status, said = ask(text.read(texts))
            assert status == 200 and said["predictions"] == [a["prediction"] for a in text.predict(texts)]
            assert ask([{"text": t} for t in texts])[0] == 400, "a text alone is not enough for it"
        finally:
            os.killpg(process.pid, 15)
            process.wait(30)


def test_what_a_run_says_of_its_texts(messages: pd.DataFrame) -> None:
    "Written by lesson 30 and needed here."
    part = tracking._made_of_text(messages, ["text", *FEATURES])
    assert part["text"]["clean"] and set(part["text"]["made"]) >= {"word_count", "upper_share"}
    assert "mlops_lib.training.classic.FittedModel" in TRUSTED
