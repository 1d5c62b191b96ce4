"""Trial passes of a network before training: they are timed, and their output is hidden."""

import contextlib
import io
import time

from tf_pcl import console


class Trials:
    """A context manager for trial passes, which may be nested.

    Attributes:
      seconds: the time of all passes so far.
    """

    def __init__(self):
        self.seconds, self._depth, self._began = 0.0, 0, 0.0
        self._hidden = contextlib.ExitStack()

    def __enter__(self):
        self._depth += 1
        if self._depth == 1:
            self._began = time.perf_counter()
            self._hidden.enter_context(console.discarded("stdout"))
            self._hidden.enter_context(contextlib.redirect_stdout(io.StringIO()))

    def __exit__(self, *exception):
        self._depth -= 1
        if self._depth == 0:
            self.seconds += time.perf_counter() - self._began
            self._hidden.close()


trials = Trials()
