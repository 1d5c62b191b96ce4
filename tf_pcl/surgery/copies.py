"""Functional Keras models: made of whatever a user brings, walked through call by call, and copied."""

import collections
import inspect

import numpy as np
import tensorflow as tf

from tf_pcl.compat import keras, layers
from tf_pcl.errors import UserError, one_line


def functional(network, input_shape=None):
    """A network as a functional keras.Model from one batch of float images to one tensor, with the same weights.

    Args:
      network: a functional or Sequential keras.Model, or a subclassed one whose `call` runs on a keras.Input.
      input_shape: (H, W, channels); needed where the network does not say it itself.
    Returns:
      `network` itself if it is such a model; a model of the same layers; or, where the network's own input shape is open
      (None, None, channels) and `input_shape` is given, a copy with the same values.
    Raises:
      UserError: if it is nothing of the kind or does not take such images.
    """
    if not isinstance(network, keras.Model):
        raise UserError(
            f"network {network!r} is {type(network).__name__}: it must be a keras.Model"
        )
    if isinstance(network, keras.Sequential):
        if not network.inputs and input_shape:
            network.build((None, *input_shape))
        if network.inputs:
            network = keras.Model(network.inputs, network.outputs, name=network.name)
    if not network.inputs or _own_call(network):
        if network.inputs:
            input_shape = input_shape or network.inputs[0].shape[1:]
        if not input_shape:
            raise UserError(
                f"network {network.name!r} is not a functional Keras model: build it with keras.Model(inputs, "
                "outputs) or a Sequential that starts with keras.Input, or convert it with "
                "surgery.functional(network, input_shape)"
            )
        network = _traced(network, input_shape)
    if len(network.outputs) != 1 or len(network.inputs) != 1:
        raise UserError(
            f"network {network.name!r} has {len(network.inputs)} inputs and {len(network.outputs)} outputs: "
            "it must have one of each"
        )
    if any(type(layer).__name__ == "AddLoss" for layer in leaves(network)):
        raise UserError(
            f"network {network.name!r} adds a loss of its own with add_loss, which would be lost in the peers: "
            "leave it out, or put it into a layer's call"
        )
    given = network.inputs[0]
    if given.shape.rank != 4 or not given.dtype.is_floating:
        raise UserError(
            f"network {network.name!r} takes {given.dtype.name} {tuple(given.shape)}: it must take float images "
            "[batch, height, width, channels]"
        )
    if input_shape and any(
        own not in (None, asked) for own, asked in zip(given.shape[1:], input_shape)
    ):
        raise UserError(
            f"network {network.name!r} takes images {tuple(given.shape[1:])}; those of the data set are "
            f"{tuple(input_shape)}"
        )
    if input_shape and None in tuple(given.shape[1:]) and None not in input_shape:
        network = copy(network, input_shape=input_shape)
    return network


def _traced(network, input_shape):
    """The functional model that a subclassed model's `call` makes of a keras.Input."""
    refused = f"network {network.name!r} ({type(network).__name__}) cannot be made a functional Keras model: "
    try:
        network(keras.Input(input_shape))  # Makes the weights.
        images = keras.Input(input_shape)
        # Of the training phase when it runs: with the default, often False, BatchNorm would never use batch statistics.
        phase = (
            {"training": None} if "training" in inspect.signature(network.call).parameters else {}
        )
        model = keras.Model(images, network.call(images, **phase), name=network.name)
    except Exception as e:  # The user's code.
        raise UserError(f"{refused}{one_line(e)}") from e
    if {id(w) for w in model.weights} != {id(w) for w in network.weights}:
        lost = sorted({w.name for w in network.weights} - {w.name for w in model.weights})
        raise UserError(f"{refused}weights outside of its layers ({', '.join(lost)}) would be lost")
    if any(
        _operations(model, input_shape, training) != _operations(network, input_shape, training)
        for training in (False, True)
    ):
        raise UserError(
            f"{refused}its call does something in training or inference that its layers do not do by "
            "themselves, such as `if training:`; pass `training` on to layers only"
        )
    images = tf.constant(np.random.RandomState(0).uniform(size=(2, *input_shape)), tf.float32)
    own, its = (tf.cast(one(images), tf.float32) for one in (model, network))
    if not np.allclose(own, its, rtol=1e-3, atol=1e-4):
        raise UserError(f"{refused}the copy answers otherwise than the network")
    return model


