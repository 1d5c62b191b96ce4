"""Grids of runs: which runs, what they are called, what they cost, what stages they share."""

import os

import pytest

from tf_pcl.errors import UserError
from tf_pcl.options import Options
from tf_pcl.study import grid, listing, runner
from tf_pcl.study.grid import Cell, Line
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
    with pytest.raises(UserError, match="two different runs would be called pcl-"):
        grid.plan([line("pcl"), line("pcl", views="shared")], "here", SMALL)


def test_the_baseline_of_equal_cost_is_as_dear_as_the_dearest_and_its_schedule_is_stretched():
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
    assert grid.in_a_shell(cell) == (
        "python -m tf_pcl train --method=pcl --network=helpers:without_norm --dataset=digits "
        "--train_examples=200 --epochs=6 --batch_size=50 --seed=0 --deterministic=true "
        "'--workdir=a folder/pcl-helpers.without_norm-digits-seed0'"
    )


def kd(network, workdir, **given):
    options = dict(SMALL, teacher_network="helpers:without_norm", dataset="digits", **given)
    return Cell("kd", Options(method="kd", network=network, workdir=workdir, **options))


def test_a_teacher_is_shared_between_students_of_one_recipe_and_seed():
    mine = kd("helpers:other", "a")
    assert grid.shared_stages(mine, kd("helpers:without_norm", "b")) == ["1-teacher"]
    for other in (
        kd("helpers:other", "b"),
        kd("helpers:without_norm", "b", seed=1),
        kd("helpers:without_norm", "b", learning_rate=0.2),
        Cell(
            "dml", Options(method="dml", network="helpers:without_norm", dataset="digits", **SMALL)
        ),
    ):
        assert grid.shared_stages(mine, other) == []
    # The first stage of these is the target network itself.
    ban = [
        Cell("ban", Options(method="ban", network=f"helpers:{n}", dataset="digits", **SMALL))
        for n in ("other", "without_norm")
    ]
    assert grid.shared_stages(*ban) == []
    cells = [mine, kd("helpers:without_norm", "b")]
    assert grid.saved_by_sharing(cells) == mine.stages[0].gflop
    assert "since stages are shared" in listing.costs(cells)


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
        assert ("2 of 3 runs are done already\n" in out) == bool(done)
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
