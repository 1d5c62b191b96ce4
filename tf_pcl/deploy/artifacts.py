"""Writes a trained network in several formats, and compares their outputs.

Every format takes raw images uint8 [N, H, W, C], 0–255, and gives `logits` and `probabilities`,
float32 [N, K]: it includes the preprocessing. Only a SavedModel has the signature serve_bytes:
TFLite and ONNX have no operations for image files.
"""

import dataclasses
import functools
import importlib
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Optional

import numpy as np
import tensorflow as tf

from tf_pcl import console, surgery
from tf_pcl import data as datasets
from tf_pcl.compat import keras
from tf_pcl.data import ImageData
from tf_pcl.data.storage import Split, Stream
from tf_pcl.deploy import model_card, runtimes
from tf_pcl.deploy.finished import DEPLOYED, Finished
from tf_pcl.errors import Stopped, UserError, choose, one_line
from tf_pcl.surgery.graph import calls
from tf_pcl.training import export
from tf_pcl.training import workdir as workdirs
from tf_pcl.training.workdir import Workdir

# The newest opset that tf2onnx writes without experimental operators and that older runtimes read.
OPSET = 17
# The number of training images that give the value ranges of an integer network.
CALIBRATION_IMAGES = 200
# The folder of artifacts with folded BatchNorm, and how much logits may then differ, relative to
# the largest one or to 1: float32 sums in another order.
FOLDED, FOLDING_TOLERANCE = "folded", 1e-4
# The number of calls that measure the latency of a single image, and of those before that do not
# count.
CALLS, WARM_UP_CALLS = 50, 5
TABLE = "artifacts.json"


class Source(NamedTuple):
    """The source of an artifact.

    Attributes:
      network: a functional keras.Model from raw images uint8 [N, H, W, C] to logits.
      data: the data set that it was trained on.
      folder: the folder of the artifacts.
      calibration: how many training images calibrate an integer network.
      has_saved_model: whether the folder has the SavedModel that the run has made and checked.
    """

    network: keras.Model
    data: ImageData
    folder: str
    calibration: int = CALIBRATION_IMAGES
    has_saved_model: bool = False


def export_run(
    path: str,
    formats: Sequence[str],
    *,
    exit_name: str = DEPLOYED,
    data_dir: Optional[str] = None,
    folder: Optional[str] = None,
    calibration_images: int = CALIBRATION_IMAGES,
    fold_batch_norm: bool = False,
) -> dict[str, Any]:
    """Writes the network of a run in other formats, with a table of comparison and a model card.

    Args:
      path: the workdir of a run that has ended.
      formats: names in FORMATS.
      exit_name: the exit of the network; see Finished.exit_name.
      data_dir: the present folder of the data set, if it was moved.
      folder: the folder for the artifacts; by default the run's export folder, or for another exit
        than the deployed one, a folder of its name there. Artifacts with folded BatchNorm go into
        a folder FOLDED of it.
      calibration_images: how many training images calibrate an integer network, at least 1.
      fold_batch_norm: whether BatchNorm is folded into the layers before it; see surgery.fold.

    Returns:
      The contents of artifacts.json.

    Raises:
      UserError: if the run has not ended, a name is not known, a package is missing, or the data
        set or the network cannot be loaded.
      Stopped: if the network cannot be converted.
    """
    if not formats:
        raise UserError("give at least one", parameter="format", value="")
    for name in formats:
        choose("format", name, FORMATS, parameter="format")
    finished = Finished.of(path)
    exit_name = finished.exit_name(exit_name)
    for name in formats:
        FORMATS[name].check_packages(name)
    own, is_deployed = Workdir(finished.path).export, exit_name == finished.results["deployed"]
    usual = own if is_deployed else os.path.join(own, exit_name)
    folder = os.path.expanduser(folder or os.path.join(usual, *[FOLDED] * fold_batch_norm))
    is_own = os.path.realpath(folder) == os.path.realpath(own)
    if is_own and (fold_batch_norm or not is_deployed):
        raise UserError(
            "it has the SavedModel of the deployed exit as it was trained: give another folder",
            parameter="folder",
            value=folder,
        )
    data = finished.load_data(data_dir)
    network = finished.network(exit_name, data)
    written, facts = folded(network, data) if fold_batch_norm else (network, {})
    calibration = min(calibration_images, len(data.train))
    source = Source(written, data, folder, calibration, has_saved_model=is_own)
    _make_folder(folder)
    workdirs.write_labels(folder, data.classes)
    paths = {name: _written(name, source) for name in dict.fromkeys(formats)}
    with console.discarded("stdout", "stderr"):
        loaded = {name: runtimes.load(file) for name, file in paths.items()}
    table = {
        "run": os.path.abspath(finished.path),
        "folder": os.path.abspath(folder),
        "exit": exit_name,
        **facts,
        **compare(network, loaded, data),
    }
    for name, row in table["artifacts"].items():
        row["file"] = os.path.relpath(paths[name], folder)
        row["kib"] = round(_size(paths[name]) / 1024, 1)
    if any("int8" in name for name in formats):
        table["calibration_images"] = source.calibration
    workdirs.write_json(os.path.join(folder, TABLE), table)
    model_card.write(folder, finished, data, network, table)
    return table


