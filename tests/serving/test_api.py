"""The API over real models and real HTTP: its document is true, nothing makes it fail, and models are exchanged under it."""

import asyncio
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow.pyfunc import scoring_server
from prometheus_client.parser import text_string_to_metric_families
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from support import private, until

from mlops_lib.data.features import clean_text, create_features
from mlops_lib.data.synthetic import generate_inbox
from mlops_lib.data.tables import add_label
from mlops_lib.registry.gates import set_alias
from mlops_lib.registry.tracking import log_run, model_uri, open_store, register
from mlops_lib.serving.api import ApiError, BusWatch, background, create_app
from mlops_lib.serving.predictor import Predictor
from mlops_lib.training import train

QUICK: dict[str, Any] = {"chars": 0, "thirds": False, "shift": False}
ROW = {"a": 0.5, "b": -1.0, "plan": "basic", "active": True}


def registered(frame: pd.DataFrame, kind: str, name: str, **params: Any) -> int:
    return int(register(log_run(train(kind, frame, target="label", params=params), frame), name))


@pytest.fixture(scope="module")
def messages() -> pd.DataFrame:
    reviews = generate_inbox(n_reviews=400, seed=5).review.drop_duplicates("text").dropna(subset=["stars"])
    return create_features(add_label(clean_text(reviews))).reset_index(drop=True)


@pytest.fixture
def inbox(messages: pd.DataFrame) -> str:
    "Two versions of a model for texts; the first one is champion."
    name = f"m{uuid.uuid4().hex[:8]}"
    for kind in ("naive_bayes", "ordinal"):
        registered(messages, kind, name, **QUICK)
    set_alias("champion", 1, "the first one", name=name)
    return name


@pytest.fixture(scope="module")
def table() -> str:
    "A model for rows of a table."
    rng, n, name = np.random.default_rng(1), 300, f"t{uuid.uuid4().hex[:8]}"
    frame = pd.DataFrame({"a": rng.normal(size=n), "b": rng.normal(size=n), "plan": rng.choice(["basic", "pro"], n), "active": rng.random(n) < 0.5})
    registered(frame.assign(label=np.where(frame.a + rng.normal(0, 0.3, n) > 0, "stays", "leaves")), "logistic", name)
    set_alias("champion", 1, "the only one", name=name)
    return name


@pytest.fixture(scope="module")
def app(table: str) -> Any:
    return create_app(f"{table}@champion", api_key="", max_body=50_000, max_rows=50, every=60)


@pytest.fixture(scope="module")
def url(app: Any) -> Iterator[str]:
    with background(app) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as one:
        yield one


# ---- answers


def test_one_row_and_several(client: httpx.Client, table: str) -> None:
    one = client.post("/api/v1/predict", json={"instance": ROW, "probabilities": True}, headers={"x-request-id": "r-1"}).json()
    assert one["model"] == table and one["version"] == 1 and one["request_id"] == "r-1" and one["runtime"] in ("onnx", "native")
    assert set(one["probabilities"]) == {"stays", "leaves"} and math.isclose(sum(one["probabilities"].values()), 1, abs_tol=1e-6)
    assert one["confidence"] == max(one["probabilities"].values()) == one["probabilities"][one["prediction"]]
    rows = [{**ROW, "a": a} for a in (-2.0, 0.5, 2.0)]
    many = client.post("/api/v1/predict/batch", json={"instances": rows}).json()
    assert [p["prediction"] for p in many["predictions"]] == ["leaves", one["prediction"], "stays"]
    assert many["version"] == 1 and all(set(p) == {"prediction", "confidence"} for p in many["predictions"])


