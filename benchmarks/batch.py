"""Batch scoring beside what one would write by hand, in one run: rows a second, and the ratio to a pandas loop.

    python benchmarks/batch.py [--rows 20000] [--repeats 3] [--json]
    python benchmarks/batch.py --long 1000000       one file of that many rows: speed and peak memory

All arms read the same CSV file of messages, ask the same registered model and write a CSV file. `pandas` is the loop that everybody
writes: read_csv in pieces of 5,000, predict, to_csv. `pyfunc` is the same loop with the model as `mlflow.pyfunc` loads it (its own file
format, `cloudpickle`, of the same pipeline). `score` does more: it checks every row, cleans the texts, sets bad rows aside, gives
confidences, and can be killed at any time. Two processes and two Dask workers are started before the clock runs, and have loaded the
model. The arms take turns, and medians are compared. The marks are ratios to the pandas loop.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

MARKS = {"score": 0.8, "score, 2 processes": 1.2, "score, 2 Dask workers": 1.2}
QUICK = {"chars": 0, "thirds": False, "shift": False}


def prepare(folder: Path, rows: int) -> Path:
    "Register a model, and write a file of messages."
    import pandas as pd

    from mlops_lib.data.synthetic import generate_inbox
    from mlops_lib.data.tables import add_label
    from mlops_lib.registry.gates import set_alias
    from mlops_lib.registry.tracking import log_run, register
    from mlops_lib.training import train

    reviews = generate_inbox(n_reviews=4_000, seed=1).review
    reviews = reviews[reviews["text"].notna() & reviews["stars"].notna() & (reviews["text"].str.strip() != "")]
    frame = add_label(reviews)[["text", "label"]].head(2_000)
    register(log_run(train("logistic", frame, "label", params=QUICK), frame))
    set_alias("champion", 1, "for the benchmark")
    path, piece = folder / "in.csv", reviews[["review_id", "user_id", "date", "text"]]
    for start in range(0, rows, len(piece)):
        pd.DataFrame(piece).head(rows - start).to_csv(path, mode="a", index=False, header=not start)
    return path


def loop(model: Any, source: Path, out: Path) -> None:
    "Read a piece, predict, append."
    import pandas as pd

    for number, piece in enumerate(pd.read_csv(source, chunksize=5_000)):
        piece["prediction"] = model.predict(piece[["text"]])
        piece.to_csv(out, mode="a", index=False, header=not number)


def as_pyfunc(folder: Path) -> Any:
    "The champion's pipeline as mlflow.pyfunc loads it."
    import mlflow.pyfunc
    import mlflow.sklearn

    from mlops_lib.registry.gates import champion

    found = champion()
    assert found is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow.sklearn.save_model(found.model.pipeline, str(folder / "pyfunc"), pip_requirements=["scikit-learn"], serialization_format="cloudpickle")
    return mlflow.pyfunc.load_model(str(folder / "pyfunc"))


def arms(folder: Path, source: Path, stack: ExitStack) -> dict[str, Callable[[Path], Any]]:
    "What is compared; each writes to the file that it is given."
    from mlops_lib.registry.gates import champion
    from mlops_lib.serving import batch

    found = champion()
    assert found is not None
    model, pyfunc = found.model, as_pyfunc(folder)
    address = stack.enter_context(batch.local_cluster(2))
    pool = stack.enter_context(batch._pool(2))

    def in_pool(out: Path) -> None:  # as `score(workers=2)` does, with processes that are there already
        batch._pool = lambda workers: _as_it_is(pool)  # type: ignore[assignment]
        batch.score(source, out, workers=2)

    return {
        "pandas": lambda out: loop(model, source, out),
        "pyfunc": lambda out: loop(pyfunc, source, out),
        "score": lambda out: batch.score(source, out),
        "score, ONNX": lambda out: batch.score(source, out, fast=True),
        "score, 2 processes": in_pool,
        "score, 2 Dask workers": lambda out: batch.score(source, out, dask=address),
    }


class _as_it_is:  # noqa: N801
    "A context that leaves what is in it open."

    def __init__(self, value: Any) -> None:
        self.value = value

    def __enter__(self) -> Any:
        return self.value

    def __exit__(self, *_: object) -> None:
        return None


def compare(rows: int, repeats: int) -> list[dict[str, Any]]:
    "Rows a second of each arm, and the ratio to the pandas loop."
    with tempfile.TemporaryDirectory(prefix="mlops-batch-") as folder, ExitStack() as stack:
        work = Path(folder)
        source = prepare(work, rows)
        all_arms = arms(work, source, stack)
        seconds: dict[str, list[float]] = {name: [] for name in all_arms}
        for turn in range(repeats + 1):  # the first round warms up: models are loaded
            for number, (name, run) in enumerate(all_arms.items()):
                begin = time.perf_counter()
                run(work / f"out-{turn}-{number}.csv")
                seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(taken[1:]) for name, taken in seconds.items()}
    return [
        {"arm": name, "rows": rows, "rows_per_s": round(rows / s), "ratio": round(medians["pandas"] / s, 2), "mark": MARKS.get(name)}
        for name, s in medians.items()
    ]


def long(rows: int) -> dict[str, Any]:
    "One file in one process: speed and peak memory."
    from mlops_lib.serving.batch import score

    with tempfile.TemporaryDirectory(prefix="mlops-batch-") as folder:
        source = prepare(Path(folder), rows)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        result = score(source, Path(folder, "out.csv"))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        size = source.stat().st_size / 1e6
    return {
        "rows": result.rows, "file_mb": round(size), "seconds": round(result.seconds, 1), "rows_per_s": round(result.rows / result.seconds),
        "peak_mb_before": round(before), "peak_mb": round(peak),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--long", type=int, metavar="ROWS")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if "MLOPS_BENCHMARK" not in os.environ:  # settings are read at import: begin again in a workspace of its own
        with tempfile.TemporaryDirectory(prefix="mlops-batch-") as own:
            environ = {"MLOPS_DATA_DIR": f"{own}/data", "MLOPS_MLFLOW_TRACKING_URI": f"sqlite:///{own}/mlflow.db"}
            environ |= {"MLOPS_BENCHMARK": "1", "MLOPS_LOG_LEVEL": "ERROR"}
            sys.exit(subprocess.run([sys.executable, *sys.argv], env=os.environ | {"OMP_NUM_THREADS": "1"} | environ).returncode)
    if args.long:
        found = long(args.long)
        print(json.dumps(found) if args.json else ", ".join(f"{name} {value:,}" for name, value in found.items()))
        return
    results = compare(args.rows, args.repeats)
    if args.json:
        print(json.dumps(results, indent=1))
        return
    print(f"{'arm':24}{'rows/s':>9}{'ratio':>8}   mark")
    for r in results:
        verdict = "" if r["mark"] is None else f"{r['mark']}  {'met' if r['ratio'] >= r['mark'] else 'MISSED'}"
        print(f"{r['arm']:24}{r['rows_per_s']:>9,}{r['ratio']:>8.2f}   {verdict}")


if __name__ == "__main__":
    main()
