"""BatchNorm is folded where it can be, the answers stay, and all else is left or refused."""

import numpy as np
import pytest
import tensorflow as tf
from helpers import CLASSES, SHAPE, build, noise, slow_but
from tensorflow import keras
from tensorflow.keras import layers as L

from tf_pcl import data, networks, surgery
from tf_pcl.data.datasets import Arrays
from tf_pcl.deploy import artifacts
from tf_pcl.errors import Stopped, UserError
from tf_pcl.surgery.graph import leaves


def drawn(network):
    """A network with statistics, factors and offsets as after a training."""
    random = np.random.RandomState(0)
    for layer in leaves(network):
        for weight in layer.weights:
            if isinstance(layer, L.BatchNormalization):
                weight.assign(random.uniform(0.5, 1.5, weight.shape))
    return network


def norms(network):
    return [one.name for one in leaves(network) if isinstance(one, L.BatchNormalization)]


def same(network, folded, apart=1e-5):
    images = tf.constant(np.random.RandomState(1).uniform(-1, 1, (9, *network.input_shape[1:])))
    a, b = (model(images, training=False).numpy() for model in (network, folded))
    np.testing.assert_allclose(a, b, rtol=0, atol=apart * max(1, np.abs(a).max()))


@pytest.mark.parametrize(
    "first, more",
    [
        (L.Conv2D, dict(filters=6, kernel_size=3)),
        (L.Conv2D, dict(filters=6, kernel_size=3, groups=2, use_bias=False, padding="same")),
        (L.DepthwiseConv2D, dict(kernel_size=3, depth_multiplier=3)),
        (L.DepthwiseConv2D, dict(kernel_size=3, use_bias=False, strides=2)),
        (L.SeparableConv2D, dict(filters=5, kernel_size=3, depth_multiplier=2)),
        (L.Dense, dict(units=5, use_bias=False)),
    ],
)
@pytest.mark.parametrize("norm", [dict(), dict(scale=False), dict(center=False)])
def test_every_kind_of_layer_takes_it_in(first, more, norm):
    images = keras.Input((6, 6, 4))
    x = L.ReLU()(L.BatchNormalization(name="n", **norm)(first(**more)(images)))
    network = drawn(keras.Model(images, L.Dense(3)(L.GlobalAveragePooling2D()(x))))
    before = network.get_weights()
    made = surgery.fold_batch_norm(network)
    assert (made.folded, made.left, norms(made.network)) == (["n"], [], [])
    same(network, made.network)
    np.testing.assert_equal(network.get_weights(), before)
    assert [w.shape for w in made.network.weights if "bias" in w.name][0] == (x.shape[-1],)


class Doubled(L.Conv2D):
    def call(self, x):
        return 2 * super().call(x)


def read_twice(x):
    x = L.Conv2D(4, 3, padding="same")(x)
    return L.Add()([L.BatchNormalization(name="n")(x), x])


def with_activation(x):
    return L.BatchNormalization(name="n")(L.Conv2D(4, 3, activation="relu")(x))


def layer_twice(x):
    conv = L.Conv2D(4, 3, padding="same")
    return L.BatchNormalization(name="n")(conv(conv(x)))


def of_the_users(x):
    return L.BatchNormalization(name="n")(Doubled(4, 3)(x))


def other_axis(x):
    return L.BatchNormalization(axis=1, name="n")(L.Conv2D(4, 3)(x))


def of_its_batch(x):
    return L.BatchNormalization(name="n")(L.Conv2D(4, 3)(x), training=True)


def in_half(x):
    return L.BatchNormalization(name="n")(L.Conv2D(4, 3, dtype="mixed_bfloat16")(x))


def before_it(x):
    return L.Conv2D(4, 3)(L.ReLU()(L.BatchNormalization(name="n")(x)))


def called_otherwise(x):
    conv = L.Conv2D(4, 3)
    x = L.BatchNormalization(name="n")(conv(x))
    conv.call = lambda x: x[..., 1:-1, 1:-1, :]
    return x


@pytest.mark.parametrize(
    "body",
    [
        read_twice,
        with_activation,
        layer_twice,
        of_the_users,
        other_axis,
        of_its_batch,
        in_half,
        before_it,
        called_otherwise,
    ],
)
def test_elsewhere_it_is_left(body):
    images = keras.Input((8, 8, 4))
    x = L.BatchNormalization(name="other")(L.Conv2D(4, 3)(body(images)))
    network = drawn(keras.Model(images, L.GlobalAveragePooling2D()(x)))
    made = surgery.fold_batch_norm(network)
    assert (made.folded, made.left, norms(made.network)) == (["other"], ["n"], ["n"])
    same(network, made.network)


ZOO = {
    "resnet32": (33, 0),
    "resnet18": (20, 0),
    # Each layer has one between its two convolutions, and one behind the shared input.
    "densenet40_12": (18, 21),
    "vgg16": (13, 0),
    "wrn20_8": (22, 0),
}


@pytest.mark.parametrize("name", slow_but(ZOO, "resnet32"))
def test_networks_of_the_zoo(name):
    network = drawn(networks.build(name, (32, 32, 3), 10))
    made = surgery.fold_batch_norm(network)
    assert (len(made.folded), len(made.left)) == ZOO[name]
    same(network, made.network, 1e-4)


def some_digits():
    digits = data.load("digits")
    some = Arrays(digits.test.images[:60], digits.test.labels[:60])
    return data.ImageData("digits", digits.classes, SHAPE, some, some, digits.mean, digits.std)


def test_a_deployed_network_with_parts_within_it():
    network = drawn(build("one", "resnet8").deployed())
    made, facts = artifacts.folded(network, some_digits())
    found = facts["batch_norm"]
    assert found["folded"] == len(norms(network)) == 9 and found["left"] == [] == norms(made)
    assert found["largest_difference"] < 1e-4
    images = noise(5, *SHAPE)
    np.testing.assert_allclose(network(images), made(images), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_tflite_folds_by_itself(tmp_path):
    network, digits = drawn(build("baseline", "resnet8").deployed()), some_digits()
    operations = []
    for one in (network, artifacts.folded(network, digits)[0]):
        path = artifacts._written("tflite", artifacts.Source(one, digits, str(tmp_path)))
        details = tf.lite.Interpreter(path)._get_ops_details()
        operations.append([row["op_name"] for row in details if row["op_name"] != "DELEGATE"])
    assert operations[0] == operations[1] and operations[0].count("CONV_2D") == 9
    # The mean of the images, and none of a BatchNorm.
    assert operations[0].count("MUL") + operations[0].count("SUB") <= 2


def test_what_cannot_be_shown_equal_is_refused_in_one_line(monkeypatch):
    network = build("baseline", "resnet8").deployed()
    usual = surgery.fold._values

    def wrong(layer, norm):
        *kernels, bias = usual(layer, norm)
        return [*kernels, bias + 0.01]

    monkeypatch.setattr(surgery.fold, "_values", wrong)
    with pytest.raises(Stopped, match="logits differ by up to .* nothing was written"):
        artifacts.folded(network, some_digits())
    without = build("baseline", "without_norm").deployed()
    with pytest.raises(UserError, match="none of the network's 0 BatchNorm layers directly"):
        artifacts.folded(without, some_digits())
    assert without.output_shape == (None, CLASSES)
