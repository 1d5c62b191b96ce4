"""The zoo's networks are those of the tables: parameters, forward cost, cuts, any image size."""

import functools
import re

import numpy as np
import oracle
import pytest
import tensorflow as tf
from helpers import flop, slow_but
from tensorflow import keras

from tf_pcl import networks, surgery
from tf_pcl.errors import UserError
from tf_pcl.methods import PCL, Baseline, OKDDip
from tf_pcl.networks import blocks
from tf_pcl.training.assemble import Assembly

layers = keras.layers
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
OF_THE_TABLE = slow_but(TABLE, "resnet32", "resnet18")


@functools.cache
def build(name):
    return networks.build(name, *TABLE[name][0])


def trainable(model):
    return sum(w.shape.num_elements() for w in model.trainable_weights)


@pytest.mark.parametrize("name", OF_THE_TABLE)
def test_a_network_is_that_of_the_table(name):
    network, (_, parameters, gflop, low) = build(name), TABLE[name]
    assert trainable(network) == parameters
    counted, costs = flop(network), surgery.costs(network)
    assert round(counted / 1e9, 3) == gflop
    assert sum(costs.values()) == pytest.approx(counted, rel=1e-3)
    assert costs["logits"] == 2 * network.get_layer("logits").kernel.shape.num_elements()
    # The branch is the last stage and all after it.
    trunk, branch = surgery.split(network)
    assert trunk.output_shape[1:] == branch.input_shape[1:] == low
    assert trainable(trunk) + trainable(branch) == parameters
    assert trunk.count_params() + branch.count_params() == network.count_params()


@pytest.mark.slow
def test_methods_classify_the_512_pooled_channels_of_vgg16():
    network = lambda: networks.vgg16((32, 32, 1), 10)
    assert network().get_layer("features").output_shape == (None, 512)
    ensemble = PCL(network, peers=3).student.ensemble_classifier
    assert ensemble.count_params() == 3 * 512 * 10 + 10
    okddip = OKDDip(network, peers=2)
    assert okddip.query.kernel.shape == okddip.key.kernel.shape == (512, 64)


@pytest.mark.parametrize("name", slow_but(networks.NETWORKS, "resnet8", "vgg16", "resnet18"))
def test_any_image_size_in_low_precision(name):
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    model = networks.build(name, (None, None, 1), 10)
    for size in [(64, 64), (8, 8), (9, 5)]:
        logits = model(tf.random.normal((2, *size, 1)))
        assert logits.shape == (2, 10) and logits.dtype == tf.float32
        assert tf.reduce_all(tf.math.is_finite(logits)) and tf.math.reduce_std(logits) > 0
    assert model.get_layer("features").compute_dtype == "bfloat16"


@pytest.mark.parametrize("fan", slow_but(["fan_in", "fan_out"], "fan_out"))
def test_kernels_can_be_drawn_by_fan_in_or_fan_out(fan):
    drawn = networks.build("resnet18", *IMAGENET, initializer=fan)
    target = surgery.Target.of(drawn)
    for model in (target.new(), target.new()):
        kernels = [w.numpy() for w in model.weights if len(w.shape) == 4]
        assert len(kernels) == 20
        for k in kernels:
            size = k.shape[0] * k.shape[1] * k.shape[2 if fan == "fan_in" else 3]
            assert k.std() == pytest.approx((2 / size) ** 0.5, rel=0.05)
    assert np.abs(drawn.weights[0] - build("resnet18").weights[0]).max() > 0.01
    with pytest.raises(UserError, match="fan_in, fan_out"):
        networks.build("resnet8", (8, 8, 1), 10, initializer="fan")


def test_a_run_draws_its_network_as_asked(digits):
    kernels = {
        fan: Assembly(digits, initializer=fan)(Baseline, "resnet14").trainable_weights[0].numpy()
        for fan in ("fan_in", "fan_out")
    }
    # The first convolution reads 9 · 1 values and makes 9 · 16.
    assert kernels["fan_in"].std() == pytest.approx(4 * kernels["fan_out"].std(), rel=0.3)


class Published:
    """The blocks of the published PyTorch networks, in inference mode with the weights of ours.

    They are in NumPy float64.

    Args:
      model: a network whose layers were made in the order in which the blocks here use them.
    """

    def __init__(self, model):
        number = lambda layer: int(re.search(r"\d*$", layer.name)[0] or 0)
        self.weights = {
            kind: iter(
                [
                    [w.astype(np.float64) for w in layer.get_weights()]
                    for layer in sorted(model.layers, key=number)
                    if isinstance(layer, kind)
                ]
            )
            for kind in (layers.Conv2D, layers.BatchNormalization)
        }

    def conv_norm(self, x, stride=1):
        (kernel,) = next(self.weights[layers.Conv2D])
        x = oracle.convolve(x, kernel, stride)
        return oracle.batch_norm(x, *next(self.weights[layers.BatchNormalization]))

    def conv_norm_relu(self, x, stride=1):
        return np.maximum(self.conv_norm(x, stride), 0)

    def basic_block(self, x, stride=1, shortcut=False):
        y = self.conv_norm(self.conv_norm_relu(x, stride))
        return np.maximum(y + (self.conv_norm(x, stride) if shortcut else x), 0)

    def bottleneck(self, x, stride, paths):
        ys = [self.conv_norm_relu(self.conv_norm_relu(x), stride) for _ in range(paths)]
        y = self.conv_norm(np.concatenate(ys, axis=-1))
        return np.maximum(y + self.conv_norm(x, stride), 0)


@pytest.mark.parametrize("size", [(16, 16), (20, 9)])
def test_blocks_pad_as_the_published_networks(size):
    images = keras.Input((*size, 3))
    x = layers.MaxPooling2D(3, 2)(blocks.pad(blocks.conv_norm_relu(images, 8, 7, 2), 3))
    x = blocks.sections(x, [1, 2], blocks.basic_block, (8,))
    x = blocks.bottleneck(x, 8, 24, strides=2, paths=2)
    model = keras.Model(images, blocks.classifier(x, 7))
    rng = np.random.RandomState(0)
    for w in model.weights:
        fan_in = np.prod(w.shape[:-1])
        w.assign(
            rng.uniform(0.5, 1.5, w.shape) if fan_in == 1 else rng.randn(*w.shape) / fan_in**0.5
        )

    image = rng.randn(2, *size, 3)
    published = Published(model)
    x = oracle.max_pool(published.conv_norm_relu(image, 2))
    x = published.basic_block(published.basic_block(x), 2, shortcut=True)
    x = published.bottleneck(published.basic_block(x), 2, paths=2)
    kernel, bias = model.get_layer("logits").get_weights()
    want = x.mean((1, 2)) @ kernel + bias
    np.testing.assert_allclose(model(image), want, atol=1e-3 * np.abs(want).max())
    assert not any(list(left) for left in published.weights.values())


def test_the_pooling_of_a_large_images_stem_is_padded_alike():
    network = networks.resnet18((32, 32, 3), 10)
    stem = next(layer for layer in network.layers if isinstance(layer, layers.ReLU)).output
    pooled = next(
        layer for layer in network.layers if isinstance(layer, layers.MaxPooling2D)
    ).output
    before, after = keras.Model(network.input, [stem, pooled])(tf.random.normal((2, 32, 32, 3)))
    np.testing.assert_array_equal(after, oracle.max_pool(before.numpy()))
