"""Judging and using a trained network: metrics, corruptions, evaluations, predictions."""

import colorsys
import csv
import dataclasses
import io
import json
import logging
import os
import pathlib
import shutil
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from helpers import noise, with_labels
from pages import python
from PIL import Image
from tensorflow import keras

from tf_pcl.data import image_files, load, storage
from tf_pcl.data.storage import Arrays, Stream
from tf_pcl.deploy import artifacts, corruptions, evaluate, figures, metrics, predict, runtimes
from tf_pcl.errors import UserError
from tf_pcl.options import Options
from tf_pcl.training import export, report
from tf_pcl.training.workdir import Workdir
from tf_pcl.verbs import VERBS
from tf_pcl.verbs import evaluate as verb

LOGITS = (3 * np.random.RandomState(0).randn(200, 7)).astype(np.float32)
LABELS = np.random.RandomState(1).randint(0, 7, 200)
# Half of the predictions are right, and some logits are equal.
LABELS[::2] = LOGITS[::2].argmax(1)
LOGITS[:5] = 1


def softmax(row):
    z = [float(value) for value in row]
    total = sum(np.exp(value - max(z)) for value in z)
    return [np.exp(value - max(z)) / total for value in z]


def test_metrics_are_those_of_the_equations():
    wrong, wrong5, loss, bins, counts = 0, 0, 0.0, {}, np.zeros([7, 7], int)
    for row, label in zip(LOGITS, LABELS):
        p = softmax(row)
        order = sorted(range(7), key=lambda k: (-row[k], k))
        wrong += order[0] != label
        wrong5 += label not in order[:5]
        loss -= np.log(p[label])
        counts[label, order[0]] += 1
        bins.setdefault(int(np.ceil(max(p) * 15)), []).append((max(p), order[0] == label))
    gaps = [
        len(b) * abs(np.mean([c for c, _ in b]) - np.mean([r for _, r in b])) for b in bins.values()
    ]
    assert metrics.error(LOGITS, LABELS) == pytest.approx(100 * wrong / 200, abs=1e-12)
    assert metrics.error(LOGITS, LABELS, 5) == pytest.approx(100 * wrong5 / 200, abs=1e-12)
    assert 0 < wrong5 < wrong
    assert metrics.nll(LOGITS, LABELS) == pytest.approx(loss / 200, rel=1e-12)
    found = metrics.reliability(LOGITS, LABELS)
    assert found.error() == pytest.approx(sum(gaps) / 200, rel=1e-12)
    assert found.images.sum() == 200
    assert {b + 1: n for b, n in enumerate(found.images) if n} == {
        b: len(e) for b, e in bins.items()
    }
    np.testing.assert_array_equal(metrics.confusion(LOGITS, LABELS), counts)


def test_a_certain_prediction_is_in_the_last_bin_and_costs_what_it_costs():
    logits, labels = np.float32([[1000, 0], [1000, 0]]), np.array([0, 1])
    assert metrics.nll(logits, labels) == 500
    assert metrics.reliability(logits, labels).images.tolist() == [0] * 14 + [2]
    assert metrics.reliability(logits, labels).error() == 0.5


def blurred(images, sigma):
    """Gaussian blur with a kernel of four deviations and repeated borders, float64."""
    reach = int(4 * sigma + 0.5)
    kernel = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    x = images.astype(np.float64)
    for axis in (1, 2):
        pad = [(0, 0)] * 4
        pad[axis] = (reach, reach)
        x = np.apply_along_axis(np.convolve, axis, np.pad(x, pad, mode="edge"), kernel, "valid")
    return x


def brightened(images, more):
    x = images.astype(np.float64)
    for pixel in x.reshape(-1, 3):
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        pixel[:] = colorsys.hsv_to_rgb(h, s, min(v + more, 1))
    return x


def expected(name, x, value, seed, first):
    if name == "gaussian noise":
        draws = [
            np.random.RandomState([seed, first + i]).randn(*x.shape[1:]) for i in range(len(x))
        ]
        return x + value * np.stack(draws)
    if name == "blur":
        return blurred(x, value)
    if name == "contrast":
        mean = x.mean((1, 2), keepdims=True)
        return mean + value * (x - mean)
    return brightened(x, value)


