"""tf-pcl report: runs from disk, what is said of them, and the page."""

import csv
import html.parser
import io
import json
import os
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pages
import pytest
from rich.console import Console
from rich.markdown import Markdown
from scipy.special import softmax

from tf_pcl.errors import UserError
from tf_pcl.options import Options
from tf_pcl.study import comparisons, paper, report, runs, tables
from tf_pcl.training.report import alike
from tf_pcl.training.workdir import TEST_FILES, TRAINING_FILES, Workdir, write_json
from tf_pcl.verbs import VERBS

EPOCHS = 12
BASE = dict(dataset="digits", network="resnet8", epochs=EPOCHS, train_examples=200)
EXITS = {
    "baseline": ["peer_1"],
    "pcl": ["peer_1", "peer_2", "ensemble", "mean_peer_1", "mean_peer_2", "mean_ensemble"],
}
GFLOP = {"baseline": 4.0, "pcl": 13.0}
LABELS = np.arange(1000) % 10


def make_run(folder, method, seed, error, epochs_done=None, diversity=0.04, keep=False, **more):
    """A workdir as a run leaves it, whose deployed exit ends at `error` percent; the others 1 more.

    With `keep`, its predictions on 1,000 images are wrong on the first ones, as the error says.
    """
    options = Options(**{**BASE, "method": method, "seed": seed, **more})
    workdir = Workdir(str(folder))
    facts = {"classes": list("0123456789"), "image_shape": [8, 8, 1], "test images": 1000}
    workdir.begin(options, facts, {"tensorflow": "2.15.1", "keras": "2.15.0"})
    exits, deployed = EXITS[method], "mean_peer_1" if method == "pcl" else "peer_1"
    last = options.epochs if epochs_done is None else epochs_done
    if not last:
        return folder
    ends = {name: error + (name != deployed) for name in exits}
    rows = []
    for epoch in range(1, last + 1):
        row = {"epoch": epoch, "step": 4 * epoch}
        row |= {f"val_error/{n}": e + 60 * (1 - epoch / options.epochs) for n, e in ends.items()}
        if len(exits) > 1:
            row["val_diversity"] = diversity + 0.5 * (1 - epoch / options.epochs)
        rows.append(row)
    workdir.write_rows(rows)
    results = {
        "method": method,
        "seed": seed,
        "epochs": last,
        "deployed": deployed,
        "deployed_error": ends[deployed],
        "error": ends,
        "training_gflop": GFLOP[method] * options.epochs,
        "versions": {"tensorflow": "2.15.1"},
    }
    write_json(workdir.results, results)
    if keep:
        logits = 4 * np.eye(10, dtype=np.float32)[LABELS]
        wrong = round(10 * error)
        logits[:wrong] = np.roll(logits[:wrong], 1, axis=-1)
        os.makedirs(os.path.join(folder, "evaluation"))
        path = os.path.join(folder, "evaluation", "predictions.npz")
        np.savez(path, labels=LABELS, logits=logits)
    return folder


BASELINE_ERRORS, LONG_ERRORS, PCL_ERRORS = (7.8, 7.8, 5.6), (5.0, 4.4, 3.4), (5.3, 5.0, 2.9)


@pytest.fixture
def folder(tmp_path):
    """Nine runs: a baseline, one that costs as much as PCL, and PCL, which lacks nothing."""
    for seed in range(3):
        make_run(tmp_path / f"b{seed}", "baseline", seed, BASELINE_ERRORS[seed], keep=True)
        make_run(tmp_path / "deep" / f"l{seed}", "baseline", seed, LONG_ERRORS[seed], epochs=39)
        make_run(tmp_path / f"p{seed}", "pcl", seed, PCL_ERRORS[seed], keep=True)
    return tmp_path


def change(path, **values):
    """Changes values of a JSON file, or adds them."""
    write_json(str(path), {**json.loads(path.read_text()), **values})


def written(folder, *paths):
    made = report.report([str(p) for p in paths or [folder]], str(folder / "out"))
    page, text, errors, differences = (open(f, encoding="utf-8").read() for f in made.files)
    assert text == made.markdown
    rows = lambda text: list(csv.DictReader(io.StringIO(text)))
    return page, text, rows(errors), rows(differences)


