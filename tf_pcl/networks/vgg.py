"""VGG (Simonyan and Zisserman, 2015)."""

from tf_pcl.compat import keras, layers
from tf_pcl.networks.blocks import conv_norm_relu


def vgg16(input_shape, num_classes):
    """VGG-16 (table 1, column D) for CIFAR, with BatchNorm: 15,299,748 parameters with 100 classes.

    Five groups of 3×3 convolutions, 64-64, 128-128, 256×3, 512×3, 512×3, each convolution with
    bias, BatchNorm and ReLU, each group with a 2×2 max pooling, the layers stage_1 … stage_5; then
    the classifier, fully connected layers 512-512-C with ReLU between, no dropout. An image of 32
    is 1×1 after the last pooling; what is left of a larger one is averaged over the image, the
    layer `features`, and the pooling of an odd size rounds up, so that every size goes. He
    initialisation in front of a ReLU (the paper, without BatchNorm, starts from a shallower
    trained network), Glorot uniform at the end.

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
