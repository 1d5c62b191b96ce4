"""The benchmarks run and print what they say they measure."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
def test_a_line_for_every_stage(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "benchmarks/step.py",
            "--networks=resnet8",
            "--teacher_network=resnet8",
            "--methods=kd",
            "--precisions=float32",
            "--batch_size=16",
            "--steps=2",
            "--rounds=1",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()
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
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/workers.py", "--methods=baseline"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    _, head, line = done.stdout.splitlines()
    assert head.split() == ["method", "loss", *["losses", "errors", "weights"] * 2]
    method, loss, *differences = line.split()
    assert method == "baseline" and float(loss) > 0
    for losses, errors, weights in (differences[:3], differences[3:]):
        # An image of the 360 may change sides.
        assert float(losses) < 1e-3 and float(errors) < 0.3 and float(weights) < 1e-2
    assert not list(tmp_path.iterdir())
