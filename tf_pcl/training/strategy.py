"""The distribution strategy of a run, and its precision and seeds."""

from collections.abc import Callable
from typing import Any, Optional

import tensorflow as tf

from tf_pcl import surgery
from tf_pcl.compat import keras, let_xla_compile_elementwise, no_lines_of_tensorflow
from tf_pcl.errors import UserError, one_line
from tf_pcl.options import Options
from tf_pcl.training import cluster as clusters

_DEPTHWISE = (
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv1D,
    keras.layers.SeparableConv2D,
)


def start(options: Options) -> tf.distribute.Strategy:
    """Prepares this process for a run and returns the strategy of its options.

    Raises:
      UserError: if this machine does not allow the strategy, or the options do not fit its number
        of replicas.
    """
    prepare(options)
    strategy = make(options.strategy)
    check(strategy, options)
    if tf.config.optimizer.get_jit():
        _compile_first()
    return strategy


def prepare(options: Options) -> None:
    """Sets what must be set before any network is built: precision, seeds, determinism."""
    set_precision(options.precision)
    keras.utils.set_random_seed(options.seed)
    # So layers that draw random numbers (dropout) keep the state of their generators in variables,
    # which checkpoints save.
    keras.backend.experimental.enable_tf_random_generator()
    if options.deterministic:
        tf.config.experimental.enable_op_determinism()
        # Arithmetic optimization turns several sums into one AddN, which adds three or more tensors
        # in an order that depends on timing.
        tf.config.optimizer.set_experimental_options({"arithmetic_optimization": False})


def set_precision(policy: str) -> None:
    """Sets Keras's precision policy and, in bfloat16 on the CPU, how elementwise work is compiled.

    TensorFlow's own kernels for ReLU and additions are slower there in bfloat16 than in float32,
    and take a third of a ResNet's step. Those of XLA are several times faster. Convolutions stay
    with oneDNN, whose kernels are faster than those of XLA.

    Args:
      policy: the name of a Keras policy, such as "mixed_bfloat16".
    """
    narrow = policy == "mixed_bfloat16" and let_xla_compile_elementwise()
    keras.mixed_precision.set_global_policy(policy)
    keras.backend.set_floatx("float32")  # The type of inputs, which a keras.json may change.
    # XLA is never turned off here, since it may have been turned on elsewhere.
    if narrow and not tf.config.list_physical_devices("GPU"):
        tf.config.optimizer.set_jit("autoclustering")


def slow_in_bfloat16(network: keras.Model) -> str:
    """Says which layers take longer in bfloat16 than in float32 on the CPU; "" if there are few.

    In bfloat16, BatchNorm is fast for multiples of 16 channels only. For other numbers of channels
    it takes three to five times as long as in float32. The gradient of a depthwise filter takes up
    to four times as long.

    Args:
      network: a built network.
    """
    if tf.config.list_physical_devices("GPU") or tf.config.list_physical_devices("TPU"):
        return ""
    layers = surgery.graph.leaves(network)
    norms = [one for one in layers if isinstance(one, keras.layers.BatchNormalization)]
    odd = [one for one in norms if one.moving_mean.shape[0] % 16]
    depthwise = [one for one in layers if isinstance(one, _DEPTHWISE)]
    slow = []
    if 4 * len(odd) > len(norms):
        slow.append(f"{len(odd)} BatchNorm layers (their channels are not a multiple of 16)")
    if depthwise:
        slow.append(f"{len(depthwise)} depthwise convolutions")
    if not slow:
        return ""
    return (
        f"`precision=mixed_bfloat16`: on a CPU, {' and '.join(slow)} are slower than in float32; "
        "try `precision=float32`"
    )


def _compile_first() -> None:
    """Lets XLA compile a small function, since TensorFlow writes two lines the first time."""
    relu = tf.function(tf.nn.relu)
    with no_lines_of_tensorflow():
        for _ in range(3):  # A cluster of operations is not compiled in its first run.
            relu(tf.ones([2], tf.bfloat16))


def make(name: str) -> tf.distribute.Strategy:
    """Makes a strategy.

    Args:
      name: auto (mirrored with several GPUs, else one device), mirrored, multi_worker (needs
        TF_CONFIG, see cluster.find), tpu or one_device.

    Raises:
      UserError: if this machine does not allow it.
      Stopped: if another process of the cluster does not begin.
    """
    # Physical devices, because listing logical ones starts TensorFlow's runtime, before which
    # workers must be connected.
    gpus = tf.config.list_physical_devices("GPU")
    if name == "mirrored" or (name == "auto" and len(gpus) > 1):
        devices = tf.config.list_logical_devices("GPU" if gpus else "CPU")
        return tf.distribute.MirroredStrategy([device.name for device in devices])
    if name == "multi_worker":
        clusters.gather(clusters.find())
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
    """Returns the data set for `fit` under a strategy.

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


def gatherer(strategy: tf.distribute.Strategy) -> Optional[Callable[[int], set[int]]]:
    """Returns a function number -> the numbers of all processes; all of them must call it.

    It is None where one process trains alone.
    """
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return None

    @tf.function
    def gathered(own: tf.Tensor) -> Any:
        context = tf.distribute.get_replica_context
        # The identity gives each replica's value a device, which the collective needs.
        return strategy.run(lambda one: context().all_gather(tf.identity(one), axis=0), (own,))

    def of_all(number: int) -> set[int]:
        given = gathered(tf.constant([number], tf.int64))
        return set(strategy.experimental_local_results(given)[0].numpy().tolist())

    return of_all
