"""The blocks of the networks: functions from a feature map [B, H, W, channels] to another.

Convolutions pad with zeros to the size ⌈H / strides⌉, so that no image is too small: (k − 1) / 2
pixels on all sides for an odd size k, as the published networks do. Keras's "same" does that only
at stride 1; at stride 2 it pads an even image only at the bottom and on the right, which would
shift a residual block's branch by a pixel against its 1×1 shortcut. Convolutions are initialised as
in He et al. (2015): normal, variance 2 / fan-in.
"""

from collections.abc import Sequence
from typing import Callable, Optional

import tensorflow as tf

from tf_pcl.compat import layers


def conv(
    x: tf.Tensor, filters: int, size: int, strides: int = 1, use_bias: bool = False
) -> tf.Tensor:
    """Convolves a map with kernels of an odd size, padded alike on all sides."""
    # At stride 1, Keras pads within the convolution; at larger strides it needs a layer for that.
    padding = "same"
    if size > 1 and strides > 1:
        x, padding = pad(x, size), "valid"
    return layers.Conv2D(
        filters, size, strides, padding=padding, use_bias=use_bias, kernel_initializer="he_normal"
    )(x)


def pad(x: tf.Tensor, size: int) -> tf.Tensor:
    """Puts zeros around a map, so that a window of odd `size` can be centred on every pixel."""
    return layers.ZeroPadding2D((size - 1) // 2)(x)


def norm(x: tf.Tensor) -> tf.Tensor:
    """Applies BatchNorm as in the papers: momentum of the statistics 0.9, epsilon 1e-5."""
    return layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x)


def conv_norm_relu(
    x: tf.Tensor, filters: int, size: int, strides: int = 1, use_bias: bool = False
) -> tf.Tensor:
    """Applies a convolution, BatchNorm and ReLU."""
    return layers.ReLU()(norm(conv(x, filters, size, strides, use_bias)))


def norm_relu_conv(x: tf.Tensor, filters: int, size: int) -> tf.Tensor:
    """Applies BatchNorm, ReLU and a convolution."""
    return conv(layers.ReLU()(norm(x)), filters, size)


def basic_block(
    x: tf.Tensor, filters: int, strides: int = 1, name: Optional[str] = None
) -> tf.Tensor:
    """Applies two 3×3 convolutions with a shortcut (He et al., 2016, figure 5, left).

    Args:
      x: [B, H, W, channels].
      filters: channels of both convolutions.
      strides: of the first.
      name: of the last layer.
    Returns:
      [B, ⌈H / strides⌉, ⌈W / strides⌉, filters].
    """
    y = conv_norm_relu(x, filters, 3, strides)
    return _residual(x, norm(conv(y, filters, 3)), strides, name)


def bottleneck(
    x: tf.Tensor,
    width: int,
    filters: int,
    strides: int = 1,
    name: Optional[str] = None,
    paths: int = 1,
) -> tf.Tensor:
    """Applies 1×1, 3×3 and 1×1 convolutions with a shortcut (He et al., 2016, figure 5, right).

    The stride is in the 3×3 convolution.

    Args:
      x: [B, H, W, channels].
      width: channels of the 3×3 convolution, and of the 1×1 in front of it.
      filters: channels of the output.
      strides: of the 3×3 convolution.
      name: of the last layer.
      paths: how many groups the 3×3 convolution has (Xie et al., 2017). Each path has its own 1×1
        and 3×3 of width / paths, and the last 1×1 takes their concatenation, as in their figure 3b.
        Figure 3c is the same function with the same parameters, but TensorFlow's grouped
        convolution is many times slower on the CPU and cannot be exported to ONNX.
    Returns:
      [B, ⌈H / strides⌉, ⌈W / strides⌉, filters].
    """
    ys = [
        conv_norm_relu(conv_norm_relu(x, width // paths, 1), width // paths, 3, strides)
        for _ in range(paths)
    ]
    y = layers.Concatenate()(ys) if paths > 1 else ys[0]
    return _residual(x, norm(conv(y, filters, 1)), strides, name)


def _residual(x, y, strides, name):
    """Returns ReLU(x + y); where shapes differ, x first passes a 1×1 convolution (option B)."""
    if strides != 1 or x.shape[-1] != y.shape[-1]:
        x = norm(conv(x, y.shape[-1], 1, strides))
    return layers.ReLU(name=name)(layers.Add()([x, y]))


def sections(
    x: tf.Tensor, blocks: Sequence[int], block: Callable, widths: Sequence[int]
) -> tf.Tensor:
    """Applies sections of residual blocks, which papers call stages.

    Each section but the first halves height and width and doubles the channels.

    Args:
      x: [B, H, W, channels].
      blocks: the number of blocks in each section. The layers stage_1, stage_2, … end them.
      block: basic_block or bottleneck.
      widths: the channels that `block` takes in the first section.
    Returns:
      The last section's output.
    """
    for section, count in enumerate(blocks):
        for i in range(count):
            strides = 2 if section and i == 0 else 1
            name = f"stage_{section + 1}" if i == count - 1 else None
            x = block(x, *(width * 2**section for width in widths), strides=strides, name=name)
    return x


def classifier(x: tf.Tensor, num_classes: int) -> tf.Tensor:
    """Applies global average pooling (`features`) and a float32 fully connected layer (`logits`).

    The latter starts Glorot uniform.
    """
    x = layers.GlobalAveragePooling2D(name="features")(x)
    return layers.Dense(num_classes, dtype="float32", name="logits")(x)
