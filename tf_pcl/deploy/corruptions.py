"""Corruptions of images at five strengths, as functions of the image's number, strength and seed.

They are five of those of Hendrycks and Dietterich (arXiv 1903.12261), in TensorFlow and SciPy. The
strengths are the authors' for CIFAR if the smaller side has at most 64 pixels, else those for
ImageNet.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.ndimage
import tensorflow as tf

from tf_pcl.data import image_files

STRENGTHS = 5
_LARGEST_SMALL_SIDE = 64


class Corruption(NamedTuple):
    """A corruption and its strengths.

    Attributes:
      apply: a function (images float32 [B, H, W, C] in [0, 1], strength, random numbers) -> images,
        which are clipped afterwards. The random numbers are a function that returns standard
        normal numbers of the images' shape.
      small: its five strengths for small images.
      large: the same for large ones.
    """

    apply: Callable[..., np.ndarray]
    small: tuple[float, ...]
    large: tuple[float, ...]


def corrupted(
    images: np.ndarray, name: str, strength: int, *, first: int = 0, seed: int = 0
) -> np.ndarray:
    """Corrupts images.

    Args:
      images: uint8 [B, H, W, C].
      name: one of CORRUPTIONS.
      strength: from 1 to STRENGTHS.
      first: the number of the first image; the random numbers of an image depend on its number and
        not on its batch.
      seed: the seed of the random numbers.

    Returns:
      uint8 [B, H, W, C].
    """
    row = CORRUPTIONS[name]
    small = min(images.shape[1:3]) <= _LARGEST_SMALL_SIDE

    def normal() -> np.ndarray:
        draw = lambda i: np.random.RandomState([seed, i]).standard_normal(images.shape[1:])
        return np.stack([draw(first + i) for i in range(len(images))]).astype(np.float32)

    value = (row.small if small else row.large)[strength - 1]
    changed = row.apply(images.astype(np.float32) / 255, value, normal)
    return np.round(255 * np.clip(changed, 0, 1)).astype(np.uint8)


def _noise(images: np.ndarray, deviation: float, normal: Callable[[], np.ndarray]) -> np.ndarray:
    return images + deviation * normal()


def _blur(images: np.ndarray, pixels: float, _: Any) -> np.ndarray:
    return scipy.ndimage.gaussian_filter(images, (0, pixels, pixels, 0), mode="nearest")


def _contrast(images: np.ndarray, factor: float, _: Any) -> np.ndarray:
    mean = images.mean((1, 2), keepdims=True)
    return mean + factor * (images - mean)


def _brightness(images: np.ndarray, more: float, _: Any) -> np.ndarray:
    if images.shape[-1] == 1:
        return images + more
    hue, saturation, value = np.moveaxis(tf.image.rgb_to_hsv(images).numpy(), -1, 0)
    brighter = np.stack([hue, saturation, np.minimum(value + more, 1)], -1)
    return tf.image.hsv_to_rgb(brighter).numpy()


def _jpeg(images: np.ndarray, quality: float, _: Any) -> np.ndarray:
    raw = np.round(255 * images).astype(np.uint8)
    packed = [tf.io.encode_jpeg(image, quality=int(quality)) for image in raw]
    return np.stack([image_files.decode(p, raw.shape[-1]) for p in packed]) / np.float32(255)


CORRUPTIONS = {
    "gaussian noise": Corruption(
        _noise, (0.04, 0.06, 0.08, 0.09, 0.1), (0.08, 0.12, 0.18, 0.26, 0.38)
    ),
    "blur": Corruption(_blur, (0.4, 0.6, 0.7, 0.8, 1), (1, 2, 3, 4, 6)),
    "contrast": Corruption(_contrast, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "brightness": Corruption(_brightness, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "JPEG": Corruption(_jpeg, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}
