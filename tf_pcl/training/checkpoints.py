"""Checkpoints of the whole state: model, teachers, optimizer, step, metrics."""

import os
import re
from typing import Any, Optional

import tensorflow as tf
from absl import logging

from tf_pcl.errors import UserError


class Checkpoints:
    """The last checkpoints of a model, numbered by step.

    Args:
      model: a compiled Distiller.
      folder: where the checkpoints are; it is made when the first one is saved.
      keep: how many of them stay.
    """

    def __init__(self, model: Any, folder: str, keep: int = 3):
        self.checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
        self.folder, self.keep = folder, keep
        self._manager: Optional[tf.train.CheckpointManager] = None

    def save(self, step: int) -> str:
        """Saves the state after `step` steps and returns the checkpoint's path."""
        if self._manager is None:
            self._manager = tf.train.CheckpointManager(self.checkpoint, self.folder, self.keep)
        return self._manager.save(checkpoint_number=step)

    def restore(self) -> int:
        """Restores the newest checkpoint that can be read, with a warning of each that cannot.

        Returns:
          The checkpoint's step, or 0 if there is no checkpoint.

        Raises:
          UserError: if there are checkpoints and none of them can be read.
        """
        steps = self._steps()
        for step in steps:
            path = os.path.join(self.folder, f"ckpt-{step}")
            try:
                self.checkpoint.restore(path).assert_existing_objects_matched()
                return step
            # A damaged file raises whatever its damage leads to: IndexError, DataLossError, …
            except Exception as e:
                logging.warning(
                    "checkpoint %s cannot be read (%s); trying the one before",
                    path,
                    " ".join(str(e).split())[:160],
                )
        if steps:
            raise UserError(
                f"none of the checkpoints in {self.folder} can be read: give another `workdir`, or "
                "remove the folder to begin again"
            )
        return 0

    def _steps(self) -> list[int]:
        # Read the folder itself: after a crash TensorFlow's index of it can be out of date.
        names = os.listdir(self.folder) if os.path.isdir(self.folder) else []
        matches = (re.fullmatch(r"ckpt-(\d+)\.index", name) for name in names)
        return sorted((int(match[1]) for match in matches if match), reverse=True)