def test_a_run_that_was_not_tested_is_not_done_and_one_may_end_early(tmp_path):
    """With validation images, the errors in results.json are theirs until the test at the end."""
    for seed, epochs_done, tested in ((0, EPOCHS, None), (1, 7, {"peer_1": 5.0})):
        path = make_run(tmp_path / f"b{seed}", "baseline", seed, 5.0, epochs_done=epochs_done)
        change(path / "results.json", test_error=tested)
    study = runs.read([str(tmp_path)])
    assert list(study.sections[0].groups[0].runs) == [1]
    assert any("b0 is not finished" in note for note in study.notes)


def test_runs_that_differ_by_the_seed_alone_belong_together(folder):
    # A machine's options and the default of the method are no difference.
    make_run(folder / "p3", "pcl", 3, 4.0, peers=3, strategy="one_device", temperature=3.0)
    make_run(folder / "v0", "pcl", 0, 4.0, views="shared")
    make_run(folder / "other", "pcl", 0, 9.0, network="vgg16")
    study = runs.read([str(folder), str(folder / "b0")])
    digits, other = study.sections
    assert (other.network, [g.label for g in other.groups]) == ("vgg16", ["pcl"])
    assert {group.label: list(group.runs) for group in digits.groups} == {
        "baseline": [0, 1, 2],
        "baseline (epochs=39)": [0, 1, 2],
        "pcl": [0, 1, 2, 3],
        "pcl (views=shared)": [0],
    }
    assert digits.common == {"epochs": "12", "train_examples": "200"}
    assert digits.groups[2].errors() == {0: 5.3, 1: 5.0, 2: 2.9, 3: 4.0}
    assert digits.groups[2].errors("ensemble")[0] == 6.3
    assert [note for note in study.notes if "pcl (views" in note] == [
        "seeds 1, 2, 3 of pcl (views=shared) are missing (digits, resnet8)"
    ]


def test_runs_that_are_missing_unfinished_twice_or_damaged_are_named(folder):
    shutil.rmtree(folder / "p2")
    half = make_run(folder / "half", "pcl", 2, 5.0, epochs_done=7)
    begun = make_run(folder / "begun", "baseline", 4, 5.0, epochs_done=0)
    twice = make_run(folder / "twice", "baseline", 0, 1.0)
    (make_run(folder / "damaged", "pcl", 9, 5.0) / "results.json").write_text("{")
    (make_run(folder / "older", "pcl", 9, 5.0) / "flags.txt").write_text("--no_such_flag=1\n")
    # An earlier stage has no flags of its own, and belongs to its run.
    make_run(folder / "p0" / "1-teacher", "baseline", 7, 1.0)
    study = runs.read([str(folder)])
    notes = "\n".join(study.notes)
    assert f"{half} is not finished: 7 of 12 epochs" in notes
    assert f"{begun} is not finished: no test of its last stage has been made" in notes
    assert f"{twice} is left out: {folder / 'b0'} has the same options and seed" in notes
    assert f"{folder / 'damaged'} cannot be read and is left out" in notes
    assert re.search(rf"{folder / 'older'} cannot be read .*no_such_flag", notes)
    assert "seed 2 of pcl is missing (digits, resnet8)" in study.notes
    assert len(study.notes) == 6
    assert [list(group.runs) for group in study.sections[0].groups] == [[0, 1, 2]] * 2 + [[0, 1]]


def test_other_data_of_the_same_name_are_another_section(folder):
    run = make_run(folder / "more", "pcl", 0, 4.0, data_dir=str(folder / "photos"))
    change(run / "data.json", **{"test images": 57})
    shutil.rmtree(folder / "p0")
    first, second = runs.read([str(folder)]).sections
    assert {first.data, second.data} == {
        "digits (photos, 10 classes, 57 test images)",
        "digits (10 classes, 1,000 test images)",
    }