def test_a_classifier_that_is_right_as_often_as_it_is_sure():
    """Two bins by hand: 0.9 sure and right in 3 of 4, 0.6 sure and right in 1 of 2."""
    sure = np.array([0.9, 0.9, 0.9, 0.9, 0.6, 0.6])
    labels = np.array([0, 0, 0, 1, 0, 1])
    found = metrics.reliability(np.log(np.stack([sure, 1 - sure], 1)), labels, bins=10)
    assert found.images.tolist() == [0] * 5 + [2, 0, 0, 4, 0]
    assert found.accuracy[8] == 0.75 and found.confidence[5] == pytest.approx(0.6)
    assert found.error() == pytest.approx((4 * 0.15 + 2 * 0.1) / 6)
    # Labels drawn from the probabilities themselves.
    random = np.random.RandomState(0)
    p = random.dirichlet([0.5] * 4, 20_000)
    drawn = (p.cumsum(1) < random.rand(len(p), 1)).sum(1)
    assert metrics.reliability(np.log(p + 1e-300), drawn).error() < 0.02


@pytest.mark.parametrize("name", ["gaussian noise", "blur", "contrast", "brightness"])
def test_corruptions_are_those_of_the_equations(name):
    images = noise(3, 16, 12, 3)
    for strength in (1, 5):
        value = corruptions.CORRUPTIONS[name].small[strength - 1]
        whole = 255 * np.clip(expected(name, images / 255, value, 4, 10), 0, 1)
        found = corruptions.corrupted(images, name, strength, first=10, seed=4)
        assert found.dtype == np.uint8
        # The rounding of halves.
        assert np.abs(found - whole).max() < 0.51


def test_jpeg_is_that_of_another_library():
    image = np.asarray(Image.fromarray(noise(6, 6, 3)).resize((48, 48)))
    for strength, quality in ((1, 80), (5, 40)):
        packed = io.BytesIO()
        Image.fromarray(image).save(packed, "jpeg", quality=quality)
        theirs = np.asarray(Image.open(packed)).astype(int)
        found = corruptions.corrupted(image[None], "JPEG", strength)[0]
        assert np.abs(found - theirs).mean() < 1 < np.abs(found - image.astype(int)).mean()


@pytest.mark.parametrize("shape", [(8, 8, 1), (70, 65, 3)])
def test_corruptions_know_the_number_and_the_seed_not_the_batch(shape):
    images = noise(4, *shape)
    for name, row in corruptions.CORRUPTIONS.items():
        assert len(row.small) == len(row.large) == corruptions.STRENGTHS
        whole = corruptions.corrupted(images, name, 3, seed=1)
        part = corruptions.corrupted(images[2:], name, 3, first=2, seed=1)
        np.testing.assert_array_equal(whole[2:], part)
        other = corruptions.corrupted(images, name, 3, seed=2)
        assert (whole != other).any() == (name == "gaussian noise")
        assert whole.shape == images.shape and (whole != images).any()


class Fixed(runtimes.Runtime):
    """A network that says LOGITS of images that carry their numbers, and that knows its names."""

    kind = "fixed"

    def __init__(self, folder, names, shape=(8, 8, 1)):
        (folder / "labels.txt").write_text("\n".join(names))
        run = lambda images: LOGITS[images[:, 0, 0, 0]]
        super().__init__(str(folder), [None, *shape], len(names), run)


NAMES = ["a,b", "$x_1$", "[red]", "ä", "e", "f", "a name that is too long for a picture"]


def numbered(classes=NAMES):
    images = noise(200, 8, 8, 1)
    images[:, 0, 0, 0] = np.arange(200)
    return dataclasses.replace(with_labels(images, LABELS), classes=tuple(classes))


