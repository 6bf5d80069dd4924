"""Telemetry: names that hold, a bus that is measured without harm, alerts that fire when they should, deliveries, logs and traces."""

import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import Request, urlopen

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from support import need, not_run, private, until

from mlops_lib.events.bus import Bus, connect
from mlops_lib.events.schema import PredictionCompleted, TrainingFailed, TrainingRequested
from mlops_lib.events.transport import BusUnavailable
from mlops_lib.monitoring import telemetry
from mlops_lib.monitoring.telemetry import (
    DASHBOARDS,
    METRICS,
    RECORDED,
    RULES,
    BusMetrics,
    Deliverer,
    PredictedClasses,
    Sample,
    TelemetryError,
    dashboard,
    declared,
    export_story,
    exporter,
    quantile,
    query,
    read_metrics,
    scrape,
    spans_of,
    story_lines,
    trace_id,
    training_shares,
    unwatch,
    watch,
    write_dashboards,
    write_rules,
)
from mlops_lib.servers import find_program, free_port

ROOT = Path(__file__).resolve().parents[2]


def order(story: str | None = None, path: str = "/nowhere/rows.parquet") -> TrainingRequested:
    more = {"correlation_id": story} if story else {}
    return TrainingRequested(source_service="test", payload={"dataset_id": "d", "dataset_path": path, "framework": "sklearn"}, **more)


def answered(label: Any, version: str = "1", **more: Any) -> PredictionCompleted:
    about = {"request_id": uuid.uuid4().hex, "prediction": label, "latency_ms": 1.0, "model_version": version, **more}
    return PredictionCompleted(source_service="test", payload=about)


@pytest.fixture
def bus() -> Iterator[Bus]:
    with connect(f"memory://{uuid.uuid4().hex}") as one:
        yield one


def collected(collector: Any) -> dict[tuple[str, ...], float]:
    registry = CollectorRegistry()
    registry.register(collector)
    return {(s.name, *s.labels.values()): s.value for s in read_metrics(generate_latest(registry).decode())}


# ---------------------------------------------------------------- names


def test_the_table_of_metrics_is_what_the_modules_declare() -> None:
    assert sorted(METRICS) == declared(), "a metric was added, renamed or moved: correct METRICS, the dashboards and the alerts"


def test_every_metric_is_looked_at_and_none_is_invented() -> None:
    exprs = [e for panels in DASHBOARDS.values() for p in panels for e in p.queries.values()] + [*RECORDED.values(), *(r.expr for r in RULES)]
    text = "\n".join(exprs)
    kinds = {"histogram": "_bucket"}
    assert not [m.name for m in METRICS if m.name + kinds.get(m.kind, "") not in text]
    words = {w for w in re.findall(r"[a-z][a-z0-9_]*_[a-z0-9_]+", re.sub(r'"[^"]*"', "", text)) if ":" not in w}
    known = {m.name + kinds.get(m.kind, "") for m in METRICS} | {m.name for m in METRICS} | {label for m in METRICS for label in m.labels}
    recorded = {part for name in RECORDED for part in name.split(":")}
    assert words - known - recorded <= {"histogram_quantile", "group_left"}, words - known


def test_committed_files_are_what_the_code_makes(tmp_path: Path) -> None:
    made = [(write_rules(tmp_path), ROOT / "deploy" / "prometheus" / "rules")]
    made += [(path, ROOT / "deploy" / "grafana" / "dashboards") for path in write_dashboards(tmp_path)]
    for path, folder in made:
        assert (folder / path.name).read_text() == path.read_text(), f"{path.name}: run write_rules() and write_dashboards(), and commit"
    assert {p.name for p in (ROOT / "deploy" / "grafana" / "dashboards").glob("*.json")} == {p.name for p, _ in made[1:]}


def test_dashboards_are_what_grafana_reads() -> None:
    for name in DASHBOARDS:
        told = dashboard(name)
        places = [tuple(p["gridPos"].values()) for p in told["panels"]]
        assert len(set(places)) == len(places) and len({p["id"] for p in told["panels"]}) == len(places)
        assert all(t["datasource"]["uid"] == "prometheus" and t["expr"] for p in told["panels"] for t in p["targets"])
    source = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"][0]
    assert source["uid"] == "prometheus"
    with pytest.raises(TelemetryError, match="no dashboard 'Sales'"):
        dashboard("Sales")


def test_each_rule_says_what_to_do_and_how_urgent_it_is() -> None:
    assert len({r.name for r in RULES}) == len(RULES)
    for rule in RULES:
        assert rule.severity in ("critical", "warning") and len(rule.todo) > 40 and rule.summary and rule.name[0].isupper()


# ---------------------------------------------------------------- the bus


def test_a_bus_is_measured(bus: Bus) -> None:
    def fail(event: Any) -> None:
        raise ValueError("no")

    bus.subscribe("mail", "training.*", fail, retries=0)
    bus.publish_many([order(), order()])
    bus.publish(answered(1))  # nobody wants it
    bus.drain()
    found = collected(BusMetrics(bus))
    assert found[("bus_up",)] == 1 and found[("bus_queues",)] == 1
    assert found[("bus_dead_letters", "mail")] == 2 and found[("bus_dead_letters", "unroutable")] == 1
    assert found[("bus_depth", "mail", "ready")] == found[("bus_depth", "mail", "delayed")] == 0


