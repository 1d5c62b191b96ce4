"""Which kinds of operation a computation spends its time on, by TensorFlow's profiler."""

import collections
import glob
import os
import re
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf
from tensorflow.tsl.profiler.protobuf import xplane_pb2

# The profiler calls an operation "name:Type". Types of oneDNN, and fused ones, have prefixes.
_OPERATION = re.compile(r"[^:]+:(?:_Mkl)?(?:Native)?_?(\w+)")
_THREADS = "tf_Compute"


class Kind(NamedTuple):
    """All operations of one type.

    Attributes:
      name: the type.
      count: how many there are.
      seconds: what they take, summed over the threads that run operations.
    """

    name: str
    count: float
    seconds: float


def kinds(run: Callable[[], Any], steps: int) -> list[Kind]:
    """Runs something under the profiler and returns the Kinds of one step of it, slowest first.

    Args:
      run: a function that takes some equal steps and waits for their results.
      steps: how many.
    """
    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        run()
        tf.profiler.experimental.stop()
        (path,) = glob.glob(os.path.join(folder, "**", "*.xplane.pb"), recursive=True)
        with open(path, "rb") as f:
            space = xplane_pb2.XSpace.FromString(f.read())
    counts: collections.Counter = collections.Counter()
    seconds: collections.Counter = collections.Counter()
    for plane in space.planes:
        for line in plane.lines:
            if line.name.startswith(_THREADS):
                for event in line.events:
                    found = _OPERATION.fullmatch(plane.event_metadata[event.metadata_id].name)
                    if found:
                        counts[found[1]] += 1
                        seconds[found[1]] += event.duration_ps / 1e12
    return [
        Kind(name, counts[name] / steps, total / steps) for name, total in seconds.most_common()
    ]


def table(found: list[Kind], most: int = 15) -> list[str]:
    """Returns lines that show Kinds, the first of them by name, all others as one, and the sum."""
    rows, rest = found[:most], found[most:]
    if rest:
        rows.append(_together(f"{len(rest)} other kinds", rest))
    rows.append(_together("all", found))
    return [f"{'kind':32}{'count':>8}{'ms':>10}{'share':>10}"] + [
        f"{kind.name:32}{kind.count:8.0f}{1000 * kind.seconds:10.2f}"
        f"{100 * kind.seconds / rows[-1].seconds:8.1f} %"
        for kind in rows
    ]


def _together(name: str, several: list[Kind]) -> Kind:
    return Kind(name, sum(kind.count for kind in several), sum(kind.seconds for kind in several))
