"""The tables of a study: in Markdown for people, in CSV for programs."""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from math import nan
from typing import Any, NamedTuple, Optional

from tf_pcl.study import paper, statistics
from tf_pcl.study.comparisons import Comparison
from tf_pcl.study.runs import Group, Section
from tf_pcl.study.statistics import Difference, McNemar

NONE = "–"
# Units of cost and their size in GFLOP.
UNITS = {"GFLOP": 1e0, "TFLOP": 1e3, "PFLOP": 1e6, "EFLOP": 1e9}


class Table(NamedTuple):
    """A table for people.

    Attributes:
      columns: the headings.
      rows: the cells; a row has as many as there are columns.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Returns the table in Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
        return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def errors(
    section: Section, costs: Mapping[str, Optional[float]], comparisons: Sequence[Comparison]
) -> Table:
    """Returns the table of a section's groups, a row each.

    Args:
      section: the section.
      costs: {label of a group: training cost in GFLOP, or None}.
      comparisons: what comparisons.compare found.
    """
    reference = next((costs[g.label] for g in section.groups if g.is_baseline), None)
    against = [at for at in _HEADS if any(c.at == at for c in comparisons)]
    columns = ["method", "seeds", "test error, %", "other exits, %"]
    figures = {group.label: _of_paper(section, group) for group in section.groups}
    columns += ["paper, %"] * any(text != NONE for text in figures.values())
    columns += ["training cost"] * any(costs.values()) + ["× baseline"] * bool(reference)
    columns += [_HEADS[at] for at in against]
    rows = []
    for group in section.groups:
        cost = costs[group.label]
        cells = {
            "method": group.label,
            "seeds": ", ".join(map(str, group.runs)),
            "test error, %": mean(group.errors().values()),
            "other exits, %": _others(group) or NONE,
            "paper, %": figures[group.label],
            "training cost": flop(cost),
            "× baseline": f"{cost / reference:.1f}" if cost and reference else NONE,
        }
        mine = {c.at: c for c in comparisons if c.group is group}
        cells.update({_HEADS[at]: _points(mine.get(at)) for at in against})
        rows.append([cells[column] for column in columns])
    return Table(columns, rows)


def differences(comparisons: Sequence[Comparison]) -> Table:
    """Returns the table of comparisons, a row each; differences are in points of test error."""
    rows = []
    for c in comparisons:
        seeds = c.seeds
        rows.append(
            [
                c.group.label,
                ", ".join(filter(None, [c.against.label, c.at])),
                NONE if seeds is None else str(seeds.size),
                NONE if seeds is None else _signed(seeds.mean),
                _interval(seeds),
                "no seed in common" if seeds is None else seeds.verdict,
                _interval(c.images),
                ", ".join(f"{m.p:.2g}" if m else NONE for m in _tests(c)) or NONE,
            ]
        )
    columns = [
        "method",
        "against",
        "seeds",
        "difference, points",
        "95 % over seeds",
        "verdict",
        "95 % over test images",
        "McNemar's p, by seed",
    ]
    kept = [i for i, _ in enumerate(columns) if i < 6 or any(row[i] != NONE for row in rows)]
    return Table([columns[i] for i in kept], [[row[i] for i in kept] for row in rows])


def errors_csv(found: Iterable[tuple[Section, Mapping[str, Optional[float]]]]) -> str:
    """Returns a CSV with a row for each exit of each group.

    Args:
      found: each section with its costs, as `errors` takes them.
    """
    rows: list[dict[str, Any]] = []
    for section, costs in found:
        for group in section.groups:
            figure = paper.figure(group.options.method, section.network, section.in_paper)
            for name in group.exits():
                s = statistics.summary(group.errors(name).values())
                deployed = name == group.deployed
                rows.append(
                    {
                        "data": section.data,
                        "network": section.network,
                        "method": group.options.method,
                        "setting": group.label,
                        "epochs": group.options.epochs,
                        "exit": name,
                        "deployed": int(deployed),
                        "seeds": " ".join(map(str, group.runs)),
                        "error_mean": s.mean,
                        "error_deviation": s.deviation,
                        "paper_mean": figure.mean if figure and deployed else None,
                        "paper_deviation": figure.deviation if figure and deployed else None,
                        "cost_gflop": costs[group.label],
                    }
                )
    return _csv(rows)


def differences_csv(found: Iterable[tuple[Section, Sequence[Comparison]]]) -> str:
    """Returns a CSV with a row for each comparison of each section."""
    rows: list[dict[str, Any]] = []
    for section, comparisons in found:
        for c in comparisons:
            seeds, images, tests = c.seeds, c.images, _tests(c)
            rows.append(
                {
                    "data": section.data,
                    "network": section.network,
                    "setting": c.group.label,
                    "against": c.against.label,
                    "at": c.at,
                    "seeds": seeds.size if seeds else 0,
                    "difference": seeds and seeds.mean,
                    "low": seeds and seeds.low,
                    "high": seeds and seeds.high,
                    "verdict": seeds.verdict if seeds else "no seed in common",
                    "images": images.size if images else 0,
                    "images_low": images and images.low,
                    "images_high": images and images.high,
                    **{
                        f"mcnemar_{name}": " ".join(f"{getattr(m, name, nan):.4g}" for m in tests)
                        for name in McNemar._fields
                    },
                }
            )
    return _csv(rows)


def mean(values: Iterable[float]) -> str:
    """Returns "mean ± deviation" of errors in percent, or the value itself if there is only one."""
    s = statistics.summary(values)
    return f"{s.mean:.2f}" + (f" ± {s.deviation:.2f}" if s.deviation is not None else "")


def flop(cost: Optional[float]) -> str:
    """Returns a cost, given in GFLOP, in the unit that suits it."""
    if cost is None:
        return NONE
    unit = max((u for u in UNITS if cost >= UNITS[u]), key=UNITS.__getitem__, default="GFLOP")
    return f"{cost / UNITS[unit]:.3g} {unit}"


def kinds(exits: Iterable[str]) -> dict[str, list[str]]:
    """Returns {kind of exit: its names}: "peer" of peer_1 and peer_2."""
    found: dict[str, list[str]] = {}
    for name in exits:
        found.setdefault(re.sub(r"_\d+$", "", name), []).append(name)
    return found


_HEADS = {
    "equal epochs": "against baseline, equal epochs",
    "equal cost": "against baseline, equal cost",
    "higher cost": "against baseline, higher cost",
    "": "against the first",
}


def _tests(c: Comparison) -> list[Optional[McNemar]]:
    """Returns McNemar's test of each common seed, None without predictions; [] if all lack them."""
    seeds = sorted({*c.group.runs} & {*c.against.runs})
    return [c.mcnemar.get(seed) for seed in seeds] if c.mcnemar else []


