"""Watches which layers a model calls, on what, while it runs."""

import contextlib
from collections.abc import Iterable
from typing import Callable

import numpy as np
import tensorflow as tf

from tf_pcl.compat import keras
from tf_pcl.surgery.graph import leaves, sublayers
from tf_pcl.surgery.trial import trials


@contextlib.contextmanager
def _watched(layers_: Iterable[keras.layers.Layer], before: Callable, after: Callable):
    """Calls before(layer, inputs) and after(layer, inputs, outputs) around each layer's `call`."""

    def wrap(layer):
        original = layer.call

        def call(inputs, *args, **kwargs):
            before(layer, inputs)
            outputs = original(inputs, *args, **kwargs)
            after(layer, inputs, outputs)
            return outputs

        layer.call = call
        return layer

    wrapped = []
    try:
        for layer in layers_:
            wrapped.append(wrap(layer))
        yield
    finally:
        for layer in wrapped:
            del layer.call


def own_kernels(layer: keras.layers.Layer) -> list:
    """Returns the kernels that a layer holds itself, not in a sublayer."""
    return [w for w in own_weights(layer) if "kernel" in w.name.split("/")[-1]]


def own_weights(layer: keras.layers.Layer) -> list:
    """Returns the weights that a layer holds itself, not in a sublayer."""
    inside = {id(w) for sub in sublayers(layer) if sub is not layer for w in sub.weights}
    return [w for w in layer.weights if id(w) not in inside]


def flops(model: keras.Model) -> dict:
    """Counts what one image's forward pass costs in each of a model's leaves.

    Returns:
      {id of a leaf: FLOP}, 2 × multiply-adds with kernels: of convolutions of every kind, of dense
      layers and of the projections of attention. A kernel is applied once at every place of the
      layer's output, or of its input where that has fewer.
    """
    found = {id(leaf): 0 for leaf in leaves(model)}
    kernels, owner = {}, {}
    for leaf in leaves(model):
        for layer in sublayers(leaf):
            own = own_kernels(layer)
            if own and id(layer) not in owner:
                owner[id(layer)] = id(leaf)
                kernels[id(layer)] = (layer, sum(int(np.prod(w.shape)) for w in own))

    def count(layer, inputs, outputs):
        sizes = [tf.nest.flatten(x)[0].shape[1:-1] for x in (inputs, outputs)]
        places = min(int(np.prod(size)) for size in sizes)
        found[owner[id(layer)]] += 2 * kernels[id(layer)][1] * places

    shape = [side or 32 for side in model.input_shape[1:]]
    with trials, _watched((layer for layer, _ in kernels.values()), lambda *_: None, count):
        model(tf.zeros([1, *shape], model.inputs[0].dtype), training=False)
    return found


def first_weighted_input(model: keras.Model, images: np.ndarray) -> np.ndarray:
    """Returns what reaches the first layer with weights that are trained, for `images`.

    Args:
      model: a functional keras.Model.
      images: [B, H, W, C], in what scale they will come.
    """
    seen: list = []

    def note(layer, inputs):
        if not seen:
            seen.append(np.asarray(tf.cast(tf.nest.flatten(inputs)[0], tf.float32)))

    trained = {id(w) for w in model.trainable_weights} or {id(w) for w in model.weights}
    holders = [
        layer
        for layer in sublayers(model)
        if not isinstance(layer, keras.Model) and any(id(w) in trained for w in own_weights(layer))
    ]
    with trials, _watched(holders, note, lambda *_: None):
        model(tf.cast(images, model.inputs[0].dtype), training=False)
    return seen[0] if seen else np.asarray(images, np.float32)
