"""DenseNet (Huang et al., 2017)."""

from tf_pcl.compat import keras, layers
from tf_pcl.networks.blocks import classifier, conv, norm, norm_relu_conv


def densenet40_12(input_shape: tuple, num_classes: int) -> keras.Model:
    """Builds DenseNet-BC, depth 40 and growth rate k = 12, 188,092 parameters with 100 classes.

    A 3×3 convolution makes 2k channels. Three dense blocks of 6 layers follow (section 3). Each
    layer is a 1×1 convolution to 4k and a 3×3 to k channels, which are added to the layer's input
    as further channels. Between blocks stands a transition, a 1×1 convolution to half the channels
    and a 2×2 average pooling. BatchNorm and ReLU precede every convolution but the first. The
    transitions are stage_1 and stage_2; the last block after BatchNorm and ReLU is stage_3. There
    is no dropout, which the paper has only for training without augmentation.

    Args:
      input_shape: (H, W, channels) of standardised images.
      num_classes: C.
    Returns:
      A functional keras.Model from images [B, H, W, channels] to logits float32 [B, C].
    """
    growth = 12
    images = keras.Input(input_shape, name="images")
    x = conv(images, 2 * growth, 3)
    for section in (1, 2, 3):
        for _ in range(6):
            new = norm_relu_conv(norm_relu_conv(x, 4 * growth, 1), growth, 3)
            x = layers.Concatenate()([x, new])
        if section < 3:
            x = norm_relu_conv(x, x.shape[-1] // 2, 1)
            x = layers.AveragePooling2D(padding="same", name=f"stage_{section}")(x)
    x = layers.ReLU(name="stage_3")(norm(x))
    return keras.Model(images, classifier(x, num_classes), name="densenet40_12")
