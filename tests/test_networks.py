import re

import numpy as np
import pytest
import tensorflow as tf
from helpers import flop, noise, without_norm
from tensorflow import keras

from tf_pcl import methods, networks, surgery
from tf_pcl.errors import UserError
from tf_pcl.methods.distiller import build_all
from tf_pcl.options import Options
from tf_pcl.surgery import graph
from tf_pcl.surgery.cuts import DEFAULT_TRUNK_SHARE
from tf_pcl.training import export
from tf_pcl.training.assemble import Assembly, method_arguments


def count(model):
    return sum(int(np.prod(w.shape)) for w in model.trainable_weights)


def residual_toy(input_shape=(8, 8, 3), num_classes=5):
    images = keras.Input(input_shape, name="images")
    a = keras.layers.Conv2D(4, 3, padding="same", name="a")(images)
    b = keras.layers.Conv2D(4, 3, padding="same", name="b")(a)
    c = keras.layers.Add(name="c")([a, b])
    d = keras.layers.GlobalAveragePooling2D(name="features")(c * 2.0 + a)
    return keras.Model(images, keras.layers.Dense(num_classes, name="logits")(d), name="toy")


@pytest.mark.parametrize(
    "name, parameters", [("resnet8", 78_042), ("resnet14", 175_258), ("resnet20", 272_474)]
)
def test_parameter_counts(name, parameters):
    """Those of the networks that are not in the tables; test_zoo.py has the others."""
    network = networks.build(name, (32, 32, 3), 10)
    assert count(network) == parameters
    trunk, branch = surgery.split(network)
    assert count(trunk) + count(branch) == parameters
    assert trunk.output_shape[1:] == (16, 16, 32)


@pytest.mark.parametrize("build", [networks.resnet8, without_norm])
def test_trunk_and_branch_compute_what_the_network_does(build):
    network = build((8, 8, 1), 10)
    x = tf.constant(noise(5, 8, 8, 1), tf.float32)
    trunk, branch = surgery.split(network)
    got = branch(trunk(x))
    logits = got["logits"] if build is networks.resnet8 else tf.nn.softmax(got["logits"])
    np.testing.assert_allclose(logits, network(x), atol=1e-5)
    assert branch.output_shape["features"][-1] in (16, 64)
    # The parts are the network's own layers: together they have its weights and no others.
    assert [w.ref() for w in network.weights] == [
        w.ref() for w in (*trunk.weights, *branch.weights)
    ]
    trunk.layers[1].kernel.assign_add(tf.ones_like(trunk.layers[1].kernel))
    changed = branch(trunk(x))["logits"]
    assert not np.allclose(changed, got["logits"])
    np.testing.assert_allclose(
        changed if build is networks.resnet8 else tf.nn.softmax(changed), network(x), atol=1e-3
    )


def test_cut_points_lie_outside_residual_blocks():
    points = surgery.cut_points(residual_toy())
    assert "a" in points and not {"b", "c", "images", "logits", "features"} & set(points)
    points = surgery.cut_points(networks.resnet8((8, 8, 1), 10))
    assert {"stage_1", "stage_2", "stage_3"} < set(points)
    assert len(points) == 3 + 2 * 3, (
        "stem of three layers, each block's sum and ReLU; nothing inside a block"
    )


def test_every_cut_point_cuts_and_every_other_layer_is_refused_with_the_points_named():
    network = residual_toy()
    x = tf.constant(noise(2, 8, 8, 3), tf.float32)
    points = surgery.cut_points(network)
    for layer in network.layers:
        if layer.name in points:
            trunk, branch = surgery.split(network, layer.name)
            np.testing.assert_allclose(branch(trunk(x))["logits"], network(x), rtol=1e-4)
            assert branch(trunk(x))["features"].shape == (2, 4)
        else:
            with pytest.raises(UserError, match=re.escape("possible: " + ", ".join(points))):
                surgery.split(network, layer.name)


def test_a_network_of_keras_applications():
    network = networks.build("applications.MobileNetV2", (32, 32, 3), 7)
    assert sum(surgery.costs(network).values()) == pytest.approx(flop(network), rel=1e-3)
    cut = surgery.propose_cut(network)
    assert cut.name == "block_12_add" and 0.6 < cut.share <= DEFAULT_TRUNK_SHARE
    trunk, branch = surgery.split(network)
    assert trunk.output_names == [cut.name] and count(trunk) + count(branch) == count(network)
    norms = [
        layer
        for model in (trunk, branch)
        for layer in model.layers
        if isinstance(layer, keras.layers.BatchNormalization)
    ]
    assert len(norms) == 52 and {layer.momentum for layer in norms} == {0.9}
    assert branch.output_shape == {
        "features": (None, 1280),
        "logits": (None, 7),
        "feature_map": (None, 1, 1, 1280),
    }


