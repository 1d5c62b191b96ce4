"""What must not end or falsify a run: odd paths and values, streams, damaged files, bad numbers."""

import dataclasses
import errno
import io
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from faults import BrokenPipe, failing
from helpers import SHAPE, events, noise, tiny_model, with_labels
from pages import ROOT, python

from tf_pcl import console
from tf_pcl.data import datasets, storage
from tf_pcl.errors import Stopped, UserError
from tf_pcl.options import Options
from tf_pcl.training import callbacks, export, report, run, stages, strategy
from tf_pcl.training import cluster as clusters
from tf_pcl.training import workdir as workdirs
from tf_pcl.training.checkpoints import Checkpoints
from tf_pcl.training.workdir import Workdir

# Paths.


@pytest.mark.parametrize(
    "path, text",
    [
        ("lr=[0.1]", "brackets"),
        ("a*", "brackets"),
        ("a?b/run", "brackets"),
        ("gs://bucket/run", "folder of this machine"),
        ("s3://bucket/run", "folder of this machine"),
        ("~no-such-user-here/run", "no such home folder"),
        ("a" * 300, "File name too long"),
        ("new/" + "a" * 300, "File name too long"),
        ("/".join(["a" * 100] * 45), "File name too long"),
    ],
)
def test_workdirs_that_could_not_be_used_are_refused(path, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=text) as refused:
        Workdir.of_run(Options(workdir=path)).check(Options())
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


def test_a_workdir_that_is_a_link_to_nothing_is_refused(tmp_path):
    (tmp_path / "link").symlink_to("nothing")
    for path in ("link", "link/run"):
        with pytest.raises(UserError, match="link: No such file or directory"):
            Workdir(str(tmp_path / path)).check(Options())


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    options = Options(workdir="~/run", data_dir="~/data", weights="~/w.h5", teacher="~/t")
    assert Workdir.of_run(options).path == "/home/someone/run"
    assert (options.data_dir, options.weights) == ("/home/someone/data", "/home/someone/w.h5")
    assert options.teacher == "/home/someone/t"


# Values.


@pytest.mark.parametrize(
    "settings, text",
    [
        (dict(epochs=10**40), "at most 1000000"),
        (dict(epochs=10**400), "at most 1000000"),
        (dict(peers=10**40), "at most 1000"),
        (dict(generations=10**40), "at most 1000"),
        (dict(image_size=10**40), "at most 10000"),
        (dict(cutout=10**40), "at most 10000"),
        (dict(learning_rate=1e39), "finite"),
        (dict(data_dir="a\nb"), r"`data_dir=a\\nb`: it has line breaks"),
        (dict(workdir=os.fsdecode(b"ni\xf1o")), "not UTF-8"),
    ],
)
def test_values_that_nothing_can_hold_are_refused(settings, text):
    with pytest.raises(UserError, match=text):
        Options(**settings)


