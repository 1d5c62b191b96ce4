"""The files of a workdir; only this module knows their layout.

flags.txt             the options of the run, as a flagfile
data.json             facts about the data set
versions.json         the versions of Python and the packages that it ran with, and its replicas
train_images.txt, validation_images.txt, test_images.txt
                      the files of each, where the run divided them itself
images.json           of images too large for memory: which of their files could not be read when
                      the run began, and the channels' means and deviations
trackers.json         the run's ids in W&B and MLflow, if it is logged there
lock                  which process works here; the lock itself ends with that process
results.json          the results; rewritten after every epoch that was tested
metrics.csv           a row for every epoch
checkpoints/          the last checkpoints
tensorboard/train, tensorboard/test or, where there are validation images, tensorboard/validation
export/saved_model/1  the deployed network, in the layout of TensorFlow Serving
export/labels.txt     the classes in the order of the outputs, a line each, escaped
export/classes.json   the same names as a JSON list
evaluation/           what tf-pcl evaluate has written
1-NAME, 2-NAME, …     of each stage before the last: trackers.json, results.json and the rest
worker-1, worker-2, … the folders of the workers after the first
"""

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Optional, TextIO

from absl import logging

from tf_pcl.data import class_names
from tf_pcl.errors import UserError
from tf_pcl.options import Options

try:
    import fcntl
except ImportError:  # Windows has no such locks.
    fcntl = None  # type: ignore[assignment]

