"""Every message is an event or an EventError; what was said comes back; the published contract is the one that is kept."""

import json
import math
import re
from datetime import UTC, datetime, timedelta, timezone
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import JsonValue, ValidationError
from support import an_event

from mlops_lib.events import schema as s
from mlops_lib.events.schema import (
    DataIngested,
    DriftDetected,
    Event,
    EventError,
    TrainingCompleted,
    TrainingRequested,
    parse_event,
)
from mlops_lib.logs import correlation

KINDS = {name: kind for name, kind in Event.types.items() if kind.__module__ == s.__name__}
TYPES = ["data.ingested", "data.validated", "training.requested", "training.started", "training.completed", "training.failed", "model.validated", "model.registered", "model.deployed", "prediction.requested", "prediction.completed", "drift.detected", "document.ingested", "document.classified", "document.indexed",
         "experiment.exposed", "experiment.outcome", "experiment.measured", "experiment.started", "experiment.stepped", "experiment.alarmed", "experiment.decided"]

# ---- an event of any type, made from the fields of its class

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
names = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)
numbers = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | numbers | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
counts, seconds, shares = st.integers(0, 10**12), st.floats(0, allow_infinity=False), st.floats(0, 1)
LEAVES = [(s.Name, names), (s.Count, counts), (s.Share, shares), (s.Seconds, seconds), (s.Number, st.floats()),
          (s.Moment, st.floats(0, 1e11)), (s.Finite, numbers), (s.ArmLoad, st.builds(s.ArmLoad, requests=counts, times=st.lists(counts, max_size=3)).map(lambda load: load.model_dump())),
          (JsonValue, json_values), (str, text), (bool, st.booleans()), (type(None), st.none())]  # fmt: skip


def values(annotation: Any) -> st.SearchStrategy:
    for known, strategy in LEAVES:
        if annotation is known:
            return strategy
    kind, args = get_origin(annotation), get_args(annotation)
    if kind is Literal:
        return st.sampled_from(args)
    if kind in (Union, UnionType):
        return st.one_of(*map(values, args))
    if kind is list:
        return st.lists(values(args[0]), max_size=3)
    if kind is tuple:
        return st.tuples(*map(values, args))
    if kind is dict:
        return st.dictionaries(values(args[0]), values(args[1]), max_size=3)
    raise AssertionError(f"no strategy for {annotation}")


def payloads(kind: type[Event]) -> st.SearchStrategy[dict]:
    model: Any = kind.model_fields["payload"].annotation
    hints = {name: hint for name, hint in get_type_hints(model, include_extras=True).items() if name in model.model_fields}
    required = {n: values(h) for n, h in hints.items() if model.model_fields[n].is_required()}
    optional = {n: values(h) for n, h in hints.items() if n not in required}
    newer = st.dictionaries(st.from_regex(r"x_[a-z]{1,5}", fullmatch=True), json_values, max_size=2)
    return st.builds(lambda known, new: known | new, st.fixed_dictionaries(required, optional=optional), newer)


zones = st.integers(-1_380, 1_380).map(lambda minutes: timezone(timedelta(minutes=minutes)))
times = st.datetimes(datetime(2, 1, 1), datetime(9998, 1, 1), timezones=zones)
envelopes = st.fixed_dictionaries(
    {"source_service": names},
    optional={
        "event_id": st.uuids().map(str), "causation_id": st.none() | st.uuids().map(str), "correlation_id": names,
        "timestamp": times, "x_new": json_values, "xnew": text, "id": json_values, "specversion": text,
    },
)  # fmt: skip
events = st.sampled_from(sorted(KINDS)).flatmap(
    lambda name: st.builds(lambda e, p: KINDS[name](**e, payload=p), envelopes, payloads(KINDS[name]))
)


def test_the_types_of_the_course() -> None:
    assert sorted(KINDS) == sorted(TYPES)
    assert all(kind.model_fields["event_type"].default == name for name, kind in KINDS.items())


# ---- what was said comes back


@given(events)
@settings(max_examples=400)
def test_round_trip(event: Event) -> None:
    body = event.to_json()
    for seen in (parse_event(body), parse_event(body.decode()), parse_event(json.loads(body)), parse_event(bytearray(body))):
        assert type(seen) is type(event)
        assert seen.to_json() == body
    if b'"NaN"' not in body:  # which equals nothing
        assert parse_event(body) == event
    assert json.loads(body)["payload"].keys() == event.payload.model_dump().keys()


