"""Checkpoints of the whole state: model, teachers, optimizer, random numbers, step, metrics."""

import os
import re
import shutil
from collections.abc import Iterable
from typing import Any, Callable, Optional

import numpy as np
import tensorflow as tf
from absl import logging

from tf_pcl import optimizer as optimizers
from tf_pcl.errors import UserError, one_line
from tf_pcl.surgery.graph import generators
from tf_pcl.training import workdir as workdirs


class Checkpoints:
    """The last checkpoints of a model, numbered by step.

    Args:
      model: a Distiller. If it is not compiled, only its weights are restored.
      folder: where the checkpoints are; it is made when the first one is saved.
      keep: how many of them stay.
      needed: a function from the step of a checkpoint that stays to the step of another one that
        must stay with it, or None.
    """

    def __init__(
        self,
        model: Any,
        folder: str,
        keep: int = 3,
        needed: Callable[[int], Optional[int]] = lambda step: None,
    ):
        state = {}
        if optimizer := getattr(model, "optimizer", None):
            state["optimizer"] = optimizer
            # Keras leaves those of its layers out.
            if random := generators(model):
                state["random"] = random
        self.checkpoint = tf.train.Checkpoint(model=model, **state)
        self.model, self.folder, self.keep, self.needed = model, folder, keep, needed

    def save(self, step: int) -> str:
        """Saves the state after `step` steps and returns the checkpoint's path."""
        os.makedirs(self.folder, exist_ok=True)
        path = self.checkpoint.write(self._path(step))
        self._keep_last(step)
        return path

    def not_finite(self) -> list[str]:
        """Returns the names of the variables with a value that is not finite."""
        return not_finite([*self.model.weights, *optimizers.state(self.model.optimizer)])

    def tidy(self, step: int) -> None:
        """Removes what a killed process left behind; `step`: that of the newest good checkpoint.

        Checkpoints of later steps, which could not be read, stay until the run saves these steps
        again.
        """
        for name in os.listdir(self.folder) if os.path.isdir(self.folder) else ():
            if re.fullmatch(r"ckpt-\d+_temp", name):
                shutil.rmtree(os.path.join(self.folder, name), ignore_errors=True)
            elif re.fullmatch(r".*\.tempstate\d+|checkpoint\.tmp.*", name):
                os.remove(os.path.join(self.folder, name))
        if step:
            self._keep_last(step)

    def restore(self, newest: Optional[int] = None) -> int:
        """Restores the newest checkpoint that can be read, with a warning for each that cannot.

        Args:
          newest: the last step that counts; by default all steps count.

        Returns:
          The checkpoint's step, or 0 if there is no checkpoint.

        Raises:
          UserError: if there are checkpoints and none of them can be read.
        """
        steps = [s for s in self._steps() if newest is None or s <= newest]
        for step in steps:
            path = self._path(step)
            try:
                self.read(step)
                return step
            # A damaged file raises anything: IndexError, DataLossError, …
            except Exception as e:
                logging.warning(
                    "checkpoint %s cannot be read (%s); trying the one before", path, one_line(e)
                )
        if steps:
            raise UserError(
                f"none of the checkpoints in {self.folder} can be read: give another `workdir`, or "
                "remove the folder to begin again"
            )
        return 0

    def read(self, step: int) -> None:
        """Restores the checkpoint of this step; a damaged one raises any exception."""
        status = self.checkpoint.read(self._path(step))
        status.assert_existing_objects_matched().expect_partial()

    def has(self, step: int) -> bool:
        """Returns whether there is a checkpoint of this step."""
        return step in self._steps()

    def _path(self, step: int) -> str:
        return os.path.join(self.folder, f"ckpt-{step}")

    def _keep_last(self, step: int) -> None:
        """Removes the checkpoints up to `step` that need not stay, and lists the others.

        The last ones stay, and those that are needed with them. The list is in TensorFlow's form.
        """
        steps = [s for s in self._steps() if s <= step]
        last = steps[: self.keep]
        stay = [s for s in steps if s in {*last, *map(self.needed, last)}]
        for name in os.listdir(self.folder):
            match = re.fullmatch(r"ckpt-(\d+)\.(index|data-\d+-of-\d+)", name)
            if match and int(match[1]) <= step and int(match[1]) not in stay:
                os.remove(os.path.join(self.folder, name))
        kept = [f"ckpt-{s}" for s in sorted(stay)]
        # For tf.train.latest_checkpoint, in the text form of CheckpointState.
        lines = [f'model_checkpoint_path: "{kept[-1]}"']
        lines += [f'all_model_checkpoint_paths: "{path}"' for path in kept]
        workdirs.write(os.path.join(self.folder, "checkpoint"), "\n".join(lines) + "\n")

    def _steps(self) -> list[int]:
        # Read the folder itself: after a crash TensorFlow's list of it can be out of date.
        names = os.listdir(self.folder) if os.path.isdir(self.folder) else []
        matches = (re.fullmatch(r"ckpt-(\d+)\.index", name) for name in names)
        return sorted((int(match[1]) for match in matches if match), reverse=True)


def not_finite(variables: Iterable[tf.Variable]) -> list[str]:
    """Returns the names of the variables with a value that is not finite."""
    floats = [v for v in variables if v.dtype.is_floating]
    finite = [tf.reduce_all(tf.math.is_finite(v)) for v in floats]
    return [v.name for v, good in zip(floats, np.array(tf.stack(finite))) if not good]
