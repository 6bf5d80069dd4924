"""What drift detection promises, by simulation, beside the usual monitors; and what it costs.

python benchmarks/drift.py [calibration|streams|speed|all] [--seeds 200] [--first 0] [--evidently PYTHON] [--json]

The marks: any of ten clean columns alarms in at most 5 % of windows, for a reference of 5,000 and windows of 100 to 5,000, and at
100,000; a shift of 0.2 standard deviations of one column of ten is found in 90 % at 1,000 rows; a shift of 0.02 at 100,000 rows
alarms in at most 5 %; a flipped correlation with the same marginals is found in 95 %, with at most 6 % where nothing flipped. At
most one of 30 clean streams alarms, with a median delay of 400 when an error rate rises from .2 to .3. A million rows of 20 columns
take at most 0.6 of scipy's ks_2samp, and evidently at least 35 times as long. `--first` gives other seeds than those that the defaults
were chosen with. --evidently is the Python of an environment of its own with evidently in it, which does not import with pandas 3:

python3 -m venv /tmp/evidently && /tmp/evidently/bin/pip install "evidently==0.7.*" "pandas<2.3" "numpy<2.3"
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
from river import drift
from scipy import stats

from mlops_lib.monitoring.drift import Reference, detect
from mlops_lib.monitoring.streams import ErrorWatch

NAMES = [f"x{k}" for k in range(10)]
MARKS = {"false": 0.05, "power": 0.90, "tiny": 0.05, "flip": 0.95, "flip false": 0.06, "speed": 0.6, "delay": 400}


def psi(reference: np.ndarray, current: np.ndarray) -> float:
    "Population stability index over the reference's deciles."
    edges = np.quantile(reference, np.linspace(0, 1, 11)[1:-1])
    a, b = (np.bincount(np.searchsorted(edges, x), minlength=10) / len(x) + 1e-4 for x in (reference, current))
    return float(((b - a) * np.log(b / a)).sum())


def normal(rng: np.random.Generator, n: int, shift: float = 0.0) -> pd.DataFrame:
    "Ten columns, of which the first has moved."
    return pd.DataFrame(rng.normal(size=(n, 10)) + shift * (np.arange(10) == 0), columns=NAMES)


def mixed(rng: np.random.Generator, n: int, shift: float = 0.0) -> pd.DataFrame:
    "Ten columns as they come: skewed, tied, with heavy tails, categories and holes; half of them correlated."
    frame = pd.DataFrame({"skewed": rng.gamma(1.5, 2, n), "tails": rng.standard_cauchy(n), "stars": rng.choice(5, n, p=[0.1, 0.1, 0.1, 0.3, 0.4]).astype(float)})
    frame["zeros"], base = rng.poisson(0.3, n).astype(float), rng.normal(size=n)
    frame["holes"] = np.where(rng.random(n) < 0.1, np.nan, base + rng.normal(size=n))
    frame["near"], frame["nearer"] = base + 0.5 * rng.normal(size=n), base + 0.1 * rng.normal(size=n)
    frame["kind"] = rng.choice(["mail", "chat", "phone"], n, p=[0.6, 0.3, 0.1])
    frame["city"] = rng.zipf(1.6, n).clip(max=3_000).astype(str)
    return frame.assign(flag=rng.random(n) < 0.02)


def pair(rng: np.random.Generator, n: int, correlation: float) -> pd.DataFrame:
    "Ten columns, two of which move together."
    frame = normal(rng, n)
    frame["x1"] = correlation * frame["x0"] + np.sqrt(1 - correlation**2) * frame["x1"]
    return frame


def usual(then: pd.DataFrame, now: pd.DataFrame) -> dict[str, bool]:
    "The verdicts of plain KS, of KS with Bonferroni, and of PSI."
    p = [stats.ks_2samp(then[c], now[c], method="asymp").pvalue for c in then]
    return {"KS .05": min(p) < 0.05, "KS Bonferroni": min(p) < 0.05 / len(p), "PSI .1": max(psi(then[c].to_numpy(), now[c].to_numpy()) for c in then) > 0.1}


def cases(args: argparse.Namespace) -> Iterator[tuple[str, str, Callable[[np.random.Generator], tuple[pd.DataFrame, pd.DataFrame]], bool]]:
    "Name, the mark it is held against, how to draw then and now, and whether the usual monitors look at it too."
    for n in (100, 200, 500, 5_000):
        yield f"clean 5,000 x {n:,}", "false", lambda rng, n=n: (normal(rng, 5_000), normal(rng, n)), True
    yield "clean 100,000 x 100,000", "false", lambda rng: (normal(rng, 100_000), normal(rng, 100_000)), False
    for n in (100, 500):
        yield f"clean, ten unlike columns, 5,000 x {n:,}", "false", lambda rng, n=n: (mixed(rng, 5_000), mixed(rng, n)), False
    for m in (1_000, 5_000):
        yield f"0.2 sd, {m:,} x 1,000", "power", lambda rng, m=m: (normal(rng, m), normal(rng, 1_000, 0.2)), True
    yield "0.02 sd, 100,000 x 100,000", "tiny", lambda rng: (normal(rng, 100_000), normal(rng, 100_000, 0.02)), True
    yield "correlation .6 flips, 1,000 x 500", "flip", lambda rng: (pair(rng, 1_000, 0.6), pair(rng, 500, -0.6)), True
    yield "correlation .6 stays, 1,000 x 500", "flip false", lambda rng: (pair(rng, 1_000, 0.6), pair(rng, 500, 0.6)), False


EVIDENTLY = """
import sys, time, numpy as np, pandas as pd
from evidently import Report
from evidently.presets import DataDriftPreset
for line in sys.stdin:
    got = np.load(line.strip())
    then, now = (pd.DataFrame(got[k], columns=[f"x{n}" for n in range(got[k].shape[1])]) for k in ("then", "now"))
    start = time.perf_counter(); done = Report([DataDriftPreset()]).run(now, then); seconds = time.perf_counter() - start
    print(int(next(m["value"]["count"] for m in done.dict()["metrics"] if "DriftedColumnsCount" in m["metric_name"])), seconds, flush=True)
