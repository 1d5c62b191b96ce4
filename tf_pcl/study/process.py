"""A command in a process of its own, which is told to end before this one does."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Optional

from tf_pcl.console import ENDS_WITH_STDIN

# How often to look at a process, and how long it has to save and end after a signal.
SECONDS, PATIENCE = 0.5, 120


def start(
    command: Sequence[str],
    log: str,
    folder: Optional[str] = None,
    environment: Optional[Mapping[str, str]] = None,
) -> subprocess.Popen:
    """Starts a command, which gets SIGTERM when this process ends, even if it is killed.

    The command has to be one of tf_pcl, which notices the end by its standard input: that is a pipe
    whose other end closes then.

    Args:
      command: the program and its arguments.
      log: the file that its output is added to.
      folder: where it runs; by default here.
      environment: variables beside those of this process.
    """
    os.makedirs(os.path.dirname(log), exist_ok=True)
    with open(log, "ab") as output:
        # In a session of its own, the process does not get the terminal's Ctrl-C beside our signal:
        # a second one would end it before it has saved.
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=folder,
            env={**os.environ, **(environment or {}), ENDS_WITH_STDIN: "1"},
        )


def stop(processes: Iterable[subprocess.Popen]) -> None:
    """Sends SIGTERM to processes, and SIGKILL to those that have not ended after two minutes."""
    alive = [process for process in processes if process.poll() is None]
    try:
        for process in alive:
            process.send_signal(signal.SIGTERM)
        end = time.monotonic() + PATIENCE
        for process in alive:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0, end - time.monotonic()))
    finally:
        for process in alive:
            if process.poll() is None:
                process.kill()
                process.wait()


def run(
    command: Sequence[str],
    log: str,
    folder: Optional[str] = None,
    environment: Optional[Mapping[str, str]] = None,
) -> int:
    """Runs a command as `start` does, and returns its exit status.

    If this process is interrupted, the command is stopped; the KeyboardInterrupt comes after that.
    """
    process = start(command, log, folder, environment)
    try:
        while process.poll() is None:
            # In short waits, since a wait without end cannot be interrupted everywhere.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS)
    finally:
        stop([process])
    return process.returncode
