"""Trains the runs of a grid, each in a process, and resumes where an earlier call stopped."""

import contextlib
import dataclasses
import functools
import io
import os
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tf_pcl.data import datasets
from tf_pcl.errors import Stopped, UserError, choose
from tf_pcl.options import Options
from tf_pcl.study import cost, process
from tf_pcl.study.grid import Cell, shared_stages
from tf_pcl.study.places import PLACES, Place
from tf_pcl.training.beside import drawn, same_test, same_training
from tf_pcl.training.report import ended, facts_of_files, versions
from tf_pcl.training.run import look_at_data
from tf_pcl.training.workdir import Workdir, read_json, saved_model


class Failure(NamedTuple):
    """A run that failed.

    Attributes:
      cell: the run.
      status: the exit status of its process.
      log: the file with its output.
    """

    cell: Cell
    status: int
    log: str


def check(cells: Sequence[Cell], alone: bool = True) -> None:
    """Checks that every run can use its workdir. Writes nothing.

    A run that an earlier call has left behind ends by itself after saving: it has two minutes for
    that.

    Args:
      cells: the runs.
      alone: whether no other process may work in the workdirs.

    Raises:
      UserError: if a workdir holds a run with other options, or another process works in it.
    """
    end = time.monotonic() + process.PATIENCE
    for cell in cells:
        workdir, said = Workdir(cell.path), False
        while alone and (owner := workdir.owner()) and time.monotonic() < end:
            if not said:
                print(f"{cell.title}: waiting for the end of the run there ({owner})", flush=True)
            said = True
            time.sleep(process.SECONDS)
        workdir.check(cell.options, alone)
        _check_data(workdir, cell)


def _check_data(workdir: Workdir, cell: Cell) -> None:
    """Checks that a run that is there has the images of these options, as far as headers tell.

    A run that is done is not started again, and would not see that its folder has other images now.
    """
    options = cell.options
    if not os.path.exists(workdir.data) or not datasets.find(options.dataset).reads_files:
        return
    seed = options.seed if drawn(options) else 0
    facts = _facts(dataclasses.replace(cost.division(options), seed=seed))
    if options.on_bad_image == "skip":
        # Only who decodes them knows which files are left out.
        facts = {name: facts[name] for name in ("classes", "image_shape")}
    workdir.check_data(facts, whole=False)
    old = workdir.read_data()
    # Facts that are not compared count as those of the run.
    if results_of(cell) and not (same_training(old, facts) and same_test(old, {**old, **facts})):
        raise UserError(
            "the run there is done, and had other images than the folder has now: give another "
            "workdir or the same data",
            parameter="workdir",
            value=workdir.path,
        )


@functools.cache
def _facts(options: Options) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()):  # The summary has been printed.
        return facts_of_files(*look_at_data(options))


def results_of(cell: Cell) -> Optional[dict[str, Any]]:
    """Returns the contents of results.json of a run that is done, else None."""
    return _results(cell.path, cell.options)


def _results(path: str, options: Options) -> Optional[dict[str, Any]]:
    """Returns the contents of results.json of a run or stage that is done, else None."""
    try:
        results = read_json(Workdir(path).results)
        return results if ended(results, options) and saved_model(path) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def run(cells: Sequence[Cell], runner: str = "local", jobs: Optional[int] = None) -> list[Failure]:
    """Trains the runs that are not done, each in a process of its own.

    A line is printed for every run that ends. On a terminal, a bar below shows how much of the
    whole cost is done and how much time is left.

    Args:
      cells: the runs, whose workdirs have passed `check`.
      runner: "local" for this machine, "ray" for a Ray cluster whose machines see the same folders
        and have the same Python with the same packages.
      jobs: how many runs train at the same time; by default one on this machine, and on a cluster
        one for each GPU or, where there is none, for each machine.

    Returns:
      The runs that failed; the others are done.

    Raises:
      UserError: if there is no such runner, or it cannot be used.
      Stopped: on Ctrl-C. The current runs have saved, and the same call resumes them.
    """
    place = PLACES[choose("runner", runner, PLACES, parameter="runner")](jobs)
    board = _Board(cells)
    try:
        if board.waiting:
            with place, board.bar:
                _train(board, place)
    except KeyboardInterrupt:
        names = ", ".join(cell.title for cell, *_ in board.running.values())
        raise Stopped(
            f"stopped in {names or 'no run'}; what was saved is kept, and the same command goes on "
            "from there"
        ) from None
    return board.failures


