"""The papers' SGD, and the optimizers that can be chosen in its place."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Optional, Union

import numpy as np
import tensorflow as tf

from tf_pcl import compat, schedules
from tf_pcl.compat import keras
from tf_pcl.errors import UserError, choose

LearningRate = Union[float, keras.optimizers.schedules.LearningRateSchedule]


class OwnDecays:
    """Lets an optimizer give some weights a weight decay of their own.

    It is a mixin, which comes before a keras.optimizers.Optimizer among the bases of a class.

    Args:
      usual_decay: the decay wd ≥ 0 of all other weights.
      decay_by_name: {variable's name: wd} of the weights that have a decay of their own.
    """

    # Attributes of the optimizer.
    iterations: Any
    jit_compile: Any
    use_ema: Any
    _update_step: Any
    _update_step_xla: Any

    def __init__(
        self,
        *args: Any,
        usual_decay: float,
        decay_by_name: Optional[Mapping[str, float]] = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.usual_decay, self.decay_by_name = usual_decay, dict(decay_by_name or {})
        # By variable, since names need not be unique: {Keras's key of a variable: (its name, wd)}.
        self._own_decays: dict[str, tuple[str, float]] = {}

    def set_decay(self, weights: Iterable[tf.Variable], decay: float) -> None:
        """Gives these variables a weight decay of their own, before the first step."""
        self._own_decays.update({self._key(w): (w.name, decay) for w in weights})

    def build(self, var_list: Sequence[tf.Variable]) -> None:
        super().build(var_list)  # type: ignore[misc]
        self._decays = {self._key(w): (w.name, self._decay_of(w)) for w in var_list}

    def _decay(self, variable: tf.Variable) -> float:
        """Returns the decay of a variable that `build` was given."""
        return self._decays[self._key(variable)][1]

    def _decays_by_name(self) -> dict[str, float]:
        """Returns `decay_by_name` for the configuration.

        Raises:
          ValueError: if weights of one name have different decays, which names cannot tell apart.
        """
        by_name = {**self.decay_by_name, **dict(self._own_decays.values())}
        for name, decay in getattr(self, "_decays", {}).values():
            if by_name.get(name, self.usual_decay) != decay:
                raise ValueError(
                    f"several weights are called {name} and have different decays: give their "
                    "layers different names"
                )
        return by_name

    def _decay_of(self, variable: tf.Variable) -> float:
        by_name = self.decay_by_name.get(variable.name, self.usual_decay)
        return self._own_decays.get(self._key(variable), (variable.name, by_name))[1]

    def aggregate_gradients(self, grads_and_vars: Iterable[tuple]) -> Any:
        if tf.distribute.has_strategy():
            return super().aggregate_gradients(grads_and_vars)  # type: ignore[misc]
        # There is nothing to add. Keras would add with a function whose gradient TensorFlow
        # registers for good, so that the graph of the step would stay in memory after its model.
        return grads_and_vars

    def _internal_apply_gradients(self, grads_and_vars: Iterable[tuple]) -> Any:
        if tf.distribute.has_strategy() or self.use_ema or getattr(self, "_mesh", None):
            return super()._internal_apply_gradients(grads_and_vars)  # type: ignore[misc]
        # Keras updates through a strategy even if there is none. That doubles the time of tracing
        # the updates, and does the same.
        self._update_all(grads_and_vars)
        return self.iterations.assign_add(1)

    def _update_all(self, grads_and_vars: Iterable[tuple]) -> None:
        """Updates all variables, on one device."""
        for gradient, variable in grads_and_vars:
            if self.jit_compile:
                self._update_step_xla(gradient, variable, id(self._key(variable)))
            else:
                self._update_step(gradient, variable)

    def _key(self, variable: tf.Variable) -> str:
        return self._var_key(variable)  # type: ignore[attr-defined]


@keras.utils.register_keras_serializable(package="tf_pcl")
class CoupledSGD(OwnDecays, keras.optimizers.Optimizer):
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
        # With Keras's default of 0, every step would subtract 0 · w from every weight.
        kwargs["weight_decay"] = kwargs.get("weight_decay") or None
        super().__init__(
            name=name, usual_decay=coupled_decay, decay_by_name=decay_by_name, **kwargs
        )
        self._learning_rate = self._build_learning_rate(learning_rate)
        self.momentum, self.nesterov, self.coupled_decay = momentum, nesterov, coupled_decay

    def build(self, var_list: Sequence[tf.Variable]) -> None:
        super().build(var_list)
        if not getattr(self, "_built", False):
            self.velocities = [self.add_variable_from_reference(w, "velocity") for w in var_list]
            self._built = True

    def update_step(self, gradient: tf.Tensor, variable: tf.Variable) -> None:
        velocity = self._velocity(variable)
        decayed = self._decay(variable) * variable
        lr = tf.cast(self.learning_rate, variable.dtype)
        v, step = self._rule(tf.convert_to_tensor(gradient) + decayed, velocity, lr)
        velocity.assign(v)
        variable.assign_sub(step)

    def _rule(self, d: tf.Tensor, velocity: Any, lr: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the new velocity, and what is subtracted from the weight."""
        v = self.momentum * velocity + d
        return v, lr * (d + self.momentum * v if self.nesterov else v)

    def _velocity(self, variable: tf.Variable) -> tf.Variable:
        return self.velocities[self._index_dict[self._key(variable)]]

    def _update_all(self, grads_and_vars: Iterable[tuple]) -> None:
        # Most variables of a network are vectors, of BatchNorm and biases, and small. Updated one
        # after another, each would take a dozen operations.
        pairs = list(grads_and_vars)
        vectors = [(g, w) for g, w in pairs if isinstance(g, tf.Tensor) and w.shape.rank == 1]
        for dtype in dict.fromkeys(w.dtype for _, w in vectors):
            self._update_vectors([(g, w) for g, w in vectors if w.dtype == dtype])
        super()._update_all((g, w) for g, w in pairs if not any(w is v for _, v in vectors))

    def _update_vectors(self, grads_and_vars: Sequence[tuple]) -> None:
        """Does what `update_step` does, for vectors of one type together."""
        gradients, variables = zip(*grads_and_vars)
        velocities = [self._velocity(w) for w in variables]
        sizes = [w.shape[0] for w in variables]
        decays = np.repeat([self._decay(w) for w in variables], sizes)
        w = tf.concat(variables, 0)
        d = tf.concat(gradients, 0) + tf.constant(decays, w.dtype) * w
        lr = tf.cast(self.learning_rate, w.dtype)
        v, step = self._rule(d, tf.concat(velocities, 0), lr)
        for held, new in zip(velocities, tf.split(v, sizes)):
            held.assign(new)
        for held, new in zip(variables, tf.split(w - step, sizes)):
            held.assign(new)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that make this optimizer again.

        Raises:
          ValueError: if weights of one name have different decays, which names cannot tell apart.
        """
        return {
            **super().get_config(),
            "learning_rate": self._serialize_hyperparameter(self._learning_rate),
            "momentum": self.momentum,
            "nesterov": self.nesterov,
            "coupled_decay": self.coupled_decay,
            "decay_by_name": self._decays_by_name(),
        }


@keras.utils.register_keras_serializable(package="tf_pcl")
class DecoupledAdam(OwnDecays, keras.optimizers.Adam):
    """Keras's AdamW (Loshchilov and Hutter, 2019), in which weights can have decays of their own.

    A step is w ← w − lr·wd·w and then Adam's step. Keras's own AdamW knows only one decay, which a
    weight has or has not.

    Args:
      learning_rate: a float or a keras LearningRateSchedule of the step.
      decoupled_decay: wd ≥ 0, of every trainable weight, those of BatchNorm and biases too.
      decay_by_name: {variable's name: wd} of the weights that have a decay of their own.
      **kwargs: what keras.optimizers.Adam takes, but for its `weight_decay`.
    """

    def __init__(
        self,
        learning_rate: LearningRate = 1e-3,
        decoupled_decay: float = 0.05,
        decay_by_name: Optional[Mapping[str, float]] = None,
        name: str = "AdamW",
        **kwargs: Any,
    ):
        super().__init__(
            learning_rate,
            name=name,
            usual_decay=decoupled_decay,
            decay_by_name=decay_by_name,
            **kwargs,
        )
        self.decoupled_decay = decoupled_decay

    def update_step(self, gradient: tf.Tensor, variable: tf.Variable) -> None:
        lr = tf.cast(self.learning_rate, variable.dtype)
        variable.assign_sub(variable * self._decay(variable) * lr)
        super().update_step(gradient, variable)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that make this optimizer again; ValueError as in CoupledSGD."""
        config = super().get_config()
        config.pop("weight_decay", None)
        return {
            **config,
            "decoupled_decay": self.decoupled_decay,
            "decay_by_name": self._decays_by_name(),
        }


def recipe(
    epochs: float,
    steps_per_epoch: int,
    learning_rate: float = 0.1,
    lr_decay_epochs: Optional[Sequence[float]] = None,
    weight_decay: float = 5e-4,
    *,
    optimizer: str = "sgd",
    schedule: str = "steps",
    warmup_epochs: float = 0.0,
    clip_norm: Optional[float] = None,
) -> Any:
    """Returns the optimizer of the tables (PCL, section 4.1), or another one.

    That of the tables is SGD with Nesterov momentum 0.9, whose rate is divided by 10 at 1/2 and 3/4
    of training.

    Args:
      epochs: the length of training.
      steps_per_epoch: optimizer steps in one epoch.
      learning_rate: the rate at the start, or after the warm-up.
      lr_decay_epochs: the epochs after which the rate is divided by 10; by default 150 and 225 of
        300, scaled to `epochs`. For the schedule "steps" alone.
      weight_decay: L2 decay; "sgd" adds it to the gradient, the others subtract it from the weight
        apart from their own step.
      optimizer: "sgd" (CoupledSGD), "adamw" (DecoupledAdam) or "lamb" (tensorflow-addons' LAMB).
      schedule: "steps", or "cosine", which falls to 0 at the end of training.
      warmup_epochs: the epochs in which the rate rises to that of the schedule.
      clip_norm: the largest norm of all gradients together, over all replicas; None for any.

    Raises:
      UserError: if there is no such optimizer or schedule, or its package is not installed.
    """
    choose("optimizer", optimizer, ("sgd", "adamw", "lamb"), parameter="optimizer")
    rate = schedules.learning_rate(
        learning_rate,
        epochs,
        steps_per_epoch,
        schedule=schedule,
        decay_epochs=lr_decay_epochs,
        warmup_epochs=warmup_epochs,
    )
    clip: dict[str, Any] = {} if clip_norm is None else {"global_clipnorm": clip_norm}
    if optimizer == "adamw":
        return DecoupledAdam(rate, decoupled_decay=weight_decay, **clip)
    if optimizer == "lamb":
        return _lamb(rate, weight_decay, **clip)
    return CoupledSGD(rate, coupled_decay=weight_decay, **clip)


def _lamb(rate: LearningRate, weight_decay: float, **kwargs: Any) -> Any:
    lamb = compat.lamb()
    if lamb is None:
        raise UserError(
            "it comes from tensorflow-addons, which is not installed here or cannot use this "
            "TensorFlow: take sgd or adamw",
            parameter="optimizer",
            value="lamb",
        )
    return lamb(rate, weight_decay=weight_decay, **kwargs)


def current_rate(optimizer: Any) -> float:
    """Returns the learning rate of an optimizer's last step, or of its first one before that."""
    rate = optimizer.learning_rate
    if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        # Optimizers of Keras's older kind return the schedule itself.
        rate = rate(tf.maximum(optimizer.iterations - 1, 0))
    return float(keras.backend.get_value(rate))


def state(optimizer: Any) -> list[tf.Variable]:
    """Returns the variables of an optimizer."""
    variables = optimizer.variables
    return list(variables() if callable(variables) else variables)
