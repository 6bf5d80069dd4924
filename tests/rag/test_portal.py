"""The document platform over real HTTP: what comes in, what is asked, what is refused, and what is told to whom."""

import asyncio
import contextlib
import io
import json
import re
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import httpx
import pypdf
import pytest
import schemathesis
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from mlops_lib.logs import setup_logging
from mlops_lib.rag.answers import AnswerError
from mlops_lib.rag.documents import Library, platform
from mlops_lib.rag.index import IndexingError
from mlops_lib.rag.portal import MAX_NAME, clean_name, create_portal, portal_page, receive_file, with_policy
from mlops_lib.serving.api import ApiError, background
from mlops_lib.serving.doorman import Refused

RETURNS = "# Returns\n\nA parcel may be sent back within 30 days. We pay the money back within 5 working days after the parcel has reached us."
QUESTION = "When do you pay the money back?"
MOST = 200_000  # bytes of a document


def by_words(text: str) -> Any:
    "A classifier that needs no training."
    if "unclassifiable" in text:
        raise ValueError("nobody knows what this is")
    return SimpleNamespace(category="legal" if "contract" in text else "business", confidence=0.9, version="test")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Library]:
    with platform(tmp_path_factory.mktemp("library"), classify=by_words) as one:
        yield one


@pytest.fixture(scope="module")
def url(library: Library) -> Iterator[str]:
    with background(create_portal(library, api_key="", max_bytes=MOST)) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=120) as one:
        yield one


def send(client: httpx.Client, data: bytes | str, name: str = "a.txt", **more: Any) -> httpx.Response:
    return client.post("/index", files={"file": (name, data.encode() if isinstance(data, str) else data)}, **more)


def settled(client: httpx.Client, sent: httpx.Response) -> dict[str, Any]:
    "Ask until nothing more will happen to a document."
    assert sent.status_code in (200, 202), sent.text
    deadline = time.monotonic() + 120
    while (told := client.get(sent.headers["location"]).json())["state"] not in ("indexed", "failed"):
        assert time.monotonic() < deadline, told
        time.sleep(0.02)
    return told


class Changed:
    "A library of which one thing is different."

    def __init__(self, library: Library, **other: Any) -> None:
        self._library = library
        vars(self).update(other)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)


def is_refused(said: httpx.Response, *statuses: int) -> str:
    "It is, as RFC 9457 has it; gives the reason."
    assert said.status_code in statuses, said.text
    assert said.headers["content-type"] == "application/problem+json"
    told = said.json()
    assert told["status"] == said.status_code and told["request_id"] == said.headers["x-request-id"] and told["detail"]
    return str(told["detail"])


# ---- the way of a document


def test_a_document_comes_in_answers_and_goes(client: httpx.Client) -> None:
    sent = send(client, RETURNS, "returns.md")
    assert sent.status_code == 202 and sent.json()["name"] == "returns.md"
    told = settled(client, sent)
    assert (told["state"], told["category"], told["error"]) == ("indexed", "business", None) and told["chunks"] >= 1
    assert [s["event_type"] for s in told["steps"]] == ["document.ingested", "document.classified", "document.indexed"]
    id = told["document_id"]
    assert sent.headers["location"] == f"/documents/{id}"
    assert id in {d["document_id"] for d in client.get("/documents").json()["documents"]}

    text = client.get(f"/documents/{id}/text").json()["text"]
    hits = client.post("/query", json={"query": QUESTION, "k": 3, "category": "business"}).json()["hits"]
    assert any(h["document_id"] == id and text[h["start"] : h["end"]] == h["text"] and 0 <= h["score"] <= 1 for h in hits)
    answer = client.post("/answer", json={"question": QUESTION}).json()
    assert answer["found"] and "5 working days" in answer["text"] and answer["model"] is None
    numbers = [s["number"] for s in answer["sources"]]
    assert numbers == list(range(1, len(numbers) + 1)) and all(set(s["cites"]) <= set(numbers) for s in answer["sentences"])
    cited = [s for s in answer["sources"] if s["document_id"] == id]
    assert cited and all(text[s["start"] : s["end"]] == s["text"] for s in cited)
    assert not client.post("/query", json={"query": QUESTION, "category": "marketing"}).json()["hits"]

    assert client.delete(f"/document/{id}").json() == {"document_id": id, "deleted": True}
    for gone in (client.get(f"/documents/{id}"), client.get(f"/documents/{id}/text"), client.delete(f"/document/{id}")):
        is_refused(gone, 404)
    assert all(h["document_id"] != id for h in client.post("/query", json={"query": QUESTION}).json()["hits"])