CLOUD = {
    "type": "object",
    "required": ["id", "source", "specversion", "type"],
    "properties": {
        "id": {"type": "string", "minLength": 1},
        "source": {"type": "string", "minLength": 1},
        "specversion": {"const": "1.0"},
        "type": {"type": "string", "minLength": 1},
        "datacontenttype": {"const": "application/json"},
        "time": {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)$"},
        "data": {"type": "object"},
        "data_base64": False,
    },
    "patternProperties": {"^[a-z0-9]+$": {}},
    "additionalProperties": False,
}


@given(events)
@settings(max_examples=300)
def test_cloudevents(event: Event) -> None:
    cloud = s.to_cloudevent(event)
    jsonschema.validate(cloud, CLOUD)
    assert all(isinstance(value, str | bool | int) for name, value in cloud.items() if name != "data")
    assert re.fullmatch(r"[\w.~!$&'()*+,;=@/?:#%-]+", cloud["source"], re.ASCII)
    urlsplit(cloud["source"])
    assert set(json.loads(event.to_json())) - set(s._CLOUD.values()) <= set(cloud) | set(json.loads(cloud.get("extra", "{}")))
    for seen in (parse_event(cloud), parse_event(json.dumps(cloud))):
        assert type(seen) is type(event)
        assert json.loads(seen.to_json()) == json.loads(event.to_json())


def test_a_cloudevent_of_somebody_else() -> None:
    data = {"document_id": "d", "path": "p", "media_type": "text/plain", "size_bytes": 3}
    theirs = {
        "specversion": "1.0", "id": "9c2f5a0e-0d0c-4a39-9d8e-0a5f0a1b2c3d", "source": "https://example.org/a?b=c#d", "data": data,
        "type": "document.ingested", "time": "2026-03-01T11:00:00+01:00", "traceparent": "00-ab-cd-01", "subject": "a.txt",
    }  # fmt: skip
    event = parse_event(theirs)
    assert (event.event_id, event.correlation_id, event.causation_id) == (theirs["id"], theirs["id"], None)
    assert event.timestamp == datetime(2026, 3, 1, 10, tzinfo=UTC)
    assert s.to_cloudevent(event).items() >= (theirs | {"time": "2026-03-01T10:00:00Z"}).items(), "all of it is passed on"
    for wrong, why in {"id": "event_id", "source": "source_service", "type": "event_type", "time": "timestamp", "data": "payload"}.items():
        with pytest.raises(EventError, match=why):
            parse_event({name: value for name, value in theirs.items() if name != wrong})
    for wrong, why in ({"specversion": "0.3"}, "'0.3'"), ({"extra": "["}, "extra"), ({"extra": "[1]"}, "extra"), ({"id": "17"}, "'17'"):
        with pytest.raises(EventError, match=why):
            parse_event(theirs | wrong)


