"""Kills a run many times and compares what it leaves with what an undisturbed run leaves.

    python benchmarks/crash.py --kills=50 -- --method=pcl --dataset=digits --network=resnet8

What follows `--` is the command of the run, as train.py takes it; --deterministic and --workdir
are added. The command runs once undisturbed. Then it is started again and again in another workdir,
and each time its process is ended by SIGKILL: in turns at a random moment of the training, and at a
call that changes the workdir (open, rename, remove, mkdir, …), at once or shortly after it. When a
run comes to its end before it is killed, it is compared, and another run begins in a new workdir,
until all kills are done and the last run has ended.

With --workers=2 the run is that of two processes on this machine's loopback. One of them, now this
and now that, is killed; the other ends by itself, and both are started again.

Compared are, for every stage and every worker, bit for bit: the variables of the last checkpoint
and of the exported network, metrics.csv, results.json and TensorBoard's values, where each tag may
have each step once. Times and speeds are left out. No other file may be left than an undisturbed
run leaves.

It prints a line for each kill and each run. The exit status is 1 if a run differs or fails.
"""

import contextlib
import csv
import json
import os
import pathlib
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from absl import app, flags

FLAGS = flags.FLAGS
flags.DEFINE_integer("kills", 50, "how often the process is killed", lower_bound=1)
flags.DEFINE_integer("workers", 1, "how many processes train together", lower_bound=1)
flags.DEFINE_integer("draw", 0, "seed of the moments and calls")
flags.DEFINE_float("reach", 0.35, "a process is killed within this share of the undisturbed run")
flags.DEFINE_string("keep_in", None, "folder in which the workdirs stay; default: none stays")

TRAIN = pathlib.Path(__file__).resolve().parent.parent / "train.py"
# Columns, keys and tags that tell of time or place.
TIMES = ("wall_seconds", "images_per_second")
PLACES = ("workdir",)

# Runs train.py and ends the process by SIGKILL at a chosen place. A hook of Python's audit events
# counts the calls that change the workdir; each event comes before its call. Arguments: train.py,
# the workdir, a file for notes, the kind ("none", "moment", "call"), which call, the seconds.
_CHILD = """
import atexit, os, runpy, signal, sys, threading, time
train, workdir, notes, kind, which, seconds, *arguments = sys.argv[1:]
which, seconds = int(which), float(seconds)
notes = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "os.truncate"}
count, began = 0, None

def note(text):
    os.write(notes, (text + "\\n").encode())

def kill(what):
    note(what)
    os.kill(os.getpid(), signal.SIGKILL)

def kill_after(seconds, what):
    def wait():
        time.sleep(seconds)
        kill(what)
    threading.Thread(target=wait, daemon=True).start()

def changes(event, args):
    path = args[0] if args else None
    if not isinstance(path, str) or not os.path.abspath(path).startswith(workdir):
        return None
    if event == "open":
        writes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        return path if writes else None
    return path if event in CHANGES else None

def hook(event, args):
    global count, began
    path = changes(event, args)
    if path is None:
        return
    if began is None:
        # The lock is opened to be read first, and made when the training is about to begin.
        if event != "open" or not path.endswith("lock") or not args[2] & os.O_CREAT:
            return
        began = time.perf_counter()
        if kind == "moment":
            kill_after(seconds, f"{seconds:.3f} s after its start")
    count += 1
    if kind == "call" and count == which:
        what = f"at call {count}, {event} {os.path.relpath(path, workdir)}"
        if seconds:
            kill_after(seconds, f"{what}, {1000 * seconds:.1f} ms later")
        else:
            kill(what)

def tell():
    note(f"done {count} {time.perf_counter() - began}")

sys.addaudithook(hook)
atexit.register(tell)
sys.argv = [train, *arguments]
sys.path.insert(0, os.path.dirname(train))
runpy.run_path(train, run_name="__main__")
"""


class End(NamedTuple):
    """How a process ended.

    Attributes:
      killed: where it was killed; None if it was not.
      calls: how many calls changed the workdir, if it came to its end.
      seconds: from the start of the training to the end, if it came to its end.
      problem: the end of its output, if it failed.
    """

    killed: Optional[str] = None
    calls: int = 0
    seconds: float = 0.0
    problem: Optional[str] = None


