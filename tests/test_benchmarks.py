"""The benchmarks run and print what they say they measure."""

import pathlib
import re
import subprocess
import sys

import pytest
import tensorflow as tf

from tf_pcl.training.events import Events
from tf_pcl.training.workdir import Workdir, write_json

ROOT = pathlib.Path(__file__).parent.parent


def printed(folder, name, *flags):
    """The lines that a benchmark prints when it is called in a folder."""
    done = subprocess.run(
        [sys.executable, ROOT / f"benchmarks/{name}.py", *flags],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_line_for_every_stage(tmp_path):
    head, *lines = printed(
        tmp_path,
        "step",
        "--networks=resnet8",
        "--teacher_network=resnet8",
        "--methods=kd",
        "--precisions=float32",
        "--batch_size=16",
        "--steps=2",
        "--rounds=1",
    )
    assert head.split() == (
        "network precision method first step images/s × kd in fit memory".split()
    )
    cells = [line.split() for line in lines]
    stages = [["kd", "teacher"], ["kd", "student"]]
    assert [row[2 : -len("1 s 2 3 4 % 5 GiB".split())] for row in cells] == stages
    for row in cells:
        first, s, speed, times, share, percent, memory, gib = row[-8:]
        assert row[:2] == ["resnet8", "float32"] and (s, percent, gib) == ("s", "%", "GiB")
        assert min(map(float, (first, speed, times, share, memory))) > 0
    assert float(cells[0][-5]) == 1.0
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_replicas_and_two_workers_equal_one_device(tmp_path):
    _, head, line = printed(tmp_path, "workers", "--methods=baseline")
    assert head.split() == ["method", "loss", *["losses", "errors", "weights"] * 2]
    method, loss, *differences = line.split()
    assert method == "baseline" and float(loss) > 0
    for losses, errors, weights in (differences[:3], differences[3:]):
        # An image of the 360 may change sides.
        assert float(losses) < 1e-3 and float(errors) < 0.3 and float(weights) < 1e-2
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_that_is_killed_is_compared(tmp_path):
    first, *kills, run, last = printed(
        tmp_path,
        "crash",
        "--kills=2",
        f"--keep_in={tmp_path}",
        "--",
        "--method=baseline",
        "--dataset=digits",
        "--network=resnet8",
        "--train_examples=100",
        "--batch_size=50",
        "--epochs=3",
    )
    assert first.startswith("undisturbed: ") and run == "run-1: equal"
    assert [line.split(": ")[0] for line in kills] == ["run-1, kill 1", "run-1, kill 2"]
    assert last == (
        "2 kills, 1 at random moments and 1 at calls; 1 of 1 runs end as the undisturbed one"
    )


@pytest.mark.slow
def test_the_cost_of_checks_is_told_as_ratios(tmp_path):
    _, line = printed(
        tmp_path,
        "checks",
        "--networks=resnet8",
        "--methods=baseline",
        "--batch_size=16",
        "--steps=2",
        "--rounds=1",
    )
    number = r"(\d+\.?\d*)"
    found = re.fullmatch(
        rf"resnet8 +baseline +{number} +× {number} +× {number} +{number} ms, {number} % of a "
        "checkpoint",
        line,
    )
    assert found and min(map(float, found.groups())) > 0
    assert not list(tmp_path.iterdir())


def test_what_a_run_left_is_compared_bit_for_bit(tmp_path):
    """Every difference counts but times: the benchmark cannot find all runs equal."""
    crash = imported_crash()
    for name, loss, seconds in ("a", 0.5, 1.0), ("b", 0.5, 2.0), ("c", 0.25, 1.0):
        leave(tmp_path / name, loss, seconds)
    (tmp_path / "b/results.json.part").write_text("")
    a, b, c = (crash.contents(tmp_path / name) for name in "abc")
    assert crash._difference(a, b) == ["files"]
    assert crash._difference(a, c) == [
        f". {what}" for what in ("TensorBoard", "exported weights", "metrics", "results", "weights")
    ]


def imported_crash():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import crash
    finally:
        sys.path.pop(0)
    return crash


WORKER = """
import json, os, sys
(workdir,) = [a.split("=")[1] for a in sys.argv if a.startswith("--workdir=")]
number = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
own = os.path.join(workdir, f"worker-{number}") if number else workdir
os.makedirs(own, exist_ok=True)
open(os.path.join(own, "lock"), "a+")
open(os.path.join(own, "metrics.csv"), "w")
"""


def test_one_of_two_workers_is_killed(tmp_path, monkeypatch):
    crash = imported_crash()
    (tmp_path / "train.py").write_text(WORKER)
    monkeypatch.setattr(crash, "TRAIN", tmp_path / "train.py")
    addresses = crash.free_addresses(2)
    for worker in 0, 1:
        run = tmp_path / f"killed-{worker}"
        end = crash.start([], run, crash.Place("call", 2, 0.0, worker), addresses)
        assert end.killed == "at call 2, open metrics.csv" and end.problem is None
        written = [(folder / "metrics.csv").exists() for folder in (run, run / "worker-1")]
        assert written == [bool(worker), not worker]
    end = crash.start([], tmp_path / "whole", addresses=addresses)
    assert (end.killed, end.calls, end.problem) == (None, 2, None)


def leave(folder, loss, seconds):
    """Writes what a run of one step leaves."""
    workdir = Workdir(str(folder))
    row = {"epoch": 1, "step": 1, "wall_seconds": seconds, "loss": loss}
    Events(workdir, [row], "peer_1", {})
    workdir.write_rows([row])
    results = {"loss": loss, "wall_seconds": seconds, "settings": {"workdir": str(folder)}}
    write_json(workdir.results, results)
    state = tf.train.Checkpoint(loss=tf.Variable(loss))
    state.write(str(folder / "checkpoints/ckpt-1"))
    write_json(workdir.data, {})
    lines = '"ckpt-1"\nall_model_checkpoint_paths: "ckpt-1"\n'
    (folder / "checkpoints/checkpoint").write_text(f"model_checkpoint_path: {lines}")
    state.write(str(folder / "export/saved_model/1/variables/variables"))
