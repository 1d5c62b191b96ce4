import numpy as np
import oracle
import pytest
import tensorflow as tf

from tf_pcl import losses

rng = np.random.RandomState(0)
Z, Q, Y = 4 * rng.randn(16, 10), 4 * rng.randn(16, 10), rng.randint(0, 10, 16)


def test_cross_entropy():
    assert losses.cross_entropy(Y, tf.constant(Z, tf.float32)).numpy() == pytest.approx(
        oracle.ce(Y, Z), rel=1e-5
    )


@pytest.mark.parametrize("T", [1.0, 3.0, 20.0])
def test_distillation(T):
    got = losses.distillation(tf.constant(Q, tf.float32), tf.constant(Z, tf.float32), T).numpy()
    assert got == pytest.approx(
        T**2 * oracle.kl(oracle.softmax(Q, T), oracle.softmax(Z, T)), rel=1e-5
    )


def test_distillation_of_equal_logits_is_zero_and_extremes_are_finite():
    z = tf.constant(Z, tf.float32)
    assert abs(losses.distillation(z, z, 3.0).numpy()) < 1e-6
    assert np.isfinite(losses.distillation(1e4 * z, -1e4 * z, 1.0).numpy())


def test_gradient_is_cut_at_the_teacher_unless_asked():
    q, z = tf.Variable(Q), tf.Variable(Z)
    for cut in (True, False):
        with tf.GradientTape() as tape:
            loss = losses.distillation(q, z, 3.0, cut=cut)
        to_teacher, to_student = tape.gradient(loss, [q, z])
        assert (to_teacher is None) == cut
        # d/dz T² KL = T (p − q) / B.
        want = 3.0 * (oracle.softmax(Z, 3.0) - oracle.softmax(Q, 3.0)) / len(Z)
        np.testing.assert_allclose(to_student.numpy(), want, atol=1e-6)


def test_low_precision_logits_are_compared_in_float32():
    z = tf.constant(Z, tf.bfloat16)
    assert losses.cross_entropy(Y, z).dtype == losses.distillation(z, z).dtype == tf.float32