def test_texts_are_rows(inbox: str) -> None:
    with background(create_app(inbox, api_key="")) as url, httpx.Client(base_url=url, timeout=60) as client:
        short = client.post("/api/v1/predict", json={"instance": "Terrible service, never again."}).json()
        long = client.post("/api/v1/predict", json={"instance": {"text": "Terrible service, never again."}}).json()
        assert {**short, "request_id": ""} == {**long, "request_id": ""} and short["prediction"] in (0, 1, 2)
        tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["Terrible service, never again."]}
        told = client.post(f"/v2/models/{inbox}/infer", json={"inputs": [tensor]}).json()
        assert told["outputs"][0]["data"] == [short["prediction"]] and told["outputs"][0]["datatype"] == "INT64"
        csv = 'text\n"Terrible service, never again."\n'
        sent = client.post("/invocations", content=csv, headers={"content-type": "text/csv"}).json()
        assert sent == {"predictions": [short["prediction"]]}


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/api/v1/predict", b"{", 400, "no JSON"),
        ("/api/v1/predict", b'{"instance": NaN}', 400, "no JSON"),
        ("/api/v1/predict", b"[" * 40_000, 400, "no JSON"),
        ("/api/v1/predict", b'{"instance": {"a": ' + b"[" * 900 + b"]" * 900 + b"}}", 422, ""),
        ("/api/v1/predict", b'"instance"', 400, "an object is expected"),
        ("/api/v1/predict", b"{}", 422, "instance"),
        ("/api/v1/predict", b'{"instance": 5}', 422, ""),
        ("/api/v1/predict", json.dumps({"instance": ROW, "extra": 1}).encode(), 422, "extra"),
        ("/api/v1/predict", json.dumps({"instance": ROW, "probabilities": 1}).encode(), 422, "probabilities"),
        ("/api/v1/predict", json.dumps({"instance": {**ROW, "a": "1"}}).encode(), 422, "a "),
        ("/api/v1/predict", json.dumps({"instance": {**ROW, "a": 1e300}}).encode(), 422, "a "),
        ("/api/v1/predict", json.dumps({"instance": {**ROW, "aa": 1}}).encode(), 422, "aa"),
        ("/api/v1/predict", json.dumps({"instance": {"b": 1}}).encode(), 422, "a is missing"),
        ("/api/v1/predict/batch", b'{"instances": []}', 422, "instances"),
        ("/api/v1/predict/batch", json.dumps({"instances": [ROW] * 51}).encode(), 413, "at most 50"),
        ("/api/v1/predict/batch", json.dumps({"instances": [ROW, {**ROW, "b": None}, "x"]}).encode(), 422, ""),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(client: httpx.Client, path: str, body: bytes, status: int, words: str) -> None:
    said = client.post(path, content=body, headers={"content-type": "application/json"})
    assert said.status_code == status and said.headers["content-type"] == "application/problem+json", said.text
    told = said.json()
    assert words in told["detail"] and told["status"] == status and told["request_id"] == said.headers["x-request-id"]


def test_paths_and_methods_that_are_not_there(client: httpx.Client) -> None:
    gone = client.get("/api/v1/nothing")
    assert gone.status_code == 404 and gone.json()["title"] == "Not Found"
    wrong = client.put("/api/v1/predict")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST" and wrong.json()["status"] == 405


# ---- the document


@pytest.fixture(scope="module")
def document(url: str, app: Any) -> Any:
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


def test_nothing_that_the_document_allows_or_forbids_makes_it_fail(document: Any, url: str) -> None:
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance, unsupported_method]
    tried = []
    for found in document.get_all_operations():
        operation = found.ok()
        for mode in schemathesis.GenerationMode:
            if mode.is_negative and operation.method == "get":  # nothing can be wrong with it
                continue

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(max_examples=8, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            def run(case: Any) -> None:
                case.call_and_validate(base_url=url, checks=checks)
                tried.append(case.operation.label)

            run()
    assert len(set(tried)) == len(list(document.get_all_operations())), "every operation was tried"
    assert len(tried) > 60


def test_the_document_is_complete(app: Any) -> None:
    told = app.openapi()
    predict = told["paths"]["/api/v1/predict"]["post"]
    assert set(predict["responses"]) == {"200", "400", "408", "413", "415", "422", "500", "503"}
    assert predict["requestBody"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/PredictRequest"}
    assert set(told["components"]["schemas"]["PredictAnswer"]["required"]) == {"model", "version", "runtime", "request_id", "prediction"}
    assert "HTTPValidationError" not in told["components"]["schemas"] and "securitySchemes" not in told["components"]
    locked = create_app("x", api_key="a-long-secret-key").openapi()
    assert locked["paths"]["/api/v1/predict"]["post"]["security"] == [{"key": []}, {"bearer": []}]
    assert "401" in locked["paths"]["/api/v1/predict"]["post"]["responses"]
    assert "security" not in locked["paths"]["/ready"]["get"]


# ---- strangers

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["a", "b", "plan", "active", "x", "text", "name", "data"]), inner, max_size=5),
    max_leaves=12,
)
shapes = st.sampled_from(["instance", "instances", "inputs", "dataframe_split", "dataframe_records", "outputs", "user", "params", "id"])


