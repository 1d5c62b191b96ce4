"""Methods of several stages: their equations in NumPy float64, and their stages in a run."""

import json
import shutil

import numpy as np
import oracle
import pytest
import tensorflow as tf
from helpers import CLASSES, SHAPE, noise, other, without_norm
from tensorflow import keras

from tf_pcl import losses as losses_module
from tf_pcl import methods, networks
from tf_pcl.errors import UserError
from tf_pcl.methods.distiller import Exit, build_all
from tf_pcl.options import Options
from tf_pcl.training import export, run
from tf_pcl.training.assemble import Assembly
from tf_pcl.training.stages import Trainer
from tf_pcl.training.workdir import Workdir

B = 8
RNG = np.random.RandomState(0)
LABELS = RNG.randint(0, CLASSES, B)
QUICK = dict(dataset="digits", network="helpers:without_norm", epochs=2, batch_size=480)


def raw(seed=0):
    """A network from raw images, as deployed() gives."""
    keras.utils.set_random_seed(seed)
    return methods.Baseline(without_norm(SHAPE, CLASSES)).deployed()


def exit_of(z, f=None):
    return Exit(*(None if x is None else tf.Variable(x, dtype=tf.float32) for x in (z, f)))


# The equations.


@pytest.mark.parametrize(
    "kwargs, widths",
    [
        ({}, (6, 6)),
        (
            dict(
                ce_weight=0.5,
                collaboration_weight=0.7,
                self_weight=0.3,
                angle_weight=3.0,
                mutual_weight=0.2,
                temperature=2.0,
            ),
            (4, 7, 5),
        ),
    ],
)
def test_ctsl_mkt_loss_and_gradients(kwargs, widths):
    m, rng = len(widths), np.random.RandomState(1)
    model = methods.CTSLMKT([without_norm(SHAPE, CLASSES) for _ in widths], **kwargs)
    z, z_alone = 2 * rng.randn(2, m, B, CLASSES)
    f = [rng.randn(B, d) for d in widths]
    weights = [
        kwargs.get(f"{name}_weight", default)
        for name, default in (
            ("ce", 1.0),
            ("collaboration", 1.0),
            ("self", 1.0),
            ("angle", 2.0),
            ("mutual", 1.0),
        )
    ]
    t = kwargs.get("temperature", 4.0)
    names = [f"peer_{k + 1}" for k in range(m)]
    student = {name: exit_of(z[k], f[k]) for k, name in enumerate(names)}
    teacher = {f"alone_{name}": exit_of(z_alone[k]) for k, name in enumerate(names)}
    with tf.GradientTape() as tape:
        terms = model.loss_terms(LABELS, student, teacher)
        total = tf.add_n(list(terms.values()))
    want = oracle.ctsl_mkt(LABELS, z, f, z_alone, *weights, t)
    assert set(terms) == set(want) == set(model.terms)
    for name in want:
        assert terms[name].numpy() == pytest.approx(want[name], rel=1e-5), name
    # The gradient against differences of the equations in which all that teaches stays where it is.
    gradients = tape.gradient(
        total,
        [
            *(student[n].logits for n in names),
            *(student[n].features for n in names),
            *(e.logits for e in teacher.values()),
        ],
    )
    assert gradients[2 * m :] == [None] * m
    own = [a.copy() for a in z], [a.copy() for a in f]
    for array, gradient in zip([*own[0], *own[1]], gradients):
        for index in zip(*(rng.randint(0, n, 4) for n in array.shape)):
            at, ends = array[index], []
            for there in (at + 1e-5, at - 1e-5):
                array[index] = there
                ends.append(sum(oracle.ctsl_mkt(LABELS, z, f, z_alone, *weights, t, own).values()))
            array[index] = at
            assert gradient.numpy()[index] == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=2e-5)


@pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (0.01, 30.0)])
def test_relations_of_few_images(scale, shift):
    f = np.float32(shift + scale * np.random.RandomState(3).randn(6, 5))
    np.testing.assert_allclose(
        losses_module.pairwise_distances(f), oracle.distances(np.float64(f)), atol=1e-4
    )
    np.testing.assert_allclose(
        losses_module.triplet_angles(f), oracle.angles(np.float64(f)), atol=1e-4
    )