"""


class Evidently:
    "evidently's preset for data drift, as it comes, in an environment of its own."

    def __init__(self, python: str) -> None:
        self.child = subprocess.Popen([python, "-W", "ignore", "-c", EVIDENTLY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, then: pd.DataFrame, now: pd.DataFrame) -> tuple[int, float]:  # columns that it says have drifted; seconds
        assert self.child.stdin
        assert self.child.stdout
        with tempfile.TemporaryDirectory() as folder:
            np.savez(f"{folder}/both.npz", then=then.to_numpy(), now=now.to_numpy())
            print(f"{folder}/both.npz", file=self.child.stdin, flush=True)
            count, seconds = self.child.stdout.readline().split()
        return int(count), float(seconds)


def calibration(args: argparse.Namespace) -> list[dict]:
    told = []
    evidently = Evidently(args.evidently) if args.evidently else None
    for number, (name, mark, draw, others) in enumerate(cases(args)):
        alarms: dict[str, list[bool]] = {"detect": []}
        for seed in range(args.first, args.first + args.seeds):
            then, now = draw(np.random.default_rng([number, seed]))
            alarms["detect"].append(detect(then, now, seed=seed).drifted)
            if others and (seed - args.first) < max(1, args.seeds // 4):
                for monitor, alarm in usual(then, now).items():
                    alarms.setdefault(monitor, []).append(alarm)
                if evidently:
                    alarms.setdefault("evidently", []).append(evidently(then, now)[0] > 0)
        rates = {monitor: round(float(np.mean(values)), 4) for monitor, values in alarms.items()}
        met = rates["detect"] >= MARKS[mark] if mark in ("power", "flip") else rates["detect"] <= MARKS[mark]
        told.append({"case": name, "mark": MARKS[mark], "met": bool(met), "seeds": args.seeds, **rates})
        if not args.json:
            print(f"{name:42s} {'>=' if mark in ('power', 'flip') else '<='} {MARKS[mark]:<5} {'ok    ' if met else 'MISSED'} {rates}", flush=True)
    return told


def clock(call: Callable[[], object], times: int = 3) -> float:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def speed(args: argparse.Namespace) -> list[dict]:
    "Twenty columns: the profile is made once; a window is compared with it."
    rng, n, names = np.random.default_rng(0), args.rows, [f"x{k}" for k in range(20)]
    then, now = (pd.DataFrame(rng.normal(size=(n, 20)), columns=names) for _ in range(2))
    reference = Reference(then)
    seconds = {
        "Reference, once": clock(lambda: Reference(then)), "detect with it": clock(lambda: detect(reference, now)),
        "detect with both frames": clock(lambda: detect(then, now)),
        "scipy ks_2samp": clock(lambda: [stats.ks_2samp(then[c], now[c], method="asymp") for c in names], 1 if n > 100_000 else 3),
    }  # fmt: skip
    if args.evidently:
        evidently = Evidently(args.evidently)
        evidently(then.head(1_000), now.head(1_000))  # it imports at its first call
        seconds["evidently"] = evidently(then, now)[1]
    told = [{"what": what, "rows": n, "seconds": round(s, 3), "of scipy": round(s / seconds["scipy ks_2samp"], 3), "of detect": round(s / seconds["detect with it"], 2)} for what, s in seconds.items()]
    if not args.json:
        print(pd.DataFrame(told).to_string(index=False))
    return told


def streams(args: argparse.Namespace) -> list[dict]:
    "Streams of 4,000 cases; in half of them the error rises from .2 to .3 at the 2,000th. Alarms before that are false, too."
    watches: dict[str, Callable[[], Any]] = {
        "ErrorWatch": ErrorWatch, "ADWIN, delta .002": lambda: Plain(drift.ADWIN()), "PageHinkley": lambda: Plain(drift.PageHinkley()),
        "DDM": lambda: Plain(drift.binary.DDM()), "EDDM": lambda: Plain(drift.binary.EDDM()),
    }  # fmt: skip
    told = []
    for name, make in watches.items():
        false, early, delays = 0, 0, []
        for seed in range(args.first, args.first + args.seeds):
            for changes in (False, True):
                rng = np.random.default_rng([99, seed, changes])
                rate = np.where((np.arange(4_000) >= 2_000) & changes, 0.3, 0.2)
                watch = make()
                first = next((n for n, wrong in enumerate(rng.random(4_000) < rate) if watch.update(int(wrong))), 4_000)
                false += not changes and first < 4_000
                early += changes and first < 2_000
                delays += [first - 2_000] if changes and first >= 2_000 else []
        told.append({"watch": name, "streams": args.seeds, "false": round(false / args.seeds, 4), "early": round(early / args.seeds, 4), "median delay": statistics.median(delays) if delays else None})
        if not args.json:
            print(told[-1], flush=True)
    return told


class Plain:
    "A detector of river, as it comes."

    def __init__(self, detector: Any) -> None:
        self.detector = detector

    def update(self, error: int) -> bool:
        self.detector.update(error)
        return bool(self.detector.drift_detected)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="all", choices=["calibration", "streams", "speed", "all"])
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--evidently", help="Python of an environment that has evidently")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    told = {}
    for name, run in (("calibration", calibration), ("streams", streams), ("speed", speed)):
        if args.what in (name, "all"):
            told[name] = run(args)
    if args.json:
        json.dump(told, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