@given(
    path=st.sampled_from(["/api/v1/predict", "/api/v1/predict/batch", "/v2/models/MODEL/infer", "/invocations"]),
    body=st.dictionaries(shapes, json_values, max_size=3).map(lambda v: json.dumps(v).encode()) | st.binary(max_size=60),
    media=st.sampled_from(["application/json", "text/csv", "application/json; charset=utf-16", ""]),
)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_body_makes_it_fail(client: httpx.Client, table: str, path: str, body: bytes, media: str) -> None:
    said = client.post(path.replace("MODEL", table), content=body, headers={"content-type": media})
    assert said.status_code in (200, 400, 413, 415, 422), said.text
    assert json.loads(said.content)


def test_fifty_megabytes(url: str) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(50):
            yield b"x" * 2**20

    kind = {"content-type": "application/json"}
    for content, more in ((endless(), {}), (endless(), {"content-length": str(50 * 2**20)})):
        try:
            said = httpx.post(f"{url}/api/v1/predict", content=content, headers=kind | more, timeout=60)
            assert said.status_code == 413
        except httpx.TransportError:  # it hung up on us while we were still talking
            pass
    assert httpx.get(f"{url}/health").status_code == 200
    numbers = metrics(url, "http_requests_total")
    assert sum(v for k, v in numbers.items() if k[1:] == ("/api/v1/predict", "413")) >= 2


def metrics(url: str, name: str, **headers: str) -> dict[tuple[str, ...], float]:
    text = httpx.get(f"{url}/metrics", headers=headers, timeout=60).text
    return {tuple(s.labels.values()): s.value for f in text_string_to_metric_families(text) for s in f.samples if s.name == name}


