"""A disk that fails within a write: what was there stays whole, and the same call works later."""

import json
import os

import pytest
import tensorflow as tf
from faults import failing_renames, full_disk, no_file_beyond
from helpers import SHAPE, noise, tiny_model

from tf_pcl.training import export
from tf_pcl.training import workdir as workdirs
from tf_pcl.training.checkpoints import Checkpoints
from tf_pcl.training.events import Events, read
from tf_pcl.training.workdir import Workdir

FAULTS = [lambda: no_file_beyond(40), full_disk, failing_renames]
ROWS = [{"epoch": e, "step": 7 * e, "loss": 1 / 3**e} for e in range(1, 9)]


def test_the_faults_are_what_they_say(tmp_path):
    path = tmp_path / "file"
    with no_file_beyond(10):
        with open(path, "wb", buffering=0) as f:
            assert f.write(b"0123456789abc") == 10  # A short write, and then none.
            with pytest.raises(OSError, match="File too large"):
                f.write(b"abc")
    with full_disk(), open(path, "w") as f, pytest.raises(OSError, match="No space left"):
        os.fsync(f)
    with failing_renames("nothing like this") as failed:
        os.replace(path, tmp_path / "new")
    assert not failed
    with failing_renames(times=1) as failed:
        with pytest.raises(OSError, match="Input/output"):
            os.replace(tmp_path / "new", path)
        os.replace(tmp_path / "new", path)
    assert len(failed) == 1
    path.write_bytes(b"0123456789abc")


@pytest.mark.parametrize("fault", FAULTS)
def test_metrics_and_results_are_the_old_or_the_new(fault, tmp_path):
    workdir = Workdir(str(tmp_path))
    workdir.write_rows(ROWS[:3])
    workdirs.write_json(workdir.results, {"epochs": 3})
    with fault():
        with pytest.raises(OSError):
            workdir.write_rows(ROWS)
        with pytest.raises(OSError):
            workdirs.write_json(workdir.results, {"epochs": list(range(99))})
    assert [row["epoch"] for row in workdir.read_rows()] == [1, 2, 3]
    assert json.loads((tmp_path / "results.json").read_text()) == {"epochs": 3}
    workdir.tidy()
    assert sorted(os.listdir(tmp_path)) == ["metrics.csv", "results.json"]
    workdir.write_rows(ROWS)
    assert len(workdir.read_rows()) == len(ROWS)


@pytest.mark.parametrize("fault", [lambda: no_file_beyond(600), full_disk, failing_renames])
def test_a_checkpoint_that_fails_leaves_those_before(fault, tmp_path):
    model = tiny_model()
    weight = model.trainable_weights[0]
    checkpoints = Checkpoints(model, str(tmp_path))
    for step in (1, 2):
        weight.assign(tf.fill(weight.shape, float(step)))
        checkpoints.save(step)
    weight.assign(tf.fill(weight.shape, 3.0))
    with fault(), pytest.raises((OSError, tf.errors.OpError)):
        checkpoints.save(3)
    again = Checkpoints(tiny_model(), str(tmp_path))
    newest = again.restore()
    # The files of a checkpoint are whole before Python's part, the list of them, begins.
    assert newest in (2, 3)
    restored = again.model.trainable_weights[0]
    assert float(tf.reduce_min(restored)) == float(tf.reduce_max(restored)) == newest
    again.tidy(newest)
    again.save(4)
    assert Checkpoints(model, str(tmp_path)).restore() == 4
    left = [n for n in os.listdir(tmp_path) if "temp" in n or n.endswith(".part")]
    assert not left


def test_points_of_tensorboard_that_could_not_be_written_are_made_good(tmp_path):
    workdir = Workdir(str(tmp_path))
    events = Events(workdir, ROWS[:1], "peer_1", {})
    with no_file_beyond(max(p.stat().st_size for p in tmp_path.glob("tensorboard/train/*"))):
        with pytest.raises(tf.errors.OpError, match="flush"):
            events.write(ROWS[1])
    assert set(read(workdir)) == {7}
    Events(workdir, ROWS, "peer_1", {})
    found = read(workdir)
    assert {step: row["loss"] for step, row in found.items()} == pytest.approx(
        {row["step"]: row["loss"] for row in ROWS}
    )


@pytest.mark.parametrize("fault", [lambda: no_file_beyond(2000), failing_renames])
def test_an_export_that_fails_leaves_the_one_before(fault, tmp_path):
    deployed = tiny_model().deployed()
    images = noise(2, *SHAPE)
    folder = export.export(deployed, tuple("0123456789"), str(tmp_path / "export"))
    expected = deployed(images).numpy()
    for weight in deployed.weights:
        weight.assign(weight + 1)
    with fault(), pytest.raises((OSError, tf.errors.OpError)):
        export.export(deployed, tuple("0123456789"), str(tmp_path / "export"))
    whole = tf.saved_model.load(folder).signatures["serving_default"](tf.constant(images))
    assert abs(whole["logits"].numpy() - expected).max() < 1e-5
    Workdir(str(tmp_path)).tidy()
    assert not [p for p in (tmp_path / "export").iterdir() if p.name.startswith("tmp")]