def test_the_same_content_is_the_same_document(client: httpx.Client) -> None:
    first = send(client, "The same words, twice.", "first.txt")
    settled(client, first)
    again = send(client, "The same words, twice.", "second.md")
    assert (first.status_code, again.status_code) == (202, 200)
    assert again.json()["document_id"] == first.json()["document_id"] and again.json()["name"] == "first.txt"
    client.delete(f"/document/{first.json()['document_id']}")
    assert send(client, "The same words, twice.", "third.txt").status_code == 202


def test_a_document_that_cannot_be_classified_says_so(client: httpx.Client) -> None:
    told = settled(client, send(client, "This is unclassifiable."))
    assert told["state"] == "failed" and "nobody knows what this is" in told["error"]


def test_twenty_people_upload_at_once(client: httpx.Client, url: str) -> None:
    texts = [f"Memo {n % 10}: the meeting about project {n % 10} begins at {n % 10} o'clock." for n in range(20)]

    async def everybody() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, timeout=120) as many:
            return await asyncio.gather(*(many.post("/index", files={"file": ("memo.txt", t.encode())}) for t in texts))

    sent = asyncio.run(everybody())
    assert {r.status_code for r in sent} <= {200, 202}
    assert len({r.json()["document_id"] for r in sent}) == 10
    assert all(settled(client, r)["state"] == "indexed" for r in sent)
    found = client.post("/answer", json={"question": "When does the meeting about project 7 begin?"}).json()
    assert "7 o'clock" in found["text"]


# ---- files of strangers


def pdf(encrypted: bool = False) -> bytes:
    "A PDF with a page and no text on it."
    writer, file = pypdf.PdfWriter(), io.BytesIO()
    writer.add_blank_page(200, 200)
    if encrypted:
        writer.encrypt("secret", algorithm="RC4-128")
    writer.write(file)
    return file.getvalue()


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as one:
        one.writestr("word/document.xml", "<xml/>")
    return file.getvalue()


