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
      at: what they have in common, "equal epochs" or "equal cost"; "" for neither.
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
    that costs as much, whose schedule may differ. Without a baseline, every group is compared with
    the first.

    Args:
      section: the section.
      costs: {label of a group: training cost in GFLOP, or None}.
    """
    baselines = [group for group in section.groups if group.is_baseline]
    found = []
    for group in section.groups:
        same = [b for b in baselines if b is not group and _alike(group, b, set())]
        equal = [
            b
            for b in baselines
            if b is not group and _alike(group, b, _SCHEDULE) and _apart(group, b, costs) < _NEAR
        ]
        found += [_compared(group, b, "equal epochs") for b in same if not group.is_baseline]
        if not group.is_baseline and equal:
            nearest = min(equal, key=lambda b: _apart(group, b, costs))
            found.append(_compared(group, nearest, "equal cost"))
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


def _apart(group: Group, other: Group, costs: Mapping[str, Optional[float]]) -> float:
    """Returns by which share of the first's cost two groups differ; inf if one is not known."""
    mine, theirs = costs.get(group.label), costs.get(other.label)
    return abs(theirs / mine - 1) if mine and theirs else np.inf


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
