"""tf-pcl compare: trains many runs with one command, and compares them."""

import os
import re
import shlex
from collections.abc import Sequence
from typing import Any

from absl import flags

from tf_pcl import compat, console, options
from tf_pcl.errors import Stopped, UserError
from tf_pcl.verbs import train
from tf_pcl.verbs.verb import Verb

_SINGLE = {"methods": "method", "networks": "network", "datasets": "dataset", "seeds": "seed"}


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of training and those of the grid, in the given absl FlagValues."""
    options.define_flags(values)
    values["workdir"].help = (
        "folder of the grid, in which every run has a folder METHOD-NETWORK-DATASET-seedSEED; "
        "default: runs/compare"
    )
    _define_lists(values)
    flags.DEFINE_string(
        "grid",
        None,
        "file with a line for each set of runs: flags, or NAME: flags, where NAME takes the "
        "method's place in the runs' names; flags of the command line apply to all lines",
        flag_values=values,
    )
    flags.DEFINE_string(
        "table",
        None,
        "a table of the paper, with its methods, networks and data set: 1, 2 or two_stage",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "equal_cost",
        None,
        "add a baseline that is trained until it has cost as much as the most expensive method; "
        "default: with more than one method",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "runner",
        "local",
        ("local", "ray"),
        "where runs train: on this machine, or on a Ray cluster, where ray is installed",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "jobs",
        None,
        "how many runs train at the same time; default: 1 on this machine, on a Ray cluster 1 for "
        "each GPU or, if it has none, for each machine",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "dry_run", False, "list the runs with their cost, and train nothing", flag_values=values
    )
    flags.DEFINE_boolean(
        "print_commands",
        False,
        "print the command of each run, a line each, and train nothing",
        flag_values=values,
    )


def _define_lists(values: flags.FlagValues) -> None:
    for plural, single in _SINGLE.items():
        names = plural.replace("datasets", "data sets")
        text = f"{names}, comma separated; see --{single} for their names"
        if plural == "seeds":
            text = "the number of seeds, from 0 on, or several seeds: 3 means 0,1,2; default: 1"
        flags.DEFINE_list(plural, None, text, flag_values=values)


def planned(values: flags.FlagValues, rest: Sequence[str] = ()) -> list[Any]:
    """Returns the Cells of parsed flags.

    Args:
      values: absl FlagValues.
      rest: the arguments that are not flags.

    Raises:
      UserError: if they do not fit together.
    """
    train.refuse_words(rest)
    if values.grid and values.table:
        raise UserError("--grid does not go with --table: give one of them")
    common = options.given(values)
    workdir = os.path.expanduser(common.pop("workdir", os.path.join("runs", "compare")))
    # TensorFlow takes seconds to import, so the flags are checked first.
    options.from_flags(values)
    lists = _lists(values, common)
    texts = _read(values.grid) if values.grid else []
    compat.import_tensorflow()
    from tf_pcl.study import grid

    for single in _SINGLE.values():
        common.pop(single, None)
    cells = grid.plan(_lines(values, lists, texts), workdir, common)
    several = len({cell.name for cell in cells}) > 1
    wanted = several if values.equal_cost is None else values.equal_cost
    return grid.with_equal_cost(cells, workdir) if wanted else cells


def _compare(rest: list[str]) -> None:
    values = flags.FLAGS
    cells = planned(values, rest)
    from tf_pcl.study import listing, report, runner

    if values.print_commands:
        print(*(shlex.join(cell.command()) for cell in cells), sep="\n")
        return
    runner.check(cells, alone=not values.dry_run)
    if values.dry_run:
        print(listing.costs(cells))
        return
    failures = runner.run(cells, values.runner, values.jobs)
    if len(failures) < len(cells):
        workdir = os.path.dirname(cells[0].options.workdir)
        made = report.report([workdir], os.path.join(workdir, "report"))
        print()
        console.show(made.markdown)
        print(made.files[0])
    if failures:
        named = "; ".join(f"{f.cell.title} with status {f.status}, see {f.log}" for f in failures)
        raise Stopped(
            f"{len(failures)} of {len(cells)} runs failed: {named}. The same command tries them "
            "again."
        )


def _lines(
    values: flags.FlagValues, usual: dict[str, list[Any]], texts: list[tuple[int, str, list[str]]]
) -> list[Any]:
    """Returns the Lines of a grid.

    Args:
      values: absl FlagValues.
      usual: the lists of the command line for all lines, as `_lists` returns them.
      texts: the lines of a file, as `_read` returns them.
    """
    if values.table:
        return _of_table(values.table, usual)
    if not texts:
        return [_line("", usual, {})]
    found = []
    for number, name, arguments in texts:
        own = flags.FlagValues()
        options.define_flags(own)
        _define_lists(own)
        try:
            rest = own([values.grid, *arguments])[1:]
            if rest:
                raise UserError(f"{rest[0]!r} is not a flag")
            given = options.given(own)
            lists = {**usual, **_lists(own, given)}
            for single in ("workdir", *_SINGLE.values()):
                given.pop(single, None)
            found.append(_line(name, lists, given))
        except (flags.Error, UserError) as e:
            raise UserError(f"{values.grid}, line {number}: {e}") from e
    return found


def _line(name: str, lists: dict[str, Any], given: dict[str, Any]) -> Any:
    """Returns a Line, with the defaults of a run for missing lists."""
    from tf_pcl.study.grid import Line

    default = options.Options()
    whole = {
        plural: lists.get(plural) or [getattr(default, single)]
        for plural, single in _SINGLE.items()
    }
    return Line(**whole, given=given, name=name)


def _lists(values: flags.FlagValues, given: dict[str, Any]) -> dict[str, list[Any]]:
    """Returns {"methods": …, "seeds": …} of the given ones, from flags in singular or plural."""
    found: dict[str, list[Any]] = {}
    for plural, single in _SINGLE.items():
        several = values[plural].value
        if several is not None and single in given:
            raise UserError(f"--{plural} does not go with --{single}: give one of them")
        if several is not None:
            found[plural] = _seeds(several) if plural == "seeds" else several
            if not found[plural] or "" in found[plural]:
                raise UserError(f"--{plural}={','.join(several)}: give names, comma separated")
        elif single in given:
            found[plural] = [given[single]]
    return found


def _seeds(texts: list[str]) -> list[int]:
    if not all(re.fullmatch(r"\d{1,9}", text) for text in texts) or texts == ["0"]:
        raise UserError(
            f"--seeds={','.join(texts)}: give how many, as in --seeds=3, or several, as in "
            "--seeds=0,1,5; --seed=7 is for one"
        )
    numbers = [int(text) for text in texts]
    return numbers if len(numbers) > 1 else list(range(numbers[0]))


def _of_table(name: str, lists: dict[str, Any]) -> list[Any]:
    from tf_pcl.study import grid

    if "datasets" in lists:
        raise UserError("--table brings its data sets: leave --dataset and --datasets out")
    entries = grid.table(name, lists.get("networks", ()), lists.get("methods", ()))
    # The paper has three runs of each.
    seeds = lists.get("seeds", [0, 1, 2])
    return [grid.Line([e["method"]], [e["network"]], [e["dataset"]], seeds) for e in entries]


def _read(path: str) -> list[tuple[int, str, list[str]]]:
    """Returns (number, name, flags) of the lines of a grid's file."""
    try:
        with open(os.path.expanduser(path), encoding="utf-8") as f:
            lines = f.read().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--grid={path}: it cannot be read: {e}") from e
    found = []
    for number, line in enumerate(lines, 1):
        match = re.fullmatch(r"\s*(?:([\w.+-]*[\w.+]):\s)?(.*)", line)
        assert match
        try:
            arguments = shlex.split(match[2], comments=True)
        except ValueError as e:
            raise UserError(f"{path}, line {number}: {e}") from e
        if arguments or match[1]:
            found.append((number, match[1] or "", arguments))
    if not found:
        raise UserError(f"--grid={path}: it has no line of flags, such as NAME: --epochs=60")
    return found


VERB = Verb(
    "Trains a grid of runs, methods by networks by data sets by seeds, and compares them.",
    define_flags,
    _compare,
    complete_help=train.VERB.complete_help,
)
