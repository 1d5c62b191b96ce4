"""Data sets by name: the table DATASETS and load(name) -> ImageData.

A name that is not in the table is looked up in tensorflow-datasets. The images of a split are kept
in memory up to 4 GiB (storage.Arrays); larger splits are files that are read when they are needed
(storage.Files) or, from tensorflow-datasets, a stream (storage.Stream).
"""

import collections
import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, Callable, Optional, Union

import numpy as np

from tf_pcl.data import digits, from_tfds, image_files, image_folder, tiny_imagenet
from tf_pcl.data.class_names import escape
from tf_pcl.data.splits import NOT_DIVISIBLE, Loaded, Request, hold_out
from tf_pcl.data.storage import Arrays, Files, Origin, Reading, Split, Stream
from tf_pcl.errors import UserError, choose

# If a channel varies less than this over all images, on the scale 0–255, it holds little but the
# noise of rounding and compression, which standardisation must not amplify.
LEAST_DEVIATION = 8.0


@dataclasses.dataclass(frozen=True)
class ImageData:
    """A data set of labelled images.

    Args:
      name: the name of the data set.
      classes: the names of the classes in the order of the labels.
      image_shape: (H, W, C) of every image.
      train: the training images.
      test: the test images.
      mean: the mean of each channel on the scale 0–255, over the training images (over the first
        10,000 if they are not in memory).
      std: the standard deviation of each channel on the same scale, at least LEAST_DEVIATION.
      flip: whether a mirrored image keeps its class.
      validation: images that are neither trained nor tested on, to choose an epoch by; None if
        there are none.
      lists: {split: paths of its files below the folder}, if `load` divided the files.
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
    """A row of DATASETS: how a data set or a family of data sets is loaded and described.

    Args:
      load: a function splits.Request -> splits.Loaded.
      summary: what it is, in a few words.
      folder: what its `data_dir` is; None if it takes none.
      needs_folder: whether `data_dir` is required.
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
    """Loads a data set.

    Args:
      name: one of DATASETS, or an image-classification data set that tensorflow-datasets lists.
      data_dir: the folder of the data, as DATASETS describes it. For tensorflow-datasets it is the
        folder of the prepared data sets.
      image_size: cut the square in the middle of each image and resize it to this many pixels a
        side; needed if images differ in size.
      train_examples: use only so many training images, the first of a permutation, after the
        validation images were taken.
      seed: the seed of this permutation, and of the choice of validation images. The choice of test
        images does not depend on it.
      on_bad_image: what to do with image files that cannot be read: "fail", or "skip" to leave
        them out, if the data set reads image files.
      validation_examples: how many of the training images, or which share of them (more than 0,
        less than 1), are held out as validation images, the same share of each class.
      test_examples: how many of the images, or which share of them, become test images, which are
        taken first; for a data set without test images of its own.
      labels: a CSV file that names the images of `data_dir` and their labels, and may name splits.
      labels_columns: its columns as "FILE,LABEL" or "FILE,LABEL,SPLIT"; guessed unless given.
      began: if a run is resumed, what `record` returned when it began. With "skip", the data then
        have the same images as at that time, and others replace those whose files have broken
        since. It is for images that are not kept in memory.

    Returns:
      An ImageData. A summary of image files is printed.

    Raises:
      UserError: if there is no such data set, or it or its images cannot be used.
    """
    request = Request(
        data_dir,
        image_size,
        on_bad_image,
        train_examples,
        seed,
        validation_examples,
        test_examples,
        labels,
        labels_columns,
        began,
    )
    row, images = _load(name, request)
    _say_duplicates(images)
    lists = None
    if labels or validation_examples or test_examples:
        lists = _lists(images, data_dir or "")
    found = image_data(name, images, row.flip, lists)
    reading = reading_of(found)
    if began and reading and reading.broken:
        # The mean over the remaining images would be another one.
        mean, std = tuple(began["mean"]), tuple(began["std"])
        found = dataclasses.replace(found, mean=mean, std=std)
    return found


def reading_of(data: ImageData) -> Optional[Reading]:
    """Returns the Reading of the image files of a data set; None if none is read by index."""
    parts = data.train, data.test, data.validation
    return next((part.reading for part in parts if isinstance(part, Files)), None)


