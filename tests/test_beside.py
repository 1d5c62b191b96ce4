"""How a run compares with a baseline beside it."""

import json
import os

import pytest
from test_report import BASE, make_run

from tf_pcl.options import Options
from tf_pcl.training import beside, run
from tf_pcl.training.workdir import TEST_FILES, TRAINING_FILES, Workdir, write_json

FACTS = {"classes": list("0123456789"), "image_shape": [8, 8, 1], "test images": 1000}
NETWORKS = dict(BASE, network="resnet8,resnet14", method="dml")


def told(folder, error=22.8, **options):
    """What is said of a run in `folder` that ended at `error` percent."""
    given = Options(**{**BASE, "method": "pcl", "seed": 1, **options})
    workdir = Workdir(str(folder / "mine"))
    workdir.begin(given, FACTS, {})
    return beside.gain({"deployed_error": error}, given, workdir)


@pytest.fixture
def folder(tmp_path):
    make_run(tmp_path / "a0", "baseline", 0, 30.0)
    make_run(tmp_path / "b1", "baseline", 1, 24.1)
    make_run(tmp_path / "p0", "pcl", 0, 1.0)
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_the_baseline_of_the_same_seed_and_settings_is_named(folder):
    line = told(folder, peers=4, distill_weight=2.0, trunk_share=0.5)
    assert line == (
        f"1.30 points better than the baseline in {folder / 'b1'} (24.10 %); one seed of each says "
        "little, and tf-pcl report compares several"
    )
    assert told(folder, 25.6).startswith("1.50 points worse than the baseline")
    assert told(folder, 24.1).startswith("as good as the baseline")
    # Without one of the same seed it is the first.
    assert "a0 (30.00 %)" in told(folder, seed=5)
    # Of several networks, the first one is deployed.
    assert "b1 (24.10 %)" in told(folder, **NETWORKS)


def test_a_path_is_told_as_it_was_given(folder, monkeypatch):
    monkeypatch.chdir(folder)
    given = Options(**{**BASE, "method": "pcl", "seed": 1})
    told(folder)
    assert "in b1 (" in beside.gain({"deployed_error": 2.0}, given, Workdir("mine"))
    monkeypatch.chdir("mine")
    assert "in ../b1 (" in beside.gain({"deployed_error": 2.0}, given, Workdir("../mine/"))


@pytest.mark.parametrize(
    "other",
    [
        dict(epochs=24),
        dict(train_examples=100),
        dict(learning_rate=0.05),
        dict(network="resnet14"),
        dict(mixup=0.2),
        dict(method="baseline"),
    ],
)
def test_other_settings_are_not_compared(other, folder):
    assert told(folder, **other) is None


def test_runs_that_are_not_done_or_of_other_data_or_damaged_are_not_compared(folder):
    data = folder / "b1" / "data.json"
    data.write_text(json.dumps({**json.loads(data.read_text()), "test images": 999}))
    make_run(folder / "a0", "baseline", 0, 30.0, epochs_done=3)
    for name, damage in [("c", b"{"), ("d", b"[]"), ("e", b'{"method": "baseline"}')]:
        os.makedirs(folder / name)
        (folder / name / "results.json").write_bytes(damage)
    assert told(folder) is None


def test_a_baseline_on_other_test_images_is_not_compared(folder):
    of = lambda run: folder / run / "data.json"
    known = lambda run, number: of(run).write_text(
        json.dumps({**json.loads(of(run).read_text()), TEST_FILES: number})
    )
    # A run of an earlier version does not know them.
    known("b1", "0000000a")
    assert "b1 (24.10 %)" in told(folder)
    given = Options(**{**BASE, "method": "pcl", "seed": 1})
    for number, name in ("0000000a", "b1"), ("0000000b", "a0"):
        known("mine", number)
        assert f"{name} (" in beside.gain({"deployed_error": 2.0}, given, Workdir(folder / "mine"))


@pytest.mark.parametrize("fact", [TRAINING_FILES, "training images", "means"])
def test_a_baseline_that_was_trained_on_other_images_is_not_compared(fact, folder):
    values = [[9.0], [9.001], [9.5]] if fact == "means" else [7, 7, 8]
    for name, value in zip(("mine", "b1", "a0"), values):
        workdir = Workdir(str(folder / name))
        given = Options(**{**BASE, "method": "pcl", "seed": 1})
        if name == "mine":
            workdir.begin(given, FACTS, {})
        write_json(workdir.data, {**workdir.read_data(), fact: value})
    gain = lambda **more: beside.gain(
        {"deployed_error": 2.0},
        Options(**{**BASE, "method": "pcl", "seed": 1, **more}),
        Workdir(str(folder / "mine")),
    )
    assert "b1 (" in gain()
    b1 = Workdir(str(folder / "b1"))
    write_json(b1.data, {**b1.read_data(), fact: values[2]})
    # The baseline of another seed has drawn other images.
    assert "a0 (" in gain()
    for name in ("a0", "b1"):
        make_run(folder / name, "baseline", int(name[1]), 24.1, train_examples=None)
        workdir = Workdir(str(folder / name))
        write_json(workdir.data, {**workdir.read_data(), fact: values[2]})
    assert gain(train_examples=None) is None


@pytest.mark.slow
def test_a_run_says_at_its_end_what_it_gained(tmp_path, monkeypatch, capsys):
    # It asks a fresh process, which other tests do.
    monkeypatch.setattr(run.export, "check", lambda *arguments: None)
    small = dict(dataset="digits", network="helpers:other", epochs=1, batch_size=256)
    out = {}
    for method in ("baseline", "dml"):
        options = Options(**small, method=method, workdir=str(tmp_path / f"a {method}"))
        error = run.run(options)["deployed_error"]
        out[method] = error, capsys.readouterr().out
    (alone, before), (taught, after) = out["baseline"], out["dml"]
    # It can be copied into a shell.
    assert f"tensorboard --logdir '{tmp_path / 'a baseline'}'" in before
    assert "than the baseline" not in before and "as good as" not in before
    (line,) = [line for line in after.splitlines() if "the baseline in" in line]
    assert f"the baseline in {tmp_path / 'a baseline'} ({alone:.2f} %)" in line
    assert line.startswith(f"{abs(alone - taught):.2f} points") or alone == taught