def test_pages_of_others_may_not_ask(table: str) -> None:
    origin = {"origin": "https://shop.example", "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    with background(create_app(table, api_key="")) as url:
        assert not [h for h in httpx.options(f"{url}/api/v1/predict", headers=origin).headers if h.startswith("access-control")]
    app = create_app(table, api_key="a-long-secret-key", cors_origins=["https://shop.example"])
    with background(app) as url:
        before = httpx.options(f"{url}/api/v1/predict", headers=origin)
        assert before.status_code == 200 and before.headers["access-control-allow-origin"] == "https://shop.example"
        refused = httpx.post(f"{url}/api/v1/predict", json={"instance": ROW}, headers={"origin": "https://shop.example"})
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://shop.example"
        other = httpx.post(f"{url}/api/v1/predict", json={"instance": ROW}, headers={"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
    with pytest.raises(ApiError):
        create_app(table, api_key="a-long-secret-key", cors_origins=["*"])


# ---- the protocols of others


def test_open_inference_protocol(client: httpx.Client, table: str) -> None:
    about = client.get(f"/v2/models/{table}").json()
    assert about["name"] == table and about["versions"] == ["1"]
    kinds = {i["name"]: i["datatype"] for i in about["inputs"]}
    assert kinds == {"a": "FP64", "b": "FP64", "plan": "BYTES", "active": "BOOL"}
    rows = [ROW, {**ROW, "a": -3.0}]
    inputs = [{"name": n, "datatype": k, "shape": [2], "data": [r[n] for r in rows]} for n, k in kinds.items()]
    said = client.post(f"/v2/models/{table}/versions/1/infer", json={"id": "q1", "inputs": inputs, "outputs": [{"name": "probabilities"}, {"name": "prediction"}]}).json()
    mine = client.post("/api/v1/predict/batch", json={"instances": rows, "probabilities": True}).json()["predictions"]
    assert said["id"] == "q1" and said["model_name"] == table and said["model_version"] == "1"
    proba, label = said["outputs"]
    assert label == {"name": "prediction", "datatype": "BYTES", "shape": [2], "data": [p["prediction"] for p in mine]}
    assert proba["shape"] == [2, 2] and np.allclose(proba["data"], [v for p in mine for v in p["probabilities"].values()])
    for path in ("/v2", "/v2/health/live", "/v2/health/ready", f"/v2/models/{table}/ready", f"/v2/models/{table}/versions/1/ready"):
        assert client.get(path).status_code == 200
    for path, status in (("/v2/models/other", 404), (f"/v2/models/{table}/versions/9", 404), (f"/v2/models/{table}/versions/x/ready", 404)):
        said = client.get(path)
        assert said.status_code == status and list(said.json()) == ["error"]
    wrong = client.post(f"/v2/models/{table}/infer", json={"inputs": [{**inputs[0], "shape": [3]}]})
    assert wrong.status_code == 400 and "3" in wrong.json()["error"]


def test_the_same_answers_as_mlflow_s_own_server(client: httpx.Client, table: str) -> None:
    import mlflow
    from starlette.testclient import TestClient

    mlflow.set_tracking_uri(os.environ["MLOPS_MLFLOW_TRACKING_URI"])
    frame = pd.DataFrame([ROW, {**ROW, "a": -3.0, "plan": "pro"}])
    bodies = [
        (json.dumps({"dataframe_split": frame.to_dict("split")}), "application/json"),
        (json.dumps({"dataframe_records": frame.to_dict("records")}), "application/json"),
        (json.dumps({"inputs": frame.to_dict("list")}), "application/json"),
        (frame.to_csv(index=False), "text/csv"),
    ]
    theirs = TestClient(scoring_server.init(mlflow.pyfunc.load_model(model_uri(f"{table}/1", open_store()))))
    for body, media in bodies:
        kind = {"content-type": media}
        said = client.post("/invocations", content=body, headers=kind)
        assert said.status_code == 200, said.text
        assert said.json() == theirs.post("/invocations", content=body, headers=kind).json() and said.headers["x-model-version"] == "1"
    assert client.post("/invocations", json={"rows": []}).json()["error_code"] == "BAD_REQUEST"
    assert client.post("/invocations", content=b"PAR1", headers={"content-type": "application/vnd.apache.parquet"}).status_code == 415
    assert client.get("/version").text == theirs.get("/version").text and client.get("/ping").status_code == 200


# ---- ready, and what it tells


def test_without_a_model_it_is_alive_and_not_ready(tmp_path: Path) -> None:
    with background(create_app("nothing@champion", api_key="", every=0.1)) as url, httpx.Client(base_url=url, timeout=60) as client:
        assert client.get("/health").json() == {"status": "alive"}
        for method, path in (("GET", "/ready"), ("POST", "/api/v1/predict"), ("GET", "/v2/health/ready"), ("GET", "/ping"), ("GET", "/api/v1/models")):
            said = client.request(method, path, **({"json": {"instance": "x"}} if method == "POST" else {}))
            assert said.status_code == 503 and said.headers["retry-after"] == "2" and "nothing" in said.text


def test_a_bus_that_is_gone(table: str, tmp_path: Path) -> None:
    with private("redis", tmp_path / "redis") as redis:
        app = create_app(table, api_key="", bus=redis.url, every=0.1)
        with background(app) as url:
            until(lambda: httpx.get(f"{url}/ready", timeout=60).status_code == 200, "ready")
            redis.kill()
            said = until(lambda: r if (r := httpx.get(f"{url}/ready", timeout=60)).status_code == 503 else None, "not ready")
            assert said.headers["content-type"] == "application/problem+json" and "bus" in said.json()["detail"]
            assert httpx.post(f"{url}/api/v1/predict", json={"instance": ROW}, timeout=60).status_code == 200, "what needs no bus goes on"
            redis.start()
            until(lambda: httpx.get(f"{url}/ready", timeout=60).status_code == 200, "ready again")


def test_a_bus_that_hangs_does_not_hang_the_probe() -> None:
    asked, answer = threading.Event(), threading.Event()

    def queues() -> list[str]:
        asked.set()
        answer.wait(60)
        return []

    watch = BusWatch(SimpleNamespace(queues=queues), every=0.01).start()
    assert asked.wait(20) and watch.problem, "unknown is not ready"
    answer.set()
    until(lambda: watch.problem is None, "it answers")
    watch._at -= 3600
    watch.every = 1e9
    watch.close()


def test_a_bad_version_leaves_the_old_one_and_says_so(inbox: str) -> None:
    files = Path(model_uri(f"{inbox}/2", open_store()).removeprefix("file://"))
    (files / "model.skops").write_bytes(b"not a model")
    with background(create_app(inbox, api_key="", every=0.05)) as url:
        set_alias("champion", 2, "a mistake", name=inbox)
        ready = until(lambda: r if (r := httpx.get(f"{url}/ready", timeout=60).json()).get("problem") else None, "it noticed")
        assert ready["status"] == "ready" and ready["version"] == 1 and f"{inbox} 2 cannot be taken" in ready["problem"]
        assert httpx.post(f"{url}/api/v1/predict", json={"instance": "Thanks!"}, timeout=60).json()["version"] == 1
        told = httpx.get(f"{url}/api/v1/models", timeout=60).json()
        assert told["problem"] == ready["problem"] and [m["version"] for m in told["models"] if m["current"]] == [1]
        assert metrics(url, "model_load_failures_total") == {(inbox,): 1.0}
        [(labels, one)] = metrics(url, "model_version_info").items()
        assert set(labels) == {inbox, "1", told["models"][0]["runtime"]} and one == 1.0
        set_alias("champion", 1, "back", name=inbox)
        until(lambda: httpx.get(f"{url}/ready", timeout=60).json()["problem"] is None, "nothing is wrong any more")


# ---- a new model, while it answers


def test_models_are_exchanged_under_load(inbox: str) -> None:
    said: list[list[tuple[float, int, int]]] = [[] for _ in range(4)]
    ended = threading.Event()

    with Predictor(inbox, every=3600) as predictor, background(create_app(predictor=predictor, api_key="")) as url:

        def ask(mine: list[tuple[float, int, int]]) -> None:
            with httpx.Client(base_url=url, timeout=60) as client:
                while not ended.is_set():
                    begun = time.monotonic()
                    r = client.post("/api/v1/predict", json={"instance": "Great, thank you!"})
                    mine.append((begun, r.status_code, r.json().get("version", 0)))

        threads = [threading.Thread(target=ask, args=(mine,)) for mine in said]
        for thread in threads:
            thread.start()
        for version in (2, 1, 2):
            seen = len(said[0])
            until(lambda seen=seen: len(said[0]) > seen + 10, "some answers")
            set_alias("champion", version, "swap", name=inbox)
            assert predictor.refresh()
        seen = len(said[0])
        until(lambda: len(said[0]) > seen + 10, "some answers")
        ended.set()
        for thread in threads:
            thread.join(60)
        swaps = metrics(url, "model_swaps_total")
    for mine in said:
        assert {status for _, status, _ in mine} == {200}, "no request failed"
        versions = [version for *_, version in mine]
        changes = [v for i, v in enumerate(versions) if i == 0 or v != versions[i - 1]]
        assert changes == [1, 2, 1, 2], "each client sees the versions in the order of the swaps, never an older one again"
    assert swaps == {(inbox,): 4.0}


# ---- experiments


class Traffic:
    "Sends users whose name begins with b to version 2, as lesson 55 does by hash."

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def start(self) -> None: ...

    def close(self) -> None: ...

    def route(self, user: str | None) -> Any:
        arm, version = ("b", 2) if str(user).startswith("b") else ("gone", 7) if user == "gone" else ("a", None)
        return SimpleNamespace(arm=arm, version=version, shadow=(2,) if arm == "a" else (), experiment="e1")

    def exposed(self, route: Any) -> None:
        self.seen.append(("exposed", route.arm))

    def observe(self, route: Any, seconds: float, ok: bool = True) -> None:
        self.seen.append(("observed", route.arm, ok))

    def shadowed(self, route: Any, seconds: float, ok: bool = True, agreed: bool | None = None) -> None:
        self.seen.append(("shadowed", route.arm, ok))

    def outcome(self, user: str, value: float) -> bool:
        if value < 0:
            raise ValueError("An outcome of this experiment is 0 or 1.")
        return user != "stranger"


def test_users_go_where_the_experiment_says(inbox: str) -> None:
    traffic = Traffic()
    with Predictor(inbox, every=3600) as predictor:
        predictor.load(2)
        with background(create_app(predictor=predictor, api_key="", traffic=traffic)) as url, httpx.Client(base_url=url, timeout=60) as client:
            ask = lambda user, instance="Thanks!": client.post("/api/v1/predict", json={"instance": instance, "user": user})
            b, a, gone = ask("bob").json(), ask("ann").json(), ask("gone").json()
            assert (b["version"], b["arm"]) == (2, "b") and (a["version"], a["arm"]) == (1, "a")
            assert gone["version"] == 1 and "arm" not in gone, "a version that is not loaded turns nobody away"
            until(lambda: ("shadowed", "a", True) in traffic.seen, "the shadow answered")
            assert traffic.seen.count(("exposed", "b")) == traffic.seen.count(("observed", "b", True)) == 1
            assert ask("bob", "  ").status_code == 422
            assert traffic.seen.count(("observed", "b", True)) == 2, "the caller's mistake says nothing about the version"
            assert traffic.seen.count(("exposed", "b")) == 1
            feedback = lambda user, value: client.post("/api/v1/feedback", json={"user": user, "value": value})
            assert feedback("bob", 1).json() == {"noted": True} and feedback("bob", True).status_code == 202
            assert feedback("stranger", 0).json() == {"noted": False} and feedback("bob", -1).status_code == 422
            for body in ({"user": "bob"}, {"user": "", "value": 1}, {"user": "bob", "value": "1"}):
                assert client.post("/api/v1/feedback", json=body).status_code == 422


# ---- processes


class Process:
    "`serve` in a process of its own."

    def __init__(self, folder: Path, **options: Any) -> None:
        code = "from mlops_lib.logs import setup_logging; from mlops_lib.serving.api import serve; setup_logging('INFO', True)\n"
        code += f"if __name__ == '__main__': serve(port=0, **{options!r})"
        script = folder / f"{uuid.uuid4().hex}.py"
        script.write_text(code)
        self.log = script.with_suffix(".log")
        with self.log.open("w") as log:
            self.child = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.child.stdout
        line = self.child.stdout.readline()
        assert line.startswith("serving http://"), self.log.read_text()[-2_000:]
        self.url = line.split()[1]

    def ready(self) -> None:
        def asks() -> bool:
            assert self.child.poll() is None, self.log.read_text()[-2_000:]
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"{self.url}/ready", timeout=60).status_code == 200
            return False

        until(asks, "ready", seconds=300)

    def end(self) -> int:
        self.child.send_signal(signal.SIGTERM)
        return self.child.wait(60)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        if self.child.poll() is None:
            self.child.kill()
        self.child.wait(60)


def test_a_thousand_at_once_and_an_orderly_end(table: str, tmp_path: Path) -> None:
    body = json.dumps({"instance": ROW}).encode()
    ask = b"POST /api/v1/predict HTTP/1.1\r\nhost: x\r\nx-api-key: a-long-secret-key\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)

    async def all_of_them(host: str, port: int) -> tuple[list[bytes], bytes]:
        opened = await asyncio.gather(*(asyncio.open_connection(host, port) for _ in range(1_000)))
        for _, writer in opened:
            writer.write(ask + body)
        said = [await reader.readuntil(b"\r\n") for reader, _ in opened]
        late_reader, late_writer = opened[0][0], opened[0][1]
        await late_reader.readuntil(b"}")
        late_writer.write(ask + body[:-5])  # under way when the process is told to end
        await late_writer.drain()
        await asyncio.sleep(0.1)
        api.child.send_signal(signal.SIGTERM)
        await asyncio.to_thread(until, lambda: refused(host, port), "nobody new is let in")
        late_writer.write(body[-5:])
        end = await late_reader.read()
        for _, writer in opened:
            writer.close()
        return said, end

    def refused(host: str, port: int) -> bool:
        try:
            httpx.get(f"http://{host}:{port}/health", timeout=5)
        except httpx.TransportError:
            return True
        return False

    with Process(tmp_path, model=table, api_key="a-long-secret-key") as api:
        api.ready()
        host, port = api.url.removeprefix("http://").split(":")
        said, end = asyncio.run(all_of_them(host, int(port)))
        assert set(said) == {b"HTTP/1.1 200 OK\r\n"}
        assert end.startswith(b"HTTP/1.1 200 OK\r\n") and b'"prediction"' in end, "what was under way was answered"
        assert api.child.wait(60) == 0
        told = [json.loads(line) for line in api.log.read_text().splitlines()]
        assert sum(line["message"] == "request" and line["status"] == 200 for line in told) >= 1_001
        assert told[-1]["message"] == "stopped" and "a-long-secret-key" not in api.log.read_text()


def test_several_processes_tell_the_numbers_of_all(table: str, tmp_path: Path) -> None:
    with Process(tmp_path, model=table, workers=2, every=0.2) as api:
        api.ready()
        lines = lambda: [json.loads(line) for line in api.log.read_text().splitlines() if line.startswith("{") and line.endswith("}")]
        until(lambda: len({line["pid"] for line in lines() if "pid" in line}) == 2, "both are at work")
        with ThreadPoolExecutor(8) as pool:
            asked = list(pool.map(lambda _: httpx.post(f"{api.url}/api/v1/predict", json={"instance": ROW}, timeout=60).status_code, range(40)))
        assert set(asked) == {200}
        for _ in range(6):  # whichever of the two is asked
            assert metrics(api.url, "http_requests_total")["POST", "/api/v1/predict", "200"] == 40
            assert metrics(api.url, "prediction_rows_total") == {(table, "1"): 40.0}
        assert api.end() == 0


def test_what_cannot_be_served_is_said_before_anything_starts(table: str) -> None:
    from mlops_lib.serving.api import serve

    with pytest.raises(ApiError, match="At least one process"):
        serve(workers=0)
    with pytest.raises(ValueError, match="API key"):
        serve(api_key="short")
    with background(create_app(table, api_key="")) as url, pytest.raises(ApiError, match="Choose another port"):
        serve(port=int(url.rpartition(":")[2]))
    with pytest.raises(ApiError, match="positive"):
        create_app(table, max_rows=0)
