"""Statistics of differences over several seeds, or over the test images of two networks."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Optional

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
# The bootstrap's samples. The ends of its interval vary by about 1 % of its width then.
_SAMPLES = 10_000
# How far equal differences of errors may lie apart, since these are rounded to four digits.
_EQUAL = 2.001e-4


class Summary(NamedTuple):
    """The mean of some values.

    Attributes:
      size: how many values there are, at least 1.
      mean: their mean.
      deviation: the sample standard deviation, with size − 1 in the denominator; None for one
        value.
    """

    size: int
    mean: float
    deviation: Optional[float]


class Difference(NamedTuple):
    """The mean of paired differences, and its confidence interval.

    Attributes:
      size: how many pairs there are.
      mean: the mean difference, first minus second.
      low, high: the ends of its confidence interval; None if there is none.
    """

    size: int
    mean: float
    low: Optional[float] = None
    high: Optional[float] = None

    @property
    def clear(self) -> Optional[bool]:
        """Whether the interval excludes 0; None if there is no interval."""
        if self.low is None or self.high is None:
            return None
        return self.low > 0 or self.high < 0

    @property
    def verdict(self) -> str:
        """The verdict: "more than noise", "within noise" or "not known"."""
        return {True: "more than noise", False: "within noise", None: "not known"}[self.clear]


class McNemar(NamedTuple):
    """McNemar's exact test of two classifiers on the same images.

    Attributes:
      first_only: how many images the first alone gets right.
      second_only: how many the second alone gets right.
      p: the probability, if both were equally good, of a split at least as uneven; in (0, 1].
    """

    first_only: int
    second_only: int
    p: float


def summary(values: Iterable[float]) -> Summary:
    """Returns the Summary of at least one value."""
    values = list(values)
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Summary(len(values), float(np.mean(values)), deviation)


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Optional[Difference]:
    """Compares two settings over the seeds that both have.

    The interval is that of Student's t for paired values, which assumes that the differences are
    normally distributed over seeds. There is none for one seed, nor if all differences are equal,
    which happens by chance with few seeds: it would have no width.

    Args:
      first, second: {seed: error}.

    Returns:
      The Difference of first − second, or None if no seed is in both.
    """
    differences = np.array([first[s] - second[s] for s in sorted({*first} & {*second})])
    if not len(differences):
        return None
    mean = float(np.mean(differences))
    if len(differences) < 2 or np.ptp(differences) < _EQUAL:
        return Difference(len(differences), mean)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1) * stats.sem(differences)
    return Difference(len(differences), mean, float(mean - half), float(mean + half))


def mcnemar(first: np.ndarray, second: np.ndarray) -> McNemar:
    """Tests whether two classifiers differ on the same images.

    Args:
      first, second: bool [N], whether each gets the image right.
    """
    a, b = int(np.sum(first & ~second)), int(np.sum(second & ~first))
    p = stats.binomtest(a, a + b, 0.5).pvalue if a + b else 1.0
    return McNemar(a, b, float(p))


def bootstrap(first: np.ndarray, second: np.ndarray, seed: int = 0) -> Difference:
    """Compares two settings over test images, which are drawn anew with replacement.

    The interval shows how much other test images could change the difference between these
    networks. It says nothing about other seeds.

    Args:
      first, second: [N], each image's error: 0 or 1, or the share of seeds that get it wrong.
      seed: the seed of the draws.

    Returns:
      The Difference of first − second in percent; its interval holds the middle 95 % of the draws.
    """
    each = 100.0 * (np.asarray(first, np.float64) - np.asarray(second, np.float64))
    # A draw depends only on how often each value occurs.
    values, counts = np.unique(each, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(each), counts / len(each), _SAMPLES)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(drawn @ values / len(each), [tail, 100 - tail])
    return Difference(len(each), float(np.mean(each)), float(low), float(high))