@pytest.mark.parametrize("kinds", [1, 3])
def test_relations_of_identical_images_are_finite_and_so_are_their_gradients(kinds):
    values = np.float32(np.random.RandomState(4).rand(kinds, 16) * 3)
    f = tf.Variable(values[np.arange(B) % kinds])
    with tf.GradientTape() as tape:
        d, a = losses_module.pairwise_distances(f), losses_module.triplet_angles(f)
        loss = tf.reduce_sum(tf.square(d - 0.3)) + tf.reduce_sum(tf.square(a - 0.3))
    assert np.isfinite(d).all() and np.isfinite(a).all()
    gradient = tape.gradient(loss, f).numpy()
    assert np.isfinite(gradient).all() and np.abs(gradient).max() < 1e3
    if kinds > 1:
        np.testing.assert_allclose(a, oracle.angles(np.float64(f.numpy())), atol=1e-5)


def test_the_angles_hold_no_vector_for_every_triple():
    b, d = 20, 7

    @tf.function(input_signature=[tf.TensorSpec([b, d])])
    def step(f):
        with tf.GradientTape() as tape:
            tape.watch(f)
            a = losses_module.triplet_angles(f)
            loss = tf.reduce_mean(keras.losses.huber(tf.zeros_like(a), a))
        return tape.gradient(loss, f)

    sizes = [
        out.shape.num_elements() or 0
        for op in step.get_concrete_function().graph.get_operations()
        for out in op.outputs
    ]
    assert max(sizes) == b**3


def test_kd_loss_and_gradient():
    model = methods.KD(without_norm(SHAPE, CLASSES), teacher=raw(1), temperature=2.5)
    z, z_t = 3 * np.random.RandomState(2).randn(2, B, CLASSES)
    student, teacher = {"student": exit_of(z)}, {"teacher": exit_of(z_t)}
    with tf.GradientTape() as tape:
        terms = model.loss_terms(LABELS, student, teacher)
        total = tf.add_n(list(terms.values()))
    p, q = oracle.softmax(z, 2.5), oracle.softmax(z_t, 2.5)
    assert terms["ce"].numpy() == pytest.approx(oracle.ce(LABELS, z), rel=1e-5)
    assert terms["teacher"].numpy() == pytest.approx(2.5**2 * oracle.kl(q, p), rel=1e-5)
    got, none = tape.gradient(total, [student["student"].logits, teacher["teacher"].logits])
    np.testing.assert_allclose(
        got, (oracle.softmax(z) - np.eye(CLASSES)[LABELS] + 2.5 * (p - q)) / B, atol=1e-6
    )
    assert none is None
    assert methods.KD(without_norm(SHAPE, CLASSES), teacher=raw(1)).temperature == 3


def test_ban_generations_and_their_ensemble():
    ancestors = [raw(1), raw(2)]
    model = methods.BAN(without_norm(SHAPE, CLASSES), ancestors=ancestors)
    images = tf.constant(noise(B, *SHAPE))
    exits = model.all_exits(images)
    assert list(model.exits) == [
        "generation_2",
        "generation_0",
        "generation_1",
        "ensemble",
    ] and set(exits) == set(model.exits)
    p = [oracle.softmax(exits[f"generation_{k}"].logits) for k in range(3)]
    for k in (0, 1):
        np.testing.assert_allclose(exits[f"generation_{k}"].logits, ancestors[k](images), atol=1e-6)
    np.testing.assert_allclose(
        tf.nn.softmax(exits["ensemble"].logits), np.mean(p, axis=0), atol=1e-6
    )
    # In training the parent alone is asked.
    student, teacher = model.students(images[:, None], True), model.teachers(images[:, None], True)
    assert list(teacher) == ["generation_1"]
    terms = model.loss_terms(LABELS, student, teacher)
    z = student["generation_2"].logits.numpy()
    assert terms["ce"].numpy() == pytest.approx(oracle.ce(LABELS, z), rel=1e-5)
    assert terms["parent"].numpy() == pytest.approx(oracle.kl(p[1], oracle.softmax(z)), rel=1e-5)
    first = methods.BAN(without_norm(SHAPE, CLASSES))
    assert list(first.exits) == ["generation_0"]
    assert list(first.loss_terms(LABELS, {"generation_0": exit_of(z)}, {})) == ["ce"]


