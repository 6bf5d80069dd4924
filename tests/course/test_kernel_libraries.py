"""Each library of the course works in a fork of the process that imported it: its threads, pools and random numbers too."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from jupyter_client import KernelManager

from mlops_lib.course import kernels, pipeline

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux only")

CASES = {
    "torch": """
import torch
from torch.utils.data import DataLoader, TensorDataset
x = torch.linspace(-1, 1, 256)[:, None]
net = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
steps = torch.optim.Adam(net.parameters(), lr=0.05)
for epoch in range(20):
    for a, b in DataLoader(TensorDataset(x, x**2), batch_size=64, shuffle=True, num_workers=2 if epoch == 0 else 0):
        steps.zero_grad(); loss = torch.nn.functional.mse_loss(net(a), b); loss.backward(); steps.step()
torch.set_num_threads(2)
assert (torch.randn(600, 600) @ torch.randn(600, 600)).shape == (600, 600)
assert loss < 0.1, loss
""",
    "tensorflow": """
import keras, numpy as np
x = np.linspace(-1, 1, 256)[:, None]
net = keras.Sequential([keras.layers.Dense(16, "tanh"), keras.layers.Dense(1)])
net.compile(keras.optimizers.Adam(0.05), "mse")
losses = net.fit(x, x**2, epochs=20, batch_size=64, verbose=0).history["loss"]
assert losses[-1] < 0.1, losses
""",
    "xgboost": """
import numpy as np, xgboost
x = np.random.default_rng(0).normal(size=(2000, 5))
assert xgboost.XGBClassifier(n_estimators=20, n_jobs=2).fit(x, x[:, 0] > 0).score(x, x[:, 0] > 0) > 0.95
""",
    "sklearn": """
import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
x = np.random.default_rng(0).normal(size=(500, 5)); y = x[:, 0] > 0
assert RandomForestClassifier(20, n_jobs=2).fit(x, y).score(x, y) > 0.95
assert HistGradientBoostingClassifier(max_iter=20).fit(x, y).score(x, y) > 0.95
assert cross_val_score(LogisticRegression(), x, y, n_jobs=2).mean() > 0.9  # in processes of joblib
""",
    "mlflow": """
import mlflow, numpy as np, os
from sklearn.linear_model import LogisticRegression
mlflow.set_tracking_uri(f"sqlite:///{os.getcwd()}/mlflow.db")
mlflow.set_experiment("fork")
with mlflow.start_run() as run:
    mlflow.log_metrics({"a": 1.5})
    model = LogisticRegression().fit([[0.0], [1.0]], [0, 1])
    kept = mlflow.sklearn.log_model(model, name="model", pip_requirements=["scikit-learn"])
assert mlflow.get_run(run.info.run_id).data.metrics == {"a": 1.5}
assert mlflow.sklearn.load_model(kept.model_uri).predict([[1.0]]) == 1
""",
    "onnxruntime": """
import numpy as np, onnxruntime
from skl2onnx import to_onnx
from sklearn.linear_model import LogisticRegression
x = np.random.default_rng(0).normal(size=(200, 3)).astype("float32")
model = LogisticRegression().fit(x, x[:, 0] > 0)
options = onnxruntime.SessionOptions(); options.intra_op_num_threads = 2
session = onnxruntime.InferenceSession(to_onnx(model, x[:1]).SerializeToString(), options)
assert (session.run(None, {"X": x})[0] == model.predict(x)).all()
""",
    "polars": """
import polars as pl
frame = pl.DataFrame({"a": range(200_000)}).with_columns(b=pl.col("a") % 7)
assert frame.group_by("b").agg(pl.col("a").sum()).sort("b").height == 7
frame.write_parquet("x.parquet")
assert pl.scan_parquet("x.parquet").group_by("b").len().collect(engine="streaming").height == 7
import pandas as pd
assert pd.read_parquet("x.parquet").groupby("b").a.sum().sum() == frame["a"].sum()
""",
    "confluent_kafka": """
