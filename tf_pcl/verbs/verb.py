"""The description of a verb for the command line."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Verb(NamedTuple):
    """A verb of the command line.

    Attributes:
      summary: one line for --help.
      define_flags: defines its absl flags.
      run: runs it, given the arguments that are not flags. UserError and Stopped end it with one
        line.
      arguments: its arguments beside flags, as --help shows them, such as "RUN…".
      complete_help: completes the help of its flags with texts that are not known where the flags
        are defined.
    """

    summary: str
    define_flags: Callable[[], None]
    run: Callable[[list[str]], Any]
    arguments: str = ""
    complete_help: Callable[[], None] = lambda: None
