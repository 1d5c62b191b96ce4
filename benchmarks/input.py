"""Speed of the input pipeline, against images that are mapped one by one.

    python benchmarks/input.py --networks=resnet32

Images are made in a temporary folder and come from every kind of source: from memory, from JPEG
files that are read when they are needed, and from records of tensorflow-datasets that are read in
order. For each source and size a line tells

- the views/s that `data.train_batches` makes, with the usual augmentation of images of that size;
- the views/s of a pipeline as most users write it: `Dataset.map` of one image at a time, which
  decodes it once and makes its views with tf.image, then `batch` and `prefetch`;
- the ratio of the two;
- the views/s that decoding alone allows, where images are files: each image read and decoded by a
  parallel `map`, and nothing else;
- for each of `--networks`, how many training steps of `--method` the pipeline can feed in a second,
  and how many the bare step takes.

All are taken in turns, in rounds, so that a noisy machine disturbs all alike. The medians count;
behind ± stands half the distance between the lowest and the highest.
"""

import contextlib
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, Optional

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import tensorflow as tf
import yardsticks
from absl import app, flags, logging

from tf_pcl import compat, data
from tf_pcl.compat import keras
from tf_pcl.data import storage
from tf_pcl.methods import METHODS
from tf_pcl.training import strategy
from tf_pcl.training.assemble import Assembly

# Before app.run, in which TensorFlow looks for devices.
compat.let_xla_compile_elementwise()

FLAGS = flags.FLAGS
flags.DEFINE_list(
    "sources",
    ["memory-32", "files-64", "files-224", "records-64", "records-224"],
    "where images come from (memory, files, records) and their side in pixels",
)
flags.DEFINE_integer("images", 1024, "training images of each source")
flags.DEFINE_integer("views", 3, "views of each image")
flags.DEFINE_integer("batch_size", 128, "images a batch; a quarter of it beyond 64 pixels")
flags.DEFINE_float("seconds", 2, "seconds of a turn, of which the first third is not measured")
flags.DEFINE_integer("rounds", 3, "rounds")
flags.DEFINE_list("networks", [], "networks whose training step is to be fed")
flags.DEFINE_string("method", "pcl", "the method that trains them")
flags.DEFINE_string("precision", "float32", "Keras precision policy of the training step")

CLASSES = 10
EPOCHS = 10**6


class Turns:
    """Takes turns and keeps what each gave.

    Args:
      take: a function seconds -> events a second.
    """

    def __init__(self, take: Callable[[float], float]):
        self.take = take
        self.rates: list[float] = []

    @property
    def rate(self) -> float:
        """The median."""
        return float(np.median(self.rates))

    def __str__(self) -> str:
        digits = 0 if self.rate >= 100 else 2
        return f"{self.rate:,.{digits}f} ± {np.ptp(self.rates) / 2:,.{digits}f}"


class Source(NamedTuple):
    """Images of one size from one kind of source.

    Attributes:
      loaded: what data.load gives.
      one_by_one: a tf.data.Dataset of (image uint8 [H, W, 3], label), shuffled and without end,
        that `map` made of one image at a time.
      decoded: the same in order and without labels; None where nothing is decoded.
    """

    loaded: data.ImageData
    one_by_one: tf.data.Dataset
    decoded: Optional[tf.data.Dataset]


def photos(count: int, side: int) -> np.ndarray:
    """Returns images with the frequencies of photos, uint8 [count, side, side, 3]."""
    random = np.random.RandomState(0)
    x = np.zeros((count, side, side, 3), np.float32)
    for n in (2, 4, 8, 16, 32, 64):
        x += tf.image.resize(random.randn(count, n, n, 3), (side, side), "bicubic") / n**0.5
    return np.clip(128 + 60 * x, 0, 255).astype(np.uint8)


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """Lets data.load keep no image in memory, and print nothing."""
    limit, storage.MEMORY_LIMIT = storage.MEMORY_LIMIT, 0
    try:
        with contextlib.redirect_stdout(None):
            yield
    finally:
        storage.MEMORY_LIMIT = limit


