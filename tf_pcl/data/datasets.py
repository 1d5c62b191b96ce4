"""Data sets by name: load(name) -> ImageData.

DATASETS has those of this package; every other name is looked up in tensorflow-datasets. A split is kept in one of three
ways, by its size:
- Arrays, decoded in memory (up to MEMORY_LIMIT): a batch is a pure function of (seed, step);
- Files, an image folder larger than that: files are read at random by index, so the same holds;
- Stream, a tensorflow-datasets set larger than that (ImageNet): records are read in order through a shuffle buffer of
  BUFFER examples whose seed is a function of (seed, epoch). Two runs with the same seed still see the same batches, and a
  run still resumes at the exact step (it reads and drops the epoch's earlier records first), but an epoch's order is only
  as random as the buffer is large.
"""
import dataclasses
import os
import re
import threading
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import tensorflow as tf

from tf_pcl.errors import UserError, choose

MEMORY_LIMIT = 4 << 30
BUFFER = 16384


class Arrays:
    """Images uint8 [N, H, W, C] and labels int32 [N] in memory."""

    random_access = True

    def __init__(self, images, labels):
        with tf.device("CPU"):
            self.images, self.labels = tf.constant(images), tf.constant(labels, tf.int32)

    def __len__(self):
        return len(self.labels)

    def fetch(self, index):
        """(images, labels) of the indices int64 [n]."""
        return tf.gather(self.images, index), tf.gather(self.labels, index)

    def first(self, count):
        """The first `count` images, as numpy."""
        return self.images[:count].numpy()


class Files:
    """Image files on disk, read when they are needed.

    Args:
      paths: [N] file names; labels: int [N]; decode: a function bytes -> uint8 [H, W, C]; shape: (H, W, C).
    """

    random_access = True

    def __init__(self, paths, labels, decode, shape):
        self.paths, self.labels = tf.constant(paths), tf.constant(labels, tf.int32)
        self.decode, self.shape = decode, shape

    def __len__(self):
        return len(self.labels)

    def fetch(self, index):
        """(images, labels) of the indices int64 [n]."""
        images = tf.map_fn(lambda path: self.decode(tf.io.read_file(path)), tf.gather(self.paths, index),
                           fn_output_signature=tf.TensorSpec(self.shape, tf.uint8))
        return images, tf.gather(self.labels, index)

    def first(self, count):
        """The first `count` images, as numpy."""
        return self.fetch(tf.range(min(count, len(self))))[0].numpy()


class Stream:
    """A tensorflow-datasets split read in order.

    Args:
      dataset: tf.data.Dataset of {"image", "label"} in a fixed order; size: its length; decode: a function image ->
        uint8 [H, W, C].
    """

    random_access = False

    def __init__(self, dataset, size, decode):
        self.dataset, self.size, self.decode = dataset, size, decode

    def __len__(self):
        return self.size

    def _decoded(self, dataset):
        return dataset.map(lambda e: (self.decode(e["image"]), tf.cast(e["label"], tf.int32)),
                           num_parallel_calls=tf.data.AUTOTUNE)

    def examples(self):
        """(image, label) in the order of the files."""
        return self._decoded(self.dataset)

    def shuffled(self, seed):
        """(image, label) through a shuffle buffer; `seed`: integers."""
        number = int(np.random.SeedSequence(seed).generate_state(1)[0])
        return self._decoded(self.dataset.shuffle(BUFFER, seed=number))

    def first(self, count):
        """The first `count` images, as numpy."""
        return np.stack([image for image, _ in self.examples().take(count).as_numpy_iterator()])


@dataclasses.dataclass(frozen=True)
class ImageData:
    """A data set of labelled images.

    name: as given; classes: names in the order of the labels; image_shape: (H, W, C); train, test: Arrays, Files or Stream; mean, std: by channel
    on the scale 0–255, of the training images (of the first 10,000 where they are not in memory); flip: whether a
    mirrored image keeps its class.
    """

    name: str
    classes: tuple
    image_shape: tuple
    train: object
    test: object
    mean: tuple
    std: tuple
    flip: bool = True


