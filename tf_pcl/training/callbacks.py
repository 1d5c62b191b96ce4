"""Keras callbacks: the record of a run, its early end, checkpoints regularly and on signals."""

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, Optional

import numpy as np

from tf_pcl import optimizer as optimizers
from tf_pcl.compat import keras
from tf_pcl.console import noted_signal
from tf_pcl.errors import Stopped
from tf_pcl.training import pictures
from tf_pcl.training import workdir as workdirs
from tf_pcl.training.checkpoints import Checkpoints
from tf_pcl.training.events import Events
from tf_pcl.training.workdir import Workdir

# Smaller views are enlarged in pictures, by a whole number, but not beyond this many pixels.
_VIEW_SIDE = 32

Row = dict[str, float]
Logs = Optional[Mapping[str, float]]


class Record(keras.callbacks.Callback):
    """Writes metrics.csv and TensorBoard's logs after every epoch, results.json after every test.

    Args:
      workdir: the folder of the run or stage.
      rows: the rows of metrics.csv of the epochs before.
      events: TensorBoard's files of the run or stage.
      batch_size: images a step.
      describe: a function rows -> contents of results.json.
      seconds: the wall-clock time of the earlier stages.
    """

    def __init__(
        self,
        workdir: Workdir,
        rows: list[Row],
        events: Events,
        batch_size: int,
        describe: Callable[[list[Row]], Any],
        seconds: float = 0.0,
    ):
        super().__init__()
        self.workdir, self.rows, self.batch_size = workdir, rows, batch_size
        self.describe = describe
        self.before = rows[-1]["wall_seconds"] if rows else seconds
        self.began = time.perf_counter()
        self.traced = False
        self.events = events

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        self.steps, self.since = 0, time.perf_counter()
        self.trained: Optional[float] = None

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        self.steps += 1
        if not self.traced:
            # The first step of a process traces the graph, so the time begins after it.
            self.traced = True
            self.steps, self.since = 0, time.perf_counter()

    def on_test_begin(self, logs: Logs = None) -> None:
        self.trained = time.perf_counter() - self.since

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        row = self._row(epoch, logs or {})
        self.rows.append(row)
        self.workdir.write_rows(self.rows)
        if any(name.startswith("val_") for name in row):
            workdirs.write_json(self.workdir.results, self.describe(self.rows))
        self.events.write(row)
        self.events.flush()

    def show_views(self, views: Any) -> None:
        """Writes a picture of the first 8 images' views to TensorBoard: a row per image.

        Args:
          views: uint8 [B, m, H, W, C].
        """
        views = np.asarray(views[:8])
        factor = max(1, _VIEW_SIDE // views.shape[2])
        views = np.pad(
            views.repeat(factor, 2).repeat(factor, 3), [(0, 0), (0, 0), (1, 1), (1, 1), (0, 0)]
        )
        rows, columns, h, w, channels = views.shape
        grid = views.transpose(0, 2, 1, 3, 4).reshape(rows * h, columns * w, channels)
        self.events.write_image("views", grid)

    def show_answers(self, step: int, counts: Any, classes: Sequence[str]) -> None:
        """Writes pictures of the trained network's predictions for the test images.

        Args:
          step: the last step.
          counts: how many images of class i are taken for class j, int [K, K].
          classes: the names of the classes.
        """
        for draw in (pictures.confusion_matrix, pictures.class_errors):
            image = pictures.pixels(draw(counts, classes))
            # By this name they come after the errors, also on TensorBoard's first page.
            self.events.write_image(f"test_images/{draw.__name__}", image, "test", step)
        self.events.flush()

    def _row(self, epoch: int, logs: Mapping[str, float]) -> Row:
        seconds = self.trained or time.perf_counter() - self.since
        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        return {
            "epoch": epoch + 1,
            "step": int(self.model.step.numpy()),
            "wall_seconds": self.before + time.perf_counter() - self.began,
            **({"images_per_second": self.steps * self.batch_size / seconds} if self.steps else {}),
            "learning_rate": optimizers.current_rate(optimizer),
            **{name: float(value) for name, value in self.model.schedules().items()},
            **{name: float(value) for name, value in logs.items()},
        }


class StopEarly(keras.callbacks.Callback):
    """Ends the training after an epoch when a function of the rows of metrics.csv says so.

    Args:
      ends: the function.
      rows: the rows, which Record adds to.
    """

    def __init__(self, ends: Callable[[list[Row]], bool], rows: list[Row]):
        super().__init__()
        self.ends, self.rows = ends, rows

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        if self.ends(self.rows):
            self.model.stop_training = True


class Save(keras.callbacks.Callback):
    """Saves checkpoints regularly, and on SIGTERM and SIGINT, which end the run with Stopped.

    As a context manager it handles these signals. A signal takes effect after the current step or
    test; a second one ends the process at once. An epoch's last checkpoint is saved after its row
    is in metrics.csv, so that metrics.csv has all epochs of every checkpoint.

    Args:
      checkpoints: where to save.
      every: steps between checkpoints; the end of the run is always saved.
      step: the step at which the run begins.
      total: the run's last step.
      title: which stage of the run this is, for people; "" if there is one stage.
      of_all: a function that gathers a number of all processes, if there are several. All of them
        stop at the same step, whichever got the signal.
      last: whether no stage follows: a signal in the last step then ends the run as planned.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        every: int,
        step: int,
        total: int,
        title: str = "",
        of_all: Optional[Callable[[int], set[int]]] = None,
        last: bool = True,
    ):
        super().__init__()
        self.of_all, self.last = of_all, last
        self.of = f"{total} ({title})" if title else str(total)
        self.checkpoints, self.every, self.step, self.total = checkpoints, every, step, total
        self.signal = noted_signal()
        self.saved = step

    def __enter__(self) -> "Save":
        self.handlers = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Optional[FrameType]) -> None:
        self.signal = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        if self.step % self.model.steps_per_epoch:
            # The run resumes within an epoch. The metrics include the first part of that epoch, and
            # `fit` has just reset them.
            self.checkpoints.restore(self.step)

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        self.step += 1
        self._refuse_wrong(logs or {})
        if self.step % self.model.steps_per_epoch:
            self._save_if_due()

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        self._refuse_wrong(logs or {})
        self._save_if_due()

    def _refuse_wrong(self, logs: Mapping[str, float]) -> None:
        """Ends the run if a loss or an error is not finite; terms are checked first."""
        for name in sorted(logs, key=lambda name: not name.startswith("loss/")):
            if not np.isfinite(logs[name]):
                raise self._gone_wrong(f"{name} is {logs[name]}")

    def _gone_wrong(self, what: str) -> Stopped:
        return Stopped(
            f"{what} at step {self.step}, which was not saved; the newest checkpoint is that of "
            f"step {self.saved}. Try a smaller `learning_rate` in another `workdir`."
        )

    def _needed(self) -> bool:
        """Returns whether the epoch that has just ended needs a checkpoint that stays."""
        between = self.step % self.model.steps_per_epoch == 0
        return between and self.checkpoints.needed(self.step) == self.step

    def _save_if_due(self) -> None:
        stops = bool(self.signal)
        if self.of_all:
            stops = 1 in self.of_all(int(stops))
        ends = self.step == self.total or self.model.stop_training
        if not (stops or self.step % self.every == 0 or ends or self._needed()):
            return
        if wrong := self.checkpoints.not_finite():
            raise self._gone_wrong(
                f"{len(wrong)} of the variables, {wrong[0]} first, are not finite"
            )
        path = self.checkpoints.save(self.step)
        self.saved = self.step
        if stops and not (ends and self.last):
            by = self.signal or "a signal to another worker"
            raise Stopped(
                f"stopped by {by} at step {self.step} of {self.of}; saved {path}. The same command "
                "goes on from there."
            )
