"""Where the training runs."""

import json
import os
import re
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tf_pcl.compat import keras
from tf_pcl.errors import UserError, one_line
from tf_pcl.options import Options


def start(options: Options) -> tf.distribute.Strategy:
    """Prepares this process for a run and returns the strategy of its options.

    Raises:
      UserError: if this machine has no such strategy, or the options do not fit its number of
        replicas.
    """
    prepare(options)
    strategy = make(options.strategy)
    check(strategy, options)
    return strategy


def prepare(options: Options) -> None:
    """Sets what must stand before any network is built: precision, seeds, determinism."""
    keras.mixed_precision.set_global_policy(options.precision)
    keras.utils.set_random_seed(options.seed)
    # Layers that draw random numbers (dropout) then keep the state of their generators in
    # variables, which checkpoints hold.
    keras.backend.experimental.enable_tf_random_generator()
    if options.deterministic:
        tf.config.experimental.enable_op_determinism()
        # Arithmetic optimization turns several sums into one AddN, which adds three or more tensors
        # in an order that depends on timing.
        tf.config.optimizer.set_experimental_options({"arithmetic_optimization": False})


def make(name: str) -> tf.distribute.Strategy:
    """Makes a strategy.

    Args:
      name: auto (mirrored with several GPUs, else one device), mirrored, multi_worker (needs
        TF_CONFIG), tpu or one_device.

    Raises:
      UserError: if this machine has no such thing.
    """
    # Physical devices, because listing logical ones starts TensorFlow's runtime, and several
    # workers must be connected before that.
    gpus = tf.config.list_physical_devices("GPU")
    if name == "mirrored" or (name == "auto" and len(gpus) > 1):
        devices = tf.config.list_logical_devices("GPU" if gpus else "CPU")
        return tf.distribute.MirroredStrategy([device.name for device in devices])
    if name == "multi_worker":
        worker()
        return tf.distribute.MultiWorkerMirroredStrategy()
    if name == "tpu":
        try:
            resolver = tf.distribute.cluster_resolver.TPUClusterResolver.connect()
        except (ValueError, tf.errors.OpError) as e:
            raise UserError(
                f"no TPU was found ({one_line(e)}): take another strategy",
                parameter="strategy",
                value=name,
            ) from e
        return tf.distribute.TPUStrategy(resolver)
    return tf.distribute.get_strategy()


def worker() -> int:
    """Returns this process's number among those of the cluster in TF_CONFIG.

    The chief, where there is one, has the number 0, and the workers follow.

    Raises:
      UserError: if TF_CONFIG does not say what the cluster is and which task this process has.
    """
    text = os.environ.get("TF_CONFIG") or "{}"
    try:
        config = json.loads(text)
        cluster, task = config["cluster"], config["task"]
        if other := set(cluster) - {"chief", "worker"}:
            raise ValueError(f"a task is a chief or a worker, not {', '.join(sorted(other))}")
        for address in [a for kind in cluster.values() for a in list(kind)]:
            if not re.fullmatch(r".+:\d+", address):
                raise ValueError(f"an address is HOST:PORT, not {address}")
        kinds = [kind for kind in ("chief", "worker") if kind in cluster]
        tasks = [(kind, i) for kind in kinds for i in range(len(cluster[kind]))]
        return tasks.index((task["type"], task["index"]))
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(
            "it needs the environment variable TF_CONFIG with the cluster and this process's task, "
            'such as {"cluster": {"worker": ["host0:2222", "host1:2222"]}, "task": {"type": '
            f'"worker", "index": 0}}}}; TF_CONFIG is {text[:200]} ({one_line(e)})',
            parameter="strategy",
            value="multi_worker",
        ) from e


def check(strategy: tf.distribute.Strategy, options: Options) -> None:
    """Checks that the options fit the strategy's number of replicas.

    Raises:
      UserError: if they do not.
    """
    replicas = strategy.num_replicas_in_sync
    if options.batch_size % replicas:
        raise UserError(
            f"the batch cannot be shared equally by {replicas} replicas: give a multiple of "
            f"{replicas}",
            parameter="batch_size",
            value=options.batch_size,
        )
    if options.jit_compile and replicas > 1:
        raise UserError(
            f"`jit_compile` does not go with {replicas} replicas, since TensorFlow compiles a "
            "step for one device only: add `strategy=one_device` or leave it out"
        )


def distribute(strategy: tf.distribute.Strategy, batches: Callable[..., tf.data.Dataset]) -> Any:
    """Returns what `fit` iterates over under a strategy.

    Args:
      strategy: where the training runs.
      batches: a function shard=(i, n) -> tf.data.Dataset of the i-th of n parts of each batch.
    """
    if strategy.num_replicas_in_sync == 1:
        return batches(shard=(0, 1))

    def of_worker(context: tf.distribute.InputContext) -> tf.data.Dataset:
        part = batches(shard=(context.input_pipeline_id, context.num_input_pipelines))
        replicas = strategy.num_replicas_in_sync // context.num_input_pipelines
        size = part.element_spec[1].shape[0] // replicas
        return part.rebatch(size, drop_remainder=True)

    return strategy.distribute_datasets_from_function(of_worker)
