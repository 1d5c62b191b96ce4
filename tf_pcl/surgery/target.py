"""The target network, of which several instances can be made."""

import functools
import inspect
import sys
import weakref
from typing import Any, Callable, Optional, Union

import numpy as np
import tensorflow as tf

from tf_pcl.compat import is_of_keras, keras
from tf_pcl.errors import UserError, one_line
from tf_pcl.surgery import proof, twins
from tf_pcl.surgery.convert import built_by, check_kind, functional
from tf_pcl.surgery.graph import finalize, head, sublayers
from tf_pcl.surgery.weights import assign_pairs

USE_A_FUNCTION = (
    "give the function that builds the network, not the network itself: the function is called "
    "for each peer"
)


class Target:
    """Makes separate instances of one target network.

    A function is called for each instance. A keras.Model becomes the first instance; the others
    are made by Keras's own serialization, and each is proven to compute the same.

    Args:
      network: a function that returns a keras.Model, without arguments or with the arguments
        (input_shape, num_classes); or a keras.Model.
      input_shape: (H, W, channels) of the images; a function of two arguments needs it.
      num_classes: C, for such a function.
      load: a function that loads trained weights into a network. It is called on the first
        instance; the others start with the same weights, except for the classifier.

    Attributes:
      name: of the network.
      proven: keys of what was proven for the graphs of the instances; see proof.same.
    """

    def __init__(
        self,
        network: Union[keras.Model, Callable[..., keras.Model]],
        *,
        input_shape: Optional[tuple] = None,
        num_classes: Optional[int] = None,
        load: Optional[Callable[[keras.Model], Any]] = None,
    ):
        self._instance = network if isinstance(network, keras.Model) else None
        self._build: Any = (
            None
            if self._instance is not None
            else _without_arguments(network, input_shape, num_classes)
        )
        self._shape, self._load = input_shape, load
        self._loaded = getattr(network, "loaded_weights", False)
        self.proven: set = set()
        self._held: dict = {}
        self._twins: list = []
        self._copies = 0
        self._made: Optional[keras.Model] = None
        self._given = False
        self.name: str = getattr(network, "name", "") or getattr(network, "__name__", "network")

    @classmethod
    def of(cls, network: Any) -> "Target":
        """Returns `network` itself if it is a Target, or the Target of a model or a function.

        Raises:
          UserError: if it is a list, or anything else.
        """
        if isinstance(network, cls):
            return network
        check_kind(network, or_function=True)
        return cls(network)

    def new(self) -> keras.Model:
        """Makes another instance: a functional keras.Model that shares no weight with the others.

        Its weights are drawn anew, except for those that are not trained or were loaded, which are
        equal in all instances.

        Raises:
          UserError: if no such instance can be made; the text says why and what to do.
        """
        if not self._given:
            self._given = True
            return self.first
        return self._another()

    @property
    def first(self) -> keras.Model:
        """The first instance, which the first call of `new` returns."""
        if self._made is None:
            self._made = self._begin()
            self._hold(self._made)
        return self._made

    def copy(self) -> keras.Model:
        """Makes an instance with the present values of the first; see `new`."""
        made = self._another()
        assign_pairs(paired(self.first, made))
        finalize(made)
        return made

    def _another(self):
        first = self.first
        made = self._again()
        self._check_apart(made)
        try:
            pairs = paired(first, made)
        except ValueError as e:
            raise UserError(f"network {self.name!r} cannot be made twice: {e}") from e
        last = {id(w) for w in head(first).weights}
        trained = {id(w) for w in first.trainable_weights}
        assign_pairs(
            (a, b) for a, b in pairs if id(a) not in trained or self._loaded and id(a) not in last
        )
        finalize(made)
        _draw_anew(made, salt=len(self._held))
        self._hold(made)
        self._twins.append([(a, b, a.trainable) for a, b in zip(sublayers(first), sublayers(made))])
        return made

    def follow(self) -> None:
        """Freezes in all instances what was frozen in the first, and trains what is trained there.

        What is changed in another instance alone stays.
        """
        for i, layers in enumerate(self._twins):
            now = [
                (other, (one if one.trainable != before else other).trainable)
                for one, other, before in layers
            ]
            for other, trainable in now:
                # This sets all layers inside, too; they come later.
                if other.trainable != trainable:
                    other.trainable = trainable
            self._twins[i] = [(one, other, one.trainable) for one, other, _ in layers]

    def _begin(self):
        made = self._instance if self._instance is not None else built_by(self.name, self._build)
        network = functional(made, self._shape)
        formats = {str(getattr(layer, "data_format", None)) for layer in sublayers(network)}
        if "channels_first" in {*formats, keras.backend.image_data_format()}:
            raise UserError(
                f"network {self.name!r} or Keras's own `image_data_format` has channels first, and "
                "methods need feature maps with channels last: build it with Keras's usual "
                "`channels_last`"
            )
        try:
            graph = proof.traced(network)
            proof.answers_once(network, graph)
            proof.owns_its_variables(network, graph)
        except UserError:
            raise
        except Exception as e:  # Whatever its layers raise on images.
            shape = tuple(network.input_shape[1:])
            raise UserError(
                f"network {self.name!r} cannot be run on images {shape}: {one_line(e)}"
            ) from e
        if self._load:
            self._load(network)
            self._loaded = True
        return network

    def _again(self):
        """Returns another instance, whose weights are not checked yet."""
        if self._build:
            return functional(built_by(self.name, self._build), self._shape)
        made = _serialized(self._instance)
        for a, b in zip(sublayers(self._instance), sublayers(made)):
            if type(a) is type(b):
                if a.trainable != b.trainable:
                    b.trainable = a.trainable
                # The configurations of most of Keras's layers leave it out.
                b._activity_regularizer = a._activity_regularizer
                # They name functions, and tf.nn.relu and Keras's have one name.
                if is_of_keras(type(a)) and inspect.isfunction(vars(a).get("activation")):
                    b.activation = a.activation
        return self._proven(functional(made, self._shape))

    def _proven(self, made):
        """Returns an instance made by serialization if it computes what the first one does."""
        what = f"a copy of network {self.name!r}"
        try:
            self._check_apart(made)
            fresh = made.get_weights()
            assign_pairs(paired(self.first, made))
            finalize(made)
            unlike = twins.difference(self.first, made)
            if unlike:
                raise UserError(f"{what} is not the network that was given: {unlike}")
            # Copies of one configuration are alike: only the first is compared in training.
            proof.same(self.first, made, what, twin=made, training=not self._copies)
            self._copies += 1
            made.set_weights(fresh)
        except UserError as e:
            raise UserError(f"{e}; {USE_A_FUNCTION}") from e
        except Exception as e:  # The user's own layers may not work in a copy.
            raise UserError(f"{what} cannot be made: {one_line(e)}; {USE_A_FUNCTION}") from e
        return made

    def _hold(self, made):
        self._held.update((id(v), weakref.ref(v)) for v in made.weights)

    def _check_apart(self, made):
        """Raises UserError if an instance holds a variable of an earlier one."""
        for variable in made.weights:
            known = self._held.get(id(variable))
            if known is not None and known() is variable:
                raise UserError(
                    f"network {self.name!r} shares the variable {variable.name!r} among its "
                    "instances: build new layers each time"
                )


