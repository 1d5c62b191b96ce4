"""What can stand in the papers' recipe's place: optimizers, schedules, soft labels."""

import functools
import json

import numpy as np
import oracle
import pytest
import tensorflow as tf
from helpers import CLASSES, assert_close, build, noise, with_labels
from tensorflow import keras

from tf_pcl import compat, data, losses, optimizer, schedules
from tf_pcl.data import mixing
from tf_pcl.data.augmentations import Draws
from tf_pcl.errors import UserError
from tf_pcl.options import OPTIMIZERS, Options
from tf_pcl.training import strategy as strategies
from tf_pcl.training.checkpoints import Checkpoints

rng = np.random.RandomState(0)
LAMB = compat.lamb()


def test_the_recipe_of_the_tables_is_what_comes_without_words():
    options = Options()
    assert (options.optimizer, options.learning_rate, options.weight_decay) == ("sgd", 0.1, 5e-4)
    assert (options.schedule, options.warmup_epochs, options.clip_norm) == ("steps", 0, None)
    assert options.label_smoothing == options.mixup == options.cutmix == 0
    made = optimizer.recipe(300, 390)
    assert type(made) is optimizer.CoupledSGD and made.global_clipnorm is None
    assert type(made._learning_rate) is keras.optimizers.schedules.PiecewiseConstantDecay


def test_an_optimizer_brings_its_usual_rate_unless_one_is_given():
    for name, usual in OPTIMIZERS.items():
        options = Options(optimizer=name)
        assert (options.learning_rate, options.weight_decay) == usual
        assert f"{usual.learning_rate:g}" == options.as_flags()["learning_rate"]
    given = Options(optimizer="adamw", learning_rate=0.3, weight_decay=0.0)
    assert (given.learning_rate, given.weight_decay) == (0.3, 0.0)


@pytest.mark.parametrize(
    "settings, text",
    [
        (dict(optimizer="adam"), "Allowed: adamw, lamb, sgd"),
        (dict(schedule="cosine", lr_decay_epochs=(2.0,)), "`lr_decay_epochs` does not go with"),
        (dict(epochs=3, warmup_epochs=4.0), "`warmup_epochs=4` is more than `epochs=3`"),
        (dict(clip_norm=0.0), "more than 0"),
        (dict(label_smoothing=1.5), "at most 1"),
        (dict(mixup=-1.0), "at least 0"),
    ],
)
def test_recipes_out_of_range(settings, text):
    with pytest.raises(UserError, match=text):
        Options(**settings)


@pytest.mark.parametrize("warmup", [0, 1.5])
@pytest.mark.parametrize("schedule", ["steps", "cosine"])
def test_rates_of_a_schedule_with_and_without_warm_up(schedule, warmup):
    epochs, steps = 8, 10
    s = np.arange(epochs * steps, dtype=np.float64)
    if schedule == "cosine":
        want = 0.2 * (1 + np.cos(np.pi * s / (epochs * steps))) / 2
    else:
        want = 0.2 * np.where(s < 40, 1, np.where(s < 60, 0.1, 0.01))
    if warmup:
        want *= np.minimum(1, (s + 1) / (warmup * steps))
    rate = schedules.learning_rate(0.2, epochs, steps, schedule=schedule, warmup_epochs=warmup)
    np.testing.assert_allclose([float(rate(tf.constant(int(i)))) for i in s], want, atol=2e-7)
    again = keras.optimizers.schedules.deserialize(
        json.loads(json.dumps(keras.optimizers.schedules.serialize(rate)))
    )
    assert [float(again(i)) for i in (0, 3, 70)] == [float(rate(i)) for i in (0, 3, 70)]


