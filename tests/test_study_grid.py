"""Grids of runs: which runs, what they are called, what they cost, what stages they share."""

import json
import os
import pathlib
import re
import shlex
import shutil

import numpy as np
import pytest
from helpers import noise
from test_train_py import final_weights

from tf_pcl.errors import UserError
from tf_pcl.options import Options
from tf_pcl.study import grid, listing, runner
from tf_pcl.study.grid import Cell, Line
from tf_pcl.training import export, report, run
from tf_pcl.training.workdir import Workdir, write_json

SMALL = dict(train_examples=200, batch_size=50, epochs=6)


# What a run that is done leaves.
TRAIN = """
import json, os
os.makedirs(os.path.join(path, "export/saved_model/1"))
open(os.path.join(path, "export/saved_model/1/saved_model.pb"), "w").close()
with open(os.path.join(path, "results.json"), "w") as f:
    json.dump({"epochs": epochs, "deployed_error": error}, f)
"""


def line(*methods, networks=("helpers:without_norm",), seeds=(0,), name="", **given):
    return Line(methods, networks, ["digits"], seeds, given, name)


def test_all_combinations_have_a_folder_of_their_own():
    networks = ["resnet8", "helpers:without_norm"]
    cells = grid.plan([line("baseline", "dml", networks=networks, seeds=[0, 7])], "here", SMALL)
    assert len({cell.path for cell in cells}) == len(cells) == 8
    assert cells[0].path == "here/baseline-resnet8-digits-seed0" == cells[0].options.workdir
    assert cells[-1].title == "dml-helpers.without_norm-digits-seed7"
    assert cells[-1].options == Options(
        method="dml",
        network="helpers:without_norm",
        dataset="digits",
        seed=7,
        workdir=cells[-1].path,
        **SMALL,
    )


def test_an_option_of_some_methods_goes_to_these_and_one_of_none_is_refused():
    cells = grid.plan([line("baseline", "dml")], "here", dict(SMALL, peers=4))
    assert [cell.options.peers for cell in cells] == [None, 4]
    for lines, common in (
        ([line("baseline", "dml")], {"generations": 2}),
        ([line("baseline", generations=2), line("ban")], {}),
    ):
        with pytest.raises(UserError, match="`generations` does not go with `method=baseline`"):
            grid.plan(lines, "here", common)
    with pytest.raises(UserError, match="Did you mean dml"):
        grid.plan([line("dlm")], "here")


def test_lines_may_differ_in_any_option_if_they_have_names():
    shared = line("pcl", name="shared", views="shared")
    cells = grid.plan([line("pcl"), shared, line("pcl")], "here", SMALL)
    assert [(cell.name, cell.options.views) for cell in cells] == [
        ("pcl", None),
        ("shared", "shared"),
    ]
    with pytest.raises(UserError, match="two different runs would have the name pcl-"):
        grid.plan([line("pcl"), line("pcl", views="shared")], "here", SMALL)


def test_the_baseline_of_equal_cost_costs_as_much_as_the_costliest_and_its_schedule_is_stretched():
    given = dict(SMALL, lr_decay_epochs=(3.0, 4.5), peers=3)
    cells = grid.plan([line("baseline", "dml", "byot", seeds=[0, 1])], "here", given)
    more = grid.with_equal_cost(cells, "here")[len(cells) :]
    assert [cell.title for cell in more] == [
        f"baseline_equal_cost-helpers.without_norm-digits-seed{seed}" for seed in (0, 1)
    ]
    # Three networks cost three times as much.
    assert more[1].options == Options(
        method="baseline",
        network="helpers:without_norm",
        dataset="digits",
        seed=1,
        workdir=more[1].path,
        **{**SMALL, "epochs": 18, "lr_decay_epochs": (9.0, 13.5)},
    )
    assert more[0].gflop == pytest.approx(cells[2].gflop, rel=1e-6)
    assert grid.with_equal_cost(cells[:2], "here") == cells[:2]
    # Of comparisons that differ in more than the method, each has its own.
    fast = [line("dml", name="fast", learning_rate=0.2), line("dml")]
    added = grid.with_equal_cost(grid.plan(fast, "here", SMALL), "here")[2:]
    assert [(cell.name, cell.options.learning_rate) for cell in added] == [
        ("baseline_equal_cost_to_fast", 0.2),
        ("baseline_equal_cost_to_dml", 0.1),
    ]


