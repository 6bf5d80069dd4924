"""The course by papermill, one lesson after the other in fresh kernels; by `mlops run` on warm kernels; and with nothing changed.

python benchmarks/run.py                  # every lesson: minutes
python benchmarks/run.py --only 0_start   # a part, as `mlops run --only` takes it
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mlops_lib.course import graph, kernels, pipeline
from mlops_lib.settings import find_root

NOTHING, CHAIN = 0.5, 1.15  # marks: seconds with nothing changed; times the critical path
COMMAND = [str(Path(sys.executable).with_name("mlops")), "run", "--json"]


def one_by_one(lessons: list[graph.Lesson], out: Path) -> float:  # seconds
    "papermill as its documentation shows it, a plain kernel for each notebook."
    import papermill

    os.environ |= pipeline.ENVIRONMENT
    start = time.perf_counter()
    for lesson in lessons:
        began = time.perf_counter()
        papermill.execute_notebook(
            str(lesson.path), str(out / lesson.path.name), kernel_name="python3", cwd=str(lesson.path.parent), progress_bar=False
        )
        print(f"  {lesson.name:<28} {time.perf_counter() - began:6.1f} s", flush=True)
    return time.perf_counter() - start


def run(*options: str, runs: str) -> tuple[float, dict]:  # seconds of the process, and what it says
    "`mlops run` as a person calls it."
    start = time.perf_counter()
    done = subprocess.run([*COMMAND, *options], env=os.environ | {"MLOPS_RUNS_DIR": runs}, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"mlops run ended with {done.returncode}: {done.stdout[-2_000:]}")
    return seconds, json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--jobs", type=int)
    asked = parser.parse_args()
    course = graph.read_course(find_root())
    lessons = graph.select(course, asked.only)
    options = [word for part in asked.only for word in ("--only", part)] + (["--jobs", str(asked.jobs)] if asked.jobs else [])
    print(f"{len(lessons)} lessons, {pipeline.how_many(asked.jobs)} at a time")
    with tempfile.TemporaryDirectory(prefix="mlops-") as folder:
        print("papermill, one by one, fresh kernels")
        plain = one_by_one(lessons, Path(folder))
        names = kernels.install(pipeline.ENVIRONMENT)
        kernels.wait_for_server(names, pipeline.lesson_environment("embedded"), timeout=300)
        warm, said = run(*options, runs=f"{folder}/runs")
        nothing = min(run(*options, runs=f"{folder}/runs")[0] for _ in range(5))
        print("mlops run, warm kernels: lessons in forks", sum(o["kernel"] == "mlops" for o in said["lessons"]))
    path, chain = graph.critical_path(graph.waits(lessons), {o["name"]: o["seconds"] for o in said["lessons"]})
    work = sum(o["seconds"] for o in said["lessons"])
    least = max(chain, work / pipeline.how_many(asked.jobs))  # no schedule is shorter: the chain, or all work on all cores
    print(f"papermill one by one   {plain:8.1f} s   1.00")
    print(f"mlops run              {warm:8.1f} s   {warm / plain:.2f}")
    print(f"nothing changed        {nothing:8.2f} s   mark {NOTHING} s: {'met' if nothing < NOTHING else 'missed'}")
    print(f"critical path          {chain:8.1f} s   {' '.join(name.split('/')[1] for name in path)}")
    print(f"the least possible     {least:8.1f} s   the path, or {work:.1f} s of lessons on the cores there are")
    print(f"mlops run / path       {warm / chain:8.2f}     mark {CHAIN}; / the least possible {warm / least:.2f}")


if __name__ == "__main__":
    main()
