"""Keras's compile, fit, evaluate and predict as a method has them.

They take what Keras's users pass and refuse in one sentence what cannot be trained on. `distiller`
has the steps.
"""

import collections
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Optional

import numpy as np
import tensorflow as tf

from tf_pcl import losses, ranges, surgery
from tf_pcl import optimizer as optimizers
from tf_pcl.compat import keras
from tf_pcl.errors import UserError
from tf_pcl.methods import batches
from tf_pcl.surgery.graph import sublayers
from tf_pcl.surgery.weights import assign_pairs

STANDARDISE = (
    "if these are raw images, 0–255, build the method with "
    "`preprocess=networks.standardise(mean, std)`"
)
# Multiples of ln C, the cross-entropy of a guess, above which a first loss shows that raw images
# reach the network, and a loss after an epoch that the training is lost.
TOO_LARGE, LOST = 100, 1e6


class Fitting(keras.Model):
    """A keras.Model that brings its own losses and metrics and learns the length of its training.

    `Distiller` adds the steps. It sets `step`, and defines `deployed`, `decay_exceptions` and
    `reported`.

    Attributes:
      mean_of: {name: keras.metrics.Mean} of all that is reported, once the model is compiled.
    """

    # What compile and fit were given; a method trains only once it knows the length.
    _given_length: tuple = (None, None)
    _length: tuple = (None, None)
    _own_recipe = False
    _class_weights: tuple[float, ...] = ()
    _takes_raw = False
    _label_smoothing = 0.0

    def __init__(self, name: Optional[str] = None):
        # What stands in front of the networks gets images as they are, also in mixed precision.
        super().__init__(name=name, autocast=False)
        # Not through Keras's __setattr__, which would make them a part of checkpoints.
        self.__dict__["_forms"] = {}
        self.__dict__["_recomputed"] = []

    def compile(
        self,
        optimizer: Any = None,
        *,
        epochs: Optional[int] = None,
        steps_per_epoch: Optional[int] = None,
        label_smoothing: float = 0.0,
        recompute: bool = False,
        **kwargs: Any,
    ) -> None:
        """Configures training as Keras does, without losses and metrics: a method has its own.

        Args:
          optimizer: a keras optimizer or its name; by default the tables' SGD (optimizer.recipe),
            whose learning rate drops at 1/2 and 3/4 of training. Optimizers from optimizer.recipe
            apply a method's `decay_exceptions`; those of other classes decay all weights alike.
          epochs: the length of training, by which schedules scale. By default it is the epochs
            done before and those of the present call of fit. A training in several calls of fit
            needs the whole length here.
          steps_per_epoch: the steps of an epoch; by default those of the present call of fit.
          label_smoothing: ε in [0, 1]: in training, a label y counts as (1 − ε) y + ε / C in each
            cross-entropy with the labels. Distillation and tests do not change.
          recompute: whether outputs of layers are computed again in the backward pass, instead of
            being kept. No number changes; a step takes less memory and more time.
          **kwargs: jit_compile, run_eagerly, steps_per_execution.

        Raises:
          UserError: for losses, metrics, an optimizer of another Keras, and a smoothing out of
            range.
        """
        for name in ("loss", "metrics", "loss_weights", "weighted_metrics"):
            if kwargs.get(name) is not None:
                raise UserError(
                    "a method brings its own losses and metrics: leave it out",
                    parameter=name,
                    value="…",
                )
        surgery.check_keras(optimizer)
        ranges.OF_PARAMETERS["label_smoothing"].check("label_smoothing", label_smoothing)
        self._label_smoothing = label_smoothing
        # Not through Keras's __setattr__, as above.
        self.__dict__["_recomputed"] = surgery.recomputed(self, self.untrained) if recompute else []
        self._given_length = self._length = (epochs, steps_per_epoch)
        self._own_recipe = not optimizer
        optimizer = optimizer or optimizers.recipe(epochs or 1, steps_per_epoch or 1)
        scaled = isinstance(optimizer, keras.mixed_precision.LossScaleOptimizer)
        inner = optimizer.inner_optimizer if scaled else optimizer
        if isinstance(inner, optimizers.OwnDecays):
            for weights, decay in self.decay_exceptions:
                inner.set_decay(weights, decay)
        self._check_specs(getattr(inner, "optimizer_specs", ()))
        layers = (sub for layer in self._students for sub in sublayers(layer))
        if not scaled and any(layer.compute_dtype == "float16" for layer in layers):
            # Keras goes by the global policy, which may have changed since the network was built.
            optimizer = keras.mixed_precision.LossScaleOptimizer(keras.optimizers.get(optimizer))
        super().compile(optimizer=optimizer, **kwargs)
        self.mean_of = {name: keras.metrics.Mean(name) for name in self.reported}
        self.__dict__.pop("_returned", None)

    def _check_specs(self, specs: Sequence[dict[str, Any]]) -> None:
        """Raises UserError if a MultiOptimizer of tensorflow-addons would not train each weight.

        It knows weights by their names alone, leaves out the others, and trains a weight twice if
        its name is given twice.

        Args:
          specs: its optimizers with the names of their weights.
        """
        times = collections.Counter(name for spec in specs for name in spec["weights"])
        wrong = [w.name for w in self.trainable_weights if times[w.name] != 1] if specs else []
        if wrong:
            raise UserError(
                f"it finds weights by their names, would train {wrong[0]!r} {times[wrong[0]]} "
                f"times a step, and {len(wrong)} of the weights not once: give it every layer of "
                "the method once, and of peers' layers of the same name only one peer's",
                parameter="optimizer",
                value="MultiOptimizer",
            )

    def build_optimizer(self) -> None:
        """Makes the optimizer's variables, unless they are there."""
        inner = self._inner_optimizer
        build = getattr(self.optimizer, "build", getattr(inner, "build", None))
        # An optimizer of Keras's legacy kind makes its variables in the first step alone.
        if build and not getattr(inner, "_built", False):
            build(self.trainable_weights)

    @property
    def metrics_names(self) -> list[str]:
        """The names of what the last `evaluate`, `train_on_batch` or `test_on_batch` returned."""
        returned = self.__dict__.get("_returned")
        return super().metrics_names if returned is None else list(returned)

    def make_train_function(self, force: bool = False) -> Any:
        """Returns Keras's function of a step, an iterator of batches -> {name: mean}."""
        # TensorFlow traces a step a second time if the first trace has made variables.
        with self.distribute_strategy.scope():
            self.build_optimizer()
        if self._own_recipe:
            # Its rate follows the same steps as the method's own schedules, also where the model
            # was compiled again or its weights were loaded without the optimizer's.
            self._inner_optimizer.iterations.assign(self.step)
        return super().make_train_function(force)

    @property
    def epochs(self) -> int:
        """The length of training in epochs; UserError if it is not known."""
        return self._known(0)

    @property
    def steps_per_epoch(self) -> int:
        """The steps of an epoch; UserError if they are not known."""
        return self._known(1)

    def fit(self, x: Any = None, y: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Trains as Keras's fit does and refuses in one sentence what it cannot train on.

        Raises:
          UserError: for data of another form (see the class), invalid labels or weights, a callback
            that is of another Keras or sets the learning rate of an optimizer which follows a
            schedule, and a loss that diverges because raw images reach the network.
        """
        given = _bound(super().fit, x, y, *args, **kwargs)
        given["callbacks"] = self._callbacks(given)
        if hasattr(given.get("validation_data"), "shape"):
            raise UserError("`validation_data` has no labels: give (images, labels)")
        weights = given.pop("class_weight", None)
        if weights is not None:
            self._class_weights = batches.as_class_weights(weights, self._ends[1])
            self.train_function = None
        if getattr(self, "_eval_data_handler", None) is not None:
            # An interrupted fit leaves its validation data, which Keras would use again.
            del self._eval_data_handler
        try:
            with batches.in_one_sentence():
                return super().fit(**self._checked(given, "train_function"))
        finally:
            if weights is not None:
                self._class_weights, self.train_function = (), None

    def evaluate(self, x: Any = None, y: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Measures the deployed exit's cross-entropy, and each exit's error in percent.

        The cross-entropy, `loss`, is weighted by `sample_weight` and without the network's own
        penalties. All are means over the images, for any batch sizes.

        Raises:
          UserError: as `fit`.
        """
        return self._returning(super().evaluate, "test_function", x, y, *args, **kwargs)

    def predict(self, x: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        """Returns the deployed exit's logits [N, C]; UserError for images of another size."""
        with batches.in_one_sentence():
            _ = self._ends
            return super().predict(x, *args, **kwargs)

    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Trains on a batch; UserError as in `fit`, and for an unknown length of training."""
        return self._returning(super().train_on_batch, "", *args, **kwargs)

    def test_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Measures on a batch what `evaluate` measures; UserError as there."""
        return self._returning(super().test_on_batch, "", *args, **kwargs)

    def load_weights(self, filepath: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads weights as Keras does, and refuses a file that lacks some of them.

        Raises:
          UserError: if it is of another method, network or number of peers. With Keras's
            `skip_mismatch` or `by_name`, the weights that it lacks stay as they are.
        """
        given = _bound(super().load_weights, filepath, *args, **kwargs)
        of_metrics = {id(w) for metric in self.metrics for w in metric.weights}
        before = [(w, w.numpy()) for w in self.weights if id(w) not in of_metrics]
        marked = [(w, value) for w, value in before if w.dtype.is_floating and value.size]
        for weight, value in marked:
            weight.assign(np.full_like(value, np.nan))
        lost = before
        try:
            status = super().load_weights(**given)
            lost = [(w, value) for w, value in marked if np.isnan(w.numpy()).all()]
            if lost and not (given.get("skip_mismatch") or given.get("by_name")):
                names, lost = [w.name for w, _ in lost], before
                if status is not None:
                    status.expect_partial()  # Otherwise TensorFlow prints a line for each.
                raise UserError(
                    f"{filepath} lacks {len(names)} of the {len(before)} weights of this "
                    f"{type(self).__name__}, such as {names[0]!r}: give one that the same method "
                    "has saved, with the same networks and peers"
                )
        finally:
            assign_pairs((value, weight) for weight, value in lost)
        return status

    def save(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """Raises UserError: only a method's weights and its deployed network can be saved."""
        raise UserError(
            "a method cannot be saved as a model: use save_weights (a ModelCheckpoint with "
            "`save_weights_only=True`), or save the network that deployed() returns"
        )

    def _returning(self, function: Callable, step: str, *args: Any, **kwargs: Any) -> Any:
        """Calls Keras's function and returns what it measures, a dict or a list.

        Args:
          function: a method of keras.Model that has the parameter `return_dict`.
          step: as `function` in `_checked`; "" for a function of one batch, whose step checks it.
          *args, **kwargs: what the user gave.
        """
        given = _bound(function, *args, **kwargs)
        as_dict = given.pop("return_dict", False)
        with batches.in_one_sentence():
            given = self._checked(given, step) if step else given
            values = function(**given, return_dict=True)
        self.__dict__["_returned"] = [name for name in self.reported if name in values]
        return values if as_dict else [values[name] for name in self._returned]

    @property
    def _students(self) -> list[keras.layers.Layer]:
        """All layers but the teachers."""
        return [layer for layer in self.layers if not any(layer is t for t in self.untrained)]

    @functools.cached_property
    def _ends(self) -> tuple:
        """((H, W, C) of the images, number of classes); a size is None if any is allowed."""
        deployed = self.deployed()
        return tuple(deployed.input_shape[1:]), deployed.output_shape[-1]

    @property
    def _image_shape(self) -> Optional[tuple]:
        # fit, evaluate and predict set it; a single step does not build a network for it.
        return self.__dict__.get("_ends", (None,))[0]

    def _known(self, i: int) -> int:
        if self._length[i] is None:
            raise UserError(
                "the length of training is not known, and the schedules depend on it: give "
                "`compile` or `fit` the `epochs` and `steps_per_epoch`"
            )
        return self._length[i]

    def _set_length(self, epochs: float, steps: Optional[int]) -> None:
        """Takes the length of training from fit, where compile was not given it."""
        given_epochs, given_steps = self._given_length
        epochs = epochs if given_epochs is None else given_epochs
        steps = steps if given_steps is None else given_steps
        if (epochs, steps) == self._length:
            return
        self._length = (epochs, steps)
        if self._own_recipe and steps is not None:
            rate = optimizers.recipe(epochs, steps)._learning_rate
            self._inner_optimizer.learning_rate = rate
        # The lengths are constants of the graph.
        self.make_train_function(force=True)

    @property
    def _inner_optimizer(self) -> Any:
        # Mixed precision wraps an optimizer in one that scales the loss.
        return getattr(self.optimizer, "inner_optimizer", self.optimizer)

    def _callbacks(self, given: dict) -> list:
        """Returns a fit's callbacks, after the one that tells the model its length."""
        callbacks = given.get("callbacks")
        if isinstance(callbacks, keras.callbacks.CallbackList):
            raise UserError("give a list of callbacks", parameter="callbacks", value="CallbackList")
        callbacks = tf.nest.flatten(callbacks) if callbacks else []
        rate = getattr(self._inner_optimizer, "_learning_rate", None)
        sets_rate = (keras.callbacks.ReduceLROnPlateau, keras.callbacks.LearningRateScheduler)
        for callback in callbacks:
            surgery.check_keras(callback)
            if isinstance(callback, sets_rate) and isinstance(
                rate, keras.optimizers.schedules.LearningRateSchedule
            ):
                raise UserError(
                    f"{type(callback).__name__} cannot change a learning rate that follows a "
                    "schedule: give `compile` one with a number, such as "
                    "tf_pcl.optimizer.CoupledSGD(0.1)"
                )
        return [_Begin(given.get("initial_epoch") or 0), *callbacks]

    def _checked(self, given: dict, function: str) -> dict:
        """Checks what is known before the first step, and returns the arguments of fit or evaluate.

        Args:
          given: {name: value}.
          function: the name of the attribute in which Keras keeps the function of the step.
        """
        y, classes = given.get("y"), self._ends[1]
        if y is not None and not tf.nest.is_nested(y):
            try:
                y = tf.convert_to_tensor(np.asarray(y))
            except (TypeError, ValueError) as e:
                raise UserError("the labels are no array of numbers") from e
            batches.as_labels(batches.dense("labels", y), classes)
        weights = given.get("sample_weight")
        if weights is not None and not getattr(weights, "shape", ()):
            raise UserError(
                f"`sample_weight` is a {type(weights).__name__}: give an array, with a number for "
                "each image"
            )
        form = [batches.form(given.get(name)) for name in ("x", "y", "sample_weight")]
        in_fit = given.get("_use_cached_eval_dataset", False)
        if form != self._forms.get(function) or ("?" in form and not in_fit):
            # Otherwise TensorFlow traces one function for both forms, with unknown shapes.
            self._forms[function] = form
            setattr(self, function, None)
        for name in ("x", "validation_data") if self._jit_compile else ():
            # XLA drops the assertions of a step that it compiles.
            if isinstance(given.get(name), tf.data.Dataset):
                given[name] = given[name].map(functools.partial(batches.asserted, classes))
        return given

    def _check_first_batch(
        self, views: tf.Tensor, labels: tf.Tensor, logits: Sequence[tf.Tensor]
    ) -> list:
        """Checks in the first step, before its update, that no raw images reach the network.

        Args:
          views: as the step gets them, [B, m, H, W, C].
          labels: class numbers [B] or probabilities [B, C].
          logits: those of the trained exits, each [B, C].

        Returns:
          Operations that the update must wait for; none under XLA, which drops assertions.
        """
        if not self._takes_raw or self._jit_compile:
            return []
        usual = math.log(logits[0].shape[-1])

        def look():
            loss = tf.reduce_max(
                [tf.reduce_mean(losses.cross_entropies(labels, z)) for z in logits]
            )
            largest = tf.reduce_max(tf.abs(tf.cast(views, tf.float32)))
            check = batches.demand(
                tf.logical_or(largest <= 20, loss <= TOO_LARGE * usual),
                "the images have values up to",
                largest,
                "and reach the network unscaled; its cross-entropy starts at",
                loss,
                f"instead of about {usual:.2g}: {STANDARDISE}",
            )
            return batches.after([check], tf.constant(True))

        return [tf.cond(tf.equal(self.step, 0), look, lambda: tf.constant(True))]


def _bound(function: Callable, *args: Any, **kwargs: Any) -> dict:
    """Returns the arguments of a call as {name: value}."""
    given = inspect.signature(function).bind(*args, **kwargs).arguments
    further = given.pop("kwargs", {})
    return {**given, **further}


class _Begin(keras.callbacks.Callback):
    """Tells the model the length of training, before other callbacks, and checks its loss.

    Args:
      initial_epoch: that of fit.
    """

    def __init__(self, initial_epoch: int):
        super().__init__()
        self.initial_epoch = initial_epoch

    def on_train_begin(self, logs=None):
        epochs, steps = self.params["epochs"] - self.initial_epoch, self.params["steps"]
        if steps:
            done = self.model.step.numpy() / steps
            epochs += int(done) if done == int(done) else done
        self.model._set_length(epochs, steps)

    def on_epoch_end(self, epoch, logs=None):
        if not self.model._takes_raw or "loss/ce" not in (logs or {}):
            return
        # The mean is at most this: some exits may not be trained, or weigh less than 1.
        loss, usual = logs["loss/ce"] / len(self.model.exits), math.log(self.model._ends[1])
        message = (
            f"the cross-entropy is {logs['loss/ce']:.3g} after epoch {epoch + 1}: {STANDARDISE}, "
            "or try a smaller learning rate"
        )
        if not loss < LOST * usual:
            raise UserError(message)
        if loss > 5 * usual:
            warnings.warn(message, stacklevel=2)
