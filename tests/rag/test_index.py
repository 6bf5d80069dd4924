"""The index under a second process, a real kill -9, hostile files, and on a real Chroma server."""

import json
import multiprocessing
import os
import signal
import zlib
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import chromadb
import numpy as np
import pypdf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import need

import mlops_lib.rag.index as module
from mlops_lib.data.embedding import embed
from mlops_lib.rag.index import (
    Chunk,
    Document,
    Index,
    IndexingError,
    View,
    decode,
    matches,
    read_document,
    read_html,
    read_notebook,
    read_pdf,
    spans,
    walk,
)
from mlops_lib.servers import server

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["chromadb", "mlops_lib.rag.index"])  # or each one imports them anew
processes.set_forkserver_preload(["mlops_lib.rag.index"])


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    with Index(folder=tmp_path / "chroma") as one:
        yield one


def words(index: Index, id: str) -> str:
    "The text of a document, put together from its chunks."
    text = [" "] * len(index.text(id))
    for c in index.view({"document": id}).chunks:
        text[c.start : c.end] = c.text
    return "".join(text).strip()


def records(index: Index) -> list[str]:
    "Ids of the chunks that Chroma holds, seen or not."
    with index._open() as opened:
        return sorted(opened.chunks.get(include=[])["ids"])


def whole(index: Index) -> None:
    "Nothing is left over, nothing is missing, and the vectors are those of the texts."
    view = index.view()
    assert records(index) == sorted(c.id for c in view.chunks)
    assert all(index.text(c.document)[c.start : c.end] == c.text for c in view.chunks)
    if len(view):
        assert np.abs(view.vectors - embed([c.text for c in view.chunks])).max() < 1e-5


# chunks


@given(st.text(alphabet="ab .\n\t\u00e9\U0001f600", max_size=400), st.integers(1, 60), st.integers(0, 59))
def test_chunks_are_where_they_say_and_nothing_is_lost(text: str, size: int, overlap: int) -> None:
    overlap = min(overlap, size - 1)
    found = spans(text, size, overlap)
    inside = {n for start, end in found for n in range(start, end)}
    assert all(n in inside for n, c in enumerate(text) if not c.isspace())
    assert all(0 < end - start <= size and text[start:end] == text[start:end].strip() for start, end in found)
    assert [end for _, end in found] == sorted({end for _, end in found})
    assert all(later - start > 0 for (start, _), (later, _) in zip(found, found[1:], strict=False)) or overlap
    assert all(later >= end - overlap for (_, end), (later, _) in zip(found, found[1:], strict=False))


@pytest.mark.parametrize(("size", "overlap"), [(0, 0), (10, 10), (10, -1), (-5, 0)])
def test_sizes_that_cannot_be(size: int, overlap: int) -> None:
    with pytest.raises(IndexingError, match="size above 0"):
        spans("text", size, overlap)


def test_ids_stay_when_the_text_around_changes(index: Index) -> None:
    text = "\n\n".join(f"Paragraph {n} is about subject {n}. " + "It goes on. " * 30 for n in range(8))
    index.add(Document(text), id="d")
    before = {c.id for c in index.view().chunks}
    index.add(Document("A preface that is new. " * 20 + "\n\n" + text), id="d")
    after = {c.id for c in index.view().chunks}
    assert len(before & after) >= len(before) - 2
    whole(index)


def test_the_same_text_twice_in_a_document_gives_two_chunks(index: Index) -> None:
    index.add(Document("\n\n".join(["The same line again. " * 20] * 3)), id="d")
    ids = [c.id for c in index.view().chunks]
    assert len(ids) == len(set(ids)) == 3
    whole(index)


# reading


