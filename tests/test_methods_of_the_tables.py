"""The single-stage methods beside PCL against their equations, in NumPy float64."""

import numpy as np
import oracle
import pytest
import tensorflow as tf
from helpers import CLASSES, SHAPE, assert_close, noise, slow_but, without_norm
from tensorflow import keras

from tf_pcl import networks
from tf_pcl.errors import UserError
from tf_pcl.methods import METHODS
from tf_pcl.methods.distiller import Exit

B, EPOCHS, STEPS = 16, 30, 10
LABELS = np.random.RandomState(0).randint(0, CLASSES, B)
SINGLE_STAGE = ("byot", "cl", "dml", "ffl", "okddip", "one")


def three_stages(input_shape, num_classes):
    """A network with two stages before the last, whose feature is as long as that of exits()."""
    images = x = keras.Input(input_shape)
    for stage in (1, 2, 3):
        x = keras.layers.Conv2D(16, 3, padding="same", activation="relu", name=f"stage_{stage}")(x)
    return keras.Model(
        images, keras.layers.Dense(num_classes)(keras.layers.GlobalAveragePooling2D()(x))
    )


def build(method, network=without_norm, **kwargs):
    model = METHODS[method](
        lambda: network(SHAPE, CLASSES), preprocess=networks.standardise([78.0], [96.0]), **kwargs
    )
    model.compile(epochs=EPOCHS, steps_per_epoch=STEPS)
    return model


def exits(names, d=16, seed=1):
    """Logits and features {name: array} in float64, and the Exits of variables that hold them."""
    rng = np.random.RandomState(seed)
    z, f = (
        {name: scale * rng.randn(B, n) for name in names} for scale, n in ((3.0, CLASSES), (0.5, d))
    )
    return (
        z,
        f,
        {name: Exit(*(tf.Variable(x[name], dtype=tf.float32) for x in (z, f))) for name in names},
    )


def peers(m, *more):
    return [*(f"peer_{j + 1}" for j in range(m)), *more]


@pytest.mark.parametrize(
    "equations, names, T, share, kwargs, step",
    [
        (oracle.dml, peers(2), 1.0, None, {"peers": 2}, 0),
        (oracle.dml, peers(4), 3.0, None, {"peers": 4, "temperature": 3.0}, 0),
        (oracle.cl, peers(3), 2.0, 0.5, {}, 0),
        (oracle.cl, peers(2), 5.0, 0.2, {"peers": 2, "temperature": 5.0, "distill_share": 0.2}, 0),
        (oracle.one, peers(3, "ensemble"), 3.0, None, {}, 37),
        (oracle.one, peers(2, "ensemble"), 2.0, None, {"peers": 2, "temperature": 2.0}, 200),
        (oracle.ffl, peers(3, "ensemble"), 3.0, None, {}, 37),
        (oracle.ffl, peers(4, "ensemble"), 1.0, None, {"peers": 4, "temperature": 1.0}, 0),
        (oracle.byot, ["exit_1", "deepest"], 3.0, 0.3, {}, 0),
        (
            oracle.byot,
            ["exit_1", "exit_2", "deepest"],
            1.0,
            0.8,
            {"network": three_stages, "temperature": 1.0, "distill_share": 0.8, "hint_weight": 0.5},
            0,
        ),
    ],
)
def test_loss_and_the_gradient_that_is_cut_at_every_teacher(
    equations, names, T, share, kwargs, step
):
    model = build(equations.__name__, **kwargs)
    assert list(model.exits) == names and model.num_views == 1
    model.step.assign(step)
    z, f, student = exits(names)
    # α = 80 of 300 epochs, 8 of 30.
    weights, lessons = equations(z, oracle.omega(step / STEPS, 8.0), share)
    with tf.GradientTape() as tape:
        terms = model.loss_terms(LABELS, student, {})
        total = tf.add_n(list(terms.values()))
    want = oracle.losses_of(LABELS, z, weights, lessons, T)
    if equations is oracle.byot:
        hint_weight = kwargs.get("hint_weight", 0.03)
        to_last = {name: f[name] - f["deepest"] for name in names[:-1]}
        want["hint"] = hint_weight * sum(
            np.mean(np.sum(apart**2, axis=1)) for apart in to_last.values()
        )
    assert set(terms) == set(want) == set(model.terms)
    for term in want:
        assert terms[term].numpy() == pytest.approx(want[term], rel=1e-5), term
    logits, features = tape.gradient(
        total, [{name: e[i] for name, e in student.items()} for i in (0, 1)]
    )
    for name, expected in oracle.gradients_of(LABELS, z, weights, lessons, T).items():
        np.testing.assert_allclose(logits[name], expected, atol=1e-6, err_msg=name)
    if equations is oracle.byot:
        assert features["deepest"] is None
        for name, apart in to_last.items():
            np.testing.assert_allclose(features[name], hint_weight * 2 * apart / B, atol=1e-6)