def folded(network: keras.Model, data: ImageData) -> tuple[keras.Model, dict[str, Any]]:
    """Folds a network's BatchNorm, and checks on all test images that its outputs stay the same.

    Args:
      network: a keras.Model from raw images uint8 to logits.
      data: the data set.

    Returns:
      The folded network, and {"batch_norm": {"folded": how many, "left": names of the others,
      "largest_difference": that of logits}}.

    Raises:
      UserError: if there is nothing to fold, or the network cannot be rebuilt.
      Stopped: if logits differ by more than FOLDING_TOLERANCE of the largest one, or the numbers of
        errors differ.
    """
    refused = functools.partial(UserError, parameter="fold_batch_norm", value="True")
    try:
        made = surgery.fold_batch_norm(network)
    except Exception as e:  # The user's own layers may not work in a copy.
        raise refused(
            f"the network cannot be rebuilt with folded BatchNorm ({one_line(e)}): leave it out"
        ) from e
    if not made.folded:
        raise refused(
            f"none of the network's {len(made.left)} BatchNorm layers directly follows a "
            "convolution or a dense layer: leave it out"
        )
    one, other = (_in_graph(model) for model in (network, made.network))
    wrong, apart, largest = np.zeros(2, int), 0.0, 1.0
    for images, labels in datasets.test_batches(data, runtimes.BATCH):
        a, b = one(images).numpy(), other(images).numpy()
        wrong += [int((z.argmax(-1) != labels.numpy()).sum()) for z in (a, b)]
        # NaN counts as the largest difference.
        apart = float(np.maximum(apart, np.abs(a - b).max()))
        largest = max(largest, float(np.abs(a).max()))
    if not apart <= FOLDING_TOLERANCE * largest or wrong[0] != wrong[1]:
        raise Stopped(
            f"with folded BatchNorm, logits differ by up to {apart:.2g} and {wrong[1]} test images "
            f"are wrong instead of {wrong[0]}: nothing was written; leave `fold_batch_norm` out"
        )
    difference = float(f"{apart:.3g}")
    facts = {"folded": len(made.folded), "left": made.left, "largest_difference": difference}
    return made.network, {"batch_norm": facts}


def _in_graph(network: keras.Model) -> Callable[[tf.Tensor], tf.Tensor]:
    return tf.function(lambda images: network(images, training=False), reduce_retracing=True)


def compare(
    network: keras.Model, loaded: Mapping[str, runtimes.Runtime], data: ImageData
) -> dict[str, Any]:
    """Compares the outputs of several formats of a network for the test images.

    Args:
      network: the network, a keras.Model from raw images uint8 to logits.
      loaded: {name: the network in another format, loaded by its own runtime}.
      data: the data set.

    Returns:
      "test_images", their number; "original", a row for the network; "artifacts", {name: row}. A
      row has "error" (percent of the test images) and "latency_ms" (median of one image); rows of
      artifacts also have "largest_difference" (of logits) and "same_class" (percent of the images
      that get the same class as from the network).
    """
    graph = _in_graph(network)
    answers: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "": lambda images: graph(tf.constant(images)).numpy(),
        **{name: runtime.logits for name, runtime in loaded.items()},
    }
    wrong, same = dict.fromkeys(answers, 0), dict.fromkeys(answers, 0)
    largest, count = dict.fromkeys(answers, 0.0), 0
    for batch, labels in datasets.test_batches(data, runtimes.BATCH):
        # Files may have become unreadable.
        images, count = batch.numpy(), count + len(labels)
        expected = answers[""](images)
        for name, answer in answers.items():
            logits = answer(images) if name else expected
            top = logits.argmax(-1)
            wrong[name] += int((top != labels.numpy()).sum())
            same[name] += int((top == expected.argmax(-1)).sum())
            # NaN counts as the largest difference.
            largest[name] = float(np.maximum(largest[name], np.abs(logits - expected).max()))
    one = data.test.first(1)
    rows = {
        name: {
            "error": round(100 * wrong[name] / count, 4),
            "same_class": round(100 * same[name] / count, 4),
            "largest_difference": float(f"{largest[name]:.3g}"),
            "latency_ms": float(f"{_latency(answer, one):.3g}"),
        }
        for name, answer in answers.items()
    }
    original = rows.pop("")
    shown = {name: original[name] for name in ("error", "latency_ms")}
    return {"test_images": count, "original": shown, "artifacts": rows}


