"""Cuts a functional Keras model into a trunk that peers share and a branch that each has for itself."""

from tf_pcl.compat import keras
from tf_pcl.errors import UserError
from tf_pcl.surgery.copies import calls
from tf_pcl.surgery.cuts import default_cut, propose_cut_of, usable_cuts
from tf_pcl.surgery.features import with_features


def split(network, at=None):
    """Cuts a network after layer `at`.

    Args:
      network: a functional keras.Model from images to logits or probabilities.
      at: the name of the trunk's last layer; by default what propose_cut says.
    Returns:
      trunk: keras.Model from images to the output of `at`; branch: keras.Model from there to the outputs of
      with_features, "feature_map" only if the branch makes it. Together they have exactly the network's weights, copied.
    Raises:
      UserError: if the network cannot be cut there; the text names the layers where it can.
    """
    whole = with_features(network)
    points, order = usable_cuts(whole), [node.layer.name for node in calls(whole)]
    at = at or default_cut(whole) or propose_cut_of(whole)[0]
    if at not in points:
        reason = (
            "cannot be cut there"
            if at in {layer.name for layer in whole.layers}
            else "has no such layer"
        )
        raise UserError(
            f"--split_at={at}: network {whole.name!r} {reason}. Layers where a cut is possible: "
            f"{', '.join(points) or 'none'}."
        )
    cut = whole.get_layer(at).output
    behind = order[order.index(at) + 1 :]
    made = {key: tensor for key, tensor in whole.output.items() if tensor.node.layer.name in behind}
    trunk, branch = (
        keras.Model(whole.input, cut, name="trunk"),
        keras.Model(cut, made, name="branch"),
    )
    if not branch.trainable_weights:
        raise UserError(
            f"network {whole.name!r} has no trainable layer after {at!r}: peers would all be the same; make "
            "some layer there trainable, or cut earlier with --split_at"
        )
    return trunk, branch