def record(data: ImageData) -> Optional[dict[str, Any]]:
    """Returns what `load` must know of image files to resume a run; None if nothing."""
    reading = reading_of(data)
    if reading is None:
        return None
    return {"left_out": reading.left_out, "mean": list(data.mean), "std": list(data.std)}


def look(
    name: str, data_dir: Optional[str] = None, image_size: Optional[int] = None, **others: Any
) -> tuple[tuple[int, ...], Loaded]:
    """Returns the images of a data set; of image files it reads only the headers.

    Args:
      name, data_dir, image_size: as in `load`.
      **others: its other arguments, except `began`.

    Returns:
      The shape (H, W, C) of the images, and the images with the names of the classes.

    Raises:
      UserError: as `load`, except for images of which only the header can be read.
    """
    images = _load(name, Request(data_dir, image_size, **others, headers_only=True))[1]
    _check_several(name, images.classes)
    shape = getattr(images.train, "shape", None) or images.train.first(1).shape[1:]
    return tuple(shape), images


def _load(name: str, request: Request) -> tuple[Dataset, Loaded]:
    """Returns the row of a data set, and its images that a request asks for, divided."""
    row = _checked(name, request)
    parts = request.validation_examples, request.test_examples
    images = divided(row.load(request), name, *parts, request.seed)
    if request.train_examples:
        train = _subset(images.train, name, request.train_examples, request.seed)
        images = images._replace(train=train)
        lost = np.setdiff1d(np.arange(len(images.classes)), train.all_labels())
        if len(lost):
            named = ", ".join(escape(images.classes[k]) for k in lost[:5])
            print(f"No image of {named} is among the {request.train_examples:,} training images")
    return row, images


def divided(
    loaded: Loaded,
    name: str,
    validation_examples: Optional[Union[int, float]],
    test_examples: Optional[Union[int, float]],
    seed: int,
) -> Loaded:
    """Returns the images after test and validation images were taken from the training images.

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
        # Independent of the seed: runs with several seeds are compared on the same test images.
        train, test = hold_out(train, test_examples, 0, "test_examples", name)
    if validation_examples:
        train, validation = hold_out(train, validation_examples, seed, "validation_examples", name)
    return Loaded(loaded.classes, train, test, validation)


def image_data(
    name: str, images: Loaded, flip: bool, lists: Optional[Mapping[str, Sequence[str]]] = None
) -> ImageData:
    """Returns the ImageData of divided images; UserError if there is only one class."""
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


def _checked(name: str, request: Request) -> Dataset:
    """Returns the row of a data set; UserError if the request does not fit it."""
    data_dir, labels = request.data_dir, request.labels
    if data_dir and not os.path.isdir(data_dir):
        raise UserError(
            "it is not there: give an existing folder", parameter="data_dir", value=data_dir
        )
    choose("on_bad_image", request.on_bad_image, ("fail", "skip"), parameter="on_bad_image")
    row = find(name)
    for parameter, given, able in (
        ("on_bad_image", request.on_bad_image == "skip", "reads_files"),
        ("labels", bool(labels), "reads_labels"),
    ):
        if given and not getattr(row, able):
            readers = ", ".join(n for n, other in DATASETS.items() if getattr(other, able))
            raise UserError(
                f"it does not go with the data set {name}: it is for {readers}",
                parameter=parameter,
                value=getattr(request, parameter),
            )
    if request.labels_columns and not labels:
        raise UserError(
            "it needs the file, `labels=FILE.csv`",
            parameter="labels_columns",
            value=request.labels_columns,
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
        problem = f"it is more than the {len(train)} training images of {name}: give fewer"
    elif isinstance(train, Stream):
        problem = NOT_DIVISIBLE.format(name)
    else:
        return train.subset(np.random.RandomState(seed).permutation(len(train))[:count])
    raise UserError(problem, parameter="train_examples", value=count)


def _mean_and_std(images: np.ndarray) -> tuple[tuple, tuple]:
    """Returns each channel's mean, and deviation ≥ LEAST_DEVIATION, of uint8 [N, H, W, C]."""
    # Counting the 256 values is exact and needs no float copy of the images.
    counts = [np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[-1])]
    means = [np.average(np.arange(256), weights=n) for n in counts]
    stds = [
        max(LEAST_DEVIATION, np.average((np.arange(256) - m) ** 2, weights=n) ** 0.5)
        for m, n in zip(means, counts)
    ]
    return tuple(means), tuple(stds)
