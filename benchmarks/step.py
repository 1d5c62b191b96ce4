"""Speed and memory of a training step, alone and within training.

    python benchmarks/step.py --dataset=image_folder --data_dir=FOLDER --methods=baseline,pcl

It prints a line for every network, precision and method (each of its stages), with --recompute also
for a step that computes outputs of layers again:

- the seconds from nothing to the end of the first step;
- the images/s (augmented views not counted) of the bare step, which takes one batch of real views
  over and over;
- the time of a step as a multiple of the first method's in that precision;
- the arithmetic of an image, in GFLOP: three forward passes of what is trained, and one of each
  teacher;
- what part the step reaches of the FLOP/s at which this machine multiplies matrices of that
  precision, and of the bytes/s at which it adds large vectors;
- what part of the step's time its own convolutions and matrix products take, alone in one graph;
- what part of the step's speed `fit` reaches on the real input pipeline, with a record and
  TensorBoard's logs written as in a run;
- the memory that training takes at its peak, over that of a process that has only loaded TensorFlow
  and the images. It is taken in a process of its own.

Everything is measured in turns, in rounds, so that a noisy machine disturbs all alike. Medians
count, those of ratios within a round where two measures are compared; the smallest and the largest
value stand in brackets. docs/speed.md says how to read the figures.

With --profile, a table follows that says which operations the time goes to.
"""

import contextlib
import itertools
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import profiles
import tensorflow as tf
import yardsticks
from absl import app, flags

from tf_pcl import compat, data
from tf_pcl.compat import keras
from tf_pcl.methods import METHODS
from tf_pcl.methods.cost import training_flop
from tf_pcl.methods.distiller import build_all
from tf_pcl.training import strategy
from tf_pcl.training.assemble import Assembly
from tf_pcl.training.callbacks import Record
from tf_pcl.training.events import Events
from tf_pcl.training.workdir import Workdir

# Before app.run, in which TensorFlow looks for devices.
compat.let_xla_compile_elementwise()

FLAGS = flags.FLAGS
flags.DEFINE_string("dataset", "digits", "data set")
flags.DEFINE_string("data_dir", None, "its folder")
flags.DEFINE_integer("image_size", None, "pixels: resize images to this side")
flags.DEFINE_list("networks", ["resnet32"], "target networks")
flags.DEFINE_string("teacher_network", "resnet110", "the teacher, where a method trains one")
flags.DEFINE_list("methods", ["baseline", "pcl"], "methods; times are compared to the first's")
flags.DEFINE_list("precisions", ["float32", "mixed_bfloat16"], "Keras precision policies")
flags.DEFINE_integer("batch_size", 128, "images a step")
flags.DEFINE_integer("steps", 20, "steps a round")
flags.DEFINE_integer("rounds", 3, "rounds")
flags.DEFINE_bool("in_fit", True, "measure within training too")
flags.DEFINE_bool("memory", True, "measure memory too; on Linux")
flags.DEFINE_bool("yardsticks", True, "measure what the machine and the convolutions alone do too")
flags.DEFINE_bool("recompute", False, "measure steps that recompute outputs of layers too")
flags.DEFINE_bool("profile", False, "say which kinds of operation the time of a step goes to")


def set_precision(policy: str) -> None:
    """Sets a precision policy in this process, which has several; a run has one."""
    tf.config.optimizer.set_jit(False)
    strategy.set_precision(policy)


