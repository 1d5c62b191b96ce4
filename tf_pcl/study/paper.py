"""The tables of Wu and Gong (AAAI 2021), and how a run departs from their protocol."""

import csv
import functools
import importlib.resources
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, Optional

from tf_pcl.options import Options
from tf_pcl.training.beside import settings_of

_FOLDER = importlib.resources.files("tf_pcl") / "paper"
# The tables by name: a file has a column for each method, and a first column of networks or data
# sets.
TABLES = {
    "1": ("table1_cifar10.csv", {"dataset": "cifar10"}),
    "2": ("table2_cifar100.csv", {"dataset": "cifar100"}),
    "two_stage": ("two_stage_resnet32.csv", {"network": "resnet32"}),
}
# The sizes of all these data sets.
_SHAPE, _TRAINING, _TEST = [32, 32, 3], 50_000, 10_000


class Figure(NamedTuple):
    """An entry of a table.

    Attributes:
      mean: test error in percent.
      deviation: the deviation over three runs.
    """

    mean: float
    deviation: float


def figure(method: str, network: str, dataset: Optional[str]) -> Optional[Figure]:
    """Returns the paper's figure for a method; None if it has none.

    Args:
      method: its name.
      network: the network's name.
      dataset: the name of the data set in the tables; None if they do not have it.
    """
    return _figures().get((method, network, dataset or ""))


def known_as(options: Options, data: Mapping[str, Any]) -> Optional[str]:
    """Returns the name of a run's data set in the tables; None if they do not have it.

    A folder of images, or another data set, is recognised by its classes, and by the size and the
    number of its images.

    Args:
      options: the run's options.
      data: the contents of its data.json.
    """
    if options.dataset in _classes():
        return options.dataset
    training = data.get("training images", 0) + data.get("validation images", 0)
    whole = training == _TRAINING or options.train_examples
    if data.get("image_shape") != _SHAPE or data.get("test images") != _TEST or not whole:
        return None
    classes = {re.sub("[ -]", "_", name.lower()) for name in data.get("classes", [])}
    return next((name for name, its in _classes().items() if its == classes), None)


def departures(options: Options) -> list[str]:
    """Returns "name=here (there in the paper)" for each setting that differs from the paper's.

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


def entries(table: str) -> list[tuple[dict[str, str], str]]:
    """Returns ({"method", "network", "dataset"}, text) of each entry of one of TABLES."""
    file, common = TABLES[table]
    (key, *methods), *rows = _lines(file)
    return [
        ({**common, key: name, "method": method}, text)
        for name, *texts in rows
        for method, text in zip(methods, texts)
    ]


@functools.cache
def _figures() -> dict[tuple[str, str, str], Figure]:
    """Returns {(method, network, data set): Figure}."""
    return {
        (of["method"], of["network"], of["dataset"]): _figure(text)
        for name in TABLES
        for of, text in entries(name)
    }


@functools.cache
def _classes() -> dict[str, set[str]]:
    """Returns {data set: names of its classes}."""
    return {name: set(classes) for name, *classes in _lines("classes.csv")}


def _lines(name: str) -> list[list[str]]:
    """Returns the cells of each line of a file beside the tables."""
    lines = (_FOLDER / name).read_text(encoding="utf-8").splitlines()
    return list(csv.reader(line for line in lines if not line.startswith("#")))


def _figure(text: str) -> Figure:
    match = re.fullmatch(r"([\d.]+)±([\d.]+)", text)
    assert match, text
    return Figure(float(match[1]), float(match[2]))
