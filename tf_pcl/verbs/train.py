"""tf-pcl train: the same as train.py."""

from tf_pcl import compat, options
from tf_pcl.errors import UserError
from tf_pcl.verbs import further_help
from tf_pcl.verbs.verb import Verb


def _refuse_words(rest: list[str]) -> None:
    if rest:
        raise UserError(f"{rest[0]!r} is not a flag: flags begin with --, as in --epochs=300")


def _train(rest: list[str]) -> None:
    _refuse_words(rest)
    chosen = options.from_flags()
    # TensorFlow takes seconds to import: not before the flags are known to be good.
    if chosen.precision == "mixed_bfloat16":
        compat.let_xla_compile_elementwise()
    compat.import_tensorflow()
    from tf_pcl.training import run

    run.run(chosen)


VERB = Verb(
    "Trains a network with a method of online knowledge distillation.",
    options.define_flags,
    _train,
    complete_help=further_help.complete,
)
