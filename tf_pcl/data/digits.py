"""The handwritten digits that come with scikit-learn."""

import numpy as np
import tensorflow as tf

from tf_pcl.data import image_files
from tf_pcl.data.splits import Loaded, Request
from tf_pcl.data.storage import Arrays

TEST_IMAGES = 360


def load(request: Request) -> Loaded:
    """Loads 1,797 grey images of 8×8 pixels: the first 1,437 to train on, the last 360 to test on.

    Only the image size of the request matters: the images are part of scikit-learn.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    if request.image_size:
        images = image_files.resize(tf.constant(images), request.image_size).numpy()
    return Loaded(
        [str(name) for name in digits.target_names],
        Arrays(images[:-TEST_IMAGES], digits.target[:-TEST_IMAGES]),
        Arrays(images[-TEST_IMAGES:], digits.target[-TEST_IMAGES:]),
    )
