"""Data: sets by name (datasets), stateless augmentation (augment), tf.data pipelines (pipeline)."""

from tf_pcl.data.datasets import ImageData, load
from tf_pcl.data.pipeline import steps_per_epoch, test_batches, train_batches
