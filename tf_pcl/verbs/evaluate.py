"""tf-pcl evaluate: evaluates a trained network."""

import dataclasses
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Optional

from absl import flags

from tf_pcl import compat
from tf_pcl.console import show_table
from tf_pcl.errors import UserError
from tf_pcl.verbs.verb import Verb

if TYPE_CHECKING:
    from tf_pcl.data import ImageData
    from tf_pcl.deploy.evaluate import Evaluation
    from tf_pcl.options import Options

# The number of classes in the table of those with the most errors.
_ROWS = 10


def _define_flags() -> None:
    flags.DEFINE_string("dataset", None, "data to evaluate on; default: those of the run")
    flags.DEFINE_string("data_dir", None, "folder of the data; default: that of the run")
    flags.DEFINE_enum(
        "on_bad_image",
        None,
        ["fail", "skip"],
        "refuse image files that cannot be read, or leave them out; default: as the run",
    )
    flags.DEFINE_enum("split", "test", ["train", "validation", "test"], "which images")
    flags.DEFINE_boolean(
        "corruptions",
        False,
        "also measure the error on images with noise, blur, other contrast, other brightness and "
        "JPEG artifacts, each at five strengths",
    )
    flags.DEFINE_integer(
        "seed", 0, "seed of the noise of --corruptions", lower_bound=0, upper_bound=2**31 - 1
    )
    flags.DEFINE_integer(
        "worst",
        24,
        "how many wrong images worst.csv and worst.png have, those of the highest confidence",
        lower_bound=1,
    )
    flags.DEFINE_string(
        "output",
        None,
        "folder for the files; default: evaluation in the run's workdir, else evaluation-NAME "
        "beside the network",
    )


def _evaluate(rest: list[str]) -> None:
    if len(rest) != 1:
        raise UserError(
            f"{len(rest)} networks were given: give one workdir, SavedModel, .tflite or .onnx file"
        )
    compat.import_tensorflow()
    from tf_pcl.deploy import evaluate, runtimes

    values = flags.FLAGS
    runtime = runtimes.load(rest[0])
    workdir = _workdir(rest[0])
    chosen = _options(workdir, runtime.image_shape)
    data = _load(chosen)
    _refuse_trained(workdir, data, values.split)
    found = evaluate.evaluate(
        runtime,
        data,
        split=values.split,
        corruptions=values.corruptions,
        worst=values.worst,
        seed=values.seed,
        watch=_watch,
    )
    folder = os.path.expanduser(values.output or _beside(rest[0], workdir, chosen, data))
    about = {
        "network": runtime.path,
        "form": runtime.kind,
        "dataset": chosen.dataset,
        "split": values.split,
    }
    evaluate.write(found, folder, about)
    _show(found, about)
    print(f"Written to {folder}")


def _workdir(path: str) -> Optional[str]:
    """Returns the workdir in which a network lies, if it lies in one."""
    folder = os.path.abspath(os.path.expanduser(path))
    # WORKDIR/export/EXIT/folded/saved_model/1 is the deepest place.
    for _ in range(6):
        if os.path.isfile(os.path.join(folder, "flags.txt")):
            return folder
        folder = os.path.dirname(folder)
    return None


def _options(workdir: Optional[str], shape: tuple[int, ...]) -> "Options":
    """Returns options for loading the data, for a network of images of this shape."""
    from tf_pcl.options import Options, from_file

    values = flags.FLAGS
    of_run = from_file(os.path.join(workdir, "flags.txt")) if workdir else None
    dataset = values.dataset or (of_run.dataset if of_run else None)
    if dataset is None:
        raise UserError("the run of this network is not known: name its data with `dataset`")
    base = of_run if of_run and of_run.dataset == dataset else Options(dataset=dataset)
    given: dict[str, Any] = {name: values[name].value for name in ("data_dir", "on_bad_image")}
    # Images of other sizes are brought to the network's, as in training.
    given["image_size"] = shape[0] if shape[0] == shape[1] else None
    return dataclasses.replace(base, **{n: value for n, value in given.items() if value})


