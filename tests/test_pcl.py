"""PCL against its equations."""

import numpy as np
import oracle
import pytest
import tensorflow as tf
from helpers import CLASSES, SHAPE, assert_close, noise, with_norm, without_norm
from tensorflow import keras

from tf_pcl import networks
from tf_pcl.errors import UserError
from tf_pcl.methods.distiller import Exit
from tf_pcl.methods.pcl import PCL

rng = np.random.RandomState(0)
B, EPOCHS, STEPS = 16, 30, 10


def build(network=networks.resnet8, **kwargs):
    model = PCL(
        lambda: network(SHAPE, CLASSES), preprocess=networks.standardise([78.0], [96.0]), **kwargs
    )
    model.compile(epochs=EPOCHS, steps_per_epoch=STEPS)
    return model


def exits(names, seed):
    z = 3 * np.random.RandomState(seed).randn(len(names), B, CLASSES)
    return z, {name: Exit(tf.Variable(logits, dtype=tf.float32)) for name, logits in zip(names, z)}


LABELS = rng.randint(0, CLASSES, B)


@pytest.mark.parametrize(
    "m, T, step", [(2, 3.0, 0), (3, 3.0, 37), (3, 1.0, 79), (4, 5.0, 80), (3, 3.0, 250)]
)
def test_loss(m, T, step):
    model = build(without_norm, peers=m, temperature=T)
    model.step.assign(step)
    names = [f"peer_{j + 1}" for j in range(m)]
    z, student = exits([*names, "ensemble"], 1)
    z_t, teacher = exits([f"mean_{n}" for n in [*names, "ensemble"]], 2)
    # α = 80 of 300 epochs, 8 of 30.
    want = oracle.pcl(LABELS, z[:m], z[m], z_t[:m], T, oracle.omega(step / STEPS, 8.0))
    with tf.GradientTape() as tape:
        terms = model.loss_terms(LABELS, student, teacher)
        distilled = terms["ensemble"] + terms["mean"]
    np.testing.assert_allclose([terms[k] for k in ("ce", "ensemble", "mean")], want, rtol=1e-5)
    # No gradient flows into the teachers through what they teach; the students get theirs.
    logits = [e.logits for e in [*student.values(), *teacher.values()]]
    gradients = tape.gradient(distilled, logits)
    assert [g is None for g in gradients] == [False] * m + [True] * (m + 2)


def test_ablations():
    names = ["peer_1", "peer_2", "peer_3"]
    z, student = exits(names, 1)
    z_e, with_ensemble = exits(["ensemble"], 3)

    def terms(**kwargs):
        model = build(without_norm, **kwargs)
        model.step.assign(40)
        given = {**student, **with_ensemble} if "ensemble" in model.exits else student
        teacher = exits([f"mean_{n}" for n in given], 2)[1]
        return model, {k: v.numpy() for k, v in model.loss_terms(LABELS, given, teacher).items()}

    w = oracle.omega(4.0, 8.0)
    paper = oracle.pcl(
        LABELS, z, z_e[0], exits([f"mean_{n}" for n in [*names, "ensemble"]], 2)[0][:3], 3.0, w
    )

    model, got = terms(ensemble_teacher="none")
    assert set(got) == {"ce", "mean"}
    assert "ensemble" not in model.exits
    assert "mean_ensemble" not in model.exits
    assert got["ce"] == pytest.approx(sum(oracle.ce(LABELS, x) for x in z), rel=1e-5)

    model, got = terms(peer_teacher="none")
    assert set(got) == {"ce", "ensemble"} and model.mean is None and model.deployed_exit == "peer_1"
    assert got["ensemble"] == pytest.approx(paper[1], rel=1e-5)

    model, got = terms(peer_teacher="mutual")
    assert model.mean is None and model.deployed_exit == "peer_1"
    assert got["mean"] == pytest.approx(oracle.pcl(LABELS, z, z_e[0], z, 3.0, w)[2], rel=1e-5)

    model, got = terms(rampup_epochs=0)
    assert got["ensemble"] == pytest.approx(paper[1] / w, rel=1e-5)

    model, got = terms(distill_weight=0.5)
    assert got["mean"] == pytest.approx(0.5 * paper[2], rel=1e-5)

    assert build(without_norm, views="shared").num_views == 1 and build(without_norm).num_views == 3


