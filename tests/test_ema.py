import numpy as np
import oracle
import pytest
import tensorflow as tf
from helpers import assert_close
from tensorflow import keras

from tf_pcl.ema import Shadow
from tf_pcl.errors import UserError
from tf_pcl.networks import resnet8


def test_shadow_follows_the_recursion_and_leaves_statistics_alone():
    source, shadow = (resnet8((8, 8, 1), 10) for _ in range(2))
    ema = Shadow(source, shadow)
    np.testing.assert_equal(source.get_weights(), shadow.get_weights())
    statistics = [w.numpy() for w in shadow.non_trainable_weights]
    want = [w.numpy().astype(np.float64) for w in shadow.trainable_weights]
    for g in range(1, 6):
        for w in source.weights:
            w.assign_add(tf.random.normal(w.shape, seed=g))
        ema.update(oracle.phi(g, 0.7))
        want = [
            oracle.phi(g, 0.7) * t + (1 - oracle.phi(g, 0.7)) * s.numpy()
            for t, s in zip(want, source.trainable_weights)
        ]
    assert_close(shadow.trainable_weights, want, atol=1e-5)
    np.testing.assert_equal([w.numpy() for w in shadow.non_trainable_weights], statistics)


def test_statistics_are_averaged_where_asked_for():
    source, shadow = (resnet8((8, 8, 1), 10) for _ in range(2))
    ema = Shadow(source, shadow)
    want = [w.numpy().astype(np.float64) for w in shadow.weights]
    for g in range(1, 4):
        for w in source.weights:
            w.assign_add(tf.random.normal(w.shape, seed=g))
        ema.update(oracle.phi(g, 0.7), statistics=True)
        phi = oracle.phi(g, 0.7)
        want = [phi * t + (1 - phi) * s.numpy() for t, s in zip(want, source.weights)]
    assert_close(shadow.weights, want, atol=1e-5)


def test_models_built_otherwise_are_refused():
    dense = lambda units: keras.Sequential([keras.Input((3,)), keras.layers.Dense(units)])
    with pytest.raises(ValueError, match="different weights"):
        Shadow(dense(4), dense(5))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_wide_weights_are_averaged_and_short_ones_refused(dtype):
    made = lambda: keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, dtype=dtype)])
    source, shadow = made(), made()
    if dtype == "float64":
        ema = Shadow(source, shadow)
        source.weights[1].assign(tf.ones([4], dtype))
        ema.update(tf.constant(0.75))
        np.testing.assert_allclose(shadow.weights[1].numpy(), 0.25)
    else:
        with pytest.raises(UserError, match=f"the policy mixed_{dtype}"):
            Shadow(source, shadow)
