"""TensorBoard's page of a folder of runs: what stands first, HParams, pictures."""

import numpy as np
import pytest
import tensorflow as tf
from tensorboard import context
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import backend_context, metadata

from tf_pcl.options import Options
from tf_pcl.training import events, pictures, run
from tf_pcl.training.workdir import Workdir

ROWS = [
    {"epoch": 1, "step": 4, "ema_decay": 0.5, "error/peer_1": 40.0, "val_error/mean_peer_1": 50.0},
    {"epoch": 2, "step": 8, "ema_decay": 0.6, "error/peer_1": 30.0, "val_error/mean_peer_1": 45.5},
]
SETTINGS = {"method": "pcl", "epochs": 2, "learning_rate": 0.1, "flip": True, "drops": (1.0, 2.0)}


def read(workdir, split):
    """{tag: [step]} of one folder of event files, and the hparams in it."""
    found, asked = {}, []
    for path in events._files(workdir, split):
        for event in tf.compat.v1.train.summary_iterator(path):
            for value in event.summary.value:
                if value.tag == metadata.SESSION_START_INFO_TAG:
                    content = value.metadata.plugin_data.content
                    asked.append(metadata.parse_session_start_info_plugin_data(content))
                else:
                    found.setdefault(value.tag, []).append(event.step)
    return found, asked


def test_the_deployed_error_is_the_first_tag_and_no_column_of_its_own(tmp_path):
    workdir = Workdir(str(tmp_path))
    for _ in range(2):  # A second process writes everything anew.
        log = events.Events(workdir, ROWS, "mean_peer_1", SETTINGS)
        log.write_image("test_images/one", np.zeros([4, 4, 3], np.uint8), "test", 8)
        log.flush()
    test, _ = read(workdir, "test")
    train, _ = read(workdir, "train")
    assert sorted({*test, *train})[0] == "deployed_error"
    assert test["deployed_error"] == test["error/mean_peer_1"] == [4, 8]
    assert test["test_images/one"] == [8] and "deployed_error" not in train
    assert events.read(workdir) == {
        row["step"]: pytest.approx({k: v for k, v in row.items() if k != "epoch"}) for row in ROWS
    }
    _, (asked,) = read(workdir, "")
    assert asked.group_name == workdir.path
    assert {k: v.WhichOneof("kind") for k, v in asked.hparams.items()} == {
        "method": "string_value",
        "epochs": "number_value",
        "learning_rate": "number_value",
        "flip": "bool_value",
        "drops": "string_value",
    }


def test_the_test_error_of_a_run_with_validation_images_is_one_point(tmp_path):
    workdir = Workdir(str(tmp_path))
    for _ in range(2):
        log = events.Events(workdir, ROWS, "mean_peer_1", SETTINGS, "validation")
        log.write_tested(4, 47.5)
        log.flush()
    assert read(workdir, "test")[0] == {"deployed_error": [4]}
    assert read(workdir, "validation")[0]["deployed_error"] == [4, 8]
    # Where metrics.csv was lost, it is no row's.
    assert events.read(workdir)[4]["val_error/mean_peer_1"] == 50.0
    # HParams finds it by itself.
    metrics = {(m.name.group, m.name.tag): m for m in shown_metrics(tmp_path)}
    assert {("test", "deployed_error"), ("validation", "deployed_error")} <= metrics.keys()


def shown_metrics(folder):
    """What TensorBoard's HParams page has columns for."""
    multiplexer = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(folder))
    backend = backend_context.Context(base_plugin.TBContext(data_provider=provider))
    asked = context.RequestContext()
    found = backend.hparams_metadata(asked, "")
    return backend.experiment_from_metadata(asked, "", True, found, []).metric_infos


def counts(labels, predicted, classes):
    found = np.zeros([classes, classes], int)
    np.add.at(found, (labels, predicted), 1)
    return found


@pytest.mark.parametrize("count", [2, 12, 60])
def test_pictures_of_the_answers(count):
    random = np.random.RandomState(0)
    labels = random.randint(0, count - 1, 400)  # The last class has no images.
    predicted = np.where(random.rand(400) < 0.3, random.randint(0, count, 400), labels)
    names = ["$dollar$", "long " * 20, *map(str, range(count))][:count]
    for draw in (pictures.confusion_matrix, pictures.class_errors):
        image, right = (
            pictures.pixels(draw(counts(labels, answers, count), names))
            for answers in (predicted, labels)
        )
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[-1] == 3
        assert 100 < min(image.shape[:2]) and max(image.shape[:2]) < 1300
        # It shows the answers.
        assert (right != image).any()


def test_pictures_of_classes_of_any_name():
    names = [
        "ni\udcf1o",
        "two\nlines",
        "$\\nothing$",
        *(f"the same first letters, {i}" for i in "ab"),
    ]
    labels = np.arange(5)
    for draw in (pictures.confusion_matrix, pictures.class_errors):
        assert pictures.pixels(draw(counts(labels, labels[::-1], 5), names)).ndim == 3


@pytest.mark.slow
def test_a_run_has_its_flags_and_pictures_once_whatever_happens(tmp_path):
    options = Options(
        dataset="digits",
        network="resnet8",
        method="baseline",
        epochs=1,
        batch_size=256,
        train_examples=512,
        workdir=str(tmp_path / "run"),
    )
    for _ in range(2):
        run.run(options)
    workdir = Workdir(options.workdir)
    test, _ = read(workdir, "test")
    pictured = {f"test_images/{name}": [2] for name in ("confusion_matrix", "class_errors")}
    assert pictured.items() <= test.items()
    assert all(steps == [2] for steps in test.values())
    _, (asked,) = read(workdir, "")
    assert asked.hparams["optimizer"].string_value == "sgd"
    assert asked.hparams["epochs"].number_value == 1 and "workdir" not in asked.hparams
