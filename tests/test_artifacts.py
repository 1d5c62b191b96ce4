"""The forms of a run's network, each loaded by its own runtime, and the model card."""

import base64
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from helpers import CLASSES, SHAPE, build, noise, slow_but, without_norm
from pages import blocks, commands, page, python, rows, section
from rich.console import Console
from rich.markdown import Markdown

from tf_pcl import data, networks
from tf_pcl.data.datasets import Arrays
from tf_pcl.deploy import artifacts, model_card, runtimes
from tf_pcl.deploy.finished import Finished
from tf_pcl.errors import Stopped, UserError
from tf_pcl.options import Options
from tf_pcl.surgery import Target, deployable, with_features
from tf_pcl.training import run
from tf_pcl.training.workdir import TEST_FILES, Workdir, write_json

# For Python 3.9 there is no tf2onnx that goes with TensorFlow.
ONNX = sys.version_info >= (3, 10)
FORMATS = [name for name in artifacts.FORMATS if ONNX or name != "onnx"]
SETTINGS = dict(dataset="digits", network="resnet8", train_examples=200, batch_size=50, epochs=3)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A network of random weights that standardises its images, and 100 digits."""
    digits = data.load("digits")
    some = Arrays(digits.test.images[:100], digits.test.labels[:100])
    fewer = data.ImageData("digits", digits.classes, SHAPE, some, some, digits.mean, digits.std)
    tf.keras.utils.set_random_seed(1)
    network = deployable(
        networks.standardise(digits.mean, digits.std),
        with_features(Target.of(without_norm(SHAPE, CLASSES)).new()),
    )
    return artifacts.Source(network, fewer, str(tmp_path_factory.mktemp("artifacts")), 50)


# The least that must get the same class, in percent, and how far logits may lie apart, as a share
# of the largest.
AGREEMENT = {
    "saved_model": (100, 1e-5),
    "tflite": (100, 1e-5),
    "tflite_float16": (97, 0.01),
    "tflite_int8": (85, 0.1),
    "onnx": (100, 1e-5),
}


@pytest.mark.parametrize(
    "name", slow_but(FORMATS, "tflite", "tflite_float16", "tflite_int8", "onnx")
)
def test_a_form_answers_as_the_network_does(name, source, capfd):
    path = artifacts._written(name, source)
    loaded = runtimes.load(path)
    found = artifacts.compare(source.network, {name: loaded}, source.data)
    images = source.data.test.first(100)
    expected = source.network(images).numpy()
    same, apart = AGREEMENT[name]
    row = found["artifacts"][name]
    assert row["same_class"] >= same
    assert row["largest_difference"] <= apart * np.abs(expected).max()
    assert row["latency_ms"] > 0 and found["test_images"] == 100
    wrong = lambda logits: 100 * np.mean(logits.argmax(-1) != source.data.test.all_labels())
    assert row["error"] == pytest.approx(wrong(loaded.logits(images)))
    assert found["original"]["error"] == pytest.approx(wrong(expected))
    # What converters write is kept back.
    written = capfd.readouterr()
    assert "Non-Converted" not in written.out + written.err


def test_the_integer_network_takes_images_as_they_are_and_computes_with_integers(source):
    path = artifacts._written("tflite_int8", source)
    interpreter = tf.lite.Interpreter(path)
    (given,) = interpreter.get_input_details()
    assert given["dtype"] == np.uint8 and given["quantization"] == (1.0, 0)
    types = {d["dtype"] for d in interpreter.get_tensor_details() if "weight" in d["name"]}
    floats = [d for d in interpreter.get_tensor_details() if d["dtype"] == np.float32]
    assert np.float32 not in types
    # The two outputs alone.
    assert {d["index"] for d in floats} == {d["index"] for d in interpreter.get_output_details()}


def test_what_cannot_be_converted_is_said_in_one_line(source):
    def sorts(images, training):
        return tf.numpy_function(lambda x: np.sort(x[:, 0, :, 0]), [images], tf.float32)

    unknown = source._replace(network=sorts)
    with pytest.raises(Stopped, match="`format=tflite`: this network cannot be converted"):
        artifacts._written("tflite", unknown)
    assert not os.path.exists(os.path.join(source.folder, "model.tflite.part"))


def test_the_network_of_an_exit_gives_its_logits():
    model = build("pcl", "without_norm")
    for weight in model.mean.weights:
        weight.assign(1.1 * weight + 0.01)
    images = noise(4, *SHAPE)
    exits = model.all_exits(images)
    assert len(exits) == 8
    for name, e in exits.items():
        np.testing.assert_allclose(model.network_of(name)(images), e.logits, atol=1e-5)
    with pytest.raises(UserError, match="`exit=peer_4`: it is not known"):
        model.network_of("peer_4")


def test_a_method_whose_other_exits_are_no_networks_says_which_it_has():
    model = build("one", "without_norm")
    other = next(name for name in model.exits if name != model.deployed_exit)
    assert model.network_of(model.deployed_exit).output_shape == (None, CLASSES)
    with pytest.raises(UserError, match=f"`exit={other}`: .* only {model.deployed_exit} is"):
        model.network_of(other)


def fake_run(folder, seed, error=10.0, **changes):
    """A workdir as a run leaves it, whose SavedModel is empty."""
    options = Options(**{**SETTINGS, "method": "pcl", "seed": seed, **changes})
    workdir = Workdir(str(folder / f"{options.epochs}-seed{seed}"))
    workdir.begin(options, {"classes": ["a"], "means": [seed]}, {})
    errors = {"peer_1": error + 1, "mean_peer_1": error, "mean_ensemble": error - 1}
    results = {"error": errors, "deployed": "mean_peer_1", "epochs": options.epochs}
    write_json(workdir.results, results)
    os.makedirs(os.path.join(workdir.export, "saved_model", "1"))
    open(os.path.join(workdir.export, "saved_model", "1", "saved_model.pb"), "w").close()
    return workdir.path


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"formats": ["tflite", "pickle"]}, "`format=pickle`: it is not known. Allowed: onnx, "),
        ({"formats": []}, "`format=`: give at least one"),
        ({"exit_name": "mean_ensembel"}, "`exit=mean_ensembel`: .* Did you mean mean_ensemble?"),
        ({"path": "nowhere"}, "nowhere is not a workdir: it has no flags.txt; give that of a run"),
        ({"path": "begun"}, "the run in begun has not ended, since it has no SavedModel yet"),
        ({"path": "odd"}, "odd/results.json is damaged"),
        ({"path": "again"}, "the run in again trains anew and has not ended"),
        ({"folder": "done/export", "exit_name": "peer_1"}, "`folder=done/export`: it has"),
        ({"folder": "done/export", "fold_batch_norm": True}, "`folder=done/export`: it has"),
        ({"folder": "done/flags.txt"}, "`folder=done/flags.txt`: the folder cannot be written"),
    ],
)
def test_what_cannot_be_done_is_refused(arguments, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("done", "begun", "odd", "again"):
        os.rename(fake_run(tmp_path, 0), name)
    os.remove("begun/results.json")
    write_json("odd/results.json", {"epochs": 3})
    # It has the SavedModel of the training before.
    results = json.loads((tmp_path / "again" / "results.json").read_text())
    write_json("again/results.json", {**results, "epochs": 1})
    monkeypatch.setattr(Finished, "load_data", lambda *_: data.load("digits"))
    monkeypatch.setattr(Finished, "network", lambda *_: None)
    with pytest.raises(UserError, match=text) as refused:
        artifacts.export_run(**{"path": "done", "formats": ["tflite"], **arguments})
    assert "\n" not in str(refused.value)


def test_a_missing_package_is_named_with_what_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tf2onnx", None)
    with pytest.raises(UserError, match=r"`format=onnx`: it needs tf2onnx .*'tf_pcl\[onnx\]'"):
        artifacts.export_run(fake_run(tmp_path, 0), ["tflite", "onnx"])


def test_runs_that_differ_by_the_seed_are_found_beside_a_run(tmp_path):
    paths = [fake_run(tmp_path, seed, 10.0 + seed) for seed in (2, 0, 1)]
    fake_run(tmp_path, 3, epochs=4)
    os.remove(os.path.join(fake_run(tmp_path, 4), "results.json"))
    found = Finished.of(paths[0]).siblings()
    assert [one.options.seed for one in found] == [0, 1, 2]
    assert model_card._spread([one.results["error"]["mean_peer_1"] for one in found]) == (
        "11.00 ± 1.00"
    )
    assert Finished.of(paths[0]).exit_name("ensemble") == "mean_ensemble"
    assert Finished.of(paths[0]).exit_name("deployed") == "mean_peer_1"
    # Those on other test images are no siblings.
    for path, number in zip(paths, ("0000000a", "0000000b", "0000000a")):
        data = Workdir(path).read_data()
        write_json(Workdir(path).data, {**data, TEST_FILES: number})
    assert [one.options.seed for one in Finished.of(paths[0]).siblings()] == [1, 2]
    # Nor are those on other training images, unless the seed has drawn them.
    paths = [fake_run(tmp_path / "all", seed, train_examples=None) for seed in (0, 1, 2)]
    write_json(Workdir(paths[2]).data, Workdir(paths[0]).read_data())
    assert [one.options.seed for one in Finished.of(paths[0]).siblings()] == [0, 2]


def test_the_card_repeats_the_flags_that_were_given():
    options = Options(**SETTINGS, data_dir="/a b/it's", lr_decay_epochs=(1.0, 2.0), workdir="x")
    command = model_card._command(options)
    assert model_card._dataset(options) == "digits"
    photos = Options(dataset="image_folder", data_dir="/a b/my_photos/")
    assert model_card._dataset(photos) == r"image_folder (my\_photos)"
    assert "'" not in command and "workdir" not in command
    flags = command.replace("\\\n", " ").split()[2:]
    assert set(flags) == {
        "--method=pcl",
        "--lr_decay_epochs=1,2",
        *(f"--{name}={value}" for name, value in SETTINGS.items()),
    }


def test_the_card_names_what_its_command_lacks():
    folder, file = "`--data_dir`, the folder of the data", "`--labels`, the file of their labels"
    photos = Options(dataset="image_folder", data_dir="photos")
    assert model_card._also(Options(**SETTINGS)) == ""
    assert model_card._also(photos) == f" {folder}, has to be given too."
    labelled = dataclasses.replace(photos, labels="of.csv")
    assert model_card._also(labelled) == f" {folder}, and {file}, have to be given too."


class Doubled(tf.keras.layers.Layer):
    def call(self, x):
        return 2 * x


def own_layers(input_shape, num_classes):
    images = tf.keras.Input(input_shape)
    x = tf.keras.layers.Flatten()(Doubled()(images))
    return tf.keras.Model(images, tf.keras.layers.Dense(num_classes)(x))


@pytest.mark.slow
def test_a_network_with_own_layers_is_exported(tmp_path):
    """No code of the SavedModel is run for that."""
    path = str(tmp_path / "run")
    own = {**SETTINGS, "network": "test_artifacts:own_layers", "epochs": 1}
    results = run.run(Options(**own, method="baseline", workdir=path))
    table = artifacts.export_run(path, ["saved_model", "tflite"])
    assert table["original"]["error"] == pytest.approx(results["deployed_error"], abs=0.01)
    # The SavedModel is that of the run.
    assert [row["same_class"] for row in table["artifacts"].values()] == [100, 100]
    shutil.rmtree(Workdir(path).checkpoints)
    with pytest.raises(UserError, match="no checkpoint of epoch 1, .* train again$"):
        artifacts.export_run(path, ["tflite"])


@pytest.mark.slow
def test_a_run_is_exported_in_all_forms_with_a_card(tmp_path):
    """One run gives both its deployed network and its ensemble (PCL-E)."""
    path = str(tmp_path / "run")
    results = run.run(Options(**SETTINGS, workdir=path))
    (_, formats), (_, *folding) = commands(page("docs/deploy.md"), "tf-pcl export")
    assert formats == f"--format={','.join(artifacts.FORMATS)}"
    command = "-m", "tf_pcl", "export", path
    done = python(*command, f"--format={','.join(FORMATS)}")
    assert done.returncode == 0, done.stderr
    table = done.stdout.splitlines()
    assert [line.split()[0] for line in table] == ["format", "trained", *FORMATS, "Folder:"]
    with open(os.path.join(path, "export", "artifacts.json")) as f:
        told = json.load(f)
    assert told["original"]["error"] == pytest.approx(results["deployed_error"], abs=0.01)
    assert told["artifacts"]["tflite"]["same_class"] == 100
    assert told["artifacts"]["tflite_int8"]["same_class"] >= 90
    size = {name: row["kib"] for name, row in told["artifacts"].items()}
    assert size["tflite"] > 1.8 * size["tflite_float16"] > 1.8 * 1.5 * size["tflite_int8"]

    ensemble = artifacts.export_run(path, ["tflite"], exit_name="ensemble")
    assert ensemble["exit"] == "mean_ensemble"
    assert ensemble["folder"] == os.path.join(path, "export", "mean_ensemble")
    error = results["error"]["mean_ensemble"]
    assert ensemble["original"]["error"] == pytest.approx(error, abs=0.01)
    assert ensemble["artifacts"]["tflite"]["error"] == pytest.approx(error, abs=0.01)

    done = python(*command, *folding)
    assert done.returncode == 0, done.stderr
    assert "BatchNorm: 9 layers folded; logits differ by up to " in done.stdout
    folded = os.path.join(path, "export", artifacts.FOLDED)
    with open(os.path.join(folded, "artifacts.json")) as f:
        told = json.load(f)
    assert told["artifacts"]["saved_model"]["same_class"] == 100
    assert told["artifacts"]["saved_model"]["error"] == told["original"]["error"]
    assert told["batch_norm"]["folded"] == 9 and told["batch_norm"]["left"] == []
    card = open(os.path.join(folded, "MODEL_CARD.md")).read()
    assert "9 BatchNorm layers are folded into the layers before them. The trained" in card

    card = open(os.path.join(path, "export", "MODEL_CARD.md")).read()
    assert "folded" not in card
    shown = {name.split("**")[1] if "**" in name else name: error for name, error in rows(card, 2)}
    for name, error in results["error"].items():
        assert shown[name] == f"{error:.2f}"
    assert "of this run alone (seed 0)" in card and "\n\n\n" not in card
    images = data.load("digits").test.first(4)
    expected = tf.nn.softmax(artifacts.export.load(path, data.load("digits").classes)(images))
    loading = blocks(section(card, "## How to load it"), "python")
    assert len(loading) == 2 + ONNX
    for block in loading:
        names = {"images": images}
        here = os.getcwd()
        os.chdir(os.path.join(path, "export"))
        try:
            exec(block, names)
        finally:
            os.chdir(here)
        np.testing.assert_allclose(names["probabilities"], expected, atol=1e-4)
    request = blocks(section(card, "## TensorFlow Serving"), "sh")[0].split("\n\n")[1]
    photo = bytes(range(256)) * 30
    (tmp_path / "photo.jpg").write_bytes(photo)
    sent = subprocess.check_output(
        ["sh", "-c", re.sub(r"curl .*", "cat", request)], cwd=tmp_path, text=True
    )
    asked = json.loads(sent)
    assert asked["signature_name"] == "serve_bytes"
    assert base64.b64decode(asked["instances"][0]["image_bytes"]["b64"]) == photo


@pytest.mark.slow
def test_each_exit_is_that_of_the_epoch_that_validation_chose(tmp_path):
    path = str(tmp_path / "run")
    results = run.run(
        Options(
            **{**SETTINGS, "network": "helpers:other", "epochs": 5},
            method="pcl",
            peers=2,
            learning_rate=0.5,
            validation_examples=200,
            export="best",
            workdir=path,
        )
    )
    assert results["exported_epoch"] < results["epochs"]
    finished = Finished.of(path)
    digits = finished.load_data()
    images, labels = digits.test.first(360), digits.test.all_labels()
    for name in ("mean_peer_1", "peer_2", "mean_ensemble"):
        answers = finished.network(name, digits)(images).numpy().argmax(-1)
        assert 100 * np.mean(answers != labels) == pytest.approx(results["error"][name], abs=0.01)
    # As after training in mixed precision: built anew, in float32.
    mixed = dataclasses.replace(finished.options, precision="mixed_bfloat16")
    anew = dataclasses.replace(finished, options=mixed).network("mean_peer_1", digits)
    exported = finished.network("mean_peer_1", digits)
    np.testing.assert_allclose(anew(images), exported(images), rtol=1e-4, atol=1e-5)
    artifacts.export_run(path, ["tflite"], exit_name="ensemble")
    card = open(os.path.join(path, "export", "mean_ensemble", "MODEL_CARD.md")).read()
    chosen = (
        f"after epoch {results['exported_epoch']} of 5, the one with the lowest validation error"
    )
    assert chosen in card and "after the last" not in card
    shutil.rmtree(Workdir(path).checkpoints)
    os.mkdir(Workdir(path).checkpoints)
    with pytest.raises(UserError, match=f"no checkpoint of epoch {results['exported_epoch']}"):
        finished.network("peer_2", digits)


def test_class_names_are_no_markup_in_a_model_card():
    name = "a<b>&lt; $x$ [y] *z*"
    rendered = Markdown(model_card._plain(name))
    shown = io.StringIO()
    Console(file=shown, width=99).print(rendered)
    assert shown.getvalue().strip() == name
    # GitHub shows what is between two dollar signs as mathematics.
    assert "\\$x\\$" in model_card._plain(name)
    # A folder's name may hold bytes that are not UTF-8, and a file of text may not.
    assert model_card._plain("caf\udce9") == r"caf\\xe9"