def test_as_many_other_test_images_are_another_section(folder):
    """Two folders may have the same classes and as many images, and tell nothing of each other."""
    for seed in range(3):
        # Of the runs of one seed, it is not known: they are of earlier versions.
        change(folder / f"p{seed}" / "data.json", **{TEST_FILES: "0000000a"} if seed else {})
    assert len(runs.read([str(folder)]).sections) == 1
    other = make_run(folder / "other", "baseline", 0, 4.0, data_dir="there/photos")
    change(other / "data.json", **{TEST_FILES: "0000000b"})
    found = {section.data: section for section in runs.read([str(folder)]).sections}
    facts = "10 classes, 1,000 test images, test files"
    assert {*found} == {
        f"digits ({facts} 0000000a)",
        f"digits (there/photos, {facts} 0000000b)",
        f"digits ({facts} not known)",
    }
    last = found[f"digits (there/photos, {facts} 0000000b)"]
    assert [(group.label, list(group.runs)) for group in last.groups] == [("baseline", [0])]


def test_runs_that_were_trained_on_other_images_are_named(folder):
    for run in folder.glob("[bp]*"):
        change(run / "data.json", **{"training images": 200, "means": [99.001]})
    change(folder / "b1" / "data.json", means=[99.002])  # Rounded on another machine.
    # What is drawn depends on the seed.
    for name in "b2", "p2":
        change(folder / name / "data.json", means=[98.0])
    assert not runs.read([str(folder)]).notes
    # Runs of earlier versions do not know their files.
    for name in "b0", "p0":
        change(folder / name / "data.json", **{TRAINING_FILES: "0000000a"})
    assert not runs.read([str(folder)]).notes
    for other in {TRAINING_FILES: "0000000b"}, {"means": [97.0]}, {"training images": 199}:
        change(folder / "p0" / "data.json", **other)
        (note,) = runs.read([str(folder)]).notes
        assert note.startswith(f"{folder / 'p0'} was trained on other images than {folder / 'b0'}")


@pytest.mark.parametrize("damage", ["cut", "other arrays", "other images", "other network"])
def test_predictions_that_are_not_the_runs_are_named_and_left_out(damage, folder):
    path = folder / "b1" / "evaluation" / "predictions.npz"
    with np.load(path) as arrays:
        labels, logits = arrays["labels"], arrays["logits"]
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:999])
    elif damage == "other arrays":
        np.savez(path, labels=labels)
    elif damage == "other images":
        np.savez(path, labels=labels[:500], logits=logits[:500])
    else:
        np.savez(path, labels=labels, logits=-logits)
    ((section,), (note,)) = runs.read([str(folder)])
    assert note.startswith(f"{path} is left out: it ") and "tf-pcl evaluate" in note
    first, *_ = comparisons.compare(section, dict.fromkeys(g.label for g in section.groups))
    assert [*first.mcnemar] == [0, 2] and first.seeds.size == 3


def test_kept_predictions_may_differ_by_an_image(folder):
    path = folder / "b1" / "evaluation" / "predictions.npz"
    with np.load(path) as arrays:
        labels, logits = arrays["labels"], arrays["logits"]
    logits[-1] = np.roll(logits[-1], 1)
    np.savez(path, labels=labels, logits=logits)
    assert not runs.read([str(folder)]).notes


@pytest.mark.parametrize("changed", [{"error": None}, {"deployed_error": float("nan")}])
def test_a_run_whose_errors_are_none_is_left_out(changed, folder):
    change(folder / "b1" / "results.json", **changed)
    study = runs.read([str(folder)])
    assert f"{folder / 'b1'} cannot be read and is left out" in "\n".join(study.notes)
    assert list(study.sections[0].groups[0].runs) == [0, 2]


@pytest.mark.parametrize("what", ["nothing", "unfinished", "missing"])
def test_where_there_is_no_finished_run_an_error_says_so(what, tmp_path):
    if what == "unfinished":
        make_run(tmp_path / "a", "pcl", 0, 5.0, epochs_done=3)
    path = tmp_path / "none" if what == "missing" else tmp_path
    text = {
        "nothing": "no finished run lies in .*: give workdirs of runs",
        "unfinished": "no finished run lies in .*a is not finished: 3 of 12 epochs",
        "missing": "none is no folder",
    }[what]
    with pytest.raises(UserError, match=text):
        report.report([str(path)], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["epochs", "folder"])
