"""What alarms keep of the gain of training again for every window, and what they cost, by simulation with known drifts.

python benchmarks/retraining.py [--seeds 3] [--first 0] [--windows 32] [--cooldown 1] [--backoff 1.2] [--only DRIFT] [--jobs 1] [--json]

A model is trained on the first 8 windows. For each later window three marks (weighted F1) are taken: of the model that stays as it is,
of one that is trained again after every window, and of one that is trained again when the monitor of lesson 75 raises an alarm and the
policy of lesson 76 allows it (so many windows from one to the next, at least; so many times as long after each that was refused), and put into
service when the gate's test lets it through. All learn from the rows of the newest 8 windows, with the same settings. The marks, on the
mean of the seeds: 90 % or more of the gain with half of the trainings or fewer, over all drifts together; and without any drift one
training in ten windows at most. One drift and seed takes a minute and a half on one free core; `--first` gives other seeds.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.metrics import f1_score

from mlops_lib.data.features import clean_text, create_features
from mlops_lib.data.quality import remove_duplicates, validate
from mlops_lib.data.synthetic import Drift, generate_inbox
from mlops_lib.data.tables import add_label
from mlops_lib.monitoring.drift import Reference
from mlops_lib.monitoring.retraining import Policy, decide
from mlops_lib.monitoring.watch import Watched, judge_window
from mlops_lib.registry.gates import hold_out, paired_bootstrap
from mlops_lib.registry.tracking import fingerprints
from mlops_lib.training import train

FIRST, ROWS, DAYS = 8, 250, 14
MARKS = {"gain": 0.9, "cost": 0.5, "quiet": 0.1}
DRIFTS = ("sudden concept", "sudden, weaker", "slow concept", "sudden label", "none")


def drift_of(name: str) -> Drift | None:
    "Known changes; a window lasts two weeks: with a broken week the weekdays would differ in every window."
    day = lambda window: str((pd.Timestamp("2024-01-01") + pd.Timedelta(days=DAYS * window)).date())
    known = {
        "sudden concept": Drift("concept", day(14), 2.0), "sudden, weaker": Drift("concept", day(14), 1.2),
        "slow concept": Drift("concept", day(12), 2.0, days=8 * DAYS), "sudden label": Drift("label", day(14), 2.0),
    }  # fmt: skip
    return known.get(name)


def windows_of(drift: Drift | None, seed: int, count: int) -> list[pd.DataFrame]:
    "Rows as the validation leaves them, cut by time."
    end = str((pd.Timestamp("2024-01-01") + pd.Timedelta(days=DAYS * count)).date())
    inbox = generate_inbox(count * ROWS, seed, start="2024-01-01", end=end, drift=drift).review
    rows = create_features(add_label(clean_text(validate(remove_duplicates(inbox), max_bad_share=0.2).good)))
    number = ((rows["date"] - pd.Timestamp("2024-01-01")).dt.days // DAYS).clip(0, count - 1)
    return [part.sort_values("date").reset_index(drop=True) for _, part in rows.groupby(number)]


def learn(rows: pd.DataFrame) -> tuple[Any, Watched]:
    "A model, and what the monitor keeps of it."
    rows = rows.reset_index(drop=True)
    result = train("logistic", rows, params={"chars": 0, "thirds": False, "shift": False}, targets={})
    names = [str(c) for c in result.classes]
    part = rows.drop(index=rows.index[result.test_index])
    columns = [c for c in result.features if c != "text"] + ["label"]
    said = pd.Series(result.y_pred).astype(str).value_counts().to_dict()
    report = {"named_by": ["text"], "features": result.features}
    version: Any = SimpleNamespace(
        report=report, training_rows=np.unique(fingerprints(part, ["text"])), model=result.model, name="inbox", version=0,
        run=SimpleNamespace(data=SimpleNamespace(tags={"target": "label"})),
    )  # fmt: skip
    right = int((result.y_true == result.y_pred).sum()), len(result.y_true)
    labels = part["label"].astype(str).value_counts().to_dict()
    return result.model, Watched(version, Reference(part[columns], kinds={"label": "categorical"}), columns, {c: labels.get(c, 0) for c in names}, said, right)


def mark(model: Any, rows: pd.DataFrame) -> float:
    return float(f1_score(rows["label"], model.predict(rows), average="weighted"))


def better(new: Any, old: Any, exam: pd.DataFrame) -> bool:
    "The gate's test: by more than luck, on rows that neither has learnt."
    drawn = paired_bootstrap(exam["label"], old.predict(exam), new.predict(exam), draws=2_000)
    return bool((1 + (drawn <= 0).sum()) / (1 + len(drawn)) <= 0.05)


def simulate(drift: Drift | None, seed: int, count: int, policy: Policy) -> dict[str, Any]:
    "One year, three ways."
    windows = windows_of(drift, seed, count)
    sides = [hold_out(w, ["text"]) for w in windows]
    recent = lambda k: pd.concat([rest for rest, _ in sides[max(0, k - FIRST + 1) : k + 1]])
    first, told = learn(recent(FIRST - 1))
    mine = always = first
    marks, trained, refused = {"never": 0.0, "always": 0.0, "alarmed": 0.0}, list[float](), 0
    for k in range(FIRST, count):
        for name, model in (("never", first), ("always", always), ("alarmed", mine)) if drift else ():
            marks[name] += mark(model, windows[k])
        alarms, now = judge_window(told, windows[k]), 86_400.0 * DAYS * k
        asked = any(decide(policy, now, trained, refused=refused, worse=a["drift_type"] == "concept_drift")[0] for a in alarms)
        if asked or drift:
            always, of_always = learn(recent(k))
        if asked:
            trained.append(now)
            exam = pd.concat([aside for _, aside in sides[k - 3 : k + 1]], ignore_index=True)
            refused += 1
            if better(always, mine, exam):
                mine, told, refused = always, of_always, 0
    return {"trainings": len(trained), "windows": count - FIRST, "gain": marks["alarmed"] - marks["never"], "whole": marks["always"] - marks["never"]}


def one(case: tuple[str, int], count: int, policy: Policy) -> dict[str, Any]:
    logging.disable(logging.WARNING)
    name, seed = case
    return {"drift": name, "seed": seed, **simulate(drift_of(name), seed, count, policy)}


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    cases = [(name, args.first + n) for n in range(args.seeds) for name in DRIFTS if args.only in (None, name)]
    work = partial(one, count=args.windows, policy=Policy(cooldown_hours=24 * DAYS * args.cooldown, backoff=args.backoff))
    with ProcessPoolExecutor(args.jobs) as pool:
        for found in pool.map(work, cases):
            kept = f"gain {found['gain']:.3f} of {found['whole']:.3f}, " if found["whole"] else ""
            print(f"seed {found['seed']}, {found['drift']}: {kept}{found['trainings']} trainings of {found['windows']}", file=sys.stderr, flush=True)
            yield found


def shares(found: pd.DataFrame) -> dict[str, Any]:
    "Of each seed what is kept of the gain and what it costs; their means, with the 95 % interval of the mean."
    sums = found.groupby("seed")[["gain", "whole", "trainings", "windows"]].sum()
    told: dict[str, Any] = {}
    kept = {"gain kept": sums["gain"] / sums["whole"]} if sums["whole"].any() else {}
    for name, values in {**kept, "trainings": sums["trainings"] / sums["windows"]}.items():
        told[name] = float(values.mean())
        if len(values) > 1:
            told[f"{name} ±"] = float(stats.t.ppf(0.975, len(values) - 1) * values.sem())
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--cooldown", type=int, default=1, help="windows from one retraining to the next, at least")
    parser.add_argument("--backoff", type=float, default=Policy().backoff, help="times as long after each model in a row that was refused")
    parser.add_argument("--only", choices=DRIFTS)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    each = pd.DataFrame(run(args))
    told = {name: shares(part) for name, part in each.groupby("drift", sort=False)}
    if len(real := each[each["drift"] != "none"]):
        told["all drifts"] = shares(real)
    if args.json:
        print(json.dumps({"each": json.loads(each.to_json(orient="records")), "means": told}))
    else:
        print(pd.DataFrame(told).T.round(3).to_string(na_rep=""))
    kept, quiet = told.get("all drifts"), told.get("none")
    missed = kept and not (kept["gain kept"] >= MARKS["gain"] and kept["trainings"] <= MARKS["cost"])
    return int(bool(missed or (quiet and quiet["trainings"] > MARKS["quiet"])))


if __name__ == "__main__":
    sys.exit(main())
