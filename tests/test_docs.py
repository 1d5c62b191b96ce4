"""What the pages and the flag files promise."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import tensorflow as tf
from absl import flags
from helpers import CLASSES, SHAPE, noise, with_labels
from pages import (
    METHODS_OF_PAPERS,
    PAGES,
    ROOT,
    blocks,
    commands,
    page,
    python,
    rows,
    section,
    shell,
)

from tf_pcl import cli, methods, networks, options
from tf_pcl.methods import METHODS
from tf_pcl.methods.distiller import build_all
from tf_pcl.study import paper
from tf_pcl.training import cluster, run
from tf_pcl.training.assemble import Assembly, method_arguments

README = page("README.md")
CONTRIBUTING = page("docs/contributing.md")
TRAIN = r"(?:python train\.py|tf-pcl train|python -m tf_pcl train)"
# Flags that the pages name and that are not options of a run.
OTHER_FLAGS = {"help", "flagfile", "with", "strict", "noflip"}
OTHER_FLAGS |= {"methods", "networks", "datasets", "seeds", "grid", "table"}
OTHER_FLAGS |= {"equal_cost", "noequal_cost", "dry_run", "print_commands", "output"}
# Those of tf-pcl compare and tf-pcl export.
OTHER_FLAGS |= {"runner", "jobs"}
OTHER_FLAGS |= {"format", "exit", "folder", "calibration_images", "fold_batch_norm"}
# Those of tf-pcl evaluate and tf-pcl predict.
OTHER_FLAGS |= {"corruptions", "json", "output", "split", "top_k", "worst"}
OTHER_FLAGS |= {"profile", "workers"}  # Those of benchmarks.
IN_A_COPY = "TF_PCL_TESTS_IN_A_COPY"


def parse(arguments):
    values = flags.FlagValues()
    options.define_flags(values)
    assert values(["train.py", *arguments]) == ["train.py"]
    return options.from_flags(values)


def test_two_commands_set_everything_up():
    for heading, text in (("Train", "python train.py"), ("Test", "python -m pytest")):
        found = blocks(section(README, f"## {heading}"))
        assert len(found) == 1 and len(found[0].splitlines()) == 1 and text in found[0]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 170


def test_every_command_of_the_pages_parses(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = [arguments for path in PAGES for arguments in commands(page(path), TRAIN)]
    assert len(found) > 20
    for arguments in found:
        method = parse(cli._with_recipes(arguments)).method
        assert method in METHODS_OF_PAPERS | {"mean_logits"}


@pytest.mark.parametrize(
    "name, least",
    [
        ("step", 4),
        ("workers", 1),
        ("versus_torch", 1),
        ("input", 1),
        ("growth", 1),
        ("deployed", 1),
    ],
)
def test_every_command_of_a_benchmark_has_its_flags(name, least):
    source = page(f"benchmarks/{name}.py")
    defined = set(re.findall(r'DEFINE_\w+\("(\w+)"', source))
    defined |= {f"no{name}" for name in re.findall(r'DEFINE_bool\("(\w+)"', source)}
    found = [a for path in PAGES for a in commands(page(path), rf"python benchmarks/{name}\.py")]
    assert len(found) >= least
    for arguments in found:
        assert {re.match(r"--(\w+)", a).group(1) for a in arguments} <= defined


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_flags_in_the_text_exist(path):
    named = set(re.findall(r"`--(\w+)(?:=[^`]*)?`", page(path)))
    assert named <= set(options.names()) | OTHER_FLAGS


def test_the_options_that_may_differ_in_a_workdir_are_listed():
    text = " ".join(page("docs/runs.md").split())
    (listed,) = re.findall(r"These may differ: (.*?)\. ", text)
    assert set(re.findall(r"`--(\w+)`", listed)) == {*options.Options().run_only(), "on_bad_image"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "heading, made",
    [
        ("Your own images", "image_folder-resnet8-pcl-seed0"),
        ("Your own network", "digits-my_models.build-pcl-seed0"),
    ],
)
def test_what_a_user_brings_trains_as_printed(heading, made, tmp_path):
    (source,) = blocks(section(README, f"### {heading}"), "sh")
    shorter = re.sub(r"--epochs=\d+", "--epochs=2", source)
    assert shorter != source
    done = shell(shorter, tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "runs" / made / "results.json").read_text())
    assert results["deployed_error"] < 80


def printed_as(line):
    """The pattern of what a line of a page shows: numbers may be others, and … is anything."""
    pattern = re.escape(" ".join(line.split()))
    pattern = re.sub(r"\d(?:[\d,]|\\\.)*(?:e\\[+-]\d+)?", r"[\\d.,]+(?:e[+-]\\d+)?", pattern)
    return pattern.replace(r"\ ", r"\s+").replace("…", ".*")


@pytest.mark.slow
def test_a_first_run_is_toured_and_served_as_printed(tmp_path):
    """One short run, on which the tour and the page on deployment are tried."""

    def run_shorter(source):
        shorter = re.sub(r"--epochs=\d+", "--epochs=1", source).replace("sh in_venv.sh ", "")
        done = shell(re.sub("^tf-pcl", "python -m tf_pcl", shorter, flags=re.M), tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    tour = page("docs/tour.md")
    (first,) = commands(section(README, "## Train"), TRAIN)
    assert first in commands(tour, TRAIN)
    pairs = re.findall(r"^```sh\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", tour, re.M | re.S)
    assert len(pairs) == 5
    for source, text in pairs:
        output = run_shorter(source)
        for line in text.splitlines():
            assert re.search(printed_as(line), output), (line, output)
    assert (tmp_path / "tour/report.html").exists()
    assert (tmp_path / "runs/digits-resnet8-pcl-seed0/export/model.tflite").exists()

    (serve,) = blocks(page("docs/deploy.md"), "python")
    (tmp_path / "serve.py").write_text(serve)
    assert "shape=(1, 10)" in run_shorter("python serve.py")
    # The network is judged and used as printed on the same page.
    for name in ("photo.jpg", "scans/0.png", "more/deep/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        tf.io.write_file(str(tmp_path / name), tf.io.encode_png(noise(9, 9, 3)))
    for heading, made in (
        ("How good is it", ["runs/digits-resnet8-pcl-seed0/evaluation", "judged"]),
        ("What is in these photos", []),
    ):
        (source,) = blocks(section(page("docs/deploy.md"), f"## {heading}"), "sh")
        output = run_shorter(source)
        for folder in made:
            assert (tmp_path / folder / "predictions.npz").exists()
    assert "more/deep/1.png" in output and '{"path": "scans/0.png"' in output
    assert "corruptions" in json.loads((tmp_path / "judged" / "evaluation.json").read_text())


RECIPES = pytest.mark.parametrize(
    "path", sorted((ROOT / "flags").iterdir()), ids=lambda path: path.name
)


@RECIPES
def test_recipes_parse_and_are_called_as_they_are(path):
    head = path.read_text(encoding="utf-8").splitlines()[:4]
    for line, word in zip(
        head, ("table", f"python train.py --flagfile=flags/{path.name}", "Expected error", "Cost")
    ):
        assert line.startswith("# ") and word in line
    chosen = parse([f"--flagfile={path}"])
    method_of, network, data_set = path.stem.split("-")
    assert (method_of, network, data_set) == (chosen.method, chosen.network, chosen.dataset)


@pytest.mark.slow
@RECIPES
def test_recipes_build(path):
    chosen = parse([f"--flagfile={path}"])
    classes = int(chosen.dataset[len("cifar") :])
    images = with_labels(noise(4, 32, 32, 3), np.arange(4))
    images = dataclasses.replace(images, classes=tuple(map(str, range(classes))))
    stages = METHODS[chosen.method].stages(
        Assembly(images), chosen.network, **method_arguments(chosen)
    )
    assert build_all(stages)[-1].deployed().output_shape == (None, classes)


def test_every_method_of_a_paper_has_the_recipe_of_two_networks():
    names = {path.stem for path in (ROOT / "flags").iterdir()}
    assert {
        f"{method}-{network}-cifar100"
        for method in METHODS_OF_PAPERS
        for network in ("resnet32", "vgg16")
    } < names
    assert {name.split("-")[0] for name in names} == METHODS_OF_PAPERS <= set(METHODS)


def test_the_tables_of_methods_have_them_all_and_their_flags():
    described = [row for row in rows(page("docs/methods.md"), 6) if row[0] in METHODS]
    measured = [row for row in rows(page("docs/results.md"), 5) if row[0] in METHODS]
    for table in (described, measured):
        assert sorted(row[0] for row in table) == sorted(METHODS_OF_PAPERS)
    for name, *_, own in described:
        assert set(re.findall(r"--(\w+)", own)) <= set(METHODS[name].parameters()), name


def test_the_page_of_choices_has_the_figures_of_the_results():
    methods_of = lambda table: {row[0]: row for row in table if row[0] in METHODS}
    results = page("docs/results.md")
    costs = methods_of(rows(results, 5))
    # The report names the option of a row, such as the teacher of kd, behind its method.
    reported = [row for row in rows(results, 9) if "(epochs" not in row[0]]
    errors = methods_of([row[0].split("`")[0], *row[1:]] for row in reported)
    gained = lambda cell: cell.split(",")[0].translate(str.maketrans("+−–", "−+ ")).strip()
    ideas, chosen = (methods_of(rows(page("docs/which.md"), n)) for n in (3, 8))
    assert set(ideas) == set(chosen) == set(errors) == METHODS_OF_PAPERS
    for name, (_, time, arithmetic, memory, *gains, mean, ends) in chosen.items():
        assert [time, arithmetic, f"{memory} GiB"] == costs[name][2:]
        epochs, equal, higher = map(gained, errors[name][6:])
        assert [arithmetic, *gains] == [errors[name][5], epochs, higher or equal], name
        papers = gains_of_the_paper(name, "cifar100") if name != "baseline" else []
        assert mean == (points(sum(papers) / len(papers)) if papers else ""), name
        several = len(papers) > 1
        assert not several or ends == f"{points(min(papers))}, {points(max(papers))}", name


def points(gain):
    """A gain as the pages print it."""
    return f"{gain:+.2f}".replace("-", "−")


def gains_of_the_paper(method, dataset):
    """How much lower the paper's errors are than the baseline's, by its networks."""
    found = [
        (paper.figure("baseline", network, dataset), paper.figure(method, network, dataset))
        for network in sorted(networks.NETWORKS)
    ]
    return [alone.mean - mean.mean for alone, mean in found if alone and mean]


def test_runs_are_listed_as_printed(tmp_path, monkeypatch, capsys):
    (source,) = blocks(page("docs/runs.md"), "python")
    for name, error in (("first", 7.5), ("second", 6.25)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "results.json").write_text(
            json.dumps({"deployed": "peer_1", "deployed_error": error})
        )
    monkeypatch.chdir(tmp_path)
    exec(compile(source, "runs.md", "exec"), {})
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["6.25", "%", "peer_1", "second"],
        ["7.50", "%", "peer_1", "first"],
    ]


def test_the_job_of_kubernetes_makes_a_cluster(monkeypatch):
    (source,) = blocks(page("docs/runs.md"), "yaml")
    script = (
        source[source.index("- |") :]
        .split("\n", 1)[1]
        .replace("exec tf-pcl", "printenv TF_CONFIG; exit #")
    )
    environment = {**os.environ, "JOB_COMPLETION_INDEX": "1"}
    done = subprocess.run(["sh", "-ec", script], env=environment, capture_output=True, text=True)
    monkeypatch.setenv("TF_CONFIG", done.stdout.strip())
    found = cluster.find()
    assert found.addresses == ["pcl-node-0-0.pcl:2222", "pcl-node-0-1.pcl:2222"] and found.own == 1


@pytest.mark.slow
def test_the_notebook_of_the_readme_runs():
    (source,) = blocks(section(README, "### In a notebook"), "python")
    assert source.count("epochs=20") == 2
    exec(compile(source.replace("epochs=20", "epochs=2"), "README.md", "exec"), {})


@pytest.mark.slow
def test_the_notebook_of_the_tour_runs(tmp_path, monkeypatch):
    """Its cells, one after another in one namespace, with few epochs."""
    notebook = json.loads(page("docs/tour.ipynb"))
    sources = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    assert notebook["nbformat"] == 4 and sources[0].count("EPOCHS = 60") == 1
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plt, "show", plt.close)
    made = {}
    for number, source in enumerate(sources, 1):
        shorter = source.replace("EPOCHS = 60", "EPOCHS = 2")
        exec(compile(shorter, f"tour.ipynb, cell {number}", "exec"), made)
    assert (tmp_path / "tour/saved_model/1/saved_model.pb").exists()
    np.testing.assert_allclose(made["probabilities"].sum(), 1, rtol=1e-5)
    assert len(made["history"]["val_error/mean_peer_1"]) == 2


@pytest.mark.slow
def test_the_notebook_on_data_runs(make_folder, monkeypatch):
    (source,) = blocks(page("docs/data.md"), "python")
    sizes = {"cat": 24, "dog": 16}
    folder = make_folder({"photos": {c: [noise(8, 8, 3)] * n for c, n in sizes.items()}})
    monkeypatch.chdir(folder)
    made = {}
    exec(compile(source, "data.md", "exec"), made)
    assert made["photos"].classes == ("cat", "dog") and len(made["photos"].test) == 8
    assert made["model"].step.numpy() == 4


def test_the_network_of_the_page_is_cut_where_the_page_says():
    (source,) = blocks(page("docs/networks.md"), "python")
    made = {}
    exec(compile(source, "networks.md", "exec"), made)
    model = methods.PCL(lambda: made["build"](SHAPE, CLASSES))
    assert model.student.cut.name == "stage_1"


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    """Links between pages exist, and the API pages find what they name."""
    done = python("-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tf_pcl.methods.pcl.PCL" in (tmp_path / "api/methods/index.html").read_text()


def test_links_of_the_readme_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README + page("CONTRIBUTING.md"))
    assert len(targets) > 10
    for target in targets:
        assert target.startswith("https://") or (ROOT / target).exists(), target


def method_of_the_page():
    """(source of the file, lines that register it) of the page's method."""
    text = section(CONTRIBUTING, "## Add a method")
    (source,), (row,) = blocks(text, "python"), blocks(text, "diff")
    return source, [line[1:] for line in row.splitlines() if line.startswith("+")]


