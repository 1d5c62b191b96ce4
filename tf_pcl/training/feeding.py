"""Whether the training step waits for its data."""

import time
from typing import Any, Optional

import tensorflow as tf

from tf_pcl.compat import keras
from tf_pcl.data.datasets import ImageData
from tf_pcl.data.storage import MEMORY_LIMIT, Arrays

# Measurements of fewer seconds say little, and a smaller share is not worth a warning.
SECONDS, SHARE = 10.0, 0.2


class Feeding(keras.callbacks.Callback):
    """Measures the share of the time that the training step waits for data, and warns once.

    The time when a batch is made is noted; the batch may then wait in buffers. A step has waited
    for its batch if it began before that time. So nothing is measured within the step, which does
    not become slower. The share is judged once, at the end of the first epoch after which SECONDS
    have been measured.

    Args:
      data: the data set.
    """

    def __init__(self, data: ImageData):
        super().__init__()
        self.data = data
        self.made: dict[int, float] = {}
        self.waited = self.spent = 0.0
        self.told = False

    def noted(self, batches: tf.data.Dataset) -> tf.data.Dataset:
        """Returns the batches for the next `fit`, and notes when each of them is made.

        Args:
          batches: a data set of this process, whose elements are tuples.
        """
        made: dict[int, float] = {}
        self.made, self.number = made, 0

        def note(number: Any) -> Any:
            made[int(number)] = time.perf_counter()
            return number

        def with_note(number: tf.Tensor, batch: tuple) -> tuple:
            tf.numpy_function(note, [number], tf.int64)
            return batch

        return batches.enumerate().map(with_note).prefetch(1)

    @property
    def share(self) -> Optional[float]:
        """The share of the time that steps have waited, in [0, 1]; None before SECONDS."""
        return self.waited / self.spent if self.spent >= SECONDS else None

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.began = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        made = self.made.pop(self.number, None)
        self.number += 1
        # The first step includes the tracing of the graph and the start of the pipeline.
        if self.told or made is None or self.number == 1:
            return
        spent = time.perf_counter() - self.began
        self.spent += spent
        self.waited += min(max(made - self.began, 0.0), spent)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self.told or self.share is None:
            return
        self.told = True
        if self.share >= SHARE:
            print(f"WARNING: {starving(self.share, self.data)}", flush=True)


def starving(share: float, data: ImageData) -> str:
    """Returns a sentence for people about a step that waits for data, and what to do.

    Args:
      share: the share of the time that it waits, in [0, 1].
      data: the data set.
    """
    if isinstance(data.train, Arrays):
        remedy = "Images are augmented too slowly: give the run more CPU cores, or augment less."
    else:
        remedy = (
            "Images are read and decoded too slowly: give the run more CPU cores or a faster disk, "
            "or store the images at the size that is trained on. Up to "
            f"{MEMORY_LIMIT >> 30} GiB of decoded images are read once and kept in memory."
        )
    return f"the training step waits for data {100 * share:.0f} % of the time. {remedy}"
