"""What all methods share: the training step, the test step, metrics, the step counter."""

import functools
import inspect
import itertools
import math
import typing
import warnings

import numpy as np
import tensorflow as tf

from tf_pcl import losses, schedules
from tf_pcl import optimizer as optimizers
from tf_pcl.compat import keras
from tf_pcl.errors import UserError
from tf_pcl.methods import batches

STANDARDISE = (
    "if these are raw images, 0–255, build the method with "
    "`preprocess=networks.standardise(mean, std)`"
)
# So many times ln C, the cross-entropy of a guess, is no start, and no epoch to go on from.
TOO_LARGE, LOST = 100, 1e6


class Exit(typing.NamedTuple):
    """One prediction of a model.

    It has logits float32 [B, C] and, where the exit has them, the feature [B, d] that they classify
    and the feature map [B, H, W, c] before it.
    """

    logits: tf.Tensor
    features: typing.Optional[tf.Tensor] = None
    feature_map: typing.Optional[tf.Tensor] = None


class Stage(typing.NamedTuple):
    """One training of several.

    name: a word, "" where there is one stage. network: what is trained, as Distiller.stages gets
    it. build: a function from the list of the stages' trained Distillers before to the one that
    this stage trains.
    """

    name: str
    network: typing.Any
    build: typing.Callable


