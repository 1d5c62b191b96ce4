"""The end of a network: its logits, the feature before them, and the feature map before that."""

from typing import NamedTuple, Optional

import numpy as np
import tensorflow as tf

from tf_pcl.compat import keras, layers
from tf_pcl.errors import UserError
from tf_pcl.surgery import proof
from tf_pcl.surgery.convert import functional, traced
from tf_pcl.surgery.described import described
from tf_pcl.surgery.graph import (
    Place,
    calls,
    continued,
    free_name,
    is_inner_model,
    phase,
    sublayers,
)
from tf_pcl.surgery.trial import trials

# Names, since tf.nn and Keras have different functions. A log-softmax counts too: log-probabilities
# and logits have the same softmax.
_SOFTMAX = ("softmax", "softmax_v2", "log_softmax", "log_softmax_v2")
_IDENTITY = ("linear", "cast", "identity")


class NoClassifier(UserError):
    """Raised when the graph of a network does not show its logits."""


class Classifier(NamedTuple):
    """The end of a network.

    Attributes:
      logits: the place of the logits, or of the classifier's output if its activation must be left
        out.
      inputs: the place of the classifier's input, [B, d] or a map [B, H, W, d].
      layer: the Dense or Conv2D layer.
      fused: whether the layer applies a softmax itself.
      normalised: the name of the softmax or log-softmax that the network ends in, or "".
    """

    logits: Place
    inputs: Place
    layer: keras.layers.Layer
    fused: bool
    normalised: str


def with_logits(network: keras.Model) -> keras.Model:
    """Gives a network logits as its only output.

    If the graph shows a softmax at the end, it is left out. Otherwise the outputs for two random
    images show whether they are logits or probabilities, whose logarithms are logits.

    Args:
      network: a keras.Model from images to logits or probabilities; a model that this function or
        `with_features` gave is returned as it is.

    Returns:
      A functional keras.Model of the network's own layers, with outputs {"logits": float32 [B, C]}.

    Raises:
      UserError: if the network gives neither logits nor probabilities.
    """
    if _has_logits(network):
        return network
    network = functional(network, integers=True)
    try:
        network, classifier = _with_classifier(network)
    except NoClassifier:
        return _by_values(network)
    return _made(network, classifier, {"logits": _logits(network, classifier)})


def with_features(network: keras.Model, proven: Optional[set] = None) -> keras.Model:
    """Gives a network its logits, its feature and its last feature map as outputs.

    The *feature* is the vector that pooling or flattening makes of the last feature map; without
    such a map, it is the input of the classifier.

    Args:
      network: a keras.Model from images to logits or probabilities; a softmax at the end is left
        out. A Dense layer gives the logits, or a 1×1 Conv2D on a map that is 1×1 or averaged
        afterwards.
      proven: the graphs for which the result was proven; it is not proven again for an equal one.

    Returns:
      A functional keras.Model of the network's own layers, with outputs {"features": [B, d],
      "logits": float32 [B, C]} and, where there is one, "feature_map": [B, H, W, c].

    Raises:
      UserError: if the network does not end in a linear classifier.
    """
    if _has_logits(network) and "features" in network.output:
        return network
    network, classifier = _with_classifier(functional(network))
    pooled, feature_map = _pooled(classifier)
    wanted = {"logits": _logits(network, classifier), "features": _vector(network, pooled)}
    if feature_map is not None:
        wanted["feature_map"] = feature_map
    return _made(network, classifier, wanted, proven)


def _has_logits(network):
    """Says whether a network has these outputs by this module, and not by its author."""
    return getattr(network, "logits_are_proven", False)


def _made(network, classifier, wanted, proven=None):
    """Returns a model of the places `wanted`, {key: Place}, proven to agree with the network."""
    exposed = _exposed(network, wanted)
    made = keras.Model(exposed.input, exposed.output, name=network.name)
    # Otherwise the graph is the network's own, in training too.
    rebuilt = classifier.fused or any(place.around for place in wanted.values())
    text = None if proven is None else described(network)
    known = (proven, ("features", text)) if text else None
    _prove(network, made, classifier.normalised, training=rebuilt, known=known)
    made.logits_are_proven = True
    return made


