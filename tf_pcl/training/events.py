"""TensorBoard's files of a run: written, and read where metrics.csv was damaged."""

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf
from tensorboard.plugins.hparams import api as hparams

from tf_pcl.training.workdir import Workdir

SPLITS = ("train", "test", "validation")
# The folder of all, where the HParams page looks for what a run was asked.
_BOTH = ""
# TensorBoard sorts tags by name, and this is to be the first one. It repeats another tag, or the
# test error in results.json.
FIRST_TAG = "deployed_error"
# Columns of metrics.csv that are no scalars of TensorBoard.
_PLACES = ("epoch", "step")


class Events:
    """The event files of a run or stage, in which each tag has each step once.

    The files of an earlier process are replaced: metrics.csv holds all that they do.

    Args:
      workdir: the folder of the run or stage.
      rows: the rows of metrics.csv.
      deployed_exit: the name of the exit whose error stands first.
      settings: {name: value} of what the run was asked, for the HParams page.
      tested: what the errors of every epoch are of, "test" or "validation".
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
        self._writers: dict[str, Any] = {}
        old = [path for split in (_BOTH, *SPLITS) for path in _files(workdir, split)]
        with self._writer(_BOTH).as_default(step=0):
            hparams.hparams({k: _plain(v) for k, v in settings.items()}, trial_id=workdir.path)
        for row in rows:
            self.write(row)
        self.flush()
        # Not before the new ones are written.
        for path in old:
            os.remove(path)

    def write(self, row: Mapping[str, float]) -> None:
        """Writes a row of metrics.csv: what begins with val_ into `tested`, the rest into train."""
        for name, value in row.items():
            if name not in _PLACES:
                split = self.tested if name.startswith("val_") else "train"
                tag = name.removeprefix("val_")
                with self._writer(split).as_default(step=int(row["step"])):
                    if tag == f"error/{self.deployed_exit}":
                        tf.summary.scalar(FIRST_TAG, value)
                    tf.summary.scalar(tag, value)

    def write_tested(self, step: int, error: float) -> None:
        """Writes the test error of what is exported, where every epoch's is of validation images.

        Args:
          step: the step of the exported epoch.
          error: of the deployed exit, in percent.
        """
        with self._writer("test").as_default(step=step):
            tf.summary.scalar(FIRST_TAG, error)

    def write_image(self, name: str, image: Any, split: str = "train", step: int = 0) -> None:
        """Writes a picture, uint8 [H, W, C]."""
        with self._writer(split).as_default(step=step):
            tf.summary.image(name, image[None])

    def flush(self) -> None:
        """Hands what was written to the system."""
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
        return  # The end of a file that a killed process wrote; what was before it counts.


def _files(workdir: Workdir, split: str) -> list[str]:
    folder = glob.escape(workdir.tensorboard(split))
    return sorted(glob.glob(os.path.join(folder, "events.out.tfevents.*")))


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str)) else str(value)
