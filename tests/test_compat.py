"""One Keras for the whole package on both stacks, and what stands in for tensorflow-addons."""

import json
import os
import re
import subprocess
import sys
import textwrap

import numpy as np
import pages
import pytest
import tensorflow as tf
from tensorflow import keras

from tf_pcl import compat, losses
from tf_pcl.training import export

ADDONS = compat._addons()
KERAS_3 = compat.keras.__name__ == "tf_keras"


def python(source, *arguments, **env):
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source), *arguments],
        capture_output=True,
        text=True,
        env={**{k: v for k, v in os.environ.items() if k != "TF_USE_LEGACY_KERAS"}, **env},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def without_addons(monkeypatch):
    monkeypatch.setattr(compat, "_addons", lambda: None)


def test_importing_the_package_gives_a_users_network_its_keras():
    printed = python(
        """
        import sys, tf_pcl
        assert "tensorflow" not in sys.modules
        import tensorflow as tf
        from tensorflow import keras
        from tensorflow.keras import layers
        from tf_pcl import compat
        model = keras.Sequential([keras.Input([2]), layers.Dense(3)])
        print(isinstance(model, compat.keras.Model))
        print(isinstance(model.layers[0], compat.layers.Dense))
        print(compat.foreign_keras(model))
        """
    )
    assert printed.split() == ["True", "True", "None"]


def test_the_package_works_where_tensorflow_was_imported_first():
    printed = python(
        """
        import tensorflow as tf
        tf.keras.layers.Dense  # a notebook has used it
        from tf_pcl import compat
        from tf_pcl.compat import keras
        compat._addons()
        assert compat.layers is keras.layers
        from tf_pcl import networks
        network = networks.resnet8((8, 8, 1), 10)
        print(isinstance(network, keras.Model), network(tf.zeros([2, 8, 8, 1])).shape)
        """
    )
    assert printed == "True (2, 10)"


# The other Keras: Keras 3 beside tf_keras, tf_keras beside the Keras of TensorFlow 2.15. Its import
# changes what the process's Keras does, so that it has a process of its own.
OTHER = "keras" if KERAS_3 else "tf_keras"


def test_beside_another_keras_its_models_are_told_apart_and_own_ones_are_copied(tmp_path):
    """Keras itself would wait without end for layers of its own, whose names the other took."""
    assert compat.foreign_keras(keras.Sequential()) is None
    assert compat.foreign_keras(keras.layers.Dense(1)) is None
    assert compat.foreign_keras("resnet32") is None
    printed = python(
        f"""
        import sys
        from tf_pcl import compat, methods, networks, surgery
        from tf_pcl.compat import keras
        from tf_pcl.errors import UserError
        import {OTHER} as other
        print(compat.foreign_keras(other.layers.Dense(1)))
        print(compat.foreign_keras(type("Mine", (other.Model,), {{}})()))

        def mixed():
            # Dropout would be left out, and BatchNorm be constant.
            images = keras.Input([8, 8, 3])
            x = other.layers.Dropout(0.5)(keras.layers.Flatten()(images))
            return keras.Model(images, keras.layers.Dense(5)(x))

        class Subclassed(keras.Model):
            def __init__(self):
                super().__init__()
                self.end = other.layers.Dense(5)

            def call(self, x):
                return self.end(x[:, 0, 0])

        network = networks.resnet8((8, 8, 1), 10)
        model = methods.Baseline(network)
        foreign = lambda *_: other.Sequential([other.layers.Dense(5)])
        sys.modules["my_foreign"] = type("M", (), dict(build=foreign, model=foreign()))
        for refused in (
            lambda: methods.Baseline(foreign),
            lambda: networks.build("my_foreign:build", (8, 8, 1), 5),
            lambda: methods.Baseline(mixed),
            lambda: surgery.functional(Subclassed(), (8, 8, 3)),
            lambda: methods.Baseline(network, preprocess=other.layers.Rescaling(1.0)),
            lambda: model.compile(other.optimizers.SGD()),
            lambda: model.fit(callbacks=[other.callbacks.TerminateOnNaN()]),
            lambda: surgery.load_weights(foreign(), "absent"),
            lambda: networks.build("my_foreign:model", (8, 8, 1), 5),
        ):
            try:
                refused()
            except UserError as e:
                print("refused:", e)
        model = methods.PCL(network, peers=2)
        print(all(isinstance(layer, keras.layers.Layer) for layer in model.submodules
                  if "Layer" in [c.__name__ for c in type(layer).__mro__]))
        network.save({str(tmp_path / "w.keras")!r})
        print(len(surgery.load_weights(network, {str(tmp_path / "w.keras")!r})[0]))
        """
    )
    sentence, of_subclass, *refused, of_keras, loaded = printed.splitlines()[-13:]
    assert sentence.startswith(f"Dense comes from the package {OTHER}, ")
    assert "from tf_pcl.compat import keras" in sentence
    assert all(line.startswith("refused: ") for line in refused)
    assert all("from tf_pcl.compat import keras" in line for line in refused[:-1])
    assert "it must name a function" in refused[-1]
    assert of_subclass.startswith("Mine comes from")
    assert of_keras == "True" and int(loaded) > 10


def test_keras_3_without_tf_keras_says_what_to_install(monkeypatch):
    monkeypatch.setattr(compat, "_is_keras_3", lambda: True)
    monkeypatch.setitem(sys.modules, "tf_keras", None)
    minor = ".".join(tf.__version__.split(".")[:2])
    with pytest.raises(ImportError, match=rf"pip install tf-keras=={minor}\.\*"):
        compat._import_keras()