class Place(NamedTuple):
    """Where a process is killed.

    Attributes:
      kind: "none", "moment" or "call".
      which: at which call.
      wait: seconds after that call or, at a moment, after the start of the training.
      worker: the number of the process.
    """

    kind: str = "none"
    which: int = 0
    wait: float = 0.0
    worker: int = 0


NOWHERE = Place()


class Process:
    """A process of the run.

    Args:
      command: the flags of train.py.
      workdir: the folder of the run.
      place: where it kills itself.
      number: its number among the processes that train together.
      addresses: the HOST:PORT of each of these; none where it trains alone.
    """

    def __init__(
        self,
        command: list[str],
        workdir: pathlib.Path,
        place: Place,
        number: int = 0,
        addresses: Sequence[str] = (),
    ):
        own = workdir / f"worker-{number}" if number else workdir
        self.notes, self.output = tempfile.NamedTemporaryFile("r"), tempfile.TemporaryFile("w+")
        what = [str(TRAIN), str(own.resolve()), self.notes.name, place.kind, str(place.which)]
        environment = dict(os.environ)
        if addresses:
            task = {"type": "worker", "index": number}
            config = {"cluster": {"worker": list(addresses)}, "task": task}
            environment["TF_CONFIG"] = json.dumps(config)
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, *what, str(place.wait), *command]
            + [f"--workdir={workdir}"],
            env=environment,
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )

    def end(self) -> End:
        """Waits for its end and says how that was."""
        status = self.process.wait()
        noted = self.notes.read().strip()
        self.output.seek(0)
        printed = self.output.read()
        self.notes.close()
        self.output.close()
        if status == -9:
            return End(killed=noted)
        if status or not noted.startswith("done"):
            return End(problem=printed[-2000:] or f"status {status}")
        _, calls, seconds = noted.split()
        return End(calls=int(calls), seconds=float(seconds))


def start(
    command: list[str], workdir: pathlib.Path, place: Place = NOWHERE, addresses: Sequence[str] = ()
) -> End:
    """Runs the command in one process, or in one for each address, and says how that ended.

    Where the one that is to kill itself has done so, the others end as they can.
    """
    processes = [
        Process(command, workdir, place if number == place.worker else NOWHERE, number, addresses)
        for number in range(len(addresses) or 1)
    ]
    ends = [process.end() for process in processes]
    if ends[place.worker].killed is not None:
        return ends[place.worker]
    return next((end for end in ends if end.problem or end.killed), ends[place.worker])


def free_addresses(count: int) -> list[str]:
    """Returns addresses of this machine whose ports are free."""
    with contextlib.ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]


