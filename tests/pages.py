"""This checkout: its pages, what is printed on them, and processes that run it."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# The methods of papers. Each is described, measured and has recipes; others may be registered too.
METHODS_OF_PAPERS = frozenset("ban baseline byot cl ctsl_mkt dml ffl kd okddip one pcl".split())


def page(name):
    """The text of a page, by its path from the root."""
    return (ROOT / name).read_text(encoding="utf-8")


def section(text, heading):
    """What stands under a heading, up to the next of its level or above."""
    level = heading.split(" ")[0]
    return re.search(
        rf"^{re.escape(heading)}\n(.*?)(?=^#{{1,{len(level)}}} |\Z)", text, re.M | re.S
    ).group(1)


def blocks(text, language=None):
    """The fenced blocks of a text, or those of one language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    return [block for name, block in found if language in (None, name)]


def commands(text, program):
    """[[argument]] of the calls of a program, a regular expression, in the sh blocks of a text."""
    lines = "\n".join(blocks(text, "sh")).replace("\\\n", " ").splitlines()
    calls = (re.search(rf"(?:^|\s){program}(?=\s|$)(.*)", line) for line in lines)
    return [shlex.split(call.group(1)) for call in calls if call]


def rows(text, columns):
    """The rows of the tables with so many columns, each [cell] without backquotes at its ends."""
    split = ([cell.strip(" `") for cell in line.split("|")[1:-1]] for line in text.splitlines())
    return [row for row in split if len(row) == columns]


def python(*arguments, cwd=ROOT, timeout=None, **env):
    """Runs this Python, which finds this checkout's package from every folder, to its end."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
    )


def shell(source, folder):
    """Runs a script in a folder, in which train.py is this checkout's and python this Python."""
    for name in ("train.py", "tf_pcl"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / "bin/python").chmod(0o755)
    return subprocess.run(
        ["sh", "-e", "-c", source],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"},
    )
