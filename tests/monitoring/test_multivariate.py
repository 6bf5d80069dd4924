"""Columns that change only together are found; equal samples are not told apart."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mlops_lib.monitoring.drift import detect
from mlops_lib.monitoring.multivariate import MultivariateError, dependence, domain_classifier, mmd, normal_scores


def pair(rng: np.random.Generator, n: int, r: float, more: int = 3) -> pd.DataFrame:
    x = rng.normal(size=(n, more + 2))
    x[:, 1] = r * x[:, 0] + np.sqrt(1 - r**2) * x[:, 1]
    return pd.DataFrame(x).add_prefix("x")


def test_equal_clouds_are_alike_as_often_as_they_should() -> None:
    rng = np.random.default_rng(1)
    p = [mmd(rng.normal(size=(80, 4)), rng.normal(size=(60, 4)), permutations=99, seed=k).p for k in range(120)]
    assert sum(v <= 0.05 for v in p) <= stats.binom.ppf(0.9999, 120, 0.05)
    assert stats.kstest(p, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("change", ["place", "spread", "shape"])
def test_clouds_that_differ_in_any_way_are_told_apart(change: str) -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(400, 3)), rng.normal(size=(400, 3))
    y = {"place": y + 0.5, "spread": y * 1.5, "shape": np.sign(y) * np.abs(y) ** 0.05}[change]
    found = mmd(x, y)
    assert found.p <= 0.05
    assert 0 < found.effect <= 1


def test_a_flip_is_found_and_its_absence_is_not() -> None:
    "The short form of benchmarks/drift.py."
    flipped, stayed = [], []
    for seed in range(25):
        rng = np.random.default_rng([3, seed])
        then = pair(rng, 600, 0.6)
        flipped.append(dependence(then, pair(rng, 300, -0.6), permutations=199).p <= 0.05)
        stayed.append(dependence(then, pair(rng, 300, 0.6), permutations=199).p <= 0.05)
    assert sum(flipped) >= stats.binom.ppf(0.0001, 25, 0.95)
    assert sum(stayed) <= stats.binom.ppf(0.9999, 25, 0.06)


def test_a_dependence_that_no_correlation_shows_is_found() -> None:
    rng = np.random.default_rng(4)
    x = rng.normal(size=1_000)
    then, now = pd.DataFrame({"a": x, "b": rng.permutation(x**2)}), pd.DataFrame({"a": x, "b": x**2})
    assert dependence(then, now).p < 0.01
    assert detect(then, now).joint.drifted


def test_normal_scores_keep_order_and_holes_are_zero() -> None:
    scores = normal_scores(pd.DataFrame({"a": [3.0, 1.0, np.nan, 2.0, 9e99], "constant": 1.0}))
    assert scores[2, 0] == 0
    assert list(np.argsort(scores[[1, 3, 0, 4], 0])) == [0, 1, 2, 3]
    assert not scores[:, 1].any()


def test_the_classifier_finds_where_and_is_honest_where_nothing_is() -> None:
    rng = np.random.default_rng(5)
    then, now = pair(rng, 600, 0.0), pair(rng, 600, 0.0)
    assert domain_classifier(then, now).p > 0.001
    now["x3"] += 1
    found = domain_classifier(then, now.mask(rng.random(now.shape) < 0.02))
    assert found.p < 1e-6
    assert next(iter(found.importance)) == "x3"
    assert found.auc > 0.6


def test_what_cannot_be_compared_is_refused() -> None:
    rng = np.random.default_rng(6)
    table = pair(rng, 100, 0.0)
    for wrong in (
        lambda: mmd(np.zeros(3), np.zeros((3, 1))),
        lambda: mmd(np.zeros((1, 2)), np.zeros((5, 2))),
        lambda: mmd(np.zeros((5, 2)), np.zeros((5, 3))),
        lambda: mmd(np.full((5, 2), np.nan), np.zeros((5, 2))),
        lambda: dependence(table, table.rename(columns={"x0": "y"})),
        lambda: dependence(table[:5], table),
        lambda: dependence(table[["x0"]], table[["x0"]]),
        lambda: domain_classifier(table, table[:10]),
    ):
        with pytest.raises(MultivariateError):
            wrong()


def test_points_that_are_all_the_same_are_alike() -> None:
    same = mmd(np.ones((30, 2)), np.ones((40, 2)))
    assert same.p > 0.9
    assert same.effect == 0
