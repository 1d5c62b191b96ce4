"""Where runs train: processes that end with the one that has started them, several at a time."""

import importlib.util
import subprocess
import sys
import time

import pytest

from tf_pcl.errors import UserError
from tf_pcl.study import places

# As a training does, it saves and ends when it gets SIGTERM.
TRAIN = """
import signal, sys, time
from tf_pcl import console
def save(*_):
    print("saved", flush=True)
    sys.exit(1)
signal.signal(signal.SIGTERM, save)
console.end_with_stdin()
print("begun", flush=True)
time.sleep(60)
"""
# Tells that it is there, and waits until another one has told so.
MEET = """
import os, sys, time
open(sys.argv[1], "w").close()
while not os.path.exists(sys.argv[2]):
    time.sleep(0.01)
"""
PLACES = [places.Local]
# Where the extra is not installed there is nothing to try.
RAY = importlib.util.find_spec("ray") is not None
if RAY:
    PLACES.append(pytest.param(places.OnRay, marks=pytest.mark.slow))


def python(code, *arguments):
    return [sys.executable, "-c", code, *map(str, arguments)]


def until_told(log, text):
    deadline = time.monotonic() + 60
    while not log.exists() or log.read_text() != text:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def test_a_training_saves_and_ends_when_the_process_that_started_it_is_killed(tmp_path):
    log = tmp_path / "log.txt"
    start = f"from tf_pcl.study import process\nprocess.run({python(TRAIN)}, {str(log)!r})"
    parent = subprocess.Popen(python(start))
    until_told(log, "begun\n")
    parent.kill()
    parent.wait()
    until_told(log, "begun\nsaved\n")


@pytest.mark.parametrize("make", PLACES)
def test_several_at_a_time_their_status_and_an_interrupt(make, tmp_path):
    a, b, log = (tmp_path / name for name in ("a", "b", "log.txt"))
    with pytest.raises(KeyboardInterrupt), make(2) as place:
        for name, arguments in (("a", (a, b)), ("b", (b, a))):
            assert place.free()
            place.start(name, python(MEET, *arguments), str(tmp_path / "of_both.txt"))
        assert not place.free()
        ended = []
        while len(ended) < 2:
            ended += place.ended()
        assert sorted(ended) == [("a", 0), ("b", 0)] and place.free()
        place.start("bad", python("raise SystemExit(3)"), str(tmp_path / "of_bad.txt"))
        while not (ended := place.ended()):
            pass
        assert ended == [("bad", 3)]
        place.start("train", python(TRAIN), str(log))
        until_told(log, "begun\n")
        raise KeyboardInterrupt
    assert log.read_text() == "begun\nsaved\n"


def test_ray_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="`runner=ray`: the package ray is missing .* install ray"):
        places.OnRay()


if RAY:

    def test_a_cluster_that_does_not_answer_is_refused(monkeypatch):
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
        with pytest.raises(UserError, match="`runner=ray`: the cluster cannot be reached .*efused"):
            places.OnRay().__enter__()
