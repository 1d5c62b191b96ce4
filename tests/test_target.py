"""What is trained is what was given: networks are made again, sliced, proven, or refused."""

import numpy as np
import pytest
import tensorflow as tf
from helpers import CLASSES, SHAPE, assert_close, noise, without_norm
from tensorflow import keras
from tensorflow.keras import layers as L

from tf_pcl import methods, networks, surgery
from tf_pcl.errors import UserError
from tf_pcl.surgery import proof
from tf_pcl.surgery.described import described
from tf_pcl.surgery.features import kind_of_outputs

X = noise(12, 8, 8, 3).astype("float32") / 64


def ends(x, classes=4, **kwargs):
    return L.Dense(classes, **kwargs)(L.GlobalAveragePooling2D()(x))


def arrays(weights):
    return [w.numpy() for w in weights]


def deployed_with_values_of(model, network):
    """The peer to deploy, with the network's own values."""
    deployed = model.deployed()
    assert [w.shape for w in deployed.weights] == [w.shape for w in network.weights]
    deployed.set_weights(network.get_weights())
    return deployed


def around(build, method=methods.PCL, **kwargs):
    kwargs.setdefault("split_at", "cut")
    as_they_are = L.Activation("linear", dtype="float32")
    return method(build, peers=2, preprocess=as_they_are, **kwargs)


class Unit(L.Layer):
    """A convolution and BatchNorm, in a layer whose call takes no `training`."""

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.width, self.conv, self.norm = width, L.Conv2D(width, 3), L.BatchNormalization()

    def call(self, x):
        return self.norm(self.conv(x))

    def get_config(self):
        return {**super().get_config(), "width": self.width}


class Around(L.Layer):
    """A layer that keeps a sublayer which it was given, and returns it in its configuration."""

    def __init__(self, inside, **kwargs):
        super().__init__(**kwargs)
        self.inside = inside

    def call(self, x):
        return tf.nn.relu(self.inside(x))

    def get_config(self):
        return {**super().get_config(), "inside": self.inside}


class Gain(L.Layer):
    """A layer whose configuration leaves out with which argument it was made."""

    def __init__(self, gain=1.0, **kwargs):
        super().__init__(**kwargs)
        self.gain = gain

    def call(self, x):
        return self.gain * x

    def get_config(self):
        return {**L.Layer.get_config(self), "gain": 1.0}


class Noisy(L.Layer):
    """A layer that is random in inference."""

    def call(self, x):
        return x + tf.random.normal(tf.shape(x))


def inner_in_inference_mode():
    images = keras.Input((8, 8, 3))
    base = keras.Model(images, Unit(5)(images))
    outer = keras.Input((8, 8, 3))
    return keras.Model(outer, ends(L.Conv2D(6, 3, name="cut")(base(outer, training=False))))


def inner_by_position():
    images = keras.Input((8, 8, 3))
    base = keras.Model(images, L.BatchNormalization()(L.Conv2D(4, 3, name="cut")(images), False))
    outer = keras.Input((8, 8, 3))
    return keras.Model(outer, ends(base(outer, training=False)))


def layer_object():
    images = keras.Input((8, 8, 3))
    return keras.Model(images, ends(Around(L.Conv2D(6, 3))(L.Conv2D(4, 3, name="cut")(images))))


def without_argument():
    images = keras.Input((8, 8, 3))
    x = Gain(4.0)(L.Conv2D(4, 3)(images))
    return keras.Model(images, ends(Gain(3.0)(L.Conv2D(6, 3, name="cut")(x))))


def attribute_set_later():
    images = keras.Input((8, 8, 3))
    clip = L.ReLU()
    network = keras.Model(images, ends(clip(L.Conv2D(6, 3, name="cut")(images))))
    clip.call = lambda x: tf.nn.relu(x - 0.1)
    return network


def keyword_only():
    images = keras.Input((8, 8, 3))
    x = L.Lambda(lambda t, *, by=2.0: by * t)(L.Conv2D(4, 3, name="cut")(images))
    return keras.Model(images, ends(L.Conv2D(4, 3)(x)))


def names_of_ours():
    images = keras.Input((8, 8, 3))
    x = L.MaxPooling2D(name="tf_pcl_pooled_features")(L.Conv2D(4, 3, name="cut")(images))
    x = L.Conv2D(4, 1, name="tf_pcl_flat_logits")(x)
    return keras.Model(images, L.GlobalAveragePooling2D(name="features")(x))


