"""Text features by polars against the same features by pandas `apply`, taking turns in one process.

python benchmarks/features.py [--reviews reviews.jsonl] [--rows 20000] [--rounds 5] [--stream 1000000]

The mark: polars takes at most 0.2 of the time of `apply`. `--stream N` writes N generated review lines, then reads, cleans
and featurises them batch by batch, and prints the peak memory.
"""

import argparse
import json
import re
import resource
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pandas as pd

from mlops_lib.data import features as f
from mlops_lib.data.features import FEATURES, clean_text, create_features
from mlops_lib.data.synthetic import generate_inbox, write_inbox
from mlops_lib.data.tables import load_reviews, scan_reviews

MARK = 0.2


def in_python(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern.replace("(?-u:", "(?a:"))


RULES = [(in_python(pattern), replacement) for pattern, replacement in f.RULES]
SENTENCE, DIGIT = re.compile(r"[.!?]+(?: |$)|[^.!? ]$"), re.compile("[0-9]")
NEGATION = in_python(rf"(?i)(?-u:\b)(?:{f.NEGATION})(?-u:\b)|n't(?-u:\b)")
CONTRAST = in_python(rf"(?i)(?-u:\b)(?:{f.CONTRAST})(?-u:\b)")
UPPER = re.compile("[A-Z]")
UNUSUAL = in_python(f._UNUSUAL.replace(f._RUNS, rf"([{re.escape(f.RUNS_OF)}])\1{{3}}"))  # Python's faster way


def apply_clean(text: str) -> str:
    "The rules of clean_text, with its short cut, as a Python function for one text."
    text = text.strip()
    if not UNUSUAL.search(text):
        return text
    while True:
        before, text = text, f._rare(unicodedata.normalize("NFKC", text))
        for pattern, replacement in RULES:
            text = pattern.sub(replacement, text)
        text = text.strip()
        if text == before:
            return text


def apply_features(row: pd.Series) -> list[float]:
    "The features of create_features, as a Python function for one row."
    text = " ".join(row["text"].split())
    words = text.count(" ") + 1 if text else 0
    letters = len(text) - words + 1
    upper = len(UPPER.findall(text)) if text.isascii() else sum(unicodedata.category(c) == "Lu" for c in text)
    date = row["date"]
    values = [
        len(text), words, len(SENTENCE.findall(text)), text.count("!"), text.count("?"), len(DIGIT.findall(text)),
        len(NEGATION.findall(text)), len(CONTRAST.findall(text)), upper / letters if words else 0.0,
        letters / words if words else 0.0,
    ]
    return values + ([-1, -1] if date is pd.NaT else [date.hour, date.weekday()]) + [0]


def alternate(rounds: int, **arms: Callable[[], object]) -> dict[str, float]:
    "Median seconds of each arm; they take turns, so that a busy machine slows all of them."
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, run in arms.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(times) for name, times in seconds.items()}


def stream(rows: int, batch_rows: int) -> dict[str, float]:
    "Load, clean and featurise generated lines batch by batch; peak memory is this process's."
    with tempfile.TemporaryDirectory() as folder:
        write_inbox(folder, rows)
        path = next(p for p in Path(folder).iterdir() if "review" in p.name)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        start, seen, words = time.perf_counter(), 0, 0
        for batch in scan_reviews(path, batch_rows):
            made = create_features(clean_text(batch))
            seen, words = seen + len(made), words + made["word_count"].sum()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"rows": seen, "seconds": seconds, "peak MB": peak, "peak MB before": before, "words": words}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reviews", type=Path, help="a file of reviews; without it they are generated")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stream", type=int, metavar="N", help="also stream N generated lines")
    parser.add_argument("--batch-rows", type=int, default=50_000)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    found = load_reviews(args.reviews) if args.reviews else generate_inbox(min(args.rows, 20_000)).review
    df = pd.concat([found] * (args.rows // len(found) + 1)).head(args.rows).reset_index(drop=True)
    df["text"] = df["text"].fillna("")
    cleaned = clean_text(df)
    assert cleaned["text"].tolist() == df["text"].apply(apply_clean).tolist(), "both clean alike"
    by_row = pd.DataFrame(cleaned.apply(apply_features, axis=1).tolist(), columns=FEATURES)
    pd.testing.assert_frame_equal(create_features(cleaned)[FEATURES], by_row, check_dtype=False)

    result: dict[str, dict[str, float]] = {}
    result["clean_text"] = alternate(
        args.rounds, polars=lambda: clean_text(df), apply=lambda: df["text"].apply(apply_clean)
    )
    result["create_features"] = alternate(
        args.rounds, polars=lambda: create_features(cleaned),
        apply=lambda: pd.DataFrame(cleaned.apply(apply_features, axis=1).tolist(), columns=FEATURES),
    )
    for seconds in result.values():
        seconds["ratio"] = seconds["polars"] / seconds["apply"]
    ok = result["create_features"]["ratio"] <= MARK
    if args.stream:
        result["stream"] = stream(args.stream, args.batch_rows)
    if args.json:
        print(json.dumps(result))
        return 0 if ok else 1
    print(f"{len(df):,} reviews of {df['text'].str.len().mean():.0f} characters, median of {args.rounds} rounds")
    for name in ("clean_text", "create_features"):
        r = result[name]
        print(f"{name:16s} polars {r['polars']:7.3f} s   pandas apply {r['apply']:7.3f} s   ratio {r['ratio']:.3f}")
    print(f"mark: create_features at most {MARK} of apply: {'met' if ok else 'MISSED'}")
    if args.stream:
        print("stream: " + ", ".join(f"{name} {value:,.0f}" for name, value in result["stream"].items()))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
