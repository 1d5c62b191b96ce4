"""Proofs that a model made from a network computes what the network computes.

They run once, before training, on two random images, and change nothing: variables and the states
of random generators are restored.
"""

import random
from collections.abc import Iterable
from typing import Callable, NamedTuple, Optional

import numpy as np
import tensorflow as tf

from tf_pcl.compat import keras
from tf_pcl.errors import UserError
from tf_pcl.surgery.graph import generators
from tf_pcl.surgery.trial import trials

TOLERANCE = 1e-3  # Of the largest output; convolutions may sum in another order.


class Run(NamedTuple):
    """The results of one pass of a model.

    Attributes:
      outputs: arrays.
      penalty: the sum of the layers' own losses.
      changes: the change of each state variable, an array; None if it is not of floats.
      gradients: for each trainable weight, whether the sum of the squared outputs has a gradient
        with respect to it; None in inference.
    """

    outputs: list
    penalty: np.ndarray
    changes: list
    gradients: Optional[list]


def images_for(model: keras.Model) -> tf.Tensor:
    """Returns two random images that a model takes, in [-1, 1] or, as integers, in 0–255."""
    shape = [side or 32 for side in model.input_shape[1:]]
    dtype = tf.as_dtype(model.inputs[0].dtype)
    low, high = (-1, 1) if dtype.is_floating else (0, 256)
    return tf.cast(np.random.RandomState(0).uniform(low, high, (2, *shape)), dtype)


def states(model: keras.Model) -> list:
    """Returns the variables that a pass may change: statistics, and states of random generators."""
    found = [*model.non_trainable_weights, *(g.state for g in generators(model))]
    return list({id(v): v for v in found}.values())


def run(
    model: Callable, parts: Iterable, images, training: bool, state: list, weights: list, seed=None
) -> Run:
    """Runs a model once on `images` and restores `state`.

    Args:
      model: a function (images, training=…) that returns tensors in any structure.
      parts: the keras.Models whose losses count, all of which it calls.
      state: the variables that the pass may change.
      weights: the weights whose gradients are computed, in training.
      seed: TensorFlow's global seed for this run; afterwards it is drawn from Python's generator.
    """
    before = [v.numpy() for v in state]
    if seed is not None:
        tf.random.set_seed(seed)

    def forward(images):
        with tf.GradientTape() as tape:
            made = tf.nest.flatten(model(images, training=training))
            outputs = [tf.cast(t, tf.float32) for t in made]
            total = tf.add_n([tf.reduce_sum(tf.square(t)) for t in outputs])
        losses = [tf.reduce_sum(tf.cast(x, tf.float32)) for part in parts for x in part.losses]
        penalty = tf.add_n([tf.constant(0.0), *losses])
        return outputs, penalty, tape.gradient(total, weights) if training else None

    strategy = tf.distribute.get_strategy()
    outputs, penalty, gradients = strategy.run(forward, args=(images,))
    first = lambda value: strategy.experimental_local_results(value)[0]
    outputs = [first(t).numpy() for t in outputs]
    changes = [v.numpy() - b if b.dtype.kind == "f" else None for v, b in zip(state, before)]
    for variable, value in zip(state, before):
        variable.assign(value)
    if seed is not None:
        tf.random.set_seed(random.randrange(2**31))
    penalty = first(penalty).numpy()
    return Run(outputs, penalty, changes, gradients and [g is not None for g in gradients])


def _close(a, b, tolerance) -> bool:
    if a.shape != b.shape:
        return False
    a, b = a.astype(np.float64), b.astype(np.float64)  # NumPy does not compare bfloat16.
    scale = max(1e-3, float(np.abs(a).max(initial=0.0)))
    return np.allclose(a, b, rtol=0, atol=tolerance * scale, equal_nan=True)


def _all_close(one: Iterable, other: Iterable, tolerance: float = TOLERANCE) -> bool:
    one, other = list(one), list(other)
    return len(one) == len(other) and all(
        a is b is None or (a is not None and b is not None and _close(a, b, tolerance))
        for a, b in zip(one, other)
    )


