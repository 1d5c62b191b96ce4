"""What XLA makes of the training step, counted by kinds of operation.

    python benchmarks/hlo.py --networks=resnet8 --methods=pcl --precisions=float32,mixed_float16

For every network, precision and method, of its last stage, the step is compiled as
`--jit_compile` does, here for the CPU. It prints

- the seconds that this takes;
- how many operations there are; what is fused counts as one;
- how many of them are fusions, convolutions, matrix products, transposes, copies, branches;
- the transfers between the device and its host, by name, which a GPU would wait for. There should
  be none.

The operations before XLA improves them hardly depend on the device; those afterwards are of this
machine, and a GPU's are others: its convolutions want other layouts, and more is fused.
"""

import collections
import re
import time

import step
import tensorflow as tf
from absl import app, flags

from tf_pcl import data
from tf_pcl.compat import keras
from tf_pcl.methods.distiller import build_all

FLAGS = flags.FLAGS
flags.FLAGS.set_default("networks", ["resnet8"])
flags.FLAGS.set_default("batch_size", 16)

KINDS = ["fusion", "convolution", "dot", "transpose", "copy", "conditional"]
TRANSFERS = r"outfeed|infeed|send|recv|send-done|recv-done|.*[Hh]ost.*"
# A custom call is one to the host where its target says so.
LINE = re.compile(
    r"^\s*(?:ROOT )?%?[\w.\-]+ = (?:\(.*?\)|\S+) ([\w\-]+)\((?:.*custom_call_target=\"([^\"]*)\")?"
)
# Computations that a single operation is made of.
WITHIN = re.compile(r" (?:fusion|reduce|reduce-window|map|sort|scatter|select-and-scatter)\(.*")
CALLED = re.compile(r"(?:calls|to_apply|select|scatter)=%?([\w.\-]+)")


def counts(text: str) -> collections.Counter:
    """Counts the operations in the text of an HLO module, each fusion as one.

    Parameters, constants and tuples are no operations. A custom call counts under its target.
    """
    inside = {name for part in WITHIN.findall(text) for name in CALLED.findall(part)}
    found: collections.Counter = collections.Counter()
    skipped = False
    for line in text.splitlines():
        if line.endswith("{"):
            skipped = line.split()[0].lstrip("%") in inside
        match = LINE.match(line)
        if match and not skipped:
            found[match[2] or match[1]] += 1
    for kind in ("parameter", "constant", "tuple", "get-tuple-element"):
        del found[kind]
    return found


def modules(case: step.Case, loaded: data.ImageData, batch_size: int) -> tuple[float, dict]:
    """Returns the seconds of compiling a case's step, and {stage: text of its HLO module}."""
    keras.mixed_precision.set_global_policy(case.precision)
    model = build_all(step.stages_of(case, loaded))[-1]
    model.compile(epochs=300, steps_per_epoch=10, jit_compile=True)
    model.build_optimizer()
    batch = next(iter(data.train_batches(loaded, batch_size, 300, views=model.num_views)))
    compiled = tf.function(model.train_step, jit_compile=True)
    began = time.perf_counter()
    compiled(batch)
    seconds = time.perf_counter() - began
    text = compiled.experimental_get_compiler_ir(batch)
    return seconds, {stage: text(stage=stage) for stage in ("hlo", "optimized_hlo")}


def main(argv: list[str]) -> None:
    del argv
    tf.get_logger().setLevel("ERROR")
    loaded = data.load(FLAGS.dataset, FLAGS.data_dir, FLAGS.image_size)
    titles = ["operations", *KINDS]
    print(
        f"{'network':12} {'precision':15} {'method':10} compiled  {'stage':14}"
        + "".join(f"{title:>12}" for title in titles)
        + "  transfers"
    )
    for network in FLAGS.networks:
        for precision in FLAGS.precisions:
            for method in FLAGS.methods:
                case = step.Case(network, FLAGS.teacher_network, precision, method, 0)
                seconds, found = modules(case, loaded, FLAGS.batch_size)
                for stage, text in found.items():
                    of_kind = counts(text)
                    numbers = [sum(of_kind.values()), *(of_kind[kind] for kind in KINDS)]
                    transfers = [one for one in of_kind if re.fullmatch(TRANSFERS, one)]
                    print(
                        f"{network:12} {precision:15} {method:10} {seconds:6.1f} s  {stage:14}"
                        + "".join(f"{number:12}" for number in numbers)
                        + f"  {', '.join(transfers) or 'none'}",
                        flush=True,
                    )


if __name__ == "__main__":
    app.run(main)