def test_ensemble_is_a_classifier_of_the_features_or_the_mean_of_the_logits():
    views = tf.constant(noise(6, 3, *SHAPE))
    model = build(without_norm)
    out = model.students(views, False)
    peers = [out[f"peer_{j}"] for j in (1, 2, 3)]
    kernel, bias = model.student.ensemble_classifier.get_weights()
    assert kernel.shape == (3 * 16, CLASSES)
    want = np.concatenate([p.features for p in peers], 1) @ kernel + bias
    np.testing.assert_allclose(out["ensemble"].logits, want, atol=1e-4)
    model = build(without_norm, ensemble_teacher="logits")
    out = model.students(views, False)
    np.testing.assert_allclose(
        out["ensemble"].logits, np.mean([out[f"peer_{j}"].logits for j in (1, 2, 3)], 0), atol=1e-5
    )


def test_peers_begin_apart_and_see_their_own_views():
    views = noise(6, 3, *SHAPE)
    model = build(without_norm)
    one = model.students(tf.constant(views[:, :1]), False)
    own = model.students(tf.constant(views), False)
    assert np.abs(one["peer_1"].logits - one["peer_2"].logits).max() > 1e-3
    for j in range(3):
        alone = model.students(tf.constant(views[:, j : j + 1]), False)[f"peer_{j + 1}"].logits
        np.testing.assert_allclose(own[f"peer_{j + 1}"].logits, alone, atol=1e-4)
        np.testing.assert_allclose(model.student.target(j)(views[:, j]), alone, atol=1e-4)


def test_views_share_the_trunks_batch_statistics_or_have_their_own():
    views = noise(6, 3, *SHAPE)
    views[:, 1] //= 4
    together, apart = (build(with_norm, trunk_batch=way) for way in ("together", "apart"))
    apart.student.set_weights(together.student.get_weights())
    trunk, raw = apart.student.trunk, apart.preprocess
    own = [trunk(raw(views[:, j]), training=True) for j in range(3)]
    joint = tf.split(trunk(raw(np.concatenate(list(views.swapaxes(0, 1)))), training=True), 3)
    for model, want in ((together, joint), (apart, own)):
        assert_close(model.student.low(tf.constant(views), True), want, atol=1e-4)
    assert max(np.abs(a - b).max() for a, b in zip(own, joint)) > 0.1
    assert apart.mean.trunk_batch == "apart"


@pytest.mark.parametrize(
    "kwargs, updates",
    [
        ({"ema_decay": 0.6}, [oracle.phi(g, 0.6) for g in range(1, 13)]),
        # 300 steps in all: the average spans 1 % of them, β = 1 − 1/3.
        pytest.param({}, [oracle.phi(g, 2 / 3) for g in range(1, 13)], marks=pytest.mark.slow),
        # 10 steps an epoch: one update, φ(1) = 0, at the end of the first.
        ({"ema_every": "epoch"}, [1.0] * 9 + [0.0, 1.0, 1.0]),
    ],
)
@pytest.mark.parametrize(
    "network", [without_norm, pytest.param(networks.resnet8, marks=pytest.mark.slow)]
)
def test_mean_teacher_is_the_average_of_the_weights(network, kwargs, updates):
    model = build(network, **kwargs)
    batch = (tf.constant(noise(8, 3, *SHAPE)), tf.constant(LABELS[:8]))
    want = [w.numpy().astype(np.float64) for w in model.mean.trainable_weights]
    assert any(w is model.mean.ensemble_classifier.kernel for w in model.mean.trainable_weights)
    assert len(want) == len(model.student.trainable_weights)
    step = tf.function(model.train_step)
    for phi in updates:
        step(batch)
        want = [
            phi * t + (1 - phi) * s.numpy() for t, s in zip(want, model.student.trainable_weights)
        ]
        assert_close(model.mean.trainable_weights, want, atol=2e-5)


