"""tf-pcl compare as a process: planned, run, killed, resumed, refused."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from absl import flags
from pages import ROOT, commands, page
from test_train_py import final_weights

from tf_pcl.errors import UserError
from tf_pcl.verbs import compare

FLAGS = (
    "--dataset=digits --network=helpers:without_norm --train_examples=200 --batch_size=50 "
    "--epochs=2 --deterministic"
).split()
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}


def start(folder, *flags):
    return subprocess.Popen(
        [sys.executable, "-m", "tf_pcl", "compare", *FLAGS, *flags],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
    )


def finish(folder, *flags):
    process = start(folder, *flags)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def test_what_is_planned_is_listed_and_nothing_written(tmp_path):
    code, out, err = finish(tmp_path, "--methods=baseline,dml", "--seeds=2", "--dry_run")
    assert code == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert [line[0] for line in lines[1:-1]] == [
        f"{name}-helpers.without_norm-digits-seed{seed}"
        for name in ("baseline", "dml", "baseline_equal_cost")
        for seed in (0, 1)
    ]
    assert [line[1:4:2] for line in lines[1:-1:2]] == [["2", "1.0"], ["2", "3.0"], ["6", "3.0"]]
    assert out.splitlines()[-1].startswith("6 runs, ")
    assert not list(tmp_path.iterdir())


def asked(*arguments):
    """The Cells that arguments of the command line ask for."""
    values = flags.FlagValues()
    compare.define_flags(values)
    rest = values(["tf-pcl", *arguments])[1:]
    return compare.planned(values, rest)


def test_lines_of_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid").write_text(
        "# two lines\ndml: --methods=dml --peers=2\nfour: --methods=dml --peers=4  # more\n"
    )
    cells = asked(*FLAGS, "--grid=grid", "--seed=3", "--noequal_cost", "--workdir=there")
    assert [(cell.path, cell.options.peers) for cell in cells] == [
        (f"there/{name}-helpers.without_norm-digits-seed3", peers)
        for name, peers in (("dml", 2), ("four", 4))
    ]
    for line, problem in (
        ("--methods=dml --epocs=3", "grid, line 1: Unknown command line flag 'epocs'"),
        ("\ndml", "grid, line 2: 'dml' is not a flag"),
        ("# none", "it has no line of flags"),
    ):
        (tmp_path / "grid").write_text(line)
        with pytest.raises(UserError, match=problem):
            asked("--grid=grid")


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--networks=a"], "--networks does not go with --network: give one of them"),
        (["--seeds=two"], "--seeds=two: give how many, as in --seeds=3, or several, as in"),
        (["--table=1", "--grid=x"], "--grid does not go with --table: give one of them"),
        (["--grid=absent"], "--grid=absent: it cannot be read"),
        (["pcl"], "'pcl' is not a flag"),
    ],
)
def test_what_is_asked_wrongly_is_refused_in_one_line(flags, line, tmp_path):
    code, out, err = finish(tmp_path, *flags)
    assert (code, out, err.count("\n")) == (2, "", 1) and line in err, err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_grid_goes_on_after_signals_and_shares_a_teacher_bit_for_bit(tmp_path):
    teacher = "--teacher_network=helpers:without_norm"
    flags = [f for f in FLAGS if "network" not in f]
    both = ["--networks=helpers:without_norm,helpers:other", "--methods=kd", teacher]
    command = [sys.executable, "-m", "tf_pcl", "compare", *flags, *both, "--workdir=grid"]
    command += ["--noequal_cost"]
    call = dict(cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV)
    # Where the tests run in the background of a shell, SIGINT is ignored.
    call["preexec_fn"] = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    first, second = (
        tmp_path / "grid" / f"kd-helpers.{name}-digits-seed0" for name in ("without_norm", "other")
    )
    # The run that a killed command leaves behind ends, and is not in the way of the next command.
    lock = first / "lock"
    for signum in (signal.SIGKILL, signal.SIGINT):
        before = lock.read_text() if lock.exists() else ""
        process = subprocess.Popen(command, **call)
        deadline = time.monotonic() + 120
        # The file names the process that trains.
        while not lock.exists() or lock.read_text() in ("", before):
            assert time.monotonic() < deadline and process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(signum)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and err.count("\n") == 1 and "goes on from there" in err
    done = subprocess.run(command, **call)
    assert done.returncode == 0, done.stderr
    assert "kd-helpers.other-digits-seed0: takes 1-teacher from an earlier run" in done.stdout
    assert "| kd |" in done.stdout and done.stdout.splitlines()[-1] == "grid/report/report.html"
    # The second run alone, with a teacher of its own.
    train = [sys.executable, "-m", "tf_pcl", "train", *flags, "--method=kd", teacher]
    alone = subprocess.run([*train, "--network=helpers:other", "--workdir=alone"], **call)
    assert alone.returncode == 0, alone.stderr
    for folder in ("1-teacher", "."):
        weights = (final_weights(w / folder, 8) for w in (second, tmp_path / "alone"))
        np.testing.assert_equal(*weights)
    results = json.loads((second / "results.json").read_text())
    again = json.loads((tmp_path / "alone/results.json").read_text())
    assert results["training_gflop"] == again["training_gflop"] > 0


def test_the_commands_of_the_page_are_planned(tmp_path, monkeypatch):
    text = page("docs/compare.md")
    (lines,) = re.findall(r"<<'END'\n(.*?)^END", text, re.M | re.S)
    (tmp_path / "views.grid").write_text(lines)
    monkeypatch.chdir(tmp_path)
    counts = [
        len(asked(*(a for a in arguments if a[0] not in ">c"), "--noequal_cost"))
        for arguments in commands(text, "tf-pcl compare")
    ]
    assert counts == [6, 6, 9, 21, 6, 6]
