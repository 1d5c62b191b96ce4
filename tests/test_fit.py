"""What Keras's users give compile, fit and evaluate: labels, weights, batches, callbacks."""

import numpy as np
import oracle
import pytest
import tensorflow as tf
from helpers import assert_close, build, noise, slow_but, without_norm
from tensorflow import keras

from tf_pcl import methods, networks
from tf_pcl.errors import UserError
from tf_pcl.methods import METHODS
from tf_pcl.optimizer import CoupledSGD, current_rate

rng = np.random.RandomState(0)
N, SHAPE, CLASSES = 50, (8, 8, 1), 10
IMAGES, LABELS = noise(N, *SHAPE), rng.randint(0, CLASSES, N)
SOFT = oracle.softmax(2 * rng.randn(N, CLASSES))
WEIGHTS = rng.uniform(0, 3, N)
BOTH = ["baseline", pytest.param("pcl", marks=pytest.mark.slow)]


def tiny(method="baseline", optimizer=None, network=without_norm, **compiled):
    """A compiled method of one view around a tiny network; the same weights at each call."""
    keras.utils.set_random_seed(0)
    given = {"preprocess": networks.standardise([128.0], [64.0])}
    if method == "pcl":
        given.update(views="shared", rampup_epochs=0)
    model = METHODS[method](lambda: network(SHAPE, CLASSES), **given)
    model.compile(optimizer, **compiled)
    return model


def still(method, **compiled):
    """A method whose weights do not move, so that a loss of fit can be computed beside it."""
    return tiny(method, keras.optimizers.SGD(0.0), **compiled)


def logits(model):
    """{exit name: logits [N, C]} of all images."""
    return {name: e.logits.numpy() for name, e in model.all_exits(tf.constant(IMAGES)).items()}


def wanted(model, labels, weights=1.0):
    """{name: value} that fit on all images reports for a PCL or Baseline at rest, by the oracle."""
    z = logits(model)
    if "ensemble" not in z:
        return {"loss/ce": oracle.ce(labels, z["peer_1"], weights)}
    peers = [z[f"peer_{j}"] for j in (1, 2, 3)]
    means = [z[f"mean_peer_{j}"] for j in (1, 2, 3)]
    terms = oracle.pcl(labels, peers, z["ensemble"], means, 3.0, 1.0, weights)
    return dict(zip(("loss/ce", "loss/ensemble", "loss/mean"), terms))


def dataset(*batch, size=16):
    return tf.data.Dataset.from_tensor_slices(batch).batch(size)


FORMS = {
    "int32": LABELS.astype(np.int32),
    "uint8": LABELS.astype(np.uint8),
    "uint64": LABELS.astype(np.uint64),
    "float": LABELS.astype(np.float32),
    "column": LABELS[:, None],
    "column of uint8": LABELS[:, None].astype(np.uint8),
    "one-hot": np.eye(CLASSES)[LABELS],
    "one-hot int": np.eye(CLASSES, dtype=np.int64)[LABELS],
    "soft": SOFT,
    "soft float16": SOFT.astype(np.float16),
}
QUICK_FORMS = ("uint8", "column", "soft")


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("names", slow_but([QUICK_FORMS, tuple(FORMS)], QUICK_FORMS), ids=len)
def test_labels_of_every_form_give_the_true_loss_and_error(names, method):
    model = still(method)
    z = logits(model)
    for name in names:
        labels = FORMS[name]
        y = labels if name.startswith("soft") else LABELS
        for data in ((IMAGES, labels), (dataset(IMAGES, labels), None)):
            # 50 images in batches of 16: the last one has 2.
            found = model.evaluate(
                *data, batch_size=16 if data[1] is not None else None, verbose=0, return_dict=True
            )
            assert set(found) >= {"loss", *(f"error/{exit_name}" for exit_name in model.exits)}
            want = oracle.ce(y, z[model.deployed_exit])
            assert found["loss"] == pytest.approx(want, rel=1e-3 if "16" in name else 1e-5), name
            for exit_name in model.exits:
                want = oracle.error(y, z[exit_name])
                assert found[f"error/{exit_name}"] == pytest.approx(want, abs=1e-4), name
        history = model.fit(
            IMAGES, labels, batch_size=16, verbose=0, validation_data=(IMAGES, labels)
        ).history
        for term, want in wanted(model, y).items():
            assert history[term][0] == pytest.approx(want, rel=1e-3, abs=1e-5), (name, term)
        assert history["error/peer_1"][0] == pytest.approx(oracle.error(y, z["peer_1"]), abs=1e-4)
        assert history["val_loss"][0] == pytest.approx(found["loss"], rel=1e-5)