def _operations(model, input_shape, training):
    """How often each operation stands in a model's graph, without those that only hand on."""
    strategy = tf.distribute.get_strategy()

    @tf.function
    def run(images):
        return strategy.run(lambda x: model(x, training=training), args=(images,))

    graph = run.get_concrete_function(tf.TensorSpec([2, *input_shape])).graph
    return collections.Counter(
        op.type
        for op in graph.get_operations()
        if op.type not in ("Identity", "IdentityN", "NoOp", "Cast", "Const")
    )


def calls(network):
    """The calls of layers (Keras's Node: layer, call_args, call_kwargs, keras_inputs, outputs) that make a functional
    model's outputs, each after those that it needs, in the order of network.layers otherwise."""
    known = {id(t) for t in network.inputs}
    needed, stack = {}, list(network.outputs)
    while stack:
        tensor = stack.pop()
        if id(tensor) not in known and id(tensor.node) not in needed:
            needed[id(tensor.node)] = tensor.node
            stack += tensor.node.keras_inputs
    order = {id(layer): i for i, layer in enumerate(network.layers)}
    waiting, ready = sorted(needed.values(), key=lambda node: order[id(node.layer)]), []
    while waiting:
        behind = []
        for node in waiting:
            if all(id(t) in known for t in node.keras_inputs):
                ready.append(node)
                known |= {id(t) for t in tf.nest.flatten(node.outputs)}
            else:
                behind.append(node)
        waiting = behind
    return ready


def _own_call(model):
    """Whether a model computes something else than its graph of layers."""
    return any(
        "call" in vars(c) for c in type(model).__mro__ if not c.__module__.startswith("keras.")
    )


def _dissolves(layer):
    """Whether a layer is a functional model of one input, whose layers can stand in its place."""
    return isinstance(layer, keras.Model) and len(layer.inputs or []) == 1 and not _own_call(layer)


def leaves(model):
    """The layers of a model, those of its inner models in place of these; each once."""
    found = {}
    for layer in model.layers:
        found.update((id(la), la) for la in (leaves(layer) if _dissolves(layer) else [layer]))
    return list(found.values())


def head(network):
    """The last layer with weights, which gives the logits."""
    return [layer for layer in leaves(network) if layer.weights][-1]


def keep_weights(network):
    """Lets every copy of a network start from the weights that it has now, trained ones: peers' branches too, which are
    otherwise initialised afresh. Only the layer that gives the logits is: peers of one view would else stay alike.

    Args:
      network: a functional keras.Model.
    """
    last = head(network)
    for layer in leaves(network):
        layer.keeps_weights = layer is not last


def clone(model, salt=0):
    """A copy of a functional model with fresh weights, except in layers that keep them: frozen ones, those that only hold
    statistics of data (Normalization), and those of keep_weights.

    Keras copies the fixed seed of an initialiser or a dropout along, which would make all clones alike: `salt` is added
    to every such seed.
    """
    return copy(
        model,
        salt=salt,
        keeps=lambda layer: not layer.trainable_weights or getattr(layer, "keeps_weights", False),
    )


