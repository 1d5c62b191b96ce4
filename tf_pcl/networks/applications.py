"""The networks of keras.applications."""

import inspect
from typing import Callable

from tf_pcl.compat import keras
from tf_pcl.errors import UserError, choose, one_line

PREFIX = "applications."


def application(name: str) -> Callable[..., keras.Model]:
    """Returns the function of keras.applications that `applications.NAME` names.

    Raises:
      UserError: if keras.applications has no such function.
    """
    known = {n: f for n, f in vars(keras.applications).items() if inspect.isfunction(f)}
    return known[choose("network of keras.applications", name[len(PREFIX) :], known)]


def load_imagenet(name: str, network: keras.Model) -> tuple:
    """Loads the ImageNet weights that Keras publishes into a network of `builder`.

    Keras downloads them. The classifier stays as it is.

    Returns:
      loaded, fresh: the names of the layers that got weights, and of the one that did not.

    Raises:
      UserError: if they cannot be loaded.
    """
    try:
        source = application(name)(
            weights="imagenet", include_top=False, input_shape=network.input_shape[1:]
        )
    except Exception as e:  # Downloads raise anything, and Keras refuses some sizes.
        raise UserError(
            f"Keras cannot load the weights of {name}: {one_line(e)}; give a file of weights",
            parameter="weights",
            value="imagenet",
        ) from e
    known = {layer.name: layer for layer in source.layers if layer.weights}
    holders = [layer for layer in network.layers if layer.weights]
    *body, last = holders
    # The names of some layers have numbers that Keras counts over all models; their order is fixed.
    for layer, given in zip(body, known.values()):
        layer.set_weights(given.get_weights())
    network.loaded_weights = True
    return [layer.name for layer in body], [last.name]


def builder(name: str) -> Callable[[tuple, int], keras.Model]:
    """Returns a function (input_shape, num_classes) that builds `applications.NAME` for training.

    The network has no pretrained weights, gives logits, and its BatchNorm has the recipe's
    momentum, 0.9.

    Raises:
      UserError: if keras.applications has no such network.
    """
    function = application(name)

    def build(input_shape, num_classes):
        model = function(
            weights=None, input_shape=input_shape, classes=num_classes, classifier_activation=None
        )
        for layer in model.submodules:
            if isinstance(layer, keras.layers.BatchNormalization):
                # With MobileNetV2's own 0.999, the statistics still hold the initial values after
                # thousands of steps.
                layer.momentum = 0.9
        return model

    return build
