"""train.py as a process: killed, stopped, resumed, refused."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf
from pages import ROOT, python

from tf_pcl.methods import METHODS

# 22 steps an epoch.
RUN = (
    "--dataset=digits --network=resnet8 --batch_size=64 --epochs=3 --deterministic "
    "--checkpoint_every=5steps"
).split()
PCL = ["--method=pcl", "--peers=2"]


def start(workdir, *flags, method=PCL):
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *RUN,
        *method,
        f"--workdir={workdir}",
        *flags,
    ]
    # As a user starts it, without what the tests set.
    env = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    return subprocess.Popen(
        command,
        cwd=workdir.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )


def finish(workdir, *flags, **kwargs):
    process = start(workdir, *flags, **kwargs)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_for_checkpoint(workdir, step, process):
    deadline = time.monotonic() + 120
    while not (workdir / f"checkpoints/ckpt-{step}.index").exists():
        assert time.monotonic() < deadline and process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def final_weights(workdir, step=66):
    reader = tf.train.load_checkpoint(str(workdir / f"checkpoints/ckpt-{step}"))
    # Wall-clock times are no part of the state; everything that is stored must be the same.
    return {
        name: reader.get_tensor(name)
        for name in reader.get_variable_to_shape_map()
        if name not in ("_CHECKPOINTABLE_OBJECT_GRAPH", "save_counter/.ATTRIBUTES/VARIABLE_VALUE")
    }


def metrics(workdir):
    with open(workdir / "metrics.csv", newline="") as f:
        return [
            {k: v for k, v in row.items() if k not in ("wall_seconds", "images_per_second")}
            for row in csv.DictReader(f)
        ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    code, out, err = finish(workdir)
    assert code == 0, err
    return workdir, out


@pytest.mark.slow
def test_a_run_leaves_what_the_contract_says(undisturbed):
    workdir, out = undisturbed
    for path in (
        "flags.txt versions.json results.json metrics.csv checkpoints tensorboard/train "
        "tensorboard/test export/saved_model/1/saved_model.pb export/labels.txt"
    ).split():
        assert (workdir / path).exists(), path
    results = json.loads((workdir / "results.json").read_text())
    assert results["epochs"] == 3
    assert results["error"]["mean_peer_1"] == results["deployed_error"] < 60
    assert f"{results['deployed_error']:.2f} %  (deployed)" in out
    assert re.findall(r" - (\S+): ", out) == ["loss", "error/peer_1", "val_error/mean_peer_1"] * 3
    assert len(metrics(workdir)) == 3
    # The flagfile repeats the run. In the same workdir it finds it finished and trains nothing.
    before = (workdir / "metrics.csv").read_text()
    done = python("train.py", f"--flagfile={workdir}/flags.txt", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert (workdir / "metrics.csv").read_text() == before
    assert "Epoch" not in done.stdout
    assert "(deployed)" in done.stdout


@pytest.mark.slow
def test_killed_mid_epoch_and_resumed_is_bit_for_bit_the_same(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir)
    wait_for_checkpoint(workdir, 30, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (workdir / "checkpoints/ckpt-66.index").exists()
    # The disk lost the end of the newest checkpoint.
    newest = max(workdir.glob("checkpoints/ckpt-*.index"), key=lambda p: int(p.stem.split("-")[1]))
    data = newest.with_name(newest.stem + ".data-00000-of-00001")
    data.write_bytes(data.read_bytes()[:1000])
    code, out, err = finish(workdir)
    assert code == 0, err
    assert "goes on at step" in out and "cannot be read" in err
    assert re.findall(r"^Epoch (\S+)$", out, re.M) == ["2/3", "3/3"]
    mine, its = final_weights(undisturbed[0]), final_weights(workdir)
    assert len(mine) > 100
    np.testing.assert_equal(its, mine)
    assert metrics(undisturbed[0]) == metrics(workdir)


@pytest.mark.slow
def test_killed_in_a_later_stage_and_resumed_is_bit_for_bit_the_same(tmp_path):
    ctsl_mkt = ["--method=ctsl_mkt", "--epochs=1"]
    for name in ("whole", "killed"):
        workdir = tmp_path / name
        if name == "killed":
            process = start(workdir, method=ctsl_mkt)
            wait_for_checkpoint(workdir, 10, process)
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert (workdir / "2-peer_2/checkpoints/ckpt-22.index").exists()
        code, out, err = finish(workdir, method=ctsl_mkt)
        assert code == 0, err
    assert "stage 2 of 3, peer_2: done" in out and "stage 3 of 3, together: goes on at step" in out
    for folder in ("1-peer_1", "2-peer_2", "."):
        mine, its = (final_weights(tmp_path / name / folder, 22) for name in ("whole", "killed"))
        assert len(mine) > 50
        np.testing.assert_equal(its, mine)
        assert metrics(tmp_path / "whole" / folder) == metrics(tmp_path / "killed" / folder)


@pytest.mark.slow
def test_a_signal_before_training_ends_in_one_line(tmp_path):
    process = start(tmp_path / "run")
    while "epochs of 22 steps" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and err.startswith("train.py: stopped") and err.count("\n") == 1


@pytest.mark.slow
def test_a_signal_saves_and_the_same_command_goes_on(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir, "--checkpoint_every=100epochs")
    deadline = time.monotonic() + 120
    while not (workdir / "metrics.csv").exists():
        assert time.monotonic() < deadline and process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "stopped by SIGTERM at step" in err and "Traceback" not in err
    assert len(list(workdir.glob("checkpoints/*.index"))) == 1
    # Other settings do not go on in this workdir.
    code, _, err = finish(workdir, "--epochs=5")
    assert code == 2 and "--epochs=5 here, 3 there" in err
    code, out, err = finish(workdir)
    assert code == 0 and "goes on at step" in out
    np.testing.assert_equal(final_weights(workdir), final_weights(undisturbed[0]))


@pytest.mark.parametrize(
    "flags, text",
    [
        (["--methd=pcl"], "methd"),
        (["--epochs=many"], "epochs"),
        (["--strategy=both"], "auto"),
        (["pcl"], "not a flag"),
        (["--lr_decay_epochs=a,b"], "such as 150,225"),
        (["--peers=1"], "at least 2"),
    ],
)
def test_bad_input_is_one_line_and_status_2(flags, text, tmp_path):
    process = start(tmp_path / "run", *flags)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert err.startswith("train.py: ")
    assert err.count("\n") == 1
    assert text in err
    assert not list(tmp_path.iterdir())


def test_help_names_every_flag_with_its_default():
    text = " ".join(python("train.py", "--help").stdout.split())
    for line in (
        f"--method: how to train: {', '.join(METHODS)}. Flags",
        "target first. Names: resnet8,",
        "--dataset: name of the data set: digits (8×8 handwritten digits,",
        "any other name (an image-classification data set of tensorflow-datasets,",
        "--data_dir: folder of the data: image_folder: a folder of SPLIT/CLASS/IMAGE.jpg or .png,",
        "(image_folder, tiny_imagenet)",
        "--distill_share: share of distillation in a student's loss,",
        "(byot: 0.3, cl: 0.5)",
        "--ema_every: <step|epoch>:",
        "(pcl: step)",
        "--[no]deterministic:",
        "(default: '1epoch')",
    ):
        assert line in text, line