def test_adamw_is_that_of_keras_and_weights_can_have_their_own_decay():
    gradients = rng.randn(6, 2, 5).astype(np.float32)
    start = rng.randn(2, 5).astype(np.float32)
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 6)

    def trained(made, own=None):
        weights = [tf.Variable(w, name=name) for w, name in zip(start, "ab")]
        if own is not None:
            made.set_decay(weights[1:], own)
        for g in gradients:
            made.apply_gradients(zip(map(tf.constant, g), weights))
        return np.array(weights)

    theirs = trained(keras.optimizers.AdamW(schedule, weight_decay=0.3))
    np.testing.assert_array_equal(trained(optimizer.DecoupledAdam(schedule, 0.3)), theirs)
    made = optimizer.DecoupledAdam(schedule, 0.3, beta_1=0.8)
    mixed = trained(made, own=0.02)
    plain, fainter = (
        trained(keras.optimizers.AdamW(schedule, weight_decay=wd, beta_1=0.8)) for wd in (0.3, 0.02)
    )
    np.testing.assert_array_equal(mixed, [plain[0], fainter[1]])
    again = keras.optimizers.deserialize(json.loads(json.dumps(keras.optimizers.serialize(made))))
    assert type(again) is type(made) and again.get_config() == made.get_config()
    np.testing.assert_array_equal(trained(again), mixed)


def test_lamb_comes_from_addons_or_is_refused_in_one_line():
    if LAMB is None:
        with pytest.raises(UserError, match="tensorflow-addons, which is not installed"):
            optimizer.recipe(2, 3, optimizer="lamb")
        return
    made = optimizer.recipe(2, 3, 0.1, weight_decay=0.01, optimizer="lamb", schedule="cosine")
    w = tf.Variable([3.0, 4.0])
    made.build([w])
    made.apply_gradients([(tf.constant([1.0, -2.0]), w)])
    # The first step of Adam is the gradient's sign; LAMB gives it the length of the weights.
    update = np.array([1.0, -1.0]) + 0.01 * np.array([3.0, 4.0])
    want = np.array([3.0, 4.0]) - 0.1 * 5 / np.linalg.norm(update) * update
    np.testing.assert_allclose(w, want, rtol=1e-5)
    assert optimizer.current_rate(made) == pytest.approx(0.1)
    assert len(optimizer.state(made)) == 3  # The step, and two moments of the weight.


def test_clipping_takes_the_norm_of_the_gradients_of_all_replicas(two_replicas):
    gradients = np.array([[[3.0, 0.0], [0.0, -1.0]], [[1.0, 2.0], [4.0, 0.0]]], np.float32)
    with two_replicas.scope():
        made = optimizer.recipe(2, 3, 0.5, weight_decay=0.0, clip_norm=1.5)
        weights = [tf.Variable([1.0, 1.0], name=name) for name in "ab"]
        made.build(weights)

    @tf.function
    def step():
        mine = tf.gather(gradients, tf.distribute.get_replica_context().replica_id_in_sync_group)
        made.apply_gradients(zip(tf.unstack(mine), weights))

    two_replicas.run(step)
    total = gradients.sum(axis=0)
    clipped = total * 1.5 / np.linalg.norm(total)
    np.testing.assert_allclose(np.array(weights), 1 - 0.5 * 1.9 * clipped, rtol=1e-5)


Z, Q, Y = 4 * rng.randn(16, 10), 4 * rng.randn(16, 10), rng.randint(0, 10, 16)


def test_smoothing_is_of_the_labels_alone():
    z, q = tf.constant(Z, tf.float32), tf.constant(Q, tf.float32)
    soft, weights = oracle.softmax(rng.randn(16, 10)), rng.uniform(0, 2, 16)
    plain = losses.distillation(q, z, 3.0).numpy()
    with losses.smoothed(0.1):
        for labels, p in ((Y, np.eye(10)[Y]), (soft, soft)):
            want = oracle.ce(0.9 * p + 0.01, Z)
            assert losses.cross_entropy(labels, z).numpy() == pytest.approx(want, rel=1e-5)
        with losses.weighted(tf.constant(weights, tf.float32)):
            want = oracle.ce(0.9 * np.eye(10)[Y] + 0.01, Z, weights)
            assert losses.cross_entropy(Y, z).numpy() == pytest.approx(want, rel=1e-5)
        assert losses.distillation(q, z, 3.0).numpy() == plain
        tested = losses.cross_entropies(Y, z)
    np.testing.assert_allclose(np.mean(tested), oracle.ce(Y, Z), rtol=1e-5)
    assert losses.cross_entropy(Y, z).numpy() == pytest.approx(oracle.ce(Y, Z), rel=1e-5)


