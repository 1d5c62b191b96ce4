"""ResNeXt (Xie et al., 2017)."""

import functools

from tf_pcl.networks.blocks import bottleneck
from tf_pcl.networks.resnets import resnet


def resnext29_2x64d(input_shape, num_classes):
    """The CIFAR ResNeXt of section 5.3 with cardinality 2 and base width 64, 9,222,564 parameters with 100 classes.

    A 3×3 convolution of 64 channels, three sections of 3 blocks, their 3×3 convolutions of 2
    groups of 64-128-256, outputs 256-512-1024, whose shape changes by a 1×1 convolution with
    BatchNorm. He initialisation.

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