@pytest.mark.slow
def test_plain_labels_of_any_type_train_alike_to_the_last_bit():
    weights = []
    for name in ("int32", "uint8", "uint64", "float", "column"):
        model = tiny("pcl")
        model.fit(IMAGES, FORMS[name], epochs=2, batch_size=16, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    np.testing.assert_equal(weights[1:], weights[:1] * 4)


def generator(*batch):
    for i in range(0, N, 10):
        yield tuple(part[i : i + 10] for part in batch)


def test_labels_from_generators_whose_shapes_are_told_late():
    model = still("baseline")
    z = logits(model)["peer_1"]
    for labels in (LABELS, LABELS[:, None], SOFT):
        found = model.evaluate(generator(IMAGES, labels), verbose=0, return_dict=True)
        y = labels[:, 0] if labels.shape[1:] == (1,) else labels
        assert found["loss"] == pytest.approx(oracle.ce(y, z), rel=1e-5)
    # A width that is known only when a batch is there.
    for labels in (LABELS[:, None], SOFT):
        images, columns = (
            tf.TensorSpec([None] * 4, tf.uint8),
            tf.TensorSpec([None, None], labels.dtype),
        )
        late = tf.data.Dataset.from_generator(
            lambda labels=labels: generator(IMAGES, labels), output_signature=(images, columns)
        )
        found = model.evaluate(late, verbose=0, return_dict=True)
        y = labels[:, 0] if labels.shape[1:] == (1,) else labels
        assert found["loss"] == pytest.approx(oracle.ce(y, z), rel=1e-5)


WRONG_LABELS = {
    "-1": (np.where(np.arange(N) == 40, -1, LABELS), "the labels go from -1 to 9 .* 0 to 9"),
    "10": (np.where(np.arange(N) == 40, 10, LABELS), "the labels go from 0 to 10 .* 0 to 9"),
    "255": (np.full(N, 255, np.uint8), "to 255"),
    "huge": (np.full(N, 2**63 + 1, np.uint64), "0 to 9"),
    "fractions": (LABELS + 0.5, "fractions"),
    "nan": (np.full(N, np.nan), "fractions"),
    "texts": (LABELS.astype(str), "numbers"),
    "no probabilities": (0.9 * SOFT, "sum to 1"),
    "several classes": (np.ones([N, CLASSES], int), "sum to 1"),
    "no class": (np.zeros([N, CLASSES]), "sum to 1"),
    "nan probabilities": (np.full([N, CLASSES], np.nan), "sum to 1"),
    "other width": (np.eye(7)[LABELS % 7], r"\[batch, 10\]|\[\?,10\]"),
    "three axes": (np.eye(CLASSES)[LABELS][:, None], r"\[batch, 10\]"),
}


def one_sentence(error, text):
    assert error.match(text) and "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("jit_compile", slow_but([False, True], False))
@pytest.mark.parametrize("name", slow_but(WRONG_LABELS, "-1", "255", "fractions", "other width"))
def test_labels_that_are_none_are_refused(name, jit_compile):
    labels, text = WRONG_LABELS[name]
    model = tiny(jit_compile=jit_compile, epochs=1, steps_per_epoch=4)
    for data in ((IMAGES, labels), (dataset(IMAGES, labels), None)):
        for run in (model.fit, model.evaluate):
            with pytest.raises(UserError) as error:
                run(*data, verbose=0)
            one_sentence(error, text)
    with pytest.raises(UserError) as error:
        model.fit(dataset(IMAGES, LABELS), validation_data=dataset(IMAGES, labels), verbose=0)
    one_sentence(error, text)
    if not jit_compile:
        with pytest.raises(UserError) as error:
            model.fit(generator(IMAGES, labels), verbose=0)
        one_sentence(error, text)


def test_a_network_of_one_output_is_refused():
    model = methods.Baseline(without_norm(SHAPE, 1))
    model.compile()
    with pytest.raises(UserError, match="one output"):
        model.fit(IMAGES, np.zeros([N, 1]), verbose=0)


THREE = np.stack([IMAGES] * 3, axis=1)
plain = lambda: dataset(IMAGES, LABELS)
WRONG_BATCHES = {
    "dict": (lambda: plain().map(lambda x, y: {"image": x, "label": y}), "a dict of image, label"),
    "views apart": (lambda: plain().map(lambda x, y: ((x, x, x), y)), "tuple of 3: stack"),
    "dict of views": (lambda: plain().map(lambda x, y: ({"a": x}, y)), "dict of 1"),
    "dict of labels": (lambda: plain().map(lambda x, y: (x, {"a": y})), "labels are a dict"),
    "no labels": (lambda: plain().map(lambda x, y: x), "without labels"),
    "four": (lambda: plain().map(lambda x, y: (x, y, y, y)), "tuple of 4"),
    "texts": (lambda: plain().map(lambda x, y: (tf.as_string(x), y)), "type string"),
    "one image": (lambda: plain().unbatch(), "batch the data set"),
    "other size": (lambda: plain().map(lambda x, y: (x[:, :6], y)), r"\[6, 8, 1\].*\[8, 8, 1\]"),
    "other channels": (lambda: plain().map(lambda x, y: (tf.repeat(x, 3, -1), y)), r"\[8, 8, 3\]"),
    "no shapes": (
        lambda: tf.data.Dataset.from_generator(
            lambda: generator(IMAGES, LABELS), (tf.uint8, tf.int64)
        ),
        "no known shape",
    ),
    "ragged": (
        lambda: plain().map(lambda x, y: (tf.RaggedTensor.from_tensor(x, ragged_rank=2), y)),
        "dense",
    ),
    "several views": (lambda: dataset(THREE, LABELS), "one view|each image once"),
    "size known late": (
        lambda: tf.data.Dataset.from_generator(
            lambda: generator(IMAGES[:, :6], LABELS),
            output_signature=(tf.TensorSpec([None] * 4, tf.uint8), tf.TensorSpec([None], tf.int64)),
        ),
        r"6,8,1.* is needed",
    ),
}


@pytest.mark.parametrize("name", WRONG_BATCHES)
def test_batches_that_are_none_are_refused(name):
    make, text = WRONG_BATCHES[name]
    model = tiny(epochs=1, steps_per_epoch=4)
    for run in (model.fit, model.evaluate):
        with pytest.raises(UserError) as error:
            run(make(), verbose=0)
        one_sentence(error, text)


@pytest.mark.parametrize(
    "x, y, text",
    [
        (IMAGES, None, "without labels"),
        ([IMAGES, IMAGES], LABELS, "tuple of 2"),
        (IMAGES, LABELS[:-1], "same number"),
        (THREE, LABELS, "one view|each image once"),
        (IMAGES[:, :6], LABELS, "resize"),
        (IMAGES.astype(str), LABELS, "type string"),
    ],
)
def test_arrays_that_are_no_images_and_labels_are_refused(x, y, text):
    model = tiny()
    for run in (model.fit, model.evaluate):
        with pytest.raises(UserError) as error:
            run(x, y, verbose=0)
        one_sentence(error, text)


@pytest.mark.slow
def test_the_number_of_views_is_the_methods():
    model = methods.PCL(
        lambda: without_norm(SHAPE, CLASSES), preprocess=networks.standardise([128.0], [64.0])
    )
    model.compile()
    for wrong in (IMAGES, THREE[:, :2], THREE[:, :1]):
        with pytest.raises(UserError) as error:
            model.fit(wrong, LABELS, verbose=0)
        one_sentence(error, "trains on 3 views")
    with pytest.raises(UserError) as error:
        model.fit(THREE, LABELS, validation_split=0.5, verbose=0)
    one_sentence(error, "each image once")
    model.fit(THREE, LABELS, validation_data=(THREE[:, :1], LABELS), verbose=0)
    with pytest.raises(UserError, match="resize"):
        model.predict(IMAGES[:, :6], verbose=0)
    assert model.predict(IMAGES, verbose=0).shape == (N, CLASSES)


def test_raw_images_are_seen_before_they_ruin_the_network():
    def deep(input_shape, num_classes):
        convolve = lambda: keras.layers.Conv2D(
            32,
            3,
            padding="same",
            activation="relu",
            kernel_initializer=keras.initializers.HeNormal(7),
        )
        return keras.Sequential(
            [
                keras.Input(input_shape),
                *(convolve() for _ in range(4)),
                keras.layers.Flatten(),
                keras.layers.Dense(num_classes),
            ]
        )

    model = methods.Baseline(deep(SHAPE, CLASSES))
    model.compile()
    before = [w.numpy() for w in model.trainable_weights]
    with pytest.raises(UserError) as error:
        model.fit(IMAGES, LABELS, verbose=0)
    one_sentence(error, "up to 255.*preprocess")
    np.testing.assert_equal([w.numpy() for w in model.trainable_weights], before)
    # The same network learns from scaled images.
    model.fit(IMAGES / 255.0, LABELS, verbose=0)
    # A loss that is lost later is said, too.
    model = methods.Baseline(without_norm(SHAPE, CLASSES))
    model.compile(keras.optimizers.SGD(1e6))
    with pytest.raises(UserError) as error:
        model.fit(IMAGES, LABELS, epochs=3, verbose=0)
    one_sentence(error, "preprocess")


@pytest.mark.parametrize("method", BOTH)
def test_weights_of_images_and_classes(method):
    of_class = rng.uniform(0, 3, CLASSES)
    by_class = dict(enumerate(of_class))
    model = still(method)
    z = logits(model)
    for labels, own in ((LABELS, of_class[LABELS]), (SOFT, SOFT @ of_class)):
        for given, weights in (
            (dict(sample_weight=WEIGHTS), WEIGHTS),
            (dict(class_weight=by_class), own),
            (dict(sample_weight=WEIGHTS[:, None], class_weight=by_class), WEIGHTS * own),
            ({}, 1.0),
        ):
            history = model.fit(IMAGES, labels, batch_size=16, verbose=0, **given).history
            for term, want in wanted(model, labels, weights).items():
                assert history[term][0] == pytest.approx(want, rel=1e-4, abs=1e-5), (term, given)
            # Errors count every image once.
            want = oracle.error(labels, z["peer_1"])
            assert history["error/peer_1"][0] == pytest.approx(want, abs=1e-4)
        found = model.evaluate(
            IMAGES, labels, sample_weight=WEIGHTS, batch_size=16, verbose=0, return_dict=True
        )
        want = oracle.ce(labels, z[model.deployed_exit], WEIGHTS)
        assert found["loss"] == pytest.approx(want, rel=1e-5)
    with pytest.raises(UserError):
        model.fit(IMAGES, LABELS, sample_weight=-WEIGHTS, verbose=0)
    for no_array in (2.0, WEIGHTS.tolist()):
        with pytest.raises(UserError, match="`sample_weight` is a .*: give an array"):
            model.evaluate(IMAGES, LABELS, sample_weight=no_array, verbose=0)
    with pytest.raises(UserError):
        model.fit(IMAGES, LABELS, sample_weight=np.stack([WEIGHTS] * 2, 1), verbose=0)
    for wrong in ({0: 1.0}, {**by_class, 10: 1.0}, {**by_class, 0: -1.0}, {"a": 1}, 3):
        with pytest.raises(UserError) as error:
            model.fit(IMAGES, LABELS, class_weight=wrong, verbose=0)
        one_sentence(error, "class_weight")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_term_of_every_method_is_weighted(method):
    model = build(method, "without_norm", optimizer=keras.optimizers.SGD(0.0))
    model.step.assign(20)
    shape = (16, *SHAPE) if model.num_views == 1 else (16, model.num_views, *SHAPE)
    views, labels = noise(*shape), LABELS[:16]
    half = (np.arange(16) % 2).astype(np.float32)
    run = lambda weights, labels=labels: {
        name: value[0]
        for name, value in model.fit(
            views, labels, sample_weight=weights, batch_size=16, shuffle=False, verbose=0
        ).history.items()
        if name.startswith("loss/")
    }
    one, twice = run(np.ones(16)), run(np.full(16, 2.0))
    assert set(one) == {f"loss/{term}" for term in model.terms}
    for name in one:
        assert twice[name] == pytest.approx(2 * one[name], rel=1e-4, abs=1e-6), name
        assert one[name] > 0 or name in ("loss/self", "loss/mean"), name
    # Without a weight an image's label does not count.
    changed = np.where(half == 0, (labels + 1) % CLASSES, labels)
    assert run(half) == pytest.approx(run(half, changed), rel=1e-5)
    assert run(np.ones(16), changed)["loss/ce"] != pytest.approx(one["loss/ce"], rel=1e-4)
    assert all(value == 0 for value in run(np.zeros(16)).values())


@pytest.mark.slow
def test_two_replicas_weigh_as_one(two_replicas):
    trained = []
    for strategy in (tf.distribute.get_strategy(), two_replicas):
        with strategy.scope():
            model = tiny("pcl")
        history = model.fit(
            dataset(IMAGES[:48], SOFT[:48], WEIGHTS[:48]),
            epochs=2,
            class_weight=dict(enumerate(range(CLASSES))),
            validation_data=dataset(IMAGES, SOFT, WEIGHTS),
            verbose=0,
        ).history
        trained.append((history, [w.numpy() for w in model.trainable_weights]))
        with pytest.raises(UserError):
            model.evaluate(dataset(IMAGES, LABELS - 1), verbose=0)
    (one, weights), (two, mirrored) = trained
    assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert_close(weights, mirrored, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_evaluate_is_exact_for_every_exit_with_a_smaller_last_batch(method):
    model = build(method, "resnet8")
    found = model.evaluate(IMAGES, LABELS, batch_size=16, verbose=0, return_dict=True)
    z = logits(model)
    assert set(z) == set(model.exits)
    for name in model.exits:
        # Where two classes are level but for rounding, either may win: no image here is that close.
        assert found[f"error/{name}"] == pytest.approx(oracle.error(LABELS, z[name]), abs=1e-4), (
            name
        )
    assert found["loss"] == pytest.approx(oracle.ce(LABELS, z[model.deployed_exit]), rel=1e-4)


# The length of training, optimizers and callbacks.


class Rates(keras.callbacks.Callback):
    """The learning rate and ω at the end of each epoch."""

    def on_train_begin(self, logs=None):
        self.rates, self.schedules = [], []

    def on_epoch_end(self, epoch, logs=None):
        self.rates.append(float(keras.backend.get_value(self.model.optimizer.learning_rate)))
        self.schedules.append({k: float(v) for k, v in self.model.schedules().items()})


@pytest.mark.parametrize("method", BOTH)
def test_fit_tells_the_length_of_training(method):
    trained = []
    for told in ({}, dict(epochs=8, steps_per_epoch=4), dict(epochs=8)):
        keras.utils.set_random_seed(0)
        given = {} if method == "baseline" else {"views": "shared"}
        model = METHODS[method](
            lambda: without_norm(SHAPE, CLASSES),
            preprocess=networks.standardise([128.0], [64.0]),
            **given,
        )
        model.compile(**told)
        rates = Rates()
        model.fit(
            IMAGES, LABELS, epochs=8, batch_size=16, shuffle=False, callbacks=[rates], verbose=0
        )
        np.testing.assert_allclose(rates.rates, [0.1] * 4 + [0.01] * 2 + [0.001] * 2, rtol=1e-5)
        assert (model.epochs, model.steps_per_epoch) == (8, 4)
        if method == "pcl":
            # α is 80 of 300 epochs.
            want = [oracle.omega(e, 80 / 300 * 8) for e in range(1, 9)]
            got = [values["rampup"] for values in rates.schedules]
            np.testing.assert_allclose(got, want, rtol=1e-5)
        trained.append(model.get_weights())
    for other in trained[1:]:
        np.testing.assert_equal(other, trained[0])


def test_a_further_fit_prolongs_the_training():
    model = tiny("baseline")
    rates = Rates()
    fit = lambda **given: model.fit(
        IMAGES, LABELS, batch_size=25, callbacks=[rates], verbose=0, **given
    )
    fit(epochs=4)
    np.testing.assert_allclose(rates.rates, [0.1, 0.1, 0.01, 0.001], rtol=1e-5)
    fit(epochs=8, initial_epoch=4)
    assert model.epochs == 8
    np.testing.assert_allclose(rates.rates, [0.01] * 2 + [0.001] * 2, rtol=1e-5)
    fit(epochs=8)
    assert model.epochs == 16
    np.testing.assert_allclose(rates.rates, [0.01] * 4 + [0.001] * 4, rtol=1e-5)


def test_a_length_that_nobody_tells_is_asked_for():
    model = tiny("pcl")
    endless = lambda: (batch for _ in iter(int, 1) for batch in generator(IMAGES, LABELS))
    with pytest.raises(UserError, match="steps_per_epoch"):
        model.fit(generator(IMAGES, LABELS), verbose=0)
    with pytest.raises(UserError, match="steps_per_epoch"):
        model.train_on_batch(IMAGES, LABELS)
    model.fit(endless(), steps_per_epoch=3, epochs=2, verbose=0)
    assert model.step.numpy() == 6 and (model.epochs, model.steps_per_epoch) == (2, 3)
    # Where nothing scales with it, it is not needed.
    tiny("baseline", "adam").fit(generator(IMAGES, LABELS), verbose=0)


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize(
    "make",
    [
        lambda: "adam",
        lambda: keras.optimizers.AdamW(1e-3, weight_decay=1e-3, clipnorm=1.0),
        lambda: keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.01, 8)),
        lambda: keras.optimizers.legacy.Adam(1e-3),
        lambda: CoupledSGD(
            keras.optimizers.schedules.ExponentialDecay(0.01, 4, 0.5), global_clipnorm=1.0
        ),
    ],
)
def test_optimizers_and_schedules_of_kerass(method, make):
    model = tiny(method, make())
    history = model.fit(IMAGES, LABELS, epochs=3, batch_size=16, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.parametrize("optimizer", [None, "adam"])
def test_the_step_is_traced_once(optimizer, policy, monkeypatch):
    keras.mixed_precision.set_global_policy(policy)
    model, traced = tiny("baseline", optimizer), []
    step = model.train_step
    monkeypatch.setattr(model, "train_step", lambda data: traced.append(None) or step(data))
    # A model that is compiled again starts anew, with what can be trained then.
    model.compile(model.optimizer)
    model.fit(IMAGES, LABELS, epochs=2, batch_size=25, verbose=0)
    assert len(traced) == 1


@pytest.mark.parametrize("clip", ["clipnorm", "clipvalue", "global_clipnorm"])
def test_gradients_are_clipped_before_the_papers_sgd(clip):
    w0, gradients = rng.randn(2, 3), 3 * rng.randn(5, 2, 3)
    norm = lambda g: g * min(1, 0.5 / np.linalg.norm(g))
    clipped = [np.clip(g, -0.5, 0.5) if clip == "clipvalue" else norm(g) for g in gradients]
    w = tf.Variable(w0)
    optimizer = CoupledSGD(0.1, coupled_decay=0.05, **{clip: 0.5})
    for g, want in zip(gradients, oracle.sgd(w0, clipped, [0.1] * 5, decay=0.05)):
        optimizer.apply_gradients([(tf.constant(g), w)])
        np.testing.assert_allclose(w.numpy(), want, atol=1e-6)
    assert CoupledSGD.from_config(optimizer.get_config()).get_config()[clip] == 0.5


@pytest.mark.parametrize("method", BOTH)
def test_callbacks(method, tmp_path):
    model = tiny(method, CoupledSGD(1e-9))
    data = dict(x=IMAGES, y=LABELS, batch_size=25, verbose=0, validation_split=0.2)
    stop = keras.callbacks.EarlyStopping(min_delta=1.0, patience=1, restore_best_weights=True)
    plateau = keras.callbacks.ReduceLROnPlateau(factor=0.1, patience=1, min_delta=1.0, min_lr=0)
    files = str(tmp_path / "weights-{epoch}")
    keep = keras.callbacks.ModelCheckpoint(files, save_weights_only=True, save_best_only=True)
    history = model.fit(epochs=9, callbacks=[stop, plateau, keep], **data).history
    assert len(history["val_loss"]) == 2
    assert float(model.optimizer.learning_rate) == pytest.approx(1e-10, rel=1e-5)
    kept = tiny(method, CoupledSGD(1e-9))
    kept.load_weights(files.format(epoch=1)).expect_partial()
    assert_close(kept.trainable_weights, model.trainable_weights, rtol=0)

    by_schedule = tiny(method)
    for callback in (plateau, keras.callbacks.LearningRateScheduler(lambda epoch: 0.1)):
        with pytest.raises(UserError) as error:
            by_schedule.fit(epochs=2, callbacks=[callback], **data)
        one_sentence(error, type(callback).__name__)
    for whole in ("whole", "whole.keras", "whole.h5"):
        with pytest.raises(UserError) as error:
            by_schedule.fit(
                callbacks=keras.callbacks.ModelCheckpoint(str(tmp_path / whole)), **data
            )
        one_sentence(error, "save_weights_only")


@pytest.mark.parametrize("method", BOTH)
def test_backup_and_restore_goes_on_with_the_same_schedules(method, tmp_path):
    class Break(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def trained(*callbacks):
        model, rates = tiny(method), Rates()
        try:
            model.fit(
                IMAGES,
                LABELS,
                batch_size=25,
                epochs=4,
                shuffle=False,
                verbose=0,
                callbacks=[*callbacks, rates],
            )
        except KeyboardInterrupt:
            pass
        return model.get_weights(), rates.rates

    weights, rates = trained()
    backup = lambda: keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))
    assert len(trained(backup(), Break())[1]) == 2
    resumed, rest = trained(backup())
    np.testing.assert_allclose(rest, rates[2:], rtol=1e-6)
    assert_close(resumed, weights, atol=1e-6)


