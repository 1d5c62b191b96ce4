"""Which epoch is exported and when a run ends early, by validation images."""

import json
import signal
import time

import numpy as np
import pytest
import tensorflow as tf
from helpers import noise, other, with_labels
from test_train_py import final_weights, finish, metrics, start

from tf_pcl.errors import UserError
from tf_pcl.methods import METHODS
from tf_pcl.options import Options
from tf_pcl.training import events, report, run, selection
from tf_pcl.training.checkpoints import Checkpoints
from tf_pcl.training.selection import Selection
from tf_pcl.training.workdir import Workdir

ERROR = "val_error/peer_1"


def rows(*errors):
    """Rows of epochs of 3 steps; None for an epoch without a test."""
    return [
        {"epoch": e, "step": 3 * e, **({} if error is None else {ERROR: error})}
        for e, error in enumerate(errors, 1)
    ]


def test_the_first_of_the_lowest_errors_is_exported():
    table = rows(9.0, None, 7.5, 8.0, 7.5, 8.0)
    best, last = Selection(ERROR, best=True), Selection(ERROR)
    assert best.exported(table)["epoch"] == 3 and last.exported(table)["epoch"] == 6
    needed = [best.step_needed(table, step) for step in (2, 3, 8, 9, 15, 18)]
    assert needed == [None, 3, 3, 9, 9, 9] and last.step_needed(table, 18) is None


def test_a_run_ends_when_the_error_has_not_improved_for_so_many_epochs():
    errors = (9.0, 7.5, 8.0, 7.5, 8.0, 7.0)
    ends = lambda patience, *seen: Selection(ERROR, patience=patience).ends(rows(*seen))
    for patience in (1, 2, 3):
        told = [ends(patience, *errors[:n]) for n in range(1, 6)]
        assert told == [n - 2 >= patience for n in range(1, 6)]
    assert not ends(2, 9.0, 7.5, 8.0, None) and ends(2, 9.0, 7.5, 8.0, None, 8.0)
    assert not ends(1, *errors) and not Selection(ERROR).ends(rows(1.0, *[2.0] * 99))


def test_rows_from_a_file_decide_as_those_of_the_run(tmp_path):
    """A run that goes on must not take an equal error of a later epoch for a lower one."""
    workdir = Workdir(str(tmp_path))
    for wrong in range(1, 360):
        error = float(np.float32(100 * wrong) / np.float32(360))
        workdir.write_rows(rows(error))
        table = [*workdir.read_rows(), *rows(None, error)[1:]]
        assert Selection(ERROR, best=True).exported(table)["epoch"] == 1


