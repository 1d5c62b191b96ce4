"""Folders of a user's own images, laid out as SPLIT/CLASS/IMAGE."""

import collections
import os
from typing import Optional

from tf_pcl.data import image_files, splits
from tf_pcl.data.class_names import escape
from tf_pcl.data.storage import Split
from tf_pcl.errors import UserError

LAYOUT = "SPLIT/CLASS/IMAGE.jpg or .png"
SUFFIXES = (".jpg", ".jpeg", ".png")


def load(
    data_dir: str, image_size: Optional[int], on_bad_image: str
) -> tuple[list[str], Split, Split]:
    """Loads the images of a folder; each class is a folder of each split.

    The images have the order that tfds.ImageFolder gives them. Names that begin with a dot are
    hidden and do not count. What was found is printed.

    Args:
      data_dir: the folder that holds the splits.
      image_size: cut images to a square in their middle and resize it to this many pixels a side.
      on_bad_image: "fail", or "skip" to leave out files that cannot be read.

    Returns:
      The names of the classes, the training images, the test images.

    Raises:
      UserError: if the folder cannot be read, splits or classes lack images, or image_files.load
        refuses the images.
    """
    try:
        files, others = _scan(data_dir)
        if not any(files.values()) and _has_images_without_splits(data_dir):
            raise UserError(
                "it has images as CLASS/IMAGE, without splits: put them into train/CLASS, and some "
                "that are not trained on into test/CLASS",
                parameter="data_dir",
                value=data_dir,
            )
    except OSError as e:
        raise UserError(
            f"it cannot be read: {e.filename}: {e.strerror}", parameter="data_dir", value=data_dir
        ) from e
    pair = splits.train_and_test(
        [split for split, labels in files.items() if any(labels.values())],
        data_dir,
        LAYOUT,
        parameter="data_dir",
    )
    if others:
        kinds = (f"{count:,} {escape(kind)}" for kind, count in others.most_common(5))
        print(f"Not .jpg or .png, left alone: {', '.join(kinds)}")
    classes = sorted({label for split in pair for label in files[split]})
    _check_classes(classes, files, pair, data_dir)
    examples = {
        split: [
            (path, k) for k, label in enumerate(classes) for path in files[split].get(label, ())
        ]
        for split in pair
    }
    read = image_files.load(examples, classes, image_size, on_bad_image)
    return classes, read[pair[0]], read[pair[1]]


def _scan(data_dir: str) -> tuple[dict[str, dict[str, list[str]]], collections.Counter]:
    """Returns {split: {class: paths of images}} and how many other files there are of each kind."""
    files: dict[str, dict[str, list[str]]] = collections.defaultdict(dict)
    others: collections.Counter = collections.Counter()
    for split in _folders(data_dir):
        for label in _folders(os.path.join(data_dir, split)):
            paths: list[str] = []
            files[split][label] = paths
            for entry in _visible(os.path.join(data_dir, split, label)):
                if _is_image(entry.name):
                    paths.append(entry.path)
                else:
                    others[os.path.splitext(entry.name)[1] or entry.name] += 1
    return files, others


def _has_images_without_splits(data_dir: str) -> bool:
    return any(
        _is_image(entry.name)
        for folder in _folders(data_dir)
        for entry in _visible(os.path.join(data_dir, folder))
    )


def _check_classes(classes, files, pair, data_dir):
    """Refuses classes without training images; those without test images are only named."""
    train, test = (
        ", ".join([escape(label) for label in classes if not files[split].get(label)][:5])
        for split in pair
    )
    if train:
        raise UserError(
            f"it has no image of {train} in {pair[0]}: every class needs some; add them, or take "
            "the folders out of all splits",
            parameter="data_dir",
            value=data_dir,
        )
    if test:
        print(f"No image of {test} in {pair[1]}")


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _visible(path: str) -> list[os.DirEntry]:
    """Returns a folder's entries by name, without hidden ones such as .DS_Store and ._1.jpg."""
    return sorted(
        (e for e in os.scandir(path) if not e.name.startswith(".")), key=lambda entry: entry.name
    )


def _folders(path: str) -> list[str]:
    return [entry.name for entry in _visible(path) if entry.is_dir()]