def load(name, data_dir=None, image_size=None, train_examples=None, seed=0):
    """Loads a data set.

    Args:
      name: one of DATASETS, or an image-classification data set that tensorflow-datasets lists.
      data_dir: the folder of image_folder (SPLIT/CLASS/*.jpg or *.png), or that of tensorflow-datasets.
      image_size: cut images to a square in their middle and resize it to this many pixels a side; needed where images
        differ in size.
      train_examples: use only the first so many of a permutation seeded by `seed`.
    Returns:
      An ImageData.
    Raises:
      UserError: if there is no such data set, it cannot be had, or its images cannot be used; nothing is written then.
    """
    if data_dir and not os.path.isdir(data_dir):
        raise UserError(f"--data_dir={data_dir} is not there: give an existing folder")
    if name in DATASETS:
        classes, train, test, flip = DATASETS[name](data_dir, image_size)
    else:
        classes, train, test, flip = _tfds(name, data_dir, image_size)
    if len(classes) < 2:
        raise UserError(f"{name} has {len(classes)} class ({', '.join(classes)}): at least 2 are needed")
    if train_examples:
        if train_examples > len(train):
            raise UserError(f"--train_examples={train_examples} is more than the {len(train)} training images of {name}")
        if not train.random_access:
            raise UserError(f"--train_examples is not possible with {name}, which is too large for memory and is read in "
                            "order")
        index = np.random.RandomState(seed).permutation(len(train))[:train_examples]
        train = (Arrays(*(t.numpy() for t in train.fetch(index))) if isinstance(train, Arrays)
                 else Files(train.paths.numpy()[index], train.labels.numpy()[index], train.decode, train.shape))
    sample = train.first(len(train) if isinstance(train, Arrays) else 10000)
    # Counting the 256 values is exact and needs no float copy of the images.
    counts = [np.bincount(sample[..., c].ravel(), minlength=256) for c in range(sample.shape[-1])]
    means = [np.average(np.arange(256), weights=n) for n in counts]
    stds = [max(1.0, np.average((np.arange(256) - m) ** 2, weights=n) ** 0.5) for m, n in zip(means, counts)]
    return ImageData(name, tuple(classes), sample.shape[1:], train, test, tuple(means), tuple(stds), flip)


def _digits(data_dir, image_size):
    """scikit-learn's 1,797 handwritten digits, 8×8, grey: the first 1,437 to train on, the last 360 to test on."""
    if data_dir:
        raise UserError("--data_dir does not go with --dataset=digits, which comes with scikit-learn")
    from sklearn.datasets import load_digits
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    if image_size:
        images = _resize(tf.constant(images), image_size).numpy()
    return ([str(c) for c in digits.target_names], Arrays(images[:-360], digits.target[:-360]),
            Arrays(images[-360:], digits.target[-360:]), False)


def _image_folder(data_dir, image_size):
    """SPLIT/CLASS/*.jpg, *.jpeg or *.png of any size, grey or colour, through tfds.ImageFolder."""
    if not data_dir:
        raise UserError("--dataset=image_folder needs --data_dir, a folder of SPLIT/CLASS/IMAGE.jpg or .png")
    import tensorflow_datasets as tfds
    try:
        builder = tfds.ImageFolder(data_dir)
    except (OSError, tf.errors.OpError) as e:
        raise UserError(f"--data_dir={data_dir} cannot be read: {' '.join(str(e).split())}") from e
    splits = {split: info.num_examples for split, info in builder.info.splits.items() if info.num_examples}
    train, test = _two_splits(splits, f"--data_dir={data_dir}", "SPLIT/CLASS/IMAGE.jpg or .png")
    decode = _decoder(image_size)
    sources, shapes = [], set()
    for split in (train, test):
        encoded = builder.as_dataset(split=split, decoders={"image": tfds.decode.SkipDecoding()})
        try:
            shape = tuple(decode(next(iter(encoded))["image"]).shape)
            in_memory = splits[split] * np.prod(shape) <= MEMORY_LIMIT
            paths, labels, images = _columns(encoded.map(lambda e: (e["image/filename"], e["label"],
                                                      decode(e["image"]) if in_memory else 0),
                                           num_parallel_calls=tf.data.AUTOTUNE))
        except tf.errors.OpError as e:
            raise _unusable(encoded, decode) or e
        sources.append(Arrays(images, labels) if in_memory else Files(paths, labels, decode, shape))
        shapes.add(shape)
    if len(shapes) > 1:
        raise UserError(f"--data_dir={data_dir}: images of {train} and {test} differ in size; give --image_size=PIXELS")
    return builder.info.features["label"].names, *sources, True


def _columns(dataset):
    """The components of a data set's elements, each as one numpy array."""
    return [np.concatenate(parts) for parts in zip(*dataset.batch(512).as_numpy_iterator())]


def _unusable(encoded, decode):
    """The UserError that names the first image of a folder that cannot be read or is of another size."""
    first = path = None
    try:
        for example in encoded:
            path = example["image/filename"].numpy().decode()
            h, w, _ = decode(example["image"]).shape
            first = first or (path, h, w)
            if (h, w) != first[1:]:
                return UserError(f"images differ in size: {first[0]} is {first[2]}×{first[1]}, {path} is {w}×{h} "
                                 "(width × height). Give --image_size=PIXELS to bring them to one size.")
    except tf.errors.InvalidArgumentError:
        return UserError(f"{path} cannot be read as a JPEG or PNG image: mend it or take it out")
    except tf.errors.OpError as e:
        return UserError(f"an image cannot be read: {' '.join(e.message.split())[:200]}")
    return None


