"""Texts that are equal for two builds of a network only if both have the same graph.

A proof for one build then holds for the other.
"""

import hashlib
import inspect
import json
from typing import Any, Optional

import numpy as np
import tensorflow as tf

from tf_pcl.compat import is_of_keras, keras
from tf_pcl.surgery.graph import calls, has_own_call, is_operation, sublayers


def described(model: keras.Model) -> Optional[str]:
    """Returns a short text that says what a model computes, for any values of its weights.

    Args:
      model: a functional keras.Model.

    Returns:
      A hash of its layers' classes and configurations without their names, of their inputs, and of
      the outputs. None if these do not say everything: if a layer is the user's own, applies a
      function of the user's, or was changed after it was built.
    """
    if not all(map(_is_told, sublayers(model))):
        return None
    try:
        text = json.dumps(_graph(model), default=_value)
    except (TypeError, ValueError, NotImplementedError):  # A layer without a configuration.
        return None
    return hashlib.sha256(text.encode()).hexdigest()


def _is_told(layer: Any) -> bool:
    """Says whether a layer's class and configuration tell what it computes."""
    kind = type(layer)
    if isinstance(layer, keras.layers.Lambda) or not is_of_keras(kind):
        return False
    if isinstance(layer, keras.Model) and (has_own_call(layer) or not layer.inputs):
        return False
    if is_operation(layer):
        return True
    for name, value in vars(layer).items():
        if inspect.isfunction(value) and not value.__module__.startswith(("keras.", "tf_keras.")):
            return False
        # A method in an object was replaced; Keras itself does not do that.
        if callable(value) and inspect.isfunction(getattr(kind, name, None)):
            return False
    return True


def _graph(model: keras.Model) -> list:
    """Returns a description of a functional model, of values that JSON or `_value` can write."""
    places = {id(t): f"input {i}" for i, t in enumerate(model.inputs)}
    layers: dict = {}

    def placed(value: Any) -> Any:
        return places.get(id(value), value)

    rows = []
    for number, call in enumerate(calls(model)):
        layer = call.layer
        first = layers.setdefault(id(layer), len(layers)) == len(layers) - 1
        given = tf.nest.map_structure(placed, [call.call_args, call.call_kwargs])
        rows.append([layers[id(layer)], _layer(layer) if first else "", given])
        for i, made in enumerate(tf.nest.flatten(call.outputs)):
            places[id(made)] = f"call {number} output {i}"
    inputs = [[list(t.shape), tf.as_dtype(t.dtype).name] for t in model.inputs]
    return [inputs, rows, tf.nest.map_structure(placed, model.output)]


def _layer(layer: Any) -> list:
    """Returns a layer's class and configuration; that of a model is its graph."""
    of_class = f"{type(layer).__module__}.{type(layer).__qualname__}"
    if isinstance(layer, keras.Model):
        return [of_class, layer.trainable, _graph(layer)]
    config = {key: value for key, value in layer.get_config().items() if key != "name"}
    return [of_class, layer.trainable, config]


def _value(value: Any) -> Any:
    """Returns a full description of a value that JSON cannot write."""
    if isinstance(value, (np.ndarray, np.generic, tf.Tensor)):
        value = np.asarray(value)
        return [str(value.dtype), value.shape, value.tolist()]
    if isinstance(value, tf.DType):
        return value.name
    if isinstance(value, tf.TensorShape):
        return value.as_list()
    raise TypeError(type(value).__name__)
