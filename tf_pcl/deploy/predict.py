"""Classifies image files by a trained network."""

import concurrent.futures
import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Callable, NamedTuple, Optional

import numpy as np
import tensorflow as tf

from tf_pcl.data import image_files, image_folder
from tf_pcl.deploy import metrics
from tf_pcl.deploy.runtimes import BATCH, Runtime
from tf_pcl.errors import UserError


class Prediction(NamedTuple):
    """The prediction of a network for a file.

    Attributes:
      path: the file.
      classes: the names of its likeliest classes, the likeliest first; empty for a bad file.
      probabilities: the probabilities of these classes.
      problem: why the file cannot be used; None if it can.
    """

    path: str
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    problem: Optional[str] = None


def find(names: Iterable[str]) -> list[str]:
    """Returns the files that names of files, folders and patterns denote.

    A folder denotes the images below it, by the suffixes that the data set image_folder reads. A
    name that neither exists nor matches anything is returned unchanged.

    Args:
      names: such as photo.jpg, folder, "folder/**/*.png".

    Returns:
      Paths in the order of the names, each once; those of a folder or a pattern in their own order.

    Raises:
      UserError: if there is no file at all, or a folder cannot be read.
    """
    found: dict[str, None] = {}
    any_there = False
    for name in map(os.path.expanduser, names):
        several = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        for path in several or [name]:
            files = _below(path) if os.path.isdir(path) else [path]
            found.update(dict.fromkeys(files))
            any_there |= any(map(os.path.exists, files))
    if not any_there:
        suffixes = ", ".join(image_folder.suffixes())
        raise UserError(
            f"no image is found ({', '.join(names)}): give files, patterns, or folders with "
            f"{suffixes} files"
        )
    return list(found)


def _below(folder: str) -> list[str]:
    """Returns the images in a folder and those below it, without hidden ones."""
    try:
        return [path for path in image_folder.files_below(folder) if image_folder.is_image(path)]
    except OSError as e:
        raise UserError(f"{e.filename} cannot be read ({e.strerror})") from e


def predict(runtime: Runtime, paths: Sequence[str], top_k: int = 5) -> Iterator[Prediction]:
    """Runs a network on image files, which are decoded and resized as in training.

    Args:
      runtime: the network.
      paths: the files.
      top_k: how many classes to name, at least 1; all where there are fewer.

    Yields:
      A Prediction for each file, in their order, also for those that cannot be used.
    """
    read = _reader(runtime.image_shape)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), BATCH):
            part = paths[start : start + BATCH]
            images, problems = zip(*pool.map(read, part))
            good = [image for image in images if image is not None]
            logits = iter(runtime.logits(np.stack(good)) if good else ())
            for path, problem in zip(part, problems):
                yield (
                    _said(runtime, path, next(logits), top_k)
                    if problem is None
                    else Prediction(path, problem=problem)
                )


def _said(runtime: Runtime, path: str, logits: np.ndarray, top_k: int) -> Prediction:
    if not np.isfinite(logits).all():
        return Prediction(path, problem="the network gives logits that are not finite")
    likeliest = metrics.top_k(logits[None], top_k)[0]
    probabilities = np.exp(metrics.log_probabilities(logits[None])[0, likeliest])
    return Prediction(
        path, tuple(runtime.classes[k] for k in likeliest), tuple(probabilities.tolist())
    )


def _reader(shape: Sequence[int]) -> Callable[[str], tuple[Optional[np.ndarray], Optional[str]]]:
    """Returns a function from a path to (image uint8 of that shape, None) or (None, problem)."""

    @tf.function(input_signature=[tf.TensorSpec([], tf.string), tf.TensorSpec([], tf.int32)])
    def decode(encoded: tf.Tensor, turn: tf.Tensor) -> tf.Tensor:
        image = image_files.upright(image_files.decode_any(encoded, shape[-1]), turn)
        return image_files.fit(image, shape)

    # Threads that call it for the first time at once would each trace it.
    decode = decode.get_concrete_function()

    def read(path: str) -> tuple[Optional[np.ndarray], Optional[str]]:
        try:
            with open(path, "rb") as f:
                encoded = f.read()
            turn = image_files.header(encoded).orientation
            return decode(tf.constant(encoded), turn).numpy(), None
        except OSError as e:
            return None, (e.strerror or "it cannot be read").lower()
        except ValueError as e:
            return None, str(e)
        except tf.errors.OpError:
            return None, "the image is damaged or ends early"

    return read