SAVED_MODEL = os.path.join("saved_model", "1")
LABELS, NAMES = "labels.txt", "classes.json"
# The folder of the evaluation of a run in its workdir, and the file of its predictions.
EVALUATION, PREDICTIONS = "evaluation", "predictions.npz"
# What data.json calls numbers that tell images from files apart. One of them may break.
TRAINING_FILES, TEST_FILES = "training files", "test files"
# What data.json calls a number that tells the names of all image files and their labels apart.
FILE_LABELS = "labels of files"
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
        self.images = os.path.join(path, "images.json")
        self.lock = os.path.join(path, "lock")
        self.results = os.path.join(path, "results.json")
        self.metrics = os.path.join(path, "metrics.csv")
        self.checkpoints = os.path.join(path, "checkpoints")
        self.export = os.path.join(path, "export")
        self.trackers = os.path.join(path, "trackers.json")

    @classmethod
    def of_run(cls, options: Options, worker: int = 0) -> "Workdir":
        """Returns the workdir of a run with these options.

        Args:
          options: the run's options.
          worker: the index of this process among several. All of them must save, since statistics
            are gathered from all; the run's workdir is that of the first.
        """
        network = options.network.replace(":", ".").replace(",", "+")
        name = f"{options.dataset}-{network}-{options.method}-seed{options.seed}"
        path = options.workdir or os.path.join("runs", name)
        return cls(os.path.join(path, f"worker-{worker}") if worker else path)

    def of_stage(self, number: int, name: str) -> "Workdir":
        """Returns the folder of a stage before the last; `number` counts from 1."""
        return Workdir(os.path.join(self.path, f"{number}-{name}"))

    def tensorboard(self, split: str) -> str:
        """Returns the folder of TensorBoard's logs of "train", "test" or "validation"."""
        return os.path.join(self.path, "tensorboard", split)

    def check(self, options: Options, alone: bool = True) -> None:
        """Checks that a run with these options can use this folder. Writes nothing.

        Args:
          options: the run's options.
          alone: whether no other process may work in it.

        Raises:
          UserError: if the folder cannot be written, another process works in it, it holds a run
            with other options or one of a run's earlier stages, or any run where `options.resume`
            is "never".
        """
        self._check_name()
        self._check_writable()
        if alone:
            self._refuse_other(self.owner())
        if not os.path.exists(self.flags):
            if os.path.exists(self.checkpoints):
                raise self._refused(
                    "the folder holds checkpoints but no flags.txt, like the folder of a run's "
                    "earlier stage: give another workdir"
                )
            return
        if options.resume == "never":
            raise self._refused(
                "the folder holds a run: give another workdir, or `resume=auto` to resume the run"
            )
        # Files that have broken since then may be left out for the rest of the run.
        given, free = options.as_flags(), {*options.run_only(), "on_bad_image"}
        # An option that is newer than the run had its default there.
        old = {**Options().as_flags(), **self._read_flags()}
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

    def check_checkpoints(self) -> None:
        """Raises UserError if a run in this folder is done and its checkpoints were removed."""
        done = os.path.exists(os.path.join(self.export, SAVED_MODEL))
        if done and not os.path.exists(self.checkpoints):
            raise self._refused(
                "the run in it is done, but its checkpoints were removed, so it would be trained "
                "again: use its results and export as they are, or give another workdir"
            )

    def check_data(self, facts: Mapping[str, Any], whole: bool = True) -> None:
        """Checks that a run in this folder, if there is one, has the data that `facts` describe.

        Args:
          facts: what data.json has of the data.
          whole: whether these are all facts.

        Raises:
          UserError: if it has other data.
        """
        old = _recorded(self.data)
        if old is None:
            return
        free = {TRAINING_FILES, TEST_FILES}
        # Runs of earlier versions do not know it.
        free |= set() if FILE_LABELS in old else {FILE_LABELS}
        differ = [
            f"{name} {_brief(facts.get(name))} here, {_brief(old.get(name))} there"
            for name in dict.fromkeys([*facts, *(old if whole else ())])
            if facts.get(name) != old.get(name) and name not in free
        ]
        if differ:
            raise self._refused(
                f"the folder holds a run on other data ({'; '.join(differ)}): give another "
                "workdir or the same data"
            )

    def check_versions(self, versions: Mapping[str, str]) -> None:
        """Checks that a run in this folder, if there is one, ran on the stack of `versions`.

        Two stacks round differently: no run on one stack would equal a run that changed stacks.

        Args:
          versions: versions by package, among them "tensorflow" and "keras".

        Raises:
          UserError: if the run was on another minor version of TensorFlow or Keras.
        """
        packages = ("tensorflow", "keras")
        old = _recorded(self.versions, needs=packages)
        if old is None or all(_minor(versions[p]) == _minor(old[p]) for p in packages):
            return
        here, there = (
            f"TensorFlow {v['tensorflow']} with Keras {v['keras']}" for v in (versions, old)
        )
        raise self._refused(
            f"the folder holds a run on {there}, and this is {here}, which rounds differently: "
            f"go on with TensorFlow {_minor(old['tensorflow'])}, or give another workdir"
        )

    def check_replicas(self, replicas: int, bound: Sequence[str]) -> None:
        """Checks that a run in this folder can go on with this number of replicas.

        Args:
          replicas: how many devices share a batch.
          bound: the layers that depend on that number.

        Raises:
          UserError: if it began on another number and there are such layers.
        """
        before = (_recorded(self.versions) or {}).get("replicas", replicas)
        if before != replicas and bound:
            raise self._refused(
                f"the run began on {before} replicas, not {replicas}, and {len(bound)} layers "
                f"depend on that number ({', '.join(bound[:2])}{', …' * (len(bound) > 2)}): go on "
                f"with {before}, or give another workdir"
            )

    def follow(self, first: "Workdir") -> None:
        """Copies the first worker's checkpoints into this workdir of a later worker.

        Workers that were killed may have saved different steps, or there may be more workers now.
        Nothing is done if the first worker's workdir is not on this machine's disks, or has no run
        yet.
        """
        if not os.path.exists(first.flags):
            return
        stages = [n for n in os.listdir(first.path) if re.fullmatch(r"\d+-.+", n)]
        for stage in ("", *stages):
            its, own = (Workdir(os.path.join(w.path, stage)) for w in (first, self))
            os.makedirs(own.path, exist_ok=True)
            shutil.rmtree(own.checkpoints, ignore_errors=True)
            if os.path.isdir(its.checkpoints):
                shutil.copytree(its.checkpoints, own.checkpoints)
            for name in ("flags.txt", "data.json", "versions.json", "images.json", "metrics.csv"):
                if os.path.exists(os.path.join(its.path, name)):
                    shutil.copyfile(os.path.join(its.path, name), os.path.join(own.path, name))

    def begin(
        self, options: Options, facts: Mapping[str, Any], versions: Mapping[str, Any]
    ) -> None:
        """Makes the folder and writes the options, data and versions of the run."""
        os.makedirs(self.path, exist_ok=True)
        given = {name: value for name, value in options.as_flags().items() if name != "workdir"}
        write(self.flags, "".join(f"--{name}={value}\n" for name, value in given.items()))
        write_json(self.data, facts)
        write_json(self.versions, versions)

    def read_data(self) -> dict[str, Any]:
        """Returns what data.json tells of the data; {} if it is missing or damaged."""
        return read_json_if_any(self.data)

    def read_images(self) -> Optional[dict[str, Any]]:
        """Returns what `write_images` wrote; None if the folder holds no such run."""
        return _recorded(self.images, needs=("left_out", "mean", "std"))

    def write_images(self, record: Optional[Mapping[str, Any]]) -> None:
        """Writes the record of the image files (data.datasets.record), if there is one."""
        if record is not None:
            write_json(self.images, record)

    def write_lists(self, lists: Mapping[str, Iterable[str]]) -> None:
        """Writes SPLIT_images.txt for {split: paths}, a path a line, escaped as class names are."""
        for split, paths in lists.items():
            lines = "".join(f"{class_names.escape(path)}\n" for path in paths)
            write(os.path.join(self.path, f"{split}_images.txt"), lines)

    def read_list(self, split: str) -> set[str]:
        """Returns the escaped paths that `write_lists` wrote for a split, if it wrote any."""
        try:
            with open(os.path.join(self.path, f"{split}_images.txt"), encoding="utf-8") as f:
                return set(f.read().split("\n")[:-1])
        except FileNotFoundError:
            return set()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes out of this folder, which is made if it does not exist.

        The lock ends with the process, for whatever reason. On a file system without locks there
        is a warning.

        Raises:
          UserError: if another process has the lock; the text names it.
        """
        os.makedirs(self.path, exist_ok=True)
        # The file stays open: if a process closes it anywhere, the system releases the lock.
        with open(self.lock, "a+", encoding="utf-8") as f:
            self._refuse_other(self._take(f))
            f.truncate(0)
            f.write(f"host {socket.gethostname()}, process {os.getpid()}\n")
            f.flush()
            yield

    def owner(self) -> Optional[str]:
        """Returns which other process works in this folder, None if none does."""
        if not os.path.exists(self.lock):
            return None
        with open(self.lock, "r+", encoding="utf-8") as f:
            return self._take(f)

    def tidy(self) -> None:
        """Removes what a killed process left half written, checkpoints apart."""
        for folder, pattern in (self.path, r".*\.part"), (self.export, r"tmp\w{8}|.*\.part"):
            for name in os.listdir(folder) if os.path.isdir(folder) else ():
                path = os.path.join(folder, name)
                if re.fullmatch(pattern, name):
                    if os.path.isdir(path):
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        os.remove(path)

    def read_rows(self) -> list[dict[str, float]]:
        """Returns the rows of metrics.csv without empty cells, or [] if there is no such file.

        Lines that are not rows of numbers, or are out of order, are left out with a warning.
        """
        if not os.path.exists(self.metrics):
            return []
        with open(self.metrics, encoding="utf-8", errors="replace", newline="") as f:
            columns, *lines = [line.split(",") for line in f.read().split("\n")]
        rows: list[dict[str, float]] = []
        foreign = [] if "epoch" in columns else [1]
        for number, cells in enumerate(lines, 2):
            try:
                row = {name: float(cell) for name, cell in zip(columns, cells) if cell}
                before = rows[-1]["epoch"] if rows else 0
                if len(cells) != len(columns) or row["epoch"] <= before:
                    raise ValueError
                rows.append(row)
            except (ValueError, KeyError):
                if cells != [""]:
                    foreign.append(number)
        if foreign:
            logging.warning(
                "%s: lines %s are not rows of this run, and are left out",
                self.metrics,
                ", ".join(map(str, foreign[:5])) + ", …" * (len(foreign) > 5),
            )
        return rows

    def write_rows(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Writes metrics.csv with a column for every key, in the order of first appearance."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines = [",".join(columns)]
        lines += [",".join(f"{row[c]:.9g}" if c in row else "" for c in columns) for row in rows]
        write(self.metrics, "\n".join(lines) + "\n")

    def _refuse_other(self, owner: Optional[str]) -> None:
        if owner:
            raise self._refused(
                f"another process works in this folder ({owner}): wait for its end, or give "
                "another workdir"
            )

    def _take(self, lock: TextIO) -> Optional[str]:
        """Locks an open file until it is closed; returns the owner if another has locked it."""
        try:
            if fcntl:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno not in (errno.EACCES, errno.EAGAIN):
                logging.warning("%s cannot be locked: %s", self.path, e.strerror)
                return None
            lock.seek(0)
            return lock.read(200).strip() or "unknown"
        return None

    def _read_flags(self) -> dict[str, str]:
        """Returns {name: text} of flags.txt."""
        with open(self.flags, encoding="utf-8", errors="replace") as f:
            lines = [line.strip() for line in f if line.strip() and not line.startswith("#")]
        matches = [re.fullmatch(r"--(\w+)=(.*)", line) for line in lines]
        if not lines or not all(matches):
            raise self._refused(
                "its flags.txt is damaged, so the options of the run are not known: write its "
                "flags again, one flag and its value a line, or give another workdir"
            )
        return {match[1]: match[2] for match in matches if match}

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
                "TensorFlow reads brackets, *, ? and \\ in a path as a pattern and would not find "
                "its files again: give a name without them"
            )

    def _check_writable(self) -> None:
        there = os.path.abspath(self.path)
        missing: list[str] = []
        while not os.path.lexists(there):  # A link to nothing is there, and no folder.
            there, name = os.path.split(there)
            missing.insert(0, name)
        try:
            # Names that are too long fail here, before the folder is made.
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
    """Writes a text file so that readers see either the old one or the new one, never a part."""
    with open(path + ".part", "w", encoding="utf-8", newline="") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".part", path)


def write_json(path: str, value: Any) -> None:
    """Writes a JSON file with `write`."""
    write(path, json.dumps(value, indent=2) + "\n")


def read_json(path: str) -> dict[str, Any]:
    """Returns the contents of a JSON file that holds an object.

    Raises:
      OSError: if it cannot be read.
      ValueError, TypeError: if it is damaged.
    """
    with open(path, encoding="utf-8") as f:
        return dict(json.load(f))


def read_json_if_any(path: str) -> dict[str, Any]:
    """Returns the same as `read_json`; {} if the file is missing or damaged."""
    try:
        return read_json(path)
    except (OSError, ValueError, TypeError):
        return {}


def _recorded(path: str, needs: Sequence[str] = ()) -> Optional[dict[str, Any]]:
    """Returns a JSON file's record of a run's beginning; None if it is missing or damaged.

    Args:
      path: the file.
      needs: keys without which it is damaged.
    """
    if not os.path.exists(path):
        return None
    try:
        record = read_json(path)
        if set(needs) <= set(record):
            return record
    except (ValueError, TypeError):
        pass
    logging.warning(
        "%s is damaged: it is written again, and cannot show whether the run resumes as it began",
        path,
    )
    return None


def saved_model(path: str) -> Optional[str]:
    """Returns the folder of the SavedModel at `path`, or None if there is none.

    Of several versions, the folders 1, 2 … of TensorFlow Serving's layout, it is the newest.

    Args:
      path: a run's workdir, its export folder or the folder of a SavedModel or of its versions.
    """
    layout = os.path.dirname(SAVED_MODEL)
    for below in ("", layout, os.path.join("export", layout)):
        folder = os.path.join(path, below) if below else path
        names = os.listdir(folder) if os.path.isdir(folder) else []
        numbers = [name for name in names if re.fullmatch("[0-9]+", name)]
        for name in ("", *sorted(numbers, key=int, reverse=True)):
            if os.path.exists(os.path.join(folder, name, "saved_model.pb")):
                return os.path.join(folder, name) if name else folder
    return None


def write_labels(export: str, classes: Iterable[str]) -> None:
    """Writes the names of the classes into an export folder, a line each and as JSON."""
    names = list(classes)
    write(os.path.join(export, LABELS), "".join(f"{class_names.escape(n)}\n" for n in names))
    write_json(os.path.join(export, NAMES), names)


def read_labels(saved_model: str) -> Optional[list[str]]:
    """Returns the names of the classes of an exported SavedModel; None if no file has them."""
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
