"""What stands between raw images and a network."""

from collections.abc import Sequence
from typing import Optional

import numpy as np

from tf_pcl.compat import keras
from tf_pcl.networks import applications


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


def standardises_itself(network: keras.Model) -> bool:
    """Says whether the network scales raw images itself, with Rescaling or Normalization."""
    scaling = (keras.layers.Rescaling, keras.layers.Normalization)
    return any(isinstance(layer, scaling) for layer in network.submodules)