FILES: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "encrypted": ("a.pdf", lambda: pdf(encrypted=True), "encrypted"),
    "only pictures": ("a.pdf", pdf, "OCR"),
    "broken": ("a.pdf", lambda: b"%PDF-1.7\n" + b"x" * 500, "broken"),
    "an archive": ("a.pdf", archive, "archive"),
    "binary": ("a.txt", lambda: bytes(range(256)) * 4, "a.txt"),
    "a picture": ("a.txt", lambda: b"\x89PNG\r\n\x1a\n" + bytes(99), "picture"),
    "neither encoding": ("a.txt", lambda: bytes([0x81, 0x8D, 0x8F, 0x90, 0x9D] * 50), "UTF-8"),
    "half of UTF-16": ("a.txt", lambda: b"\xff\xfe" + "Über".encode("utf-16-le") + b"\x00", "utf-16"),
    "empty": ("a.txt", lambda: b"", "empty"),
    "blank": ("a.md", lambda: b" \n\t " * 9, "a.md"),
    "no notebook": ("a.ipynb", lambda: b'{"nbformat": 4, "cells": 7}', "notebook"),
    "too large": ("a.txt", lambda: b"word " * (MOST // 5 + 1), f"{MOST:,}"),
}


@pytest.mark.parametrize("what", FILES)
def test_a_file_that_is_no_document_is_refused_with_the_reason(client: httpx.Client, what: str) -> None:
    name, data, word = FILES[what]
    assert word in is_refused(send(client, data(), name), 400, 413, 415, 422)


def test_what_a_file_is_counts_and_not_its_name(client: httpx.Client) -> None:
    told = settled(client, send(client, "<html><body><p>Visible.</p><script>hidden()</script></body></html>", "page.txt"))
    assert told["media_type"] == "text/html"
    text = client.get(f"/documents/{told['document_id']}/text").json()["text"]
    assert "Visible" in text and "hidden" not in text


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../../../etc/passwd", "passwd"),
        ("..\\..\\boot.ini", "boot.ini"),
        ("/etc/../a.txt", "a.txt"),
        ("Überblick 概要 📦.md", "Überblick 概要 📦.md"),
        ("U\u0308berblick.txt", "Überblick.txt"),
        ("harmless\u202efdp.exe", "harmlessfdp.exe"),
        ("a\x00b.txt", "a b.txt"),
        ("<b onclick=alert(1)>.txt", "<b onclick=alert(1)>.txt"),
        ("CON", "CON"),
        ("x" * 400 + ".pdf", "x" * (MAX_NAME - 4) + ".pdf"),
    ],
)
def test_a_name_is_a_text_and_no_path(client: httpx.Client, name: str, shown: str) -> None:
    assert clean_name(name) == shown
    disposition = b'form-data; name="file"; filename="' + name.replace('"', "%22").replace("\\", "\\\\").encode() + b'"'
    body = b"--x\r\nContent-Disposition: " + disposition + b"\r\n\r\nA document called " + repr(name).encode() + b"\r\n--x--\r\n"
    sent = client.post("/index", content=body, headers={"content-type": "multipart/form-data; boundary=x"})
    assert sent.status_code == 202, sent.text
    assert sent.json()["name"] == shown


@pytest.mark.parametrize("name", ["", " ", ".", "..", "../..", "/", "\x00", "\u202e", ".\u2028."])
def test_a_name_of_which_nothing_is_left(name: str) -> None:
    with pytest.raises(Refused, match="needs a name"):
        clean_name(name)


@given(st.text(st.characters(), max_size=300))
@example("a" * 149 + "/" + "\ud800" * 200 + ".x")
@example("x." + "y" * 300)
def test_every_name_can_be_shown(name: str) -> None:
    try:
        shown = clean_name(name)
    except Refused:
        return
    assert 0 < len(shown) <= MAX_NAME and shown.isprintable() and not set(shown) & set("/\\\u202e\u2066")
    assert clean_name(shown) == shown
    shown.encode()


def test_a_header_cannot_be_put_into_a_name(client: httpx.Client) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.txt\r\nSet-Cookie: a=b"\r\n\r\nwords of a header\r\n--x--\r\n'
    said = client.post("/index", content=body, headers={"content-type": "multipart/form-data; boundary=x"})
    assert said.status_code in (202, 400) and "set-cookie" not in said.headers


PART = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\nwords\r\n'


