"""Peak memory of the data pipeline over a large file: generated, loaded, checked and turned into features, piece by piece.

    python benchmarks/memory.py [--rows 1000000] [--batch-rows 50000] [--json]

Each stage runs in a process of its own, so that its peak is its own: `generate` writes the file; `load` only reads it;
`pipeline` reads, validates and makes features, as one stream. The mark is a peak of at most 1.5 GB in every stage;
exit code 1 where it is missed. The file goes to a temporary folder (a million rows are about 450 MB) and is removed.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MARK = 1.5  # GB
STAGES = ("generate", "load", "pipeline")


def generate(folder: Path, rows: int, batch_rows: int) -> int:
    "Write reviews, users and businesses."
    from mlops_lib.data.synthetic import write_inbox

    write_inbox(folder, rows)
    return rows


def load(folder: Path, rows: int, batch_rows: int) -> int:
    "Read the reviews and forget them."
    from mlops_lib.data.tables import scan_reviews

    return sum(len(batch) for batch in scan_reviews(folder / "review.json", batch_rows))


def pipeline(folder: Path, rows: int, batch_rows: int) -> int:
    "Read, validate against all three tables, clean, and make features; one batch at a time."
    from mlops_lib.data.features import clean_text, create_features
    from mlops_lib.data.quality import validate
    from mlops_lib.data.tables import load_businesses, load_users, scan_reviews

    user, business = load_users(folder / "user.json"), load_businesses(folder / "business.json")
    done = 0
    for batch in scan_reviews(folder / "review.json", batch_rows):
        validation = validate(batch, max_bad_share=0.2, tables={"user": user, "business": business}, first_row=done)
        features = create_features(clean_text(validation.good), business)
        assert len(features) == len(validation.good)
        done += len(batch)
    return done


def measure(stage: str, folder: Path, rows: int, batch_rows: int) -> dict[str, float | str]:
    "Run one stage in a fresh process, and return its peak memory and speed."
    command = [sys.executable, __file__, "--stage", stage, "--folder", str(folder), "--rows", str(rows)]
    command += ["--batch-rows", str(batch_rows)]
    environ = os.environ | {"MLOPS_DATA_DIR": str(folder / "data"), "MLOPS_LOG_LEVEL": "ERROR"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environ)
    if done.returncode:
        raise SystemExit(f"The stage {stage!r} failed with exit code {done.returncode}.")
    return json.loads(done.stdout.splitlines()[-1])


def run_stage(stage: str, folder: Path, rows: int, batch_rows: int) -> dict[str, float | str]:
    "Run one stage here."
    start, cpu = time.perf_counter(), time.process_time()
    done = {"generate": generate, "load": load, "pipeline": pipeline}[stage](folder, rows, batch_rows)
    took, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "linux" else 2**30)  # GiB
    peak *= 2**30 / 1e9
    return {
        "stage": stage, "rows": done, "seconds": round(took, 1), "rows_per_s": round(done / took),
        "rows_per_cpu_s": round(done / cpu), "peak_gb": round(peak, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--batch-rows", type=int, default=50_000)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        print(json.dumps(run_stage(args.stage, args.folder, args.rows, args.batch_rows)))
        return
    with tempfile.TemporaryDirectory(prefix="mlops-memory-") as folder:
        results = [measure(stage, Path(folder), args.rows, args.batch_rows) for stage in STAGES]
        size = sum(path.stat().st_size for path in Path(folder).glob("*.json")) / 1e6
    if args.json:
        print(json.dumps({"stages": results, "mark_gb": MARK, "file_mb": round(size)}, indent=1))
    else:
        print(f"{args.rows:,} reviews with their users and businesses, {size:,.0f} MB")
        for r in results:
            verdict = "ok" if float(r["peak_gb"]) <= MARK else "TOO MUCH"
            print(f"{r['stage']:<9} {r['rows_per_s']:>9,} rows/s {r['peak_gb']:>6} GB  {verdict}")
    sys.exit(any(float(r["peak_gb"]) > MARK for r in results))


if __name__ == "__main__":
    main()
