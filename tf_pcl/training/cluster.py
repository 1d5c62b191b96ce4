"""The processes that train together: who they are, and which of them do not answer."""

import concurrent.futures
import contextlib
import json
import os
import re
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, Optional

import tensorflow as tf

from tf_pcl.errors import Stopped, UserError, one_line

# Under Slurm, the processes of a node listen on this port and those that follow it.
SLURM_PORT = 12345
# Seconds of waiting after which the missing processes are named, and after which the run ends.
PATIENCE, LIMIT = 30.0, 600.0
# The errors of collective operations when a process is lost; sometimes Keras wraps them.
_LOST = (tf.errors.OpError, RuntimeError, ValueError)


class Cluster(NamedTuple):
    """The processes that train together.

    Attributes:
      names: the name of each, such as "worker 1". The chief comes first, or the first worker if
        there is no chief.
      addresses: HOST:PORT of each, in the same order.
      own: the number of this process among them.
    """

    names: list[str]
    addresses: list[str]
    own: int


def find() -> Cluster:
    """Returns the cluster of TF_CONFIG; if that is not set, it is set from Slurm's variables.

    Raises:
      UserError: if the environment does not define the cluster and the task of this process.
    """
    try:
        if not os.environ.get("TF_CONFIG") and "SLURM_STEP_NODELIST" in os.environ:
            os.environ["TF_CONFIG"] = json.dumps(of_slurm(os.environ))
        config = json.loads(os.environ.get("TF_CONFIG") or "{}")
        processes, task = config["cluster"], config["task"]
        if other := set(processes) - {"chief", "worker"}:
            raise ValueError(f"a task is a chief or a worker, not {', '.join(sorted(other))}")
        addresses = [a for kind in processes.values() for a in list(kind)]
        for address in addresses:
            match = re.fullmatch(r"[^/]+:([0-9]{1,5})", address)
            if not match or not 0 < int(match[1]) < 65536:
                raise ValueError(f"an address is HOST:PORT, with a PORT up to 65535, not {address}")
            if addresses.count(address) > 1:
                raise ValueError(f"each process needs an address of its own, not twice {address}")
        kinds = [kind for kind in ("chief", "worker") if kind in processes]
        tasks = [(kind, i) for kind in kinds for i in range(len(processes[kind]))]
        return Cluster(
            [f"{kind} {i}" for kind, i in tasks],
            [processes[kind][i] for kind, i in tasks],
            tasks.index((task["type"], task["index"])),
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        text = " ".join((os.environ.get("TF_CONFIG") or "{}").split())
        raise UserError(
            "it needs the environment variable TF_CONFIG with the cluster and this process's task, "
            'such as {"cluster": {"worker": ["host0:2222", "host1:2222"]}, "task": {"type": '
            f'"worker", "index": 0}}}}; TF_CONFIG is {text[:200]} ({one_line(e)})',
            parameter="strategy",
            value="multi_worker",
        ) from e


def of_slurm(variables: Mapping[str, str]) -> dict[str, dict]:
    """Returns the contents of TF_CONFIG for a process that srun has started.

    TensorFlow's SlurmClusterResolver sorts the hosts by their names, n10 before n9, while Slurm
    counts processes in the order of the nodes; and it knows no cluster without GPUs.

    Args:
      variables: the environment. SLURM_STEP_NODELIST, such as "n[9-10],m5", names the nodes;
        SLURM_STEP_TASKS_PER_NODE, such as "2(x2),1", says how many processes each has;
        SLURM_PROCID is this one's number.

    Returns:
      {"cluster": {"worker": [HOST:PORT]}, "task": {"type": "worker", "index": this one's number}}.

    Raises:
      ValueError: if a variable is missing or has another form.
    """
    names = ("SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE", "SLURM_PROCID")
    if missing := [name for name in names if name not in variables]:
        raise ValueError(f"Slurm's {missing[0]} is not set: start the processes with srun")
    nodes, counts, number = (variables[name] for name in names)
    hosts = [host for part in re.findall(r"(?:[^,[]|\[[^]]*\])+", nodes) for host in _hosts(part)]
    tasks: list[int] = []
    for count in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", count)
        if not match:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE is {counts}")
        tasks += [int(match[1])] * int(match[2] or 1)
    if len(hosts) != len(tasks):
        raise ValueError(f"Slurm names {len(hosts)} nodes, {nodes}, and the tasks of {len(tasks)}")
    addresses = [f"{h}:{SLURM_PORT + i}" for h, count in zip(hosts, tasks) for i in range(count)]
    return {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": int(number)}}


def _hosts(part: str) -> list[str]:
    """Returns the hosts of one part of a node list, such as n[1-3,07]."""
    match = re.fullmatch(r"([^[\]]*)(?:\[([^[\]]+)\])?", part)
    if not match:
        raise ValueError(f"SLURM_STEP_NODELIST has the part {part}")
    if not match[2]:
        return [part]
    found = []
    for numbers in match[2].split(","):
        low, _, high = numbers.partition("-")
        width = len(low)
        found += [f"{match[1]}{n:0{width}}" for n in range(int(low), int(high or low) + 1)]
    return found


def gather(
    cluster: Cluster, patience: Optional[float] = None, limit: Optional[float] = None
) -> None:
    """Waits until all other processes have begun, and says which of them have not.

    TensorFlow would wait for an hour and say nothing. Meanwhile this process accepts connections at
    its address, as TensorFlow does later, so that the others see it.

    Args:
      cluster: all processes.
      patience: seconds after which a line names the missing processes; by default PATIENCE.
      limit: seconds after which the waiting ends; by default LIMIT.

    Raises:
      UserError: if another program uses the port of this process.
      Stopped: if a process has not begun within `limit`.
    """
    patience, limit = PATIENCE if patience is None else patience, LIMIT if limit is None else limit
    others = [i for i in range(len(cluster.names)) if i != cluster.own]
    began, told = time.monotonic(), ""
    with _listening(cluster) as own, concurrent.futures.ThreadPoolExecutor(16) as pool:
        while others:
            answers = [*pool.map(lambda i: _answers(cluster.addresses[i]), others)]
            # Those that have begun are asked again: they may have ended while others were missing.
            lacking = _named(cluster, [i for i, answered in zip(others, answers) if not answered])
            if not lacking:
                return
            waited = time.monotonic() - began
            if waited > limit:
                raise Stopped(
                    f"{lacking} of the cluster did not begin within {limit:g} s: nothing was "
                    "trained; start all processes with the same command, at the addresses of "
                    "TF_CONFIG"
                )
            if waited > patience and lacking != told:
                told = lacking
                print(
                    f"Waiting for {lacking} of the cluster, {limit:g} s in all …",
                    file=sys.stderr,
                    flush=True,
                )
            with contextlib.suppress(BlockingIOError):
                while True:
                    own.accept()[0].close()
            time.sleep(min(1.0, patience / 4))


def _listening(cluster: Cluster) -> socket.socket:
    """Returns a socket that accepts connections at this process's port, and does not block."""
    port = int(cluster.addresses[cluster.own].rpartition(":")[2])
    backlog = max(128, 4 * len(cluster.names))
    try:
        try:
            own = socket.create_server(
                ("", port), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True
            )
        except (OSError, ValueError):  # There may be no IPv6 here.
            own = socket.create_server(("", port), backlog=backlog)
    except OSError as e:
        raise UserError(
            f"{cluster.names[cluster.own]}, this process, cannot take connections at "
            f"{cluster.addresses[cluster.own]} ({e.strerror}): end what uses the port, or give "
            "another one in TF_CONFIG",
            parameter="strategy",
            value="multi_worker",
        ) from e
    own.setblocking(False)
    return own


def _named(cluster: Cluster, processes: Iterable[int]) -> str:
    return " and ".join(f"{cluster.names[i]} ({cluster.addresses[i]})" for i in processes)


@contextlib.contextmanager
def watched(cluster: Optional[Cluster]) -> Iterator[None]:
    """Names the processes that have ended, if that ends the body.

    Args:
      cluster: the processes that train together; None for one alone.

    Raises:
      Stopped: in place of an error of TensorFlow, if another process no longer answers.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        failure = e.__cause__ if isinstance(e, Stopped) else e
        gone = silent(cluster) if cluster and isinstance(failure, _LOST) else ""
        if not gone:
            raise
        what = str(e) if isinstance(e, Stopped) else f"failed with {type(e).__name__}"
        raise Stopped(f"{gone} of the cluster does not answer: {what}") from None


def silent(cluster: Cluster) -> str:
    """Returns the other processes that refuse connections, as "worker 1 (HOST:PORT) and …".

    It looks for one for 10 seconds, since a process that ends still listens for a while.
    """
    end = time.monotonic() + 10
    while True:
        others = [i for i in range(len(cluster.names)) if i != cluster.own]
        gone = [i for i in others if not _answers(cluster.addresses[i])]
        if gone or time.monotonic() > end:
            return _named(cluster, gone)
        time.sleep(0.5)


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
    except OSError:
        return False
    return True
