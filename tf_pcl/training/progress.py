"""The output of a stage while it trains: one line on a terminal, else lines for each epoch."""

import collections
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Optional

from rich.console import Console
from rich.live import Live
from rich.text import Text

from tf_pcl.compat import keras
from tf_pcl.console import Unfailing
from tf_pcl.methods.cost import FORWARD_AND_BACKWARD

Logs = Optional[Mapping[str, float]]

# Seconds between two measurements of the speed, and so between two updates of the line.
EVERY = 0.5
# The speed is measured over this many of them: over the last five minutes, or as many steps.
_LOOKS = 600
# Seconds after the first step until the speed is known well enough.
_SETTLED = 3.0


class Plan(NamedTuple):
    """The amounts of a stage that its time depends on.

    Attributes:
      steps: training steps of all epochs.
      steps_per_epoch: training steps of an epoch.
      batch_size: images a step.
      epochs_per_test: epochs from one test to the next.
      test_images: images of a test.
      later: the costs of a step in the later stages, divided by that in this stage.
    """

    steps: int
    steps_per_epoch: int
    batch_size: int
    epochs_per_test: int = 1
    test_images: int = 0
    later: Sequence[float] = ()


class Pace:
    """Measures how fast a stage trains, and says how long the run will still take.

    The measurements are those of this process; the time of later stages is scaled by their cost.

    Args:
      plan: what the stage has to do.
      clock: a function that returns seconds.

    Attributes:
      first: the seconds of the first step, in which TensorFlow traces the graph; None before its
        end.
    """

    def __init__(self, plan: Plan, clock: Callable[[], float] = time.perf_counter):
        self.plan, self._clock = plan, clock
        self.first: Optional[float] = None
        self._looks: collections.deque = collections.deque(maxlen=_LOOKS)
        self._began = clock()
        self._next = 0.0
        self._test: Optional[float] = None
        self._tests = 0
        self._testing: Optional[float] = None
        self._in_tests = 0.0

    def begin(self) -> None:
        """Notes that the training begins."""
        self._began = self._clock()

    def stepped(self, step: int) -> bool:
        """Notes that a step is done; returns whether the speed was measured."""
        now = self._clock()
        if now < self._next:
            return False
        if self.first is None:
            self.first = now - self._began
        self._next = now + EVERY
        self._looks.append((now - self._in_tests, step))
        return True

    def look(self, step: int) -> None:
        """Measures the speed at once; `step`: the last one that is done."""
        self._next = 0.0
        self.stepped(step)

    def test_begins(self) -> None:
        """Notes that the training pauses for a test."""
        self._testing = self._clock()

    def test_ends(self) -> None:
        """Notes that the training goes on after a test, if there was one."""
        if self._testing is None:
            return
        took = self._clock() - self._testing
        self._testing = None
        self._in_tests += took
        # The first one includes tracing, so it does not count.
        if self._tests:
            self._test = took if self._test is None else min(self._test, took)
        self._tests += 1

    @property
    def measured(self) -> float:
        """The seconds of training over which the speed is measured."""
        return self._looks[-1][0] - self._looks[0][0] if self._looks else 0.0

    @property
    def images_per_second(self) -> Optional[float]:
        """Training images a second; None before the second measurement."""
        seconds = self._step_seconds()
        return self.plan.batch_size / seconds if seconds else None

    def left(self, step: int) -> Optional[float]:
        """Returns the seconds that the run will still take; None as long as they are not known.

        Args:
          step: the last one that is done.
        """
        seconds = self._step_seconds()
        if seconds is None or self.first is None:
            return None
        plan = self.plan
        test = self._test
        if test is None:
            test = seconds / FORWARD_AND_BACKWARD * plan.test_images / plan.batch_size
        time_of = lambda steps: (
            steps * seconds + test * -(-steps // (plan.steps_per_epoch * plan.epochs_per_test))
        )
        later = sum(plan.later) * time_of(plan.steps) + len(plan.later) * self.first
        return time_of(plan.steps - step) + later

    def _step_seconds(self) -> Optional[float]:
        if len(self._looks) < 2:
            return None
        (began, first), *_, (now, last) = self._looks
        return (now - began) / (last - first) if last > first and now > began else None


class Laps:
    """Adds up the seconds that a run spends on one thing after another.

    Args:
      clock: a function that returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock, self._began = clock, clock()
        self._seconds: dict[str, float] = {}

    def end(self, what: str) -> None:
        """Counts the time since the last call, or since the beginning, as spent on `what`."""
        now = self._clock()
        self._seconds[what] = self._seconds.get(what, 0.0) + now - self._began
        self._began = now

    def __str__(self) -> str:
        parts = ", ".join(f"{duration(spent)} to {what}" for what, spent in self._seconds.items())
        return f"{duration(sum(self._seconds.values()))}: {parts}"


def duration(seconds: float) -> str:
    """Returns a time for people, such as "95 s", "24 min", "3.4 h"."""
    for unit, size, most in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 48)):
        if seconds / size < most:
            return f"{seconds / size:.{1 if unit == 'h' else 0}f} {unit}"
    return f"{seconds / 86400:.1f} days"


class Epochs(keras.callbacks.ProgbarLogger):
    """Keras's lines of an epoch with three numbers: the loss, the training and the test error.

    The errors are those of the deployed exit. If that exit is not trained, the training error is
    that of the first exit.
    """

    def set_params(self, params: dict[str, Any]) -> None:
        # Show the epochs of the run: if a run resumes within an epoch, the rest of that epoch is a
        # separate `fit`.
        super().set_params({**params, "epochs": self.model.epochs})

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        super().on_train_batch_end(batch, self._shown(logs))

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        super().on_epoch_end(epoch, self._shown(logs))

    def _shown(self, logs: Logs) -> dict[str, float]:
        logs = logs or {}
        deployed = self.model.deployed_exit
        trained = deployed if f"error/{deployed}" in logs else self.model.exits[0]
        names = ("loss", f"error/{trained}", f"val_error/{deployed}")
        return {name: logs[name] for name in names if name in logs}


class Line:
    """The last line of a terminal, which is updated; other output goes above it.

    Args:
      console: the terminal.
    """

    def __init__(self, console: Console):
        self._console = console
        # Without a thread: only steps update the line.
        self._live = Live(
            console=console, auto_refresh=False, redirect_stderr=_is_terminal(sys.stderr)
        )

    def show(self, text: str) -> None:
        """Shows a text, cut to the width of the terminal."""
        if not self._live.is_started:
            self._live.start()
            # A killed process would leave its terminal without a cursor.
            self._console.show_cursor(True)
        self._live.update(Text(text, no_wrap=True, overflow="crop"), refresh=True)

    def end(self) -> None:
        """Leaves the line as it is; what follows goes below it."""
        self._live.stop()


def terminal() -> Optional[Console]:
    """Returns standard output as a terminal whose lines can be updated; None if it is not one.

    Writing to it never fails.
    """
    if not _is_terminal(sys.stdout):
        return None
    console = Console(file=Unfailing(sys.stdout))  # type: ignore[arg-type]
    return console if console.is_terminal and not console.is_dumb_terminal else None


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream is not None and stream.isatty())
    except ValueError:  # It is closed.
        return False


class Progress(keras.callbacks.Callback):
    """Prints once the time of the first step and the time left, and updates the line.

    As a context manager it ends the line.

    Args:
      pace: measures the speed.
      title: what is trained, for people.
      step: the step at which the training begins.
      tested: the split that every epoch is tested on, "test" or "validation".
      error: the last error of the deployed exit in percent; None before the first test.
      console: the terminal of the line; None for no line.
    """

    def __init__(
        self,
        pace: Pace,
        title: str,
        step: int = 0,
        tested: str = "test",
        error: Optional[float] = None,
        console: Optional[Console] = None,
    ):
        super().__init__()
        self.pace, self.title, self.step, self.tested = pace, title, step, tested
        self.error, self.line = error, Line(console) if console else None
        self.said = False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.line:
            self.line.end()

    def callbacks(self) -> list[keras.callbacks.Callback]:
        """Returns this callback, and that of the epochs' lines where there is no terminal."""
        return [self] if self.line else [Epochs("steps"), self]

    def on_train_begin(self, logs: Logs = None) -> None:
        if self.pace.first is None:
            self.pace.begin()
            if self.line:
                self.line.show(f"{self.title}: tracing the training step …")

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        self.pace.test_ends()

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        self.step += 1
        if self.pace.stepped(self.step):
            if self.pace.measured >= _SETTLED:
                self._say()
            self._show()

    def on_test_begin(self, logs: Logs = None) -> None:
        self.pace.look(self.step)
        self._say()
        self.pace.test_begins()
        self._show(", testing")

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        self.error = (logs or {}).get(f"val_error/{self.model.deployed_exit}", self.error)
        if not self.said:  # There was no test.
            self.pace.look(self.step)
        self._say()
        self._show()

    def on_train_end(self, logs: Logs = None) -> None:
        self.pace.test_ends()

    def _say(self) -> None:
        """Prints once what the first steps have shown."""
        if self.said or self.pace.first is None:
            return
        self.said = True
        speed, left = self.pace.images_per_second, self.pace.left(self.step)
        text = f"first step after {self.pace.first:.1f} s"
        if speed and left is not None:
            text += f"; about {duration(left)} left at {speed:,.0f} images/s"
        print(text, flush=True)

    def _show(self, doing: str = "") -> None:
        if not self.line:
            return
        plan, speed, left = self.pace.plan, self.pace.images_per_second, self.pace.left(self.step)
        epoch = -(-self.step // plan.steps_per_epoch)
        parts = [f"epoch {epoch}/{plan.steps // plan.steps_per_epoch}{doing}"]
        parts += [f"{speed:,.0f} images/s"] if speed else []
        parts += [f"{duration(left)} left"] if left else []
        parts += [] if self.error is None else [f"{self.tested} error {self.error:.2f} %"]
        self.line.show(f"{self.title}: {', '.join(parts)}")
