"""A grid of runs, their costs, and a baseline that costs as much as the most expensive run."""

import dataclasses
import functools
import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Optional

from tf_pcl.errors import UserError, choose
from tf_pcl.methods import BASELINE, METHODS
from tf_pcl.options import Options
from tf_pcl.study import cost, paper
from tf_pcl.training.assemble import method_arguments, options_of

EQUAL_COST = f"{BASELINE}_equal_cost"


@dataclasses.dataclass(frozen=True)
class Line:
    """Runs that are given together: all combinations of methods, networks, data sets and seeds.

    Attributes:
      methods, networks, datasets: names.
      seeds: numbers.
      given: {option: value} of all of them. An option that only some methods take goes to these.
      name: their name in place of the method; "" for the method.
    """

    methods: Sequence[str]
    networks: Sequence[str]
    datasets: Sequence[str]
    seeds: Sequence[int]
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Cell:
    """A run of a grid.

    Attributes:
      name: its method, or the name of the runs of its line.
      options: its options; `workdir` is its own folder in that of the grid.
    """

    name: str
    options: Options

    @property
    def path(self) -> str:
        """The run's workdir."""
        assert self.options.workdir
        return self.options.workdir

    @property
    def title(self) -> str:
        """The name of its folder."""
        return os.path.basename(self.path)

    @functools.cached_property
    def stages(self) -> list[cost.StageCost]:
        """Its stages with their costs."""
        return cost.stages_of(self.options)

    @property
    def gflop(self) -> float:
        """The cost of its training."""
        return sum(stage.gflop for stage in self.stages)

    def command(self, python: str = "python") -> list[str]:
        """Returns the command that trains it, without options that have their defaults."""
        told = self.options.told(always=("method", "network", "dataset", "seed"))
        flags = [f"--{name}={value}" for name, value in told.items()]
        return [python, "-m", "tf_pcl", "train", *flags]


def plan(lines: Sequence[Line], workdir: str, common: Optional[Mapping] = None) -> list[Cell]:
    """Returns the runs of lines, each once.

    Args:
      lines: the lines.
      workdir: the folder of the grid.
      common: {option: value} of all lines, unless a line has another value.

    Raises:
      UserError: if none of the methods takes an option, values are out of range, or different runs
        would have the same folder.
    """
    common = dict(common or {})
    methods = {method for line in lines for method in line.methods}
    for method in methods:
        choose("method", method, METHODS, parameter="method")
    cells: dict[str, Cell] = {}
    for line in lines:
        _refuse_untaken(common, methods)
        _refuse_untaken(line.given, line.methods)
        for dataset, network, method, seed in itertools.product(
            line.datasets, line.networks, line.methods, line.seeds
        ):
            told = dict(method=method, network=network, dataset=dataset, seed=seed)
            _add(cells, _cell({**common, **line.given, **told}, line.name, workdir))
    return list(cells.values())


def with_equal_cost(cells: Sequence[Cell], workdir: str) -> list[Cell]:
    """Adds to each comparison a baseline that costs as much as its most expensive run.

    A comparison consists of runs that agree in all but the method and its own options. The baseline
    has so many epochs that it costs as much as the most expensive of them; its learning rate drops
    at the same shares of its training. If none costs more than a baseline, nothing is added.

    Args:
      cells: the runs.
      workdir: the folder of the grid.
    """
    costliest: dict[Options, Cell] = {}
    for cell in cells:
        alone = _alone(cell.options)
        if alone not in costliest or cell.gflop > costliest[alone].gflop:
            costliest[alone] = cell
    added: dict[str, list[tuple[Options, Cell]]] = {}
    for alone, cell in costliest.items():
        factor = cell.gflop / cost.cost_of(alone)
        epochs = round(factor * alone.epochs)
        if epochs <= alone.epochs:
            continue
        drops = alone.lr_decay_epochs
        longer = dataclasses.replace(
            alone,
            epochs=epochs,
            lr_decay_epochs=drops and tuple(round(e * epochs / alone.epochs, 2) for e in drops),
        )
        added.setdefault(_folder(EQUAL_COST, longer), []).append((longer, cell))
    found = {cell.title: cell for cell in cells}
    for several in added.values():
        for longer, cell in several:
            # Names of most expensive runs distinguish comparisons of one network, data set and
            # seed.
            name = EQUAL_COST if len(several) == 1 else f"{EQUAL_COST}_to_{cell.name}"
            _add(found, _cell(vars(longer), name, workdir))
    return list(found.values())


