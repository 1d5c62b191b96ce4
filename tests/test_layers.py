"""The architecture: who imports whom, and that the training step lives once."""

import ast
import pathlib
import re

PACKAGE = pathlib.Path(__file__).parent.parent / "tf_pcl"
# A module imports only from layers before its own; modules of one layer stand side by side.
LAYERS = [
    {"errors", "compat", "console"},
    {"ranges"},
    {"losses", "schedules", "ema", "optimizer", "data", "surgery"},
    {"networks"},
    {"methods"},
    {"options"},
    {"training"},
    {"deploy"},
    {"study"},
    {"verbs"},
    {"cli"},
    {"__main__"},
]
# What may be used within a layer.
SIDE_BY_SIDE = {("optimizer", "schedules")}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        part = path.relative_to(PACKAGE).parts[0].replace(".py", "")
        if part != "__init__":
            yield path, part


def imported(path):
    """Parts of tf_pcl that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "tf_pcl":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [a.name for a in node.names]
            )
            yield from (name.split(".")[1] for name in names if name.startswith("tf_pcl."))


def test_every_module_imports_only_what_stands_before_it():
    level = {part: i for i, parts in enumerate(LAYERS) for part in parts}
    seen = 0
    for path, part in modules():
        for other in imported(path):
            seen += 1
            assert other == part or level[other] < level[part] or (part, other) in SIDE_BY_SIDE, (
                f"{path} imports {other}"
            )
    assert seen > 20


def test_one_training_step_and_one_reader_of_flags():
    steps = [
        path.name
        for path, _ in modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name in ("train_step", "test_step")
    ]
    assert steps == ["distiller.py", "distiller.py"]
    # The command line fills FLAGS; the options of a run and the verbs are read from it.
    readers = {path.name for path, part in modules() if re.search(r"\bFLAGS\b", path.read_text())}
    assert readers - {path.name for path, part in modules() if part == "verbs"} == {
        "cli.py",
        "options.py",
    }


def test_only_public_keras():
    for path, _ in modules():
        assert "keras.src" not in path.read_text()


def test_a_method_is_named_in_its_file_and_the_table_alone():
    from tf_pcl.methods import METHODS

    for path, part in modules():
        if part == "methods" and path.stem in (*METHODS, "__init__"):
            continue
        # The default of --method is named once, the program like the first method; "one" and
        # "baseline" are words of the language too.
        text = path.read_text().replace('method: str = _flag("pcl"', "").replace("tf-pcl", "")
        for name in METHODS:
            assert not re.search(
                rf'"{name}"' if name in ("one", "baseline") else rf"\b{name}\b", text
            ), f"{path} knows {name}"
