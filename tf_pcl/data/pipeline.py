"""tf.data pipelines: training batches of several views, test batches.

A training batch is a pure function of (seed, step): its images are a stateless permutation of the epoch, its views are
drawn from stateless random numbers keyed by step and view. So a run goes on at any step without a stored iterator, two
methods see the same images (and the same first view), and workers need not talk to each other.
"""

import tensorflow as tf

from tf_pcl.data import augmentations
from tf_pcl.errors import UserError, choose


def train_batches(
    data,
    batch_size,
    epochs,
    *,
    views=1,
    seed=0,
    start=0,
    flip=None,
    augment=None,
    color_jitter=0,
    cutout=0,
    shard=(0, 1),
):
    """Endless-looking but finite training data: `epochs` epochs of shuffled batches of augmented views.

    Args:
      data: an ImageData (datasets.load).
      batch_size: B, the global batch; the rest of an epoch that does not fill a batch is left out of that epoch.
      epochs: how many epochs.
      views: m, independent augmentations of each image.
      seed: an integer; the same seed gives the same batches.
      start: the step (batches from the beginning) to begin with.
      flip: whether to mirror; by default what the data set says.
      augment: "crop" (zero-pad by an eighth of the side and cut the old size) or "inception" (cut 8 to 100 % of the area
        and resize it); by default crop for sides up to 64 pixels, else inception.
      color_jitter: strength in [0, 1], by how much brightness, contrast and saturation vary; 0 for not at all.
      cutout: size in pixels (even) of a blackened square; 0 for none.
      shard: (i, n): only the i-th of n equal parts of each batch.
    Returns:
      A tf.data.Dataset of (views uint8 [B / n, m, H, W, C], labels int32 [B / n]), raw 0–255.
    """
    steps = steps_per_epoch(data, batch_size)
    part, parts = shard
    rows = slice(batch_size // parts * part, batch_size // parts * (part + 1))
    base = tf.constant([seed & 0x7FFFFFFF, 0x5EED], tf.int32)
    mirror = data.flip if flip is None else flip
    side = min(data.image_shape[:2])
    inception = (
        choose(
            "--augment", augment or ("crop" if side <= 64 else "inception"), ("crop", "inception")
        )
        == "inception"
    )

    def augmented(step, images, labels):
        made = []
        for j in range(views):
            key = augmentations.fold_in(base, 1, step, j)
            if inception:
                view = augmentations.inception_crop(images, key, mirror, rows, batch_size)
            else:
                view = augmentations.pad_crop_flip(
                    images, key, max(1, round(side / 8)), mirror, rows, batch_size
                )
            if color_jitter:
                view = augmentations.color_jitter(view, key, color_jitter, rows, batch_size)
            if cutout:
                view = augmentations.cutout(view, key, cutout, rows, batch_size)
            made.append(view)
        return tf.ensure_shape(
            tf.stack(made, 1), [rows.stop - rows.start, views, *data.image_shape]
        ), labels

    if data.train.random_access:

        def batch(step):
            epoch, k = step // steps, step % steps
            index = tf.random.experimental.index_shuffle(
                k * batch_size + tf.range(batch_size, dtype=tf.int64)[rows],
                augmentations.fold_in(base, 0, epoch),
                tf.constant(len(data.train) - 1, tf.int64),
            )
            return augmented(step, *data.train.fetch(index))

        batches = tf.data.Dataset.range(start, epochs * steps).map(
            batch, num_parallel_calls=tf.data.AUTOTUNE
        )
    else:
        batches = (
            data.train.batches(seed, epochs, batch_size, rows, start)
            .enumerate(start)
            .map(
                lambda step, example: augmented(step, *example), num_parallel_calls=tf.data.AUTOTUNE
            )
        )
    return batches.prefetch(2)


def steps_per_epoch(data, batch_size):
    """Whole batches in the training images; UserError if there is none."""
    if batch_size > len(data.train):
        raise UserError(
            f"--batch_size={batch_size} is larger than the {len(data.train)} training images of {data.name}"
        )
    return len(data.train) // batch_size


def test_batches(data, batch_size):
    """The test images in their order, the last batch smaller: (images uint8 [≤B, H, W, C], labels int32 [≤B])."""
    if data.test.random_access:
        count = len(data.test)
        starts = tf.data.Dataset.range(0, count, batch_size)
        batches = starts.map(
            lambda i: data.test.fetch(tf.range(i, tf.minimum(i + batch_size, count))),
            num_parallel_calls=tf.data.AUTOTUNE,
        )
    else:
        batches = data.test.examples().batch(batch_size)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return batches.with_options(options).prefetch(2)
