"""The one place that decides which Keras, and whether tensorflow-addons, the package uses.

`keras` and `layers` are those of TensorFlow if TensorFlow comes with Keras 2. If it comes with
Keras 3, they are those of tf_keras, which is the name of Keras 2 today. They are imported on first
use: importing this module does not import TensorFlow.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

# Set by __getattr__ on first use.
keras: Any
layers: Any

# The packages that a Keras may come from.
_KERAS_PACKAGES = {"keras", "tf_keras"}


def _is_keras_3() -> bool:
    try:
        return int(importlib.metadata.version("keras").split(".")[0]) >= 3
    except importlib.metadata.PackageNotFoundError:
        return False


def use_keras_2() -> None:
    """Asks TensorFlow, if it is not imported yet, to give Keras 2 to everyone in this process.

    A user's own network that says `from tensorflow import keras` then gets the Keras of this
    package. If the user has set TF_USE_LEGACY_KERAS, that value is kept.
    """
    if "tensorflow" not in sys.modules and _is_keras_3():
        os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")


def let_xla_compile_elementwise() -> bool:
    """Tells TensorFlow what XLA may compile on the CPU: ReLU, its gradient, and additions.

    It takes effect only together with `tf.config.optimizer.set_jit`, and only if this process has
    not looked for devices yet: TensorFlow reads the variable once. The results stay the same, bit
    for bit.

    Returns:
      Whether TensorFlow was told so; False if the user has set TF_XLA_FLAGS, which is kept.
    """
    told = (
        "--tf_xla_cpu_global_jit=true --tf_xla_min_cluster_size=1 "
        "--tf_xla_ops_to_cluster=Relu,ReluGrad,Relu6,Relu6Grad,AddV2,AddN"
    )
    return os.environ.setdefault("TF_XLA_FLAGS", told) == told


def __getattr__(name: str) -> Any:
    if name not in ("keras", "layers"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Both at once: TensorFlow 2.15 gives another module `keras`, of the same classes, after
    # tensorflow-addons was imported.
    keras = _import_keras()
    globals().update(keras=keras, layers=keras.layers)
    return globals()[name]


def _import_keras() -> Any:
    if not _is_keras_3():
        from tensorflow import keras

        return keras
    try:
        return importlib.import_module("tf_keras")
    except ModuleNotFoundError as e:
        if e.name != "tf_keras":
            raise
        minor = ".".join(importlib.metadata.version("tensorflow").split(".")[:2])
        raise ImportError(
            "tf_pcl needs Keras 2, which is the package tf-keras where TensorFlow comes with "
            f"Keras 3: install it by `pip install tf-keras=={minor}.*`"
        ) from e


def import_tensorflow() -> None:
    """Imports TensorFlow without the lines that its C++ code writes meanwhile.

    In the newest releases, it writes them before it reads TF_CPP_MIN_LOG_LEVEL. If the import
    fails, they are written after all.
    """
    with no_lines_of_tensorflow():
        importlib.import_module("tensorflow")


@contextlib.contextmanager
def no_lines_of_tensorflow() -> Iterator[None]:
    """Holds back what is written to the standard error's descriptor, unless there is an error."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        except BaseException:
            written.seek(0)
            os.write(terminal, written.read())
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


def keras_version() -> str:
    """Returns the version of the Keras that the package uses."""
    return importlib.metadata.version("tf_keras" if _is_keras_3() else "keras")


def foreign_keras(thing: object) -> str | None:
    """Says what to do about a model, layer, optimizer … of another Keras than the package's.

    Args:
      thing: any object.
    Returns:
      A sentence for the user; None if the object is of this Keras, or of no Keras at all.
    """
    own = _package(_import_keras().Model)
    others = {_package(c) for c in type(thing).__mro__} & _KERAS_PACKAGES - {own}
    if not others:
        return None
    return (
        f"{type(thing).__name__} comes from the package {others.pop()}, and tf_pcl works with "
        f"Keras 2 of the package {own}: build it with `from tf_pcl.compat import keras`"
    )