@pytest.mark.parametrize(
    ("media", "body", "statuses"),
    [
        ("", PART + b"--x--\r\n", (415,)),
        ("application/json", b"{}", (415,)),
        ("application/octet-stream", b"words", (415,)),
        ("multipart/form-data", PART + b"--x--\r\n", (400,)),
        ("multipart/form-data; boundary=", PART + b"--x--\r\n", (400,)),
        ("multipart/form-data; boundary=y", PART + b"--x--\r\n", (400, 422)),
        ("multipart/form-data; boundary=" + "x" * 5_000, PART, (400,)),
        ("multipart/form-data; boundary=x", b"", (400, 422)),
        ("multipart/form-data; boundary=x", b"--x--\r\n", (400, 422)),
        ("multipart/form-data; boundary=x", PART[:-7], (400, 422)),
        ("multipart/form-data; boundary=x", PART + PART + b"--x--\r\n", (400,)),
        ("multipart/form-data; boundary=x", PART.replace(b'name="file"', b'name="data"') + b"--x--\r\n", (422,)),
        ("multipart/form-data; boundary=x", PART.replace(b'; filename="a.txt"', b"") + b"--x--\r\n", (422,)),
        ("multipart/form-data; boundary=x", PART.replace(b"form-data; name", b"form-data; nome") + b"--x--\r\n", (400,)),
        ("multipart/form-data; boundary=x", b"--x\r\n" + b"a: b\r\n" * 5_000 + b"\r\nwords\r\n--x--\r\n", (400,)),
        ("multipart/form-data; boundary=x", b"--x\r\n" + b"a" * 100_000 + b": b\r\n\r\nwords\r\n--x--\r\n", (400,)),
        ("multipart/form-data; boundary=x", b"".join(PART.replace(b"file", b"f%d" % n).replace(b'; filename="a.txt"', b"") for n in range(99)) + b"--x--\r\n", (400,)),
        ("multipart/form-data; boundary=x; charset=klingon", PART.replace(b"words", b"words in klingon") + b"--x--\r\n", (202, 200)),
    ],
)  # fmt: skip
def test_a_form_that_is_none(client: httpx.Client, media: str, body: bytes, statuses: tuple[int, ...]) -> None:
    said = client.post("/index", content=body, headers={"content-type": media})
    assert said.status_code in statuses, said.text
    if said.status_code >= 400:
        is_refused(said, *statuses)


@given(st.binary(max_size=200), st.sampled_from([b"", b"--x\r\n", PART]))
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
def test_no_form_makes_it_fail(client: httpx.Client, noise: bytes, before: bytes) -> None:
    said = client.post("/index", content=before + noise, headers={"content-type": "multipart/form-data; boundary=x"})
    assert said.status_code in (200, 202, 400, 413, 415, 422), said.text


def test_compressed_forms_are_not_read(client: httpx.Client) -> None:
    assert "unpack" in is_refused(send(client, "words", headers={"content-encoding": "gzip"}), 415)


# ---- more than there is room for


def test_two_hundred_megabytes_are_cut_off_in_time() -> None:
    taken = 0

    async def endless() -> dict[str, Any]:
        nonlocal taken
        body = PART.rstrip() if taken == 0 else b"x" * 65_536
        taken += len(body)
        return {"type": "http.request", "body": body, "more_body": True}

    headers = {b"content-type": b"multipart/form-data; boundary=x"}
    with pytest.raises(Refused) as refused:
        asyncio.run(receive_file(headers, endless, MOST))
    assert refused.value.status == 413
    assert taken <= MOST + 2 * 65_536
    taken = 0
    with pytest.raises(Refused) as refused:
        asyncio.run(receive_file({**headers, b"content-length": b"200000000"}, endless, MOST))
    assert (refused.value.status, taken) == (413, 0), "what is announced as too large is not read at all"


@pytest.mark.parametrize("announced", [False, True])
def test_two_hundred_megabytes_from_somebody_who_does_not_listen(client: httpx.Client, url: str, announced: bool) -> None:
    def body() -> Iterator[bytes]:
        yield PART
        for _ in range(200):
            yield b"x" * 2**20

    headers = {"content-type": "multipart/form-data; boundary=x"} | ({"content-length": str(200 * 2**20 + len(PART))} if announced else {})
    with contextlib.suppress(httpx.TransportError):  # it hung up on us while we were still talking
        assert httpx.post(f"{url}/index", content=body(), headers=headers, timeout=120).status_code == 413
    assert client.get("/health").status_code == 200
    assert send(client, f"Somebody came after that, {announced}.").status_code == 202


def test_who_is_slow_is_not_waited_for(library: Library) -> None:
    def slowly() -> Iterator[bytes]:
        yield PART
        while not over:
            time.sleep(0.05)
            yield b"x"

    over = False
    with background(create_portal(library, api_key="", seconds=0.5)) as url:
        try:
            with contextlib.suppress(httpx.TransportError):
                said = httpx.post(f"{url}/index", content=slowly(), headers={"content-type": "multipart/form-data; boundary=x"}, timeout=60)
                is_refused(said, 408)
        finally:
            over = True
        numbers = metrics(httpx.Client(base_url=url), "http_requests_total")
        assert numbers["POST", "/index", "408"] == 1