from confluent_kafka import Consumer, Producer
producer = Producer({"test.mock.num.brokers": 1})
address = producer.list_topics(timeout=10).orig_broker_name.rpartition("/")[0]
producer.produce("t", b"hello"); assert producer.flush(20) == 0
consumer = Consumer({"bootstrap.servers": address, "group.id": "g", "group.protocol": "consumer", "auto.offset.reset": "earliest"})
consumer.subscribe(["t"])
while (message := consumer.poll(1)) is None or message.error():
    continue
assert message.value() == b"hello"
consumer.close()
""",
    "multiprocessing": """
import asyncio, math, multiprocessing, subprocess, sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
for method in ("fork", "spawn", "forkserver"):
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as pool:
        assert list(pool.map(math.factorial, range(5))) == [1, 1, 2, 6, 24]
with ThreadPoolExecutor(4) as pool:
    assert sum(pool.map(abs, range(-10, 0))) == 55
assert subprocess.run([sys.executable, "-c", "print(1)"], capture_output=True).stdout == b"1\\n"
process = await asyncio.create_subprocess_exec(sys.executable, "-c", "", stdout=-1)
assert await process.wait() == 0
""",
}
DRAWS = {
    "torch": "import torch; print(torch.rand(1).item())",
    "tensorflow": "import keras, tensorflow as tf; print(tf.random.uniform([1]).numpy()[0], keras.random.uniform([1]).numpy()[0])",
}


def here(library: str) -> bool:
    return library == "multiprocessing" or importlib.util.find_spec(library) is not None


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("k")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("XDG_RUNTIME_DIR", "JUPYTER_PATH", "IPYTHONDIR"):
            patch.setenv(name, str(folder))
        names = kernels.install(pipeline.ENVIRONMENT, kernels.course_imports(), folder)
        more = [name for name in ("tensorflow", "keras", "torch.utils.data", "skl2onnx") if here(name.partition(".")[0])]
        names = kernels.install(pipeline.ENVIRONMENT, list(dict.fromkeys([*names, *more])), folder)
        kernels.wait_for_server(names, os.environ | pipeline.ENVIRONMENT)
        yield folder
        kernels.stop_servers()


def run(place: Path, code: str, cwd: Path) -> str:
    manager = KernelManager(kernel_name="mlops", transport="ipc", ip=f"{cwd}/k")
    manager.start_kernel(cwd=str(cwd))
    assert manager.provisioner.why_plain == ""
    client, said = manager.client(), []
    try:
        client.wait_for_ready(timeout=60)
        reply = client.execute_interactive(code, output_hook=lambda m: said.append(m["content"].get("text", "")), timeout=100)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert reply["content"]["status"] == "ok", "\n".join(reply["content"]["traceback"])
    return "".join(said)


def test_the_server_is_as_good_as_single_threaded(place: Path) -> None:
    [server] = kernels.servers()
    assert server["left_out"] == {}
    # the helpers of two memory allocators, which renew themselves in a fork, and one of polars that deletes spilled files
    names = ["python" if name.startswith("python") else name for name in server["threads"]]  # python3.11 in some environments
    assert set(names) <= {"python", "jemalloc_bg_thd", "polars-ooc-clea"}
    assert names.count("python") == 1


@pytest.mark.parametrize("library", CASES)
def test_it_works_in_a_fork(place: Path, library: str, tmp_path: Path) -> None:
    if not here(library):
        pytest.skip(f"{library} is not installed")
    run(place, CASES[library], tmp_path)


@pytest.mark.parametrize("library", DRAWS)
def test_its_random_numbers_are_its_own(place: Path, library: str, tmp_path: Path) -> None:
    if not here(library):
        pytest.skip(f"{library} is not installed")
    drawn = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        drawn.append(run(place, DRAWS[library], tmp_path / name).split())
    assert not set(drawn[0]) & set(drawn[1]), drawn