@given(st.sampled_from([math.nan, math.inf, -math.inf]))
def test_what_is_no_number_survives(odd: float) -> None:
    payload = {"experiment_id": "e", "run_id": "r", "model_path": "m", "duration_seconds": 1, "metrics": {"loss": odd}}
    event = TrainingCompleted(source_service="t", payload=payload)
    json.loads(event.to_json(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    for seen in (parse_event(event.to_json()), parse_event(s.to_cloudevent(event))):
        assert isinstance(seen, TrainingCompleted)
        assert seen.payload.metrics["loss"] == pytest.approx(odd, nan_ok=True)


def test_a_number_of_a_version_is_text() -> None:
    payload = {"model_id": "m", "model_version": 3, "run_id": "r"}
    assert s.ModelRegistered(source_service="t", payload=payload).payload.model_version == "3"


# ---- the story and the time


@given(events)
@settings(max_examples=50)
def test_a_reply_belongs_to_the_story(event: Event) -> None:
    failed = {"experiment_id": "e", "run_id": "r", "error": "", "error_type": "E"}
    reply = event.reply(s.TrainingFailed, failed)
    assert (reply.correlation_id, reply.causation_id) == (event.correlation_id, event.event_id)
    assert reply.source_service == event.source_service
    assert event.reply(s.TrainingFailed, reply.payload, "other").source_service == "other"
    assert reply.event_id != event.event_id


def test_who_begins_a_story() -> None:
    alone = an_event()
    assert alone.correlation_id == alone.event_id
    assert alone.causation_id is None
    with correlation("batch"):
        assert an_event().correlation_id == "batch"
        assert parse_event(alone.to_json()).correlation_id == alone.event_id, "reading does not change the story"
        stranger = s.to_cloudevent(alone) | {"correlationid": None}
        with pytest.raises(EventError, match="correlation_id"):
            parse_event(stranger)
        del stranger["correlationid"]
        assert parse_event(stranger).correlation_id == alone.event_id, "a reader's own story is not the event's"


def test_a_story_whose_name_cannot_travel_is_refused_at_once() -> None:
    with correlation("x" * 201), pytest.raises(ValidationError, match="correlation_id"):
        an_event()


@given(times)
def test_times_are_utc(time: datetime) -> None:
    event = an_event()
    seen = parse_event(json.loads(event.to_json()) | {"timestamp": time.isoformat()})
    assert seen.timestamp == time
    assert seen.timestamp.utcoffset() == timedelta(0)
    assert parse_event(seen.to_json()).timestamp == time


def test_events_do_not_change() -> None:
    event = an_event()
    for change in (lambda: setattr(event, "source_service", "me"), lambda: setattr(event.payload, "num_samples", 1)):
        with pytest.raises(ValidationError, match="frozen"):
            change()


# ---- what is refused, and the words for it


def good() -> dict[str, Any]:
    return json.loads(an_event(3).to_json())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"version": 2}, ["version 2", "this is version 1"]),
        ({"version": "1"}, ["version '1'"]),
        ({"event_type": "data.ingest"}, ["'data.ingest'", "data.ingested"]),
        ({"event_type": None}, ["event_type"]),
        ({"event_type": "x" * 10**5}, ["event_type 'xxx"]),
        ({"timestamp": "2026-03-01T10:00:00"}, ["timestamp", "timezone", "2026-03-01T10:00:00"]),
        ({"timestamp": "0001-01-01T00:00:00+10:00"}, ["timestamp", "0001-01-01"]),
        ({"timestamp": "9999-12-31T23:59:59-10:00"}, ["timestamp", "9999-12-31"]),
        ({"timestamp": 1e300}, ["timestamp"]),
        ({"event_id": "17"}, ["event_id", "'17'"]),
        ({"causation_id": ""}, ["causation_id"]),
        ({"correlation_id": ""}, ["correlation_id"]),
        ({"correlation_id": "a\nERROR forged"}, ["correlation_id"]),
        ({"source_service": "\x1b[2J"}, ["source_service"]),
        ({"source_service": "x" * 201}, ["source_service", "200"]),
        ({"payload": None}, ["payload", "None"]),
        ({"payload": {"dataset_id": "d", "dataset_path": "p", "num_samples": -1}}, ["payload.num_samples", "-1"]),
        ({"payload": {"dataset_id": "d", "dataset_path": "p"}}, ["payload.num_samples", "required"]),
        (
            {"event_type": "training.completed", "payload": {**dict.fromkeys(("experiment_id", "run_id", "model_path"), "x"), "duration_seconds": "Infinity"}},
            ["payload.duration_seconds", "finite", "Infinity"],
        ),
    ],
)
def test_refused_with_a_reason(wrong: dict, words: list[str]) -> None:
    with pytest.raises(EventError) as caught:
        parse_event(json.dumps(good() | wrong))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert len(str(caught.value)) < 1_000, "a message about a message is short"


@pytest.mark.parametrize("name", Event.needed)
def test_nothing_is_made_up_by_the_reader(name: str) -> None:
    "A default would give a message that comes twice two ids."
    with pytest.raises(EventError, match=name):
        parse_event({k: v for k, v in good().items() if k != name})


def test_defaults_that_say_nothing_new_may_be_left_out() -> None:
    event = parse_event({k: v for k, v in good().items() if k not in ("version", "causation_id")})
    assert (event.version, event.causation_id) == (1, None)


