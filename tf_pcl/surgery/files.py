"""Reads files of Keras without running the code in them.

A file of a whole model holds more than weights. Keras builds what the file describes: the Python
code of Lambda layers, functions that it names, and, in a SavedModel, a graph. Here weights are read
as arrays, and a network is built only from Keras's own layers.
"""

import importlib
import inspect
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Optional

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import trackable_object_graph_pb2

from tf_pcl import compat
from tf_pcl.compat import keras
from tf_pcl.errors import UserError
from tf_pcl.surgery.features import LogOfProbabilities, WithoutActivation
from tf_pcl.surgery.graph import finalize, leaves

# The file in a SavedModel by which Keras 2 describes its layers.
_DESCRIPTION = "keras_metadata.pb"
_MODELS = {"Functional", "Model", "Sequential"}
# Layers that this package puts into networks, by the names that files have for them. Files of
# earlier versions have the name of the class.
_OWN = {
    name: cls
    for cls in (LogOfProbabilities, WithoutActivation)
    for name in (cls.__name__, keras.utils.get_registered_name(cls))
}
_HARMLESS = {*_MODELS, *_OWN, "Policy", "__tuple__", "__ellipsis__"}
# Layers that run code, or that open files which their configuration names.
_HARMFUL = {"Lambda", "TFSMLayer", "StringLookup", "IntegerLookup", "TextVectorization"}
# Layers that call a function of TensorFlow, and the functions that are allowed.
_FUNCTION_LAYERS = {"TFOpLambda", "SlicingOpLambda"}
_FUNCTIONS = re.compile(
    r"(math|nn|image|linalg|__operators__)\.\w+|cast|concat|stack|unstack|split|reshape|squeeze|"
    r"expand_dims|transpose|tile|pad|identity|stop_gradient|where|gather|slice|strided_slice|shape|"
    r"reverse|one_hot|clip_by_value|zeros_like|ones_like|add|subtract|multiply|divide|matmul|"
    r"minimum|maximum|abs|sqrt|square|exp|tanh|sigmoid|pow|einsum|reduce_(mean|sum|max|min|all|any)"
)


class Layer(NamedTuple):
    """A layer's name and its weights as they are in a file, in Keras's order."""

    name: str
    weights: list


def is_model(path: str) -> bool:
    """Says whether a file is a whole model, and not one of weights alone.

    Raises:
      OSError: if a .h5 file cannot be read.
    """
    if path.endswith(".keras") or os.path.isdir(path):
        return True
    if not path.endswith((".h5", ".hdf5")):
        return False
    import h5py

    with h5py.File(path) as f:
        return "model_config" in f.attrs


def check_described(folder: str) -> None:
    """Raises UserError if a SavedModel has no description of its layers."""
    if not os.path.exists(os.path.join(folder, _DESCRIPTION)):
        raise UserError(
            f"{folder} holds a graph without a description of its layers, as Keras 3 and "
            "model.export() write it: give the export of a run, or as `weights` a .keras or "
            ".weights.h5 file of the model"
        )


def read_layers(path: str) -> list[Layer]:
    """Reads the layers with weights of a whole model, those of inner models included.

    Args:
      path: .h5, .keras or the folder of a SavedModel that Keras has written.

    Raises:
      KeyError, OSError, ValueError: or any other exception, if the file is damaged.
    """
    if os.path.isdir(path):
        found = _of_saved_model(path)
    else:
        found = _of_keras(path) if path.endswith(".keras") else _of_h5(path)
    return [layer for layer in found if layer.weights]


def read_network(folder: str) -> keras.Model:
    """Builds the network of a SavedModel that Keras has written, only from Keras's own layers.

    The graph in the SavedModel is not loaded.

    Args:
      folder: its folder.

    Raises:
      UserError: if it has layers or functions which are not Keras's own, or which run code.
      KeyError, OSError, ValueError: or any other exception, if the file is damaged.
    """
    if compat.names_are_taken():
        raise UserError(
            f"{folder} cannot be loaded in this process, where another Keras, tf_keras, has taken "
            "the names of the layers: load it where neither tensorflow-hub nor tf_keras is imported"
        )
    described = _metadata(folder)["root"]
    foreign = _foreign(described["class_name"], described["config"])
    if foreign:
        raise UserError(
            f"{folder} holds {foreign}, which may run code of its own: if you trust its source, "
            "give `trust_files`"
        )
    cls = keras.Sequential if described["class_name"] == "Sequential" else keras.Model
    with keras.utils.custom_object_scope(_OWN):
        network = cls.from_config(described["config"])
    targets = [layer for layer in leaves(network) if layer.weights]
    values = read_layers(folder)
    if len(targets) != len(values):
        raise ValueError(f"{len(values)} layers have weights, where {len(targets)} are described")
    for layer, (name, weights) in zip(targets, values):
        # Weights could fit another layer of the same shape.
        if layer.name != name:
            raise ValueError(
                f"the weights of layer {name!r} come where {layer.name!r} is described"
            )
        layer.set_weights(weights)
    finalize(network)
    return network


def _foreign(class_name: str, config: Any) -> Optional[str]:
    """Names the first harmful part of a configuration; returns None if there is none."""
    for node in _nodes({"class_name": class_name, "config": config}):
        name, inside = str(node["class_name"]), node.get("config")
        inside = inside if isinstance(inside, Mapping) else {}
        if name in _FUNCTION_LAYERS:
            function = str(inside.get("function"))
            if not _FUNCTIONS.fullmatch(function):
                return f"a call of the function {function}"
        elif not (name in _HARMLESS or _is_harmless(name, node.get("module"))):
            called = f"{inside['name']!r} " if "name" in inside else ""
            return f"the layer {called}of the class {name}"
    return None


