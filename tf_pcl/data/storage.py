"""The three ways in which the images of a split are kept; datasets says which is taken when."""

import functools

import numpy as np
import tensorflow as tf

MEMORY_LIMIT = 4 << 30  # bytes of decoded images a split
BUFFER = 16384  # encoded images in the shuffle buffer of a stream, 1.8 GB of ImageNet's


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

    def subset(self, index):
        """Arrays of the indices int [n] alone."""
        return Arrays(self.images.numpy()[index], self.labels.numpy()[index])


class Files:
    """Image files on disk, read when they are needed.

    Args:
      paths: [N] file names; orientations: int [N] (image_files.upright); labels: int [N].
      decode: a function (encoded, orientation) -> uint8 [H, W, C]; shape: (H, W, C).
    """

    random_access = True

    def __init__(self, paths, orientations, labels, decode, shape):
        self.paths, self.orientations = tf.constant(paths), tf.constant(orientations, tf.int32)
        self.labels, self.decode, self.shape = tf.constant(labels, tf.int32), decode, shape

    def __len__(self):
        return len(self.labels)

    def _read(self, path, orientation):
        return self.decode(tf.io.read_file(path), orientation)

    def fetch(self, index):
        """(images, labels) of the indices int64 [n]."""
        images = tf.map_fn(
            lambda i: self._read(self.paths[i], self.orientations[i]),
            index,
            fn_output_signature=tf.TensorSpec(self.shape, tf.uint8),
        )
        return images, tf.gather(self.labels, index)

    def first(self, count):
        """The first `count` images, as numpy."""
        files = tf.data.Dataset.from_tensor_slices((self.paths, self.orientations)).take(count)
        return np.stack(
            [*files.map(self._read, num_parallel_calls=tf.data.AUTOTUNE).as_numpy_iterator()]
        )

    def subset(self, index):
        """Files of the indices int [n] alone."""
        return Files(
            self.paths.numpy()[index],
            self.orientations.numpy()[index],
            self.labels.numpy()[index],
            self.decode,
            self.shape,
        )


class Stream:
    """A tensorflow-datasets split read in order.

    Args:
      dataset: tf.data.Dataset of (encoded image, label) in a fixed order; size: its length; decode: a function encoded ->
        uint8 [H, W, C].
    """

    random_access = False

    def __init__(self, dataset, size, decode):
        self.dataset, self.size, self.decode = dataset, size, decode

    def __len__(self):
        return self.size

    def _decoded(self, dataset):
        return dataset.map(
            lambda image, label: (self.decode(image), tf.cast(label, tf.int32)),
            num_parallel_calls=tf.data.AUTOTUNE,
        )

    def examples(self):
        """(image, label) in the order of the files."""
        return self._decoded(self.dataset)

    def batches(self, seed, epochs, batch_size, rows, start):
        """Rows `rows`, a slice, of the whole batches of shuffled epochs, from the `start`-th batch of all on.

        What is not returned is read but not decoded.
        """

        def epoch(number):
            # Shuffle buffers take seeds that are plain numbers, hence one data set an epoch.
            order = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
            shuffled = self.dataset.shuffle(BUFFER, seed=order, reshuffle_each_iteration=False)
            return shuffled.batch(batch_size, drop_remainder=True).skip(
                max(start - number * steps, 0)
            )

        steps = len(self) // batch_size
        whole = functools.reduce(
            tf.data.Dataset.concatenate, map(epoch, range(start // steps, epochs))
        )
        part = whole.map(lambda images, labels: (images[rows], labels[rows])).unbatch()
        return self._decoded(part).batch(rows.stop - rows.start)

    def first(self, count):
        """The first `count` images, as numpy."""
        return np.stack([image for image, _ in self.examples().take(count).as_numpy_iterator()])
