"""Validation against the same checks written by hand, side by side in one run.

    python benchmarks/validation.py [--rows 200000] [--repeats 15] [--json]

Both sides get the same frame and give the same three things: the good rows, the bad rows with their reasons, and the
count of each reason. The repetitions alternate, and the medians are compared. The mark is a ratio of at most 1.4.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import polars as pl

from mlops_lib.data.quality import MAX_TEXT, validate

MARK = 1.4
COUNTS = ("useful", "funny", "cool")


def make_reviews(
    rows: int,
    bad_share: float = 0.02,
    seed: int = 0,
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:  # reviews, users, businesses
    "Reviews of usual lengths; `bad_share` of them broken in one of seven ways."
    rng = np.random.default_rng(seed)
    words = np.array(["the", "food", "came", "late", "and", "cold", "but", "we", "liked", "a", "place", "maybe", "again"])
    lengths = np.clip(rng.lognormal(4.4, 0.7, rows), 3, 900).astype(int)
    pool = [" ".join(rng.choice(words, n)) for n in rng.choice(lengths, 3_000)]
    n_users, n_businesses = max(rows // 10, 1), max(rows // 50, 1)
    texts = pl.Series("text", pool)[rng.integers(0, len(pool), rows)]
    start = datetime(2023, 1, 1)
    frame = pl.DataFrame({
        "review_id": pl.Series(range(rows)).cast(pl.String).str.zfill(22),
        "user_id": pl.Series(rng.integers(0, n_users, rows)).cast(pl.String).str.zfill(22),
        "business_id": pl.Series(rng.integers(0, n_businesses, rows)).cast(pl.String).str.zfill(22),
        "stars": rng.integers(1, 6, rows).astype(float),
        **{name: rng.integers(0, 9, rows) for name in COUNTS},
        "text": texts,
        "date": pl.Series(rng.integers(0, 700 * 86_400, rows) * 1_000_000).cast(pl.Duration("us")) + start,
    })
    how = pl.Series("how", np.where(rng.random(rows) < bad_share, rng.integers(1, 8, rows), 0))
    frame = frame.with_columns(
        stars=pl.when(how == 1).then(9.0).otherwise("stars"),
        text=pl.when(how == 2).then(pl.lit(" ")).when(how == 3).then(None).otherwise("text"),
        useful=pl.when(how == 4).then(-1).otherwise("useful"),
        user_id=pl.when(how == 5).then(pl.lit("nobody")).otherwise("user_id"),
        review_id=pl.when(how == 6).then(pl.lit("0" * 22)).otherwise("review_id"),
        date=pl.when(how == 7).then(datetime(1970, 1, 1)).otherwise("date"),
    )
    users = pl.DataFrame({"user_id": pl.Series(range(n_users)).cast(pl.String).str.zfill(22)})
    businesses = pl.DataFrame({"business_id": pl.Series(range(n_businesses)).cast(pl.String).str.zfill(22)})
    return frame, users, businesses


def polars_by_hand(
    df: pl.DataFrame, users: pl.DataFrame, businesses: pl.DataFrame,
) -> tuple[pl.DataFrame, pl.DataFrame, dict[str, int]]:
    "REVIEW_SCHEMA as polars expressions, all in one query."
    c = pl.col
    latest = datetime.now(UTC).replace(tzinfo=None) + timedelta(days=1)
    checks = {f"{name}: is missing": c(name).is_null()
              for name in ("review_id", "user_id", "business_id", "stars", "text", "date")}
    checks |= {f"{name}: length": ~c(name).str.len_chars().is_between(1, 64)
               for name in ("review_id", "user_id", "business_id")}
    checks |= {f"{name}: negative": c(name) < 0 for name in COUNTS}
    checks |= {
        "review_id: again": ~c("review_id").is_first_distinct() & c("review_id").is_not_null(),
        "user_id: unknown": ~c("user_id").is_in(users["user_id"].unique().implode()),
        "business_id: unknown": ~c("business_id").is_in(businesses["business_id"].unique().implode()),
        "stars: value": ~c("stars").is_in([1.0, 2.0, 3.0, 4.0, 5.0]),
        "text: blank": ~c("text").str.contains(r"\S"),
        "text: long": c("text").str.len_chars() > MAX_TEXT,
        "date: old": c("date") < datetime(2000, 1, 1),
        "date: future": c("date") > latest,
    }
    flags = df.select(**{name: flag.fill_null(False) for name, flag in checks.items()})
    bad = flags.select(pl.any_horizontal(pl.all())).to_series()
    reasons = flags.filter(bad).select(reasons=pl.concat_str(
        [pl.when(name).then(pl.lit(name)) for name in checks], separator="; ", ignore_nulls=True))
    rows = pl.DataFrame({"row": bad.arg_true()})
    quarantine = pl.concat([df.filter(bad), rows, reasons], how="horizontal")
    return df.filter(~bad), quarantine, flags.sum().row(0, named=True)


def pandas_by_hand(
    df: pd.DataFrame, users: pd.DataFrame, businesses: pd.DataFrame,
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, int]]:
    "REVIEW_SCHEMA as pandas expressions."
    latest = datetime.now(UTC).replace(tzinfo=None) + timedelta(days=1)
    flags = {f"{name}: is missing": df[name].isna()
             for name in ("review_id", "user_id", "business_id", "stars", "text", "date")}
    flags |= {f"{name}: length": df[name].notna() & ~df[name].str.len().between(1, 64)
              for name in ("review_id", "user_id", "business_id")}
    flags |= {f"{name}: negative": df[name] < 0 for name in COUNTS}
    flags |= {
        "review_id: again": df["review_id"].notna() & df["review_id"].duplicated(),
        "user_id: unknown": df["user_id"].notna() & ~df["user_id"].isin(users["user_id"]),
        "business_id: unknown": df["business_id"].notna() & ~df["business_id"].isin(businesses["business_id"]),
        "stars: value": df["stars"].notna() & ~df["stars"].isin([1, 2, 3, 4, 5]),
        "text: blank": df["text"].notna() & ~df["text"].str.contains(r"\S", na=True),
        "text: long": df["text"].str.len() > MAX_TEXT,
        "date: old": df["date"] < datetime(2000, 1, 1),
        "date: future": df["date"] > latest,
    }
    table = pd.DataFrame(flags)
    bad = table.any(axis=1)
    names = table.columns.to_numpy()
    reasons = ["; ".join(names[row]) for row in table[bad].to_numpy()]
    quarantine = df[bad].assign(row=np.flatnonzero(bad), reasons=reasons)
    return df[~bad].reset_index(drop=True), quarantine, table.sum().to_dict()


def side_by_side(
    ours: Callable[[], object],
    by_hand: Callable[[], object],
    repeats: int,
) -> dict[str, float]:  # median seconds of both, and the ratio
    "Time two ways to do one thing, in turns."
    times: dict[str, list[float]] = {"validate": [], "by_hand": []}
    for _ in range(repeats + 1):
        for name, work in (("validate", ours), ("by_hand", by_hand)):
            started = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first round warms up
    return medians | {"ratio": medians["validate"] / medians["by_hand"]}


def run(rows: int = 200_000, repeats: int = 15) -> list[dict]:
    "All cases: polars and pandas frames, clean and broken ones."
    results = []
    for bad_share in (0.0, 0.02):
        df, users, businesses = make_reviews(rows, bad_share)
        tables = {"user": users, "business": businesses}
        pandas_df, pandas_users, pandas_businesses = df.to_pandas(), users.to_pandas(), businesses.to_pandas()
        pandas_tables = {"user": pandas_users, "business": pandas_businesses}
        cases = {
            "polars": (lambda: validate(df, tables=tables), lambda: polars_by_hand(df, users, businesses)),  # noqa: B023
            "pandas": (lambda: validate(pandas_df, tables=pandas_tables),  # noqa: B023
                       lambda: pandas_by_hand(pandas_df, pandas_users, pandas_businesses)),  # noqa: B023
        }
        for name, (ours, by_hand) in cases.items():
            validation, (_, quarantine, _) = ours(), by_hand()
            assert validation.quarantine["row"].to_list() == quarantine["row"].to_list(), "both must find the same rows"
            timing = side_by_side(ours, by_hand, repeats)
            results.append({"frame": name, "bad": len(quarantine) / rows, "rows": rows, **timing, "mark": MARK})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = run(options.rows, options.repeats)
    if options.json:
        print(json.dumps(results, indent=1))
        return
    print(f"{'frame':8}{'bad rows':>10}{'by hand':>12}{'validate':>12}{'ratio':>8}   mark {MARK}")
    for r in results:
        print(f"{r['frame']:8}{r['bad']:>10.1%}{r['by_hand'] * 1e3:>9.1f} ms{r['validate'] * 1e3:>9.1f} ms"
              f"{r['ratio']:>8.2f}   {'met' if r['ratio'] <= MARK else 'missed'}")


if __name__ == "__main__":
    main()