def contents(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns {what: value} of all that a run left, without times; equal runs give equal values."""
    import tensorflow as tf

    found: dict[str, Any] = {}
    folders = [path.parent for path in workdir.rglob("metrics.csv")]
    for folder in sorted(folders):
        name = folder.relative_to(workdir)
        with open(folder / "metrics.csv", newline="") as f:
            rows = [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(f)]
        results = json.loads((folder / "results.json").read_text())
        settings = {k: v for k, v in results["settings"].items() if k not in PLACES}
        found[f"{name} metrics"] = rows
        found[f"{name} results"] = {
            **{k: v for k, v in results.items() if k not in TIMES},
            "settings": settings,
        }
        found[f"{name} TensorBoard"] = _events(folder)
        last = tf.train.latest_checkpoint(str(folder / "checkpoints"))
        exported = str(folder / "export/saved_model/1/variables/variables")
        for what, prefix in (("weights", last), ("exported weights", exported)):
            reader = tf.train.load_checkpoint(prefix)
            found[f"{name} {what}"] = {
                key: reader.get_tensor(key).tobytes()
                for key in reader.get_variable_to_shape_map()
                if key != "_CHECKPOINTABLE_OBJECT_GRAPH"
            }
    # The names of event files hold the time.
    found["files"] = sorted(
        {
            re.sub(r"tfevents.*", "tfevents", str(path.relative_to(workdir)))
            for path in workdir.rglob("*")
        }
    )
    return found


def _events(folder: pathlib.Path) -> dict[str, Any]:
    """Returns {split, tag and step: [values]} of TensorBoard's files; a good run has one each."""
    import tensorflow as tf

    found: dict[str, Any] = {}
    for path in sorted(folder.glob("tensorboard/*/events*")):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                if value.tag not in TIMES:
                    key = f"{path.parent.name} {value.tag} {event.step}"
                    found.setdefault(key, []).append(value.tensor.SerializeToString())
    return found


class Killer:
    """Runs a command to its end in one workdir after another, and kills it on the way.

    Args:
      command: the flags of train.py.
      addresses: those of the processes, where there are several.
      whole: how the undisturbed run ended.
      kills: how many kills there are in all.
    """

    def __init__(self, command: list[str], addresses: Sequence[str], whole: End, kills: int):
        self.command, self.addresses, self.whole, self.kills = command, addresses, whole, kills
        self.done = {"moment": 0, "call": 0}
        self.random = random.Random(FLAGS.draw)

    def run(self, workdir: pathlib.Path) -> Optional[str]:
        """Runs to the end in a workdir; returns the output of a process that failed, else None."""
        while True:
            began = time.perf_counter()
            place = self._next()
            end = start(self.command, workdir, place, self.addresses)
            if end.killed is None:
                return end.problem
            kind = "call" if end.killed.startswith("at call") else "moment"
            self.done[kind] += 1
            print(
                f"{workdir.name}, kill {sum(self.done.values())}: "
                f"{f'worker {place.worker} ' * bool(self.addresses)}{end.killed} "
                f"({time.perf_counter() - began:.0f} s with imports)",
                flush=True,
            )

    def _next(self) -> Place:
        """Draws the next place to kill at."""
        number = sum(self.done.values())
        if number >= self.kills:
            return NOWHERE
        worker = self.random.randrange(len(self.addresses)) if self.addresses else 0
        if number % 2:
            reach = self.random.uniform(0, FLAGS.reach * self.whole.seconds)
            return Place("moment", 0, reach, worker)
        which = self.random.randint(1, max(1, int(FLAGS.reach * self.whole.calls)))
        # At once, or 0.1 ms to 0.3 s later: within what TensorFlow writes after the call.
        later = self.random.random() < 0.5
        wait = 10 ** self.random.uniform(-4, -0.5) if later else 0.0
        return Place("call", which, wait, worker)


def _difference(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    return [k for k in sorted({*found, *expected}) if found.get(k) != expected.get(k)]


def compare(command: list[str], folder: pathlib.Path) -> int:
    """Does all that the module says and returns the exit status."""
    addresses = free_addresses(FLAGS.workers) if FLAGS.workers > 1 else []
    if addresses:
        command = [*command, "--strategy=multi_worker"]
    whole = start(command, folder / "undisturbed", addresses=addresses)
    if whole.problem:
        print(f"the undisturbed run failed:\n{whole.problem}")
        return 1
    print(
        f"undisturbed: {whole.seconds:.1f} s without imports, {whole.calls} calls change files",
        flush=True,
    )
    expected = contents(folder / "undisturbed")
    repeated = [k for k, v in expected.items() if "Tensor" in k for e in v.values() if len(e) > 1]
    killer, runs, bad = Killer(command, addresses, whole, FLAGS.kills), 0, len(repeated)
    while sum(killer.done.values()) < FLAGS.kills:
        runs += 1
        workdir = folder / f"run-{runs}"
        problem = killer.run(workdir)
        differing = [] if problem else _difference(contents(workdir), expected)
        bad += bool(problem or differing)
        verdict = f"failed:\n{problem}" if problem else "differs in: " + ", ".join(differing)
        print(f"{workdir.name}: {verdict if problem or differing else 'equal'}", flush=True)
    print(
        f"{sum(killer.done.values())} kills, {killer.done['moment']} at random moments and "
        f"{killer.done['call']} at calls; {runs - bad} of {runs} runs end as the undisturbed one"
    )
    return 1 if bad else 0


def main(arguments: list[str]) -> int:
    command = [*arguments[1:], "--deterministic"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(FLAGS.keep_in or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        return compare(command, folder)


if __name__ == "__main__":
    app.run(main)
