"""The first cell of a notebook that imports everything: a kernel forked from the server beside a plain one, in turns.

python benchmarks/kernels.py             # torch, TensorFlow, MLflow and what else is installed of them
python benchmarks/kernels.py --rounds 5
"""

import argparse
import importlib.util
import os
import statistics
import tempfile
import time

import psutil
from jupyter_client import KernelManager

from mlops_lib.course import kernels
from mlops_lib.course.pipeline import ENVIRONMENT

HEAVY = ("torch", "tensorflow", "mlflow", "sklearn.ensemble", "pandas", "polars", "matplotlib.pyplot")
MARK = 0.4  # seconds


def first_cell(kernel: str, code: str) -> tuple[float, float]:
    "Seconds from the request to the kernel's first reply, and to the end of its first cell."
    with tempfile.TemporaryDirectory(prefix="mlops-") as folder:
        start = time.perf_counter()
        manager = KernelManager(kernel_name=kernel, transport="ipc", ip=f"{folder}/k")
        manager.start_kernel(env=os.environ | ENVIRONMENT)
        client = manager.client()
        client.wait_for_ready(timeout=120)
        ready = time.perf_counter() - start
        reply = client.execute_interactive(code, output_hook=lambda message: None)["content"]
        done = time.perf_counter() - start
        client.stop_channels()
        if kernel == "mlops" and manager.provisioner.why_plain:
            raise RuntimeError(manager.provisioner.why_plain)
        manager.shutdown_kernel(now=True)
    if reply["status"] != "ok":
        raise RuntimeError(f"{reply['ename']}: {reply['evalue']}")
    return ready, done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    modules = [name for name in HEAVY if importlib.util.find_spec(name.partition(".")[0])]
    names = [*kernels.install(ENVIRONMENT), *modules]
    with tempfile.TemporaryDirectory(prefix="mlops-") as own:  # a server of its own, and a kernel that uses it
        os.environ |= {"XDG_RUNTIME_DIR": own, "JUPYTER_PATH": own}
        kernels.install(ENVIRONMENT, names, kernels.Path(own))
        start = time.perf_counter()
        kernels.wait_for_server(names, os.environ | ENVIRONMENT, timeout=300)
        print(f"the server is ready after {time.perf_counter() - start:.1f} s")
        [server] = kernels.servers()
        memory = psutil.Process(server["pid"]).memory_full_info()
        print(f"it holds {memory.uss / 1e6:.0f} MB of its own, {memory.rss / 1e6:.0f} MB with shared files; threads: {server['threads']}")
        first_cell("mlops", "pass")
        sides: dict[str, list[tuple[float, float]]] = {"mlops": [], "python3": []}
        for _ in range(rounds):
            for kernel, times in sides.items():
                times.append(first_cell(kernel, f"import {', '.join(modules)}"))
        kernels.stop_servers()
    medians = {k: [statistics.median(step) for step in zip(*times, strict=True)] for k, times in sides.items()}
    for kernel, (ready, done) in medians.items():
        print(f"{kernel:<8} first reply {ready:6.2f} s, first cell done {done:6.2f} s")
    ours, plain = medians["mlops"][1], medians["python3"][1]
    print(f"forked / plain: {ours / plain:.3f}; mark {MARK} s: {'met' if ours <= MARK else 'MISSED'}")


if __name__ == "__main__":
    main()
