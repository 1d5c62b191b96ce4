"""The contents of results.json, and a run's lines for people."""

import json
import os
import platform
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Optional

import numpy as np
import tensorflow as tf

import tf_pcl
from tf_pcl import compat
from tf_pcl.compat import keras
from tf_pcl.data import ImageData
from tf_pcl.data.class_names import escape
from tf_pcl.data.splits import Loaded
from tf_pcl.methods import METHODS
from tf_pcl.methods.distiller import Distiller, Stage
from tf_pcl.options import Options
from tf_pcl.training.selection import Selection
from tf_pcl.training.workdir import FILE_LABELS, TEST_FILES, TRAINING_FILES

# Peers are alike where their diversity is below this share of the error rate; `alike` says why.
ALIKE = 0.1
# The distance that rounding leaves between equal probabilities.
_EQUAL = 1e-6
_DIVERSITY = "val_diversity"


def facts_of(data: ImageData) -> dict[str, Any]:
    """Returns the facts that identify a data set, for data.json."""
    images = Loaded(list(data.classes), data.train, data.test, data.validation)
    return {
        **facts_of_files(data.image_shape, images),
        **({"division": _fingerprint(data)} if data.lists else {}),
        # Channel means identify the pixels. They are rounded, since machines may differ in the last
        # digits.
        "means": [round(float(m), 3) for m in data.mean],
    }


def facts_of_files(shape: Sequence[int], images: Loaded) -> dict[str, Any]:
    """Returns those facts of data.json for which image files need not be decoded.

    Args:
      shape: (H, W, C) of the images.
      images: the images, which have test images.
    """
    assert images.test is not None
    validation = images.validation
    return {
        "classes": images.classes,
        "image_shape": list(shape),
        "training images": len(images.train),
        "test images": len(images.test),
        **({} if validation is None else {"validation images": len(validation)}),
        **_of_files(images),
    }


def _fingerprint(data: ImageData) -> str:
    """Returns a checksum of the files in each split and their labels."""
    lists = {split: [escape(path) for path in paths] for split, paths in data.lists.items()}
    number = zlib.crc32(json.dumps(lists, sort_keys=True).encode())
    for part in (data.train, data.test, data.validation):
        if part is not None:
            number = zlib.crc32(part.all_labels().astype("<i4").tobytes(), number)
    return f"{number:08x}"


def _of_files(images: Loaded) -> dict[str, str]:
    """Returns numbers that tell the image files of a data set apart, if it has any."""
    parts = [p for p in (images.train, images.test, images.validation) if p is not None]
    labelled = [
        (part.origin, part.all_labels().tolist()) for part in parts if part.origin is not None
    ]
    if not labelled:
        return {}
    paths = [path for origin, _ in labelled for path in origin.paths]
    # The folder may move.
    above = len(os.path.commonprefix(paths))
    names = [[*zip((p[above:] for p in origin.paths), labels)] for origin, labels in labelled]
    # What files hold, whatever their names and order.
    training, test = (sorted(zip(origin.marks, labels)) for origin, labels in labelled[:2])
    found = {TRAINING_FILES: training, TEST_FILES: test, FILE_LABELS: names}
    return {name: f"{zlib.crc32(repr(marks).encode()):08x}" for name, marks in found.items()}


def opening(
    options: Options, data: ImageData, steps: int, replicas: int, gflop: float, alone: float
) -> str:
    """Returns the lines that say what is about to be trained.

    Args:
      options: the run's options.
      data: the data set.
      steps: steps an epoch.
      replicas: how many devices share a batch.
      gflop: the cost of a step; with several stages, of one step of each.
      alone: the cost of a step that trains the deployed network alone.
    """
    shape = "×".join(map(str, data.image_shape))
    device = "GPU" if tf.config.list_physical_devices("GPU") else "CPU"
    held_out = "" if data.validation is None else f", {len(data.validation):,} validation"
    total = gflop * steps * options.epochs
    return (
        f"{options.method} on {options.dataset}: {len(data.train):,} training{held_out} and "
        f"{len(data.test):,} test images {shape}, {len(data.classes)} classes\n"
        f"{options.epochs} epochs of {steps} steps, replicas: {replicas} ({device}), "
        f"{options.precision}\n"
        f"training costs {total:,.{0 if total >= 10 else 3}f} GFLOP, {gflop / alone:.1f} times "
        "what it costs to train the deployed network alone"
    )


