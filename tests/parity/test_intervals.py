"use.intervals against enumeration, a root finder, and scipy where it is installed"
import math
from itertools import product

import numpy as np
import pytest

from llmbench.use.intervals import (Scores, bootstrap_interval, chance_level, effective_n, group_sums, paired_difference, seed_interval, sum_up, wilson_interval)

CASES = [(k, n) for n in (1, 7, 20, 100, 1319) for k in {0, 1, n//3, n - 1, n}]


def root(f, low, high):
    "Bisection"
    for _ in range(100):
        middle = (low + high)/2
        if (f(low) < 0) == (f(middle) < 0): low = middle
        else: high = middle
    return middle


def wilson_by_roots(k, n, z):
    "The shares p at which k of n lies exactly z standard errors away, the standard error being that of p"
    p = k/n
    low  = 0. if k == 0 else root(lambda q: (p - q) - z*math.sqrt(q*(1 - q)/n), 0., min(p, 1 - 1e-12))
    high = 1. if k == n else root(lambda q: (q - p) - z*math.sqrt(q*(1 - q)/n), max(p, 1e-12), 1.)
    return low, high


def test_wilson_by_roots(ledger):
    error = 0.
    for level, z in ((.95, 1.959963984540054), (.8, 1.2815515655446004)):
        for k, n in CASES: error = max(error, *np.abs(np.subtract(wilson_interval(k, n, level), wilson_by_roots(k, n, z))))
    ledger("Wilson interval", "bisection of its definition", error, 1e-9)


def test_wilson_scipy(ledger):
    stats = pytest.importorskip("scipy.stats")
    error = 0.
    for k, n in CASES:
        theirs = stats.binomtest(k, n).proportion_ci(.95, method="wilson")
        error = max(error, *np.abs(np.subtract(wilson_interval(k, n), (theirs.low, theirs.high))))
    ledger("Wilson interval", "scipy.stats.binomtest", error, 1e-9)


def coverage(interval, n, truth):
    outcomes = [math.comb(n, k)*truth**k*(1 - truth)**(n - k) for k in range(n + 1)]
    return sum(p for k, p in enumerate(outcomes) if interval(k, n)[0] - 1e-12 <= truth <= interval(k, n)[1] + 1e-12)


@pytest.mark.parametrize("n", [20, 100])
def test_wilson_keeps_its_promise_on_average(n):
    "Exact coverage over true shares from 0.5 to 0.99: mean within a point of 95 %, never under 89 % (textbook: mean 86 %, worst 18 % at n = 20)"
    table = {k: wilson_interval(k, n) for k in range(n + 1)}
    found = [coverage(lambda k, n: table[k], n, p) for p in np.linspace(.5, .99, 99)]
    assert abs(np.mean(found) - .95) < .01 and min(found) > .89


def resamples(values, weights=None):
    "All means of resamples, by enumeration"
    n, weights = len(values), np.ones(len(values)) if weights is None else np.asarray(weights, float)
    draws = [list(d) for d in product(range(n), repeat=n)]
    return np.array([np.dot(np.asarray(values)[d], weights[d])/weights[d].sum() for d in draws])


def test_bootstrap_enumerated(ledger):
    "Five different values have 3,125 resamples; 40,000 draws come near their quantiles, weighted or not"
    values, weights, error = [.1, .25, .4, .75, 1.], [3., 1., 7., 2., 5.], 0.
    for w in (None, weights):
        for level in (.95, .8):
            exact = np.quantile(resamples(values, w), [(1 - level)/2, (1 + level)/2])
            error = max(error, *np.abs(np.subtract(bootstrap_interval(values, level, draws=40_000, weights=w), exact)))
    ledger("bootstrap interval", "all 3,125 resamples", error, .02)


def test_bootstrap_binomial_quantiles():
    "For marks of 0 and 1 the resampled mean is binomial: its quantiles are exact for any seed"
    for k, n in ((18, 20), (50, 100), (93, 100)):
        pmf = [math.comb(n, j)*(k/n)**j*(1 - k/n)**(n - j) for j in range(n + 1)]
        exact = [np.searchsorted(np.cumsum(pmf), q)/n for q in (.025, .975)]
        for seed in (0, 1):
            got = bootstrap_interval([0]*(n - k) + [1]*k, seed=seed, draws=20_000)
            assert np.abs(np.subtract(got, exact)).max() <= 1/n + 1e-9


def test_cluster_bootstrap_enumerated(ledger):
    "Four groups of unequal size: whole groups are drawn, the mean is over questions"
    values, groups = [1, 1, 0, .5, 0, 0, 1, .25, .75], ["a", "a", "b", "b", "b", ("c", 1), 4, 4, 4]
    sums, counts = group_sums(values, groups)
    assert sums.tolist() == [2, .5, 0, 2] and counts.tolist() == [2, 3, 1, 3]
    exact = np.quantile(resamples(sums/counts, counts), [.05, .95])
    error = np.abs(np.subtract(bootstrap_interval(values, .9, draws=40_000, groups=groups), exact)).max()
    ledger("cluster bootstrap", "all 256 resamples of groups", error, .02)


def test_bootstrap_scipy(ledger):
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(5).beta(2, 5, 300)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)).confidence_interval
    error = np.abs(np.subtract(bootstrap_interval(values, draws=20_000), (theirs.low, theirs.high))).max()
    ledger("bootstrap interval", "scipy.stats.bootstrap", error, .001)