def _load(chosen: "Options") -> "ImageData":
    """Loads the data, without the run's division if other data come divided already."""
    from tf_pcl.training import run

    try:
        return run.load_data(chosen)
    except UserError as e:
        division = ("test_examples", "validation_examples", "train_examples", "labels")
        if e.parameter not in division or not flags.FLAGS.data_dir:
            raise
        undivided: dict[str, Any] = dict.fromkeys([*division, "labels_columns"])
        try:
            return run.load_data(dataclasses.replace(chosen, **undivided))
        except UserError as other:
            # What a folder lacks that needs a file of labels would mislead.
            raise (e if e.parameter == "labels" else other) from None


def _refuse_trained(workdir: Optional[str], data: "ImageData", split: str) -> None:
    """Refuses images of a split if the run was trained on some, by the names of their files.

    A folder that has lost or gained an image since is divided otherwise.
    """
    from tf_pcl.data.class_names import escape
    from tf_pcl.training.workdir import Workdir

    if workdir is None or split == "train":
        return
    names = {escape(path) for path in data.lists.get(split, ())}
    both = sorted(names & Workdir(workdir).read_list("train"))
    if both:
        raise UserError(
            f"{len(both):,} of {len(names):,} {split} images have the names of images that the run "
            f"was trained on, such as {both[0]}: the folder has other images than it had then, so "
            "its division is another one. Give the images that it had, or others as "
            "SPLIT/CLASS/IMAGE with `data_dir`"
        )


def _beside(path: str, workdir: Optional[str], chosen: "Options", data: "ImageData") -> str:
    """Returns the default folder for the files."""
    from tf_pcl.training import beside, report
    from tf_pcl.training.workdir import EVALUATION, Workdir, saved_model

    path = os.path.abspath(os.path.expanduser(path))
    other = []
    known = Workdir(workdir).read_data() if workdir else {}
    if known and not beside.same_test(known, report.facts_of(data)):
        folder = chosen.data_dir and os.path.basename(os.path.abspath(chosen.data_dir))
        other += [folder or chosen.dataset]
    other += [flags.FLAGS.split] if flags.FLAGS.split != "test" else []
    # A run has other networks too, such as those of its earlier stages.
    if workdir and os.path.isdir(path) and saved_model(path) == saved_model(workdir):
        return os.path.join(os.path.relpath(workdir), "-".join([EVALUATION, *other]))
    folder, name = os.path.split(path)
    return os.path.join(os.path.relpath(folder), "-".join([EVALUATION, name, *other]))


def _watch(batches: Iterable[Any], total: int) -> Iterable[Any]:
    from rich.console import Console
    from rich.progress import track

    progress = Console(file=sys.stderr)
    return track(batches, "Evaluating", total, console=progress, transient=True)


def _show(found: "Evaluation", about: dict[str, Any]) -> None:
    """Prints the figures, the classes with the most errors, and the corruptions."""
    from tf_pcl.data.class_names import escape

    figures = found.summary()
    rows = [
        ["images", f"{figures['images']:,} of {about['dataset']}, {about['split']}"],
        ["error", f"{figures['error']:.2f} %"],
    ]
    if figures["top5_error"] is not None:
        rows.append(["top-5 error", f"{figures['top5_error']:.2f} %"])
    rows.append(["NLL", f"{figures['nll']:.4f} nats"])
    rows.append(["ECE, 15 bins", f"{100 * figures['ece']:.2f} %"])
    if found.corruptions:
        rows.append(["error when corrupted", f"{figures['corruption_error']:.2f} %"])
    show_table(["", ""], rows, f"{about['network']} ({about['form']})")

    classes = [row for row in found.of_class() if row["error"]]
    classes.sort(key=lambda row: -row["error"])
    rows = []
    for row in classes[:_ROWS]:
        taken = f"{escape(row['taken_for'])} ({row['taken_for_images']:,})"
        error = f"{row['error']:.2f} %"
        rows.append([escape(row["class"]), f"{row['images']:,}", error, taken])
    if rows:
        show_table(["class", "images", "error", "most taken for"], rows, "Classes with most errors")

    if found.corruptions:
        strengths = len(next(iter(found.corruptions.values())))
        rows = [[n, *(f"{e:.1f}" for e in errors)] for n, errors in found.corruptions.items()]
        heads = ["", *map(str, range(1, strengths + 1))]
        show_table(heads, rows, "Error in percent by strength")


VERB = Verb(
    "Evaluates a trained network: errors, calibration, confusions, robustness.",
    _define_flags,
    _evaluate,
    arguments="PATH",
)
