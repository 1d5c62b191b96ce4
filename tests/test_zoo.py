"""The networks are those of the tables: exact parameter counts, forward cost, where the branch begins, any image size."""

import functools

import pytest
import tensorflow as tf
from tensorflow import keras

from tf_pcl import networks, surgery

CIFAR, IMAGENET = ((32, 32, 3), 100), ((224, 224, 3), 1000)
# Images and classes, trainable parameters, GFLOP of one image's forward pass, the trunk's output.
# For ImageNet they are torchvision's (1.814 and 4.089 G multiply-adds).
TABLE = {
    "resnet32": (CIFAR, 472_756, 0.138, (16, 16, 32)),
    "resnet110": (CIFAR, 1_170_868, 0.335, (16, 16, 128)),
    "vgg16": (CIFAR, 15_299_748, 0.628, (2, 2, 512)),
    "densenet40_12": (CIFAR, 188_092, 0.145, (8, 8, 60)),
    "wrn20_8": (CIFAR, 6_871_220, 2.046, (16, 16, 128)),
    "resnext29_2x64d": (CIFAR, 9_222_564, 2.822, (16, 16, 512)),
    "resnet18": (IMAGENET, 11_689_512, 3.628, (14, 14, 256)),
    "resnet50": (IMAGENET, 25_557_032, 8.178, (14, 14, 1024)),
}


@functools.cache
def build(name):
    return networks.build(name, *TABLE[name][0])


def trainable(model):
    return sum(w.shape.num_elements() for w in model.trainable_weights)


def flop(model):
    """2 × multiply-adds of convolutions and dense layers for one image, as TensorFlow's profiler counts its graph."""
    profiler = tf.compat.v1.profiler
    graph = (
        tf.function(model).get_concrete_function(tf.TensorSpec([1, *model.input_shape[1:]])).graph
    )
    options = (
        profiler.ProfileOptionBuilder(profiler.ProfileOptionBuilder.float_operation())
        .with_empty_output()
        .build()
    )
    node, total = profiler.profile(graph, cmd="op", options=options), 0
    while node.children:  # The view by operation is a chain.
        (node,) = node.children
        total += node.float_ops * (node.name in ("Conv2D", "DepthwiseConv2dNative", "MatMul"))
    return total


@pytest.mark.parametrize("name", TABLE)
def test_parameters(name):
    assert trainable(build(name)) == TABLE[name][1]


@pytest.mark.parametrize("name", TABLE)
def test_forward_cost(name):
    assert round(flop(build(name)) / 1e9, 3) == TABLE[name][2]


@pytest.mark.parametrize("name", TABLE)
def test_costs_agree_with_the_profiler(name):
    costs = surgery.costs(build(name))
    assert sum(costs.values()) == pytest.approx(flop(build(name)), rel=1e-3)
    assert costs["logits"] == 2 * build(name).get_layer("logits").kernel.shape.num_elements()


@pytest.mark.parametrize("name", TABLE)
def test_the_branch_is_the_last_stage_and_all_after_it(name):
    _, parameters, _, low = TABLE[name]
    trunk, branch = surgery.split(build(name))
    assert trunk.output_shape[1:] == branch.input_shape[1:] == low
    assert trainable(trunk) + trainable(branch) == parameters
    assert trunk.count_params() + branch.count_params() == build(name).count_params()


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_any_image_size_in_low_precision(name):
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    model = networks.build(name, (None, None, 1), 10)
    for size in [(64, 64), (8, 8), (9, 5)]:
        logits = model(tf.random.normal((2, *size, 1)))
        assert logits.shape == (2, 10) and logits.dtype == tf.float32
        assert tf.reduce_all(tf.math.is_finite(logits)) and tf.math.reduce_std(logits) > 0
    assert model.get_layer("features").compute_dtype == "bfloat16"
