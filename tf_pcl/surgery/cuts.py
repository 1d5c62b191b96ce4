"""Where a functional Keras model can be cut in two, and what each part costs."""

import itertools
import re

import numpy as np
import tensorflow as tf

from tf_pcl.compat import keras
from tf_pcl.errors import UserError
from tf_pcl.surgery.copies import calls, clone
from tf_pcl.surgery.features import with_features

# Cuts the tables' ResNets where the paper does: what comes before their last stage is 0.65 to 0.69 of the cost.
DEFAULT_TRUNK_SHARE = 0.7


def costs(network):
    """What one image's forward pass costs in each layer.

    Args:
      network: a functional keras.Model of a known image size.
    Returns:
      {layer name: FLOP}, in the order of computation: 2 × multiply-adds with the kernels of a layer (convolutions of every
      kind, dense layers, the projections of attention), 0 for what has none. Inner models' layers stand under their own
      names, as in split; a layer of layers counts as if all of them had the smaller of its input's and output's size.
    """
    if any(isinstance(layer, keras.Model) for layer in network.layers):
        network = clone(network)
    found = {}
    for node in calls(network):
        found[node.layer.name] = found.get(node.layer.name, 0) + _flop(node)
    return found


def _flop(node):
    """2 × multiply-adds of one call of a layer."""
    kernels = [
        w.shape.num_elements() for w in node.layer.weights if "kernel" in w.name.split("/")[-1]
    ]
    if not kernels:
        return 0
    # A kernel is applied once at every place of the output; where that has more, as after a transposed convolution or an
    # EinsumDense that splits a dimension, of the input.
    shapes = [node.keras_inputs[0].shape[1:-1], tf.nest.flatten(node.outputs)[0].shape[1:-1]]
    return 2 * sum(kernels) * min(int(np.prod(shape)) for shape in shapes)


def cut_points(network):
    """Names of the layers, from input to output, after which the network falls into two: all that follows needs only
    that layer's output and none of the layers before."""
    order = calls(network)
    last_use, last_call = {}, {}
    for i, node in enumerate(order):
        last_use.update((id(t), i) for t in node.keras_inputs)
        last_call[id(node.layer)] = i
    names, open_until = [], max(last_use.get(id(t), 0) for t in network.inputs)
    for i, node in enumerate(order[:-1]):
        made = tf.nest.flatten(node.outputs)
        if max(open_until, last_call[id(node.layer)]) <= i and len(made) == 1:
            names.append(node.layer.name)
        open_until = max(
            open_until, last_call[id(node.layer)], *(last_use.get(id(t), i) for t in made)
        )
    return names


def usable_cuts(whole):
    """The cut points that leave the feature that is classified to the branch."""
    before = itertools.takewhile(
        lambda node: node is not whole.output["features"].node, calls(whole)
    )
    names = {node.layer.name for node in before}
    return [name for name in cut_points(whole) if name in names]


def section_names(network):
    """Names of the layers that give the network's stages, stage_1 … stage_S; empty if it has none."""
    found = [re.fullmatch(r"stage_(\d+)", layer.name) for layer in network.layers]
    return [f"stage_{number}" for number in sorted(int(m.group(1)) for m in found if m)]


def default_cut(network):
    """The layer after which the last stage begins, stage_(S−1); None if there is none."""
    stages = section_names(network)
    return stages[-2] if len(stages) > 1 else None


def propose_cut(network, trunk_share=None):
    """Where to cut a network that nobody named a layer for.

    Args:
      network: as in split.
      trunk_share: the largest part of the forward cost that the peers may share, in (0, 1); by default they share all
        before the last stage of a network with named stages, or else at most DEFAULT_TRUNK_SHARE, where that is possible.
    Returns:
      name of the trunk's last layer: the last that costs no more; the part of the forward cost up to there.
    Raises:
      UserError: if the network cannot be cut, or the first cut already costs more than the given share.
    """
    return propose_cut_of(with_features(network), trunk_share)


def propose_cut_of(whole, trunk_share=None):
    cost, points = costs(whole), usable_cuts(whole)
    if not points:
        raise UserError(
            f"network {whole.name!r} cannot be cut anywhere before its classifier's input: there is nothing "
            "that peers could share; methods that take no --split_at can train it"
        )
    share = dict(zip(cost, np.cumsum(list(cost.values())) / max(1, sum(cost.values()))))
    if trunk_share is None and default_cut(whole) in points:
        return default_cut(whole), share[default_cut(whole)]
    fitting = [name for name in points if share[name] <= (trunk_share or DEFAULT_TRUNK_SHARE)]
    if trunk_share and not fitting:
        raise UserError(
            f"--trunk_share={trunk_share:g}: network {whole.name!r} can first be cut after layer {points[0]}, "
            f"which makes {100 * share[points[0]]:.2g} % of its forward cost the trunk: give at least "
            f"{np.ceil(100 * share[points[0]]) / 100:g}"
        )
    name = (fitting or points)[-1 if fitting else 0]
    return name, share[name]