def wrapped_custom():
    images = keras.Input((8, 8, 3))
    x = L.TimeDistributed(Gain(2.0))(L.Conv2D(4, 3, name="cut")(images))
    return keras.Model(images, ends(L.Conv2D(4, 3)(x)))


def dropout_and_norm():
    images = keras.Input((8, 8, 3))
    x = L.Dropout(0.3)(L.BatchNormalization()(L.Conv2D(4, 3, name="cut")(images)))
    return keras.Model(images, ends(L.Dropout(0.3)(L.Conv2D(6, 3)(x))))


BUILDERS = [
    inner_in_inference_mode,
    inner_by_position,
    layer_object,
    without_argument,
    attribute_set_later,
    keyword_only,
    names_of_ours,
    wrapped_custom,
    dropout_and_norm,
]


@pytest.mark.parametrize("build", BUILDERS, ids=lambda f: f.__name__)
def test_peers_of_a_function_are_the_network_in_inference_and_in_training(build):
    network = build()
    model = around(build)
    deployed = deployed_with_values_of(model, network)
    images = (64 * X).astype("uint8")
    np.testing.assert_allclose(deployed(images), network(64 * X // 1), rtol=1e-4, atol=1e-4)
    moved = []
    for one, given in ((network, images.astype("float32")), (deployed, images)):
        before = arrays(one.non_trainable_weights)
        tf.random.set_seed(3)
        logits = one(given, training=True)
        moved.append([a - b for a, b in zip(arrays(one.non_trainable_weights), before)])
        if build is not dropout_and_norm:
            moved[-1].append(np.asarray(logits))
    assert_close(*moved, rtol=1e-3, atol=1e-3)
    # Nobody shares a weight: not two branches, not students and means.
    peers = [*model.student.branches, *model.mean.branches, model.student.trunk, model.mean.trunk]
    held = [w.ref() for part in peers for w in part.weights]
    assert len(held) == len(set(held))
    one, two = (branch.trainable_weights for branch in model.student.branches)
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(one, two))


@pytest.mark.parametrize("build", [layer_object, without_argument, attribute_set_later])
def test_an_instance_that_keras_cannot_copy_right_is_refused_in_a_sentence(build):
    with pytest.raises(UserError, match="give the function that builds the network") as e:
        around(build())
    assert "\n" not in str(e.value)
    # One network is enough for the baseline.
    methods.Baseline(build())


def test_an_instance_is_the_first_peer_and_the_others_start_elsewhere():
    network = without_norm(SHAPE, CLASSES)
    model = methods.PCL(network, peers=2)
    own = {w.ref() for w in network.weights}
    student = [
        w.ref() for part in (model.student.trunk, model.student.branches[0]) for w in part.weights
    ]
    assert set(student) == own and not own & {w.ref() for w in model.mean.weights}


def test_a_function_that_returns_the_same_layers_again_is_refused():
    base = L.Conv2D(4, 3, name="cut")

    def build():
        images = keras.Input((8, 8, 3))
        return keras.Model(images, ends(L.Conv2D(4, 3)(base(images))))

    with pytest.raises(UserError, match="shares the variable 'cut/kernel:0'"):
        around(build)
    one = build()
    with pytest.raises(UserError, match="networks 1 and 2 share the variable"):
        methods.DML([one, one])


def test_a_variable_outside_of_the_network_is_refused():
    for trainable in (True, False):
        scale = tf.Variable(2.0, trainable=trainable, name="outside")

        def build(scale=scale):
            images = keras.Input((8, 8, 3))
            x = L.Lambda(lambda t: t * scale)(L.Conv2D(4, 3, name="cut")(images))
            return keras.Model(images, ends(x))

        for method in (around, methods.Baseline):
            with pytest.raises(UserError, match="does not hold, 'outside"):
                method(build)


def test_seeded_initializers_are_drawn_anew():
    def build():
        images = keras.Input((8, 8, 3))
        seeded = keras.initializers.HeNormal(seed=1)
        x = L.Conv2D(4, 3, name="cut", kernel_initializer=seeded)(images)
        return keras.Model(images, ends(L.Conv2D(6, 3, kernel_initializer=seeded)(x)))

    for network in (build, build()):
        one, two = (branch.weights[0].numpy() for branch in around(network).student.branches)
        assert np.abs(one - two).max() > 0.01 and 0.5 < one.std() / two.std() < 2


def test_peers_that_start_alike_get_other_classifiers_or_are_refused():
    def build(**kwargs):
        images = keras.Input((8, 8, 3))
        keras.utils.set_random_seed(7)
        return keras.Model(images, ends(L.Conv2D(4, 3, name="cut")(images), **kwargs))

    model = around(build)
    one, two = (arrays(branch.weights) for branch in model.student.branches)
    assert np.abs(one[0] - two[0]).max() > 0.01
    with pytest.raises(UserError, match="same weights each time"):
        around(lambda: build(kernel_initializer="ones"))


def test_loaded_weights_are_in_every_peer_but_in_the_classifier(tmp_path):
    source = without_argument()
    source.save_weights(str(tmp_path / "w.h5"))

    def build():
        network = without_argument()
        network.load_weights(str(tmp_path / "w.h5"))
        return network

    branches = around(build).student.branches
    body = [branch.weights[0].numpy() for branch in branches if branch.weights]
    heads = [branch.trainable_weights[-2].numpy() for branch in branches]
    np.testing.assert_array_equal(*body) if body[0].ndim == 4 else None
    assert np.abs(heads[0] - heads[1]).max() > 0.01


def test_frozen_weights_are_the_same_in_all_peers():
    def build():
        images = keras.Input((8, 8, 3))
        x = L.Conv2D(4, 3, name="cut")(images)
        for name, seed in (("frozen", None), ("frozen_with_a_seed", 1)):
            x = L.Conv2D(
                6,
                3,
                kernel_initializer=keras.initializers.HeNormal(seed),
                name=name,
                trainable=False,
            )(x)
        return keras.Model(images, ends(x))

    branches = around(build).student.branches
    for name in ("frozen", "frozen_with_a_seed"):
        np.testing.assert_array_equal(*(b.get_layer(name).kernel for b in branches))


@pytest.mark.parametrize(
    "end",
    [
        lambda x: L.Dropout(0.5)(x, training=True),
        lambda x: L.Dropout(0.001)(x, training=True),
        lambda x: L.Conv2D(4, 3)(L.RandomFlip("horizontal")(x, training=True)),
        Noisy(),
    ],
)
def test_a_network_that_is_random_in_inference_is_refused(end):
    images = keras.Input((8, 8, 3))
    network = keras.Model(images, ends(end(L.Conv2D(4, 3)(images))))
    with pytest.raises(UserError, match="gives other outputs for the same images"):
        methods.Baseline(network)


def test_a_regularizer_that_is_a_function_counts():
    def sparse(w):
        return 0.01 * tf.reduce_sum(tf.abs(w))

    images = keras.Input((8, 8, 3))
    conv = L.Conv2D(4, 3, kernel_regularizer=sparse)
    model = methods.Baseline(keras.Model(images, ends(conv(images))))
    model.compile(keras.optimizers.SGD(0.0), epochs=1, steps_per_epoch=1)
    want = 0.01 * np.abs(conv.kernel.numpy()).sum()
    history = model.fit(noise(4, 8, 8, 3) // 64, np.arange(4), verbose=0).history
    assert history["loss/regularization"][0] == pytest.approx(want, rel=1e-4)


def classifier(end, wrap=False):
    """A network without named layers whose last operation is `end`, hidden in an inner model."""
    images = keras.Input((8, 8, 3))
    z = L.Dense(5, kernel_initializer=keras.initializers.RandomNormal(stddev=2.0, seed=2))(
        L.Flatten()(images)
    )
    if not wrap:
        return keras.Model(images, end(z))
    given = keras.Input((5,))
    return keras.Model(images, keras.Model(given, end(given))(z))


class Opaque(keras.Model):
    """A subclassed model with a weight of its own."""

    def __init__(self, end=None):
        super().__init__()
        self.scale = tf.Variable(1.0, name="scale")
        self.conv, self.dense, self.end = L.Conv2D(4, 3), L.Dense(5), end or (lambda z: z)

    def call(self, x, training=None):
        x = self.scale * self.conv(x)
        return self.end(self.dense(tf.reduce_mean(x, [1, 2])))


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("end", [tf.nn.softmax, L.Softmax(), tf.nn.log_softmax, tf.identity])
def test_probabilities_are_recognised(end, wrap):
    network = classifier(end, wrap)
    logits = surgery.with_logits(network)(X)["logits"].numpy()
    given = network(X).numpy()
    want = given if end is tf.identity else None
    if want is not None:
        np.testing.assert_allclose(logits, want, atol=1e-5)
    else:
        p = np.exp(given) if end is tf.nn.log_softmax else given
        np.testing.assert_allclose(tf.nn.softmax(logits), p, atol=1e-5)
        assert np.abs(logits.sum(-1)).max() > 1


def test_values_tell_what_a_graph_does_not():
    kinds = {"logits": None, "probabilities": tf.nn.softmax, "neither": tf.sigmoid}
    for kind, end in kinds.items():
        keras.utils.set_random_seed(1)
        network = surgery.functional(Opaque(end), (8, 8, 3))
        before = network.get_weights()
        assert kind_of_outputs(network) == kind
        np.testing.assert_equal(network.get_weights(), before)
        if kind == "neither":
            with pytest.raises(UserError, match="sigmoid"):
                surgery.with_logits(network)
        else:
            made = surgery.with_logits(network)(X)["logits"]
            np.testing.assert_allclose(
                tf.nn.softmax(made), network(X) if end else tf.nn.softmax(network(X)), atol=1e-5
            )
    with pytest.raises(UserError, match="applies sigmoid"):
        surgery.with_features(classifier(tf.sigmoid))
    with pytest.raises(UserError, match="sigmoid"):
        surgery.with_logits(classifier(tf.sigmoid, wrap=True))


def test_a_teacher_that_gives_probabilities_teaches_as_its_logits_do():
    teachers = [classifier(tf.identity), *(classifier(tf.nn.softmax, wrap) for wrap in (0, 1))]
    terms = []
    for teacher in teachers:
        keras.utils.set_random_seed(4)
        model = methods.KD(classifier(tf.identity), teacher=teacher)
        model.compile(keras.optimizers.SGD(0.0), epochs=1, steps_per_epoch=1)
        images = noise(6, 8, 8, 3) // 64
        terms.append(
            model.fit(images, np.arange(6) % 5, batch_size=6, verbose=0).history["loss/teacher"][0]
        )
    np.testing.assert_allclose(terms[1:], terms[0], rtol=1e-3)
    with pytest.raises(UserError, match="sigmoid"):
        methods.KD(classifier(tf.identity), teacher=classifier(tf.sigmoid))


def test_a_model_that_cannot_be_followed_is_trained_whole():
    build = lambda: surgery.functional(Opaque(), (8, 8, 3))
    images, labels = noise(8, 8, 8, 3) // 64, np.arange(8) % 5
    for method in (methods.Baseline(build), methods.DML(build, peers=2)):
        method.compile(epochs=1, steps_per_epoch=1)
        held = {w.name for w in method.trainable_weights}
        assert any("scale" in name for name in held)
        assert np.isfinite(method.fit(images, labels, verbose=0).history["loss"][0])
        assert method.deployed()(images).shape == (8, 5)
    for method in (methods.PCL, methods.ONE):
        with pytest.raises(UserError, match="cannot be followed layer by layer") as e:
            method(build)
        assert "\n" not in str(e.value)


class Head(L.Layer):
    """Pooling and classifier in one layer, as some libraries have them."""

    def __init__(self, classes, **kwargs):
        super().__init__(**kwargs)
        self.pool, self.drop = L.GlobalAveragePooling2D(), L.Dropout(0.2)
        self.dense = L.Dense(classes)

    def call(self, x, training=False, return_features=False):
        x = self.drop(self.pool(x), training=training)
        return x if return_features else self.dense(x)


def test_a_head_of_several_layers_is_opened():
    def build():
        images = keras.Input((8, 8, 3))
        return keras.Model(images, Head(5)(L.Conv2D(6, 3)(L.Conv2D(4, 3, name="cut")(images))))

    network = build()
    whole = surgery.with_features(network)
    assert {k: tuple(v.shape[1:]) for k, v in whole.output.items()} == {
        "logits": (5,),
        "features": (6,),
        "feature_map": (4, 4, 6),
    }
    np.testing.assert_allclose(whole(X)["logits"], network(X), atol=1e-6)
    assert [w.ref() for w in whole.weights] == [w.ref() for w in network.weights]
    deployed = deployed_with_values_of(around(build), network)
    np.testing.assert_allclose(deployed((64 * X).astype("uint8")), network(64 * X), rtol=1e-3)


def test_functions_get_what_they_ask_for():
    model = methods.PCL(lambda: without_norm(SHAPE, CLASSES), peers=2)
    assert model.deployed().output_shape == (None, CLASSES)
    target = surgery.Target(without_norm, input_shape=SHAPE, num_classes=CLASSES)
    assert methods.Baseline(target).deployed().input_shape == (None, *SHAPE)
    with pytest.raises(UserError, match="takes input_shape, num_classes: give one without"):
        methods.PCL(without_norm)
    with pytest.raises(UserError, match="returned int"):
        methods.Baseline(lambda: 3)


def test_what_a_network_does_with_raw_images():
    raw, standard = noise(8, 8, 8, 3), networks.standardise([128.0] * 3, [74.0] * 3)

    def network(front, end=lambda x: x):
        images = keras.Input((8, 8, 3))
        return keras.Model(images, ends(end(L.Conv2D(4, 3)(front(images)))))

    preprocess = keras.applications
    for front, own in (
        (lambda x: x, False),
        (L.Rescaling(1 / 255), True),
        (preprocess.mobilenet_v2.preprocess_input, True),
        (preprocess.vgg16.preprocess_input, True),
        (preprocess.densenet.preprocess_input, True),
        (lambda x: x / 255.0, True),
        (L.Normalization(mean=[128.0] * 3, variance=[5476.0] * 3), True),
        (L.ZeroPadding2D(), False),
    ):
        assert networks.scales_raw_images(network(front), raw, standard) == own
    # Scaling within the network is none of its input.
    assert not networks.scales_raw_images(network(lambda x: x, L.Rescaling(0.1)), raw, standard)
    inner = network(L.Rescaling(1 / 255))
    outer = keras.Input((8, 8, 3))
    assert networks.scales_raw_images(keras.Model(outer, inner(outer)), raw, standard)
    # Padding is no image.
    padded = lambda x: L.ZeroPadding2D(3)(L.Rescaling(1 / 127.5, -1)(x))
    assert networks.scales_raw_images(network(padded), raw, standard)
    # Bright images, such as pages of text, have a mean far from 0 however they are scaled.
    bright = 200 + raw // 5
    of_bright = networks.standardise([226.0] * 3, [15.0] * 3)
    assert networks.scales_raw_images(network(L.Rescaling(1 / 255)), bright, of_bright)
    assert not networks.scales_raw_images(network(lambda x: x), bright, of_bright)
    # What a frozen part gets counts, not what it makes of it.
    for front, own in ((L.Rescaling(1 / 255), True), (lambda x: x, False)):
        images = keras.Input((8, 8, 3))
        base = keras.Model(images, L.LayerNormalization()(L.Conv2D(4, 3)(front(images))))
        base.trainable = False
        outer = keras.Input((8, 8, 3))
        model = keras.Model(outer, ends(base(outer, training=False)))
        assert networks.scales_raw_images(model, raw, standard) == own
    assert not networks.scales_raw_images(surgery.functional(Opaque(), (8, 8, 3)), raw, standard)


class TestTheProofItself:
    def network(self):
        images = keras.Input((8, 8, 3))
        return keras.Model(images, ends(L.BatchNormalization()(L.Conv2D(4, 3)(images))))

    def test_it_takes_what_is_the_same_and_leaves_everything_as_it_was(self):
        network = dropout_and_norm()
        before = network.get_weights()
        proof.same(network, network, "it")
        np.testing.assert_equal(network.get_weights(), before)

    @pytest.mark.parametrize(
        "wrong, text",
        [
            (lambda n: lambda x, training: 1.01 * n(x, training=training), "inference its outputs"),
            (lambda n: lambda x, training: n(x, training=False), "training its outputs"),
            (
                lambda n: lambda x, training: (n(x, training=training), n(x, training=training))[0],
                "changes other statistics",
            ),
            (
                lambda n: lambda x, training: tf.stop_gradient(n(x, training=training)),
                "other weights get a gradient",
            ),
        ],
    )
    def test_it_finds_what_is_not(self, wrong, text):
        network = self.network()
        with pytest.raises(UserError, match=text):
            proof.same(network, wrong(network), "it")


@pytest.mark.parametrize("find", [surgery.with_logits, surgery.with_features])
@pytest.mark.parametrize("activation", [None, "softmax"])
def test_logits_that_are_not_the_networks_are_refused(find, activation, monkeypatch):
    exposed = surgery.features._exposed

    def wrong(network, wanted):
        made = exposed(network, wanted)
        logits = L.Softmax()(made.output["logits"])  # The fault that nobody sees.
        return keras.Model(made.input, {**made.output, "logits": logits})

    images = keras.Input((8, 8, 3))
    x = L.GlobalAveragePooling2D()(L.Conv2D(4, 3)(images))
    network = keras.Model(images, L.Dense(3, activation=activation)(x))
    find(network)
    monkeypatch.setattr(surgery.features, "_exposed", wrong)
    with pytest.raises(UserError, match="the model of the logits.*outputs differ"):
        find(network)


def test_trial_passes_print_nothing(capfd):
    class Loud(L.Layer):
        def call(self, x):
            tf.print("loud")
            print("louder")
            return x

    images = keras.Input((8, 8, 3))
    capfd.readouterr()
    network = keras.Model(images, ends(Loud()(L.Conv2D(4, 3, name="cut")(images))))
    capfd.readouterr()
    methods.Baseline(network)
    assert "loud" not in capfd.readouterr().out


def test_a_run_is_checked_in_seconds_that_it_says():
    before = surgery.trials.seconds
    methods.PCL(lambda: networks.resnet8((8, 8, 1), 10), peers=2)
    assert 0 < surgery.trials.seconds - before


def plain(inner=False, again=False, phase=None, order=1, names="", **norm):
    """A network that differs from another one in what is given."""
    images = keras.Input((8, 8, 3))
    x = L.Conv2D(4, 3, padding="same", name=f"conv{names}")(images)
    x = L.BatchNormalization(name=f"norm{names}", **norm)(x, training=phase)
    x = keras.Model(images, x)(images) if inner else x
    first, second = L.Conv2D(4, 1), L.Conv2D(4, 1)
    x = L.Add()([x, tf.nn.relu(first(x))][::order])
    return keras.Model(images, ends((first if again else second)(x)))


def test_builds_of_one_graph_are_described_alike_and_of_others_apart():
    assert described(networks.resnet8(SHAPE, CLASSES)) == described(
        networks.resnet8(SHAPE, CLASSES)
    )
    assert described(plain()) == described(plain(names="_of_another_name"))
    frozen = plain()
    frozen.layers[1].trainable = False
    others = [
        plain(),
        plain(inner=True),
        plain(again=True),
        plain(phase=False),
        plain(order=-1),
        plain(epsilon=0.1),
        frozen,
        networks.resnet8(SHAPE, CLASSES),
        networks.resnet8(SHAPE, CLASSES + 1),
        networks.resnet14(SHAPE, CLASSES),
    ]
    texts = [described(one) for one in others]
    assert all(texts) and len(set(texts)) == len(texts)


@pytest.mark.parametrize(
    "build", [layer_object, without_argument, attribute_set_later, inner_in_inference_mode]
)
def test_a_graph_with_the_users_own_code_is_not_described(build):
    assert described(build()) is None


def test_a_graph_with_the_users_own_function_is_not_described():
    def own(x):
        return tf.nn.relu(x) + 1

    for layer in (L.Lambda(own), L.Activation(own), L.Conv2D(3, 3, activation=own)):
        images = keras.Input((8, 8, 3))
        assert described(keras.Model(images, ends(layer(images)))) is None


def test_what_was_proven_of_a_graph_is_not_proven_again(monkeypatch):
    runs = []
    usual = proof.run
    monkeypatch.setattr(proof, "run", lambda *a, **k: runs.append(1) or usual(*a, **k))

    def counted(*builds):
        runs.clear()
        several = iter(builds)
        around(lambda: next(several))
        return len(runs)

    def build(activation=None):
        images = keras.Input((8, 8, 3))
        x = L.Conv2D(4, 3, name="cut")(images)
        return keras.Model(images, ends(L.Conv2D(4, 3, activation=activation)(x)))

    alike = counted(*(build() for _ in range(4)))
    # The one that differs is proven too: two passes for its features, two for its parts.
    assert counted(build(), build("relu"), build(), build()) == alike + 4


def test_channels_first_are_refused():
    # The methods' own layers would take the width of a map for its channels.
    images = keras.Input(SHAPE)
    pooled = L.GlobalAveragePooling2D("channels_first")(L.Permute((3, 1, 2))(images))
    with pytest.raises(UserError, match="has channels first"):
        methods.Baseline(keras.Model(images, L.Dense(CLASSES)(pooled)))
    keras.backend.set_image_data_format("channels_first")
    try:
        with pytest.raises(UserError, match="has channels first"):
            methods.PCL(lambda: without_norm(SHAPE, CLASSES), peers=2)
    finally:
        keras.backend.set_image_data_format("channels_last")
