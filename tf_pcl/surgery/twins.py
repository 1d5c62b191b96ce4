"""Tells whether the layers of a copy are what a network's layers are.

A pass on a few images shows what layers compute of them. It does not show a bound that these images
do not reach, a regularizer, a constraint, an initializer, or a rate that is seldom drawn.
"""

import inspect
import numbers
import types
from typing import Any, Optional

import numpy as np
import tensorflow as tf

from tf_pcl.compat import is_of_keras, keras
from tf_pcl.surgery.graph import has_own_call, is_operation, sublayers

# They hold weights, or a state that passes change; others look at those.
_STATEFUL = (tf.Variable, tf.Module, keras.layers.Layer, tf.random.Generator)


def difference(network: keras.Model, copy: keras.Model) -> str:
    """Returns a clause that says what a copy's layers hold that the network's do not; "" if none.

    Numbers, texts, arrays, functions and objects of these are looked at. Seeds may differ.

    Args:
      network: a keras.Model.
      copy: a keras.Model that was made of its configuration.
    """
    ours, theirs = list(sublayers(network)), list(sublayers(copy))
    if [type(layer) for layer in ours] != [type(layer) for layer in theirs]:
        return "it has layers of other classes"
    usual = {*vars(keras.Model()), "optimizer", "loss"}  # A model may be compiled.
    for one, other in zip(ours, theirs):
        if isinstance(one, keras.Model) and not has_own_call(one):
            continue  # It is the graph of its layers.
        a, b = (_held(layer, is_of_keras(type(one))) for layer in (one, other))
        # TensorFlow wraps some functions anew each time, and has one of each name.
        named = {"function"} if is_operation(one) else set()
        for name in sorted({*a, *b} - usual - named):
            if not _alike(a.get(name), b.get(name)):
                return f"layer {one.name!r} ({type(one).__name__}) has another `{name}`"
    return ""


def _held(holder: Any, public: bool) -> dict:
    """Returns the attributes of an object, but for seeds and, with `public`, private ones."""
    return {
        name: value
        for name, value in vars(holder).items()
        if "seed" not in name and not (public and name.startswith("_"))
    }


def _alike(one: Any, other: Any, around: tuple = ()) -> bool:
    """Says whether two values are equal; objects are if their attributes are."""
    if one is other or isinstance(one, _STATEFUL) or any(one is outer for outer in around):
        return True
    if isinstance(one, (np.ndarray, np.generic, tf.Tensor, numbers.Number)):
        return isinstance(other, (np.ndarray, np.generic, tf.Tensor, numbers.Number)) and bool(
            np.array_equal(np.asarray(one), np.asarray(other))
        )
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        one, other = dict(enumerate(one)), dict(enumerate(other))
    ours, theirs = _parts(one), _parts(other)
    if ours is None or theirs is None:
        return type(one) is type(other) and (not isinstance(one, (str, bytes)) or one == other)
    return ours.keys() == theirs.keys() and all(
        _alike(value, theirs[key], (*around, one)) for key, value in ours.items()
    )


def _parts(value: Any) -> Optional[dict]:
    """Returns {key: part} of a value that consists of others, else None."""
    if isinstance(value, dict):
        return dict(value)
    if inspect.ismethod(value):
        return {"function": value.__func__}
    if inspect.isfunction(value):
        code = value.__code__
        return {
            "code": code.co_code,
            "constants": [c for c in code.co_consts if not inspect.iscode(c)],
            "names": code.co_names,
            "defaults": value.__defaults__,
            "closure": [c.cell_contents for c in value.__closure__ or () if c != types.CellType()],
        }
    if not hasattr(value, "__dict__"):
        return None
    name = type(value).__qualname__
    tensorflows = type(value).__module__.startswith("tensorflow.")
    if (tensorflows or is_of_keras(type(value))) and hasattr(value, "get_config"):
        # TensorFlow's initializers become Keras's of the same name.
        config = value.get_config()
        return {"class": name, **{k: v for k, v in config.items() if "seed" not in k}}
    return {"class": f"{type(value).__module__}.{name}", **_held(value, True)}
