"""What makes two runs comparable, and how a run compares with a baseline beside it."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any, Optional

import numpy as np

from tf_pcl import options
from tf_pcl.errors import UserError
from tf_pcl.methods import BASELINE, METHODS
from tf_pcl.options import Options
from tf_pcl.training.assemble import options_of
from tf_pcl.training.report import ended
from tf_pcl.training.workdir import TEST_FILES, TRAINING_FILES, Workdir, read_json

# Facts of data.json that do not depend on the seed.
FACTS = ("classes", "image_shape", "test images")
# Levels of 0 to 255 by which rounded means of the same images may differ.
_MEANS = 0.002
# Options of the machine, and how often to test: they change the result by rounding alone.
_MACHINE = {"strategy", "jit_compile", "deterministic", "test_every"}


def settings_of(given: Options) -> dict[str, str]:
    """Returns {name: text} of the options that affect the result, except for the seed.

    Options that are not given, or have the default of the method, are left out.
    """
    defaults = METHODS[given.method].parameters()
    leave = {*given.run_only(), *_MACHINE, "seed"}
    default_texts = {
        name: dataclasses.replace(given, **{name: value}).as_flags().get(name)
        for name, value in defaults.items()
        if name in options.names() and name not in ("network", "preprocess") and value is not None
    }
    return {
        name: text
        for name, text in given.as_flags().items()
        if name not in leave and default_texts.get(name) != text
    }


def same_test(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Says whether the data of two runs have the same classes and test images.

    Args:
      one, other: the contents of their data.json. The files of the test images are compared if both
        have them, which runs of earlier versions do not.
    """
    files = {data[TEST_FILES] for data in (one, other) if TEST_FILES in data}
    return len(files) < 2 and all(one.get(name) == other.get(name) for name in FACTS)


def same_training(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Says whether two runs have the same training images, as far as both tell of them.

    Args:
      one, other: the contents of their data.json.
    """
    apart = {
        "training images": lambda a, b: a != b,
        TRAINING_FILES: lambda a, b: a != b,
        "means": lambda a, b: np.abs(np.subtract(a, b)).max() > _MEANS,
    }
    pairs = ((one.get(name), other.get(name), differ) for name, differ in apart.items())
    return not any(differ(a, b) for a, b, differ in pairs if None not in (a, b))


def drawn(given: Options) -> tuple[Any, ...]:
    """Returns what the seed draws the training images by; () if they do not depend on it."""
    by = given.train_examples, given.validation_examples
    return (given.seed, *by) if any(by) else ()


def gain(results: Mapping[str, Any], given: Options, workdir: Workdir) -> Optional[str]:
    """Returns a line for people that compares a run with a baseline beside it.

    The baseline is a finished run in the same parent folder with the same settings, except for the
    seed and the method's own options. Among several, the one with the same seed is taken.

    Args:
      results: the contents of the run's results.json.
      given: the options of the run.
      workdir: its folder.

    Returns:
      The line; None if the run is a baseline, or has none beside it.
    """
    if given.method == BASELINE:
        return None
    found = sorted(
        _baselines(given, workdir), key=lambda run: (run[1]["seed"] != given.seed, run[0])
    )
    if not found:
        return None
    path, baseline = found[0]
    points = baseline["deployed_error"] - results["deployed_error"]
    how = f"{abs(points):.2f} points {'better' if points > 0 else 'worse'} than"
    if abs(points) < 0.005:
        how = "as good as"
    return (
        f"{how} the baseline in {path} ({baseline['deployed_error']:.2f} %); one seed of each says "
        "little, and tf-pcl report compares several"
    )


def _baselines(given: Options, workdir: Workdir) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (path, results) of the baselines beside a run with which it can be compared."""
    parent, data = os.path.dirname(os.path.normpath(workdir.path)), workdir.read_data()
    for name in sorted(os.listdir(parent or ".")):
        other = Workdir(os.path.join(parent, name))
        try:
            results = read_json(other.results)
            if results["method"] != BASELINE:
                continue
            its = options.from_file(other.flags)
            theirs = other.read_data()
            same = same_test(theirs, data) and (
                drawn(its) != drawn(given) or same_training(theirs, data)
            )
            if same and _common(its) == _common(given) and ended(results, its):
                yield other.path, {**results, "deployed_error": float(results["deployed_error"])}
        except (UserError, OSError, ValueError, KeyError, TypeError):
            continue  # It is not a run, or not one that this version can read.


def _common(given: Options) -> dict[str, str]:
    """Returns the settings that a run has in common with the baseline of its deployed network."""
    own = {"method", *options_of(given.method)}
    settings = {name: text for name, text in settings_of(given).items() if name not in own}
    return {**settings, "network": given.network.split(",")[0]}
