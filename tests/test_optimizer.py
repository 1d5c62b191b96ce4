"""The papers' SGD: its steps against NumPy, its config."""

import gc
import json

import numpy as np
import oracle
import pytest
import tensorflow as tf
from helpers import SHAPE, assert_close, build, noise, without_norm
from tensorflow import keras

from tf_pcl import networks
from tf_pcl.methods import METHODS
from tf_pcl.optimizer import CoupledSGD, recipe

rng = np.random.RandomState(0)


@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_with_coupled_decay_through_a_drop_of_the_rate(nesterov):
    w0, gradients = rng.randn(4, 3), rng.randn(12, 4, 3)
    rates = [0.1] * 6 + [0.01] * 6
    w = tf.Variable(w0, dtype=tf.float64)
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([5], [0.1, 0.01])
    optimizer = CoupledSGD(schedule, nesterov=nesterov, coupled_decay=0.05)
    for g, want in zip(gradients, oracle.sgd(w0, gradients, rates, decay=0.05, nesterov=nesterov)):
        optimizer.apply_gradients([(tf.constant(g), w)])
        np.testing.assert_allclose(w.numpy(), want, atol=1e-6)


@pytest.mark.parametrize("nesterov", [True, False])
def test_vectors_together_take_the_steps_that_each_takes_alone(nesterov):
    shapes = [(3,), (2, 3), (5,), (1,), ()]
    values = [np.asarray(rng.randn(*shape), np.float32) for shape in shapes]
    together, alone = ([tf.Variable(v) for v in values] for _ in range(2))
    half = [tf.Variable(tf.ones([2], tf.float16)) for _ in range(2)]
    steps = []
    for held in (together, alone):
        held.append(half.pop())
        one = CoupledSGD(0.1, nesterov=nesterov, coupled_decay=0.05)
        one.set_decay(held[2:3], 0.3)
        one.build(held)
        steps.append(one)
    assert steps[0].weight_decay is None
    for _ in range(3):
        gradients = [tf.cast(rng.randn(*w.shape), w.dtype) for w in together]
        steps[0].apply_gradients(zip(gradients, together))
        for g, w in zip(gradients, alone):
            steps[1].update_step(g, w)
    assert_close(together + steps[0].velocities, alone + steps[1].velocities, rtol=0)


def test_recipe_scales_with_the_length_of_training():
    optimizer = recipe(epochs=20, steps_per_epoch=10)
    assert optimizer.coupled_decay == 5e-4 and optimizer.momentum == 0.9 and optimizer.nesterov
    rate = optimizer._learning_rate
    np.testing.assert_allclose(
        [float(rate(s)) for s in (0, 99, 100, 149, 150)], [0.1, 0.1, 0.01, 0.01, 0.001], rtol=1e-6
    )


def weights():
    """Two layers' weights, of which those of the second one share their name with the first's."""
    return [tf.Variable(tf.ones([3]) * (i + 1.0), name=name) for i, name in enumerate("abb")]


@pytest.mark.parametrize("where", ["optimizers", "saving"])
def test_a_deserialised_optimizer_takes_the_same_step(where):
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([2], [0.2, 0.01])
    made = CoupledSGD(schedule, momentum=0.8, nesterov=False, coupled_decay=0.1)
    mine, its = weights()[:2], weights()[:2]
    made.set_decay(mine[1:], 0.5)
    if where == "optimizers":
        text = json.dumps(keras.optimizers.serialize(made))
        again = keras.optimizers.deserialize(json.loads(text))
    else:
        again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(made))
    assert isinstance(again, CoupledSGD) and again.get_config() == made.get_config()
    for step in range(4):
        gradients = [tf.ones([3]) * step, -tf.ones([3])]
        made.apply_gradients(zip(gradients, mine))
        again.apply_gradients(zip(gradients, its))
    assert_close(mine, its, rtol=0)
    # Both decays act.
    plain = weights()[:2]
    other = CoupledSGD(schedule, momentum=0.8, nesterov=False, coupled_decay=0.1)
    for step in range(4):
        other.apply_gradients(zip([tf.ones([3]) * step, -tf.ones([3])], plain))
    np.testing.assert_array_equal(plain[0], mine[0])
    assert np.abs(plain[1] - mine[1]).max() > 0.1


def test_weights_of_one_name_have_their_own_decays_but_no_config():
    a, b, b2 = variables = weights()
    made = CoupledSGD(0.1, coupled_decay=0.0)
    made.set_decay([b2], 0.5)
    assert made.get_config()["decay_by_name"] == {b2.name: 0.5} and b.name == b2.name
    made.apply_gradients([(tf.zeros([3]), w) for w in variables])
    assert a.numpy()[0] == 1 and b.numpy()[0] == 2 and b2.numpy()[0] < 3
    with pytest.raises(ValueError, match="give their layers different names"):
        made.get_config()


def test_a_method_s_own_decay_is_in_the_config():
    model = METHODS["ffl"](networks.resnet8((8, 8, 1), 10), peers=2)
    model.compile(epochs=2, steps_per_epoch=3)
    model.optimizer.build(model.trainable_weights)
    by_name = model.optimizer.get_config()["decay_by_name"]
    (own,) = model.decay_exceptions
    assert by_name == {w.name: own[1] for w in own[0]} and len(by_name) > 3


def test_the_graph_of_a_step_goes_with_its_model():
    def steps():
        keras.backend.clear_session()
        gc.collect()
        graphs = [g for g in gc.get_objects() if type(g).__name__ == "FuncGraph"]
        return sum(graph.name == "train_function" for graph in graphs)

    before = steps()
    model = build("baseline", without_norm)
    model.fit(noise(8, *SHAPE), np.arange(8), verbose=0)
    assert steps() == before + 1
    del model
    assert steps() == before
