"""Decodes image files of any size, grey or CMYK, with alpha, turned by EXIF, or damaged.

Every file becomes uint8 [H, W, 3]: grey is repeated, alpha is dropped (colours stay as they are
stored, as in serving and in most libraries), CMYK is converted, 16 bits are cut to 8, and an image
is turned upright as its EXIF orientation says. WebP and TIFF files are read by Pillow, where that
is installed, to the same effect; TensorFlow cannot read them.
"""

import collections
import concurrent.futures
import hashlib
import io
import os
import random
import struct
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Callable, NamedTuple, Optional, Union

import numpy as np
import tensorflow as tf

from tf_pcl.data import storage
from tf_pcl.data.class_names import escape
from tf_pcl.data.splits import Request
from tf_pcl.errors import UserError

# How many bytes of a file are read for its header; they also identify the file.
_START = 1 << 16
# How WebP and TIFF files begin.
_PILLOW_STARTS = (b"RIFF", b"II*\0", b"MM\0*")

# How a report describes images that are not plain RGB.
TRAITS = ("grey", "with alpha (dropped)", "of 16 bits", "CMYK", "turned upright")


class Header(NamedTuple):
    """The header of an image file.

    Args:
      width: in pixels, once the image is upright.
      height: in pixels, once the image is upright.
      orientation: EXIF orientation 1–8 of the decoded image; 1 is upright.
      traits: those of TRAITS that it has.
    """

    width: int
    height: int
    orientation: int = 1
    traits: tuple = ()


def header(data: bytes) -> Header:
    """Reads the header of a JPEG, PNG, GIF, BMP or, with Pillow, WebP or TIFF file from its bytes.

    Raises:
      ValueError: if they are not from such a file, or end within the header.
    """
    try:
        if data.startswith(b"\xff\xd8"):
            return _jpeg(data)
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            return _png(data)
        if data.startswith(b"GIF8"):
            return Header(*struct.unpack_from("<HH", data, 6))
        if data.startswith(b"BM"):
            size, width, height = struct.unpack_from("<Iii", data, 14)
            if size < 40:
                raise ValueError("a BMP file of OS/2")
            return Header(width, abs(height))  # Negative where the rows go down.
        if data.startswith(_PILLOW_STARTS) and pillow():
            return _header_by_pillow(data)
    except struct.error as e:
        raise ValueError("the file ends within its header") from e
    raise ValueError("not a JPEG, PNG, GIF or BMP file")


def pillow() -> Any:
    """Returns the module PIL.Image, or None where Pillow is not installed."""
    try:
        from PIL import Image
    except ImportError:
        return None
    return Image


def _header_by_pillow(data: bytes) -> Header:
    image = _opened(data)
    turn = image.getexif().get(0x0112, 1)
    # Newer versions of Pillow give the size of a TIFF image once it is upright.
    size = (image.tag_v2[256], image.tag_v2[257]) if image.format == "TIFF" else image.size
    width, height = size[::-1] if turn in range(5, 9) else size
    mode = image.mode
    alpha = mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    grey = mode in ("1", "L", "LA") or mode.startswith("I")
    turned = turn in range(2, 9)
    return Header(
        width, height, 1, _traits(grey, alpha, mode.startswith("I"), mode == "CMYK", turned)
    )


def _opened(data: bytes) -> Any:
    """Opens a WebP or TIFF image with PIL.Image; ValueError if that is not possible."""
    try:
        image = pillow().open(io.BytesIO(data), formats=("WEBP", "TIFF"))
    except Exception as e:  # Damaged files raise anything.
        raise ValueError(str(e)) from e
    if image.mode == "F":
        raise ValueError("its pixels are not whole numbers")
    return image