def test_tables_of_the_paper():
    entries = grid.table("2")
    assert len(entries) == 6 * 7
    assert {"method": "pcl", "network": "vgg16", "dataset": "cifar100"} in entries
    assert grid.table("1", ["resnet32"], ["kd"][:0])[0]["dataset"] == "cifar10"
    assert grid.table("two_stage", methods=["kd"]) == [
        {"method": "kd", "network": "resnet32", "dataset": dataset}
        for dataset in ("cifar10", "cifar100")
    ]
    with pytest.raises(UserError, match="`networks=resnet23`.*Did you mean resnet32"):
        grid.table("2", ["resnet23"])
    with pytest.raises(UserError, match="`table=3`"):
        grid.table("3")


def test_commands_name_what_is_not_usual():
    (cell,) = grid.plan([line("pcl")], "a folder", dict(SMALL, deterministic=True))
    assert shlex.join(cell.command()) == (
        "python -m tf_pcl train --method=pcl --network=helpers:without_norm --dataset=digits "
        "--train_examples=200 --epochs=6 --batch_size=50 --seed=0 --deterministic=true "
        "'--workdir=a folder/pcl-helpers.without_norm-digits-seed0'"
    )


def cell(method, workdir="a", network="helpers:without_norm", **given):
    options = {**SMALL, "dataset": "digits", **given}
    return Cell(method, Options(method=method, network=network, workdir=workdir, **options))


def kd(network, workdir, **given):
    return cell("kd", workdir, network, teacher_network="helpers:without_norm", **given)


def test_a_teacher_is_shared_between_students_of_one_recipe_and_seed():
    mine = kd("helpers:other", "a")
    for other in (
        kd("helpers:without_norm", "b"),
        kd("helpers:without_norm", "b", temperature=2.0),
        kd("helpers:other", "b"),
    ):
        assert grid.shared_stages(mine, other) == ["1-teacher"]
    for other in (
        kd("helpers:without_norm", "b", seed=1),
        kd("helpers:without_norm", "b", learning_rate=0.2),
        cell("kd", "b", teacher_network="helpers:other"),
        cell("dml"),
    ):
        assert grid.shared_stages(mine, other) == []
    cells = [mine, kd("helpers:without_norm", "b"), kd("helpers:other", "c")]
    assert grid.saved_by_sharing(cells) == 2 * mine.stages[0].gflop
    assert "shared stages save" in listing.costs(cells)


def test_what_networks_learn_alone_is_shared_whatever_the_methods_options_are():
    ban = cell("ban", generations=2)
    assert grid.shared_stages(ban, cell("ban", temperature=2.0)) == ["1-generation_0"]
    # The first stage of these is the target network itself.
    assert grid.shared_stages(ban, cell("ban", network="helpers:other")) == []
    pair, mixed = cell("ctsl_mkt"), "helpers:other,helpers:without_norm"
    assert grid.shared_stages(pair, cell("ctsl_mkt", peers=3)) == ["1-peer_1", "2-peer_2"]
    assert grid.shared_stages(pair, cell("ctsl_mkt", network=mixed)) == ["2-peer_2"]
    assert grid.saved_by_sharing([pair, cell("ctsl_mkt", network=mixed)]) == pair.stages[1].gflop
    # Weights are for the target network alone.
    started = dict(weights="imagenet", network="helpers:other")
    assert grid.shared_stages(kd("helpers:without_norm", "b"), cell("kd", **started)) == []


