"""The charts of a report, as SVG inside a page, with the colours of the page."""

import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Optional

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tf_pcl.deploy import metrics
from tf_pcl.study import paper, statistics, tables
from tf_pcl.study.runs import Group, Section

# Placeholders for colours of the page: a light and a dark page have different ones.
_INK, _RULE = "#010101", "#010102"
COLORS = 8
_SERIES = [f"#0101{i:02x}" for i in range(16, 16 + COLORS + 1)]
_VARIABLES = {
    _INK: "var(--ink)",
    _RULE: "var(--rule)",
    **{color: f"var(--series-{i})" for i, color in enumerate(_SERIES)},
}
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    # A dollar sign in a label is one.
    "text.parse_math": False,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "xtick.color": _RULE,
    "ytick.color": _RULE,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}
# Inches: the width of the page's column, and the height of a chart.
_WIDTH, _HEIGHT = 9.6, 3.7
_PANELS_A_ROW = 3
# The characters in a line of a panel's title.
_LINE = 30
# The most groups in one chart of curves; if there are more, each gets a panel.
_TOGETHER = 4


class Look(NamedTuple):
    """How a group is drawn.

    Attributes:
      series: the number of its colour; 0 is the baseline's.
      dash: the number of its dashes; 0 is a whole line.
    """

    series: int
    dash: int

    @property
    def line(self) -> dict[str, Any]:
        """Keyword arguments of a line."""
        return {"color": _SERIES[self.series], "linestyle": _DASHES[self.dash]}


class Chart(NamedTuple):
    """A chart of a report.

    Attributes:
      title: what it shows, in a few words.
      note: how to read it, in a sentence or two.
      svg: the chart, an <svg> element.
      legend: the labels with their looks.
    """

    title: str
    note: str
    svg: str
    legend: Sequence[tuple[str, Look]]


def looks(section: Section) -> dict[str, Look]:
    """Returns {label of a group: Look}; baselines share a colour, others have one each."""
    found: dict[str, Look] = {}
    for of_baseline in (True, False):
        labels = [g.label for g in section.groups if g.is_baseline == of_baseline]
        for i, label in enumerate(labels):
            series = 0 if of_baseline else 1 + i % COLORS
            dash = (i if of_baseline else i // COLORS) % len(_DASHES)
            found[label] = Look(series, dash)
    return found


def charts(section: Section, costs: Mapping[str, Optional[float]]) -> list[Chart]:
    """Returns the charts for which a section's runs have data.

    Args:
      section: the section.
      costs: {label of a group: training cost in GFLOP, or None}.
    """
    look = looks(section)
    with matplotlib.rc_context():
        # The user's own settings do not apply.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        found = [
            _seeds(section, look),
            _epochs(section, look),
            _teachers(section),
            _diversity(section, look),
            _cost(section, look, costs),
            _reliability(section, look),
        ]
    return [chart for chart in found if chart]


def _seeds(section: Section, look: Mapping[str, Look]) -> Chart:
    groups = section.groups
    figure = Figure((_WIDTH, 0.9 + 0.36 * len(groups)))
    axes = figure.add_subplot()
    for y, group in enumerate(groups):
        errors = list(group.errors().values())
        color = look[group.label].line["color"]
        axes.plot(errors, [y] * len(errors), "o", color=color, alpha=0.55, ms=6, mew=0)
        axes.plot([np.mean(errors)] * 2, [y - 0.3, y + 0.3], color=color, lw=2.5)
        known = paper.figure(group.options.method, section.network, section.in_paper)
        if known and not paper.departures(group.options):
            axes.plot([known.mean], [y], "D", mfc="none", mec=_INK, ms=6)
    axes.set_yticks(range(len(groups)), [_wrapped(group.label) for group in groups])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("test error at the end, %")
    note = "A dot is a seed, the line is their mean. Lower is better."
    return Chart("Every seed", note, _svg(figure, "Test error of every seed"), [])


