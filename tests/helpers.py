"""Small networks and small data for the tests, and a method built around them."""

import numpy as np
import pytest
import tensorflow as tf
from tensorflow import keras

from tf_pcl import data, networks
from tf_pcl.data import datasets
from tf_pcl.methods import METHODS
from tf_pcl.methods.distiller import build_all

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


def with_norm(input_shape, num_classes, extra=()):
    """A network with BatchNorm, and `extra` layers before its pooling."""
    x = images = keras.Input(input_shape)
    for i in (1, 2):
        x = keras.layers.Conv2D(8 * i, 3, strides=2, padding="same", use_bias=False)(x)
        x = keras.layers.ReLU(name=f"stage_{i}")(keras.layers.BatchNormalization(name=f"n{i}")(x))
    for layer in extra:
        x = layer(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(images, keras.layers.Dense(num_classes)(x))


def dropped(input_shape, num_classes):
    """A network with BatchNorm and Dropout."""
    return with_norm(input_shape, num_classes, [keras.layers.Dropout(0.3)])


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


def noise(*shape, seed=0):
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def with_labels(images, labels, name="noise"):
    """An ImageData of arrays, the same for training and test."""
    both = datasets.Arrays(images, labels)
    return data.ImageData(
        name, tuple("0123456789"), images.shape[1:], both, both, (128.0,), (64.0,), True
    )


def last_stage(method, network, preprocess=None):
    """The model of a method's last stage around networks that `network` builds, none trained yet.

    Args:
      method: its name.
      network: a function (input_shape, num_classes) -> keras.Model.
      preprocess: as the methods take it.
    """
    function = lambda: network(SHAPE, CLASSES)

    def make(cls, given, **arguments):
        built = lambda one: one if isinstance(one, keras.Model) else function
        return cls(
            [built(one) for one in given] if isinstance(given, list) else built(given),
            **{"preprocess": preprocess, **arguments},
        )

    return build_all(METHODS[method].stages(make, "target"))[-1]


def build(method, network, epochs=4, steps_per_epoch=5, optimizer=None, **kwargs):
    """A method's last stage around a function or one of TINY, compiled; always the same."""
    keras.utils.set_random_seed(0)
    model = last_stage(method, TINY.get(network, network), networks.standardise([78.0], [96.0]))
    model.compile(optimizer, epochs=epochs, steps_per_epoch=steps_per_epoch, **kwargs)
    return model


def tiny_model():
    """A compiled baseline on the smallest network here, whose optimizer has its variables."""
    model = METHODS["baseline"](other(SHAPE, CLASSES))
    model.compile(epochs=4, steps_per_epoch=3)
    model.optimizer.build(model.trainable_weights)
    return model


def batch(model, digits, size=32):
    """The first training batch of a method: (views, labels)."""
    return next(iter(data.train_batches(digits, size, 1, views=model.num_views)))


def flop(model):
    """2 × multiply-adds of a model's convolutions and dense layers for one image.

    TensorFlow's profiler counts them in its graph.
    """
    profiler = tf.compat.v1.profiler
    graph = (
        tf.function(model).get_concrete_function(tf.TensorSpec([1, *model.input_shape[1:]])).graph
    )
    options = (
        profiler.ProfileOptionBuilder(profiler.ProfileOptionBuilder.float_operation())
        .with_empty_output()
        .build()
    )
    node, total = profiler.profile(graph, cmd="op", options=options), 0
    while node.children:  # The view by operation is a chain.
        (node,) = node.children
        total += node.float_ops * (node.name in ("Conv2D", "DepthwiseConv2dNative", "MatMul"))
    return total


def assert_close(one, other, **tolerance):
    """np.testing.assert_allclose for all arrays of two lists or dicts of the same form."""
    tf.nest.assert_same_structure(one, other, check_types=False)
    for a, b in zip(tf.nest.flatten(one), tf.nest.flatten(other)):
        np.testing.assert_allclose(a, b, **tolerance)


def events(workdir):
    """{(split, tag): {step: value}} of TensorBoard's files, each step once."""
    found = {}
    for path in sorted(workdir.glob("tensorboard/*/*")):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                steps = found.setdefault((path.parent.name, value.tag), {})
                assert event.step not in steps, value.tag
                tensor = tf.make_ndarray(value.tensor)
                steps[event.step] = float(tensor) if tensor.ndim == 0 else list(tensor)
    return found


def slow_but(names, *quick):
    """Parameters for pytest, all of which but `quick` are tested in the slow tier."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]
