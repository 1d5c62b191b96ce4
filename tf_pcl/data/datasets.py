"""Data sets by name: load(name) -> ImageData.

DATASETS has those of this package; every other name is looked up in tensorflow-datasets. A split is kept in one of three
ways (sources), by its size:
- Arrays, decoded in memory (up to MEMORY_LIMIT): a batch is a pure function of (seed, step);
- Files, image files larger than that: they are read at random by index, so the same holds;
- Stream, a tensorflow-datasets set larger than that (ImageNet): records are read in order through a shuffle buffer of
  BUFFER examples whose seed is a function of (seed, epoch). A batch still is a function of (seed, epoch, step): a run
  resumes at the exact step (it reads the epoch's earlier records again, without decoding them), and each of n workers
  reads all records but decodes only its part of each batch, which together is the batch of one worker. But an epoch's
  order is only as random as the buffer is large.
"""

import collections
import dataclasses
import os
import random
import re
import threading
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import tensorflow as tf

from tf_pcl.data import image_files, storage
from tf_pcl.data.storage import Arrays, Stream
from tf_pcl.errors import UserError, choose


@dataclasses.dataclass(frozen=True)
class ImageData:
    """A data set of labelled images.

    name: as given; classes: names in the order of the labels; image_shape: (H, W, C); train, test: Arrays, Files or
    Stream; mean, std: by channel on the scale 0–255, of the training images (of the first 10,000 where they are not in
    memory); flip: whether a mirrored image keeps its class.
    """

    name: str
    classes: tuple
    image_shape: tuple
    train: object
    test: object
    mean: tuple
    std: tuple
    flip: bool = True


def load(name, data_dir=None, image_size=None, train_examples=None, seed=0, on_bad_image="fail"):
    """Loads a data set.

    Args:
      name: one of DATASETS, or an image-classification data set that tensorflow-datasets lists.
      data_dir: the folder of image_folder (SPLIT/CLASS/*.jpg or *.png), of tiny_imagenet (as its archive unpacks), or that
        of tensorflow-datasets.
      image_size: cut images to a square in their middle and resize it to this many pixels a side; needed where images
        differ in size.
      train_examples: use only the first so many of a permutation seeded by `seed`.
      on_bad_image: image_folder and tiny_imagenet, files that cannot be read: "fail", or "skip" to leave them out.
    Returns:
      An ImageData. For image_folder and tiny_imagenet, what was found is printed.
    Raises:
      UserError: if there is no such data set, it cannot be had, or its images cannot be used; nothing is written then.
    """
    if data_dir and not os.path.isdir(data_dir):
        raise UserError(f"--data_dir={data_dir} is not there: give an existing folder")
    if choose("--on_bad_image", on_bad_image, ("fail", "skip")) == "skip" and name not in OF_FILES:
        raise UserError(
            f"--on_bad_image=skip does not go with --dataset={name}: it is for {', '.join(OF_FILES)}"
        )
    if name in DATASETS:
        classes, train, test, flip = DATASETS[name](data_dir, image_size, on_bad_image)
    else:
        classes, train, test, flip = _tfds(name, data_dir, image_size)
    if len(classes) < 2:
        raise UserError(
            f"{name} has {len(classes)} class ({', '.join(classes)}): at least 2 are needed"
        )
    if train_examples:
        if train_examples > len(train):
            raise UserError(
                f"--train_examples={train_examples} is more than the {len(train)} training images of {name}"
            )
        if not train.random_access:
            raise UserError(
                f"--train_examples is not possible with {name}, which is too large for memory and is read in "
                "order"
            )
        train = train.subset(np.random.RandomState(seed).permutation(len(train))[:train_examples])
    sample = train.first(len(train) if isinstance(train, Arrays) else 10000)
    # Counting the 256 values is exact and needs no float copy of the images.
    counts = [np.bincount(sample[..., c].ravel(), minlength=256) for c in range(sample.shape[-1])]
    means = [np.average(np.arange(256), weights=n) for n in counts]
    stds = [
        max(1.0, np.average((np.arange(256) - m) ** 2, weights=n) ** 0.5)
        for m, n in zip(means, counts)
    ]
    return ImageData(
        name, tuple(classes), sample.shape[1:], train, test, tuple(means), tuple(stds), flip
    )