def test_a_run_that_cannot_be_read_leaves_the_others(damage, folder):
    results = folder / "b1" / "results.json"
    if damage == "epochs":
        change(results, epochs="12")
    else:
        results.unlink()
        results.mkdir()
    _, text, rows, _ = written(folder)
    assert "b1 cannot be read and is left out" in text
    assert [row["seeds"] for row in rows if row["epochs"] == "12"][:2] == ["0 2", "0 1 2"]


def test_each_test_of_images_stands_at_its_seed(folder):
    """Where the predictions of a seed are missing, those of the next do not take its place."""
    whole = written(folder)[3][0]
    (folder / "b1" / "evaluation" / "predictions.npz").unlink()
    _, text, _, differences = written(folder)
    p = whole["mcnemar_p"].split()
    assert len({*p}) == 3 and differences[0]["mcnemar_p"].split() == [p[0], "nan", p[2]]
    assert differences[0]["mcnemar_first_only"].split()[1] == "nan"
    assert f"| {float(p[0]):.2g}, –, {float(p[2]):.2g} |" in text


def test_names_of_folders_that_are_not_utf_8(folder):
    odd = pathlib.Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9"))
    make_run(odd / "b3", "baseline", 3, 5.0, epochs_done=3)
    page, text, _, _ = written(folder)
    assert all("/caf\\xe9/b3 is not finished: 3 of 12 epochs" in one for one in (page, text))


def test_a_tilde_is_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    made = report.report(["~/b0"], "~/out")
    assert made.files[0] == str(folder / "out" / "report.html")


def test_values_that_are_not_finite_are_not_drawn(folder):
    path = folder / "p0" / "metrics.csv"
    lines = path.read_text().splitlines()
    lines[-1] = lines[-1].rpartition(",")[0] + ",nan"
    path.write_text("\n".join(lines))
    assert "Diversity of the peers" in written(folder)[0]


def test_a_folder_that_cannot_be_written_is_refused(folder):
    (folder / "file").write_text("")
    with pytest.raises(UserError, match="`output=.*file`: the folder cannot be written"):
        report.report([str(folder / "b0")], str(folder / "file"))


def test_tables_at_equal_epochs_and_at_equal_cost(folder):
    page, text, errors, differences = written(folder)
    assert "Unless a label says otherwise: epochs=12, train_examples=200," in text
    assert (
        "| pcl | 0, 1, 2 | 4.40 ± 1.31 | peer_… 5.40, 5.40; ensemble 5.40; mean_peer_… 5.40; "
        "mean_ensemble 5.40 | 156 GFLOP | 3.2 | −2.67, more than noise | +0.13, within noise |"
    ) in text
    # By hand: the differences are -2.5, -2.8, -2.7 and 0.3, 0.6, -0.5; t of 2 degrees is 4.3027.
    at_epochs, at_cost = differences
    assert (at_epochs["setting"], at_epochs["against"], at_epochs["at"]) == (
        "pcl",
        "baseline",
        "equal epochs",
    )
    half = 4.302653 * np.std([-2.5, -2.8, -2.7], ddof=1) / np.sqrt(3)
    ends = [float(at_epochs[name]) for name in ("difference", "low", "high")]
    assert ends == pytest.approx([-8 / 3, -8 / 3 - half, -8 / 3 + half], abs=1e-4)
    assert (at_cost["against"], at_cost["at"]) == ("baseline (epochs=39)", "equal cost")
    assert at_cost["verdict"] == "within noise" and at_epochs["verdict"] == "more than noise"
    assert (
        "- pcl has a test error of 4.40 %, baseline of 7.07 % at equal epochs: 2.67 points less; "
        "that is more than noise over 3 seeds."
    ) in text
    # Predictions are there of the first two groups alone; the errors lie within one another.
    assert at_cost["images"] == "0" and at_epochs["images"] == "1000"
    assert at_epochs["mcnemar_first_only"] == "25 28 27"
    assert at_epochs["mcnemar_second_only"] == "0 0 0"
    assert at_epochs["mcnemar_p"].split()[0] == f"{2 * 0.5**25:.4g}"
    assert float(at_epochs["images_low"]) < -2.67 < float(at_epochs["images_high"]) < 0
    deployed = {row["setting"]: row for row in errors if row["deployed"] == "1"}
    assert float(deployed["pcl"]["error_deviation"]) == pytest.approx(np.std(PCL_ERRORS, ddof=1))
    assert deployed["baseline (epochs=39)"]["cost_gflop"] == "156" and len(errors) == 8


