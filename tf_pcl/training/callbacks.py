"""Keras callbacks: progress, the record of a run, saving on time and on signals."""

import os
import signal
import time

import numpy as np
import tensorflow as tf

from tf_pcl.compat import keras
from tf_pcl.errors import Stopped
from tf_pcl.training import workdir as workdirs


class Progress(keras.callbacks.ProgbarLogger):
    """Keras's progress line with the loss and the deployed exit's errors; in training the first's, if that is not trained."""

    def set_params(self, params):
        # Of the run: an epoch's rest, where a run goes on, is a fit of its own.
        super().set_params({**params, "epochs": self.model.epochs})

    def on_train_batch_end(self, batch, logs=None):
        super().on_train_batch_end(batch, self._shown(logs))

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, self._shown(logs))

    def _shown(self, logs):
        deployed = self.model.deployed_exit
        trained = deployed if f"error/{deployed}" in (logs or ()) else self.model.exits[0]
        names = ("loss", f"error/{trained}", f"val_error/{deployed}")
        return {name: logs[name] for name in names if name in logs}


class Record(keras.callbacks.Callback):
    """Writes metrics.csv and TensorBoard's logs after every epoch, results.json after every epoch that was tested.

    Args:
      workdir: the run's folder.
      rows: what metrics.csv holds of the epochs before.
      batch_size: images a step.
      describe: a function rows -> contents of results.json.
      seconds: wall-clock time spent before the first epoch, on earlier stages.
    """

    def __init__(self, workdir, rows, batch_size, describe, seconds=0.0):
        super().__init__()
        self.workdir, self.rows, self.batch_size, self.describe = (
            workdir,
            rows,
            batch_size,
            describe,
        )
        self.before = rows[-1]["wall_seconds"] if rows else seconds
        self.began = time.perf_counter()
        self.traced = False
        self.writers = {}

    def writer(self, split):
        """The TensorBoard writer of "train" or "test"."""
        if split not in self.writers:
            self.writers[split] = tf.summary.create_file_writer(
                os.path.join(self.workdir, "tensorboard", split)
            )
        return self.writers[split]

    def on_epoch_begin(self, epoch, logs=None):
        self.steps, self.since, self.trained = 0, time.perf_counter(), None

    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1
        if not self.traced:
            # The first step of a process includes the tracing of the graph.
            self.traced = True
            self.steps, self.since = 0, time.perf_counter()

    def on_test_begin(self, logs=None):
        self.trained = time.perf_counter() - self.since

    def on_epoch_end(self, epoch, logs=None):
        step = int(self.model.step.numpy())
        seconds = self.trained or time.perf_counter() - self.since
        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        row = {
            "epoch": epoch + 1,
            "step": step,
            "wall_seconds": self.before + time.perf_counter() - self.began,
            **({"images_per_second": self.steps * self.batch_size / seconds} if self.steps else {}),
            "learning_rate": float(keras.backend.get_value(optimizer.learning_rate)),
            **{name: float(value) for name, value in self.model.schedules().items()},
            **{name: float(value) for name, value in logs.items()},
        }
        self.rows.append(row)
        workdirs.write_rows(os.path.join(self.workdir, "metrics.csv"), self.rows)
        if any(name.startswith("val_") for name in row):
            workdirs.write_json(
                os.path.join(self.workdir, "results.json"), self.describe(self.rows)
            )
        for name, value in row.items():
            if name not in ("epoch", "step"):
                test = name.startswith("val_")
                with self.writer("test" if test else "train").as_default(step=step):
                    tf.summary.scalar(name[len("val_") :] if test else name, value)
        for writer in self.writers.values():
            writer.flush()

    def show_views(self, views, mean_side=32):
        """Writes a picture of the first 8 images' views to TensorBoard: a row an image, a column a view.

        Args:
          views: uint8 [B, m, H, W, C].
          mean_side: pixels; smaller views are enlarged to at least this side.
        """
        views = np.asarray(views[:8])
        factor = max(1, mean_side // views.shape[2])
        views = np.pad(
            views.repeat(factor, 2).repeat(factor, 3), [(0, 0), (0, 0), (1, 1), (1, 1), (0, 0)]
        )
        rows, columns, h, w, channels = views.shape
        grid = views.transpose(0, 2, 1, 3, 4).reshape(1, rows * h, columns * w, channels)
        with self.writer("train").as_default(step=0):
            tf.summary.image("views", grid)


class Save(keras.callbacks.Callback):
    """Saves checkpoints on time, and on SIGTERM and SIGINT, which end the run with Stopped.

    A signal takes effect when the step or the validation under way is done; a second one ends the process at once. An
    epoch's last checkpoint is saved after its row is in metrics.csv, so that every checkpoint's epochs are on record.

    Args:
      checkpoints: a Checkpoints.
      every: steps between checkpoints; the end of the run is always saved.
      step: where the run begins.
      total: the run's last step.
      title: which stage of the run this is, for people.
    """

    def __init__(self, checkpoints, every, step, total, title=""):
        super().__init__()
        self.of = f"{total} ({title})" if title else str(total)
        self.checkpoints, self.every, self.step, self.total = checkpoints, every, step, total
        self.signal, self.saved = None, step

    def __enter__(self):
        self.handlers = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        self.signal = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)

    def on_epoch_begin(self, epoch, logs=None):
        if self.step % self.model.steps_per_epoch:
            # The run goes on within an epoch, whose first part counts in the metrics; fit has just reset them.
            self.checkpoints.restore()

    def on_train_batch_end(self, batch, logs=None):
        self.step += 1
        if self.step % self.model.steps_per_epoch:
            self._save_if_due(logs)

    def on_epoch_end(self, epoch, logs=None):
        self._save_if_due(logs)

    def _save_if_due(self, logs):
        due = self.step % self.every == 0 or self.step == self.total
        if (due or self.signal) and not np.isfinite(logs["loss"]):
            raise Stopped(
                f"the loss is {logs['loss']} at step {self.step}: not saved; the newest checkpoint is of step "
                f"{self.saved}. Try a smaller --learning_rate."
            )
        if due or self.signal:
            path = self.checkpoints.save(self.step)
            self.saved = self.step
            if self.signal and self.step < self.total:
                raise Stopped(
                    f"stopped by {self.signal} at step {self.step} of {self.of}; saved {path}. The same "
                    "command goes on from there."
                )