def results(
    rows: Sequence[Mapping[str, float]],
    options: Options,
    stage: Stage,
    model: Distiller,
    deployed: keras.Model,
    gflop: tuple[float, float],
    selection: Optional[Selection] = None,
    tested: Optional[Mapping[str, float]] = None,
) -> dict[str, Any]:
    """Returns the contents of results.json.

    Args:
      rows: the rows of metrics.csv; the last epoch was tested.
      options: the run's options.
      stage: which stage of the method this is.
      model: what is trained.
      deployed: the network that it deploys.
      gflop: the cost of the stages before, and that of a step.
      selection: what the validation images decide; None where there are none.
      tested: {name: value} of the test of the exported network, if there was one after training.
    """
    last, key = rows[-1], f"val_error/{model.deployed_exit}"
    row = (selection and selection.exported(rows)) or last
    errors = {name: row[f"val_error/{name}"] for name in model.exits}
    validated = _validated(rows, errors, selection, tested) if selection else {}
    if tested:
        errors = {name: tested[f"error/{name}"] for name in model.exits}
    best = None if selection else round(min(row[key] for row in rows if key in row), 4)
    several = isinstance(stage.network, (list, tuple))
    return {
        "method": options.method,
        **({"stage": stage.name} if stage.name else {}),
        "dataset": options.dataset,
        "network": ",".join(stage.network) if several else stage.network,
        "peers": max(1, len(model.peer_exits)),
        "seed": options.seed,
        "epochs": int(last["epoch"]),
        "steps": int(last["step"]),
        "deployed": model.deployed_exit,
        "deployed_error": round(errors[model.deployed_exit], 4),
        "best_deployed_error": best,
        "error": _rounded(errors),
        **validated,
        **({"diversity": float(f"{row[_DIVERSITY]:.4g}")} if _DIVERSITY in row else {}),
        "parameters": {
            "deployed": _count(deployed.trainable_weights),
            "training": _count(model.trainable_weights),
        },
        "training_gflop": float(f"{gflop[0] + gflop[1] * last['step']:.6g}"),
        "images_per_second": _mean_speed(rows),
        "wall_seconds": round(last["wall_seconds"], 1),
        "settings": effective(options),
        "versions": versions(),
    }


def _validated(
    rows: Sequence[Mapping[str, float]],
    errors: Mapping[str, float],
    selection: Selection,
    tested: Optional[Mapping[str, float]],
) -> dict[str, Any]:
    """Returns what results.json has in addition if there are validation images.

    Args:
      rows: the rows of metrics.csv.
      errors: {exit: validation error} of the exported epoch.
      selection: what the validation images decide.
      tested: {name: value} of the test, None before it.
    """
    lowest, exported = selection.lowest(rows), selection.exported(rows)
    assert lowest is not None and exported is not None
    return {
        "validation_error": _rounded(errors),
        "best_validation_error": round(lowest[selection.column], 4),
        "best_validation_epoch": int(lowest["epoch"]),
        "test_error": tested and _rounded({name: tested[f"error/{name}"] for name in errors}),
        "exported": "best" if selection.best else "last",
        "exported_epoch": int(exported["epoch"]),
        "ended_early": selection.ends(rows),
    }


def ended(results: Mapping[str, Any], options: Options) -> bool:
    """Returns whether the training that results.json describes has reached its end.

    Args:
      results: the contents of results.json.
      options: the run's options.
    """
    if "test_error" in results:
        # The number of epochs does not tell, since such a run may end early.
        return results["test_error"] is not None
    return bool(results["epochs"] >= options.epochs)


