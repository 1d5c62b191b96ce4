"""The papers' SGD."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Optional, Union

import tensorflow as tf

from tf_pcl import schedules
from tf_pcl.compat import keras

LearningRate = Union[float, keras.optimizers.schedules.LearningRateSchedule]


@keras.utils.register_keras_serializable(package="tf_pcl")
class CoupledSGD(keras.optimizers.Optimizer):
    """SGD with momentum and *coupled* weight decay, the learning rate outside the velocity.

    d = g + wd·w;  v ← μ·v + d;  w ← w − lr·(d + μ·v) with Nesterov momentum, else w ← w − lr·v.

    Keras's own SGD decays weights apart from the gradient and keeps the learning rate in the
    velocity, so that a drop of the rate acts only after some steps. The papers' results come from
    the rule above. The class is not called SGD, because Keras takes every saved optimizer of that
    name for its own.

    Args:
      learning_rate: a float or a keras LearningRateSchedule of the step.
      momentum: μ in [0, 1).
      nesterov: whether the step looks ahead along the velocity.
      coupled_decay: wd ≥ 0, the L2 weight decay of every trainable weight, those of BatchNorm and
        biases too.
      decay_by_name: {variable's name: wd} of the weights that have a decay of their own.
    """

    def __init__(
        self,
        learning_rate: LearningRate = 0.1,
        momentum: float = 0.9,
        nesterov: bool = True,
        coupled_decay: float = 5e-4,
        decay_by_name: Optional[Mapping[str, float]] = None,
        name: str = "SGD",
        **kwargs: Any,
    ):
        super().__init__(name=name, **kwargs)
        self._learning_rate = self._build_learning_rate(learning_rate)
        self.momentum, self.nesterov, self.coupled_decay = momentum, nesterov, coupled_decay
        self.decay_by_name = dict(decay_by_name or {})
        # By variable, since names need not be unique: {Keras's key of a variable: (its name, wd)}.
        self._own_decays: dict[str, tuple[str, float]] = {}

    def set_decay(self, weights: Iterable[tf.Variable], coupled_decay: float) -> None:
        """Gives these variables a coupled weight decay of their own, before the first step."""
        self._own_decays.update({self._var_key(w): (w.name, coupled_decay) for w in weights})

    def build(self, var_list: Sequence[tf.Variable]) -> None:
        super().build(var_list)
        if not getattr(self, "_built", False):
            self.velocities = [self.add_variable_from_reference(w, "velocity") for w in var_list]
            self._decays = [(w.name, self._decay_of(w)) for w in var_list]
            self._built = True

    def update_step(self, gradient: tf.Tensor, variable: tf.Variable) -> None:
        lr = tf.cast(self.learning_rate, variable.dtype)
        index = self._index_dict[self._var_key(variable)]
        velocity, (_, decay) = self.velocities[index], self._decays[index]
        d = tf.convert_to_tensor(gradient) + decay * variable
        velocity.assign(self.momentum * velocity + d)
        variable.assign_sub(lr * (d + self.momentum * velocity if self.nesterov else velocity))

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that make this optimizer again.

        Raises:
          ValueError: if weights of one name have different decays, which names cannot tell apart.
        """
        by_name = {**self.decay_by_name, **dict(self._own_decays.values())}
        for name, decay in getattr(self, "_decays", []):
            if by_name.get(name, self.coupled_decay) != decay:
                raise ValueError(
                    f"several weights are called {name} and have different decays: give their "
                    "layers different names"
                )
        return {
            **super().get_config(),
            "learning_rate": self._serialize_hyperparameter(self._learning_rate),
            "momentum": self.momentum,
            "nesterov": self.nesterov,
            "coupled_decay": self.coupled_decay,
            "decay_by_name": by_name,
        }

    def _decay_of(self, variable: tf.Variable) -> float:
        by_name = self.decay_by_name.get(variable.name, self.coupled_decay)
        return self._own_decays.get(self._var_key(variable), (variable.name, by_name))[1]


def recipe(
    epochs: float,
    steps_per_epoch: int,
    learning_rate: float = 0.1,
    lr_decay_epochs: Optional[Sequence[float]] = None,
    weight_decay: float = 5e-4,
) -> CoupledSGD:
    """Returns the optimizer of the tables (PCL, section 4.1).

    It is SGD with Nesterov momentum 0.9, whose rate is divided by 10 at 1/2 and 3/4 of training.

    Args:
      epochs: the length of training.
      steps_per_epoch: optimizer steps in one epoch.
      learning_rate: the rate at the start.
      lr_decay_epochs: the epochs after which the rate is divided by 10; by default 150 and 225 of
        300, scaled to `epochs`.
      weight_decay: coupled L2 decay.
    """
    if lr_decay_epochs is None:
        lr_decay_epochs = [share * epochs for share in schedules.PAPER_LR_DECAY]
    return CoupledSGD(
        schedules.step_decay(learning_rate, lr_decay_epochs, steps_per_epoch),
        coupled_decay=weight_decay,
    )
