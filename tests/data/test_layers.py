"""Layers: a version says what is in a data set, and no file is ever half there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_lib.data import layers
from mlops_lib.data.layers import LayerError, entries, latest, load, lock, manifest, once, prune, save, version_of


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(layers, "settings", layers.settings.model_copy(update={"data_dir": tmp_path}))
    return tmp_path


def python(code: str, folder: Path, **more) -> subprocess.Popen:
    env = os.environ | {"MLOPS_DATA_DIR": str(folder)}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], env=env, stdin=pipe, stdout=pipe, text=True, **more)


text = st.one_of(st.none(), st.text(st.characters(codec="utf-8"), max_size=8))
number = st.one_of(st.none(), st.floats(allow_nan=False))
row = st.tuples(text, number, st.integers(-(2**40), 2**40), st.one_of(st.none(), st.datetimes()), st.booleans())
SCHEMA = {"text": pl.String, "real": pl.Float64, "whole": pl.Int64, "time": pl.Datetime("us"), "flag": pl.Boolean}


@given(st.lists(row, max_size=12), st.data())
@settings(max_examples=60, deadline=None)
def test_version_sees_content_and_nothing_else(rows: list[tuple], data: st.DataObject) -> None:
    frame = pl.DataFrame(rows, schema=SCHEMA, orient="row")
    version = version_of(frame)
    assert version_of(frame.to_pandas()) == version, "pandas and polars"
    cut = data.draw(st.integers(0, len(rows)))
    assert version_of(pl.concat([frame[:cut], frame[cut:]], rechunk=False)) == version, "pieces in memory"
    assert version_of(pl.concat([frame, frame])[len(frame) :]) == version, "a slice of something longer"
    if rows:
        column = data.draw(st.integers(0, 4))
        changed = list(rows[0])
        changed[column] = ["new", 0.5, 7, None, not rows[0][4]][column]
        other = pl.DataFrame([tuple(changed), *rows[1:]], schema=SCHEMA, orient="row")
        assert (version_of(other) == version) == other.equals(frame)


def test_version_details() -> None:
    one = pd.DataFrame({"a": [1.0, None], "b": ["x", "y"]})
    assert version_of(one) == version_of(one.set_index(pd.Index([5, 6]))), "the index is not content"
    assert version_of(one) == version_of(one.astype({"b": "category"})), "a category is a way to store text"
    assert version_of(one) == version_of(one.astype({"a": "float32"})), "1.0 is 1.0"
    assert version_of(pd.DataFrame({"a": [0.0]})) == version_of(pd.DataFrame({"a": [-0.0]}))
    assert version_of(one) != version_of(one[["b", "a"]]), "the order of columns is content"
    assert version_of(one) != version_of(one.rename(columns={"a": "c"}))
    assert version_of(pd.DataFrame({"a": [1]})) != version_of(pd.DataFrame({"a": [1.0]})), "a whole number is no real one"
    assert version_of(pd.DataFrame({"a": ["ab", "c"]})) != version_of(pd.DataFrame({"a": ["a", "bc"]}))
    lists = pl.DataFrame({"v": [[1.0, 2.0], [3.0]]}), pl.DataFrame({"v": [[1.0], [2.0, 3.0]]})
    assert version_of(lists[0]) != version_of(lists[1])
    fixed = pl.DataFrame({"v": np.ones((2, 3), np.float32)}, schema={"v": pl.Array(pl.Float32, 3)})
    assert version_of(fixed) == version_of(fixed.clone())
    assert version_of({"b": 1, "a": [2]}) == version_of({"a": [2], "b": 1})
    assert len({version_of(x) for x in ({}, [], {"a": 1}, {"a": "1"}, pl.DataFrame())}) == 5


def test_the_version_is_the_same_in_another_process(own_folder: Path) -> None:
    code = "import polars as pl; from mlops_lib.data.layers import version_of; print(version_of(pl.DataFrame({'a': ['x', None]})))"
    assert python(code, own_folder).communicate()[0].strip() == version_of(pl.DataFrame({"a": ["x", None]}))


def test_round_trip_keeps_values_and_types() -> None:
    frame = pd.DataFrame({
        "text": ["é", None], "real": [0.5, None], "whole": [1, 2], "flag": [True, False],
        "time": pd.to_datetime(["2024-01-01", None]).astype("datetime64[us]"), "category": pd.Categorical(["x", "y"]),
    })  # fmt: skip
    entry = save(frame, "primary", "mixed")
    pd.testing.assert_frame_equal(load("primary", "mixed"), frame)
    assert version_of(load("primary", "mixed", kind="polars")) == entry.version
    save({"kind": "plain", "n": [1, 2]}, "reporting", "plain")
    assert load("reporting", "plain") == {"kind": "plain", "n": [1, 2]}


def test_versions_and_latest(own_folder: Path) -> None:
    first, second = (pd.DataFrame({"a": range(n)}) for n in (2, 3))
    a, b = save(first, "raw", "x"), save(second, "raw", "x", {"source": a_version(first)}, {"n": 3})
    assert len(load("raw", "x")) == 3
    assert len(load("raw", "x", a.version)) == len(load("raw", "x", a.version[:6])) == 2
    save(first, "raw", "x")
    assert len(load("raw", "x")) == 2, "saved last is latest, also when the content is an old one"
    assert latest("raw", "x").version == a.version
    assert len(entries("raw")) == 2
    kept = save(second, "raw", "x", latest=False)
    assert len(load("raw", "x")) == 2
    assert kept.version == b.version
    assert manifest("raw")["from"].tolist()[0] == f"source@{a_version(first)[:6]}"
    assert manifest()["data"].tolist() == ["raw/x"] * len(entries("raw"))


def a_version(frame: pd.DataFrame) -> str:
    return version_of(frame)


def test_the_same_content_gives_the_same_bytes(own_folder: Path) -> None:
    frame = pd.DataFrame({"a": ["x", "y"]})
    frame.attrs["source"] = "/somewhere/on/this/machine"
    save(frame, "raw", "x")
    one = (own_folder / "raw" / "x.parquet").read_bytes()
    (own_folder / "raw" / "x.parquet").unlink()
    save(frame.copy(), "raw", "x")
    assert (own_folder / "raw" / "x.parquet").read_bytes() == one, "DVC compares bytes"
    assert b"somewhere" not in one


def test_prune(own_folder: Path) -> None:
    made = [save(pd.DataFrame({"a": range(n)}), "raw", "x").version for n in range(1, 6)]
    other = save(pd.DataFrame({"a": [0]}), "raw", "y")
    assert sorted(prune("raw", "x", keep=2)) == sorted(made[:3])
    assert [e.version for e in entries("raw")] == [*made[3:], other.version]
    assert len(list((own_folder / "raw" / "versions").iterdir())) == 3
    assert prune("raw", "x", keep=2) == []
    with pytest.raises(LayerError, match="at least 1"):
        prune("raw", "x", keep=0)


KILLED = """
import os, sys
import pandas as pd
from mlops_lib.data import layers

