"""What is done for every request: limits, ids, keys, refusals, numbers and log lines; and clients that mean no good."""

import asyncio
import io
import json
import logging
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from mlops_lib.logs import setup_logging
from mlops_lib.serving import doorman
from mlops_lib.serving.api import background
from mlops_lib.serving.doorman import (
    Call,
    DoorError,
    Doorman,
    Gone,
    Limits,
    Refused,
    Telemetry,
    digests,
    has_key,
    read_body,
    request_id,
)

JSON = {b"content-type": b"application/json"}


class House:
    "An app behind a doorman, that does what its path says."

    def __init__(self, **limits: Any) -> None:
        self.telemetry = Telemetry()
        self.limits = Limits(**limits)
        self.hold, self.entered = threading.Event(), threading.Semaphore(0)

    def door(self, keys: Any = (), **more: Any) -> Doorman:
        direct = {("POST", "/direct"): self.direct}
        return Doorman(self.app, self.limits, digests(keys) if keys else [], self.telemetry, direct, **more)

    async def direct(self, call: Call) -> None:
        await call.reply(200, await call.body(self.limits.body))

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for _ in range(2):
                message = await receive()
                await send({"type": f"{message['type']}.complete"})
            return
        call, path = scope["call"], scope["path"]
        if path == "/bug":
            raise KeyError("secret-in-a-message")
        if path == "/refuse":
            raise Refused(418, "I am a teapot.", cup="full")
        if path == "/wait":
            self.entered.release()
            while not self.hold.is_set():
                await asyncio.sleep(0.01)
        if path == "/read":
            await call.body(self.limits.body)
            await asyncio.sleep(3600)
        await call.reply(200, b'{"fine":true}')

    def numbers(self, name: str) -> dict[tuple[str, ...], float]:
        families = text_string_to_metric_families(self.telemetry.to_bytes().decode())
        return {tuple(s.labels.values()): s.value for f in families for s in f.samples if s.name == name}


@pytest.fixture
def house() -> Iterator[House]:
    one = House(body=10_000, seconds=5.0)
    yield one
    one.hold.set()


def chunks(*parts: bytes, more: bool = False) -> Any:
    left = [{"type": "http.request", "body": p, "more_body": more or i + 1 < len(parts)} for i, p in enumerate(parts)]

    async def receive() -> Any:
        return left.pop(0) if left else {"type": "http.disconnect"}

    return receive


# ---- bodies


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=8), st.integers(0, 200))
@settings(max_examples=200, deadline=None)
def test_a_body_is_whole_or_refused_at_the_first_byte_too_many(parts: list[bytes], most: int) -> None:
    whole = b"".join(parts)
    if len(whole) <= most:
        assert asyncio.run(read_body(JSON, chunks(*parts), most)) == whole
    else:
        with pytest.raises(Refused) as e:
            asyncio.run(read_body(JSON, chunks(*parts), most))
        assert e.value.status == 413 and e.value.headers == {"connection": "close"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 415),
        ({b"content-type": b"text/plain"}, 415),
        ({b"content-type": b"application/x-www-form-urlencoded"}, 415),
        ({**JSON, b"content-encoding": b"gzip"}, 415),
        ({**JSON, b"content-length": b"101"}, 413),
        ({**JSON, b"content-length": b"9" * 5_000}, 413),
        ({**JSON, b"content-length": b"-1"}, 413),
    ],
)
def test_what_the_headers_say_is_enough_to_refuse(headers: dict[bytes, bytes], status: int) -> None:
    async def receive() -> Any:
        raise AssertionError("nothing should be read")

    with pytest.raises(Refused) as e:
        asyncio.run(read_body(headers, receive, 100))
    assert e.value.status == status


def test_a_client_that_goes_away_is_no_error_of_ours(house: House) -> None:
    with pytest.raises(Gone):
        asyncio.run(read_body(JSON, chunks(b"half", more=True), 100))
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/direct", "headers": list(JSON.items())}
    asyncio.run(house.door()(scope, chunks(b"half", more=True), send))
    assert sent == [] and house.numbers("http_requests_total") == {("POST", "/direct", "499"): 1.0}


# ---- ids and keys


@given(st.binary(max_size=80))
def test_an_id_is_always_a_plain_word(given_id: bytes) -> None:
    found = request_id({b"x-request-id": given_id})
    assert doorman._ID.fullmatch(found.encode())
    assert found == given_id.decode("latin-1") or not doorman._ID.fullmatch(given_id)