@given(st.text(alphabet=st.characters(exclude_categories=("Cc", "Cs")), min_size=1).filter(str.strip))
def test_text_in_any_utf_comes_back(text: str) -> None:
    for encoding, name in (("utf-8", "utf-8"), ("utf-8-sig", "utf-8-sig"), ("utf-16", "utf-16"), ("utf-32", "utf-32")):
        got, used = decode(text.encode(encoding))
        if not text.startswith("\ufeff"):
            assert (got, used) == (text, name)


def test_windows_1252_is_taken_only_where_it_is_plausible() -> None:
    assert decode("Grüße – „schön“, 5 €".encode("cp1252")) == ("Grüße – „schön“, 5 €", "cp1252")
    foreign = "Привет, как дела?".encode("cp1251"), "日本語の文章です".encode("shift-jis"), "hi".encode("utf-16-le")
    for data in (*foreign, bytes(range(128, 256)), b"a\x00b"):
        with pytest.raises(IndexingError, match="UTF-8"):
            decode(data)
    with pytest.raises(IndexingError, match="utf-16"):
        decode(b"\xff\xfea")


@given(st.binary(max_size=60))
def test_no_bytes_break_a_reader(data: bytes) -> None:
    for name in ("a.txt", "a.md", "a.html", "a.ipynb"):
        try:
            found = read_document(data, name)
        except IndexingError:
            continue
        assert found.text.strip()


def test_scripts_and_styles_are_not_text() -> None:
    hidden = b"<style>s{}</style><script>let hidden = '<p>x</p>'</script>"
    found = read_html(b"<title>T</title>" + hidden + b"<p>seen <b>here</b></p>" + hidden + b"<pre>a\n  b</pre><script>unclosed")
    assert found.title == "T"
    assert found.text == "seen here\n\na\n  b"
    assert read_html('<meta charset="iso-8859-2"><p>Łódź</p>'.encode("iso-8859-2")).text == "Łódź"
    assert read_html("<meta charset=wrong><p>Łódź</p>".encode()).text == "Łódź"


def test_a_notebook_keeps_the_ids_of_its_cells_and_leaves_outputs_out(index: Index, tmp_path: Path) -> None:
    cells = [
        {"cell_type": "markdown", "id": "m1", "source": ["# Title\n", "words " * 120]},
        {"cell_type": "code", "id": "c1", "source": "x = 1", "outputs": [{"text": "SECRET"}]},
        {"cell_type": "raw", "id": "r1", "source": "RAW"},
        {"cell_type": "markdown", "id": "m2", "source": "more " * 120},
    ]
    (tmp_path / "n.ipynb").write_text(json.dumps({"cells": cells, "nbformat": 4}))
    index.add(tmp_path / "n.ipynb")
    view = index.view()
    assert {c.metadata["cell"] for c in view.chunks} >= {"m1", "m2"}
    assert index.documents()[0]["title"] == "Title"
    assert "SECRET" not in index.text(view.chunks[0].document)
    assert "RAW" not in index.text(view.chunks[0].document)
    for data in (b"[1]", b'{"cells": 3}', b'{"cells": [{"cell_type": "code", "source": 3}]}', b"[" * 100_000):
        with pytest.raises(IndexingError, match="not a notebook"):
            read_notebook(data)


def pdf(*pages: str, password: str | None = None) -> bytes:
    "A PDF with a line of text on each page."
    import io

    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b"", b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    kids = []
    for text in pages:
        draw = b"BT /F1 12 Tf 72 700 Td (%s) Tj ET" % text.encode() if text else b""
        kids.append(b"%d 0 R" % (len(objects) + 1))
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R /Resources << /Font << /F1 3 0 R >> >> >>"
            % (len(objects) + 2)
        )
        objects.append(b"<< /Length %d >> stream\n%s\nendstream" % (len(draw), draw))
    objects[1] = b"<< /Type /Pages /Kids [%s] /Count %d >>" % (b" ".join(kids), len(pages))
    body = b"".join(b"%d 0 obj\n%s\nendobj\n" % (n, o) for n, o in enumerate(objects, 1))
    data = b"%PDF-1.4\n" + body + b"trailer << /Root 1 0 R /Size %d >>\nstartxref\n0\n%%%%EOF" % (len(objects) + 1)
    if password is None:
        return data
    writer, out = pypdf.PdfWriter(io.BytesIO(data)), io.BytesIO()
    writer.encrypt(password, "owner", algorithm="RC4-128")
    writer.write(out)
    return out.getvalue()