@pytest.mark.parametrize("name", ["mnist/", "mnist:9.9.9", "emnist/nope", "mnist:", "mnist:abc"])
def test_names_that_tensorflow_datasets_cannot_read_are_refused(name, tmp_path):
    with pytest.raises(UserError, match=f"`dataset={name}`.*does not have it") as refused:
        datasets.load(name, str(tmp_path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "config",
    [
        "",
        "{'cluster': {}}",
        "[1]",
        "3",
        '["localhost:1"]',
        '{"cluster": {"worker": ["localhost:1"]}}',
        '{"cluster": {"worker": ["localhost:1"]}, "task": {"type": "worker", "index": 1}}',
        '{"cluster": {"worker": ["localhost:1"]}, "task": {"type": "chief", "index": 0}}',
        '{"cluster": {"worker": "localhost:1"}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": {"worker": ["localhost"]}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": {"worker": [1]}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": {"ps": ["localhost:1"]}, "task": {"type": "ps", "index": 0}}',
        '{"cluster": 1, "task": 2}',
        '{\n"cluster": {"worker": ["a:1"]},\n"task": {"type": "worker", "index": 7}}',
        '{"cluster": {"worker": ["a:1", "a:1"]}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": {"worker": ["a:0"]}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": {"worker": ["a:65536"]}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": {"worker": ["http://a:1"]}, "task": {"type": "worker", "index": 0}}',
        "[" * 100_000,
    ],
)
def test_a_cluster_that_cannot_be_is_refused(config, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(UserError, match="TF_CONFIG") as refused:
        strategy.make("multi_worker")
    assert "\n" not in str(refused.value)


def test_every_process_of_a_cluster_has_a_folder_of_its_own(monkeypatch):
    cluster = '{"cluster": {"worker": ["a:1", "b:1"], "chief": ["c:1"]}, "task": %s}'
    paths = []
    for task in ("chief", 0), ("worker", 0), ("worker", 1):
        monkeypatch.setenv("TF_CONFIG", cluster % '{"type": "%s", "index": %d}' % task)
        paths.append(Workdir.of_run(Options(workdir="run"), clusters.find().own).path)
    assert paths == ["run", "run/worker-1", "run/worker-2"]


# Streams.


def test_writing_never_fails(monkeypatch):
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    monkeypatch.setattr(sys, "stderr", BrokenPipe())
    console.protect()
    print("8×8 … ω", flush=True)
    print("lost", file=sys.stderr, flush=True)
    assert ascii_only.buffer.getvalue() == b"8x8 ... ?\n"
    assert sys.stdout.encoding == "ascii" and not sys.stdout.isatty()
    sys.stdout.close()
    print("lost, too", flush=True)
    protected = sys.stdout
    console.protect()
    assert sys.stdout is protected
    monkeypatch.setattr(sys, "stdout", None)
    console.protect()
    sys.stdout.write("nowhere")


@pytest.mark.parametrize("streams", ["| head -1", ">/dev/full", ">&- 2>&-", "2>/dev/full", "<&-"])
def test_the_command_line_outlives_its_streams(streams):
    command = f"{sys.executable} -m tf_pcl --help"
    shell = ["bash", "-o", "pipefail", "-c", f"{command} {streams}"]
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr


# Damaged files.

QUICK = dict(dataset="digits", network="resnet8", method="baseline", epochs=3, batch_size=256)


def test_a_second_process_is_told_who_works_in_a_workdir(tmp_path):
    workdir = Workdir(str(tmp_path / "run"))
    other = (
        "import sys; from tf_pcl.options import Options;"
        "from tf_pcl.training.workdir import Workdir; w = Workdir(sys.argv[1]);"
        "w.check(Options()); held = w.locked(); held.__enter__()"
    )
    held = tmp_path / "run/lock"
    with workdir.locked():
        before = held.stat().st_mtime_ns
        done = python("-c", other, workdir.path)
        assert done.returncode == 1
        assert f"process {os.getpid()}): wait for its end" in done.stderr.splitlines()[-1]
        assert held.stat().st_mtime_ns == before
    # The lock ends with its process, however that ends, and the file may stay.
    killed = python("-c", other + "; import os; os.kill(os.getpid(), 9)", workdir.path)
    assert killed.returncode == -9
    workdir.check(Options())
    with workdir.locked():
        assert f"process {os.getpid()}" in held.read_text()


def test_a_run_that_began_while_another_one_was_loading_is_seen(tmp_path, monkeypatch):
    given = Options(**{**QUICK, "workdir": str(tmp_path / "run")})
    other = dataclasses.replace(given, learning_rate=0.3)
    build_all, workdir = stages.Trainer.build_all, Workdir(given.workdir)

    def slowly(*arguments):
        if not os.path.exists(workdir.flags):
            workdir.begin(other, {}, {})
        return build_all(*arguments)

    monkeypatch.setattr(stages.Trainer, "build_all", slowly)
    with pytest.raises(UserError, match="holds a run with other options .`learning_rate=0.1` here"):
        run.run(given)
    assert "learning_rate=0.3" in open(workdir.flags).read()


def test_a_file_system_without_locks_gives_a_warning(tmp_path, caplog):
    no_locks = failing(workdirs.fcntl, "lockf", errno.ENOLCK)
    with no_locks, Workdir(str(tmp_path)).locked():
        assert "cannot be locked: No locks available" in caplog.text


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe\x00", b"--epochs=3\n--method\n", b"rubbish\n"])
def test_damaged_flags_are_refused_in_a_line(damage, tmp_path):
    workdir = Workdir(str(tmp_path))
    workdir.begin(Options(**QUICK), {}, {})
    (tmp_path / "flags.txt").write_bytes(damage)
    with pytest.raises(UserError, match="flags.txt is damaged") as refused:
        workdir.check(Options(**QUICK))
    assert "\n" not in str(refused.value) and (tmp_path / "flags.txt").read_bytes() == damage


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff", b"[1]", b"3"])
def test_damaged_records_of_a_run_give_a_warning(damage, tmp_path, caplog):
    workdir = Workdir(str(tmp_path))
    for name in ("data.json", "versions.json"):
        (tmp_path / name).write_bytes(damage)
    workdir.check_data({"classes": ["a"]})
    workdir.check_versions({"tensorflow": "2.15.1", "keras": "2.15.0"})
    assert "data.json is damaged" in caplog.text
    assert "versions.json is damaged" in caplog.text
    caplog.clear()
    (tmp_path / "versions.json").write_text('{"tensorflow": "2.15.1"}')
    workdir.check_versions({"tensorflow": "2.15.1", "keras": "2.15.0"})
    assert "versions.json is damaged" in caplog.text


@pytest.mark.slow
def test_results_that_are_damaged_are_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "export", lambda *arguments: "nowhere")
    monkeypatch.setattr(export, "check", lambda *arguments: None)
    small = dict(epochs=1, train_examples=100, batch_size=50, network="helpers:without_norm")
    given = Options(**{**QUICK, **small, "workdir": str(tmp_path)})
    results = run.run(given)
    path = tmp_path / "results.json"
    path.write_text("{")
    run.run(given)
    assert json.loads(path.read_text()) == results


def test_foreign_lines_of_the_metrics_are_left_out(tmp_path, caplog):
    workdir = Workdir(str(tmp_path))
    rows = [{"epoch": e, "step": 7 * e, "loss": 0.5**e} for e in range(1, 4)]
    workdir.write_rows(rows)
    lines = (tmp_path / "metrics.csv").read_bytes().split(b"\n")
    lines[2:2] = [b"<<<<<<< HEAD", b"1,7,0.5,9", b"\xff\x00,,", b"1,7,0.5"]
    (tmp_path / "metrics.csv").write_bytes(b"\n".join(lines))
    assert workdir.read_rows() == rows
    assert "lines 3, 4, 5, 6 are not rows of this run" in caplog.text
    for damage in (b"", b"\n", b"\xff\xff", b"what,is,this\n1,2,3\n"):
        (tmp_path / "metrics.csv").write_bytes(damage)
        assert workdir.read_rows() == []


def test_checkpoints_do_without_tensorflow_s_list_of_them(tmp_path):
    model = tiny_model()
    weight = model.trainable_weights[0]
    for step in range(1, 4):
        weight.assign(tf.fill(weight.shape, float(step)))
        Checkpoints(model, str(tmp_path)).save(step)
    for damage in (b"", b"rubbish", b"\xff\x00"):
        (tmp_path / "checkpoint").write_bytes(damage)
        assert Checkpoints(model, str(tmp_path)).restore() == 3
    Checkpoints(model, str(tmp_path)).save(4)
    assert sorted(p.stem for p in tmp_path.glob("*.index")) == ["ckpt-2", "ckpt-3", "ckpt-4"]
    assert tf.train.latest_checkpoint(str(tmp_path)) == str(tmp_path / "ckpt-4")


def test_litter_of_killed_processes_is_removed_and_nothing_good(tmp_path):
    model = tiny_model()
    keeps_all = Checkpoints(model, str(tmp_path / "checkpoints"), keep=9)
    for step in range(1, 7):
        keeps_all.save(step)
    (tmp_path / "checkpoints/ckpt-6.index").write_bytes(b"")
    (tmp_path / "checkpoints/ckpt-7_temp").mkdir()
    (tmp_path / "checkpoints/ckpt-7_temp/part-00000-of-00001.data-00000-of-00001").write_text("x")
    (tmp_path / "checkpoints/ckpt-1.index").unlink()  # Its data were to be removed, too.
    for name in ("export/tmpabcd_123/1", "export/saved_model/1", "export/template"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "results.json.part").write_text("{")
    Workdir(str(tmp_path)).tidy()
    checkpoints = Checkpoints(model, str(tmp_path / "checkpoints"))
    assert checkpoints.restore() == 5
    checkpoints.tidy(5)
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if not p.is_dir()}
    files = [f"checkpoints/ckpt-{s}.{end}" for s in (3, 4, 5, 6) for end in ENDS]
    assert left == {"checkpoints/checkpoint", *files}
    assert {p.name for p in (tmp_path / "export").iterdir()} == {"saved_model", "template"}


