"""Errors that say what came, what is allowed and what to do."""

import difflib
import re
from collections.abc import Collection
from typing import Any, Optional

# Nobody reads a line with more names.
_MOST_LISTED = 50


class _NamesParameters(Exception):
    """An error whose text names parameters of the library in backquotes, as in "`peers=1`: …"."""

    def as_flags(self, flags: Collection[str]) -> str:
        """Returns the text on one line, with each backquoted name that is in `flags` as a flag."""

        def flag(match: "re.Match[str]") -> str:
            return f"--{match[1]}{match[2] or ''}" if match[1] in flags else match[0]

        return re.sub(r"`(\w+)(=[^`]*)?`", flag, " ".join(str(self).split()))


class UserError(_NamesParameters, ValueError):
    """Raised when the user's request is invalid.

    The text names parameters of the library in backquotes, as in "`peers=1`: …". The command line
    turns these into its flags with `as_flags`.

    Args:
      problem: one sentence that says what is wrong, what is allowed and what to do.
      parameter: the name of the parameter at fault, if there is one.
      value: the value that it was given.
      allowed: what would have been accepted: a text or a collection of values.
    """

    def __init__(
        self,
        problem: str,
        *,
        parameter: Optional[str] = None,
        value: Any = None,
        allowed: Any = None,
    ):
        self.parameter, self.value, self.allowed = parameter, value, allowed
        super().__init__(f"`{parameter}={value}`: {problem}" if parameter else problem)


class Stopped(_NamesParameters):
    """Raised when a run ends before its last step; the text says why and what was saved."""


def choose(what: str, name: Any, allowed: Collection[str], parameter: Optional[str] = None) -> Any:
    """Returns `name` if it is one of `allowed`.

    Args:
      what: what the name stands for, such as "network"; used where no parameter is given.
      name: what was asked for.
      allowed: the names that exist.
      parameter: the parameter that was given the name.

    Raises:
      UserError: if there is no such name; the text proposes the nearest one.
    """
    if name in allowed:
        return name
    near = difflib.get_close_matches(str(name), list(allowed), n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    subject = "it is not known" if parameter else f"{what} {name!r} is not known"
    listed = ", ".join(sorted(allowed)[:_MOST_LISTED])
    more = len(allowed) - _MOST_LISTED
    raise UserError(
        f"{subject}.{hint} Allowed: {listed}{f' and {more} more' if more > 0 else ''}.",
        parameter=parameter,
        value=name,
        allowed=sorted(allowed),
    )


def one_line(error: BaseException) -> str:
    """Returns an exception's type and text on one line of at most 300 characters."""
    # Where AutoGraph has been, it lists the lines of code on the way.
    text = re.sub(r'in user code:|File "[^"\n]*", line \d+, in .*\n.*\n', "", str(error))
    name = type(error).__name__
    text = " ".join(text.split()).removeprefix(f"{name}: ")
    return f"{name}: {text[:300]}{'…' if len(text) > 300 else ''}" if text else name
