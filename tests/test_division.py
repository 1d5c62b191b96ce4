"""Images that are divided into training, validation and test images; folders as they lie."""

import os
import shutil

import numpy as np
import pytest
import tensorflow as tf
from helpers import noise
from PIL import Image
from tensorflow import keras

from tf_pcl import data
from tf_pcl.data import image_files, image_folder, labels_file, splits, storage
from tf_pcl.deploy import predict
from tf_pcl.errors import UserError


def numbered(*sizes):
    """Arrays whose images number themselves, with so many of each class, mixed."""
    labels = np.random.RandomState(1).permutation(np.repeat(np.arange(len(sizes)), sizes))
    numbers = np.arange(len(labels)).astype(np.uint16)
    return storage.Arrays(numbers.view(np.uint8).reshape(-1, 1, 1, 2), labels)


def numbers(part):
    return part.images.numpy().reshape(-1, 2).view(np.uint16)[:, 0]


@pytest.mark.parametrize(
    "sizes, examples", [((50, 30, 20), 0.2), ((50, 30, 20), 10), ((7, 1, 90, 2), 0.37), ((9, 9), 1)]
)
def test_what_is_held_out_is_of_each_class_its_share(sizes, examples):
    images = numbered(*sizes)
    held = lambda seed, parameter="validation_examples": splits.hold_out(
        images, examples, seed, parameter, "d"
    )
    left, taken = held(0)
    wanted = examples if examples >= 1 else round(examples * sum(sizes))
    assert len(taken) == wanted
    # No image is in two parts or in none, and both have the order of before.
    assert sorted([*numbers(left), *numbers(taken)]) == list(range(sum(sizes)))
    assert (np.diff(numbers(left).astype(int)) > 0).all()
    counts = np.bincount(taken.all_labels(), minlength=len(sizes))
    for size, count in zip(sizes, counts):
        assert abs(count - size * wanted / sum(sizes)) < 1 + 1e-9 and count <= size - 1
    for part in (left, taken):
        labels = images.all_labels()[numbers(part)]
        np.testing.assert_array_equal(part.all_labels(), labels)
    np.testing.assert_array_equal(numbers(held(0)[1]), numbers(taken))
    if wanted > 1:
        assert not np.array_equal(numbers(held(1)[1]), numbers(taken))
        assert not np.array_equal(numbers(held(0, "test_examples")[1]), numbers(taken))


def test_each_class_keeps_an_image_to_train_on():
    left, taken = splits.hold_out(numbered(5, 1, 2), 5, 0, "test_examples", "d")
    assert sorted(left.all_labels()) == [0, 1, 2] and len(taken) == 5
    with pytest.raises(UserError, match="`test_examples=6`: 6 of the 8 images of d are too many"):
        splits.hold_out(numbered(5, 1, 2), 6, 0, "test_examples", "d")


def test_what_is_held_out_of_digits_is_not_trained_or_tested_on():
    whole, d = data.load("digits"), data.load("digits", validation_examples=0.1, seed=3)
    assert (len(d.train), len(d.validation), len(d.test)) == (1293, 144, 360) and not d.lists
    np.testing.assert_array_equal(d.test.images, whole.test.images)
    rows = lambda part: {tuple(image.ravel()) for image in part.images.numpy()}
    assert len(rows(d.train) | rows(d.validation)) == len(rows(whole.train))
    few = data.load("digits", validation_examples=144, train_examples=100, seed=3)
    np.testing.assert_array_equal(few.validation.images, d.validation.images)
    assert len(few.train) == 100 and rows(few.train) <= rows(d.train)
    got = np.concatenate([y for _, y in data.test_batches(d, 50, "validation")])
    np.testing.assert_array_equal(got, d.validation.labels)
    with pytest.raises(UserError, match="no validation images"):
        data.test_batches(whole, 50, "validation")
    with pytest.raises(UserError, match="digits has 360 test images of its own: leave it out"):
        data.load("digits", test_examples=0.2)


def photos(seed, count, side=8):
    return [noise(side, side, 3, seed=100 * seed + i) for i in range(count)]


def of_classes(make_folder, **sizes):
    """A folder of CLASS/IMAGE with so many images of each class."""
    classes = {name: photos(k, size) for k, (name, size) in enumerate(sizes.items())}
    return make_folder({".": classes})


