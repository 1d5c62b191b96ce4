"""Slices of a functional Keras model: the trunk that peers share, and the branch of each peer."""

from typing import Optional

import tensorflow as tf

from tf_pcl.compat import keras, layers
from tf_pcl.errors import UserError
from tf_pcl.surgery.cuts import find_cut
from tf_pcl.surgery.features import with_features
from tf_pcl.surgery.graph import calls, continued, last_leaf, phase


def split(network: keras.Model, at: Optional[str] = None) -> tuple:
    """Cuts a network after the layer `at`.

    Args:
      network: what with_features takes.
      at: the name of the trunk's last layer; by default that of propose_cut.

    Returns:
      trunk: a keras.Model from images to the output of `at`.
      branch: a keras.Model from there to the outputs of with_features, with "feature_map" only if
        the branch makes it. Both consist of the network's own layers.

    Raises:
      UserError: if the network cannot be cut there; the text names the layers where it can.
    """
    whole = with_features(network)
    return slice_at(whole, find_cut(whole, at).path)


def slice_at(whole: keras.Model, path: tuple) -> tuple:
    """Cuts a model at the path of a Cut; see split.

    Raises:
      UserError: if nothing is trainable after the cut.
    """
    trunk, branch = _parts(whole, path)
    if not branch.trainable_weights:
        raise UserError(
            f"network {whole.name!r} has no trainable layer after {last_leaf(trunk).name!r}, so "
            "all peers would be the same: make a layer there trainable, or cut earlier with "
            "`split_at`"
        )
    rename = lambda model, name: keras.Model(model.input, model.output, name=name)
    return rename(trunk, "trunk"), rename(branch, "branch")


def _parts(model, path):
    """Returns the models before and after a cut; the latter has the outputs that it can make."""
    order = calls(model)
    call, after = order[path[0]], {id(t) for t in _made_after(order, path[0])}
    if len(path) == 1:
        cut = tf.nest.flatten(call.outputs)[0]
        return keras.Model(model.input, cut), _model(cut, _outputs(model, after))
    # The cut is within an inner model: cut that, and call its parts as it was called.
    low, high = _parts(call.layer, path[1:])
    trunk = keras.Model(model.input, low(call.keras_inputs[0], **phase(call)))
    cut = keras.Input(high.input_shape[1:], dtype=high.input.dtype)
    made = high(cut, **phase(call))
    if isinstance(made, dict):  # An output that lies before the cut is missing.
        made = {id(call.outputs[key]): made[key] for key in made}
    else:
        made = {id(call.outputs): made}
    replaced = [made.get(id(t)) for t in tf.nest.flatten(call.outputs)]
    outputs = _outputs(model, after | set(made))
    return trunk, _model(cut, continued(call, replaced, outputs))


def _model(inputs, outputs):
    """Returns a model of the outputs {key: tensor}, or of the only one under the key ""."""
    return keras.Model(inputs, outputs.get("", outputs))


def _made_after(order, index):
    """Returns the tensors that are made after the call `index`."""
    return [t for call in order[index + 1 :] for t in tf.nest.flatten(call.outputs)]


def _outputs(model, made):
    """Returns {key: tensor} of those of a model's outputs whose ids are in `made`."""
    outputs = model.output if isinstance(model.output, dict) else {"": model.output}
    return {key: t for key, t in outputs.items() if id(t) in made}


def deployable(preprocess: keras.layers.Layer, *parts: keras.Model) -> keras.Model:
    """Joins models to one that takes raw images.

    Args:
      preprocess: a layer in front of the first part.
      parts: models, each of which takes the output of the one before; the last gives {"logits": …}.

    Returns:
      A functional keras.Model from raw images uint8 [B, H, W, C] to logits float32 [B, C].
    """
    images = keras.Input(parts[0].input_shape[1:], dtype=tf.uint8, name="images")
    x = preprocess(images)
    for part in parts:
        x = part(x)
    return with_logits_output(images, x["logits"])


def with_logits_output(images, logits) -> keras.Model:
    """Returns a keras.Model from `images` to float32 `logits`, under that output name."""
    named = layers.Activation("linear", dtype="float32", name="logits")
    return keras.Model(images, named(logits))
