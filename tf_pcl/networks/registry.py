"""The table of networks, and how a name becomes a model."""

import functools
import importlib
from typing import Any, Callable, Optional

from tf_pcl import compat
from tf_pcl.compat import keras, layers
from tf_pcl.errors import UserError, choose, one_line
from tf_pcl.networks import applications, densenet, resnets, resnext, vgg
from tf_pcl.surgery import Target, built_by, functional

# Functions (input_shape, num_classes) -> functional keras.Model that gives logits.
FOR_SMALL_IMAGES = (
    resnets.resnet8,
    resnets.resnet14,
    resnets.resnet20,
    resnets.resnet32,
    resnets.resnet110,
    resnets.wrn20_8,
    resnext.resnext29_2x64d,
    vgg.vgg16,
    densenet.densenet40_12,
)
FOR_LARGE_IMAGES = (resnets.resnet18, resnets.resnet50)
NETWORKS = {f.__name__: f for f in (*FOR_SMALL_IMAGES, *FOR_LARGE_IMAGES)}


def target(
    name: str,
    input_shape: tuple,
    num_classes: int,
    *,
    load: Optional[Callable[[keras.Model], Any]] = None,
    initializer: Optional[str] = None,
) -> Target:
    """Returns the network of this name as a Target, of which several instances can be made.

    Args:
      name, input_shape, num_classes, initializer: as in `build`.
      load: loads trained weights into the first instance; see Target.

    Raises:
      UserError: if there is no such network.
    """
    find(name)
    build_it: Any = functools.partial(build, name, input_shape, num_classes, initializer)
    build_it.__name__ = name  # By which errors call it.
    return Target(build_it, input_shape=tuple(input_shape), load=load)


def find(name: str) -> Callable[[tuple, int], keras.Model]:
    """Returns the function (input_shape, num_classes) that builds the network of this name.

    Raises:
      UserError: if there is none.
    """
    if name.startswith(applications.PREFIX):
        return applications.builder(name)
    if ":" in name:
        return _import(name)
    forms = [f"{applications.PREFIX}NAME", "module:function"]
    if choose("network", name, [*NETWORKS, *forms]) in forms:
        raise UserError(
            f"network {name}: put a name in place of the capitals, as in applications.MobileNetV2"
        )
    return NETWORKS[name]


def _import(name):
    """Returns the user's own function that `module:function` names."""
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as e:  # The module is the user's code.
        raise UserError(
            f"network {name} cannot be imported: {one_line(e)}. It must name a function as "
            "module:function that can be imported from here."
        ) from e
    # A model is callable too, but does not make a second network for another peer.
    is_model = isinstance(function, keras.Model) or compat.foreign_keras(function)
    if not callable(function) or is_model:
        raise UserError(
            f"network {name} is {type(function).__name__}: it must name a function "
            "(input_shape, num_classes) that returns a new keras.Model"
        )
    return function


def build(
    name: str, input_shape: tuple, num_classes: int, initializer: Optional[str] = None
) -> keras.Model:
    """Builds a network by its name.

    Args:
      name: one of NETWORKS; `applications.NAME` for keras.applications; or `module:function`, a
        function (input_shape, num_classes) of the user's own that returns a keras.Model.
      input_shape: (H, W, channels).
      num_classes: C ≥ 2.
      initializer: "fan_in" or "fan_out" to draw the convolutions as `initialise` does; by default
        they stay as the network's function makes them.

    Returns:
      A functional keras.Model from float images [B, H, W, channels] to [B, C].

    Raises:
      UserError: if there is no such network or it does not take such images.
    """
    function = find(name)
    try:
        model = built_by(name, function, tuple(input_shape), num_classes)
    except UserError:
        raise
    except Exception as e:  # The function is keras.applications' or the user's.
        raise UserError(
            f"network {name} cannot be built for images {tuple(input_shape)}: {one_line(e)}"
        ) from e
    model = functional(model, tuple(input_shape))
    if tuple(model.output_shape[1:]) != (num_classes,):
        raise UserError(
            f"network {name} gives outputs {model.output_shape}; the data set has {num_classes} "
            "classes: build it for as many"
        )
    if not model.trainable_weights:
        raise UserError(
            f"network {name} has no trainable weights, since all its layers are frozen or it has "
            "none: give one with layers that are trained"
        )
    if initializer:
        initialise(model, initializer)
    return model


def initialise(network: keras.Model, fan: str) -> None:
    """Draws a network's convolutions anew, normal with variance 2 / fan (He et al., 2015).

    Args:
      network: a keras.Model, changed in place; a copy of it draws in the same way. Depthwise and
        transposed convolutions stay as they are.
      fan: "fan_in", size² · channels that a kernel reads, or "fan_out", size² · channels that it
        makes. Code published in PyTorch often takes the latter, which starts smaller where a
        convolution adds channels.

    Raises:
      UserError: if `fan` is another word.
    """
    fan = choose("initializer", fan, ("fan_in", "fan_out"))
    for layer in network.submodules:
        if type(layer) is layers.Conv2D:
            layer.kernel_initializer = keras.initializers.VarianceScaling(2.0, fan)
            layer.kernel.assign(layer.kernel_initializer(layer.kernel.shape, layer.kernel.dtype))
