import base64
import io
import itertools
import os
import pathlib
import shutil
import struct
import time
import zlib

import numpy as np
import pytest
import tensorflow as tf
from helpers import noise, with_labels
from PIL import Image

from tf_pcl import data
from tf_pcl.data import augmentations, class_names, datasets, from_tfds, image_files, storage
from tf_pcl.errors import Stopped, UserError
from tf_pcl.options import Options
from tf_pcl.training import report
from tf_pcl.training.workdir import FILE_LABELS, TEST_FILES, TRAINING_FILES, Workdir


def counted(n=50):
    """An ImageData whose labels number its images."""
    return with_labels(noise(n, 8, 8, 3), np.arange(n))


def draws(count, key=(1, 2)):
    return augmentations.Draws(tf.constant(key), count)


def batches(*args, **kwargs):
    return [(v.numpy(), y.numpy()) for v, y in data.train_batches(*args, **kwargs)]


def same(a, b):
    return all(
        np.array_equal(u, v) and np.array_equal(x, y) for (u, x), (v, y) in zip(a, b)
    ) and len(a) == len(b)


def test_every_epoch_is_another_permutation():
    epochs = np.array([y for _, y in batches(counted(), 10, 3)]).reshape(3, 50)
    for epoch in epochs:
        assert sorted(epoch) == list(range(50))
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[0], np.arange(50))


def test_batches_of_a_seed_are_the_same_on_every_machine_and_version(digits):
    """Stored values hold orders and random numbers; whole numbers alone make these batches."""
    stored = 0
    for views, labels in batches(digits, 64, 2, views=2, seed=7, start=20, flip=True)[:4]:
        stored = zlib.crc32(views.tobytes() + labels.astype("<i4").tobytes(), stored)
    assert stored == 3925316916
    d = with_labels(noise(20, 32, 32, 3), np.arange(20))
    views, labels = batches(d, 4, 2, views=2, seed=7, start=4, cutout=8)[1]
    assert labels.tolist() == [14, 10, 9, 3]
    assert zlib.crc32(views.tobytes()) == 2198494703


@pytest.mark.parametrize(
    "kind, stored",
    [
        (
            "crop",
            [
                [163, 5, 99, 108, 132, 151, 185, 0, 171],
                [51, 157, 89, 181, 187, 171, 180, 182, 131],
                [0, 255, 58, 39, 255, 58, 0, 0, 0],
                [132, 32, 83, 133, 70, 97, 7, 7, 7],
                [0, 3, 99, 255, 82, 88, 255, 123, 255],
                [80, 181, 195, 52, 187, 105, 0, 0, 0],
                [47, 90, 90, 118, 49, 174, 0, 24, 24],
                [241, 51, 192, 90, 208, 198, 119, 82, 228],
            ],
        ),
        (
            "inception",
            [
                [175, 116, 109, 127, 139, 55, 30, 0, 176],
                [122, 99, 133, 94, 146, 153, 109, 90, 136],
                [0, 179, 129, 97, 188, 134, 188, 144, 203],
                [132, 76, 146, 155, 138, 21, 151, 103, 72],
                [0, 161, 177, 42, 103, 216, 164, 149, 208],
                [124, 152, 69, 175, 146, 120, 132, 143, 135],
                [78, 112, 155, 145, 107, 79, 0, 84, 79],
                [199, 213, 234, 223, 94, 167, 168, 194, 194],
            ],
        ),
    ],
)
def test_batches_with_all_augmentations_are_those_stored(kind, stored):
    d = with_labels(noise(20, 32, 32, 3), np.arange(20))
    settings = dict(augment=kind, flip=True, color_jitter=0.4, cutout=8)
    views, _ = batches(d, 4, 2, views=2, seed=7, start=4, **settings)[1]
    # Machines may round a float differently and thus a pixel by one.
    some = views[:, :, 3::13, 5::11, 1].reshape(8, 9).astype(int)
    np.testing.assert_allclose(some, stored, atol=1)


