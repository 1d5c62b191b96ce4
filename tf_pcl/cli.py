"""The command line: tf-pcl VERB [flags].

Exit status: 0 when done; 2 for an invalid request, with one line on stderr; 1 when a run ended
  early.
"""

import os
import pathlib
import re
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn, Union

from absl import app, flags, logging

from tf_pcl import console, options
from tf_pcl.errors import Stopped, UserError, choose
from tf_pcl.verbs import VERBS
from tf_pcl.verbs.verb import Verb

PROGRAM = "tf-pcl"
HELP = ("--help", "-help", "--helpshort", "-helpshort", "-h")
# A checkout has the recipes beside the package, an installed package has them inside.
_PACKAGE = pathlib.Path(__file__).parent
RECIPES = [_PACKAGE / "flags", _PACKAGE.parent / "flags"]


def main() -> NoReturn:
    """Runs the verb that the command line names: tf-pcl VERB [flags]."""
    console.protect()
    verb, *arguments = sys.argv[1:] or ["--help"]
    if verb in HELP:
        print(_overview())
        sys.exit(0)
    try:
        choose("verb", verb, VERBS)
    except UserError as e:
        sys.exit(_refuse(PROGRAM, str(e)))
    run_verb(verb, f"{PROGRAM} {verb}", arguments)


def run_verb(verb: str, program: str, arguments: Sequence[str]) -> NoReturn:
    """Runs one verb and exits.

    Args:
      verb: its name in VERBS.
      program: what the user called, with which errors begin.
      arguments: what follows it on the command line.
    """
    console.protect()
    # TensorFlow's C++ code reports missing GPU libraries as errors on machines without a GPU. Its
    # own failures are also raised as Python exceptions.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # So that module:function, a network of the user's own, is found in the current folder.
    sys.path.append(os.getcwd())
    row = VERBS[verb]
    modules = set(flags.FLAGS.flags_by_module_dict())
    row.define_flags()
    own = set(flags.FLAGS.flags_by_module_dict()) - modules

    def parse(argv: list[str]) -> list[str]:
        if any(argument.startswith(("-help", "--help")) for argument in argv):
            row.complete_help()
        if set(HELP) & set(argv):
            print(_help(row, program, own))
            sys.exit(0)
        try:
            return flags.FLAGS([argv[0], *_with_recipes(argv[1:])])[1:]
        except flags.Error as e:
            sys.exit(_refuse(program, str(e)))

    app.run(lambda rest: _call(row, program, rest), [program, *arguments], flags_parser=parse)


def _call(row: Verb, program: str, rest: list[str]) -> int:
    """Runs a verb and returns the exit status."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    console.end_on_signals()  # A training handles signals itself.
    console.end_with_stdin()
    try:
        row.run(rest)
    except UserError as e:
        return _refuse(program, _as_flags(e))
    except KeyboardInterrupt:
        print(
            f"{program}: stopped outside of a training; what was saved is kept, and the same "
            "command goes on from there",
            file=sys.stderr,
        )
        return 1
    except Stopped as e:
        if e.__cause__:
            traceback.print_exception(type(e.__cause__), e.__cause__, e.__cause__.__traceback__)
        print(f"{program}: {_as_flags(e)}", file=sys.stderr)
        return 1
    return 0


def _as_flags(error: Union[UserError, Stopped]) -> str:
    # The one place where the parameters that the library names become flags.
    return error.as_flags(list(flags.FLAGS))


def _refuse(program: str, text: str) -> int:
    """Prints in one line what is wrong with the request, and returns the exit status."""
    print(f"{program}: {' '.join(text.split())}", file=sys.stderr)
    return 2


def _overview() -> str:
    width = max(map(len, VERBS))
    rows = "\n".join(f"  {verb:{width}}  {row.summary}" for verb, row in VERBS.items())
    return (
        f"usage: {PROGRAM} VERB [flags]\n\n{rows}\n\n"
        f"{PROGRAM} VERB --help lists the flags of a verb."
    )


def _help(row: Verb, program: str, modules: set[str]) -> str:
    """Returns the help of a verb, whose flags are those that `modules` define: its own first."""
    ordered = sorted(modules, key=lambda name: (name == options.__name__, name))
    of = lambda name: "training" if name == options.__name__ else "this command"
    lists = "\n".join(
        flags.FLAGS.module_help(name).replace(f"{name}:", f"Flags of {of(name)}:", 1)
        for name in ordered
    )
    return (
        f"usage: {' '.join(filter(None, [program, row.arguments]))} [flags]\n\n"
        f"{row.summary}\n{lists}\n\n"
        "--flagfile=NAME reads flags from a file, or from the recipe of this name.\n"
        "--helpfull lists the flags of absl too."
    )


def _with_recipes(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments with the paths of recipes in place of flagfiles that do not exist."""
    found = list(arguments)
    for i, argument in enumerate(arguments):
        match = re.fullmatch(r"--?flagfile(?:=(.*))?", argument)
        if match and match[1] is not None:
            found[i] = f"--flagfile={_recipe(match[1])}"
        elif match and i + 1 < len(found):
            found[i + 1] = _recipe(arguments[i + 1])
    return found


def _recipe(name: str) -> str:
    """Returns the path of a recipe; existing files and all other names stay unchanged."""
    if os.path.exists(os.path.expanduser(name)) or os.path.basename(name) != name:
        return name
    return next((str(folder / name) for folder in RECIPES if (folder / name).is_file()), name)
