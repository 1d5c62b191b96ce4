"""Where the training runs."""

import json
import os

import tensorflow as tf

from tf_pcl.compat import keras
from tf_pcl.errors import UserError


def make(name):
    """The tf.distribute.Strategy of a name.

    Args:
      name: auto (mirrored with several GPUs, else one device), mirrored, multi_worker (needs TF_CONFIG), tpu, one_device.
    Raises:
      UserError: if this machine has no such thing.
    """
    # Physical ones: to list logical devices starts TensorFlow's runtime, before which several workers must be connected.
    gpus = tf.config.list_physical_devices("GPU")
    if name == "mirrored" or (name == "auto" and len(gpus) > 1):
        return tf.distribute.MirroredStrategy(
            [d.name for d in tf.config.list_logical_devices("GPU" if gpus else "CPU")]
        )
    if name == "multi_worker":
        if not json.loads(os.environ.get("TF_CONFIG") or "{}").get("cluster"):
            raise UserError(
                "--strategy=multi_worker needs the environment variable TF_CONFIG with the cluster and this "
                "worker's task"
            )
        return tf.distribute.MultiWorkerMirroredStrategy()
    if name == "tpu":
        try:
            resolver = tf.distribute.cluster_resolver.TPUClusterResolver.connect()
        except (ValueError, tf.errors.OpError) as e:
            raise UserError(
                f"--strategy=tpu: no TPU was found ({' '.join(str(e).split())[:120]})"
            ) from e
        return tf.distribute.TPUStrategy(resolver)
    return tf.distribute.get_strategy()


def worker():
    """The index of this process among several workers (TF_CONFIG), 0 for the first and for a process alone."""
    return json.loads(os.environ.get("TF_CONFIG") or "{}").get("task", {}).get("index", 0)


def check(strategy, options):
    """UserError where the settings do not fit the number of replicas."""
    replicas = strategy.num_replicas_in_sync
    if options.batch_size % replicas:
        raise UserError(
            f"--batch_size={options.batch_size} cannot be shared equally by {replicas} replicas: give a "
            f"multiple of {replicas}"
        )
    if options.jit_compile and replicas > 1:
        raise UserError(
            f"--jit_compile does not go with {replicas} replicas (TensorFlow compiles a step for one device "
            "only): add --strategy=one_device or leave it out"
        )


def prepare(options):
    """Process-wide settings that must stand before any network is built: precision, seeds, determinism."""
    keras.mixed_precision.set_global_policy(options.precision)
    keras.utils.set_random_seed(options.seed)
    # Layers that draw random numbers (dropout) keep their generators' state in variables, which checkpoints hold.
    keras.backend.experimental.enable_tf_random_generator()
    if options.deterministic:
        tf.config.experimental.enable_op_determinism()
        # Arithmetic optimization makes one AddN of several sums, and AddN adds three or more in an order that depends on timing.
        tf.config.optimizer.set_experimental_options({"arithmetic_optimization": False})


def distribute(strategy, batches):
    """A data set for fit from `batches`, a function shard=(i, n) -> tf.data.Dataset of the i-th of n parts of each batch."""
    if strategy.num_replicas_in_sync == 1:
        return batches(shard=(0, 1))

    def of_worker(context):
        part = batches(shard=(context.input_pipeline_id, context.num_input_pipelines))
        replicas = strategy.num_replicas_in_sync // context.num_input_pipelines
        size = part.element_spec[1].shape[0] // replicas
        return part.rebatch(size, drop_remainder=True)

    return strategy.distribute_datasets_from_function(of_worker)