def test_without_a_baseline_of_equal_cost_that_is_said(folder):
    shutil.rmtree(folder / "deep")
    assert "These runs have no baseline that costs as much as pcl" in written(folder)[1]
    for seed in range(3):
        shutil.rmtree(folder / f"b{seed}")
    make_run(folder / "v0", "pcl", 0, 9.0, views="shared")
    text = written(folder)[1]
    assert "There is no baseline among these runs" in text
    assert "no baseline that costs as much" not in text
    assert (
        "pcl (views=shared) has a test error of 9.00 %, pcl of 5.30 %: 3.70 points more; 1 seed "
        "cannot tell whether that is noise"
    ) in text


def test_where_no_baseline_costs_as_much_the_cheapest_dearer_one_takes_its_place(folder):
    shutil.rmtree(folder / "deep")
    for epochs, error in (38, 4.0), (60, 3.0), (90, 2.0):
        make_run(folder / f"l{epochs}", "baseline", 0, error, epochs=epochs)
    # 38 epochs cost 97 % of PCL's training; 60 and 90 cost 1.5 and 2.3 times as much.
    assert written(folder)[3][1]["against"] == "baseline (epochs=38)"
    shutil.rmtree(folder / "l38")
    _, text, _, differences = written(folder)
    found = differences[1]
    assert (found["against"], found["at"]) == ("baseline (epochs=60)", "higher cost")
    assert float(found["difference"]) == pytest.approx(PCL_ERRORS[0] - 3.0)
    assert "No baseline costs as much as pcl, but one costs more. A gain over that one is" in text
    assert "| against baseline, equal epochs | against baseline, higher cost |" in text


def test_the_cost_of_runs_that_do_not_tell_it_is_worked_out(folder, monkeypatch):
    for path in folder.rglob("results.json"):
        results = json.loads(path.read_text())
        del results["training_gflop"]
        path.write_text(json.dumps(results))

    def cost_of(options):
        if options.method == "pcl":
            raise UserError("no such folder")
        return 2.0 * options.epochs

    monkeypatch.setattr(report.cost, "cost_of", cost_of)
    text = written(folder)[1]
    assert "24 GFLOP | 1.0 |" in text and "78 GFLOP | 3.2 |" in text
    assert "the cost of pcl is not known: no such folder" in text


def test_the_papers_figures_stand_beside_those_of_the_runs(tmp_path):
    assert paper.figure("pcl", "resnet110", "cifar100") == (20.02, 0.55)
    assert paper.figure("kd", "resnet32", "cifar10") == (5.82, 0.12)
    assert paper.figure("kd", "vgg16", "cifar10") is None
    whole = dict(dataset="cifar100", network="resnet32", train_examples=None)
    assert paper.departures(Options(method="pcl", dataset="cifar100", peers=3)) == []
    make_run(tmp_path / "a", "pcl", 0, 26.0, **{**whole, "epochs": 300})
    make_run(tmp_path / "b", "baseline", 0, 30.0, **whole)
    page, text, errors, _ = written(tmp_path)
    assert "| pcl (epochs=300) | 0 | 26.00 |" in text and "| 25.86 ± 0.16 |" in text
    assert "| 28.72 ± 0.19 (other protocol) |" in text
    assert (
        "The paper's figure for baseline has another protocol than these runs: epochs=12 (300 in "
        "the paper)."
    ) in text
    assert {row["paper_mean"] for row in errors if row["deployed"] == "1"} == {"25.86", "28.72"}


CIFAR10 = "Airplane automobile bird cat deer dog frog horse ship truck".split()


