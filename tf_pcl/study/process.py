"""Runs commands in processes that end when this one does."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Optional

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

    It must be a command of tf_pcl, which notices the end of this process by its standard input, a
    pipe that closes then.

    Args:
      command: the program and its arguments.
      log: the file to which its output is added.
      folder: the folder in which it runs; by default the current one.
      environment: variables in addition to those of this process.
    """
    os.makedirs(os.path.dirname(log), exist_ok=True)
    with open(log, "ab") as output:
        # In its own session, the process does not get the terminal's Ctrl-C in addition to our
        # signal: a second signal would end it before it has saved.
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


def run(command: Sequence[str], log: str, **where: Any) -> int:
    """Runs a command as `start` does, with its arguments, and returns its exit status.

    If this process is interrupted, it stops the command before it raises KeyboardInterrupt.
    """
    process = start(command, log, **where)
    try:
        while process.poll() is None:
            # Short waits, since an unlimited wait cannot be interrupted on every system.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS)
    finally:
        stop([process])
    return process.returncode