def test_huge_and_deep() -> None:
    with pytest.raises(EventError, match="1,000,001 bytes"):
        parse_event(b" " * 1_000_001)
    with pytest.raises(EventError, match="path"):
        parse_event(good() | {"x": "y" * 10**6})
    with pytest.raises(EventError, match="bytes"):
        parse_event("é" * 600_000)
    assert parse_event(good() | {"x": "y" * 10**6}, max_bytes=2 * 10**6).x
    for deep in ("[" * 400_000, '{"a":' * 150_000, '{"event_type":' * 300 + "1" + "}" * 300, '{"specversion":"1.0","data":' * 300):
        with pytest.raises(EventError):
            parse_event(deep)
    with pytest.raises(EventError):
        parse_event(b'{"event_type": "data.ingested", "version": ' + b"9" * 10_000 + b"}")
    with pytest.raises(EventError, match="version"):
        parse_event(json.dumps(good() | {"version": 10**4_000}))


def nested(depth: int, by: Literal["list", "object"]) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if by == "list" else {"a": value}
    return value


@given(st.integers(150, 600), st.sampled_from(["list", "object"]), st.sampled_from(["envelope", "payload", "hyperparameters", "extra"]))
@settings(max_examples=150)
def test_what_was_read_can_be_sent_on(depth: int, by: Literal["list", "object"], where: str) -> None:
    "However deep: an event that a service accepts and cannot pass on would stop it later, where nobody expects it."
    deep = nested(depth, by)
    payload = {"dataset_id": "d", "dataset_path": "p", "framework": "f"}
    event = json.loads(TrainingRequested(source_service="t", payload=payload).to_json())
    if where == "envelope":
        event["x"] = deep
    elif where == "extra":
        event = s.to_cloudevent(parse_event(event)) | {"extra": json.dumps({"x": deep})}
    else:
        event["payload"] |= {"hyperparameters": {"x": deep}} if where == "hyperparameters" else {"x": deep}
    try:
        seen = parse_event(event)
    except EventError:
        return
    assert parse_event(seen.to_json()) == seen
    assert parse_event(json.dumps(s.to_cloudevent(seen))) == seen


def event_or_refused(data: Any) -> None:
    try:
        event = parse_event(data)
    except EventError:
        return
    assert type(event) in Event.types.values()
    assert parse_event(event.to_json()).to_json() == event.to_json()
    assert parse_event(s.to_cloudevent(event)).event_id == event.event_id


BODY = an_event(1).to_json()


@given(st.binary(max_size=60) | st.text(max_size=60))
def test_any_bytes(data: bytes | str) -> None:
    event_or_refused(data)


@given(st.data())
@settings(max_examples=400)
def test_an_event_with_damage(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(BODY)))
    end = data.draw(st.integers(start, min(len(BODY), start + 20)))
    event_or_refused(BODY[:start] + data.draw(st.binary(max_size=6)) + BODY[end:])


odd = json_values | st.floats() | st.text() | st.sampled_from(sorted(KINDS)) | st.integers(-(10**40), 10**40)
FIELDS = [*Event.model_fields, *s._CLOUD, "specversion", "datacontenttype", "extra", "data_base64", "x"]


@given(st.sampled_from(["own", "cloud"]), st.dictionaries(st.sampled_from(FIELDS), odd, max_size=4), st.data())
@settings(max_examples=600, suppress_health_check=[HealthCheck.too_slow])
def test_an_event_with_other_values(form: str, changes: dict, data: st.DataObject) -> None:
    event = parse_event(BODY)
    plain = (json.loads(BODY) if form == "own" else s.to_cloudevent(event)) | changes
    for name in data.draw(st.lists(st.sampled_from(sorted(plain)), max_size=2)):
        plain.pop(name, None)
    event_or_refused(plain)
    event_or_refused(json.dumps(plain))


@given(odd | st.lists(odd) | st.dictionaries(text, odd))
def test_any_json(value: Any) -> None:
    event_or_refused(value)
    event_or_refused(json.dumps(value))


@pytest.mark.parametrize("value", [None, 1, [], object(), {1, 2}, memoryview(b"{}"), "\ud800", {"a": "\ud800"}, {"a": object()}, {1: {2}}])
def test_what_is_no_message_at_all(value: Any) -> None:
    with pytest.raises(EventError):
        parse_event(value)


