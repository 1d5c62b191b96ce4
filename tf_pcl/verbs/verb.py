"""What the command line needs to know of a verb."""

from collections.abc import Callable
from typing import Any, NamedTuple


def _nothing() -> None:
    pass


class Verb(NamedTuple):
    """Something that the command line does.

    Attributes:
      summary: one line for --help.
      define_flags: defines its absl flags.
      run: does it, given the arguments that are not flags. UserError and Stopped end it in one
        line.
      arguments: what `run` takes beside flags, as --help writes it, such as "RUN…".
      complete_help: adds to the help of its flags what is not known where they are defined.
    """

    summary: str
    define_flags: Callable[[], None]
    run: Callable[[list[str]], Any]
    arguments: str = ""
    complete_help: Callable[[], None] = _nothing
