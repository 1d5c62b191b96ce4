"""Files of Keras that others made: their arrays are read, and their code does not run."""

import json
import zipfile

import numpy as np
import pytest
import tensorflow as tf
from tensorflow import keras

from tf_pcl import methods, networks, surgery
from tf_pcl.errors import UserError
from tf_pcl.surgery import files
from tf_pcl.training import export

FORMS = ["saved.h5", "saved.keras", "saved"]


def network(end):
    """A network with an inner model, a layer of layers, and `end` before its classifier."""
    inner_images = keras.Input((6, 6, 4))
    x = keras.layers.Conv2D(6, 3, name="deep")(inner_images)
    inner = keras.Model(inner_images, keras.layers.BatchNormalization(name="norm")(x), name="inner")
    images = keras.Input((8, 8, 3))
    x = inner(keras.layers.Conv2D(4, 3, name="zz")(images))
    x = end(keras.layers.Conv2D(2, 1, name="aa")(x))
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(images, keras.layers.Dense(5, name="logits")(x))


def with_lambda(marker):
    """A network whose Lambda layer writes a file when it is called."""
    # Bound as a default, since a file keeps these with the code.
    end = keras.layers.Lambda(lambda x, path=str(marker): (open(path, "w").close(), x)[1])
    return network(end)


def filled(model):
    for i, weight in enumerate(model.weights):
        weight.assign(tf.reshape(tf.range(tf.size(weight), dtype=tf.float32), weight.shape) + i)
    return model


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_read_and_code_is_not_run(form, tmp_path):
    marker, path = tmp_path / "marker", str(tmp_path / form)
    source = filled(with_lambda(marker))
    source.save(path)
    marker.unlink()
    other = network(keras.layers.Activation("relu"))
    loaded, fresh = surgery.load_weights(other, path)
    assert loaded == ["zz", "deep", "norm", "aa", "logits"] and not fresh
    np.testing.assert_equal(source.get_weights(), other.get_weights())
    assert not marker.exists()
    # What does not fit is refused, and not built either, unless the file is trusted.
    wrong = keras.Sequential(
        [keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(3)]
    )
    with pytest.raises(UserError, match="if you trust its source, `trust_files`") as refused:
        surgery.load_weights(wrong, path)
    assert "\n" not in str(refused.value) and not marker.exists()
    with pytest.raises(UserError, match="cannot be loaded"):
        surgery.load_weights(wrong, path, trust_files=True)
    assert marker.exists()


@pytest.mark.parametrize("form", FORMS)
def test_layers_of_one_name_in_several_inner_models_get_their_own_weights(form, tmp_path):
    def built():
        block = lambda name: keras.Sequential(
            [keras.Input((4, 4, 3)), keras.layers.Conv2D(3, 1, name="conv")], name=name
        )
        images = keras.Input((4, 4, 3))
        x = keras.layers.GlobalAveragePooling2D()(block("second")(block("first")(images)))
        return keras.Model(images, keras.layers.Dense(5, name="logits")(x))

    source, other = filled(built()), built()
    source.save(str(tmp_path / form))
    assert surgery.load_weights(other, str(tmp_path / form)) == (["conv", "conv", "logits"], [])
    np.testing.assert_equal(other.get_weights(), source.get_weights())


