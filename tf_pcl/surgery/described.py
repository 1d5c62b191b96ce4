"""Texts that two builds of a network have in common only if they are the same graph.

What was proven of one build then holds for the other.
"""

import hashlib
import inspect
import json
from typing import Any, Optional

import numpy as np
import tensorflow as tf

from tf_pcl.compat import is_of_keras, keras
from tf_pcl.surgery.graph import calls, has_own_call, sublayers


def described(model: keras.Model) -> Optional[str]:
    """Returns a short text that says what a model computes of its weights, whatever their values.

    Args:
      model: a functional keras.Model.

    Returns:
      A hash of its layers' classes and configurations without their names, of what they are called
      with, and of the outputs. None if that does not tell all: where a layer is of the user's own
      or applies the user's function, or was changed after it was made.
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
    if kind.__name__ in ("TFOpLambda", "SlicingOpLambda"):
        return True  # A function of TensorFlow's own, which the configuration names.
    for name, value in vars(layer).items():
        if inspect.isfunction(value) and not value.__module__.startswith(("keras.", "tf_keras.")):
            return False
        # Keras itself puts no method of the class into an object.
        if callable(value) and inspect.isfunction(getattr(kind, name, None)):
            return False
    return True


def _graph(model: keras.Model) -> list:
    """Returns what describes a functional model, of values that JSON or `_value` knows."""
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
    """Returns a value that JSON does not have in a form that tells it whole."""
    if isinstance(value, (np.ndarray, np.generic, tf.Tensor)):
        value = np.asarray(value)
        return [str(value.dtype), value.shape, value.tolist()]
    if isinstance(value, tf.DType):
        return value.name
    if isinstance(value, tf.TensorShape):
        return value.as_list()
    raise TypeError(type(value).__name__)