def meetings(epochs, batch):
    """How many pairs share a batch in two epochs in turn, and the correlation of neighbours."""
    of = np.empty_like(epochs)
    np.put_along_axis(of, epochs, np.arange(epochs.shape[1])[None] // batch, 1)
    cells = [np.bincount(a * (a.max() + 1) + b) for a, b in zip(of, of[1:])]
    pairs = np.mean([(n * (n - 1) // 2).sum() for n in cells])
    return pairs, np.mean([np.corrcoef(e[1:], e[:-1])[0, 1] for e in epochs])


def test_the_order_of_epochs_is_as_random_as_numpy_s():
    # Fewer rounds of the shuffle show with more than 16,384 images.
    count, batch, epochs = 50_000, 500, 8
    d = with_labels(np.zeros((count, 1, 1, 1), np.uint8), np.arange(count))
    ours = np.concatenate([y for _, y in batches(d, batch, epochs)]).reshape(epochs, count)
    assert (np.sort(ours) == np.arange(count)).all()
    theirs = np.array([np.random.RandomState(s).permutation(count) for s in range(epochs)])
    (met, correlation), (expected, chance) = meetings(ours, batch), meetings(theirs, batch)
    # By chance the first differs by about 0.001, the second is about 0.002.
    assert abs(met / expected - 1) < 0.01
    assert abs(correlation) < 0.008 and abs(chance) < 0.008


def test_a_batch_is_a_function_of_seed_and_step():
    d = counted()
    all_of_them = batches(d, 8, 2, views=2, seed=3)
    assert len(all_of_them) == 12 and all_of_them[0][0].shape == (8, 2, 8, 8, 3)
    assert same(all_of_them, batches(d, 8, 2, views=2, seed=3))
    assert same(all_of_them[7:], batches(d, 8, 2, views=2, seed=3, start=7))
    assert not same(all_of_them, batches(d, 8, 2, views=2, seed=4))
    # A method with one view sees the first view of a method with several.
    assert same([(v[:, :1], y) for v, y in all_of_them], batches(d, 8, 2, views=1, seed=3))
    assert not np.array_equal(all_of_them[0][0][:, 0], all_of_them[0][0][:, 1])


def joined(d, *args, n=2, **kwargs):
    """The batches of which n workers have a part each."""
    parts = [batches(d, *args, **kwargs, shard=(i, n)) for i in range(n)]
    return [tuple(map(np.concatenate, zip(*batch))) for batch in zip(*parts)]


@pytest.mark.parametrize("kind", ["crop", "inception"])
def test_shards_are_parts_of_the_global_batch(kind):
    settings = dict(views=2, augment=kind, color_jitter=0.4, cutout=4)
    assert same(batches(counted(), 8, 1, **settings), joined(counted(), 8, 1, **settings))


def test_large_images_are_cropped_as_by_inception():
    for side, kind in ((64, "crop"), (65, "inception")):
        d = with_labels(noise(4, side, side, 3), np.arange(4))
        assert same(batches(d, 4, 1), batches(d, 4, 1, augment=kind))
    with pytest.raises(
        UserError, match="`augment=incepton`: it is not known. Did you mean inception"
    ):
        data.train_batches(d, 4, 1, augment="incepton")


def test_unknown_augmentations_and_values_are_refused():
    d = counted()
    for given, text in (
        ({"cut_out": 4}, "augmentation 'cut_out' is not known. Did you mean cutout"),
        ({"cutout": 3}, "`cutout=3`: give an even number"),
        ({"cutout": -2}, "`cutout=-2`"),
        ({"color_jitter": 1.5}, "`color_jitter=1.5`: give a number from 0 to 1"),
        ({"flip": "no"}, "`flip=no`: give true or false"),
    ):
        with pytest.raises(UserError, match=text):
            data.train_batches(d, 4, 1, **given)


def test_an_augmentation_is_a_function_and_a_row(monkeypatch):
    d = counted()
    plain = batches(d, 10, 1, views=2, seed=3)
    monkeypatch.setitem(
        augmentations.AUGMENTATIONS,
        "darken",
        augmentations.Augmentation(
            lambda images, draws, most: (
                images - tf.minimum(images, tf.cast(draws.uniform(1, 1, 1, high=most), tf.uint8))
            ),
            lambda most: 0 <= most <= 255,
            "a number from 0 to 255",
        ),
    )
    # The new row changes nothing where it is not asked for, wherever it stands.
    rows = augmentations.AUGMENTATIONS
    monkeypatch.setattr(augmentations, "AUGMENTATIONS", dict(sorted(rows.items())))
    assert [*augmentations.AUGMENTATIONS][3] == "darken"
    assert same(plain, batches(d, 10, 1, views=2, seed=3))
    dark = batches(d, 10, 1, views=2, seed=3, darken=200)
    by = np.array([a.astype(int) - b for (a, _), (b, _) in zip(plain, dark)]).max((3, 4, 5))
    assert by.min() >= 0 and by.max() <= 200 and len(np.unique(by)) > 20
    assert same(dark, joined(d, 10, 1, views=2, seed=3, darken=200))
    with pytest.raises(UserError, match="`darken=300`: give a number from 0 to 255"):
        data.train_batches(d, 10, 1, darken=300)


def test_draws_are_new_at_each_call_and_those_of_an_image_do_not_depend_on_its_shard():
    whole = draws(8)
    first, second = whole.uniform(3).numpy(), whole.uniform(3).numpy()
    assert not np.array_equal(first, second)
    part = augmentations.Draws(tf.constant([1, 2]), 8, slice(4, 8))
    np.testing.assert_array_equal(part.uniform(3), first[4:])
    np.testing.assert_array_equal(part.uniform(3), second[4:])


def test_pad_and_crop_and_flip_give_shifted_windows_and_mirrors():
    images = noise(64, 6, 6, 1) // 2 + 1
    cropped = augmentations.pad_and_crop(tf.constant(images), draws(64), padding=1)
    out = augmentations.flip(cropped, draws(64, key=(3, 4))).numpy()
    mirrored = 0
    for image, got in zip(images, out):
        padded = np.pad(image, [(1, 1), (1, 1), (0, 0)])
        windows = [padded[i : i + 6, j : j + 6] for i in range(3) for j in range(3)]
        plain, mirror = (
            any((w == got).all() for w in windows),
            any((w[:, ::-1] == got).all() for w in windows),
        )
        assert plain or mirror
        mirrored += mirror and not plain
    assert 16 < mirrored < 48
    uncut = augmentations.pad_and_crop(tf.constant(images), draws(64), padding=0)
    np.testing.assert_array_equal(uncut, images)


def test_inception_windows_lie_within_the_image_and_have_the_paper_s_areas_and_ratios():
    random = np.random.RandomState(0).rand(5000, 4)
    for h, w in ((1000, 1000), (600, 800), (200, 4000)):
        top, left, height, width = (
            augmentations.inception_windows(tf.constant(random, tf.float32), h, w).numpy().T
        )
        assert min(top.min(), left.min()) == 0
        assert (top + height).max() == h and (left + width).max() <= w
        ratio, area = width / height, width * height / (h * w)
        assert 0.745 < ratio.min() < 0.76
        assert 1.32 < ratio.max() < 1.34
        assert abs(np.log(ratio).mean()) < 0.01
        if h > 200:
            assert 0.0795 < area.min() < 0.1 and 0.9 < area.max() <= 1
            # Where they may lie is uniform.
            assert abs((top / (h - height + 1)).mean() - 0.5) < 0.02
    # The smallest of images have windows too.
    for side in (1, 2, 3):
        windows = augmentations.inception_windows(tf.constant(random, tf.float32), side, side)
        assert windows[:, 2:].numpy().min() == 1
        assert (windows[:, :2] + windows[:, 2:]).numpy().max() == side


def test_resized_windows_are_the_image_between_its_pixels():
    images = noise(3, 9, 9, 3)
    whole = tf.constant([[0, 0, 9, 9]] * 3)
    np.testing.assert_array_equal(augmentations.resized_windows(tf.constant(images), whole), images)
    # Of three pixels, each third pixel of nine is one; beyond the outermost there is no black.
    windows = tf.constant([[2, 1, 3, 3]] * 3)
    part = augmentations.resized_windows(tf.constant(images), windows).numpy()
    np.testing.assert_array_equal(part[:, 1::3, 1::3], images[:, 2:5, 1:4])
    np.testing.assert_array_equal(part[:, 0, 0], images[:, 2, 1])
    np.testing.assert_array_equal(part[:, 8, 8], images[:, 4, 3])
    pixels = images.astype(float)
    between = (2 * pixels[:, 2:4, 1:4] + pixels[:, 3:5, 1:4]) / 3
    assert np.abs(part[:, 2:8:3, 1::3] - between).max() <= 0.51


def test_windows_at_the_border_have_no_black_edge():
    random = tf.random.stateless_uniform([1000, 2], [1, 2])
    at_first, at_last = tf.zeros([1000, 2]), tf.fill([1000, 2], 1 - 1e-6)
    white = tf.fill([1000, 70, 50, 1], tf.constant(255, tf.uint8))
    for where in (at_first, at_last):
        windows = augmentations.inception_windows(tf.concat([random, where], 1), 70, 50)
        assert (augmentations.resized_windows(white, windows).numpy() == 255).all()


def test_inception_crop_is_stateless_and_its_mirror_images_are_half():
    images = tf.constant(noise(8, 20, 20, 3))
    first, again, other = (
        augmentations.inception_crop(images, draws(8, key=(1, s))).numpy() for s in (2, 2, 3)
    )
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    # A ramp that falls was mirrored.
    ramp = tf.tile(tf.range(0, 250, 5, dtype=tf.int32)[None, None, :, None], [400, 50, 1, 1])
    unflipped = augmentations.inception_crop(tf.cast(ramp, tf.uint8), draws(400))
    cut = augmentations.flip(unflipped, draws(400, key=(3, 4))).numpy().astype(int)
    assert 150 < (cut[:, 0, 0, 0] > cut[:, 0, -1, 0]).sum() < 250
    assert (np.abs(np.diff(cut[:, 0, :, 0], axis=1)) <= 6).all()
    assert (np.diff(unflipped.numpy().astype(int)[:, 0, :, 0], axis=1) >= 0).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_color_jitter_against_numpy(channels):
    images = noise(200, 5, 5, channels) // 2 + 60
    np.testing.assert_array_equal(
        augmentations.color_jitter(tf.constant(images), draws(200), 0.0), images
    )
    got = augmentations.color_jitter(tf.constant(images), draws(200), 0.3).numpy()
    factors = draws(200).uniform(3, 1, 1, 1, low=0.7, high=1.3).numpy()
    b, c, s = factors.transpose(1, 0, 2, 3, 4)
    grey = lambda x: x @ np.array([[0.2989], [0.587], [0.114]]) if channels == 3 else x
    bright = images * b
    mean = grey(bright).mean((1, 2, 3), keepdims=True)
    contrasted = mean + c * (bright - mean)
    expected = grey(contrasted) + s * (contrasted - grey(contrasted))
    assert np.abs(got - np.clip(expected, 0, 255)).max() <= 0.51
    assert factors.min() < 0.72 and factors.max() > 1.28


def test_cutout_blackens_one_square():
    out = augmentations.cutout(
        tf.fill([32, 8, 8, 3], tf.constant(200, tf.uint8)), draws(32), 4
    ).numpy()
    black = (out == 0).all(-1)
    assert ((out == 200) | (out == 0)).all()
    assert black.sum((1, 2)).max() == 16 and black.sum((1, 2)).min() >= 4
    assert len(np.unique(black, axis=0)) > 10


def test_digits(digits):
    assert digits.image_shape == (8, 8, 1) and (len(digits.train), len(digits.test)) == (1437, 360)
    images, labels = digits.train.fetch(tf.range(1437))
    assert images.dtype == tf.uint8
    assert images.numpy().max() == 255
    assert set(labels.numpy()) == set(range(10))
    np.testing.assert_allclose(
        [digits.mean[0], digits.std[0]], [images.numpy().mean(), images.numpy().std()], rtol=1e-6
    )
    assert data.load("digits", image_size=12).image_shape == (12, 12, 1)
    assert not digits.flip


def test_train_examples_is_a_seeded_subset(digits):
    few, again, other = (data.load("digits", train_examples=100, seed=s).train for s in (1, 1, 2))
    assert len(few) == 100
    np.testing.assert_array_equal(few.images, again.images)
    assert not np.array_equal(few.images, other.images)
    with pytest.raises(UserError, match="more than the 1437"):
        data.load("digits", train_examples=2000)


def test_test_batches_are_whole_and_in_order(digits):
    got = list(data.test_batches(digits, 100))
    assert [len(y) for _, y in got] == [100, 100, 100, 60]
    np.testing.assert_array_equal(np.concatenate([x for x, _ in got]), digits.test.images)


def test_image_folder_of_grey_and_colour_jpeg_and_png(make_folder, monkeypatch):
    jpeg = tf.io.encode_jpeg(noise(8, 8, 3, seed=5)).numpy()
    folder = make_folder(
        {
            "train": {"cat": [noise(8, 8, 3), noise(8, 8, 1)], "dog": [noise(8, 8, 3, seed=2)]},
            "val": {"cat": [noise(8, 8, 3)], "dog": [jpeg]},
        }
    )
    os.rename(f"{folder}/val/dog/0.png", f"{folder}/val/dog/0.JPG")
    d = data.load("image_folder", folder)
    assert d.classes == ("cat", "dog")
    assert d.image_shape == (8, 8, 3)
    assert (len(d.train), len(d.test)) == (3, 2)
    images, labels = d.train.fetch(tf.range(3))
    dog = images.numpy()[labels.numpy() == 1][0]
    np.testing.assert_array_equal(dog, noise(8, 8, 3, seed=2))
    # Folders too large for memory are read at random by index, with the same outcome.
    monkeypatch.setattr(storage, "MEMORY_LIMIT", 0)
    on_disk = data.load("image_folder", folder)
    assert isinstance(on_disk.train, storage.Files) and on_disk.mean == d.mean
    assert same(batches(d, 2, 2, views=2), batches(on_disk, 2, 2, views=2))


def test_image_folder_has_the_order_of_tensorflow_datasets(make_folder):
    import tensorflow_datasets as tfds

    folder = make_folder(
        {
            s: {c: [noise(4, 4, 3, seed=i) for i in range(12)] for c in ("cat", "cat-2", "B")}
            for s in ("train", "val", "extra")
        }
    )
    d, builder = data.load("image_folder", folder), tfds.ImageFolder(folder)
    assert list(d.classes) == builder.info.features["label"].names == ["B", "cat", "cat-2"]
    for split, ours in (("train", d.train), ("val", d.test)):
        theirs = [*builder.as_dataset(split=split).as_numpy_iterator()]
        np.testing.assert_array_equal(ours.images, [e["image"] for e in theirs])
        np.testing.assert_array_equal(ours.labels, [e["label"] for e in theirs])


def with_exif(jpeg, turn, order):
    """A JPEG with an EXIF orientation among other entries, in byte order `order` (< or >)."""
    entries = [
        struct.pack(order + "HHII", 0x0100, 4, 1, 7),
        struct.pack(order + "HHIHH", 0x0112, 3, 1, turn, 0),
    ]
    exif = (
        {"<": b"II*\0", ">": b"MM\0*"}[order]
        + struct.pack(order + "IH", 8, 2)
        + b"".join(entries)
        + bytes(4)
    )
    segment = b"Exif\0\0" + exif
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:]


# How an image of each EXIF orientation is turned upright.
UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: np.rot90(x, 2),
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize("turn", UPRIGHT)
def test_exif_orientation(turn):
    jpeg = tf.io.encode_jpeg(noise(4, 6, 3)).numpy()
    height, width, _ = UPRIGHT[turn](noise(4, 6, 3)).shape
    for order in "<>":
        h = image_files.header(with_exif(jpeg, turn, order))
        assert h == (width, height, turn, ("turned upright",) if turn > 1 else ())
    np.testing.assert_array_equal(
        image_files.upright(tf.constant(noise(4, 6, 3)), tf.constant(turn)),
        UPRIGHT[turn](noise(4, 6, 3)),
    )


def test_a_header_behind_a_long_colour_profile(tmp_path):
    jpeg = tf.io.encode_jpeg(noise(4, 6, 3)).numpy()
    profile = b"\xff\xe2" + struct.pack(">H", 60002) + bytes(60000)
    (tmp_path / "long.jpg").write_bytes(jpeg[:2] + 3 * profile + b"\xff" + jpeg[2:])
    assert image_files._start_of(tmp_path / "long.jpg")[0] == (6, 4, 1, ())


def test_orientation_of_damaged_exif():
    good = with_exif(tf.io.encode_jpeg(noise(4, 6, 3)).numpy(), 6, "<")[12:]
    assert image_files.orientation(good) == 6
    assert image_files.orientation(good.replace(struct.pack("<H", 6), struct.pack("<H", 9))) == 1
    assert all(image_files.orientation(good[:n]) in (1, 6) for n in range(60))
    assert image_files.orientation(b"") == 1


def orientation_of(encoded):
    """What the header says; None where it cannot be read."""
    try:
        return image_files.header(encoded).orientation
    except ValueError:
        return None


exif_orientations = tf.function(
    lambda files: tf.map_fn(
        image_files.exif_orientation, files, fn_output_signature=tf.TensorSpec([], tf.int32)
    ),
    input_signature=[tf.TensorSpec([None], tf.string)],
)


def segment(marker, content):
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content


PNG = tf.io.encode_png(noise(4, 6, 3)).numpy()


def png_with_exif(turn, order):
    exif = b"eXIf" + with_exif(b"", turn, order)[10:]
    chunk = struct.pack(">I", len(exif) - 4) + exif + struct.pack(">I", zlib.crc32(exif))
    return PNG[:33] + chunk + PNG[33:]


def test_exif_orientation_in_the_graph_is_that_of_the_header():
    plain = tf.io.encode_jpeg(noise(4, 6, 3)).numpy()
    jfif, start = plain[2:20], plain[:2]
    assert jfif.startswith(b"\xff\xe0")
    turned = {(turn, order): with_exif(plain, turn, order) for turn in range(10) for order in "<>"}
    profile = segment(0xE2, bytes(60_000))
    exif = lambda turn, order: with_exif(start, turn, order)[2:]
    big = start + 3 * profile + b"\xff\xff\xff" + exif(6, ">") + plain[2:]
    files = {
        **turned,
        "none": plain,
        "after JFIF": start + jfif + exif(8, "<") + plain[20:],
        "behind profiles and fill bytes": big,
        "the first of two": start + exif(5, ">") + exif(3, "<") + plain[2:],
        "goes on in a second": start + exif(8, ">") + segment(0xE1, b"Exif\0\0more") + plain[2:],
        "XMP is no EXIF": start + segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0") + plain[2:],
        "XMP, then EXIF": start + segment(0xE1, b"http://ns.adobe") + exif(7, ">") + plain[2:],
        "a short EXIF": start + segment(0xE1, b"Exif\0\0II*\0") + plain[2:],
        "an offset far away": start
        + segment(0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff\0\1")
        + plain[2:],
        "more entries than there are": turned[6, "<"].replace(
            struct.pack("<IH", 8, 2), struct.pack("<IH", 8, 60_000)
        ),
        "no entry": turned[6, "<"].replace(struct.pack("<IH", 8, 2), struct.pack("<IH", 8, 0)),
        "neither II nor MM": turned[6, "<"].replace(b"II*\0", b"IM*\0"),
        "garbage before a marker": start + b"\1\2\3" + exif(4, "<") + plain[2:],
        "empty": b"",
        "two bytes": start,
        "PNG": PNG,
        **{f"PNG {turn}": png_with_exif(turn, ">") for turn in range(10)},
        "a short PNG": png_with_exif(6, "<")[:40],
        "a chunk too long for PNG": png_with_exif(6, "<").replace(b"eXIf", b"eXIg"),
        "text": b"\xff\xd8 is how a JPEG begins",
    }
    expected = [orientation_of(encoded) for encoded in files.values()]
    got = exif_orientations(tf.constant([*files.values()])).numpy()
    assert dict(zip(files, got)) == {name: e or 1 for name, e in zip(files, expected)}
    assert {name: e for name, e in zip(files, got) if e > 1 and name not in turned} == {
        **{f"PNG {turn}": turn for turn in range(2, 9)},
        "after JFIF": 8,
        "behind profiles and fill bytes": 6,
        "the first of two": 5,
        "goes on in a second": 8,
        "XMP, then EXIF": 7,
        "more entries than there are": 6,
        "garbage before a marker": 4,
    }
    # Every start of a file, and files with some bytes changed.
    random = np.random.RandomState(0)
    damaged = [f[:n] for f in (turned[6, "<"], turned[8, ">"]) for n in range(len(f))]
    damaged += [files["PNG 8"][:n] for n in range(len(PNG))]
    more = ("after JFIF", "the first of two", "PNG 6", "PNG 7")
    for encoded in [*turned.values(), *map(files.get, more)] * 40:
        changed = bytearray(encoded)
        for at in random.randint(2, 80, random.randint(1, 4)):
            changed[at] = random.choice([0, 1, 2, 6, 18, 0xC0, 0xE1, 0xFF, random.randint(256)])
        damaged.append(bytes(changed))
    known = [orientation_of(encoded) for encoded in damaged]
    assert sum(k is not None for k in known) > 500 and len({*known}) == 9
    for encoded, expected, got in zip(
        damaged, known, exif_orientations(tf.constant(damaged)).numpy()
    ):
        assert got == expected or expected is None and 1 <= got <= 8, encoded


def test_decode_upright_in_a_saved_model(tmp_path):
    jpeg = tf.io.encode_jpeg(noise(16, 24, 3), quality=100).numpy()
    module = tf.Module()
    module.decode = tf.function(
        image_files.decode_upright, input_signature=[tf.TensorSpec([], tf.string)]
    )
    tf.saved_model.save(module, str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path)).decode
    plain = tf.io.decode_jpeg(jpeg, dct_method="INTEGER_ACCURATE").numpy()
    for turn, turned in UPRIGHT.items():
        np.testing.assert_array_equal(loaded(with_exif(jpeg, turn, "<")), turned(plain))
    png = tf.io.encode_png(plain).numpy()
    np.testing.assert_array_equal(loaded(png), plain)
    for turn, turned in UPRIGHT.items():
        file = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = turn
        Image.fromarray(plain).save(file, "PNG", exif=exif)
        np.testing.assert_array_equal(loaded(file.getvalue()), turned(plain))
        header = image_files.header(file.getvalue())
        assert (header.orientation, header.height, header.width) == (turn, *turned(plain).shape[:2])
    grey = image_files.decode_upright(tf.constant(with_exif(jpeg, 6, ">")), channels=1)
    assert grey.shape == (24, 16, 1)


def test_gif_and_bmp_are_those_of_pillow():
    pixels = noise(6, 9, 3) // 64 * 64
    of_colours = Image.fromarray(pixels).quantize(64)
    grey = Image.fromarray(pixels[..., 0])
    for image, kind in ((of_colours, "GIF"), (of_colours, "BMP"), (grey, "BMP"), (None, "BMP")):
        image = image or Image.fromarray(pixels)
        file = io.BytesIO()
        image.save(file, kind)
        expected = np.asarray(Image.open(file).convert("RGB"))
        for decode in (image_files.decode, tf.function(image_files.decode)):
            np.testing.assert_array_equal(decode(tf.constant(file.getvalue())), expected)
        one = image_files.decode(tf.constant(file.getvalue()), channels=1)
        np.testing.assert_array_equal(one, tf.image.rgb_to_grayscale(expected))
        header = image_files.header(file.getvalue())
        assert (header.width, header.height) == image.size
    old = b"BM" + bytes(12) + struct.pack("<IHHHH", 12, 9, 6, 1, 24) + bytes(200)
    with pytest.raises(ValueError, match="OS/2"):
        image_files.header(old)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP"])
def test_a_header_that_ends_early_is_named(kind):
    file = io.BytesIO()
    Image.fromarray(noise(9, 9, 3)).save(file, kind)
    for length in (8, 30) if kind == "JPEG" else (8,):
        with pytest.raises(ValueError, match="the file ends within its header"):
            image_files.header(file.getvalue()[:length])


# 8×8, cyan 0, magenta and yellow 255, black 0: red.
CMYK = base64.b64decode(
    "/9j/7gAOQWRvYmUAZAAAAAAA/9sAQwADAgIDAgIDAwMDBAMDBAUIBQUEBAUKBwcGCAwKDAwLCgsLDQ4SEA0OEQ4LCxAWEBETFBUVFQwPFxgWFBgSFBUU"
    "/8AAFAgACAAIBEMRAE0RAFkRAEsRAP/EABQAAQAAAAAAAAAAAAAAAAAAAAn/xAAUEAEAAAAAAAAAAAAAAAAAAAAA/9oADgRDAE0AWQBLAAA/AFTFUKoqb"
    "//Z"
)
GIF = base64.b64decode("R0lGODdhAgADAIAAAP8AAAAAACwAAAAAAgADAAACAoRfADs=")


def test_photos_of_all_kinds_become_grey():
    """A level is the rounding of what is not grey in the file."""
    pixels = np.repeat(np.repeat(noise(3, 3, 3), 8, 0), 8, 1)
    kinds = ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "L"), ("JPEG", "RGB"), ("JPEG", "L")
    for kind, mode in kinds:
        file, image = io.BytesIO(), Image.fromarray(pixels).convert(mode)
        image.save(file, kind, quality=100, subsampling=0)
        expected = np.asarray(Image.open(file).convert("RGB").convert("L")).astype(int)
        found = image_files.decode(tf.constant(file.getvalue()), 1).numpy()[..., 0]
        assert np.abs(found - expected).max() <= (mode != "L")
    red = image_files.decode(tf.constant(CMYK), 1).numpy()
    assert red.shape == (8, 8, 1) and np.abs(red - 76.0).max() <= 1


def test_photos_of_all_kinds(make_folder, capsys, monkeypatch):
    jpeg = tf.io.encode_jpeg(noise(8, 12, 3), quality=100).numpy()
    plain = noise(8, 8, 3, seed=3)
    wide = np.arange(65536, step=1024, dtype=np.uint16).reshape(8, 8, 1)
    kinds = [
        plain,
        noise(8, 8, 1),
        noise(8, 8, 2),
        noise(9, 9, 4),
        tf.io.encode_png(wide).numpy(),
        CMYK,
        jpeg,
        with_exif(jpeg, 6, "<"),
        with_exif(jpeg, 3, ">"),
        GIF,
    ]
    folder = make_folder(
        {"train": {"a": kinds, "b": [plain]}, "test": {"a": [plain], "b": [plain]}}
    )
    for name in ("notes.txt", "more.txt", "old.bmp"):
        with open(f"{folder}/train/a/{name}", "w") as f:
            f.write("x")
    d = data.load("image_folder", folder, image_size=8)
    assert capsys.readouterr().out.splitlines() == [
        "Not .jpg or .png, ignored: 2 .txt, 1 .bmp",
        "train: 11 images of 2×3 to 8×12 pixels; 3 grey; 2 with alpha (dropped); 1 of 16 bits; "
        "1 CMYK; 2 turned upright",
        "test: 2 images of 8×8 pixels",
        "Byte for byte in another split too: 2 of the test images, such as "
        f"{folder}/test/a/0.png = {folder}/train/b/0.png",
    ]
    monkeypatch.setattr(storage, "MEMORY_LIMIT", 0)
    on_disk = data.load("image_folder", folder, image_size=8)
    images, labels = on_disk.train.fetch(tf.range(11))
    np.testing.assert_array_equal(images, d.train.images)
    got = dict(
        zip(
            (os.path.relpath(p.decode(), folder) for p in on_disk.train.paths.numpy()),
            images.numpy().astype(int),
        )
    )
    of = lambda i: got[f"train/a/{i}.png"]
    np.testing.assert_array_equal(of(0), plain)
    np.testing.assert_array_equal(of(1), np.repeat(noise(8, 8, 1), 3, 2))
    np.testing.assert_array_equal(of(2), np.repeat(noise(8, 8, 2)[..., :1], 3, 2))
    np.testing.assert_array_equal(of(4), np.repeat(wide >> 8, 3, 2))
    assert np.abs(of(5) - [255, 0, 0]).max() < 3 and np.abs(of(9) - [255, 0, 0]).max() < 3
    np.testing.assert_allclose(of(7), np.rot90(of(6), -1), atol=1)
    np.testing.assert_allclose(of(8), np.rot90(of(6), 2), atol=1)
    assert on_disk.mean == d.mean and same(batches(d, 4, 1), batches(on_disk, 4, 1))


def test_portraits_turned_by_exif_are_of_one_size_with_those_that_are_not(make_folder):
    turned = with_exif(tf.io.encode_jpeg(noise(8, 6, 3)).numpy(), 8, "<")
    folder = make_folder({s: {"a": [turned], "b": [noise(6, 8, 3)]} for s in ("train", "test")})
    assert data.load("image_folder", folder).image_shape == (6, 8, 3)


@pytest.mark.parametrize("limit", [0, 4 << 30])
def test_files_that_cannot_be_read_are_named_or_skipped(make_folder, capsys, monkeypatch, limit):
    monkeypatch.setattr(storage, "MEMORY_LIMIT", limit)
    png, jpeg = tf.io.encode_png(noise(8, 8, 3)).numpy(), tf.io.encode_jpeg(noise(8, 8, 3)).numpy()
    bad = [b"", b"RIFF....WEBPVP8 ", png[:60], jpeg[:-40], jpeg[:30]]
    folder = make_folder(
        {
            "train": {"a": [*bad, png], "b": [png, noise(8, 8, 1)]},
            "test": {"a": [jpeg], "b": [png, b"G"]},
        }
    )
    with pytest.raises(UserError, match="cannot be read .*`on_bad_image=skip`") as refused:
        data.load("image_folder", folder)
    assert all(
        name in str(refused.value)
        for name in (*(f"train/a/{i}.png" for i in range(5)), "test/b/1.png")
    )
    capsys.readouterr()
    d = data.load("image_folder", folder, on_bad_image="skip")
    lines = capsys.readouterr().out.splitlines()
    assert "train: 3 images of 8×8 pixels; 1 grey; 5 cannot be read" in lines
    assert "test: 2 images of 8×8 pixels; 1 cannot be read" in lines
    assert lines[-2].startswith("Left out: ") and lines[-2].count(".png") == 6
    assert lines[-1].startswith("Byte for byte in another split too: 1 of the test images")
    assert (len(d.train), len(d.test)) == (3, 2) and len(batches(d, 3, 2)) == 2
    assert sorted(d.train.fetch(tf.range(3))[1].numpy()) == [0, 1, 1]


def test_a_look_at_files_reads_their_headers_alone(make_folder, digits):
    png = tf.io.encode_png(noise(8, 8, 3)).numpy()
    train = {"a": [png[:60], noise(8, 8, 1)], "b": [png]}
    folder = make_folder({"train": train, "test": {"a": [png], "b": [png]}})
    with pytest.raises(UserError, match="cannot be read"):
        data.load("image_folder", folder)
    shape, images = data.look("image_folder", folder)
    assert (shape, images.classes, len(images.train)) == ((8, 8, 3), ["a", "b"], 3)
    shape, images = data.look("image_folder", folder, 4, validation_examples=1)
    assert (shape, len(images.train), len(images.validation)) == ((4, 4, 3), 2, 1)
    pathlib.Path(folder, "train/a/0.png").write_bytes(b"")
    with pytest.raises(UserError, match="0.png cannot be read"):
        data.look("image_folder", folder)
    shape, images = data.look("digits", train_examples=9)
    assert (shape, tuple(images.classes)) == (digits.image_shape, digits.classes)
    assert len(images.train) == 9


@pytest.fixture
def streamed(make_folder, monkeypatch):
    """A folder of two classes of four images, too large for memory, and a test image of each."""
    monkeypatch.setattr(storage, "MEMORY_LIMIT", 0)
    several = [noise(8, 8, 3, seed=i) for i in range(4)]
    return pathlib.Path(make_folder({"train": {"a": several, "b": several}, "test": ONE}))


def of_folder(folder, **how):
    return data.load("image_folder", str(folder), **{"on_bad_image": "skip", **how})


BREAKING = {
    "vanishes": lambda path: path.unlink(),
    "is empty": lambda path: path.write_bytes(b""),
    "is truncated": lambda path: path.write_bytes(path.read_bytes()[:60]),
    "has another size": lambda path: path.write_bytes(tf.io.encode_png(noise(9, 8, 3)).numpy()),
}


def images_of(d):
    return d.train.fetch(tf.range(len(d.train)))[0].numpy()


@pytest.mark.parametrize("how", BREAKING)
def test_images_whose_files_break_under_a_run_are_replaced_alike(streamed, how, caplog):
    """The next image of the class stands for one that is lost."""
    d = of_folder(streamed)
    paths, labels = list(d.train.paths.numpy()), d.train.all_labels()
    index = paths.index(os.fsencode(streamed / "train/a/1.png"))
    members = list(np.flatnonzero(labels == 0))
    following = members[(members.index(index) + 1) % 4]
    images = images_of(d)
    BREAKING[how](streamed / "train/a/1.png")
    expected = images.copy()
    expected[index] = images[following]
    for _ in range(2):
        np.testing.assert_array_equal(images_of(d), expected)
    # Each file is told once.
    name, other = os.fsdecode(paths[index]), os.fsdecode(paths[following])
    told = f"{name} can no longer be read: {other}, of its class, replaces it"
    back = "; put it, or an empty file of its name, back" * (how == "vanishes")
    assert caplog.messages == [told + back]
    count = "can no longer be read: 1 training images, which others of their classes replaced"
    assert count in datasets.reading_of(d).summary()


def test_batches_with_lost_images_are_the_same_wherever_a_run_goes_on(streamed):
    d = of_folder(streamed)
    (streamed / "train/a/1.png").unlink()
    lacking = batches(d, 4, 2, views=2)
    assert same(lacking[1:], batches(d, 4, 2, views=2, start=1))
    assert same(lacking, joined(d, 4, 2, views=2, n=2))


@pytest.mark.slow
def test_lost_test_images_are_missing_and_lost_classes_end_the_run(streamed, caplog):
    d = of_folder(streamed)
    (streamed / "test/b/0.png").unlink()
    assert [list(y) for _, y in data.test_batches(d, 1)] == [[0]]
    assert len(d.test.first(9)) == 1 and "test/b/0.png can no longer be read: it is" in caplog.text
    assert "0 training images, which others of their classes replaced, and 1 others" in (
        datasets.reading_of(d).summary()
    )
    for path in streamed.glob("train/a/*"):
        path.write_bytes(b"")
    with pytest.raises(Stopped, match="in its class can no longer be read.*same command resumes"):
        with storage.watched(datasets.reading_of(d)):
            batches(d, 4, 1)


def named(d):
    """The line that ends what reads the images."""
    with pytest.raises(Stopped) as stopped, storage.watched(datasets.reading_of(d)):
        batches(d, 8, 1)
    return str(stopped.value)


def test_files_that_change_or_break_under_a_run_are_named(streamed):
    strict, skips = (of_folder(streamed, on_bad_image=how) for how in ("fail", "skip"))
    path = streamed / "train/b/2.png"
    good = path.read_bytes()
    path.write_bytes(tf.io.encode_png(noise(8, 8, 3, seed=9)).numpy())
    # Another image is no bad image: it could not be left out alike when the run goes on.
    for d in strict, skips:
        assert named(d).startswith(f"{path} has changed since it was first read: restore it")
    path.unlink()
    line = f"{path} can no longer be read: repair it, or leave out all unreadable files with"
    assert named(strict).startswith(line) and "`on_bad_image=skip`" in named(strict)
    path.write_bytes(good)
    with storage.watched(datasets.reading_of(strict)):
        assert len(batches(strict, 8, 1)) == 1
    # What has nothing to do with files stays as it is.
    with pytest.raises(ValueError, match="^other$"), storage.watched(datasets.reading_of(strict)):
        raise ValueError("other")


@pytest.mark.slow
def test_a_run_goes_on_with_the_files_that_it_began_with(streamed, tmp_path):
    workdir = Workdir(str(tmp_path / "run"))
    bad, breaks = streamed / "train/b/9.png", streamed / "train/a/1.png"
    bad.write_bytes(b"")
    began = of_folder(streamed)
    assert len(began.train) == 8 and workdir.read_images() is None
    workdir.begin(Options(), report.facts_of(began), {})
    workdir.write_images(datasets.record(began))
    whole, good = images_of(began), breaks.read_bytes()

    breaks.write_bytes(good[:60])
    lacking = images_of(began)
    # Without a run, what cannot be read is no image of the data set.
    fresh = [of_folder(streamed) for _ in range(2)]
    assert [len(d.train) for d in fresh] == [7, 7]
    np.testing.assert_array_equal(*map(images_of, fresh))
    with pytest.raises(UserError, match="training images 7 here, 8 there"):
        workdir.check_data(report.facts_of(fresh[0]))

    again = lambda **how: of_folder(streamed, began=workdir.read_images(), **how)
    bad.write_bytes(good)  # What was left out at first stays so, mended or not.
    resumed = again()
    workdir.check_data(report.facts_of(resumed))
    assert (resumed.mean, resumed.std) == (began.mean, began.std)
    np.testing.assert_array_equal(images_of(resumed), lacking)
    assert not np.array_equal(lacking, whole)
    assert datasets.record(resumed) == datasets.record(began) == workdir.read_images()
    assert len(images_of(again(train_examples=6))) == 6

    breaks.write_bytes(good)
    mended = again()
    np.testing.assert_array_equal(images_of(mended), whole)
    assert mended.mean == began.mean
    # A file whose name is gone leaves no place: an empty one of its name does.
    breaks.unlink()
    with pytest.raises(UserError, match="training images 7 here, 8 there"):
        workdir.check_data(report.facts_of(again()))
    breaks.touch()
    np.testing.assert_array_equal(images_of(again()), lacking)


@pytest.mark.parametrize("limit", [storage.MEMORY_LIMIT, 0])
def test_test_images_are_known_by_what_their_files_hold(limit, make_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "MEMORY_LIMIT", limit)
    images = [noise(8, 8, 3, seed=i) for i in range(3)]
    folder = make_folder(dict.fromkeys(["train", "test"], {"a": images[:1], "b": images[1:]}))
    number = lambda folder: report.facts_of(of_folder(folder))[TEST_FILES]
    here = number(folder)
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    assert number(moved) == here
    # Neither the training images nor the files' names matter, but the classes do.
    os.rename(moved / "test/b/1.png", moved / "test/b/x.png")
    shutil.copy(moved / "train/b/0.png", moved / "train/b/1.png")
    assert number(moved) == here
    os.rename(moved / "test/b/x.png", moved / "test/a/x.png")
    assert number(moved) != here
    workdir = Workdir(str(tmp_path / "run"))
    facts = report.facts_of(of_folder(folder))
    workdir.begin(Options(), facts, {})
    # A run goes on where a test image has broken, which is told elsewhere.
    workdir.check_data({**facts, TEST_FILES: "0000000a"})


def test_a_run_does_not_go_on_with_other_labels(make_folder, tmp_path):
    """Neither the number of the images nor their means tell that two have changed places."""
    of = lambda split: {"a": [noise(8, 8, 3, seed=split + i) for i in range(2)], "b": []}
    folder = make_folder({s: of(9 * k) for k, s in enumerate(("train", "val", "test"))})
    for split in ("train", "val", "test"):
        shutil.copy(f"{folder}/{split}/a/1.png", f"{folder}/{split}/b/0.png")
    facts = lambda: report.facts_of_files(*data.look("image_folder", folder))
    workdir, before = Workdir(str(tmp_path / "run")), facts()
    workdir.begin(Options(), before, {})
    workdir.check_data(facts())
    for split in ("train", "test"):
        path = f"{folder}/{split}"
        os.rename(f"{path}/a/0.png", f"{path}/b/9.png")
        os.rename(f"{path}/b/0.png", f"{path}/a/9.png")
        with pytest.raises(
            UserError, match=r'other data \(labels of files "\w+" here, "\w+" there\)'
        ):
            workdir.check_data(facts())
        assert (facts()[TRAINING_FILES] == before[TRAINING_FILES]) == (split == "test")
        os.rename(f"{path}/a/9.png", f"{path}/b/0.png")
        os.rename(f"{path}/b/9.png", f"{path}/a/0.png")
    assert facts() == before
    shutil.rmtree(f"{folder}/val")
    with pytest.raises(UserError, match="validation images null here, 3 there"):
        workdir.check_data(facts())
    # Runs of earlier versions do not know all of it.
    new = (FILE_LABELS, TRAINING_FILES, TEST_FILES)
    old = {name: fact for name, fact in before.items() if name not in new}
    workdir.begin(Options(), old, {})
    workdir.check_data(before)


def test_a_class_without_a_readable_image_is_refused(make_folder):
    for images in ([b"x"], [tf.io.encode_png(noise(8, 8, 3)).numpy()[:60], b"y"]):
        folder = make_folder({"train": {"a": images, "b": [noise(8, 8, 3)]}, "test": ONE})
        with pytest.raises(
            UserError, match="no image of a in train can be read, such as .*train/a/0.png"
        ):
            data.load("image_folder", folder, on_bad_image="skip")
        shutil.rmtree(folder)
    with pytest.raises(UserError, match="no image of a, b in train can be read"):
        data.load(
            "image_folder",
            make_folder({"train": {"a": [b""], "b": [b""]}, "test": ONE}),
            on_bad_image="skip",
        )


def test_on_bad_image_goes_with_files_only():
    with pytest.raises(
        UserError,
        match="`on_bad_image=skip`: it does not go with the data set digits: it is for image_f",
    ):
        data.load("digits", on_bad_image="skip")


def test_image_size_cuts_the_middle_and_resizes(make_folder):
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    folder = make_folder({s: {"a": [wide], "b": [noise(40, 20, 3)]} for s in ("train", "test")})
    d = data.load("image_folder", folder, image_size=10)
    images, labels = d.test.fetch(tf.range(2))
    assert d.image_shape == (10, 10, 3)
    np.testing.assert_array_equal(images.numpy()[labels.numpy() == 0][0], np.full((10, 10, 3), 200))
    with pytest.raises(UserError, match=r"30×10.*20×40|20×40.*30×10"):
        data.load("image_folder", folder)


ONE = {"a": [noise(8, 8, 3)], "b": [noise(8, 8, 3)]}


@pytest.mark.parametrize(
    "splits, text",
    [
        (
            {"train": {"a": [b"not an image"], "b": [noise(8, 8, 3)]}, "test": ONE},
            "train/a/0.png cannot be read",
        ),
        (
            {
                "train": ONE,
                "test": {
                    "a": [tf.io.encode_png(noise(8, 8, 3)).numpy()[:60]],
                    "b": [noise(8, 8, 3)],
                },
            },
            "test/a/0.png cannot be read",
        ),
        ({"train": {"a": [noise(8, 8, 3)]}, "test": {"a": [noise(8, 8, 3)]}}, "1 class"),
        ({"train": ONE}, "has splits train: it needs train and test"),
        ({"train": ONE, "test": {"a": []}}, "has splits train"),
        ({"train": {"a": []}}, "has no images"),
        ({"train": ONE, "test": {**ONE, "c": [noise(8, 8, 3)]}}, "has no image of c in train"),
        ({}, "is not there"),
    ],
)
def test_folders_that_cannot_be_used(make_folder, splits, text):
    with pytest.raises(UserError, match=text):
        data.load("image_folder", make_folder(splits))


def test_hidden_names_do_not_count_and_classes_without_test_images_are_named(make_folder, capsys):
    folder = make_folder(
        {"train": {**ONE, "c": [noise(8, 8, 3)], ".checkpoints": [noise(8, 8, 3)]}, "test": ONE}
    )
    os.rename(f"{folder}/train/.checkpoints/0.png", f"{folder}/train/a/._0.png")
    # Some lie elsewhere.
    os.mkdir(f"{folder}/test/a/more")
    for stray in ("0.png", "train/1.png", "test/a/more/2.png"):
        shutil.copy(f"{folder}/train/c/0.png", f"{folder}/{stray}")
    d = data.load("image_folder", folder)
    assert d.classes == ("a", "b", "c") and len(d.train) == 3
    out = capsys.readouterr().out
    assert "No image of c in test" in out
    line = f"Ignored: 3 images that do not lie in a class's folder itself, such as {folder}/0.png\n"
    assert line in out and "ignored: 1" not in out


STRANGE_NAMES = [
    os.fsdecode(b"ni\xf1o"),
    os.fsdecode(b"\x80 \xff\xfe"),
    "two\nlines",
    "a\r\n\x0b\x0c\x1c\x85\u2028b",
    "back\\slash \\n \\xf1 \\u000a \\\\",
    "\t \x00 \x7f",
    "\ud800 a lone surrogate",
]


@pytest.mark.parametrize("name", [*STRANGE_NAMES, "niño", "猫 🐈", "", 'it\'s a "dog"'])
def test_class_names_are_lines_and_come_back(name):
    line = class_names.escape(name)
    assert "\n".join([line, line, "end"]).splitlines() == [line, line, "end"] or not name
    assert class_names.unescape(line.encode().decode()) == name
    assert (line == name) == (name not in STRANGE_NAMES)


def test_different_class_names_are_different_lines():
    alphabet = ["\\", "x", "u", "f1", "0", "\n", os.fsdecode(b"\xf1"), "\xf1", "\u008a"]
    names = {"".join(p) for n in range(5) for p in itertools.product(alphabet, repeat=n)}
    lines = {class_names.escape(name) for name in names}
    assert len(lines) == len(names) and {class_names.unescape(line) for line in lines} == names


def test_class_folders_of_any_name(make_folder, monkeypatch):
    made = make_folder({"train": {"a": [noise(8, 8, 3)]}, "test": {"a": [noise(8, 8, 3)]}})
    for name in STRANGE_NAMES[:3]:
        shutil.copytree(f"{made}/train/a", f"{made}/train/{name}")
    with open(os.path.join(made, "train", "a", os.fsdecode(b"notes.\xf1")), "w"):
        pass
    # A terminal takes UTF-8 alone.
    printed = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
    monkeypatch.setattr("sys.stdout", printed)
    d = data.load("image_folder", made)
    assert d.classes == tuple(sorted(["a", *STRANGE_NAMES[:3]])) and len(d.train) == 4
    lines = printed.buffer.getvalue().decode().splitlines()
    assert lines[0] == "Not .jpg or .png, ignored: 1 .\\xf1"
    assert lines[1] == r"No image of ni\xf1o, two\u000alines, \x80 \xff\xfe in test"
    shutil.rmtree(f"{made}/train/a")
    with pytest.raises(UserError, match="has no image of a in train"):
        data.load("image_folder", made)


def test_a_folder_of_classes_without_splits_is_told_so(make_folder):
    folder = make_folder({"train": ONE})
    with pytest.raises(UserError, match="has images as CLASS/IMAGE, without splits"):
        data.load("image_folder", f"{folder}/train")


def test_an_image_that_is_no_longer_there_is_named(make_folder):
    folder = make_folder({"train": ONE, "test": ONE})
    os.remove(f"{folder}/test/b/0.png")
    os.symlink("/nowhere.png", f"{folder}/test/b/0.png")
    with pytest.raises(UserError, match="test/b/0.png"):
        data.load("image_folder", folder)


def test_names_of_data_sets():
    for arguments, text in (
        (("cifar11",), "Did you mean cifar1"),
        (("image_folder",), "needs `data_dir`, a folder of SPLIT/CLASS/IMAGE"),
        (("digits", "/"), "does not go with"),
        (("cifar10", "/nowhere"), "is not there"),
        (("imdb_reviews",), "not for image classification"),
    ):
        with pytest.raises(UserError, match=text):
            data.load(*arguments)


def test_rows_say_what_the_data_sets_are():
    rows = datasets.described()
    assert [*rows] == [*data.DATASETS, "any other name"]
    assert [name for name, row in rows.items() if row.reads_files] == [
        "image_folder",
        "tiny_imagenet",
    ]
    assert datasets.find("digits").folder is None and "SPLIT/CLASS" in rows["image_folder"].folder
    assert not datasets.find("emnist/letters").flip and datasets.find("cifar10:3.0.2").flip
    assert all(row.summary and row.folder for name, row in rows.items() if name != "digits")


def test_tensorflow_datasets_by_name():
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=20):
        d = data.load("cifar100")
        assert (
            d.image_shape == (32, 32, 3) and len(d.classes) == 100 and len(d.train) == 20 and d.flip
        )
        assert not data.load("mnist").flip


@pytest.fixture
def imagenet(tmp_path):
    """A folder with imagenet2012 as tensorflow-datasets prepares it.

    Its images are of several sizes, its test images have no labels.
    """
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "file_name": tfds.features.Text(),
            "label": tfds.features.ClassLabel(num_classes=1000),
        }
    )
    examples = lambda labels: [
        (i, {"image": noise(20 + i, 30 - i, 3, seed=i), "file_name": str(i), "label": label})
        for i, label in enumerate(labels)
    ]
    tfds.dataset_builders.store_as_tfds_dataset(
        "imagenet2012",
        "5.1.0",
        features,
        data_dir=tmp_path,
        split_datasets={
            "train": examples(range(20)),
            "validation": examples(range(6)),
            "test": examples([-1] * 6),
        },
    )
    return str(tmp_path)