def small(end, shape=(8, 8, 3), **names):
    """Two convolutions, and what `end` makes of the map [B, 4, 4, 6]."""
    images = keras.Input(shape)
    x = keras.layers.Conv2D(4, 3, activation="relu", name=names.get("first", "first"))(images)
    x = keras.layers.Conv2D(6, 3, activation="relu", name=names.get("second", "second"))(x)
    return keras.Model(images, end(x), name="small")


def pool(x, **kwargs):
    return keras.layers.GlobalAveragePooling2D(**kwargs)(x)


def vector(x):
    return keras.layers.Dense(5, name="logits")(pool(x))


def probabilities(network, x):
    """Of a network that may give logits or probabilities."""
    z = network(x)
    z = z["logits"] if isinstance(z, dict) else z
    return z if np.allclose(tf.reduce_sum(z, -1), 1) and np.min(z) >= 0 else tf.nn.softmax(z)


Conv2D, Dense, Flatten = keras.layers.Conv2D, keras.layers.Dense, keras.layers.Flatten
ENDS = {
    "softmax layer": lambda x: keras.layers.Softmax()(vector(x)),
    "softmax activation": lambda x: keras.layers.Activation("softmax")(vector(x)),
    "softmax fused": lambda x: Dense(5, activation="softmax")(pool(x)),
    "softmax of tf fused": lambda x: Dense(5, activation=tf.nn.softmax)(pool(x)),
    "softmax of tf": lambda x: tf.nn.softmax(vector(x)),
    "log-softmax": lambda x: tf.nn.log_softmax(vector(x)),
    "log-softmax fused": lambda x: Dense(5, activation=tf.nn.log_softmax)(pool(x)),
    "cast": lambda x: tf.cast(vector(x), "float32"),
    "flatten": lambda x: Dense(5)(Flatten()(x)),
    "mean of tf": lambda x: Dense(5)(tf.reduce_mean(x, [1, 2])),
    "convolution": lambda x: Flatten()(Conv2D(5, 1)(pool(x, keepdims=True))),
    "convolution, two layers": lambda x: tf.nn.softmax(
        Flatten()(Conv2D(5, 1)(Conv2D(9, 1)(pool(x, keepdims=True))))
    ),
    "convolution, fused": lambda x: keras.layers.Reshape([5])(
        Conv2D(5, 1, activation="softmax")(pool(x, keepdims=True))
    ),
    "convolution, then mean": lambda x: keras.layers.Softmax()(
        pool(Conv2D(5, 1, use_bias=False)(x))
    ),
    "dense, then mean": lambda x: pool(Dense(5)(x)),
}


@pytest.mark.parametrize("end", ENDS)
def test_ends_that_give_logits(end):
    network = small(ENDS[end])
    for layer in network.layers:  # Biases other than 0.
        layer.set_weights([w + 0.1 * noise(*w.shape) / 255 for w in layer.get_weights()])
    x = tf.constant(noise(3, 8, 8, 3) / 255, tf.float32)
    trunk, branch = surgery.split(network, "first")
    got = branch(trunk(x))
    want = (
        probabilities(network, x)
        if end not in ("log-softmax", "log-softmax fused")
        else tf.exp(network(x))
    )
    np.testing.assert_allclose(tf.nn.softmax(got["logits"]), want, atol=1e-6)
    assert np.abs(np.sum(got["logits"], -1) - 1).max() > 1e-3, "logits, not probabilities"
    assert count(trunk) + count(branch) == count(network)
    # The logits are linear in the feature where no hidden layer is between; the map is that
    # before the pooling.
    if end != "convolution, two layers":
        *kernel, bias = (w.numpy() for w in graph.head(network).weights[:2])
        kernel, bias = (kernel[0], bias) if kernel else (bias, 0.0)
        logits = got["features"] @ kernel.reshape(-1, 5) + bias
        np.testing.assert_allclose(logits, got["logits"], atol=1e-6)
    assert got["features"].shape.rank == 2 and got["feature_map"].shape == (3, 4, 4, 6)


