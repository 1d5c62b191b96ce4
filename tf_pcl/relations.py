"""How the images of a batch relate to each other, from their features (Relational Knowledge Distillation; Park, Kim, Lu and
Cho, CVPR 2019). Features that coincide, as those of the same image twice, have finite values and gradients."""
import tensorflow as tf

from tf_pcl import addons


def distances(features):
    """Pairwise Euclidean distances, divided by their mean over those that are not zero.

    Args:
      features: [B, d].
    Returns:
      float32 [B, B].
    """
    f = tf.cast(features, tf.float32)
    # Distances come as ‖u‖² + ‖v‖² − 2 u·v: around the mean these are small, and little is lost in their difference.
    d = addons.load().losses.metric_learning.pairwise_distance(f - tf.stop_gradient(tf.reduce_mean(f, axis=0)))
    apart = tf.cast(tf.math.count_nonzero(d), tf.float32)
    return tf.math.divide_no_nan(d * apart, tf.reduce_sum(d))


def angles(features):
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