def test_queues_beyond_the_bound_are_left_out_and_the_worst_are_kept(bus: Bus) -> None:
    for n in range(12):
        bus.transport.bind(f"q{n:02}", ["training.*" if n == 7 else "model.*"])
    bus.publish(order())
    found = collected(BusMetrics(bus, most=3))
    assert len([k for k in found if k[0] == "bus_dead_letters"]) <= 3 and found[("bus_depth", "q07", "ready")] == 1 and found[("bus_queues",)] == 12


class Broken:
    "A bus that is away, or hangs, and can be mended."

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.hanging, self.asked, self.release = error, False, 0, threading.Event()

    def queues(self) -> list[str]:
        self.asked += 1
        if self.hanging:
            self.release.wait(60)
        if self.error:
            raise self.error
        return ["q"]

    def depth(self, queue: str) -> dict[str, int]:
        return {"ready": 1, "delayed": 0, "dead": 0}


def test_a_bus_that_is_away_is_a_number_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Broken(BusUnavailable("gone"))
    metrics = BusMetrics("memory://never", every=0.001)
    monkeypatch.setattr(metrics, "bus", lambda: broken)
    assert collected(metrics) == {("bus_up",): 0}
    broken.error = None
    assert until(lambda: collected(metrics).get(("bus_depth", "q", "ready")), "it is back") == 1
    broken.error = OSError("reset")
    until(lambda: collected(metrics) == {("bus_up",): 0}, "gone again")


def test_a_bus_that_hangs_is_asked_once_and_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Broken()
    broken.hanging = True
    metrics = BusMetrics("memory://never", timeout=0.05, every=0.001)
    monkeypatch.setattr(metrics, "bus", lambda: broken)
    with futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: collected(metrics), range(16))) == [{("bus_up",): 0}] * 16
    assert broken.asked == 1
    broken.hanging = False
    broken.release.set()
    assert until(lambda: collected(metrics).get(("bus_up",)), "it answers") == 1


def test_many_scrapes_ask_the_bus_once(monkeypatch: pytest.MonkeyPatch) -> None:
    broken, metrics = Broken(), BusMetrics("memory://never", every=600)
    monkeypatch.setattr(metrics, "bus", lambda: broken)
    assert {collected(metrics)[("bus_up",)] for _ in range(20)} == {1.0} and broken.asked == 1


@pytest.mark.parametrize("wrong", [{"every": 0}, {"timeout": -1}, {"most": 0}])
def test_limits_of_the_bus_metrics_are_positive(wrong: dict[str, Any]) -> None:
    with pytest.raises(TelemetryError, match="are positive"):
        BusMetrics("memory://x", **wrong)


# ---------------------------------------------------------------- what is predicted


def counts(model: str) -> dict[tuple[str, str], float]:
    return {(s.labels["version"], s.labels["label"]): s.value for m in telemetry.PREDICTED.collect() for s in m.samples if s.name.endswith("_total") and s.labels["model"] == model}


def trained(model: str) -> dict[tuple[str, str], float]:
    return {(s.labels["version"], s.labels["label"]): s.value for m in telemetry.TRAINED.collect() for s in m.samples if s.labels["model"] == model}


def test_predictions_are_counted_by_class_and_the_shares_in_training_stand_beside_them(bus: Bus) -> None:
    model = uuid.uuid4().hex
    counter = PredictedClasses(model, shares=lambda m, v: {"0": 0.9, "1": 0.1} if v == "1" else {})
    counter.start(bus)
    bus.publish_many([answered(0), answered(1), answered(1), answered("0"), answered(2.5, "2"), answered(1, "2"), answered(None, "2")])
    bus.drain()
    assert counts(model) == {("1", "0"): 2, ("1", "1"): 2, ("2", "number"): 1, ("2", "1"): 1, ("2", "None"): 1}
    assert trained(model) == {("1", "0"): 0.9, ("1", "1"): 0.1}
    counter.stop()


@given(st.lists(st.one_of(st.text(max_size=200), st.integers(), st.floats(), st.none(), st.lists(st.integers(), max_size=3)), max_size=120))
def test_no_answer_can_make_endless_series(labels: list[Any]) -> None:
    model = uuid.uuid4().hex
    counter = PredictedClasses(model, shares=lambda m, v: {"0": 1.0})
    for n, label in enumerate(labels):
        counter.handle(answered(label, str(n % 3)))
    found = counts(model)
    assert sum(found.values()) == len(labels)
    for version in {v for v, _ in found}:
        assert len([v for v, _ in found if v == version]) <= telemetry.MAX_LABELS + 1
    assert all(len(label) <= 80 for _, label in found)


def test_old_versions_are_forgotten() -> None:
    model = uuid.uuid4().hex
    counter = PredictedClasses(model, shares=lambda m, v: {"0": 1.0})
    for n in range(telemetry.MAX_VERSIONS + 5):
        counter.handle(answered(0, str(n)))
    versions = {v for v, _ in counts(model)}
    assert len(versions) == telemetry.MAX_VERSIONS == len(trained(model)) and "0" not in versions and str(telemetry.MAX_VERSIONS + 4) in versions


def test_shares_of_a_model_that_nobody_has_are_unknown() -> None:
    assert training_shares(f"nobody{uuid.uuid4().hex}", "1") == {}


# ---------------------------------------------------------------- the exporter, and being found


def test_the_exporter_serves_the_bus_and_the_predictions(tmp_path: Path) -> None:
    model, url = uuid.uuid4().hex, f"sqlite:///{tmp_path}/bus.db"
    with exporter(url, classes=PredictedClasses(model, shares=lambda m, v: {})) as address, connect(url) as bus:
        until(lambda: bus.queues(), "it listens")
        bus.publish(answered("yes"))
        found = until(lambda: [s for s in scrape(address) if s.name == "predicted_class_total" and s.labels["model"] == model], "counted")
        assert found[0].labels["label"] == "yes" and Sample("bus_up", {}, 1.0) in scrape(address)
        with pytest.raises(TelemetryError, match="Choose another port"), exporter(url, int(address.rpartition(":")[2])):
            pass
    with pytest.raises(TelemetryError, match="No answer from"):
        scrape(address, timeout=2)


