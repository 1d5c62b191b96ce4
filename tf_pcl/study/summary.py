"""What the runs of a grid show: a table of means over seeds."""

import statistics
from collections.abc import Sequence

from tf_pcl.study.grid import EQUAL_COST, Cell, saved_by_sharing
from tf_pcl.study.runner import results_of


def summary(cells: Sequence[Cell]) -> str:
    """Returns a table of the test errors of the deployed networks, for people.

    For each network on each data set there is a row for the runs of a name: the mean over seeds and
    the sample deviation (with n − 1). Those of equal epochs stand first, then the baseline of equal
    cost.

    Args:
      cells: the runs of a grid; those that are not done are left out and counted.
    """
    groups: dict[tuple[str, str], dict[str, list[Cell]]] = {}
    for cell in cells:
        about = (cell.options.dataset, cell.options.network)
        groups.setdefault(about, {}).setdefault(cell.name, []).append(cell)
    return "\n\n".join(_group(*about, rows) for about, rows in groups.items())


def costs(cells: Sequence[Cell]) -> str:
    """Returns a table of what the runs of a grid cost, and which are done, for people.

    Args:
      cells: the runs.
    """
    width = max(len(cell.title) for cell in cells)
    alone: dict[tuple[str, str], float] = {}
    for cell in cells:
        about = (cell.options.dataset, cell.options.network)
        alone[about] = min(alone.get(about, cell.gflop), cell.gflop)
    lines = [f"{'run':{width}}  epochs  {'GFLOP':>10}  × the cheapest"]
    for cell in cells:
        ratio = cell.gflop / alone[cell.options.dataset, cell.options.network]
        done = "  done" if results_of(cell) else ""
        lines.append(
            f"{cell.title:{width}}  {cell.options.epochs:6}  {cell.gflop:10.4g}  {ratio:5.1f}{done}"
        )
    saved = saved_by_sharing(cells)
    total = sum(cell.gflop for cell in cells) - saved
    lines.append(f"{len(cells)} runs, {total:.4g} GFLOP")
    if saved:
        lines[-1] += f"; {saved:.4g} GFLOP less than apart, since stages are shared"
    return "\n".join(lines)


def _group(dataset: str, network: str, rows: dict[str, list[Cell]]) -> str:
    cheapest = min(cell.gflop for several in rows.values() for cell in several)
    width = max(map(len, rows))
    lines = [
        f"{network} on {dataset}: test error in percent, mean ± deviation over seeds",
        f"{'':{width}}  {'epochs':>6}  {'cost':>6}  {'error':>12}  seeds",
    ]
    equal_cost = {name for name in rows if name.startswith(EQUAL_COST)}
    for name in sorted(rows, key=lambda name: name in equal_cost):
        several = rows[name]
        errors = [r["deployed_error"] for cell in several if (r := results_of(cell))]
        lines.append(
            f"{name:{width}}  {several[0].options.epochs:6}  "
            f"{several[0].gflop / cheapest:5.1f}×  {_mean(errors):>12}  "
            + (f"{len(errors)}" if len(errors) == len(several) else _of(errors, several))
        )
    if equal_cost:
        lines.append(f"{EQUAL_COST} costs what the dearest of the others costs.")
    return "\n".join(lines)


def _mean(errors: Sequence[float]) -> str:
    if not errors:
        return "–"
    mean = f"{statistics.fmean(errors):.2f}"
    return f"{mean} ± {statistics.stdev(errors):.2f}" if len(errors) > 1 else mean


def _of(errors: Sequence[float], cells: Sequence[Cell]) -> str:
    return f"{len(errors)} of {len(cells)}"