@pytest.mark.parametrize(
    "change, known",
    [
        ({}, "cifar10"),
        ({"training images": 45_000, "validation images": 5_000}, "cifar10"),
        ({"training images": 5_000}, None),
        ({"classes": CIFAR10[1:] + ["plane"]}, None),
        ({"image_shape": [64, 64, 3]}, None),
        ({"test images": 2_000}, None),
    ],
)
def test_a_data_set_of_the_paper_is_known_in_a_folder_too(change, known):
    data = {"classes": CIFAR10, "image_shape": [32, 32, 3]}
    data |= {"training images": 50_000, "test images": 10_000, **change}
    assert paper.known_as(Options(dataset="image_folder", data_dir="x"), data) == known
    assert paper.known_as(Options(dataset="cifar100"), {}) == "cifar100"
    hundred = [name.replace("_", " ") for name in paper._classes()["cifar100"]]
    assert len(hundred) == 100
    few = {**data, "classes": hundred, "training images": 500}
    some = paper.known_as(Options(dataset="image_folder", train_examples=500), few)
    assert some == ("cifar100" if not {*change} & {"image_shape", "test images"} else None)


def test_the_papers_figures_stand_beside_those_of_a_folder(tmp_path):
    facts = {"classes": CIFAR10, "image_shape": [32, 32, 3]}
    facts |= {"training images": 50_000, "test images": 10_000}
    given = dict(dataset="image_folder", data_dir="x", network="resnet32", train_examples=None)
    make_run(tmp_path / "a", "pcl", 0, 6.0, **{**given, "epochs": 300})
    write_json(str(tmp_path / "a" / "data.json"), facts)
    text = written(tmp_path)[1]
    assert "resnet32 on image_folder" in text and "| 5.67 ± 0.12 |" in text


def test_costs_are_told_in_the_unit_that_suits_them():
    assert [tables.flop(c) for c in (None, 0.25, 48.2, 1234.0, 5e6, 7e10)] == [
        "–",
        "0.25 GFLOP",
        "48.2 GFLOP",
        "1.23 TFLOP",
        "5 PFLOP",
        "70 EFLOP",
    ]


# Measured at the end of 60 epochs on 200 of the digits, ResNet-8.
@pytest.mark.parametrize(
    ("diversity", "error", "found"),
    [
        (0.0, 6.67, True),  # equal weights at the start and one view
        (0.00553, 6.94, True),  # the same, where a gate tells the peers apart
        (0.0213, 8.24, False),  # the least of PCL's peers
        (0.0751, 5.37, False),  # two whole networks
        (0.0, 0.0, True),
        (0.002, 0.0, False),  # alike because all are right
        (None, 5.0, False),  # no peers
    ],
)
def test_peers_are_alike_below_a_tenth_of_the_error_rate(diversity, error, found):
    results = {"deployed_error": error}
    results |= {} if diversity is None else {"diversity": diversity}
    assert bool(alike(results)) == found
    if found:
        assert "the peers have become alike" in alike(results)
        # Nothing is less than a tenth of 0.
        assert ("less than 0.1 times the error rate" in alike(results)) == (error > 0)


@pytest.mark.slow
@pytest.mark.parametrize("same", [True, False])
def test_a_run_says_at_its_end_if_its_peers_are_alike(same, tmp_path, monkeypatch, capsys):
    from tf_pcl.methods.peers import Peers
    from tf_pcl.training import run

    build = Peers.__init__

    def build_alike(self, *args, **kwargs):
        build(self, *args, **kwargs)
        for branch in self.branches[1:]:
            branch.set_weights(self.branches[0].get_weights())

    if same:
        monkeypatch.setattr(Peers, "__init__", build_alike)
    options = dict(BASE, method="pcl", peers=2, views="shared", ensemble_teacher="none")
    options |= dict(train_examples=None, epochs=2, workdir=str(tmp_path / "run"))
    results = run.run(Options(**options))
    assert results["deployed_error"] < 40
    assert (results["diversity"] < 1e-6) == same
    warned = "WARNING: the peers have become alike" in capsys.readouterr().out
    assert warned == same
    page = report.report([str(tmp_path / "run")], str(tmp_path / "out")).markdown
    assert ("the peers have become alike" in page) == same