def test_the_exporter_starts_without_a_bus() -> None:
    with exporter("amqp://guest:guest@127.0.0.1:1/", retry=0.01) as address:
        assert Sample("bus_up", {}, 0.0) in scrape(address)


def test_the_exporter_is_a_service_that_is_found_and_ends_in_order(tmp_path: Path) -> None:
    body = '\nfrom mlops_lib.monitoring.telemetry import serve_exporter\nserve_exporter(about["port"], bus_url=about["bus"], targets=about["targets"])'
    targets = tmp_path / "targets"
    with running(body, tmp_path / "exporter.log", bus=f"sqlite:///{tmp_path}/bus.db", targets=str(targets)) as address:
        until(lambda: up(address) and Sample("bus_up", {}, 1.0) in scrape(address), "it serves")
        (path,) = until(lambda: list(targets.glob("*.yml")), "it says where it is")
        assert address.endswith(yaml.safe_load(path.read_text())[0]["targets"][0])
    assert not list(targets.iterdir()) and "stopped" in (tmp_path / "exporter.log").read_text()


def test_a_service_is_found_by_a_whole_file_and_forgotten(tmp_path: Path) -> None:
    path = watch("api", "http://127.0.0.1:8000", tmp_path)
    watch("api", "127.0.0.1:8001", tmp_path)
    watch("api", "127.0.0.1:8001", tmp_path)
    assert yaml.safe_load(path.read_text()) == [{"targets": ["127.0.0.1:8000"], "labels": {"service": "api"}}]
    assert len(list(tmp_path.iterdir())) == 2, "one for each address, and no half files"
    unwatch("api", "127.0.0.1:8000", tmp_path)
    unwatch("api", "127.0.0.1:8000", tmp_path)
    assert not path.exists() and len(list(tmp_path.iterdir())) == 1
    assert watch("portal", "host.docker.internal:80", tmp_path).exists() and watch("x", "http://[::1]:80", tmp_path).exists()


@pytest.mark.parametrize(
    ("service", "address"),
    [("../x", "127.0.0.1:80"), ("API", "127.0.0.1:80"), ("", "127.0.0.1:80"), ("api", "127.0.0.1"), ("api", "127.0.0.1:99999"), ("api", "ftp://127.0.0.1:1"),
     ("api", "http://a/b:1"), ("api", "u:p@h:1"), ("api", 'h":1'), ("api", "h\n:1"), ("api", "")],
)  # fmt: skip
def test_what_is_no_service_is_not_watched(service: str, address: str, tmp_path: Path) -> None:
    with pytest.raises(TelemetryError):
        watch(service, address, tmp_path)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- numbers


@given(st.lists(st.floats(0, 2), min_size=1, max_size=200), st.floats(0.01, 0.99))
def test_a_quantile_lies_in_the_bucket_of_the_exact_one(values: list[float], q: float) -> None:
    registry, bounds = CollectorRegistry(), (0.1, 0.5, 1.0, 1.5, 2.0)
    seconds = Histogram("seconds", "", ["kind"], buckets=bounds, registry=registry)
    for n, value in enumerate(values):
        seconds.labels(str(n % 2)).observe(value)
    found = quantile(read_metrics(generate_latest(registry).decode()), "seconds", q)
    exact = sorted(values)[max(0, math.ceil(q * len(values) - 1e-9) - 1)]
    upper = next(b for b in bounds if exact <= b)
    assert max([0.0, *(b for b in bounds if b < upper)]) - 1e-9 <= found <= upper + 1e-9


def test_quantiles_of_nothing_and_beyond_the_last_bound() -> None:
    assert str(quantile([], "x", 0.5)) == "nan"
    beyond = [Sample("x_bucket", {"le": "1.0"}, 0.0), Sample("x_bucket", {"le": "+Inf"}, 3.0)]
    assert quantile(beyond, "x", 0.5) == 1.0
    for q in (0, 1, -1, 50):
        with pytest.raises(TelemetryError, match="between 0 and 1"):
            quantile([], "x", q)


@given(st.text(max_size=200))
def test_any_text_is_metrics_or_a_clear_error(text: str) -> None:
    with contextlib.suppress(TelemetryError):
        assert all(isinstance(s.value, float) for s in read_metrics(text))


def test_what_is_no_prometheus_is_said() -> None:
    with pytest.raises(TelemetryError, match="no Prometheus in this profile"):
        query("up")
    with pytest.raises(TelemetryError, match="begins with http"):
        query("up", "file:///etc/passwd")


# ---------------------------------------------------------------- alerts