def test_an_evaluation_is_written(tmp_path):
    runtime, seen = Fixed(tmp_path, NAMES), []
    watch = lambda batches, total: (seen.append(total), batches)[1]
    found = evaluate.evaluate(runtime, numbered(), worst=5, watch=watch)
    folder = tmp_path / "made" / "evaluation"
    evaluate.write(found, str(folder), {"network": "n"})
    assert seen == [2]
    names = "classes.csv confusion.csv confusion.png evaluation.json predictions.npz"
    names += " worst.csv worst.png"
    assert sorted(path.name for path in folder.iterdir()) == names.split()
    with np.load(folder / "predictions.npz") as kept:
        assert (kept["labels"].dtype, kept["logits"].dtype) == (np.int64, np.float32)
        np.testing.assert_array_equal(kept["labels"], LABELS)
        np.testing.assert_array_equal(kept["logits"], LOGITS)
    written = json.loads((folder / "evaluation.json").read_text())
    assert written["network"] == "n" and written["images"] == 200
    assert written["error"] == metrics.error(LOGITS, LABELS)
    assert written["top5_error"] == metrics.error(LOGITS, LABELS, 5)
    counts = metrics.confusion(LOGITS, LABELS)
    for k, row in enumerate(written["classes"]):
        errors = counts[k].sum() - counts[k, k]
        assert (row["class"], row["images"]) == (NAMES[k], counts[k].sum())
        assert row["error"] == pytest.approx(100 * errors / counts[k].sum())
        assert counts[k, NAMES.index(row["taken_for"])] == row["taken_for_images"]
        assert row["taken_for"] != NAMES[k]
    table = [*csv.reader((folder / "confusion.csv").open(encoding="utf-8"))]
    assert table[0] == ["class", *NAMES] and [row[0] for row in table[1:]] == NAMES
    assert [[int(cell) for cell in row[1:]] for row in table[1:]] == counts.tolist()


def test_the_worst_images_are_the_most_confident_of_the_wrong_ones(tmp_path):
    wrong = evaluate.evaluate(Fixed(tmp_path, NAMES), numbered(), worst=5).worst
    p = np.array([softmax(row) for row in LOGITS])
    order = sorted(np.flatnonzero(p.argmax(1) != LABELS), key=lambda i: -p[i].max())[:5]
    assert wrong.index.tolist() == order and wrong.images[:, 0, 0, 0].tolist() == order
    np.testing.assert_allclose(wrong.confidence, p[order].max(1), rtol=1e-6)
    assert (wrong.labels.tolist(), wrong.predicted.tolist()) == (
        LABELS[order].tolist(),
        p[order].argmax(1).tolist(),
    )


def test_a_stream_is_read_again_for_the_worst_images(tmp_path):
    data, runtime = numbered(), Fixed(tmp_path, NAMES)
    examples = tf.data.Dataset.from_tensor_slices((data.test.images, LABELS))
    stream = dataclasses.replace(data, test=Stream(examples, 200, lambda image: image))
    kept, streamed = (evaluate.evaluate(runtime, of).worst for of in (data, stream))
    np.testing.assert_array_equal(kept.images, streamed.images)
    assert len(streamed.images) == 24


def test_corrupted_images_are_judged_by_their_own_labels(tmp_path):
    # The network knows the brightness alone, and the label is whether it is above the middle.
    (tmp_path / "labels.txt").write_text("dark\nbright\n")
    run = lambda x: np.stack([0 * (m := x.mean((1, 2, 3)) - 127.5), m], 1).astype(np.float32)
    runtime = runtimes.Runtime(str(tmp_path), [None, 8, 8, 1], 2, run)
    images = np.repeat(np.arange(0, 250, dtype=np.uint8), 64).reshape(250, 8, 8, 1)
    data = numbered(["dark", "bright"])
    data = dataclasses.replace(data, test=Arrays(images, np.arange(250) > 127))
    found = evaluate.evaluate(runtime, data, corruptions=True, worst=0)
    assert found.summary()["error"] == 0 and found.summary()["top5_error"] is None
    steps = corruptions.CORRUPTIONS["brightness"].small
    # Those below the middle by less than what is added are mistaken.
    expected = [100 * np.mean((np.arange(128) / 255 + s) * 255 > 127.99) * 128 / 250 for s in steps]
    np.testing.assert_allclose(found.corruptions["brightness"], expected, atol=0.41)
    assert found.corruptions["contrast"] == found.corruptions["blur"] == [0.0] * 5
    evaluate.write(found, str(tmp_path / "out"))
    rows = [*csv.reader((tmp_path / "out" / "corruptions.csv").open())]
    assert [row[0] for row in rows[1:]] == [*corruptions.CORRUPTIONS] and len(rows[1]) == 6
    assert Image.open(tmp_path / "out" / "corruptions.png").size == (720, 480)
    # No image is wrong, and there is a picture all the same.
    assert Image.open(tmp_path / "out" / "worst.png").size[0] > 0


