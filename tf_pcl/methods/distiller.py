"""What all methods share: the training step, the test step, and what a method defines."""

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Optional

import tensorflow as tf

from tf_pcl import compat, losses, ranges, schedules, surgery
from tf_pcl.compat import keras
from tf_pcl.errors import UserError
from tf_pcl.methods import batches
from tf_pcl.methods.fitting import Fitting
from tf_pcl.surgery.graph import sublayers

# Types of images that a network of uint8 takes whatever their values.
_RAW = (tf.uint8, tf.bool)


class Exit(NamedTuple):
    """One prediction of a model.

    Attributes:
      logits: float32 [B, C].
      features: the feature [B, d] that the logits are computed from, where the exit has it.
      feature_map: the feature map [B, H, W, c] before that, where the exit has it.
    """

    logits: tf.Tensor
    features: Optional[tf.Tensor] = None
    feature_map: Optional[tf.Tensor] = None


class Stage(NamedTuple):
    """One training of several.

    Attributes:
      name: a word, "" where there is one stage.
      network: what is trained, as Distiller.stages gets it.
      build: a function from the trained Distillers of the stages before to the Distiller that this
        stage trains.
      alone: whether the network is trained with cross-entropy alone, independently of the method's
        own arguments and of the stages before.
    """

    name: str
    network: Any
    build: Callable
    alone: bool = False


def build_all(stages: Iterable[Stage]) -> list["Distiller"]:
    """Builds each stage, untrained, around the Distillers of the stages before."""
    built: list[Distiller] = []
    for stage in stages:
        built.append(stage.build(built))
    return built