class Clock(keras.callbacks.Callback):
    """Measures the seconds of a step, from the first step's end on."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)


class Case(NamedTuple):
    """What is measured: one stage of a method, whose number counts from 0.

    With `recompute`, its step computes outputs of layers again (`--recompute` of a run).
    """

    network: str
    teacher_network: str
    precision: str
    method: str
    stage: int
    recompute: bool = False


class Trained:
    """A stage that is trained; those before it are built and not trained.

    Args:
      case: what is measured.
      loaded: the images.
      batch_size: images a step.
      steps: steps a round.
    """

    def __init__(self, case: Case, loaded: data.ImageData, batch_size: int, steps: int):
        began = time.perf_counter()
        set_precision(case.precision)
        stages = stages_of(case, loaded)[: case.stage + 1]
        self.model, self.name = build_all(stages)[-1], stages[-1].name
        self.precision, self.batch_size, self.steps = case.precision, batch_size, steps
        self.model.compile(epochs=300, steps_per_epoch=steps + 1, recompute=case.recompute)
        self.stream = data.train_batches(loaded, batch_size, 300, views=self.model.num_views)
        self.batch = iter(tf.data.Dataset.from_tensors(next(iter(self.stream))).repeat())
        self.step = self.model.make_train_function()
        self.step(self.batch)["loss"].numpy()
        self.first = time.perf_counter() - began
        for _ in range(2):  # XLA compiles what it compiles in the second step.
            self.step(self.batch)
        self.alone: list[float] = []
        self.in_fit: list[float] = []
        self.convolutions: Optional[yardsticks.Convolutions] = None

    def take_turn(self, folder: Optional[str]) -> None:
        """Takes the seconds of a step, alone and, with a folder for a run's records, in `fit`."""
        began = time.perf_counter()
        self.take_steps()
        self.alone.append((time.perf_counter() - began) / self.steps)
        if folder:
            record = self.record(folder)
            clock = Clock()
            self.model.fit(
                self.stream, steps_per_epoch=self.steps + 1, verbose=0, callbacks=[record, clock]
            )
            self.in_fit.append(clock.seconds)
        if self.convolutions:
            self.convolutions.take_turn()

    def take_steps(self) -> None:
        """Takes as many steps as a round has, and waits for the last."""
        set_precision(self.precision)
        for _ in range(self.steps):
            logs = self.step(self.batch)
        logs["loss"].numpy()

    def add_yardsticks(self) -> None:
        """Counts the arithmetic and the memory traffic, and measures the convolutions from now on.

        Attributes that it sets:
          flop: of a step.
          moved: the bytes that a step reads and writes, as yardsticks.moved_bytes counts them.
          convolutions: those of the step.
        """
        function = self.step.get_concrete_function(self.batch)
        self.flop = self.batch_size * training_flop(self.model)
        self.moved = yardsticks.moved_bytes(function)
        self.convolutions = yardsticks.Convolutions(function)

    def record(self, folder: str) -> Record:
        """Returns a run's callback that writes its records into a folder."""
        workdir = Workdir(folder)
        events = Events(workdir, [], self.model.deployed_exit, {})
        return Record(workdir, [], events, self.batch_size, lambda rows: rows)


def stages_of(case: Case, loaded: data.ImageData) -> list[Any]:
    """Returns all stages of a case's method."""
    method, arguments = METHODS[case.method], {}
    if "teacher_network" in method.parameters():
        arguments["teacher_network"] = case.teacher_network
    return method.stages(Assembly(loaded), case.network, **arguments)


def peak_memory(source: tuple, case: Case, batch_size: int) -> float:
    """Returns the GiB that a few steps take at most.

    Args:
      source: the arguments of data.load.
      case: what is measured.
      batch_size: images a step.
    """
    with contextlib.redirect_stdout(None):
        loaded = data.load(*source)
    before = yardsticks.most_memory()
    Trained(case, loaded, batch_size, steps=2).take_turn(None)
    return yardsticks.most_memory() - before


def measure(network: str, loaded: data.ImageData) -> tuple[dict, dict]:
    """Measures the speed of every precision, method and stage with one network.

    Returns:
      {Case: Trained}, {precision: Machine}; the second is empty without yardsticks.
    """
    trained, machines = {}, {}
    for precision in FLAGS.precisions:
        for method in FLAGS.methods:
            first = Case(network, FLAGS.teacher_network, precision, method, 0)
            variants = [False, True] if FLAGS.recompute else [False]
            for i, recompute in itertools.product(range(len(stages_of(first, loaded))), variants):
                case = first._replace(stage=i, recompute=recompute)
                trained[case] = Trained(case, loaded, FLAGS.batch_size, FLAGS.steps)
                if FLAGS.yardsticks:
                    trained[case].add_yardsticks()
        if FLAGS.yardsticks:
            computed_in = keras.mixed_precision.Policy(precision).compute_dtype
            machines[precision] = yardsticks.Machine(tf.as_dtype(computed_in))
    for _ in range(FLAGS.rounds):
        for one in (*machines.values(), *trained.values()):
            if isinstance(one, yardsticks.Machine):
                one.take_turn()
                continue
            with tempfile.TemporaryDirectory() as folder:
                one.take_turn(folder if FLAGS.in_fit else None)
    return trained, machines