def copy(model, input_shape=None, salt=0, keeps=lambda layer: True):
    """A copy of a functional model, in which functional models that it uses as layers are dissolved into their layers.

    Args:
      model: a functional keras.Model.
      input_shape: of the copy's one input, without the batch; by default the model's.
      salt: is added to every fixed seed.
      keeps: whether the copy of a layer gets its weights or is initialised afresh.
    Returns:
      A keras.Model of the same outputs.
    Raises:
      UserError: if a layer cannot be copied.
    """
    copies = _copied_layers(model, salt)

    def replay(part, inputs, training=None):
        """The outputs of a model `part` for other inputs, computed by the copies of its layers."""
        made = {id(t): new for t, new in zip(part.inputs, inputs)}
        for node in calls(part):
            args, kwargs = tf.nest.map_structure(
                lambda t: made.get(id(t), t), (node.call_args, node.call_kwargs)
            )
            if _dissolves(node.layer):
                phase = kwargs.get("training", args[1] if len(args) > 1 else None)
                new = replay(
                    node.layer, tf.nest.flatten(args[0]), training if phase is None else phase
                )
                old = tf.nest.flatten(node.outputs)
            else:
                layer = copies[id(node.layer)]
                if training is not None and "training" in inspect.signature(layer.call).parameters:
                    own = kwargs.get("training")
                    kwargs = {**kwargs, "training": training if own is None else own}
                new, old = tf.nest.flatten(layer(*args, **kwargs)), tf.nest.flatten(node.outputs)
            made.update((id(t), n) for t, n in zip(old, new))
        return [made[id(t)] for t in part.outputs]

    inputs = [
        keras.Input(input_shape or t.shape[1:], dtype=t.dtype, name=t.node.layer.name)
        for t in model.inputs
    ]
    made = dict(zip(map(id, model.outputs), replay(model, inputs)))
    outputs = tf.nest.map_structure(lambda t: made[id(t)], model.output)
    copied = keras.Model(inputs if len(inputs) > 1 else inputs[0], outputs, name=model.name)
    for layer in (la for la in leaves(model) if la.weights):
        twin = copies[id(layer)]
        # A layer of layers: its configuration does not say which of these are frozen.
        pairs = [
            (layer, twin),
            *(
                (a, b)
                for a, b in zip(layer.submodules, twin.submodules)
                if isinstance(a, layers.Layer)
            ),
        ]
        for own, new in pairs:
            if new.trainable != own.trainable:
                new.trainable = own.trainable
        for own, new in pairs:
            if own.weights and keeps(own):
                set_weights(new, own.get_weights())
    return copied


def set_weights(layer, values):
    """Gives a layer the values of its weights, and lets a Normalization work with them."""
    layer.set_weights(values)
    if hasattr(layer, "finalize_state"):
        layer.finalize_state()


def _copied_layers(model, salt):
    """{id of a layer: its copy}, in which names that come twice get a number."""

    def salted(config):
        if isinstance(config, dict):
            return {
                k: v + salt if k == "seed" and isinstance(v, int) else salted(v)
                for k, v in config.items()
            }
        if isinstance(config, (list, tuple)):
            return (list if isinstance(config, list) else tuple)(
                map(salted, config)
            )  # Keras's own lists are subclasses.
        return config

    copies, names = {}, set()
    for layer in leaves(model):
        if isinstance(layer, layers.InputLayer):
            continue
        # A configuration may only name them.
        functions = {
            f.__name__: f
            for f in (getattr(layer, name, None) for name in ("function", "activation"))
            if hasattr(f, "__name__")
        }
        try:
            config = salted(layer.get_config())
            config["name"] = _free(layer.name, names)
            with keras.utils.custom_object_scope(functions):
                twin = layer.__class__.from_config(config)
        except (
            Exception
        ) as e:  # NotImplementedError, TypeError, and what a layer of the user's own raises.
            raise UserError(
                f"layer {layer.name!r} ({type(layer).__name__}) of network {model.name!r} cannot be copied for "
                f"the peers: {one_line(e)}; give it a get_config with its constructor's arguments"
            ) from e
        twin.keeps_weights = getattr(layer, "keeps_weights", False)
        names.add(twin.name)
        copies[id(layer)] = twin
    return copies


def _free(name, taken):
    """`name`, with the first number behind it that makes it new."""
    candidates = (name if i == 1 else f"{name}_{i}" for i in range(1, len(taken) + 2))
    return next(c for c in candidates if c not in taken)