def _epochs(section: Section, look: Mapping[str, Look]) -> Optional[Chart]:
    column = lambda group: f"val_error/{group.deployed}"
    drawn = [group for group in section.groups if group.curve(column(group))[0].size > 1]
    if not drawn:
        return None
    curves = [group.curve(column(group))[1] for group in drawn]
    # The high errors of the first epochs would leave little room for the rest.
    middle = [float(np.mean(y[:, -1 - y.shape[1] // 2])) for y in curves]
    top = min(max(float(np.max(y)) for y in curves), 2.5 * max(middle) + 1)
    draw = lambda axes, group: _band(axes, group, column(group), look[group.label])
    svg = _curves(drawn, draw, "error, %", (0, top), "Error over epochs")
    note = (
        "The error of the deployed network, the mean over seeds, on the test images, or on the "
        "validation images of runs that have them. The band reaches from the lowest to the highest "
        "seed."
    )
    return Chart("Error over epochs", note, svg, _legend(drawn, look))


def _diversity(section: Section, look: Mapping[str, Look]) -> Optional[Chart]:
    column = "val_diversity"
    drawn = [group for group in section.groups if group.curve(column)[0].size > 1]
    if not drawn:
        return None
    curves = [group.curve(column)[1] for group in drawn]
    last = max(float(np.max(y[:, -1])) for y in curves)
    draw = lambda axes, group: _band(axes, group, column, look[group.label])
    top = min(max(float(np.max(y)) for y in curves) * 1.05, 8 * last) or 1.0
    # So a line at 0 is fully visible.
    limits = (-0.02 * top, top)
    svg = _curves(drawn, draw, "diversity", limits, "Diversity of the peers over epochs")
    note = (
        "The mean distance between the class probabilities of two peers, on the images of the "
        "errors above: 0 if peers are alike, √2 if they are certain of different classes."
    )
    return Chart("Diversity of the peers", note, svg, _legend(drawn, look))


def _teachers(section: Section) -> Optional[Chart]:
    """Draws the exits of each group; exits of a kind, such as all peers, as their mean."""
    drawn = [
        group
        for group in section.groups
        if len(group.exits()) > 1 and group.curve(f"val_error/{group.deployed}")[0].size > 1
    ]
    if not drawn:
        return None
    names = list(dict.fromkeys(kind for group in drawn for kind in tables.kinds(group.exits())))
    look = {name: Look(1 + i % COLORS, i // COLORS % 4) for i, name in enumerate(names)}
    ends = []
    figure, panels = _panels(len(drawn))
    for axes, group in zip(panels, drawn):
        for kind, exits in tables.kinds(group.exits()).items():
            curves = [group.curve(f"val_error/{name}") for name in exits]
            curves = [(x, y) for x, y in curves if x.size]
            if curves:
                means = np.mean([y.mean(0) for _, y in curves], 0)
                width = 2.4 if group.deployed in exits else 1.3
                axes.plot(curves[0][0], means, lw=width, **look[kind].line)
                ends.extend([means[len(means) // 2], means[-1]])
        axes.set_title(_wrapped(group.label))
    low, high = min(ends), max(ends)
    _over_epochs(panels, "error, %", (max(0, low - (high - low)), high + (high - low) + 0.1))
    note = (
        "The mean error of the exits of each kind over seeds, on the images of the chart above. "
        "The thick line includes the deployed exit."
    )
    svg = _svg(figure, "Error of peers and teachers over epochs")
    return Chart("Peers against teachers", note, svg, list(look.items()))


def _cost(
    section: Section, look: Mapping[str, Look], costs: Mapping[str, Optional[float]]
) -> Optional[Chart]:
    drawn = [(group, costs[group.label] or 0.0) for group in section.groups if costs[group.label]]
    if not drawn:
        return None
    figure = Figure((_WIDTH, _HEIGHT))
    axes = figure.add_subplot()
    mean = lambda group: statistics.summary(group.errors().values()).mean
    alone = sorted((cost, mean(group)) for group, cost in drawn if group.is_baseline)
    if len(alone) > 1:
        axes.plot(*zip(*alone), color=_SERIES[0], lw=1, linestyle=_DASHES[2], zorder=1)
    for group, cost in drawn:
        s = statistics.summary(group.errors().values())
        color = look[group.label].line["color"]
        axes.errorbar([cost], [s.mean], [s.deviation or 0], fmt="o", color=color, ms=7, capsize=3)
        if group.is_baseline:
            axes.annotate(group.label, (cost, s.mean), (8, 5), textcoords="offset points")
    axes.set_xscale("log")
    low, high = min(cost for _, cost in drawn), max(cost for _, cost in drawn)
    # Room for the labels to the right of the points.
    axes.set_xlim(low / 1.25, high * max(1.8, (high / low) ** 0.35))
    unit, factor = _unit(low)
    axes.xaxis.set_major_locator(_Few())
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / factor:.3g}")
    axes.set_xlabel(f"training cost, {unit}")
    axes.set_ylabel("test error, %")
    note = (
        "The cost of training by arithmetic, and the final error; bars are one sample deviation "
        "over seeds. A method pays off if it lies below the line of the baselines."
    )
    svg = _svg(figure, "Test error against the cost of training")
    legend = _legend([g for g, _ in drawn if not g.is_baseline], look)
    return Chart("Error against training cost", note, svg, legend)


def _reliability(section: Section, look: Mapping[str, Look]) -> Optional[Chart]:
    drawn, lines, found = [], [], []
    for group in section.groups:
        kept = [run.predictions() for run in group.runs.values()]
        pairs = [pair for pair in kept if pair is not None]
        if pairs:
            labels = np.concatenate([pair[0] for pair in pairs])
            logits = np.concatenate([pair[1] for pair in pairs])
            drawn.append(group)
            lines.append(metrics.reliability(logits, labels, 10))
            # As tf-pcl evaluate has it, which knows one seed.
            each = [metrics.reliability(logits, labels).error() for labels, logits in pairs]
            found.append(f"{group.label} {100 * np.mean(each):.2f} %")
    if not drawn:
        return None
    figure = Figure((5.2, 4.4))
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color=_INK, lw=0.8, linestyle=_DASHES[2])
    for group, line in zip(drawn, lines):
        some = line.images > 0
        axes.plot(
            line.confidence[some], line.accuracy[some], marker="o", ms=4, **look[group.label].line
        )
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("confidence")
    axes.set_ylabel("share that is right")
    note = (
        "How often predictions of a confidence are right, all seeds together. On the dotted line "
        "they are right as often as their confidence says. Expected calibration error, "
        f"{metrics.BINS} bins, the mean over seeds: {', '.join(found)}."
    )
    svg = _svg(figure, "Reliability diagram")
    return Chart("Reliability", note, svg, _legend(drawn, look))


def _wrapped(label: str) -> str:
    return "\n".join(textwrap.wrap(label, _LINE))


def _legend(groups: Sequence[Group], look: Mapping[str, Look]) -> list[tuple[str, Look]]:
    return [(group.label, look[group.label]) for group in groups]


def _band(axes: Axes, group: Group, column: str, look: Look) -> None:
    epochs, values = group.curve(column)
    axes.plot(epochs, values.mean(0), **look.line)
    if len(values) > 1:
        color = look.line["color"]
        axes.fill_between(epochs, values.min(0), values.max(0), color=color, alpha=0.16, lw=0)


def _curves(
    groups: Sequence[Group],
    draw: Callable[[Axes, Group], None],
    ylabel: str,
    limits: tuple[float, float],
    title: str,
) -> str:
    """Draws a few groups together, or each of many in a panel with a baseline behind it."""
    if len(groups) <= _TOGETHER:
        figure = Figure((_WIDTH, _HEIGHT))
        panels = [figure.add_subplot()]
        for group in groups:
            draw(panels[0], group)
    else:
        figure, panels = _panels(len(groups))
        for axes, group in zip(panels, groups):
            if groups[0].is_baseline and group is not groups[0]:
                draw(axes, groups[0])
            draw(axes, group)
            axes.set_title(_wrapped(group.label))
    _over_epochs(panels, ylabel, limits)
    return _svg(figure, title)


def _over_epochs(panels: Sequence[Axes], ylabel: str, limits: tuple[float, float]) -> None:
    for axes in panels:
        axes.set_ylim(*limits)
        axes.set_xlim(left=0)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    panels[0].set_ylabel(ylabel)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(_PANELS_A_ROW, count)
    rows = math.ceil(count / columns)
    figure = Figure((_WIDTH, 0.6 + 2.5 * rows if rows > 1 else _HEIGHT))
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(count)]


class _Few(matplotlib.ticker.Locator):
    """About five ticks at round numbers of a logarithmic axis."""

    def __call__(self) -> Any:
        assert self.axis
        low, high = self.axis.get_view_interval()
        return self.tick_values(low, high)

    def tick_values(self, vmin: float, vmax: float) -> list[float]:
        for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
            powers = range(math.floor(math.log10(vmin)), math.ceil(math.log10(vmax)) + 1)
            ticks = [s * 10.0**p for p in powers for s in steps if vmin <= s * 10.0**p <= vmax]
            if len(ticks) > 3:
                break
        return ticks


def _unit(cost: float) -> tuple[str, float]:
    """Returns the name of the unit that suits a cost in GFLOP, and its size in GFLOP."""
    name = tables.flop(cost).split(" ")[1]
    return name, tables.UNITS[name]


def _svg(figure: Figure, title: str) -> str:
    """Returns a figure as an <svg> element without addresses or numbered ids."""
    figure.set_layout_engine("constrained")
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r' xmlns(?::\w+)?="[^"]*"', "", svg)
    width = round(96 * figure.get_size_inches()[0])
    # Narrow screens scroll what would be too small to read.
    least = f"max-width: max(100%, {0.7 * width:.0f}px)"
    head = rf'<svg role="img" width="{width}" style="{least}" \1><title>{title}</title>'
    svg = re.sub(r'^<svg [^>]*(viewBox="[^"]*")[^>]*>', head, svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    # The page's own type, in sizes that are the chart's.
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    return re.sub(r"font-family: [^;\"]*;? ?", "", svg)
