"""Compares the groups of a section at equal epochs and at equal cost."""

from collections.abc import Mapping
from typing import NamedTuple, Optional

import numpy as np

from tf_pcl.methods import METHODS
from tf_pcl.study import statistics
from tf_pcl.study.runs import Group, Section
from tf_pcl.study.statistics import Difference, McNemar

# Costs that differ by less count as equal: a run has a whole number of epochs.
_NEAR = 0.1
# Options that may differ between groups that are compared at equal cost: the schedule's length.
_SCHEDULE = {"epochs", "lr_decay_epochs", "rampup_epochs"}


class Comparison(NamedTuple):
    """Two groups on the same test set.

    Attributes:
      group, against: the groups.
      at: "equal epochs", "equal cost", or "higher cost" if `against` costs more; "" for none.
      seeds: the difference of the deployed errors over common seeds, in points; None if no seed is
        common.
      images: the same over test images, a mean over those seeds, if predictions are stored.
      mcnemar: {seed: McNemar's test}, if predictions are stored.
    """

    group: Group
    against: Group
    at: str
    seeds: Optional[Difference]
    images: Optional[Difference]
    mcnemar: Mapping[int, McNemar]


def compare(section: Section, costs: Mapping[str, Optional[float]]) -> list[Comparison]:
    """Returns the comparisons that a section allows.

    Every group is compared with the baseline that has the same other settings, and with the one
    that costs as much, whose schedule may differ. If none does, it is compared with the cheapest of
    those that cost more. Without a baseline, every group is compared with the first.

    Args:
      section: the section.
      costs: {label of a group: training cost in GFLOP, or None}.
    """
    baselines = [group for group in section.groups if group.is_baseline]
    found = []
    for group in section.groups:
        if group.is_baseline:
            continue
        same = [b for b in baselines if _alike(group, b, set())]
        ratios = [(_ratio(b, group, costs), b) for b in baselines if _alike(group, b, _SCHEDULE)]
        equal = [(abs(ratio - 1), b) for ratio, b in ratios if abs(ratio - 1) < _NEAR]
        higher = [(ratio, b) for ratio, b in ratios if ratio > 1]
        found += [_compared(group, b, "equal epochs") for b in same]
        if equal or higher:
            nearest = min(equal or higher, key=lambda one: one[0])[1]
            found.append(_compared(group, nearest, "equal cost" if equal else "higher cost"))
    if not baselines:
        first, *others = section.groups
        found = [_compared(group, first, "") for group in others]
    return found


def _alike(group: Group, other: Group, but: set[str]) -> bool:
    """Returns whether two groups have the same settings, except for the method and `but`."""
    own = {"method", *but}
    for one in (group, other):
        own |= set(METHODS[one.options.method].parameters()) - {"network", "preprocess"}
    names = {*group.settings, *other.settings} - own
    return all(group.settings.get(name) == other.settings.get(name) for name in names)


def _ratio(group: Group, other: Group, costs: Mapping[str, Optional[float]]) -> float:
    """Returns the cost of a group divided by that of another; NaN if one is not known."""
    mine, theirs = costs.get(group.label), costs.get(other.label)
    return mine / theirs if mine and theirs else np.nan


def _compared(group: Group, against: Group, at: str) -> Comparison:
    seeds = statistics.paired(group.errors(), against.errors())
    wrong, tests = [], {}
    for seed in sorted({*group.runs} & {*against.runs}):
        mine, theirs = (g.runs[seed].predictions() for g in (group, against))
        if mine and theirs and np.array_equal(mine[0], theirs[0]):
            first, second = (logits.argmax(-1) == labels for labels, logits in (mine, theirs))
            tests[seed] = statistics.mcnemar(first, second)
            wrong.append([~first, ~second])
    images = statistics.bootstrap(*np.mean(wrong, 0)) if wrong else None
    return Comparison(group, against, at, seeds, images, tests)