def _prove(network, made, normalised="", training=False, known=None):
    """Proves that a model's logits are those of a network, or belong to its probabilities."""

    def reference(images, training):
        answer = tf.cast(network(images, training=training), tf.float32)
        return tf.exp(answer) if normalised.startswith("log") else answer

    def answer(images, training):
        logits = made(images, training=training)["logits"]
        return tf.nn.softmax(logits) if normalised else logits

    exact = network.outputs[0].dtype in (tf.float32, tf.float64)
    # A softmax in half precision has only two or three digits.
    tolerance = 0.05 if normalised and not exact else proof.TOLERANCE
    what = f"the model of the logits of network {network.name!r}"
    proof.same(
        network,
        answer,
        what,
        reference=reference,
        parts=([network], [made]),
        training=training,
        tolerance=tolerance,
        known=known,
    )


def _exposed(model, wanted):
    """Returns a model of the tensors at the places `wanted`, {key: Place}."""
    around = next((p.around[0] for p in wanted.values() if p.around), None)
    if around is None:
        return keras.Model(model.input, {key: place.tensor for key, place in wanted.items()})
    inside = {k: Place(p.tensor, p.around[1:]) for k, p in wanted.items() if p.around}
    here = {k: p.tensor for k, p in wanted.items() if not p.around}
    if here:
        inside["out"] = Place(around.layer.outputs[0])
    inner = _exposed(around.layer, inside)
    made = inner(around.keras_inputs[0], **phase(around))
    outputs = {key: made[key] for key in inside if key != "out"}
    if here:
        outputs.update(continued(around, [made["out"]], here))
    return keras.Model(model.input, outputs)


def _logits(network, classifier) -> Place:
    """Returns the place of the logits float32 [B, C], added to the graph where necessary."""
    logits, around = classifier.logits.tensor, classifier.logits.around
    if classifier.fused:
        linear = WithoutActivation(classifier.layer, name=_free(network, "logits_of_softmax"))
        logits, around = linear(classifier.inputs.tensor), classifier.inputs.around
    if logits.shape.rank == 4:
        logits = layers.Flatten(name=_free(network, "flat_logits"))(logits)
    if logits.dtype != tf.float32:
        name = _free(network, "float32_logits")
        logits = layers.Activation("linear", dtype="float32", name=name)(logits)
    return Place(logits, around)


def _vector(network, place) -> Place:
    """Returns the place of a vector [B, d], made of a map [B, H, W, d] by its mean."""
    x = place.tensor
    if x.shape.rank == 4:
        x = layers.GlobalAveragePooling2D(name=_free(network, "pooled_features"))(x)
    return Place(x, place.around)


def _free(network, name):
    """Returns `name`, prefixed, with a number if one of the network's layers has it."""
    return free_name(f"tf_pcl_{name}", {layer.name for layer in sublayers(network)})


@keras.utils.register_keras_serializable("tf_pcl")
class WithoutActivation(layers.Layer):
    """Applies a Dense or convolutional layer, with its own weights, without its activation."""

    def __init__(self, layer: keras.layers.Layer, **kwargs):
        super().__init__(**{**kwargs, "dtype": layer.dtype_policy})
        self.layer = layer

    def build(self, input_shape):
        if not self.layer.built:  # This layer was made from a configuration.
            with tf.name_scope(self.layer.name):
                self.layer.build(input_shape)
        super().build(input_shape)

    def get_config(self):
        return {**super().get_config(), "layer": keras.layers.serialize(self.layer)}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "layer": keras.layers.deserialize(config["layer"])})

    def call(self, x):
        activation, self.layer.activation = self.layer.activation, None
        try:
            linear = self.layer.call(tf.cast(x, self.compute_dtype))
        finally:
            self.layer.activation = activation
        if self.layer.activity_regularizer:
            # Keras adds this penalty where it calls the layer, which nobody does here.
            self.layer._handle_activity_regularization(x, activation(linear))
        return linear


def _with_classifier(network) -> tuple:
    """Returns a network and its Classifier; if it ends in a layer of layers, that may be opened."""
    try:
        return network, _classifier(network)
    except NoClassifier:
        opened = _opened(network)
        if opened is None:
            raise
    return opened, _classifier(opened)