@pytest.mark.parametrize("method", BOTH)
def test_steps_per_execution_and_eager_steps_change_nothing(method):
    trained = []
    for given in ({}, dict(steps_per_execution=2), dict(run_eagerly=True)):
        model = tiny(method, **given)
        model.fit(IMAGES, LABELS, batch_size=16, epochs=2, shuffle=False, verbose=0)
        assert model.step.numpy() == 8
        trained.append([w.numpy() for w in model.trainable_weights])
    for other in trained[1:]:
        assert_close(other, trained[0], atol=1e-5)


def test_losses_and_metrics_of_others_are_refused():
    for given in (
        dict(loss="mse"),
        dict(metrics=["accuracy"]),
        dict(weighted_metrics=["accuracy"]),
    ):
        with pytest.raises(UserError, match="its own losses and metrics"):
            tiny(**given)


def test_a_fit_that_was_broken_off_leaves_no_validation_data():
    model = still("baseline")
    seen = []

    class Break(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.fit(IMAGES, LABELS, validation_data=(IMAGES, LABELS), callbacks=[Break()], verbose=0)
    other = (LABELS + 1) % CLASSES
    seen = model.fit(IMAGES, LABELS, validation_data=(IMAGES, other), verbose=0).history
    want = oracle.ce(other, logits(model)["peer_1"])
    assert seen["val_loss"][0] == pytest.approx(want, rel=1e-5)


def test_lists_of_results_have_the_names_that_the_model_tells():
    model = still("baseline")
    for run, count in ((model.evaluate, 2), (model.train_on_batch, 3), (model.test_on_batch, 2)):
        values = run(IMAGES, LABELS)
        named = dict(zip(model.metrics_names, values))
        assert len(named) == len(values) == count
        assert named == pytest.approx(run(IMAGES, LABELS, return_dict=True), rel=1e-5)
    assert named["error/peer_1"] == pytest.approx(oracle.error(LABELS, logits(model)["peer_1"]))


def test_the_recipe_follows_the_steps_where_the_optimizer_is_new(tmp_path):
    fit = lambda model, rates, **given: model.fit(
        IMAGES, LABELS, batch_size=25, callbacks=[rates], verbose=0, **given
    )
    model, rates = tiny(), Rates()
    fit(model, rates, epochs=4)
    model.compile()
    fit(model, rates, epochs=4)
    np.testing.assert_allclose(rates.rates, [0.01, 0.01, 0.001, 0.001], rtol=1e-5)
    model.compile(epochs=8, steps_per_epoch=2)
    model.train_on_batch(IMAGES[:25], LABELS[:25])
    np.testing.assert_allclose(current_rate(model.optimizer), 0.001, rtol=1e-5)
    # A file without the state of the optimizer.
    model = tiny()
    model.step.assign(8)
    model.save_weights(str(tmp_path / "w.weights.h5"))
    model = tiny(epochs=8)
    model.load_weights(str(tmp_path / "w.weights.h5"))
    fit(model, rates, epochs=8, initial_epoch=4)
    np.testing.assert_allclose(rates.rates, [0.01, 0.01, 0.001, 0.001], rtol=1e-5)


def test_weights_of_another_method_are_refused(tmp_path):
    kept = str(tmp_path / "kept")
    tiny().save_weights(kept)
    model = METHODS["one"](lambda: without_norm(SHAPE, CLASSES), peers=2)
    before = model.get_weights()
    with pytest.raises(UserError) as error:
        model.load_weights(kept)
    one_sentence(error, "lacks 15 of the 16 weights of this ONE")
    for a, b in zip(before, model.get_weights()):
        np.testing.assert_array_equal(a, b)
    # A file that cannot be read leaves no trace, either.
    with pytest.raises(Exception, match="nothing"):
        model.load_weights(str(tmp_path / "nothing"))
    for a, b in zip(before, model.get_weights()):
        np.testing.assert_array_equal(a, b)


def test_losses_are_scaled_where_the_network_computes_in_float16():
    keras.mixed_precision.set_global_policy("mixed_float16")
    network = without_norm(SHAPE, CLASSES)
    keras.mixed_precision.set_global_policy("float32")
    model = methods.Baseline(network)
    for optimizer in ("sgd", CoupledSGD(0.1), None):
        model.compile(optimizer)
        assert isinstance(model.optimizer, keras.mixed_precision.LossScaleOptimizer)
    # A student in float32 needs none.
    model = methods.KD(without_norm(SHAPE, CLASSES), teacher=network)
    model.compile("sgd")
    assert not isinstance(model.optimizer, keras.mixed_precision.LossScaleOptimizer)


def test_a_methods_own_decay_holds_in_an_optimizer_that_scales_the_loss():
    model = METHODS["ffl"](lambda: without_norm(SHAPE, CLASSES), peers=2)
    scaling = keras.mixed_precision.LossScaleOptimizer(CoupledSGD(0.1))
    model.compile(scaling)
    model.build_optimizer()
    inner = scaling.inner_optimizer
    assert {inner._decay(w) for w in model.fusion.trainable_weights} == {1e-5}


@pytest.mark.parametrize("method", BOTH)
def test_images_of_floats_reach_the_preprocessing_as_they_are(method):
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    model = tiny(method, "sgd")
    images = IMAGES + 0.37
    np.testing.assert_array_equal(
        model.predict(images, verbose=0), model.deployed().predict(images, verbose=0)
    )


def test_an_optimizer_that_finds_weights_by_name_trains_each_of_them_once():
    def compiled(*layers):
        # As tensorflow-addons' MultiOptimizer has it.
        optimizer = keras.optimizers.SGD(0.1)
        optimizer.optimizer_specs = [
            {"optimizer": optimizer, "weights": [w.name for w in layer.weights]} for layer in layers
        ]
        model.compile(optimizer, epochs=1, steps_per_epoch=1)

    model = METHODS["pcl"](lambda: without_norm(SHAPE, CLASSES), peers=2)
    student = model.student
    with pytest.raises(UserError, match="'kernel:0' 0 times a step, and 2 of the weights"):
        compiled(student.trunk, student.branches[0], student.branches[1].layers[-1])
    with pytest.raises(UserError, match="'stage_1/kernel:0' 3 times"):
        compiled(student.trunk, model)
    first, second = student.branches
    compiled(student.trunk, first, second.layers[-1], student.ensemble_classifier)