class Distiller(Fitting):
    """A training method around a target network.

    Subclasses define a method's equations; this class alone has the training and the test step.

    A subclass builds its networks in `__init__`, sets `num_views`, `terms`, `exits` and
    `deployed_exit`, and defines `students`, `loss_terms`, `deployed` and, where the method has
    them, `teachers` and `after_step`.

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
      rampup_epochs: α of the ramp-up weight ω, in epochs; None for 80 of 300.
      distill_weight: λ of the ramp-up weight ω; None in a method without ω.
      step: int64, training steps done.
    """

    num_views = 1
    peer_exits: Sequence[str] = ()
    rampup_epochs: Optional[float] = None
    distill_weight: Optional[float] = None

    def __init__(self, preprocess: Optional[keras.layers.Layer] = None):
        super().__init__()
        # On each replica, a metric's result is already the mean over all replicas. Keras would add
        # up the workers' values.
        self.distribute_reduction_method = "first"
        # Not through Keras's __setattr__, which would make it a part of checkpoints.
        self.__dict__["_targets"] = []
        self._takes_raw = preprocess is None
        self.preprocess = _layer(preprocess)
        self.step = tf.Variable(
            0,
            dtype=tf.int64,
            trainable=False,
            name="step",
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
        )

    # What a method defines.

    @classmethod
    def stages(cls, make: Callable, network: Any, **arguments: Any) -> list[Stage]:
        """Returns the Stages in which the method is trained, one after another.

        The network of the last one is deployed.

        Args:
          make: a function (class, network, **arguments) -> Distiller of that class, whose attribute
            `trained` is a function path -> the network that an earlier run deployed.
          network: the target network in whatever form `make` takes; a list for several.
          **arguments: keyword arguments of the constructor, without those that come from the stages
            before. A method with arguments that concern its stages alone names them here.
        """
        return [Stage("", network, lambda trained: make(cls, network, **arguments))]

    @classmethod
    def parameters(cls) -> dict[str, Any]:
        """Returns {name: default} of what the constructor and `stages` take."""
        taken = {**inspect.signature(cls).parameters, **inspect.signature(cls.stages).parameters}
        return {name: parameter.default for name, parameter in taken.items()}

    @property
    def untrained(self) -> list[keras.Model]:
        """The models that the method holds and never trains by gradient."""
        return []

    @property
    def given_teachers(self) -> dict[str, keras.Model]:
        """{exit name: model} of the trained networks that teach and that the user has given."""
        return {}

    @property
    def decay_exceptions(self) -> list[tuple]:
        """Pairs (weights, weight decay) of the weights that do not take the recipe's decay."""
        return []

    def students(self, views: tf.Tensor, training: bool) -> dict[str, Exit]:
        """Returns {exit name: Exit} of what is trained by gradient.

        Args:
          views: [B, v, H, W, C]; v is `num_views`, and 1 in a test.
          training: whether layers such as BatchNorm and Dropout run in training mode.
        """
        raise NotImplementedError

    def teachers(self, views: tf.Tensor, training: bool) -> dict[str, Exit]:
        """Returns {exit name: Exit} of what no gradient trains; arguments as in `students`.

        It runs outside the gradient tape, before the backward pass.
        """
        return {}

    def loss_terms(
        self, labels: tf.Tensor, student: Mapping[str, Exit], teacher: Mapping[str, Exit]
    ) -> dict[str, tf.Tensor]:
        """Returns {term name: scalar}, whose sum is minimised.

        Args:
          labels: class numbers [B] or probabilities [B, C].
          student: what `students` gave.
          teacher: what `teachers` gave.
        """
        raise NotImplementedError

    def after_step(self, done: tf.Tensor) -> None:
        """Does what follows the optimizer's step; `done`: int64, steps done with this one."""
        return None  # AutoGraph cannot read a function without a statement.

    def schedules(self) -> dict[str, tf.Tensor]:
        """Returns {name: scalar} of the method's schedules at the current step, for reports."""
        return {} if self.distill_weight is None else {"rampup": self.ramp_up()}

    def deployed(self) -> keras.Model:
        """Returns the network to deploy, which shares its weights with this model.

        It is a functional keras.Model from images [B, H, W, C] to logits float32 [B, C]. It takes
        uint8 if `fit` has trained it on nothing but raw images of that type, else float32.
        """
        raise NotImplementedError

    def network_of(self, exit_name: str) -> keras.Model:
        """Returns the network of an exit, in the form of `deployed`.

        Args:
          exit_name: one of `exits`. If the other exits of a method are not networks of their own,
            only the deployed one is allowed.

        Raises:
          UserError: if the method has no network for this exit.
        """
        if exit_name == self.deployed_exit:
            return self.deployed()
        raise UserError(
            f"of this method's exits, only {self.deployed_exit} is a network of its own: give it",
            parameter="exit",
            value=exit_name,
            allowed=[self.deployed_exit],
        )

    # What methods use.

    def target_of(self, network: Any) -> surgery.Target:
        """Returns Target.of(network), whose instances stay frozen where the first one is."""
        target = surgery.Target.of(network)
        self._targets.append(target)
        return target

    def prepared_view(self, views: tf.Tensor, training: bool) -> tf.Tensor:
        """Returns the first view of each image, preprocessed, float32 [B, H, W, C]."""
        return surgery.prepared(self.preprocess, views[:, 0], training)

    def ramp_up(self) -> tf.Tensor:
        """Returns ω at the current step; α, unless given, is 80 of 300 epochs, scaled to the run.

        Only a method with a `distill_weight` has ω.
        """
        assert self.distill_weight is not None
        alpha = self.rampup_epochs
        alpha = schedules.PAPER_RAMPUP * self.epochs if alpha is None else alpha
        epoch = tf.cast(self.step, tf.float32) / self.steps_per_epoch
        return schedules.ramp_up(epoch, alpha, self.distill_weight)

    def all_exits(self, images: tf.Tensor) -> dict[str, Exit]:
        """Returns {exit name: Exit} of all predictions in inference mode.

        Args:
          images: raw images [B, H, W, C].
        """
        views = images[:, None]
        return {**self.students(views, False), **self.teachers(views, False)}

    def call(self, images: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Returns logits [B, C] of the deployed exit in inference mode, for images [B, H, W, C]."""
        images = batches.as_images(images, self._image_shape)
        return self.all_exits(images)[self.deployed_exit].logits

    # The steps.

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Configures training; see Fitting.

        As in Keras, this takes note of layers that were frozen or made trainable before. Where they
        are those of the given network, or of the first peer, the others and the means follow.

        Raises:
          UserError: as there, if a parameter of the method is out of range, and if a weight that is
            to be trained is a teacher's, too, or is one that Keras would not train.
        """
        for name, allowed in ranges.OF_PARAMETERS.items():
            if (value := getattr(self, name, None)) is not None:
                allowed.check(name, value)
        for target in self._targets:
            target.follow()
        self._check_trained()
        super().compile(*args, **kwargs)

    def _check_trained(self) -> None:
        """Raises UserError if other weights than those that the user means would be trained."""
        still = {id(w) for one in self._targets for w in one.first.non_trainable_weights}
        frozen = {id(w): model for model in self.untrained for w in model.weights}
        for layer in self._students:
            for weight in layer.trainable_weights if layer.built else ():
                if id(weight) in still:
                    raise UserError(
                        f"the layer of the weight {weight.name!r} is trainable in a model that is "
                        "frozen, so Keras would not train it, and this method would: make the "
                        "model trainable, and freeze the layers in it that are to stay"
                    )
                if id(weight) in frozen:
                    raise UserError(
                        f"the weight {weight.name!r} of {layer.name!r} would not be trained, since "
                        f"the teacher {frozen[id(weight)].name!r} has it too: give each a network "
                        "of its own, and a preprocessing without weights that are trained"
                    )

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Takes one optimizer step on a batch and returns {name: mean over the epoch so far}."""
        images, labels, weights = batches.parts(data)
        views = self._taught(batches.as_views(images, self.num_views, self._image_shape))
        # The deployed network takes uint8 if no other images were trained on.
        so_far = getattr(self.preprocess, "takes_uint8", True)
        self.preprocess.takes_uint8 = so_far and views.dtype in _RAW
        if self._own_recipe:
            _ = self.epochs, self.steps_per_epoch  # They must be known: its schedule uses them.
        teacher = self.teachers(views, True)
        with tf.GradientTape() as tape:
            with surgery.recomputing(self._recomputed):
                student = self.students(views, True)
            labels = batches.as_labels(labels, _classes(student))
            weights = batches.as_weights(weights, labels, self._class_weights)
            with losses.weighted(weights), losses.smoothed(self._label_smoothing):
                terms = self.loss_terms(labels, student, teacher)
            terms = {**terms, **self._regularization()}
            total = sum(terms.values())
            # The backward pass waits for the teachers: Grappler drops the control dependencies
            # between a teacher's forward pass and after_step, which would otherwise change the
            # teacher's weights before they are read.
            before = [e.logits for e in teacher.values()]
            before += self._check_first_batch(views, labels, [e.logits for e in student.values()])
            before += self._check_teachers(views, labels, teacher)
            with tf.control_dependencies(before):
                replicas = tf.identity(float(self.distribute_strategy.num_replicas_in_sync))
            scaled = total / replicas
        self.optimizer.minimize(scaled, self.trainable_weights, tape=tape)
        self.after_step(self.step + 1)
        self.step.assign_add(1)
        return self._report(
            {"loss": total, **{f"loss/{k}": v for k, v in terms.items()}}, labels, student
        )

    def test_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Measures all exits on a batch and returns {name: mean over the images so far}."""
        images, labels, weights = batches.parts(data)
        images = self._taught(batches.as_images(images, self._image_shape))
        exits = self.all_exits(images)
        labels = batches.as_labels(labels, _classes(exits))
        weights = batches.as_weights(weights, labels)
        loss = losses.cross_entropies(labels, exits[self.deployed_exit].logits)
        return self._report({"loss": loss if weights is None else weights * loss}, labels, exits)

    @property
    def trainable_weights(self) -> list[tf.Variable]:
        """The weights that gradients train."""
        # Teachers are `trainable`, since otherwise their BatchNorm layers would not use batch
        # statistics. So they are left out here.
        frozen = {id(w) for model in self.untrained for w in model.weights}
        return [w for w in super().trainable_weights if id(w) not in frozen]

    @property
    def non_trainable_weights(self) -> list[tf.Variable]:
        """All other weights, the teachers' among them."""
        trained = {id(w) for w in self.trainable_weights}
        return [w for w in self.weights if id(w) not in trained]

    @property
    def reported(self) -> list[str]:
        """The names of all that the steps may report."""
        terms = [f"loss/{term}" for term in (*self.terms, "regularization")]
        return ["loss", *terms, "diversity", *(f"error/{name}" for name in self.exits)]

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """The means of what is reported, which Keras resets at the start of each epoch."""
        return list(self.mean_of.values()) if hasattr(self, "mean_of") else []

    def _taught(self, images: tf.Tensor) -> tf.Tensor:
        """Returns images that all teachers can take: none is cut to integers."""
        raw = [
            t for t in self.untrained if t.inputs and not tf.as_dtype(t.inputs[0].dtype).is_floating
        ]
        return batches.as_whole(images) if raw and images.dtype not in _RAW else images

    def _check_teachers(
        self, views: tf.Tensor, labels: tf.Tensor, teacher: Mapping[str, Exit]
    ) -> list:
        """Checks in the first step that no teacher was trained on what `preprocess` makes.

        Teachers get the images as they are. Arguments and result as in _check_first_batch.
        """
        named = {
            name: model
            for name, model in self.given_teachers.items()
            # A network of uint8 was made for images as they are.
            if name in teacher and model.inputs[0].dtype not in _RAW
        }
        if self._takes_raw or self._jit_compile or not named:
            return []
        images, guess = self.prepared_view(views, False), math.log(_classes(teacher))

        def look():
            checks = []
            for name, model in named.items():
                of = lambda logits: tf.reduce_mean(losses.cross_entropies(labels, logits))
                raw, prepared = (
                    of(teacher[name].logits),
                    of(model(images, training=False)["logits"]),
                )
                right = tf.logical_or(raw <= guess, prepared >= tf.minimum(guess, raw / 2))
                words = f"the teacher {model.name!r} has a cross-entropy of"
                checks.append(
                    batches.demand(
                        right,
                        words,
                        raw,
                        "on the images, where a guess has",
                        f"{guess:.2g}, and of",
                        prepared,
                        "on what `preprocess` makes of them, and teachers get images as they are: "
                        "give it as keras.Sequential with keras.Input(…), the layer `preprocess` "
                        "and the teacher",
                    )
                )
            return batches.after(checks, tf.constant(True))

        return [tf.cond(tf.equal(self.step, 0), look, lambda: tf.constant(True))]

    def _regularization(self) -> dict[str, tf.Tensor]:
        """Returns the sum of the layers' own penalties, except those of teachers."""
        # Peers hold the layer in front of them, too.
        inside = {id(sub) for layer in self._students for sub in list(sublayers(layer))[1:]}
        penalties = [
            loss for layer in self._students if id(layer) not in inside for loss in layer.losses
        ]
        return {"regularization": sum(penalties)} if penalties else {}

    def _report(
        self, losses: Mapping[str, tf.Tensor], labels: tf.Tensor, exits: Mapping[str, Exit]
    ) -> dict[str, tf.Tensor]:
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
            # Each image counts equally, also in a smaller batch.
            count = None if value.shape.rank else tf.shape(labels)[0]
            self.mean_of[name].update_state(value, sample_weight=count)
        return {name: self.mean_of[name].result() for name in values}


def _layer(preprocess: Any) -> keras.layers.Layer:
    """Returns a layer in front of the networks; a function gets images as float32."""
    if preprocess is None:  # They are only cast.
        return keras.layers.Activation("linear", dtype="float32", name="as_they_are")
    if isinstance(preprocess, keras.layers.Layer):
        if _casts(preprocess):
            return preprocess
        # Otherwise x − 128 would be computed of uint8, modulo 256.
        return keras.Sequential([keras.layers.Rescaling(1.0, dtype="float32"), preprocess])
    surgery.check_keras(preprocess)
    if not callable(preprocess):
        raise UserError(
            "give a keras layer, such as networks.standardise(mean, std)",
            parameter="preprocess",
            value=str(preprocess)[:60],
        )
    return keras.layers.Lambda(
        lambda images: preprocess(tf.cast(images, tf.float32)), name="preprocess"
    )


def _casts(layer: keras.layers.Layer) -> bool:
    """Says whether a layer computes of integers what it computes of floats."""
    if isinstance(layer, keras.layers.Activation):
        return layer.activation is keras.activations.linear
    return compat.is_of_keras(type(layer)) and not isinstance(layer, keras.layers.Lambda)


def _classes(exits: Mapping[str, Exit]) -> int:
    """Returns the number of classes of {name: Exit}."""
    return next(iter(exits.values())).logits.shape[-1]
