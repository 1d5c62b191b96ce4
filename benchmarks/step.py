"""Speed of a training step, alone and within training.

    python benchmarks/step.py --dataset=image_folder --data_dir=FOLDER --network=resnet32

For every method and precision: images/s (augmented views not counted) of the bare step, one batch of real views stepped over
and over; its time as a multiple of the first method's in that precision; and what part of that speed fit reaches on the real
input pipeline, with a record and TensorBoard's logs written as train.py does. All take turns in rounds, so that a noisy machine
disturbs them alike; the medians count.
"""
import os
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import tensorflow as tf
from absl import app, flags
from tensorflow import keras

from tf_pcl import data, networks
from tf_pcl.methods import METHODS
from tf_pcl.training.callbacks import Record

FLAGS = flags.FLAGS
flags.DEFINE_string("dataset", "digits", "data set")
flags.DEFINE_string("data_dir", None, "its folder")
flags.DEFINE_string("network", "resnet32", "target network")
flags.DEFINE_list("methods", ["baseline", "pcl"], "methods; times are compared to the first's")
flags.DEFINE_list("precisions", ["float32", "mixed_bfloat16"], "Keras precision policies")
flags.DEFINE_integer("batch_size", 128, "images a step")
flags.DEFINE_integer("steps", 20, "steps a round")
flags.DEFINE_integer("rounds", 3, "rounds")


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
    """A method that is trained in one precision.

    Args:
      method: a name of METHODS; loaded: an ImageData; folder: for its records.
    """

    def __init__(self, method, loaded, folder):
        network = networks.build(FLAGS.network, loaded.image_shape, len(loaded.classes))
        self.model = METHODS[method](network, preprocess=networks.standardise(loaded.mean, loaded.std))
        self.model.compile(epochs=300, steps_per_epoch=FLAGS.steps + 1)
        self.stream = data.train_batches(loaded, FLAGS.batch_size, 300, views=self.model.views)
        self.batch = iter(tf.data.Dataset.from_tensors(next(iter(self.stream))).repeat())
        self.step = self.model.make_train_function()
        self.step(self.batch)
        self.callbacks = [Record(folder, [], FLAGS.batch_size, lambda rows: rows), Clock()]
        self.alone, self.in_fit = [], []

    def take_turn(self):
        """One round: seconds of a step, alone and in fit."""
        began = time.perf_counter()
        for _ in range(FLAGS.steps):
            logs = self.step(self.batch)
        logs["loss"].numpy()
        self.alone.append((time.perf_counter() - began) / FLAGS.steps)
        self.model.fit(self.stream, steps_per_epoch=FLAGS.steps + 1, verbose=0, callbacks=self.callbacks)
        self.in_fit.append(self.callbacks[1].seconds)


def main(argv):
    del argv
    loaded = data.load(FLAGS.dataset, FLAGS.data_dir)
    trained = {}
    with tempfile.TemporaryDirectory() as folder:
        for precision in FLAGS.precisions:
            keras.mixed_precision.set_global_policy(precision)
            for method in FLAGS.methods:
                trained[precision, method] = Trained(method, loaded, folder)
        for _ in range(FLAGS.rounds):
            for one in trained.values():
                one.take_turn()
    for (precision, method), one in trained.items():
        seconds = np.median(one.alone)
        times = seconds / np.median(trained[precision, FLAGS.methods[0]].alone)
        share = np.median(np.divide(one.alone, one.in_fit))
        print(f"{precision:15} {method:10} {FLAGS.batch_size / seconds:8.1f} images/s {times:6.2f} × {FLAGS.methods[0]}"
              f" {100 * share:6.1f} % of it in fit")


if __name__ == "__main__":
    app.run(main)