def test_a_folder_of_classes_is_divided(make_folder, monkeypatch):
    folder = of_classes(make_folder, cat=20, dog=10, eel=10)
    settings = dict(test_examples=0.2, validation_examples=4)
    d = data.load("image_folder", folder, **settings)
    assert d.classes == ("cat", "dog", "eel")
    assert (len(d.train), len(d.validation), len(d.test)) == (28, 4, 8)
    np.testing.assert_array_equal(np.bincount(d.test.labels), [4, 2, 2])
    np.testing.assert_array_equal(np.bincount(d.validation.labels), [2, 1, 1])
    listed = [path for paths in d.lists.values() for path in paths]
    assert sorted(listed) == sorted(
        f"{name}/{i}.png" for name, n in (("cat", 20), ("dog", 10), ("eel", 10)) for i in range(n)
    )
    # What is listed is what is there.
    for split, paths in d.lists.items():
        images = getattr(d, split).images.numpy()
        stored = {image.tobytes() for image in images}
        for path in paths:
            with open(os.path.join(folder, path), "rb") as f:
                assert tf.io.decode_png(f.read()).numpy().tobytes() in stored
    moved = shutil.move(folder, folder + " elsewhere")
    again = data.load("image_folder", moved, **settings)
    assert again.lists == d.lists
    np.testing.assert_array_equal(again.train.images, d.train.images)
    other = data.load("image_folder", moved, seed=1, **settings).lists
    assert other["test"] == d.lists["test"] and other["validation"] != d.lists["validation"]
    monkeypatch.setattr(storage, "MEMORY_LIMIT", 0)
    on_disk = data.load("image_folder", moved, **settings)
    assert on_disk.lists == d.lists
    np.testing.assert_array_equal(on_disk.test.fetch(tf.range(8))[0], d.test.images)


def test_a_folder_without_splits_names_the_option(make_folder):
    folder = of_classes(make_folder, cat=3, dog=3)
    with pytest.raises(UserError, match="without splits: give `test_examples=0.2`"):
        data.load("image_folder", folder)
    with pytest.raises(UserError, match="at most 4 can be taken"):
        data.load("image_folder", folder, test_examples=5)


def test_names_of_splits(make_folder, capsys):
    one = lambda k: {"a": photos(2 * k, 2), "b": photos(2 * k + 1, 2)}
    folder = make_folder({"training": one(0), "valid": one(1), "extra": one(3)})
    d = data.load("image_folder", folder)
    assert len(d.train) == len(d.test) == 4 and d.validation is None
    assert "Splits that are not used: extra\n" in capsys.readouterr().out
    # Beside a test split, it is for validation.
    shutil.move(f"{folder}/extra", f"{folder}/test")
    both = data.load("image_folder", folder)
    np.testing.assert_array_equal(both.validation.images, d.test.images)
    assert not np.array_equal(both.test.images, d.test.images)
    with pytest.raises(UserError, match="image_folder has 4 validation images of its own"):
        data.load("image_folder", folder, validation_examples=2)
    shutil.rmtree(f"{folder}/valid")
    shutil.rmtree(f"{folder}/test")
    with pytest.raises(UserError, match="has splits training.*or `test_examples=0.2`"):
        data.load("image_folder", folder)
    assert len(data.load("image_folder", folder, test_examples=2).test) == 2


def test_copies_in_another_split_are_counted(make_folder, capsys):
    large = noise(200, 200, 3, seed=5)  # More than the part that is read for the header.
    other = large.copy()
    other[-1, -1] ^= 1
    pngs = [tf.io.encode_png(image, compression=0).numpy() for image in (large, other)]
    assert pngs[0][: image_files._START] == pngs[1][: image_files._START] and pngs[0] != pngs[1]
    a = photos(1, 3, 200)
    folder = make_folder(
        {
            "train": {"a": [*a, pngs[0]], "b": photos(2, 3, 200)},
            "val": {"a": [a[1]], "b": photos(3, 1, 200)},
            "test": {"a": [a[0], pngs[1]], "b": [pngs[0]]},
        }
    )
    data.load("image_folder", folder)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "Byte for byte" in line]
    assert "too: 1 of the validation images and 2 of the test images, such as" in line
    assert f"{folder}/val/a/0.png = {folder}/train/a/1.png" in line


def csv(folder, text, name="labels.csv"):
    path = os.path.join(folder, name)
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)
    return path


