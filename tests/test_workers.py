"""Several processes that train together, on this machine's loopback."""

import concurrent.futures
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tensorflow as tf
from helpers import assert_close, noise, with_labels, with_norm
from pages import ROOT, python

from tf_pcl import surgery
from tf_pcl.compat import keras
from tf_pcl.errors import Stopped, UserError
from tf_pcl.methods import METHODS
from tf_pcl.methods.distiller import Stage
from tf_pcl.options import Options
from tf_pcl.training import cluster, report
from tf_pcl.training.checkpoints import Checkpoints
from tf_pcl.training.selection import Selection
from tf_pcl.training.stages import Trainer, _check_same
from tf_pcl.training.workdir import Workdir

WORKDIRS = "alone", "together"
RUN = (
    "--dataset=digits --network=networks_of_the_test:without_norm --batch_size=256 "
    "--train_examples=512 --epochs=2 --learning_rate=0.05"
).split()
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


@pytest.mark.slow
def test_two_workers_report_what_one_device_does(tmp_path):
    flags = ["--method=pcl", "--peers=2"]
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
    for mine, its in zip(*(Workdir(str(tmp_path / w)).read_rows() for w in WORKDIRS)):
        assert set(mine) == set(its)
        for name in set(mine) - {"wall_seconds", "images_per_second"}:
            few = "error" in name
            assert its[name] == pytest.approx(mine[name], rel=1e-4, abs=0.3 if few else 1e-6), name


@pytest.mark.slow
def test_two_workers_choose_the_same_epoch(tmp_path):
    flags = ["--method=baseline", "--epochs=60", "--learning_rate=0.2", "--validation_examples=99"]
    flags += ["--export=best", "--early_stop=2", "--checkpoint_every=1000epochs"]
    for again in False, True:
        workers = start_workers(tmp_path, "--workdir=together", *flags)
        outputs = [worker.communicate(timeout=300)[0] for worker in workers]
        assert [worker.returncode for worker in workers] == [0, 0], outputs
        assert all(("done" in out) == again for out in outputs)
    folders = [tmp_path / "together", tmp_path / "together/worker-1"]
    first, second = (
        [row["val_error/peer_1"] for row in Workdir(str(folder)).read_rows()] for folder in folders
    )
    assert first == second and 3 <= len(first) < 60
    best = first.index(min(first)) + 1
    for folder in folders:
        results = json.loads((folder / "results.json").read_text())
        assert results["ended_early"] and results["exported_epoch"] == best == len(first) - 2
        assert (folder / f"checkpoints/ckpt-{2 * best}.index").exists()


def test_workers_whose_metrics_differ_are_refused():
    table, best = [{"epoch": 1.0, "val_error/a": 5.0}], Selection("val_error/a", best=True)
    _check_same(table, best, lambda number: {number})
    _check_same(table, None, lambda number: {number, 0})
    _check_same(table, best, None)
    numbers = set()
    for one in table, [{"epoch": 1.0, "val_error/a": 4.0}], [{"epoch": 1.0}], []:
        with pytest.raises(UserError, match="copy it from"):
            _check_same(one, best, lambda number: numbers.add(number) or {number, -1})
    assert len(numbers) == 4


def ended(cwd, hit, with_signal):
    """(status, output) of two workers in mid-training, one of which gets a signal."""
    flags = ["--method=baseline", "--epochs=100000", "--workdir=together"]
    workers = start_workers(cwd, *flags)
    written = cwd / "together" / ("" if hit else "worker-1") / "metrics.csv"
    end = time.monotonic() + 200
    while not written.exists():
        assert time.monotonic() < end
        assert workers[0].poll() is None, workers[0].communicate()
        time.sleep(0.2)
    workers[hit].send_signal(with_signal)
    began = time.monotonic()
    outputs = [w.communicate(timeout=100)[0] for w in workers]
    assert time.monotonic() - began < 60
    return [(w.returncode, out.strip()) for w, out in zip(workers, outputs)]


