"""What a training step is measured by: the machine's own speed, and the step's convolutions alone.

Everything is timed inside one graph: called one by one from Python, products and convolutions lose
up to a fifth of their speed.
"""

import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

# The arithmetic of a network, forward and backward.
ARITHMETIC = (
    "BatchMatMulV2",
    "Conv2D",
    "Conv2DBackpropFilter",
    "Conv2DBackpropInput",
    "Conv3D",
    "Conv3DBackpropFilterV2",
    "Conv3DBackpropInputV2",
    "DepthwiseConv2dNative",
    "DepthwiseConv2dNativeBackpropFilter",
    "DepthwiseConv2dNativeBackpropInput",
    "MatMul",
)
# Operations that give their input on, or that only name something: they move no memory.
FREE = ("Const", "ExpandDims", "Identity", "Placeholder", "ReadVariableOp", "Reshape", "Squeeze")

SIDES = 1024, 2048, 3072  # of the matrices that are multiplied
SUMMED = 2**26  # float32 numbers in each of two vectors that are added: 256 MiB


class Machine:
    """Measures how fast this machine multiplies matrices and moves memory.

    Args:
      dtype: the type of the matrices.

    Attributes:
      flop_per_second: for each turn, that of the fastest of several sizes of matrices.
      bytes_per_second: for each turn, what `a += b` reads and writes, for vectors that are much
        larger than any cache. Nothing is allocated, unlike in a copy.
    """

    def __init__(self, dtype: tf.DType):
        self._products = [_products(side, dtype) for side in SIDES]
        self._sum = _sum(SUMMED)
        self.flop_per_second: list[float] = []
        self.bytes_per_second: list[float] = []

    def take_turn(self) -> None:
        """Measures both once."""
        self.flop_per_second.append(max(flop / _seconds(run) for run, flop in self._products))
        run, moved = self._sum
        self.bytes_per_second.append(moved / _seconds(run))


class Convolutions:
    """Measures a step's convolutions and matrix products alone, one after another in one graph.

    Each is computed as often, with the same shapes, types and attributes and in the same order as
    the step does, on inputs that lie ready; nothing else is computed.

    Args:
      step: the step's concrete function, whose shapes are all known.

    Attributes:
      seconds: what all of them take, for each turn.
    """

    def __init__(self, step: Any):
        self._variables: dict[tuple, tf.Variable] = {}
        self._builders = [
            self._builder(operation)
            for operation in operations(step.graph)
            if operation.type in ARITHMETIC
        ]
        self._run = tf.function(self._all)
        self._run()
        self.seconds: list[float] = []

    def __len__(self) -> int:
        return len(self._builders)

    def take_turn(self) -> None:
        """Measures them once."""
        self.seconds.append(_seconds(self._run))

    def _builder(self, operation: tf.Operation) -> Callable[[], tf.Tensor]:
        """Returns a function that builds an operation anew, on inputs of its own."""
        definition = operation.op_def
        types = {argument.type_attr for argument in definition.input_arg}
        arguments = {
            a.name: operation.get_attr(a.name) for a in definition.attr if a.name not in types
        }
        for argument, tensor in zip(definition.input_arg, operation.inputs):
            if argument.name.endswith("_sizes"):
                # The shape of an image or a filter whose gradient this is.
                arguments[argument.name] = tf.constant(operation.outputs[0].shape.as_list())
            else:
                arguments[argument.name] = self._variable(tensor)
        function = getattr(tf.raw_ops, operation.type)
        return lambda: function(**arguments)

    def _variable(self, tensor: tf.Tensor) -> tf.Variable:
        """Returns what stands in for a tensor, a variable: constants would be computed once."""
        key = tuple(tensor.shape), tensor.dtype
        if key not in self._variables:
            noise = tf.random.normal(tensor.shape, stddev=0.1)
            self._variables[key] = tf.Variable(tf.cast(noise, tensor.dtype), trainable=False)
        return self._variables[key]

    def _all(self) -> tf.Tensor:
        numbers: list[tf.Tensor] = []
        for build in self._builders:
            with tf.control_dependencies(numbers[-1:]):
                # One number of each goes into the sum, so that none is left out.
                numbers.append(tf.cast(tf.reshape(build(), [-1])[0], tf.float32))
        return tf.add_n(numbers)


def operations(graph: Any) -> Iterator[tf.Operation]:
    """Yields what a function's graph computes, the functions that it calls included.

    What neither the results nor a change of a variable depends on is left out, as TensorFlow does.

    Args:
      graph: the `graph` of a concrete function.
    """
    waiting = [tensor.op for tensor in graph.outputs] + list(graph.control_outputs)
    needed = set()
    while waiting:
        operation = waiting.pop()
        if operation not in needed:
            needed.add(operation)
            waiting += [tensor.op for tensor in operation.inputs] + list(operation.control_inputs)
    for operation in graph.get_operations():
        if operation in needed:
            yield operation
            for attribute in operation.node_def.attr.values():
                for called in (attribute.func, *attribute.list.func):
                    if called.name:
                        yield from operations(graph._get_function(called.name).graph)


def moved_bytes(step: Any) -> int:
    """Returns the bytes that a step reads and writes if no operation finds its input in a cache.

    TensorFlow may fuse operations, and then it moves less. Where a variable is changed, what is
    added or assigned counts, and not the variable itself.

    Args:
      step: the step's concrete function.
    """
    return sum(
        (tensor.shape.num_elements() or 0) * tensor.dtype.size
        for operation in operations(step.graph)
        if operation.type not in FREE
        for tensor in (*operation.inputs, *operation.outputs)
    )


def _products(side: int, dtype: tf.DType) -> tuple[Callable[[], Any], float]:
    """Returns a function that multiplies square matrices some times, and its FLOP."""
    a, b = (
        tf.Variable(tf.cast(tf.random.normal([side, side], stddev=side**-0.5), dtype))
        for _ in range(2)
    )
    times = max(1, 4 * 2048**3 // side**3)

    @tf.function
    def run():
        product = a
        for _ in range(times):
            product = tf.matmul(product, b)
        return product[0, 0]

    run()
    return run, 2.0 * times * side**3


def _sum(size: int) -> tuple[Callable[[], Any], float]:
    """Returns a function that adds a vector to another one in its place, and the bytes it moves."""
    a, b = (tf.Variable(tf.fill([size], value)) for value in (0.0, 1.0))

    @tf.function
    def run():
        a.assign_add(b)
        return a[0]

    run()
    return run, 3.0 * a.dtype.size * size


def rate(call: Callable[[], Any], seconds: float) -> float:
    """Returns how often a second something can be called, in so many seconds, at least twice."""
    count, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds or count < 2:
        call()
        count += 1
    return count / spent


def most_memory() -> float:
    """Returns the GiB that this process has held at most, as Linux counts them."""
    # Not getrusage, in which a process inherits its parent's.
    with open("/proc/self/status") as f:
        (kib,) = re.findall(r"VmHWM:\s+(\d+) kB", f.read())
    return int(kib) / 2**20


def _seconds(run: Callable[[], Any]) -> float:
    """Returns the seconds that a graph takes once."""
    began = time.perf_counter()
    run().numpy()
    return time.perf_counter() - began