def test_a_saved_model_with_adapted_statistics_is_read(tmp_path):
    statistics = keras.layers.Normalization()
    values = np.random.RandomState(0).randint(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    statistics.adapt(values.astype(np.float32))
    images = keras.Input((8, 8, 3), dtype="uint8")
    x = statistics(keras.layers.Rescaling(1.0)(images))
    x = keras.layers.Dense(5)(keras.layers.GlobalAveragePooling2D()(x))
    deployed = keras.Model(images, x)
    deployed.save(str(tmp_path / "saved"))
    again = surgery.read_network(str(tmp_path / "saved"))
    np.testing.assert_array_equal(again(values), deployed(values))


def test_a_saved_model_without_a_description_says_what_to_give(tmp_path):
    """As Keras 3 and model.export() write it."""
    tf.saved_model.save(tf.Module(), str(tmp_path / "graph"))
    for read in (
        lambda: export.load(str(tmp_path / "graph"), "abcde"),
        lambda: surgery.load_weights(network_of_8(), str(tmp_path / "graph")),
    ):
        with pytest.raises(UserError, match=r"graph holds a graph without .* \.weights\.h5"):
            read()


def teacher(end, tmp_path):
    path = str(tmp_path / "export")
    made = filled(network(end))
    images = keras.Input((8, 8, 3), dtype="uint8", name="images")
    scaled = networks.standardise([9.0] * 3, [9.0] * 3)(images)
    deployed = keras.Model(images, keras.layers.Activation("linear", name="logits")(made(scaled)))
    return deployed, export.export(deployed, "abcde", path)


def test_a_teacher_is_built_of_keras_s_own_layers(tmp_path):
    deployed, folder = teacher(keras.layers.LeakyReLU(), tmp_path)
    # Its graph is not even read.
    (tmp_path / "export/saved_model/1/saved_model.pb").write_bytes(b"no graph")
    again = export.load(folder, "abcde")
    images = np.random.RandomState(0).randint(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    np.testing.assert_array_equal(again(images), deployed(images))
    assert [layer.name for layer in again.layers] == [layer.name for layer in deployed.layers]


def test_weights_that_belong_to_another_layer_are_refused(tmp_path, monkeypatch):
    """Two layers of one shape: the weights of each would fit the other too."""
    images = keras.Input((4, 4, 3), dtype="uint8")
    x = keras.layers.Rescaling(1 / 255)(images)
    for name in ("first", "second"):
        x = keras.layers.Conv2D(3, 1, name=name)(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(images, keras.layers.Dense(5)(x))
    folder = export.export(model, "abcde", str(tmp_path / "export"))
    read = files.read_layers
    monkeypatch.setattr(files, "read_layers", lambda path: [*read(path)[1::-1], *read(path)[2:]])
    with pytest.raises(UserError, match="of layer 'second' come where 'first' is described"):
        export.load(folder, "abcde")


def test_a_teacher_with_code_is_refused_unless_trusted(tmp_path):
    marker = tmp_path / "marker"
    end = keras.layers.Lambda(lambda x, path=str(marker): (open(path, "w").close(), x)[1])
    _, folder = teacher(end, tmp_path)
    marker.unlink()
    with pytest.raises(UserError, match="of the class Lambda, .*`trust_files`") as refused:
        export.load(folder, "abcde")
    assert "\n" not in str(refused.value) and not marker.exists()
    assert export.load(folder, "abcde", trust_files=True).output_shape == (None, 5)
    assert marker.exists()


class Doubled(keras.layers.Layer):
    def call(self, x):
        return 2 * x


@pytest.mark.parametrize(
    "end, text",
    [
        (lambda x: tf.repeat(x, 2, 1), "a call of the function repeat"),
        (Doubled(), "of the class Doubled"),
    ],
)
def test_layers_that_are_not_keras_s_own_are_refused(end, text, tmp_path):
    _, folder = teacher(end, tmp_path)
    with pytest.raises(UserError, match=text):
        export.load(folder, "abcde")


@pytest.mark.parametrize(
    "name, module, harmless",
    [
        ("Conv2D", None, True),
        ("Conv2D", "keras.layers", True),
        ("HeNormal", "keras.initializers", True),
        ("system", "os", False),
        ("get_file", "keras.utils", False),
        ("deserialize", "keras.layers", False),
        ("Conv2D", "mine", False),
        ("Lambda", "keras.layers", False),
        ("StringLookup", None, False),
        ("Custom>Doubled", None, False),
        (["Conv2D"], None, False),
    ],
)
def test_what_a_configuration_may_name(name, module, harmless):
    node = {"class_name": name, "module": module, "config": {"name": "x"}}
    config = {"layers": [{"class_name": "Wrapper", "config": {"layer": [node]}}]}
    assert (files._foreign("Functional", config) is None) == harmless


def test_networks_of_this_package_are_teachers_without_trust(tmp_path):
    """The networks that a run deploys, with published preprocessing too."""
    images = np.random.RandomState(0).randint(0, 256, (4, 32, 32, 3)).astype(np.uint8)
    for name in ("applications.MobileNet", "applications.ResNet50"):
        deployed = surgery.deployable(
            networks.preprocessing(name, (32, 32, 3)), surgery.with_logits(network_of_32(name))
        )
        folder = export.export(deployed, "abcde", str(tmp_path / name))
        np.testing.assert_array_equal(export.load(folder, "abcde")(images), deployed(images))
        # Keras cannot describe the slice `[..., ::-1]` of ResNet50's preprocessing in .keras files.
        for ending in ("h5",) if name.endswith("ResNet50") else ("keras", "h5"):
            deployed.save(str(tmp_path / f"saved.{ending}"))
            read = keras.models.load_model(str(tmp_path / f"saved.{ending}"))
            np.testing.assert_array_equal(read(images), deployed(images))


def network_of_32(name):
    """A network that ends in a softmax, fused with the last layer or apart from it."""
    images = keras.Input((32, 32, 3))
    x = keras.layers.GlobalAveragePooling2D()(images)
    if name.endswith("ResNet50"):
        return keras.Model(images, keras.layers.Dense(5, activation="softmax")(x))
    x = keras.layers.Dense(5)(x)
    return keras.Model(images, tf.exp(x) / tf.reduce_sum(tf.exp(x), -1, keepdims=True))


def test_a_file_that_names_a_module_is_not_obeyed(tmp_path):
    """Keras's safe mode has let a .keras file import modules; weights do not need that."""
    source = filled(network(keras.layers.Activation("relu")))
    source.save(str(tmp_path / "saved.keras"))
    with zipfile.ZipFile(tmp_path / "saved.keras") as z:
        parts = {name: z.read(name) for name in z.namelist()}
    config = json.loads(parts["config.json"])
    config["config"]["layers"][1].update(module="no_such_module_here")
    parts["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(tmp_path / "saved.keras", "w") as z:
        for name, content in parts.items():
            z.writestr(name, content)
    other = network(keras.layers.Activation("relu"))
    assert not surgery.load_weights(other, str(tmp_path / "saved.keras"))[1]
    np.testing.assert_array_equal(other.get_weights()[0], source.get_weights()[0])


def test_a_taught_student_learns_from_it(tmp_path):
    deployed, folder = teacher(keras.layers.LeakyReLU(), tmp_path)
    model = methods.KD(network_of_8, teacher=export.load(folder, "abcde"))
    images = np.zeros((2, 1, 8, 8, 3), np.uint8)
    logits = model.teachers(tf.constant(images), False)["teacher"].logits
    np.testing.assert_allclose(logits, deployed(images[:, 0]), rtol=1e-6)


def network_of_8():
    return network(keras.layers.Activation("relu"))
