"""What a method's training costs, by arithmetic."""

import functools

import tensorflow as tf

from tf_pcl.compat import keras
from tf_pcl.methods.distiller import Distiller
from tf_pcl.surgery.observe import flops, flops_while

# The backward pass of a layer computes two gradients, each of which costs as much as its forward
# pass.
FORWARD_AND_BACKWARD = 3


def training_flop(model: Distiller) -> float:
    """Returns the FLOP per image of a training step.

    These are 2 × multiply-adds of convolutions and dense layers, as `surgery.costs` counts them:
    three forward passes' worth of what is trained, and one forward pass of each teacher, for all
    views of the image. What the losses compute is left out.

    Args:
      model: a method around its networks, which is left as it is.
    """
    views = tf.zeros([1, model.num_views, *model.deployed().input_shape[1:]], tf.uint8)
    passes = (FORWARD_AND_BACKWARD, model.students), (1, model.teachers)
    return float(
        sum(
            weight * sum(flops_while(functools.partial(exits, views, True), model).values())
            for weight, exits in passes
        )
    )


def alone_flop(network: keras.Model) -> float:
    """Returns the FLOP per image of a step that trains a network alone."""
    return float(FORWARD_AND_BACKWARD * sum(flops(network).values()))
