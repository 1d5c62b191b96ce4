"""The list of a grid's runs."""

from collections.abc import Sequence

from tf_pcl.study.grid import Cell, saved_by_sharing
from tf_pcl.study.runner import results_of


def costs(cells: Sequence[Cell]) -> str:
    """Returns a table, for people, of the costs of a grid's runs, and which of them are done.

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
        lines[-1] += f"; shared stages save {saved:.4g} GFLOP"
    return "\n".join(lines)