def test_a_pdf_by_pages_and_one_that_anybody_may_open() -> None:
    found = read_pdf(pdf("First page.", "", "Third page."))
    assert found.text == "First page.\n\nThird page."
    assert [dict(about) for _, about in found.parts] == [{"page": 1}, {"page": 3}]
    assert read_pdf(pdf("Free to read.", password="")).text == "Free to read."


def test_a_pdf_that_cannot_be_read_says_why() -> None:
    bomb = zlib.compress(b"(a) Tj " * 30_000_000, 9)
    packed = b"<< /Filter /FlateDecode /Length %d >> stream\n%s\nendstream" % (len(bomb), bomb)
    line = b"<< /Length 39 >> stream\nBT /F1 12 Tf 72 700 Td (text) Tj ET\nendstream"
    simple = pdf("text")
    start = simple.index(b"<< /Length")
    unfolding = simple[:start] + packed + simple[simple.index(b"endstream", start) + 9 :]
    cases: list[tuple[bytes, str, dict[str, Any]]] = [
        (pdf("secret", password="1234"), "encrypted", {}),
        (pdf("", ""), "no text, only pictures", {}),
        (simple[:60], "broken PDF", {}),
        (unfolding, "broken PDF|limit|more than", {}),
        (pdf("a", "b", "c"), "3 pages, the limit is 2", {"max_pages": 2}),
        (pdf("long " * 9, "long " * 9), "longer than 50 characters", {"max_text": 50}),
        (b"GIF89a" + line, "not a PDF", {}),
    ]
    for data, why, limits in cases:
        with pytest.raises(IndexingError, match=why):
            read_pdf(data, **limits)


# what is refused, and the index stays as it was


def test_a_folder_takes_the_good_and_reports_the_bad(index: Index, tmp_path: Path) -> None:
    folder, outside = tmp_path / "in", tmp_path / "outside"
    (folder / "deep" / ".git").mkdir(parents=True)
    outside.mkdir()
    (outside / "secret.txt").write_text("not for you")
    good = {"b.txt": b"second", "a.md": b"# First", "deep/c.html": b"<p>third", "deep/win.txt": "schön".encode("cp1252")}
    bad = {
        "photo.txt": b"\x89PNG\r\n\x1a\n\x00", "empty.txt": b" \n ", "tool.exe": b"MZ", "scan.pdf": pdf(""),
        "locked.pdf": pdf("x", password="p"), "cut.pdf": b"%PDF-1.4", "no.ipynb": b"{}", "script.html": b"<script>1</script>",
    }
    for name, data in ({**good, **bad, ".hidden.txt": b"x", "deep/.git/HEAD.txt": b"x"}).items():
        (folder / name).write_bytes(data)
    with (folder / "huge.txt").open("wb") as file:
        file.truncate(200_000_000)
    (folder / "link.txt").symlink_to(outside / "secret.txt")
    (folder / "way").symlink_to(outside)
    (folder / "loop").symlink_to(folder)
    (folder / "same.txt").symlink_to(folder / "b.txt")
    os.mkfifo(folder / "pipe.txt")
    got = index.add(folder)
    names = [Path(d["source"]).name for d in index.documents()]
    assert sorted(names) == ["a.md", "b.txt", "c.html", "win.txt"]
    assert len(got.documents) == 4
    refused = {Path(name).name: why for name, why in got.refused.items()}
    assert refused.keys() == {*bad, "huge.txt", "link.txt", "way", "loop", "pipe.txt"}
    assert "200,000,000 bytes" in refused["huge.txt"]
    assert "out of the folder" in refused["link.txt"]
    assert "out of the folder" in refused["way"]
    assert "regular" in refused["pipe.txt"]
    assert "no kind" in refused["tool.exe"]
    assert index.view({"encoding": "cp1252"}).chunks[0].text == "schön"
    again = index.add(folder)
    assert (again.unchanged, again.chunks, again.documents) == (4, 0, got.documents)
    whole(index)


