"""What every method must keep, over all registered methods and two tiny networks."""

import collections
import graphlib

import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    CLASSES,
    SHAPE,
    TINY,
    assert_close,
    batch,
    build,
    last_stage,
    slow_but,
    with_norm,
)
from pages import METHODS_OF_PAPERS

from tf_pcl import data, surgery
from tf_pcl.compat import keras
from tf_pcl.methods import METHODS
from tf_pcl.methods.distiller import Distiller
from tf_pcl.training import export
from tf_pcl.training import strategy as strategies
from tf_pcl.training.checkpoints import Checkpoints

EVERY = [
    pytest.param(m, n, marks=[] if (m, n) == ("pcl", "without_norm") else pytest.mark.slow)
    for m in METHODS
    for n in TINY
]


@pytest.mark.parametrize("method, network", EVERY)
def test_contract(method, network, digits, tmp_path):
    model = build(method, network, epochs=2, steps_per_epoch=12)
    views, labels = batch(model, digits)

    # Every trainable weight gets a gradient; the teachers' weights are none of them and get none.
    teacher = model.teachers(views, True)
    with tf.GradientTape() as tape:
        student = model.students(views, True)
        terms = model.loss_terms(labels, student, teacher)
        total = tf.add_n(list(terms.values()))
    frozen = [w for t in model.untrained for w in t.trainable_weights]
    gradients = tape.gradient(total, model.trainable_weights + frozen)
    trained, none = (
        gradients[: len(model.trainable_weights)],
        gradients[len(model.trainable_weights) :],
    )
    for weight, gradient in zip(model.trainable_weights, trained):
        assert gradient is not None and np.abs(gradient).max() > 0, weight.name
    assert not {id(w) for w in frozen} & {id(w) for w in model.trainable_weights}
    assert none == [None] * len(frozen)
    assert set(terms) <= set(model.terms) and set(student) | set(teacher) <= set(model.exits)
    assert model.deployed_exit in student | teacher
    assert set(model.all_exits(views[:, 0])) == set(model.exits)

    # The loss falls under fit, on one batch over and over, and the error of every exit is reported.
    one = tf.data.Dataset.from_tensors((views, labels)).repeat(24)
    history = model.fit(
        one, epochs=2, steps_per_epoch=12, validation_data=data.test_batches(digits, 100), verbose=0
    ).history
    assert history["loss/ce"][1] < 0.95 * history["loss/ce"][0]
    assert {f"val_error/{name}" for name in model.exits} <= set(history)
    assert model.step.numpy() == 24

    # The deployed network: the target network's parameters, the deployed exit's answers.
    images = digits.test.first(20)
    deployed = model.deployed()
    assert sum(np.prod(w.shape) for w in deployed.trainable_weights) == sum(
        np.prod(w.shape) for w in TINY[network](SHAPE, CLASSES).trainable_weights
    )
    expected = model.all_exits(tf.constant(images))[model.deployed_exit].logits
    np.testing.assert_allclose(deployed(images), expected, atol=1e-5)
    np.testing.assert_allclose(model.predict(images, verbose=0), expected, atol=1e-5)

    # Its SavedModel answers the same.
    folder = export.export(deployed, "abcdefghij", str(tmp_path / "export"))
    answers = tf.saved_model.load(folder).signatures["serving_default"](images=tf.constant(images))
    np.testing.assert_allclose(answers["logits"], expected, atol=1e-5)

    # A checkpoint brings everything back, and training goes on the same.
    Checkpoints(model, str(tmp_path / "checkpoints")).save(24)
    other = build(method, network, epochs=2, steps_per_epoch=12)
    other.optimizer.build(other.trainable_weights)
    assert Checkpoints(other, str(tmp_path / "checkpoints")).restore() == 24
    for m in (model, other):
        m.fit(one, epochs=1, steps_per_epoch=2, verbose=0)
    # The means of metrics are larger than weights, and threads add in any order.
    assert_close(model.weights, other.weights, rtol=1e-5, atol=1e-6)


