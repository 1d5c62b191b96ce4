"""A report of several runs: a page that opens offline, and tables."""

import importlib.resources
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

import jinja2
import numpy as np

import tf_pcl
from tf_pcl.data.class_names import escape
from tf_pcl.errors import UserError
from tf_pcl.study import comparisons, cost, figures, paper, runs, statistics, tables
from tf_pcl.study.comparisons import Comparison
from tf_pcl.study.runs import Group, Section
from tf_pcl.study.statistics import Difference
from tf_pcl.training.report import alike
from tf_pcl.training.workdir import write

PAGE, MARKDOWN = "report.html", "report.md"
ERRORS, DIFFERENCES = "errors.csv", "differences.csv"

# With more comparisons than this, not each gets a sentence.
_MANY = 6


class Report(NamedTuple):
    """The report as it was written.

    Attributes:
      markdown: the text of the tables, the findings and the notes.
      files: the paths of the files, the page first.
    """

    markdown: str
    files: list[str]


class _Chapter(NamedTuple):
    """A section of the study with all its contents on the page."""

    section: Section
    costs: Mapping[str, Optional[float]]
    comparisons: Sequence[Comparison]
    errors: tables.Table
    differences: tables.Table
    findings: list[str]
    remarks: list[str]
    looks: Mapping[str, figures.Look]
    charts: Sequence[figures.Chart]


def report(paths: Sequence[str], output: str) -> Report:
    """Reads runs and writes their comparison into a folder.

    The folder gets a page of HTML, the same tables in Markdown, and two CSV files with the errors
    and the differences. Older ones are replaced.

    Args:
      paths: workdirs, or folders that hold workdirs.
      output: the folder, which is made if it does not exist.

    Raises:
      UserError: if no finished run is found, or the folder cannot be written.
    """
    study, output = runs.read(paths), os.path.expanduser(output)
    # Paths may hold bytes that are not UTF-8.
    notes = [escape(note) for note in study.notes]
    chapters = [_chapter(section, notes) for section in study.sections]
    warnings = _alike(study.sections)
    markdown = _markdown(chapters, warnings, notes)
    texts = {
        PAGE: _page(chapters, warnings, notes),
        MARKDOWN: markdown,
        ERRORS: tables.errors_csv((c.section, c.costs) for c in chapters),
        DIFFERENCES: tables.differences_csv((c.section, c.comparisons) for c in chapters),
    }
    files = [os.path.join(output, name) for name in texts]
    try:
        os.makedirs(output, exist_ok=True)
        for path, text in zip(files, texts.values()):
            write(path, text)
    except OSError as e:
        raise UserError(
            f"the folder cannot be written ({e.strerror}): give another one",
            parameter="output",
            value=output,
        ) from e
    return Report(markdown, files)


def _chapter(section: Section, notes: list[str]) -> _Chapter:
    """Returns the chapter of a section, and adds unknown costs to the notes."""
    costs = {group.label: _cost(group, notes) for group in section.groups}
    found = comparisons.compare(section, costs)
    return _Chapter(
        section,
        costs,
        found,
        tables.errors(section, costs, found),
        tables.differences(found),
        _findings(found),
        _remarks(section, costs, found),
        figures.looks(section),
        figures.charts(section, costs),
    )


def _cost(group: Group, notes: list[str]) -> Optional[float]:
    """Returns the cost of a group's run in GFLOP; None, with a note, if it is not known."""
    told = [(run.results or {}).get("training_gflop") for run in group.runs.values()]
    known = [gflop for gflop in told if gflop]
    if len(known) == len(told):
        return float(np.mean(known))
    # Runs of earlier versions did not record it.
    try:
        return cost.cost_of(group.options)
    except UserError as e:
        notes.append(f"the cost of {group.label} is not known: {e}")
        return None


def _findings(found: Sequence[Comparison]) -> list[str]:
    """Returns a sentence for each comparison; if there are many, only for those beyond noise."""
    told = [c for c in found if c.seeds]
    if len(told) > _MANY:
        told = [c for c in told if c.seeds and c.seeds.clear]
    sentences = [_finding(c, c.seeds) for c in told if c.seeds]
    if len(told) < len(found):
        which = "Of the other comparisons, none" if told else "None of the comparisons"
        sentences.append(
            f"{which} is known to be more than noise; the table of differences has all "
            f"{len(found)}."
        )
    return sentences