def test_files_come_in_order(tmp_path: Path) -> None:
    for name in ("b/z.txt", "a/y.txt", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [p.name for p in walk(tmp_path, {})] == ["c.txt", "y.txt", "z.txt"]


def test_bad_sources_leave_the_index_as_it_was(index: Index, tmp_path: Path) -> None:
    index.add(Document("Parcels take two days."), id="d")
    before = index.view()
    (tmp_path / "tool.exe").write_bytes(b"MZ")
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: index.add(""), "empty"),
        (lambda: index.add(Document(" \n")), "empty"),
        (lambda: index.add(42), "a path, a text or a Document"),  # type: ignore[arg-type]
        (lambda: index.add(tmp_path / "none.txt"), "no file"),
        (lambda: index.add("manual.pdf"), "no file"),
        (lambda: index.add(tmp_path / "tool.exe"), "no kind"),
        (lambda: index.add(tmp_path, id="x"), "own id"),
        (lambda: index.add("text", id=""), "1 to 300"),
        (lambda: index.add("text", metadata={"title": "x"}), "reserved"),
        (lambda: index.add("text", metadata={"a": [1]}), "a text, a number"),  # type: ignore[dict-item]
        (lambda: index.add("text", metadata={"a": float("nan")}), "a text, a number"),
        (lambda: index.add("x" * 20_000_001), "20,000,001 characters"),
        (lambda: index.text("e"), "no document 'e'"),
        (lambda: index.view().position("e"), "no chunk"),
    ]
    for call, why in cases:
        with pytest.raises(IndexingError, match=why):
            call()
    assert index.view() is before
    assert index.delete("e") == 0
    whole(index)


def test_an_index_that_cannot_be(tmp_path: Path) -> None:
    for bad in ("", "a", "x" * 80, "-ab", "a b c", "../up"):
        with pytest.raises(IndexingError, match="named by"):
            Index(bad, tmp_path)
    with pytest.raises(IndexingError, match="not both"):
        Index(folder=tmp_path, url="http://127.0.0.1:1")
    with pytest.raises(IndexingError, match="address like"):
        Index(url="ftp://x").view()
    with pytest.raises(IndexingError, match="No Chroma server answers"):
        Index(url="http://127.0.0.1:1").view()
    (tmp_path / "chroma.sqlite3").write_bytes(b"not a database" * 500)
    with pytest.raises(IndexingError, match="does not work"):
        Index(folder=tmp_path).view()
    client = chromadb.PersistentClient(str(tmp_path / "l2"))
    client.create_collection("documents", embedding_function=None)
    client.close()
    with pytest.raises(IndexingError, match="measures l2"):
        Index(folder=tmp_path / "l2").view()


# what an index does


def test_replace_delete_and_stats(index: Index) -> None:
    index.add(Document("alpha " * 300, title="A"), id="a", metadata={"year": 2024})
    index.add(Document("beta " * 300, title="B"), id="b")
    assert index.add(Document("alpha " * 300, title="A"), id="a", metadata={"year": 2024}).unchanged == 1
    changed = index.add(Document("alpha " * 300, title="A"), id="a", metadata={"month": 5})
    assert changed.unchanged == 0
    assert set(index.view().fields) == {"document", "kind", "month", "source", "title"}
    index.add(Document("gamma", title="A"), id="a")
    assert words(index, "a") == "gamma"
    stats = index.stats()
    assert (stats["documents"], stats["chunks"]) == (2, len(index.view()))
    whole(index)
    assert index.delete("b") == stats["chunks"] - 1
    assert [d["id"] for d in index.documents()] == ["a"]
    whole(index)
    index.drop()
    assert len(index.view()) == 0
    assert index.view({"anything": 1}) is index.view()


