"""The losses that the methods share: functions of logits [B, C] that return a float32 scalar, a mean over the batch."""
import tensorflow as tf


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
