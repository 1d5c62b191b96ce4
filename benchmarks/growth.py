"""How the time and the memory of a PCL step grow.

    python benchmarks/growth.py --axes=peers,batch --figure=growth.png

Along each axis one thing changes, and all else stays as the flags say:

- peers: their number m, each of which sees a view of its own;
- batch: the images of a step;
- depth: the layers of a CIFAR ResNet;
- size: the side of the images in pixels;
- replicas: how many logical CPU devices share the batch, under a mirrored strategy.

Every point is trained in a process of its own, on noise, and these processes take turns, so that a
noisy machine disturbs all alike. For each point a line tells the time of a step (the median), its
arithmetic, and the memory that training takes at its peak, over that of a process that has only
loaded TensorFlow, beside the outputs that the backward pass needs, by arithmetic. For each axis
lines follow with the fitted laws, a power and a line with a constant, and with a verdict: whether
the time grows by more than --tolerance over what the arithmetic says.

--results keeps what was measured in a file, so that the axes can be measured in several calls and
drawn into one figure. On Linux.
"""

import json
import multiprocessing
import os
import sys
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import tensorflow as tf
import yardsticks
from absl import app, flags
from matplotlib.figure import Figure

from tf_pcl import methods, networks
from tf_pcl.methods.cost import training_flop

FLAGS = flags.FLAGS
flags.DEFINE_list("axes", ["peers", "batch", "depth", "size", "replicas"], "what grows")
flags.DEFINE_list("peers", ["2", "3", "4", "6", "8"], "numbers of peers; PCL needs 2")
flags.DEFINE_list("batch", ["32", "64", "128", "256", "512"], "batch sizes")
flags.DEFINE_list("depth", ["8", "14", "20", "32"], "depths of the ResNet")
flags.DEFINE_list("size", ["16", "32", "64"], "sides of the images")
flags.DEFINE_list("replicas", ["1", "2"], "logical CPU devices")
flags.DEFINE_string("standard", "3,64,8,32,1", "peers, batch … where they do not grow")
flags.DEFINE_float("seconds", 1.5, "seconds of a turn; at least two steps")
flags.DEFINE_integer("rounds", 3, "rounds")
flags.DEFINE_float("tolerance", 0.05, "what the time may grow over the arithmetic")
flags.DEFINE_string("results", None, "a JSON file, to which the axes are added")
flags.DEFINE_string("figure", None, "a PNG file: a plot of all axes in the results")


class Point(NamedTuple):
    """What is trained."""

    peers: int
    batch: int
    depth: int
    size: int
    replicas: int


class Measured(NamedTuple):
    """What was measured at a value of an axis.

    Attributes:
      value: what grows.
      seconds: of a step.
      gflop: of a step, by arithmetic.
      gib: the memory at the peak.
      gib_outputs: the outputs of layers that the backward pass needs, by arithmetic.
    """

    value: int
    seconds: float
    gflop: float
    gib: float
    gib_outputs: float


class Trained:
    """The step of a point; it lives in a process of its own.

    Args:
      point: what is trained.
    """

    def __init__(self, point: Point):
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * point.replicas
        )
        devices = [device.name for device in tf.config.list_logical_devices("CPU")]
        strategy = tf.distribute.get_strategy()
        if point.replicas > 1:
            strategy = tf.distribute.MirroredStrategy(devices)
        shape = (point.size, point.size, 3)
        random = np.random.RandomState(0)
        views = random.randint(0, 256, (point.batch, point.peers, *shape), np.uint8)
        labels = np.arange(point.batch) % 10
        before = yardsticks.most_memory()
        with strategy.scope():
            model = methods.PCL(
                lambda: networks.build(f"resnet{point.depth}", shape, 10),
                peers=point.peers,
                preprocess=networks.standardise([128.0] * 3, [64.0] * 3),
            )
            model.compile(epochs=300, steps_per_epoch=100)
        self.gflop = point.batch * training_flop(model) / 1e9
        outputs = point.peers * point.batch * needed(model.deployed())
        self.gib_outputs = 4 * outputs / 2**30
        batches = tf.data.Dataset.from_tensors((views, labels)).repeat()
        self.batches = iter(strategy.experimental_distribute_dataset(batches))
        self.step = model.make_train_function()
        for _ in range(2):
            self.step(self.batches)["loss"].numpy()
        self.gib = yardsticks.most_memory() - before

    def turn(self, seconds: float) -> float:
        """Returns the seconds of a step, taken for so many seconds."""
        return 1 / yardsticks.rate(lambda: self.step(self.batches)["loss"].numpy(), seconds)


def needed(network: Any) -> int:
    """Returns how many numbers the backward pass needs of an image's forward pass, about.

    They are the inputs of BatchNorm and those of convolutions, which are outputs of convolutions
    and of ReLUs.
    """
    kinds = "Conv2D", "Activation", "ReLU"
    layers = [layer for layer in network._flatten_layers() if type(layer).__name__ in kinds]
    return sum(int(np.prod(layer.output_shape[1:])) for layer in layers)


# The step of this process; a process has one.
_own: list[Trained] = []


def begin(point: Point) -> tuple[float, float, float]:
    """Builds the step of this process, and returns (GFLOP, GiB at the peak, GiB of outputs)."""
    tf.get_logger().setLevel("ERROR")
    _own.append(Trained(point))
    return _own[0].gflop, _own[0].gib, _own[0].gib_outputs


