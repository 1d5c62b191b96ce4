"""BatchNorm folded into the convolution or the dense layer before it, for inference alone."""

import collections
from typing import Any, NamedTuple, Optional

import numpy as np
import tensorflow as tf

from tf_pcl.compat import keras, layers
from tf_pcl.surgery.graph import calls, is_inner_model

# The layers that can absorb a BatchNorm: their last kernel is scaled. Subclasses may compute
# something else.
_TAKING = (layers.Conv2D, layers.DepthwiseConv2D, layers.SeparableConv2D, layers.Dense)


class Folded(NamedTuple):
    """A network whose BatchNorm layers are folded where they can be.

    Attributes:
      network: a keras.Model that computes in inference what the given one does. It must not be
        trained: it shares its other layers with the given network.
      folded: the names of the BatchNorm layers that are folded.
      left: the names of the others.
    """

    network: keras.Model
    folded: list
    left: list


def fold_batch_norm(network: keras.Model) -> Folded:
    """Folds each BatchNorm that directly follows a layer with a kernel into that layer.

    BatchNorm computes s · x + t with s = γ / √(σ² + ε) and t = β − s · μ. A linear Conv2D,
    DepthwiseConv2D, SeparableConv2D or Dense layer before it, whose output no other layer uses,
    absorbs s into its kernel and t into its bias.

    Args:
      network: a functional keras.Model. Its inner models are folded too, each by itself.

    Returns:
      A Folded; the caller must prove that the networks agree.
    """
    folding = _Folding()
    return Folded(folding.of(network), folding.folded, folding.left)


class _Folding:
    def __init__(self):
        self.folded, self.left = [], []
        self._made = {}  # By the id of an inner model, which may be called several times.

    def of(self, model):
        """Returns a model with folded layers in place of those that `_pairs` finds."""
        pairs = _pairs(model)
        norms = {id(norm) for _, norm in pairs}
        taking = {id(layer): _with_bias(layer) for layer, _ in pairs}
        for layer in model.layers:
            if isinstance(layer, layers.BatchNormalization):
                (self.folded if id(layer) in norms else self.left).append(layer.name)

        def again(layer):
            if is_inner_model(layer):
                if id(layer) not in self._made:
                    self._made[id(layer)] = self.of(layer)
                return self._made[id(layer)]
            if id(layer) in norms:
                return layers.Activation("linear", name=layer.name, dtype=layer.dtype_policy)
            return taking.get(id(layer), layer)

        made = keras.models.clone_model(model, clone_function=again)
        for layer, norm in pairs:
            taking[id(layer)].set_weights(_values(layer, norm))
        return made


def _pairs(model):
    """Returns [(layer, BatchNorm behind it)] of what can be folded in a model's own graph."""
    order = calls(model)
    times = collections.Counter(id(call.layer) for call in order)
    read = collections.Counter({id(t) for t in model.outputs})
    read.update(id(t) for call in order for t in call.keras_inputs)
    return [
        (before.layer, call.layer)
        for call in order
        if (before := _taken_in(call)) is not None
        and times[id(call.layer)] == times[id(before.layer)] == read[id(before.outputs)] == 1
    ]


def _taken_in(call) -> Optional[Any]:
    """Returns the call before that of a BatchNorm, if its layer can absorb the BatchNorm."""
    norm = call.layer
    if type(norm) is not layers.BatchNormalization or len(call.keras_inputs) != 1:
        return None
    x = call.keras_inputs[0]
    before = x.node
    # Not layers whose code was changed after they were built, nor BatchNorm that uses its batch.
    changed = "call" in vars(norm) or "call" in vars(before.layer)
    phase = [*call.call_args[1:], *(v for k, v in call.call_kwargs.items() if k != "mask")]
    if changed or any(value not in (None, False) for value in phase):
        return None
    if type(before.layer) not in _TAKING or list(norm.axis) != [x.shape.rank - 1]:
        return None
    last = getattr(before.layer, "data_format", "channels_last") == "channels_last"
    linear = before.layer.activation is keras.activations.linear
    floats = {layer.dtype_policy.name for layer in (norm, before.layer)} == {"float32"}
    return before if last and linear and floats else None


def _with_bias(layer):
    """Returns a layer of the same kind with a bias; its weights can be set once it is built."""
    return type(layer).from_config({**layer.get_config(), "use_bias": True})


def _values(layer, norm):
    """Returns the weights of `_with_bias(layer)` that compute what the two layers do."""
    exact = lambda variable: np.asarray(tf.convert_to_tensor(variable), np.float64)
    kernels = layer.get_weights()[: len(layer.weights) - bool(layer.use_bias)]
    scale = 1 / np.sqrt(exact(norm.moving_variance) + norm.epsilon)
    scale *= exact(norm.gamma) if norm.scale else 1
    bias = (exact(layer.bias) if layer.use_bias else 0) - exact(norm.moving_mean)
    bias = scale * bias + (exact(norm.beta) if norm.center else 0)
    # The last axis of a kernel counts the outputs; in a depthwise kernel the last two axes do.
    outputs = kernels[-1].shape[-2:] if type(layer) is layers.DepthwiseConv2D else (-1,)
    kernels[-1] = kernels[-1] * scale.reshape(outputs)
    return [*kernels, bias]
