"""Watches a model's layers, and their inputs and outputs, while it runs."""

import contextlib
import inspect
from collections.abc import Iterable
from typing import Callable, Optional

import numpy as np
import tensorflow as tf

from tf_pcl.compat import keras
from tf_pcl.surgery.graph import leaves, sublayers
from tf_pcl.surgery.trial import trials


@contextlib.contextmanager
def _watched(
    layers_: Iterable[keras.layers.Layer],
    before: Callable,
    after: Callable,
    training: Optional[bool] = None,
):
    """Calls before(layer, inputs) and after(layer, inputs, outputs) around each layer's `call`.

    Unless it is None, `training` replaces the layers' argument of that name.
    """

    def wrap(layer):
        original = layer.call

        def call(inputs, *args, **kwargs):
            before(layer, inputs)
            if training is not None and "training" in kwargs:
                kwargs["training"] = training
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


def own_weights(layer: keras.layers.Layer) -> list:
    """Returns the weights that a layer holds itself, not in a sublayer."""
    inside = {id(w) for sub in sublayers(layer) if sub is not layer for w in sub.weights}
    return [w for w in layer.weights if id(w) not in inside]


def flops(model: keras.Model) -> dict:
    """Counts the cost of one image's forward pass in each of a model's leaves.

    Returns:
      {id of a leaf: FLOP}; see `flops_while` for what is counted.
    """
    shape = [side or 32 for side in model.input_shape[1:]]
    image = tf.zeros([1, *shape], model.inputs[0].dtype)
    counted = flops_while(lambda: model(image, training=False), model)
    # A layer that several leaves hold counts for the first one.
    return {
        id(leaf): sum(counted.pop(id(layer), 0) for layer in sublayers(leaf))
        for leaf in leaves(model)
    }


def flops_while(compute: Callable[[], object], model: keras.layers.Layer) -> dict:
    """Counts what the layers in a model cost while `compute` runs, eagerly and in inference mode.

    If `compute` calls a layer in training mode, it runs in inference mode, so that no statistics
    change and no random numbers are drawn.

    Returns:
      {id of a layer: FLOP}, 2 × multiply-adds with the kernels that the layer holds itself: of
      convolutions of every kind, of dense layers and of the projections of attention. A kernel is
      applied once at every place of the layer's output, or of its input where that has fewer.
    """
    of_kernel = lambda w: int(np.prod(w.shape)) if "kernel" in w.name.split("/")[-1] else 0
    sizes = {id(layer): sum(map(of_kernel, own_weights(layer))) for layer in sublayers(model)}
    found = {key: 0 for key, size in sizes.items() if size}
    replicas = []

    def count(layer, inputs, outputs):
        # All replicas compute the same.
        replicas.append(tf.distribute.get_replica_context().replica_id_in_sync_group)
        if id(layer) in found and replicas[-1] == replicas[0]:
            places = (int(np.prod(tf.nest.flatten(x)[0].shape[:-1])) for x in (inputs, outputs))
            found[id(layer)] += 2 * sizes[id(layer)] * min(places)

    ends = [
        layer
        for layer in sublayers(model)
        if id(layer) in found
        or not isinstance(layer, keras.Model)
        and "training" in inspect.signature(layer.call).parameters
    ]
    with trials, _watched(ends, lambda *_: None, count, training=False):
        tf.distribute.get_strategy().run(compute)
    return found


def first_weighted_input(model: keras.Model, images: np.ndarray) -> np.ndarray:
    """Returns the input of the first layer with weights for training, frozen or not, for `images`.

    Args:
      model: a functional keras.Model.
      images: [B, H, W, C], on the scale that is used later.
    """
    seen: list = []

    def note(layer, inputs):
        if not seen:
            seen.append(np.asarray(tf.cast(tf.nest.flatten(inputs)[0], tf.float32)))

    # Normalization has other ones.
    of_training = {id(w) for w in model.weights if w.trainable} or {id(w) for w in model.weights}
    holders = [
        layer
        for layer in sublayers(model)
        if not isinstance(layer, keras.Model)
        and any(id(w) in of_training for w in own_weights(layer))
    ]
    with trials, _watched(holders, note, lambda *_: None):
        model(tf.cast(images, model.inputs[0].dtype), training=False)
    return seen[0] if seen else np.asarray(images, np.float32)
