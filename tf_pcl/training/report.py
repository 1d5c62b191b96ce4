"""What a run tells: the contents of results.json and the lines for people."""

import platform
from collections.abc import Iterable, Sequence
from typing import Any, Optional

import numpy as np
import tensorflow as tf

import tf_pcl
from tf_pcl import compat
from tf_pcl.compat import keras
from tf_pcl.data import ImageData
from tf_pcl.methods import METHODS
from tf_pcl.methods.distiller import Distiller, Stage
from tf_pcl.options import Options


def facts_of(data: ImageData) -> dict[str, Any]:
    """Returns what tells a data set from another one, for data.json."""
    return {
        "classes": list(data.classes),
        "image_shape": list(data.image_shape),
        "training images": len(data.train),
        "test images": len(data.test),
        # Channel means fingerprint the pixel data. They are rounded, since machines may differ in
        # the last digits.
        "means": [round(float(m), 3) for m in data.mean],
    }


def opening(options: Options, data: ImageData, steps: int, replicas: int) -> str:
    """Returns the lines that say what is about to be trained.

    Args:
      options: the run's options.
      data: the data set.
      steps: steps an epoch.
      replicas: how many devices share a batch.
    """
    shape = "×".join(map(str, data.image_shape))
    device = "GPU" if tf.config.list_physical_devices("GPU") else "CPU"
    return (
        f"{options.method} on {options.dataset}: {len(data.train):,} training and "
        f"{len(data.test):,} test images {shape}, {len(data.classes)} classes\n"
        f"{options.epochs} epochs of {steps} steps, replicas: {replicas} ({device}), "
        f"{options.precision}"
    )


def results(
    rows: Sequence[dict[str, float]],
    options: Options,
    stage: Stage,
    model: Distiller,
    deployed: keras.Model,
) -> dict[str, Any]:
    """Returns the contents of results.json.

    Args:
      rows: the rows of metrics.csv; in the last one's epoch there was a test.
      options: the run's options.
      stage: which stage of the method this is.
      model: what is trained.
      deployed: the network that it deploys.
    """
    last, key = rows[-1], f"val_error/{model.deployed_exit}"
    errors = {name: last[f"val_error/{name}"] for name in model.exits}
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
        "best_deployed_error": round(min(row[key] for row in rows if key in row), 4),
        "error": {name: round(error, 4) for name, error in errors.items()},
        "parameters": {
            "deployed": _count(deployed.trainable_weights),
            "training": _count(model.trainable_weights),
        },
        "images_per_second": _mean_speed(rows),
        "wall_seconds": round(last["wall_seconds"], 1),
        "settings": effective(options),
        "versions": versions(),
    }


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
    width = max(map(len, errors))
    lines = [f"{'exit':{width}}  test error after {results['epochs']} epochs"]
    for name, error in errors.items():
        mark = "  (deployed)" if name == results["deployed"] else ""
        lines.append(f"{name:{width}}  {error:6.2f} %{mark}")
    lines.append(
        f"{counts['deployed']:,} parameters are deployed, of {counts['training']:,} trained; "
        f"{results['images_per_second'] or 0:.0f} training images/s, without the first step"
    )
    return "\n".join(lines)


def warning(results: dict[str, Any], data: ImageData) -> Optional[str]:
    """Returns a line for people if a trained network is no better than a guess, else None.

    Args:
      results: the contents of results.json.
      data: the data set.
    """
    counts = np.bincount(data.test.all_labels(), minlength=len(data.classes))
    guess = 100 * (1 - counts.max() / counts.sum())
    if results["deployed_error"] < guess - 1e-3:
        return None
    return (
        "WARNING: the deployed network is no better than a guess: to answer always with the most "
        f"frequent class gives a test error of {guess:.2f} %. Look at the losses in metrics.csv, "
        "the learning rate and the length of training."
    )


def _count(weights: Iterable[tf.Variable]) -> int:
    return int(sum(np.prod(w.shape) for w in weights))


def _mean_speed(rows: Sequence[dict[str, float]]) -> Any:
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
