"""TensorBoard's files of a run: written, and read where metrics.csv was damaged."""

import glob
import os
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from tf_pcl.training.workdir import Workdir

SPLITS = ("train", "test", "validation")
# Columns of metrics.csv that are no scalars of TensorBoard.
_PLACES = ("epoch", "step")


class Events:
    """The event files of a run or stage, in which each tag has each step once.

    The files of an earlier process are replaced: metrics.csv holds all that they do.

    Args:
      workdir: the folder of the run or stage.
      rows: the rows of metrics.csv.
      tested: what the errors of every epoch are of, "test" or "validation".
    """

    def __init__(self, workdir: Workdir, rows: Sequence[Mapping[str, float]], tested: str = "test"):
        self.workdir, self.tested = workdir, tested
        self._writers: dict[str, Any] = {}
        old = _files(workdir)
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
                with self._writer(split).as_default(step=int(row["step"])):
                    tf.summary.scalar(name.removeprefix("val_"), value)

    def write_image(self, name: str, image: Any) -> None:
        """Writes a picture uint8 [H, W, C] of the training."""
        with self._writer("train").as_default(step=0):
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
    for path in _files(workdir):
        prefix = "" if os.path.basename(os.path.dirname(path)) == "train" else "val_"
        try:
            for event in tf.compat.v1.train.summary_iterator(path):
                for value in event.summary.value:
                    scalar = tf.make_ndarray(value.tensor)
                    if scalar.dtype.kind == "f" and scalar.ndim == 0:
                        row = rows.setdefault(event.step, {"step": float(event.step)})
                        row[prefix + value.tag] = float(scalar)
        except tf.errors.DataLossError:
            continue  # The end of a file that a killed process wrote; what was before it counts.
    return rows


def _files(workdir: Workdir) -> list[str]:
    folders = [glob.escape(workdir.tensorboard(split)) for split in SPLITS]
    return [
        path
        for f in folders
        for path in sorted(glob.glob(os.path.join(f, "events.out.tfevents.*")))
    ]
