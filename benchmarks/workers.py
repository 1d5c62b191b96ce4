"""Compares what methods train on one device, on two replicas and on two workers.

All three see the same batches from the same weights. BatchNorm is synchronized, so that they differ
by rounding alone. The replicas are two logical CPUs of one process, the workers two processes on
this machine's loopback.

    python benchmarks/workers.py --methods=baseline,pcl

It prints a line for each method: the loss of the last epoch on one device, and by how much two
replicas and two workers differ from it, which is the largest difference of the losses in
metrics.csv (relative), of the errors (percent of the test images) and of the weights (absolute), in
all stages.
"""

import csv
import functools
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile

from absl import app, flags

ALONE, REPLICAS, WORKERS = "one_device", "two_replicas", "two_workers"

METHODS = flags.DEFINE_list("methods", None, "methods, comma separated; default: all")
NETWORK = flags.DEFINE_string("network", "resnet8", "the target network, and the teacher of kd")
BATCH = flags.DEFINE_integer("batch_size", 256, "images a step")
EPOCHS = flags.DEFINE_integer("epochs", 2, "epochs of each stage")
EXAMPLES = flags.DEFINE_integer("train_examples", 512, "training images of the digits")
RATE = flags.DEFINE_float("learning_rate", 0.01, "learning rate at the start")
# What this program gives its own processes.
PLACE = flags.DEFINE_enum("place", None, [ALONE, REPLICAS, WORKERS], "where to train, and no more")
FOLDER = flags.DEFINE_string("folder", None, "where that writes")


def train() -> None:
    """Trains every method in this process and writes what came out, a folder for each stage."""
    import numpy as np
    import tensorflow as tf

    from tf_pcl import data
    from tf_pcl.compat import keras
    from tf_pcl.methods import METHODS as TABLE
    from tf_pcl.options import Options
    from tf_pcl.training import report
    from tf_pcl.training import strategy as strategies
    from tf_pcl.training.assemble import Assembly, method_arguments
    from tf_pcl.training.stages import Trainer
    from tf_pcl.training.workdir import Workdir

    if PLACE.value == REPLICAS:
        (cpu,) = tf.config.list_physical_devices("CPU")
        two = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(cpu, two)
        strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    else:
        strategy = strategies.make("multi_worker" if PLACE.value == WORKERS else "one_device")
    digits = data.load("digits", train_examples=EXAMPLES.value)
    for method in METHODS.value or TABLE:
        teacher = "teacher_network" in TABLE[method].parameters()
        options = Options(
            method=method,
            network=NETWORK.value,
            dataset="digits",
            train_examples=EXAMPLES.value,
            batch_size=BATCH.value,
            epochs=EPOCHS.value,
            learning_rate=RATE.value,
            sync_batch_norm=True,
            teacher_network=NETWORK.value if teacher else None,
        )
        strategies.prepare(options)
        trainer, models = Trainer(options, digits, strategy), []
        with strategy.scope():
            stages = TABLE[method].stages(
                Assembly(digits), options.network, **method_arguments(options)
            )
        for number, stage in enumerate(stages):
            model = trainer.build(stages, models)
            models.append(model)
            folder = os.path.join(FOLDER.value, method, str(number))
            describe = functools.partial(
                report.results,
                options=options,
                stage=stage,
                model=model,
                deployed=model.deployed(),
                gflop=(0.0, 0.0),  # What it costs is not compared.
            )
            trainer.train(model, Workdir(folder), describe)
            counts = {id(v) for metric in model.metrics for v in metric.variables}
            weights = [w.numpy() for w in model.weights if id(w) not in counts]
            np.savez(os.path.join(folder, "weights.npz"), *weights)
        keras.backend.clear_session()


def start(folder: pathlib.Path, place: str, number: int = 0, addresses: tuple = ()):
    """Starts a process of this program that trains in a place."""
    cluster = {"worker": list(addresses)}
    config = {"cluster": cluster, "task": {"type": "worker", "index": number}}
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    # The package of this checkout, wherever the command is given.
    root = str(pathlib.Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    if addresses:
        environment["TF_CONFIG"] = json.dumps(config)
    own = folder / (f"{place}-{number}" if number else place)
    with open(f"{own}.log", "w") as log:
        return subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], f"--place={place}", f"--folder={own}"],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def free_addresses(count: int) -> tuple:
    """Returns addresses of this machine whose ports are free."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = tuple(f"127.0.0.1:{s.getsockname()[1]}" for s in sockets)
    for s in sockets:
        s.close()
    return addresses


def rows(folder: pathlib.Path) -> list:
    """Returns the rows of a stage's metrics.csv."""
    with open(folder / "metrics.csv", newline="") as f:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(f)]


def differences(one: pathlib.Path, other: pathlib.Path) -> tuple:
    """Returns the largest differences of losses, errors and weights between two stages' folders."""
    import numpy as np

    losses, errors = [0.0], [0.0]
    for mine, its in zip(rows(one), rows(other)):
        assert set(mine) == set(its), set(mine) ^ set(its)
        for name in set(mine) - {"wall_seconds", "images_per_second"}:
            apart = abs(mine[name] - its[name])
            if "error" in name:
                errors.append(apart)
            else:
                losses.append(apart / max(abs(mine[name]), 1e-6))
    results = [json.loads((f / "results.json").read_text()) for f in (one, other)]
    errors += [abs(e - results[1]["error"][name]) for name, e in results[0]["error"].items()]
    assert results[0]["steps"] == results[1]["steps"]
    with np.load(one / "weights.npz") as a, np.load(other / "weights.npz") as b:
        assert len(a.files) == len(b.files)
        weights = max(float(np.abs(a[name] - b[name]).max()) for name in a.files)
    return max(losses), max(errors), weights


def main(_: list) -> None:
    """Trains in all places, one after another, and prints the table."""
    if PLACE.value:
        return train()
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        for place in ALONE, REPLICAS, WORKERS:
            addresses = free_addresses(2) if place == WORKERS else ()
            processes = [start(folder, place, i, addresses) for i in range(len(addresses) or 1)]
            if any([process.wait() for process in processes]):
                logs = [log.read_text()[-2000:] for log in sorted(folder.glob("*.log"))]
                sys.exit(f"{place} failed:\n" + "\n".join(logs))
        print(f"{'':10}{'one device':>12}{'two replicas':>30}{'two workers':>30}")
        print(f"{'method':10}{'loss':>12}" + f"{'losses':>10}{'errors':>10}{'weights':>10}" * 2)
        for method in sorted(p.name for p in (folder / ALONE).iterdir()):
            stages = sorted(p.name for p in (folder / ALONE / method).iterdir())
            line = f"{method:10}{rows(folder / ALONE / method / stages[-1])[-1]['loss']:12.5f}"
            for place in REPLICAS, WORKERS:
                found = [
                    differences(folder / ALONE / method / s, folder / place / method / s)
                    for s in stages
                ]
                line += "".join(f"{max(column):10.1e}" for column in zip(*found))
            print(line, flush=True)


if __name__ == "__main__":
    app.run(main)
