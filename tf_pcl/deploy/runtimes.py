"""Runs trained networks of each format with the runtime of that format.

`load` finds the format: a folder is a SavedModel or has one; the table FILES has the suffixes of
files.
"""

import functools
import json
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Optional

import numpy as np
import tensorflow as tf
from absl import logging

from tf_pcl.compat import no_lines_of_tensorflow
from tf_pcl.data import class_names
from tf_pcl.errors import UserError, one_line
from tf_pcl.training import workdir as workdirs

# The number of images that a runtime gets at once, if it takes any number.
BATCH = 100


class Runtime:
    """A loaded network that gives logits.

    Args:
      path: its folder or file.
      shape: the shape [N, H, W, C] of its input; N is None, or below 1, if it takes any number of
        images.
      outputs: the number of its logits K.
      run: a function from images uint8 [n, H, W, C] to logits float32 [n, K]; n is N if
        that is fixed.
      run_bytes: a function from a list of encoded images to logits, if the network has one.

    Attributes:
      kind: the format, such as "tflite".
      path: as given.
      image_shape: (H, W, C).
      classes: names in the order of the logits, from classes.json or labels.txt in the folder of
        the network or up to two folders above; numbers if there is no such file.
      named: whether the names come from such a file.
      logits_of_bytes: a function from a list of n encoded images to logits float32 [n, K]; None
        if the network takes no encoded images.
    """

    kind = ""
    # What the outputs are, "logits" or "probabilities", if their name or format tells it.
    _gives: Optional[str] = None

    def __init__(
        self,
        path: str,
        shape: Sequence[Optional[int]],
        outputs: Any,
        run: Callable[[np.ndarray], np.ndarray],
        run_bytes: Optional[Callable[[Sequence[bytes]], np.ndarray]] = None,
    ):
        if len(shape) != 4 or not all(map(_is_count, shape[1:])) or shape[3] not in (1, 3):
            raise UserError(
                f"{path} takes an input of the shape {list(shape)}: a network of images takes "
                "[N, H, W, C] with a fixed height H and width W and 1 or 3 channels C"
            )
        if not _is_count(outputs) or outputs < 2:
            given = "a single logit" if outputs == 1 else "no fixed number of logits"
            raise UserError(f"{path} gives {given}: give a classifier of at least two classes")
        self.path, self._run, self.logits_of_bytes = path, run, run_bytes
        self.image_shape = tuple(int(n) for n in shape[1:] if n)
        self._fixed = int(shape[0]) if _is_count(shape[0]) and shape[0] else None
        names = _names(path)
        if names is not None and len(names) != outputs:
            logging.warning(
                "%s has %d outputs, and the file beside it has %d names: its classes are numbered",
                path,
                outputs,
                len(names),
            )
            names = None
        self.named = names is not None
        self.classes = tuple(names or map(str, range(outputs)))

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Returns the logits of images.

        Args:
          images: raw images uint8 [B, H, W, C], of any number B.

        Returns:
          float32 [B, K].

        Raises:
          UserError: if the images have another shape or type.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.shape[1:] != self.image_shape:
            raise UserError(
                f"images {images.dtype} {list(images.shape)} do not fit {self.path}: it takes "
                f"uint8 [B, {', '.join(map(str, self.image_shape))}]"
            )
        size, parts = self._fixed or BATCH, [np.zeros([0, len(self.classes)], np.float32)]
        for start in range(0, len(images), size):
            part = images[start : start + size]
            missing = self._fixed - len(part) if self._fixed else 0
            padded = np.pad(part, [(0, missing), *[(0, 0)] * 3]) if missing else part
            parts.append(np.asarray(self._run(padded), np.float32)[: len(part)])
        return np.concatenate(parts)

    def take_logarithms(self) -> None:
        """Makes `logits` return logarithms of the outputs if these are probabilities.

        Networks of other programs often end in a softmax. The softmax of its logarithm is what they
        say; that of the probabilities themselves would be another one. If neither name nor format
        tells, images that differ much do: probabilities sum to 1.
        """
        if self._gives == "logits":
            return
        images = np.random.RandomState(0).randint(0, 256, (4, *self.image_shape)).astype(np.uint8)
        images[0], images[1] = 0, 255
        found = self.logits(images)
        likely = found.min() >= 0 and np.allclose(found.sum(1), 1, atol=0.01)
        if likely or self._gives == "probabilities":
            logarithm = lambda run: lambda given: np.log(np.maximum(run(given), np.float32(1e-37)))
            self._run = logarithm(self._run)
            self.logits_of_bytes = self.logits_of_bytes and logarithm(self.logits_of_bytes)


