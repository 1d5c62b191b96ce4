import numpy as np
import oracle
import pytest
import tensorflow as tf
from tensorflow import keras

from tf_pcl.optimizer import SGD, recipe

rng = np.random.RandomState(0)


@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_with_coupled_decay_through_a_drop_of_the_rate(nesterov):
    w0, gradients = rng.randn(4, 3), rng.randn(12, 4, 3)
    rates = [0.1] * 6 + [0.01] * 6
    w = tf.Variable(w0, dtype=tf.float64)
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([5], [0.1, 0.01])
    optimizer = SGD(schedule, nesterov=nesterov, coupled_decay=0.05)
    for g, want in zip(gradients, oracle.sgd(w0, gradients, rates, decay=0.05, nesterov=nesterov)):
        optimizer.apply_gradients([(tf.constant(g), w)])
        np.testing.assert_allclose(w.numpy(), want, atol=1e-6)


def test_recipe_scales_with_the_length_of_training():
    optimizer = recipe(epochs=20, steps_per_epoch=10)
    assert optimizer.coupled_decay == 5e-4 and optimizer.momentum == 0.9 and optimizer.nesterov
    rate = optimizer._learning_rate
    np.testing.assert_allclose(
        [float(rate(s)) for s in (0, 99, 100, 149, 150)], [0.1, 0.1, 0.01, 0.01, 0.001], rtol=1e-6
    )


def test_config_makes_the_same_optimizer():
    made = SGD.from_config(SGD(0.2, momentum=0.8, nesterov=False, coupled_decay=1e-3).get_config())
    assert (made.momentum, made.nesterov, made.coupled_decay) == (0.8, False, 1e-3)
    assert float(made.learning_rate) == pytest.approx(0.2)
