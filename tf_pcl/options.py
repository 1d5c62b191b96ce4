"""All of the command line's settings: one dataclass, from which the absl flags are made.

The only module that reads FLAGS. What is None is left to the method's, network's or data set's own default.
"""

import dataclasses
import math
import re
import typing

from absl import flags

from tf_pcl.errors import UserError


def _flag(default, help_text, kind=None, *, low=None, high=None, above=None, run_only=False):
    """A setting: `kind` is int, float, bool, str, list (of floats) or a tuple of the allowed words; numbers lie in
    [low, high] and are > above; a `run_only` one does not change the result and may differ between calls in a workdir."""
    return dataclasses.field(
        default=default,
        metadata=dict(
            help=help_text,
            kind=kind or type(default),
            low=low,
            high=high,
            above=above,
            run_only=run_only,
        ),
    )


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of a run, each with its flag's name, unit and default."""

    # What to train.
    method: str = _flag("pcl", "how to train")
    network: str = _flag(
        "resnet32",
        "target network: a name, applications.NAME for keras.applications, or module:function "
        "of your own; for methods of whole networks also several, comma separated, the target first",
    )
    split_at: typing.Optional[str] = _flag(
        None,
        "layer after which each peer has its own branch; default: before the "
        "last stage, or as --trunk_share says",
        str,
    )
    trunk_share: typing.Optional[float] = _flag(
        None,
        "largest share of the network's forward cost, more than 0 and at most "
        "1, that the peers have in common: the cut is the last possible one; "
        "default: 0.7 for networks without stages",
        float,
        above=0,
        high=1,
    )
    weights: typing.Optional[str] = _flag(
        None,
        "what --network starts from in every stage: .weights.h5, .h5, .keras, a "
        "SavedModel, a TensorFlow checkpoint or a run's workdir; a classifier of other "
        "classes in it is left out",
        str,
    )
    peers: typing.Optional[int] = _flag(
        None,
        "number of peers, a leader not counted; default for several networks: theirs",
        int,
        low=1,
    )
    teacher: typing.Optional[str] = _flag(
        None,
        "workdir or SavedModel of a network trained before; default: train --teacher_network first",
        str,
    )
    teacher_network: typing.Optional[str] = _flag(
        None, "network of the teacher; default: resnet110", str
    )
    generations: typing.Optional[int] = _flag(
        None, "number of networks trained one after another, generation 0 counted", int, low=1
    )

    # Data.
    dataset: str = _flag(
        "cifar100",
        "cifar10, cifar100, digits, tiny_imagenet, image_folder, or any image-classification data "
        "set of tensorflow-datasets",
    )
    data_dir: typing.Optional[str] = _flag(
        None,
        "folder of the images (image_folder: SPLIT/CLASS/IMAGE; tiny_imagenet: "
        "as unpacked) or of tensorflow-datasets",
        str,
        run_only=True,
    )
    train_examples: typing.Optional[int] = _flag(
        None, "train on the first so many images of a seeded permutation; default: all", int, low=1
    )
    image_size: typing.Optional[int] = _flag(
        None,
        "pixels: cut images square and resize them to this side; default: as they are",
        int,
        low=4,
    )
    flip: typing.Optional[bool] = _flag(
        None, "mirror half of the views; default: unless the data set is of digits or letters", bool
    )
    on_bad_image: str = _flag(
        "fail",
        "image_folder, tiny_imagenet: refuse files that cannot be read, or leave them out",
        ("fail", "skip"),
    )
    augment: typing.Optional[str] = _flag(
        None,
        "crop: zero-pad by an eighth of the side and cut the old size; inception: "
        "cut 8 to 100 % of the area and resize it; default: crop up to 64 pixels a side, "
        "else inception",
        ("crop", "inception"),
    )
    color_jitter: float = _flag(
        0.0,
        "brightness, contrast and saturation vary by factors of 1 ± this; 0: none",
        low=0,
        high=1,
    )
    cutout: int = _flag(0, "pixels: side of a blackened square in each view, even; 0: none", low=0)
    class_weights: typing.Optional[str] = _flag(
        None,
        "balanced: an image weighs the less in every loss the more training images its class has; "
        "default: all images alike",
        ("balanced",),
    )

    # Recipe.
    epochs: int = _flag(300, "length of training", low=1)
    batch_size: int = _flag(128, "images a step, over all replicas together", low=1)
    learning_rate: float = _flag(0.1, "learning rate at the start", above=0)
    lr_decay_epochs: typing.Optional[tuple] = _flag(
        None,
        "epochs after which the learning rate is divided by 10, comma "
        "separated; default: 150,225 of 300, scaled to --epochs",
        list,
    )
    weight_decay: float = _flag(5e-4, "L2 decay, added to the gradient", low=0)
    temperature: typing.Optional[float] = _flag(
        None, "softens teachers' and students' probabilities", float, above=0
    )
    rampup_epochs: typing.Optional[float] = _flag(
        None,
        "epochs until distillation has its full weight, 0: from the start; "
        "default: 80 of 300, scaled to --epochs",
        float,
        low=0,
    )
    distill_weight: typing.Optional[float] = _flag(
        None, "full weight of distillation", float, low=0
    )
    distill_share: typing.Optional[float] = _flag(
        None,
        "share of distillation in a student's loss, the rest is cross-entropy",
        float,
        low=0,
        high=1,
    )
    hint_weight: typing.Optional[float] = _flag(
        None, "weight of the squared distance between features", float, low=0
    )
    ce_weight: typing.Optional[float] = _flag(None, "weight α of cross-entropy", float, low=0)
    collaboration_weight: typing.Optional[float] = _flag(
        None, "weight β of what comes from the other peers", float, low=0
    )
    self_weight: typing.Optional[float] = _flag(None, "weight γ of self-distillation", float, low=0)
    angle_weight: typing.Optional[float] = _flag(
        None, "weight β_1 of the angles, times β", float, low=0
    )
    mutual_weight: typing.Optional[float] = _flag(
        None, "weight β_2 of the other peers' logits, times β", float, low=0
    )
    ema_decay: typing.Optional[float] = _flag(
        None,
        "largest decay of the mean teacher; default: 0.999, by steps at most "
        "what averages over 1 % of training",
        float,
        low=0,
        high=1,
    )
    ema_every: typing.Optional[str] = _flag(
        None, "when the mean teacher is updated", ("step", "epoch")
    )
    ensemble_teacher: typing.Optional[str] = _flag(
        None,
        "classifier on the peers' features, mean of their logits, or none",
        ("features", "logits", "none"),
    )
    peer_teacher: typing.Optional[str] = _flag(
        None,
        "peers learn from each other's mean, from each other, or not",
        ("mean", "mutual", "none"),
    )
    views: typing.Optional[str] = _flag(
        None, "each peer has its own view, or all share one", ("own", "shared")
    )
    deploy: typing.Optional[str] = _flag(
        None, "export one mean peer, or all with the ensemble classifier", ("peer", "ensemble")
    )
    seed: int = _flag(0, "of weights, subset, order and augmentation", low=0, high=2**31 - 1)

    # Machine.
    strategy: str = _flag(
        "auto",
        "auto: all GPUs of this machine, else the CPU",
        ("auto", "mirrored", "multi_worker", "tpu", "one_device"),
    )
    precision: str = _flag(
        "float32", "Keras precision policy", ("float32", "mixed_bfloat16", "mixed_float16")
    )
    jit_compile: bool = _flag(False, "compile the step with XLA; for one GPU")
    deterministic: bool = _flag(
        False, "bit for bit the same result at each run on one device; slower"
    )

    # Output.
    workdir: typing.Optional[str] = _flag(
        None,
        "folder of results, logs, checkpoints and the SavedModel; default "
        "runs/DATASET-NETWORK-METHOD-seedSEED",
        str,
        run_only=True,
    )
    checkpoint_every: str = _flag(
        "1epoch",
        "how often to save: a number of steps (500steps) or epochs (5epochs)",
        run_only=True,
    )
    test_every: int = _flag(1, "epochs between tests; the last epoch is always tested", low=1)
    resume: str = _flag(
        "auto",
        "auto: go on from the workdir's checkpoint; never: refuse a workdir that has one",
        ("auto", "never"),
        run_only=True,
    )

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _check(field, getattr(self, field.name))
        if self.cutout % 2:
            raise UserError(f"--cutout={self.cutout}: give an even number of pixels")
        if self.split_at and self.trunk_share:
            raise UserError(
                f"--split_at={self.split_at} does not go with --trunk_share={self.trunk_share:g}: give one"
            )
        if self.weights and "," in self.network:
            raise UserError(
                f"--weights does not go with several networks, --network={self.network}: give one network"
            )
        if (self.rampup_epochs or 0) > self.epochs:
            raise UserError(
                f"--rampup_epochs={self.rampup_epochs:g} is more than --epochs={self.epochs}"
            )
        drops = self.lr_decay_epochs or ()
        if list(drops) != sorted(set(drops)) or any(not 0 < e < self.epochs for e in drops):
            raise UserError(
                f"--lr_decay_epochs={','.join(f'{e:g}' for e in drops)}: give increasing epochs between 0 and "
                f"--epochs={self.epochs}"
            )
        self.checkpoint_steps(1)

    def checkpoint_steps(self, steps_per_epoch):
        """--checkpoint_every in steps."""
        m = re.fullmatch(r"(\d+)(?:(steps?)|(epochs?))", self.checkpoint_every)
        if not m or not int(m.group(1)):
            raise UserError(
                f"--checkpoint_every={self.checkpoint_every}: give a number of steps or epochs, such as "
                "500steps or 2epochs"
            )
        return int(m.group(1)) * (steps_per_epoch if m.group(3) else 1)

    def as_flags(self):
        """{flag name: text} of all that is not None."""
        return {
            f.name: _text(getattr(self, f.name))
            for f in dataclasses.fields(self)
            if getattr(self, f.name) is not None
        }

    def run_only(self):
        """Names of the settings that do not change the result."""
        return {f.name for f in dataclasses.fields(self) if f.metadata["run_only"]}