class SavedModel(Runtime):
    """A SavedModel, run by TensorFlow through its signatures."""

    kind = "saved_model"

    def __init__(self, path: str):
        try:
            # The signatures do not keep their model alive.
            self._loaded = tf.saved_model.load(path)
            signatures = self._loaded.signatures
        except (OSError, ValueError, AttributeError, tf.errors.OpError) as e:
            raise UserError(
                f"{path} cannot be loaded as a SavedModel ({one_line(e)}): give a complete one"
            ) from e
        serve = signatures.get("serving_default")
        inputs = serve.structured_input_signature[1] if serve is not None else {}
        outputs = serve.structured_outputs if serve is not None else {}
        if len(inputs) != 1:
            raise UserError(
                f"{path} has no signature serving_default that takes images alone: give the "
                "export of a run"
            )
        ((name, spec),) = inputs.items()
        logits = _choose_logits(path, list(outputs))
        self._gives = _told_by(logits)
        encoded = signatures.get("serve_bytes")
        super().__init__(
            path,
            spec.shape.as_list() if spec.shape.rank else [],
            _width(outputs[logits].shape),
            lambda images: serve(**{name: tf.cast(images, spec.dtype)})[logits].numpy(),
            encoded and (lambda files: encoded(image_bytes=tf.constant(files))[logits].numpy()),
        )


class TFLite(Runtime):
    """A TFLite file, run by TensorFlow Lite's interpreter, its input and output of any type."""

    kind = "tflite"

    def __init__(self, path: str):
        try:
            # The newest TensorFlow says that its interpreter will move to a package of its own, and
            # any that it has made a delegate.
            with warnings.catch_warnings(), no_lines_of_tensorflow():
                warnings.simplefilter("ignore")
                self._interpreter = tf.lite.Interpreter(model_path=path)
                self._interpreter.allocate_tensors()
            given = self._interpreter.get_input_details()
            made = self._interpreter.get_output_details()
            signatures = self._interpreter.get_signature_list()
        except (OSError, ValueError, RuntimeError) as e:
            raise UserError(
                f"{path} cannot be loaded as a TFLite file ({one_line(e)}): give a complete one"
            ) from e
        if len(given) != 1:
            raise UserError(
                f"{path} has {len(given)} inputs: a network of images has one, the images"
            )
        self._input = given[0]
        if "serving_default" in signatures:
            runner = self._interpreter.get_signature_runner("serving_default")
            outputs = runner.get_output_details()
        else:
            outputs = {detail["name"]: detail for detail in made}
        logits = _choose_logits(path, list(outputs))
        self._output, self._gives = outputs[logits], _told_by(logits)
        # Rounded probabilities of many classes may all be 0. TFLite fixes the scale of a softmax.
        lowest = {np.uint8: 0, np.int8: -128}.get(self._output["dtype"])
        if self._output["quantization"] == (1 / 256, lowest):
            self._gives = "probabilities"
        shape = self._input["shape_signature"].tolist()
        super().__init__(path, shape, _width(self._output["shape"].tolist()), self._of)

    def _of(self, images: np.ndarray) -> np.ndarray:
        place = self._input["index"]
        shape = self._interpreter.get_input_details()[0]["shape"]
        if list(shape) != list(images.shape):
            self._interpreter.resize_tensor_input(place, images.shape)
            self._interpreter.allocate_tensors()
        self._interpreter.set_tensor(place, _quantised(images, self._input))
        self._interpreter.invoke()
        return _real(self._interpreter.get_tensor(self._output["index"]), self._output)


class ONNX(Runtime):
    """An ONNX file, run by ONNX Runtime on the CPU."""

    kind = "onnx"

    def __init__(self, path: str):
        try:
            import onnxruntime
        except ImportError as e:
            raise UserError(
                f"{path} needs ONNX Runtime ({one_line(e)}): install it with pip install "
                "onnxruntime"
            ) from e
        try:
            self._session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        except Exception as e:  # Its errors have no common class of their own.
            raise UserError(
                f"{path} cannot be loaded as an ONNX file ({one_line(e)}): give a complete one"
            ) from e
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        types = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32}
        if len(inputs) != 1 or inputs[0].type not in types:
            raise UserError(
                f"{path} takes {', '.join(one.type for one in inputs)}: a network of images takes "
                "one tensor(uint8) or tensor(float)"
            )
        name, dtype = inputs[0].name, types[inputs[0].type]
        logits = _choose_logits(path, [one.name for one in outputs])
        (shape,) = (one.shape for one in outputs if one.name == logits)
        self._gives = _told_by(logits)
        super().__init__(
            path,
            # A size that is not fixed has a name.
            [n if isinstance(n, int) else None for n in inputs[0].shape],
            _width(shape),
            lambda images: self._session.run([logits], {name: images.astype(dtype)})[0],
        )


