"""What does keeping a record cost? Logging and registering a trained model, our way and the tutorial's, side by side.

python benchmarks/tracking.py            # the marks: log + register ≤ 0.25 s; ≥ 100 × log_metric per metric
"""

import argparse
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import mlflow
import numpy as np
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.models import infer_signature

from mlops_lib.data.steps import prepare
from mlops_lib.registry.tracking import TRUSTED, empty_store, experiment_id, log_batches, log_run, open_store, register
from mlops_lib.training import train
from mlops_lib.training.metrics import TrainingResult

MARK_SECONDS, MARK_TIMES = 0.25, 100


def seconds(work: Callable[[], object], repeats: int) -> float:
    took = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
    return statistics.median(took)


def plain_store(folder: Path, name: str) -> str:
    "A store as MLflow makes it: SQLite's default journal."
    shutil.copyfile(empty_store(), folder / name)
    return f"sqlite:///{folder / name}"


def tutorial(result: TrainingResult, data: pd.DataFrame, uri: str, requirements: list[str] | None) -> None:
    "The same record by the tutorial: fluent calls, a loop over metrics, a figure, log_model."
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment("tutorial")
    example = data.iloc[result.test_index[:3]][result.features]
    with mlflow.start_run():
        for name, value in result.params.items():
            mlflow.log_param(name, value)
        for prefix, found in (("", result.metrics), ("train_", result.train_metrics), ("target_", result.targets)):
            for name, value in found.items():
                mlflow.log_metric(prefix + name, value)
        figure, axes = plt.subplots(figsize=(4, 4))
        axes.imshow(result.confusion)
        mlflow.log_figure(figure, "confusion.png")
        plt.close(figure)
        mlflow.sklearn.log_model(
            result.model, name="model", registered_model_name="m", input_example=example,
            signature=infer_signature(example, result.y_pred[:3]), skops_trusted_types=list(TRUSTED),
            pip_requirements=requirements,
        )  # fmt: skip


def per_metric(store: MlflowClient, points: int, repeats: int) -> tuple[float, float]:
    "Seconds for one metric: log_metric, and a batch of a training's curve."
    run_id = store.create_run(experiment_id(store, "metrics")).info.run_id
    store.log_metric(run_id, "warm", 0.0)
    one = seconds(lambda: store.log_metric(run_id, "loss", 0.5), 5 * repeats)
    curve = [Metric("curve", 0.5, 0, step) for step in range(points)]
    return one, seconds(lambda: log_batches(store, run_id, curve), repeats) / points


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--kind", default="logistic")
    parser.add_argument("--server", help="also measure a running MLflow server, such as http://127.0.0.1:5000")
    parser.add_argument("--slow", action="store_true", help="also the tutorial's way, which takes minutes for a text model")
    options = parser.parse_args()
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    folder = Path(tempfile.mkdtemp(prefix="mlops-tracking-"))
    data = prepare()
    quick = {} if options.kind in ("xgboost", "forest", "histgb") else {"shift": False}
    result = train(options.kind, data, targets={}, params=quick)
    print(f"{options.kind}: {len(data):,} messages, trained in {result.seconds:.1f} s; load {os.getloadavg()[0]:.1f}")

    ours = open_store(f"sqlite:///{folder / 'ours.db'}")
    keep = lambda: register(log_run(result, data, store=ours), "m", store=ours)
    keep()
    spent = seconds(keep, options.repeats)
    rows = {"log_run + register": spent}
    plain = open_store(plain_store(folder, "plain.db"))
    rows["the same, SQLite's default journal"] = seconds(
        lambda: register(log_run(result, data, store=plain), "m", store=plain), options.repeats
    )
    if options.server:
        server = open_store(options.server)
        rows["the same, MLflow server"] = seconds(
            lambda: register(log_run(result, data, store=server), "benchmark", store=server), 3
        )
    if options.slow:
        uri = plain_store(folder, "tutorial.db")
        rows["tutorial, fixed requirements"] = seconds(lambda: tutorial(result, data, uri, ["scikit-learn"]), 1)
        rows["tutorial, requirements inferred"] = seconds(lambda: tutorial(result, data, uri, None), 1)
    table = pd.DataFrame({"seconds": rows})
    table["times ours"] = table.seconds / spent
    print(table.round(3).to_string())

    stores = {"MLflow's default": plain, "ours": ours} | ({"server": server} if options.server else {})
    cost = pd.DataFrame({name: per_metric(s, 900, options.repeats) for name, s in stores.items()}).T * 1000
    cost.columns = pd.Index(["log_metric, ms", "batch, ms a metric"])
    cost["times cheaper"] = cost.iloc[:, 0] / cost.iloc[:, 1]
    print(cost.round(3).to_string())
    times = float(cost.iloc[0, 0] / cost.loc["ours"].iloc[1])
    print(f"log + register: {spent:.3f} s (mark {MARK_SECONDS}): {'met' if spent <= MARK_SECONDS else 'missed'}")
    met = "met" if times >= MARK_TIMES else "missed"
    print(f"our batch against log_metric on MLflow's default store: {times:.0f} × (mark {MARK_TIMES}): {met}")
    shutil.rmtree(folder)
    return int(not np.all([spent <= MARK_SECONDS, times >= MARK_TIMES]))


if __name__ == "__main__":
    sys.exit(main())