def test_labels_of_a_file(make_folder, capsys):
    folder = make_folder({"0": {"x": photos(0, 6)}, "1": {"y": photos(1, 6)}})
    lines = [
        f"{i},{i}/{c}/{k}{s},{9 + i}"
        for i, c, s in ((0, "x", ""), (1, "y", ".png"))
        for k in range(5)
    ]
    path = csv(folder, "number,Image ID,diagnosis\n" + "\n".join(lines) + "\n\n")
    d = data.load("image_folder", folder, labels=path, test_examples=2)
    out = capsys.readouterr().out.splitlines()
    assert "Labels: the column Image ID for file names, diagnosis for labels" in out
    assert "Left out: 2 images without a label" in out and len(out) == 3
    # Numbers have the order of numbers.
    assert d.classes == ("9", "10") and len(d.train) == 8 and len(d.test) == 2
    assert all(name.startswith(("0/x", "1/y")) for name in d.lists["train"])
    label = dict(zip(d.lists["test"], (0, 1)))
    assert sorted(d.test.labels.numpy()) == sorted(label.values())
    named = data.load(
        "image_folder", folder, labels=path, labels_columns="Image ID,number", test_examples=2
    )
    assert named.classes == ("0", "1") and named.lists == d.lists


def test_splits_of_a_file_of_labels(make_folder, capsys):
    folder = make_folder({".": {"all": photos(0, 6)}})
    rows = zip(range(6), ("cat", "dog") * 3, ("train", "Train", "test", "test", "dev", "dev"))
    text = "\ufeffpath;kind;split\n" + "".join(f"all/{i}.png;{c};{s}\n" for i, c, s in rows)
    d = data.load("image_folder", folder, labels=csv(folder, text))
    assert "the column path for file names, kind for labels, split for splits" in (
        capsys.readouterr().out
    )
    assert [len(part) for part in (d.train, d.validation, d.test)] == [2, 2, 2]
    assert d.lists["validation"] == ["all/4.png", "all/5.png"] and d.classes == ("cat", "dog")


@pytest.mark.parametrize(
    "text, columns, problem",
    [
        (
            "a,b,c\n1,2,3\n",
            None,
            "not clear which of its columns a, b, c has the file names: .*`labels_columns=",
        ),
        ("file,label\n", None, "no lines after"),
        ("", None, "no lines after"),
        ("file,label\nall/0.png\n", None, "line 2 has 1 cells"),
        ("file,label\nall/0.png, \n", None, r"line 2 \(all/0.png\) has no label"),
        ("file,label\nall/9.png,a\n", None, "such as all/9.png: give their paths below `data_dir`"),
        ("file,label\n../all/0.png,a\n", None, "do not exist"),
        ("file,label\nall/0.png,a\nall/0.png,b\n", None, "occurs twice"),
        ("file,label,set\nall/0.png,a,seven\n", None, "has the split 'seven'; allowed are train"),
        ("file,label\nall/0.png,a, b\nall/1.png,c\n", None, "line 2 has 3 cells, the first has 2"),
        ('file,label\nall/0.png,"a\nall/1.png,b\n', None, "cannot be read as a CSV file"),
        ("file,label,label\nall/0.png,a,x\nall/1.png,b,y\n", None, "several columns label"),
        ("file,kind,kind\nall/0.png,a,x\nall/1.png,b,y\n", "file,kind", "several columns kind"),
        ("file,label\nall/0.png,a\n", "file,kind", "has no column kind: it has file, label"),
        ("file,label\nall/0.png,a\n", "file", "two or three columns"),
        (
            "file,label\nall/0.png,a\nall/1.png,b\n",
            None,
            "it has splits train.*`test_examples=0.2`",
        ),
    ],
)
def test_files_of_labels_that_cannot_be_used(make_folder, text, columns, problem):
    folder = make_folder({".": {"all": photos(0, 2)}})
    with pytest.raises(UserError, match=problem) as refused:
        data.load("image_folder", folder, labels=csv(folder, text), labels_columns=columns)
    assert "\n" not in str(refused.value)


def test_labels_are_read_as_they_are_meant(make_folder, capsys):
    folder = make_folder({".": {"all": photos(0, 9)}})
    labels = ["caf\u00e9", "cafe\u0301", ' "a, b"', '"a, b"', "01", "1", "1.0", "Tea", "tea"]
    rows = "".join(f"all/{i}.png,{label},\n" for i, label in enumerate(labels))
    d = data.load(
        "image_folder", folder, labels=csv(folder, "file,label\n" + rows), test_examples=1
    )
    assert d.classes == ("01", "1", "1.0", "Tea", "a, b", "caf\u00e9", "tea")
    assert "names are alike: 01, 1, 1.0; Tea, tea\n" in capsys.readouterr().out


