"""Layers between raw images and a network."""

from collections.abc import Sequence
from typing import Optional

import numpy as np

from tf_pcl.compat import keras
from tf_pcl.networks import applications
from tf_pcl.surgery.observe import first_weighted_input


def standardise(mean: Sequence[float], std: Sequence[float]) -> keras.layers.Layer:
    """Returns a layer from raw images 0–255 to float32 images of mean 0 and deviation 1.

    Args:
      mean, std: of each channel, on the scale 0–255.
    """
    return keras.layers.Normalization(
        mean=np.asarray(mean, np.float32),
        variance=np.square(np.asarray(std, np.float32)),
        dtype="float32",
        name="standardise",
    )


def preprocessing(name: str, input_shape: tuple) -> Optional[keras.Model]:
    """Returns the preprocess_input that the published weights of `applications.NAME` expect.

    Args:
      name: of a network; one that is not of keras.applications has no such function.
      input_shape: (H, W, channels).

    Returns:
      A keras.Model from raw images 0–255 to float32 images, or None.
    """
    if not name.startswith(applications.PREFIX):
        return None
    module = applications.application(name).__module__.split(".")[-1]
    images = keras.Input(input_shape, dtype="float32")
    prepared = getattr(keras.applications, module).preprocess_input(images)
    return keras.Model(images, prepared, name="preprocess_input")


def scales_raw_images(
    network: keras.Model, images: np.ndarray, standard: keras.layers.Layer
) -> bool:
    """Says whether a network scales raw images itself.

    This depends on the input of the first layer that has weights: whether it is nearer to mean 0
    and deviation 1 if the network gets raw images, or if it gets standardised ones.

    Args:
      network: a functional keras.Model.
      images: raw images [B, H, W, C], 0–255.
      standard: the layer that standardises them.
    """

    def distance(given):
        seen = first_weighted_input(network, given)
        deviation, size = np.maximum([seen.std(), np.sqrt(np.mean(np.square(seen)))], 1e-6)
        # A mean far from 0 is worse than a wrong scale: it makes all images look alike.
        return abs(np.log(deviation)) + 2 * abs(np.log(deviation / size))

    raw = np.asarray(images, np.float32)
    return bool(distance(raw) < distance(np.asarray(standard(raw))))
