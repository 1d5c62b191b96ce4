"""Statistics of several runs, against SciPy, NumPy and figures that can be worked out by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from tf_pcl.study import statistics

RNG = np.random.default_rng(3)


def test_mean_and_deviation_are_those_of_a_sample():
    assert statistics.summary([2, 4, 4, 4, 5, 5, 7, 9]) == (8, 5.0, pytest.approx(2.13808994))
    assert statistics.summary([7.5]) == (1, 7.5, None)


def test_the_paired_interval_is_students():
    """Student's own example: ten patients' hours of sleep with two drugs (1908)."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = statistics.paired(dict(enumerate(second)), dict(enumerate(first)))
    assert found.size == 10 and found.mean == pytest.approx(1.58)
    assert (found.low, found.high) == pytest.approx((0.7001142, 2.4598858))
    assert found.clear and found.verdict == "more than noise"
    # The interval leaves out 0 where the test's p is below 0.05.
    for shift in (0.0, 1.0, 3.0):
        a, b = RNG.normal(shift, 1, 6), RNG.normal(0, 1, 6)
        mine = statistics.paired(dict(enumerate(a)), dict(enumerate(b)))
        assert mine.clear == (stats.ttest_rel(a, b).pvalue < 0.05)


def test_only_common_seeds_are_paired():
    found = statistics.paired({0: 5.0, 1: 6.0, 7: 99.0}, {0: 4.0, 1: 4.0, 2: -99.0})
    assert (found.size, found.mean) == (2, 1.5)
    # Two seeds: t is 12.7062, the standard error is 0.5.
    assert (found.low, found.high) == pytest.approx((1.5 - 6.3531, 1.5 + 6.3531), abs=1e-4)
    assert found.verdict == "within noise"
    assert statistics.paired({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize("first", [{0: 5.0}, {0: 5.0, 1: 6.0, 2: 7.0}])
def test_one_seed_or_equal_differences_say_nothing(first):
    found = statistics.paired(first, {seed: error - 2 for seed, error in first.items()})
    assert found.mean == 2 and found.low is None
    assert found.clear is None and found.verdict == "not known"


def test_rounding_makes_equal_differences_no_others():
    """One image of 360 in each pair, as results.json has it: 0.8333 − 0.5556 is not 0.2778."""
    wrong = {0: (3, 2), 1: (19, 18), 2: (20, 19)}
    first, second = ({s: round(100 * w[k] / 360, 4) for s, w in wrong.items()} for k in (0, 1))
    assert len({round(first[s] - second[s], 6) for s in wrong}) == 2
    found = statistics.paired(first, second)
    assert found.low is None and found.verdict == "not known"
    # One image of 100,000 is a difference.
    assert statistics.paired({0: 5.001, 1: 5.0}, {0: 4.0, 1: 4.0}).verdict == "more than noise"


@pytest.mark.parametrize(("a", "b"), [(1, 5), (12, 3), (4, 4), (0, 3), (0, 0)])
def test_mcnemar_is_a_coin_thrown_for_each_image_that_differs(a, b):
    first = np.array([True] * a + [False] * b + [True] * 20 + [False] * 7)
    second = np.array([False] * a + [True] * b + [True] * 20 + [False] * 7)
    n = a + b
    tail = sum(math.comb(n, k) for k in range(min(a, b) + 1)) / 2**n
    found = statistics.mcnemar(first, second)
    assert found == (a, b, pytest.approx(min(1, 2 * tail)))


def test_the_bootstrap_agrees_with_drawing_images_one_by_one():
    first = (RNG.random(400) < 0.20).astype(float)
    second = (RNG.random(400) < 0.12).astype(float)
    drawn = RNG.integers(0, 400, (4000, 400))
    low, high = np.percentile(100 * (first[drawn].mean(1) - second[drawn].mean(1)), [2.5, 97.5])
    found = statistics.bootstrap(first, second)
    assert found.mean == pytest.approx(100 * (first.mean() - second.mean()))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.35)
    assert found == statistics.bootstrap(first, second)
    assert statistics.bootstrap(first, first)[1:] == (0, 0, 0)