def test_the_order_of_equal_numbers_is_not_left_to_chance():
    # That of a set would change from process to process.
    for names in (["1", "01", "001", "2"], ["001", "01", "2", "1"]):
        assert labels_file.in_order(dict.fromkeys(names)) == ["001", "01", "1", "2"]


def test_links_that_lead_back_are_not_followed(make_folder):
    folder = of_classes(make_folder, cat=3, dog=3)
    for i, name in enumerate(("cat", "dog", "cat")):
        os.symlink(os.path.join(folder, "dog" if i else "."), f"{folder}/{name}/up{i}")
    found = [*image_folder.files_below(folder)]
    images = [f"{c}/{i}.png" for c in ("cat", "dog") for i in range(3)]
    linked = [f"cat/up2/{i}.png" for i in range(3)]
    assert [os.path.relpath(path, folder) for path in found] == images[:3] + linked + images[3:]
    assert predict.find([folder]) == found


def test_labels_go_with_folders_alone():
    with pytest.raises(UserError, match="`labels=x.csv`: it does not go with the data set digits"):
        data.load("digits", labels="x.csv")
    with pytest.raises(UserError, match="`labels_columns=a,b`: it needs the file"):
        data.load("digits", labels_columns="a,b")


def test_names_of_columns_are_told_apart():
    assert labels_file._guessed("f", ["id", "file_name", "Class"]) == (1, 2, None)
    assert labels_file._guessed("f", ["image", "zone"]) == (0, 1, None)
    assert labels_file._guessed("f", ["photo", "label", "Set"]) == (0, 1, 2)


# How an upright image lies in a file, by EXIF orientation.
LIES = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x, -1),
}


def exif(turn):
    made = Image.Exif()
    made[0x0112] = turn
    return made


def test_webp_and_tiff_are_read_by_pillow(make_folder, monkeypatch, capsys):
    plain = noise(6, 8, 3)
    folder = make_folder({s: {"a": [plain], "b": [plain]} for s in ("train", "test")})
    turned = exif(6)
    alpha = np.dstack([plain, np.zeros((6, 8), np.uint8)])
    wide = np.arange(48, dtype=np.uint16).reshape(6, 8) * 1000
    kinds = {
        "lossless.webp": (plain, dict(lossless=True), plain),
        "alpha.webp": (alpha, dict(lossless=True, exact=True), plain),
        "turned.webp": (np.rot90(plain), dict(lossless=True, exif=turned), plain),
        "plain.tif": (plain, {}, plain),
        **{
            f"turned {turn}.tif": (lies(plain), dict(exif=exif(turn)), plain)
            for turn, lies in LIES.items()
        },
        "grey.TIFF": (plain[..., 0], dict(format="TIFF"), plain[..., :1].repeat(3, 2)),
        "wide.tif": (wide, {}, (wide >> 8).astype(np.uint8)[..., None].repeat(3, 2)),
    }
    for name, (pixels, settings, _) in kinds.items():
        Image.fromarray(pixels).save(f"{folder}/train/a/{name}", **settings)
    with open(f"{folder}/train/a/plain.tif", "rb") as f, open(f"{folder}/train/b/1.png", "wb") as g:
        g.write(f.read()[:200])  # Neither a PNG file nor a whole TIFF file.
    d = data.load("image_folder", folder, on_bad_image="skip")
    out = capsys.readouterr().out
    assert (
        "train: 15 images of 8×6 pixels; 2 grey; 1 with alpha (dropped); 1 of 16 bits; 8 turned"
        in out
    )
    assert "1 cannot be read" in out
    got = dict(zip((os.path.basename(p.decode()) for p in d.train.origin.paths), d.train.images))
    for name, (_, _, expected) in kinds.items():
        np.testing.assert_array_equal(got[name], expected, err_msg=name)
    monkeypatch.setattr(image_files, "pillow", lambda: None)
    assert len(data.load("image_folder", folder, on_bad_image="skip").train) == 2
    assert "ignored: 9 .tif, 3 .webp, 1 .TIFF (with Pillow, .tif, .tiff, .webp can be read)" in (
        capsys.readouterr().out
    )