@pytest.mark.parametrize(
    "parts, problem",
    [
        ({"test": [0, 1]}, "mnist has splits test: it needs train and test"),
        ({"train": [0, 1, -1], "test": [0, 1]}, "no label of 1 of 3 images in train"),
        ({"train": [0, 1], "test": [0, 1, -1, -1]}, "no label of 2 of 4 images in test"),
    ],
)
def test_sets_of_tensorflow_datasets_that_cannot_be_used(parts, problem, tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(shape=(28, 28, 1)),
        "label": tfds.features.ClassLabel(num_classes=10),
    }
    tfds.dataset_builders.store_as_tfds_dataset(
        "mnist",
        "3.0.1",
        tfds.features.FeaturesDict(features),
        data_dir=tmp_path,
        split_datasets={
            split: [(i, {"image": noise(28, 28, 1), "label": k}) for i, k in enumerate(labels)]
            for split, labels in parts.items()
        },
    )
    # Whether the first one that is read has a label is chance.
    monkeypatch.setattr(from_tfds, "_labelled_splits", lambda builder, tfds: [*builder.info.splits])
    with pytest.raises(UserError, match=problem):
        data.load("mnist", str(tmp_path))


def test_imagenet_streams_resumes_and_is_shared_by_workers(imagenet, monkeypatch):
    kept = data.load("imagenet2012", imagenet, image_size=16)
    monkeypatch.setattr(storage, "MEMORY_LIMIT", 0)
    d = data.load("imagenet2012", imagenet, image_size=16)
    assert isinstance(d.train, storage.Stream)
    assert isinstance(kept.train, storage.Arrays)
    assert d.mean == kept.mean
    assert len(d.train) == 20 and d.classes[0] == "n01440764"
    # The test images of ImageNet have no labels.
    for images in (d, kept):
        assert sorted(np.concatenate([y for _, y in data.test_batches(images, 4)])) == list(
            range(6)
        )
    dataset = data.train_batches(d, 6, 3, seed=1)
    whole, again = ([(v.numpy(), y.numpy()) for v, y in dataset] for _ in range(2))
    assert len(whole) == 9 and same(whole, again)
    assert same(whole[4:], batches(d, 6, 3, seed=1, start=4))
    assert same(whole, joined(d, 6, 3, seed=1))
    assert same(whole[4:], joined(d, 6, 3, seed=1, start=4, n=3))
    assert not same(whole, batches(d, 6, 3, seed=2))
    epochs = [np.concatenate([y for _, y in whole[i : i + 3]]) for i in (0, 3)]
    assert len(set(epochs[0])) == 18 and not np.array_equal(*epochs)