def test_a_python_object_does_not_become_an_event() -> None:
    with pytest.raises(ValidationError, match="JSON"):
        DataIngested(source_service="t", payload={"dataset_id": "d", "dataset_path": "p", "num_samples": 1, "x": object()})
    loop: dict[str, Any] = good()
    loop["x"] = loop
    with pytest.raises(EventError, match="JSON"):
        parse_event(loop)


# ---- types of one's own


def test_a_type_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Event, "types", dict(Event.types))

    class Escalated(Event):
        "Somebody wants to speak to a person."

        class Payload(s.Payload):
            hours: float = 0

        event_type: Literal["complaint.escalated"] = "complaint.escalated"
        payload: Payload

    first = Escalated
    event = Escalated(source_service="t", payload={"hours": 3})
    assert type(parse_event(event.to_json())) is Escalated
    assert "complaint.escalated" in s.asyncapi()["channels"]

    class Escalated(Event):  # type: ignore[no-redef]  # the same cell, run again
        event_type: Literal["complaint.escalated"] = "complaint.escalated"

    assert type(parse_event(event.to_json())) is Escalated is not first
    with pytest.raises(EventError, match=r"already .*Escalated"):

        class Other(Event):
            event_type: Literal["complaint.escalated"] = "complaint.escalated"

    with pytest.raises(EventError, match=r"already mlops_lib\.events\.schema\.DataIngested"):

        class Impostor(DataIngested):
            pass

    s._parser.cache_clear()


@pytest.mark.parametrize("name", ["", "one", "Data.Ingested", "data ingested", "data.*", "data.", "data.x\n", 5])
def test_a_name_that_is_no_routing_key(name: Any) -> None:
    fields = {"__annotations__": {"event_type": Literal[name]}, "event_type": name, "__module__": __name__}
    with pytest.raises(EventError, match="event_type"):
        type("Wrong", (Event,), fields)
    with pytest.raises(EventError, match="event_type"):
        type("Open", (Event,), {"__annotations__": {"event_type": str}, "event_type": "a.b", "__module__": __name__})
    assert not {"a.b", name} & set(Event.types)


# ---- the contract for others


def references(part: Any) -> list[str]:
    inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else []
    own = [part["$ref"]] if isinstance(part, dict) and "$ref" in part else []
    return own + [ref for p in inner for ref in references(p)]


def test_every_reference_leads_somewhere() -> None:
    document = json.loads(json.dumps(s.asyncapi("T", "2.0.0")))
    assert (document["asyncapi"], document["info"]) == ("3.0.0", {"title": "T", "version": "2.0.0"})
    assert set(document["channels"]) == set(document["components"]["messages"]) == set(Event.types)
    found = references(document)
    assert len(found) > 4 * len(KINDS)
    for ref in found:
        at = document
        for step in ref.removeprefix("#/").split("/"):
            at = at[step]
    for operation in document["operations"].values():
        assert operation["action"] in ("send", "receive")


def check(event: dict) -> None:
    document = s.asyncapi()
    one = document["components"]["messages"][event["event_type"]]["payload"]
    jsonschema.Draft202012Validator({**one, "components": document["components"]}).validate(event)


@given(events)
@settings(max_examples=100, deadline=None)
def test_real_events_keep_the_contract(event: Event) -> None:
    check(json.loads(event.to_json()))


def test_the_contract_refuses_what_the_parser_refuses() -> None:
    nothing = {"metric_name": "psi", "current_value": math.nan, "baseline_value": 0, "threshold": -math.inf}
    drift = DriftDetected(source_service="t", payload=nothing | {"drift_type": "data_drift", "severity": "low"})
    fine = json.loads(drift.to_json())
    check(fine)
    for wrong in (
        *({"!": name} for name in Event.needed),
        {"version": 2},
        {"event_id": "17"},
        {"source_service": "a\nb"},
        {"payload": fine["payload"] | {"severity": "bad"}},
        {"payload": fine["payload"] | {"current_value": "much"}},
    ):
        event = {k: v for k, v in (fine | wrong).items() if k not in ("!", wrong.get("!"))}
        with pytest.raises(EventError):
            parse_event(event)
        if wrong != {"!": "event_type"}:  # which chooses the schema
            with pytest.raises(jsonschema.ValidationError):
                check(event)