def _text(value):
    if isinstance(value, tuple):
        return ",".join(f"{e:g}" for e in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check(field, value):
    limits = field.metadata
    if value is None:
        return
    if isinstance(limits["kind"], tuple):
        if value not in limits["kind"]:
            raise UserError(
                f"--{field.name}={value} is not known. Allowed: {', '.join(limits['kind'])}."
            )
        return
    if limits["kind"] is str and not value:
        raise UserError(f"--{field.name}= is empty: give a value or leave it out")
    low, high, above = limits["low"], limits["high"], limits["above"]
    fits = (
        (
            math.isfinite(value)
            and (low is None or value >= low)
            and (high is None or value <= high)
            and (above is None or value > above)
        )
        if limits["kind"] in (int, float)
        else True
    )
    if not fits:
        allowed = " and ".join(
            ["finite"] * (limits["kind"] is float)
            + [
                text
                for text, limit in (
                    (f"at least {low}", low),
                    (f"at most {high}", high),
                    (f"more than {above}", above),
                )
                if limit is not None
            ]
        )
        raise UserError(f"--{field.name}={value} is out of range: it must be {allowed}")


def define_flags(values=flags.FLAGS):
    """Defines an absl flag for every setting, in the given absl FlagValues."""
    define = {
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        bool: flags.DEFINE_boolean,
        str: flags.DEFINE_string,
        list: flags.DEFINE_list,
    }
    for f in dataclasses.fields(Options):
        kind, text = f.metadata["kind"], f.metadata["help"]
        if isinstance(kind, tuple):
            flags.DEFINE_enum(f.name, f.default, kind, text, flag_values=values)
        else:
            define[kind](f.name, f.default, text, flag_values=values)


def complete_help(methods, networks, values=flags.FLAGS):
    """Adds to the flags' help the names of methods and networks, and at flags of methods who takes them, with which default.

    Args:
      methods: {name: Distiller}.
      networks: names.
      values: absl FlagValues in which the flags are defined.
    """
    values["method"].help += (
        ": "
        + ", ".join(methods)
        + ". Flags that not all of them take name those that do, with their "
        "defaults, in brackets"
    )
    values["network"].help += ". Names: " + ", ".join(networks)
    for name in sorted({field.name for field in dataclasses.fields(Options)} - {"network"}):
        takers = [
            method + ("" if default is None else f": {default}")
            for method, cls in methods.items()
            for own, default in cls.parameters().items()
            if own == name
        ]
        if takers:
            values[name].help += f" ({', '.join(takers)})"


def from_flags(values=flags.FLAGS):
    """The Options that parsed absl FlagValues ask for; UserError if they are out of range or do not fit together."""
    given = {f.name: values[f.name].value for f in dataclasses.fields(Options)}
    if given["lr_decay_epochs"] is not None:
        try:
            given["lr_decay_epochs"] = tuple(float(e) for e in given["lr_decay_epochs"])
        except ValueError as e:
            raise UserError(f"--lr_decay_epochs: {e}; give numbers, such as 150,225") from e
    return Options(**given)
