"""Random augmentations of uint8 batches [B, H, W, C], stateless: the same seed gives the same images."""
import warnings

import tensorflow as tf


def fold_in(seed, *data):
    """A new seed int [2] from a seed and integers."""
    for d in data:
        seed = tf.random.experimental.stateless_fold_in(seed, d)
    return seed


def pad_crop_flip(images, seed, padding, flip, rows=slice(None), total=None):
    """Zero-pads by `padding` pixels, cuts a random window of the old size, mirrors half of the windows if `flip`.

    Args:
      images: uint8 [B, H, W, C].
      seed: int [2].
      padding: pixels on every side.
      flip: whether to mirror left-right.
      rows, total: if `images` are rows `rows` of a batch of `total`, they are treated as they would be within it.
    """
    h, w = images.shape[1:3]
    total = total or tf.shape(images)[0]
    offsets = tf.random.stateless_uniform([total, 2], fold_in(seed, 0), 0, 2 * padding + 1, tf.int32)[rows]
    down, right = tf.range(h), tf.range(w)
    columns = tf.tile(right[None], [tf.shape(offsets)[0], 1])
    if flip:
        mirrored = tf.random.stateless_uniform([total, 1], fold_in(seed, 1))[rows] < 0.5
        columns = tf.where(mirrored, right[::-1], columns)
    images = tf.pad(images, [[0, 0], [padding, padding], [padding, padding], [0, 0]])
    images = tf.gather(images, offsets[:, :1] + down, axis=1, batch_dims=1)
    return tf.gather(images, offsets[:, 1:] + columns, axis=2, batch_dims=1)


def cutout(images, seed, size, rows=slice(None), total=None):
    """Blackens a random square of `size` pixels in each image, partly outside at the borders (DeVries and Taylor, 2017).

    Args:
      images, seed, rows, total: as in pad_crop_flip.
      size: an even number of pixels.
    """
    with warnings.catch_warnings():
        # The package announces its end of life at each import.
        warnings.simplefilter("ignore")
        import tensorflow_addons as tfa
    h, w = images.shape[1:3]
    total = total or tf.shape(images)[0]
    centre = tf.random.stateless_uniform([total, 2], fold_in(seed, 2))[rows]
    return tfa.image.cutout(images, (size, size), offset=tf.cast(centre * tf.constant([h, w], tf.float32), tf.int32))
