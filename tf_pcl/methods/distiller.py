"""What all methods share: the training step, the test step, metrics, the step counter."""
import itertools
import typing

import tensorflow as tf
from tensorflow import keras

from tf_pcl import optimizer as optimizers
from tf_pcl.networks import clone


class Exit(typing.NamedTuple):
    """One prediction of a model: logits [B, C] and, where the exit has one, the feature [B, d] that they classify."""

    logits: tf.Tensor
    features: typing.Optional[tf.Tensor] = None


class Distiller(keras.Model):
    """A training method around a target network. Subclasses give its equations; the steps live here alone.

    A subclass builds its networks in `__init__`, sets `views`, `terms`, `exits` and `deployed_exit`, and defines
    `students`, `loss_terms`, `deployed` and, where the method has them, `teachers` and `after_step`.

    Train with Keras's own compile and fit on batches of (views uint8 [B, m, H, W, C], labels int [B]); images [B, H, W, C]
    count as one view. Under a strategy each replica must get equally many images, since a loss is a mean over the
    replica's images, divided by the number of replicas.

    Attributes:
      views: how many augmented views of an image the method trains on.
      terms: names of the loss terms.
      exits: names of all predictions, trained ones first; `error/NAME` is the error in percent.
      deployed_exit: the name of the prediction that `deployed()` gives.
      step: int64, training steps done.
    """

    views = 1

    def __init__(self, preprocess=None, name=None):
        super().__init__(name=name)
        # Without a layer of its own, the cast to float that it would make.
        self.preprocess = preprocess or keras.layers.Activation("linear", dtype="float32", name="as_they_are")
        self.step = tf.Variable(0, dtype=tf.int64, trainable=False, name="step",
                                aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)

    # What a method defines.

    @property
    def untrained(self):
        """Models that the method holds and never trains by gradient."""
        return []

    def students(self, views, training):
        """{exit name: Exit} of what is trained by gradient, for views [B, v, H, W, C]; v is 1 in a test."""
        raise NotImplementedError

    def teachers(self, views, training):
        """{exit name: Exit} of what is never trained by gradient; it runs outside the gradient tape."""
        return {}

    def loss_terms(self, labels, student, teacher):
        """{term name: scalar}, whose sum is minimised, from labels [B] and the exits of students() and teachers()."""
        raise NotImplementedError

    def after_step(self, done):
        """What follows the optimizer's step; `done`: int64, steps done with this one."""

    def schedules(self):
        """{name: scalar} of the method's schedules at the current step, for reports."""
        return {}

    def deployed(self):
        """The network to deploy: a functional keras.Model from raw images uint8 [B, H, W, C] to logits float32 [B, C].

        It shares its weights with this model.
        """
        raise NotImplementedError

    # Keras.

    def compile(self, optimizer=None, *, epochs, steps_per_epoch, **kwargs):
        """Keras's compile, with the length of training, which schedules scale with.

        Args:
          optimizer: a keras optimizer; by default the tables' SGD (optimizer.recipe).
          epochs, steps_per_epoch: as will be given to fit.
        """
        self.epochs, self.steps_per_epoch = epochs, steps_per_epoch
        super().compile(optimizer=optimizer or optimizers.recipe(epochs, steps_per_epoch), **kwargs)
        self.mean_of = {name: keras.metrics.Mean(name) for name in (
            "loss", *(f"loss/{t}" for t in self.terms), "loss/regularization", "diversity", *(f"error/{e}" for e in self.exits))}

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

    def train_step(self, data):
        views, labels = data
        if views.shape.rank == 4:
            views = views[:, None]
        teacher = self.teachers(views, True)
        with tf.GradientTape() as tape:
            student = self.students(views, True)
            terms = {**self.loss_terms(labels, student, teacher), **self._regularization()}
            total = tf.add_n(list(terms.values()))
            scaled = total / self.distribute_strategy.num_replicas_in_sync
        self.optimizer.minimize(scaled, self.trainable_weights, tape=tape)
        self.after_step(self.step + 1)
        self.step.assign_add(1)
        return self._report({"loss": total, **{f"loss/{k}": v for k, v in terms.items()}}, labels, student)

    def test_step(self, data):
        images, labels = data
        return self._report({}, labels, self.all_exits(images))

    def _regularization(self):
        """The penalties of layers with a regularizer of their own (keras kernel_regularizer), teachers left out."""
        penalties = [loss for layer in self.layers if not any(layer is t for t in self.untrained) for loss in layer.losses]
        return {"regularization": tf.add_n(penalties)} if penalties else {}

    def _report(self, losses, labels, exits):
        """Updates the metrics and returns the mean of each that was updated."""
        values = dict(losses)
        for name, e in exits.items():
            wrong = tf.argmax(e.logits, -1) != tf.cast(labels, tf.int64)
            values[f"error/{name}"] = 100.0 * tf.cast(wrong, tf.float32)
        p = [tf.nn.softmax(e.logits) for name, e in exits.items() if name.startswith("peer_")]
        if len(p) > 1:
            pairs = [tf.norm(a - b, axis=-1) for a, b in itertools.combinations(p, 2)]
            values["diversity"] = tf.add_n(pairs) / len(pairs)
        for name, value in values.items():
            self.mean_of[name].update_state(value)
        return {name: self.mean_of[name].result() for name in values}


class Peers(keras.Model):
    """m peers on a shared trunk; all of the weights that a method trains.

    Args:
      trunk, branch: as networks.split gives them.
      count: m ≥ 1; every peer gets a freshly initialised copy of the branch.
      preprocess: a layer in front of the trunk.
    """

    def __init__(self, trunk, branch, count, preprocess, name="peers"):
        super().__init__(name=name)
        self.preprocess = preprocess
        self.trunk = trunk
        self.branches = []
        for j in range(count):
            own = clone(branch, salt=j)
            # Keras wants different names for models that meet in one, as in an ensemble.
            self.branches.append(keras.Model(own.input, own.output, name=f"branch_{j + 1}"))
        self.built = True

    def call(self, views, training=False):
        """A list of the peers' Exits for views [B, v, H, W, C]: peer j takes view j, or all take the one (v = 1)."""
        count = views.shape[1]
        # The views go through the trunk as one batch of v·B images, which share its BatchNorm statistics.
        images = tf.reshape(tf.transpose(views, [1, 0, 2, 3, 4]), [-1, *views.shape[2:]])
        low = tf.split(self.trunk(self.preprocess(images), training=training), count)
        low = low * len(self.branches) if count == 1 else low
        return [Exit(**branch(x, training=training)) for branch, x in zip(self.branches, low)]

    def target(self, j=0):
        """Peer j as a functional keras.Model from raw images uint8 to logits float32: trunk and one branch."""
        images = keras.Input(self.trunk.input_shape[1:], dtype=tf.uint8, name="images")
        return classifier(images, self.branches[j](self.trunk(self.preprocess(images)))["logits"])


def classifier(images, logits):
    """keras.Model from `images` to float32 `logits`, under that output name."""
    return keras.Model(images, keras.layers.Activation("linear", dtype="float32", name="logits")(logits))


def peer_names(count):
    """["peer_1", …]."""
    return [f"peer_{j + 1}" for j in range(count)]
