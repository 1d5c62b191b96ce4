"""Speed and memory of a training step, alone and within training.

    python benchmarks/step.py --dataset=image_folder --data_dir=FOLDER --networks=resnet32 --methods=baseline,pcl

For every network, precision and method (each of its stages): seconds from nothing to the end of the first step; images/s
(augmented views not counted) of the bare step, one batch of real views stepped over and over; its time as a multiple of the
first method's in that precision; what part of that speed fit reaches on the real input pipeline, with a record and
TensorBoard's logs written as train.py does; and the memory that training takes at its peak, over that of a process that has
but loaded TensorFlow and the images. Speeds are taken in turns, in rounds, so that a noisy machine disturbs them alike; the
medians count. Memory is taken in a process of its own.
"""

import contextlib
import functools
import multiprocessing
import os
import re
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import tensorflow as tf
from absl import app, flags

from tf_pcl import data
from tf_pcl.compat import keras
from tf_pcl.methods import METHODS
from tf_pcl.training.callbacks import Record
from tf_pcl.training.run import around

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


class Clock(keras.callbacks.Callback):
    """The seconds of a step, from the first step's end on."""

    def on_epoch_begin(self, epoch, logs=None):
        self.ends = []

    def on_train_batch_end(self, batch, logs=None):
        self.ends.append(time.perf_counter())

    @property
    def seconds(self):
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)


class Trained:
    """The last of some stages, trained; those before are built and not trained.

    Args:
      stages: of Distiller.stages; loaded: an ImageData; batch_size: images a step; steps: steps a round.
    """

    def __init__(self, stages, loaded, batch_size, steps):
        began = time.perf_counter()
        models = []
        for stage in stages:
            models.append(stage.build(models))
        self.model, self.name, self.batch_size, self.steps = (
            models[-1],
            stages[-1].name,
            batch_size,
            steps,
        )
        self.model.compile(epochs=300, steps_per_epoch=steps + 1)
        self.stream = data.train_batches(loaded, batch_size, 300, views=self.model.num_views)
        self.batch = iter(tf.data.Dataset.from_tensors(next(iter(self.stream))).repeat())
        self.step = self.model.make_train_function()
        self.step(self.batch)["loss"].numpy()
        self.first = time.perf_counter() - began
        self.alone, self.in_fit = [], []

    def take_turn(self, folder):
        """One round: seconds of a step, alone and, if there is a folder for its records, in fit."""
        began = time.perf_counter()
        for _ in range(self.steps):
            logs = self.step(self.batch)
        logs["loss"].numpy()
        self.alone.append((time.perf_counter() - began) / self.steps)
        if folder:
            record, clock = Record(folder, [], self.batch_size, lambda rows: rows), Clock()
            self.model.fit(
                self.stream, steps_per_epoch=self.steps + 1, verbose=0, callbacks=[record, clock]
            )
            self.in_fit.append(clock.seconds)


def stages_of(method, network, loaded, teacher_network):
    """[Distiller.stages of the first stage, of the first two, …]"""
    arguments = (
        {"teacher_network": teacher_network}
        if "teacher_network" in METHODS[method].parameters()
        else {}
    )
    stages = METHODS[method].stages(functools.partial(around, loaded), network, **arguments)
    return [stages[: i + 1] for i in range(len(stages))]


def peak_memory(source, method, network, teacher_network, stage, precision, batch_size):
    """GiB that a few steps take at most; to be called in a process of its own. `source`: arguments of data.load."""
    with contextlib.redirect_stdout(None):
        loaded = data.load(*source)
    before = most_memory()
    keras.mixed_precision.set_global_policy(precision)
    Trained(
        stages_of(method, network, loaded, teacher_network)[stage], loaded, batch_size, 2
    ).take_turn(None)
    return most_memory() - before


def most_memory():
    """GiB that this process has held at most, as Linux counts them."""
    with open("/proc/self/status") as f:
        # Not getrusage, in which a process inherits its parent's.
        return int(re.search(r"VmHWM:\s+(\d+) kB", f.read()).group(1)) / 2**20


def main(argv):
    del argv
    tf.get_logger().setLevel("ERROR")
    source = FLAGS.dataset, FLAGS.data_dir, FLAGS.image_size
    loaded = data.load(*source)
    print(
        f"{'network':24} {'precision':15} {'method':24} first step  images/s  × {FLAGS.methods[0]:10}"
        f"{'in fit' if FLAGS.in_fit else '':>8}{'memory' if FLAGS.memory else '':>10}",
        flush=True,
    )
    for network in FLAGS.networks:
        trained = {}
        for precision in FLAGS.precisions:
            keras.mixed_precision.set_global_policy(precision)
            for method in FLAGS.methods:
                for i, stages in enumerate(
                    stages_of(method, network, loaded, FLAGS.teacher_network)
                ):
                    trained[precision, method, i] = Trained(
                        stages, loaded, FLAGS.batch_size, FLAGS.steps
                    )
        for _ in range(FLAGS.rounds):
            for one in trained.values():
                with tempfile.TemporaryDirectory() as folder:
                    one.take_turn(folder if FLAGS.in_fit else None)
        for (precision, method, i), one in trained.items():
            seconds = np.median(one.alone)
            times = seconds / np.median(trained[precision, FLAGS.methods[0], 0].alone)
            line = (
                f"{network:24} {precision:15} {' '.join([method, one.name]):24} {one.first:8.1f} s "
                f"{FLAGS.batch_size / seconds:9.1f}  {times:8.2f}    "
            )
            if FLAGS.in_fit:
                line += f"{100 * np.median(np.divide(one.alone, one.in_fit)):8.1f} %"
            if FLAGS.memory:
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    gib = pool.apply(
                        peak_memory,
                        (
                            source,
                            method,
                            network,
                            FLAGS.teacher_network,
                            i,
                            precision,
                            FLAGS.batch_size,
                        ),
                    )
                line += f"{gib:6.2f} GiB"
            print(line, flush=True)
        del trained
        keras.backend.clear_session()


if __name__ == "__main__":
    app.run(main)
