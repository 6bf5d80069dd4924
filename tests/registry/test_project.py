"""A training that MLflow starts from MLproject, and one whose record lies on a served store."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow.projects
import numpy as np
import pandas as pd
import pytest
from support import private

from mlops_lib.data.synthetic import generate_inbox
from mlops_lib.registry import tracking
from mlops_lib.registry.gates import champion, freeze_exam, promote
from mlops_lib.registry.tracking import experiment_id, load_model, log_run, open_store, register, upload_run, write_run
from mlops_lib.training import train

ROOT = Path(__file__).parents[2]


def test_mlproject_trains_on_given_reviews_and_the_run_is_found(tmp_path, monkeypatch):
    rows = generate_inbox(250, seed=3).review
    place = tmp_path / "my 'own' reviews; touch spoilt"
    place.mkdir()
    reviews = place / "reviews.parquet"
    rows.to_parquet(reviews)
    store = open_store(f"sqlite:///{tmp_path}/mlflow.db")
    experiment_id(store, tracking.settings.mlflow_experiment)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.tracking_uri)  # `mlflow run` hands it on
    monkeypatch.delenv("MLOPS_MLFLOW_TRACKING_URI")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    parameters = {"kind": "naive_bayes", "reviews": str(reviews), "seed": "7"}
    mlflow.set_tracking_uri(store.tracking_uri)
    try:
        done = mlflow.projects.run(
            str(ROOT), parameters=parameters, env_manager="local",
            experiment_name=tracking.settings.mlflow_experiment,
        )  # fmt: skip
    finally:
        mlflow.set_tracking_uri(None)
    assert done.get_status() == "FINISHED"
    place_of = experiment_id(store, tracking.settings.mlflow_experiment)
    (run,) = store.search_runs([place_of], f"tags.mlflow.parentRunId = '{done.run_id}'")
    assert run.data.tags["kind"] == "naive_bayes"
    assert run.data.params["seed"] == "7"
    assert run.info.status == "FINISHED"
    assert not list(ROOT.glob("spoilt*"))


def table(n: int, seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(rng.normal(size=(n, 3)).round(6), columns=["a", "b", "c"])
    return frame.assign(label=np.where(frame.a + frame.b > 0, "yes", "no"))


def test_a_served_store_keeps_runs_models_and_decisions_and_its_absence_loses_none(tmp_path, monkeypatch):
    settings = tracking.settings.model_copy(update={"data_dir": tmp_path / "data"})
    monkeypatch.setattr(tracking, "settings", settings)
    rows = table(400, 0)
    done = train("logistic", rows, "label", targets={"accuracy": 0.7})
    with private("mlflow", tmp_path / "server") as one:
        store = open_store(one.url)
        bundle = write_run(done, tmp_path / "bundle", rows)
        with ThreadPoolExecutor(3) as pool:
            (run_id,) = set(pool.map(lambda _: upload_run(bundle, store=store), range(3)))
        assert tracking.model_uri(run_id, store).startswith("mlflow-artifacts:")
        assert register(run_id, "served", store=store) == 1
        assert (load_model("served/1", store=store).predict(rows) == done.model.predict(rows)).all()
        decision = promote("challenger", freeze_exam(table(200, 1), "label", "served"), name="served", store=store)
        assert decision.passed, decision.reason
        now = champion("served", store=store)
        assert now.report["features"] == ["a", "b", "c"]
        assert len(now.training_rows) == len(rows) - len(done.y_true)
        one.kill()
        with pytest.raises(tracking.TrackingError, match="runs_pending"):
            log_run(done, rows, store=store)
        one.start()
        (late,) = tracking.upload_pending(store)
        assert (load_model(late, store=store).predict(rows) == done.model.predict(rows)).all()