@pytest.mark.parametrize(
    "end, text",
    [
        (lambda x: keras.layers.Activation("sigmoid")(vector(x)), "applies sigmoid"),
        (lambda x: tf.sigmoid(vector(x)), "applies sigmoid"),
        (
            lambda x: keras.layers.Softmax()(Dense(5, activation="softmax")(pool(x))),
            "applies softmax",
        ),
        (lambda x: keras.layers.Softmax()(vector(x) / 2.0), "truediv"),
        (lambda x: keras.layers.Lambda(lambda z: tf.nn.softmax(z))(vector(x)), "Lambda"),
        (lambda x: keras.layers.Dropout(0.1)(vector(x)), "Dropout"),
        (lambda x: pool(Conv2D(5, 1, activation="relu")(x)), "applies relu .* before the average"),
        (lambda x: pool(keras.layers.Softmax()(Conv2D(5, 1)(x))), "Softmax"),
        (lambda x: pool(Conv2D(5, 3)(x)), r"kernel \(3, 3\)"),
        (lambda x: keras.layers.GlobalMaxPooling2D()(Conv2D(5, 1)(x)), "GlobalMaxPooling2D"),
        (lambda x: Flatten()(Conv2D(5, 1)(x)), "Flatten"),
        (lambda x: keras.layers.Conv1D(5, 1)(Dense(5)(keras.layers.Reshape((16, 6))(x))), "Conv1D"),
        (lambda x: Dense(5)(keras.layers.Reshape((16, 6))(x)), "gives outputs"),
    ],
)
def test_ends_that_give_none_are_refused_in_one_line(end, text):
    with pytest.raises(UserError, match=text) as e:
        surgery.split(small(end), "first")
    assert "\n" not in str(e.value)


def test_networks_that_cannot_serve_are_refused():
    images = keras.Input((8, 8, 1))
    flat = keras.layers.GlobalAveragePooling2D()(images)
    sigmoid = keras.Model(images, keras.layers.Dense(3, activation="sigmoid")(flat))
    headless = keras.Model(images, keras.layers.ReLU()(flat))
    two = keras.Model(images, [flat, flat])

    class Own(keras.Model):
        pass

    for network, text in (
        (sigmoid, "applies sigmoid"),
        (headless, "Dense layer"),
        (two, "2 outputs"),
        (Own(), "functional"),
        ([two, two], "2 networks were given"),
        (len, "must be a keras.Model"),
    ):
        with pytest.raises(UserError, match=text):
            surgery.with_features(network)


def test_costs():
    images = keras.Input((8, 6, 3))
    x = keras.layers.Conv2D(6, (3, 1), strides=2, padding="same", groups=3, name="grouped")(
        images
    )  # [4, 3, 6]
    x = keras.layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same", name="depthwise")(x)
    x = keras.layers.SeparableConv2D(5, 3, padding="same", name="separable")(x)
    x = keras.layers.Conv2DTranspose(7, 2, strides=2, name="transposed")(x)  # [8, 6, 7]
    twice = keras.layers.Dense(7, name="twice")
    x = twice(twice(x))
    x = keras.layers.Reshape((48, 7), name="tokens")(x)
    x = keras.layers.MultiHeadAttention(2, 3, name="attention")(x, x)
    network = keras.Model(
        images,
        keras.layers.Dense(4, name="logits")(keras.layers.GlobalAveragePooling1D(name="pool")(x)),
    )
    want = {
        "grouped": 12 * 3 * 1 * 6,
        "depthwise": 12 * 9 * 12,
        "separable": 12 * (9 * 12 + 12 * 5),
        "transposed": 12 * 4 * 5 * 7,
        "twice": 2 * 48 * 7 * 7,
        "tokens": 0,
        "attention": 48 * 4 * 7 * 6,
        "pool": 0,
        "logits": 28,
    }
    assert surgery.costs(network) == {name: 2 * adds for name, adds in want.items()}
    # The same inside another model, whose own size is open.
    inner = keras.Sequential(
        [keras.Input((None, None, 3)), keras.layers.Conv2D(5, 3, name="inside")], name="inner"
    )
    outer = keras.Sequential(
        [keras.Input((8, 8, 3)), inner, Flatten(name="flat"), Dense(2, name="out")]
    )
    assert surgery.costs(outer) == {"inside": 2 * 36 * 27 * 5, "flat": 0, "out": 2 * 180 * 2}


