"""Reads runs, and groups those that differ only by the seed."""

import collections
import dataclasses
import functools
import json
import os
import shlex
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Optional

import numpy as np

from tf_pcl import options
from tf_pcl.deploy import metrics
from tf_pcl.errors import UserError, one_line
from tf_pcl.methods import BASELINE, METHODS
from tf_pcl.options import Options
from tf_pcl.study import paper
from tf_pcl.training.beside import FACTS, drawn, same_training, settings_of
from tf_pcl.training.report import ended
from tf_pcl.training.workdir import EVALUATION, PREDICTIONS, TEST_FILES, Workdir, read_json

# Points, or one image, by which the error of stored predictions may differ from that of the run: in
# other batches or on other devices, rounding changes a few predictions.
_NEAR = 0.5
# The settings that define a section of a report.
_SUBJECT = ("data", "network")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
      path: its workdir.
      options: its options.
      results: the contents of results.json; None before the first test of the last stage.
      rows: the rows of metrics.csv of the last stage.
      data: the contents of data.json, {} if there is none.
      done: whether its training has come to its end.
    """

    path: str
    options: Options
    results: Optional[dict[str, Any]]
    rows: Sequence[Mapping[str, float]]
    data: Mapping[str, Any]
    done: bool

    def predictions(self) -> Optional[tuple[np.ndarray, np.ndarray]]:
        """Returns labels int64 [N] and logits float32 [N, K] of the test images, if stored."""
        return self._kept[0]

    @property
    def unusable(self) -> Optional[str]:
        """Why the stored predictions are not those of the run; None if they are, or if none are."""
        return self._kept[1]

    @functools.cached_property
    def _kept(self) -> tuple[Optional[tuple[np.ndarray, np.ndarray]], Optional[str]]:
        path = os.path.join(self.path, EVALUATION, PREDICTIONS)
        if not os.path.exists(path):
            return None, None
        told = f"{path} is left out: "
        try:
            with np.load(path) as arrays:
                labels, logits = arrays["labels"], arrays["logits"]
            error = metrics.error(logits, labels)
        except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as e:
            return None, f"{told}it is damaged ({one_line(e)}); tf-pcl evaluate writes it anew"
        wanted, near = _results(self)["deployed_error"], max(_NEAR, 101 / len(labels))
        if len(labels) != self.data.get("test images", len(labels)) or abs(error - wanted) > near:
            return None, (
                f"{told}it has an error of {error:.2f} % on {len(labels):,} images, and the run "
                f"one of {wanted:.2f} % on its test images: tf-pcl evaluate "
                f"{shlex.quote(self.path)} writes it anew"
            )
        return (labels, logits), None


@dataclasses.dataclass(frozen=True)
class Group:
    """Finished runs that differ only by the seed.

    Attributes:
      label: how it differs from the other groups of its section, for people.
      settings: {name: text} of the given options, except for the seed, those of the machine and
        those that have the method's default.
      runs: {seed: Run}, at least one.
    """

    label: str
    settings: Mapping[str, str]
    runs: Mapping[int, Run]

    @property
    def options(self) -> Options:
        """The options of one of its runs."""
        return next(iter(self.runs.values())).options

    @property
    def is_baseline(self) -> bool:
        """Whether its network was trained alone, without distillation."""
        return self.options.method == BASELINE

    @property
    def deployed(self) -> str:
        """The name of the exit that is deployed."""
        return str(_results(next(iter(self.runs.values())))["deployed"])

    def errors(self, exit_name: Optional[str] = None) -> dict[int, float]:
        """Returns {seed: test error in percent at the end} of an exit, by default the deployed."""
        found = {seed: _results(run) for seed, run in self.runs.items()}
        if exit_name is None:
            return {seed: results["deployed_error"] for seed, results in found.items()}
        return {seed: results["error"][exit_name] for seed, results in found.items()}

    def exits(self) -> list[str]:
        """Returns the names of the exits that all runs have."""
        first, *others = (_results(run)["error"] for run in self.runs.values())
        return [name for name in first if all(name in other for other in others)]

    def curve(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns epochs [E] and values [seeds, E] of a column of metrics.csv.

        Epochs without a finite value in each run are left out; E may be 0.
        """
        found = [
            {row["epoch"]: row[column] for row in run.rows if np.isfinite(row.get(column, np.nan))}
            for run in self.runs.values()
        ]
        epochs = sorted(set.intersection(*(set(one) for one in found)))
        return np.array(epochs), np.array([[one[e] for e in epochs] for one in found])


