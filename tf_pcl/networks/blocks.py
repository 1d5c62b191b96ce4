"""What the networks are built from: functions from a feature map [B, H, W, channels] to another.

Convolutions pad with zeros to the size ⌈H / strides⌉, so that no image is too small: (k − 1) / 2
pixels on all sides for an odd size k, as the published networks do. Keras's "same" is that at
stride 1 alone; at stride 2 it pads an even image at the bottom and on the right only, so that a
residual block's branch would look one pixel beside its 1×1 shortcut. Convolutions are initialised
as He et al. (2015): normal, variance 2 / fan-in.
"""

from tf_pcl.compat import layers


def conv(x, filters, size, strides=1, use_bias=False):
    """Convolution of an odd size, padded alike on all sides, without a bias unless asked for."""
    # At stride 1 Keras pads within the convolution; at a larger one a layer of its own is needed.
    padding = "same"
    if size > 1 and strides > 1:
        x, padding = pad(x, size), "valid"
    return layers.Conv2D(
        filters, size, strides, padding=padding, use_bias=use_bias, kernel_initializer="he_normal"
    )(x)


def pad(x, size):
    """Zeros around a map, so that a window of odd `size` can be centred on every pixel."""
    return layers.ZeroPadding2D((size - 1) // 2)(x)


def norm(x):
    """BatchNorm as the papers have it: statistics' momentum 0.9, epsilon 1e-5."""
    return layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x)


def conv_norm_relu(x, filters, size, strides=1, use_bias=False):
    """Convolution, BatchNorm, ReLU."""
    return layers.ReLU()(norm(conv(x, filters, size, strides, use_bias)))


def norm_relu_conv(x, filters, size):
    """BatchNorm, ReLU, convolution."""
    return conv(layers.ReLU()(norm(x)), filters, size)


def basic_block(x, filters, strides=1, name=None):
    """Two 3×3 convolutions and a shortcut (He et al., 2016, figure 5, left).

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


def bottleneck(x, width, filters, strides=1, name=None, paths=1):
    """1×1, 3×3 and 1×1 convolutions and a shortcut (He et al., 2016, figure 5, right), the stride in the 3×3.

    Args:
      x: [B, H, W, channels].
      width: channels of the 3×3 convolution, and of the 1×1 in front of it.
      filters: channels that come out.
      strides: of the 3×3 convolution.
      name: of the last layer. paths: the 3×3 convolution is grouped into so many (Xie et al.,
        2017), written as their figure 3b: each path has its own 1×1 and 3×3 of width / paths, and
        the last 1×1 takes their concatenation. The same function and the same parameters as figure
        3c, but TensorFlow's grouped convolution is many times slower on the CPU and cannot be
        exported to ONNX.
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
    """ReLU(x + y); where the shape changes, x through a 1×1 convolution and BatchNorm (option B)."""
    if strides != 1 or x.shape[-1] != y.shape[-1]:
        x = norm(conv(x, y.shape[-1], 1, strides))
    return layers.ReLU(name=name)(layers.Add()([x, y]))


def sections(x, blocks, block, widths):
    """Sections of residual blocks; each but the first halves height and width and doubles the channels.

    Args:
      x: [B, H, W, channels]. blocks: number of blocks in each section; the sections' outputs are
        the layers stage_1, stage_2, …
      block: basic_block or bottleneck.
      widths: what the block takes for its channels in the first section.
    Returns:
      The last section's output.
    """
    for section, count in enumerate(blocks):
        for i in range(count):
            strides = 2 if section and i == 0 else 1
            name = f"stage_{section + 1}" if i == count - 1 else None
            x = block(x, *(width * 2**section for width in widths), strides=strides, name=name)
    return x


def classifier(x, num_classes):
    """Global average pooling (`features`) and a float32 fully connected layer (`logits`), Glorot uniform initialisation."""
    x = layers.GlobalAveragePooling2D(name="features")(x)
    return layers.Dense(num_classes, dtype="float32", name="logits")(x)
