"""What must not end or falsify a run: odd paths and values, streams, damaged files, bad numbers."""

import io
import os
import pathlib
import subprocess
import sys

import pytest

from tf_pcl import console
from tf_pcl.data import datasets
from tf_pcl.errors import UserError
from tf_pcl.options import Options
from tf_pcl.training import strategy
from tf_pcl.training.workdir import Workdir

ROOT = pathlib.Path(__file__).parent.parent


# Paths.


@pytest.mark.parametrize(
    "path, text",
    [
        ("lr=[0.1]", "brackets"),
        ("a*", "brackets"),
        ("a?b/run", "brackets"),
        ("gs://bucket/run", "folder of this machine"),
        ("s3://bucket/run", "folder of this machine"),
        ("~no-such-user-here/run", "no such home folder"),
        ("a" * 300, "File name too long"),
        ("new/" + "a" * 300, "File name too long"),
        ("/".join(["a" * 100] * 45), "File name too long"),
    ],
)
def test_workdirs_that_could_not_be_used_are_refused(path, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=text) as refused:
        Workdir.of_run(Options(workdir=path)).check(Options())
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    options = Options(workdir="~/run", data_dir="~/data", weights="~/w.h5", teacher="~/t")
    assert Workdir.of_run(options).path == "/home/someone/run"
    assert (options.data_dir, options.weights) == ("/home/someone/data", "/home/someone/w.h5")
    assert options.teacher == "/home/someone/t"


# Values.


@pytest.mark.parametrize(
    "settings, text",
    [
        (dict(epochs=10**40), "at most 1000000"),
        (dict(epochs=10**400), "at most 1000000"),
        (dict(peers=10**40), "at most 1000"),
        (dict(generations=10**40), "at most 1000"),
        (dict(image_size=10**40), "at most 10000"),
        (dict(cutout=10**40), "at most 10000"),
        (dict(learning_rate=1e39), "finite"),
        (dict(data_dir="a\nb"), r"`data_dir=a\\nb`: it has line breaks"),
        (dict(workdir=os.fsdecode(b"ni\xf1o")), "not UTF-8"),
    ],
)
def test_values_that_nothing_can_hold_are_refused(settings, text):
    with pytest.raises(UserError, match=text):
        Options(**settings)


@pytest.mark.parametrize("name", ["mnist/", "mnist:9.9.9", "emnist/nope", "mnist:", "mnist:abc"])
def test_names_that_tensorflow_datasets_cannot_read_are_refused(name, tmp_path):
    with pytest.raises(UserError, match=f"`dataset={name}`.*does not have it") as refused:
        datasets.load(name, str(tmp_path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "config",
    [
        "",
        "{'cluster': {}}",
        "[1]",
        "3",
        '["localhost:1"]',
        '{"cluster": {"worker": ["localhost:1"]}}',
        '{"cluster": {"worker": ["localhost:1"]}, "task": {"type": "worker", "index": 1}}',
        '{"cluster": {"worker": ["localhost:1"]}, "task": {"type": "chief", "index": 0}}',
        '{"cluster": {"worker": "localhost:1"}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": {"worker": ["localhost"]}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": {"worker": [1]}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": {"ps": ["localhost:1"]}, "task": {"type": "ps", "index": 0}}',
        '{"cluster": 1, "task": 2}',
    ],
)
def test_a_cluster_that_cannot_be_is_refused(config, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(UserError, match="TF_CONFIG") as refused:
        strategy.make("multi_worker")
    assert "\n" not in str(refused.value)


def test_every_process_of_a_cluster_has_a_folder_of_its_own(monkeypatch):
    cluster = '{"cluster": {"worker": ["a:1", "b:1"], "chief": ["c:1"]}, "task": %s}'
    paths = []
    for task in ("chief", 0), ("worker", 0), ("worker", 1):
        monkeypatch.setenv("TF_CONFIG", cluster % '{"type": "%s", "index": %d}' % task)
        paths.append(Workdir.of_run(Options(workdir="run"), strategy.worker()).path)
    assert paths == ["run", "run/worker-1", "run/worker-2"]


# Streams.


class Broken(io.StringIO):
    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self):
        raise BrokenPipeError(32, "Broken pipe")


def test_writing_never_fails(monkeypatch):
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    monkeypatch.setattr(sys, "stderr", Broken())
    console.protect()
    print("8×8 … ω", flush=True)
    print("lost", file=sys.stderr, flush=True)
    assert ascii_only.buffer.getvalue() == b"8x8 ... ?\n"
    assert sys.stdout.encoding == "ascii" and not sys.stdout.isatty()
    sys.stdout.close()
    print("lost, too", flush=True)
    protected = sys.stdout
    console.protect()
    assert sys.stdout is protected
    monkeypatch.setattr(sys, "stdout", None)
    console.protect()
    sys.stdout.write("nowhere")


@pytest.mark.parametrize("streams", ["| head -1", ">/dev/full", ">&- 2>&-", "2>/dev/full", "<&-"])
def test_the_command_line_outlives_its_streams(streams):
    command = f"{sys.executable} -m tf_pcl --help"
    shell = ["bash", "-o", "pipefail", "-c", f"{command} {streams}"]
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
