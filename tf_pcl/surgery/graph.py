"""The graph of a functional Keras model: its calls of layers, and the models inside it.

A *call* is Keras's Node: `layer`, `call_args`, `call_kwargs`, `keras_inputs`, `outputs`. An *inner
model* is a functional model of one input that another one calls as a layer.
"""

import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from tf_pcl.compat import is_of_keras, keras


def calls(model: keras.Model) -> list:
    """Returns the calls that make a functional model's outputs, each after those that it needs."""
    known = {id(t) for t in model.inputs}
    needed, stack = {}, list(model.outputs)
    while stack:
        tensor = stack.pop()
        if id(tensor) not in known and id(tensor.node) not in needed:
            needed[id(tensor.node)] = tensor.node
            stack += tensor.node.keras_inputs
    # Among several possible orders, take that of model.layers, the same in every build of a
    # network.
    rank = {id(layer): i for i, layer in enumerate(model.layers)}
    waiting, ready = sorted(needed.values(), key=lambda call: rank[id(call.layer)]), []
    while waiting:
        behind = []
        for call in waiting:
            if all(id(t) in known for t in call.keras_inputs):
                ready.append(call)
                known |= {id(t) for t in tf.nest.flatten(call.outputs)}
            else:
                behind.append(call)
        waiting = behind
    return ready


def has_own_call(model: keras.Model) -> bool:
    """Says whether a model's class defines a `call` that is not Keras's own."""
    return any("call" in vars(c) for c in type(model).__mro__ if not is_of_keras(c))


def is_inner_model(layer: keras.layers.Layer) -> bool:
    """Says whether a layer is a functional (or Sequential) model of one input."""
    if not isinstance(layer, keras.Model) or has_own_call(layer):
        return False
    return len(layer.inputs or []) == 1


def phase(call) -> dict:
    """Returns the `training` with which the user called an inner model, as keyword arguments."""
    given = call.call_kwargs.get("training")
    if given is None and len(call.call_args) > 1:
        given = call.call_args[1]
    return {} if given is None else {"training": given}


class Place(NamedTuple):
    """A tensor in a model's graph, and the calls of the inner models around it, outermost first."""

    tensor: Any
    around: tuple = ()

    def call(self):
        """Returns the call that makes the tensor, which is not a call of an inner model."""
        return self.deepest().tensor.node

    def deepest(self) -> "Place":
        """Returns the place of the same tensor inside the inner models that make it."""
        call = self.tensor.node
        if not call.keras_inputs and self.around:  # The input of an inner model.
            return Place(self.around[-1].keras_inputs[0], self.around[:-1]).deepest()
        if is_inner_model(call.layer):
            index = [id(t) for t in tf.nest.flatten(call.outputs)].index(id(self.tensor))
            return Place(call.layer.outputs[index], (*self.around, call)).deepest()
        return self

    def inputs(self) -> list:
        """Returns the places of the tensors that the call of `call()` takes."""
        deepest = self.deepest()
        return [Place(t, deepest.around) for t in deepest.tensor.node.keras_inputs]


def outputs_by_key(outputs: Any) -> dict:
    """Returns {key: tensor} of a model's outputs, with numbers as keys unless they are a dict."""
    if isinstance(outputs, dict):
        return outputs
    return {str(i): tensor for i, tensor in enumerate(tf.nest.flatten(outputs))}


def leaves(model: keras.Model) -> list:
    """Returns a model's layers, each once, with the layers of inner models in their place."""
    found: dict = {}
    for layer in model.layers:
        inside = leaves(layer) if is_inner_model(layer) else [layer]
        found.update((id(one), one) for one in inside)
    return list(found.values())


def names(model: keras.Model) -> dict:
    """Returns {id of a leaf: its name}; a repeated name gets the first free number."""
    found: dict = {}
    for layer in leaves(model):
        found[id(layer)] = free_name(layer.name, set(found.values()))
    return found


def free_name(name: str, taken: Collection[str]) -> str:
    """Returns a name, with the first free number from 2 on if it is taken."""
    numbered = (f"{name}_{i}" for i in itertools.count(2))
    return next(one for one in itertools.chain([name], numbered) if one not in taken)


def last_leaf(layer: keras.layers.Layer) -> keras.layers.Layer:
    """Returns the layer that makes a layer's output: itself, or that of an inner model."""
    return last_leaf(layer.outputs[0].node.layer) if is_inner_model(layer) else layer


def head(model: keras.Model) -> keras.layers.Layer:
    """Returns the last leaf that has weights, which gives the logits."""
    return [layer for layer in leaves(model) if layer.weights][-1]


def is_operation(layer: keras.layers.Layer) -> bool:
    """Says whether a layer applies a function of TensorFlow that its configuration names."""
    return type(layer).__name__ in ("TFOpLambda", "SlicingOpLambda")


def sublayers(model: keras.layers.Layer) -> Iterator[keras.layers.Layer]:
    """Yields a layer itself and every layer in it, at any depth."""
    # Many times faster than the public `submodules`, which searches all attributes.
    yield from model._flatten_layers(recursive=True, include_self=True)


def generators(model: keras.layers.Layer) -> list[tf.random.Generator]:
    """Returns the generators of random numbers that the layers of a model hold, such as Dropout."""
    held: list = []
    for layer in sublayers(model):
        own = getattr(layer, "_random_generator", None)
        held += [getattr(own, "_generator", None), *vars(layer).values()]
    return list({id(g): g for g in held if isinstance(g, tf.random.Generator)}.values())


def finalize(model: keras.Model) -> None:
    """Lets layers that hold statistics of data (Normalization) work with their present values."""
    for layer in sublayers(model):
        if hasattr(layer, "finalize_state") and layer.weights:
            layer.finalize_state()


def continued(call, made: Sequence, wanted: dict) -> dict:
    """Computes tensors that depend only on one call's outputs, from other tensors in their place.

    Args:
      call: a call in a model's graph.
      made: the tensors that take the place of its outputs, in their order.
      wanted: tensors of the same graph.
    """
    outputs = tf.nest.flatten(call.outputs)
    instead = {id(old): new for old, new in zip(outputs, made)}
    found = {key: instead[id(t)] for key, t in wanted.items() if id(t) in instead}
    later = {key: t for key, t in wanted.items() if key not in found}
    if later:
        used = _used(later.values(), instead)
        inputs = [t for t in outputs if id(t) in used]
        rest = keras.Model(inputs if len(inputs) > 1 else inputs[0], later)
        given = [instead[id(t)] for t in inputs]
        found.update(rest(given if len(given) > 1 else given[0]))
    return found


def _used(tensors, among) -> set:
    """Returns the ids of those tensors of `among` from which `tensors` are computed."""
    found, stack, seen = set(), list(tensors), set()
    while stack:
        tensor = stack.pop()
        if id(tensor) in among:
            found.add(id(tensor))
        elif id(tensor) not in seen:
            seen.add(id(tensor))
            stack += tensor.node.keras_inputs
    return found
