"""A command in a process of its own, which is told to end before this one does."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Sequence

# How often to look at a process, and how long it has to save and end after a signal.
_SECONDS, _PATIENCE = 0.5, 120


def run(
    command: Sequence[str],
    log: str,
    look: Callable[[], None] = lambda: None,
) -> int:
    """Runs a command and returns its exit status.

    If this process is interrupted, the command gets SIGTERM and two minutes to save and end; the
    KeyboardInterrupt comes after that.

    Args:
      command: the program and its arguments.
      log: the file that its output is added to.
      look: called about twice a second until it ends.
    """
    os.makedirs(os.path.dirname(log), exist_ok=True)
    with open(log, "ab") as output:
        # In a session of its own, the process does not get the terminal's Ctrl-C beside our signal:
        # a second one would end it before it has saved.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                look()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_SECONDS)
        except KeyboardInterrupt:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_PATIENCE)
            raise
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    return process.returncode
