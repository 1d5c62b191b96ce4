"""Data sets by name: the table DATASETS and load(name) -> ImageData.

A name that is not in the table is looked up in tensorflow-datasets. How the images of a split are
kept depends on their size: in memory up to 4 GiB (storage.Arrays), else as files that are read when
they are needed (storage.Files) or, from tensorflow-datasets, as a stream (storage.Stream).
"""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Callable, Optional

import numpy as np

from tf_pcl.data import digits, from_tfds, image_folder, tiny_imagenet
from tf_pcl.data.class_names import escape
from tf_pcl.data.storage import Arrays, Split, Stream
from tf_pcl.errors import UserError, choose

# A channel that varies less over all images, on the scale 0–255, holds little but the noise of
# rounding and compression, which standardisation must not blow up.
LEAST_DEVIATION = 8.0


@dataclasses.dataclass(frozen=True)
class ImageData:
    """A data set of labelled images.

    Args:
      name: the name that it was asked for by.
      classes: the names of the classes in the order of the labels.
      image_shape: (H, W, C) of every image.
      train: the training images.
      test: the test images.
      mean: the mean of each channel on the scale 0–255, over the training images (over the first
        10,000 where they are not in memory).
      std: the standard deviation of each channel on the same scale, at least 1.
      flip: whether a mirrored image keeps its class.
    """

    name: str
    classes: tuple
    image_shape: tuple
    train: Split
    test: Split
    mean: tuple
    std: tuple
    flip: bool = True


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A row of DATASETS: how a data set or a family of them is loaded, and what is said of it.

    Args:
      load: a function (data_dir, image_size, on_bad_image) -> (names of the classes, training
        images, test images).
      summary: what it is, in a few words.
      folder: what its `data_dir` is; None if it takes none.
      needs_folder: whether it cannot do without a `data_dir`.
      reads_files: whether it reads image files, so that `on_bad_image` applies.
      flip: whether a mirrored image keeps its class.
    """

    load: Callable[..., tuple[Sequence[str], Split, Split]]
    summary: str
    folder: Optional[str] = None
    needs_folder: bool = False
    reads_files: bool = False
    flip: bool = True


DATASETS = {
    "digits": Dataset(
        digits.load, "8×8 handwritten digits, which come with scikit-learn", flip=False
    ),
    "image_folder": Dataset(
        image_folder.load,
        "your own images",
        folder=f"a folder of {image_folder.LAYOUT}",
        needs_folder=True,
        reads_files=True,
    ),
    "tiny_imagenet": Dataset(
        tiny_imagenet.load,
        "200 classes of 64×64 photos",
        folder=tiny_imagenet.FOLDER,
        needs_folder=True,
        reads_files=True,
    ),
}
# The row of every name that is not in the table; `find` completes it.
OTHER_NAMES = Dataset(
    from_tfds.load,
    "an image-classification data set of tensorflow-datasets, such as cifar10 or cifar100",
    folder="where tensorflow-datasets keeps its data sets",
)


def find(name: str) -> Dataset:
    """Returns the row of a data set; a name that is not in the table is tensorflow-datasets'.

    Raises:
      UserError: if there is no such data set.
    """
    if name in DATASETS:
        return DATASETS[name]
    base = choose("data set", from_tfds.base_name(name), [*DATASETS, *from_tfds.names()])
    return dataclasses.replace(
        OTHER_NAMES,
        load=functools.partial(from_tfds.load, name),
        flip=base not in from_tfds.UNMIRRORED,
    )


def described() -> dict[str, Dataset]:
    """Returns the rows of DATASETS and, as "any other name", that of tensorflow-datasets."""
    return {**DATASETS, "any other name": OTHER_NAMES}


def load(
    name: str,
    data_dir: Optional[str] = None,
    image_size: Optional[int] = None,
    train_examples: Optional[int] = None,
    seed: int = 0,
    on_bad_image: str = "fail",
) -> ImageData:
    """Loads a data set; nothing is written if it is refused.

    Args:
      name: one of DATASETS, or an image-classification data set that tensorflow-datasets lists.
      data_dir: the folder of the data; what it holds is said in DATASETS. For tensorflow-datasets
        it is the folder where prepared data sets are kept.
      image_size: cut images to a square in their middle and resize it to this many pixels a side;
        it is needed where images differ in size.
      train_examples: use only the first so many of a permutation of the training images.
      seed: the seed of this permutation.
      on_bad_image: what to do with image files that cannot be read: "fail", or "skip" to leave
        them out. "skip" is for the data sets that read image files.

    Returns:
      An ImageData. What was found in image files is printed.

    Raises:
      UserError: if there is no such data set, it cannot be had, or its images cannot be used.
    """
    row = _checked(name, data_dir, on_bad_image)
    classes, train, test = row.load(data_dir, image_size, on_bad_image)
    if len(classes) < 2:
        raise UserError(
            f"the data set {name} has {len(classes)} class ({', '.join(map(escape, classes))}): at "
            "least 2 are needed"
        )
    if train_examples:
        train = _subset(train, name, train_examples, seed)
    sample = train.first(len(train) if isinstance(train, Arrays) else 10000)
    mean, std = _mean_and_std(sample)
    return ImageData(name, tuple(classes), sample.shape[1:], train, test, mean, std, row.flip)


def _checked(name: str, data_dir: Optional[str], on_bad_image: str) -> Dataset:
    """Returns the row of a data set that goes with the other parameters; UserError if none does."""
    if data_dir and not os.path.isdir(data_dir):
        raise UserError(
            "it is not there: give an existing folder", parameter="data_dir", value=data_dir
        )
    choose("on_bad_image", on_bad_image, ("fail", "skip"), parameter="on_bad_image")
    row = find(name)
    if on_bad_image == "skip" and not row.reads_files:
        readers = ", ".join(known for known, other in DATASETS.items() if other.reads_files)
        raise UserError(
            f"it does not go with the data set {name}: it is for {readers}",
            parameter="on_bad_image",
            value=on_bad_image,
        )
    if data_dir and not row.folder:
        raise UserError(
            f"it does not go with the data set {name} ({row.summary}): leave it out",
            parameter="data_dir",
            value=data_dir,
        )
    if row.needs_folder and not data_dir:
        raise UserError(f"the data set {name} needs `data_dir`, {row.folder}")
    return row


def _subset(train: Split, name: str, count: int, seed: int) -> Split:
    if count > len(train):
        problem = f"it is more than the {len(train)} training images of {name}"
    elif isinstance(train, Stream):
        problem = (
            f"it is not possible with {name}, which is too large for memory and is read in order"
        )
    else:
        return train.subset(np.random.RandomState(seed).permutation(len(train))[:count])
    raise UserError(problem, parameter="train_examples", value=count)


def _mean_and_std(images: np.ndarray) -> tuple[tuple, tuple]:
    """Returns mean and standard deviation (at least 1) by channel of images uint8 [N, H, W, C]."""
    # Counting the 256 values is exact and needs no float copy of the images.
    counts = [np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[-1])]
    means = [np.average(np.arange(256), weights=n) for n in counts]
    stds = [
        max(LEAST_DEVIATION, np.average((np.arange(256) - m) ** 2, weights=n) ** 0.5)
        for m, n in zip(means, counts)
    ]
    return tuple(means), tuple(stds)