ENDS = "index", "data-00000-of-00001"


@pytest.mark.slow
def test_what_metrics_lack_comes_from_tensorboard_and_each_tag_has_each_step_once(tmp_path, caplog):
    """A run that is started again, whatever was lost, tells what it told before."""
    settings = Options(**QUICK, train_examples=512, workdir=str(tmp_path))
    first = run.run(settings)
    whole, scalars = (tmp_path / "metrics.csv").read_text(), events(tmp_path)
    assert {steps for steps in map(len, scalars.values())} == {1, 3}  # The picture, and the rest.
    # Some event files of a process that was killed, one of them damaged at its end.
    for path in list(tmp_path.glob("tensorboard/*/events*")):
        (path.parent / f"{path.name}.more").write_bytes(path.read_bytes()[:-3])
    (tmp_path / "metrics.csv").write_text("\n".join(whole.split("\n")[:2]) + "\nforeign\n")
    (tmp_path / "checkpoints/checkpoint").write_text("rubbish")
    (tmp_path / "data.json").write_text("")
    again = run.run(settings)
    assert "lacked the rows of 2 epochs; they were recovered" in caplog.text
    for name in ("error", "deployed_error", "best_deployed_error", "steps", "epochs"):
        assert again[name] == first[name]
    assert numbers(tmp_path / "metrics.csv") == pytest.approx(numbers_of(whole), rel=1e-6)
    assert events(tmp_path) == scalars
    # Without both, the errors of the last epoch are measured again.
    for path in [tmp_path / "metrics.csv", *tmp_path.glob("tensorboard/*/*")]:
        path.unlink()
    last = run.run(settings)
    assert "those of epochs 1, 2 are lost" in caplog.text
    assert last["error"] == first["error"]


