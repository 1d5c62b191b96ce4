"""Chooses the images for training, for the choice of an epoch, and for tests."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, Optional, Union

import numpy as np

from tf_pcl.data.class_names import escape
from tf_pcl.data.storage import Split, Stream
from tf_pcl.errors import UserError

# Names of the splits; the first one that exists is taken.
TRAIN = ("train", "training")
VALIDATION = ("val", "validation", "valid", "dev")
# Without a test split, the validation split is used for tests.
TEST = ("test", *VALIDATION)
NAMES = (*TRAIN, *TEST)
# Why no images can be taken out of a Stream.
NOT_DIVISIBLE = (
    "it is not possible with {}, which is too large for memory and is read in order: leave it out"
)


class Request(NamedTuple):
    """How to load a data set.

    Attributes:
      data_dir: the folder of the data; None if none was given.
      image_size: cut the square in the middle of each image and resize it to this many pixels a
        side; None leaves the images as they are.
      on_bad_image: what to do with image files that cannot be read: "fail", or "skip" to leave
        them out.
      train_examples, seed, validation_examples, test_examples: how the loaded images will be
        divided (datasets.load); None for no division.
      labels: a CSV file of file names and labels; None if folders are the classes.
      labels_columns: the columns of this file, "FILE,LABEL" or "FILE,LABEL,SPLIT"; None to guess.
      began: the record of a resumed run from its beginning (datasets.load); None for a new run.
      headers_only: whether image files need not be decoded, since their pixels are not used.
    """

    data_dir: Optional[str] = None
    image_size: Optional[int] = None
    on_bad_image: str = "fail"
    train_examples: Optional[int] = None
    seed: int = 0
    validation_examples: Optional[Union[int, float]] = None
    test_examples: Optional[Union[int, float]] = None
    labels: Optional[str] = None
    labels_columns: Optional[str] = None
    began: Optional[Mapping[str, Any]] = None
    headers_only: bool = False

    @property
    def divisible(self) -> bool:
        """Whether test images may be missing, as they will be taken from the training images."""
        return bool(self.test_examples)


class Loaded(NamedTuple):
    """The images of a data set, in its own splits.

    Attributes:
      classes: the names of the classes in the order of the labels.
      train: the training images.
      test: the test images; None only if the request is `divisible`.
      validation: the validation images, if there are any besides test images.
    """

    classes: list[str]
    train: Split
    test: Optional[Split] = None
    validation: Optional[Split] = None


class Chosen(NamedTuple):
    """The names of the splits that are used; None for a missing split."""

    train: str
    test: Optional[str]
    validation: Optional[str]


def choose(
    splits: Collection[str], where: str, layout: str, parameter: str = "", divisible: bool = False
) -> Chosen:
    """Returns the splits for training, tests and validation, and prints which are not used.

    Args:
      splits: the names of all splits that have labelled images.
      where: the folder, file or data set with these splits, for errors.
      layout: how the splits should be laid out, for errors.
      parameter: the name of the parameter that has the value `where`, if there is one.
      divisible: whether the test split may be missing.

    Raises:
      UserError: if the training or the test split is missing.
    """
    first = lambda names: next((name for name in names if name in splits), None)
    train, test, validation = first(TRAIN), first(TEST), first(VALIDATION)
    chosen = None
    if train and test:
        chosen = Chosen(train, test, None if test == validation else validation)
    elif train and divisible:
        chosen = Chosen(train, None, None)
    if chosen:
        if unused := sorted({*splits} - {*chosen}):
            print(f"Splits that are not used: {', '.join(map(escape, unused))}")
        return chosen
    found = f"splits {', '.join(sorted(splits))}" if splits else "no images"
    advice = ", or `test_examples=0.2` to take some of the training images" if train else ""
    raise UserError(
        f"{'it' if parameter else where} has {found}: it needs train and test (or "
        f"{', '.join(VALIDATION)}), as {layout}{advice}",
        parameter=parameter or None,
        value=where,
    )


def hold_out(
    images: Split, examples: Union[int, float], seed: int, parameter: str, name: str
) -> tuple[Split, Split]:
    """Takes some images out of a split, the same share of each class.

    The choice is a function of the labels, their order, `examples`, `seed` and `parameter`.

    Args:
      images: the images.
      examples: how many to take, or which share of them, more than 0 and less than 1.
      seed: the seed of the choice.
      parameter: the parameter that asks for these images; each has its own choice.
      name: the name of the data set, for errors.

    Returns:
      The remaining images and those that were taken, both in their order.

    Raises:
      UserError: if `examples` is no such number, there are not enough images, or they are read in
        order.
    """
    if isinstance(images, Stream):
        raise UserError(NOT_DIVISIBLE.format(name), parameter=parameter, value=examples)
    if not (0 < examples < 1 or examples >= 1 and examples % 1 == 0):
        raise UserError(
            "give a whole number of images, or a share of them, more than 0 and less than 1",
            parameter=parameter,
            value=examples,
        )
    labels = images.all_labels()
    wanted = examples if examples >= 1 else max(1, round(examples * len(labels)))
    most = len(labels) - len(np.unique(labels))
    if wanted > most:
        raise UserError(
            f"{wanted:.0f} of the {len(labels)} images of {name} are too many: at most {most} can "
            "be taken, since each class needs one to train on",
            parameter=parameter,
            value=examples,
            allowed=f"at most {most}",
        )
    taken = _stratified(labels, int(wanted), [seed, *parameter.encode()])
    return images.subset(np.flatnonzero(~taken)), images.subset(np.flatnonzero(taken))


def _stratified(labels: np.ndarray, count: int, seed: list[int]) -> np.ndarray:
    """Chooses `count` of the examples, the same share of each class, rounded; bool [N]."""
    numbers = np.unique(labels, return_inverse=True)[1]
    sizes = np.bincount(numbers)
    shares = sizes * count / len(labels)
    quotas = np.floor(shares).astype(int)
    # The largest remainders are rounded up; among equal ones, those of the first classes.
    for k in np.argsort(quotas - shares, kind="stable"):
        quotas[k] += quotas.sum() < count and quotas[k] < sizes[k] - 1
    # If many classes have only one or two images, the others give more than their share.
    for k in np.argsort(-sizes, kind="stable"):
        quotas[k] += min(count - quotas.sum(), sizes[k] - 1 - quotas[k])
    # NumPy guarantees the same numbers of a RandomState in all versions.
    random, taken = np.random.RandomState(seed), np.zeros(len(labels), bool)
    for k, quota in enumerate(quotas):
        taken[random.permutation(np.flatnonzero(numbers == k))[:quota]] = True
    return taken