def _others(group: Group) -> str:
    """Returns the mean errors of the exits that are not deployed, those of a kind together."""
    texts = []
    for kind, names in kinds(group.exits()).items():
        others = [name for name in names if name != group.deployed]
        if others:
            means = [statistics.summary(group.errors(n).values()).mean for n in others]
            name = others[0] if len(names) == 1 else f"{kind}_…"
            texts.append(f"{name} {', '.join(f'{m:.2f}' for m in means)}")
    return "; ".join(texts)


def _of_paper(section: Section, group: Group) -> str:
    figure = paper.figure(group.options.method, section.network, section.in_paper)
    if figure is None:
        return NONE
    text = f"{figure.mean:.2f} ± {figure.deviation:.2f}"
    return text + (" (other protocol)" if paper.departures(group.options) else "")


def _points(comparison: Optional[Comparison]) -> str:
    if comparison is None:
        return NONE
    if comparison.seeds is None:
        return "no seed in common"
    return f"{_signed(comparison.seeds.mean)}, {comparison.seeds.verdict}"


def _interval(difference: Optional[Difference]) -> str:
    if difference is None or difference.low is None:
        return NONE
    return f"{_signed(difference.low)} to {_signed(difference.high)}"


def _signed(points: Optional[float]) -> str:
    return NONE if points is None else f"{points:+.2f}".replace("-", "−")


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        cell = lambda value: f"{value:.6g}" if isinstance(value, float) else value
        writer.writerows({name: cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue()
