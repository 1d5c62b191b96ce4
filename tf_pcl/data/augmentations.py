"""Random augmentations of uint8 images [B, H, W, C]: for each, one function and one row.

A function takes images, Draws that give it random numbers, and the value of its option; it returns
images of the same shape. Random numbers are stateless: the same key gives the same images. They
depend on the augmentation's name and not on other rows. The rows of AUGMENTATIONS are applied in
their order.
"""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any, Callable, Optional, Union

import tensorflow as tf

from tf_pcl import compat
from tf_pcl.errors import UserError, choose


def fold_in(seed: tf.Tensor, *numbers: Union[int, tf.Tensor]) -> tf.Tensor:
    """Returns a new seed int [2] that is a function of a seed and of integers."""
    for number in numbers:
        seed = tf.random.experimental.stateless_fold_in(seed, number)
    return seed


class Draws:
    """Gives random numbers for some images of a global batch.

    The numbers of an image depend on the key, on the number of calls before, and on the image's row
    in the global batch. So workers with different rows together draw what one worker with the
    whole batch would.

    Args:
      key: a seed, int [2].
      total: the size of the global batch.
      rows: the rows of these images in the global batch, B of them.
    """

    def __init__(self, key: tf.Tensor, total: int, rows: slice = slice(None)):
        self.key, self.total, self.rows = key, total, rows
        self._calls = 0

    def uniform(self, *shape: int, low=0, high=1, dtype: tf.DType = tf.float32) -> tf.Tensor:
        """Returns the next random numbers, [B, *shape], uniform in [low, high)."""
        key = fold_in(self.key, self._calls)
        self._calls += 1
        return tf.random.stateless_uniform([self.total, *shape], key, low, high, dtype)[self.rows]

    def beta(self, alpha: float) -> tf.Tensor:
        """Returns the next random numbers of Beta(α, α), float32 [B], in [0, 1]."""
        key = fold_in(self.key, self._calls)
        self._calls += 1
        # A number of Beta is a share of the sum of two numbers of Gamma. For a small α both may
        # underflow; then the number is 0.
        shape, dtype = [self.total, 2], tf.float64
        gamma = tf.random.stateless_gamma(shape, key, tf.cast(alpha, dtype), dtype=dtype)
        share = tf.math.divide_no_nan(gamma[:, 0], tf.reduce_sum(gamma, 1))
        return tf.cast(share, tf.float32)[self.rows]

    def named(self, name: str) -> "Draws":
        """Returns Draws for the same images whose random numbers depend on a name as well."""
        # Python's own hash differs from process to process.
        key = fold_in(self.key, zlib.crc32(name.encode()) & 0x7FFFFFFF)
        return Draws(key, self.total, self.rows)


def pad_and_crop(images: tf.Tensor, draws: Draws, padding: Optional[int] = None) -> tf.Tensor:
    """Zero-pads images on every side and cuts a random window of the old size.

    Args:
      images: uint8 [B, H, W, C].
      draws: the random numbers.
      padding: in pixels; an eighth of the shorter side by default.
    """
    h, w, channels = images.shape[1:]
    if padding is None:
        padding = max(1, round(min(h, w) / 8))
    offsets = draws.uniform(2, high=2 * padding + 1, dtype=tf.int32)
    # TensorFlow pads rows of bytes up to three times as fast as rows of pixels.
    rows = tf.reshape(images, [-1, h, w * channels])
    rows = tf.pad(rows, [[0, 0], [padding, padding], [channels * padding, channels * padding]])
    images = tf.reshape(rows, [-1, h + 2 * padding, w + 2 * padding, channels])
    images = tf.gather(images, offsets[:, :1] + tf.range(h), axis=1, batch_dims=1)
    return tf.gather(images, offsets[:, 1:] + tf.range(w), axis=2, batch_dims=1)


def inception_crop(images: tf.Tensor, draws: Draws) -> tf.Tensor:
    """Cuts a random window and resizes it to the old size (Szegedy et al., 2015).

    A window's ratio of width to height is log-uniform in [3/4, 4/3], its area uniform from 8 % of
    the image to the largest that fits; both are rounded to whole pixels. It is cut from the given
    image; photos have been resized before.
    """
    return resized_windows(images, inception_windows(draws.uniform(4), *images.shape[1:3]))


def inception_windows(uniform: tf.Tensor, h: int, w: int) -> tf.Tensor:
    """Returns windows (top, left, height, width) in images of `h` × `w` pixels, int32 [B, 4].

    Args:
      uniform: numbers in [0, 1), float32 [B, 4].
      h: height of the images.
      w: width of the images.
    """
    ratio = (4 / 3) ** (2 * uniform[:, 0] - 1)
    largest = tf.minimum(1.0, tf.minimum(w / h / ratio, h / w * ratio))
    smallest = tf.minimum(0.08, largest)
    area = h * w * (smallest + (largest - smallest) * uniform[:, 1])
    size = tf.maximum(1.0, tf.round(tf.sqrt(tf.stack([area / ratio, area * ratio], 1))))
    first = tf.floor(uniform[:, 2:] * ([h + 1, w + 1] - size))
    return tf.cast(tf.concat([first, size], 1), tf.int32)


