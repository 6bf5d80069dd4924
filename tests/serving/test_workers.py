"""Six services that talk only through events: the whole chain, in one process and in six, and what happens when things break."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from prometheus_client import REGISTRY
from support import private, until

from mlops_lib.data.synthetic import generate_inbox
from mlops_lib.events.bus import Bus, connect
from mlops_lib.events.history import History, Story
from mlops_lib.events.schema import (
    DataIngested,
    Event,
    ModelRegistered,
    ModelValidated,
    PredictionRequested,
    TrainingCompleted,
    TrainingRequested,
)
from mlops_lib.events.transport import BusError, Reject
from mlops_lib.registry import gates, tracking
from mlops_lib.servers import free_port
from mlops_lib.serving import predictor, workers
from mlops_lib.serving.workers import (
    Deploy,
    Inference,
    Ingress,
    Registry,
    Training,
    Validation,
    WorkerError,
    counted,
    ingested,
    make_worker,
    planned,
    plot_story,
    run_workers,
)
from mlops_lib.training import train

QUICK: dict[str, Any] = {"chars": 0, "thirds": False, "shift": False, "targets": {"f1_weighted": 0.4}}
CHAIN = [
    "data.ingested", "data.validated", "training.requested", "training.started",
    "training.completed", "model.registered", "model.validated", "model.deployed",
]  # fmt: skip


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reviews") / "reviews.parquet"
    generate_inbox(n_reviews=900, seed=7).review.to_parquet(path)
    return path


@pytest.fixture(scope="module")
def rows(reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "Rows to train on, as the validation leaves them."
    path = tmp_path_factory.mktemp("rows") / "rows.parquet"
    workers.refined(reviews, 0.2)[0].to_parquet(path)
    return path


@pytest.fixture
def bus() -> Iterator[Bus]:
    with connect(f"memory://{uuid.uuid4().hex}") as one:
        yield one


@pytest.fixture
def model() -> str:
    return f"m{uuid.uuid4().hex[:8]}"


def request(path: object, framework: str = "sklearn", **hyperparameters: Any) -> TrainingRequested:
    payload = {"dataset_id": "d", "dataset_path": str(path), "framework": framework, "hyperparameters": hyperparameters}
    return TrainingRequested(source_service="test", payload=payload)


def question(model: str, text: object = "Wonderful, thank you!", version: str = "champion", **more: Any) -> PredictionRequested:
    payload = {"request_id": uuid.uuid4().hex, "model_id": model, "model_version": version, "input_data": {"text": text}, **more}
    return PredictionRequested(source_service="test", payload=payload)


def types(story: Story) -> list[str]:
    return [e.event_type for e in story]


def only(history: History, name: str) -> Event:
    found = history.latest(name)
    assert len(found) == 1, f"{len(found)} × {name}"
    return found[0]


def all_workers(model: str, jobs: Path, **gate: Any) -> dict[str, dict[str, Any]]:
    return {
        "history": {"url": f"sqlite:///{jobs}/history.db"},
        "ingress": {"folder": jobs / "drop", "every": 0.1},
        "validation": {"wanted": {"sklearn": QUICK}, "model": model, "max_bad_share": 0.2},
        "training": {"folder": jobs},
        "registry": {"model": model, "gate": gate},
        "deploy": {"model": model},
        "inference": {"model": model, "every": 0.1},
    }


# ---- the chain, in one process


def test_a_dropped_file_becomes_a_model_that_answers(bus: Bus, history: History, model: str, reviews: Path, tmp_path: Path) -> None:
    before = REGISTRY.get_sample_value("inference_duration_seconds_count") or 0
    with run_workers(bus=bus, options=all_workers(model, tmp_path)) as crew:
        (crew["ingress"].folder / "today.parquet").write_bytes(reviews.read_bytes())
        until(lambda: history.latest("model.deployed"), "the model is deployed")
        bus.drain()
        story = history.story(history.latest("data.ingested")[0].correlation_id)
        assert types(story) == CHAIN
        assert [e.causation_id for e in story[1:]] == [story[i].event_id for i in (0, 1, 2, 2, 4, 5, 6)]
        asked = bus.publish(question(model, "Terrible. I want my money back."))
        bus.drain()
        answer = history.story(asked.correlation_id)[-1]
        assert answer.event_type == "prediction.completed" and answer.causation_id == asked.event_id
        assert answer.payload.prediction in (0, 1, 2) and 0 < answer.payload.confidence <= 1
        assert answer.payload.model_version == story[-1].payload.model_version == "1"
        assert story[-1].payload.endpoint_url == "bus:inference"
    assert (REGISTRY.get_sample_value("inference_duration_seconds_count") or 0) == before + 1
    assert not any(bus.dead_letters(queue) for queue in bus.queues() if queue != "unroutable")
    exam, trained = gates.load_exam(model).frame, pd.read_parquet(story[2].payload.dataset_path)
    assert not set(exam.text) & set(trained.text), "no model is trained on the exam"
    assert plot_story(story).get_yticks().tolist() == list(range(len(story.services)))


def test_what_comes_again_has_no_second_effect(bus: Bus, history: History, model: str, reviews: Path, tmp_path: Path) -> None:
    with run_workers(bus=bus, options=all_workers(model, tmp_path)) as crew:
        first = crew["ingress"].ingest(reviews)
        bus.drain(60)
        story = history.story(first.correlation_id)
        assert types(story) == CHAIN
        for worker in crew.values():  # as if no inbox had kept a note of what was handled
            for event in story:
                if event.event_type in getattr(worker, "keys", ()):
                    worker.handle(event)
        bus.drain()
        assert [e.event_id for e in history.story(first.correlation_id)] == [e.event_id for e in story]
    assert list(gates.versions(model).version) == [1]
    assert len(gates.decisions(model)) == 1


@pytest.mark.parametrize("lost", ["before", "after"])
def test_every_service_dies_once_at_every_word(
    lost: str, bus: Bus, history: History, model: str, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    "Its work is done, but its event is not published, or is and nobody confirms it: then it is handled again."
    real, died = bus.publish, Counter[str]()

    def publish(event: Event, *rest: Any) -> Event:
        died[event.event_id] += 1
        if died[event.event_id] > 1:
            return real(event, *rest)
        if lost == "after":
            real(event, *rest)
        raise BusError("The process is dead.")

    for kind in (Validation, Training, Registry, Deploy):
        monkeypatch.setattr(kind, "options", {**kind.options, "backoff": 0.02, "max_backoff": 0.05})
    options = all_workers(model, tmp_path)
    options.pop("ingress")
    with run_workers(list(options), bus, options):
        real(come := ingested(reviews))
        monkeypatch.setattr(bus, "publish", publish)
        bus.drain(60)
    assert types(history.story(come.correlation_id)) == CHAIN
    assert len(died) == 7 and min(died.values()) >= 2
    assert list(gates.versions(model).version) == [1] and len(gates.decisions(model)) == 1
    assert len(list(tmp_path.glob("*/bundle"))) == 1


def test_a_champion_whose_decision_was_cut_off_has_passed(bus: Bus, history: History, model: str, rows: Path, tmp_path: Path) -> None:
    done = completed(bus, history, rows, tmp_path)
    run_id = tracking.upload_run(Path(done.payload.artifacts["bundle"]))
    version = tracking.register(run_id, model)
    tracking.open_store().set_registered_model_alias(model, "champion", str(version))  # and then it died
    Registry(model).start(bus)
    bus.publish(ModelRegistered(source_service="test", payload={"model_id": model, "model_version": version, "run_id": run_id}))
    bus.drain(60)
    assert only(history, "model.validated").payload.passed


# ---- ingress


def test_the_same_content_is_one_event(reviews: Path, tmp_path: Path) -> None:
    pd.read_parquet(reviews).to_json(tmp_path / "other.json", orient="records", lines=True, date_format="iso")
    one, two = ingested(reviews), ingested(tmp_path / "other.json")
    assert one.event_id == two.event_id == one.correlation_id
    assert one.payload.dataset_path == two.payload.dataset_path and one.payload.num_samples == 900
    pd.read_parquet(reviews).head(899).to_parquet(tmp_path / "less.parquet")
    assert ingested(tmp_path / "less.parquet").event_id != one.event_id


def test_a_file_is_taken_when_it_stays_as_it_is(bus: Bus, history: History, reviews: Path, tmp_path: Path) -> None:
    ingress = Ingress(tmp_path / "drop", every=3600).start(bus)
    whole = reviews.read_bytes()
    for name in (".hidden", "half.parquet.part"):
        (ingress.folder / name).write_bytes(whole)
    file = ingress.folder / "a.parquet"
    for size in (1_000, 20_000, len(whole)):
        file.write_bytes(whole[:size])
        ingress.look()
        assert file.exists(), "it was still growing when it was seen last"
    ingress.look()
    (ingress.folder / "empty.json").touch()
    ingress.look()
    ingress.look()
    bus.drain()
    only(history, "data.ingested")
    assert sorted(p.name for p in ingress.folder.iterdir() if p.is_file()) == [".hidden", "half.parquet.part"]
    assert [p.name.split("-")[1] for p in (ingress.folder / "done").iterdir()] == ["a.parquet"]
    assert "is empty" in next((ingress.folder / "refused").glob("*.why.txt")).read_text()
    ingress.stop()


def test_a_file_waits_for_the_bus(reviews: Path, tmp_path: Path) -> None:
    closed = connect("memory://")
    ingress = Ingress(tmp_path / "drop", every=3600).start(closed)
    closed.close()
    (ingress.folder / "a.parquet").write_bytes(reviews.read_bytes())
    ingress.look()
    ingress.look()
    assert (ingress.folder / "a.parquet").exists()


def test_a_folder_that_is_gone_for_a_while(bus: Bus, history: History, reviews: Path, tmp_path: Path) -> None:
    ingress = Ingress(tmp_path / "drop", every=0.02).start(bus)
    ingress.folder.rename(tmp_path / "elsewhere")
    looks = []
    real, ingress._take = ingress._take, lambda path: looks.append(path)  # type: ignore[method-assign]
    threading.Event().wait(0.1)
    (tmp_path / "elsewhere").rename(ingress.folder)
    (ingress.folder / "a.parquet").write_bytes(reviews.read_bytes())
    until(lambda: looks, "it looks again")
    ingress._take = real  # type: ignore[method-assign]
    until(lambda: history.latest("data.ingested"), "the file is taken")
    ingress.stop()


# ---- validation


@pytest.mark.parametrize("what", ["vanished", "damaged", "bad"])
def test_a_data_set_that_is_no_good_is_an_event(what: str, bus: Bus, history: History, model: str, reviews: Path, tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    if what == "damaged":
        path.write_bytes(reviews.read_bytes()[:5_000])
    elif what == "bad":
        pd.read_parquet(reviews).assign(stars=9.0).to_parquet(path)
    Validation(model=model).start(bus)
    came = DataIngested(source_service="test", payload={"dataset_id": "d", "dataset_path": str(path), "num_samples": 900})
    bus.publish(came)
    bus.drain()
    story = history.story(came.correlation_id)
    assert types(story) == ["data.ingested", "data.validated"]
    said = story[1].payload
    assert not said.passed and said.num_quarantined >= 850
    reason = {"vanished": "There is no file", "damaged": "damaged or cut off", "bad": "is not 1, 2, 3, 4 or 5"}[what]
    assert any(reason in problem for problem in said.problems)


def test_only_training_data_ask_for_a_training(bus: Bus, history: History, model: str, reviews: Path) -> None:
    Validation({"sklearn": {}, "xgboost": {"rounds": 5}}, 0.2, model=model).start(bus)
    come = ingested(reviews)
    test = DataIngested(source_service="test", payload={**dict(come.payload), "dataset_type": "test"})
    bus.publish_many([come, test])
    bus.drain()
    assert types(history.story(test.correlation_id)) == ["data.ingested", "data.validated"]
    asked = [e.payload for e in history.latest("training.requested")]
    assert {p.framework: p.hyperparameters for p in asked} == {"sklearn": {}, "xgboost": {"rounds": 5}}


def test_an_exam_too_small_for_the_gate_is_not_frozen(model: str, reviews: Path) -> None:
    frame = workers.refined(reviews, 0.2)[0]
    workers.keep_exam(frame.head(200), model)
    with pytest.raises(gates.RegistryError):
        gates.load_exam(model)
    rest = workers.keep_exam(frame, model)
    frozen = gates.load_exam(model)
    assert len(rest) + len(frozen.frame) == len(frame)
    workers.keep_exam(frame.sample(frac=0.9, random_state=1), model)
    assert gates.load_exam(model).version == frozen.version, "an exam that is there stays"


# ---- training


@pytest.mark.parametrize(
    ("order", "error_type", "words"),
    [
        (lambda rows, tmp: request(tmp / "gone.parquet"), "WorkerError", "gone.parquet is not there"),
        (lambda rows, tmp: request(_write(tmp / "bad.parquet", b"PAR1 oh no")), "WorkerError", "no Parquet file"),
        (lambda rows, tmp: request(_without(rows, tmp, "label", "stars")), "TableError", "no column 'stars'"),
        (lambda rows, tmp: request(_without(rows, tmp, "text"), target="nothing"), "TableError", "nothing"),
        (lambda rows, tmp: request(rows, "abacus"), "WorkerError", "no framework 'abacus'"),
        (lambda rows, tmp: request(rows, kind="xgboost"), "WorkerError", "no kind 'xgboost'"),
        (lambda rows, tmp: request(rows, learning_rte=1), "ClassicError", "learning_rte"),
        (lambda rows, tmp: request(rows, targets={"f1_wieghted": 0.5}), "TrainError", "f1_weighted"),
    ],
)
def test_a_failing_training_is_an_event_and_the_next_one_is_taken(
    order: Callable[..., TrainingRequested], error_type: str, words: str, bus: Bus, history: History, rows: Path, tmp_path: Path
) -> None:
    before = REGISTRY.get_sample_value("training_completed_total", {"status": "failed", "framework": "sklearn"}) or 0
    Training(folder=tmp_path / "jobs").start(bus)
    bad, good = order(rows, tmp_path), request(rows, kind="naive_bayes", targets={})
    bus.publish_many([bad, good])
    bus.drain(60)
    said = history.story(bad.correlation_id)[-1]
    assert said.event_type == "training.failed" and said.payload.error_type == error_type
    assert words in said.payload.error and said.causation_id == bad.event_id
    assert types(history.story(good.correlation_id))[-1] == "training.completed"
    assert not bus.dead_letters("training-sklearn")
    after = REGISTRY.get_sample_value("training_completed_total", {"status": "failed", "framework": "sklearn"})
    assert after == before + 1


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _without(rows: Path, folder: Path, *columns: str) -> Path:
    pd.read_parquet(rows).drop(columns=list(columns)).to_parquet(folder / "less.parquet")
    return folder / "less.parquet"


def test_the_same_request_twice_trains_once_and_two_workers_share(bus: Bus, history: History, rows: Path, tmp_path: Path) -> None:
    before = REGISTRY.get_sample_value("training_started_total", {"framework": "sklearn"}) or 0
    two = [Training(folder=tmp_path).start(bus), Training(folder=tmp_path).start(bus)]
    asked = [request(rows, kind="naive_bayes", targets={}, seed=n) for n in range(4)]
    bus.publish_many([*asked, *asked])
    bus.drain(60)
    for event in asked:
        two[0].handle(event)  # past the inbox
    bus.drain()
    assert len(history.latest("training.started")) == len(history.latest("training.completed")) == 4
    assert REGISTRY.get_sample_value("training_started_total", {"framework": "sklearn"}) == before + 4
    assert len(list(tmp_path.glob("*/bundle"))) == 4


def test_frameworks_take_only_their_own_and_refuse_together(bus: Bus, history: History, rows: Path, tmp_path: Path) -> None:
    for framework in ("sklearn", "xgboost"):
        Training(framework, tmp_path).start(bus)
    nobody, ours = request(rows, "abacus"), request(rows, "xgboost", rounds=3, targets={})
    bus.publish_many([nobody, ours])
    bus.drain(60)
    assert types(history.story(nobody.correlation_id)) == ["training.requested", "training.failed"], "refused by two, heard once"
    story = history.story(ours.correlation_id)
    assert types(story)[-1] == "training.completed" and {e.source_service for e in story[1:]} == {"training-xgboost"}


def test_a_bundle_that_is_complete_is_only_announced(bus: Bus, history: History, rows: Path, tmp_path: Path) -> None:
    training = Training(folder=tmp_path).start(bus)
    asked = bus.publish(request(rows, kind="naive_bayes", targets={}))
    bus.drain(60)
    job = tmp_path / asked.event_id
    first = only(history, "training.completed")
    model = (job / "bundle" / "run.json").read_bytes()
    (job / "outcome.json").unlink()  # it died after the bundle
    training.handle(asked)
    bus.drain()
    assert only(history, "training.completed").event_id == first.event_id
    again = TrainingCompleted.model_validate_json((job / "outcome.json").read_bytes())
    assert again.event_id == first.event_id and again.payload.metrics == first.payload.metrics
    assert (job / "bundle" / "run.json").read_bytes() == model, "it was not trained again"


def test_a_job_that_kills_its_process_is_given_up(bus: Bus, history: History, rows: Path, tmp_path: Path) -> None:
    asked = request(rows, kind="naive_bayes", targets={})
    died = [counted(tmp_path / asked.event_id) for _ in range(3)]
    for process in died:
        process.__enter__()  # and never left
    Training(folder=tmp_path).start(bus)
    bus.publish(asked)
    bus.drain()
    assert "ended 3 processes" in only(history, "training.failed").payload.error


def test_who_lives_takes_the_note_back(tmp_path: Path) -> None:
    for _ in range(5):
        with contextlib.suppress(KeyboardInterrupt), counted(tmp_path, lives=1):
            raise KeyboardInterrupt
    assert json.loads((tmp_path / "begun.json").read_text())["deaths"] == 0


def test_plans_are_checked() -> None:
    plan = planned(request("d", "xgboost", rounds=3, seed=5, targets={"accuracy": 0.5}).payload)
    assert plan == {"kind": "xgboost", "seed": 5, "targets": {"accuracy": 0.5}, "params": {"rounds": 3}}
    with pytest.raises(WorkerError, match="no framework 'abacus'"):
        Training("abacus")


# ---- networks


@pytest.fixture
def needs_torch() -> None:
    pytest.importorskip("torch")


@pytest.mark.usefixtures("needs_torch")
def test_a_loss_of_nan_is_a_failed_training(bus: Bus, history: History, rows: Path, tmp_path: Path) -> None:
    Training("pytorch", tmp_path).start(bus)
    bus.publish(request(rows, "pytorch", learning_rate=1e6, epochs=30, patience=30, targets={}))
    bus.drain(60)
    said = only(history, "training.failed").payload
    assert said.error_type == "TorchError" and "epoch" in said.error


@pytest.mark.parametrize(("framework", "package"), [("pytorch", "torch"), ("tensorflow", "tensorflow")])
def test_a_service_that_is_stopped_leaves_the_network_to_the_next(
    framework: str, package: str, bus: Bus, history: History, rows: Path, tmp_path: Path
) -> None:
    pytest.importorskip(package)
    first = Training(framework, tmp_path)
    epochs: list[int] = []

    def tell(epoch: int, found: Any, real: Any = first._epoch) -> None:
        epochs.append(epoch)
        if len(epochs) == 2:
            first.stopping.set()
        real(epoch, found)

    first._epoch = tell  # type: ignore[method-assign]
    first.start(bus)
    asked = bus.publish(request(rows, framework, epochs=5, patience=5, targets={}))
    until(lambda: first.subscription.retried == 1, "it gives the job back")
    first.stop()
    assert REGISTRY.get_sample_value("current_training_epoch", {"framework": framework}) == 2
    second = Training(framework, tmp_path)
    went_on: list[int] = []
    second._epoch = lambda epoch, found: went_on.append(epoch)  # type: ignore[method-assign]
    second.start(bus)
    bus.drain(60)
    assert types(history.story(asked.correlation_id)) == ["training.requested", "training.started", "training.completed"]
    assert (epochs, went_on) == ([1, 2], [3, 4, 5]), "from the checkpoint"


# ---- told to go


def test_a_training_that_cannot_be_finished_in_time_is_left_to_others(
    bus: Bus, history: History, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlops_lib.training as library

    begun, go_on, fit = threading.Event(), threading.Event(), library.find_fit("naive_bayes")

    def slow(*args: Any, **rest: Any) -> Any:
        begun.set()
        assert go_on.wait(60)
        return fit("naive_bayes", *args[1:], **rest)

    monkeypatch.setitem(library.KINDS, "slow", slow)
    monkeypatch.setitem(workers.FRAMEWORKS, "sklearn", ("slow", "naive_bayes"))
    first = Training(folder=tmp_path).start(bus)
    asked = bus.publish(request(rows, targets={}))
    assert begun.wait(60)
    note = tmp_path / asked.event_id / "begun.json"
    assert json.loads(note.read_text())["deaths"] == 1, "as long as it is at work nobody knows how it will end"
    first.stop(timeout=0.05)
    assert json.loads(note.read_text())["deaths"] == 0, "it was told to go: that is no death"
    go_on.set()
    until(lambda: history.latest("training.completed"), "it is completed once")


# ---- registry


def completed(bus: Bus, history: History, rows: Path, jobs: Path, **hyperparameters: Any) -> TrainingCompleted:
    training = Training(folder=jobs).start(bus)
    asked = bus.publish(request(rows, **{**QUICK, **hyperparameters}))
    bus.drain(60)
    training.stop()
    return history.story(asked.correlation_id)[-1]  # type: ignore[return-value]


def test_a_store_that_is_down_is_asked_again(
    bus: Bus, history: History, model: str, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tries = tracking.open_store, []

    def open_store(*args: Any) -> Any:
        tries.append(args)
        if len(tries) < 3:
            raise tracking.TrackingError("No MLflow server answers.")
        return real(*args)

    done = completed(bus, history, rows, tmp_path)
    monkeypatch.setattr(tracking, "open_store", open_store)
    monkeypatch.setattr(Registry, "options", {**Registry.options, "backoff": 0.05})
    Registry(model).start(bus)
    history.replay(bus, done.correlation_id)
    bus.drain(60)
    assert only(history, "model.registered").payload.model_version == "1" and len(tries) >= 3


def test_what_cannot_be_recorded_for_long_is_replayed_later(bus: Bus, history: History, model: str, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = completed(bus, history, rows, tmp_path)
    bundle = Path(done.payload.artifacts["bundle"])
    bundle.rename(tmp_path / "elsewhere")  # a disk that is not mounted
    monkeypatch.setattr(Registry, "options", {**Registry.options, "backoff": 0.01, "retries": 2})
    Registry(model).start(bus)
    history.replay(bus, done.correlation_id)
    bus.drain()
    [letter] = bus.dead_letters("registry")
    assert letter.attempts == 3 and "no bundle" in letter.error
    (tmp_path / "elsewhere").rename(bundle)
    bus.replay("registry")
    bus.drain(60)
    only(history, "model.registered")


def test_a_training_without_a_bundle_is_rejected(bus: Bus, model: str) -> None:
    payload = {"experiment_id": "e", "run_id": "r", "model_path": "m", "duration_seconds": 1}
    worker = Registry(model).start(bus)
    with pytest.raises(Reject, match="no bundle"):
        worker.handle(TrainingCompleted(source_service="test", payload=payload))


def test_a_refused_model_is_not_deployed(bus: Bus, history: History, model: str, reviews: Path, tmp_path: Path) -> None:
    options = all_workers(model, tmp_path, targets={"f1_weighted": 0.999})
    with run_workers(bus=bus, options=options) as crew:
        crew["ingress"].ingest(reviews)
        bus.drain(60)
    said = only(history, "model.validated").payload
    assert not said.passed and "0.999" in said.reason
    assert said.threshold_criteria["f1_weighted ≥ 0.999"]["passed"] is False
    assert not history.latest("model.deployed") and gates.champion(model) is None


# ---- deploy and inference


@pytest.fixture
def served(bus: Bus, history: History, model: str, reviews: Path, tmp_path: Path) -> Iterator[dict[str, Any]]:
    "A first version in service, and a gate that lets the next one through."
    with run_workers(bus=bus, options=all_workers(model, tmp_path, rule="not worse", margin=0.9)) as crew:
        crew["story"] = crew["ingress"].ingest(reviews).correlation_id
        bus.drain(60)
        assert crew["inference"].version.version == 1
        yield crew


def test_a_model_that_does_not_load_is_not_deployed(bus: Bus, history: History, model: str, served: dict[str, Any]) -> None:
    served["deploy"].stop()
    story = history.story(served["story"])
    bus.publish(request(story[2].payload.dataset_path, **QUICK, seed=9))
    until(lambda: len(history.latest("model.validated")) == 2, "the second one passes the gate")
    store = tracking.open_store()
    for file in Path(tracking.model_uri(f"{model}/2", store).removeprefix("file://")).rglob("*.skops"):
        file.write_bytes(b"not a model")
    assert gates.champion(model).version == 2
    newcomer = Deploy(model).start(bus)
    bus.drain(60)
    newcomer.stop()
    [letter] = bus.dead_letters("deploy")
    assert f"{model} 2 cannot answer" in letter.error and "Version 1 stays" in letter.error and letter.attempts == 1
    assert gates.champion(model).version == 1
    assert [e.payload.model_version for e in history.latest("model.deployed")] == ["1"]
    until(lambda: served["inference"].version.version == 1, "the last good one is in service")
    asked = bus.publish(question(model))
    bus.drain()
    assert history.story(asked.correlation_id)[-1].payload.model_version == "1"


def test_a_version_is_deployed_when_the_api_serves_it(bus: Bus, history: History, model: str, served: dict[str, Any]) -> None:
    from mlops_lib.serving.api import background, create_app

    served["deploy"].stop()
    story = history.story(served["story"])
    with background(create_app(model, api_key="", every=0.1)) as url:
        over_http = Deploy(model, endpoint=f"{url}/").start(bus)
        bus.publish(request(story[2].payload.dataset_path, **QUICK, seed=9))
        until(lambda: len(history.latest("model.deployed")) == 2, "the API serves version 2")
        told = history.latest("model.deployed")
        assert {e.payload.model_version: e.payload.endpoint_url for e in told} == {"1": "bus:inference", "2": url}
        over_http.stop()
    bus.publish(request(story[2].payload.dataset_path, **QUICK, seed=10))
    until(lambda: len(history.latest("model.validated")) == 3, "the third one passes the gate")
    for file in Path(tracking.model_uri(f"{model}/3", tracking.open_store()).removeprefix("file://")).rglob("*.skops"):
        file.write_bytes(b"not a model")
    with background(create_app(model, api_key="", every=0.1)) as url:
        Deploy(model, endpoint=url).start(bus)
        until(lambda: bus.dead_letters("deploy"), "the API refuses version 3")
    [letter] = bus.dead_letters("deploy")
    assert f"{url} refuses it" in letter.error and "Version 2 stays" in letter.error and letter.attempts == 1
    assert gates.champion(model).version == 2


def test_an_api_that_is_away_has_said_nothing_against_a_version(bus: Bus, model: str, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register = tracking.register(tracking.log_run(train("naive_bayes", pd.read_parquet(rows), params={"chars": 0}), None), model)
    gates.set_alias("champion", register, "the first one", name=model)
    deploy = Deploy(model, endpoint=f"http://127.0.0.1:{free_port()}", patience=0.0)
    deploy.bus = bus
    passed = {"model_id": model, "model_version": str(register), "run_id": "r", "passed": True, "reason": "better"}
    with pytest.raises(WorkerError, match="does not serve"):
        deploy.handle(ModelValidated(source_service="test", payload=passed))
    assert gates.champion(model).version == register, "it is tried again"
    with pytest.raises(WorkerError, match="http://"):
        Deploy(model, endpoint="file:///etc/passwd")


def test_a_champion_that_does_not_load_leaves_the_one_in_service(
    bus: Bus, history: History, model: str, served: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    served["deploy"].stop()
    real, tries = predictor.load_version, []

    def load_version(version: Any, **how: Any) -> Any:
        if version.version == 1:
            return real(version, **how)
        tries.append(version.version)
        raise tracking.TrackingError("The files of the model are not there.")

    monkeypatch.setattr(predictor, "load_version", load_version)
    monkeypatch.setattr(predictor, "RETRY", (600.0, 600.0))
    bus.publish(request(history.story(served["story"])[2].payload.dataset_path, **QUICK, seed=9))
    until(lambda: tries, "the second one is tried")
    asked = bus.publish(question(model))
    refused = bus.publish(question(model, version="2"))
    bus.drain(60)
    assert history.story(asked.correlation_id)[-1].payload.model_version == "1"
    assert "version 1 is in service" in bus.dead_letters("inference")[0].error and bus.dead_letters("inference")[0].event_id == refused.event_id
    assert tries == [2], "a broken version is not loaded again and again"


def test_a_new_champion_is_served_without_a_lost_request(bus: Bus, history: History, model: str, served: dict[str, Any]) -> None:
    story = history.story(served["story"])
    bus.publish(request(story[2].payload.dataset_path, **QUICK, seed=9))
    asked = []
    while served["inference"].version.version == 1:
        asked.append(bus.publish(question(model)))
        time.sleep(0.01)
    asked += [bus.publish(question(model, version="2"))]
    bus.drain(60)
    answered = {e.payload.request_id: e.payload.model_version for e in history.latest("prediction.completed", limit=10_000)}
    assert set(answered) == {e.payload.request_id for e in asked}
    assert answered[asked[-1].payload.request_id] == "2" and not bus.dead_letters("inference")
    gates.rollback("the second one is rude", name=model)
    until(lambda: served["inference"].version.version == 1, "a rollback is followed, too")


def test_requests_that_cannot_be_answered_are_rejected_at_once(bus: Bus, history: History, model: str, served: dict[str, Any]) -> None:
    bad = {
        "text must not be missing": question(model, None),
        "text is blank: ' '": question(model, " "),
        "txet is not known; did you mean 'text'?": question(model, "fine", input_data={"text": "fine", "txet": "fine"}),
        "There is no model 'other'": question("other"),
        "version 1 is in service": question(model, version="77"),
        "cannot be answered": question(model, "fine", input_data={"text": "fine", "date": "the day before yesterday"}),
    }
    bus.publish_many(bad.values())
    good = bus.publish(question(model, "fine", input_data={"text": "fine", "date": "2024-05-01T12:00:00"}))
    bus.drain(60)
    letters = {letter.event_id: letter for letter in bus.dead_letters("inference")}
    for words, event in bad.items():
        assert words in letters[event.event_id].error and letters[event.event_id].attempts == 1
    assert history.story(good.correlation_id)[-1].event_type == "prediction.completed"


def test_the_urgent_are_answered_first(bus: Bus, history: History, model: str, served: dict[str, Any]) -> None:
    served["inference"].stop()
    ranks = ["low", "normal", "low", "high", "normal", "high"]
    bus.publish_many([question(model, request_id=f"{rank}-{n}", priority=rank) for n, rank in enumerate(ranks)])
    Inference(model).start(bus)
    bus.drain(60)
    order = [e.payload.request_id.split("-")[0] for e in reversed(history.latest("prediction.completed"))]
    assert order == sorted(ranks, key=["high", "normal", "low"].index)


def test_a_request_waits_for_the_first_champion(bus: Bus, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Inference, "options", {**Inference.options, "backoff": 0.01, "retries": 2})
    Inference(model).start(bus)
    bus.publish(question(model))
    bus.drain()
    [letter] = bus.dead_letters("inference")
    assert letter.attempts == 3 and "no champion yet" in letter.error


def test_a_version_that_is_not_the_champion_any_more_is_left_alone(bus: Bus, history: History, model: str, served: dict[str, Any]) -> None:
    late = {"model_id": model, "run_id": "r", "passed": True, "model_version": "0"}
    served["deploy"].handle(ModelValidated(source_service="test", payload=late))
    bus.drain()
    only(history, "model.deployed")


# ---- together


def test_workers_are_made_by_name() -> None:
    assert make_worker("training:xgboost").name == "training-xgboost"
    for name, options in (("trainer", {}), ("deploy:pytorch", {}), ("deploy", {"colour": "red"})):
        with pytest.raises(WorkerError, match=name):
            make_worker(name, **options)
    with pytest.raises(WorkerError, match="validaton"), run_workers(["validation"], "memory://", {"validaton": {}}):
        pass


# ---- in processes of their own


SERVE = """
import json, sys
from mlops_lib.logs import setup_logging
from mlops_lib.serving.workers import serve_worker
setup_logging("INFO")
names, options = json.loads(sys.argv[1])
serve_worker(*names, **options)
"""


class Part:
    "A service in a process of its own, which can be killed."

    def __init__(self, folder: Path, *names: str, **options: Any):
        self.log = folder / f"{'-'.join(names).replace(':', '-')}-{uuid.uuid4().hex[:4]}.log"
        command = [sys.executable, "-c", SERVE, json.dumps([names, options])]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment(folder))

    def says(self, words: str) -> list[str]:
        assert self.process.poll() is None, f"ended by itself:\n{self.log.read_text()[-3_000:]}"
        return [line for line in self.log.read_text().splitlines() if words in line]

    def end(self, how: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(30)


def environment(folder: Path) -> dict[str, str]:
    here = {"DATA_DIR": folder / "data", "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "REGISTERED_MODEL": "inbox"}
    return {**os.environ, **{f"MLOPS_{name}": str(value) for name, value in here.items()}}


@pytest.fixture(scope="module")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with private("rabbitmq", tmp_path_factory.mktemp("rabbitmq")) as one:
        yield one.url


@contextlib.contextmanager
def started(*parts: Part) -> Iterator[list[Path]]:
    try:
        yield [part.log for part in parts]
    finally:
        for part in parts:
            part.end(signal.SIGKILL)


def test_six_services_over_rabbitmq(rabbitmq: str, reviews: Path, tmp_path: Path) -> None:
    names = ["ingress", "validation", "training:sklearn", "registry", "deploy", "inference"]
    about = {"bus_url": rabbitmq, "namespace": "six"}
    options = {"validation": {"validation": {"wanted": {"sklearn": QUICK}, "max_bad_share": 0.2}}, "ingress": {"ingress": {"every": 0.1}}}
    port = free_port()
    more = {"training:sklearn": {"metrics_port": port}}
    parts = {n: Part(tmp_path, n, **about, options=options.get(n, {}), **more.get(n, {})) for n in names}
    bus = connect(rabbitmq, namespace="six", ledger=tmp_path / "test.db")
    history = History(f"sqlite:///{tmp_path}/history.db")
    history.follow(bus)
    with started(*parts.values()) as logs, bus:
        until(lambda: all(part.says("at work") for part in parts.values()), "all are at work", *logs)
        (tmp_path / "data" / "drop" / ".r").write_bytes(reviews.read_bytes())
        (tmp_path / "data" / "drop" / ".r").rename(tmp_path / "data" / "drop" / "today.parquet")
        until(lambda: history.latest("model.deployed"), "a model is deployed", *logs)
        story = history.story(history.latest("data.ingested")[0].correlation_id)
        assert types(story) == CHAIN
        assert story.services == ["ingress", "validation", "training-sklearn", "registry", "deploy"]
        asked = bus.publish(question("inbox"))
        until(lambda: len(history.story(asked.correlation_id)) == 2, "an answer", *logs)
        assert history.story(asked.correlation_id)[-1].payload.model_version == "1"
        metrics = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
        for line in ('training_completed_total{framework="sklearn",status="completed"} 1.0', 'training_started_total{framework="sklearn"} 1.0'):
            assert line in metrics
        assert "training_duration_seconds_bucket" in metrics and "current_training_epoch" in metrics
        assert {name: part.end() for name, part in parts.items()} == dict.fromkeys(names, 0)


@pytest.mark.usefixtures("needs_torch")
def test_kill_9_in_the_middle_of_a_training(rabbitmq: str, rows: Path, tmp_path: Path) -> None:
    about = {"bus_url": rabbitmq, "namespace": "kill"}
    bus = connect(rabbitmq, namespace="kill", ledger=tmp_path / "test.db")
    history = History(f"sqlite:///{tmp_path}/history.db")
    history.follow(bus)
    raw: list[str] = []
    bus.subscribe("raw", "training.completed", lambda event: raw.append(event.event_id))
    victim = Part(tmp_path, "training:pytorch", **about)
    with started(victim) as logs, bus:
        until(lambda: victim.says("at work"), "the first one is at work", *logs)
        asked = bus.publish(request(rows, "pytorch", epochs=30, patience=30, targets={"f1_weighted": 0.3}))
        until(lambda: len(victim.says("epoch")) >= 3, "some epochs are over", *logs)
        victim.end(signal.SIGKILL)
        done = len([line for line in victim.log.read_text().splitlines() if "epoch" in line])
        assert done < 30 and not history.latest("training.completed")
        successor = Part(tmp_path, "training:pytorch", "registry", **about)
        with started(successor) as logs:
            until(lambda: history.latest("model.registered"), "its successor is done", *logs)
            first = int(successor.says("epoch=")[0].split("epoch=")[1].split()[0])
            assert done <= first <= done + 2, "it went on from the checkpoint"
            assert len(successor.says("epoch=")) == 30 - first + 1
            assert successor.end() == 0
        assert types(history.story(asked.correlation_id))[:3] == ["training.requested", "training.started", "training.completed"]
        only(history, "training.completed")
        assert len(raw) == 1
    store = tracking.open_store(f"sqlite:///{tmp_path}/mlflow.db")
    assert list(gates.versions("inbox", store=store).version) == [1]
    assert len(store.search_runs([e.experiment_id for e in store.search_experiments() if e.name == "inbox"])) == 1


@pytest.mark.long
def test_the_tracking_server_comes_back(reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, kept = f"sqlite:///{tmp_path}/bus.db", f"sqlite:///{tmp_path}/history.db"
    options = {"validation": {"wanted": {"sklearn": QUICK}, "max_bad_share": 0.2}, "history": {"url": kept}}
    history = History(kept)
    with private("mlflow", tmp_path / "mlflow") as store, connect(url) as bus:
        history.follow(bus)
        monkeypatch.setattr(sys.modules[__name__], "environment", lambda folder, here=environment: {**here(folder), "MLOPS_MLFLOW_TRACKING_URI": store.url})
        all_in_one = Part(tmp_path, bus_url=url, options=options)
        with started(all_in_one) as logs:
            until(lambda: all_in_one.says("at work"), "they are at work", *logs)
            store.stop()
            bus.publish(ingested(reviews))
            until(lambda: history.latest("training.completed"), "the training is completed", *logs)
            until(lambda: all_in_one.says("handler failed, trying again"), "the registry finds the server gone", *logs)
            assert not history.latest("model.registered")
            store.start()
            until(lambda: history.latest("model.deployed"), "nothing was lost", *logs)
            assert types(history.story(history.latest("data.ingested")[0].correlation_id)) == CHAIN
            assert all_in_one.end() == 0


def test_every_kind_can_be_asked_for_in_one_framework() -> None:
    from mlops_lib.training import KINDS

    asked = [kind for kinds in workers.FRAMEWORKS.values() for kind in kinds]
    assert sorted(asked) == sorted(KINDS)
    for framework, kinds in workers.FRAMEWORKS.items():
        order = {"dataset_id": "d", "dataset_path": "d.parquet", "framework": framework, "hyperparameters": {}}
        assert workers.planned(TrainingRequested.Payload(**order))["kind"] == kinds[0]