class Page(html.parser.HTMLParser):
    """What an HTML parser finds: tables, addresses, the elements left open, texts of charts."""

    VOID = {"meta", "br", "path", "use"}

    def __init__(self, text):
        super().__init__()
        self.tables, self.addresses, self.open, self.charts, self.ids = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            if name in attributes:
                self.addresses.append(attributes[name])
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag == "svg":
            assert attributes["role"] == "img"
            self.charts.append("")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += text.strip()
        if "svg" in self.open:
            self.charts[-1] += text.strip() + "\n"


def test_the_page_is_whole_in_itself(folder):
    make_run(folder / "a<b>0", "pcl", 7, 5.0, epochs_done=7)
    make_run(folder / "same", "pcl", 3, 5.0, diversity=1e-5)
    text = written(folder)[0]
    page = Page(text)
    assert not page.open
    # Nothing is fetched: addresses are of parts of the page itself.
    assert all(address.startswith("#") for address in page.addresses)
    assert {address[1:] for address in page.addresses} <= set(page.ids)
    assert not re.search(r"https?:|url\((?!#)|@import|<script|<link|<img", text)
    errors, differences = page.tables
    assert errors[0][:3] == ["method", "seeds", "test error, %"]
    assert [row[0] for row in errors[1:]] == ["baseline", "baseline (epochs=39)", "pcl"]
    assert errors[1][2] == "7.07 ± 1.27" and errors[3][1] == "0, 1, 2, 3"
    assert len({len(row) for row in errors}) == 1 and len(differences) == 3
    titles = [chart.split("\n")[0] for chart in page.charts]
    assert titles == [
        "Test error of every seed",
        "Error over epochs",
        "Error of peers and teachers over epochs",
        "Diversity of the peers over epochs",
        "Test error against the cost of training",
        "Reliability diagram",
    ]
    assert "baseline (epochs=39)" in page.charts[4] and "GFLOP" in page.charts[4]
    # What was read from disk cannot become markup.
    assert "a&lt;b&gt;0 is not finished: 7 of 12 epochs" in text and "a<b>" not in text
    assert "pcl, seed 3 (digits, resnet8): the peers have become alike" in text
    # Every colour is one of the page's, which a dark page changes.
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    assert used and all(text.count(f"{name}:") == 2 for name in used)
    assert "#0101" not in text


def test_what_a_label_holds_is_no_markup(folder):
    label = "pcl (weights=$x_1$<b>[r]*&lt;)"
    make_run(folder / "odd", "pcl", 0, 4.0, weights=label[len("pcl (weights=") : -1])
    page, text = written(folder)[:2]
    assert label in Page(page).charts[0].split("\n")
    assert label in [row[0] for row in Page(page).tables[0]]
    shown = io.StringIO()
    Console(file=shown, width=999).print(Markdown(text))
    assert label in shown.getvalue()


def test_what_is_worse_has_the_colour_of_what_is_worse(tmp_path):
    for seed in range(3):
        make_run(tmp_path / f"b{seed}", "baseline", seed, 5.0 + seed / 10)
        make_run(tmp_path / f"p{seed}", "pcl", seed, 8.0 + seed)
        make_run(tmp_path / f"q{seed}", "pcl", seed, 2.0 + seed / 5, peers=2)
    page = written(tmp_path)[0]
    cells = [*re.findall(r'<td class="([^"]*clear[^"]*)">([^<]*)', page)]
    assert [("worse" in kind, text) for kind, text in cells] == [
        (True, "+3.90, more than noise"),
        (False, "−2.90, more than noise"),
        (True, "more than noise"),
        (False, "more than noise"),
    ]


def test_the_calibration_error_is_that_of_evaluate(folder):
    told = dict(re.findall(r"(baseline|pcl) (\d+\.\d\d) %", written(folder)[0].split("15 bins")[1]))
    for method in told:
        each = []
        for seed in range(3):
            with np.load(folder / f"{method[0]}{seed}" / "evaluation" / "predictions.npz") as kept:
                p = softmax(kept["logits"], axis=1)
                right = p.argmax(1) == kept["labels"]
            # All are equally sure here.
            each.append(abs(p.max(1).mean() - right.mean()))
        assert float(told[method]) == pytest.approx(100 * np.mean(each), abs=0.006)
    assert len(told) == 2