def table(contents: Mapping[str, Any]) -> str:
    """Returns the table in the contents of artifacts.json, for people."""
    head = ["format", "file", "KiB", "test error", "same class", "logits differ by", "ms an image"]
    original = contents["original"]
    rows = [
        head,
        [
            f"trained network ({contents['exit']})",
            "",
            "",
            f"{original['error']:.2f} %",
            "",
            "",
            f"{original['latency_ms']:.2f}",
        ],
    ]
    rows += [
        [
            name,
            row["file"],
            f"{row['kib']:,.0f}",
            f"{row['error']:.2f} %",
            f"{row['same_class']:.2f} %",
            f"{row['largest_difference']:.1e}",
            f"{row['latency_ms']:.2f}",
        ]
        for name, row in contents["artifacts"].items()
    ]
    widths = [max(map(len, column)) for column in zip(*rows)]
    align = [str.ljust, str.ljust, *[str.rjust] * 5]
    return "\n".join(
        "  ".join(side(cell, width) for side, cell, width in zip(align, row, widths)).rstrip()
        for row in rows
    )


def _latency(answer: Callable[[np.ndarray], np.ndarray], image: np.ndarray) -> float:
    """Returns the median of the milliseconds of a call."""
    seconds = []
    for _ in range(WARM_UP_CALLS + CALLS):
        start = time.perf_counter()
        answer(image)
        seconds.append(time.perf_counter() - start)
    return 1000 * float(np.median(seconds[WARM_UP_CALLS:]))


