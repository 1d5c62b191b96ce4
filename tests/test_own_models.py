"""Keras models and layers as their authors write them: trained as they are, or refused."""

import numpy as np
import pytest
import tensorflow as tf
from helpers import noise
from tensorflow import keras
from tensorflow.keras import layers as L

from tf_pcl import methods, networks, surgery
from tf_pcl.errors import UserError
from tf_pcl.surgery import twins

X, Y = noise(16, 8, 8, 3), np.arange(16) % 4


def network(*several, name=None, **end):
    """A network with layers of a test behind its cut."""
    x = images = keras.Input((8, 8, 3))
    for layer in (L.Conv2D(4, 3, padding="same", name="cut"), *several):
        x = layer(x)
    return keras.Model(images, L.Dense(4, **end)(L.GlobalAveragePooling2D()(x)), name=name)


def pcl(one, **arguments):
    return methods.PCL(one, **{"split_at": "cut", "peers": 2, **arguments})


class Clip(L.Layer):
    """A bound that small images do not reach, and a configuration without it."""

    def __init__(self, limit=6.0, **kwargs):
        super().__init__(**kwargs)
        self.limit = limit

    def call(self, x):
        return tf.clip_by_value(x, -self.limit, self.limit)

    def get_config(self):
        return super().get_config()


class Unit(L.Layer):
    """A convolution that is made of arguments which the configuration lacks."""

    def __init__(self, **kwargs):
        own = {name: kwargs.pop(name) for name in [*kwargs] if name.startswith("kernel_")}
        super().__init__(**kwargs)
        self.conv = L.Conv2D(4, 3, **own)

    def call(self, x):
        return self.conv(x)

    def get_config(self):
        return super().get_config()


def scaled(factor):
    def of(value, dtype=None):
        if isinstance(value, tf.TensorShape) or isinstance(value, tuple):
            return factor * tf.random.normal(value)
        return factor * tf.reduce_sum(tf.square(value))

    return of


def two(**functions):
    """Two convolutions with functions of one name."""
    return [
        L.Conv2D(4, 3, **{key: make(factor) for key, make in functions.items()})
        for factor in (0.1, 3.0)
    ]


@pytest.mark.parametrize(
    "several, lacking",
    [
        (lambda: [Clip(100.0)], "limit"),
        (lambda: [Unit(kernel_regularizer="l2")], "kernel_regularizer"),
        (lambda: [Unit(kernel_constraint=keras.constraints.MaxNorm(0.1))], "kernel_constraint"),
        (lambda: [Unit(kernel_initializer="random_normal")], "kernel_initializer"),
        (lambda: two(kernel_regularizer=scaled), "kernel_regularizer"),
        (lambda: two(kernel_initializer=scaled), "kernel_initializer"),
    ],
    ids=["value", "regularizer", "constraint", "initializer", "regularizers", "initializers"],
)
def test_a_copy_that_lacks_what_no_pass_shows_is_refused(several, lacking):
    with pytest.raises(UserError, match=f"has another `{lacking}`; give the function that builds"):
        pcl(network(*several()))


def test_a_copy_with_other_losses_is_refused():
    late = network(L.Conv2D(4, 3, name="late"))
    kernel = late.get_layer("late").kernel
    late.get_layer("late").add_loss(lambda: tf.reduce_sum(tf.square(kernel)))
    with pytest.raises(UserError, match="its own losses"):
        pcl(late)
    added = network()
    added.add_loss(lambda: tf.reduce_sum(tf.square(kernel)))
    with pytest.raises(UserError, match="its own losses"):
        methods.Baseline(added)


def test_copies_of_kerass_own_layers_are_what_they_were_made_of():
    one = networks.resnet8((8, 8, 3), 4)
    one.compile("sgd", "mse")
    assert not twins.difference(one, type(one).from_config(one.get_config()))
    pcl(network(bias_initializer=tf.constant_initializer(0)))
    # TensorFlow wraps these functions anew whenever Keras looks them up.
    pcl(network(L.Lambda(abs), lambda x: -tf.maximum(tf.tanh(x), tf.square(x) % 2.0)))


