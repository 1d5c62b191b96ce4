"""Makes a functional Keras model of a user's network."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Optional

import tensorflow as tf

from tf_pcl import compat
from tf_pcl.compat import keras
from tf_pcl.errors import UserError, one_line
from tf_pcl.surgery import proof
from tf_pcl.surgery.graph import has_own_call, leaves


def functional(
    network: keras.Model, input_shape: Optional[tuple] = None, integers: bool = False
) -> keras.Model:
    """Returns a network as a functional model from a batch of float images to one tensor.

    The result has the network's own layers. A subclassed model becomes the graph of layers that its
    `call` makes, if that computes the same; otherwise it becomes the only layer of a functional
    model, which can be trained but not cut.

    Args:
      network: a functional, Sequential or subclassed keras.Model.
      input_shape: (H, W, channels); needed if the network does not define it.
      integers: whether it may take images of integers, as deployed networks do.

    Returns:
      `network` itself if it is such a model, or a functional keras.Model of its layers.

    Raises:
      UserError: if it is not such a model, or does not take such images.
    """
    check_kind(network)
    network = _with_inputs(network, input_shape)
    _check_ends(network, integers)
    ends = [(network.input, network.inputs[0]), (network.output, network.outputs[0])]
    if any(given is not tensor for given, tensor in ends):  # One tensor in a dict or a list.
        network = keras.Model(network.inputs, network.outputs[0], name=network.name)
    given = tuple(network.inputs[0].shape[1:])
    if input_shape and any(g not in (None, a) for g, a in zip(given, input_shape)):
        raise UserError(
            f"network {network.name!r} takes images {given}; those of the data set are "
            f"{tuple(input_shape)}: build it for these"
        )
    if input_shape and None in given and None not in input_shape:
        # The network allows any size. Its layers are called again on images of this size.
        images = keras.Input(input_shape, name=network.inputs[0].node.layer.name)
        network = keras.Model(images, network(images), name=network.name)
    return network


def check_keras(thing: Any) -> None:
    """Raises UserError for a layer, optimizer … of another Keras than the package's."""
    if foreign := compat.foreign_keras(thing):
        raise UserError(foreign)


def check_kind(network: Any, or_function: bool = False) -> None:
    """Raises UserError for all but a keras.Model of this Keras, or for all but that and functions.

    Args:
      network: what was given.
      or_function: whether it may be a function too.
    """
    if isinstance(network, (list, tuple)):
        raise UserError(f"{len(network)} networks were given: this method takes one")
    check_keras(network)
    is_function = callable(network) and not isinstance(network, keras.layers.Layer)
    if not (isinstance(network, keras.Model) or or_function and is_function):
        raise UserError(
            f"network {network!r} is {type(network).__name__}: it must be a keras.Model"
            + ", or a function that returns one" * or_function
        )


def built_by(name: str, function: Callable[..., Any], *arguments: Any) -> keras.Model:
    """Returns the keras.Model that a user's function makes.

    Args:
      name: the network's name, for errors.
      function: the function.
      *arguments: what it takes.

    Raises:
      UserError: if it returns anything else, or calls a layer of another Keras on a tensor of a
        model of this one.
      Exception: whatever else the function raises.
    """
    with _only_own_layers(name):
        made = function(*arguments)
    if isinstance(made, keras.Model):
        return made
    if foreign := compat.foreign_keras(made):
        raise UserError(f"network {name!r}: {foreign}")
    raise UserError(
        f"network {name!r} returned {type(made).__name__}: it must return a keras.Model"
    )


@contextlib.contextmanager
def _only_own_layers(name: str) -> Iterator[None]:
    """Refuses, meanwhile, layers of another Keras that are called on tensors of this one.

    TensorFlow would compute them as if their weights were constants, and leave out dropout.
    """
    other: Any = compat.foreign_layer()
    if other is None:
        yield
        return
    own, call = type(keras.Input([1])), other.__call__

    @functools.wraps(call)
    def checked(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(tensor, own) for tensor in tf.nest.flatten((args, kwargs))):
            raise UserError(f"network {name!r}: {compat.foreign_keras(layer)}")
        return call(layer, *args, **kwargs)

    other.__call__ = checked
    try:
        yield
    finally:
        other.__call__ = call


