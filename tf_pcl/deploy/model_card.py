"""MODEL_CARD.md: a description of a trained network, its errors, and how to load it."""

import os
import platform
import re
import shlex
import statistics
from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2
import numpy as np

from tf_pcl.compat import keras
from tf_pcl.data import ImageData, datasets
from tf_pcl.data.class_names import escape
from tf_pcl.deploy.finished import Finished
from tf_pcl.options import Options
from tf_pcl.surgery.observe import flops
from tf_pcl.training import workdir as workdirs

NAME = "MODEL_CARD.md"
# If there are more classes than this, only labels.txt has the other names.
_SHOWN_CLASSES = 20


def write(
    folder: str, finished: Finished, data: ImageData, network: keras.Model, table: Mapping[str, Any]
) -> None:
    """Writes the model card.

    Args:
      folder: the folder of the artifacts.
      finished: the run.
      data: its data set.
      network: the exported network.
      table: the contents of artifacts.json.
    """
    runs = finished.siblings()
    errors = [run.results["error"] for run in runs]
    template = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    ).from_string(
        resources.files("tf_pcl.deploy").joinpath(f"{NAME}.jinja").read_text(encoding="utf-8")
    )
    results, options = finished.results, finished.options
    text = template.render(
        results=results,
        options=options,
        data=data,
        table=table,
        exit=table["exit"],
        shape="×".join(map(str, data.image_shape)),
        classes=[_plain(name) for name in data.classes[:_SHOWN_CLASSES]],
        seeds=[run.options.seed for run in runs],
        errors={name: _spread([one[name] for one in errors]) for name in errors[0]},
        parameters=int(sum(np.prod(w.shape) for w in network.trainable_weights)),
        multiply_adds=sum(flops(network).values()) // 2,
        command=_command(options),
        also=_also(options),
        machine=f"{platform.machine()}, {os.cpu_count()} CPU cores",
        served=os.path.exists(os.path.join(folder, workdirs.SAVED_MODEL)),
        dataset=_dataset(options),
        when=_when(results),
        name=re.sub(r"\W+", "_", f"{options.dataset}_{options.network}"),
    )
    workdirs.write(os.path.join(folder, NAME), text)


def _dataset(options: Options) -> str:
    """Returns the name of the data set, with its folder if that identifies the images."""
    row = datasets.DATASETS.get(options.dataset)
    if row is None or not row.needs_folder or not options.data_dir:
        return options.dataset
    return f"{options.dataset} ({_plain(os.path.basename(os.path.abspath(options.data_dir)))})"


def _when(results: Mapping[str, Any]) -> str:
    """Returns after which epoch a network was exported, and how that epoch was chosen."""
    epochs = results["epochs"]
    if results.get("exported") == "best":
        exported = results["exported_epoch"]
        return f"after epoch {exported} of {epochs}, the one with the lowest validation error"
    return f"after the last of {epochs} epochs"


def _spread(errors: list[float]) -> str:
    """Returns a mean, with the sample standard deviation if there are several errors."""
    mean = f"{statistics.mean(errors):.2f}"
    return f"{mean} ± {statistics.stdev(errors):.2f}" if len(errors) > 1 else mean


def _command(options: Options) -> str:
    """Returns the command that repeats the training: the flags that are not at their defaults."""
    given = {n: v for n, v in options.told().items() if n not in options.run_only()}
    flags = [f"--{name}={shlex.quote(value)}" for name, value in given.items()]
    return " \\\n    ".join(["tf-pcl train", *flags])


def _also(options: Options) -> str:
    """Returns a sentence about what the command lacks, since it differs between machines; or ""."""
    files = {"data_dir": "the folder of the data", "labels": "the file of their labels"}
    lacking = [f"`--{name}`, {what}" for name, what in files.items() if getattr(options, name)]
    have = "have" if len(lacking) > 1 else "has"
    return f" {', and '.join(lacking)}, {have} to be given too." if lacking else ""


def _plain(name: str) -> str:
    """Returns a name as labels.txt has it, escaped for a line of Markdown."""
    return re.sub(r"([\\`*_|<>&$\[\]])", r"\\\1", " ".join(escape(name).split()))
