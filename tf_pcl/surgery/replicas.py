"""BatchNorm whose statistics are those of all replicas' images."""

import functools
from typing import Any

import numpy as np
import tensorflow as tf

from tf_pcl.compat import is_of_keras, keras
from tf_pcl.surgery.graph import sublayers

# The methods of Keras's layer in which it computes the statistics of a batch.
_FUSED, _MOMENTS = "_fused_batch_norm", "_calculate_mean_and_var"


def synchronize(model: keras.Model) -> list[str]:
    """Lets the BatchNorm layers of a model see the images of all replicas in training.

    The layers keep their weights, configurations and outputs in inference, so saved and exported
    networks do not change. On one replica nothing changes. On several, equal parts of a batch give
    the statistics that the whole batch gives on one. Keras's own `synchronized=True` does not: it
    computes the variance as E x² − (E x)², which loses digits, and stores it without the factor
    N / (N − 1) of its usual kernel.

    Args:
      model: a keras.Model or a method, whose step has not been traced yet. All replicas must get
        equally many images.

    Returns:
      The layers that stay unsynchronized, each as "NAME (CLASS)": other layers that collect
      statistics of their replica's images.
    """
    for layer in filter(_is_known, sublayers(model)):
        # Attributes of this layer only: other models in the process keep Keras's functions.
        for name, ours in ((_FUSED, _fused), (_MOMENTS, _moments)):
            usual = functools.partial(getattr(type(layer), name), layer)
            setattr(layer, name, functools.partial(ours, layer, usual))
    return _named(layer for layer in _collecting(model) if not _is_known(layer))


def replica_bound(model: keras.Model, synchronized: bool = False) -> list[str]:
    """Returns the layers that depend on the number of replicas, each as "NAME (CLASS)".

    They collect statistics of their replica's images, or draw random numbers for each replica.

    Args:
      model: a keras.Model, or a method.
      synchronized: whether `synchronize` is used with several replicas.
    """
    found = [one for one in _collecting(model) if not (synchronized and _is_known(one))]
    found += [one for one in sublayers(model) if getattr(one, "_random_generator", None)]
    return _named(found)


def _collecting(model):
    """Returns the layers with variables that each replica collects by itself."""
    own = lambda layer: getattr(layer, "_non_trainable_weights", ())
    return [layer for layer in sublayers(model) if any(map(_is_local, own(layer)))]


def _named(layers):
    return [f"{layer.name} ({type(layer).__name__})" for layer in layers]


def _is_known(layer):
    """Says whether a layer is Keras's BatchNorm, or a subclass that does not override its work."""
    # With virtual_batch_size, parts of a batch are normalised apart on one device too.
    if not isinstance(layer, keras.layers.BatchNormalization) or layer.virtual_batch_size:
        return False
    for name in ("call", _FUSED, _MOMENTS):
        definer = next((c for c in type(layer).__mro__ if name in vars(c)), None)
        if definer is None or not is_of_keras(definer):
            return False
    return True


def _is_local(variable):
    """Says whether each replica collects a variable by itself, and reading gives the mean."""
    return (
        variable.synchronization == tf.VariableSynchronization.ON_READ
        and variable.aggregation == tf.VariableAggregation.MEAN
    )


def _replicas() -> Any:
    """Returns the context of this replica if it is one of several, else None."""
    context = tf.distribute.get_replica_context()
    return context if context is not None and context.num_replicas_in_sync > 1 else None


def _fused(layer, usual, inputs, mask, training):
    """Does the work of a layer's fused kernel."""
    if not _replicas() or not training:
        return usual(inputs, mask, training)
    x = tf.cast(inputs, tf.float32)
    axes = [i for i in range(x.shape.rank) if i not in layer.axis]
    mean, variance = _moments(layer, None, x, axes, False)
    count = tf.cast(_replicas().num_replicas_in_sync * tf.size(x) / tf.size(mean), tf.float32)
    # Like the kernel, this normalises by the batch's variance and collects the unbiased one.
    for statistic, value in (
        (layer.moving_mean, mean),
        (layer.moving_variance, variance * (count / tf.maximum(count - 1.0, 1.0))),
    ):
        statistic.assign_sub((statistic - value) * (1.0 - layer.momentum))
    shape = np.ones(x.shape.rank, int)
    shape[layer.axis] = -1
    along = lambda vector: None if vector is None else tf.reshape(vector, shape)
    parts = map(along, (mean, variance, layer.beta, layer.gamma))
    return tf.cast(tf.nn.batch_normalization(x, *parts, layer.epsilon), inputs.dtype)


def _moments(layer, usual, inputs, axes, keep_dims, mask=None):
    """Returns mean and variance of all replicas' inputs along `axes`, exact to rounding."""
    context = _replicas()
    if context is None:
        return usual(inputs, axes, keep_dims, mask=mask)
    if mask is not None:
        return layer._sync_calculate_mean_and_var(inputs, axes, keep_dims, mask=mask)
    own = tf.stack(tf.nn.moments(inputs, axes, keepdims=keep_dims))
    # One sum gives each replica the means and variances of all: each adds its own at its place.
    place = tf.one_hot(
        context.replica_id_in_sync_group, context.num_replicas_in_sync, dtype=own.dtype
    )
    place = tf.reshape(place, [-1, *[1] * own.shape.rank])
    momentum = layer.momentum
    means, variances = tf.unstack(context.all_reduce("sum", place * own), axis=1)
    # The threads of other replicas have run meanwhile, in which `recompute` may have changed it.
    layer.momentum = momentum
    mean = tf.reduce_mean(means, axis=0)
    return mean, tf.reduce_mean(variances + tf.square(means - mean), axis=0)