class Distiller(keras.Model):
    """A training method around a target network.

    Subclasses give its equations, and the steps live here alone. A subclass builds its networks
    in `__init__`, sets `num_views`, `terms`, `exits` and `deployed_exit`, and defines
    `students`, `loss_terms`, `deployed` and, where the method has them, `teachers` and
    `after_step`.

    Train with Keras's own compile and fit on batches of (views uint8 [B, m, H, W, C], labels) or
    (views, labels, weights); images [B, H, W, C] count as one view. Labels are class numbers [B]
    or [B, 1], of any type as long as they are whole, or one-hot or soft labels [B, C]; the class
    of a soft label, for errors, is its most probable one. Batches of other forms are refused with
    a UserError. `sample_weight` and `class_weight` weigh each image in all loss terms, as
    `losses.batch_mean` says; a soft label weighs Σ_c p_c w_c. Errors count each image once, as
    Keras's metrics do.

    Under a strategy each replica must get equally many images, since a loss is a mean over the
    replica's images, divided by the number of replicas.

    Attributes:
      num_views: how many augmented views of an image the method trains on.
      terms: names of the loss terms.
      exits: names of all predictions, trained ones first; `error/NAME` is the error in percent.
      peer_exits: names of the exits that are peers; `diversity` is measured between them.
      deployed_exit: the name of the prediction that `deployed()` gives.
      rampup_epochs, distill_weight: α and λ of the ramp-up weight ω; λ is None where there is no ω.
      step: int64, training steps done.
    """

    num_views = 1
    peer_exits: typing.Sequence[str] = ()
    rampup_epochs: typing.Optional[float] = None
    distill_weight: typing.Any = None
    # What compile and fit were given; a method trains only once it knows the length.
    _given_length = _length = (None, None)
    _own_recipe = False
    _class_weights: tuple[float, ...] = ()

    def __init__(self, preprocess=None, name=None):
        super().__init__(name=name)
        # What a metric tells is the mean over all replicas already, on each of them. Keras would
        # add up the workers' values.
        self.distribute_reduction_method = "first"
        self._takes_raw = preprocess is None
        # Past Keras, which would make it a part of checkpoints.
        self.__dict__["_forms"] = {}
        # Without a layer of its own, the cast to float that it would make.
        self.preprocess = preprocess or keras.layers.Activation(
            "linear", dtype="float32", name="as_they_are"
        )
        self.step = tf.Variable(
            0,
            dtype=tf.int64,
            trainable=False,
            name="step",
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
        )

    # What a method defines.

    @classmethod
    def stages(cls, make, network, **arguments):
        """Returns the Stages of the method, which are trained one after another.

        The network of the last one is deployed.

        Args:
          make: a function (class, network, **arguments) -> Distiller of that class, whose attribute
            `trained` is a function path -> the network that an earlier run deployed.
          network: the target network in whatever form `make` takes; a list for several. arguments:
            keyword arguments of the constructor, without those that come from the stages before. A
            method with arguments that concern its stages alone names them here.
        """
        return [Stage("", network, lambda trained: make(cls, network, **arguments))]

    @classmethod
    def parameters(cls):
        """{name: default} of what the constructor and `stages` take."""
        taken = {**inspect.signature(cls).parameters, **inspect.signature(cls.stages).parameters}
        return {name: parameter.default for name, parameter in taken.items()}

    @property
    def untrained(self):
        """Models that the method holds and never trains by gradient."""
        return []

    @property
    def decay_exceptions(self):
        """[(weights, weight decay)] of the weights that do not take the recipe's."""
        return []

    def students(self, views, training):
        """Returns {exit name: Exit} of what is trained by gradient.

        Args:
          views: uint8 [B, v, H, W, C]; v is 1 in a test.
          training: whether this is a training step.
        """
        raise NotImplementedError

    def teachers(self, views, training):
        """Returns {exit name: Exit} of what no gradient trains.

        It runs outside the gradient tape, before the backward pass. The arguments are those of
        `students`.
        """
        return {}

    def loss_terms(self, labels, student, teacher):
        """Returns {term name: scalar}, whose sum is minimised.

        Args:
          labels: [B].
          student: the exits of `students`.
          teacher: the exits of `teachers`.
        """
        raise NotImplementedError

    def after_step(self, done):
        """What follows the optimizer's step; `done`: int64, steps done with this one."""
        return None  # AutoGraph cannot read a function without a statement.

    def schedules(self):
        """{name: scalar} of the method's schedules at the current step, for reports."""
        return {} if self.distill_weight is None else {"rampup": self.ramp_up()}

    def deployed(self):
        """Returns the network to deploy, which shares its weights with this model.

        It is a functional keras.Model from raw images uint8 [B, H, W, C] to logits float32 [B, C].
        """
        raise NotImplementedError

    # Keras.

    def compile(self, optimizer=None, *, epochs=None, steps_per_epoch=None, **kwargs):
        """Keras's compile, without losses and metrics, which are the method's own.

        Args:
          optimizer: a keras optimizer or its name; by default the tables' SGD (optimizer.recipe),
            whose learning rate drops at 1/2 and 3/4 of training. One of another class decays all
            weights alike.
          epochs, steps_per_epoch: the length of training, which schedules scale with. By default it
            is what fit says: the epochs done before and those of this call. Who trains in several
            calls of fit gives the whole length here.
          kwargs: jit_compile, run_eagerly, steps_per_execution.

        Raises:
          UserError: for losses and metrics.
        """
        for name in ("loss", "metrics", "loss_weights", "weighted_metrics"):
            if kwargs.get(name) is not None:
                raise UserError(
                    "a method brings its own losses and metrics: leave it out",
                    parameter=name,
                    value="…",
                )
        self._given_length = self._length = (epochs, steps_per_epoch)
        self._own_recipe = not optimizer
        optimizer = optimizer or optimizers.recipe(epochs or 1, steps_per_epoch or 1)
        if isinstance(optimizer, optimizers.CoupledSGD):
            for weights, decay in self.decay_exceptions:
                optimizer.set_decay(weights, decay)
        super().compile(optimizer=optimizer, **kwargs)
        self.mean_of = {
            name: keras.metrics.Mean(name)
            for name in (
                "loss",
                *(f"loss/{t}" for t in (*self.terms, "regularization")),
                "diversity",
                *(f"error/{e}" for e in self.exits),
            )
        }

    @property
    def epochs(self):
        """The length of training in epochs; UserError if nobody has told it."""
        return self._known(0)

    @property
    def steps_per_epoch(self):
        """The steps of an epoch; UserError if nobody has told it."""
        return self._known(1)

    def _known(self, i):
        if self._length[i] is None:
            raise UserError(
                "the length of training is not known, and schedules scale with it: give "
                "`compile` or `fit` the `epochs` and `steps_per_epoch`"
            )
        return self._length[i]

    def fit(self, x=None, y=None, *args, **kwargs):
        """Keras's fit, which refuses in one sentence what it cannot train on.

        Raises:
          UserError: for data of another form (see the class), labels that are no classes, weights
            that are none, a callback that sets the learning rate of an optimizer which follows a
            schedule, and a loss that is lost since raw images reach the network.
        """
        given = inspect.signature(super().fit).bind(x, y, *args, **kwargs).arguments
        given.update(given.pop("kwargs", {}))
        given["callbacks"] = self._callbacks(given)
        weights = given.pop("class_weight", None)
        if weights is not None:
            self._class_weights = batches.as_class_weights(weights, self._ends[1])
            self.train_function = None
        if getattr(self, "_eval_data_handler", None) is not None:
            # A fit that was broken off has left its validation data, which Keras would take again.
            del self._eval_data_handler
        try:
            with batches.in_one_sentence():
                return super().fit(**self._checked(given, "train_function"))
        finally:
            if weights is not None:
                self._class_weights, self.train_function = (), None

    def evaluate(self, x=None, y=None, *args, **kwargs):
        """Keras's evaluate: the deployed exit's cross-entropy, and each exit's error in percent.

        The cross-entropy, `loss`, is weighted by `sample_weight` and without penalties of the
        network's own. All are means over the images, however the batches are cut.

        Raises:
          UserError: as `fit`.
        """
        given = inspect.signature(super().evaluate).bind(x, y, *args, **kwargs).arguments
        given.update(given.pop("kwargs", {}))
        with batches.in_one_sentence():
            return super().evaluate(**self._checked(given, "test_function"))

    def predict(self, x, *args, **kwargs):
        """Keras's predict: logits of the deployed exit; UserError for images of another size."""
        with batches.in_one_sentence():
            _ = self._ends
            return super().predict(x, *args, **kwargs)

    def train_on_batch(self, *args, **kwargs):
        """Keras's train_on_batch; UserError as in `fit`, and for an unknown length of training."""
        with batches.in_one_sentence():
            return super().train_on_batch(*args, **kwargs)

    def test_on_batch(self, *args, **kwargs):
        """Keras's test_on_batch; values and UserError as in `evaluate`."""
        with batches.in_one_sentence():
            return super().test_on_batch(*args, **kwargs)

    def save(self, filepath, *args, **kwargs):
        """Refuses: a method is not saved as a whole; its weights and the deployed network are."""
        raise UserError(
            "a method is not saved as a model: use save_weights (a ModelCheckpoint with "
            "`save_weights_only=True`), or save what deployed() gives"
        )

    @functools.cached_property
    def _ends(self):
        """((H, W, C) of the images, number of classes); None in the shape for any."""
        deployed = self.deployed()
        return tuple(deployed.input_shape[1:]), deployed.output_shape[-1]

    def _callbacks(self, given):
        """The callbacks of a fit with the arguments `given`; the first one tells its length."""
        callbacks = given.get("callbacks")
        if isinstance(callbacks, keras.callbacks.CallbackList):
            raise UserError("give a list of callbacks", parameter="callbacks", value="CallbackList")
        callbacks = tf.nest.flatten(callbacks) if callbacks else []
        optimizer = getattr(self.optimizer, "inner_optimizer", self.optimizer)
        rate = getattr(optimizer, "_learning_rate", None)
        for callback in callbacks:
            sets_rate = (keras.callbacks.ReduceLROnPlateau, keras.callbacks.LearningRateScheduler)
            if isinstance(callback, sets_rate) and isinstance(
                rate, keras.optimizers.schedules.LearningRateSchedule
            ):
                raise UserError(
                    f"{type(callback).__name__} cannot change a learning rate that follows a "
                    "schedule: give `compile` one with a number, such as "
                    "tf_pcl.optimizer.CoupledSGD(0.1)"
                )
        return [_Begin(given.get("initial_epoch") or 0), *callbacks]

    def _checked(self, given, function):
        """The arguments of fit or evaluate, once what can be seen before a step has been looked at.

        `function` is the name of the one that Keras makes of the step.
        """
        y, classes = given.get("y"), self._ends[1]
        if y is not None and not tf.nest.is_nested(y):
            try:
                y = tf.convert_to_tensor(np.asarray(y))
            except (TypeError, ValueError) as e:
                raise UserError("the labels are no array of numbers") from e
            batches.as_labels(batches.dense("labels", y), classes)
        form = [batches.form(given.get(name)) for name in ("x", "y", "sample_weight")]
        in_fit = given.get("_use_cached_eval_dataset", False)
        if form != self._forms.get(function) or ("?" in form and not in_fit):
            # Else TensorFlow traces one function for both forms, in which the shapes are not known.
            self._forms[function] = form
            setattr(self, function, None)
        for name in ("x", "validation_data") if self._jit_compile else ():
            # A step that XLA compiles asserts nothing.
            if isinstance(given.get(name), tf.data.Dataset):
                given[name] = given[name].map(functools.partial(batches.asserted, classes))
        return given

    def _set_length(self, epochs, steps):
        """Takes the length of training from fit, where compile was not given it."""
        length = tuple(b if a is None else a for a, b in zip(self._given_length, (epochs, steps)))
        if length == self._length:
            return
        self._length = length
        if self._own_recipe and None not in length:
            optimizer: typing.Any = getattr(self.optimizer, "inner_optimizer", self.optimizer)
            optimizer.learning_rate = optimizers.recipe(*length)._learning_rate
        # The lengths are constants of the graph.
        self.make_train_function(force=True)

    @property
    def metrics(self):
        return list(self.mean_of.values()) if hasattr(self, "mean_of") else []

    @property
    def trainable_weights(self):
        # Teachers stay `trainable`, or their BatchNorm layers would not use batch statistics; they
        # are left out here.
        frozen = {id(w) for model in self.untrained for w in model.weights}
        return [w for w in super().trainable_weights if id(w) not in frozen]

    @property
    def non_trainable_weights(self):
        trained = {id(w) for w in self.trainable_weights}
        return [w for w in self.weights if id(w) not in trained]

    def call(self, images, training=False):
        """Logits of the deployed exit for raw images [B, H, W, C]."""
        images = batches.as_images(images, self._image_shape)
        return self.all_exits(images)[self.deployed_exit].logits

    def all_exits(self, images):
        """{exit name: Exit} of all predictions in inference mode, for raw images [B, H, W, C]."""
        views = images[:, None]
        return {**self.students(views, False), **self.teachers(views, False)}

    @property
    def fractional_epoch(self):
        """Epochs done, float32: step / steps per epoch."""
        return tf.cast(self.step, tf.float32) / self.steps_per_epoch

    def ramp_up(self):
        """ω at the current step; α, unless given, is 80 of 300 epochs, scaled to the run."""
        rampup_epochs = (
            schedules.PAPER_RAMPUP * self.epochs
            if self.rampup_epochs is None
            else self.rampup_epochs
        )
        return schedules.ramp_up(self.fractional_epoch, rampup_epochs, self.distill_weight)

    def train_step(self, data):
        images, labels, weights = batches.parts(data)
        views = batches.as_views(images, self.num_views, self._image_shape)
        if self._own_recipe:
            _ = self.epochs, self.steps_per_epoch  # Its schedule scales with them.
        teacher = self.teachers(views, True)
        with tf.GradientTape() as tape:
            student = self.students(views, True)
            labels = batches.as_labels(labels, _classes(student))
            weights = batches.as_weights(weights, labels, self._class_weights)
            with losses.weighted(weights):
                terms = self.loss_terms(labels, student, teacher)
            terms = {**terms, **self._regularization()}
            total = sum(terms.values())
            # The backward pass waits for the teachers. Without this order Grappler lets after_step
            # change a teacher's weights while the teacher is still about to read them: it drops
            # the control dependencies between the two.
            before = [e.logits for e in teacher.values()]
            before += self._check_first_batch(views, labels, student)
            with tf.control_dependencies(before):
                replicas = tf.identity(float(self.distribute_strategy.num_replicas_in_sync))
            scaled = total / replicas
        self.optimizer.minimize(scaled, self.trainable_weights, tape=tape)
        self.after_step(self.step + 1)
        self.step.assign_add(1)
        return self._report(
            {"loss": total, **{f"loss/{k}": v for k, v in terms.items()}}, labels, student
        )

    def test_step(self, data):
        images, labels, weights = batches.parts(data)
        exits = self.all_exits(batches.as_images(images, self._image_shape))
        labels = batches.as_labels(labels, _classes(exits))
        weights = batches.as_weights(weights, labels)
        loss = losses.cross_entropies(labels, exits[self.deployed_exit].logits)
        return self._report({"loss": loss if weights is None else weights * loss}, labels, exits)

    @property
    def _image_shape(self):
        # Known in fit, evaluate and predict; a step alone does not build a network for it.
        return self.__dict__.get("_ends", (None,))[0]

    def _check_first_batch(self, views, labels, student):
        """Looks for images that reach the network raw, in the first step and before its update.

        Args:
          views: as the step gets them, [B, m, H, W, C].
          labels: as `loss_terms` gets them.
          student: {exit name: Exit} of `students`.

        Returns:
          [what the update must wait for], which fails with a sentence; none under XLA, which drops
          assertions.
        """
        if not self._takes_raw or self._jit_compile:
            return []
        logits, usual = [e.logits for e in student.values()], math.log(_classes(student))

        def look():
            loss = tf.reduce_max(
                [tf.reduce_mean(losses.cross_entropies(labels, z)) for z in logits]
            )
            largest = tf.reduce_max(tf.abs(tf.cast(views, tf.float32)))
            check = batches.demand(
                tf.logical_or(largest <= 20, loss <= TOO_LARGE * usual),
                "the images have values up to",
                largest,
                "and reach the network as they are, whose cross-entropy starts at",
                loss,
                f"instead of about {usual:.2g}: {STANDARDISE}",
            )
            return batches.after([check], tf.constant(True))

        return [tf.cond(tf.equal(self.step, 0), look, lambda: tf.constant(True))]

    def _regularization(self):
        """The penalties of layers with a regularizer of their own; teachers are left out."""
        penalties = [
            loss
            for layer in self.layers
            if not any(layer is t for t in self.untrained)
            for loss in layer.losses
        ]
        return {"regularization": sum(penalties)} if penalties else {}

    def _report(self, losses, labels, exits):
        """Updates the metrics and returns the mean of each that was updated.

        Args:
          losses: {name: the mean over the batch, or the value of each image [B]}.
          labels: as `loss_terms` gets them.
          exits: {exit name: Exit}.
        """
        values = dict(losses)
        classes = tf.argmax(labels, -1) if labels.shape.rank == 2 else tf.cast(labels, tf.int64)
        for name, e in exits.items():
            wrong = tf.argmax(e.logits, -1) != classes
            values[f"error/{name}"] = 100.0 * tf.cast(wrong, tf.float32)
        p = [tf.nn.softmax(exits[name].logits) for name in self.peer_exits]
        if len(p) > 1:
            pairs = [tf.norm(a - b, axis=-1) for a, b in itertools.combinations(p, 2)]
            values["diversity"] = sum(pairs) / len(pairs)
        for name, value in values.items():
            # Every image counts alike, also in a batch that is smaller.
            count = None if value.shape.rank else tf.shape(labels)[0]
            self.mean_of[name].update_state(value, sample_weight=count)
        return {name: self.mean_of[name].result() for name in values}


def _classes(exits):
    """The number of classes of {name: Exit}."""
    return next(iter(exits.values())).logits.shape[-1]


class _Begin(keras.callbacks.Callback):
    """Tells the model its training's length, before others restore anything, and looks at its loss.

    Args:
      initial_epoch: as fit was given it.
    """

    def __init__(self, initial_epoch):
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
        # At most: some exits may not be trained, and an exit may weigh less than 1.
        loss, usual = logs["loss/ce"] / len(self.model.exits), math.log(self.model._ends[1])
        said = (
            f"the cross-entropy is {logs['loss/ce']:.3g} after epoch {epoch + 1}: {STANDARDISE}, "
            "or try a smaller learning rate"
        )
        if not loss < LOST * usual:
            raise UserError(said)
        if loss > 5 * usual:
            warnings.warn(said, stacklevel=2)
