"""Slices of a functional Keras model: the trunk that peers share, and the branch of each peer."""

import inspect
from collections.abc import Sequence
from typing import Any, Optional

import tensorflow as tf

from tf_pcl.compat import keras, layers
from tf_pcl.errors import UserError
from tf_pcl.surgery.cuts import find_cut
from tf_pcl.surgery.features import with_features
from tf_pcl.surgery.graph import calls, continued, free_name, last_leaf, outputs_by_key, phase


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
    call, later = order[path[0]], order[path[0] + 1 :]
    after = {id(t) for one in later for t in tf.nest.flatten(one.outputs)}
    if len(path) == 1:
        cut = tf.nest.flatten(call.outputs)[0]
        return keras.Model(model.input, cut), keras.Model(cut, _outputs(model, after))
    # The cut is within an inner model: cut that, and call its parts as it was called.
    low, high = _parts(call.layer, path[1:])
    trunk = keras.Model(model.input, low(call.keras_inputs[0], **phase(call)))
    cut = keras.Input(high.input_shape[1:], dtype=high.input.dtype)
    made = high(cut, **phase(call))
    # An output that lies before the cut is missing.
    replaced = {id(t): made.get(key) for key, t in outputs_by_key(call.outputs).items()}
    outputs = _outputs(model, after | {key for key, t in replaced.items() if t is not None})
    inside = [replaced[id(t)] for t in tf.nest.flatten(call.outputs)]
    return trunk, keras.Model(cut, continued(call, inside, outputs))


def _outputs(model, made):
    """Returns {key: tensor} of those of a model's outputs whose ids are in `made`."""
    return {key: t for key, t in outputs_by_key(model.output).items() if id(t) in made}


def deployable(preprocess: keras.layers.Layer, *parts: keras.Model) -> keras.Model:
    """Joins models to one that takes raw images.

    Args:
      preprocess: a layer in front of the first part.
      parts: models, each of which takes the output of the one before; the last gives {"logits": …}.

    Returns:
      A functional keras.Model from raw images [B, H, W, C], see raw_images, to logits float32
      [B, C].
    """
    images = raw_images(preprocess, parts[0])
    x, taken = images, ["images", "logits"]
    for part in (preprocess, *parts):
        layer = renamed(part, taken, x)
        x = layer(x)
        taken.append(layer.name)
    return with_logits_output(images, x["logits"])


def raw_images(preprocess: keras.layers.Layer, first: keras.Model) -> Any:
    """Returns a deployed network's input, uint8 if it was trained on that type, else float32.

    Args:
      preprocess: the layer in front of it.
      first: its first part.
    """
    # Keras cuts floats to the type of an input, and images from 0 to 1 would all be black.
    dtype = tf.uint8 if getattr(preprocess, "takes_uint8", False) else tf.float32
    return keras.Input(first.input_shape[1:], dtype=dtype, name="images")


def renamed(layer: keras.layers.Layer, taken: Sequence[str], x: Any) -> keras.layers.Layer:
    """Returns a layer, in a model of another name if its own is among those taken.

    Keras wants different names for the layers of a model.

    Args:
      layer: a layer or a model.
      taken: names.
      x: a tensor like those that it is called on.
    """
    if layer.name not in taken:
        return layer
    inner = keras.Input(x.shape[1:], dtype=x.dtype)
    return keras.Model(inner, layer(inner), name=free_name(layer.name, taken))


def prepared(preprocess: keras.layers.Layer, images: tf.Tensor, training: bool) -> tf.Tensor:
    """Returns images after the layer in front of a network, called in the network's phase.

    Otherwise layers of random augmentation would change the images of a test, too.
    """
    takes = inspect.signature(preprocess.call).parameters
    return preprocess(images, **({"training": training} if "training" in takes else {}))


def with_logits_output(images, logits) -> keras.Model:
    """Returns a keras.Model from `images` to float32 `logits`, under that output name."""
    named = layers.Activation("linear", dtype="float32", name="logits")
    return keras.Model(images, named(logits))
