"""Weights: assigned from one model to another, or loaded from a file."""

import collections
import functools
import os
from collections.abc import Iterable

import numpy as np
import tensorflow as tf

from tf_pcl import compat
from tf_pcl.compat import keras
from tf_pcl.errors import UserError, one_line
from tf_pcl.surgery import files
from tf_pcl.surgery.convert import check_kind
from tf_pcl.surgery.graph import finalize, head, leaves

_HOW_TO_TRUST = (
    "; if you trust its source, `trust_files` lets Keras build the model with the code in the file"
)


def assign_pairs(pairs: Iterable) -> None:
    """Gives the second variable of each pair the value of the first."""
    for source, target in pairs:
        target.assign(source)


def load_weights(network: keras.Model, path: str, trust_files: bool = False) -> tuple:
    """Loads the weights of a file into a network; peers made from it start with them too.

    Layers are matched by their names, or else by their order. The layer that gives the logits may
    be missing in the file, or have other classes: it stays as it is. All other layers must be
    there, with the same shapes. Weights are read as arrays; no code in the file runs.

    Args:
      network: a functional keras.Model with the layers of the saved one, in the same order unless
        the file has their names.
      path: a file or folder that Keras has saved: weights (.weights.h5, .h5, the prefix or the
        folder of a TensorFlow checkpoint) or a whole model (.keras, .h5, a SavedModel's folder).
      trust_files: if the arrays do not fit, let Keras build the whole model, with the code in the
        file, and take its weights.

    Returns:
      loaded, fresh: the names of the layers that got weights, and of those, at most one, that did
      not.

    Raises:
      UserError: if there is no such file, it cannot be read or does not fit; the network is then
        unchanged.
    """
    check_kind(network)
    path = _located(path, trust_files)
    targets = [layer for layer in leaves(network) if layer.weights]
    best: dict = {}
    missing, failure = targets, None
    before = network.get_weights()
    level = tf.get_logger().level
    tf.get_logger().setLevel("ERROR")  # It warns for each layer that does not fit.
    try:
        for attempt in _attempts(network, path, trust_files):
            network.set_weights(
                [np.full_like(w, np.nan) if w.dtype.kind == "f" else w for w in before]
            )
            try:
                found = attempt() or {id(layer): layer.get_weights() for layer in targets}
            except Exception as e:  # Damaged files, and files of other networks, raise anything.
                failure = failure or one_line(e)
                continue
            lacking = [layer for layer in targets if not _fits(layer, found.get(id(layer)))]
            if len(lacking) < len(missing):
                best, missing = found, lacking
            if not missing:
                break
    finally:
        network.set_weights(before)
        tf.get_logger().setLevel(level)
    last = head(network)
    misfits = [layer.name for layer in missing if layer is not last]
    if misfits or not best:
        why = (
            f"it lacks {len(misfits)} of {len(targets)} layers, or has them in another shape "
            f"({', '.join(misfits[:3])}{', …' * (len(misfits) > 3)})"
            if best
            else "no layer is found by name"
        )
        raise UserError(
            f"`weights={path}`: it cannot be loaded into network {network.name!r}: {why}"
            + (f"; {failure}" if failure else "")
            + f"; only the classifier, {last.name!r}, may be missing"
            + _HOW_TO_TRUST * (not trust_files and _is_model(path))
        )
    loaded = [layer for layer in targets if layer not in missing]
    for layer in loaded:
        layer.set_weights(best[id(layer)])
    finalize(network)
    network.loaded_weights = True
    return [layer.name for layer in loaded], [layer.name for layer in missing]


def _located(path, trust_files):
    """Returns the file or folder to read."""
    if os.path.exists(os.path.join(path, "saved_model.pb")):
        if not trust_files:  # Else Keras reads the file, and needs no description.
            files.check_described(path)
        return path
    if os.path.isdir(path):
        found = tf.train.latest_checkpoint(path)
        if not found:
            raise UserError(
                f"`weights={path}`: the folder holds neither a SavedModel nor a checkpoint; give "
                "one that does, or a .h5 or .keras file"
            )
        return found
    if not os.path.exists(path) and not os.path.exists(path + ".index"):
        raise UserError(
            f"`weights={path}`: there is no such file; give a .weights.h5, .h5 or .keras file, a "
            "SavedModel's folder or a checkpoint's prefix"
        )
    if trust_files and path.endswith(".keras") and compat.names_are_taken():
        raise UserError(
            f"`weights={path}`: in this process another Keras, tf_keras, has taken the names of "
            "the layers in such a file: load it where neither tensorflow-hub nor tf_keras is "
            "imported, or without `trust_files`"
        )
    return path


def _fits(layer, values):
    """Says whether `values` are all of a layer's weights; what was not read is NaN."""
    return (
        values is not None
        and [v.shape for v in values] == [tuple(w.shape) for w in layer.weights]
        and not any(np.isnan(v).any() for v in values if v.dtype.kind == "f")
    )


def _attempts(network, path, trust_files):
    """Returns functions that read the file in several ways.

    Each writes into the network, or returns {id of a layer: its weights}.
    """
    # Keras loads weights by the structure of the network; from a SavedModel it would build a model.
    ways = [] if os.path.isdir(path) else _of_keras(network, path)
    if _is_model(path):
        ways = [*_of_layers(network, functools.partial(files.read_layers, path)), *ways]
        if trust_files:
            ways += _of_layers(network, functools.partial(_built, path))
    elif path.endswith((".h5", ".hdf5")) and not path.endswith(".weights.h5"):
        read = functools.partial(_read, path, network, by_name=True, skip_mismatch=True)
        ways = [read, *ways]
    return ways


def _of_layers(network, read):
    """Returns two ways to find a network's layers among those that `read` gives."""
    targets = [layer for layer in leaves(network) if layer.weights]
    read = functools.cache(read)

    def by_name():
        # Inner models may have layers of the same names, which then say nothing.
        values, asked = (_once(pairs) for pairs in (read(), ((t.name, t) for t in targets)))
        return {id(layer): values.get(name) for name, layer in asked.items()}

    def by_order():
        return {id(layer): values for layer, (_, values) in zip(targets, read())}

    return [by_name, by_order]


def _once(pairs):
    """Returns {name: value} of the names that occur once in pairs (name, value)."""
    pairs = list(pairs)
    times = collections.Counter(name for name, _ in pairs)
    return {name: value for name, value in pairs if times[name] == 1}


def _of_keras(network, path):
    """Returns Keras's ways: into the whole network, and into all of it except the classifier."""
    feature = getattr(head(network), "input", None) if head(network) in network.layers else None
    headless = [] if feature is None else [keras.Model(network.inputs, feature)]
    return [functools.partial(_read, path, model) for model in (network, *headless)]


def _read(path, model, **how):
    status = model.load_weights(path, **how)
    if status is not None:
        status.expect_partial()


def _built(path):
    """Returns the layers of the model that Keras builds from a file; code in it runs."""
    model = keras.models.load_model(path, compile=False, safe_mode=False)
    built = [layer for layer in leaves(model) if layer.weights]
    return [files.Layer(layer.name, layer.get_weights()) for layer in built]


def _is_model(path):
    """Says whether a file holds a whole model."""
    try:
        return files.is_model(path)
    except OSError as e:
        raise UserError(
            f"`weights={path}`: it cannot be read: {one_line(e)}; give another file"
        ) from e
