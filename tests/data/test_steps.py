"""The data steps: nothing is lost, nothing is taken twice, nothing is done without need."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_lib.data import layers, steps
from mlops_lib.data.layers import LayerError, entries, latest, load, version_of
from mlops_lib.data.quality import QualityError
from mlops_lib.data.steps import STEPS, StepError, extract, prepare, read_params, run_chain, run_step
from mlops_lib.data.synthetic import generate_inbox

CHEAP = list(STEPS)[:5]
KNOBS = {"rows": 300, "seed": 7}
REAL = Path(__file__).parents[3] / "shared" / "data" / "real_reviews.jsonl"


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data"
    monkeypatch.setattr(layers, "settings", layers.settings.model_copy(update={"data_dir": folder}))
    monkeypatch.setattr(steps, "settings", steps.settings.model_copy(update={"root": tmp_path, "data_dir": folder}))
    return folder


def write(path: Path, frame: pd.DataFrame) -> Path:
    frame.assign(date=frame["date"].astype("str")).to_json(path, orient="records", lines=True)
    return path


def clean(n: int, seed: int = 7) -> pd.DataFrame:
    "Reviews without a fault."
    return generate_inbox(n, seed, duplicates=0, missing=0, invalid=0).review


# extract


@given(st.lists(st.lists(st.integers(0, 30), max_size=12), max_size=6), st.booleans())
@settings(max_examples=50, deadline=None)
def test_extract_loses_nothing_and_takes_nothing_twice(reads: list[list[int]], polars: bool) -> None:
    "Each read shows some of the messages, in any order; dates have nothing to do with the order of arrival."
    start = pd.Timestamp("2024-01-01")
    row = lambda i: {"review_id": f"r{i}", "text": str(i), "date": start + pd.Timedelta(days=(i * 7) % 31)}
    empty = pl.DataFrame(schema={"review_id": pl.String, "text": pl.String, "date": pl.Datetime("us")})
    have = empty if polars else empty.to_pandas()
    seen: set[int] = set()
    for ids in reads:
        shown = list(dict.fromkeys(ids))
        source = pl.DataFrame([row(i) for i in shown], schema=empty.schema)
        newest = have["date"].max() if len(have) else None
        found = extract(source if polars else source.to_pandas(), have)
        assert list(found.new["review_id"]) == [f"r{i}" for i in shown if i not in seen], "in the order of the source"
        assert found.known == sum(i in seen for i in shown)
        assert found.late == (0 if newest is None else sum(row(i)["date"] <= newest for i in shown if i not in seen))
        have = pl.concat([have, found.new]) if polars else pd.concat([have, found.new], ignore_index=True)
        seen |= set(shown)
        dates = [row(i)["date"] for i in seen]
        assert (found.watermark is None and not dates) or pd.Timestamp(found.watermark) == max(dates)
    assert len(have) == len(seen)


def test_extract_without_ids_and_with_repeats() -> None:
    when = pd.to_datetime(["2024-01-01", None, "2024-01-01", "2024-01-01"]).astype("datetime64[us]")
    source = pd.DataFrame({"review_id": [None, None, "a", "a"], "text": ["x", "y", "z", "z"], "date": when})
    first = extract(source)
    assert len(first.new) == 4, "raw data is as it came: repeats within one read stay"
    assert extract(source, first.new).new.empty, "rows without an id are recognised by all their values"
    grown = pd.concat([source, source.iloc[[0]].assign(text="new")], ignore_index=True)
    assert extract(grown, first.new).new["text"].tolist() == ["new"]


def test_a_date_in_the_future_does_not_move_the_watermark() -> None:
    when = pd.to_datetime(["2024-01-01", "2099-01-01"]).astype("datetime64[us]")
    first = extract(pd.DataFrame({"review_id": ["a", "b"], "text": ["x", "y"], "date": when}))
    assert pd.Timestamp(first.watermark) == when[0]
    more = pd.DataFrame({"review_id": ["c"], "text": ["z"], "date": when[:1] + pd.Timedelta(days=1)})
    found = extract(more, first.new)
    assert (found.late, pd.Timestamp(found.watermark)) == (0, more["date"][0])


# the chain


def test_chain_and_prepare_agree(own_folder: Path) -> None:
    chain = run_chain(CHEAP, KNOBS)
    assert chain["made"].tolist() == [
        "raw/reviews", "intermediate/deduplicated", "intermediate/validated", "primary/reviews", "feature/reviews",
    ]  # fmt: skip
    assert (chain["rows"].diff().dropna() <= 0).all()
    ready = prepare(None, 300, 7)
    assert version_of(ready)[:12] == chain["version"].iloc[-1]
    assert {"label", "text_length", "word_count", "hour_of_day", "day_of_week", "category_encoded"} <= set(ready.columns)
    assert ready["review_id"].is_unique
    assert not ready[["text", "stars", "label", "date"]].isna().any(axis=None)
    lineage = {e.name: e.inputs for layer in layers.LAYERS for e in entries(layer)}
    assert lineage["deduplicated"] == {"raw/reviews": latest("raw", "reviews").version}
    assert lineage["validated"]["intermediate/deduplicated"] == latest("intermediate", "deduplicated").version


def test_running_again_changes_nothing(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_chain(CHEAP, KNOBS)
    files = {p: p.read_bytes() for p in own_folder.glob("*/*.parquet")}
    again = run_chain(CHEAP, KNOBS)
    assert again["version"].tolist() == first["version"].tolist()
    assert {p: p.read_bytes() for p in own_folder.glob("*/*.parquet")} == files
    monkeypatch.setattr(steps, "load_inbox", lambda *_: pytest.fail("the source did not change: nothing is to be read"))
    before = (own_folder / "raw" / "manifest.json").read_bytes()
    run_step("extract", KNOBS)
    assert (own_folder / "raw" / "manifest.json").read_bytes() == before


def test_extract_follows_a_growing_file(tmp_path: Path) -> None:
    all_ = clean(120)
    path = tmp_path / "reviews.jsonl"
    late = all_.iloc[[0]]
    run_step("extract", {"reviews": write(path, all_.iloc[1:100]), "rows": None})
    entry = run_step("extract", {"reviews": write(path, pd.concat([all_.iloc[1:], late])), "rows": None})
    assert entry.rows == 120
    state = load("raw", "extract_state")
    assert (state["new"], state["known"], state["late"]) == (21, 99, 1)
    raw = load("raw", "reviews")
    assert raw["review_id"].tolist() == [*all_["review_id"].iloc[1:100], *all_["review_id"].iloc[100:], all_["review_id"].iloc[0]]
    assert len(load("raw", "users")) == 0, "a file of reviews comes without users"


def test_extract_starts_anew_for_another_source(tmp_path: Path) -> None:
    run_step("extract", KNOBS)
    first = set(load("raw", "reviews")["review_id"].dropna())
    run_step("extract", KNOBS | {"seed": 8})
    assert not first & set(load("raw", "reviews")["review_id"].dropna()), "another inbox is no growth of the first"
    assert len(entries("raw")) == 8, "the first one is still kept, in its version"


@pytest.mark.parametrize("harm", ["state gone", "data gone", "other data", "manifest gone"])
def test_extract_mends_what_was_lost(own_folder: Path, harm: str) -> None:
    before = run_step("extract", KNOBS)
    raw = own_folder / "raw"
    if harm == "state gone":
        (raw / "extract_state.json").unlink()
    elif harm == "data gone":
        (raw / "reviews.parquet").unlink()
    elif harm == "manifest gone":
        (raw / "manifest.json").unlink()
    else:
        load("raw", "reviews").head(100).to_parquet(raw / "reviews.parquet")
    after = run_step("extract", KNOBS)
    assert (after.rows, load("raw", "reviews")["review_id"].nunique()) == (before.rows, load("raw", "reviews", before.version)["review_id"].nunique())


def test_bad_batch_fails_and_leaves_the_output(tmp_path: Path) -> None:
    good = clean(50)
    path = write(tmp_path / "r.jsonl", good)
    knobs = {"reviews": path, "rows": None}
    run_chain(CHEAP, knobs)
    before = version_of(load("intermediate", "validated"))
    bad = good.assign(review_id=good["review_id"] + "x", text=good["text"] + " indeed", stars=9.0)
    write(path, pd.concat([good, bad.head(20)]))
    run_chain(CHEAP[:2], knobs)
    with pytest.raises(QualityError, match="20 of 70"):
        run_step("validate", knobs)
    assert version_of(load("intermediate", "validated")) == before
    kept = run_step("validate", knobs | {"validate": {"max_bad_share": 0.5}})
    assert kept.rows == 50
    assert load("reporting", "validation")["bad"] == 20


def test_each_step_says_what_it_misses() -> None:
    for name, missing in (("remove_duplicates", "raw/reviews"), ("clean_text", "intermediate/validated"), ("embed", "feature/reviews")):
        with pytest.raises(LayerError, match=f"no {missing}"):
            run_step(name)
    with pytest.raises(StepError, match="extract, remove_duplicates"):
        run_step("exctract")


def test_embed_gives_unit_vectors(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="embed not tested: onnxruntime is not installed")
    run_chain(list(STEPS), {"rows": 100, "embed": {"rows": 3}})
    made = load("model_input", "reviews", kind="polars")
    assert made.schema["embedding"] == pl.Array(pl.Float32, 384)
    assert len(made) == 3
    norm = (made["embedding"].to_numpy() ** 2).sum(axis=1)
    assert (abs(norm - 1) < 1e-3).all()


# params


def test_params(tmp_path: Path) -> None:
    assert read_params() == steps.PARAMS, "no file: the defaults"
    (tmp_path / "params.yaml").write_text("rows: 5\nvalidate:\n  max_bad_share: 0.5\n")
    assert read_params()["rows"] == 5
    assert read_params()["validate"] == {"max_bad_share": 0.5}
    assert read_params()["embed"] == steps.PARAMS["embed"]
    (tmp_path / "params.yaml").write_text("")
    assert read_params() == steps.PARAMS
    for text, says in (("rwos: 1", "rwos; it can have"), ("validate: 3", "validate has 3"), ("- a", "has"), ("a: [", "not YAML"), ("1: 2", "1; it can")):
        (tmp_path / "params.yaml").write_text(text)
        with pytest.raises(StepError, match=says):
            read_params()


def test_the_workspace_params_are_all_known() -> None:
    params = read_params(Path(__file__).parents[2] / "params.yaml")
    assert set(params) == set(steps.PARAMS)


# prepare


def test_prepare_works_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    real = steps.load_inbox
    monkeypatch.setattr(steps, "load_inbox", lambda *a: (asked.append(a), real(*a))[1])
    first = prepare(None, 200, 1)
    pd.testing.assert_frame_equal(prepare(None, 200, 1), first)
    assert len(asked) == 1
    prepare(None, 200, 2)
    prepare(None, 201, 1)
    assert len(asked) == 3, "another seed or size is another data set"
    path = write(tmp_path / "r.jsonl", clean(60))
    prepare(path)
    prepare(str(path))
    assert len(asked) == 4
    write(path, clean(70))
    assert len(prepare(path)) > 60, "the file changed, so the rows do"
    path.touch()
    prepare(path)
    assert len(asked) == 5, "only its content counts"


def test_prepare_refuses_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StepError, match="cannot be read from"):
        prepare(tmp_path / "nothing.jsonl")


def test_prepare_fails_on_bad_data_and_keeps_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", clean(40).assign(stars=9.0))
    with pytest.raises(QualityError):
        prepare(path)
    assert entries("model_input") == []


PREPARE = """
import sys
from mlops_lib.data import steps