class Section(NamedTuple):
    """Groups that can be compared: one network on one data set.

    Attributes:
      data: the data set, for people.
      network: the network's name.
      in_paper: the name of the data set in the paper's tables; None if they do not have it.
      groups: the groups, those of the baseline first.
      common: {name: text} of the settings of all groups, unless their labels say otherwise, except
        for defaults.
    """

    data: str
    network: str
    in_paper: Optional[str]
    groups: list[Group]
    common: dict[str, str]


class Study(NamedTuple):
    """Any set of runs.

    Attributes:
      sections: at least one.
      notes: sentences about runs that are missing, unfinished or left out.
    """

    sections: list[Section]
    notes: list[str]


def read(paths: Iterable[str]) -> Study:
    """Reads runs and groups them.

    Args:
      paths: workdirs, or folders that hold workdirs at any depth.

    Raises:
      UserError: if a path is no folder, or no finished run is found.
    """
    paths = list(paths)
    notes: list[str] = []
    found = []
    for path in dict.fromkeys(os.path.realpath(p) for given in paths for p in _workdirs(given)):
        try:
            found.append(_read(path))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            notes.append(f"{path} cannot be read and is left out: {e}")
    if not any(run.done for run in found):
        raise UserError(
            f"no finished run lies in {', '.join(paths)}: give workdirs of runs, or folders that "
            "hold them" + "".join(f"; {note}" for note in [*notes, *map(_unfinished, found)][:3])
        )
    sections = _sections(found, notes)
    notes += _gaps(sections) + _other_training(sections) + _versions(found)
    notes += [run.unusable for run in found if run.done and run.unusable]
    return Study(sections, notes)


def _workdirs(path: str) -> Iterator[str]:
    """Yields the workdirs at and below a path, except for those of earlier stages."""
    path = os.path.expanduser(path)
    if not os.path.isdir(path):
        raise UserError(f"{path} is no folder: give workdirs of runs, or folders that hold them")
    for folder, names, files in os.walk(path):
        names.sort()
        if os.path.basename(Workdir(folder).flags) in files:
            # Everything in a workdir belongs to its run.
            names.clear()
            yield folder


def _read(path: str) -> Run:
    workdir = Workdir(path)
    given = options.from_file(workdir.flags)
    if given.method not in METHODS:
        raise UserError(f"its method {given.method} is not known to this version")
    results, data = (
        read_json(file) if os.path.exists(file) else None
        for file in (workdir.results, workdir.data)
    )
    rows = workdir.read_rows()
    if results is not None:
        # Runs of earlier versions have it only in metrics.csv.
        last = next((row for row in reversed(rows) if "val_diversity" in row), {})
        if "val_diversity" in last:
            results.setdefault("diversity", last["val_diversity"])
        if not {"deployed", "deployed_error", "epochs", "error"} <= {*results}:
            raise UserError("its results.json is not that of a run")
        errors = [*results["error"].values(), results["deployed_error"]]
        if not np.isfinite(errors).all() or results["deployed"] not in results["error"]:
            raise UserError("the errors in its results.json are not finite, or not those of a run")
    done = results is not None and ended(results, given)
    return Run(path, given, results, rows, data or {}, done)


def _results(run: Run) -> dict[str, Any]:
    assert run.results is not None
    return run.results


def _sections(found: Sequence[Run], notes: list[str]) -> list[Section]:
    """Returns the sections; what is left out is added to the notes."""
    grouped: dict[Any, dict[int, list[Run]]] = {}
    data = _data_names(found)
    for run in found:
        settings = {**settings_of(run.options), "data": data[run.path]}
        key = tuple(sorted(settings.items()))
        grouped.setdefault(key, {}).setdefault(run.options.seed, []).append(run)
    by_subject: dict[Any, list[Group]] = {}
    for key, seeds in grouped.items():
        done: dict[int, Run] = {}
        unfinished = []
        for seed, runs in sorted(seeds.items()):
            first, *others = sorted(runs, key=lambda run: not run.done)
            if first.done:
                done[seed] = first
            else:
                unfinished.append(_unfinished(first))
            same = f"is left out: {first.path} has the same options and seed"
            notes += [f"{run.path} {same}" for run in others]
        settings = dict(key)
        notes += unfinished
        if done:
            subject = tuple(settings[name] for name in _SUBJECT)
            by_subject.setdefault(subject, []).append(Group("", settings, done))
    return [
        _labelled(name, network, groups) for (name, network), groups in sorted(by_subject.items())
    ]