def _with_inputs(network, input_shape):
    """Returns a model that has an `input`, with the network's layers."""
    if isinstance(network, keras.Sequential) and not has_own_call(network):
        if not network.inputs and input_shape:
            network.build((None, *input_shape))
        if network.inputs:
            return keras.Model(network.inputs, network.outputs, name=network.name)
    if network.inputs and not has_own_call(network):
        return network
    if network.inputs:
        input_shape = input_shape or tuple(network.inputs[0].shape[1:])
    if not input_shape:
        raise UserError(
            f"network {network.name!r} does not define the size of its images: build it with "
            "keras.Model(inputs, outputs) or a Sequential that starts with keras.Input, or convert "
            "it with surgery.functional(network, input_shape)"
        )
    return _of_subclassed(network, tuple(input_shape))


def _of_subclassed(network, input_shape):
    """Returns the graph that a subclassed model's `call` makes, or the model as one layer."""
    images = keras.Input(input_shape, name="images")
    try:
        whole = keras.Model(images, network(images), name=network.name)
    except Exception as e:  # The user's code.
        raise UserError(
            f"network {network.name!r} ({type(network).__name__}) cannot be called on images "
            f"{input_shape}: {one_line(e)}"
        ) from e
    try:
        return traced(network, images, whole, "the graph of its layers")
    except Exception as e:  # Whatever the user's code raises on a symbolic input.
        # The model stays one layer. Errors about its inside report this reason.
        whole.why_one_layer = " ".join(str(e).split())[:300]
    return whole


def traced(last: keras.layers.Layer, x: Any, whole: keras.Model, what: str) -> keras.Model:
    """Returns a model with the layers that its last layer calls in place of that layer.

    Args:
      last: the last layer of `whole`, which may be a model.
      x: the tensor in the graph of `whole` that it is called on.
      whole: a functional keras.Model.
      what: the name of the result in an error.

    Raises:
      ValueError: or whatever the layer's code raises, if the result is not the same.
    """
    # With training=None the layers follow the phase of the whole graph.
    takes = inspect.signature(last.call).parameters
    end = last.call(x, **({"training": None} if "training" in takes else {}))
    graph = keras.Model(whole.input, end, name=whole.name)
    lost = {w.name for w in whole.weights} - {w.name for w in graph.weights}
    if lost or len(graph.weights) != len(whole.weights):
        raise ValueError(f"it holds weights outside of its layers ({', '.join(sorted(lost))})")
    proof.same(whole, graph, what)
    if not proof.draws_alike(whole, graph):
        raise ValueError("it draws random numbers in training alone")
    return graph


def _check_ends(network, integers):
    """Raises UserError if a functional model is not one from float images to one tensor."""
    for weight in {type(weight): weight for weight in network.weights}.values():
        if foreign := compat.foreign_keras(weight):
            raise UserError(f"network {network.name!r} has weights of another Keras: {foreign}")
    if len(network.outputs) != 1 or len(network.inputs) != 1:
        raise UserError(
            f"network {network.name!r} has {len(network.inputs)} inputs and "
            f"{len(network.outputs)} outputs: it must have one of each"
        )
    if any(type(layer).__name__ == "AddLoss" for layer in leaves(network)):
        raise UserError(
            f"network {network.name!r} adds a loss with add_loss, which the peers would lose: "
            "leave it out, or add it in a layer's call"
        )
    given = network.inputs[0]
    if given.shape.rank != 4 or not (integers or tf.as_dtype(given.dtype).is_floating):
        raise UserError(
            f"network {network.name!r} takes {tf.as_dtype(given.dtype).name} "
            f"{tuple(given.shape)}: it must take float images [batch, height, width, channels]"
        )
    if given.shape[0] is not None:
        raise UserError(
            f"network {network.name!r} takes only batches of {given.shape[0]} images: "
            "leave the batch size open (keras.Input(shape), and no stateful=True)"
        )
    made = network.outputs[0].shape
    if made.rank and made[0] is not None:
        raise UserError(
            f"network {network.name!r} gives outputs {tuple(made)} for any batch: it must give "
            "each image logits, [batch, classes]"
        )