def foreign_layer() -> type | None:
    """Returns the class of another Keras's layers; None if that Keras is not imported."""
    (other,) = _KERAS_PACKAGES - {_package(_import_keras().Model)}
    return sys.modules[other].layers.Layer if other in sys.modules else None


def names_are_taken() -> bool:
    """Says whether this Keras makes another one's layers when it reads a configuration.

    TensorFlow 2.15 has one table of Keras's public names, which belongs to the Keras that was
    imported last. That is tf_keras, for instance, after an import of tensorflow-hub.
    """
    keras = _import_keras()
    layer = keras.layers.deserialize(keras.layers.serialize(keras.layers.ReLU()))
    return not isinstance(layer, keras.layers.ReLU)


def is_of_keras(cls: type) -> bool:
    """Says whether a class is defined by Keras itself."""
    return _package(cls) in _KERAS_PACKAGES


def _package(of_class: type) -> str:
    return of_class.__module__.partition(".")[0]


@functools.cache
def _addons() -> Any:
    """Returns tensorflow_addons; None where it is missing or cannot use this TensorFlow."""
    with warnings.catch_warnings():
        # It warns on every import that it has reached its end of life.
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module("tensorflow_addons")
        except ImportError:
            return None


def lamb() -> Any:
    """Returns the class of tensorflow-addons' LAMB; None where there is no tensorflow-addons."""
    addons = _addons()
    if addons is None:
        return None

    # It is an optimizer of Keras's older kind, which has no `build`.
    build = lambda self, var_list: self._create_all_weights(var_list)
    return type("Lamb", (addons.optimizers.LAMB,), {"build": build})


def cutout(images: Any, size: int, offset: Any) -> Any:
    """Blackens a square in every image, by tensorflow-addons where that is installed.

    Args:
      images: [B, H, W, C], of any dtype.
      size: the side of the square, an even number of pixels.
      offset: int32 [B, 2], row and column of the square's centre. What lies outside the image is
        cut off.
    Returns:
      Images of the same shape and dtype.
    """
    addons = _addons()
    if addons is None:
        return _cutout(images, size, offset)
    return addons.image.cutout(images, (size, size), offset=offset)


def _cutout(images: Any, size: int, offset: Any) -> Any:
    import tensorflow as tf

    def masked(centres, length):
        from_first = tf.range(length)[None] - (centres[:, None] - size // 2)
        return (from_first >= 0) & (from_first < size)

    images = tf.convert_to_tensor(images)
    offset = tf.convert_to_tensor(offset)
    rows = masked(offset[:, 0], tf.shape(images)[1])[:, :, None, None]
    columns = masked(offset[:, 1], tf.shape(images)[2])[:, None, :, None]
    return tf.where(rows & columns, tf.zeros([], images.dtype), images)


def pairwise_distance(features: Any) -> Any:
    """Computes all Euclidean distances of a batch, by tensorflow-addons where that is installed.

    Args:
      features: float32 [B, d].
    Returns:
      float32 [B, B]; the distance of equal features is 0 and has no gradient.
    """
    addons = _addons()
    if addons is None:
        return _pairwise_distance(features)
    return addons.losses.metric_learning.pairwise_distance(features)


def _pairwise_distance(features: Any) -> Any:
    import tensorflow as tf

    squares = tf.reduce_sum(tf.square(features), axis=1)
    products = tf.matmul(features, features, transpose_b=True)
    squared = squares[:, None] + squares[None] - 2.0 * products
    apart = (squared > 0) & ~tf.eye(tf.shape(features)[0], dtype=tf.bool)
    # The square root of 0 has no finite gradient. So equal features get that of 1, which is
    # dropped.
    return tf.where(apart, tf.sqrt(tf.where(apart, squared, 1.0)), 0.0)
