"""The benchmarks run and print what they say they measure."""

import pathlib
import re
import subprocess
import sys

import pytest
import tensorflow as tf

from tf_pcl.training.events import Events
from tf_pcl.training.workdir import Workdir, write_json

ROOT = pathlib.Path(__file__).parent.parent


def printed(folder, name, *flags):
    """The lines that a benchmark prints when it is called in a folder."""
    done = subprocess.run(
        [sys.executable, ROOT / f"benchmarks/{name}.py", *flags],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_line_for_every_stage(tmp_path):
    head, *lines = printed(
        tmp_path,
        "step",
        "--networks=resnet8",
        "--teacher_network=resnet8",
        "--methods=kd",
        "--precisions=float32",
        "--batch_size=16",
        "--steps=2",
        "--rounds=1",
    )
    assert head.split() == (
        "network precision method first step images/s × kd in fit memory".split()
    )
    cells = [line.split() for line in lines]
    stages = [["kd", "teacher"], ["kd", "student"]]
    assert [row[2 : -len("1 s 2 3 4 % 5 GiB".split())] for row in cells] == stages
    for row in cells:
        first, s, speed, times, share, percent, memory, gib = row[-8:]
        assert row[:2] == ["resnet8", "float32"] and (s, percent, gib) == ("s", "%", "GiB")
        assert min(map(float, (first, speed, times, share, memory))) > 0
    assert float(cells[0][-5]) == 1.0
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_replicas_and_two_workers_equal_one_device(tmp_path):
    _, head, line = printed(tmp_path, "workers", "--methods=baseline")
    assert head.split() == ["method", "loss", *["losses", "errors", "weights"] * 2]
    method, loss, *differences = line.split()
    assert method == "baseline" and float(loss) > 0
    for losses, errors, weights in (differences[:3], differences[3:]):
        # An image of the 360 may change sides.
        assert float(losses) < 1e-3 and float(errors) < 0.3 and float(weights) < 1e-2
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_that_is_killed_is_compared(tmp_path):
    first, *kills, run, last = printed(
        tmp_path,
        "crash",
        "--kills=2",
        f"--keep_in={tmp_path}",
        "--",
        "--method=baseline",
        "--dataset=digits",
        "--network=resnet8",
        "--train_examples=100",
        "--batch_size=50",
        "--epochs=3",
    )
    assert first.startswith("undisturbed: ") and run == "run-1: equal"
    assert [line.split(": ")[0] for line in kills] == ["run-1, kill 1", "run-1, kill 2"]
    assert last == (
        "2 kills, 1 at random moments and 1 at calls; 1 of 1 runs end as the undisturbed one"
    )


@pytest.mark.slow
def test_the_cost_of_checks_is_told_as_ratios(tmp_path):
    _, line = printed(
        tmp_path,
        "checks",
        "--networks=resnet8",
        "--methods=baseline",
        "--batch_size=16",
        "--steps=2",
        "--rounds=1",
    )
    number = r"(\d+\.?\d*)"
    found = re.fullmatch(
        rf"resnet8 +baseline +{number} +× {number} +× {number} +{number} ms, {number} % of a "
        "checkpoint",
        line,
    )
    assert found and min(map(float, found.groups())) > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_where_the_time_before_the_first_step_goes(tmp_path):
    *helps, head, line = printed(
        tmp_path,
        "start",
        "--networks=resnet8",
        "--methods=baseline",
        "--batch_size=16",
        "--steps=2",
    )
    assert [one.split("--help")[0] for one in helps] == [
        "python train.py ",
        "python -m tf_pcl ",
        "python -m tf_pcl export ",
    ]
    assert head.split() == (
        "network method import data build check trace first step steps export to first step".split()
    )
    network, method, *stages, total, s, _, apart = line.split()
    assert (network, method, s, len(stages)) == ("resnet8", "baseline", "s", 8)
    assert min(map(float, stages)) >= 0 and float(apart) == 0
    assert float(total) == pytest.approx(sum(map(float, stages[:6])), abs=0.2)


@pytest.mark.slow
def test_the_forms_of_a_network_are_compared_with_it(tmp_path):
    head, *lines = printed(
        tmp_path,
        "deployed",
        "--networks=resnet8",
        "--image_size=8",
        "--batch_sizes=1,16",
        "--images=32",
        "--rounds=2",
    )
    assert head.split() == ("network form batch ms middle half images/s × keras differ".split())
    row = r"resnet8 +(keras|saved_model|saved_model folded) +(1|16) +[\d.]+  [\d.]+ to [\d.]+ +\d+ "
    found = [re.fullmatch(row + r" +([\d.]+)  (\d\.\de-\d\d|0\.0e\+00)", line) for line in lines]
    forms = ["keras", "saved_model", "saved_model folded"]
    assert [one[1] for one in found] == 2 * forms
    assert [one[2] for one in found] == [*3 * ["1"], *3 * ["16"]]
    for one in found:
        assert float(one[4]) < 1e-3
        assert float(one[3]) == 1 if one[1] == "keras" else float(one[3]) > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_xla_makes_of_a_step_has_no_transfers(tmp_path):
    head, *lines = printed(
        tmp_path, "hlo", "--methods=baseline", "--precisions=float32", "--batch_size=4"
    )
    kinds = "operations fusion convolution dot transpose copy conditional".split()
    assert head.split() == [
        "network",
        "precision",
        "method",
        "compiled",
        "stage",
        *kinds,
        "transfers",
    ]
    for line, stage in zip(lines, ["hlo", "optimized_hlo"]):
        cells = line.split()
        assert cells[:3] == ["resnet8", "float32", "baseline"] and cells[5] == stage
        count = dict(zip(kinds, map(int, cells[6:13])))
        # 9 convolutions and two gradients of each, of which that of the images is not needed.
        assert count["convolution"] in (3 * 9 - 1, 3 * 9) and count["dot"] >= 2
        assert cells[13:] == ["none"]
    assert count["operations"] > count["fusion"] > 20


def test_operations_within_a_fusion_do_not_count():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import hlo
    finally:
        sys.path.pop(0)
    text = """
%added (a: f32[], b: f32[]) -> f32[] {
  ROOT %add.1 = f32[] add(f32[] %a, f32[] %b)
}

%part (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %negate.1 = f32[4]{0} negate(f32[4]{0} %p)
  ROOT %copy.1 = f32[4]{0} copy(f32[4]{0} %negate.1)
}

ENTRY %main (x: f32[4]) -> f32[] {
  %x = f32[4]{0} parameter(0)
  %fusion = f32[4]{0} fusion(f32[4]{0} %x), kind=kLoop, calls=%part
  %zero = f32[] constant(0)
  %call = f32[4]{0} custom-call(f32[4]{0} %fusion), custom_call_target="xla_to_host"
  ROOT %reduce.1 = f32[] reduce(f32[4]{0} %call, f32[] %zero), dimensions={0}, to_apply=%added
}
"""
    assert hlo.counts(text) == {"fusion": 1, "xla_to_host": 1, "reduce": 1}
    assert re.fullmatch(hlo.TRANSFERS, "xla_to_host") and not re.fullmatch(hlo.TRANSFERS, "fusion")


def test_what_a_run_left_is_compared_bit_for_bit(tmp_path):
    """Every difference counts but times: the benchmark cannot find all runs equal."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import crash
    finally:
        sys.path.pop(0)
    for name, loss, seconds in ("a", 0.5, 1.0), ("b", 0.5, 2.0), ("c", 0.25, 1.0):
        leave(tmp_path / name, loss, seconds)
    (tmp_path / "b/results.json.part").write_text("")
    a, b, c = (crash.contents(tmp_path / name) for name in "abc")
    assert crash._difference(a, b) == ["files"]
    assert crash._difference(a, c) == [
        f". {what}" for what in ("TensorBoard", "exported weights", "metrics", "results", "weights")
    ]


def leave(folder, loss, seconds):
    """Writes what a run of one step leaves."""
    workdir = Workdir(str(folder))
    row = {"epoch": 1, "step": 1, "wall_seconds": seconds, "loss": loss}
    Events(workdir, [row], "peer_1", {})
    workdir.write_rows([row])
    results = {"loss": loss, "wall_seconds": seconds, "settings": {"workdir": str(folder)}}
    write_json(workdir.results, results)
    state = tf.train.Checkpoint(loss=tf.Variable(loss))
    state.write(str(folder / "checkpoints/ckpt-1"))
    write_json(workdir.data, {})
    lines = '"ckpt-1"\nall_model_checkpoint_paths: "ckpt-1"\n'
    (folder / "checkpoints/checkpoint").write_text(f"model_checkpoint_path: {lines}")
    state.write(str(folder / "export/saved_model/1/variables/variables"))
