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
    """Makes a data set of arrays, of which `train_batches` makes batches of views.

    Args:
      images: the training images [N, H, W, C] or, if they are grey, [N, H, W]: uint8, or other
        numbers from 0 to 255, which are rounded.
      labels: class numbers [N] or [N, 1], or one-hot [N, K].
      classes: the names of the K classes; "0", "1" … by default.
      test: (images, labels) to test on.
      validation: (images, labels) by which to choose an epoch.
      test_examples: how many or which share (less than 1) of the training images to take for the
        test, of each class its share; where `test` is not given. If neither is, there are no test
        images.
      validation_examples: the same for validation.
      seed: the seed of what is taken for validation.
      flip: whether a mirrored image keeps its class.
      name: what to call it in messages.

    Raises:
      UserError: if these are no images and labels, or do not fit together.
    """
    train = _arrays(images, labels, "images")
    tested, validated = (
        None if pair is None else _arrays(*pair, parameter)
        for pair, parameter in ((test, "test"), (validation, "validation"))
    )
    parts = [part for part in (train, tested, validated) if part is not None]
    shapes = {tuple(part.images.shape[1:]) for part in parts}
    if len(shapes) > 1:
        raise UserError(f"images of one size are needed, and these are {sorted(shapes)}")
    most = 1 + max(int(part.all_labels().max()) for part in parts)
    names = [str(k) for k in range(most)] if classes is None else [str(name) for name in classes]
    if len(names) < most:
        raise UserError(f"the label {most - 1} has no name: there are {len(names)} `classes`")
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
    """Makes a data set of what tf.data.Datasets hold, which is kept in memory.

    Args:
      dataset: (images, labels) or (image, label) to train on, such as
        keras.utils.image_dataset_from_directory gives. It is read once.
      classes: the names of the classes; by default the dataset's `class_names`, where it has them.
      test: the same to test on.
      validation: the same to choose an epoch by.
      **arguments: further arguments of `from_arrays`.

    Raises:
      UserError: as `from_arrays` does, and if an element is no pair.
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
            f"a dataset of pairs (images, labels) is needed, and the elements of this are {spec}"
        )
    if spec[0].shape.rank == 3:
        dataset = dataset.batch(512)
    images, labels = [], []
    for x, y in dataset.as_numpy_iterator():
        images.append(_uint8(x, "dataset"))  # Keras's own batches are of float32.
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
    if x.dtype.kind == "f" and x.size and x.max() <= 1:
        raise _scaled(parameter, x)
    x = _uint8(x, parameter)
    x = x[..., None] if x.ndim == 3 else x
    if y.ndim == 2:
        y = y.argmax(1) if y.shape[1] > 1 else y[:, 0]
    if x.ndim != 4 or y.shape != x.shape[:1] or not len(y):
        raise UserError(
            f"{parameter}: images [N, H, W, C] and labels [N] are needed, and these have the "
            f"shapes {np.shape(images)} and {np.shape(labels)}"
        )
    if (y != np.floor(y)).any() or y.min() < 0:
        raise UserError(f"{parameter}: labels are whole numbers from 0 on")
    return Arrays(x, y.astype(np.int32))


def _uint8(images: np.ndarray, parameter: str) -> np.ndarray:
    if images.dtype == np.uint8:
        return images
    if images.size and (images.min() < 0 or images.max() > 255):
        raise _scaled(parameter, images)
    return np.round(images).astype(np.uint8)


def _scaled(parameter: str, images: np.ndarray) -> UserError:
    return UserError(
        f"{parameter}: images are of raw values from 0 to 255, and these are from {images.min():g} "
        f"to {images.max():g}: give them as they were before they were scaled"
    )
