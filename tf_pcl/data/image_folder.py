"""Folders of a user's own images: SPLIT/CLASS/IMAGE, CLASS/IMAGE, or any folder with labels."""

import collections
import os
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tf_pcl.data import image_files, labels_file, splits
from tf_pcl.data.class_names import escape
from tf_pcl.data.splits import Loaded, Request
from tf_pcl.errors import UserError

LAYOUT = "SPLIT/CLASS/IMAGE.jpg or .png"
SUFFIXES = (".jpg", ".jpeg", ".png")
# Suffixes that are read if Pillow is installed.
PILLOW_SUFFIXES = (".webp", ".tif", ".tiff")

# {split: {class: paths of images}}
Files = dict[str, dict[str, list[str]]]


class Ignored(NamedTuple):
    """Files that are not used: the numbers of those that are no images, and stray images."""

    kinds: collections.Counter
    stray: list[str]


def load(request: Request) -> Loaded:
    """Loads the images of a folder.

    Each split has a folder for each class, or the folder itself has if the request is `divisible`,
    or the request has a file of labels. The order of the images is that of tfds.ImageFolder. Names
    that begin with a dot are hidden and do not count. A summary is printed.

    Args:
      request: its folder holds the images.

    Raises:
      UserError: if the folder cannot be read, splits or classes lack images, or image_files.load
        refuses the images.
    """
    data_dir = request.data_dir or ""
    try:
        files, ignored = _labelled(request) if request.labels else _scan(data_dir)
        if not (request.labels or any(any(labels.values()) for labels in files.values())):
            files, ignored = _without_splits(data_dir, request.divisible)
    except OSError as e:
        raise UserError(
            f"it cannot be read: {e.filename}: {e.strerror}", parameter="data_dir", value=data_dir
        ) from e
    chosen = splits.choose(
        [split for split, labels in files.items() if any(labels.values())],
        request.labels or data_dir,
        "a column of splits" if request.labels else LAYOUT,
        parameter="labels" if request.labels else "data_dir",
        divisible=request.divisible,
    )
    _say_ignored(ignored)
    used = [split for split in chosen if split is not None]
    names = {label for split in used for label in files[split]}
    classes = labels_file.in_order(names) if request.labels else sorted(names)
    _check_classes(classes, files, used, data_dir)
    _say_alike(classes)
    examples = {
        split: [
            (path, k) for k, label in enumerate(classes) for path in files[split].get(label, ())
        ]
        for split in used
    }
    read = image_files.load(examples, classes, request)
    test, validation = (read[split] if split else None for split in chosen[1:])
    return Loaded(classes, read[chosen.train], test, validation)


def _scan(data_dir: str) -> tuple[Files, Ignored]:
    """Returns the images of SPLIT/CLASS, and what else is there."""
    files: Files = {}
    ignored = Ignored(collections.Counter(), _images(data_dir))
    for split in _folders(data_dir):
        files[split] = _classes(os.path.join(data_dir, split), ignored)
    return files, ignored


def _without_splits(data_dir: str, divisible: bool) -> tuple[Files, Ignored]:
    """Returns what `_scan` does for the images of CLASS, all for training.

    Raises:
      UserError: if there are such images and they may not be divided.
    """
    ignored = Ignored(collections.Counter(), [])
    classes = _classes(data_dir, ignored)
    if not any(classes.values()):
        return {}, ignored
    if not divisible:
        raise UserError(
            "it has images as CLASS/IMAGE, without splits: give `test_examples=0.2` to test on a "
            "fifth of them, or move training images into train/CLASS and test images into "
            "test/CLASS",
            parameter="data_dir",
            value=data_dir,
        )
    return {splits.TRAIN[0]: classes}, ignored


def _classes(folder: str, ignored: Ignored) -> dict[str, list[str]]:
    """Returns {class: paths of images} of CLASS/IMAGE and notes what else is there."""
    found: dict[str, list[str]] = {}
    ignored.stray.extend(_images(folder))
    for label in _folders(folder):
        found[label] = []
        for entry in _visible(os.path.join(folder, label)):
            if entry.is_dir():
                ignored.stray.extend(filter(is_image, files_below(entry.path)))
            elif is_image(entry.name):
                found[label].append(entry.path)
            else:
                ignored.kinds[_kind(entry.name)] += 1
    return found


