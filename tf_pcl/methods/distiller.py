"""What all methods share: the training step, the test step, metrics, the step counter."""

import inspect
import itertools
import typing

import tensorflow as tf

from tf_pcl import optimizer as optimizers
from tf_pcl import schedules
from tf_pcl.compat import keras


class Exit(typing.NamedTuple):
    """One prediction of a model: logits float32 [B, C] and, where the exit has them, the feature [B, d] that they classify
    and the feature map [B, H, W, c] before it."""

    logits: tf.Tensor
    features: typing.Optional[tf.Tensor] = None
    feature_map: typing.Optional[tf.Tensor] = None


class Stage(typing.NamedTuple):
    """One training of several.

    name: a word, "" where there is one stage.
    network: what is trained, as Distiller.stages gets it.
    build: a function from the list of the stages' trained Distillers before to the one that this stage trains.
    """

    name: str
    network: typing.Any
    build: typing.Callable


class Distiller(keras.Model):
    """A training method around a target network. Subclasses give its equations; the steps live here alone.

    A subclass builds its networks in `__init__`, sets `num_views`, `terms`, `exits` and `deployed_exit`, and defines
    `students`, `loss_terms`, `deployed` and, where the method has them, `teachers` and `after_step`.

    Train with Keras's own compile and fit on batches of (views uint8 [B, m, H, W, C], labels int [B]); images [B, H, W, C]
    count as one view. Under a strategy each replica must get equally many images, since a loss is a mean over the
    replica's images, divided by the number of replicas.

    Attributes:
      num_views: how many augmented views of an image the method trains on.
      terms: names of the loss terms.
      exits: names of all predictions, trained ones first; `error/NAME` is the error in percent.
      peer_exits: names of the exits that are peers; `diversity` is measured between them.
      deployed_exit: the name of the prediction that `deployed()` gives.
      rampup_epochs, distill_weight: α and λ of the ramp-up weight ω; λ is None in a method without ω.
      step: int64, training steps done.
    """

    num_views = 1
    peer_exits: typing.Sequence[str] = ()
    rampup_epochs = distill_weight = None

    def __init__(self, preprocess=None, name=None):
        super().__init__(name=name)
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
        """[Stage] in which the method is trained, one after another; the last one's network is deployed.

        Args:
          make: a function (class, network, **arguments) -> Distiller of that class, whose attribute
            `trained` is a function path -> the network that an earlier run deployed.
          network: the target network in whatever form `make` takes; a list for several.
          arguments: keyword arguments of the constructor, without those that come from the stages before. A method with
            arguments that concern its stages alone names them here.
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
        """{exit name: Exit} of what is trained by gradient, for views [B, v, H, W, C]; v is 1 in a test."""
        raise NotImplementedError

    def teachers(self, views, training):
        """{exit name: Exit} of what no gradient trains; it runs outside the gradient tape, before the backward pass."""
        return {}

    def loss_terms(self, labels, student, teacher):
        """{term name: scalar}, whose sum is minimised, from labels [B] and the exits of students() and teachers()."""
        raise NotImplementedError

    def after_step(self, done):
        """What follows the optimizer's step; `done`: int64, steps done with this one."""

    def schedules(self):
        """{name: scalar} of the method's schedules at the current step, for reports."""
        return {} if self.distill_weight is None else {"rampup": self.ramp_up()}

    def deployed(self):
        """The network to deploy: a functional keras.Model from raw images uint8 [B, H, W, C] to logits float32 [B, C].

        It shares its weights with this model.
        """
        raise NotImplementedError

    # Keras.

    def compile(self, optimizer=None, *, epochs, steps_per_epoch, **kwargs):
        """Keras's compile, with the length of training, which schedules scale with.

        Args:
          optimizer: a keras optimizer; by default the tables' SGD (optimizer.recipe). One of another class decays all
            weights alike.
          epochs, steps_per_epoch: as will be given to fit.
        """
        self.epochs, self.steps_per_epoch = epochs, steps_per_epoch
        optimizer = optimizer or optimizers.recipe(epochs, steps_per_epoch)
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
    def metrics(self):
        return list(self.mean_of.values()) if hasattr(self, "mean_of") else []

    @property
    def trainable_weights(self):
        # Teachers stay `trainable`, or their BatchNorm layers would not use batch statistics; they are left out here.
        frozen = {id(w) for model in self.untrained for w in model.weights}
        return [w for w in super().trainable_weights if id(w) not in frozen]

    @property
    def non_trainable_weights(self):
        trained = {id(w) for w in self.trainable_weights}
        return [w for w in self.weights if id(w) not in trained]

    def call(self, images, training=False):
        """Logits of the deployed exit for raw images [B, H, W, C]."""
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
        views, labels = data
        if views.shape.rank == 4:
            views = views[:, None]
        teacher = self.teachers(views, True)
        with tf.GradientTape() as tape:
            student = self.students(views, True)
            terms = {**self.loss_terms(labels, student, teacher), **self._regularization()}
            total = sum(terms.values())
            # The backward pass waits for the teachers. Without this order Grappler lets after_step change a teacher's weights
            # while the teacher is still about to read them: it drops the control dependencies between the two.
            with tf.control_dependencies([e.logits for e in teacher.values()]):
                replicas = tf.identity(float(self.distribute_strategy.num_replicas_in_sync))
            scaled = total / replicas
        self.optimizer.minimize(scaled, self.trainable_weights, tape=tape)
        self.after_step(self.step + 1)
        self.step.assign_add(1)
        return self._report(
            {"loss": total, **{f"loss/{k}": v for k, v in terms.items()}}, labels, student
        )

    def test_step(self, data):
        images, labels = data
        return self._report({}, labels, self.all_exits(images))

    def _regularization(self):
        """The penalties of layers with a regularizer of their own (keras kernel_regularizer), teachers left out."""
        penalties = [
            loss
            for layer in self.layers
            if not any(layer is t for t in self.untrained)
            for loss in layer.losses
        ]
        return {"regularization": sum(penalties)} if penalties else {}

    def _report(self, losses, labels, exits):
        """Updates the metrics and returns the mean of each that was updated."""
        values = dict(losses)
        for name, e in exits.items():
            wrong = tf.argmax(e.logits, -1) != tf.cast(labels, tf.int64)
            values[f"error/{name}"] = 100.0 * tf.cast(wrong, tf.float32)
        p = [tf.nn.softmax(exits[name].logits) for name in self.peer_exits]
        if len(p) > 1:
            pairs = [tf.norm(a - b, axis=-1) for a, b in itertools.combinations(p, 2)]
            values["diversity"] = sum(pairs) / len(pairs)
        for name, value in values.items():
            self.mean_of[name].update_state(value)
        return {name: self.mean_of[name].result() for name in values}