@pytest.mark.slow
def test_a_worker_that_dies_is_named_by_the_other(tmp_path):
    _, (status, out) = ended(tmp_path, 0, signal.SIGKILL)
    assert status == 1 and "Traceback" not in out, out
    line = r"^train.py: worker 0 \(127.0.0.1:\d+\) of the cluster does not answer: .* goes on"
    assert len(re.findall(line, out, re.M)) == 1


@pytest.mark.slow
def test_a_signal_to_one_worker_stops_both_at_the_same_step(tmp_path):
    (status, first), (other_status, second) = ended(tmp_path, 1, signal.SIGTERM)
    assert status == other_status == 1, (first, second)
    steps = [
        int(re.search(rf"stopped by {by} at step (\d+) of", out)[1])
        for by, out in (("a signal to another worker", first), ("SIGTERM", second))
    ]
    assert steps[0] == steps[1] > 0


SLURM = {"STEP_NODELIST": "n[9-10],gpu07", "STEP_TASKS_PER_NODE": "2(x2),1", "PROCID": "3"}
ADDRESSES = ["n9:12345", "n9:12346", "n10:12345", "n10:12346", "gpu07:12345"]


def set_slurm(monkeypatch, **variables):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    for name, value in {**SLURM, **variables}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)


def test_the_cluster_is_that_of_slurm(monkeypatch):
    set_slurm(monkeypatch)
    assert cluster.find() == ([f"worker {i}" for i in range(5)], ADDRESSES, 3)
    # TensorFlow reads this variable.
    assert json.loads(os.environ.pop("TF_CONFIG"))["task"] == {"type": "worker", "index": 3}


def test_slurms_lists_are_read_as_tensorflow_does(monkeypatch):
    resolver = tf.distribute.cluster_resolver.SlurmClusterResolver
    for nodes, tasks in ("a[01-03,7]", "1(x4)"), ("m,n2", "2,1"), ("r1n[8-9]", "1(x2)"):
        set_slurm(monkeypatch, STEP_NODELIST=nodes, STEP_TASKS_PER_NODE=tasks, PROCID="0")
        own = resolver(
            {"worker": len(cluster.find().names)},
            cluster.SLURM_PORT,
            gpus_per_node=2,
            gpus_per_task=1,
            auto_set_gpu=False,
        )
        assert own.cluster_spec().as_dict()["worker"] == cluster.find().addresses
        del os.environ["TF_CONFIG"]


@pytest.mark.parametrize(
    "variables",
    [
        {"STEP_NODELIST": "n[9-"},
        {"STEP_NODELIST": "n[1-9]"},
        {"STEP_TASKS_PER_NODE": "two"},
        {"PROCID": "5"},
    ],
)
def test_variables_that_are_not_slurms_are_refused(variables, monkeypatch):
    set_slurm(monkeypatch, **variables)
    with pytest.raises(UserError, match="TF_CONFIG"):
        cluster.find()
    os.environ.pop("TF_CONFIG", None)


def test_a_process_that_does_not_listen_is_named():
    with socket.create_server(("127.0.0.1", 0)) as here:
        (closed,) = free_addresses(1)
        addresses = ["127.0.0.1:1", f"127.0.0.1:{here.getsockname()[1]}", closed]
        three = cluster.Cluster(["chief 0", "worker 0", "worker 1"], addresses, 0)
        assert cluster.silent(three) == f"worker 1 ({closed})"
        lost = Stopped("failed at step 3")
        lost.__cause__ = tf.errors.UnavailableError(None, None, "")
        with pytest.raises(Stopped, match=r"^worker 1 .*: failed at step 3$") as e:
            with cluster.watched(three):
                raise lost
        assert e.value.__cause__ is None
        with pytest.raises(UserError), cluster.watched(three):
            raise UserError("as it was")


