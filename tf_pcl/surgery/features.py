"""What stands before a classifier's logits."""

import numpy as np
import tensorflow as tf

from tf_pcl.compat import keras, layers
from tf_pcl.errors import UserError
from tf_pcl.surgery.copies import calls, copy, functional

# By the functions' names, since tf.nn's are others than Keras's. Log-probabilities have the softmax of the logits.
_SOFTMAX = ("softmax", "softmax_v2", "log_softmax", "log_softmax_v2")
_SAME = ("linear", "cast", "identity")


def with_features(network):
    """Copies a classifier and gives the copy more outputs: what stands before the logits.

    Args:
      network: a functional (or Sequential) keras.Model from images [B, H, W, channels] to logits or to probabilities; a
        softmax or log-softmax at the end is taken off. The logits come from a Dense layer, or from a 1×1 Conv2D on a map
        that is 1×1 or is averaged afterwards: it becomes a Dense layer of the same name and weights behind a pooling. Or a
        model that this function gave.
    Returns:
      A keras.Model with the network's weights, not shared with it, and outputs {"features": [B, d], "logits": float32
      [B, C]}: the feature is what the last layer classifies. A network that pools or flattens a feature map [B, H, W, c] to
      a vector has it as a third output, "feature_map".
    Raises:
      UserError: if the network does not end in a linear classifier.
    """
    if isinstance(network, (list, tuple)):
        raise UserError(f"{len(network)} networks were given: this method takes one")
    if isinstance(getattr(network, "output", None), dict) and "logits" in network.output:
        return copy(network)
    copied = copy(functional(network))
    classifier = _classifier(copied)
    x, logits, order = classifier.keras_inputs[0], classifier.outputs, calls(copied)
    maps = [node.keras_inputs[0] for node in order[: order.index(classifier)] if _pools(node)]
    if x.shape.rank == 4:
        if not (maps and _is_vector(x)):
            maps.append(x)
        x = layers.GlobalAveragePooling2D(name="pooled")(x)
        logits = _dense(classifier.layer, x)
    elif classifier.layer.activation is not keras.activations.linear:
        logits = _dense(classifier.layer, x)
    if logits.dtype != tf.float32:
        logits = layers.Activation("linear", dtype="float32", name="float32_logits")(logits)
    outputs = {"features": x, "logits": logits}
    if maps:
        outputs["feature_map"] = maps[-1]
    return keras.Model(copied.input, outputs, name=network.name)


def _classifier(network):
    """The call of the Dense or Conv2D layer that gives the logits; UserError if what follows it is no softmax or mean."""

    def refused(why):
        return UserError(
            f"network {network.name!r} {why}: it must end in a Dense layer, or a 1×1 Conv2D and its average "
            "over the image, that gives the logits [batch, classes]; only a softmax may follow"
        )

    node, averaged, normalised = network.outputs[0].node, False, False
    while not isinstance(node.layer, (layers.Dense, layers.Conv2D)):
        layer, applied = node.layer, _applied(node.layer)
        if not node.keras_inputs:
            raise refused("has no classifier")
        x = node.keras_inputs[0]
        if applied in _SOFTMAX and not normalised and (not averaged or _is_vector(x)):
            normalised = True
        elif _averages(node):
            averaged = averaged or not _is_vector(x)
        elif applied not in _SAME:
            what = f", which applies {applied}" if applied else ""
            raise refused(f"ends in layer {layer.name!r} ({type(layer).__name__}){what}")
        node = node.keras_inputs[0].node
    layer = node.layer
    applied, x = _applied(layer), node.keras_inputs[0]
    if applied != "linear" and (applied not in _SOFTMAX or normalised or averaged):
        raise refused(
            f"applies {applied} to its last layer {layer.name!r}{' before the average over the image' * averaged}"
        )
    if isinstance(layer, layers.Conv2D) and (
        type(layer) is not layers.Conv2D
        or layer.kernel_size != (1, 1)
        or layer.strides != (1, 1)
        or layer.groups != 1
    ):
        raise refused(
            f"ends in layer {layer.name!r} ({type(layer).__name__} with kernel {layer.kernel_size})"
        )
    if network.outputs[0].shape.rank != 2 or x.shape.rank not in (2, 4):
        raise refused(
            f"gives outputs {tuple(network.outputs[0].shape)} from layer {layer.name!r} on {tuple(x.shape)}"
        )
    if len(layer.inbound_nodes) > 1:
        raise refused(f"uses its last layer {layer.name!r} more than once")
    return node


def _applied(layer):
    """The name of the function that a layer applies, a classifier to its logits; None if it is no such layer."""
    if isinstance(layer, layers.Softmax):
        return "softmax"
    if type(layer).__name__ == "TFOpLambda":
        return layer.get_config()["function"].split(".")[-1]
    name = (
        "activation"
        if isinstance(layer, (layers.Activation, layers.Dense, layers.Conv2D))
        else "function"
    )
    return getattr(getattr(layer, name, None), "__name__", None)


def _is_vector(x):
    """Whether a tensor is [B, c], or a map [B, 1, 1, c]."""
    return x.shape.rank == 2 or tuple(x.shape[1:3]) == (1, 1)


def _averages(node):
    """Whether a call makes [B, c] of a map [B, H, W, c] by its mean, or of [B, 1, 1, c] in any way."""
    x = node.keras_inputs[0]
    return isinstance(node.layer, layers.GlobalAveragePooling2D) or (
        _is_vector(x)
        and isinstance(node.layer, (layers.Flatten, layers.Reshape, layers.GlobalMaxPooling2D))
    )


def _pools(node):
    """Whether a call makes a vector of a feature map [B, H, W, c], also [B, 1, 1, c]."""
    if len(node.keras_inputs) != 1 or not hasattr(node.outputs, "shape"):
        return False
    pooling = isinstance(node.layer, (layers.GlobalAveragePooling2D, layers.GlobalMaxPooling2D))
    return node.keras_inputs[0].shape.rank == 4 and (node.outputs.shape.rank == 2 or pooling)


def _dense(layer, x):
    """The logits of a linear Dense layer on x [B, d], with the weights of a Dense or 1×1 Conv2D layer."""
    config = {**layer.get_config(), "activation": "linear"}
    kind = type(layer)
    if isinstance(layer, layers.Conv2D):
        kind, config["units"] = layers.Dense, layer.filters
        config = {key: config[key] for key in layers.Dense(1).get_config()}
    dense = kind.from_config(config)
    logits = dense(x)
    dense.set_weights(
        [np.reshape(value, w.shape) for value, w in zip(layer.get_weights(), dense.weights)]
    )
    return logits