def numbers(path):
    return numbers_of(path.read_text())


def numbers_of(text):
    return [float(cell) for line in text.split("\n")[1:] for cell in line.split(",") if cell]


@pytest.mark.slow
def test_a_run_outlives_image_files_that_break(make_folder, tmp_path, monkeypatch, capsys, caplog):
    """It ends in a line that names the file and goes on with it mended, or without it."""
    monkeypatch.setattr(storage, "MEMORY_LIMIT", 0)
    several = [noise(8, 8, 3, seed=i) for i in range(8)]
    folder = make_folder({s: {"a": several, "b": several} for s in ("train", "test")})
    images = dict(dataset="image_folder", data_dir=folder, epochs=6, batch_size=4)
    options = Options(
        **{**QUICK, **images}, checkpoint_every="1steps", workdir=str(tmp_path / "run")
    )
    broken, save = pathlib.Path(folder, "train/a/3.png"), Checkpoints.save

    def breaks(checkpoints, step):
        if step == 1:
            broken.unlink()
        return save(checkpoints, step)

    monkeypatch.setattr(Checkpoints, "save", breaks)
    line = (
        rf"^{broken} can no longer be read: repair it, .*failed at step \d+ of 24: .* goes on from"
    )
    with pytest.raises(Stopped, match=line):
        run.run(options)
    with pytest.raises(UserError, match="training images 15 here, 16 there"):
        run.run(options)
    broken.write_bytes(b"")
    with pytest.raises(UserError, match="a/3.png cannot be read as a JPEG or PNG image"):
        run.run(options)
    capsys.readouterr()
    # What began without skip goes on with it, and a test image breaks now, too.
    pathlib.Path(folder, "test/b/0.png").write_bytes(b"")
    found = run.run(dataclasses.replace(options, on_bad_image="skip"))
    out = capsys.readouterr().out
    assert f"Broken since the run began: {broken}, {folder}/test/b/0.png. In training" in out
    assert "Left out, since their files can no longer be read: 1 training images" in out
    assert "and 1 others" in out.splitlines()[-1] and found["epochs"] == 6
    assert f"{broken} can no longer be read: {folder}/train/a/" in caplog.text
    assert f"{folder}/test/b/0.png can no longer be read: it is left out" in caplog.text


