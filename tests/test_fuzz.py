"""Random command lines and folders of data: each is fit for a run, or refused in one line."""

import contextlib
import dataclasses
import os
import pathlib
import string
import tempfile

import numpy as np
import pytest
import tensorflow as tf
from absl import flags
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from tf_pcl import cli, data, options
from tf_pcl.data import datasets, splits
from tf_pcl.errors import UserError
from tf_pcl.methods import METHODS
from tf_pcl.training import run
from tf_pcl.training.workdir import Workdir
from tf_pcl.verbs import train

EXAMPLES = int(os.environ.get("TF_PCL_FUZZ", 50))
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
KINDS = {field.name: options.kind_of(field) for field in dataclasses.fields(options.Options)}


@contextlib.contextmanager
def nothing_is_written():
    """Within an empty folder, in which nothing may be when it is left."""
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield pathlib.Path(folder)
            assert os.listdir(folder) == []
        finally:
            os.chdir(here)


def ends(check):
    """Calls `check` and tells how it ended; anything but a refusal in one line is an error."""
    try:
        check()
    except (UserError, flags.Error) as e:
        text = e.as_flags(KINDS) if isinstance(e, UserError) else " ".join(str(e).split())
        assert text and "\n" not in text and len(text) < 3000
        event("refused")
    else:
        event("valid")


NUMBERS = st.one_of(
    st.integers(-3, 400).map(str),
    st.integers(0, 10**40).map(str),
    st.floats().map(str),
    st.sampled_from(
        ["10^40", "1e400", "-0", "nan", "0x10", "1_000", "١", "1e-9", "0.5", "0.1,0.2"]
    ),
)
NAMES = st.sampled_from(
    [
        "digits",
        "image_folder",
        "mnist/",
        "mnist:9.9.9",
        "resnet8",
        "resnet8,resnet8",
        "applications.MobileNet",
        "applications.",
        "os:getcwd",
        "nowhere:nothing",
        ":",
        "a:b:c",
        "imagenet",
        "1epoch",
        "0steps",
        "99999999999999999999steps",
        "~nobody/x",
        "gs://a/b",
        ".",
        "..",
        "/dev/null/x",
        "a" * 300,
        *METHODS,
    ]
)
TEXTS = st.one_of(NAMES, NUMBERS, st.text(max_size=12), st.text(string.printable, max_size=30))


def value_of(kind):
    if isinstance(kind, tuple):
        return st.one_of(st.sampled_from(kind), TEXTS)
    if kind is bool:
        return st.one_of(st.sampled_from(["true", "false"]), TEXTS)
    likely = st.sampled_from(["resnet8"] if kind is str else ["1", "2", "0.5"])
    return st.one_of(likely, likely, NUMBERS, TEXTS)


FLAG = st.one_of(
    *[
        value_of(kind).map(lambda value, name=name: f"--{name}={value}")
        for name, kind in KINDS.items()
    ],
    st.sampled_from(
        ["--nojit_compile", "--deterministic", "--flagfile=.", "--flagfile", "--", "-x"]
    ),
    st.sampled_from([f"--method={name}" for name in METHODS]),
    TEXTS,
)


def prepared(arguments):
    """Does with a command line what a run does before it loads the data."""
    values = flags.FlagValues()
    options.define_flags(values)
    train.refuse_words(values(["train.py", *cli._with_recipes(arguments)])[1:])
    chosen = options.from_flags(values)
    run._check_names(chosen)
    Workdir.of_run(chosen).check(chosen)
    asked = run._data_asked(chosen)
    datasets._checked(asked.pop("name"), splits.Request(**asked))


@pytest.mark.slow
@FUZZ
@given(st.lists(FLAG, max_size=4))
def test_command_lines(arguments):
    with nothing_is_written():
        ends(lambda: prepared(arguments))


def encoded(shape, form=tf.io.encode_png, dtype=np.uint8):
    return form(np.random.RandomState(0).randint(0, 256, shape).astype(dtype)).numpy()


PNG, JPEG = encoded((8, 8, 3)), encoded((8, 8, 3), tf.io.encode_jpeg)
CONTENTS = st.one_of(
    st.just(PNG),
    st.sampled_from(
        [
            JPEG,
            encoded((8, 8, 1)),
            encoded((8, 8, 4)),
            encoded((8, 8, 3), dtype=np.uint16),
            encoded((9, 5, 3)),
            encoded((1, 1, 3)),
            PNG[:-20],
            JPEG[:-20],
            JPEG[:30],
            PNG[:20],
            # A header that promises 2^31 pixels a side.
            PNG[:16] + b"\x7f\xff\xff\xff" * 2 + PNG[24:],
            b"",
            b"GIF89a",
            b"no image",
        ]
    ),
    st.binary(max_size=40),
)
PARTS = st.sampled_from(
    ["a", "b", "c", "Ä", "with space", "two\nlines", "[x]*", ".hidden", "\udcff"]
)
FILES = st.dictionaries(
    st.sampled_from(["1.png", "2.png", "3.jpg", "4.JPEG", "5.bmp", "x.txt", ".DS_Store", "d.png/"]),
    CONTENTS,
    max_size=3,
)
FOLDERS = st.dictionaries(
    st.sampled_from(["train", "test", "val", "validation", "other"]),
    st.dictionaries(PARTS, FILES, max_size=4),
    max_size=3,
)
GOOD = {name: {part: {"1.png": PNG} for part in "ab"} for name in ("train", "test")}


def write(folder, tree):
    for name, below in tree.items():
        path = folder / os.fsdecode(os.fsencode(name))
        if isinstance(below, dict) or name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
            write(path, below if isinstance(below, dict) else {})
        else:
            path.write_bytes(below)


@pytest.mark.slow
@FUZZ
@given(
    st.one_of(FOLDERS, FOLDERS.map(lambda tree: {**tree, **GOOD}), st.just(GOOD), FILES),
    FOLDERS,
    st.sampled_from([None, 4, 16]),
    st.sampled_from(["fail", "skip"]),
)
def test_folders_of_data(tree, more, image_size, on_bad_image):
    with nothing_is_written() as folder:
        with tempfile.TemporaryDirectory() as images:
            root = pathlib.Path(images)
            write(root, tree)
            for name in set(more) & set(tree):  # Some classes beside good ones.
                if isinstance(more[name], dict):
                    write(root / name, more[name])
            before = sorted(map(str, root.rglob("*")))
            ends(lambda: loaded(images, image_size, on_bad_image))
            assert sorted(map(str, root.rglob("*"))) == before
        assert folder.exists()


def loaded(folder, image_size, on_bad_image):
    found = data.load("image_folder", folder, image_size, on_bad_image=on_bad_image)
    assert len(found.classes) >= 2 and len(found.train) and len(found.test)
    assert np.isfinite([*found.mean, *found.std]).all()
    views, labels = next(iter(data.train_batches(found, 2, 1, views=1)))
    assert views.shape == (2, 1, *found.image_shape) and labels.shape == (2,)