def test_what_does_not_fit_is_refused(tmp_path):
    data = numbered()
    for shape, names, text in (
        ((8, 9, 1), NAMES, "have the shape 8×8×1, .* takes 8×9×1"),
        ((8, 8, 1), NAMES[:-1], "knows 6 classes, and noise has 7"),
        ((8, 8, 1), [*NAMES[:-1], "other"], "number 6 is other, there a name that is too long"),
    ):
        with pytest.raises(UserError, match=text):
            evaluate.evaluate(Fixed(tmp_path, names, shape), data)
    with pytest.raises(UserError, match="`split=validation`: noise has none"):
        evaluate.evaluate(Fixed(tmp_path, NAMES), data, split="validation")
    runtime = Fixed(tmp_path, NAMES)
    runtime._run = lambda images: np.where(images[:, 0, 0] == 7, np.nan, LOGITS[: len(images)])
    with pytest.raises(UserError, match="not finite for 1 of 200 images, .* number 7"):
        evaluate.evaluate(runtime, data)
    found = evaluate.evaluate(Fixed(tmp_path, NAMES), data)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="`output=.*cannot be written"):
        evaluate.write(found, str(tmp_path / "file"))


def test_images_that_break_meanwhile_are_not_taken_for_others(make_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "MEMORY_LIMIT", 0)
    part = {name: [noise(8, 8, 3, seed=k)] * 3 for k, name in enumerate("ab")}
    folder = make_folder({"train": part, "test": part})
    photos = load("image_folder", folder, on_bad_image="skip")
    with open(f"{folder}/test/a/0.png", "wb") as f:
        f.write(b"x")
    run = lambda images: np.zeros([len(images), 2], np.float32)
    runtime = runtimes.Runtime(str(tmp_path), [None, 8, 8, 3], 2, run)
    with pytest.raises(UserError, match="1 of 6 images of image_folder have become unreadable"):
        evaluate.evaluate(runtime, photos)
    network = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten()])
    network.add(keras.layers.Dense(2, kernel_initializer="zeros"))
    table = artifacts.compare(network, {}, photos)
    # Two of the five that are left are of class a, which wins ties.
    assert (table["test_images"], table["original"]["error"]) == (5, 60.0)


def jpeg(image, turn=1, mode="RGB"):
    packed, picture = io.BytesIO(), Image.fromarray(image).convert(mode)
    exif = picture.getexif()
    exif[0x0112] = turn
    picture.save(packed, "jpeg", exif=exif, quality=95)
    return packed.getvalue()


def png(image):
    return tf.io.encode_png(image).numpy()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of images of each kind, and what is none."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more" / "deep").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    files = {
        "a.jpg": jpeg(noise(20, 30, 3)),
        "b [1].JPG": jpeg(noise(30, 20, 3, seed=1), turn=6),
        "grey.jpg": jpeg(noise(12, 12, 3), mode="L"),
        "more/alpha.png": png(noise(9, 7, 4)),
        "more/deep/sixteen.png": png(noise(9, 7, 3).astype(np.uint16) * 257),
        "more/deep/small.png": png(noise(8, 8, 3)),
        "more/notes.txt": b"no image",
        ".hidden/c.png": png(noise(8, 8, 3)),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_files_are_found(photos):
    relative = lambda found: [os.path.relpath(path, photos) for path in found]
    below = ["a.jpg", "b [1].JPG", "grey.jpg", "more/alpha.png"]
    below += ["more/deep/sixteen.png", "more/deep/small.png"]
    assert relative(predict.find([str(photos)])) == below
    # A name with brackets is a file where there is one; each file comes once.
    names = [str(photos / "b [1].JPG"), str(photos / "**/*.png"), str(photos / "more")]
    assert relative(predict.find(names)) == below[1:2] + below[3:]
    # What is not there is named later, with the other bad files.
    assert relative(predict.find([str(photos / "a.jpg"), str(photos / "x.png")])) == [
        "a.jpg",
        "x.png",
    ]
    (photos / "empty").mkdir(exist_ok=True)
    for nothing in ("absent", "*.absent", "empty"):
        with pytest.raises(UserError, match="no image is found .*: give files"):
            predict.find([str(photos / nothing)])


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 8, 3), (6, 9, 1)])
def test_predictions_are_those_of_the_served_network(photos, tmp_path, shape):
    images = keras.Input(shape, dtype="uint8")
    x = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(images))
    model = keras.Model(images, keras.layers.Dense(4)(x))
    names = ["cat", "dog", "bird", "fish"]
    runtime = runtimes.load(export.export(model, names, str(tmp_path / "export")))
    paths = predict.find([str(photos)])
    for one, path in zip(predict.predict(runtime, paths, top_k=9), paths):
        with open(path, "rb") as f:
            p = np.array(softmax(runtime.logits_of_bytes([f.read()])[0]))
        assert (one.path, one.problem) == (path, None)
        assert one.classes == tuple(names[k] for k in np.argsort(-p))
        np.testing.assert_allclose(one.probabilities, np.sort(p)[::-1], rtol=1e-4)


