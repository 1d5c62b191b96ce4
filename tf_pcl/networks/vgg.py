"""VGG (Simonyan and Zisserman, 2015)."""

from tf_pcl.compat import keras, layers
from tf_pcl.networks.blocks import conv_norm_relu


def vgg16(input_shape: tuple, num_classes: int) -> keras.Model:
    """Builds VGG-16 for CIFAR with BatchNorm, 15,299,748 parameters with 100 classes.

    Five groups of 3×3 convolutions (table 1, column D) have 64-64, 128-128, 256×3, 512×3 and 512×3
    channels. Each convolution has a bias, BatchNorm and ReLU. Each group ends in a 2×2 max
    pooling, the layers stage_1 … stage_5. The map that is left is averaged to the layer
    `features`; an image of 32 pixels is 1×1 there. The classifier consists of fully connected
    layers 512-512-C with ReLU between them, without dropout. Layers in front of a ReLU start as He
    et al. (2015) do; the paper, without BatchNorm, starts from a shallower trained network.

    Args:
      input_shape: (H, W, channels) of standardised images.
      num_classes: C.
    Returns:
      A functional keras.Model from images [B, H, W, channels] to logits float32 [B, C].
    """
    x = images = keras.Input(input_shape, name="images")
    for section, (count, filters) in enumerate([(2, 64), (2, 128), (3, 256), (3, 512), (3, 512)]):
        for _ in range(count):
            x = conv_norm_relu(x, filters, 3, use_bias=True)
        x = layers.MaxPooling2D(padding="same", name=f"stage_{section + 1}")(x)
    x = layers.GlobalAveragePooling2D(name="features")(x)
    for hidden in (1, 2):
        x = layers.Dense(
            512, activation="relu", kernel_initializer="he_normal", name=f"hidden_{hidden}"
        )(x)
    logits = layers.Dense(num_classes, dtype="float32", name="logits")(x)
    return keras.Model(images, logits, name="vgg16")