def test_mean_teacher_keeps_statistics_of_its_own_passes():
    model = build()
    views = tf.constant(noise(8, 3, *SHAPE))
    statistics = lambda group: [
        w.numpy() for w in group.trunk.layers if hasattr(w, "moving_mean") for w in [w.moving_mean]
    ]
    for weight in model.mean.trunk.trainable_weights:
        weight.assign_add(0.1 * tf.random.normal(weight.shape))
    before = statistics(model.mean)
    model.train_step((views, tf.constant(LABELS[:8])))
    after, of_students = statistics(model.mean), statistics(model.student)
    assert all(np.abs(a - b).max() > 0 for a, b in zip(before, after))
    assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(after, of_students))


@pytest.mark.slow
def test_mean_teacher_of_epochs_is_usable_after_the_first(digits):
    """The first update, φ = 0, makes it the peers, with their statistics of BatchNorm too."""
    batch, steps = 64, len(digits.train) // 64
    model = PCL(
        lambda: networks.resnet8(SHAPE, CLASSES),
        preprocess=networks.standardise(digits.mean, digits.std),
        ema_every="epoch",
    )
    model.compile(epochs=8, steps_per_epoch=steps)
    step = tf.function(model.train_step)
    for k in range(steps):
        images, labels = digits.train.fetch(tf.range(k * batch, (k + 1) * batch))
        step((tf.repeat(images[:, None], 3, axis=1), labels))
    assert_close(model.mean.weights, model.student.weights, rtol=1e-5, atol=1e-6)
    images, labels = digits.test.images, digits.test.labels.numpy()
    logits = {name: e.logits.numpy() for name, e in model.all_exits(images).items()}
    error = {name: 100 * np.mean(z.argmax(-1) != labels) for name, z in logits.items()}
    for name in ("peer_1", "peer_2", "peer_3", "ensemble"):
        assert error[f"mean_{name}"] == pytest.approx(error[name], abs=0.5)
    assert error["mean_peer_1"] < 50


def test_high_capacity_network_is_the_mean_ensemble():
    model = build(without_norm, deploy="ensemble")
    images = noise(5, *SHAPE)
    assert model.deployed_exit == "mean_ensemble"
    np.testing.assert_allclose(
        model.deployed()(images),
        model.all_exits(tf.constant(images))["mean_ensemble"].logits,
        atol=1e-4,
    )
    assert len(model.deployed().trainable_weights) == len(model.mean.trainable_weights)


def test_schedules_are_reported():
    model = build(without_norm)
    model.step.assign(40)
    values = model.schedules()
    assert float(values["rampup"]) == pytest.approx(oracle.omega(4.0, 8.0), rel=1e-5)
    assert float(values["ema_decay"]) == pytest.approx(oracle.phi(40, 2 / 3), rel=1e-5)


@pytest.mark.parametrize(
    "kwargs, text",
    [
        ({"peers": 1}, "at least 2 peers"),
        ({"ema_every": "steps"}, "Did you mean step"),
        ({"views": "both"}, "own, shared"),
        ({"trunk_batch": "alone"}, "apart, together"),
        ({"deploy": "ensemble", "ensemble_teacher": "none"}, "no ensemble to deploy"),
        ({"split_at": "stage_9"}, "stage_2"),
    ],
)
def test_what_cannot_be(kwargs, text):
    with pytest.raises(UserError, match=text):
        build(without_norm, **kwargs)


def test_the_users_network_is_the_first_peer_and_is_trained():
    network = networks.resnet8(SHAPE, CLASSES)
    before = network.get_weights()
    model = PCL(network, peers=2)
    # All peers share what the network begins with, pretrained weights for instance.
    np.testing.assert_array_equal(model.student.trunk.get_weights()[0], before[0])
    model.compile(keras.optimizers.SGD(0.5), epochs=1, steps_per_epoch=1)
    model.train_step((tf.constant(noise(8, 2, *SHAPE)), tf.constant(LABELS[:8])))
    assert np.abs(network.get_weights()[0] - before[0]).max() > 1e-3
    images = noise(5, *SHAPE)
    np.testing.assert_allclose(model.student.target()(images), network(images), rtol=1e-4)