def test_a_worker_decodes_only_its_part_of_a_stream():
    decoded = []

    def decode(image):
        tf.numpy_function(lambda i: decoded.append(int(i)), [image], [])
        return tf.fill([8, 8, 3], tf.cast(image, tf.uint8))

    records = tf.data.Dataset.from_tensor_slices((np.arange(24), np.arange(24)))
    stream = storage.Stream(records, 24, decode)
    d = data.ImageData("big", ("a", "b"), (8, 8, 3), stream, stream, (0.0,) * 3, (1.0,) * 3)
    seen = np.concatenate([y for _, y in batches(d, 8, 1, start=1, shard=(1, 2))])
    assert len(seen) == 8 and sorted(decoded) == sorted(seen)


def test_sets_fetched_by_hand_say_so(tmp_path):
    with pytest.raises(
        UserError, match="downloaded by hand. With .*manual as manual_dir: .*ILSVRC2012_img_"
    ):
        data.load("imagenet2012", str(tmp_path), image_size=32)
    assert os.listdir(tmp_path) == []


def test_a_missing_set_without_network_is_refused_soon(tmp_path, monkeypatch):
    monkeypatch.setattr(from_tfds, "_reachable", lambda url: False)
    with pytest.raises(
        UserError, match=r"cifar-100-binary.tar.gz in .*manual, or take the data set digits"
    ):
        data.load("cifar100", str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_an_address_that_does_not_answer_is_given_up():
    began = time.monotonic()
    # Reserved for documentation: no machine has it.
    assert not from_tfds._reachable("http://192.0.2.1/archive.tar.gz", seconds=1)
    assert time.monotonic() - began < 5


@pytest.fixture
def tiny_imagenet(tmp_path):
    """A folder as the archive of Tiny ImageNet unpacks.

    It has three classes, of which two have the same first word.
    """
    root = tmp_path / "tiny-imagenet-200"
    words = {
        "n3": "crane",
        "n1": "goldfish, Carassius auratus",
        "n2": "crane, machine",
        "n9": "not used",
    }
    (root / "val" / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("n3\nn1\nn2\n")
    (root / "words.txt").write_text("".join(f"{wnid}\t{text}\n" for wnid, text in words.items()))
    jpeg = lambda shade, channels: tf.io.encode_jpeg(
        np.full((64, 64, channels), shade, np.uint8)
    ).numpy()
    for k, wnid in enumerate(("n3", "n1", "n2")):
        (root / "train" / wnid / "images").mkdir(parents=True)
        for i in range(3):
            (root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG").write_bytes(
                jpeg(50 * k + i, 1 if i == 2 else 3)
            )
        (root / "val" / "images" / f"val_{k}.JPEG").write_bytes(jpeg(50 * k, 3))
    (root / "val" / "val_annotations.txt").write_text(
        "".join(
            f"val_{k}.JPEG\t{wnid}\t0\t32\t44\t62\n" for k, wnid in enumerate(("n3", "n1", "n2"))
        )
    )
    return root


def test_tiny_imagenet(tiny_imagenet, capsys):
    for folder in (tiny_imagenet, tiny_imagenet.parent):
        d = data.load("tiny_imagenet", str(folder))
        assert d.classes == ("crane (n3)", "goldfish", "crane (n2)")
        assert d.image_shape == (64, 64, 3) and (len(d.train), len(d.test)) == (9, 3)
        for part in (d.train, d.test):
            images, labels = part.images.numpy().astype(int), part.labels.numpy()
            assert (np.abs(images - 50 * labels[:, None, None, None]) <= 3).all()
    assert "train: 9 images of 64×64 pixels; 3 grey\n" in capsys.readouterr().out
    assert data.load("tiny_imagenet", str(tiny_imagenet), image_size=32).image_shape == (32, 32, 3)


@pytest.mark.parametrize(
    "missing", ["wnids.txt", "words.txt", "train/n1", "val/val_annotations.txt"]
)
def test_what_is_missing_of_tiny_imagenet_is_named(tiny_imagenet, missing):
    os.rename(tiny_imagenet / missing, tiny_imagenet.parent / "away")
    with pytest.raises(
        UserError, match=f"{missing}.*: No such file.*give the folder tiny-imagenet-200 of"
    ) as e:
        data.load("tiny_imagenet", str(tiny_imagenet))
    assert "\n" not in str(e.value)


def test_tiny_imagenet_that_is_damaged(tiny_imagenet):
    load = lambda: data.load("tiny_imagenet", str(tiny_imagenet))
    os.remove(tiny_imagenet / "val" / "images" / "val_1.JPEG")
    with pytest.raises(UserError, match="val_1.JPEG cannot be read"):
        load()
    annotations = tiny_imagenet / "val" / "val_annotations.txt"
    for text, said in (
        ("val_0.JPEG\tn7\n", "does not list 'n7'"),
        ("val_0.JPEG\n", "fewer than 2"),
        ("", "0 validation"),
    ):
        annotations.write_text(text)
        with pytest.raises(UserError, match=said):
            load()
    with pytest.raises(UserError, match="needs `data_dir`, the folder tiny-imagenet-200 of"):
        data.load("tiny_imagenet")