# ---- questions of strangers


@pytest.mark.parametrize("path", ["/query", "/answer"])
@pytest.mark.parametrize(
    ("change", "status", "word"),
    [
        ({"question": ""}, 422, ""),
        ({"question": " \n "}, 422, "empty"),
        ({"question": "why " * 3_000}, 422, "10000"),
        ({"question": "why " * 250_000}, 413, "bytes"),
        ({"question": 7}, 422, "string"),
        ({"question": None}, 422, "string"),
        ({"k": 0}, 422, "1"),
        ({"k": 10_000}, 422, "100"),
        ({"k": "5"}, 422, "k"),
        ({"k": True}, 422, "k"),
        ({"k": 2**70}, 422, "k"),
        ({"category": "poetry"}, 422, "technical"),
        ({"category": {"$gt": ""}}, 422, "category"),
        ({"where": {"colour": "red"}}, 422, "where"),
        ({"kategory": "legal"}, 422, "kategory"),
    ],
)
def test_a_question_that_cannot_be(client: httpx.Client, path: str, change: dict[str, Any], status: int, word: str) -> None:
    body = {"question": "why"} | change
    if path == "/query":
        body["query"] = body.pop("question")
    assert word in is_refused(client.post(path, json=body), status)


@pytest.mark.parametrize(
    ("body", "statuses"),
    [(b"", (400,)), (b"{", (400,)), (b"\xff", (400,)), (b"[]", (400,)), (b'{"query": NaN}', (400,)), (b"[" * 100_000, (400,)), (b'{"query": "\\ud800"}', (200, 400, 422))],
)
def test_a_body_that_is_no_json(client: httpx.Client, body: bytes, statuses: tuple[int, ...]) -> None:
    said = client.post("/query", content=body, headers={"content-type": "application/json"})
    assert said.status_code in statuses, said.text
    is_refused(client.post("/query", content=body, headers={"content-type": "text/plain"}), 415)


@given(st.text(min_size=1, max_size=200), st.integers(1, 100), st.sampled_from([None, "legal", "other"]))
@settings(max_examples=40, suppress_health_check=list(HealthCheck))
def test_every_question_has_an_answer(client: httpx.Client, question: str, k: int, category: str | None) -> None:
    with contextlib.suppress(UnicodeEncodeError):  # half a character is no JSON
        body = json.dumps({"question": question, "k": k, "category": category}, ensure_ascii=False).encode()
        said = client.post("/answer", content=body, headers={"content-type": "application/json"})
        assert said.status_code in (200, 422), said.text
        assert said.status_code == 200 or "empty" in said.json()["detail"]


@pytest.mark.parametrize("id", ["x", "%2e%2e%2f", "a/b", "%00", "é", "a" * 5_000, "d:marker", "marker", "' or 1=1 --"])
def test_a_document_that_is_not_there(client: httpx.Client, id: str) -> None:
    for method, path in (("GET", f"/documents/{id}"), ("GET", f"/documents/{id}/text"), ("DELETE", f"/document/{id}")):
        is_refused(client.request(method, path), 404)


# ---- when others fail


