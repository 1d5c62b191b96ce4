"""What --deterministic and the search for numbers that are not finite cost.

    python benchmarks/checks.py --methods=baseline,pcl --networks=resnet32

It prints a line for every network and method, of the last stage:

- the milliseconds of a step within `fit`, on the real input pipeline;
- the time of a step with --deterministic, as a multiple of that;
- the time of a step when losses and errors are checked after it, as a multiple of that;
- the milliseconds of the check of all variables, which comes before each checkpoint, and what part
  that is of the time of writing a checkpoint.

Each round is a process of its own, and rounds with and without --deterministic come in turns, so
that a noisy machine disturbs all alike. The medians count. Flags are those of benchmarks/step.py.
"""

import contextlib
import multiprocessing
import tempfile
import time
from typing import Any, NamedTuple

import numpy as np
import step
from absl import app, flags

from tf_pcl import data
from tf_pcl.options import Options
from tf_pcl.training import strategy
from tf_pcl.training.callbacks import Record, Save
from tf_pcl.training.checkpoints import Checkpoints
from tf_pcl.training.workdir import Workdir

FLAGS = flags.FLAGS


class Seconds(NamedTuple):
    """What a round takes: a step without and with checks, the check of all variables, a save."""

    plain: float
    checked: float
    variables: float
    save: float


def of_round(source: tuple, case: step.Case, batch_size: int, steps: int, again: bool) -> Seconds:
    """Measures a round; `again` says whether it is with --deterministic."""
    options = Options(deterministic=again, strategy="one_device")
    strategy.prepare(options)
    with contextlib.redirect_stdout(None):
        loaded = data.load(*source)
    trained = step.Trained(case, loaded, batch_size, steps)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(trained.model, folder)
        save = Save(checkpoints, 10**9, 0, 10**9)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for checked in 4 * [False, True]:
            seconds[checked].append(of_fit(trained, folder, [save] if checked else []))
        variables = timed(checkpoints.not_finite)
        saves = timed(lambda: checkpoints.save(1))
    return Seconds(np.median(seconds[False]), np.median(seconds[True]), variables, saves)


def of_fit(trained: step.Trained, folder: str, more: list[Any]) -> float:
    """Returns the seconds of a step within `fit`, with more callbacks than a record and a clock."""
    record = Record(Workdir(folder), [], trained.batch_size, lambda rows: rows)
    clock = step.Clock()
    trained.model.fit(
        trained.stream,
        steps_per_epoch=trained.steps + 1,
        verbose=0,
        callbacks=[record, *more, clock],
    )
    return clock.seconds


def timed(call: Any) -> float:
    """Returns the seconds of a call, the median of five after a first one."""
    found = []
    for _ in range(6):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return float(np.median(found[1:]))


def measure(source: tuple, case: step.Case) -> dict[bool, list[Seconds]]:
    """Returns the rounds without and with --deterministic."""
    rounds: dict[bool, list[Seconds]] = {False: [], True: []}
    for again in FLAGS.rounds * [False, True]:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            asked = source, case, FLAGS.batch_size, FLAGS.steps, again
            rounds[again].append(pool.apply(of_round, asked))
    return rounds


def main(argv: list[str]) -> None:
    del argv
    source = FLAGS.dataset, FLAGS.data_dir, FLAGS.image_size
    with contextlib.redirect_stdout(None):
        loaded = data.load(*source)
    print(
        "network          method        ms/step  deterministic  losses checked  variables checked"
    )
    for network in FLAGS.networks:
        for method in FLAGS.methods:
            case = step.Case(network, FLAGS.teacher_network, "float32", method, 0)
            last = len(step.stages_of(case, loaded)) - 1
            rounds = measure(source, case._replace(stage=last))
            plain, again = (Seconds(*np.median(rounds[k], axis=0)) for k in (False, True))
            print(
                f"{network:16} {method:12} {1000 * plain.plain:8.1f}  "
                f"× {again.plain / plain.plain:<12.2f} × {plain.checked / plain.plain:<13.3f} "
                f"{1000 * plain.variables:.1f} ms, {100 * plain.variables / plain.save:.0f} % of "
                "a checkpoint",
                flush=True,
            )


if __name__ == "__main__":
    app.run(main)