def _finding(c: Comparison, seeds: Difference) -> str:
    common = {*c.group.runs} & {*c.against.runs}
    mine, theirs = (
        statistics.summary([error for seed, error in group.errors().items() if seed in common])
        for group in (c.group, c.against)
    )
    points = abs(seeds.mean)
    how = f"{points:.2f} points {'less' if seeds.mean < 0 else 'more'}"
    many = f"{seeds.size} seed{'s' * (seeds.size > 1)}"
    judged = f"that is {seeds.verdict} over {many}"
    if seeds.clear is None:
        judged = f"{many} cannot tell whether that is noise"
    return (
        f"{c.group.label} has a test error of {mine.mean:.2f} %, {c.against.label} of "
        f"{theirs.mean:.2f} %{' at ' + c.at if c.at else ''}: "
        f"{'the same' if points < 0.005 else how}; {judged}."
    )


def _remarks(
    section: Section, costs: Mapping[str, Optional[float]], found: Sequence[Comparison]
) -> list[str]:
    """Returns remarks that are needed to read a section's tables."""
    remarks = []
    verdicts = [c for c in found if c.seeds is not None and c.seeds.clear is not None]
    if len(verdicts) > 4:
        remarks.append(
            f"Of {len(verdicts)} comparisons, about {len(verdicts) / 20:.1f} would be called more "
            "than noise by chance alone, if no two methods differed."
        )
    methods = [g.label for g in section.groups if not g.is_baseline and costs[g.label]]
    at = {c.group.label: c.at for c in found if c.at.endswith("cost")}
    higher = [label for label in methods if at.get(label) == "higher cost"]
    without = [label for label in methods if label not in at]
    if without and not any(g.is_baseline for g in section.groups):
        remarks.append(
            "There is no baseline among these runs, so it is not known what the methods gain: "
            "train one with the same settings, and one that costs as much as the most expensive "
            "method."
        )
    elif without:
        remarks.append(
            f"These runs have no baseline that costs as much as {_listed(without)}, so it is not "
            "known what remains of a gain at equal cost."
        )
    if higher:
        remarks.append(
            f"No baseline costs as much as {_listed(higher)}, but one costs more. A gain over that "
            "one is also a gain at equal cost, as far as longer training does no harm; a loss says "
            "nothing about equal cost."
        )
    for group in section.groups:
        figure = paper.figure(group.options.method, section.network, section.in_paper)
        departures = paper.departures(group.options) if figure else []
        if departures:
            remarks.append(
                f"The paper's figure for {group.label} has another protocol than these runs: "
                f"{'; '.join(departures)}."
            )
    return remarks


def _alike(sections: Sequence[Section]) -> list[str]:
    """Returns a warning for each run whose peers have become alike."""
    return [
        f"{group.label}, seed {seed} ({section.data}, {section.network}): {sentence}"
        for section in sections
        for group in section.groups
        for seed, run in group.runs.items()
        if run.results and (sentence := alike(run.results))
    ]


def _listed(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _page(chapters: Sequence[_Chapter], warnings: Sequence[str], notes: Sequence[str]) -> str:
    template = (importlib.resources.files("tf_pcl.study") / "report.html").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    values: dict[str, Any] = dict(
        chapters=chapters,
        warnings=warnings,
        notes=notes,
        version=tf_pcl.__version__,
        confidence=f"{100 * statistics.CONFIDENCE:.0f} %",
        summary=_summary(chapters),
        settings=_settings,
    )
    return environment.from_string(template).render(values)


def _summary(chapters: Sequence[_Chapter]) -> str:
    groups = sum(len(c.section.groups) for c in chapters)
    count = sum(len(g.runs) for c in chapters for g in c.section.groups)
    return f"{count} run{'s' * (count > 1)} of {groups} setting{'s' * (groups > 1)}"


def _markdown(chapters: Sequence[_Chapter], warnings: Sequence[str], notes: Sequence[str]) -> str:
    parts = []
    for c in chapters:
        parts += [f"# {c.section.network} on {c.section.data}", _settings(c.section)]
        parts += [_bullets(c.findings), c.errors.markdown()]
        parts += [c.differences.markdown()] if c.differences.rows else []
        parts += c.remarks
    if warnings or notes:
        parts += ["# Notes", _bullets([*(f"WARNING: {w}" for w in warnings), *notes])]
    text = "\n\n".join(part.strip() for part in parts if part) + "\n"
    # What a label or a folder is called is no markup.
    return re.sub(r"[<*`$&\[\]]", r"\\\g<0>", text)


def _settings(section: Section) -> str:
    common = ", ".join(f"{name}={value}" for name, value in section.common.items())
    if not common:
        return "All settings are the defaults, unless a label says otherwise."
    return f"Unless a label says otherwise: {common}, and the defaults of all other settings."


def _bullets(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)
