"""The losses that the methods share: scalars, means over the batch [B, C] of logits.

Inside `weighted(weights)` every image counts with its weight, as with Keras's sample_weight: a loss
is Σ w·l / B. Inside `smoothed(ε)` the labels of cross-entropies are smoothed. So an equation reads
the same with and without weights and smoothing.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Optional

import numpy as np
import tensorflow as tf

from tf_pcl import compat
from tf_pcl.errors import UserError

# A context variable, since each replica traces its step in a thread of its own.
_weights: contextvars.ContextVar = contextvars.ContextVar("weights", default=None)
_smoothing: contextvars.ContextVar = contextvars.ContextVar("smoothing", default=0.0)


@contextlib.contextmanager
def weighted(weights: Optional[tf.Tensor]) -> Iterator[None]:
    """Weighs the images of the batch in all losses that are computed inside.

    Args:
      weights: float32 [B], at least 0; None if all weigh 1.
    """
    token = _weights.set(weights)
    try:
        yield
    finally:
        _weights.reset(token)


@contextlib.contextmanager
def smoothed(smoothing: float) -> Iterator[None]:
    """Smooths the labels of every `cross_entropy` inside (Szegedy et al., 2016).

    A label y, class number or probabilities, becomes (1 − ε) y + ε / C. Distillation does not
    change.

    Args:
      smoothing: ε in [0, 1].
    """
    token = _smoothing.set(smoothing)
    try:
        yield
    finally:
        _smoothing.reset(token)


def batch_mean(values: tf.Tensor) -> tf.Tensor:
    """Returns the weighted mean of losses of images, or of pairs or triples of images.

    Args:
      values: [B], one for each image; or [G, G] or [G, G, G], one for each pair or triple of images
        of the global batch. The weight of a pair or triple is the geometric mean of its images'
        weights: an image of weight 0 removes it, and if all weights are c, so is that of the loss.

    Returns:
      A scalar.
    """
    weights = _weights.get()
    if weights is None:
        return tf.reduce_mean(values)
    rank = values.shape.rank
    if rank > 1:
        root = tf.pow(of_all_replicas(weights), 1 / rank)
        weights = root
        for _ in range(rank - 1):
            weights = weights[..., None] * root
    return tf.reduce_mean(tf.cast(weights, values.dtype) * values)


def of_all_replicas(values: tf.Tensor) -> tf.Tensor:
    """Returns the values [G, …] of the global batch from those [B, …] of this replica."""
    context = tf.distribute.get_replica_context()
    # The identity gives these values a gradient of their own, as in triplet_angles.
    return (
        context.all_gather(values, axis=0)
        if context is not None and context.num_replicas_in_sync > 1
        else tf.identity(values)
    )


def cross_entropy(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Returns CE(y, z) of class numbers int [B], or probabilities [B, C], and logits [B, C].

    Inside `smoothed` the labels are smoothed.
    """
    smoothing = _smoothing.get()
    if smoothing:
        labels, classes = tf.convert_to_tensor(labels), logits.shape[-1]
        labels = tf.one_hot(labels, classes) if labels.shape.rank == 1 else labels
        labels = (1 - smoothing) * tf.cast(labels, tf.float32) + smoothing / classes
    return batch_mean(cross_entropies(labels, logits))


def cross_entropies(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Returns CE(y, z) of each image, float32 [B], without its weight; see `cross_entropy`."""
    logits, labels = tf.cast(logits, tf.float32), tf.convert_to_tensor(labels)
    if labels.shape.rank == 2:
        return tf.nn.softmax_cross_entropy_with_logits(tf.cast(labels, tf.float32), logits)
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)


def distillation(
    teacher: tf.Tensor, student: tf.Tensor, temperature: float = 1.0, cut: bool = True
) -> tf.Tensor:
    """Returns T² · KL(softmax(z_teacher / T) ‖ softmax(z_student / T)) (Hinton et al.).

    Args:
      teacher, student: logits [B, C].
      temperature: T > 0. The factor T² keeps the size of the gradient when T grows.
      cut: whether the teacher's logits are constants, so that no gradient flows into it.
    """
    if cut:
        teacher = tf.stop_gradient(teacher)
    log_q = tf.nn.log_softmax(tf.cast(teacher, tf.float32) / temperature)
    log_p = tf.nn.log_softmax(tf.cast(student, tf.float32) / temperature)
    return temperature**2 * batch_mean(tf.reduce_sum(tf.exp(log_q) * (log_q - log_p), axis=-1))


def pairwise_distances(features: tf.Tensor) -> tf.Tensor:
    """Returns pairwise distances, divided by the mean of those not zero (Park et al., 2019).

    Equal features, as those of one image twice, have finite values and gradients.

    Args:
      features: [B, d].
    Returns:
      float32 [B, B].
    """
    f = tf.cast(features, tf.float32)
    # Distances are computed as ‖u‖² + ‖v‖² − 2 u·v. With the mean subtracted, these terms are
    # small, and their difference loses few digits.
    d = compat.pairwise_distance(f - tf.stop_gradient(tf.reduce_mean(f, axis=0)))
    apart = tf.cast(tf.math.count_nonzero(d), tf.float32)
    return tf.math.divide_no_nan(d * apart, tf.reduce_sum(d))


def triplet_angles(features: tf.Tensor) -> tf.Tensor:
    """Returns the cosines of the angles of all triples of features (Park et al., 2019).

    A cosine is 0 if a feature is equal to that of the corner.

    Args:
      features: [B, d].
    Returns:
      float32 [B, B, B], at [v, u, w] cos∠(u, v, w), the corner being v.
    """
    # The identity lets the gradients of the two uses below be added first, apart from those of
    # other uses: a sum of three could be computed in several orders, with different rounding.
    f = tf.identity(tf.cast(features, tf.float32))
    to = f[None] - f[:, None]  # [v, u]: from v to u
    squared = tf.reduce_sum(tf.square(to), axis=-1, keepdims=True)
    apart = squared > 0
    directions = to * tf.where(apart, tf.math.rsqrt(tf.where(apart, squared, 1.0)), 0.0)
    return tf.matmul(directions, directions, transpose_b=True)


def balanced_class_weights(labels, num_classes: int) -> dict[int, float]:
    """Returns weights that make all classes count equally, for the `class_weight` of fit.

    With n_c images of class c, n in all and K classes that have any, class c weighs n / (K n_c), as
    in scikit-learn's "balanced"; the mean weight of an image is 1. A class without images weighs 0.

    Args:
      labels: class numbers, int [N], N ≥ 1.
      num_classes: C.

    Raises:
      UserError: if there are no labels, or one is not in 0 … C − 1.
    """
    labels = np.asarray(labels).reshape(-1)
    if not labels.size or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"balanced weights need class numbers, not {labels.size} labels of type {labels.dtype}"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(
            f"the labels go from {labels.min()} to {labels.max()}, and class numbers from 0 to "
            f"{num_classes - 1} are allowed"
        )
    counts = np.bincount(labels.astype(np.int64), minlength=num_classes)
    present = np.count_nonzero(counts)
    return {c: float(labels.size / (present * n)) if n else 0.0 for c, n in enumerate(counts)}
