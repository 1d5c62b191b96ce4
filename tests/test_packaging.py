"""What is installed: the wheel, its command, its data."""

import configparser
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest
from pages import ROOT

PAPER = ROOT / "tf_pcl" / "paper"


def call(*command, **kwargs):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built by way of the source distribution, as `python -m build` does it."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    for name in ("tf_pcl", "flags"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    made = "from setuptools import build_meta; build_meta.build_sdist('made')"
    call(sys.executable, "-c", made, cwd=source)
    (sdist,) = (source / "made").glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    call(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", source / "made", sdist)
    (path,) = (source / "made").glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_the_package_the_recipes_and_the_paper_s_tables(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    kinds = (".py", ".csv", ".html", ".jinja", ".json")
    package = [p for p in (ROOT / "tf_pcl").rglob("*") if p.suffix in kinds]
    want = {p.relative_to(ROOT).as_posix() for p in package}
    want |= {f"tf_pcl/flags/{p.name}" for p in (ROOT / "flags").iterdir()}
    assert held == want


@pytest.mark.slow
def test_the_installed_command_trains_outside_the_checkout(wheel, tmp_path):
    venv, here = tmp_path / "venv", tmp_path / "here"
    here.mkdir()
    call(sys.executable, "-m", "venv", "--without-pip", venv)
    # The packages of this environment, which stand behind those of the new one.
    (packages,) = venv.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", venv]
    call(*pip, "install", "--no-deps", "--no-index", wheel)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # A recipe by its name; what follows it counts.
    out = call(
        venv / "bin" / "tf-pcl",
        "train",
        "--flagfile=pcl-resnet32-cifar100.flags",
        "--dataset=digits",
        "--network=resnet8",
        "--epochs=1",
        cwd=here,
        env=env,
    )
    assert "pcl on digits" in out
    run = here / "runs" / "digits-resnet8-pcl-seed0"
    results = json.loads((run / "results.json").read_text())
    assert results["epochs"] == 1 and (run / "export/saved_model/1/saved_model.pb").exists()
    where = call(venv / "bin" / "python", "-m", "tf_pcl", "--help", cwd=here, env=env)
    assert "train " in where
    imported = "import tf_pcl; print(tf_pcl.__file__)"
    assert str(packages) in call(venv / "bin" / "python", "-c", imported, cwd=here, env=env)


def test_setup_cfg_lists_every_package():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    found = {p.parent.relative_to(ROOT) for p in (ROOT / "tf_pcl").rglob("__init__.py")}
    assert set(config["options"]["packages"].split()) == {
        "tf_pcl.flags",
        *(".".join(folder.parts) for folder in found),
    }


def table(name):
    """{(row's name, column's name): text} of one of the paper's tables."""
    source, *lines = (PAPER / name).read_text(encoding="utf-8").splitlines()
    assert source.startswith("# Wu and Gong, Peer Collaborative Learning")
    (_, *columns), *rows = csv.reader(lines)
    return {(row[0], column): cell for row in rows for column, cell in zip(columns, row[1:])}


def test_the_recipes_expect_what_the_paper_s_tables_say():
    tables = {"cifar10": table("table1_cifar10.csv"), "cifar100": table("table2_cifar100.csv")}
    two_stage = table("two_stage_resnet32.csv")
    compared = 0
    for path in sorted((ROOT / "flags").iterdir()):
        method, network, dataset = path.stem.split("-")
        expected = path.read_text(encoding="utf-8").splitlines()[2]
        said = re.search(r": ([\d.]+) ± ([\d.]+) %", expected)
        known = tables[dataset].get((network, method))
        if method == "kd" and network == "resnet32":
            known = two_stage[dataset, method]
        assert bool(said) == bool(known), path.name
        if said:
            assert known == f"{said[1]}±{said[2]}", path.name
            compared += 1
    assert compared > 10
