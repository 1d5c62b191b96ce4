"""Standard streams that never end a run: closed ones, full disks, pipes that nobody reads, ASCII.

Everything in the process writes through `sys.stdout` and `sys.stderr`, Keras's progress line and
absl's log too. So what protects a run is put there, once, by the command line.
"""

import codecs
import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from types import FrameType
from typing import Any, Optional

_PLAIN = {"×": "x", "–": "-", "…": "...", "±": "+-", "’": "'"}
_ERRORS = "tf_pcl_plain"
# The environment variable that asks a process to end when its standard input does.
ENDS_WITH_STDIN = "TF_PCL_ENDS_WITH_STDIN"
# The names of the signals that this process got.
_noted: list[str] = []


class Unfailing:
    """A text stream that drops what cannot be written, and otherwise acts as the given stream.

    Args:
      stream: the text stream.
    """

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes a text if that is possible and returns its length."""
        try:
            self._stream.write(text)
        except (OSError, ValueError):  # ValueError: the stream is closed.
            pass
        return len(text)

    def flush(self) -> None:
        """Flushes the stream if that is possible."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def protect() -> None:
    """Makes the standard streams of this process unfailing."""
    _open_closed()
    # At a width of 0 rich prints nothing, and at some characters that are no digits it fails.
    if not re.fullmatch("0*[1-9][0-9]*", os.environ.get("COLUMNS", "")):
        os.environ.pop("COLUMNS", None)
    codecs.register_error(_ERRORS, _plainly)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, Unfailing):
            continue
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_ERRORS)
        setattr(sys, name, Unfailing(stream))


@contextlib.contextmanager
def discarded(*names: str) -> Iterator[None]:
    """Discards what is written to the streams "stdout" or "stderr", also by C++ code and tf.print.

    A stream that is closed, or has no descriptor, stays as it is.
    """
    kept: dict[int, int] = {}

    def flush(name: str) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            getattr(sys, name).flush()

    numbers = {"stdout": 1, "stderr": 2}
    for name in names:
        flush(name)
        with contextlib.suppress(OSError):
            kept[numbers[name]] = os.dup(numbers[name])
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), numbers[name])
    try:
        yield
    finally:
        for name in names:
            flush(name)
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)


def show(markdown: str) -> None:
    """Prints a text in Markdown: laid out where a terminal shows it, as it is elsewhere."""
    if not sys.stdout.isatty():
        print(markdown)
        return
    # These imports take a while.
    from rich.console import Console
    from rich.markdown import Markdown

    Console(highlight=False).print(Markdown(markdown))


def show_table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], title: Optional[str] = None
) -> None:
    """Prints a table. On a terminal long cells are folded; elsewhere each row is one line.

    Args:
      heads: the columns' names; none is shown if all are empty.
      rows: cells, which may have brackets.
      title: a line above.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(*heads, title=title, show_header=any(heads))
    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 10_000
    Console(file=sys.stdout, width=width, markup=False, highlight=False, emoji=False).print(table)


def end_on_signals() -> None:
    """Makes SIGTERM act as Ctrl-C does: both raise KeyboardInterrupt, and are noted."""
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # It may be ignored.
        signal.signal(signal.SIGINT, _interrupt)


def noted_signal() -> Optional[str]:
    """Returns the name of the signal that this process got, None if it got none.

    Python drops an exception that is raised in a finalizer or in the callback of a weak reference.
    What then still runs should end as soon as it can.
    """
    return _noted[0] if _noted else None


def _interrupt(number: int, frame: Optional[FrameType]) -> None:
    _noted.append(signal.Signals(number).name)
    raise KeyboardInterrupt


def end_with_stdin() -> None:
    """Makes this process get SIGTERM when its standard input ends, if ENDS_WITH_STDIN is set.

    If standard input is a pipe from the process that started this one, it ends when that process
    ends, for whatever reason. The processes that this one starts do not inherit the variable.
    """
    if os.environ.pop(ENDS_WITH_STDIN, None):
        threading.Thread(target=_wait_for_stdin, daemon=True).start()


def _wait_for_stdin() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _open_closed() -> None:
    # Otherwise the next file that is opened, perhaps a checkpoint, would get the number of a
    # standard stream, and C++ code would write its messages into it.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _plainly(error: UnicodeError) -> tuple[str, int]:
    """Replaces characters that an encoding lacks by plain ones; an error handler of codecs."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_PLAIN.get(character, "?") for character in lacking), error.end
