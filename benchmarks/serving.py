"""How fast is the API? Ours with every feature on, beside bare FastAPI, MLflow and LitServe: one model, one client, in turns.

python benchmarks/serving.py                         # wants wrk (https://github.com/wg/wrk)
python benchmarks/serving.py --litserve PYTHON       # a Python with litserve, onnxruntime and numpy: it is no dependency of ours

Each server is one process on the first core, the client runs on the second.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

KEY = "a-long-key-for-the-benchmark-5f2c9e"
NAMES = [f"x{i}" for i in range(10)]
ROW = {name: round(0.1 * i - 0.3, 2) for i, name in enumerate(NAMES)}
LABEL = re.compile(r'"(yes|no)"')
# what we hold ourselves to: requests a second of the first, in those of the second, at so many connections
MARKS = [
    ("ours", "bare FastAPI + ONNX", 16, 0.8),
    ("ours", "mlflow models serve, sklearn", 16, 18),
    ("ours", "mlflow models serve, ONNX", 16, 2.2),
    ("ours", "LitServe + ONNX", 16, 3),
    ("ours, native", "ours, native, one by one", 16, 6),
    ("ours, native", "ours, native, one by one", 1, 0.95),
]


def make(folder: Path) -> None:
    "The same forest for everybody: in our registry, as scikit-learn's MLflow model, as ONNX."
    import mlflow
    import numpy as np
    import onnx
    import pandas as pd
    from mlflow.models import infer_signature
    from skl2onnx import to_onnx
    from sklearn.datasets import make_classification
    from sklearn.ensemble import RandomForestClassifier

    from mlops_lib.registry.gates import set_alias
    from mlops_lib.registry.tracking import log_run, register
    from mlops_lib.training import train

    x, y = make_classification(3_000, 10, n_informative=6, random_state=0)
    table = pd.DataFrame(x, columns=NAMES).round(4)
    result = train("forest", table.assign(y=np.where(y, "yes", "no")), target="y", params={"n_estimators": 100})
    register(log_run(result, table.assign(y=np.where(y, "yes", "no"))), "bench")
    set_alias("champion", 1, "the only one", name="bench")

    forest = RandomForestClassifier(100, random_state=0).fit(table.to_numpy(), np.where(y, "yes", "no"))
    about: Any = {"signature": infer_signature(table, forest.predict(table.to_numpy())), "pip_requirements": []}
    mlflow.sklearn.save_model(forest, str(folder / "sklearn"), **about, serialization_format="cloudpickle")
    graph = to_onnx(forest, table.to_numpy(np.float32)[:1], options={"zipmap": False})
    onnx.save(graph, str(folder / "forest.onnx"))
    del graph.graph.output[1]  # MLflow makes a table of the outputs, and probabilities are two columns
    mlflow.onnx.save_model(graph, str(folder / "onnx"), pip_requirements=[])


def serve(which: str, folder: Path, port: int) -> None:
    "Be one of the servers."
    import uvicorn

    how: Any = {"host": "127.0.0.1", "port": port, "loop": "uvloop", "http": "httptools", "log_level": "warning", "access_log": False}
    if which == "bare":
        uvicorn.run(_bare(folder), **how)
        return
    from mlops_lib.logs import setup_logging
    from mlops_lib.serving.api import create_app, settle
    from mlops_lib.serving.predictor import Predictor

    setup_logging("INFO", as_json=True, stream=open(os.devnull, "w"))  # noqa: SIM115 - every request is logged, as in service
    more: dict[str, Any] = {"fast": which == "ours"} | ({"max_rows": 1} if which == "alone" else {})
    with Predictor("bench@champion", **more) as predictor:
        settle()  # as `mlops serve` does
        bus = f"sqlite:///{folder / 'events.db'}"
        uvicorn.run(create_app(predictor=predictor, api_key=KEY, cors_origins=["https://shop.example"], bus=bus, traffic=True), **how)


def _one_thread(ort: Any) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return options


def _bare(folder: Path) -> Any:
    "What a tutorial shows: a typed body, the session, a typed answer, and nothing else."
    import numpy as np
    import onnxruntime as ort
    from fastapi import FastAPI
    from pydantic import BaseModel, create_model

    fields: Any = dict.fromkeys(NAMES, (float, ...))
    Row = create_model("Row", **fields)

    class Answer(BaseModel):
        prediction: str
        confidence: float

    app, session = FastAPI(), ort.InferenceSession(str(folder / "forest.onnx"), _one_thread(ort))

    @app.post("/predict")
    async def predict(row: Row) -> Answer:  # type: ignore[valid-type]
        x = np.array([[getattr(row, name) for name in NAMES]], np.float32)
        label, proba = session.run(None, {"X": x})
        return Answer(prediction=label[0], confidence=proba[0].max())

    return app


def commands(folder: Path, litserve: str | None) -> dict[str, tuple[list[str], str, dict[str, Any], dict[str, str]]]:
    "name -> command without its port, path, body, headers"
    me, key = [sys.executable, __file__, "--folder", str(folder), "--serve"], {"x-api-key": KEY}
    mlflow = [str(Path(sys.executable).with_name("mlflow")), "models", "serve", "--env-manager", "local", "-w", "1", "-m"]
    records = {"dataframe_split": {"columns": NAMES, "data": [list(ROW.values())]}}
    found = {
        "bare FastAPI + ONNX": ([*me, "bare"], "/predict", ROW, {}),
        "ours": ([*me, "ours"], "/api/v1/predict", {"instance": ROW}, key),
        "ours, native": ([*me, "native"], "/api/v1/predict", {"instance": ROW}, key),
        "ours, native, one by one": ([*me, "alone"], "/api/v1/predict", {"instance": ROW}, key),
        "mlflow models serve, sklearn": ([*mlflow, str(folder / "sklearn")], "/invocations", records, {}),
        "mlflow models serve, ONNX": ([*mlflow, str(folder / "onnx")], "/invocations", records, {}),
    }
    if litserve:
        found["LitServe + ONNX"] = ([litserve, str(Path(__file__).with_name("serving_litserve.py")), str(folder / "forest.onnx")], "/predict", ROW, {})
    return found


def ask(url: str, body: dict[str, Any], headers: dict[str, str]) -> str:
    sent = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json", **headers})
    with urllib.request.urlopen(sent, timeout=30) as answer:
        return answer.read().decode()


@contextmanager
def running(command: list[str], folder: Path, name: str) -> Iterator[int]:
    "A server on the first core, until the block ends."
    from mlops_lib.servers import free_port

    port = free_port()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT": "60"}
    how: Any = {"preexec_fn": lambda: os.sched_setaffinity(0, {0})} if hasattr(os, "sched_setaffinity") else {}
    with open(folder / f"{name}.log", "wb") as log:
        told = [*command, *(["--port"] if "--serve" in command else ["-p"] if "-m" in command else []), str(port)]
        process = subprocess.Popen(told, stdout=log, stderr=log, env=environment, start_new_session=True, **how)
        try:
            yield port
        finally:
            os.killpg(process.pid, 9)
            process.wait()


def wait(url: str, body: dict[str, Any], headers: dict[str, str], name: str, patience: float = 180) -> str:
    deadline = time.monotonic() + patience
    while True:
        try:
            return ask(url, body, headers)
        except urllib.error.HTTPError as e:
            raise SystemExit(f"{name}: {e}: {e.read()[:500]!r}") from None
        except OSError as e:
            if time.monotonic() > deadline:
                raise SystemExit(f"{name} does not answer: {e}") from None
            time.sleep(0.5)


SCRIPT = """wrk.method = "POST"
wrk.body = [=[{body}]=]
wrk.headers["content-type"] = "application/json"
{headers}
done = function(summary, latency, requests)
  io.write(string.format("RESULT %d %d %d %d %d %d %d\\n", summary.requests, summary.duration, summary.errors.status,
    summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout,
    latency:percentile(50), latency:percentile(99), latency.max))
