"""Logs runs to Weights & Biases and MLflow, if the options ask for it.

Each is a callback that logs the row of metrics.csv after every epoch. The destination is set by the
packages' own environment variables (WANDB_MODE, WANDB_PROJECT, MLFLOW_TRACKING_URI, …).
"""

import contextlib
import importlib.util
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Optional

from absl import logging

from tf_pcl.compat import keras
from tf_pcl.errors import UserError, one_line
from tf_pcl.options import Options
from tf_pcl.training import workdir as workdirs
from tf_pcl.training.workdir import Workdir

PROJECT = "tf_pcl"


class Tracker(keras.callbacks.Callback):
    """Logs a run, or continues the one that an earlier process logged.

    Args:
      workdir: the folder of the run or stage, which keeps the tracker's id of the run.
      rows: the rows of metrics.csv, which gets a new one at the end of each epoch.
      settings: {name: value} of the run's options.
    """

    name = ""

    def __init__(
        self, workdir: Workdir, rows: Sequence[Mapping[str, float]], settings: Mapping[str, Any]
    ):
        super().__init__()
        self.rows = rows
        known = workdirs.read_json_if_any(workdir.trackers)
        run = self.begin(workdir, known.get(self.name), settings)
        workdirs.write_json(workdir.trackers, {**known, self.name: run})

    def on_epoch_end(self, epoch: int, logs: Optional[Mapping[str, float]] = None) -> None:
        row = dict(self.rows[-1])
        error = row.get(f"val_error/{self.model.deployed_exit}")
        if error is not None:
            row["deployed_error"] = error
        with self._warns(f"epoch {epoch + 1}"):
            self.log(row, int(row["step"]))

    def close(self, good: bool) -> None:
        """Ends the run as `end` does, or warns."""
        with self._warns("the end of the run"):
            self.end(good)

    @contextlib.contextmanager
    def _warns(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as e:  # A training must not fail because a server does not answer.
            logging.warning("%s has not accepted %s: %s", self.name, what, one_line(e))

    def begin(self, workdir: Workdir, run: Optional[str], settings: Mapping[str, Any]) -> str:
        """Begins a run, or continues the one with the id `run`; returns its id."""
        raise NotImplementedError

    def log(self, row: Mapping[str, float], step: int) -> None:
        """Logs an epoch."""
        raise NotImplementedError

    def end(self, good: bool) -> None:
        """Ends the run; `good`: whether the training reached its end."""
        raise NotImplementedError


class Wandb(Tracker):
    """Logs to Weights & Biases."""

    name = "wandb"

    def begin(self, workdir: Workdir, run: Optional[str], settings: Mapping[str, Any]) -> str:
        import wandb

        run = run or uuid.uuid4().hex[:12]
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=workdir.path,
            id=run,
            resume="allow",
            dir=workdir.path,
            config=dict(settings),
        )
        return run

    def log(self, row: Mapping[str, float], step: int) -> None:
        self.run.log(dict(row), step=step)

    def end(self, good: bool) -> None:
        self.run.finish(exit_code=0 if good else 1)


class Mlflow(Tracker):
    """Logs to MLflow."""

    name = "mlflow"

    def begin(self, workdir: Workdir, run: Optional[str], settings: Mapping[str, Any]) -> str:
        import mlflow

        self.mlflow = mlflow
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        active = mlflow.start_run(run_id=run, run_name=None if run else workdir.path)
        mlflow.log_params(dict(settings))
        return active.info.run_id

    def log(self, row: Mapping[str, float], step: int) -> None:
        self.mlflow.log_metrics(dict(row), step=step)

    def end(self, good: bool) -> None:
        self.mlflow.end_run("FINISHED" if good else "FAILED")


TRACKERS: dict[str, type[Tracker]] = {cls.name: cls for cls in (Wandb, Mlflow)}


def check(options: Options) -> None:
    """Checks that the packages of the chosen trackers are installed.

    Raises:
      UserError: if one is not.
    """
    for name in TRACKERS:
        if getattr(options, name) and importlib.util.find_spec(name) is None:
            raise UserError(
                f"it needs the package {name}, which is not installed: `pip install {name}`, or "
                "leave it out",
                parameter=name,
                value="true",
            )


@contextlib.contextmanager
def tracked(
    names: Sequence[str],
    workdir: Workdir,
    rows: Sequence[Mapping[str, float]],
    settings: Mapping[str, Any],
) -> Iterator[list[Tracker]]:
    """Yields the callbacks of these trackers, and ends their runs.

    Args:
      names: keys of TRACKERS.
      workdir, rows, settings: as in Tracker.

    Raises:
      UserError: if one cannot begin.
    """
    trackers: list[Tracker] = []
    good = False
    try:
        for name in names:
            try:
                trackers.append(TRACKERS[name](workdir, rows, settings))
            except Exception as e:
                raise UserError(
                    f"it cannot log the run ({one_line(e)}): set up {name}, or leave it out",
                    parameter=name,
                    value="true",
                ) from e
        yield trackers
        good = True
    finally:
        for tracker in trackers:
            tracker.close(good)
