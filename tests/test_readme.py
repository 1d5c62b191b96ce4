"""What the README and the flag files promise."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from conftest import noise, with_labels
from tensorflow import keras

from tf_pcl import options
from tf_pcl.methods import METHODS
from tf_pcl.training import run
from tf_pcl.training.assemble import Assembly, method_arguments

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(heading, language=None):
    """The fenced blocks under a heading."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", README, re.M | re.S).group(1)
    return [
        text
        for name, text in re.findall(r"^```(\w*)\n(.*?)^```", section, re.M | re.S)
        if language in (None, name)
    ]


def parse(arguments):
    values = flags.FlagValues()
    options.define_flags(values)
    assert values(["train.py", *arguments]) == ["train.py"]
    return options.from_flags(values)


def commands():
    return [
        line.split("train.py", 1)[1].split()
        for text in re.findall(r"^```\w*\n(.*?)^```", README, re.M | re.S)
        for line in text.replace("\\\n", " ").splitlines()
        if re.match(r"(sh in_venv.sh )?python train.py ", line)
    ]


def test_two_commands_set_everything_up():
    for heading, text in (("Train", "python train.py"), ("Test", "python -m pytest")):
        found = blocks(heading)
        assert len(found) == 1 and len(found[0].splitlines()) == 1 and text in found[0]


@pytest.mark.parametrize(
    "heading, made",
    [
        ("Your own images", "image_folder-resnet8-pcl-seed0"),
        ("Your own network", "digits-my_models.build-pcl-seed0"),
    ],
)
def test_what_a_user_brings_trains_as_printed(heading, made, tmp_path):
    section = re.search(rf"^### {heading}\n(.*?)(?=^##)", README, re.M | re.S).group(1)
    source = re.search(r"^```sh\n(.*?)^```", section, re.M | re.S).group(1)
    for name in ("train.py", "tf_pcl"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "bin/python").chmod(0o755)
    shorter = re.sub(r"--epochs=\d+", "--epochs=2", source)
    assert shorter != source
    done = subprocess.run(
        ["sh", "-e", "-c", shorter],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stderr
    assert (
        json.loads((tmp_path / "runs" / made / "results.json").read_text())["deployed_error"] < 80
    )


def test_every_command_of_the_readme_parses():
    found = commands()
    assert len(found) > 5
    for arguments in found:
        method = parse([a for a in arguments if not a.startswith("--flagfile")]).method
        assert method in METHODS


@pytest.mark.parametrize("path", sorted((ROOT / "flags").iterdir()), ids=lambda p: p.name)
def test_flag_files_parse_and_build(path):
    head = path.read_text(encoding="utf-8").splitlines()[:4]
    for line, word in zip(
        head, ("table", f"python train.py --flagfile=flags/{path.name}", "Expected error", "Cost")
    ):
        assert line.startswith("# ") and word in line
    settings = parse([f"--flagfile={path}"])
    classes = int(settings.dataset[len("cifar") :])
    images = with_labels(noise(4, 32, 32, 3), np.arange(4))
    images = dataclasses.replace(images, classes=tuple(map(str, range(classes))))
    models = []
    for stage in METHODS[settings.method].stages(
        Assembly(images), settings.network, **method_arguments(settings)
    ):
        models.append(stage.build(models))
    assert models[-1].deployed().output_shape == (None, classes)
    keras.backend.clear_session()
    method_of, network, data_set = path.stem.split("-")
    assert (method_of, network, data_set) == (settings.method, settings.network, settings.dataset)


def test_every_method_has_the_recipe_of_two_networks():
    names = {path.stem for path in (ROOT / "flags").iterdir()}
    assert {
        f"{method}-{network}-cifar100" for method in METHODS for network in ("resnet32", "vgg16")
    } < names


def test_the_table_of_methods_has_them_all_and_their_flags():
    rows = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]]
        for line in README.splitlines()
        if line.startswith("| `")
    ]
    of_methods, results = (
        [row for row in rows if len(row) == width and row[0] in METHODS] for width in (6, 7)
    )
    assert (
        sorted(METHODS) == sorted(row[0] for row in of_methods) == sorted(row[0] for row in results)
    )
    for name, *_, own in of_methods:
        assert set(re.findall(r"--(\w+)", own)) <= set(METHODS[name].parameters()), name


def test_runs_are_listed_as_printed(tmp_path, monkeypatch, capsys):
    (source,) = [block for block in blocks("Use", "python") if "results.json" in block]
    for name, error in (("first", 7.5), ("second", 6.25)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "results.json").write_text(
            json.dumps({"deployed": "peer_1", "deployed_error": error})
        )
    monkeypatch.chdir(tmp_path)
    exec(compile(source, "README.md", "exec"), {})
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["6.25", "%", "peer_1", "second"],
        ["7.50", "%", "peer_1", "first"],
    ]


def test_the_python_of_the_readme_runs():
    source = "\n".join(blocks("In a notebook", "python"))
    assert "epochs = 20" in source
    exec(compile(source.replace("epochs = 20", "epochs = 2"), "README.md", "exec"), {})


def test_the_method_of_the_readme_is_one(tmp_path, monkeypatch):
    (source,) = blocks("How it is made", "python")
    assert len(source.splitlines()) <= 30
    made = {}
    exec(compile(source, "README.md", "exec"), made)
    monkeypatch.setitem(METHODS, "mean_logits", made["MeanLogits"])
    results = run.run(
        parse(
            [
                "--method=mean_logits",
                "--dataset=digits",
                "--network=resnet8",
                "--batch_size=64",
                "--epochs=3",
                "--peers=2",
                f"--workdir={tmp_path / 'run'}",
            ]
        )
    )
    assert set(results["error"]) == {"peer_1", "peer_2"} and results["deployed_error"] < 30
