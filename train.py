"""Trains a network with a method of online knowledge distillation: python train.py --method=pcl --dataset=cifar100"""

import os
import signal
import sys
import traceback

# TensorFlow's C++ side is silent: it reports missing GPU libraries as errors on machines without a GPU, and what fails
# here comes as a Python exception as well.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# A network of the user's own, --network=module:function, is looked for where the command is given.
sys.path.append(os.getcwd())

from absl import app, flags, logging

from tf_pcl import compat, options
from tf_pcl.errors import Stopped, UserError


def _refuse(error):
    print(f"train.py: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


def _parse(argv):
    if any(argument.startswith(("-help", "--help")) for argument in argv):
        compat.import_tensorflow()
        from tf_pcl.methods import METHODS
        from tf_pcl.networks import NETWORKS

        options.complete_help(METHODS, NETWORKS)
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as e:
        _refuse(e)
    if len(rest) > 1:
        _refuse(f"{rest[1]!r} is not a flag: flags begin with --, as in --method=pcl")
    return rest


def main(argv):
    del argv
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    # A training under way handles signals itself; elsewhere SIGTERM is what Ctrl-C is.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        settings = options.from_flags()
        # TensorFlow takes seconds to import: not before the flags are known to be good.
        compat.import_tensorflow()
        from tf_pcl.training import run

        run.run(settings)
    except UserError as e:
        _refuse(e)
    except KeyboardInterrupt:
        print(
            "train.py: stopped, not within a training; what was saved stands, and the same command goes on from there",
            file=sys.stderr,
        )
        sys.exit(1)
    except Stopped as e:
        if e.__cause__:
            traceback.print_exception(type(e.__cause__), e.__cause__, e.__cause__.__traceback__)
        print(f"train.py: {e}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    options.define_flags()
    flags.adopt_module_key_flags(options)
    app.run(main, flags_parser=_parse)
