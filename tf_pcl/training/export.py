"""The SavedModel of a deployed network."""

import os
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import tensorflow as tf
from absl import logging

from tf_pcl.compat import keras
from tf_pcl.data import image_files
from tf_pcl.errors import UserError
from tf_pcl.training import workdir as workdirs

# Loads a SavedModel where tf_pcl cannot be imported and writes what its two signatures say.
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


def export(model, classes, folder):
    """Writes FOLDER/saved_model/1 and FOLDER/labels.txt; what was there is replaced when the new one is whole.

    Signatures: `serving_default`, images uint8 [N, H, W, C] -> probabilities and logits, float32 [N, K]; `serve_bytes`,
    image_bytes string [N], JPEG or PNG of any size -> the same: of another size than the network's images, the middle square is
    taken, where those are square, and resized, as in training.

    Args:
      model: a functional keras.Model from raw images uint8 to logits float32.
      classes: names in the order of the logits.
      folder: the export folder.
    Returns:
      The path of the SavedModel.
    """
    shape = model.input_shape[1:]

    def answers(images):
        logits = model(images, training=False)
        return {"probabilities": tf.nn.softmax(logits), "logits": logits}

    @tf.function(input_signature=[tf.TensorSpec([None, *shape], tf.uint8, name="images")])
    def serve(images):
        return answers(images)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="image_bytes")])
    def serve_bytes(image_bytes):
        def decode(encoded):
            image = tf.io.decode_image(encoded, channels=shape[-1], expand_animations=False)
            image.set_shape([None, None, shape[-1]])
            same = tf.reduce_all(tf.shape(image)[:2] == shape[:2])
            return tf.ensure_shape(tf.cond(same, lambda: image, lambda: resized(image)), shape)

        def resized(image):
            if shape[0] == shape[1]:
                return image_files.resize(image, shape[0])
            return tf.saturate_cast(
                tf.round(tf.image.resize(image, shape[:2], antialias=True)), tf.uint8
            )

        return answers(
            tf.map_fn(decode, image_bytes, fn_output_signature=tf.TensorSpec(shape, tf.uint8))
        )

    os.makedirs(os.path.join(folder, "saved_model"), exist_ok=True)
    workdirs.write(os.path.join(folder, "labels.txt"), "".join(f"{name}\n" for name in classes))
    final = os.path.join(folder, "saved_model", "1")
    with tempfile.TemporaryDirectory(dir=folder) as made:
        verbosity = logging.get_verbosity()
        logging.set_verbosity(
            logging.ERROR
        )  # Keras warns that an inference model was never compiled.
        try:
            model.save(
                os.path.join(made, "1"),
                save_format="tf",
                include_optimizer=False,
                signatures={"serving_default": serve, "serve_bytes": serve_bytes},
            )
        finally:
            logging.set_verbosity(verbosity)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(os.path.join(made, "1"), final)
    return final


def load(path, classes):
    """The network that a run deployed.

    Args:
      path: the run's workdir, its export folder or the SavedModel itself.
      classes: names of the classes that it must tell apart, in order.
    Returns:
      A keras.Model from raw images uint8 [B, H, W, C] to logits float32 [B, C].
    Raises:
      UserError: if there is none, or labels.txt says that it was trained on other classes.
    """
    folder = workdirs.saved_model(path)
    if folder is None:
        raise UserError(
            f"{path} holds no SavedModel: give the workdir of a run that has ended, or its export/saved_model/1"
        )
    try:
        model = keras.models.load_model(folder, compile=False)
        model.input_shape, model.output_shape
    except (OSError, ValueError, AttributeError, tf.errors.OpError) as e:
        raise UserError(
            f"{folder} cannot be loaded as a Keras model ({' '.join(str(e).split())[:200]}): give the export of a "
            "run of this program"
        ) from e
    labels = os.path.join(folder, "..", "..", "labels.txt")
    if os.path.exists(labels):
        with open(labels, encoding="utf-8") as f:
            known = f.read().splitlines()
        if known != list(classes):
            raise UserError(
                f"{path} tells {len(known)} classes apart ({', '.join(known[:3])} …), the data set has "
                f"{len(classes)} ({', '.join(classes[:3])} …): give one that was trained on the same classes"
            )
    return model


def check(folder, model, images):
    """Loads a SavedModel in a fresh process without tf_pcl and compares its logits with the model's.

    Args:
      folder: the SavedModel.
      model: the keras.Model that it was made from.
      images: real images uint8 [N, H, W, C].
    Raises:
      RuntimeError: if it does not load or its answers differ.
    """
    with tempfile.TemporaryDirectory() as scratch:
        given, result = (os.path.join(scratch, name) for name in ("given.npy", "result.npz"))
        np.save(given, images)
        # The parent holds the GPUs' memory; the comparison does not need them.
        done = subprocess.run(
            [sys.executable, "-c", _CHECK, os.path.abspath(folder), given, result],
            cwd=scratch,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "2"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(
                f"the SavedModel {folder} does not load by itself: {done.stderr.strip()[-500:]}"
            )
        expected = model(images, training=False).numpy()
        # Low precision and another device sum in another order; what must not differ is the answer.
        tolerance = 1e-4 if model.dtype_policy.name == "float32" else 0.05
        scale = max(1.0, np.abs(expected).max())
        answers = np.load(result)
        for name in ("raw", "encoded"):
            difference = np.abs(answers[name] - expected).max() / scale
            if not difference <= tolerance:
                raise RuntimeError(
                    f"the SavedModel {folder} answers otherwise than the trained network ({name}: logits "
                    f"differ by {difference:.2g} of their size)"
                )
