"""How the images of a split are kept: in memory, as files, or as a stream.

- Arrays are decoded in memory, up to MEMORY_LIMIT. A batch is a pure function of (seed, step).
- Files are image files that exceed this limit. They are read by index, so the same holds.
- A Stream is a split of tensorflow-datasets that exceeds it, such as ImageNet's. Records are read
  in order through a shuffle buffer, whose seed is a function of (seed, epoch). A batch still is a
  function of (seed, epoch, step): a run resumes at the exact step (it reads the epoch's earlier
  records again, without decoding them), and each of n workers reads all records but decodes only
  its part of each batch. An epoch's order is only as random as the buffer is large.
"""

import functools
from typing import Callable, NamedTuple, Optional, Union

import numpy as np
import tensorflow as tf

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
    """

    def __init__(
        self,
        paths,
        orientations,
        labels,
        decode: Callable,
        shape: tuple,
        origin: Optional[Origin] = None,
    ):
        self.origin = origin
        self.paths, self.orientations = tf.constant(paths), tf.constant(orientations, tf.int32)
        self.labels, self.decode, self.shape = tf.constant(labels, tf.int32), decode, shape

    def __len__(self) -> int:
        return len(self.labels)

    def _read(self, path, orientation):
        return self.decode(tf.io.read_file(path), orientation)

    def fetch(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns (images uint8 [n, H, W, C], labels int32 [n]) of the indices int [n]."""
        images = tf.map_fn(
            lambda i: self._read(self.paths[i], self.orientations[i]),
            index,
            fn_output_signature=tf.TensorSpec(self.shape, tf.uint8),
        )
        return images, tf.gather(self.labels, index)

    def all_labels(self) -> np.ndarray:
        """Returns the labels of all examples, int32 [N], in their order."""
        return self.labels.numpy()

    def first(self, count: int) -> np.ndarray:
        """Returns the first `count` images, uint8 [count, H, W, C]."""
        files = tf.data.Dataset.from_tensor_slices((self.paths, self.orientations)).take(count)
        images = files.map(self._read, num_parallel_calls=tf.data.AUTOTUNE)
        return np.stack([*images.as_numpy_iterator()])

    def subset(self, index: np.ndarray) -> "Files":
        """Returns Files of the images at the indices int [n] alone."""
        paths, orientations, labels = (
            part.numpy()[index] for part in (self.paths, self.orientations, self.labels)
        )
        origin = self.origin and self.origin.subset(index)
        return Files(paths, orientations, labels, self.decode, self.shape, origin)


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
