"""Labelled images: data sets by name, and tf.data pipelines of augmented training batches.

`datasets` has the table of data sets and `load`; each data set or family of them has a file of its
own (`digits`, `image_folder`, `tiny_imagenet`, `from_tfds`); `in_memory` has those of arrays and
tf.data.Datasets. `splits` chooses the images for training, validation and tests, and `storage`
keeps them. `image_files` decodes files, `labels_file` reads labels from a CSV file, `augmentations`
has the table of random augmentations and `pipeline` makes batches.
"""

from tf_pcl.data.augmentations import AUGMENTATIONS
from tf_pcl.data.datasets import DATASETS, ImageData, load, look
from tf_pcl.data.in_memory import from_arrays, from_dataset
from tf_pcl.data.pipeline import steps_per_epoch, test_batches, train_batches
