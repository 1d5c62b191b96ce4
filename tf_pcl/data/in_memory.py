"""Data sets from arrays and from tf.data.Datasets, for notebooks."""

from collections.abc import Sequence
from typing import Any, Optional, Union

import numpy as np
import tensorflow as tf

from tf_pcl.data.datasets import ImageData, divided, image_data
from tf_pcl.data.splits import Loaded
from tf_pcl.data.storage import Arrays
from tf_pcl.errors import UserError

Share = Optional[Union[int, float]]


def from_arrays(
    images: Any,
    labels: Any,
    *,
    classes: Optional[Sequence[str]] = None,
    test: Optional[tuple[Any, Any]] = None,
    validation: Optional[tuple[Any, Any]] = None,
    test_examples: Share = None,
    validation_examples: Share = None,
    seed: int = 0,
    flip: bool = True,
    name: str = "arrays",
) -> ImageData:
    """Makes a data set of arrays, for `train_batches` and `test_batches`.

    Args:
      images: the training images [N, H, W, C] or, if they are grey, [N, H, W], of uint8 or of
        other numbers from 0 to 255, which are rounded.
      labels: class numbers [N] or [N, 1], or one-hot [N, K].
      classes: the names of the K classes; "0", "1" … by default.
      test: (images, labels) to test on.
      validation: (images, labels) by which to choose an epoch.
      test_examples: if `test` is not given, how many of the training images, or which share of them
        (less than 1), to take for the test, the same share of each class. Without both, there are
        no test images.
      validation_examples: the same for validation.
      seed: the seed of the choice of validation images.
      flip: whether a mirrored image keeps its class.
      name: the name of the data set in messages.

    Raises:
      UserError: if these are not images and labels, or do not fit together.
    """
    train = _arrays(images, labels, "images")
    tested, validated = (
        None if pair is None else _arrays(*pair, parameter)
        for pair, parameter in ((test, "test"), (validation, "validation"))
    )
    parts = [part for part in (train, tested, validated) if part is not None]
    shapes = {tuple(part.images.shape[1:]) for part in parts}
    if len(shapes) > 1:
        raise UserError(f"images must have one size, and these have {sorted(shapes)}")
    given = [labels, *(pair[1] for pair in (test, validation) if pair is not None)]
    most = max(map(_class_count, given))
    names = [str(k) for k in range(most)] if classes is None else [str(name) for name in classes]
    if len(names) < most:
        raise UserError(
            f"the label {most - 1} has no name: there are {len(names)} `classes`: name all"
        )
    loaded = Loaded(names, train, tested, validated)
    loaded = divided(loaded, name, validation_examples, test_examples, seed)
    if loaded.test is None:
        loaded = loaded._replace(test=train.subset(np.arange(0)))
    return image_data(name, loaded, flip)


def from_dataset(
    dataset: tf.data.Dataset,
    *,
    classes: Optional[Sequence[str]] = None,
    test: Optional[tf.data.Dataset] = None,
    validation: Optional[tf.data.Dataset] = None,
    **arguments: Any,
) -> ImageData:
    """Makes a data set of tf.data.Datasets, whose images are kept in memory.

    Args:
      dataset: (images, labels) or (image, label) to train on, as
        keras.utils.image_dataset_from_directory returns them. It is read once.
      classes: the names of the classes; by default the dataset's `class_names`, if it has them.
      test: such a dataset to test on.
      validation: such a dataset to choose an epoch by.
      **arguments: further arguments of `from_arrays`.

    Raises:
      UserError: as `from_arrays`, and if an element is not a pair.
    """
    held = [None if d is None else _read(d) for d in (dataset, test, validation)]
    assert held[0] is not None
    return from_arrays(
        *held[0],
        classes=getattr(dataset, "class_names", None) if classes is None else classes,
        test=held[1],
        validation=held[2],
        **{"name": "dataset", **arguments},
    )


def _read(dataset: tf.data.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images and labels of a dataset, batched or not."""
    spec = dataset.element_spec
    if not isinstance(spec, tuple) or len(spec) != 2:
        raise UserError(
            f"the dataset must have pairs (images, labels), and its elements are {spec}"
        )
    if spec[0].shape.rank == 3:
        dataset = dataset.batch(512)
    images, labels = [], []
    if dataset.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise UserError("the dataset never ends: give it without repeat()")
    for x, y in dataset.as_numpy_iterator():
        images.append(_uint8(x, "dataset"))  # Keras's own batches are float32.
        labels.append(y)
    if not images:
        raise UserError("the dataset is empty")
    if len({x.shape[1:] for x in images}) > 1:
        raise UserError("the images of the dataset differ in size: bring them to one size")
    whole = np.concatenate(images)
    if spec[0].dtype.is_floating and whole.max() <= 1:
        raise _scaled("dataset", whole)
    return whole, np.concatenate(labels)


def _arrays(images: Any, labels: Any, parameter: str) -> Arrays:
    x, y = np.asarray(images), np.asarray(labels)
    if y.dtype.kind not in "biuf":
        raise UserError(f"{parameter}: labels must be numbers, and these are {y.dtype}")
    # Integers that are all 0 may be meant to be black.
    if x.size and x.max() <= 1 and (x.dtype.kind == "f" or x.max() == 1):
        raise _scaled(parameter, x)
    x = _uint8(x, parameter)
    x = x[..., None] if x.ndim == 3 else x
    if y.ndim == 2 and y.shape[1] > 1:
        if (y.sum(1) != 1).any() or (y.max(1) != 1).any():
            raise UserError(
                f"{parameter}: labels [N, K] must be one-hot, and some rows have several classes, "
                "shares of classes or none: give one class for each image"
            )
        y = y.argmax(1)
    elif y.ndim == 2:
        y = y[:, 0]
    if x.ndim != 4 or y.shape != x.shape[:1] or not len(y):
        raise UserError(
            f"{parameter}: images must be [N, H, W, C] and labels [N], and these have the shapes "
            f"{np.shape(images)} and {np.shape(labels)}"
        )
    if (y != np.floor(y)).any() or y.min() < 0:
        raise UserError(f"{parameter}: labels must be whole numbers of at least 0")
    return Arrays(x, y.astype(np.int32))


def _class_count(labels: Any) -> int:
    """Returns how many classes labels know of that `_arrays` takes."""
    y = np.asarray(labels)
    return y.shape[1] if y.ndim == 2 and y.shape[1] > 1 else 1 + int(y.max())


def _uint8(images: np.ndarray, parameter: str) -> np.ndarray:
    if images.dtype == np.uint8:
        return images
    # Comparisons with NaN are false.
    if images.size and not (images.min() >= 0 and images.max() <= 255):
        raise _scaled(parameter, images)
    return np.round(images).astype(np.uint8)


def _scaled(parameter: str, images: np.ndarray) -> UserError:
    return UserError(
        f"{parameter}: images must have raw values from 0 to 255, and these go from "
        f"{images.min():g} to {images.max():g}: give the images before they are scaled"
    )
