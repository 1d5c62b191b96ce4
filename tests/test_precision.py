"""Elementwise operations of bfloat16 are compiled, and compute what they computed before."""

import pytest
import tensorflow as tf
from pages import python

from tf_pcl import networks
from tf_pcl.compat import keras
from tf_pcl.training import strategy

STEPS = """
import numpy as np, tensorflow as tf
from tf_pcl import data, methods, networks
from tf_pcl.compat import keras
from tf_pcl.training import strategy

strategy.set_precision("mixed_bfloat16")
digits = data.load("digits")
batch = next(iter(data.train_batches(digits, batch_size=16, epochs=1, views=2)))

def trained(compiled):
    tf.config.optimizer.set_jit("autoclustering" if compiled else False)
    keras.utils.set_random_seed(1)
    build = lambda: networks.resnet8(digits.image_shape, len(digits.classes))
    model = methods.PCL(build, peers=2, preprocess=networks.standardise(digits.mean, digits.std))
    model.compile()
    # TensorFlow compiles a cluster when it runs for the second time.
    model.fit(tf.data.Dataset.from_tensors(batch).repeat(), steps_per_epoch=4, epochs=1, verbose=0)
    return model.get_weights()

plain, compiled = trained(False), trained(True)
assert all(np.array_equal(a, b) for a, b in zip(plain, compiled))
print("equal:", len(plain))
"""


@pytest.mark.slow
def test_compiled_operations_of_bfloat16_change_no_bit():
    done = python("-c", STEPS, TF_CPP_MIN_LOG_LEVEL="0")
    assert "equal:" in done.stdout, done.stderr[-2000:]
    assert "Compiled cluster using XLA" in done.stderr


@pytest.mark.parametrize(
    ("policy", "gpus", "own", "jit"),
    [
        ("mixed_bfloat16", [], None, "autoclustering"),
        ("mixed_bfloat16", ["GPU:0"], None, ""),
        ("mixed_bfloat16", [], "--mine", ""),
        ("float32", [], None, ""),
    ],
)
def test_only_bfloat16_on_the_cpu_is_compiled(policy, gpus, own, jit, monkeypatch):
    monkeypatch.delenv("TF_XLA_FLAGS", raising=False)
    if own:
        monkeypatch.setenv("TF_XLA_FLAGS", own)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: gpus)
    try:
        # As the keras.json of a user may set it. Inputs would be rounded to it.
        keras.backend.set_floatx("float16")
        strategy.set_precision(policy)
        assert keras.Input([1]).dtype == "float32"
        assert keras.mixed_precision.global_policy().name == policy
        assert tf.config.optimizer.get_jit() == jit
    finally:
        tf.config.optimizer.set_jit(False)
        strategy.set_precision("float32")


def test_what_the_user_has_asked_of_xla_stays():
    try:
        tf.config.optimizer.set_jit("autoclustering")
        strategy.set_precision("float32")
        assert tf.config.optimizer.get_jit() == "autoclustering"
    finally:
        tf.config.optimizer.set_jit(False)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet8", ""),
        ("densenet40_12", "BatchNorm layers (their channels are not a multiple of 16)"),
        ("applications.MobileNet", "13 depthwise convolutions"),
    ],
)
def test_layers_that_bfloat16_makes_slower_are_named(name, said, monkeypatch):
    network = networks.build(name, (32, 32, 3), 10)
    line = strategy.slow_in_bfloat16(network)
    assert (said in line) if said else not line
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["GPU:0"])
    assert not strategy.slow_in_bfloat16(network)
