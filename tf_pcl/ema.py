"""Exponential moving averages of weights."""

import tensorflow as tf

from tf_pcl.errors import UserError


class Shadow:
    """Keeps the trained weights of `shadow` at a moving average of those of `source`.

    Frozen weights count, too, since they may be trained later. BatchNorm's moving statistics are
    averaged only if update() is asked to: by default the shadow collects its own in its forward
    passes, as in Mean Teacher (Tarvainen and Valpola, 2017). The shadow stays `trainable`, since a
    frozen BatchNorm layer would not use batch statistics; its weights must be left out of the
    optimizer.

    Args:
      source, shadow: two keras models built alike. The shadow starts as a copy of the source,
        statistics included.
    Raises:
      ValueError: if the weights do not pair up.
      UserError: if they have 16 bits, in which small steps of an average are lost.
    """

    def __init__(self, source, shadow):
        pairs = list(zip(source.weights, shadow.weights))
        if len(source.weights) != len(shadow.weights) or any(s.shape != t.shape for s, t in pairs):
            raise ValueError(
                "source and shadow have different weights: build both from the same network"
            )
        short = [w for w in source.weights if w.dtype.is_floating and w.dtype.size < 4]
        if short:
            raise UserError(
                f"the weight {short[0].name!r} is {short[0].dtype.name}, too coarse for an average "
                f"over training: give its layer the policy mixed_{short[0].dtype.name}"
            )
        shadow.set_weights(source.get_weights())
        # Weights that both hold, such as those of a layer in front of them, and counters are left
        # out.
        pairs = [(s, t) for s, t in pairs if s is not t and s.dtype.is_floating]
        self.trained = [(s, t) for s, t in pairs if s.trainable]
        self.statistics = [(s, t) for s, t in pairs if not s.trainable]

    def update(self, decay, statistics=False):
        """Computes θ^t ← φ θ^t + (1 − φ) θ.

        Args:
          decay: φ, a scalar in [0, 1].
          statistics: whether BatchNorm's moving statistics are averaged in the same way. This is
            needed if an update moves the weights so far that the statistics of the passes before
            no longer fit.
        """
        share = 1.0 - decay
        for source, shadow in self.trained + (self.statistics if statistics else []):
            shadow.assign_add(tf.cast(share, source.dtype) * (source - shadow))
