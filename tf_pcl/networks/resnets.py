"""ResNets (He et al., 2016): for CIFAR (section 4.2), for ImageNet (table 1), and wide ones.

Every function takes input_shape, (H, W, channels) of standardised images, and num_classes, C, and
returns a functional keras.Model from images [B, H, W, channels] to logits float32 [B, C]. The
sizes in the docstrings are for images of the size that the network is meant for; any other goes
too. Where a block changes the shape, its shortcut is a 1×1 convolution with BatchNorm (option B),
also in the CIFAR ResNets, whose paper pads with zeros (option A). He initialisation; every
BatchNorm's scale starts at 1.
"""

from collections.abc import Sequence
from typing import Callable, Optional

from tf_pcl.compat import keras, layers
from tf_pcl.networks.blocks import (
    basic_block,
    bottleneck,
    classifier,
    conv_norm_relu,
    pad,
    sections,
)


def resnet(
    blocks: Sequence[int],
    input_shape: tuple,
    num_classes: int,
    name: Optional[str] = None,
    *,
    block: Callable = basic_block,
    widths: Sequence[int] = (16,),
    stem: int = 16,
) -> keras.Model:
    """Builds a CIFAR ResNet: a 3×3 convolution, then sections at full, half, quarter … size.

    Args:
      blocks: the number of blocks in each section. The layers stage_1, stage_2, … end them.
      input_shape: (H, W, channels) of standardised images.
      num_classes: C.
      name: of the model.
      block, widths: the kind of block and its channels in the first section, as in blocks.sections.
      stem: channels of the first convolution.
    Returns:
      A functional keras.Model from images [B, H, W, channels] to logits float32 [B, C].
    """
    images = keras.Input(input_shape, name="images")
    x = sections(conv_norm_relu(images, stem, 3), blocks, block, widths)
    return keras.Model(images, classifier(x, num_classes), name=name)


def resnet8(input_shape: tuple, num_classes: int) -> keras.Model:
    """Builds blocks [1, 1, 1], for tests and tiny images."""
    return resnet([1] * 3, input_shape, num_classes, "resnet8")


def resnet14(input_shape: tuple, num_classes: int) -> keras.Model:
    """Builds blocks [2, 2, 2]."""
    return resnet([2] * 3, input_shape, num_classes, "resnet14")


def resnet20(input_shape: tuple, num_classes: int) -> keras.Model:
    """Builds blocks [3, 3, 3]."""
    return resnet([3] * 3, input_shape, num_classes, "resnet20")


def resnet32(input_shape: tuple, num_classes: int) -> keras.Model:
    """Builds the tables' ResNet-32: blocks [5, 5, 5], 472,756 parameters with 100 classes."""
    return resnet([5] * 3, input_shape, num_classes, "resnet32")


def resnet110(input_shape: tuple, num_classes: int) -> keras.Model:
    """Builds the tables' ResNet-110, 1,170,868 parameters with 100 classes.

    It has bottleneck blocks [12, 12, 12] of widths 16-32-64, with outputs four times as wide. The
    paper's own ResNet-110 has basic blocks and 1.7 million parameters.
    """
    return resnet(
        [12] * 3, input_shape, num_classes, "resnet110", block=bottleneck, widths=(16, 64)
    )


def wrn20_8(input_shape: tuple, num_classes: int) -> keras.Model:
    """Builds the tables' WRN-20-8, 6,871,220 parameters with 100 classes.

    It has bottleneck blocks [2, 2, 2] with outputs 64-128-256; the 3×3 convolutions are eight times
    as wide as a ResNet's, 128-256-512. It widens as torchvision's wide ResNets do; Zagoruyko and
    Komodakis (2016) widen basic blocks that begin with BatchNorm.
    """
    return resnet([2] * 3, input_shape, num_classes, "wrn20_8", block=bottleneck, widths=(128, 64))


def _imagenet(blocks, input_shape, num_classes, name, block, widths):
    images = keras.Input(input_shape, name="images")
    # After a ReLU no value is below the padding's zeros, so that they never win where −∞ would not.
    x = layers.MaxPooling2D(3, 2)(pad(conv_norm_relu(images, 64, 7, 2), 3))
    x = sections(x, blocks, block, widths)
    return keras.Model(images, classifier(x, num_classes), name=name)


def resnet18(input_shape: tuple, num_classes: int) -> keras.Model:
    """Builds ResNet-18, 11,689,512 parameters with 1000 classes.

    It has basic blocks [2, 2, 2, 2] after a 7×7 convolution and a max pooling of stride 2. It is
    for images of 224 pixels, whose last section is 7×7, and of 64, where it is 2×2.
    """
    return _imagenet([2, 2, 2, 2], input_shape, num_classes, "resnet18", basic_block, (64,))


def resnet50(input_shape: tuple, num_classes: int) -> keras.Model:
    """Builds ResNet-50, 25,557,032 parameters with 1000 classes.

    It has bottleneck blocks [3, 4, 6, 3] after the stem of resnet18. Strides are in the 3×3
    convolutions; the paper's are in the 1×1. It is for images of 224 and of 64 pixels.
    """
    return _imagenet([3, 4, 6, 3], input_shape, num_classes, "resnet50", bottleneck, (64, 256))