def test_proposed_cuts():
    network = residual_toy()
    costs = surgery.costs(network)
    total = sum(costs.values())
    assert surgery.propose_cut(network)[1:] == ("a", pytest.approx(costs["a"] / total))
    assert surgery.split(network)[0].output_names == ["a"]
    assert surgery.propose_cut(network, 0.999).name == "tf.__operators__.add", (
        "the last before the feature"
    )
    with pytest.raises(
        UserError, match="`trunk_share=0.1`: the first layer .* is a, .* give at least 0.43"
    ) as e:
        surgery.propose_cut(network, 0.1)
    assert surgery.propose_cut(network, 0.43).name == "a" and "\n" not in str(e.value)
    # The default share is that of the tables' ResNets, which it cuts before their last stage.
    resnet = networks.resnet20((32, 32, 3), 10)
    assert (
        surgery.propose_cut(resnet).name
        == surgery.propose_cut(resnet, DEFAULT_TRUNK_SHARE).name
        == "stage_2"
    )
    # A share that is given goes before the stages.
    assert surgery.propose_cut(resnet, 0.4).name == "stage_1"
    with pytest.raises(UserError, match="cannot be cut before its classifier"):
        surgery.split(keras.Sequential([keras.Input((8, 8, 3)), Flatten(), Dense(5)]))


def nested(base, *front, **call):
    """A base model in a network, as in transfer learning."""
    images = keras.Input((8, 8, 3))
    x = images
    for layer in front:
        x = layer(x)
    return keras.Model(images, vector(base(x, **call)), name="nested")


def base_model(size=8):
    images = keras.Input((size, size, 3))
    a = keras.layers.BatchNormalization(name="norm")(Conv2D(4, 3, padding="same", name="a")(images))
    return keras.Model(
        images, Conv2D(6, 3, name="b")(keras.layers.Add(name="sum")([a, a * 2.0])), name="base"
    )


def test_a_model_in_the_network_is_cut_inside():
    base = base_model(None)
    # Its statistics stay as they are where it was called so, and a name that comes twice gets a
    # number.
    network = nested(base, keras.layers.Rescaling(1 / 255), Conv2D(3, 1, name="a"), training=False)
    whole = surgery.with_features(network)
    assert surgery.cut_points(whole) == ["rescaling", "a", "a_2", "norm", "sum", "b"]
    x = tf.constant(noise(3, 8, 8, 3), tf.float32)
    for training in (False, True):
        np.testing.assert_allclose(whole(x, training=training)["logits"], network(x), atol=1e-5)
    trunk, branch = surgery.split(network, "norm")
    np.testing.assert_allclose(branch(trunk(x))["logits"], network(x), atol=1e-5)
    assert count(trunk) + count(branch) == count(network) and trunk.output_shape == (None, 8, 8, 4)
    # Called twice, its weights are still one set.
    images = keras.Input((8, 8, 3))
    network = keras.Model(images, vector(keras.layers.Add()([base(images), base(images / 2.0)])))
    whole = surgery.with_features(network)
    assert count(whole) == count(network) and "b" not in surgery.cut_points(whole)
    np.testing.assert_allclose(whole(x)["logits"], network(x), atol=1e-4)


class Holds(keras.layers.Layer):
    """A layer that computes with another layer."""

    def __init__(self, inside, **kwargs):
        super().__init__(**kwargs)
        self.inside = inside

    def call(self, x):
        return tf.nn.relu(self.inside(x))


@pytest.mark.parametrize(
    "around",
    [
        lambda layer, x: Holds(layer)(x),
        lambda layer, x: nested_layer(layer)(x),
        lambda layer, x: nested_layer(nested_layer(layer))(x),
    ],
    ids=["own layer", "inner model", "two deep"],
)
def test_no_cut_parts_the_uses_of_a_layer(around):
    """A peer would have it in the trunk, and another one of its own in its branch."""
    for before, behind in ((around, None), (None, around), (around, around)):
        shared = Conv2D(3, 3, padding="same", name="shared")
        x = images = keras.Input((8, 8, 3))
        for how, layer in (
            (before, Conv2D(3, 1, name="between")),
            (behind, Conv2D(4, 1, name="last")),
        ):
            x = layer(how(shared, x) if how else shared(x))
        points = surgery.cut_points(keras.Model(images, vector(x)))
        assert points[-1] == "last" and "between" not in points and len(points) == 2


def nested_layer(layer):
    images = keras.Input((8, 8, 3))
    return keras.Model(images, layer(images))


def test_an_inner_model_of_several_outputs_is_cut_where_all_of_them_come_later():
    images = keras.Input((8, 8, 3))
    first = Conv2D(4, 1, name="first")(images)
    a = Conv2D(4, 1, name="a")(first)
    b = Conv2D(4, 1, name="b")(a)
    x = tf.constant(noise(3, 8, 8, 3), tf.float32)
    for outputs in ([b, a], {"b": b, "a": a}):
        inner = keras.Model(images, outputs, name="inner")
        outer = keras.Input((8, 8, 3))
        made = tf.nest.flatten(inner(outer))
        network = keras.Model(outer, vector(keras.layers.Subtract(name="end")(made)))
        assert surgery.cut_points(network) == ["first", "end"]
        trunk, branch = surgery.split(network, "first")
        np.testing.assert_allclose(branch(trunk(x))["logits"], network(x), rtol=1e-4, atol=1e-4)


