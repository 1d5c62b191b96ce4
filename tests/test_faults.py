"""A disk that fails within a write: what was there stays whole, and the same call works later."""

import errno
import json
import os

import pytest
import tensorflow as tf
from faults import failing, failing_renames, full_disk, no_file_beyond
from helpers import SHAPE, noise, tiny_model

from tf_pcl.training import callbacks, export
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


def values(workdir):
    return {step: row["loss"] for step, row in read(workdir).items()}


def told(caplog):
    """What was said of TensorBoard's files."""
    return [line for line in caplog.messages if "TensorBoard's files" in line]


def expected(rows):
    return pytest.approx({row["step"]: row["loss"] for row in rows})


def test_tensorboard_s_points_that_could_not_be_written_are_made_good(tmp_path, caplog):
    workdir = Workdir(str(tmp_path))
    events = Events(workdir, ROWS[:1], "peer_1", {})
    events.write_image("views", noise(4, 4, 3))
    events.flush()
    with no_file_beyond(100):
        for row in ROWS[1:4]:
            events.write(row)
            events.flush()
    (line,) = told(caplog)
    assert "cannot be written (" in line and "\n" not in line
    assert set(values(workdir)) == {7}
    # The next epoch writes what was lacking, and each point stands once.
    events.write(ROWS[4])
    events.flush()
    assert values(workdir) == expected(ROWS[:5])
    (path,) = tmp_path.glob("tensorboard/train/*")
    written = [
        v.tag for e in tf.compat.v1.train.summary_iterator(str(path)) for v in e.summary.value
    ]
    assert written.count("loss") == 5 and written.count("views") == 1
    assert len(told(caplog)) == 2 and "are complete again" in told(caplog)[1]


def test_a_run_outlives_tensorboard_s_disk_and_its_next_start_writes_all(tmp_path, caplog):
    workdir = Workdir(str(tmp_path))
    with no_file_beyond(0):
        events = Events(workdir, ROWS[:1], "peer_1", {})
        events.write(ROWS[1])
        events.flush()
    assert len(told(caplog)) == 1 and not values(workdir)
    Events(workdir, ROWS, "peer_1", {})
    assert values(workdir) == expected(ROWS)


def test_a_training_outlives_tensorboard_s_disk_alone(tmp_path, caplog):
    """Of what an epoch writes, TensorBoard's files may be lacking, and nothing else."""
    model = tiny_model()
    record = lambda: callbacks.Record(
        workdir,
        [],
        Events(workdir, [], model.deployed_exit, {}),
        8,
        lambda rows: {"rows": len(rows)},
    )
    workdir = Workdir(str(tmp_path))
    with failing(tf.summary, "scalar", errno.EIO) as failed:
        one = record()
        one.set_model(model)
        one.on_epoch_begin(0)
        one.on_epoch_end(0, {"loss": 0.5, "val_error/exit_1": 50.0})
    assert failed and len(told(caplog)) == 1
    assert [row["loss"] for row in workdir.read_rows()] == [0.5] and not read(workdir)
    assert json.loads((tmp_path / "results.json").read_text()) == {"rows": 1}
    for name in "metrics.csv", "results.json":
        with failing_renames(name), pytest.raises(OSError):
            two = record()
            two.set_model(model)
            two.on_epoch_begin(0)
            two.on_epoch_end(0, {"loss": 0.5, "val_error/exit_1": 50.0})


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