@contextlib.contextmanager
def server_of_a_model(reply: bytes, status: int = 200) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # noqa: N802
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            self.send_header("content-type", "text/event-stream")
            self.send_header("content-length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()


def stream(*words: str) -> bytes:
    "What a server of OpenAI's protocol sends."
    chunk = lambda delta, end=None: {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": end}]}
    parts = [chunk({"role": "assistant", "content": w}) for w in words] + [chunk({}, "stop")]
    return b"".join(b"data: " + json.dumps(p).encode() + b"\n\n" for p in parts) + b"data: [DONE]\n\n"


def with_model(library: Library, address: str) -> Any:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model="m", base_url=address, api_key="none", max_retries=0, timeout=5)  # type: ignore[call-arg, arg-type]
    return Changed(library, answer=lambda question, k, category: library.answer(question, k, category, model=model, attempts=1))


@pytest.mark.parametrize(
    ("reply", "status"),
    [(None, 0), (b"", 503), (b"{}", 401), (b"<html>It works!</html>", 200), (b"data: [DONE]\n\n", 200), (stream("42"), 200), (stream("It is paid ", "in gold [9]."), 200)],
)
def test_a_model_that_fails_is_replaced_by_quotes_and_a_note(library: Library, client: httpx.Client, reply: bytes | None, status: int) -> None:
    settled(client, send(client, RETURNS, "returns.md"))
    with contextlib.ExitStack() as running:
        model = "http://127.0.0.1:9/v1" if reply is None else running.enter_context(server_of_a_model(reply, status))
        url = running.enter_context(background(create_portal(with_model(library, model), api_key="")))
        said = httpx.post(f"{url}/answer", json={"question": QUESTION}, timeout=120)
    assert said.status_code == 200, said.text
    told = said.json()
    assert told["found"] and "5 working days" in told["text"] and told["model"] is None and told["sources"]
    assert any("quoted instead" in note for note in told["notes"])


def test_what_a_model_writes_is_told_with_what_supports_it(library: Library, client: httpx.Client) -> None:
    settled(client, send(client, RETURNS, "returns.md"))
    reply = stream("The money is paid back within 5 working days [1]. ", "It is paid in gold [1].")
    with server_of_a_model(reply) as model, background(create_portal(with_model(library, model), api_key="")) as url:
        told = httpx.post(f"{url}/answer", json={"question": QUESTION}, timeout=120).json()
    assert told["model"] == "m" and [bool(s["problem"]) for s in told["sentences"]] == [False, True]
    assert [s["number"] for s in told["sources"]] == [1] and told["sources"][0]["score"] is None


def boom(error: Exception) -> Callable[..., Any]:
    def raised(*_: Any) -> Any:
        raise error

    return raised


def test_a_model_that_never_answers_holds_up_nobody_else(library: Library) -> None:
    ended = Event()

    def wait(question: str, k: int, category: str | None) -> Any:
        ended.wait(120)
        return library.answer(question, k, category)

    portal = create_portal(Changed(library, answer=wait), api_key="")  # type: ignore[arg-type]
    with background(portal) as url, httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(12) as many:
        try:
            asked = [many.submit(httpx.post, f"{url}/answer", json={"question": QUESTION}, timeout=120) for _ in range(12)]
            assert settled(client, send(client, "Others go on with their work.", "work.txt"))["state"] == "indexed"
            assert client.post("/query", json={"query": "work"}).status_code == 200
            assert client.get("/stats").status_code == 200
            assert not any(one.done() for one in asked)
        finally:
            ended.set()
        assert {one.result().status_code for one in asked} == {200}


@pytest.mark.parametrize(
    ("error", "status", "word"),
    [
        (IndexingError("No Chroma server answers at http://x."), 503, "Chroma"),
        (AnswerError("openai:m needs OPENAI_API_KEY."), 503, "OPENAI_API_KEY"),
        (KeyError("the secret of the house"), 500, "mistake on our side"),
    ],
)
def test_what_is_not_the_callers_fault(library: Library, error: Exception, status: int, word: str) -> None:
    with background(create_portal(Changed(library, search=boom(error)), api_key="")) as url:  # type: ignore[arg-type]
        said = httpx.post(f"{url}/query", json={"query": "why"}, timeout=60)
        assert word in is_refused(said, status) and "secret" not in said.text
        numbers = metrics(httpx.Client(base_url=url), "rag_queries_total")
    assert numbers == {("query", "error"): 1}


# ---- at the door


def test_a_key_is_needed_for_all_but_the_page(library: Library) -> None:
    with background(create_portal(library, api_key="a-long-secret-key, another-one-to-come")) as url, httpx.Client(base_url=url, timeout=60) as client:
        for path in ("/", "/health", "/metrics", "/openapi.json"):
            assert client.get(path).status_code == 200
        for method, path in (("GET", "/documents"), ("GET", "/stats"), ("POST", "/index"), ("POST", "/query"), ("POST", "/answer"), ("DELETE", "/document/x"), ("GET", "/nothing")):
            assert "key" in is_refused(client.request(method, path), 401)
        for headers in ({"x-api-key": "a-long-secret-key"}, {"authorization": "Bearer another-one-to-come"}):
            assert client.get("/documents", headers=headers).status_code == 200
        is_refused(client.get("/documents", headers={"x-api-key": "a-long-secret-kez"}), 401)
        told = client.get("/openapi.json").json()
    assert told["paths"]["/index"]["post"]["security"] == [{"key": []}, {"bearer": []}]
    with pytest.raises(ValueError, match="8 or more"):
        create_portal(library, api_key="short")


def test_limits_that_are_none(library: Library) -> None:
    for wrong in ({"max_bytes": 0}, {"seconds": 0}, {"max_in_flight": 0}):
        with pytest.raises(ApiError, match="positive"):
            create_portal(library, api_key="", **wrong)  # type: ignore[arg-type]


def test_pages_of_other_sites_may_not_ask(client: httpx.Client, url: str) -> None:
    for origin in ("https://evil.example", "null", url.replace("http://", "http://evil."), f"{url}0"):
        is_refused(send(client, "words from elsewhere", headers={"origin": origin}), 403)
        is_refused(client.get("/", headers={"origin": origin}), 403)
    assert client.get("/documents", headers={"origin": url}).status_code == 200


def test_another_name_for_this_machine_is_not_answered_to(library: Library) -> None:
    with background(create_portal(library, api_key="", hosts=("localhost", "127.0.0.1", "[::1]"))) as url, httpx.Client(base_url=url, timeout=60) as client:
        port = url.rpartition(":")[2]
        for host in ("evil.example", f"evil.example:{port}", f"localhost.evil.example:{port}", "", f"127.0.0.1.:{port}", f"127.0.0.1@evil:{port}"):
            for path in ("/", "/documents", "/health"):
                is_refused(client.get(path, headers={"host": host}), 421)
        for host in ("localhost", f"LOCALHOST:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
            assert client.get("/documents", headers={"host": host, "origin": f"http://{host}"}).status_code == 200


def test_browsers_are_told_what_they_may_do(client: httpx.Client) -> None:
    for said in (client.get("/"), client.get("/documents"), client.get("/nothing"), client.post("/index"), client.get("/openapi.json")):
        for name, value in {
            "x-content-type-options": "nosniff", "x-frame-options": "DENY", "referrer-policy": "no-referrer", "cache-control": "no-store",
            "cross-origin-opener-policy": "same-origin", "cross-origin-resource-policy": "same-origin",
        }.items():  # fmt: skip
            assert said.headers.get_list(name) == [value]
        (policy,) = said.headers.get_list("content-security-policy")
        assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "*" not in policy


def test_the_policy_names_what_stands_in_the_page_and_nothing_else() -> None:
    page = portal_page()
    assert len(re.findall(r"'sha256-[\w+/]{43}='", page.policy)) == 2
    assert not re.search(rb"https?://|innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", page.body)
    changed = with_policy(page.body.decode().replace('"use strict";', '"use strict"; alert(1);'))
    assert changed.policy != page.policy
    assert "script-src 'none'" in with_policy("<p>Nothing runs here.</p>").policy


# ---- what is told to whom watches


def metrics(client: httpx.Client, name: str) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {tuple(s.labels.values()): s.value for f in families for s in f.samples if s.name == name}


def test_questions_and_uploads_are_counted(library: Library) -> None:
    with background(create_portal(library, api_key="")) as url, httpx.Client(base_url=url, timeout=60) as client:
        before = metrics(client, "documents_indexed_total").get(("legal",), 0)
        told = settled(client, send(client, "This contract ends in May, and nobody may leave before."))
        send(client, "This contract ends in May, and nobody may leave before.")
        send(client, b"\x00\x01")
        client.post("/answer", json={"question": "When does the contract end?"})
        client.post("/answer", json={"question": "Which xylophone did Zarathustra prefer?"})
        client.post("/query", json={"query": "contract"})
        client.post("/query", json={"query": ""})
        client.post("/query", content=b"[", headers={"content-type": "application/json"})
        assert metrics(client, "rag_queries_total") == {("answer", "found"): 1, ("answer", "nothing"): 1, ("query", "found"): 1, ("query", "refused"): 2}
        assert metrics(client, "rag_query_duration_seconds_count") == {("answer",): 2, ("query",): 3}
        assert metrics(client, "document_uploads_total") == {("taken",): 1, ("known",): 1, ("refused",): 1}
        assert metrics(client, "documents_indexed_total")["legal",] == before + 1
        stats = client.get("/stats").json()
        assert stats["documents"] >= 1 and stats["categories"]["legal"] >= 1
        client.delete(f"/document/{told['document_id']}")


def test_a_log_line_ties_the_request_to_the_story(client: httpx.Client) -> None:
    stream = io.StringIO()
    handler = setup_logging("INFO", as_json=True, stream=stream)
    try:
        sent = send(client, "Words that are logged.", "a\nb.txt", headers={"x-request-id": "upload-17"})
    finally:
        setup_logging("WARNING", stream=io.StringIO())
        handler.close()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    taken = next(line for line in lines if line["message"] == "document taken")
    assert taken["correlation_id"] == sent.headers["x-request-id"] == "upload-17"
    assert taken["document_id"] == sent.json()["document_id"] and taken["story"] == sent.json()["correlation_id"]


# ---- the document of the interface


def test_nothing_that_the_document_allows_or_forbids_makes_it_fail(url: str) -> None:
    document = schemathesis.openapi.from_url(f"{url}/openapi.json")
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance, unsupported_method]
    tried = []
    for found in document.get_all_operations():
        operation = found.ok()
        for mode in schemathesis.GenerationMode:
            if mode.is_negative and operation.method in ("get", "delete"):  # nothing can be wrong with it
                continue

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(max_examples=8, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            def run(case: Any) -> None:
                case.call_and_validate(base_url=url, checks=checks)
                tried.append(case.operation.label)

            run()
    assert len(set(tried)) == len(list(document.get_all_operations())), "every operation was tried"


def test_the_document_is_complete(client: httpx.Client) -> None:
    told = client.get("/openapi.json").json()
    assert set(told["paths"]) == {
        "/index", "/documents", "/documents/{id}", "/documents/{id}/text", "/document/{id}", "/query", "/answer", "/stats", "/health", "/metrics",
    }  # fmt: skip
    assert "multipart/form-data" in told["paths"]["/index"]["post"]["requestBody"]["content"]
    assert {"200", "202", "413", "415", "422"} <= set(told["paths"]["/index"]["post"]["responses"])
    wanted = told["components"]["schemas"]["AnswerRequest"]["properties"]
    assert (wanted["k"]["minimum"], wanted["k"]["maximum"]) == (1, 100)
    assert "legal" in json.dumps(wanted["category"])
    assert "HTTPValidationError" not in told["components"]["schemas"]


def test_documents_are_there_after_a_restart(tmp_path: Path) -> None:
    for _ in range(2):
        with platform(tmp_path, classify=by_words) as library, background(create_portal(library, api_key="")) as url, httpx.Client(base_url=url, timeout=60) as client:
            told = settled(client, send(client, RETURNS, "returns.md"))
            assert client.post("/answer", json={"question": QUESTION}).json()["found"]
            assert [d["document_id"] for d in client.get("/documents").json()["documents"]] == [told["document_id"]]
