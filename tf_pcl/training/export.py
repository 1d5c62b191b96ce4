"""The SavedModel of a deployed network."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from tf_pcl import surgery
from tf_pcl.compat import keras
from tf_pcl.data import image_files
from tf_pcl.errors import Stopped, UserError, one_line
from tf_pcl.training import workdir as workdirs
from tf_pcl.training.checkpoints import not_finite

# Loads a SavedModel where tf_pcl cannot be imported, and writes the outputs of its two signatures.
_CHECK = """
import sys
sys.modules["tf_pcl"] = None
import numpy as np, tensorflow as tf
folder, given, result = sys.argv[1:]
images = np.load(given)
signatures = tf.saved_model.load(folder).signatures
png = tf.stack([tf.io.encode_png(image) for image in images])
np.savez(result, raw=signatures["serving_default"](images=tf.constant(images))["logits"],
         encoded=signatures["serve_bytes"](image_bytes=png)["logits"])
"""


def export(model: keras.Model, classes: Sequence[str], folder: str) -> str:
    """Writes FOLDER/saved_model/1 and FOLDER/labels.txt.

    An older SavedModel is replaced once the new one is complete. It has two signatures:

      serving_default: images uint8 [N, H, W, C] -> probabilities and logits, float32 [N, K].
      serve_bytes: image_bytes string [N], JPEG or PNG of any size -> the same. Images of another
        size than the network's are resized as in training; if the network takes square images,
        the square in the middle is cut out first.

    Args:
      model: a functional keras.Model from raw images uint8 to logits float32.
      classes: names in the order of the logits.
      folder: the export folder.

    Returns:
      The path of the SavedModel.
    """
    os.makedirs(os.path.join(folder, os.path.dirname(workdirs.SAVED_MODEL)), exist_ok=True)
    workdirs.write_labels(folder, classes)
    final = os.path.join(folder, workdirs.SAVED_MODEL)
    with tempfile.TemporaryDirectory(dir=folder) as made:
        verbosity = logging.get_verbosity()
        # Keras warns that an inference model was never compiled.
        logging.set_verbosity(logging.ERROR)
        try:
            model.save(
                os.path.join(made, "1"),
                save_format="tf",
                include_optimizer=False,
                signatures=_signatures(model),
            )
        finally:
            logging.set_verbosity(verbosity)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(os.path.join(made, "1"), final)
    return final


def _signatures(model: keras.Model) -> dict[str, Callable[..., Any]]:
    shape = model.input_shape[1:]

    def answers(images: tf.Tensor) -> dict[str, tf.Tensor]:
        # Some kernels refuse an empty batch: it gets an image, whose output is dropped.
        count = tf.shape(images)[0]
        more = tf.cast(count == 0, tf.int32)
        logits = model(tf.pad(images, [[0, more], *[[0, 0]] * 3]), training=False)[:count]
        return {"probabilities": tf.nn.softmax(logits), "logits": logits}

    def decoded(encoded: tf.Tensor) -> tf.Tensor:
        return image_files.fit(image_files.decode_upright(encoded, shape[-1]), shape)

    @tf.function(input_signature=[tf.TensorSpec([None, *shape], tf.uint8, name="images")])
    def serve(images: tf.Tensor) -> dict[str, tf.Tensor]:
        wrong = f"images must have the shape [N, {', '.join(map(str, shape))}]"
        checks = [tf.debugging.assert_equal(tf.shape(images)[1:], shape, wrong)]
        with tf.control_dependencies(checks):
            return answers(tf.identity(images))

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="image_bytes")])
    def serve_bytes(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        spec = tf.TensorSpec(shape, tf.uint8)
        return answers(tf.map_fn(decoded, image_bytes, fn_output_signature=spec))

    return {"serving_default": serve, "serve_bytes": serve_bytes}


def load(path: str, classes: Sequence[str], trust_files: bool = False) -> keras.Model:
    """Loads the network that a run deployed.

    Args:
      path: the run's workdir, its export folder or the SavedModel itself.
      classes: the names of the classes that it must have, in order.
      trust_files: whether to load networks with Lambda layers, the user's own layers or uncommon
        functions too, whose code then runs.

    Returns:
      A keras.Model from raw images uint8 [B, H, W, C] to logits float32 [B, K].

    Raises:
      UserError: if there is none, its code would have to be trusted, or its labels.txt has other
        classes.
    """
    folder = workdirs.saved_model(path)
    if folder is None:
        raise UserError(
            f"{path} holds no SavedModel: give the workdir of a run that has ended, or its "
            "export/saved_model/1"
        )
    try:
        if trust_files:
            model = keras.models.load_model(folder, compile=False)
        else:
            model = surgery.read_network(folder)
        _ = model.input_shape, model.output_shape
    except UserError:
        raise
    except Exception as e:  # A damaged file raises anything.
        raise UserError(
            f"{folder} cannot be loaded as a Keras model ({one_line(e)}): give the export of a "
            "run of this program"
        ) from e
    known = workdirs.read_labels(folder)
    if known is not None and known != list(classes):
        raise UserError(
            f"{path} has {len(known)} classes ({', '.join(known[:3])} …), the data set has "
            f"{len(classes)} ({', '.join(classes[:3])} …): give one that was trained on the same "
            "classes"
        )
    return model


def check_finite(model: keras.Model, images: np.ndarray) -> None:
    """Checks that the weights and outputs of a network are finite before its export.

    Args:
      model: a keras.Model from raw images uint8 to logits.
      images: real images uint8 [N, H, W, C].

    Raises:
      Stopped: if its weights or its logits are not finite.
    """
    wrong = not_finite(model.weights)
    if not wrong and not np.isfinite(model(images, training=False).numpy()).all():
        wrong = ["logits"]
    if wrong:
        raise Stopped(
            f"the trained network is not exported, since its {wrong[0]} is not finite. Try a "
            "smaller `learning_rate` in another `workdir`."
        )


def check(folder: str, model: keras.Model, images: np.ndarray) -> None:
    """Compares a SavedModel's logits, in a fresh process without tf_pcl, with the model's.

    Args:
      folder: the SavedModel.
      model: the keras.Model that it was made from.
      images: real images uint8 [N, H, W, C].

    Raises:
      RuntimeError: if it does not load or its outputs differ.
    """
    expected = model(images, training=False).numpy()
    scale = max(1.0, np.abs(expected).max())
    of_scale = lambda logits: np.abs(logits - expected).max() / scale
    # Low precision and other devices sum in another order. A graph of the network in this process
    # shows how much that matters.
    tolerance = 1e-4 if model.dtype_policy.name == "float32" else 0.05
    in_graph = tf.function(lambda given: model(given, training=False))
    tolerance = max(tolerance, 10 * of_scale(in_graph(tf.constant(images)).numpy()))
    for name, logits in _answers_elsewhere(folder, images).items():
        difference = of_scale(logits)
        if not difference <= tolerance:
            raise RuntimeError(
                f"the outputs of the SavedModel {folder} differ from the trained network's "
                f"({name}: logits differ by {difference:.2g} of their size)"
            )


def _answers_elsewhere(folder: str, images: np.ndarray) -> dict[str, np.ndarray]:
    """Returns {form of the images: logits float32 [N, K]} that a fresh process computes."""
    with tempfile.TemporaryDirectory() as scratch:
        given, result = (os.path.join(scratch, name) for name in ("given.npy", "result.npz"))
        np.save(given, images)
        done = subprocess.run(
            [sys.executable, "-c", _CHECK, ".", given, result],
            # TensorFlow cannot load from a path with brackets or *, which a parent folder may have.
            cwd=folder,
            # This process holds the memory of the GPUs; the comparison does not need them.
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "2"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(
                f"the SavedModel {folder} does not load by itself: {done.stderr.strip()[-500:]}"
            )
        return dict(np.load(result))
