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

    This depends on the input of the first layer with weights for training, frozen or not: whether
    raw images reach it at a size near 1, or standardised ones nearer to mean 0 and deviation 1.

    Args:
      network: a functional keras.Model.
      images: raw images [B, H, W, C], 0–255.
      standard: the layer that standardises them.
    """
    raw = np.asarray(images, np.float32)
    seen = np.stack([first_weighted_input(network, x) for x in (raw, np.asarray(standard(raw)))])
    # What is equal in all images, such as padding, says nothing.
    differs = np.ptp(seen, axis=1).all(axis=0)
    seen = seen[:, :, differs] if differs.any() else seen
    size, deviation = (np.maximum(one, 1e-6) for one in _sizes(seen))
    # A mean far from 0 is worse than a wrong scale: it makes all images look alike. But raw images
    # may be bright, however they are scaled.
    from_standard = abs(np.log(deviation[1])) + 2 * abs(np.log(deviation[1] / size[1]))
    return bool(abs(np.log(size[0])) < from_standard)


def _sizes(values: np.ndarray) -> tuple:
    """Returns the root mean squares and the deviations of the rows of an array."""
    rows = values.reshape(len(values), -1)
    return np.sqrt(np.mean(np.square(rows), axis=1)), rows.std(axis=1)
