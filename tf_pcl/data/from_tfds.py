"""Every image-classification data set that tensorflow-datasets lists."""

import os
import re
import threading
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import tensorflow as tf

from tf_pcl.data import image_files, splits, storage
from tf_pcl.data.splits import Loaded, Request
from tf_pcl.data.storage import Arrays, Split, Stream
from tf_pcl.errors import UserError, one_line

# Data sets whose classes change when an image is mirrored.
UNMIRRORED = {
    "mnist",
    "emnist",
    "kmnist",
    "svhn_cropped",
    "mnist_corrupted",
    "omniglot",
    "binarized_mnist",
}


def names() -> list[str]:
    """Returns the names that tensorflow-datasets lists, without versions and configurations."""
    import tensorflow_datasets as tfds

    return tfds.list_builders(with_community_datasets=False)


def base_name(name: str) -> str:
    """Returns cifar10 of cifar10:3.0.2, and emnist of emnist/letters."""
    return re.split("[/:]", name)[0]


def load(name: str, request: Request) -> Loaded:
    """Loads a data set; it is downloaded and prepared first if necessary.

    A split that exceeds storage.MEMORY_LIMIT is kept as a Stream, a smaller one as Arrays.

    Args:
      name: one of names(), perhaps with a version or configuration.
      request: its folder is that of tensorflow-datasets, by default its own.

    Raises:
      UserError: if it is not for image classification, its images differ in size and `image_size`
        is not given, or it cannot be prepared.
    """
    import tensorflow_datasets as tfds

    image_size = request.image_size
    try:
        builder = tfds.builder(name, data_dir=request.data_dir)
    except (ValueError, AssertionError, ImportError) as e:
        raise UserError(
            f"tensorflow-datasets does not have it ({one_line(e)}): give NAME, NAME:VERSION or "
            "NAME/CONFIGURATION",
            parameter="dataset",
            value=name,
        ) from e
    features = dict(builder.info.features.items())
    if not (
        isinstance(features.get("image"), tfds.features.Image)
        and isinstance(features.get("label"), tfds.features.ClassLabel)
    ):
        raise UserError(
            f"the data set {name} is not for image classification: it has the features "
            f"{', '.join(features)}, and an image and a label are needed"
        )
    height, width, channels = features["image"].shape
    if None in (height, width) and not image_size:
        raise UserError(
            f"the data set {name} has images of different sizes: give `image_size=PIXELS`"
        )
    shape = (image_size or height, image_size or width, channels or 3)
    _prepare(builder, tfds)

    def decode(image):
        image = image_files.decode(image, shape[-1])
        return (
            image_files.resize(image, image_size) if image_size else tf.ensure_shape(image, shape)
        )

    chosen = splits.choose(
        _labelled_splits(builder, tfds),
        f"the data set {name}",
        "labelled splits of tensorflow-datasets",
        divisible=request.divisible,
    )
    kept = {
        split: _kept(_encoded(builder, tfds, split), decode, shape) for split in chosen if split
    }
    for split, part in kept.items():
        # They are -1. A stream would have to be read as a whole.
        if isinstance(part, Arrays) and (missing := (part.all_labels() < 0).sum()):
            raise UserError(
                f"the data set {name} has no label of {missing:,} of {len(part):,} images in "
                f"{split}: give another one"
            )
    test, validation = (kept[split] if split else None for split in chosen[1:])
    return Loaded(features["label"].names, kept[chosen.train], test, validation)


def _encoded(builder, tfds, split):
    """Returns a tf.data.Dataset of (encoded image, label) in the order of the files."""
    dataset = builder.as_dataset(
        split=split, shuffle_files=False, decoders={"image": tfds.decode.SkipDecoding()}
    )
    return dataset.map(lambda example: (example["image"], example["label"]))


def _labelled_splits(builder, tfds):
    # Contests do not publish the labels of their test images: those of ImageNet are all -1.
    return [
        split
        for split in builder.info.splits or ("train", "test")
        if split not in splits.TEST
        or all(label >= 0 for _, label in _encoded(builder, tfds, split).take(1))
    ]


def _kept(dataset, decode, shape) -> Split:
    stream = Stream(dataset, len(dataset), decode)
    if len(stream) * np.prod(shape) > storage.MEMORY_LIMIT:
        return stream
    batches = stream.examples().batch(512).as_numpy_iterator()
    images, labels = map(np.concatenate, zip(*batches))
    return Arrays(images, labels)


def _prepare(builder, tfds):
    """Makes sure that the data set is on disk.

    If it is not prepared yet, it is made from archives in the manual folder or from a download.
    """
    try:
        builder.as_dataset(split="train")
        return
    except AssertionError:
        pass  # tensorflow-datasets raises this if nothing is prepared.
    except ValueError:
        return  # It has no such split, which is refused later.
    root = builder._data_dir_root
    manual = os.path.join(root, "downloads", "manual")
    by_hand = getattr(builder, "MANUAL_DOWNLOAD_INSTRUCTIONS", None)
    if by_hand and not (os.path.isdir(manual) and os.listdir(manual)):
        raise UserError(
            f"{builder.name} is not prepared in {root} and must be downloaded by hand. With "
            f"{manual} as manual_dir: {' '.join(by_hand.split())}"
        )
    urls = getattr(builder, "url_infos", None) or {}  # It is None if no checksums are recorded.
    archives = {url: info.filename or os.path.basename(url) for url, info in urls.items()}
    missing = {
        url: name
        for url, name in archives.items()
        if not os.path.exists(os.path.join(manual, name))
    }
    if missing and not _reachable(next(iter(missing))):
        host = min(urllib.parse.urlsplit(url).netloc for url in missing)
        raise UserError(
            f"{builder.name} is not prepared in {root} and {host} cannot be reached: put "
            f"{', '.join(sorted(set(missing.values())))} in {manual}, or take the data set "
            "digits, which needs no download"
        )
    try:
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=manual, try_download_gcs=False)
        )
    except Exception as e:  # Downloads, checksums and generators raise anything.
        raise UserError(
            f"{builder.name} could not be prepared in {root}: {' '.join(str(e).split())[:300]}. "
            f"Its archives can be put in {manual}"
        ) from e


def _reachable(url: str, seconds: float = 6) -> bool:
    """Returns whether the host of `url` answers within so many seconds."""
    answered = []

    def ask():
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=seconds).close()
            answered.append(True)
        except urllib.error.HTTPError:
            answered.append(True)
        except Exception:  # Any other error means that the host does not answer.
            pass

    # A daemon thread, because a name server that never answers must not delay the exit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answered)