def _digits(data_dir, image_size, _):
    """scikit-learn's 1,797 handwritten digits, 8×8, grey: the first 1,437 to train on, the last 360 to test on."""
    if data_dir:
        raise UserError(
            "--data_dir does not go with --dataset=digits, which comes with scikit-learn"
        )
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    if image_size:
        images = image_files.resize(tf.constant(images), image_size).numpy()
    return (
        [str(c) for c in digits.target_names],
        Arrays(images[:-360], digits.target[:-360]),
        Arrays(images[-360:], digits.target[-360:]),
        False,
    )


def _image_folder(data_dir, image_size, on_bad_image):
    """SPLIT/CLASS/*.jpg, *.jpeg or *.png of any size, in the order of tfds.ImageFolder; hidden names (.…) do not count."""
    if not data_dir:
        raise UserError(
            "--dataset=image_folder needs --data_dir, a folder of SPLIT/CLASS/IMAGE.jpg or .png"
        )
    files, others = collections.defaultdict(dict), collections.Counter()
    try:
        for split in _folders(data_dir):
            for label in _folders(os.path.join(data_dir, split)):
                paths = files[split][label] = []
                for entry in _visible(os.path.join(data_dir, split, label)):
                    if _is_image(entry.name):
                        paths.append(entry.path)
                    else:
                        others[os.path.splitext(entry.name)[1] or entry.name] += 1
    except OSError as e:
        raise UserError(f"--data_dir={data_dir} cannot be read: {e.filename}: {e.strerror}") from e
    if not any(labels for labels in files.values()):
        if any(
            _is_image(e.name)
            for split in _folders(data_dir)
            for e in _visible(os.path.join(data_dir, split))
        ):
            raise UserError(
                f"--data_dir={data_dir} has images as CLASS/IMAGE, without splits: put them into train/CLASS, and some "
                "that are not trained on into test/CLASS"
            )
    pair = _two_splits(
        [s for s, labels in files.items() if any(labels.values())],
        f"--data_dir={data_dir}",
        "SPLIT/CLASS/IMAGE.jpg or .png",
    )
    if others:
        print(
            "Not .jpg or .png, left alone: "
            + ", ".join(f"{n:,} {kind}" for kind, n in others.most_common(5))
        )
    classes = sorted({label for split in pair for label in files[split]})
    for split, refused in zip(pair, (True, False)):
        lacking = [label for label in classes if not files[split].get(label)]
        if lacking and refused:
            raise UserError(
                f"--data_dir={data_dir} has no image of {', '.join(lacking[:5])} in {split}: every class needs some; "
                "add them, or take the folders out of all splits"
            )
        if lacking:
            print(f"No image of {', '.join(lacking[:5])} in {split}")
    splits = {
        s: [(path, k) for k, label in enumerate(classes) for path in files[s].get(label, ())]
        for s in pair
    }
    return classes, *_read(splits, classes, image_size, on_bad_image), True


def _is_image(name):
    return name.lower().endswith((".jpg", ".jpeg", ".png"))


def _visible(path):
    """The entries of a folder by name, without those that systems hide, such as .DS_Store and ._1.jpg."""
    return sorted(
        (e for e in os.scandir(path) if not e.name.startswith(".")), key=lambda entry: entry.name
    )


def _folders(path):
    return [entry.name for entry in _visible(path) if entry.is_dir()]