def test_an_id_may_be_that_of_the_trace() -> None:
    trace = {b"traceparent": b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    assert request_id(trace) == "0af7651916cd43dd8448eb211c80319c"
    assert request_id({**trace, b"x-request-id": b"mine"}) == "mine"
    assert len({request_id({}) for _ in range(100)}) == 100


def test_any_of_the_keys_opens_and_nothing_else(house: House) -> None:
    keys = digests(["first-key-1234", "second-key-5678"])
    for given_key in (b"first-key-1234", b"second-key-5678"):
        assert has_key({b"x-api-key": given_key}, keys) and has_key({b"authorization": b"bearer  " + given_key}, keys)
    for wrong in (b"", b"first-key-123", b"first-key-12345", b"\xff\x00", b"x" * 100_000):
        assert not has_key({b"x-api-key": wrong}, keys) and not has_key({b"authorization": b"Bearer " + wrong}, keys)
    assert not has_key({b"authorization": b"Basic first-key-1234"}, keys) and not has_key({}, keys)
    for weak in ("", "short", "with a space", "schlüssel-12345", ["good-enough-key", "bad"]):
        with pytest.raises(DoorError) as e:
            digests(weak)
        assert "schlüssel" not in str(e.value) and "space" not in str(e.value).replace("without spaces", "")


def test_who_has_no_key_sees_only_how_the_app_is(house: House) -> None:
    with background(house.door("a-long-secret-key")) as url, httpx.Client(base_url=url) as client:
        said = client.get("/anything")
        assert said.status_code == 401 and said.headers["www-authenticate"] == "Bearer"
        assert client.get("/health").status_code == 200
        assert client.get("/anything", headers={"authorization": "Bearer a-long-secret-key"}).status_code == 200


# ---- refusals, numbers, lines


def test_refusals_are_problems_with_the_id_of_the_request(house: House) -> None:
    with background(house.door()) as url, httpx.Client(base_url=url) as client:
        said = client.get("/refuse", headers={"x-request-id": "order-17"})
        assert said.status_code == 418 and said.headers["content-type"] == "application/problem+json"
        assert said.headers["x-request-id"] == "order-17" and said.headers["x-content-type-options"] == "nosniff"
        told = said.json()
        assert told == {"type": "about:blank", "title": "I'm a Teapot", "status": 418, "detail": "I am a teapot.", "request_id": "order-17", "cup": "full"}
        broken = client.get("/bug")
        assert broken.status_code == 500 and "secret" not in broken.text and "KeyError" not in broken.text
        late = client.post("/direct", content=b"x" * 10_001, headers={"content-type": "application/json"})
        assert late.status_code == 413 and late.headers["connection"] == "close"


def test_a_foreign_protocol_has_its_own_words(house: House) -> None:
    door = house.door(word=lambda path, status, detail: {"error": detail} if path == "/refuse" else None)
    with background(door) as url:
        assert httpx.get(f"{url}/refuse").json() == {"error": "I am a teapot."}
        assert httpx.get(f"{url}/bug").json()["status"] == 500


def test_labels_are_few_whatever_is_asked(house: House) -> None:
    with background(house.door()) as url, httpx.Client(base_url=url) as client:
        for n in range(50):
            client.request(("PURGE", "LOCK", "MKCOL")[n % 3], f"/path/{n}")
        client.post("/direct", content=b"{}", headers={"content-type": "application/json"})
    assert house.numbers("http_requests_total") == {("other", "unknown", "200"): 50.0, ("POST", "/direct", "200"): 1.0}
    assert house.numbers("http_request_duration_seconds_count") == {("unknown",): 50.0, ("/direct",): 1.0}
    assert house.numbers("http_requests_in_flight") == {(): 0.0}


def test_two_apps_in_a_process_do_not_add_up() -> None:
    one, two = Telemetry(), Telemetry()
    one.count("GET", "/x", 200, 0.1)
    assert b'http_requests_total{method="GET",route="/x",status="200"} 1.0' in one.to_bytes()
    assert b'route="/x"' not in two.to_bytes()


@pytest.mark.parametrize("as_json", [True, False])
def test_a_line_for_each_request_with_its_id(house: House, as_json: bool) -> None:
    stream = io.StringIO()
    handler = setup_logging("INFO", as_json, stream)
    try:
        with background(house.door()) as url, httpx.Client(base_url=url) as client:
            for n in range(3):
                client.get(f"/path?key=secret{n}", headers={"x-request-id": f"r{n}"})
            client.get("/bug", headers={"x-request-id": "r9"})
    finally:
        logging.getLogger("mlops_lib").removeHandler(handler)
        logging.getLogger("mlops_lib").propagate = True
    lines = stream.getvalue()
    assert "secret0" not in lines
    if as_json:
        told = [json.loads(line) for line in lines.splitlines()]
        mine = [line for line in told if line["message"] == "request"]
        assert [line["correlation_id"] for line in mine] == ["r0", "r1", "r2", "r9"]
        assert list(mine[0]) == ["time", "correlation_id", "level", "logger", "message", "method", "route", "status", "ms"]
        assert [line["status"] for line in mine] == [200, 200, 200, 500]
        assert [line["correlation_id"] for line in told if "exc_info" in line] == ["r9"]
    else:
        assert lines.count("doorman: request ") == 4 and "correlation_id=r9" in lines and "KeyError" in lines


# ---- time, and too many


def test_one_deadline_for_body_and_answer() -> None:
    house = House(seconds=0.2)
    with background(house.door()) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 10) as slow:
            slow.sendall(b"POST /direct HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{")
            said = slow.recv(10_000)
            assert b" 408 " in said.split(b"\r\n")[0]
            while more := slow.recv(10_000):
                said += more
        late = httpx.post(f"{url}/read", content=b"{}", headers={"content-type": "application/json"})
        assert late.status_code == 503 and late.headers["retry-after"] == "2"


def test_headers_that_never_end(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doorman.Limits, "headers_seconds", 0.2)
    with background(house.door()) as url:
        host, port = url.removeprefix("http://").split(":")
        for begun in (b"", b"GET / HTTP/1.1\r\nx: y\r\n"):
            with socket.create_connection((host, int(port)), 10) as slow:
                slow.sendall(begun)
                assert slow.recv(100) == b"", "the connection is closed"
        assert httpx.get(f"{url}/x").status_code == 200


def test_too_many_at_once_are_told_to_come_back() -> None:
    house = House(in_flight=2)
    with background(house.door()) as url, httpx.Client(base_url=url, timeout=30) as client:
        held = [threading.Thread(target=httpx.get, args=(f"{url}/wait",), kwargs={"timeout": 30}) for _ in range(2)]
        for thread in held:
            thread.start()
        for _ in held:
            assert house.entered.acquire(timeout=20)
        said = client.get("/anything")
        assert said.status_code == 503 and said.headers["retry-after"] == "1"
        assert client.get("/health").status_code == 200, "probes come in, or a busy process would be restarted"
        house.hold.set()
        for thread in held:
            thread.join(20)
        assert client.get("/anything").status_code == 200