def _decode_by_pillow(data: bytes) -> np.ndarray:
    """Returns the first image of a WebP or TIFF file, uint8 [H, W, 3], upright."""
    from PIL import ImageOps

    image = _opened(data)
    # This turns a TIFF image, and the next line all others.
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        # 16 bits, which Pillow keeps in 32 if the numbers of the file are signed.
        return np.repeat(np.clip(pixels >> 8, 0, 255).astype(np.uint8)[..., None], 3, 2)
    if image.mode == "LA":
        image = image.getchannel("L")
    return np.asarray(image.convert("RGB"))


def _traits(*present):
    return tuple(trait for trait, there in zip(TRAITS, present) if there)


def _png(data: bytes) -> Header:
    width, height, bits, kind = struct.unpack_from(">IIBB", data, 16)
    turn, alpha, name, at = 1, kind in (4, 6), b"", 8
    while name not in (b"IDAT", b"IEND"):
        length, name = struct.unpack_from(">I4s", data, at)
        alpha |= name == b"tRNS"
        if name == b"eXIf":
            turn = orientation(data[at + 8 : at + 8 + length])
        at += 12 + length
    traits = _traits(kind in (0, 4), alpha, bits == 16, False, turn > 1)
    size = (height, width) if turn >= 5 else (width, height)
    return Header(*size, turn, traits)


def _jpeg(data: bytes) -> Header:
    turn, at = None, 2
    while True:
        at = data.find(b"\xff", at)
        if at < 0:
            raise ValueError("the file ends within its header")
        marker, size = struct.unpack_from(">xBH", data, at)
        if marker == 0xFF:  # Any number of these may precede a marker.
            at += 1
            continue
        # What follows the first segment of EXIF data only goes on with it.
        if marker == 0xE1 and turn is None and data.startswith(b"Exif\0\0", at + 4):
            turn = orientation(data[at + 10 : at + 2 + size])
        # Starts of frame are C0 to CF, except for C4, C8 and CC.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width, channels = struct.unpack_from(">xHHB", data, at + 4)
            turn = turn or 1
            size = (height, width) if turn >= 5 else (width, height)
            return Header(
                *size, turn, _traits(channels == 1, False, False, channels == 4, turn > 1)
            )
        at += 2 + size


def orientation(exif: bytes) -> int:
    """Returns the orientation 1–8 in EXIF data; 1 if there is none, or the data are damaged.

    Args:
      exif: the bytes from the TIFF header on.
    """
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order:
        try:
            (start,) = struct.unpack_from(order + "I", exif, 4)
            (entries,) = struct.unpack_from(order + "H", exif, start)
            for i in range(entries):
                tag, _, _, value = struct.unpack_from(order + "HHIH", exif, start + 2 + 12 * i)
                if tag == 0x0112:
                    return value if 1 <= value <= 8 else 1
        except struct.error:
            pass
    return 1