def optimized_graph(model, batches, folder):
    """The training step's GraphDef as it is run, after Grappler."""
    tf.summary.trace_on(graph=True)
    model.fit(batches, epochs=1, steps_per_epoch=1, verbose=0)
    with tf.summary.create_file_writer(str(folder)).as_default():
        tf.summary.trace_export("step", step=0)
    (event_file,) = folder.iterdir()
    graphs = [
        graph.post_optimization_graph
        for event in tf.compat.v1.train.summary_iterator(str(event_file))
        for value in event.summary.value
        for graph in tf.compat.v1.RunMetadata.FromString(value.tensor.string_val[0]).function_graphs
    ]
    return max(graphs, key=lambda graph: len(graph.node))


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [m for m, cls in METHODS.items() if cls.after_step is not Distiller.after_step]
)
def test_no_weight_is_read_while_it_is_written(method, digits, tmp_path):
    """Of a read and a write of one variable, one can be reached from the other in the graph."""
    model = build(method, "resnet8", epochs=1)
    graph = optimized_graph(
        model, data.train_batches(digits, 32, 1, views=model.num_views), tmp_path
    )
    node = lambda name: name.lstrip("^").split(":")[0]
    inputs = {n.name: {node(i) for i in n.input} for n in graph.node}
    before = {}
    for name in graphlib.TopologicalSorter(inputs).static_order():
        before[name] = set().union(*({i} | before[i] for i in inputs[name]))
    reads, writes = collections.defaultdict(list), collections.defaultdict(list)
    for n in graph.node:
        if n.op in (
            "ReadVariableOp",
            "AssignVariableOp",
            "AssignAddVariableOp",
            "AssignSubVariableOp",
        ):
            (reads if n.op == "ReadVariableOp" else writes)[node(n.input[0])].append(n.name)
    pairs = [(r, w) for variable in writes for r in reads[variable] for w in writes[variable]]
    assert len(pairs) > len(model.trainable_weights)
    assert [(r, w) for r, w in pairs if r not in before[w] and w not in before[r]] == []


@pytest.mark.parametrize("method", slow_but(METHODS, "baseline"))
def test_two_replicas_equal_one(method, digits, two_replicas, monkeypatch):
    # At the kink of a ReLU, rounding decides whether a gradient passes: what differs in the last
    # digit, differs in the third a few steps later. Softplus has no kink.
    monkeypatch.setattr(keras.layers.ReLU, "call", lambda layer, x: tf.nn.softplus(x))
    # The methods' own parts are in both. ResNet-8 takes several times as long.
    network = "resnet8" if method == "pcl" else with_norm

    def trained(strategy, steps=5):
        with strategy.scope():
            model = build(method, network)
        assert surgery.synchronize(model) == []
        batches = lambda shard: data.train_batches(
            digits, 32, 1, views=model.num_views, shard=shard
        )
        history = model.fit(
            strategies.distribute(strategy, batches),
            epochs=steps,
            steps_per_epoch=1,
            verbose=0,
            validation_data=data.test_batches(digits, 90),
            validation_freq=[steps],
        ).history
        return [w.numpy() for w in model.weights], history

    weights, history = trained(tf.distribute.get_strategy())
    mirrored, of_two = trained(two_replicas)
    assert len(weights) > 4
    assert_close(weights, mirrored, rtol=1e-6, atol=1e-5)
    assert_close(history, of_two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", slow_but(METHODS, "baseline"))
@pytest.mark.parametrize(
    "precision", ["mixed_bfloat16", pytest.param("mixed_float16", marks=pytest.mark.slow)]
)
def test_mixed_precision(method, precision, digits):
    keras.mixed_precision.set_global_policy(precision)
    # The CPU computes convolutions in float16 slowly: the smaller network.
    model = build(method, "resnet8" if precision == "mixed_bfloat16" else "without_norm")
    assert isinstance(model.optimizer, keras.mixed_precision.LossScaleOptimizer) == (
        precision == "mixed_float16"
    )
    views, labels = batch(model, digits)
    one = tf.data.Dataset.from_tensors((views, labels)).repeat()
    losses = model.fit(one, epochs=2, steps_per_epoch=10, verbose=0).history["loss/ce"]
    assert losses[1] < losses[0]
    assert all(w.dtype == tf.float32 for w in model.weights if w.dtype.is_floating)
    assert model.deployed()(digits.test.first(3)).dtype == tf.float32


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, precision", [*((method, "mixed_float16") for method in METHODS), ("pcl", "float32")]
)
def test_jit_compile(method, precision, digits):
    keras.mixed_precision.set_global_policy(precision)
    losses = []
    for jit in (False, True):
        model = build(method, "without_norm", jit_compile=jit)
        one = tf.data.Dataset.from_tensors(batch(model, digits)).repeat(3)
        losses.append(model.fit(one, epochs=1, steps_per_epoch=3, verbose=0).history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-5 if precision == "float32" else 1e-3)