def test_the_best_checkpoint_stays_beside_the_last_three(tmp_path):
    model = METHODS["baseline"](other((8, 8, 1), 10))
    model.compile(epochs=9, steps_per_epoch=3)
    model.optimizer.build(model.trainable_weights)
    table, errors = [], (9.0, 6.0, 7.0, 7.0, 5.0, 6.0, 6.0, 6.0, 6.0)
    best = Selection(ERROR, best=True)
    checkpoints = Checkpoints(
        model, str(tmp_path), needed=lambda step: best.step_needed(table, step)
    )
    there = lambda: sorted(int(p.stem[5:]) // 3 for p in tmp_path.glob("*.index"))
    kept = []
    for epoch in range(1, 10):
        table[:] = rows(*errors[:epoch])
        checkpoints.save(3 * epoch)
        kept.append(there())
    # Whichever of the last three can be read, the best one until then is there.
    assert kept[4] == [2, 3, 4, 5] and kept[5] == [2, 4, 5, 6]
    assert kept[6:] == [[5, 6, 7], [5, 6, 7, 8], [5, 7, 8, 9]]
    checkpoints.tidy(27)
    assert there() == [5, 7, 8, 9] and checkpoints.has(15) and not checkpoints.has(18)


def test_the_test_images_choose_no_epoch():
    data = with_labels(noise(4, 8, 8, 1), np.arange(4))
    selection.check(Options(), data)
    for given in (dict(export="best"), dict(early_stop=3)):
        with pytest.raises(UserError, match="chosen by the test images.*`validation_examples="):
            selection.check(Options(**given), data)
    selection.check(Options(export="last"), data)


@pytest.mark.parametrize("value, text", [(0.0, "more than 0"), (1.5, "whole number"), (-3, "more")])
def test_counts_and_shares(value, text):
    with pytest.raises(UserError, match=text):
        Options(validation_examples=value)
    # A number from the command line is a float, and the same run.
    assert Options(test_examples=20.0).as_flags()["test_examples"] == "20"
    assert Options(test_examples=0.2).as_flags()["test_examples"] == "0.2"


FLAGS = [
    *("--train_examples=200", "--validation_examples=140", "--batch_size=50", "--epochs=40"),
    *("--export=best", "--early_stop=3", "--checkpoint_every=3epochs"),
]
BASELINE = ["--method=baseline"]


def exported(workdir):
    folder = str(workdir / "export/saved_model/1")
    return [v.numpy() for v in tf.saved_model.load(folder).variables]


@pytest.mark.slow
def test_killed_and_resumed_exports_the_same_best_epoch(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code, out, err = finish(whole, *FLAGS, method=BASELINE)
    assert code == 0, err
    results = json.loads((whole / "results.json").read_text())
    best, epochs = results["exported_epoch"], results["epochs"]
    table = Workdir(str(whole)).read_rows()
    assert best == epochs - 3 and epochs < 40 and results["ended_early"]
    assert f"Ended after epoch {epochs} of 40" in out and len(table) == epochs
    assert results["validation_error"]["peer_1"] == pytest.approx(table[best - 1][ERROR], abs=1e-4)
    assert results["validation_error"]["peer_1"] == min(r[ERROR] for r in table).__round__(4)
    assert results["deployed_error"] == results["test_error"]["peer_1"]
    assert results["error"] == results["test_error"] and results["best_deployed_error"] is None
    board = whole / "tensorboard"
    assert {p.name for p in board.iterdir() if p.is_dir()} == {"train", "validation", "test"}
    # Of the test images there are pictures of the end, and the error of what is exported.
    (tested,) = [one for p in (board / "test").iterdir() for one in events._scalars(str(p))]
    assert tested[:2] == (best * 4, "deployed_error")
    assert tested[2] == pytest.approx(results["deployed_error"], abs=1e-3)
    # What is exported is the best epoch, not the last.
    same = lambda a, b: all(np.array_equal(x, y) for x, y in zip(a, b)) and len(a) == len(b)
    last = final_weights(whole, epochs * 4)
    assert not any(np.array_equal(w, exported(whole)[-1]) for w in last.values())

    process = start(broken, *FLAGS, method=BASELINE)
    while not (broken / "metrics.csv").exists() or len(Workdir(str(broken)).read_rows()) < 4:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (broken / "export").exists()
    code, out, err = finish(broken, *FLAGS, method=BASELINE)
    assert code == 0 and "goes on at step" in out, err
    assert metrics(broken) == metrics(whole)
    assert same(exported(broken), exported(whole))
    again = json.loads((broken / "results.json").read_text())
    for name in ("validation_error", "test_error", "exported_epoch", "epochs", "ended_early"):
        assert again[name] == results[name]


@pytest.mark.slow
def test_every_stage_exports_its_best_epoch_and_teaches_with_it(tmp_path, monkeypatch, capsys):
    options = Options(
        dataset="digits",
        network="helpers:other",
        method="ban",
        generations=2,
        epochs=6,
        learning_rate=0.5,
        train_examples=200,
        validation_examples=100,
        batch_size=50,
        export="best",
        workdir=str(tmp_path),
    )
    # It asks a fresh process, which other tests do.
    monkeypatch.setattr(run.export, "check", lambda *arguments: None)
    results = run.run(options)
    first = json.loads((tmp_path / "1-generation_0/results.json").read_text())
    table = Workdir(str(tmp_path / "1-generation_0")).read_rows()
    errors = [row["val_error/generation_0"] for row in table]
    assert first["exported_epoch"] == 1 + int(np.argmin(np.float32(errors)))
    # As an ancestor it errs on every epoch's validation images as at its best.
    ancestor = [row["val_error/generation_0"] for row in Workdir(str(tmp_path)).read_rows()]
    np.testing.assert_allclose(ancestor, min(errors), atol=1e-3)
    assert results["error"]["generation_0"] == pytest.approx(first["deployed_error"], abs=1e-3)
    assert "the best of validation" in report.table(results)
    assert json.loads((tmp_path / "data.json").read_text())["validation images"] == 100
    before = exported(tmp_path)
    line = "The run was done before, nothing was trained now: test error "
    assert line not in capsys.readouterr().out
    again = run.run(options)
    told = capsys.readouterr().out
    assert told.count(": done\n") == 2
    line += f"{results['deployed_error']:.2f} % (generation_1), results in {tmp_path}/results.json"
    assert line in told.splitlines()
    assert {**again, "wall_seconds": 0} == {**results, "wall_seconds": 0}
    np.testing.assert_array_equal(exported(tmp_path)[-1], before[-1])
