"""Data sets by name: the table DATASETS and load(name) -> ImageData.

A name that is not in the table is looked up in tensorflow-datasets. How the images of a split are
kept depends on their size: in memory up to 4 GiB (storage.Arrays), else as files that are read when
they are needed (storage.Files) or, from tensorflow-datasets, as a stream (storage.Stream).
"""

import collections
import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, Callable, Optional, Union

import numpy as np

from tf_pcl.data import digits, from_tfds, image_files, image_folder, storage, tiny_imagenet
from tf_pcl.data.class_names import escape
from tf_pcl.data.splits import Loaded, Request, hold_out
from tf_pcl.data.storage import Arrays, Origin, Reading, Split, Stream
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
      validation: images that are neither trained nor tested on, by which an epoch can be chosen;
        None if there are none.
      lists: where files were divided by `load`, {split: their paths below the folder}.
    """

    name: str
    classes: tuple
    image_shape: tuple
    train: Split
    test: Split
    mean: tuple
    std: tuple
    flip: bool = True
    validation: Optional[Split] = None
    lists: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A row of DATASETS: how a data set or a family of them is loaded, and what is said of it.

    Args:
      load: a function splits.Request -> splits.Loaded.
      summary: what it is, in a few words.
      folder: what its `data_dir` is; None if it takes none.
      needs_folder: whether it cannot do without a `data_dir`.
      reads_files: whether it reads image files, so that `on_bad_image` applies.
      reads_labels: whether it can read the labels from a file.
      flip: whether a mirrored image keeps its class.
    """

    load: Callable[..., Loaded]
    summary: str
    folder: Optional[str] = None
    needs_folder: bool = False
    reads_files: bool = False
    reads_labels: bool = False
    flip: bool = True


