"""The losses that the methods share: functions of logits [B, C] that return a float32 scalar, a mean over the batch."""

import tensorflow as tf

from tf_pcl import compat


def cross_entropy(labels, logits):
    """CE(y, z) of class indices int [B] against logits [B, C]."""
    logits = tf.cast(logits, tf.float32)
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))


def distillation(teacher, student, temperature=1.0, cut=True):
    """T² · KL(softmax(z_teacher / T) ‖ softmax(z_student / T)) (Hinton et al., 2015).

    Args:
      teacher, student: logits [B, C].
      temperature: T > 0. The factor T² keeps the size of the gradient when T grows.
      cut: whether the teacher's logits are constants, so that no gradient flows into it.
    """
    if cut:
        teacher = tf.stop_gradient(teacher)
    log_q = tf.nn.log_softmax(tf.cast(teacher, tf.float32) / temperature)
    log_p = tf.nn.log_softmax(tf.cast(student, tf.float32) / temperature)
    return temperature**2 * tf.reduce_mean(tf.reduce_sum(tf.exp(log_q) * (log_q - log_p), axis=-1))


def pairwise_distances(features):
    """Pairwise Euclidean distances, divided by their mean over those that are not zero.

    Args:
      features: [B, d].
    Returns:
      float32 [B, B].
    """
    f = tf.cast(features, tf.float32)
    # Distances come as ‖u‖² + ‖v‖² − 2 u·v: around the mean these are small, and little is lost in their difference.
    d = compat.pairwise_distance(f - tf.stop_gradient(tf.reduce_mean(f, axis=0)))
    apart = tf.cast(tf.math.count_nonzero(d), tf.float32)
    return tf.math.divide_no_nan(d * apart, tf.reduce_sum(d))


def triplet_angles(features):
    """Cosines of the angles of all triples of features; 0 where two of them coincide with the corner.

    Args:
      features: [B, d].
    Returns:
      float32 [B, B, B], at [v, u, w] cos∠(u, v, w), the corner being v.
    """
    # The gradients of the two uses are added apart from those of other uses: the sum of two has but one order.
    f = tf.identity(tf.cast(features, tf.float32))
    to = f[None] - f[:, None]  # [v, u]: from v to u
    squared = tf.reduce_sum(tf.square(to), axis=-1, keepdims=True)
    apart = squared > 0
    directions = to * tf.where(apart, tf.math.rsqrt(tf.where(apart, squared, 1.0)), 0.0)
    return tf.matmul(directions, directions, transpose_b=True)
