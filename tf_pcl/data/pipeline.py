"""tf.data pipelines: training batches of several views, test batches.

A training batch is a pure function of (seed, step): its images come from a stateless permutation of
the epoch, and its views from stateless random numbers keyed by step and view. So a run resumes at
any step without a stored iterator, two methods see the same images (and the same first view), and
workers need not communicate.
"""

from typing import Any

import tensorflow as tf

from tf_pcl.data import mixing
from tf_pcl.data.augmentations import Draws, augmented, fold_in, settle
from tf_pcl.data.datasets import ImageData
from tf_pcl.data.storage import Files, Stream
from tf_pcl.errors import UserError, choose


def train_batches(
    data: ImageData,
    batch_size: int,
    epochs: int,
    *,
    views: int = 1,
    seed: int = 0,
    start: int = 0,
    shard: tuple[int, int] = (0, 1),
    mixup: float = 0.0,
    cutmix: float = 0.0,
    **augmentations: Any,
) -> tf.data.Dataset:
    """Returns `epochs` epochs of shuffled batches of augmented views.

    Args:
      data: an ImageData (datasets.load).
      batch_size: B, the size of the global batch; the rest of an epoch that does not fill a batch
        is left out of that epoch.
      epochs: how many epochs.
      views: m, the number of independent augmentations of each image.
      seed: an integer; the same seed gives the same batches.
      start: the first step, counted over all epochs.
      shard: (i, n) for only the i-th of n equal parts of each batch.
      mixup, cutmix: α of each, as in `mixing.mixed`; 0 for none.
      **augmentations: the values of augmentations by their names in AUGMENTATIONS; None means the
        default. `augment` is "crop" (zero-pad by an eighth of the side and cut
        the old size) or "inception" (cut 8 to 100 % of the area and resize it), by default crop for
        sides up to 64 pixels, else inception. `flip` is whether to mirror half of the views, by
        default what the data set says. `color_jitter` is a strength in [0, 1], by default 0.
        `cutout` is the side of a blackened square in pixels, an even number, by default 0.

    Returns:
      A tf.data.Dataset of (views uint8 [B / n, m, H, W, C], labels int32 [B / n]), raw 0–255. The
      labels of mixed images are probabilities, float32 [B / n, K].

    Raises:
      UserError: if there are fewer images than `batch_size`, an augmentation is unknown or does
        not take the value, or the images of a part cannot be mixed in pairs.
    """
    steps = steps_per_epoch(data, batch_size)
    settled = settle(data, augmentations)
    part, parts = shard
    rows = slice(batch_size // parts * part, batch_size // parts * (part + 1))
    mixing.check(mixup, cutmix, rows.stop - rows.start, parts)
    base = tf.constant([seed & 0x7FFFFFFF, 0x5EED], tf.int32)

    def with_views(step, images, labels):
        made = [
            augmented(images, Draws(fold_in(base, 1, step, j), batch_size, rows), settled)
            for j in range(views)
        ]
        shape = [rows.stop - rows.start, views, *data.image_shape]
        made = tf.ensure_shape(tf.stack(made, 1), shape)
        if not (mixup or cutmix):
            return made, labels
        draws = Draws(fold_in(base, 2, step), batch_size, rows)
        return mixing.mixed(made, labels, draws, len(data.classes), mixup, cutmix)

    if isinstance(data.train, Stream):
        read = data.train.batches(seed, epochs, batch_size, rows, start).enumerate(start)
        batches = read.map(
            lambda step, example: with_views(step, *example), num_parallel_calls=tf.data.AUTOTUNE
        )
    else:
        fetch, size = data.train.fetch, len(data.train)

        def batch_of(step):
            epoch, k = step // steps, step % steps
            places = k * batch_size + tf.range(batch_size, dtype=tf.int64)[rows]
            index = shuffled_index(places, fold_in(base, 0, epoch), size)
            return with_views(step, *fetch(index))

        numbers = tf.data.Dataset.range(start, epochs * steps)
        batches = numbers.map(batch_of, num_parallel_calls=tf.data.AUTOTUNE)
    return batches.prefetch(2)


def shuffled_index(places: tf.Tensor, key: tf.Tensor, size: int) -> tf.Tensor:
    """Returns the indices at some places of a random permutation of 0 … size - 1.

    This is tf.random.experimental.index_shuffle with 8 rounds of its cipher instead of 4. After 4
    rounds, 50,000 indices have a serial correlation of -0.06, and images of one batch meet again in
    the next epoch a quarter more often than by chance; after 8 rounds neither is measurable.

    Args:
      places: int64 [n] in [0, size).
      key: a seed, int32 [2]; each gives another permutation.
      size: the length of the permutation.

    Returns:
      Indices int64 [n].
    """
    return tf.raw_ops.RandomIndexShuffle(
        index=places,
        seed=tf.concat([[0], key], 0),
        max_index=tf.constant(size - 1, tf.int64),
        rounds=8,
    )


def steps_per_epoch(data: ImageData, batch_size: int) -> int:
    """Returns how many whole batches the training images fill.

    Raises:
      UserError: if they do not fill one.
    """
    if batch_size > len(data.train):
        raise UserError(
            f"it is larger than the {len(data.train)} training images of {data.name}: give less",
            parameter="batch_size",
            value=batch_size,
        )
    return len(data.train) // batch_size


def test_batches(data: ImageData, batch_size: int, split: str = "test") -> tf.data.Dataset:
    """Returns the test images in their order, in batches of which the last may be smaller.

    If unreadable images are left out, they are missing in their batches.

    Args:
      data: an ImageData (datasets.load).
      batch_size: how many images a batch has.
      split: "test", "validation" or "train"; none of them is augmented.

    Returns:
      A tf.data.Dataset of (images uint8 [≤B, H, W, C], labels int32 [≤B]).

    Raises:
      UserError: if there is no such split.
    """
    test = getattr(data, choose("split", split, ("train", "validation", "test"), "split"))
    if test is None:
        raise UserError(f"{data.name} has no validation images: hold some out when it is loaded")
    if isinstance(test, Stream):
        batches = test.examples().batch(batch_size)
    else:
        count, fetch = len(test), test.fetch
        if isinstance(test, Files):
            fetch = test.fetch_readable
        starts = tf.data.Dataset.range(0, count, batch_size)
        batches = starts.map(
            lambda i: fetch(tf.range(i, tf.minimum(i + batch_size, count))),
            num_parallel_calls=tf.data.AUTOTUNE,
        )
        if isinstance(test, Files) and test.reading.skip:
            # All files of a batch may be unreadable.
            batches = batches.filter(lambda images, labels: tf.size(labels) > 0)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return batches.with_options(options).prefetch(2)
