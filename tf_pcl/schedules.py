"""Values that change during training: the learning rate, the ramp-up weight ω, the decay φ."""

from collections.abc import Sequence
from typing import Any, Optional, Union

import tensorflow as tf

from tf_pcl.compat import keras
from tf_pcl.errors import choose

# Shares of the 300 epochs of the tables, which are kept for other numbers of epochs.
PAPER_RAMPUP = 80 / 300
PAPER_LR_DECAY = (150 / 300, 225 / 300)


def ramp_up(epoch: Union[float, tf.Tensor], rampup_epochs: float, weight: float = 1.0) -> tf.Tensor:
    """Returns ω(e) = λ·exp(−5(1 − e/α)²) for e < α, else λ (Laine and Aila, 2017).

    Args:
      epoch: e, fractional epochs done so far, a float scalar.
      rampup_epochs: α ≥ 0; with 0 the weight is λ from the start.
      weight: λ.
    Returns:
      A float32 scalar in [λ·exp(−5), λ].
    """
    share = tf.minimum(tf.cast(epoch, tf.float32) / rampup_epochs, 1.0) if rampup_epochs else 1.0
    return weight * tf.exp(-5.0 * (1.0 - share) ** 2)


def ema_decay(update: Union[int, tf.Tensor], largest: float) -> tf.Tensor:
    """Returns φ(g) = min(1 − 1/g, β) for the g-th update (PCL, section 3.3).

    The average is a plain mean at first and exponential later.

    Args:
      update: g = 1, 2, …
      largest: β.
    """
    return tf.minimum(1.0 - 1.0 / tf.cast(update, tf.float32), largest)


def default_ema_decay(total_steps: int) -> float:
    """Returns β for updates by step: 0.999, capped so that the average spans ≤ 1 % of training."""
    return max(0.0, min(0.999, 1.0 - 1.0 / max(1.0, 0.01 * total_steps)))


def step_decay(
    learning_rate: float, decay_epochs: Sequence[float], steps_per_epoch: int
) -> keras.optimizers.schedules.LearningRateSchedule:
    """Returns the learning rate that is divided by 10 after each of `decay_epochs`.

    Args:
      learning_rate: the rate at the start.
      decay_epochs: increasing; they may be fractions.
      steps_per_epoch: optimizer steps in one epoch.
    """
    # Keras keeps a value up to and including its boundary: the next step is the first with the
    # drop.
    boundaries = [round(e * steps_per_epoch) - 1 for e in decay_epochs]
    values = [learning_rate * 0.1**i for i in range(len(boundaries) + 1)]
    return keras.optimizers.schedules.PiecewiseConstantDecay(boundaries, values)


@keras.utils.register_keras_serializable(package="tf_pcl")
class WarmUp(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule whose first rates are smaller: lr(s) = min(1, (s + 1) / w) · schedule(s).

    Args:
      schedule: a keras LearningRateSchedule.
      steps: w ≥ 1; the last of these steps has the schedule's own rate.
    """

    def __init__(self, schedule: keras.optimizers.schedules.LearningRateSchedule, steps: int):
        super().__init__()
        self.schedule, self.steps = schedule, steps

    def __call__(self, step: Union[int, tf.Tensor]) -> tf.Tensor:
        share = tf.minimum(1.0, (tf.cast(step, tf.float32) + 1.0) / self.steps)
        return share * self.schedule(step)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that make this schedule again."""
        serialize = keras.optimizers.schedules.serialize
        return {"schedule": serialize(self.schedule), "steps": self.steps}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "WarmUp":
        """Makes the schedule of a configuration."""
        deserialize = keras.optimizers.schedules.deserialize
        return cls(deserialize(config["schedule"]), config["steps"])


def learning_rate(
    start: float,
    epochs: float,
    steps_per_epoch: int,
    *,
    schedule: str = "steps",
    decay_epochs: Optional[Sequence[float]] = None,
    warmup_epochs: float = 0.0,
) -> keras.optimizers.schedules.LearningRateSchedule:
    """Returns the learning rate of a training.

    Args:
      start: the rate at the start, or after the warm-up.
      epochs: the length of training.
      steps_per_epoch: optimizer steps in one epoch.
      schedule: "steps": divided by 10 after each of `decay_epochs`; "cosine": start · (1 +
        cos(π s / S)) / 2 at step s of S.
      decay_epochs: increasing; by default 1/2 and 3/4 of the epochs.
      warmup_epochs: the epochs in which the rate rises to that of the schedule, as in `WarmUp`.

    Raises:
      UserError: if there is no such schedule.
    """
    choose("schedule", schedule, ("steps", "cosine"), parameter="schedule")
    if schedule == "cosine":
        total = max(1, round(epochs * steps_per_epoch))
        rate = keras.optimizers.schedules.CosineDecay(start, total)
    else:
        if decay_epochs is None:
            decay_epochs = [share * epochs for share in PAPER_LR_DECAY]
        rate = step_decay(start, decay_epochs, steps_per_epoch)
    steps = round(warmup_epochs * steps_per_epoch)
    return WarmUp(rate, steps) if steps else rate