def test_many_groups_have_a_panel_each(tmp_path):
    for peers in range(2, 10):
        make_run(tmp_path / str(peers), "pcl", 0, 3.0 + peers, peers=peers)
    text = written(tmp_path)[0]
    page = Page(text)
    epochs = page.charts[1].split("\n")
    assert [f"pcl (peers={n})" in epochs for n in (2, 7, 9)] == [True] * 3
    # Without a baseline, all are compared with the first; of many comparisons few are told.
    assert len(page.tables[1]) == 8
    assert "None of the comparisons is known to be more than noise; the table of" in text


def test_the_verb_wants_runs():
    with pytest.raises(UserError, match="give the workdirs of runs, or folders that hold them"):
        VERBS["report"].run([])


@pytest.mark.slow
def test_the_command_of_the_page_makes_a_report(folder, tmp_path):
    (arguments,) = pages.commands(pages.page("docs/compare.md"), "tf-pcl report")
    here = tmp_path / "here"
    folder = pathlib.Path(shutil.copytree(folder, here / arguments[0]))
    run = lambda *more: pages.python("-m", "tf_pcl", "report", *more, cwd=here)
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("# resnet8 on digits\n")
    # The files of the page's table, the page first.
    text = pages.section(pages.page("docs/compare.md"), "## Read a report")
    files = [row[0] for row in pages.rows(text, 2) if "." in row[0]]
    assert done.stdout.splitlines()[-4:] == [f"report/{name}" for name in files]
    assert sorted(files) == sorted(os.listdir(here / "report"))
    refused = run("nowhere")
    assert refused.returncode == 2 and refused.stderr == (
        "tf-pcl report: nowhere is no folder: give workdirs of runs, or folders that hold them\n"
    )


CHROMIUM = "/usr/bin/chromium"
if os.path.exists(CHROMIUM):
    # A browser is a large program that most machines with the tests have no need of.

    def browse(page, folder, *arguments):
        done = subprocess.run(
            [
                CHROMIUM,
                *"--headless --no-sandbox --disable-gpu --disable-quic --no-first-run".split(),
                *"--disable-background-networking --disable-component-update".split(),
                *f"--disable-sync --user-data-dir={folder / 'profile'}".split(),
                *arguments,
                f"file://{page}",
            ],
            capture_output=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.decode()

    def test_a_browser_shows_the_page(folder, tmp_path):
        from matplotlib import image

        written(folder)
        page = folder / "out" / "report.html"
        measured = tmp_path / "measured.html"
        script = """<script>
            const inside = [...document.querySelectorAll("svg")].map(s => {
                const box = s.getBoundingClientRect();
                const texts = [...s.querySelectorAll("text")].map(t => t.getBoundingClientRect());
                return box.width > 300 && box.height > 80 && texts.length > 3 && texts.every(
                    t => t.width > 0 && t.left > box.left - 2 && t.right < box.right + 2);
            });
            const wide = document.documentElement.scrollWidth > innerWidth;
            const fetched = performance.getEntriesByType("resource").length;
            document.title = JSON.stringify({inside, wide, fetched});
        </script></body>"""
        measured.write_text(page.read_text().replace("</body>", script))
        dom = browse(measured, tmp_path, "--window-size=1200,900", "--dump-dom")
        found = json.loads(
            re.search(r"<title>(\{.*?\})</title>", dom).group(1).replace("&quot;", '"')
        )
        assert found == {"inside": [True] * 6, "wide": False, "fetched": 0}
        browse(
            page,
            tmp_path,
            f"--screenshot={tmp_path / 'dark.png'}",
            "--window-size=1200,3000",
            "--force-dark-mode",
        )
        pixels = image.imread(tmp_path / "dark.png")[..., :3]
        # The page is dark, and the curves have the first method's colour.
        assert pixels[5, 5].max() < 0.2
        blue = (pixels[..., 2] - pixels[..., 0] > 0.35).sum()
        assert 1_000 < blue < 0.1 * pixels[..., 0].size