@pytest.mark.parametrize("weight", slow_but(["distill_weight", "rampup_epochs"], "rampup_epochs"))
def test_ramp_up_can_be_set(weight):
    for method, names in (
        ("one", peers(3, "ensemble")),
        ("ffl", peers(3, "ensemble")),
        ("okddip", peers(3, "leader")),
    ):
        plain, other = build(method), build(method, **{weight: 5.0})
        w = oracle.omega(2.0, 8.0)
        w_other = (
            oracle.omega(2.0, 8.0, 5.0) if weight == "distill_weight" else oracle.omega(2.0, 5.0)
        )
        if method == "okddip":
            other.query.set_weights(plain.query.get_weights())
            other.key.set_weights(plain.key.get_weights())
        got = []
        for model in (plain, other):
            model.step.assign(20)
            got.append(model.loss_terms(LABELS, exits(names)[2], {})[model.terms[1]].numpy())
        assert got[1] / got[0] == pytest.approx(w_other / w, rel=1e-5)
        assert float(other.schedules()["rampup"]) == pytest.approx(w_other, rel=1e-5)


@pytest.mark.parametrize("m, d, T, step", [(3, 16, 3.0, 37), (2, 16, 1.0, 200)])
def test_okddip_attention_targets_and_the_gradient_through_them(m, d, T, step):
    model = build("okddip", peers=m, temperature=T)
    assert list(model.exits) == peers(m, "leader") and model.query.kernel.shape == (d, d // 8)
    model.step.assign(step)
    z, f, student = exits(peers(m, "leader"), d)
    rng = np.random.RandomState(2)
    w_q, w_k = rng.randn(2, d, d // 8)
    model.query.set_weights([w_q])
    model.key.set_weights([w_k])
    w = oracle.omega(step / STEPS, 8.0)

    def total(z, f, w_q, w_k):
        weights, lessons = oracle.okddip(z, w, f, w_q, w_k)
        return sum(oracle.losses_of(LABELS, z, weights, lessons, T).values())

    features = tf.stack([student[name].features for name in peers(m)], axis=1)
    a = model.attention(features).numpy()
    np.testing.assert_allclose(a.sum(-1), 1, atol=1e-6)
    mixed = np.einsum("bij,jbc->ibc", a, np.stack([z[name] for name in peers(m)]))
    for target, name in zip(mixed, peers(m)):
        np.testing.assert_allclose(target, oracle.okddip_targets(z, f, w_q, w_k)[name], atol=1e-5)

    with tf.GradientTape() as tape:
        terms = model.loss_terms(LABELS, student, {})
        loss = tf.add_n(list(terms.values()))
    want = oracle.losses_of(LABELS, z, *oracle.okddip(z, w, f, w_q, w_k), T)
    for term in ("ce", "personal", "group"):
        assert terms[term].numpy() == pytest.approx(want[term], rel=1e-5), term

    # The whole gradient, through targets and attention, against differences of the equations.
    variables = [
        model.query.kernel,
        model.key.kernel,
        *(x for name in peers(m, "leader") for x in student[name][:2]),
    ]
    got = tape.gradient(loss, variables)
    assert got[-1] is None, "the leader's feature takes no part in attention"
    for array, gradient in zip(
        [w_q, w_k, *(x[name] for name in peers(m, "leader") for x in (z, f))], got[:-1]
    ):
        assert np.abs(gradient).max() > 1e-4
        for index in zip(*(rng.randint(0, n, 4) for n in array.shape)):
            at, ends = array[index], []
            for step_to in (at + 1e-4, at - 1e-4):
                array[index] = step_to
                ends.append(total(z, f, w_q, w_k))
            array[index] = at
            assert gradient.numpy()[index] == pytest.approx((ends[0] - ends[1]) / 2e-4, abs=1e-5)


def test_okddip_matrices_start_as_the_authors_linear_layers():
    model = build("okddip", networks.resnet8)
    for kernel in (model.query.kernel.numpy(), model.key.kernel.numpy()):
        d, limit = len(kernel), len(kernel) ** -0.5
        assert kernel.shape == (d, d // 8) == (64, 8)
        # The deviation of a uniform variable is its limit / √3; 512 draws tell it to some percent.
        assert 0.95 * limit < np.abs(kernel).max() <= limit
        assert kernel.std() == pytest.approx(limit / 3**0.5, rel=0.1)
    assert np.abs(model.query.kernel - model.key.kernel).max() > limit


def test_cl_rescales_the_gradient_into_the_trunk_alone():
    model = build("cl", peers=4)
    views = tf.constant(noise(8, 1, *SHAPE))
    pull = tf.random.normal([4, 8, CLASSES], seed=1)
    got = []
    for forward in (model.students, model.peers):
        with tf.GradientTape() as tape:
            z = [e.logits for e in forward(views, True).values()]
            total = tf.reduce_sum(pull * tf.stack(z))
        got.append(
            (
                z,
                *tape.gradient(
                    total,
                    [
                        model.peers.trunk.trainable_weights,
                        [w for branch in model.peers.branches for w in branch.trainable_weights],
                    ],
                ),
            )
        )
    (z, trunk, branches), (plain_z, plain_trunk, plain_branches) = got
    np.testing.assert_array_equal(z, plain_z)
    for a, b in zip(trunk, plain_trunk):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b / 4, rtol=1e-4, atol=1e-5)
    assert_close(branches, plain_branches, rtol=1e-5)


# The modules that methods add, layer by layer.


def shaken(module, seed=3):
    """Gives a module random weights, statistics too, and returns them by layer."""
    rng = np.random.RandomState(seed)
    for layer in module.layers:
        layer.set_weights(
            [
                rng.randn(*w.shape) / np.sqrt(np.prod(w.shape[:-1]))
                if w.ndim > 1
                else rng.uniform(0.5, 1.5, w.shape)
                for w in layer.get_weights()
            ]
        )
    return [
        [w.astype(np.float64) for w in layer.get_weights()]
        for layer in module.layers
        if layer.weights
    ]


@pytest.mark.parametrize("training", [False, True])
def test_one_gate_and_ensemble(training):
    model = build("one", networks.resnet8)
    (kernel,), norm = shaken(model.gate)
    views = tf.constant(noise(8, 1, *SHAPE))
    low = model.peers.low(views, training)[0].numpy().astype(np.float64)
    student = model.students(views, training)
    g = oracle.softmax(oracle.norm_relu(low.mean((1, 2)) @ kernel, norm, training))
    z = [student[name].logits.numpy() for name in peers(3)]
    want = sum(g[:, j : j + 1] * z[j] for j in range(3))
    np.testing.assert_allclose(student["ensemble"].logits, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_ffl_fusion(training):
    model = build("ffl", networks.resnet8)
    (depthwise,), norm_1, (pointwise,), norm_2, (kernel, bias) = shaken(model.fusion)
    assert depthwise.shape == (3, 3, 3 * 64, 1) and pointwise.shape == (1, 1, 3 * 64, 64)
    student = model.students(tf.constant(noise(8, 1, *SHAPE)), training)
    maps = np.concatenate([student[name].feature_map for name in peers(3)], axis=-1).astype(
        np.float64
    )
    for name, kept in zip(peers(3), np.split(maps, 3, axis=-1)):
        np.testing.assert_allclose(kept.mean((1, 2)), student[name].features, rtol=1e-4, atol=1e-5)
    x = oracle.norm_relu(oracle.convolve(maps, depthwise * np.eye(3 * 64)), norm_1, training)
    x = oracle.norm_relu(oracle.convolve(x, pointwise), norm_2, training)
    np.testing.assert_allclose(
        student["ensemble"].logits, x.mean((1, 2)) @ kernel + bias, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("training", [False, True])
def test_byot_exits_stand_after_each_stage_but_the_last(training):
    model = build("byot", networks.resnet8)
    assert list(model.exits) == ["exit_1", "exit_2", "deepest"]
    images = noise(8, *SHAPE)
    weights = [shaken(module) for module in model.shallow]
    student = model.students(tf.constant(images[:, None]), training)
    assert student["deepest"].features.shape == (8, 64)
    for i, (*convs_and_norms, (kernel, bias)) in enumerate(weights):
        to_stage = keras.Model(
            model.network.input, model.network.get_layer(f"stage_{i + 1}").output
        )
        x = to_stage(model.preprocess(images), training=training).numpy().astype(np.float64)
        strides = [1, *[2] * (2 - i), 1]
        for stride, (conv,), norm in zip(strides, convs_and_norms[::2], convs_and_norms[1::2]):
            x = oracle.norm_relu(oracle.convolve(x, conv, stride), norm, training)
        assert len(convs_and_norms) == 2 * len(strides)
        got = student[f"exit_{i + 1}"]
        np.testing.assert_allclose(got.features, x.mean((1, 2)), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(got.logits, x.mean((1, 2)) @ kernel + bias, rtol=1e-4, atol=1e-5)


def test_ffl_fusion_module_decays_less():
    model = build("ffl", networks.resnet8)
    weights = model.trainable_weights
    before = [w.numpy() for w in weights]
    model.optimizer.apply_gradients([(tf.zeros_like(w), w) for w in weights])
    of_fusion = {id(w) for w in model.fusion.trainable_weights}
    assert 0 < len(of_fusion) < len(weights)
    for w, b in zip(weights, before):
        decay = 1e-5 if id(w) in of_fusion else 5e-4
        # One Nesterov step from rest: w − lr · (1 + μ) · wd · w.
        np.testing.assert_allclose(
            b - w.numpy(), 0.1 * 1.9 * decay * b, rtol=0.05, atol=1e-7, err_msg=w.name
        )


def seeded(input_shape, num_classes):
    """A network whose initialisers have seeds and whose logits are in the policy's precision."""
    images = x = keras.Input(input_shape)
    for stage in (1, 2):
        initial = keras.initializers.GlorotUniform(seed=stage)
        x = keras.layers.Conv2D(
            8, 3, activation="relu", kernel_initializer=initial, name=f"stage_{stage}"
        )(x)
    return keras.Model(
        images, keras.layers.Dense(num_classes)(keras.layers.GlobalAveragePooling2D()(x))
    )


@pytest.mark.parametrize("method", SINGLE_STAGE)
def test_logits_in_low_precision_are_compared_in_float32(method):
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    model = build(method, seeded)
    logs = model.train_step((tf.constant(noise(B, *SHAPE)), tf.constant(LABELS)))
    assert all(np.isfinite(value) and value.dtype == tf.float32 for value in logs.values())
    assert {e.logits.dtype for e in model.all_exits(tf.constant(noise(2, *SHAPE))).values()} == {
        tf.float32
    }


def test_dml_networks_begin_apart_and_share_nothing():
    model = build("dml", seeded, peers=3)
    networks_of = list(model.networks.values())
    first = [network.get_weights()[0] for network in networks_of]
    assert np.abs(first[0] - first[1]).max() > 0.01 < np.abs(first[1] - first[2]).max()
    assert len({id(w) for network in networks_of for w in network.weights}) == 3 * len(
        networks_of[0].weights
    )


def dense(input_shape, num_classes):
    images = keras.Input(input_shape)
    x = keras.layers.Flatten()(images)
    for name in ("stage_1", "stage_2"):
        x = keras.layers.Dense(8, activation="relu", name=name)(x)
    return keras.Model(images, keras.layers.Dense(num_classes)(x), name="dense")


def without_stages(input_shape, num_classes):
    images = keras.Input(input_shape)
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3, name="conv")(images))
    return keras.Model(images, keras.layers.Dense(num_classes)(x), name="without_stages")


@pytest.mark.parametrize(
    "method, network, kwargs, text",
    [
        *(
            (method, without_norm, {"peers": 1}, "`peers=1`: .* at least 2 peers")
            for method in SINGLE_STAGE
            if method != "byot"
        ),
        ("one", dense, {}, r"\(None, 8\) where it is cut.* feature map .*`split_at`"),
        ("ffl", dense, {}, "the network has no feature map .*: cut earlier with `split_at`"),
        ("ffl", without_stages, {"split_at": "conv"}, "no feature map"),
        ("byot", dense, {}, "'dense' has stage_1, stage_2: .* feature map"),
        (
            "byot",
            without_stages,
            {},
            "'without_stages' has no layer stage_1, .* at least two sections",
        ),
    ],
)
def test_what_a_network_lacks_is_named(method, network, kwargs, text):
    with pytest.raises(UserError, match=text) as e:
        build(method, network, **kwargs)
    assert "\n" not in str(e.value)