def test_processes_that_have_not_begun_are_waited_for_and_named(capsys):
    addresses = free_addresses(3)
    names = ["chief 0", "worker 0", "worker 1"]
    of = lambda own: cluster.Cluster(names, addresses, own)
    cluster.gather(cluster.Cluster(names[:1], addresses[:1], 0))
    all_went_on = threading.Barrier(3)

    def begins(own, after):
        time.sleep(after)
        cluster.gather(of(own), patience=2, limit=30)
        # TensorFlow's server takes the port over.
        with cluster._listening(of(own)):
            all_went_on.wait(30)

    # Processes that see each other go on, and nothing is said of those that come in time.
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        list(pool.map(begins, range(3), (0, 0.1, 0.1)))
    assert capsys.readouterr().err == ""

    with cluster._listening(of(1)):
        with pytest.raises(
            Stopped, match=r"^worker 1 \(127.0.0.1:\d+\) of the cluster did not begin"
        ):
            cluster.gather(of(0), patience=0.2, limit=1)
        line = f"Waiting for worker 1 ({addresses[2]}) of the cluster, 1 s in all …\n"
        assert capsys.readouterr().err == line
        with pytest.raises(
            UserError, match=r"`strategy=multi_worker`: worker 0, this process, cannot"
        ):
            cluster.gather(of(1))


@pytest.mark.slow
def test_a_worker_that_never_begins_ends_the_others_in_a_line(tmp_path):
    impatient = (
        "import sys; from tf_pcl import cli, compat; compat.import_tensorflow();"
        "from tf_pcl.training import cluster;"
        "cluster.PATIENCE, cluster.LIMIT = 0.4, 1.0;"
        "cli.run_verb('train', 'train.py', sys.argv[1:])"
    )
    addresses = free_addresses(2)
    task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": 0}}
    flags = ["--dataset=digits", "--network=resnet8", "--method=baseline", "--workdir=run"]
    command = "-c", impatient, *flags, "--strategy=multi_worker"
    done = python(*command, cwd=tmp_path, timeout=100, TF_CONFIG=json.dumps(task))
    waiting, ended = done.stderr.strip().splitlines()
    assert done.returncode == 1 and waiting.startswith(f"Waiting for worker 1 ({addresses[1]})")
    assert ended.startswith(f"train.py: worker 1 ({addresses[1]}) of the cluster did not begin")
    assert not (tmp_path / "run").exists()


def test_layers_that_depend_on_the_number_of_replicas(tmp_path):
    class Own(keras.layers.BatchNormalization):
        def call(self, inputs, training=None):
            return super().call(inputs, training)

    plain, dropped = with_norm((8, 8, 1), 10), keras.layers.Dropout(0.5, name="d")
    both = ["n1 (BatchNormalization)", "n2 (BatchNormalization)"]
    assert surgery.replica_bound(plain) == both
    assert surgery.replica_bound(plain, synchronized=True) == []
    more = with_norm((8, 8, 1), 10, (Own(name="o"), dropped))
    assert surgery.replica_bound(more) == [*both, "o (Own)", "d (Dropout)"]
    assert surgery.replica_bound(more, synchronized=True) == ["o (Own)", "d (Dropout)"]
    assert surgery.synchronize(more) == ["o (Own)"]

    workdir = Workdir(str(tmp_path))
    versions = {**report.versions(), "replicas": 2}
    workdir.check_replicas(1, both)
    workdir.begin(Options(), {}, versions)
    workdir.check_versions(report.versions())
    workdir.check_replicas(2, both)
    workdir.check_replicas(1, [])
    with pytest.raises(UserError, match=r"began on 2 replicas, not 1, .*\(n1 .*go on with 2"):
        workdir.check_replicas(1, both)