DATASETS = {
    "digits": Dataset(
        digits.load, "8×8 handwritten digits, which come with scikit-learn", flip=False
    ),
    "image_folder": Dataset(
        image_folder.load,
        "your own images",
        folder=f"a folder of {image_folder.LAYOUT}, or without SPLIT and with test_examples, or of "
        "images that a file of labels names",
        needs_folder=True,
        reads_files=True,
        reads_labels=True,
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
    *,
    validation_examples: Optional[Union[int, float]] = None,
    test_examples: Optional[Union[int, float]] = None,
    labels: Optional[str] = None,
    labels_columns: Optional[str] = None,
    began: Optional[Mapping[str, Any]] = None,
) -> ImageData:
    """Loads a data set; nothing is written if it is refused.

    Args:
      name: one of DATASETS, or an image-classification data set that tensorflow-datasets lists.
      data_dir: the folder of the data; what it holds is said in DATASETS. For tensorflow-datasets
        it is the folder where prepared data sets are kept.
      image_size: cut images to a square in their middle and resize it to this many pixels a side;
        it is needed where images differ in size.
      train_examples: use only the first so many of a permutation of the training images, after
        validation images were taken out.
      seed: the seed of this permutation, and of what is taken for validation. What is taken for the
        test does not depend on it.
      on_bad_image: what to do with image files that cannot be read: "fail", or "skip" to leave
        them out. "skip" is for the data sets that read image files.
      validation_examples: how many of the training images, or which share of them (more than 0,
        less than 1), are held out of training as validation images, of each class its share.
      test_examples: how many or which share of the images are the test images, before any others
        are taken; for a data set that has none of its own.
      labels: a CSV file that names the images of `data_dir` and their labels, and may name splits.
      labels_columns: its columns as "FILE,LABEL" or "FILE,LABEL,SPLIT"; guessed unless given.
      began: what `record` returned when a run on these data began, which now goes on: with "skip",
        the same images count as then, and others stand for those whose files broke since. It is for
        images that are not kept in memory.

    Returns:
      An ImageData. What was found in image files is printed.

    Raises:
      UserError: if there is no such data set, it cannot be had, or its images cannot be used.
    """
    row = _checked(name, data_dir, on_bad_image, labels, labels_columns)
    request = Request(
        data_dir, image_size, on_bad_image, bool(test_examples), labels, labels_columns, began
    )
    images = _load(row, request, name, train_examples, validation_examples, test_examples, seed)
    _say_duplicates(images)
    lists = None
    if labels or validation_examples or test_examples:
        lists = _lists(images, data_dir or "")
    found = image_data(name, images, row.flip, lists)
    reading = reading_of(found)
    if began and reading and reading.broken:
        # The mean over the images that are left would be another one.
        mean, std = tuple(began["mean"]), tuple(began["std"])
        found = dataclasses.replace(found, mean=mean, std=std)
    return found


def reading_of(data: ImageData) -> Optional[Reading]:
    """Returns how the image files of a data set are read; None if none is read by index."""
    return storage.reading_of(data.train, data.test, data.validation)


def record(data: ImageData) -> Optional[dict[str, Any]]:
    """Returns what `load` has to know of image files where a run goes on; None if nothing."""
    reading = reading_of(data)
    if reading is None:
        return None
    return {"left_out": reading.left_out, "mean": list(data.mean), "std": list(data.std)}


def look(
    name: str,
    data_dir: Optional[str] = None,
    image_size: Optional[int] = None,
    train_examples: Optional[int] = None,
    seed: int = 0,
    on_bad_image: str = "fail",
    *,
    validation_examples: Optional[Union[int, float]] = None,
    test_examples: Optional[Union[int, float]] = None,
    labels: Optional[str] = None,
    labels_columns: Optional[str] = None,
) -> tuple[tuple[int, ...], tuple[str, ...], int]:
    """Finds out what a data set is like; of image files it reads no more than the headers.

    Args are those of `load`.

    Returns:
      The shape (H, W, C) of the images, the names of the classes in the order of the labels, and
      the number of training images.

    Raises:
      UserError: as `load`, but not for images whose header alone can be read.
    """
    row = _checked(name, data_dir, on_bad_image, labels, labels_columns)
    request = Request(
        data_dir,
        image_size,
        on_bad_image,
        bool(test_examples),
        labels,
        labels_columns,
        headers_only=True,
    )
    images = _load(row, request, name, train_examples, validation_examples, test_examples, seed)
    _check_several(name, images.classes)
    shape = getattr(images.train, "shape", None) or images.train.first(1).shape[1:]
    return tuple(shape), tuple(images.classes), len(images.train)


def _load(
    row: Dataset,
    request: Request,
    name: str,
    train_examples: Optional[int],
    validation_examples: Optional[Union[int, float]],
    test_examples: Optional[Union[int, float]],
    seed: int,
) -> Loaded:
    """Returns the images that a request is answered with, divided; arguments as in `load`."""
    images = divided(row.load(request), name, validation_examples, test_examples, seed)
    if train_examples:
        images = images._replace(train=_subset(images.train, name, train_examples, seed))
    return images


def divided(
    loaded: Loaded,
    name: str,
    validation_examples: Optional[Union[int, float]],
    test_examples: Optional[Union[int, float]],
    seed: int,
) -> Loaded:
    """Returns the images after those for test and validation were taken out of the others.

    Raises:
      UserError: if there are test or validation images already, or too few to take some.
    """
    train, test, validation = loaded.train, loaded.test, loaded.validation
    for parameter, examples, own in (
        ("test_examples", test_examples, test),
        ("validation_examples", validation_examples, validation),
    ):
        if examples and own is not None:
            kind = parameter.split("_")[0]
            raise UserError(
                f"{name} has {len(own):,} {kind} images of its own: leave it out",
                parameter=parameter,
                value=examples,
            )
    if test_examples:
        # Not by the seed: runs with several seeds are compared on the same test images.
        train, test = hold_out(train, test_examples, 0, "test_examples", name)
    if validation_examples:
        train, validation = hold_out(train, validation_examples, seed, "validation_examples", name)
    return Loaded(loaded.classes, train, test, validation)


def image_data(
    name: str, images: Loaded, flip: bool, lists: Optional[Mapping[str, Sequence[str]]] = None
) -> ImageData:
    """Returns the ImageData of images that are divided; UserError if they are of one class."""
    classes, train = images.classes, images.train
    _check_several(name, classes)
    assert images.test is not None
    sample = train.first(len(train) if isinstance(train, Arrays) else 10000)
    mean, std = _mean_and_std(sample)
    return ImageData(
        name,
        tuple(classes),
        sample.shape[1:],
        train,
        images.test,
        mean,
        std,
        flip,
        images.validation,
        lists or {},
    )


def _check_several(name: str, classes: Sequence[str]) -> None:
    if len(classes) < 2:
        raise UserError(
            f"the data set {name} has {len(classes)} class ({', '.join(map(escape, classes))}): at "
            "least 2 are needed"
        )


def _origins(images: Loaded) -> dict[str, Optional[Origin]]:
    parts = {"train": images.train, "validation": images.validation, "test": images.test}
    return {split: part.origin for split, part in parts.items() if part is not None}


def _say_duplicates(images: Loaded) -> None:
    found = image_files.duplicates(_origins(images))
    if found:
        _, path, copy = found[0]
        counts = collections.Counter(split for split, *_ in found)
        told = " and ".join(f"{n:,} of the {split} images" for split, n in counts.items())
        print(
            f"Byte for byte in another split too: {told}, such as "
            f"{escape(os.fsdecode(path))} = {escape(os.fsdecode(copy))}",
            flush=True,
        )


def _lists(images: Loaded, data_dir: str) -> dict[str, list[str]]:
    """Returns {split: paths of its images below the folder, sorted}."""
    return {
        split: sorted(os.path.relpath(os.fsdecode(path), data_dir) for path in origin.paths)
        for split, origin in _origins(images).items()
        if origin is not None
    }


def _checked(
    name: str,
    data_dir: Optional[str],
    on_bad_image: str,
    labels: Optional[str],
    labels_columns: Optional[str],
) -> Dataset:
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
    if labels and not row.reads_labels:
        readers = ", ".join(known for known, other in DATASETS.items() if other.reads_labels)
        raise UserError(
            f"it does not go with the data set {name}: it is for {readers}",
            parameter="labels",
            value=labels,
        )
    if labels_columns and not labels:
        raise UserError(
            "it needs the file, `labels=FILE.csv`", parameter="labels_columns", value=labels_columns
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
