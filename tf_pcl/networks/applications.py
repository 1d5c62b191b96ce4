"""The networks of keras.applications."""

import inspect
from typing import Callable

from tf_pcl.compat import keras
from tf_pcl.errors import choose

PREFIX = "applications."


def application(name: str) -> Callable[..., keras.Model]:
    """Returns the function of keras.applications that `applications.NAME` names.

    Raises:
      UserError: if keras.applications has no such function.
    """
    known = {n: f for n, f in vars(keras.applications).items() if inspect.isfunction(f)}
    return known[choose("network of keras.applications", name[len(PREFIX) :], known)]


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
            weights=None,
            input_shape=input_shape,
            classes=num_classes,
            classifier_activation=None,
        )
        for layer in model.submodules:
            if isinstance(layer, keras.layers.BatchNormalization):
                # With MobileNetV2's own 0.999, the first thousands of steps leave statistics that
                # still hold the initial values.
                layer.momentum = 0.9
        return model

    return build
