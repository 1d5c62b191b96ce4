"""Reads the labels of images from a CSV file of file names and labels."""

import collections
import csv
import os
import unicodedata
from collections.abc import Collection, Sequence
from typing import NamedTuple, Optional

from tf_pcl.data.class_names import escape
from tf_pcl.data.splits import NAMES, TRAIN
from tf_pcl.errors import UserError

# The usual names of columns, in lower case without spaces, hyphens and underscores.
FILE_COLUMNS = (
    *("file", "filename", "filepath", "path", "filenames", "files"),
    *("image", "imagename", "imagepath", "imagefile", "imageid", "img", "id", "name"),
)
LABEL_COLUMNS = (
    *("label", "class", "classname", "category", "target", "labels", "labelname", "species"),
    *("breed", "diagnosis", "y"),
)
SPLIT_COLUMNS = ("split", "set", "subset", "partition")


class Columns(NamedTuple):
    """The numbers of the columns of a CSV file; `split` is None if it has no such column."""

    file: int
    label: int
    split: Optional[int] = None


def read(
    path: str, columns: Optional[str], images: Collection[str], skip_missing: bool
) -> dict[str, dict[str, list[str]]]:
    """Reads a CSV file, and prints which columns were guessed and which images are left out.

    Args:
      path: the CSV file, whose first line names the columns.
      columns: "FILE,LABEL" or "FILE,LABEL,SPLIT", the names of columns; None to guess them.
      images: the paths of all images below their folder. The file may leave the suffix out.
      skip_missing: whether names without an image are left out, and not refused.

    Returns:
      {split: {class: paths of images}}. Without a column of splits, all images are for training.

    Raises:
      UserError: if the file cannot be read, its columns cannot be guessed or occur twice, an image
        is missing, has no label or several, or its split is not known.
    """
    header, rows = _rows(path)
    chosen = _named(path, header, columns) if columns else _guessed(path, header)
    for column in (header[k] for k in chosen if k is not None):
        if header.count(column) > 1:
            raise _refused(path, f"it has several columns {escape(column)}: rename the others")
    known = _names_of(images)
    files: dict[str, dict[str, list[str]]] = collections.defaultdict(
        lambda: collections.defaultdict(list)
    )
    seen: dict[str, tuple[str, str]] = {}
    missing: list[str] = []
    for number, row in rows:
        name = row[chosen.file].strip()
        # The same letters may be written in several ways, and are one class.
        label = unicodedata.normalize("NFC", row[chosen.label].strip())
        split = TRAIN[0] if chosen.split is None else row[chosen.split].strip().lower()
        if not label:
            raise _refused(path, f"line {number} ({escape(name)}) has no label")
        if split not in NAMES:
            raise _refused(
                path,
                f"line {number} ({escape(name)}) has the split {escape(split)!r}; allowed are "
                f"{', '.join(NAMES)}",
            )
        image = known.get(os.path.normpath(name))
        if image is None:
            missing.append(name)
        elif image not in seen:
            seen[image] = label, split
            files[split][label].append(image)
        elif seen[image] != (label, split):
            raise _refused(path, f"{escape(name)} occurs twice, with different labels or splits")
    _say(path, header, chosen, columns, missing, len(set(images)) - len(seen), skip_missing)
    return {split: dict(labels) for split, labels in files.items()}


def in_order(classes: Collection[str]) -> list[str]:
    """Returns sorted class names: whole numbers by their value, others alphabetically."""
    if all(name.isdecimal() for name in classes):
        # 01 and 1 are two classes: the order must not be left to chance.
        return sorted(classes, key=lambda name: (int(name), name))
    return sorted(classes)


def _rows(path: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Returns the names of the columns, and (number of its line, cells) of every other line."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            start = f.readline()
            # The usual separator that the first line has most of.
            separator = max(",;\t", key=start.count)
            f.seek(0)
            # Strict: otherwise a quotation mark that is never closed swallows all later lines.
            reader = csv.reader(f, delimiter=separator, skipinitialspace=True, strict=True)
            header = [cell.strip() for cell in next(reader, [])]
            rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        reason = e.strerror if isinstance(e, OSError) else str(e)
        raise _refused(path, f"it cannot be read as a CSV file ({reason})") from e
    if not rows:
        raise _refused(path, "it has no lines after the names of the columns")
    for number, row in rows:
        if len(row) < len(header) or any(cell.strip() for cell in row[len(header) :]):
            raise _refused(
                path,
                f"line {number} has {len(row)} cells, the first has {len(header)}: put text that "
                "has the separator in it between quotation marks",
            )
    return header, rows


def _named(path: str, header: Sequence[str], columns: str) -> Columns:
    names = [name.strip() for name in columns.split(",")]
    if len(names) not in (2, 3):
        raise UserError(
            "give the names of two or three columns, FILE,LABEL or FILE,LABEL,SPLIT",
            parameter="labels_columns",
            value=columns,
        )
    for name in names:
        if name not in header:
            raise UserError(
                f"{path} has no column {name}: it has {', '.join(map(escape, header))}",
                parameter="labels_columns",
                value=columns,
            )
    return Columns(*(header.index(name) for name in names))


def _guessed(path: str, header: Sequence[str]) -> Columns:
    plain = [name.lower().translate(str.maketrans("", "", " -_")) for name in header]
    found = lambda names: next((plain.index(name) for name in names if name in plain), None)
    file, label, split = map(found, (FILE_COLUMNS, LABEL_COLUMNS, SPLIT_COLUMNS))
    # If there are two columns beside that of the splits, knowing one is enough.
    rest = {*range(len(header))} - {file, label, split}
    if len(rest) == 1 and (file is None) != (label is None):
        file, label = (rest.pop() if column is None else column for column in (file, label))
    if file is None or label is None:
        what = "file names" if file is None else "labels"
        raise _refused(
            path,
            f"it is not clear which of its columns {', '.join(map(escape, header))} has the "
            f"{what}: name them with `labels_columns=FILE,LABEL`",
        )
    return Columns(file, label, split)


def _names_of(images: Collection[str]) -> dict[str, str]:
    """Returns {name with or without suffix: path of the image below its folder}."""
    stems = collections.Counter(os.path.splitext(path)[0] for path in images)
    without = {os.path.splitext(path)[0]: path for path in images}
    unique = {stem: path for stem, path in without.items() if stems[stem] == 1}
    return {**unique, **{path: path for path in images}}


def _say(
    path: str,
    header: Sequence[str],
    chosen: Columns,
    columns: Optional[str],
    missing: Sequence[str],
    unlabelled: int,
    skip_missing: bool,
) -> None:
    if missing and not skip_missing:
        raise _refused(
            path,
            f"it names {len(missing):,} images that do not exist, such as "
            f"{', '.join(map(escape, missing[:3]))}: give their paths below `data_dir`, or leave "
            "them out with `on_bad_image=skip`",
        )
    if not columns:
        what = zip(("file names", "labels", "splits"), chosen)
        told = (f"{escape(header[k])} for {name}" for name, k in what if k is not None)
        print(f"Labels: the column {', '.join(told)}")
    if missing:
        print(f"Left out: {len(missing):,} images that {path} names and that do not exist")
    if unlabelled:
        print(f"Left out: {unlabelled:,} images without a label")


def _refused(path: str, problem: str) -> UserError:
    return UserError(problem, parameter="labels", value=path)
