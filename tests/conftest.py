"""Every test runs on a data folder of its own: the workspace's data is never read or written."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

# mlops_lib.settings loads once, at import, so the folder is set before any test module imports the library.
_folder = tempfile.TemporaryDirectory(prefix="mlops-tests-")
os.environ["MLOPS_DATA_DIR"] = f"{_folder.name}/data"
os.environ["MLOPS_RUNS_DIR"] = f"{_folder.name}/runs"
os.environ["MLOPS_MLFLOW_TRACKING_URI"] = f"sqlite:///{_folder.name}/mlflow.db"
os.environ["MLOPS_BUS_URL"] = f"sqlite:///{_folder.name}/events.db"
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tables are small: several threads wait for each other
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # or it says on standard error that it is used

settings.register_profile("workspace", deadline=None)  # on a busy machine any example may take long
settings.load_profile("workspace")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    "A headless Chromium, for the tests of pages."
    from playwright.sync_api import sync_playwright
    from support import not_run

    if not (program := shutil.which("chromium")):
        not_run("not run: chromium is not installed (apt-get install -y chromium)")
    with sync_playwright() as p:
        one = p.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield one
        one.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("MLOPS_LONG") != "1":
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="long: make test-all"))
