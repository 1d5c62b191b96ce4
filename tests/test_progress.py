"""What a run tells while it trains: the time left, one line on a terminal."""

import io
import os
import pty
import re
import select
import sys

import numpy as np
import pytest
import tensorflow as tf
from faults import BrokenPipe
from helpers import noise, tiny_model
from rich.console import Console

from tf_pcl.console import Unfailing
from tf_pcl.training import progress
from tf_pcl.training.progress import Pace, Plan, Progress


class Clock:
    """A clock that goes on by hand."""

    now = 100.0

    def __call__(self):
        return self.now


def paced(plan, steps, step=0.1, first=8.0):
    """A pace and its clock after so many steps."""
    clock = Clock()
    pace = Pace(plan, clock)
    pace.begin()
    clock.now += first
    pace.stepped(1)
    for i in range(2, steps + 1):
        clock.now += step
        pace.stepped(i)
    pace.look(steps)
    return pace, clock


def test_the_time_left_is_that_of_steps_and_tests():
    plan = Plan(steps=1000, steps_per_epoch=100, batch_size=32, test_images=96)
    pace, clock = paced(plan, 100)
    assert pace.first == 8.0 and pace.images_per_second == pytest.approx(320)
    # A test that was not timed yet costs a third of training as many images.
    assert pace.left(100) == pytest.approx(900 * 0.1 + 9 * 0.1)
    pace.test_begins()
    clock.now += 20  # It is traced, too, and says nothing of the others.
    pace.test_ends()
    assert pace.left(100) == pytest.approx(90 + 9 * 0.1)
    for step in range(101, 201):
        clock.now += 0.1
        pace.stepped(step)
    pace.test_begins()
    clock.now += 2
    pace.test_ends()
    pace.test_ends()
    # The test's time is not that of a step.
    assert pace.images_per_second == pytest.approx(320)
    assert pace.left(200) == pytest.approx(80 + 8 * 2)
    assert pace.left(1000) == 0


def test_the_stages_to_come_count_by_what_they_cost():
    plan = Plan(1000, 100, 32, epochs_per_test=5, test_images=0, later=(2.0, 0.5))
    pace, _ = paced(plan, 500)
    assert pace.left(500) == pytest.approx(50 + 2.5 * 100 + 2 * 8.0)


def test_nothing_is_known_after_one_step():
    pace, _ = paced(Plan(10, 5, 32), 1)
    assert pace.first == 8.0 and pace.images_per_second is None and pace.left(1) is None


def test_it_looks_twice_a_second_at_most():
    clock = Clock()
    pace = Pace(Plan(10**6, 1000, 32), clock)
    looks = 0
    for step in range(1, 10_001):
        clock.now += 0.001
        looks += pace.stepped(step)
    assert looks == pytest.approx(10 / progress.EVERY, abs=1)
    # What is long past no longer counts.
    for step in range(10_001, 20_001):
        clock.now += 0.1
        pace.stepped(step)
    assert pace.images_per_second == pytest.approx(320, rel=1e-3)


def test_times_for_people():
    told = [progress.duration(s) for s in (0.4, 99, 101, 5940, 9000, 172_000, 400_000)]
    assert told == ["0 s", "99 s", "2 min", "99 min", "2.5 h", "47.8 h", "4.6 days"]


def test_a_run_adds_up_what_its_time_is_spent_on():
    clock = Clock()
    laps = progress.Laps(clock)
    for what, spent in [("build", 2), ("train", 200), ("export", 3), ("train", 100)]:
        clock.now += spent
        laps.end(what)
    assert str(laps) == "5 min: 2 s to build, 5 min to train, 3 s to export"


def fit(console=None, epochs=2, steps=3):
    """Trains the smallest model and returns its Progress."""
    model = tiny_model()
    labels = np.arange(12) % 10
    batches = tf.data.Dataset.from_tensor_slices((noise(12, 1, 8, 8, 1), labels)).batch(4).repeat()
    told = Progress(Pace(Plan(epochs * steps, steps, 4)), "stage 1 of 2, tiny", console=console)
    with told:
        model.fit(
            batches,
            epochs=epochs,
            steps_per_epoch=steps,
            validation_data=(noise(8, 8, 8, 1), np.arange(8)),
            callbacks=told.callbacks(),
            verbose=0 if console else 2,
        )
    return told


def test_elsewhere_the_first_step_is_told_once_and_each_epoch_has_its_lines(capsys):
    assert progress.terminal() is None
    fit()
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if "step after" in line]
    number = r"[\d.,]+"
    said = rf"first step after {number} s; about \d+ s left at {number} images/s"
    assert len(lines) == 1 and re.fullmatch(said, lines[0])
    assert re.findall(r"^Epoch (\S+)$", out, re.M) == ["1/4", "2/4"]
    assert re.findall(r" - (\S+): ", out) == ["loss", "error/peer_1", "val_error/peer_1"] * 2


@pytest.fixture
def pseudo_terminal(monkeypatch):
    """A terminal of 70 columns whose encoding is ASCII: its stream and its reading end."""
    reading, writing = pty.openpty()
    stream = Unfailing(open(writing, "w", encoding="ascii", errors="replace"))
    for name, value in dict(TERM="xterm", COLUMNS="70", LINES="20").items():
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    yield stream, reading
    stream.close()
    os.close(reading)


def test_a_terminal_has_one_line(pseudo_terminal, monkeypatch):
    stream, reading = pseudo_terminal
    monkeypatch.setattr(sys, "stdout", stream)
    told = fit(progress.terminal())
    shown = b""
    while select.select([reading], [], [], 0.5)[0]:  # It comes in parts.
        shown += os.read(reading, 100_000)
    shown = shown.decode("ascii")
    assert "Epoch" not in shown and shown.count("\n") == 2
    line = re.compile(r"\x1b\[[\d?]*[A-Za-z]")
    (said, last) = line.sub("", shown).replace("\r\n", "\n").split("\n")[:2]
    assert said.split("\r")[-1].startswith("first step after")
    first, *_, last = last.split("\r")
    assert "stage 1 of 2, tiny: tracing the training step ?" in said
    assert re.match(r"stage 1 of 2, tiny: epoch 2/2, [\d,]+ images/s, test error", last)
    assert f"{told.error:.2f}" in last or len(last) == 70
    # The cursor is there, whatever ends the process.
    assert shown.index("\x1b[?25h") == shown.index("\x1b[?25l") + len("\x1b[?25l")
    assert sys.stdout is stream


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_terminal_that_cannot_go_back_is_none(term, pseudo_terminal, monkeypatch):
    monkeypatch.setattr(sys, "stdout", pseudo_terminal[0])
    assert progress.terminal()
    monkeypatch.setenv("TERM", term)
    assert progress.terminal() is None


def test_what_was_closed_is_no_terminal(monkeypatch):
    for stream in (None, io.StringIO()):
        monkeypatch.setattr(sys, "stdout", stream)
        assert progress.terminal() is None
    sys.stdout.close()
    assert progress.terminal() is None


def test_a_terminal_that_is_gone_ends_nothing(monkeypatch):
    console = Console(file=Unfailing(BrokenPipe()), force_terminal=True, width=70)
    assert fit(console, epochs=1).step == 3