def test_frozen_layers_stay_frozen_and_keep_their_weights(digits):
    base = base_model()
    base.trainable = False
    network = nested(base)
    standard = networks.standardise([128.0] * 3, [74.0] * 3)
    model = methods.PCL(network, split_at="a", peers=2, preprocess=standard)
    for peers in (model.student, model.mean):
        for branch in peers.branches:
            layers = {layer.name: layer for layer in graph.sublayers(branch)}
            trained = [layer.name for layer in graph.leaves(branch) if layer.trainable_weights]
            assert trained == ["logits"]
            np.testing.assert_array_equal(layers["b"].kernel, base.get_layer("b").kernel)
    one, two = (branch.trainable_weights[0].numpy() for branch in model.student.branches)
    assert np.abs(one - two).max() > 0.01
    assert count(model.deployed()) == count(network) == 6 * 5 + 5
    before = model.student.trunk.get_weights()
    model.compile(epochs=1, steps_per_epoch=1)
    model.train_step((tf.constant(noise(4, 2, 8, 8, 3)), tf.constant([0, 1, 2, 3])))
    np.testing.assert_equal(model.student.trunk.get_weights(), before)
    assert np.abs(model.student.branches[0].trainable_weights[0] - one).max() > 0
    network.trainable = False
    with pytest.raises(UserError, match="no trainable layer after 'a'"):
        methods.PCL(network, split_at="a")


def test_what_a_layer_knows_beside_its_weights_is_copied():
    statistics = keras.layers.Normalization(name="statistics")
    statistics.adapt(noise(20, 8, 8, 3).astype(np.float32))

    def double(x):
        return 2.0 * x

    network = nested(
        small(lambda x: x), statistics, keras.layers.Lambda(double), Conv2D(3, 1, activation=double)
    )
    x = tf.constant(noise(3, 8, 8, 3), tf.float32)
    np.testing.assert_allclose(surgery.with_features(network)(x)["logits"], network(x), rtol=1e-5)
    target = surgery.Target(network)
    target.new()
    fresh = target.new()
    np.testing.assert_allclose(fresh.get_layer("statistics")(x), statistics(x))
    assert (
        np.abs(
            fresh.get_layer("small").get_layer("first").kernel
            - network.get_layer("small").get_layer("first").kernel
        ).max()
        > 0.01
    )


