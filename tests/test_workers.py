"""Several processes that train together, on this machine's loopback."""

import csv
import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
WORKDIRS = "alone", "together"
RUN = [
    "--dataset=digits",
    "--network=networks_of_the_test:without_norm",
    "--batch_size=256",
    "--train_examples=512",
    "--epochs=2",
    "--learning_rate=0.05",
]
NETWORK = """
from tensorflow import keras

def without_norm(shape, classes):
    x = images = keras.Input(shape)
    for i in (1, 2):
        x = keras.layers.Conv2D(8 * i, 3, activation="relu", padding="same", name=f"stage_{i}")(x)
    return keras.Model(images, keras.layers.Dense(classes)(keras.layers.Flatten()(x)))
"""


def free_addresses(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    return addresses


def start(cwd, *flags, config=None):
    (cwd / "networks_of_the_test.py").write_text(NETWORK)
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *RUN, *flags],
        cwd=cwd,
        env={**os.environ, **({"TF_CONFIG": json.dumps(config)} if config else {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_workers(cwd, *flags, count=2):
    cluster = {"worker": free_addresses(count)}
    return [
        start(
            cwd,
            "--strategy=multi_worker",
            *flags,
            config={"cluster": cluster, "task": {"type": "worker", "index": i}},
        )
        for i in range(count)
    ]


def rows(workdir):
    with open(workdir / "metrics.csv", newline="") as f:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(f)]


@pytest.mark.slow
@pytest.mark.parametrize("method", [["baseline"], ["pcl", "--peers=2"]], ids=lambda m: m[0])
def test_two_workers_report_what_one_device_does(method, tmp_path):
    flags = [f"--method={method[0]}", *method[1:]]
    alone = start(tmp_path, "--workdir=alone", *flags)
    for process in [alone, *start_workers(tmp_path, "--workdir=together", *flags)]:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out
    one, two = (json.loads((tmp_path / w / "results.json").read_text()) for w in WORKDIRS)
    assert two["steps"] == one["steps"] == 4 and two["parameters"] == one["parameters"]
    for name, error in one["error"].items():
        # An image of the 360 may change sides.
        assert two["error"][name] == pytest.approx(error, abs=0.3), name
    assert two["best_deployed_error"] == pytest.approx(one["best_deployed_error"], abs=0.3)
    for mine, its in zip(rows(tmp_path / "alone"), rows(tmp_path / "together")):
        assert set(mine) == set(its)
        for name in set(mine) - {"wall_seconds", "images_per_second"}:
            few = "error" in name
            assert its[name] == pytest.approx(mine[name], rel=1e-4, abs=0.3 if few else 1e-6), name