@pytest.mark.slow
def test_a_run_with_shared_stages_is_bit_for_bit_one_without(tmp_path, monkeypatch):
    def exported(model, classes, folder):
        os.makedirs(os.path.join(folder, "saved_model/1"), exist_ok=True)
        open(os.path.join(folder, "saved_model/1/saved_model.pb"), "w").close()

    # To export takes its time, and is not what is tested here.
    monkeypatch.setattr(export, "export", exported)
    monkeypatch.setattr(export, "check", lambda *_: None)
    common = dict(network="helpers:dropped", epochs=1, deterministic=True)
    other, alone, sharing = (
        cell("ctsl_mkt", str(tmp_path / name), **common, self_weight=weight)
        for name, weight in (("other", 1.0), ("alone", 2.0), ("sharing", 2.0))
    )
    for one in (other, alone):
        run.run(one.options)
    names = ["1-peer_1", "2-peer_2"]
    assert runner._take_shared(sharing, [other]) == names
    run.run(sharing.options)
    for folder in (*names, "."):
        weights = (final_weights(pathlib.Path(w.path) / folder, 4) for w in (sharing, alone))
        np.testing.assert_equal(*weights)
    results = [json.loads(open(f"{w.path}/results.json").read()) for w in (sharing, alone)]
    assert results[0]["error"] == results[1]["error"]
    assert results[0]["training_gflop"] == results[1]["training_gflop"]


def test_runs_that_share_a_stage_wait_for_it_and_others_do_not(tmp_path, monkeypatch, capfd):
    code = """
import time
path, stage, other = stage_and_path
if stage == "trains":
    whole, path = path, path + "/1-teacher"
    exec(train)
    path = whole
    while not os.path.exists(other):
        time.sleep(0.01)
exec(train)
"""
    first = kd("helpers:without_norm", str(tmp_path / "first"))
    second = kd("helpers:other", str(tmp_path / "second"))
    third = kd("helpers:other", str(tmp_path / "third"), seed=1)

    def command(cell, python):
        told = cell.path, "trains" if cell == first else "", third.path + "/results.json"
        values = f"import os\nstage_and_path, epochs, error, train = {told!r}, 6, 5.0, {TRAIN!r}"
        return [python, "-c", values + code]

    monkeypatch.setattr(Cell, "command", command)
    # The first one waits for the third, which needs no stage of the first.
    assert runner.run([first, second, third], jobs=2) == []
    told = re.sub(r"\d+ s", "… s", capfd.readouterr().out).splitlines()
    order = ["first: test error 5.00 %, … s", "second: takes 1-teacher from an earlier run"]
    order += ["second: test error 5.00 %, … s"]
    assert [line for line in told if line in order] == order
    assert {*told} - {*order} == {"third: test error 5.00 %, … s"}
    assert os.path.exists(tmp_path / "second/1-teacher/results.json")


def test_a_run_waits_for_no_stage_that_is_there_already(tmp_path):
    networks = ("helpers:without_norm", "helpers:other")
    first, second = (kd(name, str(tmp_path / name[8:])) for name in networks)
    third = kd("helpers:other", str(tmp_path / "third"), temperature=2.0)
    board = runner._Board([first, second, third])
    board.running["other"] = second, 0.0, 0.0
    assert runner._next([third], board) is None
    exec(TRAIN, {"path": f"{first.path}/1-teacher", "epochs": 6, "error": 5.0})
    assert runner._next([third], board) == third
    # Nor does one that trains that stage itself already.
    board.running["without_norm"] = first, 0.0, 0.0
    assert runner._next([third], board) is None
    Workdir(third.path).begin(third.options, {}, {})
    assert runner._next([third], board) == third


def test_a_run_of_fewer_epochs_than_are_asked_for_is_not_done(tmp_path):
    (cell,) = grid.plan([line("baseline")], str(tmp_path), SMALL)
    exec(TRAIN, {"path": cell.path, "epochs": cell.options.epochs, "error": 6.0})
    assert runner.results_of(cell)
    other = dict(SMALL, epochs=7)
    (longer,) = grid.plan([line("baseline")], str(tmp_path), other)
    assert not runner.results_of(longer)
    # But with validation images it may have ended early.
    results = os.path.join(cell.path, "results.json")
    write_json(results, {"epochs": 6, "deployed_error": 6.0, "test_error": {"peer_1": 6.0}})
    assert runner.results_of(longer)
    write_json(results, {"epochs": 7, "deployed_error": 6.0, "test_error": None})
    assert not runner.results_of(longer)


