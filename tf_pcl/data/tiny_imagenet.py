"""Tiny ImageNet, from the folder into which its archive unpacks."""

import os

from tf_pcl.data import image_files
from tf_pcl.data.splits import Loaded, Request
from tf_pcl.errors import UserError

FOLDER = "the folder tiny-imagenet-200 of cs231n.stanford.edu/tiny-imagenet-200.zip"


def load(request: Request) -> Loaded:
    """Loads Tiny ImageNet; its validation images are the test images.

    The images of its folder test have no labels and are not used. A summary is printed.

    Args:
      request: its folder is tiny-imagenet-200, or the one that holds it.

    Returns:
      The images; the name of a class is the first of its synonyms.

    Raises:
      UserError: if the folder is not that of the archive, or image_files.load refuses the images.
    """
    data_dir = request.data_dir or ""
    root = os.path.join(data_dir, "tiny-imagenet-200")
    root = root if os.path.isdir(root) else data_dir
    try:
        classes, train, test = _listed(root)
    except (OSError, ValueError, KeyError) as e:
        if isinstance(e, OSError):
            reason = f"{e.filename}: {e.strerror}"
        elif isinstance(e, KeyError):
            reason = f"wnids.txt does not list {e}, which val_annotations.txt names"
        else:
            reason = str(e)
        raise UserError(
            f"it cannot be read as Tiny ImageNet ({reason}): give {FOLDER}",
            parameter="data_dir",
            value=data_dir,
        ) from e
    if not train or not test:
        raise UserError(
            f"it has {len(train)} training and {len(test)} validation images: give {FOLDER}",
            parameter="data_dir",
            value=data_dir,
        )
    read = image_files.load({"train": train, "val": test}, classes, request)
    return Loaded(classes, read["train"], read["val"])


def _listed(root):
    """Returns the names of the classes and (path, label) of the training and validation images."""
    wnids = {wnid: k for k, (wnid,) in enumerate(_table(root, "wnids.txt", 1))}
    words = dict(_table(root, "words.txt", 2))
    train = [
        (os.path.join(root, "train", wnid, "images", name), k)
        for wnid, k in wnids.items()
        for name in sorted(os.listdir(os.path.join(root, "train", wnid, "images")))
    ]
    test = [
        (os.path.join(root, "val", "images", name), wnids[wnid])
        for name, wnid in _table(root, os.path.join("val", "val_annotations.txt"), 2)
    ]
    names = [words.get(wnid, wnid).split(",")[0] for wnid in wnids]
    # A word may have several meanings: crane is a bird and a machine.
    classes = [
        name if names.count(name) == 1 else f"{name} ({wnid})" for name, wnid in zip(names, wnids)
    ]
    return classes, train, test


def _table(root: str, name: str, columns: int) -> list[list[str]]:
    """Returns the first `columns` cells of each line of a tab-separated text file.

    Raises:
      ValueError: if a line has fewer cells.
    """
    with open(os.path.join(root, name), encoding="utf-8") as f:
        rows = [line.rstrip("\n").split("\t")[:columns] for line in f if line.strip()]
    if any(len(row) < columns for row in rows):
        raise ValueError(f"{name} has a line of fewer than {columns} tab-separated cells")
    return rows