@pytest.mark.parametrize("end", [None, "softmax"])
def test_penalties_of_outputs_count_in_the_network_and_in_its_copies(end):
    penalty = {"activity_regularizer": keras.regularizers.L2(1.0)}
    images = X[:4].astype("float32")

    def losses(model, *given):
        model(*given, training=True)
        return [float(loss) for loss in model.losses]

    one = network(L.ReLU(**penalty), activation=end, **penalty)
    expected = losses(one, images)
    assert min(expected) > 0 and len(expected) == 2
    model = pcl(one)
    np.testing.assert_allclose(losses(methods.Baseline(one).network, images), expected, rtol=1e-5)
    first, second = model.student.branches
    second.set_weights(first.get_weights())
    low = model.student.trunk(images)
    for branch in (first, second):
        np.testing.assert_allclose(losses(branch, low), expected, rtol=1e-5)


class Subclassed(keras.Model):
    """A model that does in training what it does not in inference."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.conv, self.end = kind, L.Conv2D(4, 3), L.Dense(4)

    def call(self, x, training=None):
        x = self.conv(x)
        if training and self.kind == "drop":
            x *= tf.cast(tf.random.uniform([tf.shape(x)[0], 1, 1, 1]) > 0.01, x.dtype)
        if self.kind == "penalty":
            self.add_loss(tf.reduce_mean(tf.square(x)))
        return self.end(tf.reduce_mean(x, [1, 2]))


def test_a_subclassed_model_keeps_what_it_does_in_training_alone():
    whole = surgery.functional(Subclassed("drop"), (8, 8, 3))
    assert len(np.unique(whole(tf.ones([2000, 8, 8, 3]), training=True), axis=0)) == 2
    whole = surgery.functional(Subclassed("penalty"), (8, 8, 3))
    whole(tf.ones([2, 8, 8, 3]), training=True)
    assert len(whole.losses) == 1
    followed = surgery.functional(Subclassed(""), (8, 8, 3))
    assert not any(isinstance(layer, Subclassed) for layer in followed.layers)


@pytest.mark.parametrize("name", ["images", "logits"])
def test_a_network_may_have_the_name_of_a_deployed_ones_ends(name):
    one = network(name=name)
    made = methods.Baseline(one, preprocess=L.Rescaling(1 / 255, name=name)).deployed()
    assert made.input_names == ["images"] and made.output_names == ["logits"]
    np.testing.assert_allclose(made(X), one(X / 255.0), atol=1e-5)
    for name in ("trunk", "branch_1"):
        for deploy in ("peer", "ensemble"):
            pcl(one, preprocess=L.Rescaling(1 / 255, name=name), deploy=deploy).deployed()


def test_what_stands_in_front_of_a_network_acts_as_it_does():
    random = lambda: keras.Sequential([L.Rescaling(1 / 255), L.GaussianNoise(3.0), L.RandomFlip()])
    for method, arguments in (
        (methods.Baseline, {}),
        (methods.CL, {"split_at": "cut", "peers": 2}),
        (methods.PCL, {"split_at": "cut", "peers": 2}),
    ):
        model = method(network(), preprocess=random(), **arguments)
        model.compile("sgd", run_eagerly=True)
        loss = model.evaluate(X, Y, verbose=0, return_dict=True)["loss"]
        logits = model.deployed().predict(X, verbose=0)
        expected = tf.nn.sparse_softmax_cross_entropy_with_logits(Y, logits)
        np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-5)
        views = tf.constant(X[:, None])
        first, second = (next(iter(model.students(views, True).values())) for _ in range(2))
        assert np.abs(first.logits - second.logits).max() > 1e-3
    one = network()
    scale = keras.applications.mobilenet_v2.preprocess_input
    model = methods.Baseline(one, preprocess=scale)
    np.testing.assert_allclose(model.deployed()(X), one(X / 127.5 - 1), atol=1e-5)
    with pytest.raises(UserError, match="^`preprocess=3`: give a keras layer"):
        methods.Baseline(one, preprocess=3)


def test_weights_that_teacher_and_student_share_are_not_left_untrained():
    one = network()
    parent = methods.BAN(one).deployed()
    for model in (methods.BAN(one, ancestors=[parent]), methods.KD(one, teacher=parent)):
        with pytest.raises(UserError, match="'cut/kernel:0' of .* would not be trained"):
            model.compile("sgd")
    with pytest.raises(UserError, match="would not be trained"):
        pcl(network(), preprocess=L.BatchNormalization()).compile("sgd")
    # What nobody trains may be shared.
    one.get_layer("cut").trainable = False
    images = keras.Input((8, 8, 3))
    other = keras.Model(images, L.Dense(4)(L.Flatten()(one.get_layer("cut")(images))))
    methods.KD(other, teacher=parent).compile("sgd")


def test_outputs_in_a_dict_are_taken_for_what_they_are():
    images = keras.Input((8, 8, 3))
    features = L.GlobalAveragePooling2D()(L.Conv2D(4, 3)(images))
    logits = L.Dense(4)(features)
    probabilities = L.Softmax()(logits)
    expected = keras.Model(images, logits)(X.astype("float32"))
    # Whatever their author calls them.
    for name in ("logits", "probabilities"):
        made = methods.Baseline(keras.Model(images, {name: probabilities}))
        np.testing.assert_allclose(made.deployed()(X), expected, rtol=1e-4, atol=1e-4)
    several = keras.Model(images, {"logits": logits, "features": features})
    for refused in (
        lambda: methods.Baseline(several),
        lambda: methods.KD(network(), teacher=several),
    ):
        with pytest.raises(UserError, match="1 inputs and 2 outputs"):
            refused()


def test_an_input_in_a_dict_is_that_input():
    images = keras.Input((8, 8, 3))
    logits = L.Dense(4)(L.GlobalAveragePooling2D()(L.Conv2D(4, 3, name="cut")(images)))
    for inputs in ({"image": images}, (images,)):
        pcl(keras.Model(inputs, logits))


@pytest.mark.parametrize(
    "end, said",
    [
        (lambda x: L.Dense(4)(tf.reduce_mean(x, 0, keepdims=True)), r"\(1, 4\) for any batch"),
        (lambda x: tf.boolean_mask(L.Dense(4)(x), [True] * 4, axis=1), r"\(None, None\)"),
        (lambda x: L.Dense(4)(x)[:, :0], r"\(None, 0\)"),
    ],
)
def test_outputs_that_give_no_logits_for_each_image_are_refused(end, said):
    images = keras.Input((8, 8, 3))
    with pytest.raises(UserError, match=f"gives outputs {said}"):
        methods.Baseline(keras.Model(images, end(L.Flatten()(images))))
    with pytest.raises(UserError, match="Dense: it must be a keras.Model"):
        methods.Baseline(L.Dense(4))


def test_networks_for_other_images_or_classes_are_refused():
    images = keras.Input((9, 9, 3))
    larger = keras.Model(images, L.Dense(4)(L.Flatten()(images)))
    images = keras.Input((8, 8, 3))
    more = keras.Model(images, L.Dense(7)(L.Flatten()(images)))
    builds = (
        lambda other: methods.DML([network(), other]),
        lambda other: methods.CTSLMKT([network(), other]),
        lambda other: methods.BAN(network(), ancestors=[other]),
        lambda other: methods.KD(network(), teacher=other),
    )
    for other, said in ((larger, r"4 classes and takes images \(9, 9, 3\)"), (more, "7 classes")):
        for build in builds:
            with pytest.raises(UserError, match=said):
                build(other)
    with pytest.raises(UserError, match="give a list"):
        methods.BAN(network(), ancestors=network())


def test_a_network_that_cannot_be_run_is_refused_in_a_line():
    class Fails(L.Layer):
        def call(self, x, training=None):
            if training:
                return tf.reshape(x, [7, 7])
            return x

    with pytest.raises(UserError, match="cannot be run on images") as e:
        methods.Baseline(network(Fails()))
    assert "Cannot reshape" in str(e.value) and "File" not in str(e.value)


def test_a_deployed_network_takes_uint8_only_where_it_was_trained_on_nothing_else():
    for method, arguments in (
        (methods.Baseline, {}),
        (methods.PCL, {"split_at": "cut", "peers": 2, "deploy": "ensemble"}),
    ):
        model = method(network(), **arguments)
        model.compile("sgd", epochs=1, steps_per_epoch=1, run_eagerly=True)
        # The weights may have been loaded: nobody knows what images they were trained on.
        views = np.repeat(X[:, None] // 100, model.num_views, 1)
        for trained_on, dtype in ((None, "float32"), (views, "uint8"), (views / 255, "float32")):
            images = X if dtype == "uint8" else X / np.float32(255)
            if trained_on is not None:
                model.fit(trained_on.astype(dtype), Y, batch_size=16, verbose=0)
            expected = model.predict(images, verbose=0)
            assert np.abs(expected - expected[0]).max() > 1e-4
            assert model.deployed().input.dtype == dtype
            np.testing.assert_allclose(model.deployed()(images), expected, atol=1e-5)
    shifted = X.astype("int32") - 128
    model = methods.Baseline(network())
    model.compile("sgd", epochs=1, steps_per_epoch=1, run_eagerly=True)
    model.fit(shifted // 100, Y, verbose=0)
    expected = model.predict(shifted, verbose=0)
    np.testing.assert_allclose(model.deployed()(shifted), expected, rtol=1e-4)
    teacher = methods.Baseline(network())
    teacher.compile("sgd", epochs=1, steps_per_epoch=1)
    teacher.fit(X // 100, Y, verbose=0)
    raw = methods.KD(network(), teacher=teacher.deployed())
    raw.compile("sgd", epochs=1, steps_per_epoch=1, run_eagerly=True)
    for asked in (raw.fit, raw.evaluate):
        with pytest.raises(UserError, match="go from .* and the teacher takes raw ones"):
            asked(images, Y, verbose=0)
    raw.fit((X // 100).astype("float32"), Y, verbose=0)


def test_arrays_without_labels_or_numbers_are_refused():
    model = methods.Baseline(network())
    model.compile("sgd", run_eagerly=True)
    with pytest.raises(UserError, match="`validation_data` has no labels"):
        model.fit(X, Y, validation_data=X, verbose=0)
    with pytest.raises(UserError, match="Failed to convert a NumPy array"):
        model.fit(X.astype(object), Y, verbose=0)


def frozen(*several):
    """A network with BatchNorm before and behind its cut, and some layers that are not trained."""
    images = keras.Input((8, 8, 3))
    x = L.BatchNormalization(name="low_norm")(L.Conv2D(4, 3, name="low")(images))
    x = L.BatchNormalization(name="high_norm")(L.Conv2D(4, 3, name="high")(L.ReLU(name="cut")(x)))
    one = keras.Model(images, L.Dense(4, name="end")(L.GlobalAveragePooling2D()(x)))
    for name in several:
        one.get_layer(name).trainable = False
    return one


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("method", [methods.PCL, methods.DML])
def test_what_is_frozen_or_trained_after_the_construction_is_so_in_all_peers(method, changed):
    names = ("low", "low_norm", "high_norm")
    given = {"peers": 2, **({"split_at": "cut"} if method is methods.PCL else {})}
    trained = lambda model: sorted(w.name for w in model.trainable_weights)
    expected = trained(method(frozen(*(() if changed else names)), **given))
    one = frozen(*(names if changed else ()))
    model = method(one, **given)
    model.compile("sgd")
    for name in names:
        one.get_layer(name).trainable = changed
    model.compile(keras.optimizers.SGD(0.1))
    assert trained(model) == expected
    if method is methods.PCL:
        model.fit(np.repeat((X / 255.0)[:, None], 2, 1), Y, batch_size=4, verbose=0)
        # In so short a training β is 0, so that the means are the last weights.
        for a, b in zip(model.student.weights, model.mean.weights):
            assert not a.trainable or np.allclose(a, b, atol=1e-6)
        moved = [np.ptp(w) > 0 for w in model.mean.weights if "moving_mean" in w.name]
        assert len(moved) == 3 and all(moved) == any(moved) == changed


def test_weights_of_copies_have_the_names_that_optimizers_go_by():
    model = methods.DML(frozen(), peers=2)
    one, other = ([w.name for w in peer.weights] for peer in model.networks.values())
    assert one == other and one[0] == "low/kernel:0"


def test_a_layer_that_keras_would_not_train_is_not_trained():
    images = keras.Input((8, 8, 3))
    x = L.Conv2D(4, 3, name="late")(L.ReLU(name="cut")(L.Conv2D(4, 3, name="early")(images)))
    base = keras.Model(images, x)
    base.trainable = False
    base.get_layer("late").trainable = True
    images = keras.Input((8, 8, 3))
    model = pcl(keras.Model(images, L.Dense(4)(L.GlobalAveragePooling2D()(base(images)))))
    with pytest.raises(UserError, match="'late/kernel:0' is trainable in a model that is frozen"):
        model.compile("sgd")
    base.trainable = True
    base.get_layer("early").trainable = False
    model.compile("sgd")
    assert len(model.trainable_weights) == 2 * 4 + 2  # Two branches, and the ensemble.


class Centred(L.Layer):
    def call(self, x):
        return (x - 128) / 64


@pytest.mark.parametrize(
    "layer",
    [
        lambda: L.Lambda(lambda x: (x - 128) / 64),
        Centred,
        lambda: L.Activation(lambda x: (x - 128) / 64),
    ],
    ids=["lambda", "own", "activation"],
)
def test_a_layer_in_front_computes_of_raw_images_what_it_computes_of_floats(layer):
    one = network()
    expected = one((X.astype("float32") - 128) / 64)
    model = methods.Baseline(one, preprocess=layer())
    model.compile("sgd", epochs=1, steps_per_epoch=1)
    np.testing.assert_allclose(model.predict(X, verbose=0), expected, atol=1e-4)
    np.testing.assert_allclose(model.deployed()(X), expected, atol=1e-4)


def test_the_penalty_of_what_stands_in_front_counts_once():
    for method, given in (
        (methods.Baseline, {}),
        (methods.ONE, {"peers": 2, "split_at": "cut"}),
        (methods.DML, {"peers": 2}),
    ):
        front = L.Conv2D(
            3, 1, kernel_initializer="ones", kernel_regularizer=keras.regularizers.L2(1.0)
        )
        model = method(
            network(), preprocess=keras.Sequential([L.Rescaling(1 / 255), front]), **given
        )
        model.compile(keras.optimizers.SGD(0.0), epochs=1, steps_per_epoch=1, run_eagerly=True)
        assert model.fit(X, Y, verbose=0).history["loss/regularization"] == [9.0]


def test_activations_of_one_name_are_those_of_the_network_in_its_copies():
    several = [
        L.Conv2D(4, 3, activation="relu"),
        L.Conv2D(4, 3, activation=tf.nn.relu),
        L.Activation(tf.nn.relu6),
        L.Lambda(tf.nn.relu),
    ]
    model = pcl(network(*several))
    first, second = model.student.branches
    second.set_weights(first.get_weights())
    low = tf.random.normal(first.input_shape[1:])[None]
    np.testing.assert_allclose(first(low)["logits"], second(low)["logits"], rtol=1e-5)


def test_a_teacher_of_preprocessed_images_is_refused_where_it_gets_raw_ones():
    front = networks.standardise([128.0] * 3, [64.0] * 3)
    means = np.array([-1.5, -0.5, 0.5, 1.5])
    bright = np.tile((128 + 64 * means[Y]).astype(np.uint8)[:, None, None, None], (1, 8, 8, 3))
    images = keras.Input((8, 8, 3))
    teacher = keras.Model(images, L.Dense(4)(L.GlobalAveragePooling2D()(images)))
    # Logits -10 (x - mean of the class)², but for what they have in common.
    teacher.set_weights([np.tile(20 * means / 3, (3, 1)), -10 * means**2])
    whole = keras.Sequential([keras.Input((8, 8, 3)), front, teacher])
    for method, given in ((methods.KD, "teacher"), (methods.BAN, "ancestors")):
        for one in (teacher, whole):
            argument = {given: [one] if given == "ancestors" else one}
            model = method(network(), preprocess=front, **argument)
            model.compile("sgd", epochs=1, steps_per_epoch=1, run_eagerly=True)
            if one is whole:
                model.fit(bright, Y, verbose=0)
            else:
                with pytest.raises(UserError, match="on what `preprocess` makes of them"):
                    model.fit(bright, Y, verbose=0)


def test_parameters_of_a_method_that_are_out_of_range_are_refused():
    model = methods.CL(network(), split_at="cut", peers=2, distill_share=1.5)
    with pytest.raises(UserError, match="^`distill_share=1.5`: .* at least 0 and at most 1$"):
        model.compile("sgd")
    for name, value, allowed in (
        ("temperature", 0.0, "more than 0"),
        ("temperature", float("nan"), "more than 0"),
        ("ema_decay", 1.5, "at least 0 and at most 1"),
        ("rampup_epochs", -1, "at least 0"),
        ("distill_weight", -0.5, "at least 0"),
    ):
        model.distill_share = None
        setattr(model, name, value)
        with pytest.raises(UserError, match=f"^`{name}={value}`: .* {allowed}$"):
            model.compile("sgd")
        setattr(model, name, None)
    weights = ("ce_weight", "collaboration_weight", "self_weight", "angle_weight", "mutual_weight")
    for name in weights:
        together = methods.CTSLMKT([network(), network()], **{name: -1.0})
        with pytest.raises(UserError, match=f"^`{name}=-1.0`: .* at least 0$"):
            together.compile("sgd")