def _opened(network) -> Optional[keras.Model]:
    """Returns a network with the last layer's sublayers in place of that layer.

    They are called as the layer's `call` does. None if the network does not end in a layer of
    layers, or if the result is not the same.
    """
    call = network.outputs[0].node
    inside = [layer for layer in sublayers(call.layer) if layer is not call.layer]
    if not inside or isinstance(call.layer, keras.Model) or len(call.keras_inputs) != 1:
        return None
    try:
        return traced(call.layer, call.keras_inputs[0], network, "the network")
    except Exception:  # Whatever the layer's code raises on a symbolic input.
        return None


def _classifier(network) -> Classifier:
    """Finds the layer that gives the logits; only a softmax or a mean may follow it."""

    def refused(why):
        return NoClassifier(
            f"network {network.name!r} {why}: it must end in a Dense layer, or a 1×1 Conv2D and "
            "its average over the image, that gives the logits [batch, classes]; only a softmax "
            "may follow"
        )

    place, averaged, softmax = Place(network.outputs[0]).deepest(), False, None
    normalised = ""
    while not isinstance(place.call().layer, (layers.Dense, layers.Conv2D)):
        call = place.call()
        layer, applied = call.layer, _applied(call.layer)
        if not call.keras_inputs:
            raise refused("has no classifier")
        if isinstance(layer, keras.Model):
            why = getattr(network, "why_one_layer", "")
            raise NoClassifier(
                f"network {network.name!r} ends in the subclassed model {layer.name!r} "
                f"({type(layer).__name__}), whose call cannot be followed layer by layer"
                f"{': ' * bool(why)}{why}; a method that needs only its logits can train it"
            )
        before = place.inputs()[0]
        x = before.tensor
        if applied in _SOFTMAX and softmax is None and (not averaged or _is_vector(x)):
            softmax, normalised = before, applied
        elif _averages(call):
            averaged = averaged or not _is_vector(x)
        elif applied not in _IDENTITY:
            what = f", which applies {applied}" if applied else ""
            raise refused(f"ends in layer {layer.name!r} ({type(layer).__name__}){what}")
        place = before.deepest()
    call = place.call()
    layer, applied, x = call.layer, _applied(call.layer), call.keras_inputs[0]
    fused = applied in _SOFTMAX and softmax is None and not averaged
    if applied != "linear" and not fused:
        where = " before the average over the image" * averaged
        raise refused(f"applies {applied} to its last layer {layer.name!r}{where}")
    if isinstance(layer, layers.Conv2D) and not _is_pointwise(layer):
        kind = f"{type(layer).__name__} with kernel {layer.kernel_size}"
        raise refused(f"ends in layer {layer.name!r} ({kind})")
    if network.outputs[0].shape.rank != 2 or x.shape.rank not in (2, 4):
        shapes = f"{tuple(network.outputs[0].shape)} from layer {layer.name!r} on {tuple(x.shape)}"
        raise refused(f"gives outputs {shapes}")
    if len(layer.inbound_nodes) > 1 and len(_calls_of(network, layer)) > 1:
        raise refused(f"uses its last layer {layer.name!r} more than once")
    logits = softmax or Place(network.outputs[0])
    normalised = applied if fused else normalised
    inputs = place.inputs()[0].deepest()
    return Classifier(logits.deepest(), inputs, layer, fused, normalised)


def _calls_of(network, layer):
    """Returns the calls of a layer that a network's graph holds."""
    found = []
    for call in calls(network):
        if call.layer is layer:
            found.append(call)
        elif is_inner_model(call.layer):
            found += _calls_of(call.layer, layer)
    return found


def _is_pointwise(layer):
    form = layer.kernel_size, layer.strides, layer.groups
    return type(layer) is layers.Conv2D and form == ((1, 1), (1, 1), 1)


def _pooled(classifier) -> tuple:
    """Returns the places of the feature and of the map [B, H, W, c] that it is pooled from.

    The map is None if the classifier's input does not come from one.
    """
    place = classifier.inputs
    if place.tensor.shape.rank == 4 and not _is_vector(place.tensor):
        return place, place
    here: Optional[Place] = place
    while here is not None:
        call = here.call()
        if len(call.keras_inputs) != 1:
            break
        before = here.inputs()[0]
        if _pools(call):
            made_by_weights = any(layer.weights for layer in _layers_before(before))
            return (here, before) if made_by_weights else (place, None)
        here = before.deepest()
    return place, place if place.tensor.shape.rank == 4 else None