@pytest.mark.parametrize(
    ("before", "status", "said"),
    [("", 0, r"\Aafter\Z"), ("sys.modules['tensorflow'] = None", 1, "ModuleNotFoundError")],
)
def test_tensorflow_is_imported_without_a_word(before, status, said):
    done = pages.python(
        "-c",
        f"import sys\nfrom tf_pcl import compat\n{before}\ncompat.import_tensorflow()\n"
        "sys.stderr.write('after')",
        TF_CPP_MIN_LOG_LEVEL="3",
    )
    assert done.returncode == status and re.search(said, done.stderr), done.stderr


def test_keras_version_is_of_the_package_in_use():
    assert compat.keras_version().startswith(".".join(tf.__version__.split(".")[:2]))


def by_addons(mine, theirs, x):
    """Values and gradients of a sum of squares, both ways."""
    results = []
    for function in (mine, theirs):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
            total = tf.reduce_sum(tf.square(y) + y)
        results.append((y.numpy(), tape.gradient(total, x).numpy()))
    return results


IMAGES = np.random.RandomState(0).rand(40, 9, 12, 3).astype(np.float32)
CENTRES = np.stack([np.random.RandomState(1).randint(0, n, 40) for n in (9, 12)], 1)


@pytest.mark.parametrize("size", [2, 6, 20])
def test_cutout_blackens_a_square(size, without_addons):
    expected = IMAGES.copy()
    for image, (row, column) in zip(expected, CENTRES):
        image[
            max(0, row - size // 2) : row + size // 2,
            max(0, column - size // 2) : column + size // 2,
        ] = 0
    np.testing.assert_array_equal(compat.cutout(IMAGES, size, CENTRES.astype(np.int32)), expected)
    ints = compat.cutout((255 * IMAGES).astype(np.uint8), size, CENTRES.astype(np.int32))
    assert ints.dtype == tf.uint8 and ints.shape == IMAGES.shape


def test_distances_of_equal_features_are_zero_and_have_no_gradient(without_addons):
    x = tf.constant([[0.0, 3.0], [4.0, 0.0], [4.0, 0.0]])
    with tf.GradientTape() as tape:
        tape.watch(x)
        d = compat.pairwise_distance(x)
    np.testing.assert_allclose(d, [[0, 5, 5], [5, 0, 0], [5, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(
        tape.gradient(d, x), [[-3.2, 2.4], [1.6, -1.2], [1.6, -1.2]], rtol=1e-6
    )


if ADDONS is not None:
    # On a stack without tensorflow-addons there is nothing to compare with.

    @pytest.mark.parametrize("size", [2, 6, 20])
    def test_cutout_is_that_of_tensorflow_addons(size):
        offset = tf.constant(CENTRES, tf.int32)
        (mine, my_gradient), (theirs, their_gradient) = by_addons(
            lambda x: compat._cutout(x, size, offset),
            lambda x: ADDONS.image.cutout(x, (size, size), offset),
            tf.constant(IMAGES),
        )
        np.testing.assert_array_equal(mine, theirs)
        np.testing.assert_array_equal(my_gradient, their_gradient)

    @pytest.mark.parametrize("seed", range(3))
    def test_pairwise_distance_is_that_of_tensorflow_addons(seed):
        x = np.random.RandomState(seed).randn(20, 7).astype(np.float32)
        x[5] = x[11]
        (mine, my_gradient), (theirs, their_gradient) = by_addons(
            compat._pairwise_distance,
            ADDONS.losses.metric_learning.pairwise_distance,
            tf.constant(x),
        )
        np.testing.assert_array_equal(mine, theirs)
        np.testing.assert_allclose(my_gradient, their_gradient, rtol=1e-5, atol=1e-5)

    def test_the_shared_loss_is_equal_without_tensorflow_addons(monkeypatch):
        x = tf.random.stateless_normal([16, 5], [0, 1])
        with_addons = losses.pairwise_distances(x).numpy()
        monkeypatch.setattr(compat, "_addons", lambda: None)
        np.testing.assert_array_equal(losses.pairwise_distances(x), with_addons)


# A program without tf_pcl that uses the SavedModel in several ways. Its last lines are the logits.
READS = """
import sys, numpy as np, tensorflow as tf
import tensorflow_hub as hub
sys.modules["tf_pcl"] = None
folder, images = sys.argv[1], tf.constant(np.load(sys.argv[2]))
signature = tf.saved_model.load(folder).signatures["serving_default"]
print(signature(images=images)["logits"].numpy().tolist())
print(hub.KerasLayer(folder)(images).numpy().tolist())
"""
# On the current stack Keras is Keras 3 there, which alone has this layer.
READS_WITH_KERAS_3 = """
import keras
assert keras.__version__.startswith("3.")
layer = keras.layers.TFSMLayer(folder, call_endpoint="serving_default")
inputs = keras.Input([8, 8, 1], dtype="uint8")
model = keras.Model(inputs, layer(inputs))
print(model.predict(images, verbose=0)["logits"].tolist())
"""


def test_the_saved_model_is_used_without_the_package(tmp_path):
    inputs = keras.Input([8, 8, 1], dtype="uint8")
    x = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(inputs))
    model = keras.Model(inputs, keras.layers.Dense(10)(x))
    folder = export.export(model, "0123456789", str(tmp_path))
    images = np.random.RandomState(0).randint(0, 256, [5, 8, 8, 1]).astype(np.uint8)
    np.save(tmp_path / "images.npy", images)
    printed = python(READS + READS_WITH_KERAS_3 * KERAS_3, folder, tmp_path / "images.npy")
    for line in printed.splitlines()[-2 - KERAS_3 :]:
        np.testing.assert_allclose(json.loads(line), model(images), rtol=1e-4, atol=1e-5)