def _nodes(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yields the parts of a configuration that name a class, at any depth."""
    if isinstance(value, Mapping):
        if "class_name" in value:
            yield value
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for one in value:
            yield from _nodes(one)


def _is_harmless(name: str, module: Optional[str]) -> bool:
    """Says whether a class is one that Keras has under this name, and harmless."""
    spaces = {
        "keras.layers": keras.layers,
        "keras.initializers": keras.initializers,
        "keras.regularizers": keras.regularizers,
        "keras.constraints": keras.constraints,
    }
    if name in _HARMFUL or module and module not in spaces:
        return False
    places = [spaces[module]] if module else spaces.values()
    return any(inspect.isclass(getattr(place, name, None)) for place in places)


def _of_h5(path: str) -> Iterator[Layer]:
    import h5py

    with h5py.File(path) as f:
        groups = f["model_weights"]
        for described in json.loads(f.attrs["model_config"])["config"]["layers"]:
            group = groups[described["config"]["name"]]
            weights = {name: np.array(group[name]) for name in _texts(group, "weight_names")}
            if "layers" not in described["config"]:
                yield Layer(described["config"]["name"], list(weights.values()))
                continue
            for name in _names(described["config"]):
                own = [value for key, value in weights.items() if key.startswith(f"{name}/")]
                yield Layer(name, own)


def _texts(group: Any, name: str) -> list[str]:
    """Returns an attribute of texts, which Keras splits into several if it is too long."""
    parts = [group.attrs[name]] if name in group.attrs else []
    while f"{name}{len(parts)}" in group.attrs:
        parts.append(group.attrs[f"{name}{len(parts)}"])
    return [t.decode() if isinstance(t, bytes) else t for part in parts for t in part]


def _names(config: Mapping[str, Any]) -> Iterator[str]:
    """Yields the names of the layers in a model's configuration, inner models' included."""
    for layer in config["layers"]:
        if "layers" in layer["config"]:
            yield from _names(layer["config"])
        else:
            yield layer["config"]["name"]


def _of_keras(path: str) -> Iterator[Layer]:
    import h5py

    with zipfile.ZipFile(path) as z:
        config = json.loads(z.read("config.json"))["config"]
        with z.open("model.weights.h5") as stored, h5py.File(stored) as f:
            yield from _of_groups(config, f)


def _of_groups(config: Mapping[str, Any], group: Any) -> Iterator[Layer]:
    """Yields the layers of a model, whose groups have the names of their classes and numbers."""
    seen: dict[str, int] = {}
    for layer in config["layers"]:
        kind = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", layer["class_name"]))
        kind = re.sub(r"([a-z])([A-Z])", r"\1_\2", kind).lower()
        number = seen[kind] = seen.get(kind, -1) + 1
        place = group["layers"].get(f"{kind}_{number}" if number else kind)
        if "layers" in layer["config"]:
            yield from _of_groups(layer["config"], place)
        elif place is not None:
            # A layer of layers has its weights in several groups, whose order is not known.
            own = place.get("vars", {}) if set(place) <= {"vars"} else {}
            weights = [np.array(own[str(i)]) for i in range(len(own))]
            yield Layer(layer["config"]["name"], weights)


def _metadata(folder: str) -> dict[str, Any]:
    """Returns {path of an object: its metadata of Keras} of a SavedModel."""
    package = keras.Model.__module__.partition(".")[0]
    messages = importlib.import_module(f"{package}.protobuf.saved_metadata_pb2")
    metadata = messages.SavedMetadata()
    check_described(folder)
    with open(os.path.join(folder, _DESCRIPTION), "rb") as f:
        metadata.ParseFromString(f.read())
    return {
        node.node_path: json.loads(node.metadata, object_hook=_plain) for node in metadata.nodes
    }


def _plain(value: dict) -> Any:
    """Returns the Python values that Keras writes as classes."""
    if value.get("class_name") == "__tuple__":
        return tuple(value["items"])
    return Ellipsis if value.get("class_name") == "__ellipsis__" else value


def _of_saved_model(folder: str) -> Iterator[Layer]:
    reader = tf.train.load_checkpoint(os.path.join(folder, "variables", "variables"))
    objects = trackable_object_graph_pb2.TrackableObjectGraph()
    objects.ParseFromString(reader.get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH"))
    children = [{c.local_name: c.node_id for c in node.children} for node in objects.nodes]
    names: dict[int, str] = {}
    for path, described in _metadata(folder).items():
        node: Optional[int] = 0
        for part in path.split(".")[1:]:
            node = None if node is None else children[node].get(part)
        if node is not None and "name" in described:
            names[node] = described["name"]

    def layers_of(node: int) -> Iterator[Layer]:
        numbered = (children[node].get(f"layer-{i}") for i in range(len(children[node])))
        inside = [n for n in numbered if n is not None]
        for layer in inside:
            if "layer-0" in children[layer]:
                yield from layers_of(layer)
            else:
                variables = [objects.nodes[n].attributes[0] for n in variables_of(layer)]
                weights = [reader.get_tensor(v.checkpoint_key) for v in variables]
                yield Layer(names.get(layer, ""), weights)

    def variables_of(node: int) -> list[int]:
        listed = children[node].get("variables")
        if listed is None:  # Layers such as Normalization have none, and those of the model tell.
            return [n for n in variables_of(0) if n in children[node].values()]
        return [children[listed][str(i)] for i in range(len(children[listed]))]

    yield from layers_of(0)