def same(
    model: keras.Model,
    other: Callable,
    what: str,
    *,
    reference: Optional[Callable] = None,
    twin: Optional[keras.Model] = None,
    parts: Optional[tuple] = None,
    training: bool = True,
    tolerance: float = TOLERANCE,
    known: Optional[tuple] = None,
) -> None:
    """Proves that a model made from a network computes what the network computes.

    The outputs and the layers' own losses must agree; in training also the changes of state and the
    weights that get a gradient, with the same random numbers.

    Args:
      model: the network, whose input defines the images.
      other: what was made from it, a model or a function (images, training=…).
      what: the name of `other` in the error.
      reference: what `other` must equal; by default the network itself.
      twin: the keras.Model that `other` belongs to, if it has variables of its own. They must have
        the network's values.
      parts: the keras.Models of which the two consist, whose losses are compared; by default the
        two themselves, or none if `other` is a function.
      training: whether to compare in training too, not only in inference.
      tolerance: how much outputs and statistics may differ, relative to their size.
      known: (a set, a key that describes the case). If the key is in the set, the case was proven
        before and is not run again; otherwise the key is added.

    Raises:
      UserError: if they differ.
    """
    if known and known[1] in known[0]:
        return
    with trials:
        images = images_for(model)
        if parts is None:
            parts = ([model], [other]) if isinstance(other, keras.Model) else ([], [])
        sides = [(reference or model, parts[0], model), (other, parts[1], twin or model)]
        state = [states(side) for _, _, side in sides]
        if twin is not None:  # So that generators draw the same numbers.
            for a, b in zip(*state):
                b.assign(a)
        for phase in (False, True)[: 1 + training]:
            for seed in (None, 1)[: 1 + phase]:  # Without a seed, only dropout may differ.
                differ = _difference(
                    tolerance,
                    *(
                        run(call, of, images, phase, variables, side.trainable_weights, seed)
                        for (call, of, side), variables in zip(sides, state)
                    ),
                )
                if not differ:
                    break
            if differ:
                where = "training" if phase else "inference"
                raise UserError(f"{what} differs from the given network: in {where} {differ}")
    if known:
        known[0].add(known[1])


def _difference(tolerance: float, one: Run, other: Run) -> str:
    """Returns how two runs differ; "" if they do not."""
    if not _all_close(one.outputs, other.outputs, tolerance):
        return "its outputs differ"
    if not _close(one.penalty, other.penalty, tolerance):
        return "its own losses, of regularizers or add_loss, differ"
    if not _all_close(one.changes, other.changes, tolerance):
        return "it changes other statistics"
    return "" if one.gradients == other.gradients else "other weights get a gradient"


def draws_alike(model: keras.Model, other: keras.Model) -> bool:
    """Says whether two models have the same random operations in training.

    Values do not tell, where what is drawn seldom changes them, or little.
    """

    return _drawn(traced(model)) == _drawn(traced(other))


def traced(model: keras.Model, training: bool = True) -> tf.Graph:
    """Returns the graph of a pass of a model."""
    strategy = tf.distribute.get_strategy()

    @tf.function
    def forward(images):
        return strategy.run(lambda x: model(x, training=training), args=(images,))

    with trials:
        return forward.get_concrete_function(images_for(model)).graph


def _drawn(graph):
    """Returns the sorted names of the random operations in a graph."""
    written = graph.as_graph_def()
    nodes = [*written.node, *(n for f in written.library.function for n in f.node_def)]
    return sorted(node.op for node in nodes if "Random" in node.op)


def apart(models: Iterable[keras.Model]) -> None:
    """Proves that no two models share a variable.

    Raises:
      UserError: if they do.
    """
    holder: dict = {}
    for number, model in enumerate(models, 1):
        for variable in model.weights:
            other = holder.setdefault(variable.ref(), number)
            if other != number:
                raise UserError(
                    f"networks {other} and {number} share the variable {variable.name!r}: give "
                    "each a network of its own"
                )


def answers_once(model: keras.Model, graph: tf.Graph) -> None:
    """Proves that a network gives the same outputs for the same images in inference.

    Args:
      model: the network.
      graph: its pass in training, traced.

    Raises:
      UserError: if it is random, because of dropout with training=True or a random operation.
    """
    with trials:
        images, state = images_for(model), states(model)
        if _drawn(graph) and _drawn(traced(model, training=False)):
            # What is seldom drawn does not show in the outputs of two images.
            images = tf.repeat(images, 64, axis=0)
        strategy = tf.distribute.get_strategy()
        infer = lambda images: tf.nest.flatten(model(images, training=False))
        first = lambda value: strategy.experimental_local_results(value)[0].numpy()
        before = [v.numpy() for v in state]
        one, other = ([*map(first, strategy.run(infer, args=(images,)))] for _ in range(2))
        for variable, value in zip(state, before):
            variable.assign(value)
    if not _all_close(one, other):
        raise UserError(
            f"network {model.name!r} gives other outputs for the same images each time: it is "
            "random in inference, as with dropout with training=True; leave that out"
        )


def owns_its_variables(model: keras.Model, graph: tf.Graph) -> None:
    """Proves that a network's computation uses no variable that the network does not hold.

    Args:
      model: the network.
      graph: its pass in training, traced.

    Raises:
      UserError: if it does, for example in a Lambda layer that closes over a variable.
    """
    own = {id(handle) for handle in _handles([*model.weights, *states(model)])}
    foreign = [v for v in graph.variables if not own & {id(h) for h in _handles([v])}]
    if foreign:
        raise UserError(
            f"network {model.name!r} uses a variable that it does not hold, "
            f"{foreign[0].name!r}: it would not be trained, and peers would share it; make it a "
            "weight of a layer (add_weight, or an attribute of the layer)"
        )


def _handles(variables):
    """Yields the handles of variables, also of those with several replicas or precisions."""
    for variable in variables:
        for part in getattr(variable, "values", None) or (variable,):
            yield part.handle