end
"""


def measure(url: str, script: Path, connections: int, seconds: float) -> tuple[float, float, float]:
    "Requests a second, and the latency in ms that half and 99 % of them did not exceed. Any error is the end."
    command = ["taskset", "-c", "1"] if hasattr(os, "sched_setaffinity") and os.cpu_count() != 1 else []
    command += ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--timeout", "30s", "-s", str(script), url]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"RESULT (\d+) (\d+) (\d+) (\d+) (\d+) (\d+) (\d+)", done.stdout)
    if not found or int(found[3]) or int(found[4]):
        raise SystemExit(f"{url}: there were errors: {done.stdout[-500:]}")
    return int(found[1]) / int(found[2]) * 1e6, int(found[5]) / 1e3, int(found[6]) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--litserve", metavar="PYTHON")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.folder, args.port)
        return
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        os.environ |= {"MLOPS_DATA_DIR": f"{name}/data", "MLOPS_MLFLOW_TRACKING_URI": f"sqlite:///{name}/mlflow.db"}
        make(folder)
        servers, labels = {}, {}
        for who, (command, path, body, headers) in commands(folder, args.litserve).items():
            plain = re.sub(r"\W+", "-", who)
            url = f"http://127.0.0.1:{stack.enter_context(running(command, folder, plain))}{path}"
            labels[who] = LABEL.search(wait(url, body, headers, who))
            script = folder / f"{plain}.lua"
            lines = "\n".join(f'wrk.headers["{k}"] = "{v}"' for k, v in headers.items())
            script.write_text(SCRIPT.format(body=json.dumps(body), headers=lines))
            servers[who] = (url, script)
            measure(url, script, 4, 1)  # warm
        said = {who: found and found[1] for who, found in labels.items()}
        print("everybody's answer:", said)
        found: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
        for connections in (1, 16):
            for _ in range(args.rounds):
                for who, (url, script) in servers.items():
                    found.setdefault((who, connections), []).append(measure(url, script, connections, args.seconds))
        base = "bare FastAPI + ONNX"
        print(f"\n{'server':<30}{'connections':>12}{'requests/s':>12}{'p50 ms':>9}{'p99 ms':>9}{'of bare':>9}")
        for (who, connections), runs in found.items():
            ratio = statistics.median(a[0] / b[0] for a, b in zip(runs, found[base, connections], strict=True))
            rate, p50, p99 = (statistics.median(column) for column in zip(*runs, strict=True))
            print(f"{who:<30}{connections:>12}{rate:>12,.0f}{p50:>9.2f}{p99:>9.2f}{ratio:>9.2f}")
        print()
        for ours, other, connections, mark in MARKS:
            if other in servers:
                pairs = zip(found[ours, connections], found[other, connections], strict=True)
                ratio = statistics.median(a[0] / b[0] for a, b in pairs)
                verdict = "reached" if ratio >= mark else "MISSED"
                print(f"{ours} / {other}, {connections} connections: {ratio:.2f}, mark {mark}: {verdict}")


if __name__ == "__main__":
    main()
