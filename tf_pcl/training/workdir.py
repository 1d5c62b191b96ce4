"""The files of a workdir, whose layout is known here alone.

flags.txt             the options of the run, as a flagfile
data.json             what the data were
versions.json         the versions of Python and the packages that it ran with
results.json          what came out; rewritten after every epoch that was tested
metrics.csv           a row for every epoch
checkpoints/          the last checkpoints
tensorboard/train, tensorboard/test
export/saved_model/1  the deployed network, in the layout of TensorFlow Serving
export/labels.txt     the classes in the order of the outputs, one a line, escaped
export/classes.json   the same names as a JSON list
1-NAME, 2-NAME, …     the same for each stage before the last, without the first three files
worker-1, worker-2, … what the workers after the first write
"""

import contextlib
import csv
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Optional

from tf_pcl.data import class_names
from tf_pcl.errors import UserError
from tf_pcl.options import Options

SAVED_MODEL = os.path.join("saved_model", "1")
LABELS = "labels.txt"
# The longest path that is made below a workdir, with some reserve.
_LONGEST = "export/tmp-------/1/variables/variables.data-00000-of-00001" + 64 * "-"


class Workdir:
    """The folder of a run or of one of its earlier stages.

    Args:
      path: the folder, which need not exist yet.
    """

    def __init__(self, path: str):
        self.path = path
        self.flags = os.path.join(path, "flags.txt")
        self.data = os.path.join(path, "data.json")
        self.versions = os.path.join(path, "versions.json")
        self.results = os.path.join(path, "results.json")
        self.metrics = os.path.join(path, "metrics.csv")
        self.checkpoints = os.path.join(path, "checkpoints")
        self.export = os.path.join(path, "export")

    @classmethod
    def of_run(cls, options: Options, worker: int = 0) -> "Workdir":
        """Returns the workdir that the options ask for.

        Args:
          options: the run's options.
          worker: the index of this process among several. All of them must save, since statistics
            are gathered from all; the first one's workdir is the run's.
        """
        network = options.network.replace(":", ".").replace(",", "+")
        name = f"{options.dataset}-{network}-{options.method}-seed{options.seed}"
        path = options.workdir or os.path.join("runs", name)
        return cls(os.path.join(path, f"worker-{worker}") if worker else path)

    def of_stage(self, number: int, name: str) -> "Workdir":
        """Returns the folder of a stage before the last; `number` counts from 1."""
        return Workdir(os.path.join(self.path, f"{number}-{name}"))

    def tensorboard(self, split: str) -> str:
        """Returns the folder of TensorBoard's logs of "train" or "test"."""
        return os.path.join(self.path, "tensorboard", split)

    def check(self, options: Options) -> None:
        """Checks that a run with these options can use this folder. Writes nothing.

        Raises:
          UserError: if the folder cannot be written, holds a run with other options or one of a
            run's earlier stages, or holds any run where `options.resume` is "never".
        """
        self._check_name()
        self._check_writable()
        if not os.path.exists(self.flags):
            if os.path.exists(self.checkpoints):
                raise self._refused(
                    "the folder holds checkpoints but no flags.txt, like the folder of a run's "
                    "earlier stage: give another workdir"
                )
            return
        if options.resume == "never":
            raise self._refused(
                "the folder holds a run already: give another workdir, or `resume=auto` to go on"
            )
        given, free = options.as_flags(), options.run_only()
        with open(self.flags, encoding="utf-8") as f:
            old = dict(line.strip()[2:].split("=", 1) for line in f if line.startswith("--"))
        differ = [
            f"`{name}={given.get(name, '(unset)')}` here, {old.get(name, '(unset)')} there"
            for name in sorted({*given, *old})
            if given.get(name) != old.get(name) and name not in free
        ]
        if differ:
            raise self._refused(
                f"the folder holds a run with other options ({'; '.join(differ)}): give another "
                "workdir or the same options"
            )

    def check_data(self, facts: Mapping[str, Any]) -> None:
        """Checks that a run in this folder, if there is one, is on the data that `facts` tell of.

        Raises:
          UserError: if it is on other data.
        """
        if not os.path.exists(self.data):
            return
        with open(self.data, encoding="utf-8") as f:
            old = json.load(f)
        differ = [
            f"{name} {_brief(facts[name])} here, {_brief(old.get(name))} there"
            for name in facts
            if facts[name] != old.get(name)
        ]
        if differ:
            raise self._refused(
                f"the folder holds a run on other data ({'; '.join(differ)}): give another "
                "workdir or the same data"
            )

    def check_versions(self, versions: Mapping[str, str]) -> None:
        """Checks that a run in this folder, if there is one, ran on the stack of `versions`.

        Two stacks round differently: a run that changed between them would be the run of neither.

        Args:
          versions: versions by package, among them "tensorflow" and "keras".

        Raises:
          UserError: if the run was on another minor version of TensorFlow or Keras.
        """
        if not os.path.exists(self.versions):
            return
        with open(self.versions, encoding="utf-8") as f:
            old = json.load(f)
        packages = ("tensorflow", "keras")
        if all(_minor(versions[p]) == _minor(old[p]) for p in packages):
            return
        here, there = (
            f"TensorFlow {v['tensorflow']} with Keras {v['keras']}" for v in (versions, old)
        )
        raise self._refused(
            f"the folder holds a run on {there}, and this is {here}, which rounds differently: "
            f"go on with TensorFlow {_minor(old['tensorflow'])}, or give another workdir"
        )

    def begin(
        self, options: Options, facts: Mapping[str, Any], versions: Mapping[str, str]
    ) -> None:
        """Makes the folder and writes what the run is: its options, data and versions."""
        os.makedirs(self.path, exist_ok=True)
        given = {name: value for name, value in options.as_flags().items() if name != "workdir"}
        write(self.flags, "".join(f"--{name}={value}\n" for name, value in given.items()))
        write_json(self.data, facts)
        write_json(self.versions, versions)

    def read_rows(self) -> list[dict[str, float]]:
        """Returns the rows of metrics.csv without empty cells, or [] if there is no such file."""
        if not os.path.exists(self.metrics):
            return []
        with open(self.metrics, encoding="utf-8", newline="") as f:
            return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(f)]

    def write_rows(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Writes metrics.csv with a column for every key, in the order of first appearance."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines = [",".join(columns)]
        lines += [",".join(f"{row[c]:.9g}" if c in row else "" for c in columns) for row in rows]
        write(self.metrics, "\n".join(lines) + "\n")

    def _check_name(self) -> None:
        if re.match(r"\w+:/", self.path):
            raise self._refused(
                "it has to be a folder of this machine: mount the store as a folder, or copy the "
                "workdir there when the run is done"
            )
        if self.path.startswith("~"):
            raise self._refused("there is no such home folder: give another workdir")
        if re.search(r"[][*?\\]", self.path):
            raise self._refused(
                "TensorFlow takes brackets, *, ? and \\ in a path for a pattern and would not find "
                "its files again: give a name without them"
            )

    def _check_writable(self) -> None:
        there = os.path.abspath(self.path)
        missing: list[str] = []
        while not os.path.exists(there):
            there, name = os.path.split(there)
            missing.insert(0, name)
        try:
            # Names that are too long fail here, and not when the folder is made.
            for path in [*missing, os.path.join(*missing, _LONGEST)]:
                with contextlib.suppress(FileNotFoundError):
                    os.lstat(os.path.join(there, path))
            tempfile.TemporaryFile(dir=there).close()
        except OSError as e:
            raise self._refused(
                f"the folder cannot be written ({there}: {e.strerror}): give another workdir"
            ) from e

    def _refused(self, problem: str) -> UserError:
        return UserError(problem, parameter="workdir", value=self.path)


def write(path: str, text: str) -> None:
    """Writes a text file so that a reader sees the old one or the new one, never a part."""
    with open(path + ".part", "w", encoding="utf-8", newline="") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".part", path)


def write_json(path: str, value: Any) -> None:
    """Writes a JSON file with `write`."""
    write(path, json.dumps(value, indent=2) + "\n")


def saved_model(path: str) -> Optional[str]:
    """Returns the folder of the SavedModel at `path`, or None if there is none.

    Args:
      path: a run's workdir, its export folder or the folder of a SavedModel.
    """
    below = ("", "1", SAVED_MODEL, os.path.join("export", SAVED_MODEL))
    folders = (os.path.join(path, b) for b in below)
    return next((f for f in folders if os.path.exists(os.path.join(f, "saved_model.pb"))), None)


def write_labels(export: str, classes: Iterable[str]) -> None:
    """Writes the names of the classes into an export folder, a line each and as JSON."""
    names = list(classes)
    write(os.path.join(export, LABELS), "".join(f"{class_names.escape(n)}\n" for n in names))
    write_json(os.path.join(export, "classes.json"), names)


def read_labels(saved_model: str) -> Optional[list[str]]:
    """Returns the names of the classes of an exported SavedModel, or None if no file tells them."""
    path = os.path.join(saved_model, "..", "..", LABELS)
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as f:
        return [class_names.unescape(line) for line in f.read().split("\n")[:-1]]


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else text[:56] + " …"
