"""Random augmentations of uint8 batches [B, H, W, C], stateless: the same seed gives the same images."""

import tensorflow as tf

from tf_pcl import compat


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
    offsets = tf.random.stateless_uniform(
        [total, 2], fold_in(seed, 0), 0, 2 * padding + 1, tf.int32
    )[rows]
    down, right = tf.range(h), tf.range(w)
    columns = tf.tile(right[None], [tf.shape(offsets)[0], 1])
    if flip:
        mirrored = tf.random.stateless_uniform([total, 1], fold_in(seed, 1))[rows] < 0.5
        columns = tf.where(mirrored, right[::-1], columns)
    images = tf.pad(images, [[0, 0], [padding, padding], [padding, padding], [0, 0]])
    images = tf.gather(images, offsets[:, :1] + down, axis=1, batch_dims=1)
    return tf.gather(images, offsets[:, 1:] + columns, axis=2, batch_dims=1)


def inception_crop(images, seed, flip, rows=slice(None), total=None):
    """Cuts a random window, resizes it to the old size, mirrors half of the windows if `flip` (Szegedy et al., 2015).

    A window's ratio of width to height is log-uniform in [3/4, 4/3], its area uniform from 8 % of the image to the largest
    that fits. It is cut from the image as it is given, which for photos is one already resized.

    Args:
      images, seed, flip, rows, total: as in pad_crop_flip.
    """
    h, w = images.shape[1:3]
    total = total or tf.shape(images)[0]
    windows = inception_windows(
        tf.random.stateless_uniform([total, 4], fold_in(seed, 0))[rows], h, w
    )
    mirrored = tf.random.stateless_uniform([total], fold_in(seed, 1))[rows] < (0.5 if flip else 0)
    return resized_windows(images, windows, mirrored)


def inception_windows(draws, h, w):
    """Windows (top, left, bottom, right) in images of `h` × `w` pixels, float32 [B, 4], from `draws` in [0, 1), [B, 4]."""
    ratio = (4 / 3) ** (2 * draws[:, 0] - 1)
    largest = tf.minimum(1.0, tf.minimum(w / h / ratio, h / w * ratio))
    smallest = tf.minimum(0.08, largest)
    area = h * w * (smallest + (largest - smallest) * draws[:, 1])
    height, width = tf.sqrt(area / ratio), tf.sqrt(area * ratio)
    top, left = draws[:, 2] * (h - height), draws[:, 3] * (w - width)
    return tf.stack([top, left, top + height, left + width], 1)


def resized_windows(images, windows, mirrored):
    """`windows` (of inception_windows) of uint8 [B, H, W, C], resized to H × W and mirrored where `mirrored`, bool [B]."""
    h, w = images.shape[1:3]
    # crop_and_resize counts from the centre of the first pixel, 0, to that of the last, 1, and blackens what is beyond.
    top, left, bottom, right = (
        tf.clip_by_value(edge, 1e-6, 1 - 1e-6)
        for edge in tf.unstack((windows - [0, 0, 1, 1]) / [h - 1, w - 1, h - 1, w - 1], axis=1)
    )
    left, right = tf.where(mirrored, right, left), tf.where(mirrored, left, right)
    return _uint8(
        tf.image.crop_and_resize(
            images, tf.stack([top, left, bottom, right], 1), tf.range(tf.shape(images)[0]), [h, w]
        )
    )


def color_jitter(images, seed, strength, rows=slice(None), total=None):
    """Scales brightness, contrast and saturation (grey images have none), each by a factor in [1 - strength, 1 + strength].

    Args:
      images, seed, rows, total: as in pad_crop_flip, C is 1 or 3.
      strength: in [0, 1].
    """
    total = total or tf.shape(images)[0]
    brightness, contrast, saturation = tf.unstack(
        tf.random.stateless_uniform(
            [total, 3, 1, 1, 1], fold_in(seed, 3), 1 - strength, 1 + strength
        )[rows],
        axis=1,
    )
    grey = lambda x: tf.image.rgb_to_grayscale(x) if images.shape[-1] == 3 else x
    x = tf.cast(images, tf.float32) * brightness
    mean = tf.reduce_mean(grey(x), [1, 2, 3], keepdims=True)
    x = mean + contrast * (x - mean)
    return _uint8(grey(x) + saturation * (x - grey(x)))


def _uint8(x):
    return tf.saturate_cast(tf.round(x), tf.uint8)


def cutout(images, seed, size, rows=slice(None), total=None):
    """Blackens a random square of `size` pixels in each image, partly outside at the borders (DeVries and Taylor, 2017).

    Args:
      images, seed, rows, total: as in pad_crop_flip.
      size: an even number of pixels.
    """
    h, w = images.shape[1:3]
    total = total or tf.shape(images)[0]
    centre = tf.random.stateless_uniform([total, 2], fold_in(seed, 2))[rows]
    return compat.tensorflow_addons().image.cutout(
        images, (size, size), offset=tf.cast(centre * tf.constant([h, w], tf.float32), tf.int32)
    )
