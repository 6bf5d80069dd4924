"""Users stay where they are dealt; a test that is watched is as honest as one that is not; every figure against another way to it."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from mlops_lib.serving.abtest import (
    HOLDOUT,
    AbTestError,
    Comparison,
    Router,
    SequentialTest,
    Thompson,
    boundary,
    check_ratio,
    compare_means,
    compare_rates,
    cuped,
    detectable,
    evidence,
    holm,
    moments,
    plot_test,
    ramp,
    ratio_moments,
    sample_size,
)

PEOPLE = [f"user-{n}" for n in range(20_000)]
NAMES = st.text(min_size=1, max_size=8).filter(lambda name: name.isprintable() and name != HOLDOUT)
WEIGHTS = st.floats(0.05, 20)
ARMS = st.dictionaries(NAMES, WEIGHTS, min_size=1, max_size=6)
SALTS = st.text(min_size=1, max_size=10)


def within(hits: int, n: int, p: float, alarm: float = 1e-6) -> bool:
    "Whether so many hits of n are believable where each has probability p."
    return stats.binom.cdf(hits, n, p) > alarm and stats.binom.sf(hits - 1, n, p) > alarm


# ---- the router


GOLDEN = {"ann": "b", "bob": "b", "7": "a", "Ärger": "a", "user-1": "a", "user-2": "a", "user-3": "a", "👩🏽‍🔧": "a"}

NUMBERS = "aabcbaaacacaaacbccaacacbaccaaaccaaaabaabaaaabbbaaacbcacabaac"


def test_the_split_is_the_same_on_every_machine():
    router = Router({"a": 0.5, "b": 0.3, "c": 0.2}, "golden")
    assert {user: router.assign(user) for user in GOLDEN} == GOLDEN
    assert "".join(router.assign(n) for n in range(60)) == NUMBERS
    assert router.assign(7) == router.assign("7") == router.assign(np.int64(7)), "a number and its text are one user"
    code = "from mlops_lib.serving.abtest import Router; r = Router({'a': .5, 'b': .3, 'c': .2}, 'golden'); "
    code += "print(''.join(r.assign(n) for n in range(300)))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert other.stdout.strip() == "".join(router.assign(n) for n in range(300)), "another process deals alike"


@settings(max_examples=40, deadline=None)
@given(ARMS, SALTS, st.floats(0, 0.5), st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=50))
def test_one_by_one_and_many_at_once_and_in_any_order(arms, salt, holdout, users):
    router = Router(arms, salt, holdout=holdout)
    found = router.assign_many(users).tolist()
    assert found == [router.assign(user) for user in users]
    assert found == Router(dict(reversed(arms.items())), salt, holdout=holdout).assign_many(users).tolist()
    assert found == Router({name: 4 * weight for name, weight in arms.items()}, salt, holdout=holdout).assign_many(users).tolist()
    assert found == Router(**json.loads(json.dumps(router.definition))).assign_many(users).tolist()


@settings(max_examples=15, deadline=None)
@given(ARMS, SALTS)
def test_shares_come_true(arms, salt):
    router = Router(arms, salt, holdout=0.1)
    found = router.assign_many(PEOPLE)
    assert sum(router.shares.values()) == pytest.approx(1)
    for name, share in router.shares.items():
        assert within(int((found == name).sum()), len(PEOPLE), share, 1e-9)


@settings(max_examples=40, deadline=None)
@given(ARMS, SALTS, st.data())
def test_a_weight_that_grows_moves_users_only_to_it(arms, salt, data):
    name, factor = data.draw(st.sampled_from(sorted(arms))), data.draw(st.floats(1, 10))
    users = PEOPLE[:3_000]
    before = Router(arms, salt).assign_many(users)
    after = Router(arms | {name: factor * arms[name]}, salt).assign_many(users)
    assert (after[before != after] == name).all()
    assert (before[after != name] == after[after != name]).all()


@settings(max_examples=40, deadline=None)
@given(ARMS, SALTS, st.text("xyz", min_size=9, max_size=12), WEIGHTS)
def test_an_arm_that_comes_or_goes_moves_only_its_own_users(arms, salt, new, weight):
    users = PEOPLE[:3_000]
    without, with_it = Router(arms, salt).assign_many(users), Router(arms | {new: weight}, salt).assign_many(users)
    assert (with_it[without != with_it] == new).all()
    silent = Router(arms | {new: 0}, salt).assign_many(users)
    assert (silent == without).all(), "a weight of 0 is an arm that is not there"


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(NAMES, WEIGHTS, min_size=2, max_size=5), SALTS, st.data())
def test_growing_a_share_is_exact_and_reversible(arms, salt, data):
    name, share = data.draw(st.sampled_from(sorted(arms))), data.draw(st.floats(0, 0.95))
    router = Router(arms, salt, holdout=0.2)
    grown = router.grow(name, share)
    assert grown.shares[name] == pytest.approx(0.8 * share)
    assert grown.shares[HOLDOUT] == pytest.approx(0.2)
    others = [n for n in arms if n != name]
    assert [grown.shares[n] / grown.shares[others[0]] for n in others] == pytest.approx([arms[n] / arms[others[0]] for n in others])
    back = grown.grow(name, router.shares[name] / 0.8).assign_many(PEOPLE[:3_000])
    assert (back == router.assign_many(PEOPLE[:3_000])).mean() > 0.999  # rounding may move one who is on the border


def test_two_weights_at_once_move_no_more_than_the_bound():
    a, b = {"a": 0.5, "b": 0.3, "c": 0.2}, {"a": 0.4, "b": 0.4, "c": 0.2}
    moved = (Router(a, "s").assign_many(PEOPLE) != Router(b, "s").assign_many(PEOPLE)).sum()
    assert 0.1 * 0.9 * len(PEOPLE) < moved < 1.1 * len(PEOPLE) * 2 * 0.1 / 1.1


def test_experiments_are_independent_of_each_other():
    salts = [f"experiment {n}" for n in range(12)]
    found = [Router({"a": 0.6, "b": 0.4}, salt).assign_many(PEOPLE) == "a" for salt in salts]
    p = [
        stats.chi2_contingency([[(x & y).sum(), (x & ~y).sum()], [(~x & y).sum(), (~x & ~y).sum()]]).pvalue
        for i, x in enumerate(found) for y in found[:i]
    ]  # fmt: skip
    assert min(p) > 1e-6
    assert stats.kstest(p, "uniform").pvalue > 1e-6
    shown = Router({"a": 1, "b": 1}, "x", shadow={"s": 0.5}, holdout=0.3)
    dealt, copied = shown.assign_many(PEOPLE), np.array([bool(shown.copies(u)) for u in PEOPLE])
    table = [[((dealt == arm) & (copied == c)).sum() for c in (True, False)] for arm in ("a", "b", HOLDOUT)]
    assert stats.chi2_contingency(table).pvalue > 1e-6, "arm, shadow and holdout are drawn apart"


def test_numbers_in_a_row_are_dealt_as_well_as_any_names():
    found = Router(dict.fromkeys("abcd", 1), "row").assign_many(range(40_000))
    pairs = np.unique([f"{x}{y}" for x, y in zip(found[::2], found[1::2], strict=True)], return_counts=True)[1]
    assert len(pairs) == 16 and stats.chisquare(pairs).pvalue > 1e-6


def test_shadows_get_copies_and_no_users():
    router = Router({"a": 1}, "s", shadow={"x": 1.0, "y": 0.25, "z": 0.0})
    copies = [router.copies(user) for user in PEOPLE]
    assert set(router.assign_many(PEOPLE)) == {"a"}
    assert all("x" in c and "z" not in c for c in copies)
    assert within(sum("y" in c for c in copies), len(PEOPLE), 0.25)
    wider = Router({"a": 1}, "s", shadow={"x": 1.0, "y": 0.5})
    assert all("y" in wider.copies(user) for user, c in zip(PEOPLE, copies, strict=True) if "y" in c)


def test_a_holdout_is_shared_and_shrinks_without_mixing():
    out = lambda share, salt: Router({"a": 1, "b": 1}, salt, holdout=share, holdout_salt="all").assign_many(PEOPLE) == HOLDOUT
    assert (out(0.2, "one") == out(0.2, "two")).all()
    assert not (out(0.1, "one") & ~out(0.2, "one")).any()
    apart = Router({"a": 1, "b": 1}, "three", holdout=0.2).assign_many(PEOPLE) == HOLDOUT
    assert within(int((apart & out(0.2, "one")).sum()), len(PEOPLE), 0.04)
    inside = ~out(0.2, "one")
    assert (Router({"a": 1, "b": 1}, "one").assign_many(PEOPLE)[inside] == Router({"a": 1, "b": 1}, "one", holdout=0.2, holdout_salt="all").assign_many(PEOPLE)[inside]).all()


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"arms": {}}, "No arm has a weight"),
        ({"arms": {"a": 0, "b": 0.0}}, "No arm has a weight"),
        ({"arms": {"a": -0.1}}, "numbers from 0"),
        ({"arms": {"a": math.inf}}, "numbers from 0"),
        ({"arms": {"a": math.nan}}, "numbers from 0"),
        ({"arms": {"a": True}}, "numbers from 0"),
        ({"arms": {"a": "1"}}, "numbers from 0"),
        ({"arms": {"": 1}}, "names no arm"),
        ({"arms": {HOLDOUT: 1}}, "names no arm"),
        ({"arms": {3: 1}}, "names no arm"),
        ({"arms": {"a\x00": 1}}, "printable"),  # numpy and PostgreSQL lose or refuse it
        ({"arms": ["a", "b"]}, "name -> number"),
        ({"salt": ""}, "salt"),
        ({"salt": None}, "salt"),
        ({"holdout": 1.5}, "from 0 to 1"),
        ({"shadow": {"s": 2}}, "from 0 to 1"),
        ({"shadow": {"a": 0.5}}, "a shadow at once"),
    ],
)
def test_a_router_that_cannot_be(about, message):
    with pytest.raises(AbTestError, match=message):
        Router(**{"arms": {"a": 1.0}, "salt": "s"} | about)


@pytest.mark.parametrize("user", [None, "", True, 1.5, b"ann", ("ann",)])
def test_a_user_without_a_name(user):
    router = Router({"a": 1, "b": 1}, "s", shadow={"c": 0.5})
    for ask in (router.assign, router.copies, lambda user: router.assign_many(["ann", user])):
        with pytest.raises(AbTestError, match="A user is named"):
            ask(user)


def test_odd_names_are_names():
    router = Router({"a": 1, "b": 1}, "s")
    for user in ("\ud800", "\x00", "x" * 10_000, " ", "ünï\u0301"):
        assert router.assign(user) == router.assign_many([user])[0]
    assert router.assign_many([]).tolist() == []


def test_a_canary_grows_by_steps():
    assert ramp() == (0.01, 0.025, 0.062, 0.16, 0.39, 0.5)
    assert ramp(0.1, 0.1) == (0.1,)
    assert ramp(0.01, 0.04, 2) == (0.01, 0.02, 0.04)
    for wrong in ((0, 0.5, 2), (0.5, 0.1, 2), (0.1, 1, 2), (0.1, 0.5, 1)):
        with pytest.raises(AbTestError):
            ramp(*wrong)
    with pytest.raises(AbTestError, match="beside others"):
        Router({"a": 1}, "s").grow("a", 0.5)
    with pytest.raises(AbTestError, match="beside others"):
        Router({"a": 1, "b": 1}, "s").grow("b", 1)


# ---- the ratio of the arms


def test_the_ratio_check_is_right_when_looked_at_once_and_when_watched():
    rng, n, tests = np.random.default_rng(1), 20_000, 300
    for share, peeking, least, most in ((0.5, False, 0, 0.02), (0.5, True, 0, 0.02), (0.52, False, 0.93, 1), (0.52, True, 0.93, 1)):
        steps = rng.binomial(n // 10, share, (tests, 10)).cumsum(1)
        looks = range(10) if peeking else [9]
        alarms = [
            any(not check_ratio({"a": int(a[i]), "b": (i + 1) * n // 10 - int(a[i])}, {"a": 1, "b": 1}, peeking=peeking).ok for i in looks)
            for a in steps
        ]
        assert least <= np.mean(alarms) <= most


def test_the_ratio_check_is_chi_square_or_a_fair_bet():
    shares, counts = {"a": 0.5, "b": 0.3, "c": 0.2}, {"a": 530, "b": 300, "c": 170}
    once = check_ratio(counts, shares, peeking=False)
    assert once.p_value == pytest.approx(stats.chisquare([530, 300, 170], [500, 300, 200]).pvalue)
    odds = lambda n: 1 / max(check_ratio(dict(zip("ab", n, strict=True)), {"a": 1, "b": 3}).p_value, 1e-300)
    fair = sum(stats.binom.pmf(a, 40, 0.25) * odds((a, 40 - a)) for a in range(41))
    assert fair == pytest.approx(1, abs=0.05), "what it pays is worth its stake (odds below 1 are shown as 1)"
    assert check_ratio({}, shares).ok and check_ratio({"a": 3}, {"a": 1}).ok
    strange = check_ratio({"a": 50, "b": 50, "c": 1}, {"a": 1, "b": 1, "c": 0})
    assert not strange.ok and strange.p_value == 0, "nobody was dealt to c"
    assert "NOT as dealt" in str(check_ratio({"a": 5_500, "b": 4_500}, {"a": 1, "b": 1}))
    assert check_ratio({"a": 120, "b": 80, HOLDOUT: 0}, {"a": 1, "b": 1, HOLDOUT: 0}, alpha=0.0001).ok
    for counts, shares, match in (({"x": 1}, {"a": 1}, "counted in"), ({"a": -1}, {"a": 1}, "whole number"), ({}, {"a": 0}, "No arm")):
        with pytest.raises(AbTestError, match=match):
            check_ratio(counts, shares)


# ---- looked at once


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.data())
def test_shares_against_scipy(n, m, data):
    a, b = data.draw(st.integers(0, n)), data.draw(st.integers(0, m))
    found = compare_rates((a, b), (n, m))
    table = [[a, n - a], [b, m - b]]
    pooled = (a + b) / (n + m)
    if min(pooled, 1 - pooled) * min(n, m) < 5:
        assert found.p_value == pytest.approx(stats.fisher_exact(table).pvalue)
    else:
        assert found.p_value == pytest.approx(stats.chi2_contingency(table, correction=False).pvalue)
    low, high = found.interval
    assert -1 - 1e-9 <= low <= found.effect + 1e-12 and found.effect - 1e-12 <= high <= 1 + 1e-9
    (la, ha), (lb, hb) = (stats.binomtest(k, t).proportion_ci(method="wilson") for k, t in ((a, n), (b, m)))
    pa, pb = a / n, b / m
    assert low == pytest.approx(pb - pa - math.hypot(pb - lb, ha - pa), abs=1e-9)
    assert high == pytest.approx(pb - pa + math.hypot(hb - pb, pa - la), abs=1e-9)
    swapped = compare_rates((b, a), (m, n))
    assert swapped.interval == pytest.approx((-high, -low)) and swapped.p_value == pytest.approx(found.p_value)


def test_newcombes_own_example():
    found = compare_rates((48, 56), (80, 70))  # Newcombe 1998, table II, (a), method 10
    assert (-found.interval[1], -found.interval[0]) == pytest.approx((-0.3339, -0.0524), abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 60), st.integers(2, 60), st.integers(0, 2**31), st.floats(-3, 3), st.floats(0.1, 9))
def test_means_against_scipy(n, m, seed, shift, scale):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(5, 1, n), rng.normal(5 + shift, scale, m)
    found = compare_means(*zip(moments(a), moments(b), strict=True))
    scipy = stats.ttest_ind(b, a, equal_var=False)
    assert found.p_value == pytest.approx(scipy.pvalue, rel=1e-6)
    assert found.interval == pytest.approx(tuple(scipy.confidence_interval()), rel=1e-6)
    if found.lift_interval:
        assert found.lift_interval[0] < found.lift < found.lift_interval[1]


def test_the_intervals_cover_what_they_promise():
    rng, tests = np.random.default_rng(2), 1_500
    hits = lifts = told = 0
    for _ in range(tests):
        a, b = int(rng.binomial(300, 0.2)), int(rng.binomial(500, 0.26))
        found = compare_rates((a, b), (300, 500))
        hits += found.interval[0] <= 0.06 <= found.interval[1]
        if found.lift_interval:
            told += 1
            lifts += found.lift_interval[0] <= 0.3 <= found.lift_interval[1]
    assert within(hits, tests, 0.95, 1e-4) and within(lifts, told, 0.95, 1e-4)


def test_words_are_those_of_the_user():
    said = str(compare_rates((2_000, 2_200), (20_000, 20_000)))
    assert said.startswith("11.0 % against 10.0 %: +1.0 points (95 % interval +0.4 to +1.6), relative +10.0 %")
    assert "significant" in said and "Of 1,000 users 10 more" in said
    assert "not significant" in str(compare_rates((10, 11), (100, 100)))
    equal = compare_rates((0, 0), (10, 10))
    assert equal.p_value == 1 and equal.larger is None and math.isnan(equal.lift) and equal.lift_interval is None
    assert compare_rates((10, 40), (50, 50)).larger == 1 and compare_rates((40, 10), (50, 50)).larger == 0


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: compare_rates((3, 4), (2, 9)), "more successes than trials"),
        (lambda: compare_rates((0, 0), (0, 9)), "Nothing was tried"),
        (lambda: compare_rates((1,), (2, 2)), "two arms"),
        (lambda: compare_rates("11", (2, 2)), "two arms"),
        (lambda: compare_rates((1.5, 1), (2, 2)), "whole number"),
        (lambda: compare_rates((True, 1), (2, 2)), "whole number"),
        (lambda: compare_rates((math.nan, 1), (2, 2)), "whole number"),
        (lambda: compare_rates((1, 1), (2, 2), alpha=0), "alpha"),
        (lambda: compare_means((1, 2), (1, -1), (9, 9)), "from 0"),
        (lambda: compare_means((1, math.inf), (1, 1), (9, 9)), "finite"),
        (lambda: compare_means((1, 2), (1, 1), (1, 9)), "Two values an arm"),
        (lambda: compare_means((1, 2), (0, 0), (9, 9)), "Two values an arm"),
        (lambda: moments([1.0]), "at least two"),
        (lambda: moments([1.0, math.nan]), "1 not finite"),
        (lambda: moments(["a", "b"]), "numbers"),
        (lambda: ratio_moments([1, 2], [1, 2, 3]), "numerator"),
        (lambda: ratio_moments([1, 2], [0, 0]), "numerator"),
        (lambda: ratio_moments([1, 2], [-1, 3]), "numerator"),
        (lambda: holm({"a": 1.2}), "between 0 and 1"),
        (lambda: holm({"a": math.nan}), "between 0 and 1"),
        (lambda: cuped([1, 2, 3], [[1, 2]]), "Each of the 3 users"),
        (lambda: cuped([1, 2, 3], [1, 2, math.inf]), "Each of the 3 users"),
        (lambda: cuped([1, 2, 3], [1, 2, 3], ["a", "b"]), "arms of 2"),
    ],
)
def test_what_cannot_be_is_refused(call, match):
    with pytest.raises(AbTestError, match=match):
        call()


# ---- sizes


def test_sizes_are_those_of_the_textbook_and_of_a_simulation():
    n = sample_size(0.1, 0.1)
    p, d = 0.105, 0.01
    by_hand = ((1.959964 * math.sqrt(2 * p * (1 - p)) + 0.841621 * math.sqrt(0.1 * 0.9 + 0.11 * 0.89)) / d) ** 2
    assert n == math.ceil(by_hand)
    assert sample_size(5, 0.04, sd=2) == math.ceil(2 * 4 * (1.959964 + 0.841621) ** 2 / 0.2**2)
    rng, tests = np.random.default_rng(3), 4_000
    a, b = rng.binomial(n, 0.1, tests), rng.binomial(n, 0.11, tests)
    pooled = (a + b) / (2 * n)
    found = int((np.abs(b - a) / n / np.sqrt(2 * pooled * (1 - pooled) / n) > 1.959964).sum())
    assert within(found, tests, 0.8, 1e-4)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.01, 0.6), st.floats(0.02, 0.5), st.sampled_from([0.01, 0.05]), st.sampled_from([0.5, 0.8, 0.95]), st.booleans())
def test_size_and_smallest_lift_are_inverse(base, lift, alpha, power, watched):
    assume(base * (1 + lift) < 0.99)
    n = sample_size(base, lift, alpha, power, watched=watched)
    assert detectable(base, n, alpha, power, watched=watched) <= lift * (1 + 1e-6)
    if n > 4:
        assert detectable(base, n - 1, alpha, power, watched=watched) >= lift * (1 - 1e-6)
    assert sample_size(base, lift, alpha, power, watched=True) > sample_size(base, lift, alpha, power)


def test_sizes_that_cannot_be():
    assert detectable(5, 1_570, sd=2) == pytest.approx(0.04, rel=1e-3)
    assert sample_size(0.5, -0.1) > 0 and sample_size(-3, 0.1, sd=1) > 0
    for call in (
        lambda: sample_size(0.1, 0), lambda: sample_size(0.6, 0.7), lambda: sample_size(1.2, 0.1), lambda: sample_size(0.1, 0.1, power=0.01),
        lambda: sample_size(0.1, 0.1, alpha=1), lambda: detectable(0.1, 2), lambda: sample_size(0, 0.1, sd=1), lambda: sample_size(1, 0.1, sd=-1),
    ):  # fmt: skip
        with pytest.raises(AbTestError):
            call()


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), max_size=8))
def test_holm_against_its_definition(p):
    found, order = holm(p), sorted(p, key=p.get)
    for i, name in enumerate(order):
        assert found[name] == pytest.approx(min(1, max((len(p) - j) * p[other] for j, other in enumerate(order[: i + 1]))))
    assert list(found) == list(p)


# ---- watched


def watch(a: float, b: float, n: int, tests: int, looks: int, seed: int, m: int | None = None):
    "Counts up to every look."
    rng, trials = np.random.default_rng(seed), [np.arange(1, looks + 1) * (k // looks) for k in (n, m or n)]
    return *(rng.binomial(t[0], p, (tests, looks)).cumsum(1) for p, t in zip((a, b), trials, strict=True)), *trials


def alarms(a, b, n, m, **about) -> np.ndarray:
    "In which of many tests the class finds a difference, at any look."
    rows = zip(a.tolist(), b.tolist(), strict=True)
    n, m = n.tolist(), m.tolist()
    run = lambda x, y, test: any(test.update(successes=(s, t), trials=(k, j)).significant for s, t, k, j in zip(x, y, n, m, strict=True))
    return np.array([run(x, y, SequentialTest(**about)) for x, y in rows])


@pytest.mark.parametrize(
    ("base", "n", "m", "planned"),
    [(0.1, 20_000, 20_000, 20_000), (0.5, 20_000, 20_000, 2_000), (0.003, 20_000, 1_000, 2_000), (0.95, 2_000, 2_000, 200)],
)
def test_false_alarms_of_a_hundred_looks_stay_below_alpha(base, n, m, planned):
    tests = 150
    found = int(alarms(*watch(base, base, n, tests, 100, 4, m), planned=planned).sum())
    assert stats.binom.sf(found - 1, tests, 0.05) > 1e-4, f"{found} of {tests} equal arms were called different"


def test_power_is_what_the_mark_asks_for():
    tests = 150
    found = int(alarms(*watch(0.1, 0.11, 20_000, tests, 100, 5)).sum())
    assert stats.binom.cdf(found, tests, 0.69) > 1e-3, f"{found} of {tests}"


def test_the_bet_is_fair_and_the_boundary_is_where_it_pays():
    for t in (1e-4, 0.1, 1, 30):
        fair = np.trapezoid(np.exp(evidence(z := np.linspace(-60, 60, 400_001), t) + stats.norm.logpdf(z)), z)
        assert fair == pytest.approx(1, abs=1e-6), "where there is no difference, a coin is worth a coin"
        for alpha in (0.2, 0.05, 0.001):
            assert evidence(boundary(t, alpha), t) == pytest.approx(-math.log(alpha), rel=1e-9)
            other = optimize.brentq(lambda z, t=t, alpha=alpha: evidence(z, t) + math.log(alpha), 0, 1e4)
            assert boundary(t, alpha) == pytest.approx(other, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 300)] * 4), min_size=1, max_size=12), st.sampled_from([20, 500, 20_000]))
def test_laws_of_a_sequence(steps, planned):
    test, total, before = SequentialTest(planned=planned, least=2), np.zeros(4, int), None
    for a, more_a, b, more_b in steps:
        total += (a, a + more_a, b, b + more_b)
        state = json.loads(json.dumps(test.state))
        found = test.update(successes=(total[0], total[2]), trials=(int(total[1]), int(total[3])))
        assert found == SequentialTest.resume(state).update(successes=total[[0, 2]], trials=total[[1, 3]]), "resumed it goes on alike"
        assert isinstance(found, Comparison) and 0 <= found.p_value <= 1
        assert found.interval[0] <= found.interval[1]
        if before:
            assert found.p_value <= before.p_value
            assert not (before.significant and not found.significant)
        if found.steady:
            assert found.significant == (found.interval[0] >= 0 or found.interval[1] <= 0)
            if before:
                assert found.interval[0] >= before.interval[0] and found.interval[1] <= before.interval[1]
        again = test.update(successes=(total[0], total[2]), trials=(total[1], total[3]))
        assert again == found, "looking twice at the same is looking once"
        before = found


def test_swapping_the_arms_swaps_the_sign():
    one = SequentialTest().update(successes=(1_000, 1_200), trials=(9_000, 11_000))
    two = SequentialTest().update(successes=(1_200, 1_000), trials=(11_000, 9_000))
    assert one.interval == pytest.approx((-two.interval[1], -two.interval[0])) and one.p_value == pytest.approx(two.p_value)


def test_intervals_cover_the_truth_at_every_look():
    tests, missed = 120, 0
    a, b, n, _ = watch(0.2, 0.23, 6_000, tests, 60, 6)
    for x, y in zip(a.tolist(), b.tolist(), strict=True):
        test = SequentialTest(planned=3_000)
        found = [test.update(successes=pair, trials=(k, k)).interval for *pair, k in zip(x, y, n.tolist(), strict=True)]
        missed += any(not low <= 0.03 <= high for low, high in found)
    assert stats.binom.sf(missed - 1, tests, 0.05) > 1e-4


def test_means_are_watched_as_shares_are():
    rng, tests, alarms = np.random.default_rng(7), 100, 0
    for _ in range(tests):
        a, b = rng.exponential(3, (2, 2_000))
        test = SequentialTest(planned=1_000)
        for n in range(40, 2_001, 40):
            values = zip(moments(a[:n]), moments(b[:n]), strict=True)
            found = test.update(**dict(zip(("means", "variances", "trials"), values, strict=True)))
        alarms += found.significant
    assert stats.binom.sf(alarms - 1, tests, 0.05) > 1e-4
    clear = SequentialTest(planned=1_000).update(means=(3, 4), variances=(9, 9), trials=(1_000, 1_000))
    assert clear.significant and not clear.rates and clear.interval[0] > 0 and clear.lift_interval[0] > 0


def test_an_effect_that_turns_round_is_told():
    test = SequentialTest(planned=1_000)
    assert test.update(successes=(100, 400), trials=(1_000, 1_000)).steady
    turned = test.update(successes=(5_000, 700), trials=(8_000, 8_000))
    assert not turned.steady and turned.significant and "changed" in str(turned)
    assert turned.interval[1] < 0, "the interval is the one of now"
    assert not SequentialTest.resume(test.state).update(successes=(5_000, 700), trials=(8_000, 8_000)).steady


def test_nothing_is_said_before_there_is_something_to_say():
    test = SequentialTest()
    none = test.update(successes=(0, 0), trials=(0, 0))
    assert none.p_value == 1 and none.interval == (-1, 1) and not none.significant
    assert test.update(successes=(0, 49), trials=(49, 49)).p_value == 1
    later = SequentialTest(planned=100).update(successes=(0, 60), trials=(60, 60))
    assert later.significant and later.larger == 1
    still = SequentialTest().update(means=(1, 2), variances=(0, 0), trials=(500, 500))
    assert still.p_value == 1 and still.interval == (-math.inf, math.inf), "where nothing varies, nothing can be told"
    assert SequentialTest().update(successes=(3.0, np.int32(4)), trials=np.array([70, 80])).trials == (70, 80)


@pytest.mark.parametrize(
    ("about", "match"),
    [
        ({"successes": (10, 19), "trials": (200, 200)}, "never shrink"),
        ({"successes": (10, 20), "trials": (200, 199)}, "never shrink"),
        ({"successes": (201, 20), "trials": (200, 200)}, "more successes"),
        ({"successes": (-1, 20), "trials": (200, 200)}, "whole number"),
        ({"successes": (math.nan, 20), "trials": (200, 200)}, "whole number"),
        ({"successes": (10, 20, 30), "trials": (200, 200)}, "two arms"),
        ({"successes": 10, "trials": (200, 200)}, "two arms"),
        ({"trials": (200, 200)}, "Give successes"),
        ({"trials": (200, 200), "means": (1, 2)}, "Give successes"),
        ({"trials": (200, 200), "means": (1, 2), "variances": (1, 2)}, "compares shares"),
    ],
)
def test_a_damaged_sequence_raises_and_changes_nothing(about, match):
    test = SequentialTest()
    test.update(successes=(10, 20), trials=(200, 200))
    state = test.state
    with pytest.raises(AbTestError, match=match):
        test.update(**about)
    assert test.state == state
    assert test.update(successes=(11, 20), trials=(200, 200)).trials == (200, 200), "a success may come after its trial"


@pytest.mark.parametrize("about", [{"alpha": 0}, {"alpha": 1}, {"alpha": "x"}, {"planned": 0}, {"planned": -5}, {"least": 1}])
def test_a_sequence_that_cannot_be_set_up(about):
    with pytest.raises(AbTestError):
        SequentialTest(**about)


def test_a_state_that_is_none():
    good = SequentialTest().state
    for wrong in ({}, good | {"alpha": 5}, good | {"trials": [1]}, good | {"interval": 3}, good | {"successes": [5, 5]}):
        with pytest.raises(AbTestError):
            SequentialTest.resume(wrong)


def test_means_and_counts_that_shrink():
    test = SequentialTest()
    test.update(means=(1, 2), variances=(1, 1), trials=(100, 100))
    for about in ({"trials": (99, 100)}, {"trials": (100, 100), "variances": (1, -1)}, {"trials": (100, 100), "means": (math.nan, 1)}):
        with pytest.raises(AbTestError):
            test.update(**{"means": (1, 2), "variances": (1, 1), **about})


def test_the_picture_shows_when_it_was_decided():
    test = SequentialTest(planned=1_000)
    looks = [test.update(successes=(n, 2 * n), trials=(10 * n, 10 * n)) for n in range(1, 120)]
    ax = plot_test(looks)
    assert any("decided at" in text.get_text() for text in ax.get_legend().get_texts())
    plot_test([SequentialTest().update(means=(1, 2), variances=(1, 1), trials=(3, 3))])


# ---- before, between, and instead


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.7, 0.95])
def test_cuped_leaves_one_minus_rho_squared(rho):
    rng = np.random.default_rng(8)
    past = rng.normal(size=20_000)
    now = rho * past + math.sqrt(1 - rho**2) * rng.normal(size=20_000)
    arm = rng.random(20_000) < 0.5
    found = cuped(now + 0.2 * arm, past, arm)
    assert found.ratio == pytest.approx(1 - rho**2, abs=0.02)
    effect = found.values[arm].mean() - found.values[~arm].mean()
    assert abs(effect - 0.2) < 5 * math.sqrt(4 * (1 - rho**2) / 20_000)
    assert found.values.mean() == pytest.approx((now + 0.2 * arm).mean())
    exact = np.corrcoef(now, past)[0, 1]
    assert cuped(now, past).ratio == pytest.approx(1 - exact**2)


def test_cuped_with_several_columns_and_users_without_a_past():
    rng = np.random.default_rng(9)
    x = rng.normal(size=(8_000, 2))
    y = x @ [1.0, -0.5] + rng.normal(size=8_000)
    assert cuped(y, x).ratio == pytest.approx(1 / 2.25, abs=0.02) and cuped(y, x).theta == pytest.approx([1, -0.5], abs=0.05)
    new = rng.random(8_000) < 0.4
    gaps = np.where(new[:, None], np.nan, x)
    some = cuped(y + 3 * new, gaps)
    assert some.ratio == pytest.approx((0.6 + 0.4 * 2.25) / np.var(y + 3 * new), abs=0.03), "new users are a group with a mean of their own"
    assert np.isfinite(some.values).all()
    assert cuped(y, np.full(8_000, np.nan)).ratio == pytest.approx(1), "no past at all: nothing is gained or lost"
    assert cuped(np.ones(5), np.arange(5)).ratio == 1


def test_a_ratio_over_users_is_honest_where_messages_are_not():
    rng, tests = np.random.default_rng(10), 250
    by_user = by_message = 0
    for _ in range(tests):
        sent = rng.geometric(0.2, (2, 400))
        good = rng.binomial(sent, rng.beta(2, 2, (2, 400)))
        by_user += compare_means(*zip(*map(ratio_moments, good, sent), strict=True)).significant
        by_message += compare_rates(good.sum(1), sent.sum(1)).significant
    assert within(by_user, tests, 0.05, 1e-4) and by_message > 2 * 0.05 * tests
    ones = rng.random(500)
    assert ratio_moments(ones, np.ones(500)) == pytest.approx(moments(ones))


def test_thompson_finds_the_better_arm_and_counts_what_it_learns():
    shares, rng, right = {"a": 0.1, "b": 0.3}, np.random.default_rng(11), 0
    for seed in range(20):
        bandit = Thompson(shares, seed)
        for _ in range(20):
            for arm, n in bandit.choose_many(50).items():
                bandit.update(arm, rng.binomial(n, shares[arm]), n)
        assert bandit.trials.sum() == 1_000
        right += bandit.trials[1] > 700
    assert right >= 18
    assert Thompson(["x"]).choose() == "x"
    assert Thompson("ab", 5).choose_many(7) == Thompson("ab", 5).choose_many(7)
    for call in (lambda: bandit.update("z", 1, 2), lambda: bandit.update("a", 3, 2), lambda: Thompson([]), lambda: Thompson(["a", "a"])):
        with pytest.raises(AbTestError):
            call()
