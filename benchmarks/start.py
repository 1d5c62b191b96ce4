"""What the time of a run goes to before its first step, and after its last one.

    python benchmarks/start.py --networks=resnet8,resnet32 --methods=pcl

It prints the seconds of the three commands' `--help`, and a line for every network and method, of
its last stage. The seconds are those of

- import: TensorFlow and the package;
- data: the images are loaded;
- build: networks, variables and the optimizer's slots are made;
- check: the networks are tried, to prove that parts compute what the whole does;
- trace: Python makes the graph of the training step;
- first step: TensorFlow improves the graph and runs it once;
- steps: `--steps` further ones;
- export: the SavedModel is written, and answers in a fresh process.

Every line is measured in processes of its own, in turns. The medians count; behind the sum from
import to first step stands half of the range of the rounds.
"""

import contextlib
import multiprocessing
import os
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

BEGAN = time.perf_counter()

import subprocess  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Iterator  # noqa: E402

import numpy as np  # noqa: E402
import step  # noqa: E402
import tensorflow as tf  # noqa: E402
from absl import app, flags  # noqa: E402

from tf_pcl import data, surgery  # noqa: E402
from tf_pcl.compat import keras  # noqa: E402
from tf_pcl.methods.distiller import build_all  # noqa: E402
from tf_pcl.training import export  # noqa: E402

# In the process that measures, this module is imported anew.
IMPORT = time.perf_counter() - BEGAN

FLAGS = flags.FLAGS
flags.FLAGS.set_default("rounds", 1)
STAGES = ["import", "data", "build", "check", "trace", "first step", "steps", "export"]
HELP = {
    "python train.py --help": ["train.py", "--help"],
    "python -m tf_pcl --help": ["-m", "tf_pcl", "--help"],
    "python -m tf_pcl export --help": ["-m", "tf_pcl", "export", "--help"],
}


@contextlib.contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Notes what the body takes."""
    began = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - began


def of_case(source: tuple, case: step.Case, batch_size: int, steps: int) -> dict[str, float]:
    """Returns the seconds of every stage of a case in this process."""
    # Keras warns of a loaded model that was never compiled.
    tf.get_logger().setLevel("ERROR")
    seconds = {"import": IMPORT}
    with timed(seconds, "data"), contextlib.redirect_stdout(None):
        loaded = data.load(*source)
    keras.mixed_precision.set_global_policy(case.precision)
    with timed(seconds, "build"):
        model = build_all(step.stages_of(case, loaded))[-1]
        model.compile(epochs=300, steps_per_epoch=steps + 1)
        model.build_optimizer()
        deployed = model.deployed()
    seconds["check"] = surgery.trials.seconds
    seconds["build"] -= seconds["check"]
    stream = data.train_batches(loaded, batch_size, 300, views=model.num_views)
    batch = iter(tf.data.Dataset.from_tensors(next(iter(stream))).repeat())
    function = model.make_train_function()
    with timed(seconds, "trace"):
        function.get_concrete_function(batch)
    for stage, count in {"first step": 1, "steps": steps}.items():
        with timed(seconds, stage):
            for _ in range(count):
                logs = function(batch)
            logs["loss"].numpy()
    with timed(seconds, "export"), tempfile.TemporaryDirectory() as folder:
        made = export.export(deployed, loaded.classes, folder)
        export.check(made, deployed, loaded.test.first(32))
    return seconds


def seconds_of_help(arguments: list[str]) -> float:
    """Returns the seconds of a command that prints its help."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def main(argv: list[str]) -> None:
    del argv
    source = FLAGS.dataset, FLAGS.data_dir, FLAGS.image_size
    for command, arguments in HELP.items():
        found = [seconds_of_help(arguments) for _ in range(FLAGS.rounds)]
        print(f"{command:32} {np.median(found):6.2f} s", flush=True)
    cases = [
        step.Case(network, FLAGS.teacher_network, "float32", method, 0)
        for network in FLAGS.networks
        for method in FLAGS.methods
    ]
    rounds: dict[step.Case, list] = {case: [] for case in cases}
    for _ in range(FLAGS.rounds):
        for case in cases:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                asked = source, case, FLAGS.batch_size, FLAGS.steps
                rounds[case].append(pool.apply(of_case, asked))
    print(f"{'network':16} {'method':10}" + "".join(f"{s:>11}" for s in STAGES) + "  to first step")
    for case, found in rounds.items():
        medians = [np.median([one[stage] for one in found]) for stage in STAGES]
        sums = [sum(one[stage] for stage in STAGES[:6]) for one in found]
        print(
            f"{case.network:16} {case.method:10}"
            + "".join(f"{s:11.2f}" for s in medians)
            + f"{np.median(sums):12.1f} s ± {np.ptp(sums) / 2:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    app.run(main)