@pytest.mark.parametrize("channels", [3, 1])
def test_webp_and_tiff_are_predicted_as_they_are_trained_on(channels, tmp_path):
    plain, turned = noise(8, 8, 3), Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(np.rot90(plain)).save(tmp_path / "a.webp", lossless=True, exif=turned)
    Image.fromarray(plain).save(tmp_path / "b.TIF", format="TIFF")
    (tmp_path / "c.png").write_bytes(png(plain))
    images = []
    run = lambda part: images.extend(part) or np.zeros([len(part), 2], np.float32)
    runtime = runtimes.Runtime(str(tmp_path), [None, 8, 8, channels], 2, run)
    paths = predict.find([str(tmp_path)])
    assert [os.path.basename(path) for path in paths] == ["a.webp", "b.TIF", "c.png"]
    assert [one.problem for one in predict.predict(runtime, paths)] == [None] * 3
    for image in images:
        # Grey may be rounded otherwise.
        np.testing.assert_allclose(image, images[2], atol=0 if channels == 3 else 1)
    assert channels == 1 or np.array_equal(images[0], plain)


def test_bad_files_are_named_and_the_rest_is_done(photos, tmp_path):
    whole = (photos / "a.jpg").read_bytes()
    (tmp_path / "short.jpg").write_bytes(whole[: len(whole) // 3])
    (tmp_path / "damaged.png").write_bytes(png(noise(8, 8, 3))[:60] + bytes(100))
    names = ["absent.png", "short.jpg", "good.jpg", "damaged.png", "empty.jpg", "folder.txt"]
    (tmp_path / "good.jpg").write_bytes(whole)
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "labels.txt").write_text("x\ny")
    run = lambda images: np.stack([images.mean((1, 2, 3)), 0 * images[:, 0, 0, 0]], 1)
    runtime = runtimes.Runtime(str(tmp_path), [None, 8, 8, 3], 2, run)
    found = [*predict.predict(runtime, [str(tmp_path / name) for name in names], top_k=1)]
    assert [one.problem for one in found] == [
        "no such file or directory",
        "the image is damaged or ends early",
        None,
        "the image is damaged or ends early",
        "not a JPEG, PNG, GIF or BMP file",
        "is a directory",
    ]
    assert (found[2].classes, len(found[2].probabilities)) == (("x",), 1)


def test_the_network_is_looked_for_before_the_images_and_loaded_after_them(tmp_path):
    (tmp_path / "photo.png").write_bytes(png(noise(8, 8, 3)))
    (tmp_path / "network.tflite").write_bytes(b"")
    photo, network, absent = (str(tmp_path / n) for n in ("photo.png", "network.tflite", "absent"))
    for arguments, text in {
        (): "0 paths were given: give a network",
        (photo,): "1 paths were given: give a network",
        (absent, photo): f"the network {absent} is not there",
        (absent, absent): f"the network {absent} is not there",
        (photo, photo): f"the network {photo} has no suffix of a known format",
        (network, absent): rf"no image is found \({absent}\)",
        (network, photo): f"{network} cannot be loaded",
    }.items():
        with pytest.raises(UserError, match=text):
            VERBS["predict"].run(list(arguments))


def test_a_table_has_no_more_columns_than_there_are_classes(tmp_path, monkeypatch, capsys):
    (tmp_path / "photo.png").write_bytes(png(noise(8, 8, 3)))
    run = lambda images: np.zeros([len(images), 2], np.float32)
    runtime = runtimes.Runtime(str(tmp_path), [None, 8, 8, 3], 2, run)
    monkeypatch.setattr(runtimes, "find", lambda path: lambda: runtime)
    asked = SimpleNamespace(FLAGS=SimpleNamespace(top_k=3, json=False))
    monkeypatch.setattr(sys.modules["tf_pcl.verbs.predict"], "flags", asked)
    VERBS["predict"].run(["network", str(tmp_path / "photo.png")])
    head = capsys.readouterr().out.splitlines()[1]
    assert head.split()[1::2] == ["file", "class", "next"]


def test_threads_do_not_all_trace_the_decoding(photos, tmp_path, monkeypatch, caplog):
    """TensorFlow warns of threads that have waited for the trace of another one."""
    fit = image_files.fit
    monkeypatch.setattr(image_files, "fit", lambda *given: (time.sleep(0.2), fit(*given))[1])
    run = lambda images: np.zeros([len(images), 2], np.float32)
    runtime = runtimes.Runtime(str(tmp_path), [None, 8, 8, 3], 2, run)
    logging.getLogger("tensorflow").addHandler(caplog.handler)
    try:
        assert not any(one.problem for one in predict.predict(runtime, predict.find([str(photos)])))
    finally:
        logging.getLogger("tensorflow").removeHandler(caplog.handler)
    assert "retracing" not in caplog.text


def test_what_was_measured_before_on_corrupted_images_goes(tmp_path):
    runtime = Fixed(tmp_path, NAMES)
    for corrupted in True, False:
        found = evaluate.evaluate(runtime, numbered(), worst=1, corruptions=False)
        errors = {"blur": [1.0] * 5} if corrupted else {}
        evaluate.write(dataclasses.replace(found, corruptions=errors), str(tmp_path / "out"))
        for suffix in "csv", "png":
            assert (tmp_path / f"out/corruptions.{suffix}").exists() == corrupted


@pytest.mark.parametrize("clean, errors", [(50.0, [98.0, 99.0]), (0.0, [0.0, 0.0])])
def test_the_highest_error_is_seen_whole(clean, errors):
    (axes,) = figures.corruptions({"blur": errors}, clean).axes
    low, high = axes.get_ylim()
    assert low == 0 and high > 1.04 * max(errors)


def test_the_folder_of_a_run_has_what_is_its_own(make_folder, tmp_path, monkeypatch):
    """What is known of other networks, or by other images, lies elsewhere."""
    several = [noise(8, 8, 3, seed=i) for i in range(4)]
    folder = pathlib.Path(make_folder({"a": {"": several}, "b": {"": several[::-1]}}))
    other = shutil.copytree(folder, tmp_path / "other" / "test")
    shutil.copytree(folder, tmp_path / "other" / "train")
    (other / "a" / "0.png").write_bytes(png(noise(8, 8, 3, seed=9)))
    asked = SimpleNamespace(split="test", data_dir=None)
    monkeypatch.setattr(verb, "flags", SimpleNamespace(FLAGS=asked))
    given = Options(dataset="image_folder", data_dir=str(folder), test_examples=0.5)
    workdir = Workdir(str(tmp_path / "run"))
    workdir.begin(given, report.facts_of(verb._load(given)), {})
    for path in "export/saved_model/1", "export/mean_ensemble/saved_model/1", "1-teacher/export/1":
        (tmp_path / "run" / path).mkdir(parents=True)
        (tmp_path / "run" / path / "saved_model.pb").touch()
    (tmp_path / "run/export/model.tflite").touch()
    monkeypatch.chdir(tmp_path)
    written = lambda path, given: verb._beside(
        path, str(tmp_path / "run"), given, verb._load(given)
    )
    for path, to in {
        "run": "run/evaluation",
        "run/export": "run/evaluation",
        "run/export/saved_model/1": "run/evaluation",
        "run/export/model.tflite": "run/export/evaluation-model.tflite",
        "run/export/mean_ensemble": "run/export/evaluation-mean_ensemble",
        "run/1-teacher": "run/evaluation-1-teacher",
    }.items():
        assert written(path, given) == to
    deep = "run/export/mean_ensemble/folded/saved_model/1"
    for path in "run", "run/1-teacher/export/saved_model/1", deep:
        assert verb._workdir(path) == str(tmp_path / "run")
    # They are divided already, which a run on an undivided folder need not stop at.
    others = dataclasses.replace(given, data_dir="other")
    with pytest.raises(UserError, match="has 8 test images of its own"):
        verb._load(others)
    asked.data_dir = "other"
    assert written("run", others) == "run/evaluation-other"
    # Images that only a file of labels names are no others, and without it nothing else counts.
    labelled = dataclasses.replace(given, data_dir=str(folder / "a"), labels="lost.csv")
    with pytest.raises(UserError, match="`labels=lost.csv`: it cannot be read"):
        verb._load(dataclasses.replace(labelled, test_examples=None))


@pytest.mark.parametrize("lost", [True, False])
def test_images_that_a_run_was_trained_on_do_not_test_it(make_folder, tmp_path, lost, monkeypatch):
    """With an image more or less in a folder, its division is another one."""
    several = [noise(8, 8, 3, seed=i) for i in range(20)]
    folder = pathlib.Path(make_folder({"a": {"": several}, "b": {"": several[::-1]}}))
    given = Options(dataset="image_folder", data_dir=str(folder), test_examples=0.4)
    given = dataclasses.replace(given, validation_examples=0.2, on_bad_image="skip")
    asked = SimpleNamespace(data_dir=None)
    monkeypatch.setattr(verb, "flags", SimpleNamespace(FLAGS=asked))
    workdir = Workdir(str(tmp_path / "run"))
    workdir.begin(given, {}, {})
    data = verb._load(given)
    verb._refuse_trained(workdir.path, data, "test")
    workdir.write_lists(data.lists)
    for split in ("train", "validation", "test"):
        verb._refuse_trained(workdir.path, data, split)
    (folder / "a" / ("3.png" if lost else "new.png")).write_bytes(b"x" if lost else png(several[0]))
    data = verb._load(given)
    trained = {*data.lists["test"]} & workdir.read_list("train")
    assert trained
    text = f"{len(trained)} of {len(data.test)} test images have the names .*, such as [ab]/"
    with pytest.raises(UserError, match=text):
        verb._refuse_trained(workdir.path, data, "test")
    verb._refuse_trained(workdir.path, data, "train")
    verb._refuse_trained(None, data, "test")


def called(*arguments, cwd):
    done = python("-m", "tf_pcl", *arguments, cwd=cwd)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_the_verbs_say_what_is_done_and_what_is_not(photos, tmp_path):
    images = keras.Input((8, 8, 1), dtype="uint8")
    x = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(images))
    model = keras.Model(images, keras.layers.Dense(10)(x))
    export.export(model, "0123456789", str(tmp_path / "run" / "export"))
    status, _, said = called("evaluate", "run", cwd=tmp_path)
    assert status == 2 and "name its data with --dataset" in said
    (tmp_path / "run" / "flags.txt").write_text("--dataset=digits\n--method=baseline\n")
    status, said, _ = called("evaluate", "run", "--split=train", cwd=tmp_path)
    assert status == 0 and "1,437 of digits, train" in said
    folder = tmp_path / "run" / "evaluation-train"
    assert said.endswith("Written to run/evaluation-train\n")
    assert np.load(folder / "predictions.npz")["logits"].shape == (1437, 10)

    (photos / "bad.png").write_bytes(b"")
    status, said, problem = called(
        "predict", "run", str(photos), "--json", "--top_k=2", cwd=tmp_path
    )
    (photos / "bad.png").unlink()
    lines = [json.loads(line) for line in said.splitlines()]
    assert status == 1 and "1 of 7 files cannot be used" in problem and "bad.png" in problem
    assert [len(line.get("predictions", ())) for line in lines] == [2, 2, 0, 2, 2, 2, 2]
    status, _, problem = called("predict", "run", "absent", cwd=tmp_path)
    assert status == 2 and problem.startswith("tf-pcl predict: no image is found (absent): give")