where = sys.stdin.readline().strip()
real = {"write": layers.pq.write_table, "copy": layers.shutil.copyfile, "replace": os.replace}

def dying(name):
    def die(source, target, **_):
        if name != "replace":
            target.write_bytes(b"half")
        os.kill(os.getpid(), 9)
    return die

if where == "write": layers.pq.write_table = dying("write")
if where == "copy": layers.shutil.copyfile = dying("copy")
if where == "replace":
    import mlops_lib.data.store as store
    store.os.replace = dying("replace")
if where == "manifest":
    layers._write_manifest = lambda *_: os.kill(os.getpid(), 9)
layers.save(pd.DataFrame({"a": [1, 2, 3]}), "raw", "x")
"""


@pytest.mark.parametrize("where", ["write", "copy", "replace", "manifest"])
def test_a_killed_writer_leaves_nothing_half_written(own_folder: Path, where: str) -> None:
    old = pd.DataFrame({"a": [1]})
    save(old, "raw", "x")
    process = python(KILLED, own_folder)
    process.communicate(where + "\n")
    assert process.returncode == -9
    assert len(load("raw", "x")) in (1, 3), "the old data or the new, never a half"
    for entry in entries("raw"):
        assert version_of(load("raw", "x", entry.version)) == entry.version
    for file in own_folder.rglob("*.parquet"):
        if not file.name.startswith("."):
            pq.read_table(file)
    entry = save(pd.DataFrame({"a": [1, 2, 3]}), "raw", "x")
    assert len(load("raw", "x")) == 3
    assert latest("raw", "x") == entry
    assert not list(own_folder.rglob("*.part")), "the next save sweeps up"


SAVER = """
import sys
import pandas as pd
from mlops_lib.data.layers import save

