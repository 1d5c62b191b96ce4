"""The cost of a run by arithmetic, before it runs.

The unit is the GFLOP: 1e9 operations, two for each multiply-add of a convolution or a dense layer.
Forward and backward pass of trained networks count as three forward passes, a teacher's pass as
one, and all stages of a method are included; `methods.cost` counts them for one image.
"""

import functools
from typing import NamedTuple

import numpy as np

from tf_pcl import networks
from tf_pcl.data.datasets import ImageData
from tf_pcl.data.storage import Arrays
from tf_pcl.errors import UserError, choose
from tf_pcl.methods import METHODS
from tf_pcl.methods.cost import training_flop
from tf_pcl.methods.distiller import build_all
from tf_pcl.options import Options
from tf_pcl.training.assemble import Assembly, method_arguments
from tf_pcl.training.run import OF_DATA, look_at_data

# The classes of the paper's data sets, so that their costs are known without a download.
_OF_THE_PAPER = {"cifar10": 10, "cifar100": 100}


class StageCost(NamedTuple):
    """A stage of a run and what it costs.

    Attributes:
      name: its name; "" if there is one stage.
      network: the name of the trained network; several are separated by commas.
      gflop: the cost of all its epochs.
      gflop_per_image: the cost of one image in one epoch.
      alone: whether it is independent of the method's own options and of the stages before.
    """

    name: str
    network: str
    gflop: float
    gflop_per_image: float
    alone: bool = False


def cost_of(options: Options) -> float:
    """Returns the cost of the training of a run in GFLOP, all its stages included.

    Args:
      options: the run's options.

    Raises:
      UserError: if the options do not fit together or the data cannot be loaded.
    """
    return sum(stage.gflop for stage in stages_of(options))


def stages_of(options: Options) -> list[StageCost]:
    """Returns the stages of a run with their costs; arguments and errors as in `cost_of`."""
    choose("method", options.method, METHODS, parameter="method")
    method_arguments(options)
    shape, classes, images = _facts(division(options), named=bool(options.teacher))
    seen = images // options.batch_size * options.batch_size * options.epochs
    if not seen:
        raise UserError(
            f"it is more than the {images} training images: give fewer",
            parameter="batch_size",
            value=options.batch_size,
        )
    return [
        StageCost(name, network, flop * seen / 1e9, flop / 1e9, alone)
        for name, network, flop, alone in _flop(_architecture(options), shape, classes)
    ]


def _architecture(options: Options) -> Options:
    """Returns only the options on which the cost of an image depends."""
    own = {**method_arguments(options), "trunk_share": options.trunk_share, "rampup_epochs": None}
    return Options(method=options.method, network=options.network, **own)


def division(options: Options) -> Options:
    """Returns only the options on which the number of training images depends."""
    names = {"dataset", *OF_DATA} - {"seed"}
    return Options(**{name: getattr(options, name) for name in names})


@functools.cache
def _facts(options: Options, named: bool) -> tuple[tuple[int, ...], tuple[str, ...], int]:
    """Returns the shape of a run's images, its classes and its number of training images.

    Args:
      options: what `division` returns for the run's options.
      named: whether the true names of the classes are needed.
    """
    name, held = options.dataset, options.validation_examples or 0
    if name in _OF_THE_PAPER and not options.image_size and not named:
        images = 50_000 - round(held if held >= 1 else held * 50_000)
        classes = tuple(map(str, range(_OF_THE_PAPER[name])))
        return (32, 32, 3), classes, min(images, options.train_examples or images)
    shape, looked = look_at_data(options)
    return shape, tuple(looked.classes), len(looked.train)


@functools.cache
def _flop(
    options: Options, shape: tuple[int, ...], classes: tuple[str, ...]
) -> list[tuple[str, str, float, bool]]:
    """Returns (name, network, FLOP per image, alone) of each stage of a run on such images."""
    several = options.network.split(",")
    for network in several:
        networks.find(network)
    # The pixels do not matter.
    noise = np.random.RandomState(0).randint(0, 256, (4, *shape)).astype(np.uint8)
    images = Arrays(noise, np.arange(4) % len(classes))
    means, deviations = (128.0,) * shape[-1], (64.0,) * shape[-1]
    data = ImageData("noise", classes, shape, images, images, means, deviations)
    stages = METHODS[options.method].stages(
        Assembly(data, trunk_share=options.trunk_share),
        several if len(several) > 1 else several[0],
        **method_arguments(options),
    )
    found: list[tuple[str, str, float, bool]] = []
    for stage, model in zip(stages, build_all(stages)):
        trained = stage.network if isinstance(stage.network, list) else [stage.network]
        found.append((stage.name, ",".join(trained), training_flop(model), stage.alone))
    return found
