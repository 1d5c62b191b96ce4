"""How the images of a split are kept: in memory, as files, or as a stream.

- Arrays are decoded in memory, up to MEMORY_LIMIT. A batch is a pure function of (seed, step).
- Files are image files that exceed this limit. They are read by index, so the same holds.
- A Stream is a split of tensorflow-datasets that exceeds it, such as ImageNet's. Records are read
  in order through a shuffle buffer, whose seed is a function of (seed, epoch). A batch still is a
  function of (seed, epoch, step): a run resumes at the exact step (it reads the epoch's earlier
  records again, without decoding them), and each of n workers reads all records but decodes only
  its part of each batch. An epoch's order is only as random as the buffer is large.
"""

import contextlib
import functools
import os
from collections.abc import Collection, Iterator
from typing import Callable, NamedTuple, Optional, Union

import numpy as np
import tensorflow as tf
from absl import logging

from tf_pcl.data.class_names import escape
from tf_pcl.errors import Stopped

MEMORY_LIMIT = 4 << 30  # bytes of decoded images in a split
SHUFFLE_BUFFER = 16384  # encoded images; 1.8 GB of ImageNet's


class Origin(NamedTuple):
    """The files of which the images of a split were read.

    Attributes:
      paths: bytes [N].
      marks: bytes [N], the same for files that begin alike and are of one length.
    """

    paths: np.ndarray
    marks: np.ndarray

    def subset(self, index: np.ndarray) -> "Origin":
        """Returns the Origin of the images at the indices int [n] alone."""
        return Origin(self.paths[index], self.marks[index])


# How many files of a class are tried in the place of one that cannot be read.
_TRIES = 20
# How many files are named in lines of their own.
_NAMED = 20


class Reading:
    """How the files of a data set are read, and which of them broke since.

    Args:
      skip: whether images whose files cannot be read any more are left out; otherwise they end
        what reads them.
      left_out: the paths, below the folder of the data, of files that could not be read when the
        run began.

    Attributes:
      broken: whether files were broken already when this process began, and not when the run did.
      lost: {path: path of the file whose image stands for its image in training, None in a test}
        of the files that could not be read any more.
      problem: what has ended the reading, a clause that names the file; None if nothing has.
    """

    def __init__(self, skip: bool = False, left_out: Collection[str] = ()):
        self.skip, self.left_out = skip, sorted(left_out)
        self.broken = False
        self.lost: dict[bytes, Optional[bytes]] = {}
        self.problem: Optional[str] = None

    def note(self, path: bytes, other: Optional[bytes]) -> None:
        """Says, once, that a file cannot be read and which one stands for it."""
        if path in self.lost:
            return
        self.lost[path] = other
        if len(self.lost) > _NAMED:
            return
        instead = f"{_shown(other)}, of its class, stands for it" if other else "it is left out"
        # A run that goes on needs its place among the others.
        back = "" if os.path.exists(path) else "; put it, or an empty file of its name, back"
        logging.warning("%s cannot be read any more: %s%s", _shown(path), instead, back)
        if len(self.lost) == _NAMED:
            logging.warning("More of them are counted at the end")

    def refuse(self, path: bytes, problem: str) -> None:
        """Ends what reads a file; `watched` tells why."""
        self.problem = f"{_shown(path)} {problem}"
        raise OSError(self.problem)

    def summary(self) -> Optional[str]:
        """Returns a line that counts what was left out since this process began, None if nothing.

        The images of a test are counted where they were looked at.
        """
        if not self.lost:
            return None
        trained = sum(other is not None for other in self.lost.values())
        return (
            f"Left out, since their files cannot be read any more: {trained:,} training images, "
            f"for which others of their classes stood, and {len(self.lost) - trained:,} others"
        )


def reading_of(*splits: Optional["Split"]) -> Optional[Reading]:
    """Returns how the files of a data set's splits are read; None if none is read by index."""
    return next((split.reading for split in splits if isinstance(split, Files)), None)


@contextlib.contextmanager
def watched(reading: Optional[Reading]) -> Iterator[None]:
    """Names the file that cannot be read, where that ends what is done inside.

    Args:
      reading: of the data set; None if it has none.

    Raises:
      Stopped: in place of an error of TensorFlow's, if a file cannot be read any more or changed.
    """
    try:
        yield
    except Exception as e:
        failure = e.__cause__ if isinstance(e, Stopped) else e
        if not (reading and reading.problem and isinstance(failure, (OSError, tf.errors.OpError))):
            raise
        what = str(e) if isinstance(e, Stopped) else "the same command goes on where the run stands"
        raise Stopped(f"{reading.problem}; {what}") from None


def _shown(path: bytes) -> str:
    return escape(os.fsdecode(path))


def fingerprint(encoded: tf.Tensor) -> tf.Tensor:
    """Returns a number ≥ 0 that tells the bytes of a file from others, int64 []."""
    return tf.strings.to_hash_bucket_fast(encoded, (1 << 63) - 1)


class Arrays:
    """Keeps decoded images in memory.

    Args:
      images: uint8 [N, H, W, C].
      labels: int [N].
      origin: the files of which they were read, if they were.
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
      orientations: int [N], how each image is turned (image_files.upright).
      labels: int [N].
      decode: a function (encoded, orientation) -> uint8 [H, W, C].
      shape: (H, W, C).
      origin: the files of which they are read.
      fingerprints: int64 [N], `fingerprint` of each file's bytes, -1 where that is not known.
      reading: what to do with files that cannot be read; by default they end the reading.
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

        Where a file cannot be read any more and such are left out, the image stands there of the
        next file of its class, in the order of the indices, that can be read. So a batch is a
        function of the indices and of which files are broken.
        """
        index = tf.cast(index, tf.int64)
        rows, images = self._readable(index)

        def completed() -> tf.Tensor:
            # Stateless, as far as TensorFlow is concerned: else --deterministic would read batch
            # after batch.
            return tf.numpy_function(
                self._completed, [index, rows, images], tf.uint8, stateful=False
            )

        images = tf.cond(tf.size(rows) == tf.size(index), lambda: images, completed)
        return tf.ensure_shape(images, [None, *self.shape]), tf.gather(self.labels, index)

    def fetch_readable(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Does what `fetch` does, but the images that it would replace are missing."""
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
        """Returns the first `count` images, uint8 [count, H, W, C], or those that can be read."""
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

        # Something always follows the images, so that there is a batch even if there are none.
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

    # What follows runs in Python, where a file broke or changed.

    def _changed(self, index: np.ndarray, rows: np.ndarray, same: np.ndarray) -> np.ndarray:
        path = self.paths[index[rows[np.argmin(same)]]].numpy()
        self.reading.refuse(
            path,
            "changed since it was read first: put back what it was, or go on with what it is now",
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
        """Returns the image that stands for that of index `i`."""
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
            f"and the {_TRIES} files that follow it in its class cannot be read any more: see to "
            "the disk",
        )
        raise AssertionError

    def _lost(self, i: int) -> None:
        if not self.reading.skip:
            self.reading.refuse(
                self.paths[i].numpy(),
                "cannot be read any more: mend it, or leave out whatever cannot be read with "
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

        What is not returned is read but not decoded.

        Args:
          seed: the seed of the order.
          epochs: how many epochs.
          batch_size: the size of the whole batches.
          rows: the rows of each batch that are returned, n of them.
          start: the batch, counted over all epochs, with which to begin.

        Returns:
          A data set of (images uint8 [n, H, W, C], labels int32 [n]).
        """

        def epoch(number):
            # Shuffle buffers take seeds that are plain numbers, hence one data set for each epoch.
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