def test_arrays_and_datasets_become_batches_of_views(make_folder):
    folder = of_classes(make_folder, cat=12, dog=8)
    stored = data.load("image_folder", folder, test_examples=4)
    as_keras = keras.utils.image_dataset_from_directory(folder, image_size=(8, 8), batch_size=6)
    for dataset in (as_keras, as_keras.unbatch()):
        d = data.from_dataset(dataset, classes=["cat", "dog"], test_examples=4)
        assert (len(d.train), len(d.test)) == (16, 4) and d.classes == ("cat", "dog")
        pairs = lambda part: {
            (x.tobytes(), int(y)) for x, y in zip(part.images.numpy(), part.labels.numpy())
        }
        assert pairs(d.train) | pairs(d.test) == pairs(stored.train) | pairs(stored.test)
    assert data.from_dataset(as_keras).classes == ("cat", "dog")
    views, labels = next(iter(data.train_batches(d, 8, 1, views=2)))
    assert views.shape == (8, 2, 8, 8, 3) and labels.shape == (8,)
    x, y = noise(20, 8, 8), np.arange(20) % 4
    grey = data.from_arrays(x, np.eye(4)[y], test=(x[:5], y[:5, None]), validation_examples=4)
    assert grey.image_shape == (8, 8, 1) and [*grey.test.labels.numpy()] == [*y[:5]]
    more = data.from_arrays(x, np.eye(6)[y])
    assert more.classes == ("0", "1", "2", "3", "4", "5")
    assert grey.classes == ("0", "1", "2", "3") and len(grey.validation) == 4
    assert not [*data.test_batches(data.from_arrays(x, y), 4)]


@pytest.mark.parametrize(
    "x, y, given, problem",
    [
        (noise(4, 8, 8, 3) / 255, [0, 1, 0, 1], {}, "raw values from 0 to 255"),
        (noise(4, 8, 8, 3) > 99, [0, 1, 0, 1], {}, "raw values from 0 to 255"),
        (noise(4, 8, 8, 3) // 128, [0, 1, 0, 1], {}, "raw values from 0 to 255"),
        (np.where(noise(4, 8, 8, 3) > 9, 7, np.nan), [0, 1, 0, 1], {}, "raw values from 0 to 255"),
        (noise(4, 8, 8, 3), [[0.9, 0.1]] * 4, {}, "must be one-hot"),
        (noise(4, 8, 8, 3), [[1, 1, 0]] * 4, {}, "must be one-hot"),
        (noise(4, 8, 8, 3), list("abab"), {}, "labels must be numbers"),
        (
            noise(4, 8, 8, 3),
            [0, 1, 0, 1],
            dict(test_examples=-1),
            "`test_examples=-1`: give a whole",
        ),
        (noise(4, 8, 8, 3), [0, 1, 0], {}, r"shapes \(4, 8, 8, 3\) and \(3,\)"),
        (noise(4, 8, 8, 3), [0, 1, 0, 0.5], {}, "whole numbers"),
        (noise(4, 8, 8, 3), [0, 1, 2, 3], dict(classes=["a", "b"]), "label 3 has no name"),
        (noise(4, 8, 8, 3), [0, 1, 0, 1], dict(test=(noise(4, 9, 9, 3), [0] * 4)), "one size"),
        (noise(4, 8, 8, 3), [0] * 4, {}, "1 class"),
    ],
)
def test_arrays_that_are_no_images_are_refused(x, y, given, problem):
    with pytest.raises(UserError, match=problem):
        data.from_arrays(x, y, **given)


def test_a_dataset_without_an_end_is_refused():
    endless = tf.data.Dataset.from_tensor_slices((noise(4, 8, 8, 3), [0, 1, 0, 1])).repeat()
    for dataset in (endless, endless.batch(2)):
        with pytest.raises(UserError, match="never ends: give it without repeat"):
            data.from_dataset(dataset)


def test_classes_that_train_examples_leave_out_are_named(make_folder, capsys):
    folder = make_folder(
        {s: {c: photos(k, 2) for k, c in enumerate("abc")} for s in ("train", "test")}
    )
    d = data.load("image_folder", folder, train_examples=2)
    lost = ", ".join(name for k, name in enumerate(d.classes) if k not in d.train.all_labels())
    assert f"No image of {lost} is among the 2 training images\n" in capsys.readouterr().out