def test_bootstrap_seeded_and_in_blocks():
    "The same seed gives the same interval, another a slightly different one; many values are drawn in blocks of bounded memory"
    values = np.random.default_rng(6).random(3000)
    assert bootstrap_interval(values, seed=4) == bootstrap_interval(values, seed=4) != bootstrap_interval(values, seed=5)
    low, high = bootstrap_interval(values)
    assert abs((high - low)/2 - 1.96*values.std()/math.sqrt(3000)) < .001


def test_paired_difference_enumerated(ledger):
    a, b = [1., .5, 0., .75, 1.], [0., .25, .5, .5, 1.]
    difference = [1., .25, -.5, .25, 0.]
    exact = (.2, *np.quantile(resamples(difference), [.025, .975]))
    ledger("paired difference", "all 3,125 resamples", np.abs(np.subtract(paired_difference(a, b), exact)).max(), .05)


def test_effective_n_by_hand():
    "Groups that stand or fall together count as one each (less one for the mean); groups that all look the same leave every question"
    assert effective_n([1, 1, 0, 0, 1, 1, 1, 1], list("aabbccdd")) == pytest.approx(3)
    assert effective_n([1, 0, 1, 0, 1, 0], list("aabbcc")) == 6
    assert effective_n([1]*6, list("aabbcc")) == 3
    assert effective_n([1, 0, 1], list("aaa")) == 1
    # sizes 3 and 1, marks 1 1 0 | 1: mean 3/4, residuals 2 - 9/4 and 1 - 3/4; var 3/16, n_eff = 3/16*16*(1/2)/(2/16) = 12, capped at 4
    assert effective_n([1, 1, 0, 1], list("aaab")) == 4
    # marks 1 1 1 | 0: residuals 3/4 and -3/4; var 3/16, n_eff = 3/16*16/2/(18/16) = 4/3
    assert effective_n([1, 1, 1, 0], list("aaab")) == pytest.approx(4/3)


@pytest.mark.parametrize("truth", [.5, .8, .9])
def test_grouped_interval_keeps_its_promise(truth):
    "25 facts asked in 4 phrasings that stand or fall together, exact coverage: about 95 %, where 100 independent questions would promise too much"
    def naive(k, n): return wilson_interval(4*k, 4*n)
    def grouped(k, n):
        told = sum_up(np.repeat([1, 0], [k, n - k]).repeat(4), groups=np.arange(n).repeat(4).tolist())
        return told.low, told.high
    assert coverage(naive, 25, truth) < .75 < .92 < coverage(grouped, 25, truth)


def test_chance_level_is_the_best_constant():
    "Against trying every constant answer for each kind"
    golds, kinds = list("aabbbccca"), list("xxxyyyyyx")
    best = sum(max(sum(g == guess for g, k in zip(golds, kinds) if k == kind) for guess in "abc") for kind in "xy")/9
    assert chance_level(golds, kinds) == best and chance_level(golds) == 3/9
    assert chance_level(5) == .2 and chance_level([2, 4]) == .375


def test_scores():
    told = sum_up([True, True, False, True], "quiz", .25)
    assert told == Scores("quiz", 4, 3., .75, *wilson_interval(3, 4), .25, .95)
    assert str(told) == repr(told) == "quiz: 75.0% [30.1%, 95.4%] of 4, chance 25.0%"
    assert "chance level unknown" in str(sum_up([1.]))
    assert (sum_up([1, 0, 1], level=.8).low, sum_up([1, 0, 1], level=.8).level) == (wilson_interval(2, 3, .8)[0], .8)
    graded = sum_up([.5, 1., 0.], level=.8)
    assert (graded.low, graded.high) == bootstrap_interval([.5, 1., 0.], .8) and graded.accuracy == .5


@pytest.mark.parametrize("n", range(2, 11))
def test_seeds_by_scipy(n, ledger):
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(n).normal(3, 2, n)
    low, high = stats.t.interval(.95, n - 1, values.mean(), stats.sem(values))
    mean, half = seed_interval(values)
    ledger(f"Student's interval over {n} seeds", "scipy.stats.t", max(abs(mean - half - low), abs(mean + half - high))/(high - low), 1e-4)


def test_seeds_by_hand():
    assert seed_interval([.90, .93, .96]) == pytest.approx((.93, 4.303*.03/3**.5))  # mean .93, deviation .03
    assert seed_interval([.9]) == (.9, 0.)