real = steps.load_inbox
def slow(*a):
    print("works", flush=True)
    if sys.argv[1] == "hang":
        sys.stdin.readline()
    return real(*a)

steps.load_inbox = slow
print("ready", flush=True)
sys.stdin.readline()
print(len(steps.prepare(None, 200, 1)), flush=True)
"""


def child(folder: Path, how: str) -> subprocess.Popen:
    env = os.environ | {"MLOPS_DATA_DIR": str(folder)}
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", PREPARE, how], env=env, stdin=pipe, stdout=pipe, text=True, bufsize=1)
    assert process.stdout.readline() == "ready\n"
    return process


def test_two_processes_work_once(own_folder: Path) -> None:
    both = [child(own_folder, "go") for _ in range(2)]
    for p in both:
        p.stdin.write("go\n")
    said = [p.communicate()[0].split() for p in both]
    assert sorted(len(lines) for lines in said) == [1, 2], f"one of them works, the other one waits: {said}"
    assert len({lines[-1] for lines in said}) == 1


def test_a_killed_prepare_holds_up_nobody(own_folder: Path) -> None:
    victim = child(own_folder, "hang")
    victim.stdin.write("go\n")
    assert victim.stdout.readline() == "works\n", "it holds the lock now"
    waiting = child(own_folder, "go")
    waiting.stdin.write("go\n")
    victim.kill()
    victim.wait()
    said = waiting.communicate()[0].split()
    assert said[0] == "works"
    assert int(said[1]) == len(prepare(None, 200, 1))


@pytest.mark.skipif(not REAL.is_file(), reason=f"real reviews not tested: {REAL} is not there")
def test_real_reviews() -> None:
    ready = prepare(REAL)
    assert 1900 < len(ready) <= 2019
    assert set(ready["label"]) == {0, 1, 2}
    chain = run_chain(CHEAP, {"reviews": REAL, "rows": None})
    assert chain["version"].iloc[-1] == version_of(ready)[:12]
