"""tf-pcl train: the same as train.py."""

from collections.abc import Sequence

from tf_pcl import compat, options
from tf_pcl.errors import UserError
from tf_pcl.verbs import further_help
from tf_pcl.verbs.verb import Verb


def refuse_words(rest: Sequence[str]) -> None:
    """Raises UserError if there are arguments that are not flags."""
    if rest:
        raise UserError(f"{rest[0]!r} is not a flag: flags begin with --, as in --epochs=300")


def _train(rest: list[str]) -> None:
    refuse_words(rest)
    chosen = options.from_flags()
    # TensorFlow takes seconds to import, so the flags are checked first.
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
