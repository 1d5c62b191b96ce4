"""Checkpoints, records, export, workdirs and refusals, within this process."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import weakref

import numpy as np
import pytest
import tensorflow as tf
from helpers import CLASSES, SHAPE, assert_close, events, noise, with_norm, without_norm
from tensorflow import keras

from tf_pcl import console, networks
from tf_pcl.data import image_files
from tf_pcl.errors import UserError
from tf_pcl.methods import METHODS
from tf_pcl.options import Options
from tf_pcl.training import callbacks, export, report, run
from tf_pcl.training.checkpoints import Checkpoints
from tf_pcl.training.workdir import Workdir

QUICK = dict(dataset="digits", network="resnet8", epochs=2, batch_size=256, train_examples=512)


def small_model(network=without_norm):
    model = METHODS["pcl"](lambda: network(SHAPE, CLASSES), peers=2)
    model.compile(epochs=4, steps_per_epoch=3)
    model.build_optimizer()
    return model


def test_checkpoints_keep_three_and_fall_back_from_a_truncated_one(tmp_path, caplog):
    model = small_model()
    checkpoints = Checkpoints(model, str(tmp_path))
    assert checkpoints.restore() == 0
    weight = model.trainable_weights[0]
    for step in range(1, 5):
        weight.assign(tf.fill(weight.shape, float(step)))
        checkpoints.save(step)
    assert sorted(p.stem for p in tmp_path.glob("*.index")) == ["ckpt-2", "ckpt-3", "ckpt-4"]
    weight.assign(tf.zeros_like(weight))
    assert Checkpoints(model, str(tmp_path)).restore() == 4 and weight.numpy().max() == 4.0

    newest = tmp_path / "ckpt-4.data-00000-of-00001"
    newest.write_bytes(newest.read_bytes()[:100])
    (tmp_path / "checkpoint").unlink()
    with caplog.at_level("WARNING"):
        assert Checkpoints(model, str(tmp_path)).restore() == 3
    assert weight.numpy().max() == 3.0 and "ckpt-4 cannot be read" in caplog.text

    (tmp_path / "ckpt-3.index").write_bytes(b"")
    assert Checkpoints(model, str(tmp_path)).restore() == 2


def test_the_whole_state_is_in_a_checkpoint(tmp_path):
    model, other = small_model(), small_model()
    data = tf.constant(noise(8, 2, *SHAPE)), tf.constant(np.arange(8))
    for _ in range(3):
        model.train_step(data)
    Checkpoints(model, str(tmp_path)).save(3)
    Checkpoints(other, str(tmp_path)).restore()
    assert_close(model.weights, other.weights, rtol=0)
    assert_close(model.optimizer.variables, other.optimizer.variables, rtol=0)
    assert other.step.numpy() == 3 and other.optimizer.iterations.numpy() == 3
    # The means of the epoch so far, too.
    assert {k: float(v.result()) for k, v in model.mean_of.items()} == {
        k: float(v.result()) for k, v in other.mean_of.items()
    }


def test_dropout_goes_on_where_a_checkpoint_was_saved(tmp_path):
    drawing = lambda *shape: with_norm(*shape, [keras.layers.Dropout(0.5, rng_type="stateful")])
    model, other = small_model(drawing), small_model(drawing)
    data = tf.constant(noise(8, 2, *SHAPE)), tf.constant(np.arange(8))
    model.train_step(data)
    Checkpoints(model, str(tmp_path)).save(1)
    Checkpoints(other, str(tmp_path)).restore()
    losses = [float(one.train_step(data)["loss"]) for one in (model, other)]
    assert losses[0] == losses[1]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_python_drops_before_the_training_ends_it(tmp_path, monkeypatch):
    monkeypatch.setattr(console, "_noted", [])
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        console.end_on_signals()
        thing = type("Thing", (), {})()
        watched = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGTERM))
        del thing
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert watched() is None
    model = small_model()
    save = callbacks.Save(Checkpoints(model, str(tmp_path)), 100, 0, 10)
    save.set_model(model)
    with pytest.raises(callbacks.Stopped, match="stopped by SIGTERM at step 1 of 10; saved"):
        save.on_train_batch_end(0, {"loss": 1.0})
    assert (tmp_path / "ckpt-1.index").exists()


def test_a_signal_in_the_last_step_of_a_stage_keeps_the_next_from_beginning(tmp_path):
    model = small_model()
    for last in (True, False):
        save = callbacks.Save(Checkpoints(model, str(tmp_path)), 3, 9, 10, last=last)
        save.set_model(model)
        save.on_train_batch_end(0)
        save.signal = "SIGTERM"
        stopped = pytest.raises(callbacks.Stopped, match="stopped by SIGTERM at step 10 of 10")
        with contextlib.nullcontext() if last else stopped:
            save.on_epoch_end(0)


def test_a_loss_that_is_no_number_is_not_saved(tmp_path):
    model = small_model()
    save = callbacks.Save(Checkpoints(model, str(tmp_path)), 1, 0, 10)
    save.set_model(model)
    with pytest.raises(
        callbacks.Stopped, match="nan at step 1, which was not saved.*smaller `learning_rate`"
    ):
        save.on_train_batch_end(0, {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_rows_survive_a_round_trip(tmp_path):
    workdir = Workdir(str(tmp_path))
    rows = [{"epoch": 1, "loss": 0.1}, {"epoch": 2, "loss": 0.25, "val_error/peer_1": 30.5}]
    assert workdir.read_rows() == []
    workdir.write_rows(rows)
    assert workdir.read_rows() == rows
    assert (tmp_path / "metrics.csv").read_text().splitlines()[1] == "1,0.1,"


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
def test_saved_model_of_encoded_images_and_hub(channels, tmp_path):
    import tensorflow_hub as hub

    model = METHODS["pcl"](
        networks.resnet8((8, 8, channels), CLASSES),
        peers=2,
        preprocess=networks.standardise([100.0] * channels, [50.0] * channels),
    )
    model.preprocess.takes_uint8 = True  # As if it were trained.
    deployed = model.deployed()
    folder = export.export(
        deployed, [f"class {i}" for i in range(CLASSES)], str(tmp_path / "export")
    )
    assert pathlib.Path(folder).relative_to(tmp_path).as_posix() == "export/saved_model/1"
    assert (tmp_path / "export/labels.txt").read_text().splitlines() == [
        f"class {i}" for i in range(CLASSES)
    ]
    images = noise(4, 8, 8, channels)
    want = deployed(images).numpy()
    loaded = tf.saved_model.load(folder)
    got = loaded.signatures["serving_default"](images=tf.constant(images))
    assert set(got) == {"probabilities", "logits"} and got["logits"].dtype == tf.float32
    np.testing.assert_allclose(got["logits"], want, atol=1e-5)
    np.testing.assert_allclose(got["probabilities"], tf.nn.softmax(want), atol=1e-5)
    encoded = [tf.io.encode_png(image) for image in images]
    got = loaded.signatures["serve_bytes"](image_bytes=tf.stack(encoded))
    np.testing.assert_allclose(got["logits"], want, atol=1e-5)
    # A photo is cut square and resized as in training.
    large = noise(20, 31, channels)
    got = loaded.signatures["serve_bytes"](
        image_bytes=tf.stack([tf.io.encode_png(large), encoded[0]])
    )["logits"]
    np.testing.assert_allclose(
        got, [deployed(image_files.resize(large, 8)[None])[0], want[0]], atol=1e-4
    )
    np.testing.assert_allclose(keras.models.load_model(folder)(images), want, atol=1e-5)
    layer = hub.KerasLayer(folder, trainable=True)
    np.testing.assert_allclose(layer(tf.constant(images)), want, atol=1e-5)
    assert sum(np.prod(w.shape) for w in layer.trainable_weights) == sum(
        np.prod(w.shape) for w in deployed.trainable_weights
    )


@pytest.mark.slow
def test_a_saved_model_that_answers_otherwise_is_noticed(tmp_path):
    model = METHODS["baseline"](networks.resnet8(SHAPE, CLASSES))
    deployed = model.deployed()
    folder = export.export(deployed, "abcdefghij", str(tmp_path / "export"))
    export.check(folder, deployed, noise(4, *SHAPE))
    deployed.trainable_weights[-1].assign_add(tf.ones(CLASSES))
    with pytest.raises(RuntimeError, match="the outputs of the SavedModel .* differ"):
        export.check(folder, deployed, noise(4, *SHAPE))


@pytest.mark.parametrize(
    "settings, text",
    [
        (dict(method="plc"), "Did you mean pcl"),
        (dict(network="resnet33"), "Did you mean resnet32"),
        (dict(dataset="cifr10"), "Did you mean cifar10"),
        (dict(split_at="stage_7"), "stage_1.*stage_2"),
        (dict(peers=1), "at least 2 peers"),
        (dict(method="baseline", peers=3), "`peers` does not go with `method=baseline`"),
        (dict(method="baseline", temperature=2.0), "`temperature` does not go with"),
        (dict(batch_size=10_000), "larger than the"),
        (dict(train_examples=9999), "more than the 1437"),
        (dict(dataset="image_folder", data_dir="/nowhere"), "is not there"),
        (dict(strategy="multi_worker"), "TF_CONFIG"),
        (dict(strategy="mirrored", batch_size=255), "multiple of 2"),
        (dict(strategy="mirrored", jit_compile=True), "`jit_compile` does not go with 2 replicas"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(settings, text, tmp_path):
    with pytest.raises(UserError, match=text) as refused:
        run.run(Options(**{**QUICK, "workdir": str(tmp_path / "run"), **settings}))
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "settings, text",
    [
        (dict(epochs=0), "`epochs=0`: out of range: it must be at least 1"),
        (dict(learning_rate=0.0), "more than 0"),
        (dict(learning_rate=float("nan")), "out of range"),
        (dict(temperature=float("inf")), "finite and more than 0"),
        (dict(teacher=""), "`teacher=`: it is empty"),
        (dict(ema_decay=1.5), "at least 0 and at most 1"),
        (dict(precision="float64"), "Allowed: float32"),
        (dict(lr_decay_epochs=(200, 100)), "increasing"),
        (dict(lr_decay_epochs=(400,)), "increasing"),
        (dict(rampup_epochs=301), "more than `epochs=300`"),
        (dict(cutout=3), "even"),
        (dict(image_size=-1), "at least 4"),
    ],
)
def test_values_out_of_range(settings, text):
    with pytest.raises(UserError, match=text):
        Options(**settings)


def test_workdirs(tmp_path):
    options = Options(**QUICK)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="Not a directory"):
        Workdir(str(tmp_path / "file" / "run")).check(options)
    with pytest.raises(UserError, match="cannot be written"):
        Workdir("/proc/run").check(options)
    (tmp_path / "stage" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="checkpoints but no flags.txt"):
        Workdir(str(tmp_path / "stage")).check(options)
    Workdir(str(tmp_path / "new")).check(options)
    assert not (tmp_path / "new").exists()
    workdir = Workdir(str(tmp_path))
    workdir.begin(options, {}, report.versions())
    workdir.check(options)
    workdir.check(dataclasses.replace(options, checkpoint_every="7steps", data_dir="/moved"))
    with pytest.raises(
        UserError, match=r"`epochs=3` here, 2 there; `peers=4` here, \(unset\) there"
    ):
        workdir.check(dataclasses.replace(options, epochs=3, peers=4))
    flags = tmp_path / "flags.txt"
    flags.write_text(flags.read_text().replace("--label_smoothing=0.0\n", ""))
    workdir.check(options)  # A run from before there was the option.
    with pytest.raises(UserError, match=r"`label_smoothing=0.1` here, 0.0 there"):
        workdir.check(dataclasses.replace(options, label_smoothing=0.1))
    with pytest.raises(UserError, match="holds a run: give another"):
        workdir.check(dataclasses.replace(options, resume="never"))
    (tmp_path / "export" / "saved_model" / "1").mkdir(parents=True)
    with pytest.raises(UserError, match="its checkpoints were removed"):
        run.run(dataclasses.replace(options, workdir=str(tmp_path)))
    workdir.check(options)  # So a grid passes over the run.


@pytest.mark.parametrize(
    "change",
    [{"tensorflow": "2.99.1"}, {"keras": "2.99.0"}, {"tensorflow": "2.99.0", "keras": "2.99.0"}],
)
def test_a_run_on_another_stack_is_refused(change, tmp_path):
    options = Options(**QUICK, workdir=str(tmp_path))
    here = report.versions()
    there = {**here, **change}
    Workdir(str(tmp_path)).begin(options, {}, there)
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    with pytest.raises(UserError) as refused:
        run.run(options)
    said = str(refused.value)
    for versions in (here, there):
        assert f"TensorFlow {versions['tensorflow']} with Keras {versions['keras']}" in said
    minor = ".".join(there["tensorflow"].split(".")[:2])
    assert said.endswith(f"go on with TensorFlow {minor}, or give another workdir")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


def test_a_run_goes_on_after_an_update_that_fixes_bugs(tmp_path):
    workdir = Workdir(str(tmp_path))
    workdir.check_versions(report.versions())
    here = report.versions()
    patch = ".".join([*here["tensorflow"].split(".")[:2], "99"])
    workdir.begin(Options(**QUICK), {}, {**here, "tensorflow": patch, "numpy": "99.0.0"})
    workdir.check_versions(here)


@pytest.mark.parametrize(
    "given, worker, path",
    [
        ({}, 0, "runs/digits-resnet8-dml-seed0"),
        (dict(network="a:b,resnet8", seed=3), 0, "runs/digits-a.b+resnet8-dml-seed3"),
        (dict(workdir="here"), 2, "here/worker-2"),
    ],
)
def test_where_a_run_is_unless_told(given, worker, path):
    options = Options(**{**QUICK, "method": "dml", **given})
    assert Workdir.of_run(options, worker).path == path


@pytest.mark.slow
def test_other_data_in_a_workdir_are_refused(tmp_path, make_folder):
    train = {"a": [noise(8, 8, 3)] * 6, "b": [noise(8, 8, 3, seed=1)] * 6}
    folder = make_folder({"train": train, "test": train})
    settings = Options(
        dataset="image_folder",
        network="resnet8",
        method="baseline",
        epochs=1,
        batch_size=6,
        workdir=str(tmp_path / "run"),
    )
    run.run(dataclasses.replace(settings, data_dir=folder))
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*"))
    os.rename(folder, tmp_path / "moved")
    for path in (tmp_path / "moved").glob("*/b/0.png"):
        path.write_bytes(tf.io.encode_png(noise(8, 8, 3, seed=2)).numpy())
    with pytest.raises(UserError, match=r"other data \(means \[.*\] here, \[.*\] there\)"):
        run.run(dataclasses.replace(settings, data_dir=str(tmp_path / "moved")))
    assert before == sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*"))


@pytest.mark.slow
def test_a_run_under_two_replicas_logs_and_exports(tmp_path, capsys, two_replicas, monkeypatch):
    monkeypatch.setattr(tf.distribute, "MirroredStrategy", lambda devices: two_replicas)
    results = run.run(Options(**QUICK, strategy="mirrored", workdir=str(tmp_path / "run")))
    assert results == json.loads((tmp_path / "run/results.json").read_text())
    keys = (
        "method dataset network peers seed epochs steps deployed deployed_error "
        "best_deployed_error error diversity parameters training_gflop images_per_second "
        "wall_seconds settings versions"
    )
    assert {*results} == {*keys.split()}
    settings = results["settings"]
    assert settings["batch_size"] == QUICK["batch_size"] and settings["strategy"] == "mirrored"
    # The method's own defaults too; what another method takes, or has no value, is left out.
    assert settings["temperature"] == 3.0
    assert settings["peers"] == 3
    assert not {"generations", "ema_decay"} & set(settings)
    assert results["deployed"] == "mean_peer_1" and results["steps"] == 4 and results["peers"] == 3
    assert results["parameters"]["deployed"] == sum(
        int(np.prod(w.shape)) for w in networks.resnet8(SHAPE, CLASSES).trainable_weights
    )
    found = events(tmp_path / "run")
    train, test = ({tag for s, tag in found if s == split} for split in ("train", "test"))
    losses = {"loss", "loss/ce", "loss/ensemble", "loss/mean"}
    others = "rampup ema_decay learning_rate images_per_second error/peer_1 diversity views"
    assert losses | {*others.split()} <= train
    pictures = {"test_images/confusion_matrix", "test_images/class_errors"}
    measured = {"deployed_error", "diversity", "loss"}
    assert {f"error/{n}" for n in results["error"]} | measured | pictures == test
    assert [*found["test", "error/ensemble"]] == [2, 4]
    last = found["test", "error/mean_peer_1"][4]
    assert last == pytest.approx(results["deployed_error"], abs=1e-3)
    out = capsys.readouterr().out
    assert (
        "mean_ensemble" in out and "export/saved_model/1" in out and "tensorboard --logdir" in out
    )


@pytest.mark.slow
def test_going_on_between_epochs_starts_the_epoch_s_means_afresh(tmp_path):
    settings = Options(**{**QUICK, "method": "baseline", "workdir": str(tmp_path)})
    run.run(settings)
    whole = Workdir(str(tmp_path)).read_rows()
    for path in tmp_path.glob("checkpoints/ckpt-4.*"):
        path.unlink()
    run.run(settings)
    again = Workdir(str(tmp_path)).read_rows()
    assert [row["epoch"] for row in again] == [1, 2] and again[0] == whole[0]
    for name in ("loss", "error/peer_1", "val_error/peer_1"):
        assert again[1][name] == pytest.approx(whole[1][name], rel=1e-3), name