def _labelled(request: Request) -> tuple[Files, Ignored]:
    """Returns what `_scan` does for images at any depth, by the file of labels."""
    assert request.data_dir and request.labels
    below: list[str] = []
    ignored = Ignored(collections.Counter(), [])
    for path in files_below(request.data_dir):
        if is_image(path):
            below.append(os.path.relpath(path, request.data_dir))
        elif os.path.realpath(path) != os.path.realpath(request.labels):
            ignored.kinds[_kind(os.path.basename(path))] += 1
    skip = request.on_bad_image == "skip"
    read = labels_file.read(request.labels, request.labels_columns, below, skip)
    return {
        split: {
            label: sorted(os.path.join(request.data_dir, name) for name in names)
            for label, names in labels.items()
        }
        for split, labels in read.items()
    }, ignored


def _say_ignored(ignored: Ignored) -> None:
    others, stray = ignored
    if stray:
        print(
            f"Ignored: {len(stray):,} images that do not lie in a class's folder itself, such as "
            f"{escape(stray[0])}"
        )
    if others:
        kinds = (f"{count:,} {escape(kind)}" for kind, count in others.most_common(5))
        readable = {kind.lower() for kind in others} & {*PILLOW_SUFFIXES}
        advice = f" (with Pillow, {', '.join(sorted(readable))} can be read)" if readable else ""
        print(f"Not .jpg or .png, ignored: {', '.join(kinds)}{advice}")


def _kind(name: str) -> str:
    return os.path.splitext(name)[1] or name


def _check_classes(classes, files, used, data_dir):
    """Refuses classes without images in the first split, for training; names those of others."""
    for split in used:
        missing = [escape(label) for label in classes if not files[split].get(label)]
        named = ", ".join(missing[:5])
        if missing and split == used[0]:
            raise UserError(
                f"it has no image of {named} in {split}, and every class needs some: add them, or "
                "take these classes out of all splits",
                parameter="data_dir",
                value=data_dir,
            )
        if missing:
            print(f"No image of {named} in {split}")


def _say_alike(classes: Sequence[str]) -> None:
    """Names the classes whose names differ in case or in the form of letters or numbers alone."""
    alike = collections.defaultdict(list)
    for name in classes:
        text = unicodedata.normalize("NFKC", name).casefold()
        try:
            text = str(float(text))
        except ValueError:
            pass
        alike[text].append(escape(name))
    groups = [", ".join(names) for names in alike.values() if len(names) > 1]
    if groups:
        print(f"Different classes, although their names are alike: {'; '.join(groups)}")


def files_below(folder: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Yields the paths of the files in a folder and then of those below it, without hidden ones.

    Links are followed, unless they lead back to a folder that they lie in.

    Args:
      folder: the folder.
      above: the real paths of the folders that it was reached through.

    Raises:
      OSError: if a folder cannot be read.
    """
    entries, above = _visible(folder), (*above, os.path.realpath(folder))
    yield from (entry.path for entry in entries if not entry.is_dir())
    for entry in entries:
        if entry.is_dir() and os.path.realpath(entry.path) not in above:
            yield from files_below(entry.path, above)


def suffixes() -> tuple[str, ...]:
    """Returns the suffixes of the image files that can be read here, in lower case."""
    return SUFFIXES + (PILLOW_SUFFIXES if image_files.pillow() else ())


def is_image(name: str) -> bool:
    """Returns whether a file is an image that can be read here, by its suffix."""
    return name.lower().endswith(suffixes())


def _visible(path: str) -> list[os.DirEntry]:
    """Returns a folder's entries by name, without hidden ones such as .DS_Store and ._1.jpg."""
    return sorted(
        (e for e in os.scandir(path) if not e.name.startswith(".")), key=lambda entry: entry.name
    )


def _folders(path: str) -> list[str]:
    return [entry.name for entry in _visible(path) if entry.is_dir()]


def _images(path: str) -> list[str]:
    return [e.path for e in _visible(path) if is_image(e.name) and not e.is_dir()]
