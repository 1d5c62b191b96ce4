"""CIFAR ResNets (He et al., 2016, section 4.2)."""
from tensorflow import keras
from tensorflow.keras import layers


def conv(x, filters, size, strides=1):
    """Convolution without bias, He initialisation, same padding."""
    return layers.Conv2D(filters, size, strides, padding="same", use_bias=False, kernel_initializer="he_normal")(x)


def norm(x):
    """BatchNorm as the papers have it: statistics' momentum 0.9, epsilon 1e-5."""
    return layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x)


def classifier(x, num_classes):
    """Global average pooling (`features`) and a float32 fully connected layer (`logits`)."""
    x = layers.GlobalAveragePooling2D(name="features")(x)
    return layers.Dense(num_classes, dtype="float32", name="logits")(x)


def _basic_block(x, filters, strides, name=None):
    y = layers.ReLU()(norm(conv(x, filters, 3, strides)))
    y = norm(conv(y, filters, 3))
    if strides != 1 or x.shape[-1] != filters:
        x = norm(conv(x, filters, 1, strides))
    return layers.ReLU(name=name)(layers.Add()([x, y]))


def resnet(blocks, input_shape, num_classes, name=None):
    """A CIFAR ResNet of basic blocks, widths 16-32-64, 1×1 convolution shortcuts where the shape changes.

    Args:
      blocks: number of blocks in each of the three stages, whose outputs are the layers stage_1, stage_2, stage_3.
      input_shape: (H, W, channels) of standardised images.
      num_classes: C.
    Returns:
      A functional keras.Model from images [B, H, W, channels] to logits float32 [B, C].
    """
    images = keras.Input(input_shape, name="images")
    x = layers.ReLU()(norm(conv(images, 16, 3)))
    for stage, count in enumerate(blocks):
        for i in range(count):
            strides = 2 if stage and i == 0 else 1
            x = _basic_block(x, 16 * 2**stage, strides, f"stage_{stage + 1}" if i == count - 1 else None)
    return keras.Model(images, classifier(x, num_classes), name=name)


def resnet8(input_shape, num_classes):
    """Blocks [1, 1, 1], for tests and tiny images."""
    return resnet([1] * 3, input_shape, num_classes, "resnet8")


def resnet14(input_shape, num_classes):
    """Blocks [2, 2, 2]."""
    return resnet([2] * 3, input_shape, num_classes, "resnet14")


def resnet20(input_shape, num_classes):
    """Blocks [3, 3, 3]."""
    return resnet([3] * 3, input_shape, num_classes, "resnet20")


def resnet32(input_shape, num_classes):
    """Blocks [5, 5, 5]: the tables' ResNet-32, 472,756 parameters with 100 classes."""
    return resnet([5] * 3, input_shape, num_classes, "resnet32")