sys.stdin.readline()
for i in range(10):
    save(pd.DataFrame({"a": [int(sys.argv[1]), i]}), "raw", "x")
"""


def test_no_entry_is_lost_between_processes(own_folder: Path) -> None:
    env = os.environ | {"MLOPS_DATA_DIR": str(own_folder)}
    command = [sys.executable, "-c", SAVER]
    processes = [subprocess.Popen([*command, str(n)], env=env, stdin=subprocess.PIPE, text=True) for n in range(3)]
    for p in processes:
        p.stdin.write("go\n")
        p.stdin.flush()
    assert [p.wait() for p in processes] == [0, 0, 0]
    assert len(entries("raw")) == 30
    assert version_of(load("raw", "x")) == latest("raw", "x").version


def test_lock_is_released_by_death_and_times_out(own_folder: Path) -> None:
    code = """
import sys
from pathlib import Path
from mlops_lib.data.layers import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""
    path = own_folder / "a" / "lock"
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(LayerError, match="another process"), lock(path, timeout=0.01):
        pass
    process.kill()
    process.wait()
    with lock(path, timeout=5):
        pass


def test_once_works_once_and_again_when_something_changed(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def make() -> pd.DataFrame:
        made.append(1)
        return pd.DataFrame({"a": [1]})

    for inputs, params in (({"x": "1"}, {"k": 1}), ({"x": "1"}, {"k": 1}), ({"x": "2"}, {"k": 1}), ({"x": "2"}, {"k": 2})):
        assert once(make, "feature", "n", inputs, params)["a"].tolist() == [1]
    assert len(made) == 3
    monkeypatch.setattr(layers, "code_version", lambda: "edited")
    once(make, "feature", "n", {"x": "1"}, {"k": 1})
    assert len(made) == 4, "an edit of the code makes new data"
    for file in (own_folder / "feature" / "versions").iterdir():
        file.unlink()
    once(make, "feature", "n", {"x": "1"}, {"k": 1})
    assert len(made) == 5, "a file that was deleted is made again"


def test_once_keeps_nothing_of_a_failure() -> None:
    def fail() -> pd.DataFrame:
        raise RuntimeError("no data today")

    with pytest.raises(RuntimeError, match="no data"):
        once(fail, "feature", "n", {}, {})
    assert entries("feature") == []
    assert len(once(lambda: pd.DataFrame({"a": [1]}), "feature", "n", {}, {})) == 1, "the lock is free again"


def test_errors(own_folder: Path) -> None:
    with pytest.raises(LayerError, match=r"no layer 'rwa'.*raw, intermediate"):
        load("rwa", "x")
    with pytest.raises(LayerError, match="there is: nothing"):
        load("raw", "x")
    save(pd.DataFrame({"a": [1]}), "raw", "x")
    with pytest.raises(LayerError, match="There is no raw/y; there is: x"):
        load("raw", "y")
    with pytest.raises(LayerError, match="in version '0badc0de'"):
        load("raw", "x", "0badc0de")
    with pytest.raises(LayerError, match="one type"):
        save(pd.DataFrame({"a": [1, "two"]}), "raw", "x")
    with pytest.raises(LayerError, match="has no version"):
        save(pl.DataFrame({"a": [b"bytes"]}), "raw", "x")
    with pytest.raises(LayerError, match="needs a name"):
        save(pd.DataFrame({"a": [1]}), "raw", "../x")
    assert json.loads((own_folder / "raw" / "manifest.json").read_text())[0]["rows"] == 1