def table(
    name: str, networks: Sequence[str] = (), methods: Sequence[str] = ()
) -> list[dict[str, str]]:
    """Returns the entries of a table of the paper, each as {"method", "network", "dataset"}.

    Args:
      name: one of paper.TABLES.
      networks, methods: if given, only their entries are returned.

    Raises:
      UserError: if there is no such table, or no such entry in it.
    """
    choose("table", name, paper.TABLES, parameter="table")
    entries = [entry for entry, _ in paper.entries(name)]
    for what, wanted in ("network", networks), ("method", methods):
        for one in wanted:
            choose(what, one, sorted({entry[what] for entry in entries}), parameter=f"{what}s")
        entries = [entry for entry in entries if not wanted or entry[what] in wanted]
    return entries


def shared_stages(cell: Cell, other: Cell) -> list[str]:
    """Returns the folders of the earlier stages that two runs have in common, bit for bit.

    These are stages of one method, at the same position, that train the same network alone with the
    same recipe, data and seed. The method's own options do not affect them.

    Args:
      cell, other: two runs.
    """
    mine, its = cell.options, other.options
    free = _options_of(METHODS) | {"network"} | mine.run_only() - {"data_dir", "labels"}
    differ = {name for name, value in vars(mine).items() if value != getattr(its, name)}
    # `weights` apply to all networks with the name `network`.
    if differ - free or (mine.weights and mine.network != its.network):
        return []
    stages = zip(cell.stages[:-1], other.stages[:-1])
    return [
        f"{number}-{one.name}"
        for number, (one, same) in enumerate(stages, 1)
        if one.alone and same.alone and one.network == same.network
    ]


def saved_by_sharing(cells: Sequence[Cell]) -> float:
    """Returns the GFLOP that runs save, since earlier runs have trained their stages."""
    saved = 0.0
    for i, cell in enumerate(cells):
        shared = set().union(*(shared_stages(cell, other) for other in cells[:i]))
        saved += sum(
            stage.gflop
            for number, stage in enumerate(cell.stages, 1)
            if f"{number}-{stage.name}" in shared
        )
    return saved


def _cell(values: Mapping[str, Any], name: str, workdir: str) -> Cell:
    """Returns a run; options that its method does not take are left out."""
    own = _options_of(METHODS) - options_of(values["method"])
    taken = {option: value for option, value in values.items() if option not in own}
    options = Options(**{**taken, "workdir": None})
    name = name or options.method
    path = os.path.join(workdir, _folder(name, options))
    return Cell(name, dataclasses.replace(options, workdir=path))


def _folder(name: str, options: Options) -> str:
    network = options.network.replace(",", "+")
    whole = f"{name}-{network}-{options.dataset}-seed{options.seed}"
    # Names of networks and data sets may contain colons and slashes.
    return re.sub(r"[^\w.+-]", ".", whole)


def _add(cells: dict[str, Cell], cell: Cell) -> None:
    known = cells.setdefault(cell.title, cell)
    if known != cell:
        raise UserError(
            f"two different runs would have the name {cell.title}: give the lines of the grid "
            "different names"
        )


def _alone(options: Options) -> Options:
    """Returns the options of the baseline that agrees with others in all but the method."""
    unset: dict[str, Any] = dict.fromkeys(_options_of(METHODS) - options_of(BASELINE))
    network, *_ = options.network.split(",")
    return dataclasses.replace(options, method=BASELINE, network=network, workdir=None, **unset)


def _options_of(methods: Iterable[str]) -> set[str]:
    """Returns the options that one of these methods takes, but not all runs have."""
    return set().union(*map(options_of, methods))


def _refuse_untaken(given: Mapping[str, Any], methods: Iterable[str]) -> None:
    """Raises UserError for an option that other methods take, but none of these."""
    every = sorted(methods)
    for name in sorted(_options_of(METHODS) - _options_of(every)):
        if given.get(name) is not None:
            # Enough epochs for any ramp-up.
            values = {"epochs": 1_000_000, name: given[name]}
            method_arguments(Options(method=every[0], **values))