def columns() -> dict[str, int]:
    """Returns {heading: width} of what is printed of a case."""
    widths = {"network": 24, "precision": 15, "method": 20, "first step": 11, "images/s": 21}
    widths[f"× {FLAGS.methods[0]}"] = 11
    if FLAGS.yardsticks:
        widths |= {"GFLOP": 7, "of products": 12, "of memory": 10, "convolutions": 22}
    if FLAGS.in_fit:
        widths["in fit"] = 9
    if FLAGS.memory:
        widths["memory"] = 10
    return widths


def printed(cells: Sequence[str]) -> str:
    """Returns a line of a table of `columns`."""
    widths = columns().values()
    return " ".join(
        f"{cell:{'<' if i < 3 else '>'}{width}}"
        for i, (cell, width) in enumerate(zip(cells, widths))
    )


def cells(
    case: Case, one: Trained, base: Trained, machine: Optional[yardsticks.Machine], source: tuple
) -> list[str]:
    """Returns what is printed of a case, whose times are compared to those of `base`."""
    name = " ".join(filter(None, (case.method, one.name, "recompute" * case.recompute)))
    found = [case.network, case.precision, name, f"{one.first:.1f} s"]
    found.append(spread(FLAGS.batch_size / np.array(one.alone)))
    found.append(f"{np.median(one.alone) / np.median(base.alone):.2f}")
    if machine and one.convolutions:
        products = one.flop / np.multiply(one.alone, machine.flop_per_second)
        memory = one.moved / np.multiply(one.alone, machine.bytes_per_second)
        share = 100 * np.divide(one.convolutions.seconds, one.alone)
        found.append(f"{one.flop / FLAGS.batch_size / 1e9:.3g}")
        found += [f"{100 * np.median(x):.1f} %" for x in (products, memory)]
        found.append(f"{spread(share)} %")
    if FLAGS.in_fit:
        found.append(f"{100 * np.median(np.divide(one.alone, one.in_fit)):.1f} %")
    if FLAGS.memory:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            gib = pool.apply(peak_memory, (source, case, FLAGS.batch_size))
        found.append(f"{gib:.2f} GiB")
    return found


def spread(values: Any) -> str:
    """Returns the median of values, with the smallest and the largest."""
    return f"{np.median(values):.1f} ({min(values):.1f}–{max(values):.1f})"


def main(argv: list[str]) -> None:
    del argv
    tf.get_logger().setLevel("ERROR")
    source = FLAGS.dataset, FLAGS.data_dir, FLAGS.image_size
    loaded = data.load(*source)
    print(printed(list(columns())), flush=True)
    for network in FLAGS.networks:
        trained, machines = measure(network, loaded)
        for case, one in trained.items():
            base = trained[case._replace(method=FLAGS.methods[0], stage=0, recompute=False)]
            row = cells(case, one, base, machines.get(case.precision), source)
            print(printed(row), flush=True)
        for precision, machine in machines.items():
            products = spread(np.divide(machine.flop_per_second, 1e9))
            memory = spread(np.divide(machine.bytes_per_second, 1e9))
            print(f"The machine, {precision}: {products} GFLOP/s, {memory} GB/s", flush=True)
        for case, one in trained.items() if FLAGS.profile else ():
            title = f"{case.network} {case.precision} {case.method} {one.name}".rstrip()
            table = profiles.table(profiles.kinds(one.take_steps, one.steps))
            print("", f"{title}, operations of a step:", *table, sep="\n", flush=True)
        del trained
        keras.backend.clear_session()


if __name__ == "__main__":
    app.run(main)
