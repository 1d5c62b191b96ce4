"""Evaluates a trained network on a data set: errors, calibration, confusions, robustness."""

import csv
import dataclasses
import io
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Optional

import numpy as np
import tensorflow as tf

from tf_pcl import data as datasets
from tf_pcl.data import ImageData
from tf_pcl.data.class_names import escape
from tf_pcl.data.storage import Split, Stream
from tf_pcl.deploy import metrics
from tf_pcl.deploy.corruptions import CORRUPTIONS, STRENGTHS, corrupted
from tf_pcl.deploy.runtimes import BATCH, Runtime
from tf_pcl.errors import UserError, choose
from tf_pcl.training import pictures
from tf_pcl.training import workdir as workdirs

SPLITS = ("train", "validation", "test")
# The file of the figures in the folder of an evaluation.
RESULTS = "evaluation.json"


@dataclasses.dataclass(frozen=True)
class Wrong:
    """Images that a network is most confidently wrong about, the most confident first.

    Args:
      index: their numbers in the split, int [n].
      images: uint8 [n, H, W, C].
      labels: int [n].
      predicted: the predicted classes, int [n].
      confidence: the probabilities of the predicted classes, float64 [n].
      paths: their files; "" for images without files.
    """

    index: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    paths: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation.

    Args:
      labels: int64 [N], in the order of the split.
      logits: float32 [N, K].
      classes: the names of the classes.
      worst: the images that the network is most confidently wrong about.
      corruptions: {name: error in percent at each strength}; empty if it was not measured.
    """

    labels: np.ndarray
    logits: np.ndarray
    classes: tuple[str, ...]
    worst: Wrong
    corruptions: dict[str, list[float]]

    @property
    def confusion(self) -> np.ndarray:
        """How many images of class i are predicted as class j, int [K, K]."""
        return metrics.confusion(self.logits, self.labels)

    def summary(self) -> dict[str, Any]:
        """Returns the figures of evaluation.json: errors in percent, nll in nats, ece in [0, 1]."""
        found = {
            "images": len(self.labels),
            "error": metrics.error(self.logits, self.labels),
            # With five classes or fewer, it would be 0.
            "top5_error": metrics.error(self.logits, self.labels, 5)
            if len(self.classes) > 5
            else None,
            "nll": metrics.nll(self.logits, self.labels),
            "ece": metrics.reliability(self.logits, self.labels).error(),
        }
        if self.corruptions:
            found["corruption_error"] = float(np.mean([*map(np.mean, self.corruptions.values())]))
        return found

    def of_class(self) -> list[dict[str, Any]]:
        """Returns a row for each class: name, images, error, and the class it is most taken for.

        The error is in percent, None for a class without images; the class that it is taken for is
        None for a class without errors.
        """
        rows = []
        for k, (name, counts) in enumerate(zip(self.classes, self.confusion)):
            others = np.delete(counts, k)
            taken = np.delete(np.arange(len(counts)), k)[others.argmax()]
            rows.append(
                {
                    "class": name,
                    "images": int(counts.sum()),
                    "error": 100 * float(others.sum() / counts.sum()) if counts.sum() else None,
                    "taken_for": self.classes[taken] if others.any() else None,
                    "taken_for_images": int(others.max()),
                }
            )
        return rows


def evaluate(
    runtime: Runtime,
    data: ImageData,
    *,
    split: str = "test",
    corruptions: bool = False,
    worst: int = 24,
    seed: int = 0,
    watch: Callable[[Iterable[Any], int], Iterable[Any]] = lambda batches, total: batches,
) -> Evaluation:
    """Runs a network on the images of a data set and evaluates its predictions.

    Args:
      runtime: the network.
      data: the data set, with images of the network's size.
      split: "train", "validation" or "test".
      corruptions: whether to measure the error on corrupted images too.
      worst: how many of the wrong images to keep.
      seed: the seed of the corruptions.
      watch: a function (batches, their number) -> the same batches, to show the progress.

    Raises:
      UserError: if there is no such split, the data set does not fit the network, its files
        break meanwhile, or its logits are not finite.
    """
    images = _split(data, split)
    _check_fits(runtime, data)
    batches = datasets.test_batches(dataclasses.replace(data, test=images), BATCH)
    found: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    errors = np.zeros([len(CORRUPTIONS), STRENGTHS])
    for part, their in watch(batches.as_numpy_iterator(), -(-len(images) // BATCH)):
        if corruptions:
            errors += _wrong_when_corrupted(runtime, part, their, BATCH * len(labels), seed)
        found.append(runtime.logits(part))
        labels.append(their)
    logits, truth = np.concatenate(found), np.concatenate(labels).astype(np.int64)
    if lost := len(images) - len(truth):
        # Their places are not known, so no file would have its own answer.
        raise UserError(
            f"{lost:,} of {len(images):,} images of {data.name} have become unreadable just now: "
            "give the same command again, which leaves them out from the start"
        )
    bad = np.flatnonzero(~np.isfinite(logits).all(1))
    if len(bad):
        raise UserError(
            f"{runtime.path} gives logits that are not finite for {len(bad):,} of {len(truth):,} "
            f"images, the first of which is number {bad[0]}: it cannot be evaluated"
        )
    percent = 100 * errors / len(truth)
    return Evaluation(
        truth,
        logits,
        tuple(data.classes),
        _worst(images, logits, truth, worst),
        {name: row.tolist() for name, row in zip(CORRUPTIONS, percent)} if corruptions else {},
    )


def _split(data: ImageData, name: str) -> Split:
    found: Optional[Split] = getattr(data, choose("split", name, SPLITS, parameter="split"), None)
    if found is None:
        raise UserError(
            f"{data.name} has none: give one that it has", parameter="split", value=name
        )
    return found


def _check_fits(runtime: Runtime, data: ImageData) -> None:
    if data.image_shape != runtime.image_shape:
        shapes = ["×".join(map(str, of.image_shape)) for of in (data, runtime)]
        raise UserError(
            f"images of {data.name} have the shape {shapes[0]}, {runtime.path} takes {shapes[1]}: "
            "give the data that it was trained for"
        )
    own, theirs = runtime.classes, tuple(data.classes)
    if len(own) != len(theirs):
        problem = f"{len(own)} classes, and {data.name} has {len(theirs)}"
    elif runtime.named and own != theirs:
        first = next(k for k, pair in enumerate(zip(own, theirs)) if pair[0] != pair[1])
        problem = (
            f"other classes than {data.name} has: number {first} is {escape(own[first])}, there "
            f"{escape(theirs[first])}"
        )
    else:
        return
    raise UserError(f"{runtime.path} knows {problem}: give data of the same classes")


def _wrong_when_corrupted(
    runtime: Runtime, images: np.ndarray, labels: np.ndarray, first: int, seed: int
) -> np.ndarray:
    """Returns how many of the images are wrong, int [corruptions, STRENGTHS]."""

    def wrong(name: str, strength: int) -> int:
        logits = runtime.logits(corrupted(images, name, strength, first=first, seed=seed))
        return int((logits.argmax(1) != labels).sum())

    return np.array([[wrong(n, s) for s in range(1, STRENGTHS + 1)] for n in CORRUPTIONS])


def _worst(split: Split, logits: np.ndarray, labels: np.ndarray, count: int) -> Wrong:
    predicted = metrics.top_k(logits, 1)[:, 0]
    confidence = np.exp(metrics.log_probabilities(logits).max(1))
    wrong = np.flatnonzero(predicted != labels)
    index = wrong[np.argsort(-confidence[wrong], kind="stable")][:count]
    paths = getattr(getattr(split, "origin", None), "paths", None)
    return Wrong(
        index,
        _images_at(split, index),
        labels[index],
        predicted[index],
        confidence[index],
        ["" if paths is None else os.fsdecode(paths[i]) for i in index],
    )


def _images_at(split: Split, index: np.ndarray) -> np.ndarray:
    if not isinstance(split, Stream):
        return split.fetch(tf.constant(index, tf.int64))[0].numpy()
    wanted, found = set(index.tolist()), {}
    for i, (image, _) in enumerate(split.examples().as_numpy_iterator()):
        if i in wanted:
            found[i] = image
        if len(found) == len(wanted):
            break
    return np.array([found[i] for i in index], np.uint8)


def write(evaluation: Evaluation, folder: str, about: Optional[dict[str, Any]] = None) -> None:
    """Writes an evaluation into a folder, which is made if it does not exist.

    evaluation.json         the figures, those of each class and of each corruption
    predictions.npz         labels int64 [N] and logits float32 [N, K], in the order of the split
    classes.csv             error of each class, and the class it is most taken for
    confusion.csv, .png     how many images of a row's class are predicted as a column's
    worst.csv, .png         the wrong images with the highest confidence
    corruptions.csv, .png   error at each strength, if it was measured

    Args:
      evaluation: the evaluation.
      folder: the folder.
      about: further entries of evaluation.json, such as the network's path.

    Raises:
      UserError: if the folder cannot be written.
    """
    from tf_pcl.deploy import figures

    try:
        os.makedirs(folder, exist_ok=True)
        at = lambda name: os.path.join(folder, name)
        np.savez_compressed(
            at(workdirs.PREDICTIONS), labels=evaluation.labels, logits=evaluation.logits
        )
        for name, rows in _tables(evaluation).items():
            workdirs.write(at(name), _as_csv(rows))
        matrix = pictures.confusion_matrix(evaluation.confusion, evaluation.classes)
        matrix.savefig(at("confusion.png"))
        figures.worst(evaluation.worst, evaluation.classes).savefig(at("worst.png"))
        if evaluation.corruptions:
            figure = figures.corruptions(evaluation.corruptions, evaluation.summary()["error"])
            figure.savefig(at("corruptions.png"))
        else:
            # Those of an evaluation before may be of another network or other data.
            for name in ("corruptions.csv", "corruptions.png"):
                pathlib.Path(at(name)).unlink(missing_ok=True)
        whole = {**(about or {}), **evaluation.summary()}
        whole["classes"] = evaluation.of_class()
        if evaluation.corruptions:
            whole["corruptions"] = evaluation.corruptions
        workdirs.write_json(at(RESULTS), whole)
    except OSError as e:
        raise UserError(
            f"the folder cannot be written ({e.filename}: {e.strerror}): give another one",
            parameter="output",
            value=folder,
        ) from e


def _tables(evaluation: Evaluation) -> dict[str, list[Sequence[Any]]]:
    """Returns {name of a file: rows}."""
    names, worst = [escape(name) for name in evaluation.classes], evaluation.worst
    per_class = evaluation.of_class()
    spell = lambda value: escape(value) if isinstance(value, str) else value
    found: dict[str, list[Sequence[Any]]] = {
        "classes.csv": [
            [*per_class[0]],
            *([spell(value) for value in row.values()] for row in per_class),
        ],
        "confusion.csv": [
            ["class", *names],
            *([name, *row] for name, row in zip(names, evaluation.confusion.tolist())),
        ],
        "worst.csv": [
            ["image", "path", "class", "predicted", "probability"],
            *(
                [i, escape(path), names[label], names[taken], f"{confidence:.6f}"]
                for i, path, label, taken, confidence in zip(
                    worst.index.tolist(),
                    worst.paths,
                    worst.labels,
                    worst.predicted,
                    worst.confidence,
                )
            ),
        ],
    }
    if evaluation.corruptions:
        found["corruptions.csv"] = [
            ["corruption", *(f"error_{s}" for s in range(1, STRENGTHS + 1))],
            *([name, *errors] for name, errors in evaluation.corruptions.items()),
        ]
    return found


def _as_csv(rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