def _rounded(errors: Mapping[str, float]) -> dict[str, float]:
    return {name: round(error, 4) for name, error in errors.items()}


def versions() -> dict[str, str]:
    """Returns the versions of Python and the packages that this process runs with."""
    return {
        "tf_pcl": tf_pcl.__version__,
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "keras": compat.keras_version(),
        "numpy": np.__version__,
    }


def table(results: dict[str, Any]) -> str:
    """Returns a table of the test errors in `results`, the contents of results.json, for people."""
    errors, counts = results["error"], results["parameters"]
    width, validated = max(map(len, errors)), results.get("validation_error")
    when = f"after {results['epochs']} epochs"
    if validated:
        chosen = "the best of validation" if results["exported"] == "best" else "the last"
        when = f"and validation error, epoch {results['exported_epoch']}, {chosen}"
    lines = [f"{'exit':{width}}  test error {when}"]
    deployed = results["deployed"]
    for name in [deployed, *(name for name in errors if name != deployed)]:
        error = errors[name]
        mark = f"  {validated[name]:6.2f} %" if validated else ""
        mark += "  (deployed)" if name == deployed else ""
        lines.append(f"{name:{width}}  {error:6.2f} %{mark}")
    lines.append(
        f"{counts['deployed']:,} parameters are deployed, of {counts['training']:,} trained; "
        f"{results['images_per_second'] or 0:.0f} training images/s, without the first step"
    )
    return "\n".join(lines)


def warning(results: dict[str, Any], data: ImageData) -> Optional[str]:
    """Returns a line for people if something is wrong with a trained network, else None.

    Args:
      results: the contents of results.json.
      data: the data set.
    """
    counts = np.bincount(data.test.all_labels(), minlength=len(data.classes))
    guess = 100 * (1 - counts.max() / counts.sum())
    if results["deployed_error"] < guess - 1e-3:
        same = alike(results)
        return same and f"WARNING: {same}"
    return (
        "WARNING: the deployed network is no better than a guess: predicting always the most "
        f"frequent class gives a test error of {guess:.2f} %. Look at the losses in metrics.csv, "
        "the learning rate and the length of training."
    )


def alike(results: Mapping[str, Any]) -> Optional[str]:
    """Returns a sentence for people if the peers of a run have become alike, else None.

    Peers differ mostly on the images that they get wrong, so diversity is compared with the error
    rate. At the end of 60 epochs on 200 of the digits, ResNet-8, it was 0.26 to 1.4 times the error
    rate in runs of three methods. Where the peers began with the same weights and saw the same
    view, it was 0 (PCL without its ensemble classifier, which pulls peers apart again) and 0.08
    times (ONE, whose gate tells peers apart).

    Args:
      results: the contents of results.json; without "diversity" there are no peers.
    """
    rate = results["deployed_error"] / 100
    diversity = results.get("diversity")
    if diversity is None or diversity > max(ALIKE * rate, _EQUAL):
        return None
    below = f", less than {ALIKE:g} times the error rate of {rate:.2g}"
    return (
        f"the peers have become alike: their diversity is {diversity:.2g}"
        f"{below if diversity < ALIKE * rate else ''}, so they can teach each other little. "
        "Look at diversity in metrics.csv, and try views of their own, an earlier cut or another "
        "seed."
    )


def _count(weights: Iterable[tf.Variable]) -> int:
    return int(sum(np.prod(w.shape) for w in weights))


def _mean_speed(rows: Sequence[Mapping[str, float]]) -> Any:
    """Returns the images a second over all epochs, or None if no epoch was timed."""
    speeds = [row["images_per_second"] for row in rows if "images_per_second" in row]
    return round(len(speeds) / sum(1 / s for s in speeds), 1) if speeds else None


def effective(options: Options) -> dict[str, Any]:
    """Returns the options that have a value, by name, and the method's own defaults."""
    defaults = METHODS[options.method].parameters()
    values = {
        name: defaults.get(name) if value is None else value
        for name, value in vars(options).items()
    }
    return {name: value for name, value in values.items() if value is not None}