class _Board:
    """Shows the progress of the runs of a grid.

    Attributes:
      cells: all runs.
      waiting: those that were not done at the beginning.
      running: {name of its folder: (run, its GFLOP when it began, the time when it began)}.
      failures: those that failed.
      bar: the progress bar on a terminal.
    """

    def __init__(self, cells: Sequence[Cell]):
        self.cells = cells
        self.waiting = [cell for cell in cells if not results_of(cell)]
        self.running: dict[str, tuple[Cell, float, float]] = {}
        self.failures: list[Failure] = []
        self._spent = 0.0
        console = Console(highlight=False, markup=False, soft_wrap=True)
        self.say = console.print
        # Runs advance by epochs, which may take minutes.
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=3600,
            disable=not console.is_terminal,
        )
        self._task = self.bar.add_task("")
        for cell in cells:
            if results := results_of(cell):
                error = results["deployed_error"]
                self.say(f"{cell.title}: done already, test error {error:.2f} %, {cell.path}")

    def begin(self, cell: Cell) -> None:
        """Notes that a run begins."""
        took = _take_shared(cell, self.idle())
        if took:
            self.say(f"{cell.title}: takes {', '.join(took)} from an earlier run")
        self.running[cell.title] = cell, _done(cell), time.perf_counter()
        self.look()

    def idle(self) -> list[Cell]:
        """Returns the runs that are not running."""
        return [cell for cell in self.cells if cell.title not in self.running]

    def look(self) -> None:
        """Updates the progress bar."""
        spent = sum(_done(cell) - before for cell, before, _ in self.running.values())
        # What was done at the beginning took no time, and says nothing about the time left.
        failed = {failure.cell.title for failure in self.failures}
        left = sum(cell.gflop - _done(cell) for cell in self.waiting if cell.title not in failed)
        self.bar.update(
            self._task,
            description=", ".join(self.running) or "…",
            completed=self._spent + spent,
            total=self._spent + spent + left,
        )

    def end(self, title: str, status: int) -> None:
        """Notes that the process of a run has ended."""
        cell, before, began = self.running.pop(title)
        seconds = time.perf_counter() - began
        self._spent += _done(cell) - before
        results = results_of(cell)
        if status or not results:
            failure = Failure(cell, status, log_of(cell))
            self.failures.append(failure)
            self.say(f"{cell.title}: FAILED with status {status}: {_last_line(failure.log)}")
        else:
            self.say(f"{cell.title}: test error {results['deployed_error']:.2f} %, {seconds:.0f} s")
        self.look()


def log_of(cell: Cell) -> str:
    """Returns the path of the file with the output of a run's process."""
    return os.path.join(cell.path, "log.txt")


def _train(board: _Board, place: Place) -> None:
    waiting = list(board.waiting)
    while waiting or board.running:
        while place.free() and (cell := _next(waiting, board)):
            waiting.remove(cell)
            board.begin(cell)
            place.start(cell.title, cell.command(sys.executable), log_of(cell))
        for title, status in place.ended():
            board.end(title, status)
        board.look()


def _next(waiting: Sequence[Cell], board: _Board) -> Optional[Cell]:
    """Returns the first run that need not wait for another run's stage; None if all must wait."""
    under_way = [cell for cell, *_ in board.running.values()]
    for cell in waiting:
        coming = {name for one in under_way for name in shared_stages(cell, one)}
        if _begun(cell) or not coming - set(_trained(cell, board.idle())):
            return cell
    return None


def _take_shared(cell: Cell, others: Sequence[Cell]) -> list[str]:
    """Copies other runs' trained stages into a run that has not begun, and returns their names.

    The run finds such a stage done, as a resumed run does.

    Args:
      cell: the run.
      others: runs that are not running.
    """
    if _begun(cell):
        return []
    took = []
    for name, other in _trained(cell, others).items():
        whole = os.path.join(cell.path, name)
        if not os.path.exists(whole):
            its = os.path.join(other.path, name)
            shutil.copytree(its, whole + ".part", dirs_exist_ok=True)
            os.replace(whole + ".part", whole)
            took.append(name)
    return took


def _trained(cell: Cell, others: Sequence[Cell]) -> dict[str, Cell]:
    """Returns {folder of a stage of a run: another run that has trained it}."""
    return {
        name: other
        for other in others
        for name in shared_stages(cell, other)
        if _results(os.path.join(other.path, name), other.options) and _same_stack(other)
    }


def _begun(cell: Cell) -> bool:
    return os.path.exists(Workdir(cell.path).flags)


def _same_stack(cell: Cell) -> bool:
    """Returns whether a run was made on the stack of this process, with the same rounding."""
    try:
        Workdir(cell.path).check_versions(versions())
    except UserError:
        return False
    return True


def _done(cell: Cell) -> float:
    """Returns the GFLOP that a run has spent so far, by its epochs."""
    workdir = Workdir(cell.path)
    earlier = [workdir.of_stage(i, stage.name) for i, stage in enumerate(cell.stages[:-1], 1)]
    return sum(
        stage.gflop * min(1.0, _epochs(folder) / cell.options.epochs)
        for stage, folder in zip(cell.stages, [*earlier, workdir])
    )


def _epochs(workdir: Workdir) -> int:
    try:
        with open(workdir.metrics, "rb") as f:
            return max(0, f.read().count(b"\n") - 1)
    except OSError:
        return 0


def _last_line(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            lines = [line.strip() for line in f if line.strip()]
    except OSError as e:
        return f"no output was found: {e.strerror}"
    return lines[-1] if lines else "it printed nothing"