def resized_windows(images: tf.Tensor, windows: tf.Tensor) -> tf.Tensor:
    """Cuts one window of each image, uint8 [B, H, W, C], and resizes it to H × W, bilinearly.

    Args:
      images: uint8 [B, H, W, C].
      windows: those of inception_windows, int32 [B, 4].
    """
    h, w, channels = images.shape[1:]

    def resized(one: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        image, window = one
        top, left, height, width = tf.unstack(window)
        cut = image[top : top + height, left : left + width]
        # What lies between pixels is in their range: to cast it is faster than _uint8.
        return tf.cast(tf.round(tf.image.resize(cut, [h, w])), tf.uint8)

    # One image after another, this takes half the time of tf.image.crop_and_resize.
    kind = tf.TensorSpec([h, w, channels], tf.uint8)
    return tf.map_fn(resized, (images, windows), fn_output_signature=kind)


def flip(images: tf.Tensor, draws: Draws, value: bool = True) -> tf.Tensor:
    """Mirrors half of the images left-right."""
    del value
    # Reversing rows of pixels and selecting whole images is many times faster in TensorFlow than
    # images[:, :, ::-1] and tf.where along the batch.
    rows = tf.reshape(images, [-1, *images.shape[2:]])
    mirrored = tf.reshape(tf.reverse(rows, [1]), tf.shape(images))
    chosen = tf.reshape(draws.uniform(1, 1, 1) < 0.5, [-1])
    flipped = tf.raw_ops.Select(condition=chosen, x=mirrored, y=images)
    return tf.ensure_shape(flipped, images.shape)


def color_jitter(images: tf.Tensor, draws: Draws, strength: float) -> tf.Tensor:
    """Scales brightness, contrast and saturation (grey images have none) by random factors.

    Args:
      images: uint8 [B, H, W, C], C is 1 or 3.
      draws: the random numbers.
      strength: in [0, 1]; factors lie in [1 - strength, 1 + strength].
    """
    factors = draws.uniform(3, 1, 1, 1, low=1 - strength, high=1 + strength)
    brightness, contrast, saturation = tf.unstack(factors, axis=1)
    grey = lambda x: tf.image.rgb_to_grayscale(x) if images.shape[-1] == 3 else x
    x = tf.cast(images, tf.float32) * brightness
    mean = tf.reduce_mean(grey(x), [1, 2, 3], keepdims=True)
    x = mean + contrast * (x - mean)
    return _uint8(grey(x) + saturation * (x - grey(x)))


def cutout(images: tf.Tensor, draws: Draws, size: int) -> tf.Tensor:
    """Blackens a random square in each image, partly outside at the borders.

    Source: DeVries and Taylor, 2017.

    Args:
      images: uint8 [B, H, W, C].
      draws: the random numbers.
      size: side of the square, an even number of pixels.
    """
    h, w = images.shape[1:3]
    centre = draws.uniform(2) * tf.constant([h, w], tf.float32)
    return compat.cutout(images, size, tf.cast(centre, tf.int32))


def _uint8(x: tf.Tensor) -> tf.Tensor:
    return tf.saturate_cast(tf.round(x), tf.uint8)


CROPS = {"crop": pad_and_crop, "inception": inception_crop}


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """A row of AUGMENTATIONS.

    Args:
      function: (images uint8 [B, H, W, C], draws, value) -> images of the same shape.
      allowed: the names that its value may be, or a function that says whether a value is allowed.
      values: the allowed values, in words; needed if `allowed` is a function.
      default: a function of an ImageData that returns the default value. If the value is false or
        0, images are not changed.
    """

    function: Callable[[tf.Tensor, Draws, Any], tf.Tensor]
    allowed: Union[tuple, Callable[[Any], bool]]
    values: str = ""
    default: Callable[[Any], Any] = lambda data: 0


AUGMENTATIONS = {
    "augment": Augmentation(
        lambda images, draws, kind: CROPS[kind](images, draws),
        tuple(CROPS),
        default=lambda data: "crop" if min(data.image_shape[:2]) <= 64 else "inception",
    ),
    "flip": Augmentation(
        flip, lambda on: on in (True, False), "true or false", lambda data: data.flip
    ),
    "color_jitter": Augmentation(
        color_jitter, lambda strength: 0 <= strength <= 1, "a number from 0 to 1"
    ),
    "cutout": Augmentation(
        cutout, lambda side: side >= 0 and side % 2 == 0, "an even number of pixels"
    ),
}


def settle(data: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {name: value} of the augmentations to apply, in the order of AUGMENTATIONS.

    Args:
      data: an ImageData, which determines the values that are missing or None.
      given: {name: value}.

    Raises:
      UserError: if there is no such augmentation or it does not take the value.
    """
    for name in given:
        choose("augmentation", name, AUGMENTATIONS)
    settled = {}
    for name, row in AUGMENTATIONS.items():
        value = given.get(name)
        value = row.default(data) if value is None else value
        if isinstance(row.allowed, tuple):
            choose(name, value, row.allowed, parameter=name)
        elif not row.allowed(value):
            raise UserError(f"give {row.values}", parameter=name, value=value, allowed=row.values)
        if value:
            settled[name] = value
    return settled


def augmented(images: tf.Tensor, draws: Draws, settled: Mapping[str, Any]) -> tf.Tensor:
    """Returns images uint8 [B, H, W, C] after the augmentations that `settle` returned."""
    for name, value in settled.items():
        images = AUGMENTATIONS[name].function(images, draws.named(name), value)
    return images
