"""ResNeXt (Xie et al., 2017)."""

import functools

from tf_pcl.compat import keras
from tf_pcl.networks.blocks import bottleneck
from tf_pcl.networks.resnets import resnet


def resnext29_2x64d(input_shape: tuple, num_classes: int) -> keras.Model:
    """Builds the CIFAR ResNeXt of section 5.3, 9,222,564 parameters with 100 classes.

    Its cardinality is 2 and its base width 64: a 3×3 convolution of 64 channels, then three
    sections of 3 blocks, whose 3×3 convolutions have 2 groups of 64-128-256 and whose outputs are
    256-512-1024. Where the shape changes, the shortcut is a 1×1 convolution with BatchNorm.

    Args:
      input_shape: (H, W, channels) of standardised images.
      num_classes: C.
    Returns:
      A functional keras.Model from images [B, H, W, channels] to logits float32 [B, C].
    """
    return resnet(
        [3] * 3,
        input_shape,
        num_classes,
        "resnext29_2x64d",
        stem=64,
        block=functools.partial(bottleneck, paths=2),
        widths=(2 * 64, 256),
    )
