"""The one place that decides which Keras, and whether tensorflow-addons, the package uses."""

import warnings

from tensorflow import keras

layers = keras.layers

__all__ = ["is_of_keras", "keras", "layers", "tensorflow_addons"]


def tensorflow_addons():
    """Returns the module tensorflow_addons.

    It is imported on first use, and its warning that it has reached its end of life is silenced.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tensorflow_addons
    return tensorflow_addons


def is_of_keras(cls: type) -> bool:
    """Says whether a class is defined by Keras itself."""
    return cls.__module__.split(".")[0] in ("keras", "tf_keras")
