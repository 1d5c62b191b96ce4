"""Storage of the images of a split: in memory, as files, or as a stream.

- Arrays are decoded in memory, up to MEMORY_LIMIT. A batch is a pure function of (seed, step).
- Files are image files that exceed this limit. They are read by index, so that is still true.
- A Stream is a split of tensorflow-datasets that exceeds it, such as ImageNet's. Records are read
  in order through a shuffle buffer, whose seed is a function of (seed, epoch). A batch is a
  function of (seed, epoch, step): a run resumes at the exact step (it reads the epoch's earlier
  records again, without decoding them), and each of n workers reads all records but decodes only
  its part of each batch. The order of an epoch is as random as the buffer is large.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Callable, NamedTuple, Optional, Union

import numpy as np
import tensorflow as tf
from absl import logging

from tf_pcl.data.class_names import escape
from tf_pcl.errors import Stopped

MEMORY_LIMIT = 4 << 30  # bytes of decoded images in a split
SHUFFLE_BUFFER = 16384  # encoded images; 1.8 GB of ImageNet's


class Origin(NamedTuple):
    """The files of the images of a split.

    Attributes:
      paths: bytes [N].
      marks: bytes [N], equal for files of the same length that begin alike.
    """

    paths: np.ndarray
    marks: np.ndarray

    def subset(self, index: np.ndarray) -> "Origin":
        """Returns the Origin of the images at the indices int [n] alone."""
        return Origin(self.paths[index], self.marks[index])


# How many files of a class are tried in place of an unreadable one.
_TRIES = 20
# How many files are named in lines of their own.
_NAMED = 20


class Reading:
    """How the files of a data set are read, and which of them have broken since.

    Args:
      skip: whether images are left out if their files can no longer be read; otherwise such a file
        ends the reading.

    Attributes:
      left_out: the sorted paths, below the folder of the data, of files that could not be read when
        the run began.
      broken: whether files have broken between the beginning of the run and that of this process.
      lost: {path: path of the file that replaces it in training, None in a test} of the files that
        could no longer be read.
      problem: what has ended the reading, a clause that names the file; None if nothing has.
    """

    def __init__(self, skip: bool = False):
        self.skip = skip
        self.left_out: list[str] = []
        self.broken = False
        self.lost: dict[bytes, Optional[bytes]] = {}
        self.problem: Optional[str] = None

    def note(self, path: bytes, other: Optional[bytes]) -> None:
        """Warns, once, that a file cannot be read, and names the one that replaces it."""
        if path in self.lost:
            return
        self.lost[path] = other
        if len(self.lost) > _NAMED:
            return
        instead = f"{_shown(other)}, of its class, replaces it" if other else "it is left out"
        # A resumed run needs its place among the others.
        back = "" if os.path.exists(path) else "; put it, or an empty file of its name, back"
        logging.warning("%s can no longer be read: %s%s", _shown(path), instead, back)
        if len(self.lost) == _NAMED:
            logging.warning("Further files are only counted, at the end")

    def refuse(self, path: bytes, problem: str) -> None:
        """Ends the reading of a file; `watched` reports why."""
        self.problem = f"{_shown(path)} {problem}"
        raise OSError(self.problem)

    def summary(self) -> Optional[str]:
        """Returns a line that counts the images left out since this process began; None for none.

        Test images are counted only if they were read.
        """
        if not self.lost:
            return None
        trained = sum(other is not None for other in self.lost.values())
        return (
            f"Left out, since their files can no longer be read: {trained:,} training images, "
            f"which others of their classes replaced, and {len(self.lost) - trained:,} others"
        )


@contextlib.contextmanager
def watched(reading: Optional[Reading]) -> Iterator[None]:
    """Names the file that cannot be read, if that ends the body.

    Args:
      reading: that of the data set; None if it has none.

    Raises:
      Stopped: in place of an error of TensorFlow, if a file can no longer be read or has changed.
    """
    try:
        yield
    except Exception as e:
        failure = e.__cause__ if isinstance(e, Stopped) else e
        if not (reading and reading.problem and isinstance(failure, (OSError, tf.errors.OpError))):
            raise
        what = str(e) if isinstance(e, Stopped) else "the same command resumes the run"
        raise Stopped(f"{reading.problem}; {what}") from None


def _shown(path: bytes) -> str:
    return escape(os.fsdecode(path))


def fingerprint(encoded: tf.Tensor) -> tf.Tensor:
    """Returns a hash ≥ 0 of the bytes of a file, int64 []."""
    return tf.strings.to_hash_bucket_fast(encoded, (1 << 63) - 1)


class Arrays:
    """Keeps decoded images in memory.

    Args:
      images: uint8 [N, H, W, C].
      labels: int [N].
      origin: their files, if they come from files.
    """

    def __init__(self, images, labels, origin: Optional[Origin] = None):
        self.origin = origin
        with tf.device("CPU"):
            self.images, self.labels = tf.constant(images), tf.constant(labels, tf.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns (images uint8 [n, H, W, C], labels int32 [n]) of the indices int [n]."""
        return tf.gather(self.images, index), tf.gather(self.labels, index)

    def all_labels(self) -> np.ndarray:
        """Returns the labels of all examples, int32 [N], in their order."""
        return self.labels.numpy()

    def first(self, count: int) -> np.ndarray:
        """Returns the first `count` images, uint8 [count, H, W, C]."""
        return self.images[:count].numpy()

    def subset(self, index: np.ndarray) -> "Arrays":
        """Returns Arrays of the images at the indices int [n] alone."""
        origin = self.origin and self.origin.subset(index)
        return Arrays(self.images.numpy()[index], self.labels.numpy()[index], origin)