def _data_names(found: Sequence[Run]) -> dict[str, str]:
    """Returns {run's path: the name of its data}, with the folder if data of one name differ."""
    # {data set: {what is known of it: the numbers of its test files}}
    kinds: dict[str, dict[str, set[Any]]] = collections.defaultdict(dict)
    like = lambda run: json.dumps([run.data.get(name) for name in FACTS])
    for run in found:
        numbers = kinds[run.options.dataset].setdefault(like(run), set())
        # Runs of earlier versions do not know them.
        numbers.update({run.data.get(TEST_FILES)} - {None})
    names: dict[tuple[str, str, Any], str] = {}
    kind_of = {}
    for run in found:
        name, folder = run.options.dataset, os.path.normpath(run.options.data_dir or "")
        several = len(kinds[name][like(run)]) > 1
        number = run.data.get(TEST_FILES, "not known") if several else None
        facts = [
            (folder if several else os.path.basename(folder)).strip("."),
            f"{len(run.data.get('classes', []))} classes",
            f"{run.data.get('test images', 0):,} test images",
            f"{TEST_FILES} {number}" if several else "",
        ]
        differ = several or len(kinds[name]) > 1
        kind_of[run.path] = kind = name, like(run), number
        names.setdefault(kind, name + f" ({', '.join(filter(None, facts))})" * differ)
    return {path: names[kind] for path, kind in kind_of.items()}


def _labelled(data: str, network: str, groups: list[Group]) -> Section:
    """Returns a section whose groups have labels of their differences."""
    order = list(METHODS)
    groups = sorted(
        groups,
        key=lambda g: (
            not g.is_baseline,
            order.index(g.options.method),
            g.options.epochs,
            len(g.settings),
        ),
    )
    names = dict.fromkeys(name for group in groups for name in group.settings)
    common: dict[str, str] = {}
    changes: list[list[str]] = [[] for _ in groups]
    defaults = Options().as_flags()
    for name in names:
        if name in ("method", "dataset", *_SUBJECT):
            continue
        values = [group.settings.get(name) for group in groups]
        usual = collections.Counter(values).most_common(1)[0][0]
        if usual is not None and (usual != defaults.get(name) or len({*values}) > 1):
            common[name] = usual
        for change, value in zip(changes, values):
            if value != usual:
                change.append(f"default {name}" if value is None else f"{name}={value}")
    labelled = [
        dataclasses.replace(
            group, label=group.options.method + (f" ({', '.join(change)})" if change else "")
        )
        for group, change in zip(groups, changes)
    ]
    run = next(iter(labelled[0].runs.values()))
    return Section(data, network, paper.known_as(run.options, run.data), labelled, common)


def _unfinished(run: Run) -> str:
    if run.results is None:
        return f"{run.path} is not finished: no test of its last stage has been made"
    return f"{run.path} is not finished: {run.results['epochs']} of {run.options.epochs} epochs"


def _gaps(sections: Sequence[Section]) -> list[str]:
    """Returns a sentence for each group that lacks a seed which another of its section has."""
    notes = []
    for section in sections:
        seeds = sorted({seed for group in section.groups for seed in group.runs})
        for group in section.groups:
            lacking = [str(seed) for seed in seeds if seed not in group.runs]
            if lacking:
                several = len(lacking) > 1
                notes.append(
                    f"seed{'s' * several} {', '.join(lacking)} of {group.label} "
                    f"{'are' if several else 'is'} missing ({section.data}, {section.network})"
                )
    return notes


def _other_training(sections: Sequence[Section]) -> list[str]:
    """Returns a sentence for runs of a section that were trained on other images than its first."""
    notes = []
    for section in sections:
        first: dict[Any, Run] = {}
        for run in (run for group in section.groups for run in group.runs.values()):
            one = first.setdefault(drawn(run.options), run)
            if not same_training(run.data, one.data):
                notes.append(
                    f"{run.path} was trained on other images than {one.path} ({section.data}): "
                    "that may explain a difference between them"
                )
    return notes


def _versions(found: Sequence[Run]) -> list[str]:
    """Returns a sentence if the runs were made with several versions of a package."""
    differ = {}
    for package in ("tf_pcl", "tensorflow", "keras"):
        versions = {(run.results or {}).get("versions", {}).get(package) for run in found} - {None}
        if len(versions) > 1:
            differ[package] = ", ".join(sorted(versions))
    if not differ:
        return []
    return [
        "the runs were made with several versions, which may round differently: "
        + "; ".join(f"{package} {versions}" for package, versions in differ.items())
    ]
