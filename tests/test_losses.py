import numpy as np
import oracle
import pytest
import tensorflow as tf

from tf_pcl import losses
from tf_pcl.errors import UserError
from tf_pcl.methods.byot import squared_distance
from tf_pcl.methods.ctsl_mkt import mutual_huber

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


W, SOFT = rng.uniform(0, 3, 16), oracle.softmax(rng.randn(16, 10))
W[3] = 0.0
weighted = lambda: losses.weighted(tf.constant(W, tf.float32))


def test_cross_entropy_of_soft_labels_and_with_weights():
    z = tf.constant(Z, tf.float32)
    assert losses.cross_entropy(SOFT, z).numpy() == pytest.approx(oracle.ce(SOFT, Z), rel=1e-5)
    one_hot = losses.cross_entropy(np.eye(10)[Y], z).numpy()
    assert one_hot == pytest.approx(oracle.ce(Y, Z), rel=1e-5)
    with weighted():
        for y in (Y, SOFT):
            got = losses.cross_entropy(y, z).numpy()
            assert got == pytest.approx(oracle.ce(y, Z, W), rel=1e-5)
    # The weights are those of this batch alone.
    assert losses.cross_entropy(Y, z).numpy() == pytest.approx(oracle.ce(Y, Z), rel=1e-5)


def test_distillation_and_hints_with_weights():
    q, z = tf.constant(Q, tf.float32), tf.constant(Z, tf.float32)
    with weighted():
        got, hint = losses.distillation(q, z, 3.0).numpy(), squared_distance(q, z).numpy()
    want = 9 * oracle.kl(oracle.softmax(Q, 3.0), oracle.softmax(Z, 3.0), W)
    assert got == pytest.approx(want, rel=1e-5)
    assert hint == pytest.approx(np.mean(W * np.sum((Q - Z) ** 2, -1)), rel=1e-5)


@pytest.mark.parametrize("rank", [2, 3])
def test_a_pair_or_triple_has_the_geometric_mean_of_its_weights(rank):
    x, y = 3 * rng.randn(2, *[16] * rank)
    huber = lambda r: np.where(np.abs(r) < 1, r**2 / 2, np.abs(r) - 0.5)
    of_group = lambda index: np.prod(W[list(index)]) ** (1 / rank)
    want = 2 * np.mean([of_group(i) * huber(r) for i, r in np.ndenumerate(x - y)])
    with weighted():
        got = mutual_huber(tf.constant(x, tf.float32), tf.constant(y, tf.float32)).numpy()
    assert got == pytest.approx(want, rel=1e-5)


def test_balanced_class_weights():
    labels = [0] * 6 + [1] * 3 + [3]
    weights = losses.balanced_class_weights(labels, 4)
    assert weights == pytest.approx({0: 10 / 18, 1: 10 / 9, 2: 0.0, 3: 10 / 3})
    assert np.mean([weights[c] for c in labels]) == pytest.approx(1)
    for wrong in ([0, 4], [-1], [], [0.5]):
        with pytest.raises(UserError):
            losses.balanced_class_weights(wrong, 4)
