"""Start-up time of whole processes, beside a bare interpreter and the commands of the tools that we build on.

    python benchmarks/startup.py            a table; exit code 1 where a mark is missed
    python benchmarks/startup.py --json     the same, for scripts

Every row is measured once per round, in turn, so that a busy moment on the machine hits all rows alike; the figures are medians. The marks are wall time on a machine that does nothing else; the processor time
beside them says whether a miss is ours or the machine's.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

BARE = "python -c pass"
MARKS = {"import mlops_lib": 0.1, "mlops --help": 0.3}  # seconds, whole process
IMPORTS = ("mlops_lib", "mlops_lib.training", "mlops_lib.settings", "pandas")
COMMANDS = ("mlops", "dvc", "mlflow")


def commands() -> dict[str, list[str]]:
    "Return the rows to measure: what is not installed beside this interpreter is left out."
    rows = {BARE: [sys.executable, "-c", "pass"]}
    rows |= {f"import {name}": [sys.executable, "-c", f"import {name}"] for name in IMPORTS}
    folder = str(Path(sys.executable).parent)
    for name in COMMANDS:
        if found := shutil.which(name, path=folder):
            rows[f"{name} --help"] = [found, "--help"]
    return rows


def seconds(command: list[str]) -> tuple[float, float]:
    "Run one command to its end and return the wall time and the processor time of the whole process."
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    took = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr.decode()[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(rounds: int) -> dict[str, dict[str, float | bool | None]]:
    "Measure every row, in turn, after one run of each that only warms the disk cache."
    rows = commands()
    times: dict[str, list[float]] = {name: [] for name in rows}
    busy: dict[str, list[float]] = {name: [] for name in rows}
    for i in range(rounds + 1):
        for name, command in rows.items():
            took, cpu = seconds(command)
            if i:
                times[name].append(took)
                busy[name].append(cpu)
    median = {name: statistics.median(t) for name, t in times.items()}
    return {
        name: {
            "seconds": round(median[name], 4),
            "fastest": round(min(times[name]), 4),
            "cpu": round(statistics.median(busy[name]), 4),
            "over_bare": round(median[name] - median[BARE], 4),
            "mark": (mark := MARKS.get(name)),
            "met": None if mark is None else median[name] <= mark,
        }
        for name in rows
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each row (default 5)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    rows = measure(args.rounds)
    missing = sorted(set(MARKS) - set(rows))
    if args.json:
        print(json.dumps({"rounds": args.rounds, "rows": rows, "not_measured": missing}, indent=1))
    else:
        print(f"{'whole process':<28}{'median s':>10}{'fastest s':>11}{'cpu s':>8}{'over bare s':>13}{'mark s':>9}")
        for name, row in rows.items():
            mark = "" if row["mark"] is None else f"{row['mark']:>7} {'ok' if row['met'] else 'MISSED'}"
            print(f"{name:<28}{row['seconds']:>10.3f}{row['fastest']:>11.3f}{row['cpu']:>8.3f}{row['over_bare']:>13.3f}{mark:>12}")
        for name in missing:
            print(f"{name:<28} not measured: the command is not installed beside {sys.executable}")
    return 1 if missing or any(row["met"] is False for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