@pytest.mark.slow
def test_the_method_of_the_page_is_one(tmp_path, monkeypatch):
    source, _ = method_of_the_page()
    assert len(source.splitlines()) <= 32
    made = {}
    exec(compile(source, "contributing.md", "exec"), made)
    monkeypatch.setitem(METHODS, "mean_logits", made["MeanLogits"])
    (command,) = commands(section(CONTRIBUTING, "## Add a method"), TRAIN)
    results = run.run(parse([*command, f"--workdir={tmp_path / 'run'}"]))
    assert set(results["error"]) == {"peer_1", "peer_2"} and results["deployed_error"] < 30


# The copy does not copy itself.
if IN_A_COPY not in os.environ:

    @pytest.mark.slow
    def test_a_method_is_a_file_and_a_row(tmp_path):
        """Registered as the page says, in a copy of the checkout, whose tests then pass."""
        # Those that ask the table; the others know no method.
        asking = "methods fit recompute cli train_py layers docs study_grid study_cost compare"
        files = [f"tests/test_{name}.py" for name in (*asking.split(), "report")]
        copy = tmp_path / "copy"
        kept_out = shutil.ignore_patterns(".git", ".venv*", "runs", "build", "site", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=kept_out)
        source, (imported, row) = method_of_the_page()
        (copy / "tf_pcl/methods/mean_logits.py").write_text(source)
        table = copy / "tf_pcl/methods/__init__.py"
        text, head = table.read_text(), "METHODS: dict[str, type[Distiller]] = {\n"
        assert text.count(head) == 1
        table.write_text(text.replace(head, f"{imported}\n\n{head}{row}\n"))
        (command,) = re.findall(r'^python -c "(.*)"$', CONTRIBUTING, re.MULTILINE)
        subprocess.run([sys.executable, "-c", command], cwd=copy, check=True)
        for chosen in (["-m", "not slow"], ["-m", "slow", "-k", "mean_logits"]):
            tests = "-m", "pytest", "-p", "no:cacheprovider", *files, *chosen
            done = python(*tests, cwd=copy, PYTHONPATH=str(copy), **{IN_A_COPY: "1"})
            assert done.returncode == 0, done.stdout[-5000:]
