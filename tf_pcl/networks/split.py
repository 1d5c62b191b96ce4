"""Cuts any functional Keras model into a trunk that peers share and a branch that each has for itself."""
import re

import tensorflow as tf
from tensorflow import keras
from tensorflow.keras import layers

from tf_pcl.errors import UserError


def clone(model, salt=0, linear=None):
    """A copy of `model` with fresh weights.

    Keras copies the fixed seed of an initialiser or a dropout along, which would make all clones alike: `salt` is added
    to every such seed. The layer named `linear` loses its activation.
    """
    def salted(config):
        if isinstance(config, dict):
            return {k: v + salt if k == "seed" and isinstance(v, int) else salted(v) for k, v in config.items()}
        if isinstance(config, (list, tuple)):
            return [salted(v) for v in config] if isinstance(config, list) else tuple(map(salted, config))
        return config

    def cloned(layer):
        config = salted(layer.get_config())
        if layer.name == linear:
            config["activation"] = "linear"
        return layer.__class__.from_config(config)

    return keras.models.clone_model(model, clone_function=cloned)


def with_features(network):
    """Copies a classifier and gives the copy more outputs: what stands before the logits.

    Args:
      network: a functional (or Sequential) keras.Model from images to logits or to probabilities, a softmax at the end is
        taken off; or a model that this function gave.
    Returns:
      A keras.Model with the network's weights, not shared with it, and outputs {"features": [B, d], "logits": float32
      [B, C]}: the feature is what the last layer classifies. A network that pools or flattens a feature map [B, H, W, c] to
      a vector has it as a third output, "feature_map".
    Raises:
      UserError: if the network does not end in a fully connected classifier.
    """
    if isinstance(network, (list, tuple)):
        raise UserError(f"{len(network)} networks were given: this method takes one")
    if isinstance(network, keras.Model) and isinstance(getattr(network, "output", None), dict) and "logits" in network.output:
        copied = clone(network)
        copied.set_weights(network.get_weights())
        return copied
    if isinstance(network, keras.Sequential) and network.built:
        network = keras.Model(network.inputs, network.outputs, name=network.name)
    if not isinstance(network, keras.Model) or not network.outputs:
        raise UserError(f"network {getattr(network, 'name', network)!r} is not a functional Keras model: build it with "
                        "keras.Model(inputs, outputs) or a Sequential that starts with keras.Input")
    if len(network.outputs) != 1 or len(network.inputs) != 1:
        raise UserError(f"network {network.name!r} has {len(network.inputs)} inputs and {len(network.outputs)} outputs: "
                        "it must have one of each")
    last = network.get_layer(network.output_names[0])
    copied = clone(network, linear=last.name if isinstance(last, layers.Dense) and _softmax(last) else None)
    copied.set_weights(network.get_weights())
    last = copied.get_layer(last.name)
    if isinstance(last, layers.Softmax) or (isinstance(last, layers.Activation) and _softmax(last)):
        copied = keras.Model(copied.input, last.input)
        last = copied.get_layer(copied.output_names[0])
    if not isinstance(last, layers.Dense):
        raise UserError(f"network {network.name!r} ends in layer {last.name!r} ({type(last).__name__}): it must end in a "
                        "Dense layer that gives the logits (a softmax may follow)")
    if last.activation is not keras.activations.linear:
        raise UserError(f"network {network.name!r} applies {last.activation.__name__} to its last layer {last.name!r}: "
                        "it must give logits, or probabilities through a softmax")
    outputs = {"features": last.input, "logits": last.output}
    if last.output.dtype != tf.float32:
        outputs["logits"] = layers.Activation("linear", dtype="float32", name="float32_logits")(last.output)
    pooled = [la.input for la in copied.layers if _rank(la, "input") == 4 and _rank(la, "output") == 2]
    if pooled:
        outputs["feature_map"] = pooled[-1]
    return keras.Model(copied.input, outputs, name=network.name)


def _rank(layer, side):
    """The rank of a layer's one "input" or "output" tensor; None if it has several."""
    return getattr(getattr(getattr(layer, side, None), "shape", None), "rank", None)


def _softmax(layer):
    return getattr(layer, "activation", None) is keras.activations.softmax


def cut_points(network):
    """Names of the layers, from input to output, after which the network falls into two: all that follows needs only
    that layer's output."""
    configs = {config["name"]: config for config in network.get_config()["layers"]}
    order = {layer.name: i for i, layer in enumerate(network.layers)}
    last_use = {}

    def visit(reference, user):
        """Notes in last_use each layer named in inbound nodes, which are nested lists [layer, node, tensor, arguments]."""
        if isinstance(reference, (list, tuple)):
            if len(reference) >= 3 and isinstance(reference[0], str) and reference[0] in order:
                last_use[reference[0]] = max(last_use.get(reference[0], 0), order[user])
            for item in reference:
                visit(item, user)
        elif isinstance(reference, dict):
            for item in reference.values():
                visit(item, user)

    for name, config in configs.items():
        visit(config["inbound_nodes"], name)
    names, open_until = [], 0
    for i, layer in enumerate(network.layers[:-1]):
        # No tensor made before this layer is used after it, and it made one tensor.
        if open_until <= i and not isinstance(layer, layers.InputLayer) and len(configs[layer.name]["inbound_nodes"]) == 1:
            names.append(layer.name)
        open_until = max(open_until, last_use.get(layer.name, i))
    return names


def stage_names(network):
    """Names of the layers that give the network's stages, stage_1 … stage_S; empty if it has none."""
    found = [re.fullmatch(r"stage_(\d+)", layer.name) for layer in network.layers]
    return [f"stage_{number}" for number in sorted(int(m.group(1)) for m in found if m)]


def default_cut(network):
    """The layer after which the last stage begins: stage_(S−1)."""
    stages = stage_names(network)
    return stages[-2] if len(stages) > 1 else None


def split(network, at=None):
    """Cuts a network after layer `at`.

    Args:
      network: a functional keras.Model from images to logits or probabilities.
      at: the name of the trunk's last layer; by default that before the last stage of a network with named stages.
    Returns:
      trunk: keras.Model from images to the output of `at`; branch: keras.Model from there to the outputs of
      with_features, "feature_map" only if the branch makes it. Together they have exactly the network's weights, copied.
    Raises:
      UserError: if the network cannot be cut there; the text names the layers where it can.
    """
    whole = with_features(network)
    # Keras lists the layers of a dictionary's outputs by sorted key.
    makers = dict(zip(sorted(whole.output), whole.output_names))
    order = [layer.name for layer in whole.layers]
    # A cut must leave the feature that is classified to the branch.
    points = [name for name in cut_points(whole) if order.index(name) < order.index(makers["features"])]
    at = at or default_cut(whole)
    if at not in points:
        reason = "cannot be cut there" if at in order else "has no such layer"
        came = f"--split_at={at}: network {whole.name!r} {reason}" if at else \
            f"network {whole.name!r} has no stages to be cut by: give --split_at"
        raise UserError(f"{came}. Layers where a cut is possible: {', '.join(points) or 'none'}.")
    cut = whole.get_layer(at).output
    made = {key: tensor for key, tensor in whole.output.items() if order.index(makers[key]) > order.index(at)}
    return keras.Model(whole.input, cut, name="trunk"), keras.Model(cut, made, name="branch")
