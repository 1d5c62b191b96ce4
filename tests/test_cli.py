"""The command line's verbs, as a process calls them and within this one."""

import ast
import io
import os
import re
import sys

import pytest
from pages import ROOT, python

from tf_pcl import cli, console
from tf_pcl.verbs import further_help


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_verbs_are_listed(arguments):
    done = python("-m", "tf_pcl", *arguments)
    assert done.returncode == 0 and not done.stderr
    for verb, row in cli.VERBS.items():
        line = rf"^  {verb} +{re.escape(row.summary)}$"
        assert re.search(line, done.stdout, re.M) and row.summary.endswith(".")


def test_the_help_of_training_is_there_without_tensorflow():
    """It names all methods, networks and data sets, as a file has them that fits to the tables."""
    assert further_help.written() == further_help.found(), "further_help.write() makes the file"
    code = "import sys; sys.modules['tensorflow'] = None; from tf_pcl import cli; cli.main()"
    done = python("-c", code, "train", "--help")
    assert done.returncode == 0 and not done.stderr
    # Lines may be cut within a word that has a hyphen.
    said = "".join(done.stdout.split())
    for text in further_help.written().values():
        assert "".join(text.split()) in said


@pytest.mark.parametrize(
    "arguments, line",
    [
        (
            ["trian"],
            "tf-pcl: verb 'trian' is not known. Did you mean train? Allowed: "
            f"{', '.join(sorted(cli.VERBS))}.\n",
        ),
        (
            ["train", "--epochs=0"],
            "tf-pcl train: --epochs=0: out of range: it must be at least 1 and at most 1000000\n",
        ),
        (
            ["train", "--split_at=x", "--trunk_share=0.5"],
            "tf-pcl train: --split_at=x does not go with --trunk_share=0.5: give one of them\n",
        ),
        (
            ["train", "--lr_decay_epochs=a,b"],
            "tf-pcl train: --lr_decay_epochs=a,b: could not convert string to float: 'a'; give "
            "numbers, such as 150,225\n",
        ),
    ],
)
def test_errors_begin_with_the_verb_and_name_flags(arguments, line):
    done = python("-m", "tf_pcl", *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


def test_help_has_the_flags_of_a_verb_before_those_of_training():
    done = python("-m", "tf_pcl", "compare", "--help")
    own, training = done.stdout.split("Flags of training:\n")
    assert "Flags of this command:\n  --datasets:" in own and "--seeds:" in own
    assert "--epochs:" in training and "--seeds:" not in training


def test_tables_are_laid_out_where_a_terminal_shows_them(monkeypatch, capsys):
    markdown = "# Runs\n\n| method | error |\n| --- | --- |\n| one | 7.64 |"
    console.show(markdown)
    assert capsys.readouterr().out == markdown + "\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    console.show(markdown)
    shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert "|" not in shown and re.search("method +error", shown) and re.search("one +7.64", shown)


def test_names_in_tables_are_whole_at_any_width(monkeypatch, capsys):
    name = "a_name_[of]_some_length_in_a_row"
    show = lambda: console.show_table(["file", "class"], [[name, f"{name} 60.1 %"]])
    monkeypatch.setenv("COLUMNS", "20")
    show()
    assert capsys.readouterr().out.count(f"{name} ") == 2
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    show()
    lines = [line.split("│")[1:3] for line in capsys.readouterr().out.splitlines() if "│" in line]
    first, second = ("".join(cell.strip() for cell in cells) for cells in zip(*lines))
    assert (first, second) == (name, f"{name}60.1 %")


@pytest.mark.parametrize("width, kept", [("0", None), ("²", None), ("", None), ("70", "70")])
def test_a_width_that_is_none_is_not_taken(width, kept, monkeypatch):
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    console.protect()
    assert os.environ.get("COLUMNS") == kept


def test_a_recipe_is_found_by_its_name_where_no_file_is(tmp_path, monkeypatch):
    name = "pcl-resnet32-cifar100.flags"
    monkeypatch.chdir(tmp_path)
    found = [f"--flagfile={ROOT / 'flags' / name}"]
    assert cli._with_recipes([f"--flagfile={name}"]) == found
    assert cli._with_recipes([f"-flagfile={name}"]) == found
    assert cli._with_recipes(["--flagfile", name])[1:] == [str(ROOT / "flags" / name)]
    for other in (f"--flagfile=./{name}", "--flagfile=absent", "--flagfile=", "--flagfile", name):
        assert cli._with_recipes([other]) == [other]
    (tmp_path / name).write_text("--epochs=1\n")
    assert cli._with_recipes([f"--flagfile={name}"]) == [f"--flagfile={name}"]


def test_an_import_that_fails_is_shown_as_what_it_is(tmp_path):
    source = (
        "import sys; from tf_pcl import cli; sys.modules['tf_pcl.training'] = None; "
        "cli.run_verb('train', 'here', [])"
    )
    done = python("-c", source)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ModuleNotFoundError: import of tf_pcl.training")


def texts(path):
    """The string literals of a file, docstrings among them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_only_the_command_line_speaks_of_flags():
    # options.py, cli.py and the verbs make flags of the parameters that all else speaks of.
    package = ROOT / "tf_pcl"
    paths = set(package.rglob("*.py")) - {package / "options.py", package / "cli.py"}
    paths -= set((package / "verbs").glob("*.py"))
    assert len(paths) > 50
    for path in paths:
        for text in texts(path):
            # Flags of other programs; variables of a style sheet begin as flags do.
            text = text.replace("tensorboard --logdir", "").replace("var(--", "")
            text = text.replace("--tf_xla_", "")
            assert not re.search(r"--[a-z]", text), f"{path}: {text}"
