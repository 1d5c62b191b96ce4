"""Checkpoints of the whole state: model, teachers, optimizer, step, metrics."""

import os
import re

import tensorflow as tf
from absl import logging

from tf_pcl.errors import UserError


class Checkpoints:
    """The last checkpoints of a model, numbered by step.

    Args:
      model: a compiled Distiller.
      folder: where they are; made when the first is saved.
      keep: how many stay.
    """

    def __init__(self, model, folder, keep=3):
        self.checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
        self.folder, self.keep = folder, keep
        self._manager = None

    def save(self, step):
        """Saves the state after `step` steps and returns the checkpoint's path."""
        if self._manager is None:
            self._manager = tf.train.CheckpointManager(self.checkpoint, self.folder, self.keep)
        return self._manager.save(checkpoint_number=step)

    def restore(self):
        """Restores the newest checkpoint that can be read, warns of those that cannot, and returns its step; 0 if there
        is none; UserError if none can be read."""
        steps = self._steps()
        for step in steps:
            path = os.path.join(self.folder, f"ckpt-{step}")
            try:
                self.checkpoint.restore(path).assert_existing_objects_matched()
                return step
            except Exception as e:  # A damaged file raises whatever its damage leads to: IndexError, DataLossError, …
                logging.warning(
                    "checkpoint %s cannot be read (%s); trying the one before",
                    path,
                    " ".join(str(e).split())[:160],
                )
        if steps:
            raise UserError(
                f"none of the checkpoints in {self.folder} can be read: give another --workdir, or remove the "
                "folder to begin again"
            )
        return 0

    def _steps(self):
        # From the files and not from TensorFlow's index of them, which a crash can leave behind the files.
        names = os.listdir(self.folder) if os.path.isdir(self.folder) else []
        return sorted(
            (int(m.group(1)) for m in (re.fullmatch(r"ckpt-(\d+)\.index", n) for n in names) if m),
            reverse=True,
        )
