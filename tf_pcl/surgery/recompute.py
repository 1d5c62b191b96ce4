"""Saves memory in a training step: outputs of layers are computed again in the backward pass.

The backward pass needs the outputs of nearly all layers. Here a network is a chain of parts, each
of which passes one tensor to the next. Only these tensors are kept. Everything within a part is
computed again for its gradients, and then dropped.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tf_pcl.compat import is_of_keras, keras
from tf_pcl.surgery.features import LogOfProbabilities, WithoutActivation
from tf_pcl.surgery.graph import calls, is_inner_model, sublayers

# A part ends where all its outputs together are this many times as large as the one it passes on.
_WORTH = 4
# Keras's layers that run other functions, which may return something else the second time.
_FOREIGN = ("Lambda", "TFOpLambda", "SlicingOpLambda", "ClassMethod")

# (a network, the function that replaces its `call`).
Recomputed = list[tuple[keras.Model, Callable[..., Any]]]


def recomputed(model: keras.Model, besides: Sequence[Any] = ()) -> Recomputed:
    """Finds the networks in a model and cuts each into parts, for `recomputing`.

    Args:
      model: a keras.Model, such as a method. It is left as it is.
      besides: models in it that are left out, since they get no gradient.

    Returns:
      The networks of which at least one part can be computed again.
    """
    found: Recomputed = []
    for layer in model._flatten_layers(recursive=False, include_self=False):
        if any(layer is one for one in besides):
            continue
        if is_inner_model(layer):
            chain = parts(layer)
            if any(part.repeatable for part in chain):
                found.append((layer, functools.partial(_call, layer, chain)))
        elif isinstance(layer, keras.Model):
            found += recomputed(layer, besides)
    return found


@contextlib.contextmanager
def recomputing(networks: Recomputed) -> Iterator[None]:
    """Lets networks that are called with `training=True` inside keep little for the gradient.

    Losses, gradients and the statistics of BatchNorm stay the same bit for bit. Parts with layers
    that draw random numbers, that hold a state other than BatchNorm's, or that are not Keras's own
    are computed as usual.

    Args:
      networks: what `recomputed` gives.
    """
    try:
        for network, call in networks:
            # Not through Keras's __setattr__, which would add it to what is saved.
            vars(network)["call"] = call
        yield
    finally:
        for network, _ in networks:
            vars(network).pop("call", None)


class Part(NamedTuple):
    """A part of a network.

    Attributes:
      model: a keras.Model of the network's own layers with a list of outputs. The first of them is
        what the next part takes, if there is one.
      made: {place among the network's outputs: place among those of the model}.
      repeatable: whether a second call gives the same outputs and has no effects.
    """

    model: keras.Model
    made: dict[int, int]
    repeatable: bool


def parts(network: keras.Model) -> list[Part]:
    """Cuts a network, a functional keras.Model of one input, into a chain of parts."""
    order = calls(network)
    ends = _ends(network, order)
    chain: list[Part] = []
    start, inside = network.input, set()
    for call in order:
        outputs = tf.nest.flatten(call.outputs)
        inside |= {id(t) for t in outputs}
        if call is order[-1] or id(outputs[0]) in ends:
            own = {i: t for i, t in enumerate(network.outputs) if id(t) in inside}
            handed = [] if call is order[-1] else outputs
            # Each tensor once: if one is given twice, Keras loses the origin of the first.
            unique = [*{id(t): t for t in (*handed, *own.values())}.values()]
            places = {id(t): k for k, t in enumerate(unique)}
            model = keras.Model(start, unique)
            made = {i: places[id(t)] for i, t in own.items()}
            chain.append(Part(model, made, all(map(_is_repeatable, sublayers(model)))))
            start, inside = outputs[0], set()
    return chain


def _ends(network: keras.Model, order: list) -> set[int]:
    """Returns the ids of the tensors that parts pass on."""
    last = {id(t): i for i, call in enumerate(order) for t in call.keras_inputs}
    waiting, size, ends = [network.input], 0, set()
    for i, call in enumerate(order[:-1]):
        outputs = tf.nest.flatten(call.outputs)
        waiting = [t for t in [*waiting, *outputs] if last.get(id(t), -1) > i]
        size += _size(call)
        alone = len(waiting) == len(outputs) == 1 and waiting[0] is outputs[0]
        if alone and size >= _WORTH * np.prod(_known(waiting[0].shape)):
            ends.add(id(waiting[0]))
            size = 0
    return ends


def _size(call: Any) -> int:
    """Returns how many numbers a call makes for an image; an unknown side counts as 1."""
    if is_inner_model(call.layer):
        return sum(map(_size, calls(call.layer)))
    return sum(int(np.prod(_known(t.shape))) for t in tf.nest.flatten(call.outputs))


def _known(shape: tf.TensorShape) -> list[int]:
    return [n or 1 for n in shape[1:]]


def _is_repeatable(layer: keras.layers.Layer) -> bool:
    if _is_norm(layer) or is_inner_model(layer):
        return True
    own = isinstance(layer, (WithoutActivation, LogOfProbabilities))
    foreign = not (own or is_of_keras(type(layer))) or type(layer).__name__ in _FOREIGN
    draws = getattr(layer, "_random_generator", None) is not None
    own_state = bool(getattr(layer, "_non_trainable_weights", None))
    penalised = getattr(layer, "activity_regularizer", None) is not None
    return not (foreign or draws or own_state or penalised)


def _is_norm(layer: keras.layers.Layer) -> bool:
    # With renorm=True it has further statistics. With synchronized=True, replicas wait within it
    # for others that may be in another pass; see replicas._moments.
    special = getattr(layer, "renorm", False) or getattr(layer, "synchronized", False)
    return type(layer) is keras.layers.BatchNormalization and not special


def _call(
    network: keras.Model, chain: list[Part], inputs: Any, training: Any = None, mask: Any = None
) -> Any:
    """Does what the network's own `call` does."""
    if training is not True or mask is not None:
        return type(network).call(network, inputs, training=training, mask=mask)
    made: dict[int, tf.Tensor] = {}
    x = inputs
    for part in chain:
        run = (
            _twice(part.model) if part.repeatable else functools.partial(part.model, training=True)
        )
        outputs = tf.nest.flatten(run(x))
        x = outputs[0]
        made.update({i: outputs[k] for i, k in part.made.items()})
    return tf.nest.pack_sequence_as(network.output, [made[i] for i in sorted(made)])


def _twice(part: keras.Model) -> Callable[[tf.Tensor], Any]:
    """Returns a part that is computed again for its gradient."""
    passes: list[None] = []
    # Looked up in the first pass: in the second, another replica may have changed them already.
    norms = [(layer, layer.momentum) for layer in sublayers(part) if _is_norm(layer)]

    def forward(x: tf.Tensor) -> list[tf.Tensor]:
        passes.append(None)
        with _still(norms) if len(passes) > 1 else contextlib.nullcontext():
            return tf.nest.flatten(part(x, training=True))

    return tf.recompute_grad(forward)


@contextlib.contextmanager
def _still(norms: Sequence[tuple[keras.layers.Layer, float]]) -> Iterator[None]:
    """Keeps BatchNorm layers, given with their momentum, from updating their statistics."""
    try:
        for layer, _ in norms:
            layer.momentum = 1.0
        yield
    finally:
        for layer, momentum in norms:
            layer.momentum = momentum
