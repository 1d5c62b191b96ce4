"""What a run costs by arithmetic, and where a run records it."""

import numpy as np
import pytest
import tensorflow as tf
from helpers import CLASSES, SHAPE, flop, without_norm
from tensorflow import keras

from tf_pcl import methods, networks
from tf_pcl.errors import UserError
from tf_pcl.methods.cost import training_flop
from tf_pcl.options import Options
from tf_pcl.study.cost import cost_of, stages_of


def options(method, **given):
    small = dict(network="helpers:without_norm", dataset="digits", epochs=2, batch_size=480)
    return Options(method=method, **{**small, **given})


def test_a_method_costs_three_passes_of_what_it_trains_and_one_of_a_teacher():
    one = flop(without_norm(SHAPE, CLASSES))
    cost = lambda method, **given: [
        s.gflop_per_image * 1e9 for s in stages_of(options(method, **given))
    ]
    assert cost("baseline") == [3 * one]
    assert cost("dml", peers=4) == [12 * one]
    assert cost("dml", network="helpers:without_norm,helpers:without_norm") == [6 * one]
    assert cost("ban", generations=3) == [3 * one, 4 * one, 4 * one]
    assert cost("ctsl_mkt") == [3 * one, 3 * one, 8 * one]
    assert cost("kd", teacher_network="helpers:without_norm") == [3 * one, 4 * one]
    # Three peers with views of their own, and their mean; the ensemble classifies 3·16 features.
    joint = 2 * 3 * 16 * CLASSES
    assert cost("pcl") == [4 * (3 * one + joint)]
    assert cost("pcl", peer_teacher="mutual", ensemble_teacher="none") == [9 * one]


def test_all_images_of_all_epochs_and_stages_count():
    run = options("kd", teacher_network="helpers:without_norm")
    teacher, student = stages_of(run)
    # 1,437 training images are two batches of 480.
    for stage, name in (teacher, "teacher"), (student, "student"):
        assert (stage.name, stage.network) == (name, "helpers:without_norm")
        assert stage.gflop == pytest.approx(stage.gflop_per_image * 960 * 2)
    assert cost_of(run) == teacher.gflop + student.gflop
    fewer = options("baseline", train_examples=500, epochs=3)
    assert cost_of(fewer) == pytest.approx(teacher.gflop * 480 * 3 / 960 / 2)
    with pytest.raises(UserError, match="`batch_size=480`: it is more than the 400"):
        cost_of(options("baseline", train_examples=400))


@pytest.mark.slow
def test_the_cost_of_the_papers_recipe_is_known_without_its_data():
    pcl = cost_of(Options())
    assert pcl == pytest.approx(1.66 * 117_000 * 128, rel=1e-3)
    assert pcl / cost_of(Options(method="baseline")) == pytest.approx(4.0, rel=1e-3)


def test_counting_changes_neither_statistics_nor_random_numbers():
    def network():
        images = x = keras.Input(SHAPE)
        x = keras.layers.Conv2D(4, 3)(x)
        x = keras.layers.Dropout(0.5)(keras.layers.BatchNormalization()(x))
        x = keras.layers.GlobalAveragePooling2D()(x + 1.0)
        return keras.Model(images, keras.layers.Dense(CLASSES)(x))

    drawn = []
    for count in (False, True):
        keras.utils.set_random_seed(3)
        model = methods.DML(network, preprocess=networks.standardise([78.0], [96.0]))
        before = model.get_weights()
        if count:
            assert training_flop(model) == 3 * 3 * flop(network())
        np.testing.assert_equal(model.get_weights(), before)
        views = tf.cast(np.random.RandomState(0).randint(0, 256, (2, 1, *SHAPE)), tf.uint8)
        drawn.append(model.students(views, True)["peer_1"].logits.numpy())
    np.testing.assert_array_equal(*drawn)