def _two_splits(splits, where, layout):
    """Names of the training and the test split among `splits`."""
    test = next((s for s in ("test", "val", "validation") if s in splits), None)
    if "train" not in splits or not test:
        raise UserError(f"{where} has {'splits ' + ', '.join(sorted(splits)) if splits else 'no images'}: it needs train "
                        f"and test (or val, validation), as {layout}")
    return "train", test


def _decoder(image_size):
    """A function from an encoded or a decoded image to uint8 [H, W, 3], resized if `image_size` is given."""
    def decode(image):
        if image.dtype == tf.string:
            image = tf.io.decode_image(image, channels=3, expand_animations=False)
            image.set_shape([None, None, 3])
        return _resize(image, image_size) if image_size else image

    return decode


def _resize(images, size):
    """Cuts the square in the middle of uint8 [..., H, W, C] and resizes it to `size` pixels a side."""
    h, w = tf.shape(images)[-3], tf.shape(images)[-2]
    side = tf.minimum(h, w)
    top, left = (h - side) // 2, (w - side) // 2
    square = images[..., top:top + side, left:left + side, :]
    resized = tf.image.resize(square, (size, size), antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(resized), 0, 255), tf.uint8)


def _tfds(name, data_dir, image_size):
    """An image-classification data set of tensorflow-datasets."""
    import tensorflow_datasets as tfds
    base = re.split("[/:]", name)[0]  # cifar10, of cifar10:3.0.2; emnist, of emnist/letters
    choose("--dataset", base, [*DATASETS, *tfds.list_builders(with_community_datasets=False)])
    builder = tfds.builder(name, data_dir=data_dir)
    features = dict(builder.info.features.items())
    if not (isinstance(features.get("image"), tfds.features.Image)
            and isinstance(features.get("label"), tfds.features.ClassLabel)):
        raise UserError(f"--dataset={name} is not for image classification: its features are {', '.join(features)}; "
                        "an image and a label are needed")
    _prepare(builder, tfds)
    splits = {s: i.num_examples for s, i in builder.info.splits.items()} or {"train": 0, "test": 0}
    train, test = _two_splits(splits, f"--dataset={name}", "splits of tensorflow-datasets")
    shape = features["image"].shape
    if None in shape[:2] and not image_size:
        raise UserError(f"--dataset={name} has images of different sizes: give --image_size=PIXELS")
    decode = _decoder(image_size)
    size = (image_size or shape[0]) * (image_size or shape[1]) * (shape[2] or 3)
    sources = []
    for split in (train, test):
        dataset = builder.as_dataset(split=split, shuffle_files=False)
        if splits[split] * size > MEMORY_LIMIT:
            sources.append(Stream(dataset, splits[split], decode))
        else:
            pairs = dataset.map(lambda e: (decode(e["image"]), e["label"]), num_parallel_calls=tf.data.AUTOTUNE)
            sources.append(Arrays(*_columns(pairs)))
    return features["label"].names, *sources, base not in UNMIRRORED


def _prepare(builder, tfds):
    """Makes sure that the data set is on disk: prepared before, from archives in the manual folder, or downloaded."""
    try:
        builder.as_dataset(split="train")
        return
    except AssertionError:
        pass  # What tensorflow-datasets raises where nothing is prepared.
    manual = os.path.join(builder._data_dir_root, "downloads", "manual")
    urls = getattr(builder, "url_infos", {})
    missing = {url: info.filename for url, info in urls.items()
               if not os.path.exists(os.path.join(manual, info.filename or os.path.basename(url)))}
    hosts = sorted({urllib.parse.urlsplit(url).netloc for url in missing})
    if hosts and not any(_reachable(url) for url in list(missing)[:1]):
        raise UserError(f"{builder.name} is not prepared in {builder._data_dir_root} and {hosts[0]} cannot be reached: put "
                        f"{', '.join(sorted(set(missing.values())))} in {manual}, or take --dataset=digits, which needs no "
                        "download")
    try:
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual, try_download_gcs=False))
    except Exception as e:  # TFDS passes on whatever its downloads, checksums and generators raise.
        raise UserError(f"{builder.name} could not be prepared in {builder._data_dir_root}: {' '.join(str(e).split())[:300]}. "
                        f"Its archives can be put in {manual}") from e


def _reachable(url, seconds=6):
    """Whether the host of `url` answers at all within so many seconds."""
    def ask():
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
        except urllib.error.HTTPError:
            pass
        return True

    def note():
        try:
            answered.append(ask())
        except Exception:  # Whatever the network raises, it does not answer.
            pass

    # A daemon thread: a name server that never answers must not hold up the exit.
    answered = []
    thread = threading.Thread(target=note, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answered)


DATASETS = {"digits": _digits, "image_folder": _image_folder}

# Sets of tensorflow-datasets whose classes change when an image is mirrored.
UNMIRRORED = {"mnist", "emnist", "kmnist", "svhn_cropped", "mnist_corrupted", "omniglot", "binarized_mnist"}