def _tiny_imagenet(data_dir, image_size, on_bad_image):
    """Tiny ImageNet as its archive unpacks: its validation images are the test images, the unlabelled ones are not used."""
    where = "the folder tiny-imagenet-200 of cs231n.stanford.edu/tiny-imagenet-200.zip"
    if not data_dir:
        raise UserError(f"--dataset=tiny_imagenet needs --data_dir, {where}")
    root = os.path.join(data_dir, "tiny-imagenet-200")
    root = root if os.path.isdir(root) else data_dir
    try:
        wnids = {wnid: k for k, (wnid,) in enumerate(_table(root, "wnids.txt", 1))}
        words = dict(_table(root, "words.txt", 2))
        train = [
            (os.path.join(root, "train", wnid, "images", name), k)
            for wnid, k in wnids.items()
            for name in sorted(os.listdir(os.path.join(root, "train", wnid, "images")))
        ]
        test = [
            (os.path.join(root, "val", "images", name), wnids[wnid])
            for name, wnid in _table(root, os.path.join("val", "val_annotations.txt"), 2)
        ]
    except (OSError, ValueError, KeyError) as e:
        reason = (
            f"{e.filename}: {e.strerror}"
            if isinstance(e, OSError)
            else f"wnids.txt does not list {e}, which val_annotations.txt names"
            if isinstance(e, KeyError)
            else e
        )
        raise UserError(
            f"--data_dir={data_dir} cannot be read as Tiny ImageNet ({reason}): give {where}"
        ) from e
    if not train or not test:
        raise UserError(
            f"--data_dir={data_dir} has {len(train)} training and {len(test)} validation images: "
            f"give {where}"
        )
    names = [words.get(wnid, wnid).split(",")[0] for wnid in wnids]
    # A word may have several meanings: crane is a bird and a machine.
    classes = [
        name if names.count(name) == 1 else f"{name} ({wnid})" for name, wnid in zip(names, wnids)
    ]
    return classes, *_read({"train": train, "val": test}, classes, image_size, on_bad_image), True


def _table(root, name, columns):
    """The first `columns` cells of each line of a tab-separated text file; ValueError where a line has fewer."""
    with open(os.path.join(root, name), encoding="utf-8") as f:
        rows = [line.rstrip("\n").split("\t")[:columns] for line in f if line.strip()]
    if any(len(row) < columns for row in rows):
        raise ValueError(f"{name} has a line of fewer than {columns} tab-separated cells")
    return rows


def _read(splits, classes, image_size, on_bad_image):
    """Training and test images of two splits, {name: [(path, label)]}."""
    for split, examples in splits.items():
        # As tfds.ImageFolder does, so that the first images, of which a mean is taken, are of all classes.
        random.Random(split).shuffle(examples)
    columns = {
        split: ([os.fsencode(path) for path, _ in examples], [label for _, label in examples])
        for split, examples in splits.items()
    }
    return image_files.load(columns, classes, image_size, on_bad_image).values()


def _two_splits(splits, where, layout):
    """Names of the training and the test split among `splits`."""
    test = next((s for s in TESTS if s in splits), None)
    if "train" not in splits or not test:
        raise UserError(
            f"{where} has {'splits ' + ', '.join(sorted(splits)) if splits else 'no images'}: it needs train "
            f"and test (or val, validation), as {layout}"
        )
    return "train", test


