"""What alarms keep of the gain of training again for every window, and what they cost, by simulation with known drifts.

python benchmarks/retraining.py [--seeds 3] [--windows 32] [--cooldown 1] [--only DRIFT] [--json]

A model is trained on the first 8 windows. For each later window three marks (weighted F1) are taken: of the model that stays as it is,
of one that is trained again after every window, and of one that is trained again when the monitor of lesson 75 raises an alarm and the
policy of lesson 76 allows it (so many windows from one to the next, at least), and put into service when the gate's test lets it through.
All learn from the rows of the newest 8 windows, with the same settings. The marks: 90 % or more of the gain with half of the trainings
or fewer, over all drifts together; and without any drift one training in ten windows at most.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
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


def drifts(last: int) -> dict[str, list[Drift | None]]:
    "Known changes; a window lasts two weeks: with a broken week the weekdays would differ in every window."
    day = lambda window: str((pd.Timestamp("2024-01-01") + pd.Timedelta(days=DAYS * window)).date())
    return {
        "sudden concept": [Drift("concept", day(14), 2.0)], "sudden, weaker": [Drift("concept", day(14), 1.2)],
        "slow concept": [Drift("concept", day(12), 2.0, days=8 * DAYS)], "sudden label": [Drift("label", day(14), 2.0)], "none": [None],
    }  # fmt: skip


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
    result = train("logistic", rows, params={"chars": 0, "thirds": False}, targets={})
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
    first, then = learn(recent(FIRST - 1))
    mine, told, marks, trained = first, then, {"never": [], "always": [], "alarmed": []}, list[float]()
    always = first
    for k in range(FIRST, count):
        for name, model in (("never", first), ("always", always), ("alarmed", mine)):
            marks[name].append(mark(model, windows[k]))
        again, of_again = learn(recent(k))
        always = again
        now = 86_400.0 * DAYS * k
        if judge_window(told, windows[k]) and decide(policy, now, trained)[0]:
            trained.append(now)
            exam = pd.concat([aside for _, aside in sides[k - 3 : k + 1]], ignore_index=True)
            if better(again, mine, exam):
                mine, told = again, of_again
    sums = {name: float(np.sum(v)) for name, v in marks.items()}
    return {"seed": seed, "trainings": len(trained), "windows": count - FIRST, "gain": sums["alarmed"] - sums["never"], "whole": sums["always"] - sums["never"]}


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name, kinds in drifts(args.windows).items():
        for drift in kinds if args.only in (None, name) else ():
            for seed in range(args.seeds):
                yield {"drift": name, **simulate(drift, seed, args.windows, Policy(cooldown_hours=24 * DAYS * args.cooldown))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--cooldown", type=int, default=1, help="windows from one retraining to the next, at least")
    parser.add_argument("--only", help="one of the drifts")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    table = pd.DataFrame(run(args))
    found = table.groupby("drift", sort=False)[["gain", "whole", "trainings", "windows"]].sum()
    if args.only:
        print(found.assign(kept=found["gain"] / found["whole"], cost=found["trainings"] / found["windows"]).round(3).to_string())
        return 0
    real = found.drop(index="none").sum()
    found.loc["all drifts"] = real
    found["gain kept"], found["trainings of always"] = found["gain"] / found["whole"], found["trainings"] / found["windows"]
    kept, cost, quiet = found.loc["all drifts", "gain kept"], found.loc["all drifts", "trainings of always"], found.loc["none", "trainings of always"]
    if args.json:
        print(json.dumps({"gain": kept, "cost": cost, "quiet": quiet, "table": json.loads(found.to_json(orient="index"))}))
    else:
        print(found.round(3).to_string())
    return int(not (kept >= MARKS["gain"] and cost <= MARKS["cost"] and quiet <= MARKS["quiet"]))


if __name__ == "__main__":
    sys.exit(main())
