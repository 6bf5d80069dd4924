"""Every test runs on a data folder of its own: the workspace's data is never read or written."""

import os
import tempfile

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
