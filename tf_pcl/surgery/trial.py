"""Trial passes of a network before training: they are timed, and their output is hidden."""

import contextlib
import io
import os
import sys
import time
from typing import Optional


class Trials:
    """A context manager for trial passes, which may be nested.

    Attributes:
      seconds: the time of all passes so far.
    """

    def __init__(self):
        self.seconds, self._depth = 0.0, 0
        self._began, self._stdout = 0.0, None  # type: float, Optional[int]

    def __enter__(self):
        self._depth += 1
        if self._depth == 1:
            self._began = time.perf_counter()
            self._stdout = _silence()
            self._python = contextlib.redirect_stdout(io.StringIO())
            self._python.__enter__()

    def __exit__(self, *exception):
        self._depth -= 1
        if self._depth == 0:
            self.seconds += time.perf_counter() - self._began
            self._python.__exit__(*exception)
            _restore(self._stdout)


def _silence() -> Optional[int]:
    """Discards standard output; returns a copy of its descriptor, or None without one."""
    # This uses the descriptor, since tf.print does not write through sys.stdout.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        kept = os.dup(1)
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        return kept
    return None


def _restore(kept: Optional[int]) -> None:
    if kept is not None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


trials = Trials()
