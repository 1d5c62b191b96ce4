"""Target networks: plain functions (input_shape, num_classes) -> functional keras.Model that gives logits.

They take standardised images; `standardise` makes the layer that turns raw ones into such.
"""
import importlib
import inspect

import numpy as np
from tensorflow import keras

from tf_pcl.errors import UserError, choose, one_line
from tf_pcl.networks.copies import clone, functional, keep_weights
from tf_pcl.networks.densenet import densenet40_12
from tf_pcl.networks.features import with_features
from tf_pcl.networks.resnet import resnet, resnet8, resnet14, resnet18, resnet20, resnet32, resnet50, resnet110, wrn20_8
from tf_pcl.networks.resnext import resnext29_2x64d
from tf_pcl.networks.split import costs, cut_points, propose_cut, split, stage_names
from tf_pcl.networks.vgg import vgg16
from tf_pcl.networks.weights import load_weights, saved_model

NETWORKS = {f.__name__: f for f in (
    resnet8, resnet14, resnet20, resnet32, resnet110, wrn20_8, resnext29_2x64d, vgg16, densenet40_12,  # small images
    resnet18, resnet50)}  # large ones


def _application(name):
    """The function of keras.applications that `applications.NAME` names."""
    known = {n: f for n, f in vars(keras.applications).items() if inspect.isfunction(f)}
    return known[choose("network of keras.applications", name[len("applications."):], known)]


def find(name):
    """The function (input_shape, num_classes) -> keras.Model of a network's name; build() says which names there are.

    Raises:
      UserError: if there is none.
    """
    if name.startswith("applications."):
        application = _application(name)

        def build_application(input_shape, num_classes):
            model = application(weights=None, input_shape=input_shape, classes=num_classes, classifier_activation=None)
            for layer in model.submodules:
                if isinstance(layer, keras.layers.BatchNormalization):
                    # The recipe's. With MobileNetV2's 0.999 the statistics of the first thousands of steps are no use.
                    layer.momentum = 0.9
            return model

        return build_application
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            function = getattr(importlib.import_module(module), attribute)
        except (Exception, SystemExit) as e:  # The module is the user's code.
            raise UserError(f"network {name} cannot be imported: {one_line(e)}. It must name a function as "
                            "module:function that can be imported from here.") from e
        if not callable(function):
            raise UserError(f"network {name} is {type(function).__name__}: it must name a function")
        return function
    forms = ["applications.NAME", "module:function"]
    if choose("network", name, [*NETWORKS, *forms]) in forms:
        raise UserError(f"network {name}: put a name in place of the capitals, as in applications.MobileNetV2")
    return NETWORKS[name]


def build(name, input_shape, num_classes):
    """Builds a network by its name.

    Args:
      name: one of NETWORKS; `applications.NAME` for keras.applications, without pretrained weights and with the recipe's
        BatchNorm momentum, 0.9; or `module:function`, a function (input_shape, num_classes) of the user's own that returns a
        keras.Model which `functional` takes.
      input_shape: (H, W, channels).
      num_classes: C ≥ 2.
    Returns:
      A functional keras.Model from float images [B, H, W, channels] to [B, C].
    Raises:
      UserError: if there is no such network or it does not take such images.
    """
    function = find(name)
    try:
        model = function(tuple(input_shape), num_classes)
    except Exception as e:  # The function is keras.applications' or the user's.
        raise UserError(f"network {name} cannot be built for images {tuple(input_shape)}: {one_line(e)}") from e
    if not isinstance(model, keras.Model):
        raise UserError(f"network {name} returned {type(model).__name__}: it must return a keras.Model")
    model = functional(model, tuple(input_shape))
    if tuple(model.output_shape[1:]) != (num_classes,):
        raise UserError(f"network {name} gives outputs {model.output_shape}; the data set has {num_classes} classes")
    if not model.trainable_weights:
        raise UserError(f"network {name} has no trainable weights: all its layers are frozen, or it has none")
    return model


def standardise(mean, std):
    """A layer from raw images 0–255 to float32 images of zero mean and unit standard deviation by channel.

    Args:
      mean, std: per channel, on the scale 0–255.
    """
    return keras.layers.Normalization(mean=np.asarray(mean, np.float32), variance=np.square(np.asarray(std, np.float32)),
                                      dtype="float32", name="standardise")


def preprocessing(name, input_shape):
    """The preprocess_input of `applications.NAME`, which files of its weights were trained with.

    Args:
      name: of a network; one that is not of keras.applications has none.
      input_shape: (H, W, channels).
    Returns:
      A keras.Model from raw images 0–255 to float32 images, or None.
    """
    if not name.startswith("applications."):
        return None
    module = getattr(keras.applications, _application(name).__module__.split(".")[-1])
    images = keras.Input(input_shape, dtype="float32")
    return keras.Model(images, module.preprocess_input(images), name="preprocess_input")


def standardises_itself(network):
    """Whether the network has a layer that scales its input (keras Rescaling or Normalization), so that it takes raw
    images."""
    return any(isinstance(layer, (keras.layers.Rescaling, keras.layers.Normalization))
               for layer in network.submodules)