def test_smoothing_in_a_training_step(digits):
    terms = []
    for smoothing in (0.0, 0.2):
        model = build("cl", "without_norm", label_smoothing=smoothing)
        views, labels = next(iter(data.train_batches(digits, 16, 1)))
        logits = [e.logits for e in model.students(views, True).values()]
        terms.append(model.train_step((views, labels)))
        p = (1 - smoothing) * np.eye(CLASSES)[labels] + smoothing / CLASSES
        want = 0.5 * sum(oracle.ce(p, z.numpy().astype(np.float64)) for z in logits)
        assert float(terms[-1]["loss/ce"]) == pytest.approx(want, rel=1e-4)
    assert float(terms[0]["loss/consensus"]) == float(terms[1]["loss/consensus"])
    with pytest.raises(UserError, match="label_smoothing=2"):
        model.compile(label_smoothing=2)


def mixed(size, mixup=0.0, cutmix=0.0, rows=slice(None), views=2):
    """(plain views, labels, mixed views, soft labels) of random images."""
    x, y = noise(size, views, 8, 8, 3), np.random.RandomState(1).randint(0, 10, size)
    draws = Draws(tf.constant([1, 2]), size, rows)
    got, soft = mixing.mixed(
        tf.constant(x[rows]), tf.constant(y[rows], tf.int32), draws, 10, mixup, cutmix
    )
    return x[rows], y[rows], got.numpy(), soft.numpy()


def shares(y, soft, partner):
    """λ of the images whose partner is of another class, by number."""
    return {i: soft[i, y[i]] for i in range(len(y)) if y[i] != y[partner[i]]}


@pytest.mark.parametrize("size", [10, 9])
def test_mixup_against_numpy(size):
    x, y, got, soft = mixed(size, mixup=0.8)
    partner = np.minimum(np.arange(size) ^ 1, size - 1)
    one_hot = np.eye(10)
    found = shares(y, soft, partner)
    assert len(set(found.values())) == len(found) > 5
    for i, share in found.items():
        share = np.float64(share)
        label = share * one_hot[y[i]] + (1 - share) * one_hot[y[partner[i]]]
        np.testing.assert_allclose(soft[i], label, atol=1e-6)
        want = share * x[i].astype(np.float64) + (1 - share) * x[partner[i]]
        # Rounded, and all views with one λ.
        assert np.abs(got[i] - want).max() < 0.5 + 1e-3
    if size % 2:
        np.testing.assert_array_equal(got[-1], x[-1])
        np.testing.assert_array_equal(soft[-1], one_hot[y[-1]])


def test_cutmix_puts_one_rectangle_of_the_partner_into_all_views():
    x, y, got, soft = mixed(12, cutmix=1.0)
    partner = np.arange(12) ^ 1
    areas = []
    for i in range(12):
        np.testing.assert_array_equal(got[i], np.where(got[i] == x[i], x[i], x[partner[i]]))
        own = (got[i] == x[i]).all(axis=(0, -1))
        areas.append(own.mean())
        taken = np.argwhere(~own)
        if len(taken):
            low, high = taken.min(0), taken.max(0)
            assert len(taken) == np.prod(high - low + 1)
        if y[i] != y[partner[i]]:
            assert soft[i, y[i]] == pytest.approx(own.mean(), abs=1e-6)
        assert soft[i].sum() == pytest.approx(1, abs=1e-6)
    assert len(set(areas)) > 5


