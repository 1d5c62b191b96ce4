"""Trained networks in each form give the logits of the network that they were made from."""

import pathlib
import sys

import numpy as np
import pytest
import tensorflow as tf
from helpers import noise
from tensorflow import keras

from tf_pcl.deploy import runtimes
from tf_pcl.errors import UserError
from tf_pcl.training import export, workdir

SHAPE, NAMES = (6, 4, 3), ["cat", "dog\n", "größe"]
IMAGES = noise(7, *SHAPE)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(network, folder of its export, its SavedModel)."""
    keras.utils.set_random_seed(0)  # It is made before the test's own seed is set.
    images = keras.Input(SHAPE, dtype="uint8")
    x = keras.layers.Rescaling(1 / 255)(images)
    x = keras.layers.Conv2D(5, 3, activation="relu", kernel_initializer="he_normal")(x)
    logits = keras.layers.Dense(3, bias_initializer="normal")(keras.layers.Flatten()(x))
    model = keras.Model(images, logits)
    folder = tmp_path_factory.mktemp("run") / "export"
    return model, folder, export.export(model, NAMES, str(folder))


def tflite(model, folder, *, integers=False, batch=None):
    """A TFLite file with the outputs probabilities and logits, of float or of int8 images."""
    spec = tf.TensorSpec([batch, *SHAPE], tf.float32, name="images")

    @tf.function(input_signature=[spec])
    def serve(images):
        logits = model(images)
        return {"probabilities": tf.nn.softmax(logits), "logits": logits}

    module = tf.Module()
    module.model = model
    tf.saved_model.save(module, str(folder / "for_tflite"), {"serving_default": serve})
    converter = tf.lite.TFLiteConverter.from_saved_model(str(folder / "for_tflite"))
    if integers:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        # What lies beyond the range of these would be cut off.
        given = [*IMAGES, *(noise(*SHAPE, seed=i) for i in range(50))]
        converter.representative_dataset = lambda: ([x[None].astype(np.float32)] for x in given)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = converter.inference_output_type = tf.int8
    path = folder / "tflite" / "network.tflite"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(converter.convert())
    return str(path)


def test_a_saved_model_is_found_in_each_folder_of_it(made):
    model, folder, saved_model = made
    for path in (folder.parent, folder, folder / "saved_model", saved_model):
        assert workdir.saved_model(str(path)) == saved_model
    expected = model.predict(IMAGES, verbose=0)
    for path in (folder.parent, saved_model):
        runtime = runtimes.load(str(path))
        assert (runtime.kind, runtime.path) == ("saved_model", saved_model)
        assert (runtime.image_shape, runtime.classes) == (SHAPE, tuple(NAMES)) and runtime.named
        np.testing.assert_allclose(runtime.logits(IMAGES), expected, atol=1e-5)
    encoded = [tf.io.encode_png(image).numpy() for image in IMAGES]
    np.testing.assert_allclose(runtime.logits_of_bytes(encoded), expected, atol=1e-5)
    assert runtime.logits(IMAGES[:0]).shape == (0, 3)


def test_any_number_of_images(made, monkeypatch):
    model, _, saved_model = made
    monkeypatch.setattr(runtimes, "BATCH", 3)
    expected = model.predict(IMAGES, verbose=0)
    np.testing.assert_allclose(runtimes.load(saved_model).logits(IMAGES), expected, atol=1e-5)


@pytest.mark.parametrize("integers, batch, atol", [(False, None, 1e-5), (True, 2, 0.02)])
def test_a_tflite_file(made, integers, batch, atol, capfd):
    model, folder, _ = made
    path = tflite(model, folder, integers=integers, batch=batch)
    capfd.readouterr()
    runtime = runtimes.load(path)
    assert capfd.readouterr() == ("", "")
    assert (runtime.kind, runtime.image_shape) == ("tflite", SHAPE)
    assert runtime.classes == tuple(NAMES) and runtime.logits_of_bytes is None
    # int8 has 256 levels, of which the logits' range takes all.
    np.testing.assert_allclose(runtime.logits(IMAGES), model.predict(IMAGES, verbose=0), atol=atol)
    assert (runtime._fixed, runtime._input["dtype"]) == (batch, np.int8 if integers else np.float32)


def test_names_are_those_of_the_nearest_file_that_fits(made, tmp_path, caplog):
    model, folder, _ = made
    path = tmp_path / "network.tflite"
    path.write_bytes(pathlib.Path(tflite(model, folder)).read_bytes())
    runtime = runtimes.load(str(path))
    assert runtime.classes == ("0", "1", "2") and not runtime.named
    # As other programs write it: without escapes, without a line break at the end.
    (tmp_path / "labels.txt").write_text("a b\nc\nd", encoding="utf-8")
    assert runtimes.load(str(path)).classes == ("a b", "c", "d")
    (tmp_path / "classes.json").write_text('["x", "y"]', encoding="utf-8")
    assert runtimes.load(str(path)).classes == ("0", "1", "2")
    assert "has 3 outputs, and the file beside it has 2 names" in caplog.text


def test_names_come_from_a_list(made, tmp_path, caplog):
    """In an object, as other programs write it, the numbers of the classes may be the values."""
    model, folder, _ = made
    path = tmp_path / "network.tflite"
    path.write_bytes(pathlib.Path(tflite(model, folder)).read_bytes())
    (tmp_path / "classes.json").write_text('{"dog": 1, "cat": 0, "rat": 2}', encoding="utf-8")
    assert runtimes.load(str(path)).classes == ("0", "1", "2")
    assert "classes.json: ValueError: it is no list" in caplog.text
    (tmp_path / "labels.txt").write_text("cat\ndog\nrat\n", encoding="utf-8")
    assert runtimes.load(str(path)).classes == ("cat", "dog", "rat")


@pytest.mark.parametrize("form", ["saved_model", "float", "int8"])
def test_networks_that_give_probabilities_alone(form, tmp_path):
    """The softmax of what is taken for logits is what the network says."""
    keras.utils.set_random_seed(0)
    images = keras.Input(SHAPE)
    x = keras.layers.Flatten()(keras.layers.Rescaling(1 / 99)(images))
    # Most of so many rounded probabilities are 0.
    model = keras.Model(images, keras.layers.Dense(600, activation="softmax")(x))
    expected = model.predict(IMAGES.astype(np.float32), verbose=0)
    path, atol = str(tmp_path / "network.tflite"), 1e-6
    if form == "saved_model":
        path = str(tmp_path / "network")
        model.save(path, save_format="tf")
    else:
        converter = tf.lite.TFLiteConverter.from_keras_model(model)
        if form == "int8":
            converter.optimizations, atol = [tf.lite.Optimize.DEFAULT], 1 / 100
            converter.representative_dataset = lambda: ([x[None].astype("f")] for x in IMAGES)
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
            converter.inference_input_type = converter.inference_output_type = tf.int8
        pathlib.Path(path).write_bytes(converter.convert())
    found = np.exp(runtimes.load(path).logits(IMAGES))
    np.testing.assert_allclose(found, expected, atol=atol)
    assert 0.01 < found.max() < 0.9


def test_outputs_of_saved_models(tmp_path):
    def made(**outputs):
        module = tf.Module()
        spec = tf.TensorSpec([None, *SHAPE], tf.float32, name="images")
        answer = lambda x: {name: of(tf.reshape(x, [-1, 72])) for name, of in outputs.items()}
        serve = tf.function(answer, input_signature=[spec])
        folder = str(tmp_path / "_".join(outputs))
        tf.saved_model.save(module, folder, {"serving_default": serve})
        return folder

    path = made(aux_logits=lambda x: -x[:, :3], logits=lambda x: x[:, :3])
    np.testing.assert_array_equal(runtimes.load(path).logits(IMAGES), IMAGES[:, 0, 0])
    # What is called so is so, whatever it sums to.
    path = made(logits=lambda x: tf.nn.softmax(x[:, :3] / 255))
    assert runtimes.load(path).logits(IMAGES).min() >= 0
    with pytest.raises(UserError, match="one of several must be named logits"):
        runtimes.load(made(first=lambda x: x[:, :3], second=lambda x: x[:, :3]))
    for path in (made(sum=tf.reduce_sum), made(pixels=lambda x: tf.reshape(x, [-1, *SHAPE]))):
        with pytest.raises(UserError, match="no fixed number of logits"):
            runtimes.load(path)


def test_what_cannot_be_loaded_is_said_in_one_sentence(made, tmp_path, monkeypatch):
    _, _, saved_model = made
    for name in ("a.tflite", "b.onnx", "c.bin", "d/saved_model.pb"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"nothing of the kind")
    (tmp_path / "empty").mkdir()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for name, text in {
        "a.tflite": "cannot be loaded as a TFLite file",
        "b.onnx": "install it with pip install onnxruntime",
        "c.bin": "has no suffix of a known format: give a workdir",
        "d": "cannot be loaded as a SavedModel",
        "empty": "holds no SavedModel",
        "absent": "is not there",
    }.items():
        with pytest.raises(UserError, match=text):
            runtimes.load(str(tmp_path / name))
    # Of several paths on a command line, it is said which one is meant.
    for name in "c.bin", "empty", "absent":
        with pytest.raises(UserError, match=f"the network {tmp_path / name} "):
            runtimes.find(str(tmp_path / name))
    # Of two classes with one output, that would be the first for any image.
    for outputs, text in {1: "a single logit", None: "no fixed number of logits"}.items():
        with pytest.raises(UserError, match=f"gives {text}: give a classifier of at least two"):
            runtimes.Runtime("a", [None, *SHAPE], outputs, lambda images: images)
    for images in (IMAGES[0], IMAGES.astype(np.float32), IMAGES[:, 1:]):
        with pytest.raises(UserError, match="it takes uint8"):
            runtimes.load(saved_model).logits(images)


def test_the_newest_version_is_loaded(tmp_path):
    for version in ("1", "9", "10", "11"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "saved_model.pb").touch()
    # An export that was not finished.
    (tmp_path / "11" / "saved_model.pb").unlink()
    assert workdir.saved_model(str(tmp_path)) == str(tmp_path / "10")
