"""Weights & Biases and MLflow: refused where they are missing, else given each epoch."""

import importlib.util
import json

import pytest

from tf_pcl.errors import UserError
from tf_pcl.options import Options
from tf_pcl.training import run, trackers
from tf_pcl.training.workdir import Workdir

INSTALLED = {name: importlib.util.find_spec(name) is not None for name in trackers.TRACKERS}
QUICK = dict(
    dataset="digits", network="resnet8", method="baseline", batch_size=256, train_examples=512
)


@pytest.mark.parametrize("name", trackers.TRACKERS)
def test_a_tracker_that_is_not_installed_is_refused_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"`{name}=true`.*`pip install {name}`") as refused:
        run.run(Options(**QUICK, **{name: True}, workdir=str(tmp_path / "run")))
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())
    trackers.check(Options(**QUICK))


class Written(trackers.Tracker):
    """A tracker that keeps what it was told, and fails when it is told of epoch 2."""

    name = "mlflow"
    told: list = []

    def begin(self, workdir, run, settings):
        self.told.append((run, settings))
        return run or "a run"

    def log(self, row, step):
        if row["epoch"] == 2:
            raise OSError("no server")
        self.told.append((row["deployed_error"], step))

    def end(self, good):
        self.told.append(good)


class Model:
    deployed_exit = "peer_1"


def test_a_tracker_gets_each_epoch_and_goes_on_with_its_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", Written)
    monkeypatch.setattr(Written, "told", [])
    workdir, rows = Workdir(str(tmp_path)), []
    for first in (1, 3):
        with trackers.tracked(["mlflow"], workdir, rows, {"epochs": 4}) as (tracker,):
            tracker.set_model(Model())
            for epoch in (first, first + 1):
                rows.append({"epoch": epoch, "step": 5 * epoch, "val_error/peer_1": 1.0 * epoch})
                tracker.on_epoch_end(epoch - 1)
    settings = {"epochs": 4}
    assert Written.told == [
        (None, settings),
        (1.0, 5),
        True,
        ("a run", settings),
        (3.0, 15),
        (4.0, 20),
        True,
    ]
    assert "mlflow has not accepted epoch 2: OSError: no server" in caplog.text
    with pytest.raises(KeyError), trackers.tracked(["mlflow"], workdir, rows, settings):
        raise KeyError
    assert Written.told[-1] is False
    monkeypatch.setattr(Written, "begin", lambda *args: 1 / 0)
    with pytest.raises(UserError, match="`mlflow=true`: it cannot log the run .ZeroDivisionError"):
        with trackers.tracked(["mlflow"], workdir, rows, settings):
            pass
    with trackers.tracked([], workdir, rows, settings) as none:
        assert none == []


if all(INSTALLED.values()):
    # Where the extras are not installed there is nothing to try.

    @pytest.mark.slow
    def test_whole_runs_offline(tmp_path, monkeypatch):
        import mlflow

        monkeypatch.setenv("WANDB_MODE", "offline")
        mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
        options = Options(**QUICK, epochs=2, wandb=True, mlflow=True, workdir=str(tmp_path / "run"))
        results = run.run(options)
        ids = json.loads((tmp_path / "run/trackers.json").read_text())
        assert set(ids) == set(trackers.TRACKERS)
        logged = mlflow.MlflowClient().get_run(ids["mlflow"])
        assert logged.data.params["method"] == "baseline" and logged.info.status == "FINISHED"
        assert logged.data.metrics["deployed_error"] == pytest.approx(
            results["deployed_error"], abs=1e-3
        )
        history = mlflow.MlflowClient().get_metric_history(ids["mlflow"], "loss")
        assert [metric.step for metric in history] == [2, 4]
        (offline,) = (tmp_path / "run/wandb").glob("offline-run-*")
        assert offline.name.endswith(ids["wandb"]) and list(offline.glob("*.wandb"))
        run.run(options)  # What is done is not logged again.
        assert len(list((tmp_path / "run/wandb").glob("offline-run-*"))) == 1