class Files:
    """Keeps the paths of image files and reads them when they are needed.

    Args:
      paths: bytes or str [N].
      orientations: int [N], the EXIF orientation of each image (image_files.upright).
      labels: int [N].
      decode: a function (encoded, orientation) -> uint8 [H, W, C].
      shape: (H, W, C).
      origin: their files.
      fingerprints: int64 [N], the `fingerprint` of each file's bytes; -1 if it is not known.
      reading: what to do with unreadable files; by default they end the reading.
    """

    def __init__(
        self,
        paths,
        orientations,
        labels,
        decode: Callable,
        shape: tuple,
        origin: Optional[Origin] = None,
        fingerprints=None,
        reading: Optional[Reading] = None,
    ):
        self.origin, self.reading = origin, reading or Reading()
        known = np.full(len(labels), -1) if fingerprints is None else fingerprints
        self.paths, self.orientations = tf.constant(paths), tf.constant(orientations, tf.int32)
        self.labels, self.decode, self.shape = tf.constant(labels, tf.int32), decode, shape
        self.fingerprints = tf.constant(known, tf.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns (images uint8 [n, H, W, C], labels int32 [n]) of the indices int [n].

        If unreadable files are left out, the image of the next readable file of the same class, in
        the order of the indices, replaces theirs. So a batch is a function of the indices and of
        which files are broken.
        """
        index = tf.cast(index, tf.int64)
        rows, images = self._readable(index)

        def completed() -> tf.Tensor:
            # Declared stateless: otherwise determinism would read one batch after another.
            return tf.numpy_function(
                self._completed, [index, rows, images], tf.uint8, stateful=False
            )

        images = tf.cond(tf.size(rows) == tf.size(index), lambda: images, completed)
        return tf.ensure_shape(images, [None, *self.shape]), tf.gather(self.labels, index)

    def fetch_readable(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Does what `fetch` does, without the images that it would replace."""
        index = tf.cast(index, tf.int64)
        rows, images = self._readable(index)

        def noted() -> tf.Tensor:
            return tf.numpy_function(self._noted, [index, rows], tf.int64, stateful=False)

        rows = tf.cond(tf.size(rows) == tf.size(index), lambda: rows, noted)
        kept = tf.gather(index, tf.ensure_shape(rows, [None]))
        return tf.ensure_shape(images, [None, *self.shape]), tf.gather(self.labels, kept)

    def all_labels(self) -> np.ndarray:
        """Returns the labels of all examples, int32 [N], in their order."""
        return self.labels.numpy()

    def first(self, count: int) -> np.ndarray:
        """Returns the readable ones of the first `count` images, uint8 [≤count, H, W, C]."""
        index = tf.range(min(count, len(self)), dtype=tf.int64)
        rows, images = self._readable(index)
        for i in np.delete(index, rows):
            self._lost(i)
        return images.numpy()

    def subset(self, index: np.ndarray) -> "Files":
        """Returns Files of the images at the indices int [n] alone."""
        paths, orientations, labels, known = (
            part.numpy()[index]
            for part in (self.paths, self.orientations, self.labels, self.fingerprints)
        )
        origin = self.origin and self.origin.subset(index)
        return Files(
            paths, orientations, labels, self.decode, self.shape, origin, known, self.reading
        )

    def _readable(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns (rows int64 [k], images uint8 [k, H, W, C]) of the indices int64 [n].

        The rows are places in `index`, rising, of the files that can be read.
        """

        def read(row, i):
            encoded = tf.io.read_file(self.paths[i])
            known = self.fingerprints[i]
            same = (known < 0) | (fingerprint(encoded) == known)
            return row, self.decode(encoded, self.orientations[i]), same

        # A last element follows the images, so that there is a batch even without images.
        last = tf.constant(-1, tf.int64), tf.zeros(self.shape, tf.uint8), tf.constant(True)
        count = tf.size(index, tf.int64)
        images = (
            tf.data.Dataset.from_tensor_slices((tf.range(count), index))
            .map(read, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
            .ignore_errors()
            .concatenate(tf.data.Dataset.from_tensors(last))
            .batch(count + 1)
        )
        rows, images, same = images.get_single_element()

        def changed() -> tf.Tensor:
            return tf.numpy_function(self._changed, [index, rows, same], tf.int64, stateful=False)

        rows = tf.cond(tf.reduce_all(same), lambda: rows, changed)
        return tf.ensure_shape(rows, [None])[:-1], images[:-1]

    # The following methods run in Python, if a file is broken or has changed.

    def _changed(self, index: np.ndarray, rows: np.ndarray, same: np.ndarray) -> np.ndarray:
        path = self.paths[index[rows[np.argmin(same)]]].numpy()
        self.reading.refuse(
            path, "has changed since it was first read: restore it, or go on with the new file"
        )
        return rows

    def _noted(self, index: np.ndarray, rows: np.ndarray) -> np.ndarray:
        for i in np.delete(index, rows):
            self._lost(i)
            self.reading.note(self.paths[i].numpy(), None)
        return rows

    def _completed(self, index: np.ndarray, rows: np.ndarray, images: np.ndarray) -> np.ndarray:
        whole = np.empty((len(index), *self.shape), np.uint8)
        whole[rows] = images
        for row in np.setdiff1d(np.arange(len(index)), rows):
            whole[row] = self._other(index[row])
        return whole

    def _other(self, i: int) -> np.ndarray:
        """Returns the image that replaces that of index `i`."""
        self._lost(i)
        labels = self.labels.numpy()
        members = np.flatnonzero(labels == labels[i])
        place = np.searchsorted(members, i)
        for j in members[(place + np.arange(1, _TRIES + 1)) % len(members)]:
            rows, images = self._readable(tf.constant([j], tf.int64))
            if len(rows):
                self.reading.note(self.paths[i].numpy(), self.paths[j].numpy())
                return images[0].numpy()
        self.reading.refuse(
            self.paths[i].numpy(),
            f"and the {_TRIES} files that follow it in its class can no longer be read: check the "
            "disk",
        )
        raise AssertionError

    def _lost(self, i: int) -> None:
        if not self.reading.skip:
            self.reading.refuse(
                self.paths[i].numpy(),
                "can no longer be read: repair it, or leave out all unreadable files with "
                "`on_bad_image=skip`",
            )


class Stream:
    """Reads encoded images in order and shuffles them through a buffer.

    Args:
      dataset: a tf.data.Dataset of (encoded image, label) in a fixed order.
      size: its length N.
      decode: a function encoded -> uint8 [H, W, C].
    """

    origin = None

    def __init__(self, dataset: tf.data.Dataset, size: int, decode: Callable):
        self.dataset, self.size, self.decode = dataset, size, decode

    def __len__(self) -> int:
        return self.size

    def _decoded(self, dataset):
        return dataset.map(
            lambda image, label: (self.decode(image), tf.cast(label, tf.int32)),
            num_parallel_calls=tf.data.AUTOTUNE,
        )

    def examples(self) -> tf.data.Dataset:
        """Returns a data set of (image uint8 [H, W, C], label int32) in the fixed order."""
        return self._decoded(self.dataset)

    def batches(
        self, seed: int, epochs: int, batch_size: int, rows: slice, start: int
    ) -> tf.data.Dataset:
        """Returns some rows of the whole batches of shuffled epochs.

        The other rows are read but not decoded.

        Args:
          seed: the seed of the order.
          epochs: how many epochs.
          batch_size: the size of the whole batches.
          rows: the rows of each batch that are returned, n of them.
          start: the first batch, counted over all epochs.

        Returns:
          A data set of (images uint8 [n, H, W, C], labels int32 [n]).
        """

        def epoch(number):
            # Shuffle buffers need seeds that are plain numbers, so each epoch has its own data set.
            order = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
            shuffled = self.dataset.shuffle(
                SHUFFLE_BUFFER, seed=order, reshuffle_each_iteration=False
            )
            whole = shuffled.batch(batch_size, drop_remainder=True)
            return whole.skip(max(start - number * steps, 0))

        steps = len(self) // batch_size
        whole = functools.reduce(
            tf.data.Dataset.concatenate, map(epoch, range(start // steps, epochs))
        )
        part = whole.map(lambda images, labels: (images[rows], labels[rows])).unbatch()
        return self._decoded(part).batch(rows.stop - rows.start)

    def all_labels(self) -> np.ndarray:
        """Returns the labels of all examples, int32 [N], in the order of the files."""
        return np.array([label for _, label in self.dataset.as_numpy_iterator()], np.int32)

    def first(self, count: int) -> np.ndarray:
        """Returns the first `count` images, uint8 [count, H, W, C]."""
        return np.stack([image for image, _ in self.examples().take(count).as_numpy_iterator()])


Split = Union[Arrays, Files, Stream]