def test_a_frozen_teacher_does_not_change():
    network = lambda: networks.resnet8(SHAPE, CLASSES)
    before = methods.Baseline(network()).deployed()
    for model in (
        methods.KD(network(), teacher=before),
        methods.BAN(network(), ancestors=[before]),
        methods.CTSLMKT([network(), network()]),
    ):
        model.compile(epochs=1, steps_per_epoch=2)
        frozen = [w for teacher in model.untrained for w in teacher.weights]
        before = [w.numpy() for w in frozen]
        for _ in range(2):
            model.train_step((tf.constant(noise(B, *SHAPE)), tf.constant(LABELS)))
        assert len(frozen) > 40 and any("moving_mean" in w.name for w in frozen)
        np.testing.assert_equal([w.numpy() for w in frozen], before)


def test_kd_refuses_a_teacher_of_other_classes():
    teacher = methods.Baseline(without_norm(SHAPE, CLASSES + 1)).deployed()
    with pytest.raises(
        UserError, match=f"`teacher` has {CLASSES + 1} classes .* has {CLASSES} classes"
    ):
        methods.KD(without_norm(SHAPE, CLASSES), teacher=teacher)


def test_ctsl_mkt_refuses_a_single_network():
    with pytest.raises(UserError, match="list of networks"):
        methods.CTSLMKT(without_norm(SHAPE, CLASSES))


def test_ctsl_mkt_refuses_networks_that_see_different_images(digits):
    """Alone, each sees what it needs; together, they see the same."""
    stages = methods.CTSLMKT.stages(Assembly(digits), ["helpers:other", "helpers:rescaled"])
    with pytest.raises(UserError, match="some of the networks scale raw images themselves"):
        build_all(stages)


def test_ctsl_mkt_goes_on_from_the_networks_trained_alone():
    given = [without_norm(SHAPE, CLASSES), without_norm(SHAPE, CLASSES)]
    model = methods.CTSLMKT(given)
    for k, network in enumerate(given):
        for peers in (model.networks, model.alone):
            np.testing.assert_equal(peers[f"peer_{k + 1}"].get_weights(), network.get_weights())


# Runs.


def trained(workdir, **settings):
    """The results of a run of QUICK with further settings."""
    return run.run(Options(**{**QUICK, "workdir": str(workdir), **settings}))


