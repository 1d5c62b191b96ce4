"""Where a functional Keras model can be cut in two, and what each part costs."""

import collections
import re
from typing import NamedTuple, Optional

import numpy as np
import tensorflow as tf

from tf_pcl.compat import keras
from tf_pcl.errors import UserError
from tf_pcl.surgery.features import with_features
from tf_pcl.surgery.graph import calls, is_inner_model, last_leaf, leaves, names, outputs_by_key
from tf_pcl.surgery.observe import flops

# Cuts the tables' ResNets where the paper does: what comes before their last section is 0.65 to
# 0.69 of the cost.
DEFAULT_TRUNK_SHARE = 0.7


class Cut(NamedTuple):
    """A place where a model can be cut in two: everything after it needs only one tensor.

    Attributes:
      path: the index of a call among the model's calls; if the cut is inside an inner model, that
        model's call and the index within, and so on. It is the same in every build of a network.
      name: the name of the layer that makes the tensor.
      share: the part of the forward cost up to there, in [0, 1].
    """

    path: tuple
    name: str
    share: float


def costs(network: keras.Model) -> dict:
    """Returns {layer's name: FLOP} of one image's forward pass, in the order of computation.

    Layers of inner models have their own names here. See observe.flops_while for what is counted.
    """
    network = with_features(network)
    counted, known = flops(network), names(network)
    return {known[id(leaf)]: counted[id(leaf)] for leaf in _in_order(network)}


def cuts(network: keras.Model) -> list:
    """Returns the Cuts of a network from input to output, before the feature that is classified.

    Args:
      network: what with_features takes.
    """
    whole = with_features(network)
    counted, known, order = flops(whole), names(whole), _in_order(whole)
    sums = np.cumsum([counted[id(leaf)] for leaf in order])
    share = {id(leaf): cost / max(1, sums[-1]) for leaf, cost in zip(order, sums)}
    shared = _shared(whole)
    # Of such a layer, peers would have one in the trunk and others in their branches.
    parts_one = lambda path: any(a[: len(path)] <= path < b[: len(path)] for a, b in shared)
    return [
        Cut(path, known[id(leaf)], float(share[id(leaf)]))
        for path, leaf in _paths(whole)
        if not parts_one(path)
    ]


def cut_points(network: keras.Model) -> list:
    """Returns the names of the layers after which a network can be cut, from input to output."""
    return [cut.name for cut in cuts(network)]


def _in_order(model):
    """Returns a model's leaves in the order of their first calls."""
    found: dict = {}
    for call in calls(model):
        inside = _in_order(call.layer) if is_inner_model(call.layer) else [call.layer]
        found.update((id(leaf), leaf) for leaf in inside)
    return list(found.values())


def _shared(model):
    """Returns the paths of the first and the last use of all weights that are used several times.

    Layers without weights count like weights.
    """
    used = collections.defaultdict(list)

    def look(inside, path):
        for i, call in enumerate(calls(inside)):
            if is_inner_model(call.layer):
                look(call.layer, (*path, i))
            else:
                for one in call.layer.weights or [call.layer]:
                    used[id(one)].append((*path, i))

    look(model, ())
    return {(paths[0], paths[-1]) for paths in used.values() if len(paths) > 1}


def _paths(model):
    """Yields (path, leaf that makes the tensor) of the cuts of a model."""
    order = calls(model)
    last_use: dict = {}
    for i, call in enumerate(order):
        last_use.update((id(t), i) for t in call.keras_inputs)
    # A branch must make all outputs except the feature map.
    needed = {id(t) for key, t in outputs_by_key(model.output).items() if key != "feature_map"}
    last_use.update((key, len(order)) for key in needed)
    open_until = max(last_use.get(id(t), 0) for t in model.inputs)
    for i, call in enumerate(order):
        made = tf.nest.flatten(call.outputs)
        if is_inner_model(call.layer) and open_until <= i:
            yield from (((i, *path), leaf) for path, leaf in _paths(call.layer))
        if open_until <= i and len(made) == 1 and id(made[0]) not in needed:
            yield (i,), last_leaf(call.layer)
        open_until = max(open_until, *(last_use.get(id(t), i) for t in made))


def section_names(network: keras.Model) -> list:
    """Returns the names stage_1 … stage_S of the layers that end a network's sections.

    Papers on residual networks call these parts stages. The list is empty if there are none.
    """
    found = [re.fullmatch(r"stage_(\d+)", layer.name) for layer in leaves(network)]
    return [f"stage_{number}" for number in sorted({int(m.group(1)) for m in found if m})]


def propose_cut(network: keras.Model, trunk_share: Optional[float] = None) -> Cut:
    """Proposes where to cut a network.

    Args:
      network: what with_features takes.
      trunk_share: the largest part of the forward cost that the peers may share, in (0, 1]. By
        default they share all before the last section if the network names its sections, and
        otherwise at most DEFAULT_TRUNK_SHARE, if that is possible.

    Returns:
      The last cut that leaves the trunk no larger than that.

    Raises:
      UserError: if the network cannot be cut, or if the first cut exceeds the given share.
    """
    possible = cuts(network)
    if not possible:
        raise UserError(
            f"network {network.name!r} cannot be cut before its classifier's input, so peers could "
            "share nothing: take a method of whole networks"
        )
    before_last_section = section_names(network)[-2:-1]
    for cut in possible:
        if trunk_share is None and [cut.name] == before_last_section:
            return cut
    fitting = [cut for cut in possible if cut.share <= (trunk_share or DEFAULT_TRUNK_SHARE)]
    if trunk_share and not fitting:
        first = possible[0]
        raise UserError(
            f"the first layer after which network {network.name!r} can be cut is {first.name}, at "
            f"{100 * first.share:.2g} % of its forward cost: give at least "
            f"{np.ceil(100 * first.share) / 100:g}",
            parameter="trunk_share",
            value=f"{trunk_share:g}",
            allowed=f"at least {first.share}",
        )
    return fitting[-1] if fitting else possible[0]


def find_cut(network: keras.Model, at: Optional[str] = None) -> Cut:
    """Returns the cut after the layer called `at`, or the proposed one.

    Raises:
      UserError: if the network cannot be cut there; the text names the layers where it can.
    """
    if not at:
        return propose_cut(network)
    possible = cuts(network)
    found = [cut for cut in possible if cut.name == at]
    if found:
        return found[0]
    known = set(names(network).values())
    reason = "cannot be cut there" if at in known else "has no such layer"
    points = ", ".join(cut.name for cut in possible) or "none"
    raise UserError(
        f"network {network.name!r} {reason}. Layers where a cut is possible: {points}.",
        parameter="split_at",
        value=at,
        allowed=[cut.name for cut in possible],
    )