def promtool(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    program = find_program("promtool")
    if not program:
        not_run("not run: promtool is not installed (apt-get install -y --no-install-recommends prometheus)")
    return subprocess.run([program, *words], cwd=folder, capture_output=True, text=True)  # type: ignore[list-item]


def test_promtool_takes_the_rules_and_the_configuration(tmp_path: Path) -> None:
    done = promtool(tmp_path, "check", "rules", str(write_rules(tmp_path)))
    assert done.returncode == 0, done.stdout + done.stderr
    done = promtool(ROOT / "deploy" / "prometheus", "check", "config", "prometheus.yml")
    assert done.returncode == 0 and f"{len(RULES) + len(RECORDED)} rules found" in done.stdout, done.stdout + done.stderr


V = 'model="m", version="1"'
SHARES = {f'predicted_class_total{{{V}, label="0"}}': "0+{}x200", f'predicted_class_total{{{V}, label="1"}}': "0+{}x200"}
TRAINED = {f'training_class_share{{{V}, label="0"}}': "0.9x200", f'training_class_share{{{V}, label="1"}}': "0.1x200"}


def shares(zero: float, one: float, trained: bool = True) -> dict[str, str]:
    return {k: v.format(n) for (k, v), n in zip(SHARES.items(), (zero, one), strict=True)} | (TRAINED if trained else {})


CASES: list[tuple[str, dict[str, str], str, list[dict[str, str]]]] = [  # alert, series by the minute, when, labels that fire
    ("ServiceDown", {'up{job="mlops", service="api", instance="h:1"}': "1x5 0x10"}, "12m", [{"job": "mlops", "service": "api", "instance": "h:1"}]),
    ("ServiceDown", {'up{job="mlops", service="api", instance="h:1"}': "1x5 0 1x10"}, "12m", []),
    ("BusDown", {"bus_up": "1x5 0x10"}, "12m", [{}]),
    ("BusDown", {"bus_up": "1x20"}, "12m", []),
    ("HttpErrors", {'http_requests_total{service="api", status="200"}': "0+90x30", 'http_requests_total{service="api", status="503"}': "0+10x30"}, "20m", [{"service": "api"}]),
    ("HttpErrors", {'http_requests_total{service="api", status="200"}': "0+99x30", 'http_requests_total{service="api", status="503"}': "0+1x30"}, "20m", []),
    ("HttpErrors", {'http_requests_total{service="api", status="404"}': "0+99x30"}, "20m", []),
    ("TrainingFailed", {'training_completed_total{framework="sklearn", status="failed"}': "_x10 1x60"}, "15m", [{"framework": "sklearn"}]),
    ("TrainingFailed", {'training_completed_total{framework="sklearn", status="failed"}': "1x50 2x60"}, "55m", [{"framework": "sklearn"}]),
    ("TrainingFailed", {'training_completed_total{framework="sklearn", status="failed"}': "_x10 1x60"}, "60m", []),
    ("TrainingFailed", {'training_completed_total{framework="sklearn", status="completed"}': "0+1x60"}, "60m", []),
    ("TrainingFailed", {'training_completed_total{framework="sklearn", status="failed"}': "_x10 0x60"}, "15m", []),  # a service that has just begun
    ("InferenceSlow", {'inference_duration_seconds_bucket{le="0.1"}': "0+90x30", 'inference_duration_seconds_bucket{le="1.0"}': "0+100x30", 'inference_duration_seconds_bucket{le="+Inf"}': "0+100x30"}, "20m", [{}]),
    ("InferenceSlow", {'inference_duration_seconds_bucket{le="0.1"}': "0+100x30", 'inference_duration_seconds_bucket{le="+Inf"}': "0+100x30"}, "20m", []),
    ("RagSlow", {'rag_query_duration_seconds_bucket{kind="answer", le="2.0"}': "0+50x30", 'rag_query_duration_seconds_bucket{kind="answer", le="10.0"}': "0+100x30", 'rag_query_duration_seconds_bucket{kind="answer", le="+Inf"}': "0+100x30"}, "20m", [{"kind": "answer"}]),
    ("RagSlow", {'rag_query_duration_seconds_bucket{kind="query", le="1.0"}': "0+100x30", 'rag_query_duration_seconds_bucket{kind="query", le="+Inf"}': "0+100x30"}, "20m", []),
    ("DeadLetters", {'bus_dead_letters{queue="inference"}': "0x5 3x10", 'bus_dead_letters{queue="mail"}': "0x20"}, "10m", [{"queue": "inference"}]),
    ("BusDepthGrowing", {'bus_depth{queue="q", state="ready"}': "0+200x60"}, "40m", [{"queue": "q", "state": "ready"}]),
    ("BusDepthGrowing", {'bus_depth{queue="q", state="ready"}': "20000-200x60"}, "40m", []),
    ("BusDepthGrowing", {'bus_depth{queue="q", state="ready"}': "0+1x60"}, "40m", []),
    ("ModelLoadFailed", {'model_load_failures_total{model="m"}': "_x5 1x20"}, "8m", [{"model": "m"}]),
    ("ModelLoadFailed", {'model_load_failures_total{model="m"}': "1x60"}, "40m", []),
    ("DriftDetected", {'drift_detected{drift_type="data_drift"}': "0x5 1x5", 'drift_detected{drift_type="model_drift"}': "0x20"}, "8m", [{"drift_type": "data_drift"}]),
    ("ExperimentFactsLost", {'experiment_lost_total{kind="exposures"}': "0x10 5x10"}, "15m", [{"kind": "exposures"}]),
    ("ExperimentFactsLost", {'experiment_lost_total{kind="exposures"}': "0x30"}, "15m", []),
    ("PredictedShareChanged", shares(9, 1), "150m", []),
    ("PredictedShareChanged", shares(7, 3), "150m", [{"model": "m", "version": "1", "label": k} for k in "01"]),
    ("PredictedShareChanged", shares(0.14, 0.06), "150m", []),  # 12 answers an hour
    ("PredictedShareChanged", {k: v for k, v in shares(10, 0).items() if 'total{model="m", version="1", label="1"' not in k}, "150m", [{"model": "m", "version": "1", "label": k} for k in "01"]),  # a class that nobody gets
    ("PredictedShareChanged", shares(7, 3, trained=False), "150m", []),
    ("PredictedShareOutOfBounds", shares(9.5, 0.5, trained=False), "150m", [{"model": "m", "version": "1", "label": k} for k in "01"]),
    ("PredictedShareOutOfBounds", shares(8.5, 1.5, trained=False), "150m", []),
    ("PredictedShareOutOfBounds", shares(0.18, 0.02, trained=False), "150m", []),  # 12 answers an hour
    ("PredictedShareOutOfBounds", {k: v.replace("0.1x", "0.099x") for k, v in shares(9.6, 0.4).items()}, "150m", [{"model": "m", "version": "1", "label": "0"}]),  # class 1 is rare, and always was
]  # fmt: skip

SLOW: list[tuple[str, dict[str, str], str, list[dict[str, str]]]] = [  # the same by the hour
    ("NoTraining", {'up{job="mlops", service="api"}': "1x300", 'training_completed_total{status="completed"}': "1x300"}, "8d", [{}]),
    ("NoTraining", {'up{job="mlops", service="api"}': "1x300"}, "8d", [{}]),
    ("NoTraining", {'up{job="mlops", service="api"}': "1x300"}, "6d", []),
    ("NoTraining", {'up{job="mlops", service="api"}': "1x300", 'training_completed_total{status="completed"}': "_x150 1x150"}, "8d", []),
    ("NoTraining", {'up{job="mlops", service="api"}': "1x300", 'training_completed_total{status="completed"}': "1x150 2x150"}, "8d", []),
]  # fmt: skip


def test_each_alert_fires_and_keeps_quiet(tmp_path: Path) -> None:
    "promtool runs the rules over invented series; a summary that cannot be filled in would fail here, too."
    write_rules(tmp_path)
    assert {name for name, *_ in CASES + SLOW} == {r.name for r in RULES}
    done = promtool(tmp_path, "test", "rules", str(by_promtool(CASES, "1m", tmp_path)), str(by_promtool(SLOW, "1h", tmp_path)))
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def by_promtool(cases: list[Any], interval: str, folder: Path) -> Path:
    severity, tests = {r.name: r.severity for r in RULES}, []
    for name, series, at, fires in cases:
        expr = f'ALERTS{{alertname="{name}", alertstate="firing"}}'
        told = [{"labels": "ALERTS" + json_labels({"alertname": name, "alertstate": "firing", "severity": severity[name], **labels}), "value": 1} for labels in fires]
        inputs = [{"series": k, "values": v} for k, v in series.items()]
        tests.append({"interval": interval, "input_series": inputs, "promql_expr_test": [{"expr": expr, "eval_time": at, "exp_samples": told}], "name": f"{name} {at}"})
    path = folder / f"cases-{interval}.yml"
    path.write_text(json.dumps({"rule_files": ["mlops.yml"], "evaluation_interval": interval, "tests": tests}))
    return path


def json_labels(labels: dict[str, str]) -> str:
    return "{" + ", ".join(f"{k}={json.dumps(v)}" for k, v in labels.items()) + "}"


# ---------------------------------------------------------------- deliveries


@pytest.fixture
def webhook() -> Iterator[SimpleNamespace]:
    told = SimpleNamespace(bodies=[], answers=[], url="")

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status = told.answers.pop(0) if told.answers else 200
            if status == 200:
                told.bodies.append(body)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    told.url = f"http://127.0.0.1:{server.server_port}/hook"
    yield told
    server.shutdown()
    server.server_close()


def alert(name: str, **labels: str) -> dict[str, Any]:
    return {"labels": {"alertname": name, "severity": "warning", **labels}, "annotations": {"summary": f"{name}!"}, "activeAt": "2026-01-01T00:00:00Z", "state": "firing"}


def test_an_alert_is_told_once_and_so_is_its_end(webhook: SimpleNamespace) -> None:
    sender = Deliverer(webhook.url, "http://127.0.0.1:1")
    firing = [alert("A", queue="x"), alert("A", queue="y"), alert("B")]
    assert [sender.deliver(now) for now in (firing, firing, firing[1:], firing[1:], [], [])] == [3, 0, 1, 0, 2, 0]
    first = webhook.bodies[0]
    assert {"version", "groupKey", "truncatedAlerts", "status", "receiver", "groupLabels", "commonLabels", "commonAnnotations", "externalURL", "alerts"} == set(first)
    assert first["commonLabels"] == {"alertname": "A", "severity": "warning"} and first["commonAnnotations"] == {"summary": "A!"} and len(first["alerts"]) == 2
    assert {"status", "labels", "annotations", "startsAt", "endsAt", "generatorURL", "fingerprint"} == set(first["alerts"][0])
    assert [b["status"] for b in webhook.bodies] == ["firing", "firing", "resolved", "resolved", "resolved"]
    assert webhook.bodies[2]["alerts"][0]["labels"]["queue"] == "x" and webhook.bodies[2]["alerts"][0]["endsAt"] > "2026"


def test_what_was_not_delivered_is_delivered_later(webhook: SimpleNamespace) -> None:
    sender = Deliverer(webhook.url, retries=2, backoff=0.001)
    webhook.answers = [503, 500, 429]
    with pytest.raises(TelemetryError, match="has not taken it in 3 attempts"):
        sender.deliver([alert("A")])
    webhook.answers = [503, 503]
    assert sender.deliver([alert("A")]) == 1 and len(webhook.bodies) == 1
    webhook.answers = [404]
    with pytest.raises(TelemetryError, match="Is this the right address"):
        sender.deliver([])
    assert sender.deliver([]) == 1 and webhook.bodies[-1]["status"] == "resolved"


def test_one_message_that_fails_does_not_hold_up_the_others(webhook: SimpleNamespace) -> None:
    sender = Deliverer(webhook.url, retries=0)
    webhook.answers = [400]
    with pytest.raises(TelemetryError, match="1 of 2 messages"):
        sender.deliver([alert("A"), alert("B")])
    assert [b["groupLabels"]["alertname"] for b in webhook.bodies] == ["B"] and sender.deliver([alert("A"), alert("B")]) == 1


def test_an_alert_that_goes_on_is_told_again_and_messages_have_a_bound(webhook: SimpleNamespace) -> None:
    sender = Deliverer(webhook.url, repeat=0.0, most=2)
    many = [alert("A", queue=str(n)) for n in range(5)]
    assert sender.deliver(many) == 5 == sender.deliver(many)
    assert (len(webhook.bodies[0]["alerts"]), webhook.bodies[0]["truncatedAlerts"]) == (2, 3)


def test_no_answer_from_prometheus_ends_no_alert(webhook: SimpleNamespace) -> None:
    sender = Deliverer(webhook.url, "http://127.0.0.1:1")
    sender.deliver([alert("A")])
    with pytest.raises(TelemetryError, match="No answer from"):
        sender.look()
    assert len(sender.told) == 1 and len(webhook.bodies) == 1
    with pytest.raises(TelemetryError, match="begins with http"):
        Deliverer("file:///tmp/x")


# ---------------------------------------------------------------- the whole, with Prometheus

SERVICE = """
import sys, json
from mlops_lib.logs import setup_logging
setup_logging("INFO", as_json=True, stream=open(sys.argv[1], "a", buffering=1))
about = json.loads(sys.argv[2])
{body}
"""
WORKERS = """
from mlops_lib.serving.workers import serve_worker
serve_worker("validation", "training", "training:pytorch", "registry", "deploy", "inference", "monitor", bus_url=about["bus"], metrics_port=about["port"], options=about["options"])
"""
FRONT = """
import asyncio, uvicorn
from mlops_lib.events.bus import connect
from mlops_lib.events.schema import TrainingRequested
from mlops_lib.serving.api import server_config, to_json
from mlops_lib.serving.doorman import Doorman, Limits, Telemetry

bus = connect(about["bus"])

async def train(call):
    order = await call.body(10_000)
    event = TrainingRequested(source_service="front", payload=json.loads(order))
    await bus.apublish(event)
    await call.reply(202, to_json({"event_id": event.event_id, "correlation_id": event.correlation_id}))

telemetry = Telemetry()
async def metrics(call):
    await call.reply(200, telemetry.to_bytes(), "text/plain; version=0.0.4")

async def app(scope, receive, send): ...
door = Doorman(app, limits=Limits(), keys=[], telemetry=telemetry, direct={("POST", "/train"): train, ("GET", "/metrics"): metrics})
config = server_config(door, host="127.0.0.1", port=about["port"])
config.lifespan = "off"
uvicorn.Server(config).run()
"""


@contextlib.contextmanager
def running(body: str, log: Path, **about: Any) -> Iterator[str]:
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", SERVICE.format(body=body), str(log), json.dumps(about | {"port": port})], env=os.environ, stderr=subprocess.PIPE, text=True)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        error = process.communicate(timeout=30)[1]
        assert process.returncode in (0, -15), error[-2000:]


def up(address: str) -> bool:
    with contextlib.suppress(TelemetryError):
        return bool(scrape(address))
    return False


def test_one_story_has_one_id_in_the_logs_of_several_processes(tmp_path: Path) -> None:
    "An HTTP request in one process becomes an event, and a failure in another one."
    bus_url, logs = f"sqlite:///{tmp_path}/bus.db", [tmp_path / "front.log", tmp_path / "workers.log"]
    story = f"story-{uuid.uuid4().hex[:8]}"
    body = '\nfrom mlops_lib.serving.workers import serve_worker\nserve_worker("training", "history", bus_url=about["bus"], metrics_port=about["port"], options={"history": {"url": about["history"]}})'
    with running(FRONT, logs[0], bus=bus_url) as front, running(body, logs[1], bus=bus_url, history=f"sqlite:///{tmp_path}/history.db") as workers:
        with connect(bus_url) as bus:
            until(lambda: len(bus.queues()) == 2 and up(front) and up(workers), "both are up")
        asked = Request(f"{front}/train", json.dumps(order().payload.model_dump()).encode(), {"Content-Type": "application/json", "X-Request-Id": story})
        assert json.loads(urlopen(asked, timeout=30).read())["correlation_id"] == story
        found = until(lambda: (lines := story_lines(logs, story)) and len({x["file"] for x in lines}) == 2 and lines, "both have logged it")
    assert {line["correlation_id"] for line in found} == {story}
    told = [(line["file"], line["message"]) for line in found]
    assert ("front.log", "request") in told and ("workers.log", "training failed") in told


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "A workspace whose Prometheus reads a folder of targets of its own, and reads it often."
    shutil.copy(ROOT / "settings.ini", tmp_path)
    shutil.copytree(ROOT / "deploy" / "prometheus", tmp_path / "deploy" / "prometheus", ignore=shutil.ignore_patterns("targets"))
    (tmp_path / "deploy" / "prometheus" / "targets").mkdir()
    config = tmp_path / "deploy" / "prometheus" / "prometheus.yml"
    config.write_text(config.read_text().replace(": 5s", ": 1s"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def predict(api: str, text: str, **more: Any) -> dict[str, Any]:
    asked = Request(f"{api}/api/v1/predict", json.dumps({"instance": {"text": text}, **more}).encode(), {"Content-Type": "application/json"})
    return json.loads(urlopen(asked, timeout=60).read())


def test_prometheus_scrapes_the_services_and_answers_for_each_metric(workspace: Path, webhook: SimpleNamespace) -> None:
    "Real services in processes of their own, the API, the portal and the exporter; Prometheus finds them, asks them, alerts."
    need("prometheus")
    from mlops_lib.data.synthetic import generate_inbox
    from mlops_lib.events.schema import DataValidated, PredictionRequested
    from mlops_lib.rag.documents import platform
    from mlops_lib.rag.portal import create_portal
    from mlops_lib.registry.gates import champion, decisions, set_alias
    from mlops_lib.registry.tracking import open_store
    from mlops_lib.serving import experiment
    from mlops_lib.serving.api import background, create_app
    from mlops_lib.serving.workers import ingested, refined

    model, bus_url = f"m{uuid.uuid4().hex[:8]}", f"sqlite:///{workspace}/bus.db"
    quick = {"kind": "logistic", "chars": 0, "thirds": False, "shift": False, "targets": {"f1_weighted": 0.4}}
    options = {name: {"model": model} for name in ("deploy", "inference")}
    options["validation"] = {"wanted": {"sklearn": quick}, "model": model}
    options["registry"] = {"model": model, "gate": {"min_rows": 100, "margin": 0.9}}  # the second one stays what it is
    options["monitor"] = {"model": model, "size": 20, "text": False}
    log, paths = workspace / "workers.log", {name: workspace / f"{name}.parquet" for name in ("reviews", "others", "window")}
    for seed, name in enumerate(("reviews", "others")):
        generate_inbox(n_reviews=700 - 500 * seed, seed=7 + seed).review.to_parquet(paths[name])
    moved = refined(paths["others"], 0.5)[0]
    moved.assign(text_length=5 * moved["text_length"]).to_parquet(paths["window"])
    with contextlib.ExitStack() as ending:
        prometheus = ending.enter_context(private("prometheus", workspace / "prometheus")).url
        targets = {"workers": ending.enter_context(running(WORKERS, log, bus=bus_url, options=options))}
        targets["exporter"] = ending.enter_context(exporter(bus_url, classes=PredictedClasses(model)))
        bus = ending.enter_context(connect(bus_url))
        until(lambda: {"training-pytorch", "monitor", "monitor-counts", "predicted-classes"} <= set(bus.queues()), "all listen", log)
        bus.publish(ingested(paths["reviews"]))
        bus.publish(order())
        until(lambda: champion(model), "there is a champion", log)
        network = {"dataset_id": "n", "dataset_path": str(paths["window"]), "framework": "pytorch", "hyperparameters": {"epochs": 1, "targets": {}}}
        bus.publish(TrainingRequested(source_service="test", payload=network))
        about = {"model_id": model, "model_version": "champion", "input_data": {"text": "Wonderful, thank you!"}}
        bus.publish_many([PredictionRequested(source_service="test", payload={"request_id": str(n), **about}) for n in range(20)])
        window = {"dataset_id": "w", "dataset_path": str(paths["window"]), "num_samples": len(moved), "passed": True}
        bus.publish(DataValidated(source_service="test", payload=window))

        classify = lambda text: SimpleNamespace(category="business", confidence=0.9, version="test")
        library = ending.enter_context(platform(workspace / "library", f"memory://{model}", classify=classify, history=f"sqlite:///{workspace}/history.db"))
        portal = targets["portal"] = ending.enter_context(background(create_portal(library, api_key="")))
        form = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.md"\r\n\r\n# Returns\n\nWe pay the money back.\r\n--x--\r\n'
        urlopen(Request(f"{portal}/index", form, {"Content-Type": "multipart/form-data; boundary=x"}), timeout=60).close()
        urlopen(Request(f"{portal}/query", b'{"query": "money"}', {"Content-Type": "application/json"}), timeout=60).close()

        until(lambda: len(decisions(model)) == 2, "the network is refused", log)
        experiment.start("both", model, {"champion": 0.5, "2": 0.5})
        api = targets["api"] = ending.enter_context(background(create_app(f"{model}@champion", api_key="", bus=bus, traffic=True, every=0.5)))
        until(lambda: predict(api, "Awful!", user="ada").get("arm"), "the experiment has begun")
        forgetful = experiment.Traffic(model, bus=bus, every=3_600, buffer=1).start()
        for user in ("ada", "bob"):  # and there is room for one
            forgetful.exposed(forgetful.route(user))
        forgetful.close()
        open_store().create_model_version(model, f"file://{workspace}/nothing", champion(model).run_id)
        set_alias("champion", 3, "a mistake", name=model)

        for service, address in targets.items():
            watch(service, address)
        until(lambda: {s.labels["service"] for s in query('up{job="mlops"} == 1', prometheus)} == set(targets), "all are found")
        wanted = {m: f'{m.name}{"_count" if m.kind == "histogram" else ""}{{service="{TOLD_BY.get(m.module, "workers")}"}}' for m in METRICS}
        until(lambda: not [e for e in wanted.values() if not query(e, prometheus)], f"each of {sorted(wanted.values())} has a value", log)
        for expr in [e for panels in DASHBOARDS.values() for p in panels for e in p.queries.values()] + [r.expr for r in RULES]:
            query(expr, prometheus)  # an expression that cannot be parsed, or would match many to many, raises
        with pytest.raises(TelemetryError, match="answers 400"):
            query("rate(http_requests_total)", prometheus)

        sender = Deliverer(webhook.url, prometheus)
        fire = {"DriftDetected", "TrainingFailed", "ModelLoadFailed"}
        until(lambda: sender.look() and {b["groupLabels"]["alertname"] for b in webhook.bodies} >= fire, "the alerts are told")
        failed = [a["labels"]["framework"] for b in webhook.bodies for a in b["alerts"] if a["labels"]["alertname"] == "TrainingFailed"]
        assert set(failed) == {"sklearn"}, "and only of what has happened"
        unwatch("portal", portal)
        until(lambda: "portal" not in {s.labels["service"] for s in query('up{job="mlops"}', prometheus)}, "the portal is forgotten")


TOLD_BY = {  # module -> service that Prometheus has to hear it from; else the workers
    "mlops_lib.serving.doorman": "api", "mlops_lib.serving.experiment": "api", "mlops_lib.monitoring.telemetry": "exporter",
    "mlops_lib.rag.documents": "portal", "mlops_lib.rag.portal": "portal",
}  # fmt: skip


# ---------------------------------------------------------------- logs and traces


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_a_story_is_read_from_many_files_in_the_order_of_time(tmp_path: Path) -> None:
    a = write(tmp_path / "a.log", {"time": "2", "correlation_id": "s", "message": "two"}, {"time": "1", "correlation_id": "other"}, "no json", "[]", "null", '{"half', "{}")
    b = write(tmp_path / "b.log", {"time": "1", "correlation_id": "s", "message": "one"}, {"time": "3", "correlation_id": "request", "story": "s"}, {"time": "0", "correlation_id": "request"})
    found = story_lines([a, b], "s")
    assert [(x["time"], x["file"]) for x in found] == [("0", "b.log"), ("1", "b.log"), ("2", "a.log"), ("3", "b.log")]
    assert len(story_lines([a, b], "request")) == 4, "from either end of the tie"
    assert len(story_lines([a, b], "s", most=2)) == 2 and story_lines([a], "nobody") == []
    with pytest.raises(TelemetryError, match="no log file"):
        story_lines([tmp_path / "c.log"], "s")
    with pytest.raises(TelemetryError, match="is empty"):
        story_lines([a], "")


def test_a_line_without_end_costs_nothing(tmp_path: Path) -> None:
    long = json.dumps({"time": "1", "correlation_id": "s", "message": "x" * (3 * telemetry.MAX_LINE)})
    deep = '{"correlation_id": ' + "[" * 100_000
    path = write(tmp_path / "a.log", long, deep, {"time": "2", "correlation_id": "s"})
    assert [x["time"] for x in story_lines([path], "s")] == ["2"]
    path.write_bytes(b"\xff\xfe{\n\x00\n" + json.dumps({"time": "3", "correlation_id": "s"}).encode())
    assert [x["time"] for x in story_lines([path], "s")] == ["3"]


@given(st.lists(st.binary(max_size=60), max_size=20))
def test_any_bytes_are_a_log_file(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("logs") / "any.log"
    path.write_bytes(b"\n".join(lines))
    assert isinstance(story_lines([path], "s"), list)


def a_story(correlation: str) -> list[Any]:
    first = order(correlation)
    failed = first.reply(TrainingFailed, {"experiment_id": "e", "run_id": "r", "error": "no", "error_type": "E"}, "training")
    return [failed, first]


def test_a_story_is_a_trace() -> None:
    correlation = str(uuid.uuid4())
    first, failed = spans_of(a_story(correlation))
    assert first.context.trace_id == failed.context.trace_id == uuid.UUID(correlation).int
    assert first.parent is None and failed.parent.span_id == first.context.span_id
    assert failed.start_time == first.end_time <= failed.end_time and first.start_time == first.end_time
    assert not failed.status.is_ok and first.status.is_ok and failed.resource.attributes["service.name"] == "training"
    assert spans_of([]) == []


@given(st.text(min_size=1, max_size=60))
def test_every_name_of_a_story_is_a_valid_trace_id(name: str) -> None:
    assert 0 < trace_id(name) < 2**128 and trace_id(name) == trace_id(name)


def test_nothing_is_sent_unless_a_collector_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opentelemetry.exporter.otlp.proto.grpc.trace_exporter.OTLPSpanExporter", None)
    assert telemetry.settings.otlp_endpoint is None and export_story(a_story("s")) == 0


def test_a_story_arrives_at_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    "A real gRPC server that speaks OTLP, on the loopback address."
    import grpc
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

    heard: list[Any] = []

    class Collector(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
            heard.extend(span for r in request.resource_spans for s in r.scope_spans for span in s.spans)
            return trace_service_pb2.ExportTraceServiceResponse()

    server = grpc.server(futures.ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setattr(telemetry, "settings", telemetry.settings.model_copy(update={"otlp_endpoint": f"http://127.0.0.1:{port}"}))
    try:
        assert export_story(a_story("a story")) == 2 == export_story(a_story("a story"))
    finally:
        server.stop(None)
    assert {s.name for s in heard} == {"training.requested", "training.failed"}
    assert {int.from_bytes(s.trace_id) for s in heard} == {trace_id("a story")}


def test_a_collector_that_refuses_is_said() -> None:
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    class Full(SpanExporter):
        def export(self, spans: Any) -> SpanExportResult:
            return SpanExportResult.FAILURE

    with pytest.raises(TelemetryError, match="2 spans were not taken"):
        export_story(a_story("s"), Full())
