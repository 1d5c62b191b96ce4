"""Outputs that are computed again instead of being kept: the same numbers, other operations."""

import numpy as np
import pytest
import tensorflow as tf
from helpers import CLASSES, SHAPE, assert_close, batch, build, noise, slow_but, with_norm
from tensorflow import keras

from tf_pcl import networks, surgery
from tf_pcl.methods import METHODS
from tf_pcl.surgery import recompute


def trained(model, digits, steps=3):
    """Losses of a few steps, the weights after them, and how many convolutions a step has."""
    data = batch(model, digits)
    step = tf.function(model.train_step)
    losses = [float(step(data)["loss"]) for _ in range(steps)]
    graph = step.get_concrete_function(data).graph.as_graph_def()
    convolutions = sum(node.op == "Conv2D" for node in graph.node)
    return losses, [w.numpy() for w in model.weights], convolutions


def with_and_without(method, digits, **kwargs):
    """What `trained` gives of a method, as usual and with outputs that are computed again."""
    models = (build(method, with_norm, recompute=on) for on in (False, True))
    return [trained(model, digits, **kwargs) for model in models]


@pytest.mark.parametrize("method", slow_but(METHODS, "baseline"))
def test_no_number_changes(method, digits):
    usual, again = with_and_without(method, digits)
    np.testing.assert_allclose(again[0], usual[0], rtol=1e-6)
    assert_close(again[1], usual[1], rtol=1e-5, atol=1e-6)
    assert again[2] > usual[2]


def test_teachers_are_computed_once(digits):
    """Twice: the trunk's convolution and those of three branches; once: those of their means."""
    usual, again = with_and_without("pcl", digits, steps=1)
    assert again[2] - usual[2] == 4


@pytest.mark.slow
def test_in_half_precision(digits):
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    usual, again = with_and_without("pcl", digits)
    np.testing.assert_allclose(again[0], usual[0], rtol=1e-3)


@pytest.mark.slow
def test_on_two_replicas(digits, two_replicas):
    losses = []
    for on in (False, True):
        with two_replicas.scope():
            model = build("pcl", with_norm, recompute=on)
        one = tf.data.Dataset.from_tensors(batch(model, digits)).repeat()
        losses.append(model.fit(one, epochs=2, steps_per_epoch=2, verbose=0).history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-6)


@pytest.mark.parametrize("method", slow_but(["baseline", "pcl"], "baseline"))
def test_statistics_of_two_replicas_are_collected_once(method, digits, two_replicas):
    """Within a part, a replica waits for the others, which go on to the next pass or part."""

    def network(input_shape, num_classes):
        made = with_norm(input_shape, num_classes)
        made.get_layer("n2").fused = False
        return made

    usual = build(method, network)
    images = batch(usual, digits)
    usual.train_step(images)
    with two_replicas.scope():
        model = build(method, network, recompute=True)
    assert surgery.synchronize(model) == []
    model.fit(tf.data.Dataset.from_tensors(images), verbose=0)
    norms = [layer for layer in surgery.graph.sublayers(model) if hasattr(layer, "momentum")]
    assert norms and all(layer.momentum == 0.99 for layer in norms)
    assert_close(
        [w.numpy() for w in model.non_trainable_weights],
        [w.numpy() for w in usual.non_trainable_weights],
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("name", ["resnet14", "vgg16", "densenet40_12"])
def test_parts_together_are_the_network(name):
    network = networks.build(name, (32, 32, 3), 10)
    chain = recompute.parts(network)
    assert len(chain) > 2 and chain[-1].made == {0: 0}
    x = images = tf.constant(noise(2, 32, 32, 3), tf.float32)
    for part in chain:
        x = tf.nest.flatten(part.model(x))[0]
    np.testing.assert_array_equal(x, network(images))


def test_what_may_give_something_else_again_is_not_repeated():
    dropped = with_norm(SHAPE, CLASSES, [keras.layers.Dropout(0.5)])
    own = with_norm(SHAPE, CLASSES, [keras.layers.Lambda(tf.identity)])
    plain = with_norm(SHAPE, CLASSES)
    more = with_norm(SHAPE, CLASSES, [keras.layers.BatchNormalization(renorm=True)])
    waits = with_norm(SHAPE, CLASSES, [keras.layers.BatchNormalization(synchronized=True)])
    others = (dropped, False), (own, False), (more, False), (waits, False)
    for network, repeatable in (*others, (plain, True)):
        assert all(part.repeatable for part in recompute.parts(network)) == repeatable