def turn(seconds: float) -> float:
    """Returns the seconds of a step of this process."""
    return _own[0].turn(seconds)


def measure(axis: str) -> list[Measured]:
    """Measures all points of an axis, in turns."""
    standard = Point(*map(int, FLAGS.standard.split(",")))
    values = [int(value) for value in FLAGS[axis].value]
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Pool(1) for _ in values]
    try:
        points = [standard._replace(**{axis: value}) for value in values]
        # All are built at once: it is no time that counts.
        begun = [process.apply_async(begin, (p,)) for process, p in zip(processes, points)]
        known = [one.get() for one in begun]
        seconds = [
            [process.apply(turn, (FLAGS.seconds,)) for process in processes]
            for _ in range(FLAGS.rounds)
        ]
    finally:
        for process in processes:
            process.terminate()
    return [Measured(v, s, *k) for v, s, k in zip(values, np.median(seconds, 0).tolist(), known)]


def power(x: Any, y: Any) -> float:
    """Returns p of the power law y = c·x^p that fits best, by least squares of logarithms."""
    return round(float(np.polyfit(np.log(x), np.log(y), 1)[0]), 6) + 0.0


def law(what: str, unit: str, x: Any, y: Any, said: Any) -> str:
    """Returns a line that says how y grows with x, beside what the arithmetic says."""
    slope, constant = np.polyfit(x, y, 1)
    return (
        f"  {what} ∝ x^{power(x, y):.2f} (arithmetic: x^{power(x, said):.2f}); "
        f"{constant:.3g} + {slope:.3g} x {unit}"
    )


def over(rows: list[Measured]) -> tuple[float, int]:
    """Returns by how much the time grows over the arithmetic, from the first point on, and where.

    Args:
      rows: the points of an axis, the smallest first.
    """
    first = rows[0]
    grown = [(r.seconds / first.seconds) / (r.gflop / first.gflop) - 1 for r in rows[1:]]
    worst = int(np.argmax(grown))
    return grown[worst], rows[1 + worst].value


def lines(axis: str, rows: list[Measured], tolerance: float) -> list[str]:
    """Returns what is printed of an axis."""
    told = [f"{axis:>9}   s/step   GFLOP   GFLOP/s   peak GiB   outputs GiB"]
    told += [
        f"{r.value:9} {r.seconds:8.3f} {r.gflop:7.3g} {r.gflop / r.seconds:9.3g} {r.gib:10.2f} "
        f"{r.gib_outputs:13.3g}"
        for r in rows
    ]
    x, seconds, gflop, gib, outputs = zip(*rows)
    told += [law("time", "s", x, seconds, gflop), law("memory", "GiB", x, gib, outputs)]
    more, where = over(rows)
    verdict = "holds" if more <= tolerance else "MISSED"
    told.append(
        f"  at most {100 * tolerance:.0f} % over the arithmetic: {verdict} ({100 * more:+.1f} % at "
        f"{axis}={where}, measured from {axis}={rows[0].value})"
    )
    return told


def draw(results: dict[str, list[Measured]], path: str) -> None:
    """Draws time (above) and memory (below) of all axes, with what the arithmetic says."""
    figure = Figure(figsize=(2.6 * len(results), 5), layout="constrained")
    grid = figure.subplots(2, len(results), squeeze=False)
    for column, (axis, rows) in zip(grid.T, results.items()):
        x, seconds, gflop, gib, outputs = map(np.array, zip(*rows))
        for plot, what, y, said in (
            (column[0], "seconds a step", seconds, gflop),
            (column[1], "GiB at the peak", gib, outputs),
        ):
            plot.loglog(x, y, "o", color="C0", label="measured")
            fitted = np.exp(np.polyval(np.polyfit(np.log(x), np.log(y), 1), np.log(x)))
            plot.loglog(x, fitted, "-", color="C0", label=f"fitted: x^{power(x, y):.2f}")
            plot.loglog(
                x,
                said * y[0] / said[0],
                "--",
                color="C1",
                label=f"arithmetic: x^{power(x, said):.2f}",
            )
            plot.set_xticks(x, map(str, x))
            plot.set_yticks(y[[0, -1]], [f"{one:.2g}" for one in y[[0, -1]]])
            plot.minorticks_off()
            plot.legend(fontsize=7, frameon=False)
            plot.set_ylabel(what if axis == next(iter(results)) else "")
        column[1].set_xlabel(axis)
    figure.savefig(path, dpi=110)


def main(argv: list[str]) -> None:
    del argv
    results: dict[str, list[Measured]] = {}
    if FLAGS.results and os.path.exists(FLAGS.results):
        with open(FLAGS.results) as f:
            results = {axis: [Measured(*r) for r in rows] for axis, rows in json.load(f).items()}
    print(f"peers, batch, depth, size, replicas where they do not grow: {FLAGS.standard}")
    for axis in FLAGS.axes:
        results[axis] = measure(axis)
        print(*lines(axis, results[axis], FLAGS.tolerance), sep="\n", flush=True)
        if FLAGS.results:
            with open(FLAGS.results, "w") as f:
                json.dump(results, f)
    if FLAGS.figure:
        draw(results, FLAGS.figure)


if __name__ == "__main__":
    app.run(main)
