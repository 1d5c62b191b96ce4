"""Speed of the bare training step: one batch of real views, kept in memory, stepped over and over.

    python benchmarks/step.py --dataset=image_folder --data_dir=FOLDER --network=resnet32 --steps=30

prints images/s (augmented views not counted) of each method in each precision, interleaved in rounds so that a noisy
machine disturbs all alike, and the ratio of each step's time to that of the first method in the same precision.
"""
import os
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import tensorflow as tf
from absl import app, flags
from tensorflow import keras

from tf_pcl import data, methods, networks

FLAGS = flags.FLAGS
flags.DEFINE_string("dataset", "digits", "data set")
flags.DEFINE_string("data_dir", None, "its folder")
flags.DEFINE_string("network", "resnet32", "target network")
flags.DEFINE_list("methods", ["baseline", "pcl"], "methods; ratios are to the first")
flags.DEFINE_list("precisions", ["float32", "mixed_bfloat16"], "Keras precision policies")
flags.DEFINE_integer("batch_size", 128, "images a step")
flags.DEFINE_integer("steps", 20, "steps a round")
flags.DEFINE_integer("rounds", 3, "rounds; the median counts")


def main(argv):
    del argv
    loaded = data.load(FLAGS.dataset, FLAGS.data_dir)
    runs = {}
    for precision in FLAGS.precisions:
        keras.mixed_precision.set_global_policy(precision)
        for method in FLAGS.methods:
            network = networks.build(FLAGS.network, loaded.image_shape, len(loaded.classes))
            model = methods.METHODS[method](network, preprocess=networks.standardise(loaded.mean, loaded.std))
            model.compile(epochs=300, steps_per_epoch=len(loaded.train) // FLAGS.batch_size)
            batches = data.train_batches(loaded, FLAGS.batch_size, 1, views=model.views)
            batch = iter(tf.data.Dataset.from_tensors(next(iter(batches))).repeat())
            step = model.make_train_function()
            began = time.perf_counter()
            step(batch)
            print(f"{precision} {method}: first step after {time.perf_counter() - began:.1f} s", flush=True)
            runs[precision, method] = (step, batch, [])
    for _ in range(FLAGS.rounds):
        for step, batch, seconds in runs.values():
            began = time.perf_counter()
            for _ in range(FLAGS.steps):
                logs = step(batch)
            logs["loss"].numpy()
            seconds.append((time.perf_counter() - began) / FLAGS.steps)
    for (precision, method), (_, _, seconds) in runs.items():
        time_of = np.median(seconds)
        ratio = time_of / np.median(runs[precision, FLAGS.methods[0]][2])
        print(f"{precision:15} {method:10} {FLAGS.batch_size / time_of:8.1f} images/s   {ratio:5.2f} × {FLAGS.methods[0]}")


if __name__ == "__main__":
    app.run(main)
