"""Shared set-up: two logical CPU devices, small networks, small data."""

import gc
import os

# Before TensorFlow: it says which Keras `from tensorflow import keras` is.
import tf_pcl  # noqa: F401

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pytest
import tensorflow as tf
from tensorflow import keras

from tf_pcl import data

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)


# What was imported stays, so the garbage collector need not look at it again and again.
gc.freeze()


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
    """One strategy for all tests.

    A second MirroredStrategy in a process would use the first's collective keys again.
    """
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


@pytest.fixture
def make_folder(tmp_path):
    """A function {split: {class: [array or bytes]}} -> path of the image folder that it writes."""

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
