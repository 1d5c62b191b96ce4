"""Which images are trained on, which choose the epoch, and which are tested on."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, Optional, Union

import numpy as np

from tf_pcl.data.storage import Split, Stream
from tf_pcl.errors import UserError

# Of the names of one split the first that is there is taken.
TRAIN = ("train", "training")
VALIDATION = ("val", "validation", "valid", "dev")
# Where there is no test split, the validation split is tested on.
TEST = ("test", *VALIDATION)
NAMES = (*TRAIN, *TEST)


class Request(NamedTuple):
    """What a data set is asked for.

    Attributes:
      data_dir: the folder of the data, None where none was given.
      image_size: cut images to a square in their middle and resize it to this many pixels a side;
        None leaves them as they are.
      on_bad_image: what to do with image files that cannot be read: "fail", or "skip" to leave
        them out.
      divisible: whether a data set without test images is welcome, since some of its training
        images will be taken for the test.
      labels: a CSV file of file names and labels; None where folders tell the classes.
      labels_columns: the columns of this file, "FILE,LABEL" or "FILE,LABEL,SPLIT"; None to guess.
      began: what a run on these data recorded when it began (datasets.load); None if none did.
      headers_only: whether image files need not be decoded, since nobody will look at the pixels.
    """

    data_dir: Optional[str] = None
    image_size: Optional[int] = None
    on_bad_image: str = "fail"
    divisible: bool = False
    labels: Optional[str] = None
    labels_columns: Optional[str] = None
    began: Optional[Mapping[str, Any]] = None
    headers_only: bool = False


class Loaded(NamedTuple):
    """The images of a data set, split as it is split itself.

    Attributes:
      classes: the names of the classes in the order of the labels.
      train: the training images.
      test: the test images; None only where the request is `divisible`.
      validation: the validation images, where there are some besides test images.
    """

    classes: list[str]
    train: Split
    test: Optional[Split] = None
    validation: Optional[Split] = None


class Chosen(NamedTuple):
    """The names of the splits that are used; None for a split that is not there."""

    train: str
    test: Optional[str]
    validation: Optional[str]


def choose(
    splits: Collection[str],
    where: str,
    layout: str,
    parameter: str = "",
    divisible: bool = False,
) -> Chosen:
    """Returns which splits are trained on, tested on and validated on.

    Args:
      splits: the names of all splits that have labelled images.
      where: what has these splits, for the text of the error.
      layout: how the splits should be laid out, for the text of the error.
      parameter: the name of the parameter whose value `where` is, if it is one.
      divisible: whether the test split may be missing.

    Raises:
      UserError: if the training or the test split is missing.
    """
    first = lambda names: next((name for name in names if name in splits), None)
    train, test, validation = first(TRAIN), first(TEST), first(VALIDATION)
    if train and test:
        return Chosen(train, test, None if test == validation else validation)
    if train and divisible:
        return Chosen(train, None, None)
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
    """Takes some images out of a split, of each class the same share.

    Which images these are is a function of the labels, their order, `examples`, `seed` and
    `parameter`.

    Args:
      images: the images.
      examples: how many to take, or which share of them, more than 0 and less than 1.
      seed: the seed of the choice.
      parameter: which of the parameters this is for; the choice for each is another one.
      name: the name of the data set, for the text of the error.

    Returns:
      The images that are left and those that were taken, both in their order.

    Raises:
      UserError: if there are not enough images, or they are read in order.
    """
    if isinstance(images, Stream):
        raise UserError(
            f"it is not possible with {name}, which is too large for memory and is read in order",
            parameter=parameter,
            value=examples,
        )
    labels = images.all_labels()
    wanted = examples if examples >= 1 else max(1, round(examples * len(labels)))
    most = len(labels) - len(np.unique(labels))
    if wanted > most:
        raise UserError(
            f"that is {wanted:.0f} of the {len(labels)} images of {name}, of which at most {most} "
            "can be taken, since each class needs one to train on",
            parameter=parameter,
            value=examples,
            allowed=f"at most {most}",
        )
    taken = _stratified(labels, int(wanted), [seed, *parameter.encode()])
    return images.subset(np.flatnonzero(~taken)), images.subset(np.flatnonzero(taken))


def _stratified(labels: np.ndarray, count: int, seed: list[int]) -> np.ndarray:
    """Returns bool [N]: `count` of the examples, of each class its share, rounded up or down."""
    numbers = np.unique(labels, return_inverse=True)[1]
    sizes = np.bincount(numbers)
    shares = sizes * count / len(labels)
    quotas = np.floor(shares).astype(int)
    # The largest remainders are rounded up; of equal ones those of the first classes.
    for k in np.argsort(quotas - shares, kind="stable"):
        quotas[k] += quotas.sum() < count and quotas[k] < sizes[k] - 1
    # Where many classes have but one or two images, the others give more than their share.
    for k in np.argsort(-sizes, kind="stable"):
        quotas[k] += min(count - quotas.sum(), sizes[k] - 1 - quotas[k])
    # NumPy promises the numbers of a RandomState for all its versions.
    random, taken = np.random.RandomState(seed), np.zeros(len(labels), bool)
    for k, quota in enumerate(quotas):
        taken[random.permutation(np.flatnonzero(numbers == k))[:quota]] = True
    return taken
