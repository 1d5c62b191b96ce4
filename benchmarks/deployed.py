"""Speed of a deployed network in its forms, against the plain Keras network.

    python benchmarks/deployed.py --networks=resnet32 --formats=saved_model,tflite

The network has random weights and statistics, and takes raw images of the data set. For every form,
with BatchNorm as it is and folded (`tf-pcl export --fold_batch_norm`), and for every batch size it
prints

- the milliseconds of a call, the median, and where the middle half of the calls lies;
- images/s;
- the time as a multiple of that of the plain network, a keras.Model called in a tf.function: the
  median over rounds of the ratio within a round;
- by how much logits differ from the plain network's at most.

The forms take their turns within a round, so that a noisy machine disturbs all alike.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import tensorflow as tf
from absl import app, flags

from tf_pcl import data, networks, surgery
from tf_pcl.compat import keras
from tf_pcl.deploy import artifacts, runtimes
from tf_pcl.training import export

FLAGS = flags.FLAGS
flags.DEFINE_string("dataset", "digits", "data set")
flags.DEFINE_string("data_dir", None, "its folder")
flags.DEFINE_integer("image_size", 32, "pixels: resize images to this side")
flags.DEFINE_list("networks", ["resnet32"], "target networks")
flags.DEFINE_list("formats", ["saved_model"], "forms, as those of tf-pcl export")
flags.DEFINE_list("batch_sizes", ["1", "128"], "images a call")
flags.DEFINE_integer("images", 512, "images a turn, at least 3 calls")
flags.DEFINE_integer("rounds", 10, "rounds")

PLAIN = "keras"
Answer = Callable[[np.ndarray], Any]


def built(name: str, loaded: data.ImageData) -> keras.Model:
    """Returns a deployed network, whose BatchNorm has statistics as after a training."""
    network = networks.build(name, loaded.image_shape, len(loaded.classes))
    random = np.random.RandomState(0)
    for layer in surgery.graph.leaves(network):
        if isinstance(layer, keras.layers.BatchNormalization):
            for weight in layer.weights:
                weight.assign(random.uniform(0.5, 1.5, weight.shape))
    scale = networks.standardise(loaded.mean, loaded.std)
    return surgery.deployable(scale, surgery.with_logits(network))


def forms(network: keras.Model, loaded: data.ImageData, folder: str) -> dict[str, Answer]:
    """Returns {form: a function from images uint8 [N, H, W, C] to logits}, the plain one first."""
    graph = tf.function(lambda images: network(images, training=False))
    found: dict[str, Answer] = {PLAIN: lambda images: graph(tf.constant(images))}
    folded = surgery.fold_batch_norm(network)
    for kind, one in {"": network, " folded": folded.network if folded.folded else None}.items():
        if one is None:
            continue
        place = os.path.join(folder, kind.strip() or "plain")
        os.makedirs(place)
        source = artifacts.Source(one, loaded, place)
        for name in FLAGS.formats:
            if name == "saved_model":  # Without a check in a process of its own.
                path = export.export(one, loaded.classes, place)
            else:
                path = artifacts._written(name, source)
            found[name + kind] = answer(name, path)
    return found


def answer(name: str, path: str) -> Answer:
    """Returns the function of a form that lies in a file."""
    if name != "saved_model":
        return runtimes.load(path).logits
    model = tf.saved_model.load(path)
    signature = model.signatures["serving_default"]
    # The signature does not keep the model.
    return lambda images, model=model: signature(images=tf.constant(images))["logits"]


def measure(found: dict[str, Answer], images: np.ndarray) -> dict[str, np.ndarray]:
    """Returns {form: seconds [rounds, calls]}."""
    calls = max(3, FLAGS.images // len(images))
    seconds: dict[str, list] = {name: [] for name in found}
    for round_ in range(FLAGS.rounds + 1):
        for name, call in found.items():
            taken = []
            for _ in range(calls):
                began = time.perf_counter()
                np.asarray(call(images))
                taken.append(time.perf_counter() - began)
            if round_:  # The first one traces, and fills caches.
                seconds[name].append(taken)
    return {name: np.array(taken) for name, taken in seconds.items()}


def main(argv: list[str]) -> None:
    del argv
    loaded = data.load(FLAGS.dataset, FLAGS.data_dir, FLAGS.image_size)
    print(
        f"{'network':16} {'form':28} batch        ms  middle half        images/s  × keras  differ"
    )
    for name in FLAGS.networks:
        network = built(name, loaded)
        with tempfile.TemporaryDirectory() as folder:
            found = forms(network, loaded, folder)
            for size in map(int, FLAGS.batch_sizes):
                images = loaded.train.first(min(size, len(loaded.train)))
                expected = np.asarray(found[PLAIN](images))
                seconds = measure(found, images)
                for form, taken in seconds.items():
                    low, middle, high = np.percentile(1000 * taken, [25, 50, 75])
                    ratios = np.median(taken, axis=1) / np.median(seconds[PLAIN], axis=1)
                    apart = np.abs(np.asarray(found[form](images)) - expected).max()
                    print(
                        f"{name:16} {form:28} {len(images):5} {middle:9.3f}  "
                        f"{f'{low:.3f} to {high:.3f}':18} {1000 * len(images) / middle:8.0f}  "
                        f"{np.median(ratios):7.3f}  {apart:.1e}",
                        flush=True,
                    )
        keras.backend.clear_session()


if __name__ == "__main__":
    app.run(main)