def _layers_before(place):
    """Yields the layers on the way back from a place, along first inputs."""
    place = place.deepest()
    while place.call().keras_inputs:
        yield place.call().layer
        place = place.inputs()[0].deepest()


def _applied(layer):
    """Returns the name of the function that a layer applies, or None."""
    if isinstance(layer, layers.Softmax):
        return "softmax"
    if type(layer).__name__ == "TFOpLambda":
        return layer.get_config()["function"].split(".")[-1]
    activated = isinstance(layer, (layers.Activation, layers.Dense, layers.Conv2D))
    function = getattr(layer, "activation" if activated else "function", None)
    return getattr(function, "__name__", None)


def _is_vector(x):
    """Says whether a tensor is [B, c], or a map [B, 1, 1, c]."""
    return x.shape.rank == 2 or tuple(x.shape[1:3]) == (1, 1)


def _averages(call):
    """Says whether a call makes [B, c] of a map by its mean, or of [B, 1, 1, c] in any way."""
    x = call.keras_inputs[0]
    reshapes = (layers.Flatten, layers.Reshape, layers.GlobalMaxPooling2D)
    return isinstance(call.layer, layers.GlobalAveragePooling2D) or (
        _is_vector(x) and isinstance(call.layer, reshapes)
    )


def _pools(call):
    """Says whether a call makes a vector of a feature map [B, H, W, c], also of [B, 1, 1, c]."""
    if not hasattr(call.outputs, "shape"):
        return False
    pooling = (layers.GlobalAveragePooling2D, layers.GlobalMaxPooling2D)
    return call.keras_inputs[0].shape.rank == 4 and (
        call.outputs.shape.rank == 2 or isinstance(call.layer, pooling)
    )


def _by_values(network):
    """Returns a model of the logits of a network whose graph does not show them."""
    if len(network.output_shape) != 2 or not network.output_shape[-1]:
        raise UserError(
            f"network {network.name!r} gives outputs {network.output_shape}: it must give logits "
            "[batch, classes]"
        )
    kind = kind_of_outputs(network)
    if kind == "neither":
        raise UserError(
            f"the outputs of network {network.name!r} lie between 0 and 1 and do not sum to 1, "
            "like those of a sigmoid: leave the sigmoid out, so that they are logits"
        )
    x = network.output
    if kind == "probabilities":
        x = LogOfProbabilities(name=_free(network, "log"))(x)
    elif x.dtype != tf.float32:
        name = _free(network, "float32_logits")
        x = layers.Activation("linear", dtype="float32", name=name)(x)
    made = keras.Model(network.input, {"logits": x}, name=network.name)
    _prove(network, made, "softmax" if kind == "probabilities" else "")
    made.logits_are_proven = True
    return made


@keras.utils.register_keras_serializable("tf_pcl")
class LogOfProbabilities(layers.Layer):
    """Logits float32 [B, C] whose softmax is the given probabilities [B, C]."""

    def __init__(self, **kwargs):
        super().__init__(**{**kwargs, "dtype": "float32"})

    def call(self, probabilities):
        return tf.math.log(tf.maximum(tf.cast(probabilities, tf.float32), 1e-37))


def kind_of_outputs(network: keras.Model) -> str:
    """Returns what a network's outputs are: "logits", "probabilities" or "neither".

    Probabilities are at least 0 and sum to 1. Outputs that stay between 0 and 1 when all weights
    are scaled up and change their sign are neither: they come from a sigmoid.
    """
    images = proof.images_for(network)
    weights = [w for w in network.trainable_weights if w.dtype.is_floating]
    before = [w.numpy() for w in weights]
    answers = []
    with trials:
        for factor in (1.0, -3.0, 5.0):
            for weight, value in zip(weights, before):
                weight.assign(factor * value)
            answers.append(np.asarray(tf.cast(network(images, training=False), tf.float32)))
        for weight, value in zip(weights, before):
            weight.assign(value)
    finite = [a for a in answers if np.isfinite(a).all()]
    if finite and all(a.min() >= 0 and np.allclose(a.sum(-1), 1, atol=1e-2) for a in finite):
        return "probabilities"
    within = all(a.min() >= 0 and a.max() <= 1 for a in finite)
    return "neither" if finite and within and len(finite) > 1 and np.ptp(finite[0]) else "logits"