@pytest.fixture(scope="module")
def ban(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("ban") / "run"
    keras.mixed_precision.set_global_policy("float32")
    return workdir, trained(workdir, method="ban")


@pytest.mark.slow
def test_every_stage_leaves_what_a_run_leaves(ban):
    workdir, results = ban
    for i, folder in enumerate([workdir / "1-generation_0", workdir / "2-generation_1", workdir]):
        for name in (
            "results.json metrics.csv checkpoints/ckpt-4.index tensorboard/train tensorboard/test "
            "export/saved_model/1/saved_model.pb export/labels.txt"
        ).split():
            assert (folder / name).exists(), folder / name
        of_stage = json.loads((folder / "results.json").read_text())
        assert of_stage["stage"] == of_stage["deployed"] == f"generation_{i}"
        assert of_stage["network"] == QUICK["network"]
        # What a generation erred when it was trained is what it errs as an ancestor.
        assert results["error"][f"generation_{i}"] == pytest.approx(
            of_stage["deployed_error"], abs=1e-3
        )
        assert len(list((folder / "tensorboard" / "train").iterdir())) == 1
    assert (
        results["wall_seconds"]
        > of_stage["wall_seconds"] - 1e-6
        > json.loads((workdir / "1-generation_0/results.json").read_text())["wall_seconds"]
    )


@pytest.mark.slow
def test_every_stage_begins_with_weights_of_its_own(tmp_path, monkeypatch):
    train, first = Trainer.train, []

    def noted(self, model, *rest):
        first.append(model.trainable_weights[0].numpy())
        return train(self, model, *rest)

    monkeypatch.setattr(Trainer, "train", noted)
    trained(tmp_path, method="ban", generations=2, epochs=1)
    assert len(first) == 2 and np.abs(first[0] - first[1]).max() > 0.1


def remove(folder, *patterns):
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    "lost, goes_on",
    [
        # Within generation 1, before anything of generation 2.
        (
            [
                "2-generation_1/checkpoints/ckpt-4.*",
                "checkpoints",
                "export",
                "metrics.csv",
                "results.json",
            ],
            [(1, 4), (2, 2)],
        ),
        # Between two stages.
        (["checkpoints", "export", "metrics.csv", "results.json", "tensorboard"], [(1, 4), (2, 4)]),
        # After the last step.
        (["export"], [(1, 4), (2, 4), (3, 4)]),
    ],
)
def test_a_run_goes_on_from_any_stage(ban, lost, goes_on, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(ban[0], workdir)
    remove(workdir, *lost)
    results = trained(workdir, method="ban")
    out = capsys.readouterr().out
    for stage in (1, 2, 3):
        step = dict(goes_on).get(stage)
        line = {None: "", 4: ": done"}.get(step, f": goes on at step {step} of 4")
        assert f"stage {stage} of 3, generation_{stage - 1}{line}\n" in out
    for name, error in ban[1]["error"].items():
        assert results["error"][name] == pytest.approx(error, abs=1.0), name
    assert [row["epoch"] for row in Workdir(str(workdir)).read_rows()] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("of", ["", "1-generation_0", "export/saved_model/1"])
def test_kd_with_a_teacher_that_is_there(ban, of, tmp_path):
    workdir, before = ban
    results = trained(tmp_path / "run", method="kd", teacher=str(workdir / of))
    generation = "generation_0" if of.startswith("1") else "generation_2"
    assert results["error"]["teacher"] == pytest.approx(before["error"][generation], abs=1e-3)
    assert results["deployed"] == "student" and not list((tmp_path / "run").glob("1-*"))
    assert results["parameters"]["deployed"] == results["parameters"]["training"]


@pytest.mark.slow
def test_different_networks_learn_together(tmp_path):
    for method, exits in (
        ("dml", {"peer_1", "peer_2"}),
        ("ctsl_mkt", {"peer_1", "peer_2", "alone_peer_1", "alone_peer_2"}),
    ):
        both = "helpers:without_norm,helpers:other"
        results = trained(tmp_path / method, method=method, network=both, epochs=1)
        count = lambda name: sum(
            int(np.prod(w.shape)) for w in name(SHAPE, CLASSES).trainable_weights
        )
        assert results["network"] == both
        assert set(results["error"]) == exits
        assert results["parameters"] == {
            "deployed": count(without_norm),
            "training": count(without_norm) + count(other),
        }
    stages = [
        json.loads((tmp_path / "ctsl_mkt" / f / "results.json").read_text())
        for f in ("1-peer_1", "2-peer_2")
    ]
    assert [s["network"] for s in stages] == ["helpers:without_norm", "helpers:other"]
    assert [s["deployed"] for s in stages] == ["peer_1", "peer_2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings, text",
    [
        (
            dict(method="kd", image_size=12),
            r"takes images \(8, 8, 1\); the network has 10 classes and takes images \(12, 12, 1\)",
        ),
        (dict(method="kd", teacher="/nowhere"), "/nowhere holds no SavedModel"),
        (
            dict(method="kd", teacher_network="resnet8"),
            "`teacher_network` does not go with `teacher`",
        ),
        (dict(method="pcl"), "`teacher` does not go with `method=pcl`: it is for kd"),
        (dict(method="kd", teacher=None, teacher_network="resnet9"), "Did you mean resnet"),
        (dict(method="ban", teacher=None, generations=1), "at least 2"),
        (
            dict(method="dml", teacher=None, network="resnet8,resnet14", peers=3),
            "`peers=3`: it does not go with 2 networks",
        ),
        (
            dict(method="ctsl_mkt", teacher=None, network="resnet8,resnet14", peers=3),
            "`peers=3`: it does not go with 2 networks",
        ),
        (dict(method="ctsl_mkt", teacher=None, peers=1), "at least 2 peers"),
        (
            dict(method="pcl", teacher=None, network="resnet8,resnet14"),
            "2 networks were given: this method takes one",
        ),
        (
            dict(method="dml", teacher=None, network="resnet8,helpers:rescaled"),
            "some of the networks scale raw images themselves",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_written(
    ban, settings, text, tmp_path
):
    with pytest.raises(UserError, match=text) as refused:
        trained(tmp_path / "run", **{"teacher": str(ban[0]), **settings})
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_teacher_of_other_classes_or_that_is_damaged_is_refused(ban, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(ban[0] / "export", teacher)
    labels = (teacher / "labels.txt").read_text()
    (teacher / "labels.txt").write_text(labels.replace("9", "nine"))
    with pytest.raises(UserError, match="has 10 classes .*same classes"):
        export.load(str(teacher), tuple("0123456789"))
    (teacher / "labels.txt").unlink()
    (teacher / "saved_model/1/keras_metadata.pb").write_bytes(b"no model")
    with pytest.raises(UserError, match="cannot be loaded as a Keras model"):
        export.load(str(teacher), tuple("0123456789"))
