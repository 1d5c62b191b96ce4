"""A step that waits for its data is named, and one that does not is not."""

import dataclasses
import time

import pytest
import tensorflow as tf
from helpers import build, other, slow_but
from tensorflow import keras

from tf_pcl import data
from tf_pcl.data import storage
from tf_pcl.options import Options
from tf_pcl.training import feeding, run
from tf_pcl.training import strategy as strategies
from tf_pcl.training.feeding import Feeding


def slowed(batches, seconds):
    """Batches that take so many seconds each to make."""

    def wait(number):
        time.sleep(seconds)
        return number

    def after_a_while(number, batch):
        tf.numpy_function(wait, [number], tf.int64)
        return batch

    return batches.enumerate().map(after_a_while)


def fed(batches, digits, strategy=None, pause=0.0):
    """The Feeding of three epochs of 10 steps, with a pause of some seconds after each."""
    told = Feeding(digits)
    strategy = strategy or tf.distribute.get_strategy()
    with strategy.scope():
        model = build("baseline", other)
    given = strategies.distribute(strategy, lambda shard: told.noted(batches))
    rest = keras.callbacks.LambdaCallback(on_batch_end=lambda batch, logs: time.sleep(pause))
    model.fit(given, epochs=3, steps_per_epoch=10, verbose=0, callbacks=[told, rest])
    return told


@pytest.mark.parametrize("replicas", slow_but([1, 2], 2))
def test_a_slow_source_is_named_once(replicas, digits, two_replicas, monkeypatch, capsys):
    monkeypatch.setattr(feeding, "SECONDS", 0.1)
    batches = data.train_batches(digits, 32, 3)
    strategy = two_replicas if replicas == 2 else None
    told = fed(slowed(batches, 0.05), digits, strategy)
    assert 0.4 < told.share <= 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("WARNING: the training step waits for data ") and "CPU cores" in line


def test_batches_that_are_there_are_not_waited_for(digits, monkeypatch, capsys):
    monkeypatch.setattr(feeding, "SECONDS", 0.0)
    batch = next(iter(data.train_batches(digits, 32, 1)))
    told = fed(tf.data.Dataset.from_tensors(batch).repeat(), digits, pause=0.02)
    assert told.share < feeding.SHARE
    assert not capsys.readouterr().out


def test_nothing_is_said_of_a_short_training(digits, capsys):
    told = fed(slowed(data.train_batches(digits, 32, 3), 0.02), digits)
    assert told.waited > 0 and told.share is None
    assert not capsys.readouterr().out


def test_batches_stay_as_they_are(digits):
    batches = data.train_batches(digits, 100, 1, views=2, seed=3)
    pairs = [*zip(batches, Feeding(digits).noted(batches))]
    assert len(pairs) == 14
    for batch, noted in pairs:
        for a, b in zip(batch, noted):
            assert a.shape == b.shape and bool(tf.reduce_all(a == b))


def test_what_to_do_depends_on_the_source(digits):
    files = storage.Files([b"a.jpg"], [1], [0], None, (8, 8, 3))
    kept = feeding.starving(0.4, digits)
    read = feeding.starving(0.4, dataclasses.replace(digits, train=files))
    assert kept.startswith("the training step waits for data 40 % of the time.")
    assert "decoded" in read and "decoded" not in kept


@pytest.mark.slow
def test_a_run_that_starves_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(feeding, "SECONDS", 0.1)
    fetch = storage.Arrays.fetch

    def late(self, index):
        def wait(index):
            time.sleep(0.1)
            return index

        waited = tf.numpy_function(wait, [index], index.dtype)
        waited.set_shape(index.shape)
        return fetch(self, waited)

    monkeypatch.setattr(storage.Arrays, "fetch", late)
    run.run(
        Options(
            method="baseline",
            dataset="digits",
            network="helpers:without_norm",
            batch_size=128,
            epochs=2,
            workdir=str(tmp_path / "late"),
        )
    )
    assert "WARNING: the training step waits for data" in capsys.readouterr().out