def memory(count: int, side: int, folder: pathlib.Path) -> Source:
    """Returns the source of images in memory."""
    del folder
    images, labels = photos(count, side), np.arange(count) % CLASSES
    loaded = data.from_arrays(images, labels)
    slices = tf.data.Dataset.from_tensor_slices((images, labels))
    return Source(loaded, slices.shuffle(count).repeat(), None)


def files(count: int, side: int, folder: pathlib.Path) -> Source:
    """Returns the source of JPEG files, whose images have the size that is trained on."""
    for i, image in enumerate(photos(count, side)):
        encoded = tf.io.encode_jpeg(image, quality=90).numpy()
        for split in ("train", "test") if i < CLASSES else ("train",):
            path = folder / split / str(i % CLASSES) / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded)
    with nothing_kept():
        loaded = data.load("image_folder", str(folder))
    paths = [str(path) for path in (folder / "train").rglob("*.jpg")]
    labels = [int(pathlib.Path(path).parent.name) for path in paths]

    def read(path: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return decode(tf.io.read_file(path), side), label

    slices = tf.data.Dataset.from_tensor_slices((paths, labels))
    return Source(
        loaded,
        slices.shuffle(count).repeat().map(read, tf.data.AUTOTUNE),
        slices.repeat().map(lambda *one: read(*one)[0], tf.data.AUTOTUNE),
    )


def records(count: int, side: int, folder: pathlib.Path) -> Source:
    """Returns the source of records, whose images are a quarter larger than what is trained on."""
    import tensorflow_datasets as tfds

    # As tensorflow-datasets prepares ImageNet; its classes are not used.
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "file_name": tfds.features.Text(),
            "label": tfds.features.ClassLabel(num_classes=1000),
        }
    )
    examples = [
        (i, {"image": image, "file_name": str(i), "label": i % CLASSES})
        for i, image in enumerate(photos(count, side * 5 // 4))
    ]
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(None):
        tfds.dataset_builders.store_as_tfds_dataset(
            "imagenet2012",
            "5.1.0",
            features,
            data_dir=folder,
            split_datasets={"train": examples, "validation": examples[:CLASSES]},
        )
    with nothing_kept():
        loaded = data.load("imagenet2012", str(folder), image_size=side)
    skip = {"image": tfds.decode.SkipDecoding()}
    read = tfds.builder("imagenet2012", data_dir=folder).as_dataset(
        split="train", shuffle_files=True, decoders=skip
    )

    def decoded(example: dict[str, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        image = decode(example["image"], None)
        return tf.cast(tf.image.resize(image, (side, side)), tf.uint8), example["label"]

    return Source(
        loaded,
        read.shuffle(storage.SHUFFLE_BUFFER).repeat().map(decoded, tf.data.AUTOTUNE),
        read.repeat().map(lambda one: decode(one["image"], None), tf.data.AUTOTUNE),
    )


SOURCES = {"memory": memory, "files": files, "records": records}


def decode(encoded: tf.Tensor, side: Optional[int]) -> tf.Tensor:
    """Decodes a JPEG as the package does, uint8 [side, side, 3]."""
    image = tf.io.decode_jpeg(encoded, 3, dct_method="INTEGER_ACCURATE")
    return tf.ensure_shape(image, (side, side, 3))


def one_by_one(source: Source, views: int, batch_size: int) -> tf.data.Dataset:
    """Returns batches of views that tf.image makes of one image at a time, as most users do."""
    h, w, channels = source.loaded.image_shape
    pad = round(min(h, w) / 8)

    def cropped(image: tf.Tensor) -> tf.Tensor:
        image = tf.image.resize_with_crop_or_pad(image, h + 2 * pad, w + 2 * pad)
        return tf.image.random_crop(image, (h, w, channels))

    def inception(image: tf.Tensor) -> tf.Tensor:
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.shape(image),
            tf.zeros([0, 0, 4]),
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.ensure_shape(tf.slice(image, begin, size), (None, None, channels))
        return tf.cast(tf.image.resize(window, (h, w)), tf.uint8)

    def augmented(image: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        cut = cropped if min(h, w) <= 64 else inception
        made = [tf.image.random_flip_left_right(cut(image)) for _ in range(views)]
        return tf.stack(made), label

    mapped = source.one_by_one.map(augmented, num_parallel_calls=tf.data.AUTOTUNE)
    return mapped.batch(batch_size).prefetch(tf.data.AUTOTUNE)


def turns(dataset: tf.data.Dataset, events: int) -> Turns:
    """Returns what takes turns in reading a data set, of which each element is some events."""
    iterator = iter(dataset)

    def take(seconds: float) -> float:
        # What was made while others had their turn is not counted.
        skipped = time.perf_counter() + seconds / 3
        while time.perf_counter() < skipped:
            next(iterator)
        return events * yardsticks.rate(lambda: next(iterator), seconds * 2 / 3)

    return Turns(take)


def step_turns(network: str, loaded: data.ImageData, batch_size: int) -> Turns:
    """Returns what takes turns in training a network on one batch of views, steps a second."""
    strategy.set_precision(FLAGS.precision)
    (stage,) = METHODS[FLAGS.method].stages(Assembly(loaded), network)
    model = stage.build([])
    model.compile(epochs=EPOCHS, steps_per_epoch=100)
    batch = next(iter(data.train_batches(loaded, batch_size, 1, views=model.num_views)))
    batches = iter(tf.data.Dataset.from_tensors(batch).repeat())
    step = model.make_train_function()
    call = lambda: step(batches)["loss"].numpy()
    call()
    return Turns(lambda seconds: yardsticks.rate(call, seconds))


def measured(source: Source, batch_size: int) -> dict[str, Turns]:
    """Returns {what: its turns} of a source, all taken."""
    views, loaded = FLAGS.views, source.loaded
    # A Stream is a data set for every epoch.
    epochs = 50 if isinstance(loaded.train, storage.Stream) else EPOCHS
    ours = data.train_batches(loaded, batch_size, epochs, views=views).repeat()
    found = {
        "ours": turns(ours, views * batch_size),
        "one by one": turns(one_by_one(source, views, batch_size), views * batch_size),
    }
    if source.decoded is not None:
        found["decoding"] = turns(source.decoded, views)
    for network in FLAGS.networks:
        found[network] = step_turns(network, loaded, batch_size)
    for _ in range(FLAGS.rounds):
        for one in found.values():
            one.rates.append(one.take(FLAGS.seconds))
    return found


def lines(name: str, batch_size: int, found: dict[str, Turns]) -> Iterator[str]:
    """Yields the line of a source, and those of the networks that it feeds."""
    ours, decoding = found["ours"], found.get("decoding", "")
    ratio = ours.rate / found["one by one"].rate
    yield f"{name:12} {ours!s:>18} {found['one by one']!s:>18} {ratio:7.2f} {decoding!s:>18}"
    for network in FLAGS.networks:
        feeds, step = ours.rate / FLAGS.views / batch_size, found[network]
        yield (
            f"    feeds {feeds:,.2f} steps/s of {batch_size} images; {FLAGS.method} {network} "
            f"takes {step} steps/s, {100 * step.rate / feeds:,.0f} % of it"
        )


def main(argv: list[str]) -> None:
    del argv
    tf.get_logger().setLevel("ERROR")
    logging.set_verbosity(logging.WARNING)
    print(
        f"{'source':12} {'views/s':>18} {'one by one':>18} {'ratio':>7} {'decoding alone':>18}",
        flush=True,
    )
    for given in FLAGS.sources:
        name, side = given.split("-")[0], int(given.split("-")[1])
        batch_size = FLAGS.batch_size if side <= 64 else FLAGS.batch_size // 4
        with tempfile.TemporaryDirectory() as folder:
            source = SOURCES[name](FLAGS.images, side, pathlib.Path(folder))
            found = measured(source, batch_size)
        print(*lines(given, batch_size, found), sep="\n", flush=True)
        keras.backend.clear_session()


if __name__ == "__main__":
    app.run(main)
