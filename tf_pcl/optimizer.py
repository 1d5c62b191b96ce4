"""The papers' SGD."""

import tensorflow as tf

from tf_pcl import schedules
from tf_pcl.compat import keras


class SGD(keras.optimizers.Optimizer):
    """SGD with momentum and *coupled* weight decay, the learning rate outside the velocity.

    d = g + wd·w;  v ← μ·v + d;  w ← w − lr·(d + μ·v) with Nesterov momentum, w ← w − lr·v without.

    Keras's own SGD decays weights apart from the gradient and keeps the learning rate in the velocity, so that a drop
    of the rate acts only after some steps; the papers' results come from this rule.

    Args:
      learning_rate: a float or a keras LearningRateSchedule of the step.
      momentum: μ in [0, 1).
      nesterov: whether the step looks ahead along the velocity.
      coupled_decay: wd ≥ 0, L2 weight decay of every trainable weight, BatchNorm and biases too, but for those that
        set_decay gives their own.
    """

    def __init__(
        self,
        learning_rate=0.1,
        momentum=0.9,
        nesterov=True,
        coupled_decay=5e-4,
        name="SGD",
        **kwargs,
    ):
        super().__init__(name=name, **kwargs)
        self._learning_rate = self._build_learning_rate(learning_rate)
        self.momentum, self.nesterov, self.coupled_decay = momentum, nesterov, coupled_decay
        self.decay_exceptions = {}

    def set_decay(self, weights, coupled_decay):
        """Gives these variables a coupled weight decay of their own, before the first step."""
        self.decay_exceptions.update({self._var_key(w): coupled_decay for w in weights})

    def build(self, var_list):
        super().build(var_list)
        if not getattr(self, "_built", False):
            self.velocities = [self.add_variable_from_reference(w, "velocity") for w in var_list]
            self._built = True

    def update_step(self, gradient, variable):
        lr = tf.cast(self.learning_rate, variable.dtype)
        key = self._var_key(variable)
        velocity = self.velocities[self._index_dict[key]]
        d = (
            tf.convert_to_tensor(gradient)
            + self.decay_exceptions.get(key, self.coupled_decay) * variable
        )
        velocity.assign(self.momentum * velocity + d)
        variable.assign_sub(lr * (d + self.momentum * velocity if self.nesterov else velocity))

    def get_config(self):
        return {
            **super().get_config(),
            "learning_rate": self._serialize_hyperparameter(self._learning_rate),
            "momentum": self.momentum,
            "nesterov": self.nesterov,
            "coupled_decay": self.coupled_decay,
        }


def recipe(epochs, steps_per_epoch, learning_rate=0.1, lr_decay_epochs=None, weight_decay=5e-4):
    """The optimizer of the tables (PCL, section 4.1): Nesterov momentum 0.9, rate divided by 10 at 1/2 and 3/4 of training.

    Args:
      epochs: the length of training.
      steps_per_epoch: optimizer steps in one epoch.
      learning_rate: the rate at the start.
      lr_decay_epochs: the epochs after which the rate is divided by 10; by default 150 and 225 of 300, scaled to `epochs`.
      weight_decay: coupled L2 decay.
    """
    if lr_decay_epochs is None:
        lr_decay_epochs = [share * epochs for share in schedules.PAPER_LR_DECAY]
    return SGD(
        schedules.step_decay(learning_rate, lr_decay_epochs, steps_per_epoch),
        coupled_decay=weight_decay,
    )
