"""The benchmarks run and print what they say they measure."""

import importlib
import importlib.util
import json
import re
import sys

import numpy as np
import pytest
import tensorflow as tf
from pages import ROOT, python

from tf_pcl.training.events import Events
from tf_pcl.training.workdir import Workdir, write_json

# Where the extra `bench` is not installed, tf_pcl alone is compared to the equations and timed.
VARIANTS = [[], ["eager", "eager_channels_last"]][: 2 if importlib.util.find_spec("torch") else 1]


def printed(folder, command):
    """The lines that a benchmark, "NAME FLAGS", prints when it is called in a folder."""
    name, *words = command.split()
    done = python(ROOT / f"benchmarks/{name}.py", *words, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def benchmark(name):
    """The module of this name among the benchmarks."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


@pytest.mark.slow
def test_a_line_for_every_stage(tmp_path):
    head, *lines = printed(
        tmp_path,
        "step --networks=resnet8 --teacher_network=resnet8 --methods=kd --precisions=float32 "
        "--batch_size=16 --steps=2 --rounds=1 --profile",
    )
    assert head.split() == (
        "network precision method first step images/s × kd GFLOP of products of memory "
        "convolutions in fit memory".split()
    )
    number = r"(\d+\.?\d*)"
    spread = rf"{number} \({number}–{number}\)"
    row = re.compile(
        rf"resnet8 +float32 +kd (teacher|student) +{number} s +{spread} +{number} +{number} +"
        rf"{number} % +{number} % +{spread} % +{number} % +{number} GiB"
    )
    found = [row.fullmatch(line) for line in lines[:2]]
    assert [match[1] for match in found] == ["teacher", "student"]
    assert all(float(value) > 0 for match in found for value in match.groups()[1:])
    assert float(found[0][6]) == 1.0
    # The student's step has a pass of the teacher more: 4 forward passes where that has 3.
    teacher, student = (float(match[7]) for match in found)
    assert student / teacher == pytest.approx(4 / 3, rel=0.02)
    assert re.fullmatch(rf"The machine, float32: {spread} GFLOP/s, {spread} GB/s", lines[2])
    titles = [i for i, line in enumerate(lines) if line.endswith(", operations of a step:")]
    assert len(titles) == 2
    for i in titles:
        assert lines[i + 1].split() == "kind count ms share".split()
        *kinds, total = (line.split() for line in lines[i + 2 : i + 19])
        assert total[0] == "all" and total[-2:] == ["100.0", "%"]
        for column in (-2, -3):
            parts = sum(float(kind[column]) for kind in kinds)
            assert parts == pytest.approx(float(total[column]), rel=0.02)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_line_for_a_step_that_recomputes(tmp_path):
    _, plain, recomputing = printed(
        tmp_path,
        "step --networks=resnet8 --methods=baseline --precisions=float32 --batch_size=16 "
        "--steps=2 --rounds=1 --noin_fit --noyardsticks --recompute",
    )
    number = r"\d+\.\d+"
    rest = rf"{number} s +{number} \({number}–{number}\) +({number}) +{number} GiB"
    assert float(re.fullmatch(rf"resnet8 +float32 +baseline +{rest}", plain)[1]) == 1.0
    assert re.fullmatch(rf"resnet8 +float32 +baseline recompute +{rest}", recomputing)


def test_all_convolutions_of_a_step_are_computed_alone():
    """Those of called functions and of gradients too, but none that the step does not need."""
    yardsticks, profiles = benchmark("yardsticks"), benchmark("profiles")
    first, second = (tf.keras.layers.Conv2D(2, 3, padding="same") for _ in range(2))
    third = tf.keras.layers.DepthwiseConv2D(3)
    called = tf.function(second)

    @tf.function
    def step(images):
        third(images)
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(third(called(first(images))))
        weights = [*first.weights, *second.weights, *third.weights]
        for w, g in zip(weights, tape.gradient(loss, weights)):
            w.assign_sub(g)
        return loss

    for layer in (first, second, third):
        layer.build([None, 8, 8, 2])
    alone = yardsticks.Convolutions(step.get_concrete_function(tf.zeros([4, 8, 8, 2])))
    alone.take_turn()
    assert len(alone.seconds) == 1 and alone.seconds[0] > 0
    found = {k.name: k.count for k in profiles.kinds(alone.take_turn, steps=1)}
    # Each layer once, forward; backward no gradient of the images.
    assert {name: count for name, count in found.items() if "Conv" in name} == {
        "Conv2D": 2,
        "Conv2DBackpropInput": 1,
        "Conv2DBackpropFilter": 2,
        "DepthwiseConv2dNative": 1,
        "DepthwiseConv2dNativeBackpropInput": 1,
        "DepthwiseConv2dNativeBackpropFilter": 1,
    }


def test_the_traffic_of_a_step_is_what_its_operations_read_and_write():
    yardsticks = benchmark("yardsticks")
    total = tf.Variable(tf.zeros([100]))

    @tf.function
    def step(x):
        total.assign_add(tf.reshape(x, [100]) * 2.0)

    function = step.get_concrete_function(tf.zeros([10, 10]))
    # The product reads 100 numbers and one more and writes 100, which the sum reads.
    assert yardsticks.moved_bytes(function) == 4 * (100 + 1 + 100 + 100)


@pytest.mark.slow
def test_two_replicas_and_two_workers_equal_one_device(tmp_path):
    _, head, line = printed(tmp_path, "workers --methods=baseline")
    assert head.split() == ["method", "loss", *["losses", "errors", "weights"] * 2]
    method, loss, *differences = line.split()
    assert method == "baseline" and float(loss) > 0
    for losses, errors, weights in (differences[:3], differences[3:]):
        # An image of the 360 may change sides.
        assert float(losses) < 1e-3 and float(errors) < 0.3 and float(weights) < 1e-2
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_input_pipeline_is_compared_with_images_one_by_one(tmp_path):
    head, *lines = printed(
        tmp_path,
        "input --sources=memory-8,files-8,records-8 --images=32 --views=2 --batch_size=8 "
        "--seconds=0.1 --rounds=1 --networks=resnet8 --method=baseline",
    )
    assert head.split() == "source views/s one by one ratio decoding alone".split()
    for source, line, feeds in zip(("memory", "files", "records"), lines[::2], lines[1::2]):
        name, *cells = line.replace(" ± 0.00", "").replace(" ± 0", "").replace(",", "").split()
        ours, others, ratio, *alone = map(float, cells)
        assert name == f"{source}-8" and len(alone) == (source != "memory")
        assert ratio == pytest.approx(ours / others, abs=0.01) and min(ours, *alone, 1) > 0
        told = re.fullmatch(
            r" +feeds ([\d.,]+) steps/s of 8 images; baseline resnet8 takes ([\d.,]+) ± 0(?:\.00)? "
            r"steps/s, (\d+) % of it",
            feeds,
        )
        feeds, takes, share = (float(n.replace(",", "")) for n in told.groups())
        assert feeds == pytest.approx(ours / 2 / 8, rel=0.01)
        assert share == pytest.approx(100 * takes / feeds, abs=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_growth_is_fitted_judged_and_drawn(tmp_path):
    _, head, first, second, time, memory, verdict = printed(
        tmp_path,
        "growth --axes=replicas --standard=2,8,8,8,1 --seconds=0.1 --rounds=1 "
        "--results=growth.json --figure=growth.png",
    )
    assert head.split() == "replicas s/step GFLOP GFLOP/s peak GiB outputs GiB".split()
    one, two = ([*map(float, line.split())] for line in (first, second))
    assert [one[0], two[0]] == [1, 2] and min(one[1:]) > 0 and one[2] == two[2]
    # The lines are rounded, the file is not.
    rows = json.loads((tmp_path / "growth.json").read_text())["replicas"]
    assert [row[0] for row in rows] == [1, 2]
    more = rows[1][1] / rows[0][1] - 1
    power = np.log2(1 + more)
    assert float(re.search(r"time ∝ x\^(-?[\d.]+)", time)[1]) == pytest.approx(power, abs=0.01)
    assert "memory ∝ x^" in memory
    assert ("holds" if more <= 0.05 else "MISSED") in verdict
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_run_that_is_killed_is_compared(tmp_path):
    first, *kills, run, last = printed(
        tmp_path,
        f"crash --kills=2 --keep_in={tmp_path} -- --method=baseline --dataset=digits "
        "--network=resnet8 --train_examples=100 --batch_size=50 --epochs=3",
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
        "checks --networks=resnet8 --methods=baseline --batch_size=16 --steps=2 --rounds=1",
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
@pytest.mark.parametrize("variants", VARIANTS, ids=["alone", "pytorch"][: len(VARIANTS)])
def test_the_step_beside_pytorchs(variants, tmp_path):
    """The program itself ends with an error where losses differ."""
    compared, head, *lines = printed(
        tmp_path,
        "versus_torch --network=resnet8 --batch_size=8 --image_size=16 --precisions=float32 "
        f"--variants={','.join(variants)} --steps=1 --rounds=1",
    )[-3 - bool(variants) - len(variants) :]
    names = "tf_pcl and PyTorch equal" if variants else "tf_pcl equal"
    assert compared.startswith("float32: loss terms on given logits: " + names)
    assert head.split() == "precision step loss images/s range tf_pcl's multiple".split()
    rows = [line.split() for line in lines[: 1 + len(variants)]]
    assert [row[:2] for row in rows] == [["float32", name] for name in ["tf_pcl", *variants]]
    for _, _, loss, speed, _, multiple in rows:
        assert float(loss) == pytest.approx(float(rows[0][2]), rel=1e-2)
        assert float(multiple) == pytest.approx(float(rows[0][3]) / float(speed), rel=0.05)
    for line in lines[len(rows) :]:
        best = min(float(row[-1]) for row in rows[1:])
        assert line.startswith(f"float32: tf_pcl is {best:.2f} times as fast as the best of")


@pytest.mark.slow
def test_losses_that_differ_end_the_comparison_with_pytorch():
    program = "import versus_torch; versus_torch.check('losses of x', [1.0, 2.0], [1.0, 2.1], 1e-2)"
    done = python("-c", program, cwd=ROOT / "benchmarks")
    assert done.returncode == 1 and "losses of x are [1. 2.] and should be [1.  2.1]" in done.stderr


@pytest.mark.slow
def test_where_the_time_before_the_first_step_goes(tmp_path):
    *helps, head, line = printed(
        tmp_path, "start --networks=resnet8 --methods=baseline --batch_size=16 --steps=2"
    )
    named = ["python train.py ", "python -m tf_pcl ", "python -m tf_pcl export "]
    assert [one.split("--help")[0] for one in helps] == named
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
        "deployed --networks=resnet8 --image_size=8 --batch_sizes=1,16 --images=32 --rounds=2",
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
    head, *lines = printed(tmp_path, "hlo --methods=baseline --precisions=float32 --batch_size=4")
    kinds = "operations fusion convolution dot transpose copy conditional".split()
    first = "network precision method compiled stage".split()
    assert head.split() == [*first, *kinds, "transfers"]
    for line, stage in zip(lines, ["hlo", "optimized_hlo"]):
        cells = line.split()
        assert cells[:3] == ["resnet8", "float32", "baseline"] and cells[5] == stage
        count = dict(zip(kinds, map(int, cells[6:13])))
        # 9 convolutions and two gradients of each, of which that of the images is not needed.
        assert count["convolution"] in (3 * 9 - 1, 3 * 9) and count["dot"] >= 2
        assert cells[13:] == ["none"]
    assert count["operations"] > count["fusion"] > 20


def test_operations_within_a_fusion_do_not_count():
    hlo = benchmark("hlo")
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
    crash = benchmark("crash")
    for name, loss, seconds in ("a", 0.5, 1.0), ("b", 0.5, 2.0), ("c", 0.25, 1.0):
        leave(tmp_path / name, loss, seconds)
    (tmp_path / "b/results.json.part").write_text("")
    a, b, c = (crash.contents(tmp_path / name) for name in "abc")
    assert crash._difference(a, b) == ["files"]
    assert crash._difference(a, c) == [
        f". {what}" for what in ("TensorBoard", "exported weights", "metrics", "results", "weights")
    ]


WORKER = """
import json, os, sys
(workdir,) = [a.split("=")[1] for a in sys.argv if a.startswith("--workdir=")]
number = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
own = os.path.join(workdir, f"worker-{number}") if number else workdir
os.makedirs(own, exist_ok=True)
open(os.path.join(own, "lock"), "a+")
open(os.path.join(own, "metrics.csv"), "w")
"""


def test_one_of_two_workers_is_killed(tmp_path, monkeypatch):
    crash = benchmark("crash")
    (tmp_path / "train.py").write_text(WORKER)
    monkeypatch.setattr(crash, "TRAIN", tmp_path / "train.py")
    addresses = crash.free_addresses(2)
    for worker in 0, 1:
        run = tmp_path / f"killed-{worker}"
        end = crash.start([], run, crash.Place("call", 2, 0.0, worker), addresses)
        assert end.killed == "at call 2, open metrics.csv" and end.problem is None
        written = [(folder / "metrics.csv").exists() for folder in (run, run / "worker-1")]
        assert written == [bool(worker), not worker]
    end = crash.start([], tmp_path / "whole", addresses=addresses)
    assert (end.killed, end.calls, end.problem) == (None, 2, None)


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