def _without_arguments(function, input_shape, num_classes):
    """Returns a function of no arguments from a user's function of none or of two."""
    try:
        required = [
            p
            for p in inspect.signature(function).parameters.values()
            if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
    except (TypeError, ValueError):
        required = []
    if not required:
        return function
    if input_shape is None or num_classes is None:
        raise UserError(
            f"network {getattr(function, '__name__', function)!r} is a function that takes "
            f"{', '.join(p.name for p in required)}: give one without arguments, such as "
            "lambda: build((32, 32, 3), 10)"
        )
    return lambda: function(tuple(input_shape), num_classes)


def _serialized(model):
    """Returns a copy of a model by Keras's serialization, with freshly drawn weights."""
    objects: dict = {_SameLambda.__name__: _SameLambda}
    _SameLambda.known = {}
    for layer in sublayers(model):
        objects[type(layer).__name__] = type(layer)
        if isinstance(layer, keras.layers.Lambda):
            _SameLambda.known[layer.name] = layer
        for value in vars(layer).values():
            if inspect.isfunction(value):
                objects[value.__name__] = value
    try:
        with keras.utils.custom_object_scope(objects):
            return type(model).from_config(_readable(model.get_config()))
    except Exception as e:  # NotImplementedError, and whatever a layer of the user's own raises.
        raise UserError(
            f"network {model.name!r} cannot be copied by Keras's serialization: {one_line(e)}; "
            f"{USE_A_FUNCTION}"
        ) from e


class _SameLambda:
    """Represents a Lambda layer in a configuration, so that its copy gets the same function.

    Keras would write the function's bytecode, which loses its closure, and refuses to read it.
    """

    known: dict = {}

    @classmethod
    def from_config(cls, config):
        layer = cls.known[config["name"]]
        return keras.layers.Lambda(
            layer.function, arguments=layer.arguments, name=layer.name, dtype=layer.dtype_policy
        )


def _readable(config):
    """Returns a configuration that gives the same Lambda functions and classes of Keras when read.

    Every Lambda layer becomes a _SameLambda. A class is named by the module that defines it: its
    public name may lead to another Keras (see compat.names_are_taken), and reading the layers of
    that one would never end.
    """
    if isinstance(config, (list, tuple)):
        return type(config)(map(_readable, config)) if config else config
    if not isinstance(config, dict):
        return config
    if config.get("class_name") == "Lambda" and isinstance(config.get("config"), dict):
        name = _SameLambda.__name__
        own = {"name": config["config"]["name"]}
        return {
            **config,
            "module": None,
            "class_name": name,
            "registered_name": name,
            "config": own,
        }
    # Layers are built when they are called. Built before, they would call their weights "kernel",
    # not "NAME/kernel", and optimizers go by these names.
    read = {key: _readable(value) for key, value in config.items() if key != "build_config"}
    module, of_class = config.get("module"), config.get("class_name")
    if isinstance(module, str) and isinstance(of_class, str) and module.startswith("keras."):
        public = functools.reduce(lambda a, b: getattr(a, b, None), module.split(".")[1:], keras)
        defined_in = getattr(getattr(public, of_class, None), "__module__", "")
        if hasattr(sys.modules.get(defined_in), of_class):
            read["module"] = defined_in
    return read


def paired(one: keras.Model, other: keras.Model) -> list:
    """Pairs the weights of two instances of a network.

    Returns:
      [(variable of `one`, variable of `other`)], in the order of one.weights.

    Raises:
      ValueError: if they do not pair up by name, shape, type and whether they are trained.
    """

    def described(model):
        trained = {id(w) for w in model.trainable_weights}
        return [
            (w.name.split("/")[-1], tuple(w.shape), w.dtype.name, id(w) in trained)
            for w in model.weights
        ]

    ours, theirs = described(one), described(other)
    if ours != theirs:
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), None)
        if at is None:
            raise ValueError(f"one has {len(ours)} weights, the other {len(theirs)}")
        raise ValueError(f"weight {at} is {ours[at]} in one and {theirs[at]} in the other")
    return list(zip(one.weights, other.weights))


