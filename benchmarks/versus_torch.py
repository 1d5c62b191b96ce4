"""The speed of PCL's training step beside the same step in PyTorch (benchmarks/torch_pcl.py).

    pip install 'tf_pcl[bench]'
    python benchmarks/versus_torch.py

PyTorch takes the step in several variants: with the layout that it has by default and with channels
last, each as it is (eager) and under torch.compile, which needs a C++ compiler. Both frameworks get
the same images, weights and number of threads. tf_pcl reports all its metrics beside.

First, both losses are compared to the equations in NumPy that the tests use, on given logits, and
the losses of the first steps to each other. The program ends with an error if they differ. Then
speeds are taken in turns, in rounds, so that a noisy machine disturbs all alike. It prints for
every precision and variant:

- the loss of the last step that was compared;
- the images/s (augmented views not counted), the median over the rounds and the range;
- the speed of tf_pcl as a multiple of it.

The figure that counts is the multiple of the best variant, in the last line of a precision.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.append(os.path.join(sys.path[0], "tests"))

import numpy as np
import oracle
import tensorflow as tf
from absl import app, flags

from tf_pcl import compat, networks
from tf_pcl.compat import keras
from tf_pcl.methods import METHODS
from tf_pcl.methods.distiller import Exit
from tf_pcl.optimizer import CoupledSGD
from tf_pcl.training import strategy

# Names as TensorFlow's layers and PyTorch's options have them.
PRECISIONS = {"float32": "float32", "bfloat16": "mixed_bfloat16"}
VARIANTS = ("eager", "eager_channels_last", "compiled", "compiled_channels_last")
BLOCKS = {"resnet8": 1, "resnet14": 2, "resnet20": 3, "resnet32": 5}
# ω is at its full value after two steps, so that all terms count in the losses that are compared.
RAMP_UP, LARGEST_DECAY, COMPARED = 2, 0.999, 4
# Relative; of the losses on given logits, and of the first and all compared steps.
GIVEN, STEPS = 1e-5, {"float32": (1e-4, 1e-2), "bfloat16": (1e-2, 5e-2)}

# Before app.run, in which TensorFlow looks for devices.
compat.let_xla_compile_elementwise()

FLAGS = flags.FLAGS
flags.DEFINE_enum("network", "resnet32", list(BLOCKS), "target network")
flags.DEFINE_integer("peers", 3, "m")
flags.DEFINE_integer("image_size", 32, "pixels")
flags.DEFINE_integer("classes", 100, "C")
flags.DEFINE_integer("batch_size", 128, "images a step")
flags.DEFINE_list("precisions", list(PRECISIONS), "what to measure")
flags.DEFINE_list("variants", list(VARIANTS), "PyTorch's; with none, PyTorch is not needed")
for _name, _known in (("precisions", PRECISIONS), ("variants", VARIANTS)):
    flags.register_validator(_name, set(_known).issuperset, f"known are {', '.join(_known)}")
flags.DEFINE_integer("threads", os.cpu_count(), "of each framework")
flags.DEFINE_integer("steps", 4, "steps a round")
flags.DEFINE_integer("rounds", 5, "rounds")


class Batch(NamedTuple):
    """Noise: views uint8 [B, m, H, W, 3] and labels int64 [B]."""

    views: np.ndarray
    labels: np.ndarray


class Runner:
    """A training step that is compared and timed.

    Args:
      name: for the table.
      take: a function that takes a step and returns its loss, which float() reads.
    """

    def __init__(self, name: str, take: Callable[[], Any]):
        self.name, self.take = name, take
        self.losses = [float(take()) for _ in range(COMPARED)]
        self.speeds: list[float] = []

    def take_turn(self) -> None:
        """Takes the images/s of a round."""
        began = time.perf_counter()
        for _ in range(FLAGS.steps):
            loss = self.take()
        float(loss)
        self.speeds.append(FLAGS.steps * FLAGS.batch_size / (time.perf_counter() - began))


def model_of(policy: str) -> Any:
    """Returns tf_pcl's PCL, always with the same weights."""
    tf.config.optimizer.set_jit(False)  # As in a run of this precision alone.
    strategy.set_precision(policy)
    keras.utils.set_random_seed(0)
    shape = (FLAGS.image_size, FLAGS.image_size, 3)
    model = METHODS["pcl"](
        lambda: networks.NETWORKS[FLAGS.network](shape, FLAGS.classes),
        peers=FLAGS.peers,
        rampup_epochs=RAMP_UP,
        ema_decay=LARGEST_DECAY,
        preprocess=networks.standardise([128.0] * 3, [64.0] * 3),
    )
    model.compile(CoupledSGD(0.1), epochs=300, steps_per_epoch=1)
    return model


def step_of(model: Any, batch: Batch) -> Callable[[], Any]:
    """Returns tf_pcl's step."""
    step = model.make_train_function()
    again = iter(tf.data.Dataset.from_tensors(tuple(batch)).repeat())

    def take() -> Any:
        model.reset_metrics()  # Else the loss would be the mean over all steps.
        return step(again)["loss"]

    return take


def weights_of(model: Any) -> dict[str, list]:
    """Returns the weights of the peers' layers, as torch_pcl.load takes them."""
    student = model.student
    layers = [layer for part in (student.trunk, *student.branches) for layer in part.layers]
    found: dict[str, list] = {"Conv2D": [], "BatchNormalization": [], "Dense": []}
    for layer in (*layers, student.ensemble_classifier):
        if type(layer).__name__ in found:
            found[type(layer).__name__].append(layer.get_weights())
    return found


