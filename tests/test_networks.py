import re

import numpy as np
import pytest
import tensorflow as tf
from tensorflow import keras

from conftest import noise, without_norm
from tf_pcl import networks
from tf_pcl.errors import UserError


def count(model):
    return sum(int(np.prod(w.shape)) for w in model.trainable_weights)


def residual_toy(input_shape=(8, 8, 3), num_classes=5):
    images = keras.Input(input_shape, name="images")
    a = keras.layers.Conv2D(4, 3, padding="same", name="a")(images)
    b = keras.layers.Conv2D(4, 3, padding="same", name="b")(a)
    c = keras.layers.Add(name="c")([a, b])
    d = keras.layers.GlobalAveragePooling2D(name="features")(c * 2.0 + a)
    return keras.Model(images, keras.layers.Dense(num_classes, name="logits")(d), name="toy")


@pytest.mark.parametrize("name, classes, parameters", [
    ("resnet32", 100, 472_756), ("resnet8", 10, 78_042), ("resnet14", 10, 175_258), ("resnet20", 10, 272_474)])
def test_parameter_counts(name, classes, parameters):
    network = networks.build(name, (32, 32, 3), classes)
    assert count(network) == parameters
    trunk, branch = networks.split(network)
    assert count(trunk) + count(branch) == parameters
    assert trunk.output_shape[1:] == (16, 16, 32)


@pytest.mark.parametrize("build", [networks.resnet8, without_norm])
def test_trunk_and_branch_compute_what_the_network_does(build):
    network = build((8, 8, 1), 10)
    x = tf.constant(noise(5, 8, 8, 1), tf.float32)
    trunk, branch = networks.split(network)
    got = branch(trunk(x))
    logits = got["logits"] if build is networks.resnet8 else tf.nn.softmax(got["logits"])
    np.testing.assert_allclose(logits, network(x), atol=1e-5)
    assert branch.output_shape["features"][-1] in (16, 64)
    # A copy: the original stays as it is.
    trunk.layers[1].kernel.assign_add(tf.ones_like(trunk.layers[1].kernel))
    assert not np.allclose(branch(trunk(x))["logits"], got["logits"])
    again = networks.split(network)
    np.testing.assert_allclose(again[1](again[0](x))["logits"], got["logits"], atol=1e-5)


def test_cut_points_lie_outside_residual_blocks():
    points = networks.cut_points(residual_toy())
    assert {"a", "features"} < set(points) and not {"b", "c", "images", "logits"} & set(points)
    points = networks.cut_points(networks.resnet8((8, 8, 1), 10))
    assert {"stage_1", "stage_2", "stage_3"} < set(points)
    assert len(points) == 3 + 2 * 3 + 1, "stem of three layers, each block's sum and ReLU, features; nothing inside a block"


def test_every_cut_point_cuts_and_every_other_layer_is_refused_with_the_points_named():
    network = residual_toy()
    x = tf.constant(noise(2, 8, 8, 3), tf.float32)
    points = [name for name in networks.cut_points(network) if name != "features"]
    for layer in network.layers:
        if layer.name in points:
            trunk, branch = networks.split(network, layer.name)
            np.testing.assert_allclose(branch(trunk(x))["logits"], network(x), rtol=1e-4)
            assert networks.clone(branch)(trunk(x))["features"].shape == (2, 4)
        else:
            with pytest.raises(UserError, match=re.escape("possible: " + ", ".join(points))):
                networks.split(network, layer.name)
    with pytest.raises(UserError, match="give --split_at. Layers where a cut is possible: a"):
        networks.split(network)


@pytest.mark.parametrize("name, at", [("MobileNetV2", "block_12_add"), ("EfficientNetB0", "block5c_add"),
                                      ("ResNet50", "conv4_block6_out"), ("DenseNet121", "pool4_pool")])
def test_networks_of_keras_applications_split(name, at):
    network = networks.build(f"applications.{name}", (32, 32, 3), 7)
    trunk, branch = networks.split(network, at)
    assert count(trunk) + count(branch) == count(network)
    assert branch.output_shape["logits"] == (None, 7)
    assert networks.standardises_itself(network) == (name == "EfficientNetB0")


def test_clones_of_seeded_layers_differ_by_salt():
    images = keras.Input((4,))
    x = keras.layers.Dense(3, kernel_initializer=keras.initializers.GlorotUniform(seed=1))(images)
    network = keras.Model(images, x)
    one, same, other = (networks.clone(network, salt=s).get_weights()[0] for s in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.01


@pytest.mark.parametrize("end", ["layer", "activation", "fused"])
def test_a_softmax_at_the_end_is_taken_off(end):
    images = keras.Input((8, 8, 1))
    x = keras.layers.GlobalAveragePooling2D()(images)
    x = keras.layers.Dense(4, activation="softmax" if end == "fused" else None, dtype="float32")(x)
    x = {"layer": keras.layers.Softmax(), "activation": keras.layers.Activation("softmax")}.get(end, lambda x: x)(x)
    network = keras.Model(images, x)
    given = tf.constant(noise(3, 8, 8, 1), tf.float32)
    logits = networks.with_features(network)(given)["logits"]
    np.testing.assert_allclose(tf.nn.softmax(logits), network(given), atol=1e-6)
    assert np.abs(np.sum(logits, -1) - 1).max() > 1e-3


def test_networks_that_cannot_serve_are_refused():
    images = keras.Input((8, 8, 1))
    flat = keras.layers.GlobalAveragePooling2D()(images)
    sigmoid = keras.Model(images, keras.layers.Dense(3, activation="sigmoid")(flat))
    headless = keras.Model(images, keras.layers.ReLU()(flat))
    two = keras.Model(images, [flat, flat])

    class Own(keras.Model):
        pass

    for network, text in ((sigmoid, "applies sigmoid"), (headless, "Dense layer"), (two, "2 outputs"), (Own(), "functional")):
        with pytest.raises(UserError, match=text):
            networks.with_features(network)


def test_names(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(
        "from tensorflow import keras\n"
        "def build(input_shape, num_classes):\n"
        "    return keras.Sequential([keras.Input(input_shape), keras.layers.Flatten(), keras.layers.Dense(num_classes)])\n"
        "def wrong(input_shape, num_classes):\n"
        "    return 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert networks.build("my_models:build", (8, 8, 1), 3).output_shape == (None, 3)
    for name, text in (("resnet31", "Did you mean resnet32"), ("applications.MobilNetV2", "Did you mean MobileNetV2"),
                       ("nowhere:build", "No module named 'nowhere'"), ("my_models:absent", "absent"),
                       ("my_models:wrong", "returned int"), ("applications.NAME", "Allowed|is not known"),
                       ("applications.VGG16", "cannot be built for images")):
        with pytest.raises(UserError, match=text):
            networks.build(name, (8, 8, 1), 3)


def test_standardise_gives_zero_mean_and_unit_deviation():
    images = noise(20, 8, 8, 3)
    layer = networks.standardise(images.mean((0, 1, 2)), images.std((0, 1, 2)))
    out = layer(tf.constant(images)).numpy()
    np.testing.assert_allclose(out.mean((0, 1, 2)), 0, atol=1e-3)
    np.testing.assert_allclose(out.std((0, 1, 2)), 1, atol=1e-3)
