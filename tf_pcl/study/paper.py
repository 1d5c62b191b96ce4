"""What the tables of Wu and Gong (AAAI 2021) say, and how a run differs from their protocol."""

import csv
import functools
import importlib.resources
import re
from typing import NamedTuple, Optional

from tf_pcl.options import Options
from tf_pcl.study.runs import settings_of

_FOLDER = importlib.resources.files("tf_pcl") / "paper"
_OF_NETWORKS = {"cifar10": "table1_cifar10.csv", "cifar100": "table2_cifar100.csv"}
_TWO_STAGES = ("resnet32", "two_stage_resnet32.csv")


class Figure(NamedTuple):
    """An entry of a table.

    Attributes:
      mean: test error in percent.
      deviation: the deviation over three runs.
    """

    mean: float
    deviation: float


def figure(method: str, network: str, dataset: str) -> Optional[Figure]:
    """Returns what the paper says of a method, or None where it says nothing."""
    return _figures().get((method, network, dataset))


def departures(options: Options) -> list[str]:
    """Returns "name=here (there in the paper)" of each setting that the paper has otherwise.

    Args:
      options: the options of a run whose method, network and data set are in the paper. The
        defaults of Options are the paper's recipe.
    """
    recipe = Options(method=options.method, network=options.network, dataset=options.dataset)
    here, there = settings_of(options), settings_of(recipe)
    return [
        f"{name}={here.get(name, 'default')} ({there.get(name, 'default')} in the paper)"
        for name in dict.fromkeys([*here, *there])
        if here.get(name) != there.get(name)
    ]


@functools.cache
def _figures() -> dict[tuple[str, str, str], Figure]:
    """Returns {(method, network, data set): Figure}."""
    found = {}
    for dataset, name in _OF_NETWORKS.items():
        for network, method, text in _cells(name):
            found[method, network, dataset] = _figure(text)
    network, name = _TWO_STAGES
    for dataset, method, text in _cells(name):
        found[method, network, dataset] = _figure(text)
    return found


def _cells(name: str) -> list[tuple[str, str, str]]:
    """Returns (row's name, column's name, text) of a table."""
    lines = (_FOLDER / name).read_text(encoding="utf-8").splitlines()
    (_, *columns), *rows = csv.reader(line for line in lines if not line.startswith("#"))
    return [(row[0], column, cell) for row in rows for column, cell in zip(columns, row[1:])]


def _figure(text: str) -> Figure:
    match = re.fullmatch(r"([\d.]+)±([\d.]+)", text)
    assert match, text
    return Figure(float(match[1]), float(match[2]))