def torch_steps(model: Any, batch: Batch, precision: str) -> Iterable[tuple[str, Callable]]:
    """Yields the name and the step of each of PyTorch's variants."""
    import torch
    import torch_pcl

    apart = model.student.trunk_batch == "apart"
    peers = torch_pcl.Peers(BLOCKS[FLAGS.network], FLAGS.peers, FLAGS.classes, apart)
    torch_pcl.load(peers, weights_of(model))
    views = batch.views.transpose(1, 0, 4, 2, 3).reshape(-1, 3, *batch.views.shape[2:4])
    for variant in FLAGS.variants:
        step = torch_pcl.Step(
            peers,
            torch.tensor(views),
            torch.tensor(batch.labels),
            narrow=precision == "bfloat16",
            channels_last="channels_last" in variant,
            compiled="compiled" in variant,
        )
        yield variant, scheduled(step)


def scheduled(step: Callable) -> Callable[[], Any]:
    """Returns a function that takes the next step, with ω and φ as they are then."""
    done = 0

    def take() -> Any:
        nonlocal done
        done += 1
        omega = oracle.omega(done - 1, RAMP_UP)
        return step(float(omega), oracle.phi(done, LARGEST_DECAY))

    return take


def compare_given(model: Any, batch: Batch) -> str:
    """Compares the loss terms on given logits, those of the peers and the ensemble twice."""
    z = 3 * np.random.RandomState(1).randn(2, FLAGS.peers + 1, FLAGS.batch_size, FLAGS.classes)
    model.step.assign(1)
    omega = oracle.omega(1, RAMP_UP)
    student, teacher = z
    want = oracle.pcl(batch.labels, student[:-1], student[-1], teacher[:-1], 3.0, omega)
    trained = [name for name in model.exits if not name.startswith("mean_")]
    exits = lambda prefix, given: {
        prefix + name: Exit(tf.constant(one, tf.float32)) for name, one in zip(trained, given)
    }
    terms = model.loss_terms(batch.labels, exits("", student), exits("mean_", teacher))
    found = {"tf_pcl": [float(terms[name]) for name in ("ce", "ensemble", "mean")]}
    model.step.assign(0)
    if FLAGS.variants:
        import torch
        import torch_pcl

        tensors = (torch.tensor(one, dtype=torch.float32) for one in z)
        labels = torch.tensor(batch.labels)
        found["PyTorch"] = [float(x) for x in torch_pcl.losses(labels, *tensors, omega)]
    for name, terms in found.items():
        check(f"{name}'s loss terms on given logits", terms, want, GIVEN)
    return f"loss terms on given logits: {' and '.join(found)} equal the equations in NumPy"


def check(what: str, got: Any, want: Any, tolerance: float) -> None:
    """Ends the program if numbers differ by more than a relative tolerance."""
    if not np.allclose(got, want, rtol=tolerance, atol=0):
        sys.exit(f"{what} are {np.array(got)} and should be {np.array(want)}: nothing was measured")


def measure(precision: str, batch: Batch) -> list[Runner]:
    """Measures tf_pcl, which comes first, and PyTorch's variants."""
    model = model_of(PRECISIONS[precision])
    print(f"{precision}: {compare_given(model, batch)}", flush=True)
    # Before tf_pcl's first step, since weights are copied.
    others = list(torch_steps(model, batch, precision)) if FLAGS.variants else []
    runners = []
    for name, take in (("tf_pcl", step_of(model, batch)), *others):
        runners.append(Runner(name, take))
        for count, tolerance in zip((1, COMPARED), STEPS[precision]):
            got, want = (one.losses[:count] for one in (runners[-1], runners[0]))
            check(f"the losses of {name}'s steps in {precision}", got, want, tolerance)
    for _ in range(FLAGS.rounds):
        for runner in runners:
            runner.take_turn()
    return runners


def report(precision: str, runners: list[Runner]) -> None:
    """Prints the lines of a precision."""
    speed = lambda runner: float(np.median(runner.speeds))
    ours, *others = runners
    print(
        f"{'precision':10} {'step':24} {'loss':>9} {'images/s':>9}  {'range':13} tf_pcl's multiple"
    )
    for runner in runners:
        print(
            f"{precision:10} {runner.name:24} {runner.losses[-1]:9.5f} {speed(runner):9.1f}  "
            f"{f'{min(runner.speeds):.1f}–{max(runner.speeds):.1f}':13} "
            f"{speed(ours) / speed(runner):.2f}"
        )
    if others:
        best = max(others, key=speed)
        ratios = np.divide(ours.speeds, np.max([one.speeds for one in others], axis=0))
        print(
            f"{precision}: tf_pcl is {speed(ours) / speed(best):.2f} times as fast as the best of "
            f"PyTorch, {best.name} (in single rounds {min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )


def main(argv: list[str]) -> None:
    del argv
    tf.config.threading.set_intra_op_parallelism_threads(FLAGS.threads)
    if FLAGS.variants:
        prepare_torch(FLAGS.threads)
    rng = np.random.RandomState(0)
    shape = (FLAGS.batch_size, FLAGS.peers, FLAGS.image_size, FLAGS.image_size, 3)
    batch = Batch(
        rng.randint(0, 256, shape).astype(np.uint8), rng.randint(0, FLAGS.classes, shape[0])
    )
    for precision in FLAGS.precisions:
        report(precision, measure(precision, batch))
        keras.backend.clear_session()


def prepare_torch(threads: int) -> None:
    """Gives PyTorch as many threads as TensorFlow; ends the program if it is not installed."""
    try:
        import torch
    except ImportError:
        sys.exit("PyTorch is not installed: pip install 'tf_pcl[bench]', or give --variants=")
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # As TensorFlow does.
    print(f"TensorFlow {tf.__version__} and PyTorch {torch.__version__}, {threads} threads each")


if __name__ == "__main__":
    app.run(main)