def test_a_run_that_fails_is_named_the_others_go_on_and_what_is_done_stays(
    tmp_path, monkeypatch, capfd
):
    def command(cell, python):
        fails = cell.options.seed == 1
        lines = ["print('first'); raise SystemExit('it broke')"] if fails else [TRAIN]
        told = f"path, epochs, error = {cell.path!r}, {cell.options.epochs}, 7.5"
        return [python, "-c", "\n".join([told, *lines])]

    monkeypatch.setattr(Cell, "command", command)
    cells = grid.plan([line("baseline", seeds=[0, 1, 2])], str(tmp_path), SMALL)
    for done in (0, 2):
        (failure,) = runner.run(cells)
        assert failure == (cells[1], 1, os.path.join(cells[1].path, "log.txt"))
        out = capfd.readouterr().out
        assert f"{cells[1].title}: FAILED with status 1: it broke\n" in out
        assert (f"{cells[2].title}: test error 7.50 %, 0 s\n" in out) == (not done)
        again = f"{cells[2].title}: done already, test error 7.50 %, {cells[2].path}\n"
        assert (again in out) == bool(done)
    assert open(failure.log).read() == 2 * "first\nit broke\n"


def test_a_workdir_with_another_run_is_refused(tmp_path):
    cells = grid.plan([line("baseline", seeds=[0, 1])], str(tmp_path), SMALL)
    runner.check(cells)
    assert not list(tmp_path.iterdir())
    Workdir(cells[1].path).begin(cells[1].options, {}, {})
    runner.check(cells)
    other = grid.plan([line("baseline", seeds=[0, 1])], str(tmp_path), dict(SMALL, epochs=7))
    with pytest.raises(UserError, match="seed1`: .*`epochs=7` here, 6 there"):
        runner.check(other)


@pytest.mark.parametrize("more", [{}, {"on_bad_image": "skip"}, {"train_examples": 2}])
def test_runs_on_other_images_are_refused_though_they_are_done(make_folder, tmp_path, more):
    part = {"a": [noise(8, 8, 3, seed=i) for i in range(3)], "b": [noise(8, 8, 3)] * 3}
    folder = make_folder({"train": part, "test": part})
    other = shutil.copytree(folder, tmp_path / "other")
    planned = lambda folder: grid.plan(
        [Line(["baseline"], ["resnet8"], ["image_folder"], [0, 1])],
        str(tmp_path / "grid"),
        {"epochs": 1, "batch_size": 2, "data_dir": str(folder), **more},
    )
    for cell in planned(folder):
        facts = report.facts_of(run.load_data(cell.options))
        Workdir(cell.path).begin(cell.options, facts, {})
    runner.check(planned(folder))
    runner.check(planned(other))  # A copy is no other data.
    if more.get("on_bad_image"):
        os.rename(other / "train/b", other / "train/c")
        os.rename(other / "test/b", other / "test/c")
    else:
        os.rename(other / "test/a/0.png", other / "test/b/9.png")
        os.rename(other / "test/b/0.png", other / "test/a/9.png")
    runner._facts.cache_clear()
    with pytest.raises(
        UserError, match=r"seed0`: the folder holds a run on other data \((cla|lab)"
    ):
        runner.check(planned(other))


def test_a_run_that_is_done_knows_other_images_of_the_same_names(make_folder, tmp_path):
    of = lambda seed: {"a": [noise(8, 8, 3, seed=seed)] * 3, "b": [noise(8, 8, 3)] * 3}
    folder = make_folder({"train": of(1), "test": of(2)})
    (cell,) = grid.plan(
        [Line(["baseline"], ["resnet8"], ["image_folder"], [0])],
        str(tmp_path / "grid"),
        {"epochs": 1, "batch_size": 2, "data_dir": folder},
    )
    Workdir(cell.path).begin(cell.options, report.facts_of(run.load_data(cell.options)), {})
    exec(TRAIN, dict(path=cell.path, epochs=1, error=7.5))
    runner.check([cell])
    for split in ("train", "test"):
        path = pathlib.Path(folder, split, "a/0.png")
        before = path.read_bytes()
        path.write_bytes(pathlib.Path(folder, split, "b/0.png").read_bytes())
        runner._facts.cache_clear()
        with pytest.raises(UserError, match="seed0`: the run there is done, and had other images"):
            runner.check([cell])
        if split == "train":
            path.write_bytes(before)
    # One that is not done sees it by itself, or goes on as the pages say.
    os.remove(Workdir(cell.path).results)
    runner.check([cell])