# The formats that consist of one file, by its suffix.
FILES: dict[str, Callable[[str], Runtime]] = {".tflite": TFLite, ".onnx": ONNX}


def load(path: str) -> Runtime:
    """Loads a trained network of any format.

    Args:
      path: the workdir of a run that has ended, its export folder, a SavedModel, or a file whose
        suffix is in FILES.

    Raises:
      UserError: if nothing is there, its format is not known, or it cannot be loaded.
    """
    return find(path)()


def find(path: str) -> Callable[[], Runtime]:
    """Returns a function that loads a trained network; arguments and errors as in `load`.

    Whether something of a known form is there is checked at once, without the time that loading
    takes.
    """
    path = os.path.expanduser(path)
    forms = f"a workdir, a SavedModel, or a file that ends in {' or '.join(FILES)}"
    if os.path.isdir(path):
        folder = workdirs.saved_model(path)
        if folder is None:
            raise UserError(
                f"the network {path} holds no SavedModel: give the workdir of a run that has "
                f"ended, or {forms}"
            )
        return functools.partial(_loaded, SavedModel, folder)
    if not os.path.isfile(path):
        raise UserError(f"the network {path} is not there: give {forms}")
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in FILES:
        raise UserError(f"the network {path} has no suffix of a known format: give {forms}")
    return functools.partial(_loaded, FILES[suffix], path)


def _loaded(form: Callable[[str], Runtime], path: str) -> Runtime:
    runtime = form(path)
    runtime.take_logarithms()
    return runtime


def _width(shape: Any) -> Any:
    """Returns K of the shape [N, K] of outputs, None for one of another rank."""
    return shape[1] if len(shape or ()) == 2 else None


def _is_count(number: Any) -> bool:
    return isinstance(number, int) and number > 0


def _choose_logits(path: str, names: list[str]) -> str:
    """Returns the name of the output that has the logits."""
    if "logits" in names:
        return "logits"
    if len(names) == 1:
        return names[0]
    found = [name for name in names if "logits" in name]
    if len(found) != 1:
        raise UserError(
            f"{path} has the outputs {', '.join(names)}: one of several must be named logits"
        )
    return found[0]


def _told_by(name: str) -> Optional[str]:
    """Returns what the name of an output tells of it."""
    return "logits" if "logits" in name else None


def _quantised(images: np.ndarray, detail: dict[str, Any]) -> np.ndarray:
    """Returns images in the type and on the scale of a TFLite input."""
    dtype, (scale, zero) = detail["dtype"], detail["quantization"]
    if not scale:
        return images.astype(dtype)
    limits = np.iinfo(dtype)
    return np.clip(np.round(images / scale + zero), limits.min, limits.max).astype(dtype)


def _real(values: np.ndarray, detail: dict[str, Any]) -> np.ndarray:
    """Returns the real numbers of the values of a TFLite output, float32."""
    scale, zero = detail["quantization"]
    return (values.astype(np.float32) - zero) * scale if scale else values.astype(np.float32)


def _names(path: str) -> Optional[list[str]]:
    """Returns the names of the classes from the folder of a network or the two above it."""
    folder = os.path.abspath(path)
    for _ in range(3):
        for name, names_in in ((workdirs.NAMES, _json_list), (workdirs.LABELS, _lines)):
            file = os.path.join(folder, name)
            try:
                if os.path.isfile(file):
                    with open(file, encoding="utf-8") as f:
                        return names_in(f.read())
            except (OSError, ValueError) as e:
                logging.warning("names of classes cannot be read from %s: %s", file, one_line(e))
        folder = os.path.dirname(folder)
    return None


def _json_list(text: str) -> list[str]:
    names = json.loads(text)
    # The order of an object need not be that of the outputs.
    if not isinstance(names, list):
        raise ValueError("it is no list")
    return [str(name) for name in names]


def _lines(text: str) -> list[str]:
    return [class_names.unescape(line) for line in text.rstrip("\n").split("\n")]
