"""The handwritten digits that come with scikit-learn."""

from typing import Optional

import numpy as np
import tensorflow as tf

from tf_pcl.data import image_files
from tf_pcl.data.storage import Arrays

TEST_IMAGES = 360


def load(
    data_dir: Optional[str], image_size: Optional[int], on_bad_image: str
) -> tuple[list[str], Arrays, Arrays]:
    """Loads 1,797 grey images of 8×8 pixels: the first 1,437 to train on, the last 360 to test on.

    Args:
      data_dir: not used, the images are part of scikit-learn.
      image_size: resize the images to this many pixels a side; None leaves them as they are.
      on_bad_image: not used.

    Returns:
      The names of the classes, the training images, the test images.
    """
    del data_dir, on_bad_image
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    if image_size:
        images = image_files.resize(tf.constant(images), image_size).numpy()
    return (
        [str(name) for name in digits.target_names],
        Arrays(images[:-TEST_IMAGES], digits.target[:-TEST_IMAGES]),
        Arrays(images[-TEST_IMAGES:], digits.target[-TEST_IMAGES:]),
    )