def test_with_both_each_image_draws_one():
    x, y, both, soft = mixed(40, mixup=1.0, cutmix=1.0)
    (*_, up, _), (*_, cut, _) = mixed(40, mixup=1.0), mixed(40, cutmix=1.0)
    is_up = (both == up).all(axis=(1, 2, 3, 4))
    is_cut = (both == cut).all(axis=(1, 2, 3, 4))
    assert (is_up | is_cut).all() and is_up.sum() > 10 and is_cut.sum() > 10


@pytest.mark.parametrize("alpha", [0.01, 0.2, 1.0, 8.0])
def test_beta(alpha):
    got = Draws(tf.constant([3, 4]), 20_000).beta(alpha).numpy()
    assert got.min() >= 0 and got.max() <= 1
    assert got.mean() == pytest.approx(0.5, abs=0.02)
    assert got.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), abs=0.01)


def test_mixed_batches_are_functions_of_seed_and_step_and_shards_are_their_parts():
    images = with_labels(noise(60, 8, 8, 1), np.arange(60, dtype=np.int32) % 10)
    make = lambda **kw: [
        *data.train_batches(images, 12, 2, views=2, mixup=0.4, cutmix=1.0, **kw).as_numpy_iterator()
    ]
    whole = make()
    parts = [make(shard=(i, 3)) for i in range(3)]
    for step, (views, labels) in enumerate(whole):
        assert labels.shape == (12, 10) and labels.dtype == np.float32
        for j, one in ((0, views), (1, labels)):
            np.testing.assert_array_equal(one, np.concatenate([p[step][j] for p in parts]))
    np.testing.assert_equal(make(start=7), whole[7:])
    assert not np.array_equal(whole[0][1], make(seed=1)[0][1])
    with pytest.raises(UserError, match="`mixup=0.4`.*multiple of 8"):
        make(shard=(0, 4))


RECIPE = dict(optimizer="adamw", schedule="cosine", warmup_epochs=0.5, clip_norm=0.5)


def built(method="pcl"):
    made = optimizer.recipe(2, 6, 0.01, weight_decay=0.05, **RECIPE)
    model = build(method, "without_norm", 2, 6, made, label_smoothing=0.1)
    model.optimizer.build(model.trainable_weights)
    return model


def batches_of(model, digits, **kw):
    return data.train_batches(digits, 32, 2, views=model.num_views, mixup=0.3, cutmix=1.0, **kw)


@pytest.mark.slow
def test_a_run_with_another_recipe_goes_on_bit_for_bit(digits, tmp_path):
    whole, part, rest = built(), built(), built()
    for i, batch in enumerate(batches_of(whole, digits).take(6)):
        whole.train_step(batch)
        if i < 3:
            part.train_step(batch)
    Checkpoints(part, str(tmp_path)).save(3)
    assert Checkpoints(rest, str(tmp_path)).restore() == 3
    for batch in batches_of(rest, digits, start=3).take(3):
        rest.train_step(batch)
    whole, rest = ([*m.weights, *m.optimizer.variables] for m in (whole, rest))
    assert_close(rest, whole, rtol=0)


@pytest.mark.slow
def test_two_replicas_equal_one_with_another_recipe(digits, two_replicas):
    results = []
    for strategy in (tf.distribute.get_strategy(), two_replicas):
        with strategy.scope():
            model = built("dml")
        batches = functools.partial(batches_of, model, digits)
        history = model.fit(
            strategies.distribute(strategy, batches), epochs=1, steps_per_epoch=5, verbose=0
        ).history
        results.append(([w.numpy() for w in model.weights], history))
    (weights, history), (mirrored, of_two) = results
    assert_close(weights, mirrored, rtol=1e-5, atol=2e-5)
    assert_close(history, of_two, rtol=1e-4, atol=1e-4)