class Block(keras.layers.Layer):
    """A layer of layers."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.parts = [
            Conv2D(6, 1),
            keras.layers.BatchNormalization(),
            Conv2D(6, 1),
            keras.layers.BatchNormalization(),
        ]

    def call(self, x, training=None):
        for part in self.parts:
            x = (
                part(x, training=training)
                if isinstance(part, keras.layers.BatchNormalization)
                else part(x)
            )
        return x


def test_layers_within_a_layer():
    network = small(lambda x: vector(Block(name="block")(x)))
    block = network.get_layer("block")
    for i, layer in enumerate(block.parts):
        layer.set_weights([w + 0.1 * (i + 1) for w in layer.get_weights()])
    assert surgery.costs(network)["block"] == 2 * 2 * 16 * 36
    block.parts[0].trainable = block.parts[1].trainable = False
    x = tf.constant(noise(3, 8, 8, 3) / 255, tf.float32)
    for training in (False, True):
        whole = surgery.with_features(network)
        np.testing.assert_allclose(
            whole(x, training=training)["logits"], network(x, training=training), atol=1e-5
        )
    target = surgery.Target(network)
    target.new()
    fresh = target.new().get_layer("block")
    assert [part.trainable for part in fresh.parts] == [False, False, True, True]
    same = [
        np.array_equal(a.get_weights()[0], b.get_weights()[0])
        for a, b in zip(block.parts, fresh.parts)
    ]
    assert same == [True, True, False, False]


class Scaled(keras.layers.Layer):
    """A layer whose configuration lacks its argument."""

    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.scale = function

    def call(self, x):
        return self.scale(x)


class Sub(keras.Model):
    """A subclassed model."""

    def __init__(self, kind):
        super().__init__(name="sub")
        self.kind, self.convolutions = kind, [Conv2D(4, 3, name="s1"), Conv2D(4, 3, name="s2")]
        self.norm, self.dropout, self.dense = (
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5),
            Dense(5),
        )
        if kind == "weight":
            self.own = tf.Variable(2.0, name="own")

    def call(self, x, training=False):
        for convolution in self.convolutions:
            x = tf.nn.relu(convolution(x))
        x = self.norm(x, training=training)
        if self.kind == "tensor" and tf.reduce_sum(x) > 0:
            x = -x
        if self.kind == "weight":
            x *= self.own
        if training or self.kind != "phase":
            x = self.dropout(x, training=training)
        return self.dense(pool(x))


def test_networks_in_other_forms_become_functional(two_replicas):
    x = tf.constant(noise(16, 8, 8, 3), tf.float32)
    sequential = keras.Sequential(
        [Conv2D(4, 3), Conv2D(4, 3), keras.layers.GlobalAveragePooling2D(), Dense(5)]
    )
    subclassed, opened = Sub("plain"), small(vector, (None, None, 3))
    for network in (sequential, subclassed, opened):
        model = surgery.functional(network, (8, 8, 3))
        assert model.input_shape == (None, 8, 8, 3)
        np.testing.assert_allclose(model(x), network(x), atol=1e-5)
        trunk, branch = surgery.split(model)
        np.testing.assert_allclose(branch(trunk(x))["logits"], network(x), atol=1e-5)
        assert count(trunk) + count(branch) == count(network)

    # A model with a graph of layers that computes something else is none of these.
    class Doubled(keras.Model):
        def call(self, x, training=None):
            return super().call(2.0 * x, training=training)

    images = keras.Input((8, 8, 3))
    network = Doubled(images, vector(images))
    np.testing.assert_allclose(surgery.functional(network)(x), network(x))
    assert count(surgery.functional(network)) == count(network)
    # BatchNorm and dropout work in training.
    model = surgery.functional(subclassed, (8, 8, 3))
    before = subclassed.norm.moving_mean.numpy()
    assert np.abs(model(x, training=True) - model(x, training=True)).max() > 0
    assert np.abs(subclassed.norm.moving_mean - before).max() > 0
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    assert (
        surgery.split(surgery.functional(Sub("plain"), (8, 8, 3)))[1].output["logits"].dtype
        == tf.float32
    )
    plain = small(vector)
    assert surgery.functional(plain, (8, 8, 3)) is plain
    with two_replicas.scope():
        assert surgery.functional(Sub("plain"), (8, 8, 3)).output_shape == (None, 5)


def test_forms_that_cannot_serve_are_refused_in_one_line():
    images, integers, flat = (
        keras.Input((8, 8, 3)),
        keras.Input((8, 8, 3), dtype="uint8"),
        keras.Input((4,)),
    )
    with_loss = small(vector)
    with_loss.add_loss(tf.reduce_mean(with_loss.layers[1].output))
    for network, text in [
        (Sub("weight"), "outside of its layers .own"),
        (Sub("phase"), "layer by layer.* in training its outputs differ"),
        (Sub("tensor"), "layer by layer.*symbolic"),
        (
            small(vector, (8, 8, 1)),
            r"takes images \(8, 8, 1\); those of the data set are \(8, 8, 3\)",
        ),
        (keras.Model([images, integers], vector(images)), "2 inputs"),
        (with_loss, "add_loss"),
        (keras.Model(integers, vector(keras.layers.Rescaling(1 / 255)(integers))), "uint8"),
        (keras.Model(flat, Dense(5)(flat)), r"\(None, 4\)"),
    ]:
        with pytest.raises(UserError, match=text) as e:
            surgery.with_features(surgery.functional(network, (8, 8, 3)))
        assert "\n" not in str(e.value)


def saved(model, form, folder):
    path = str(folder / f"saved{form}")
    (model.save_weights if form in (".weights.h5", ".h5", "") else model.save)(path)
    return path


FORMS = [".weights.h5", ".h5", "", ".keras", "_model", "_model.h5"]


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_weights_from_a_file(form, inner, tmp_path):
    def build(classes):
        end = lambda x: Dense(classes, name="logits")(pool(x))
        return nested(base_model()) if inner and classes == 5 else small(end)

    source, network = build(5), build(5)
    loaded, fresh = surgery.load_weights(network, saved(source, form, tmp_path))
    assert loaded == [*(("a", "norm", "b") if inner else ("first", "second")), "logits"]
    assert not fresh
    np.testing.assert_equal(network.get_weights(), source.get_weights())


@pytest.mark.parametrize("form", FORMS)
def test_a_classifier_of_other_classes_stays_fresh(form, tmp_path):
    source, network = small(lambda x: Dense(7, name="logits")(pool(x))), small(vector)
    before = network.get_weights()
    assert surgery.load_weights(network, saved(source, form, tmp_path)) == (
        ["first", "second"],
        ["logits"],
    )
    np.testing.assert_equal(network.get_weights()[:-2], source.get_weights()[:-2])
    np.testing.assert_array_equal(network.get_weights()[-2], before[-2])
    # The peers have all that was loaded, and classifiers of their own.
    for peers in (
        methods.PCL(network, split_at="first", peers=2).student.branches,
        methods.DML(network, peers=2).networks.values(),
    ):
        one, two = (
            [peer.get_layer(name).kernel.numpy() for name in ("second", "logits")] for peer in peers
        )
        np.testing.assert_array_equal(one[0], source.get_layer("second").kernel)
        np.testing.assert_array_equal(two[0], one[0])
        assert np.abs(one[1] - two[1]).max() > 0.01


def test_weights_by_order_without_a_top_and_of_a_run(tmp_path):
    source, network = small(vector, first="x", second="y"), small(vector)
    assert not surgery.load_weights(network, saved(source, ".h5", tmp_path))[1]
    np.testing.assert_array_equal(network.get_layer("second").kernel, source.get_layer("y").kernel)
    headless = keras.Model(network.input, network.get_layer("second").output)
    assert surgery.load_weights(small(vector), saved(headless, ".h5", tmp_path)) == (
        ["first", "second"],
        ["logits"],
    )
    deployed = methods.PCL(
        network, split_at="first", preprocess=networks.standardise([9.0] * 3, [9.0] * 3)
    ).deployed()
    export.export(deployed, "abcde", str(tmp_path / "run" / "export"))
    again = small(vector)
    assert not surgery.load_weights(again, str(tmp_path / "run/export/saved_model/1"))[1]
    np.testing.assert_array_equal(
        again.get_layer("first").kernel, network.get_layer("first").kernel
    )


@pytest.mark.parametrize("form", FORMS)
def test_files_that_do_not_fit_are_refused_in_one_line(form, tmp_path):
    network = small(vector)
    before = network.get_weights()
    path = saved(nested(base_model()), form, tmp_path)
    (tmp_path / "damaged").mkdir()
    damaged = saved(network, form, tmp_path / "damaged")
    for part in [
        f
        for f in (tmp_path / "damaged").rglob("*")
        if f.suffix in (".h5", ".keras", ".data-00000-of-00001")
    ]:
        part.write_bytes(part.read_bytes()[:1000])
    for given in (path, damaged, str(tmp_path / "absent.h5"), str(tmp_path / "damaged" / "none")):
        with pytest.raises(
            UserError, match="`weights=.*(cannot be (loaded|read)|no such file)"
        ) as e:
            surgery.load_weights(network, given)
        assert "\n" not in str(e.value)
        np.testing.assert_equal(network.get_weights(), before)


def test_a_run_says_what_it_decided(digits, tmp_path):
    network = "test_networks:plain"
    path = saved(plain((8, 8, 1), 7), ".h5", tmp_path)
    make = Assembly(digits, weights={network: path})
    for _ in range(2):  # Said once, however often it is built.
        model = make(methods.PCL, network, peers=2)
    assert make.lines == [
        f"weights of {path}: 2 layers loaded, not logits; peers' own classifiers start afresh",
        "images: standardised by the mean and deviation of the training images",
        "no `split_at`: the peers share the network up to layer first, 27 % of its forward cost",
    ]
    assert model.student.trunk.output_names == ["first"]
    options = Options(method="pcl", trunk_share=0.4)
    make = Assembly(digits, trunk_share=options.trunk_share)
    (stage,) = methods.PCL.stages(make, "resnet8", **method_arguments(options))
    assert stage.build([]).student.trunk.output_names == ["stage_1"]
    for wrong, text in (
        (dict(trunk_share=0.5, split_at="first"), "`trunk_share"),
        (dict(trunk_share=0.0), "more than 0"),
        (dict(network="resnet8,resnet14", weights="x.h5", method="dml"), "one network"),
    ):
        with pytest.raises(UserError, match=text):
            Options(**wrong)
    with pytest.raises(UserError, match="`trunk_share` does not go with `method=dml`"):
        method_arguments(Options(method="dml", trunk_share=0.5))


def plain(input_shape, num_classes):
    return small(lambda x: Dense(num_classes, name="logits")(pool(x)), input_shape)


def test_weights_of_keras_applications_come_with_their_scale_of_images(digits):
    images = noise(2, 32, 32, 3)
    got = networks.preprocessing("applications.VGG16", (32, 32, 3))(images)
    np.testing.assert_allclose(
        got, keras.applications.vgg16.preprocess_input(images.astype(np.float32)), atol=1e-4
    )
    assert networks.preprocessing("resnet8", (32, 32, 3)) is None


def test_trained_networks_go_on_with_the_images_they_know(digits, tmp_path, monkeypatch):
    published = lambda name, shape: keras.layers.Rescaling(1 / 64, -1, name="published")
    monkeypatch.setattr(networks, "preprocessing", published)
    network = "test_networks:plain"
    path = saved(plain((8, 8, 1), 10), ".h5", tmp_path)
    make = Assembly(digits, weights={network: path})
    models = build_all(methods.CTSLMKT.stages(make, network))
    assert [model.preprocess.name for model in models] == ["published"] * 3
    make = Assembly(digits, weights={network: path}, preprocess="standardise")
    assert make(methods.Baseline, network).preprocess.name == "standardise"


def test_names(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(
        "from tensorflow import keras\n"
        "def build(input_shape, num_classes):\n"
        "    layers = [keras.layers.Flatten(), keras.layers.Dense(num_classes)]\n"
        "    return keras.Sequential([keras.Input(input_shape), *layers])\n"
        "def wrong(input_shape, num_classes):\n"
        "    return 3\n"
        "def failing(input_shape, num_classes):\n"
        "    return input_shape.nothing\n"
        "def frozen(input_shape, num_classes):\n"
        "    model = build(input_shape, num_classes)\n"
        "    model.trainable = False\n"
        "    return model\n"
        "constant = 3\n"
        "model = build((8, 8, 1), 3)\n"
    )
    (tmp_path / "my_broken.py").write_text("import torch_of_another_planet\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert networks.build("my_models:build", (8, 8, 1), 3).output_shape == (None, 3)
    for name, text in (
        ("resnet31", "Did you mean resnet32"),
        ("applications.MobilNetV2", "Did you mean MobileNetV2"),
        ("nowhere:build", "No module named 'nowhere'"),
        ("my_models:absent", "absent"),
        ("my_models:wrong", "returned int"),
        ("my_models:constant", "is int"),
        ("my_models:model", "is Sequential: it must name a function"),
        ("my_models:failing", "my_models:failing cannot be built .* AttributeError.*nothing"),
        ("my_models:frozen", "no trainable weights"),
        ("my_broken:build", "my_broken:build cannot be imported: .*torch_of_another_planet"),
        ("applications.NAME", "Allowed|is not known"),
        ("applications.VGG16", "cannot be built for images"),
    ):
        with pytest.raises(UserError, match=text):
            networks.build(name, (8, 8, 1), 3)
    # Errors name it as it was given.
    assert networks.target("my_models:build", (8, 8, 1), 3).name == "my_models:build"


def test_standardise_gives_zero_mean_and_unit_deviation():
    images = noise(20, 8, 8, 3)
    layer = networks.standardise(images.mean((0, 1, 2)), images.std((0, 1, 2)))
    out = layer(tf.constant(images)).numpy()
    np.testing.assert_allclose(out.mean((0, 1, 2)), 0, atol=1e-3)
    np.testing.assert_allclose(out.std((0, 1, 2)), 1, atol=1e-3)


def test_weights_that_keras_publishes_for_imagenet(monkeypatch):
    build, made = networks.applications.application, []

    def published(name):
        def application(weights, include_top, input_shape):
            assert weights == "imagenet" and not include_top
            made.append(build(name)(weights=None, include_top=False, input_shape=input_shape))
            return made[0]

        return application

    name = "applications.MobileNetV2"
    network = networks.build(name, (32, 32, 3), 7)
    before = network.layers[-1].get_weights()[0]
    monkeypatch.setattr(networks.applications, "application", published)
    loaded, fresh = networks.load_imagenet(name, network)
    assert fresh == [network.layers[-1].name] and len(loaded) == 104
    # The source has the layers in the same order, all but the classifier.
    np.testing.assert_equal(network.get_weights()[:-2], made[0].get_weights())
    np.testing.assert_array_equal(network.layers[-1].get_weights()[0], before)

    def offline(name):
        def application(**kwargs):
            raise Exception("URL fetch failure")

        return application

    monkeypatch.setattr(networks.applications, "application", offline)
    with pytest.raises(UserError, match="`weights=imagenet`: Keras cannot load .*URL fetch") as e:
        networks.load_imagenet(name, network)
    assert "\n" not in str(e.value)
