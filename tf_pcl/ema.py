"""Exponential moving averages of weights."""


class Shadow:
    """Keeps the trained weights of `shadow` at a moving average of those of `source`.

    BatchNorm's moving statistics are left alone unless update() is told to average them: the
    shadow collects its own from its forward passes, as in Mean Teacher (Tarvainen and Valpola,
    2017). The shadow stays `trainable`, since a frozen BatchNorm layer would not use batch
    statistics; whoever trains `source` leaves the shadow's weights out of the optimizer.

    Args:
      source, shadow: two keras models built alike. The shadow starts as a copy of the source,
        statistics included.
    Raises:
      ValueError: if the weights do not pair up.
    """

    def __init__(self, source, shadow):
        pairs = list(zip(source.weights, shadow.weights))
        if len(source.weights) != len(shadow.weights) or any(s.shape != t.shape for s, t in pairs):
            raise ValueError(
                "source and shadow have different weights: build both from the same network"
            )
        shadow.set_weights(source.get_weights())
        self.trained = list(zip(source.trainable_weights, shadow.trainable_weights))
        # What both hold in common, such as a layer in front of them, and counters have no average.
        self.statistics = [
            (s, t)
            for s, t in zip(source.non_trainable_weights, shadow.non_trainable_weights)
            if s is not t and s.dtype.is_floating
        ]

    def update(self, decay, statistics=False):
        """θ^t ← φ θ^t + (1 − φ) θ, with φ = `decay` in [0, 1].

        Args:
          decay: φ, a scalar. statistics: whether BatchNorm's moving statistics are averaged in the
            same way. They are needed where an update moves the weights far between two passes, so
            that those of the passes before no longer fit.
        """
        share = 1.0 - decay
        for source, shadow in self.trained + (self.statistics if statistics else []):
            shadow.assign_add(share * (source - shadow))
