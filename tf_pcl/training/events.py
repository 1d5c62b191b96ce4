"""Writes TensorBoard's files of a run, and reads them if metrics.csv is damaged."""

import contextlib
import functools
import glob
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf
from absl import logging
from tensorboard.plugins.hparams import api as hparams

from tf_pcl.errors import one_line
from tf_pcl.training.workdir import Workdir

SPLITS = ("train", "test", "validation")
# The common folder, in which the HParams page finds the options of a run.
_BOTH = ""
# TensorBoard sorts tags by name, and this one comes first. It repeats another tag, or the test
# error in results.json.
FIRST_TAG = "deployed_error"
# Columns of metrics.csv that are not scalars of TensorBoard.
_PLACES = ("epoch", "step")
# The errors of a disk that cannot be written.
_REFUSED = (OSError, tf.errors.OpError)


class Events:
    """The event files of a run or stage, in which each tag has each step once.

    The files of an earlier process are replaced, since metrics.csv has all their values. If files
    cannot be written, a warning says so, and every later call tries to write all of them again.

    Args:
      workdir: the folder of the run or stage.
      rows: the rows of metrics.csv.
      deployed_exit: the name of the exit whose error comes first.
      settings: {name: value} of the run's options, for the HParams page.
      tested: the split that every epoch is tested on, "test" or "validation".
    """

    def __init__(
        self,
        workdir: Workdir,
        rows: Sequence[Mapping[str, float]],
        deployed_exit: str,
        settings: Mapping[str, Any],
        tested: str = "test",
    ):
        self.workdir, self.deployed_exit, self.tested = workdir, deployed_exit, tested
        self.settings = {name: _plain(value) for name, value in settings.items()}
        self._writers: dict[str, Any] = {}
        # Everything that was written, as functions that write it again.
        self._written: list[Callable[[], None]] = [
            functools.partial(self._write_row, row) for row in rows
        ]
        self._lacking = False
        self._try(self._write_all)

    def write(self, row: Mapping[str, float]) -> None:
        """Writes a row of metrics.csv: names with val_ into `tested`, the others into train."""
        self._keep(functools.partial(self._write_row, row))

    def write_image(self, name: str, image: Any, split: str = "train", step: int = 0) -> None:
        """Writes a picture, uint8 [H, W, C]."""
        self._keep(functools.partial(self._write_image, name, image, split, step))

    def write_tested(self, step: int, error: float) -> None:
        """Writes the test error of the exported network, if every epoch has a validation error.

        Args:
          step: the step of the exported epoch.
          error: of the deployed exit, in percent.
        """
        self._keep(functools.partial(self._write_tested, step, error))

    def flush(self) -> None:
        """Flushes the files."""
        self._try(self._flush)

    def _keep(self, write: Callable[[], None]) -> None:
        self._written.append(write)
        self._try(write)

    def _try(self, write: Callable[[], None]) -> None:
        """Calls a function that writes, or writes all again if an earlier call failed."""
        try:
            if self._lacking:
                self._write_all()
            else:
                write()
        except _REFUSED as e:
            if not self._lacking:
                logging.warning(
                    "TensorBoard's files in %s cannot be written (%s): the training goes on, and "
                    "their points will be written from metrics.csv, in a later epoch or when the "
                    "same command is given again",
                    self.workdir.path,
                    one_line(e),
                )
            self._lacking = True
        else:
            if self._lacking:
                logging.warning("TensorBoard's files in %s are complete again", self.workdir.path)
            self._lacking = False

    def _write_all(self) -> None:
        old = [path for split in (_BOTH, *SPLITS) for path in _files(self.workdir, split)]
        for writer in self._writers.values():
            with contextlib.suppress(*_REFUSED):
                writer.close()
        self._writers.clear()
        with self._writer(_BOTH).as_default(step=0):
            hparams.hparams(self.settings, trial_id=self.workdir.path)
        for write in self._written:
            write()
        self._flush()
        # The old files go only after the new ones are written.
        for path in old:
            os.remove(path)

    def _write_row(self, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            if name not in _PLACES:
                split = self.tested if name.startswith("val_") else "train"
                tag = name.removeprefix("val_")
                with self._writer(split).as_default(step=int(row["step"])):
                    if tag == f"error/{self.deployed_exit}":
                        tf.summary.scalar(FIRST_TAG, value)
                    tf.summary.scalar(tag, value)

    def _write_tested(self, step: int, error: float) -> None:
        with self._writer("test").as_default(step=step):
            tf.summary.scalar(FIRST_TAG, error)

    def _write_image(self, name: str, image: Any, split: str, step: int) -> None:
        with self._writer(split).as_default(step=step):
            tf.summary.image(name, image[None])

    def _flush(self) -> None:
        for writer in self._writers.values():
            writer.flush()

    def _writer(self, split: str) -> tf.summary.SummaryWriter:
        if split not in self._writers:
            self._writers[split] = tf.summary.create_file_writer(self.workdir.tensorboard(split))
        return self._writers[split]


def read(workdir: Workdir) -> dict[int, dict[str, float]]:
    """Returns {step: row of metrics.csv, without its epoch} of what the event files hold."""
    rows: dict[int, dict[str, float]] = {}
    for split in SPLITS:
        prefix = "" if split == "train" else "val_"
        for path in _files(workdir, split):
            for step, tag, value in _scalars(path):
                if tag != FIRST_TAG:
                    rows.setdefault(step, {"step": float(step)})[prefix + tag] = value
    return rows


def _scalars(path: str) -> Iterator[tuple[int, str, float]]:
    """Yields (step, tag, value) of the scalars in an event file."""
    try:
        for event in tf.compat.v1.train.summary_iterator(path):
            for value in event.summary.value:
                scalar = tf.make_ndarray(value.tensor)
                if scalar.dtype.kind == "f" and scalar.ndim == 0:
                    yield event.step, value.tag, float(scalar)
    except tf.errors.DataLossError:
        return  # A killed process has left the end damaged; the part before it counts.


def _files(workdir: Workdir, split: str) -> list[str]:
    folder = glob.escape(workdir.tensorboard(split))
    return sorted(glob.glob(os.path.join(folder, "events.out.tfevents.*")))


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str)) else str(value)
