"""Mixup and CutMix: images of a batch that are mixed in pairs, with soft labels.

Rows 2k and 2k + 1 of the global batch are partners; if the batch is odd, its last image does not
change. Since an epoch is shuffled, a partner is a random image. Each image of a pair draws its own
λ. All views of an image have the same partner and the same λ, and view j is mixed with the
partner's view j.
"""

from typing import Any

import tensorflow as tf

from tf_pcl.data.augmentations import Draws
from tf_pcl.errors import UserError


def check(mixup: float, cutmix: float, rows: int, parts: int) -> None:
    """Checks the values, and that partners are in the same part of the batch.

    Args:
      mixup, cutmix: as in `mixed`.
      rows: the size of a part.
      parts: how many parts the global batch has.

    Raises:
      UserError: if a value is negative, or the number of images in a part is odd.
    """
    for name, value in (("mixup", mixup), ("cutmix", cutmix)):
        if not 0 <= value < float("inf"):
            raise UserError("give a number of at least 0", parameter=name, value=value)
        if value and parts > 1 and rows % 2:
            raise UserError(
                f"images are mixed in pairs, and each of {parts} workers gets {rows} of a batch: "
                f"give a `batch_size` that is a multiple of {2 * parts}",
                parameter=name,
                value=value,
            )


def mixed(
    views: tf.Tensor, labels: tf.Tensor, draws: Draws, classes: int, mixup: float, cutmix: float
) -> tuple[tf.Tensor, tf.Tensor]:
    """Mixes each image of a batch with its partner.

    Mixup (Zhang et al., 2018) makes λ x + (1 − λ) x' of an image and its partner, with λ from
    Beta(α, α). CutMix (Yun et al., 2019) replaces a random rectangle by the partner's; its area is
    1 − λ of the image before it is cut off at the borders. The label is λ y + (1 − λ) y'; in CutMix
    λ is the share of the image that remains.

    Args:
      views: uint8 [B, m, H, W, C], whole pairs of partners; an odd batch has one image more.
      labels: class numbers int32 [B].
      draws: the random numbers of these images.
      classes: the number of classes, K.
      mixup: α ≥ 0 of mixup; 0 for none.
      cutmix: α ≥ 0 of CutMix; 0 for none. With both, each image draws one of them.

    Returns:
      Views uint8 [B, m, H, W, C], where mixup rounds to whole numbers, and labels float32 [B, K].
    """
    size = views.shape[0]
    partners = tf.minimum(tf.range(size) ^ 1, size - 1)
    others, one_hot = tf.gather(views, partners), tf.one_hot(labels, classes)
    keeps: Any = 0.0
    if mixup:
        share = draws.named("mixup").beta(mixup)
        keeps = share[:, None, None]
    if cutmix:
        left = _outside(draws.named("cutmix"), cutmix, *views.shape[2:4])
        cut = draws.named("which").uniform(1, 1) < 0.5 if mixup else True
        keeps = tf.where(cut, left, keeps)
    keeps = tf.broadcast_to(keeps, [size, *views.shape[2:4]])
    x, x_other = tf.cast(views, tf.float32), tf.cast(others, tf.float32)
    weight = keeps[:, None, :, :, None]
    images = tf.saturate_cast(tf.round(weight * x + (1 - weight) * x_other), tf.uint8)
    of_own = tf.reduce_mean(keeps, [1, 2])[:, None]
    return images, of_own * one_hot + (1 - of_own) * tf.gather(one_hot, partners)


def _outside(draws: Draws, alpha: float, h: int, w: int) -> tf.Tensor:
    """Returns 0 in a random rectangle of each image and 1 outside of it, float32 [B, h, w]."""
    side = tf.sqrt(1 - draws.beta(alpha))[:, None]
    centre = draws.uniform(2)

    def inside(length: int, axis: int) -> tf.Tensor:
        half = tf.floor(side * length) / 2
        middle = tf.floor(centre[:, axis : axis + 1] * length)
        at = tf.range(length, dtype=tf.float32)[None]
        return (at >= tf.floor(middle - half)) & (at < tf.floor(middle - half) + 2 * half)

    return tf.cast(~(inside(h, 0)[:, :, None] & inside(w, 1)[:, None]), tf.float32)