@pytest.mark.parametrize("shape", [(6,), (4, 4, 3)], ids=["plain", "fused"])
def test_synchronized_statistics_are_those_of_the_whole_batch(shape, two_replicas):
    # A mean that is large against the deviation: E x² − (E x)² would lose all digits.
    images = (np.random.RandomState(0).randn(8, *shape) + 3000).astype(np.float32)

    def trained(strategy):
        with strategy.scope():
            layer = keras.layers.BatchNormalization(momentum=0.5)
            model = keras.Sequential([keras.Input(shape), layer])
        assert surgery.synchronize(model) == []
        count = 8 // strategy.num_replicas_in_sync
        parts = strategy.experimental_distribute_values_from_function(
            lambda context: images[count * context.replica_id_in_sync_group :][:count]
        )
        step = lambda part: strategy.run(lambda x: model(x, training=True), (part,))
        made = strategy.experimental_local_results(tf.function(step)(parts))
        return [np.concatenate(made), *model.get_weights()]

    alone = trained(tf.distribute.get_strategy())
    assert_close(alone, trained(two_replicas), rtol=1e-5, atol=1e-3)


def test_synchronizing_changes_nothing_on_one_device(digits):
    usual, ours = with_norm((8, 8, 1), 10), with_norm((8, 8, 1), 10)
    ours.set_weights(usual.get_weights())
    config = ours.get_layer("n1").get_config()
    assert surgery.synchronize(ours) == [] and ours.get_layer("n1").get_config() == config
    images = tf.cast(digits.train.images[:16], tf.float32)
    for training in True, False:
        np.testing.assert_array_equal(usual(images, training), ours(images, training))
        np.testing.assert_equal(ours.get_weights(), usual.get_weights())
    ops = [
        [op.type for op in tf.function(m).get_concrete_function(images).graph.get_operations()]
        for m in (usual, ours)
    ]
    assert ops[0] == ops[1] and "FusedBatchNormV3" in ops[0]


def test_a_later_worker_follows_the_first(tmp_path):
    first, second = Workdir(str(tmp_path)), Workdir(str(tmp_path / "worker-1"))
    second.follow(first)
    assert not os.path.exists(second.path)
    first.begin(Options(), {}, report.versions())
    for stage, steps in (first, (8, 12)), (first.of_stage(1, "teacher"), (4,)), (second, (16,)):
        os.makedirs(stage.checkpoints)
        for step in steps:
            pathlib.Path(stage.checkpoints, f"ckpt-{step}.index").touch()
    first.write_rows([{"epoch": 1}])
    second.follow(first)
    assert sorted(os.listdir(second.checkpoints)) == ["ckpt-12.index", "ckpt-8.index"]
    assert os.listdir(second.of_stage(1, "teacher").checkpoints) == ["ckpt-4.index"]
    assert second.read_rows() == [{"epoch": 1.0}]


class Killed(Exception):
    pass


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_replicas(tmp_path, two_replicas, monkeypatch):
    images = noise(64, 8, 8, 1)
    data = with_labels(images, images[:, 0, 0, 0] % 10)
    options = Options(
        method="pcl", batch_size=16, epochs=2, checkpoint_every="3steps", sync_batch_norm=True
    )
    one, save = tf.distribute.get_strategy(), Checkpoints.save

    def saved(checkpoints, step):
        save(checkpoints, step)
        if step == stop:
            raise Killed

    monkeypatch.setattr(Checkpoints, "save", saved)

    def trained(name, strategy):
        trainer = Trainer(options, data, strategy)
        network = lambda: with_norm((8, 8, 1), 10)
        stage = Stage("", network, lambda _: METHODS["pcl"](network, split_at="stage_1", peers=2))
        model = trainer.build([stage], [])
        workdir = Workdir(str(tmp_path / name))
        trainer.train(model, workdir, lambda rows, selection: {})
        return [w.numpy() for w in model.weights], workdir.read_rows()

    stop = 0
    weights, whole = trained("alone", one)
    for begun, ended in (one, two_replicas), (two_replicas, one):
        name = f"from-{begun.num_replicas_in_sync}"
        stop = 3
        with pytest.raises(Stopped, match="Killed"):
            trained(name, begun)
        stop = 0
        again, resumed = trained(name, ended)
        assert_close(again, weights, rtol=1e-4, atol=1e-5)
        assert len(resumed) == len(whole) == 2
        for a, b in zip(whole, resumed):
            for key in set(a) - {"wall_seconds", "images_per_second"}:
                assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-4), key