def test_another_size_cuts_again(tmp_path: Path) -> None:
    text = Document("one two three " * 100)
    Index(folder=tmp_path).add(text, id="d")
    small = Index(folder=tmp_path, size=100, overlap=10)
    assert small.add(text, id="d").unchanged == 0
    assert max(len(c.text) for c in small.view().chunks) <= 100
    whole(small)


def test_the_id_of_a_file_does_not_depend_on_the_working_folder(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "f.txt").write_text("hello")
    first = index.add(tmp_path / "x" / "f.txt").documents
    monkeypatch.chdir(tmp_path / "x")
    assert index.add("f.txt").documents == first
    assert index.add(Path("../x/f.txt")).unchanged == 1


def test_a_document_is_never_taken_for_a_path(index: Index, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("the password is 1234")
    index.add(Document(str(secret)), id="d")
    assert index.text("d") == str(secret)


@settings(max_examples=15)
@given(text=st.text(min_size=1, max_size=2_000).filter(str.strip))
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    index = Index(folder=tmp_path_factory.getbasetemp() / "any")
    index.add(Document(text), id="d")
    assert index.text("d") == text.encode("utf-8", "replace").decode()
    assert all(index.text("d")[c.start : c.end] == c.text for c in index.view().chunks)


def test_chroma_gets_no_more_than_it_takes_and_no_telemetry(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, quiet, real, connect = [], [], chromadb.Collection.upsert, chromadb.PersistentClient

    def upsert(self: Any, ids: list[str], **rest: Any) -> None:
        sizes.append(len(ids))
        real(self, ids, **rest)

    def client(path: str, settings: chromadb.Settings) -> Any:
        quiet.append(settings.anonymized_telemetry)
        one = connect(path, settings=settings)
        one.get_max_batch_size = lambda: 7  # type: ignore[method-assign]
        return one

    monkeypatch.setattr(chromadb.Collection, "upsert", upsert)
    monkeypatch.setattr(chromadb, "PersistentClient", client)
    index.add(Document("\n\n".join(f"Line {n} " + "and more " * 40 for n in range(30))), id="d")
    assert max(sizes) == 7
    assert set(quiet) == {False}
    whole(index)
    index.delete("d")
    assert records(index) == []


def test_vectors_that_chroma_lost_are_made_again(index: Index) -> None:
    index.add(Document("\n\n".join(f"Line {n} " + "and more " * 40 for n in range(6))), id="d")
    with index._open() as opened:
        opened.chunks.delete(ids=[c.id for c in index.view().chunks[:3]])
    other = Index(folder=index.folder)
    assert np.abs(other.view().vectors - embed([c.text for c in other.view().chunks])).max() < 1e-5


# filters

FIELDS = {"n": st.integers(-3, 3), "x": st.sampled_from([0.5, 1.0, 2.0]), "s": st.sampled_from("abc"), "b": st.booleans()}
METADATA = st.fixed_dictionaries({}, optional=FIELDS)
LEAF = st.sampled_from(list(FIELDS)).flatmap(
    lambda name: st.tuples(
        st.just(name),
        st.one_of(
            st.tuples(st.sampled_from(["$eq", "$ne", "$gt", "$gte", "$lt", "$lte"]), FIELDS[name]),
            st.tuples(st.sampled_from(["$in", "$nin"]), st.lists(FIELDS[name], min_size=1, max_size=3)),
        ),
    ).map(lambda pair: {pair[0]: {pair[1][0]: pair[1][1]}})
)
JOINED = lambda inner: st.tuples(st.sampled_from(["$and", "$or"]), st.lists(inner, min_size=1, max_size=3)).map(lambda p: {p[0]: p[1]})
WHERE = st.recursive(LEAF, JOINED)


def slow(where: dict[str, Any], about: dict[str, Any]) -> bool:
    "A filter, evaluated one chunk at a time."
    (name, condition), = where.items()
    if name == "$and":
        return all(slow(w, about) for w in condition)
    if name == "$or":
        return any(slow(w, about) for w in condition)
    (operator, wanted), = condition.items()
    if name not in about:
        return operator in ("$ne", "$nin")
    value = about[name]
    return bool({
        "$eq": lambda: value == wanted, "$ne": lambda: value != wanted, "$in": lambda: value in wanted, "$nin": lambda: value not in wanted,
        "$gt": lambda: value > wanted, "$gte": lambda: value >= wanted, "$lt": lambda: value < wanted, "$lte": lambda: value <= wanted,
    }[operator]())


@given(st.lists(METADATA, max_size=8), WHERE)
def test_filters_are_exact(rows: list[dict[str, Any]], where: dict[str, Any]) -> None:
    everything = {"n": 0, "x": 1.0, "s": "a", "b": True}  # so that each field exists
    rows = [everything, *rows]
    view = View("1", [Chunk(str(n), "d", "", 0, 0, row) for n, row in enumerate(rows)], np.zeros((len(rows), 384), np.float32))
    assert matches(view, where).tolist() == [slow(where, row) for row in rows]


def test_true_is_not_one_and_a_part_of_a_view_knows_the_whole() -> None:
    rows: list[dict[str, Any]] = [{"v": True}, {"v": 1}, {"v": 1.0}, {"v": "1"}, {}]
    view = View("1", [Chunk(str(n), "d", "", 0, 0, row) for n, row in enumerate(rows)], np.eye(5, 384, dtype=np.float32))
    assert matches(view, {"v": True}).tolist() == [True, False, False, False, False]
    assert matches(view, {"v": 1}).tolist() == [False, True, True, False, False]
    assert matches(view, {"v": {"$gt": "0"}}).tolist() == [False, False, False, True, False]
    part = view.take(np.array([1, 3, 4])).take(np.array([0, 2]))
    assert (part.whole, part.rows.tolist(), [c.id for c in part.chunks]) == (view, [1, 4], ["1", "4"])
    assert part.position("4") == 1
    with pytest.raises(ValueError, match="read-only"):
        part.vectors[0, 0] = 1
    for where in ({"v": {"$in": "1"}}, {"v": [1]}, {"$and": []}, {"$or": {"v": 1}}, {"w": 1}, {"v": {"$eq": None}}, [], {"v": {"$no": 1}}):
        with pytest.raises(IndexingError):
            matches(view, where)  # type: ignore[arg-type]


# other processes


def answer(folder: Path, line: Connection) -> None:
    "Do what the test asks for, in a process with an index of its own."
    index = Index(folder=folder)
    while True:
        what, *args = line.recv()
        if what == "add":
            index.add(Document(args[1]), id=args[0])
        if what == "end":
            return
        line.send([c.text for c in index.view().chunks])


def test_each_process_sees_what_the_other_wrote(index: Index) -> None:
    here, there = processes.Pipe()
    other = processes.Process(target=answer, args=(index.folder, there))
    other.start()
    try:
        for n in range(3):
            here.send(("add", f"theirs-{n}", f"they wrote {n}"))
            seen = here.recv()
            assert sorted(seen) == sorted(c.text for c in index.view().chunks)
            index.add(Document(f"we wrote {n}"), id=f"ours-{n}")
            here.send(("look",))
            assert sorted(here.recv()) == sorted(c.text for c in index.view().chunks)
        index.delete("theirs-1")
        here.send(("look",))
        assert "they wrote 1" not in here.recv()
        here.send(("end",))
        other.join(60)
    finally:
        other.kill()
    whole(index)


def fill(folder: Path, who: str) -> None:
    index = Index(folder=folder)
    for n in range(6):
        index.add(Document(f"{who} wrote {n}. " * 60), id=f"{who}-{n}")
        index.add(Document(f"{who} wrote {n} into what both have. " * 40), id="shared")


def test_two_processes_that_add_at_once(index: Index) -> None:
    both = [processes.Process(target=fill, args=(index.folder, who)) for who in ("ann", "bob")]
    for one in both:
        one.start()
    for one in both:
        one.join(120)
    assert [one.exitcode for one in both] == [0, 0]
    assert len(index.documents()) == 13
    whole(index)


def die(folder: Path, id: str, text: str | None, fatal: int) -> None:
    "Replace or delete a document; kill -9 comes before a request to Chroma that changes something."
    module.BATCH = 2
    module.embed = lambda texts: np.tile(np.eye(1, 384, dtype=np.float32), (len(texts), 1))  # type: ignore[assignment]
    count = iter(range(100))

    def deadly(real: Callable[..., None]) -> Callable[..., None]:
        def request(*args: Any, **options: Any) -> None:
            if next(count) == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*args, **options)

        return request

    for name in ("upsert", "delete"):
        setattr(chromadb.Collection, name, deadly(getattr(chromadb.Collection, name)))
    index = Index(folder=folder)
    if text is None:
        index.delete(id)
    else:
        index.add(Document(text), id=id)


@pytest.mark.parametrize("kind", ["replace", "first", "delete"])
def test_kill_9_at_every_step_leaves_the_old_or_the_new(index: Index, kind: str) -> None:
    old, new = ("\n\n".join(f"{word} {n} " + f"{word} and more " * 25 for n in range(5)) for word in ("old", "new"))
    allowed = {"replace": (old.strip(), new.strip()), "first": ("", new.strip()), "delete": (old.strip(), "")}[kind]
    seen, steps, code = set(), 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        index.delete("d")
        if kind != "first":
            index.add(Document(old), id="d")
        child = processes.Process(target=die, args=(index.folder, "d", None if kind == "delete" else new, steps))
        child.start()
        child.join(120)
        code, steps = child.exitcode or 0, steps + 1
        there = [d["id"] for d in index.documents()]
        found = words(index, "d") if "d" in there else ""
        assert found in allowed
        seen.add(found)
        index.add(Document(f"other {steps}"), id="other")  # the next writer sweeps up what has no head
        if "d" in there:
            index.add(Document("old again"), id="d")  # and whoever replaces a document, what that has no more
        whole(index)
    assert code == 0
    assert seen == set(allowed)
    assert steps > {"replace": 5, "first": 4, "delete": 3}[kind]


# a real server


def test_a_chroma_server_does_the_same_and_may_be_killed(tmp_path: Path) -> None:
    need("chroma")
    with server("chroma", tmp_path) as one, Index(url=one.url) as ours, Index(url=one.url) as theirs:
        assert len(theirs.view()) == 0
        ours.add(Document("\n\n".join(f"Line {n} " + "and more " * 40 for n in range(6)), title="Lines"), id="d", metadata={"year": 2024})
        view = theirs.view({"year": {"$gte": 2024}})
        assert len(view) == 6
        assert theirs.view() is theirs.view()
        theirs.add(Document("short"), id="d")
        assert [c.text for c in ours.view().chunks] == ["short"]
        ours.add(Document("kept over a restart"), id="k")
        one.kill()
        with pytest.raises(IndexingError, match="does not work|No Chroma server"):
            ours.view()
        one.start()
        assert {c.text for c in ours.view().chunks} == {"short", "kept over a restart"}
        whole(ours)
        assert theirs.delete("d") == 1
        assert [d["id"] for d in ours.documents()] == ["k"]
        ours.drop()
        assert len(theirs.view()) == 0
        theirs.add(Document("after the drop"), id="n")
        assert theirs.text("n") == "after the drop"