# Numbers that are wrong.


def test_weights_and_terms_that_are_no_numbers_are_named_and_not_saved(tmp_path):
    model = tiny_model()
    save = callbacks.Save(Checkpoints(model, str(tmp_path)), 1, 0, 10)
    save.set_model(model)
    save.on_train_batch_end(0, {"loss": 1.0, "loss/ce": 1.0})
    kept = sorted(tmp_path.iterdir())
    wrong = {"loss": np.nan, "error/exit_1": 50.0, "loss/ce": 1.0, "loss/kd": np.inf}
    with pytest.raises(
        Stopped, match="^loss/kd is inf at step 2, which was not saved; .* of step 1"
    ):
        save.on_train_batch_end(1, wrong)
    weight = model.trainable_weights[0]
    weight.assign(tf.fill(weight.shape, np.inf))
    velocity = model.optimizer.variables[-1]
    velocity.assign(tf.fill(velocity.shape, np.nan))
    with pytest.raises(Stopped, match=f"^2 of the variables, {weight.name} first, are not finite"):
        save.on_epoch_end(0, {"loss": 1.0})
    assert sorted(tmp_path.iterdir()) == kept
    with pytest.raises(Stopped, match=f"not exported, since its {weight.name} is not finite"):
        export.check_finite(model.deployed(), noise(2, *SHAPE))


def test_who_only_guesses_is_told_so():
    data = with_labels(noise(10, *SHAPE), np.array([3] * 4 + [1] * 6))
    assert report.warning({"deployed_error": 39.0}, data) is None
    assert "test error of 40.00 %" in report.warning({"deployed_error": 40.0}, data)


@pytest.mark.slow
def test_a_run_that_went_wrong_says_so_and_exports_no_rubbish(tmp_path, capsys):
    lost = Options(**QUICK, learning_rate=1e20, workdir=str(tmp_path / "lost"))
    with pytest.raises(Stopped, match=r"^loss/ce is (nan|inf) at step \d, which was not saved"):
        run.run(lost)
    assert not (tmp_path / "lost/export").exists() and not (tmp_path / "lost/checkpoints").exists()
    run.run(Options(**{**QUICK, "epochs": 1}, learning_rate=3.0, workdir=str(tmp_path / "guess")))
    assert capsys.readouterr().out.splitlines()[-1].startswith("WARNING: the deployed network is")