def _tfds(name, data_dir, image_size):
    """An image-classification data set of tensorflow-datasets."""
    import tensorflow_datasets as tfds

    base = re.split("[/:]", name)[0]  # cifar10, of cifar10:3.0.2; emnist, of emnist/letters
    choose("--dataset", base, [*DATASETS, *tfds.list_builders(with_community_datasets=False)])
    builder = tfds.builder(name, data_dir=data_dir)
    features = dict(builder.info.features.items())
    if not (
        isinstance(features.get("image"), tfds.features.Image)
        and isinstance(features.get("label"), tfds.features.ClassLabel)
    ):
        raise UserError(
            f"--dataset={name} is not for image classification: its features are {', '.join(features)}; "
            "an image and a label are needed"
        )
    h, w, channels = features["image"].shape
    if None in (h, w) and not image_size:
        raise UserError(f"--dataset={name} has images of different sizes: give --image_size=PIXELS")
    _prepare(builder, tfds)

    def encoded(split):
        dataset = builder.as_dataset(
            split=split, shuffle_files=False, decoders={"image": tfds.decode.SkipDecoding()}
        )
        return dataset.map(lambda e: (e["image"], e["label"]))

    def decode(image):
        image = image_files.decode(image, channels or 3)
        return (
            image_files.resize(image, image_size)
            if image_size
            else tf.ensure_shape(image, [h, w, channels or 3])
        )

    # The labels of a contest's test images are kept back: ImageNet has -1 for each of its own.
    splits = [
        s
        for s in builder.info.splits or ("train", "test")
        if s not in TESTS or all(label >= 0 for _, label in encoded(s).take(1))
    ]
    found = []
    for split in _two_splits(splits, f"--dataset={name}", "labelled splits of tensorflow-datasets"):
        dataset = encoded(split)
        stream = Stream(dataset, len(dataset), decode)
        if (
            len(stream) * (image_size or h) * (image_size or w) * (channels or 3)
            > storage.MEMORY_LIMIT
        ):
            found.append(stream)
        else:
            found.append(
                Arrays(*map(np.concatenate, zip(*stream.examples().batch(512).as_numpy_iterator())))
            )
    return features["label"].names, *found, base not in UNMIRRORED


def _prepare(builder, tfds):
    """Makes sure that the data set is on disk: prepared before, from archives in the manual folder, or downloaded."""
    try:
        builder.as_dataset(split="train")
        return
    except AssertionError:
        pass  # What tensorflow-datasets raises where nothing is prepared.
    manual = os.path.join(builder._data_dir_root, "downloads", "manual")
    by_hand = getattr(builder, "MANUAL_DOWNLOAD_INSTRUCTIONS", None)
    if by_hand and not (os.path.isdir(manual) and os.listdir(manual)):
        raise UserError(
            f"{builder.name} is not prepared in {builder._data_dir_root} and has to be fetched by hand. With "
            f"{manual} as manual_dir: {' '.join(by_hand.split())}"
        )
    urls = getattr(builder, "url_infos", None) or {}  # None where no checksums are recorded.
    archives = {url: info.filename or os.path.basename(url) for url, info in urls.items()}
    missing = {
        url: name
        for url, name in archives.items()
        if not os.path.exists(os.path.join(manual, name))
    }
    hosts = sorted({urllib.parse.urlsplit(url).netloc for url in missing})
    if hosts and not any(_reachable(url) for url in list(missing)[:1]):
        raise UserError(
            f"{builder.name} is not prepared in {builder._data_dir_root} and {hosts[0]} cannot be reached: put "
            f"{', '.join(sorted(set(missing.values())))} in {manual}, or take --dataset=digits, which needs no "
            "download"
        )
    try:
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=manual, try_download_gcs=False)
        )
    except Exception as e:  # TFDS passes on whatever its downloads, checksums and generators raise.
        raise UserError(
            f"{builder.name} could not be prepared in {builder._data_dir_root}: "
            f"{' '.join(str(e).split())[:300]}. Its archives can be put in {manual}"
        ) from e


def _reachable(url, seconds=6):
    """Whether the host of `url` answers at all within so many seconds."""

    def ask():
        try:
            urllib.request.urlopen(
                urllib.request.Request(url, method="HEAD"), timeout=seconds
            ).close()
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


DATASETS = {"digits": _digits, "image_folder": _image_folder, "tiny_imagenet": _tiny_imagenet}
OF_FILES = ("image_folder", "tiny_imagenet")
TESTS = ("test", "val", "validation")

# Sets of tensorflow-datasets whose classes change when an image is mirrored.
UNMIRRORED = {
    "mnist",
    "emnist",
    "kmnist",
    "svhn_cropped",
    "mnist_corrupted",
    "omniglot",
    "binarized_mnist",
}
