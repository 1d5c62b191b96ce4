"""Target networks: plain functions (input_shape, num_classes) -> functional keras.Model that gives logits.

They take standardised images; `standardise` makes the layer that turns raw ones into such.
"""
import importlib
import inspect

import numpy as np
from tensorflow import keras

from tf_pcl.errors import UserError, choose
from tf_pcl.networks.densenet import densenet40_12
from tf_pcl.networks.resnet import resnet, resnet8, resnet14, resnet18, resnet20, resnet32, resnet50, resnet110, wrn20_8
from tf_pcl.networks.resnext import resnext29_2x64d
from tf_pcl.networks.split import clone, cut_points, split, stage_names, with_features
from tf_pcl.networks.vgg import vgg16

NETWORKS = {f.__name__: f for f in (
    resnet8, resnet14, resnet20, resnet32, resnet110, wrn20_8, resnext29_2x64d, vgg16, densenet40_12,  # small images
    resnet18, resnet50)}  # large ones


def find(name):
    """The function (input_shape, num_classes) -> keras.Model of a network's name; build() says which names there are.

    Raises:
      UserError: if there is none.
    """
    if name.startswith("applications."):
        known = {n: f for n, f in vars(keras.applications).items() if inspect.isfunction(f)}
        application = known[choose("--network=applications.", name[len("applications."):], known)]
        return lambda input_shape, num_classes: application(
            weights=None, input_shape=input_shape, classes=num_classes, classifier_activation=None)
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as e:
            raise UserError(f"--network={name}: {e}. It must name a function as module:function that can be imported "
                            "from here.") from e
    forms = ["applications.NAME", "module:function"]
    if choose("--network", name, [*NETWORKS, *forms]) in forms:
        raise UserError(f"--network={name}: put a name in place of the capitals, as in applications.MobileNetV2")
    return NETWORKS[name]


def build(name, input_shape, num_classes):
    """Builds a network by its name.

    Args:
      name: one of NETWORKS; `applications.NAME` for keras.applications, without pretrained weights; or `module:function`,
        a function (input_shape, num_classes) of the user's own that returns a functional keras.Model.
      input_shape: (H, W, channels).
      num_classes: C ≥ 2.
    Raises:
      UserError: if there is no such network or it does not take such images.
    """
    function = find(name)
    try:
        model = function(tuple(input_shape), num_classes)
    except (ValueError, TypeError) as e:
        raise UserError(f"--network={name} cannot be built for images {tuple(input_shape)}: {' '.join(str(e).split())}") from e
    if not isinstance(model, keras.Model):
        raise UserError(f"--network={name} returned {type(model).__name__}: it must return a keras.Model")
    if model.output_shape[-1] != num_classes:
        raise UserError(f"--network={name} gives outputs {model.output_shape}; the data set has {num_classes} classes")
    return model


def standardise(mean, std):
    """A layer from raw images 0–255 to float32 images of zero mean and unit standard deviation by channel.

    Args:
      mean, std: per channel, on the scale 0–255.
    """
    return keras.layers.Normalization(mean=np.asarray(mean, np.float32), variance=np.square(np.asarray(std, np.float32)),
                                      dtype="float32", name="standardise")


def standardises_itself(network):
    """Whether the network has a layer that scales its input (keras Rescaling or Normalization), so that it takes raw
    images."""
    return any(isinstance(layer, (keras.layers.Rescaling, keras.layers.Normalization))
               for layer in network.submodules)
