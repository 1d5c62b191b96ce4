"""Places for the processes of runs: this machine, or a Ray cluster.

A place is a context manager with these methods. When an exception leaves the context, its processes
are told to save and end, and they have ended before the exception goes on.

- `free()` returns whether one more process can start now.
- `start(name, command, log)` starts one: a command of tf_pcl, and the file for its output.
- `ended()` returns [(name, exit status)] of those that have ended since the last call. If there are
  none, it waits for about half a second.
"""

import logging
import math
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, Optional, Union

from tf_pcl.errors import UserError, one_line
from tf_pcl.study import process

# The status of a process that was lost with its machine.
LOST = -1


class Local:
    """This machine.

    Args:
      jobs: the most processes at a time; one by default.
    """

    def __init__(self, jobs: Optional[int] = None):
        self._most = jobs or 1
        self._processes: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Local":
        return self

    def __exit__(self, *exception: Any) -> None:
        process.stop(self._processes.values())

    def free(self) -> bool:
        """Returns whether one more process can start now."""
        return len(self._processes) < self._most

    def start(self, name: str, command: Sequence[str], log: str) -> None:
        """Starts a process whose output goes to the file `log`."""
        self._processes[name] = process.start(command, log)

    def ended(self) -> list[tuple[str, int]]:
        """Returns (name, exit status) of those that have ended, after half a second at most."""
        end = time.monotonic() + process.SECONDS
        while not (found := self._found()) and time.monotonic() < end:
            time.sleep(0.02)
        return found

    def _found(self) -> list[tuple[str, int]]:
        polled = [(name, one.poll()) for name, one in self._processes.items()]
        found = [(name, status) for name, status in polled if status is not None]
        for name, _ in found:
            del self._processes[name]
        return found


class OnRay:
    """A Ray cluster: that of RAY_ADDRESS, one that runs here already, or a new one here.

    Each process gets a GPU if the cluster has any, else as many cores as the smallest machine of
    the cluster has. It works in the folder of this process, with the same Python.

    Args:
      jobs: the most processes at a time; by default as many as the cluster has room for. If it has
        no room for `jobs`, each process gets an equal share.

    Raises:
      UserError: if ray is not installed.
    """

    def __init__(self, jobs: Optional[int] = None):
        # By default, Ray reports its usage to its makers.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError as e:
            raise UserError(
                "the package ray is missing here: pip install ray", parameter="runner", value="ray"
            ) from e
        self._ray: Any = ray
        self._jobs = jobs
        self._names: dict[Any, str] = {}

    def __enter__(self) -> "OnRay":
        try:
            _check_answers(os.environ.get("RAY_ADDRESS", ""))
            self._ray.init(
                log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False
            )
        except Exception as e:
            raise UserError(
                f"the cluster cannot be reached ({one_line(e)}): set RAY_ADDRESS to that of its "
                "head, or unset it to start one on this machine",
                parameter="runner",
                value="ray",
            ) from e
        machines = self._machines()
        self._kind = "GPU" if any(one.get("GPU") for one in machines) else "CPU"
        amounts = [amount for one in machines if (amount := one.get(self._kind))]
        if not amounts:
            self._ray.shutdown()
            raise UserError(
                "no machine of the cluster has a GPU or a CPU: start one that has",
                parameter="runner",
                value="ray",
            )
        share = 1.0 if self._kind == "GPU" else min(amounts)
        if self._jobs:
            share = min(share, sum(amounts) / self._jobs)
        # Ray takes whole numbers above 1, and below 1 multiples of 0.0001.
        self._share = math.floor(share) if share >= 1 else math.floor(share * 1e4) / 1e4
        return self

    def __exit__(self, *exception: Any) -> None:
        ray, refs = self._ray, list(self._names)
        try:
            for ref in refs:
                # This acts as Ctrl-C in the worker, which stops the process.
                ray.cancel(ref)
            if refs:
                ray.wait(refs, num_returns=len(refs), timeout=process.PATIENCE + 10)
        finally:
            ray.shutdown()

    def free(self) -> bool:
        """Returns whether one more process can start now."""
        room = sum(int(one.get(self._kind, 0) / self._share) for one in self._machines())
        # If a cluster has lost its machines, Ray waits for another one.
        room = max(1, room)
        return len(self._names) < min(room, self._jobs or room)

    def start(self, name: str, command: Sequence[str], log: str) -> None:
        """Starts a process whose output goes to the file `log`."""
        needs: dict[str, Any] = (
            {"num_gpus": self._share} if self._kind == "GPU" else {"num_cpus": self._share}
        )
        remote = self._ray.remote(**needs, max_retries=0)(process.run)
        # So workers find the packages of this process.
        found = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        ref = remote.remote(command, os.path.abspath(log), folder=os.getcwd(), environment=found)
        self._names[ref] = name

    def ended(self) -> list[tuple[str, int]]:
        """Returns (name, exit status) of those that have ended, after half a second at most."""
        if not self._names:
            time.sleep(process.SECONDS)
            return []
        done, _ = self._ray.wait(list(self._names), timeout=process.SECONDS)
        found = []
        for ref in done:
            try:
                status = self._ray.get(ref)
            except self._ray.exceptions.RayError:
                status = LOST
            found.append((self._names.pop(ref), status))
        return found

    def _machines(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]


def _check_answers(address: str) -> None:
    """Raises OSError if nothing answers at HOST:PORT, which Ray would try for minutes."""
    match = re.fullmatch(r"([^/:]+):(\d+)", address)
    if match:
        socket.create_connection((match[1], int(match[2])), timeout=10).close()


PLACES: dict[str, Any] = {"local": Local, "ray": OnRay}
Place = Union[Local, OnRay]