def exif_orientation(encoded: tf.Tensor) -> tf.Tensor:
    """Reads the EXIF orientation of an image file with TensorFlow's operations alone.

    For every file that `header` can read, it has the same result. It can be part of a SavedModel.

    Args:
      encoded: the bytes of the file, a string tensor [].

    Returns:
      int32 [], 1–8; 1 where there is none, it is damaged, or the file is no JPEG or PNG.
    """
    data = _Bytes(encoded)
    start = tf.where(data.size > 8, data.number(tf.constant(0, tf.int64), 4), 0)
    return tf.switch_case(
        tf.where(start == 0x89504E47, 1, tf.where(start // 0x10000 == 0xFFD8, 2, 0)),
        [lambda: tf.constant(1), lambda: _png_orientation(data), lambda: _jpeg_orientation(data)],
    )


def _png_orientation(data: "_Bytes") -> tf.Tensor:
    def next_chunk(at, turn, _):
        length, name = data.number(at, 4), data.number(at + 4, 4)
        end = tf.minimum(at + 8 + length, data.size)
        exif = name == int.from_bytes(b"eXIf", "big")
        turn = tf.cond(exif, lambda: _tiff_orientation(data, at + 8, end), lambda: turn)
        ends = [name == int.from_bytes(last, "big") for last in (b"IDAT", b"IEND")]
        return at + 12 + length, turn, ~tf.reduce_any(ends)

    return _search(data, 8, 1, next_chunk)


def _jpeg_orientation(data: "_Bytes") -> tf.Tensor:
    def next_segment(at, turn, _):
        # A segment begins with 0xFF; garbage may precede it.
        ahead = data.bytes[at : at + 4096] == 0xFF
        found = tf.reduce_any(ahead)
        at += tf.where(found, tf.argmax(ahead), 4096)
        whole = found & (at + 4 <= data.size)
        marker, length = data.number(at + 1, 1), data.number(at + 2, 2)
        # 0 stands for an orientation that is not known yet.
        exif = whole & (marker == 0xE1) & (turn == 0) & (data.number(at + 4, 6) == 0x457869660000)
        end = tf.minimum(at + 2 + length, data.size)
        turn = tf.cond(exif, lambda: _tiff_orientation(data, at + 10, end), lambda: turn)
        # Starts of frame are C0 to CF, except for C4, C8 and CC.
        others = (marker == 0xC4) | (marker == 0xC8) | (marker == 0xCC)
        frame = (marker >= 0xC0) & (marker <= 0xCF) & ~others
        # Any number of 0xFF may precede a marker.
        following = at + tf.where(marker == 0xFF, tf.constant(1, tf.int64), 2 + length)
        return tf.where(found, following, at), turn, whole & ~frame | ~found

    return tf.maximum(_search(data, 2, 0, next_segment), 1)


def _search(data: "_Bytes", at: int, turn: int, step: Callable) -> tf.Tensor:
    """Returns the orientation that steps (place, orientation, whether more follows) find."""
    # The limit ends the search in files that are made to prolong it.
    _, found, _ = tf.while_loop(
        lambda at, turn, more: more & (at < data.size),
        step,
        (tf.constant(at, tf.int64), tf.constant(turn), tf.constant(True)),
        maximum_iterations=1000,
    )
    return found


class _Bytes:
    """Reads numbers in a string tensor []; numbers beyond its end have no meaning."""

    def __init__(self, encoded: tf.Tensor):
        read = tf.io.decode_raw(encoded, tf.uint8)
        self.size = tf.size(read, tf.int64)
        # Padded, so that it is never empty.
        self.bytes = tf.pad(read, [[0, 1]])

    def number(self, at: tf.Tensor, count: int, little=False) -> tf.Tensor:
        """Returns the unsigned numbers of `count` bytes that begin at `at`, int64 [] or [n]."""
        places = tf.range(count, dtype=tf.int64)
        read = tf.gather(self.bytes, tf.minimum(at[..., None] + places, self.size))
        shifts = 8 * tf.where(little, places, count - 1 - places)
        return tf.reduce_sum(tf.bitwise.left_shift(tf.cast(read, tf.int64), shifts), -1)


def _tiff_orientation(data: _Bytes, start: tf.Tensor, end: tf.Tensor) -> tf.Tensor:
    """Does what `orientation` does, for the bytes in [start, end)."""
    order = data.number(start, 2)
    little = order == 0x4949
    known = (little | (order == 0x4D4D)) & (start + 8 <= end)
    entries = tf.where(known, start + data.number(start + 4, 4, little), end)
    # Only the first 10 bytes of an entry are read.
    within = tf.maximum((end - entries - 2 - 10) // 12 + 1, 0)
    count = tf.minimum(data.number(entries, 2, little), within)
    first = entries + 2 + 12 * tf.range(count)
    turns = data.number(first + 8, 2, little)[data.number(first, 2, little) == 0x0112]
    turn = tf.concat([turns[:1], [1]], 0)[0]
    return tf.cast(tf.where((turn >= 1) & (turn <= 8), turn, 1), tf.int32)


def upright(image: tf.Tensor, turn: tf.Tensor) -> tf.Tensor:
    """Turns an image upright.

    Args:
      image: [H, W, C].
      turn: its EXIF orientation, an int from 1 to 8.

    Returns:
      The image, [W, H, C] for the orientations 5 to 8.
    """

    def turned():
        plain = tf.cond(turn >= 5, lambda: tf.transpose(image, [1, 0, 2]), lambda: image)
        mirrored = tf.cond(
            tf.reduce_any(turn == [2, 3, 6, 7]), lambda: plain[:, ::-1], lambda: plain
        )
        return tf.cond(
            tf.reduce_any(turn == [3, 4, 7, 8]), lambda: mirrored[::-1], lambda: mirrored
        )

    return tf.cond(turn > 1, turned, lambda: image)


def decode(encoded: tf.Tensor, channels: int = 3) -> tf.Tensor:
    """Decodes the bytes of an image file, uint8 [H, W, channels]; an animation's first frame."""
    # TensorFlow's default for JPEG is wrong by up to 6 levels, and differently if the photo is
    # stored turned. Most other programs use the accurate method. It cannot make CMYK grey.
    image = tf.cond(
        tf.io.is_jpeg(encoded),
        lambda: tf.io.decode_jpeg(encoded, 3, dct_method="INTEGER_ACCURATE"),
        lambda: tf.cond(
            tf.strings.substr(encoded, 0, 4) == b"\x89PNG",
            lambda: tf.io.decode_png(encoded, 3),
            lambda: _gif_or_bmp(encoded),
        ),
    )
    return _of_channels(image, channels)


def _of_channels(image: tf.Tensor, channels: int) -> tf.Tensor:
    """Returns an image uint8 [H, W, 3] as uint8 [H, W, channels]."""
    image.set_shape([None, None, 3])
    return tf.image.rgb_to_grayscale(image) if channels == 1 else image


def _gif_or_bmp(encoded: tf.Tensor) -> tf.Tensor:
    image = tf.io.decode_image(encoded, 3, expand_animations=False)
    image.set_shape([None, None, 3])
    data, little = _Bytes(encoded), True
    # TensorFlow takes the numbers of colours for grey values in BMP files with a palette.
    numbered = (data.number(tf.constant(0, tf.int64), 2) == 0x424D) & (
        data.number(tf.constant(28, tf.int64), 2, little) == 8
    )
    start = 14 + data.number(tf.constant(14, tf.int64), 4, little)
    colours = start + 4 * tf.range(256, dtype=tf.int64)[:, None] + [2, 1, 0]
    palette = tf.gather(data.bytes, tf.minimum(colours, data.size))
    return tf.cond(
        numbered, lambda: tf.gather(palette, tf.cast(image[..., 0], tf.int32)), lambda: image
    )


def decode_any(encoded: tf.Tensor, channels: int = 3) -> tf.Tensor:
    """Decodes what `decode` does and, by Pillow, WebP and TIFF files.

    Args:
      encoded: the bytes of the file, a string tensor [].
      channels: 1 or 3.

    Returns:
      uint8 [H, W, channels].
    """

    def by_pillow() -> tf.Tensor:
        return _of_channels(tf.numpy_function(_decode_by_pillow, [encoded], tf.uint8), channels)

    start = tf.strings.substr(encoded, 0, 4)
    image = tf.cond(
        tf.reduce_any(start == tf.constant(_PILLOW_STARTS)),
        by_pillow,
        lambda: decode(encoded, channels),
    )
    image.set_shape([None, None, channels])
    return image


def decode_upright(encoded: tf.Tensor, channels: int = 3) -> tf.Tensor:
    """Decodes the bytes of an image file and turns the image upright as its EXIF says.

    Args:
      encoded: the bytes of the file, a string tensor [].
      channels: 1 or 3.

    Returns:
      uint8 [H, W, channels].
    """
    return upright(decode(encoded, channels), exif_orientation(encoded))


def resize(images: tf.Tensor, size: int) -> tf.Tensor:
    """Cuts the square in the middle of images and resizes it to `size` pixels a side.

    Args:
      images: uint8 [..., H, W, C].
      size: in pixels.
    """
    h, w = tf.shape(images)[-3], tf.shape(images)[-2]
    side = tf.minimum(h, w)
    top, left = (h - side) // 2, (w - side) // 2
    square = images[..., top : top + side, left : left + side, :]
    return tf.saturate_cast(
        tf.round(tf.image.resize(square, (size, size), antialias=True)), tf.uint8
    )


def fit(image: tf.Tensor, shape: Sequence[int]) -> tf.Tensor:
    """Brings an image of any size to that of a network, as `resize` does if that is square.

    Args:
      image: uint8 [H, W, C].
      shape: (H, W, C) of the result. If it is not square, the whole image is stretched.

    Returns:
      uint8 of that shape.
    """

    def resized() -> tf.Tensor:
        if shape[0] == shape[1]:
            return resize(image, shape[0])
        stretched = tf.image.resize(image, shape[:2], antialias=True)
        return tf.saturate_cast(tf.round(stretched), tf.uint8)

    same = tf.reduce_all(tf.shape(image)[:2] == shape[:2])
    return tf.ensure_shape(tf.cond(same, lambda: image, resized), shape)


def load(
    splits: Mapping[str, Sequence[tuple[str, int]]], classes: Sequence[str], request: Request
) -> dict[str, Union[storage.Arrays, storage.Files]]:
    """Reads every image file once and prints a summary, one line for each split.

    Args:
      splits: {name: [(path, label)]}, at least one path each; they are shuffled.
      classes: names in the order of the labels.
      request: has the size of the images, and whether to leave out files that cannot be read. For
        a resumed run, the files are left out that it left out at its beginning, and other images
        replace those that can no longer be read. With `headers_only`, a file counts as readable
        if its header is.

    Returns:
      {name: the readable files, as Arrays, or as Files if they exceed MEMORY_LIMIT or only their
      headers were read}.

    Raises:
      UserError: if files cannot be read (naming the first of them), images differ in size without
        `image_size`, or a class of a split has no image left.
    """
    files = {split: _Files(split, examples) for split, examples in splits.items()}
    image_size, skip = request.image_size, request.on_bad_image == "skip"
    below = request.data_dir or os.curdir
    shape = (image_size, image_size, 3) if image_size else _one_shape([*files.values()])
    any_turned = any((part.turns > 1).any() for part in files.values())
    reader = decode_any if any(part.by_pillow for part in files.values()) else decode

    def prepare(encoded, turn):
        image = reader(encoded)
        if any_turned:
            image = upright(image, turn)
        return resize(image, image_size) if image_size else tf.ensure_shape(image, shape)

    began = request.began["left_out"] if request.began and skip else None
    known = None if began is None else {os.fsencode(os.path.join(below, n)) for n in began}
    reading, kept, out, since = storage.Reading(skip), {}, [], []
    for split, part in files.items():
        kept[split], left_out, broken, emptied = part.read(
            prepare, shape, reading, known, request.headers_only
        )
        out += left_out
        since += broken
        if emptied and skip:
            raise UserError(
                f"no image of {', '.join(escape(classes[k]) for k in emptied[:3])} in {split} can "
                f"be read, such as {_names(out + since)}: repair them or take the class out"
            )
    if out and not skip:
        raise UserError(
            f"{_names(out)} cannot be read as a JPEG or PNG image: repair or remove, or leave out "
            "all unreadable files with `on_bad_image=skip`"
        )
    if out:
        print(f"Left out: {_names(out)}", flush=True)
    if since:
        print(
            f"Broken since the run began: {_names(since)}. In training, images of their classes "
            "replace them",
            flush=True,
        )
    paths = [os.path.relpath(os.fsdecode(path), below) for path in out]
    reading.left_out, reading.broken = sorted(paths if began is None else began), bool(since)
    return kept


class _Files:
    """The image files of a split, and their headers (None for files without one)."""

    def __init__(self, split: str, examples: Sequence[tuple[str, int]]):
        # Shuffled like tfds.ImageFolder, so that the first images, whose mean is computed, have all
        # classes.
        examples = list(examples)
        random.Random(split).shuffle(examples)
        self.split = split
        self.paths = np.array([os.fsencode(path) for path, _ in examples], object)
        self.labels = np.array([label for _, label in examples])
        read = _starts(self.paths)
        self.headers = [header for header, _ in read]
        self.origin = storage.Origin(self.paths, np.array([mark for _, mark in read], object))
        self.by_pillow = any(header and mark.startswith(_PILLOW_STARTS) for header, mark in read)
        self.turns = np.array([h.orientation if h else 1 for h in self.headers], np.int32)

    def read(
        self,
        prepare: Callable,
        shape: tuple[int, int, int],
        reading: storage.Reading,
        out: Optional[Collection[bytes]] = None,
        headers_only: bool = False,
    ) -> tuple[Union[storage.Arrays, storage.Files], list[bytes], list[bytes], list[int]]:
        """Reads all files and prints a report.

        Args:
          prepare: a function (encoded, orientation) -> uint8 [H, W, C].
          shape: (H, W, C).
          reading: what to do with files that break later.
          out: the paths of the files that are left out if the images are not kept in memory; by
            default those that cannot be read.
          headers_only: whether a file counts as readable if its header is.

        Returns:
          The images; the paths that are left out; those that are kept, though they cannot be read;
          the labels that have no readable image.
        """
        count = len(self.paths)
        in_memory = not headers_only and count * np.prod(shape) <= storage.MEMORY_LIMIT
        if not (in_memory or headers_only):
            print(
                f"{self.split}: reading {count:,} images once, to find unreadable ones …",
                flush=True,
            )

        def look(encoded, turn):
            image = prepare(encoded, turn)
            # One pixel is enough to know that a file can be decoded.
            return image if in_memory else (image[0, 0, 0], storage.fingerprint(encoded))

        images = np.zeros((count if in_memory else 0, *shape), np.uint8)
        prints = np.full(count, -1, np.int64)
        readable = np.array([bool(header) and headers_only for header in self.headers])
        for index, batch in () if headers_only else self._decodable(look):
            readable[index] = True
            if in_memory:
                images[index] = batch
            else:
                prints[index] = batch[1]
        headers = [self.headers[i] for i in np.flatnonzero(readable)]
        print(_report(self.split, headers, count - len(headers)), flush=True)
        stays = readable
        if out is not None and not in_memory:
            stays = np.array([path not in out for path in self.paths])
        good, labels = np.flatnonzero(stays), self.labels[stays]
        emptied = [*np.setdiff1d(self.labels, self.labels[readable & stays])]
        # An unreadable file is not a copy of another one.
        self.origin.marks[~readable] = b""
        found = [*self.paths[~stays]], [*self.paths[stays & ~readable]], emptied
        origin = self.origin.subset(good)
        if in_memory:
            return storage.Arrays(images if stays.all() else images[good], labels, origin), *found
        files = self.paths[good], self.turns[good], labels, prepare, shape, origin
        return storage.Files(*files, prints[good], reading), *found

    def _decodable(self, read):
        """Yields (indices, results of `read`) for the files that can be decoded."""
        index = np.array([i for i, h in enumerate(self.headers) if h], np.int64)
        files = tf.data.Dataset.from_tensor_slices(
            (index, tf.constant(self.paths[index], tf.string), self.turns[index])
        ).map(
            lambda i, path, turn: (i, read(tf.io.read_file(path), turn)),
            num_parallel_calls=tf.data.AUTOTUNE,
        )
        return files.ignore_errors().batch(512).as_numpy_iterator()


def _names(paths: Sequence[bytes]) -> str:
    more = f" and {len(paths) - 20:,} more" if len(paths) > 20 else ""
    return ", ".join(path.decode(errors="replace") for path in paths[:20]) + more


def _starts(paths: np.ndarray) -> list[tuple[Optional[Header], bytes]]:
    """Returns (header, mark) of files; the header of an unreadable file is None.

    Files of the same length that begin with the same _START bytes have the same mark. It begins
    like the file.
    """
    # Several at once, since network disks are slow to answer; in parts, since a task costs more
    # than a header.
    parts = [paths[i : i + 500] for i in range(0, len(paths), 500)]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        return [
            found
            for part in pool.map(lambda part: [*map(_start_of, part)], parts)
            for found in part
        ]


def _start_of(path: bytes) -> tuple[Optional[Header], bytes]:
    mark = b""
    try:
        with open(path, "rb") as f:
            start = f.read(_START)
            size = os.fstat(f.fileno()).st_size
            mark = start[:4] + struct.pack("<Q", size)
            mark += hashlib.blake2b(start, digest_size=16).digest()
            try:
                return header(start), mark
            except ValueError:  # A colour profile may precede the size.
                return header(start + f.read()), mark
    except (OSError, ValueError):
        return None, mark


def duplicates(splits: Mapping[str, Optional[storage.Origin]]) -> list[tuple[str, bytes, bytes]]:
    """Finds files that are byte-for-byte copies of a file in another split.

    Args:
      splits: {name: the origin of a split's images}; None is ignored.

    Returns:
      (name of the split, path, path of a copy in an earlier split) for each such file.
    """
    known: dict[bytes, list[bytes]] = {}
    found = []
    for name, origin in splits.items():
        if origin is None:
            continue
        own = [(path, mark) for path, mark in zip(origin.paths, origin.marks) if mark]
        for path, mark in own:
            copy = next((p for p in known.get(mark, ()) if _same(p, path, mark)), None)
            if copy is not None:
                found.append((name, path, copy))
        for path, mark in own:
            known.setdefault(mark, []).append(path)
    return found


def _same(path: bytes, other: bytes, mark: bytes) -> bool:
    """Returns whether two files with the same mark are the same."""
    if struct.unpack_from("<Q", mark, 4)[0] <= _START:
        return True
    # filecmp.cmp would consider files equal that were written at the same time.
    with open(path, "rb") as a, open(other, "rb") as b:
        digests = [hashlib.blake2b(f.read()).digest() for f in (a, b)]
    return digests[0] == digests[1]


def _one_shape(splits: Sequence[_Files]) -> tuple[int, int, int]:
    """Returns the shape (H, W, 3) of all images; UserError, naming two files, if they differ."""
    known = [(path, h) for part in splits for path, h in zip(part.paths, part.headers) if h]
    if not known:
        return (1, 1, 3)
    path, first = known[0]
    for other, h in known:
        if (h.width, h.height) != (first.width, first.height):
            raise UserError(
                f"images differ in size: {_names([path])} is {first.width}×{first.height}, "
                f"{_names([other])} is {h.width}×{h.height} (width × height). Give "
                "`image_size=PIXELS` to bring them to one size."
            )
    return (first.height, first.width, 3)


def _report(split: str, headers: Sequence[Header], unreadable: int) -> str:
    """Returns a line that says what the images of a split are."""
    line = f"{split}: {len(headers):,} images"
    sizes = sorted({(h.width * h.height, f"{h.width}×{h.height}") for h in headers})
    if sizes:
        largest = f" to {sizes[-1][1]}" if len(sizes) > 1 else ""
        line += f" of {sizes[0][1]}{largest} pixels"
    counts = collections.Counter(trait for h in headers for trait in h.traits)
    notes = [f"{counts[trait]:,} {trait}" for trait in TRAITS if counts[trait]]
    if unreadable:
        notes.append(f"{unreadable:,} cannot be read")
    return "; ".join([line, *notes])
