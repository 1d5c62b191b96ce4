"""Shared set-up: two logical CPU devices, small networks, small data."""

import os

# Before TensorFlow: it says which Keras `from tensorflow import keras` is.
import tf_pcl  # noqa: F401

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import pytest
import tensorflow as tf
from tensorflow import keras

from tf_pcl import data, networks
from tf_pcl.data import datasets

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)

SHAPE, CLASSES = (8, 8, 1), 10


def without_norm(input_shape, num_classes):
    """A network without BatchNorm, whose last layer is a fused softmax."""
    images = keras.Input(input_shape)
    x = keras.layers.Conv2D(8, 3, strides=2, activation="relu", padding="same", name="stage_1")(
        images
    )
    x = keras.layers.Conv2D(16, 3, strides=2, activation="relu", padding="same", name="stage_2")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(
        images,
        keras.layers.Dense(num_classes, activation="softmax", dtype="float32")(x),
        name="without_norm",
    )


def other(input_shape, num_classes):
    """A network with one stage."""
    images = keras.Input(input_shape)
    x = keras.layers.Conv2D(4, 3, strides=2, activation="relu", name="stage_1")(images)
    return keras.Model(
        images, keras.layers.Dense(num_classes)(keras.layers.GlobalAveragePooling2D()(x))
    )


def rescaled(input_shape, num_classes):
    """A network that takes raw images."""
    images = keras.Input(input_shape)
    x = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(images))
    return keras.Model(images, keras.layers.Dense(num_classes)(x))


TINY = {"without_norm": without_norm, "resnet8": networks.resnet8}


@pytest.fixture(autouse=True)
def fresh():
    """Every test starts with the same seeds, in float32."""
    keras.mixed_precision.set_global_policy("float32")
    keras.utils.set_random_seed(0)
    yield
    keras.mixed_precision.set_global_policy("float32")
    keras.backend.clear_session()


@pytest.fixture(scope="session")
def digits():
    return data.load("digits")


@pytest.fixture(scope="session")
def two_replicas():
    """One strategy for all tests: a second MirroredStrategy in a process would reuse the first's collective keys."""
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


@pytest.fixture
def make_folder(tmp_path):
    """make_folder({split: {class: [array or bytes]}}) writes an image folder, PNG for arrays, and returns its path."""

    def make(splits):
        for split, classes in splits.items():
            for name, images in classes.items():
                folder = tmp_path / "images" / split / name
                folder.mkdir(parents=True)
                for i, image in enumerate(images):
                    raw = image if isinstance(image, bytes) else tf.io.encode_png(image).numpy()
                    (folder / f"{i}.png").write_bytes(raw)
        return str(tmp_path / "images")

    return make


def noise(*shape, seed=0):
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def with_labels(images, labels, name="noise"):
    """An ImageData of arrays, the same for training and test."""
    both = datasets.Arrays(images, labels)
    return data.ImageData(
        name, tuple("0123456789"), images.shape[1:], both, both, (128.0,), (64.0,), True
    )