def _make_folder(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise UserError(
            f"the folder cannot be written ({e.strerror}): give another",
            parameter="folder",
            value=folder,
        ) from e


def _written(name: str, source: Source) -> str:
    """Writes a network in one format and returns its path."""
    path = os.path.join(source.folder, FORMATS[name].file)
    try:
        with console.discarded("stdout", "stderr"):
            content = FORMATS[name].convert(source)
    # Converters raise anything for operations that they do not know.
    except Exception as e:
        raise Stopped(
            f"`format={name}`: this network cannot be converted ({one_line(e)}): leave this format "
            "out"
        ) from e
    if content is not None:
        with open(path + ".part", "wb") as f:
            f.write(content)
        os.replace(path + ".part", path)
    return path


def _size(path: str) -> int:
    """Returns the bytes of a file, or of all files in a folder."""
    if os.path.isfile(path):
        return os.path.getsize(path)
    return sum(
        os.path.getsize(os.path.join(folder, name))
        for folder, _, names in os.walk(path)
        for name in names
    )


# The formats.


def _function(network: Callable[..., Any], shape: Sequence[int], dtype: tf.DType = tf.uint8) -> Any:
    """Returns a tf.function from images [N, H, W, C] to the outputs of serving_default."""

    @tf.function(input_signature=[tf.TensorSpec([None, *shape], dtype, name="images")])
    def serving_default(images: tf.Tensor) -> dict[str, tf.Tensor]:
        logits = network(images, training=False)
        return {"logits": logits, "probabilities": tf.nn.softmax(logits)}

    return serving_default


def _saved_model(source: Source) -> None:
    if not source.has_saved_model:
        made = export.export(source.network, source.data.classes, source.folder)
        export.check(made, source.network, source.data.test.first(32))


def _tflite(
    source: Source,
    change: Callable[[Any], None] = lambda converter: None,
    network: Optional[keras.Model] = None,
    dtype: tf.DType = tf.uint8,
) -> bytes:
    """Returns a TFLite file.

    Args:
      source: the source of the artifact.
      change: a function that changes the settings of the converter.
      network: the network to convert; by default that of the source.
      dtype: the type of its input images.
    """
    module = tf.Module()
    module.network = network or source.network
    serve = _function(module.network, source.data.image_shape, dtype)
    # From a SavedModel, so that the file has the names of input and outputs.
    with tempfile.TemporaryDirectory() as folder:
        tf.saved_model.save(module, folder, signatures={"serving_default": serve})
        converter = tf.lite.TFLiteConverter.from_saved_model(
            folder, signature_keys=["serving_default"]
        )
        change(converter)
        return bytes(converter.convert())


def _tflite_float16(source: Source) -> bytes:
    def change(converter: Any) -> None:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.target_spec.supported_types = [tf.float16]

    return _tflite(source, change)


def _tflite_int8(source: Source) -> bytes:
    """Returns a network whose weights and activations are integers of 8 bits.

    It takes raw uint8 images. Logits and probabilities are converted to float32 at its end.
    """
    images = _sample(source.data.train, source.calibration).astype(np.float32)
    # So the input always has the scale 1 and the zero point 0, which raw values need.
    images[0].flat[0], images[0].flat[-1] = 0, 255

    def change(converter: Any) -> None:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ({"images": image[None]} for image in images)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = tf.uint8

    return _tflite(source, change, _of_floats(source.network), tf.float32)


def _sample(split: Split, count: int) -> np.ndarray:
    """Returns images uint8 [count, H, W, C] of a split, drawn at random but always the same."""
    # The first images may all have one class. A stream can only be read in order.
    if not isinstance(split, Stream):
        split = split.subset(np.random.RandomState(0).permutation(len(split))[:count])
    return split.first(count)


def _of_floats(network: keras.Model) -> keras.Model:
    """Returns a network that takes raw images as float32, so that its input can be quantised.

    A model casts its inputs to the type of its input layer. The layer after that takes both types.
    """
    first = calls(network)[0]
    rest = keras.Model(first.outputs, network.output)
    images = keras.Input(network.input_shape[1:], dtype="float32", name="images")
    return keras.Model(images, rest(first.layer(images)))


def _onnx(source: Source) -> bytes:
    tf2onnx = importlib.import_module("tf2onnx")
    onnx = importlib.import_module("onnx")
    function = _function(source.network, source.data.image_shape)
    model, _ = tf2onnx.convert.from_function(
        function, input_signature=function.input_signature, opset=OPSET
    )
    # tf2onnx turns constants of layers, such as the mean of the training images, into inputs.
    traced = function.get_concrete_function()
    captured = {
        tensor.name: value.numpy()
        for tensor, value in zip(traced.inputs[1:], traced.captured_inputs)
        if tensor.dtype != tf.resource
    }
    inputs = {one.name: one for one in model.graph.input}
    used = {name for node in model.graph.node for name in node.input}
    for name in set(captured) & set(inputs):
        model.graph.input.remove(inputs[name])
        if name in used:
            model.graph.initializer.append(onnx.numpy_helper.from_array(captured[name], name))
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


@dataclasses.dataclass(frozen=True)
class Format:
    """A format in which a network is written.

    Attributes:
      file: its path below the folder of artifacts.
      summary: what it is, in a few words.
      convert: a function from a Source to the contents of the file, or None if it wrote the file.
      packages: the packages that it needs, which are in the extra onnx.
    """

    file: str
    summary: str
    convert: Callable[[Source], Optional[bytes]]
    packages: tuple[str, ...] = ()

    def check_packages(self, name: str) -> None:
        """Raises UserError if a package that the format needs cannot be imported."""
        for package in self.packages:
            try:
                importlib.import_module(package)
            # A package that does not fit another one raises anything.
            except Exception as e:
                raise UserError(
                    f"it needs {package} ({one_line(e)}): install the extra with pip install "
                    "'tf_pcl[onnx]'",
                    parameter="format",
                    value=name,
                ) from e


FORMATS = {
    "saved_model": Format(workdirs.SAVED_MODEL, "SavedModel", _saved_model),
    "tflite": Format("model.tflite", "TFLite, float32", _tflite),
    "tflite_float16": Format("model_float16.tflite", "TFLite, weights in float16", _tflite_float16),
    "tflite_int8": Format("model_int8.tflite", "TFLite, integers of 8 bits", _tflite_int8),
    "onnx": Format("model.onnx", f"ONNX, opset {OPSET}", _onnx, ("tf2onnx", "onnx", "onnxruntime")),
}