@pytest.mark.parametrize("method", slow_but(METHODS, "baseline", "pcl"))
def test_a_networks_own_regularizers_count(method, digits):
    def network(input_shape, num_classes):
        x = images = keras.Input(input_shape)
        for name in ("stage_1", "stage_2"):
            own = keras.regularizers.L2(0.5)
            x = keras.layers.Conv2D(4, 3, name=name, kernel_regularizer=own)(x)
        x = keras.layers.GlobalAveragePooling2D()(x)
        return keras.Model(images, keras.layers.Dense(num_classes)(x))

    model = last_stage(method, network)
    model.compile(epochs=1, steps_per_epoch=1)
    trained = {id(w) for w in model.trainable_weights}
    want = sum(
        0.5 * np.sum(np.square(layer.kernel.numpy()))
        for layer in model.submodules
        if getattr(layer, "kernel_regularizer", None) and id(layer.kernel) in trained
    )
    assert model.train_step(batch(model, digits))["loss/regularization"].numpy() == pytest.approx(
        want, rel=1e-4
    )


def test_defaults_are_those_of_the_papers():
    # A method of one's own has defaults of its own.
    of = {name: METHODS[name].parameters() for name in METHODS_OF_PAPERS}
    temperatures = dict(ban=1, byot=3, cl=2, ctsl_mkt=4, dml=1, ffl=3, kd=3, okddip=3, one=3, pcl=3)
    assert {
        name: settings["temperature"] for name, settings in of.items() if "temperature" in settings
    } == temperatures
    assert {
        name: settings["distill_weight"]
        for name, settings in of.items()
        if "distill_weight" in settings
    } == dict.fromkeys(("ffl", "okddip", "one", "pcl"), 1)
    assert of["cl"]["distill_share"] == 0.5
    assert of["byot"]["distill_share"] == 0.3
    assert of["byot"]["hint_weight"] == 0.03
    assert [
        of["ctsl_mkt"][f"{name}_weight"]
        for name in ("ce", "collaboration", "self", "angle", "mutual")
    ] == [1, 1, 1, 2, 1]
    assert of["ban"]["generations"] == 3
    stages = {name: METHODS[name].stages(None, "target") for name in METHODS_OF_PAPERS}
    assert [stage.network for stage in stages["kd"]] == ["resnet110", "target"]
    assert [stage.name for stage in stages["ctsl_mkt"]] == ["peer_1", "peer_2", "together"]
    peers = {
        name: build(name, "without_norm").exits
        for name in ("pcl", "dml", "cl", "one", "ffl", "okddip")
    }
    assert all(sum(name.startswith("peer_") for name in exits) == 3 for exits in peers.values())


def test_any_keras_optimizer_and_plain_images(digits):
    """In a notebook: another optimizer, a data set of (images, labels) of the user's own."""
    model = build("baseline", "resnet8", optimizer=keras.optimizers.Adam(1e-3))
    own = tf.data.Dataset.from_tensor_slices(
        (digits.train.images[:64], digits.train.labels[:64])
    ).batch(32)
    history = model.fit(own, epochs=2, verbose=0).history
    assert history["loss"][1] < history["loss"][0]
    assert set(model.evaluate(own, verbose=0, return_dict=True)) == {"loss", "error/peer_1"}
