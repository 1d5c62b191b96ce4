"""The files of a workdir."""

import csv
import json
import os
import tempfile

from tf_pcl.errors import UserError


def write(path, text):
    """Writes a text file so that a reader sees the old or the new one, never a part."""
    with open(path + ".part", "w", encoding="utf-8", newline="") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".part", path)


def write_json(path, value):
    """Writes a JSON file with write()."""
    write(path, json.dumps(value, indent=2) + "\n")


def read_rows(path):
    """Rows of a metrics.csv as dicts of floats, without the empty cells; [] if there is none."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8", newline="") as f:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(f)]


def write_rows(path, rows):
    """Writes metrics.csv from dicts of numbers: a column for every key, in the order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [",".join(columns)]
    lines += [",".join(f"{row[c]:.9g}" if c in row else "" for c in columns) for row in rows]
    write(path, "\n".join(lines) + "\n")


def check_data(workdir, data):
    """UserError if a workdir holds a run on other data than `data`, a dict of what can be told of a data set."""
    path = os.path.join(workdir, "data.json")
    if not os.path.exists(path):
        return
    with open(path, encoding="utf-8") as f:
        old = json.load(f)
    differ = [
        f"{k} {_brief(data[k])} here, {_brief(old.get(k))} there"
        for k in data
        if data[k] != old.get(k)
    ]
    if differ:
        raise UserError(
            f"--workdir={workdir} holds a run on other data ({'; '.join(differ)}): give another workdir or the same "
            "data"
        )


def _brief(value):
    text = json.dumps(value)
    return text if len(text) < 60 else text[:56] + " …"


def check_workdir(workdir, settings, free, resume):
    """Looks at a workdir before a run, writing nothing.

    Args:
      workdir: the folder, which need not be there.
      settings: {flag: text}.
      free: flags that may differ when a run goes on.
      resume: "auto" or "never".
    Raises:
      UserError: if it cannot be written, holds a run of other settings or a stage of one, or any run where resume
        is "never".
    """
    there = os.path.abspath(workdir)
    while not os.path.exists(there):
        there = os.path.dirname(there)
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as e:
        raise UserError(
            f"--workdir={workdir} cannot be written: {there}: {e.strerror}; give another"
        ) from e
    path = os.path.join(workdir, "flags.txt")
    if not os.path.exists(path):
        if os.path.exists(os.path.join(workdir, "checkpoints")):
            raise UserError(
                f"--workdir={workdir} holds checkpoints but no flags.txt, like the folder of a run's earlier stage: "
                "give another workdir"
            )
        return
    if resume == "never":
        raise UserError(
            f"--workdir={workdir} holds a run already: give another workdir, or --resume=auto to go on"
        )
    with open(path, encoding="utf-8") as f:
        old = dict(line.strip()[2:].split("=", 1) for line in f if line.startswith("--"))
    differ = [
        f"--{k}={settings.get(k, '(unset)')} here, {old.get(k, '(unset)')} there"
        for k in sorted({*settings, *old})
        if settings.get(k) != old.get(k) and k not in free
    ]
    if differ:
        raise UserError(
            f"--workdir={workdir} holds a run with other settings ({'; '.join(differ)}): give another workdir "
            "or the same settings"
        )


def saved_model(path):
    """The folder of the SavedModel at `path`: that itself, or within a run's workdir or its export folder; None without one."""
    below = (os.path.join(path, b) for b in ("", "1", "saved_model/1", "export/saved_model/1"))
    return next(
        (folder for folder in below if os.path.exists(os.path.join(folder, "saved_model.pb"))), None
    )