def _draw_anew(model, salt):
    """Draws trained weights that an initializer with a fixed seed repeated, with another seed."""
    trained = {id(w) for w in model.trainable_weights}
    for layer in sublayers(model):
        for initializer in list(vars(layer).values()):
            seed = getattr(initializer, "seed", None)
            if isinstance(seed, int) and isinstance(initializer, keras.initializers.Initializer):
                changed = type(initializer).from_config(
                    {**initializer.get_config(), "seed": seed + salt}
                )
                for weight in (w for w in layer.weights if id(w) in trained):
                    given = _drawn(initializer, weight)
                    if given is not None and np.array_equal(given, weight.numpy()):
                        weight.assign(_drawn(changed, weight))


def _drawn(initializer, weight):
    """Returns what an initializer gives for a weight, or None if it cannot."""
    try:
        # A new one: some initializers draw other values when they are called again.
        fresh = type(initializer).from_config(initializer.get_config())
        return np.asarray(fresh(weight.shape, dtype=weight.dtype))
    except Exception:  # It is for tensors of another rank, or the user's own and has no config.
        return None


def start_apart(others: list, model: keras.Model) -> None:
    """Makes sure that a peer starts with other weights than the peers before it.

    If all its trained weights equal those of another peer, its classifier's are drawn anew.

    Args:
      others: the peers before.
      model: the peer, built like them.

    Raises:
      UserError: if the weights stay equal.
    """
    if not any(_alike(other, model) for other in others):
        return
    for layer in sublayers(head(model)):
        for name, initializer in list(vars(layer).items()):
            weight = getattr(layer, name.replace("_initializer", ""), None)
            if name.endswith("_initializer") and isinstance(weight, tf.Variable):
                config = initializer.get_config()
                if "seed" in config:
                    # Without a seed the values depend on the global one, which a user's function
                    # may set to the same number for each peer.
                    config["seed"] = (config["seed"] or 0) + 1000 + len(others)
                drawn = type(initializer).from_config(config)
                weight.assign(drawn(weight.shape, dtype=weight.dtype))
    if any(_alike(other, model) for other in others):
        raise UserError(
            "the network starts from the same weights each time it is built, so all peers would be "
            "the same: remove fixed seeds from its initializers, or from the function"
        )


def _alike(first, other):
    return all(
        np.array_equal(a.numpy(), b.numpy())
        for a, b in zip(first.trainable_weights, other.trainable_weights)
    )
