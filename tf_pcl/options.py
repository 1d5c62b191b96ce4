"""The options of a run: one dataclass, from which the absl flags are made.

This is the only module that reads FLAGS. An option that is None is left to the default of the
method, the network or the data set.
"""

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Optional, get_args

from absl import flags

from tf_pcl import ranges
from tf_pcl.errors import UserError, choose

# Options in which a leading "~" means the home folder; no shell expands it within a flag.
PATHS = ("workdir", "data_dir", "labels", "weights", "teacher")


def _flag(
    default: Any,
    help_text: str,
    words: tuple[str, ...] = (),
    *,
    low: Optional[float] = None,
    high: Optional[float] = None,
    above: Optional[float] = None,
    run_only: bool = False,
) -> Any:
    """Makes the field of an option.

    Args:
      default: its value unless given.
      help_text: what it is, with its unit.
      words: the words that it may be; none if its annotation tells its type.
      low, high, above: the range of a number, see ranges.Range; that of a method's parameter
        stands in ranges.OF_PARAMETERS.
      run_only: whether it does not affect the result, so that it may differ between the calls of a
        run.
    """
    return dataclasses.field(
        default=default,
        metadata=dict(
            help=help_text, words=words, range=ranges.Range(low, high, above), run_only=run_only
        ),
    )


class Usual(NamedTuple):
    """The defaults of an optimizer.

    Attributes:
      learning_rate: the rate at the start.
      weight_decay: L2 decay.
    """

    learning_rate: float
    weight_decay: float


OPTIMIZERS = {"sgd": Usual(0.1, 5e-4), "adamw": Usual(1e-3, 0.05), "lamb": Usual(5e-3, 0.02)}


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of a run. Each has the name of its flag, whose help has its unit and default."""

    # What to train.
    method: str = _flag("pcl", "how to train")
    network: str = _flag(
        "resnet32",
        "target network: a name, applications.NAME for keras.applications, or module:function "
        "of your own; for methods of whole networks also several, comma separated, the target "
        "first",
    )
    split_at: Optional[str] = _flag(
        None,
        "layer after which each peer has its own branch; default: before the last section, or as "
        "--trunk_share says",
    )
    trunk_share: Optional[float] = _flag(
        None,
        "largest share of the network's forward cost, more than 0 and at most 1, that the peers "
        "have in common: the cut is the last possible one; default: 0.7 for networks without named "
        "sections",
        above=0,
        high=1,
    )
    weights: Optional[str] = _flag(
        None,
        "what --network starts from in every stage: imagenet for applications.NAME, "
        ".weights.h5, .h5, .keras, a SavedModel, a TensorFlow checkpoint or a run's workdir; a "
        "classifier of other classes in it is left out",
    )
    initializer: Optional[str] = _flag(
        None,
        "draw the convolutions' kernels of all networks with variance 2 / fan_in or 2 / fan_out; "
        "default: as the network does, fan_in for the networks of the table",
        ("fan_in", "fan_out"),
    )
    preprocess: str = _flag(
        "auto",
        "what the network sees: standardised images, raw ones of 0-255, or as it needs them",
        ("auto", "standardise", "none"),
    )
    peers: Optional[int] = _flag(
        None,
        "number of peers, a leader not counted; default for several networks: as many as they are",
        low=1,
        high=1000,
    )
    teacher: Optional[str] = _flag(
        None,
        "workdir or SavedModel of a network trained before; default: train --teacher_network first",
    )
    teacher_network: Optional[str] = _flag(None, "network of the teacher; default: resnet110")
    generations: Optional[int] = _flag(
        None, "number of networks trained one after another, generation 0 counted", low=1, high=1000
    )

    trust_files: bool = _flag(
        False,
        "run the code that files given as --weights and --teacher hold, such as that of Lambda "
        "layers",
        run_only=True,
    )

    # Data.
    dataset: str = _flag("cifar100", "name of the data set")
    data_dir: Optional[str] = _flag(None, "folder of the data", run_only=True)
    train_examples: Optional[int] = _flag(
        None, "train on the first so many images of a seeded permutation; default: all", low=1
    )
    labels: Optional[str] = _flag(
        None,
        "CSV file that names the images of --data_dir and their labels, and may name their splits; "
        "default: folders are the classes",
        run_only=True,
    )
    labels_columns: Optional[str] = _flag(
        None, "names of the columns of --labels, FILE,LABEL or FILE,LABEL,SPLIT; default: guessed"
    )
    test_examples: Optional[float] = _flag(
        None,
        "test on so many images, or on this share of them if less than 1, where the data set has "
        "no test images of its own; default: none",
        above=0,
    )
    validation_examples: Optional[float] = _flag(
        None,
        "hold so many training images, or this share of them if less than 1, out of training: "
        "every epoch is then tested on them, and the test images are used once, at the end; "
        "default: none",
        above=0,
    )
    image_size: Optional[int] = _flag(
        None,
        "pixels: cut images square and resize them to this side; default: as they are",
        low=4,
        high=10_000,
    )
    flip: Optional[bool] = _flag(
        None, "mirror half of the views; default: unless the data set is of digits or letters"
    )
    on_bad_image: str = _flag(
        "fail", "refuse image files that cannot be read, or leave them out", ("fail", "skip")
    )
    augment: Optional[str] = _flag(
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
    cutout: int = _flag(
        0, "pixels: side of a blackened square in each view, even; 0: none", low=0, high=10_000
    )
    mixup: float = _flag(
        0.0,
        "α: each image is mixed with another one, with a share drawn from Beta(α, α), and gets a "
        "soft label; 0: none",
        low=0,
    )
    cutmix: float = _flag(
        0.0,
        "α: as --mixup, but a rectangle of the other image replaces that of the image; with both, "
        "each image draws one of them; 0: none",
        low=0,
    )
    class_weights: Optional[str] = _flag(
        None,
        "balanced: each image has a weight in every loss, so that all classes count equally; "
        "default: all images have the same weight",
        ("balanced",),
    )

    # Recipe.
    epochs: int = _flag(300, "length of training", low=1, high=1_000_000)
    batch_size: int = _flag(128, "images a step, over all replicas together", low=1)
    optimizer: str = _flag(
        "sgd",
        "sgd: with Nesterov momentum 0.9, as in the papers; adamw: Keras's; lamb: that of "
        "tensorflow-addons, where it is installed",
        tuple(OPTIMIZERS),
    )
    learning_rate: float = _flag(
        None,
        "learning rate at the start, or after the warm-up; default: "
        + ", ".join(f"{usual.learning_rate:g} for {name}" for name, usual in OPTIMIZERS.items()),
        above=0,
    )
    schedule: str = _flag(
        "steps",
        "how the learning rate falls: in steps, or along a cosine to 0 at the end",
        ("steps", "cosine"),
    )
    lr_decay_epochs: Optional[tuple[float, ...]] = _flag(
        None,
        "epochs after which the learning rate is divided by 10, comma separated; default: 150,225 "
        "of 300, scaled to --epochs",
    )
    warmup_epochs: float = _flag(
        0.0, "epochs in which the learning rate rises to that of the schedule", low=0
    )
    weight_decay: float = _flag(
        None,
        "L2 decay, which sgd adds to the gradient and the others subtract from the weight, times "
        "the learning rate; default: "
        + ", ".join(f"{usual.weight_decay:g} for {name}" for name, usual in OPTIMIZERS.items()),
        low=0,
    )
    clip_norm: Optional[float] = _flag(
        None, "largest norm of all gradients together; default: any", above=0
    )
    label_smoothing: float = _flag(
        0.0,
        "part ε of each label that is spread over all classes, in the cross-entropy with the "
        "labels; distillation does not change",
    )
    temperature: Optional[float] = _flag(None, "softens teachers' and students' probabilities")
    rampup_epochs: Optional[float] = _flag(
        None,
        "epochs until distillation has its full weight, 0: from the start; default: 80 of 300, "
        "scaled to --epochs",
    )
    distill_weight: Optional[float] = _flag(None, "full weight of distillation")
    distill_share: Optional[float] = _flag(
        None, "share of distillation in a student's loss, the rest is cross-entropy"
    )
    hint_weight: Optional[float] = _flag(None, "weight of the squared distance between features")
    ce_weight: Optional[float] = _flag(None, "weight α of cross-entropy")
    collaboration_weight: Optional[float] = _flag(
        None, "weight β of what comes from the other peers"
    )
    self_weight: Optional[float] = _flag(None, "weight γ of self-distillation")
    angle_weight: Optional[float] = _flag(None, "weight β_1 of the angles, times β")
    mutual_weight: Optional[float] = _flag(None, "weight β_2 of the other peers' logits, times β")
    ema_decay: Optional[float] = _flag(
        None,
        "largest decay of the mean teacher; default: 0.999, with --ema_every=step capped so that "
        "the average spans at most 1 % of training",
    )
    ema_every: Optional[str] = _flag(None, "when the mean teacher is updated", ("step", "epoch"))
    ensemble_teacher: Optional[str] = _flag(
        None,
        "classifier on the peers' features, mean of their logits, or none",
        ("features", "logits", "none"),
    )
    peer_teacher: Optional[str] = _flag(
        None,
        "peers learn from each other's mean, from each other, or not",
        ("mean", "mutual", "none"),
    )
    views: Optional[str] = _flag(
        None, "each peer has its own view, or all share one", ("own", "shared")
    )
    trunk_batch: Optional[str] = _flag(
        None,
        "views pass the shared layers in one batch with common BatchNorm statistics, or each apart",
        ("together", "apart"),
    )
    export: Optional[str] = _flag(
        None,
        "which epoch's network is exported: the last, or the one with the lowest error on "
        "validation images; default: last",
        ("last", "best"),
    )
    early_stop: Optional[int] = _flag(
        None,
        "epochs: end the run when the error on validation images has not improved for so many; "
        "schedules stay those of --epochs; default: never",
        low=1,
    )
    deploy: Optional[str] = _flag(
        None, "export one mean peer, or all with the ensemble classifier", ("peer", "ensemble")
    )
    seed: int = _flag(0, "seed of weights, subsets, order and augmentation", low=0, high=2**31 - 1)

    # Machine.
    strategy: str = _flag(
        "auto",
        "auto: all GPUs of this machine, else the CPU",
        ("auto", "mirrored", "multi_worker", "tpu", "one_device"),
        # The number of replicas is checked separately: see Workdir.check_replicas.
        run_only=True,
    )
    precision: str = _flag(
        "float32", "Keras precision policy", ("float32", "mixed_bfloat16", "mixed_float16")
    )
    sync_batch_norm: bool = _flag(
        False,
        "with several replicas: BatchNorm's statistics are those of all replicas' images, as on "
        "one device",
    )
    recompute: bool = _flag(
        False,
        "keep only a few layers' outputs for the backward pass and compute the others again: less "
        "memory, a slower step, the same numbers",
        run_only=True,
    )
    jit_compile: bool = _flag(False, "compile the step with XLA; for one device")
    deterministic: bool = _flag(
        False, "bit for bit the same result at each run on one device; slower"
    )

    # Output.
    workdir: Optional[str] = _flag(
        None,
        "folder of results, logs, checkpoints and the SavedModel; default "
        "runs/DATASET-NETWORK-METHOD-seedSEED",
        run_only=True,
    )
    checkpoint_every: str = _flag(
        "1epoch",
        "how often to save: a number of steps (500steps) or epochs (5epochs)",
        run_only=True,
    )
    wandb: bool = _flag(
        False, "log each epoch to Weights & Biases too, where wandb is installed", run_only=True
    )
    mlflow: bool = _flag(
        False, "log each epoch to MLflow too, where mlflow is installed", run_only=True
    )
    test_every: int = _flag(1, "epochs between tests; the last epoch is always tested", low=1)
    resume: str = _flag(
        "auto",
        "auto: resume the run in the workdir, if it holds one; never: refuse such a workdir",
        ("auto", "never"),
        run_only=True,
    )

    def __post_init__(self) -> None:
        for name in PATHS:
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, os.path.expanduser(path))
        # The defaults of other options depend on it.
        choose("optimizer", self.optimizer, OPTIMIZERS, parameter="optimizer")
        for name, usual in OPTIMIZERS[self.optimizer]._asdict().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, usual)
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) is not None:
                _check(field, value)
        for name in ("test_examples", "validation_examples"):
            object.__setattr__(self, name, _count_or_share(name, getattr(self, name)))
        self._check_together()

    def _check_together(self) -> None:
        """Checks what the limits of a single option cannot tell; raises a UserError."""
        if self.cutout % 2:
            raise UserError(
                "give an even number of pixels",
                parameter="cutout",
                value=self.cutout,
                allowed="even",
            )
        if self.split_at and self.trunk_share:
            raise UserError(
                f"`split_at={self.split_at}` does not go with `trunk_share={self.trunk_share:g}`: "
                "give one of them"
            )
        if self.weights and "," in self.network:
            raise UserError(
                f"`weights` does not go with several networks, `network={self.network}`: give one "
                "network"
            )
        for name in ("rampup_epochs", "warmup_epochs"):
            if (epochs := getattr(self, name) or 0) > self.epochs:
                raise UserError(
                    f"`{name}={epochs:g}` is more than `epochs={self.epochs}`: give fewer"
                )
        drops = self.lr_decay_epochs or ()
        if list(drops) != sorted(set(drops)) or any(not 0 < e < self.epochs for e in drops):
            raise UserError(
                f"give increasing epochs between 0 and `epochs={self.epochs}`",
                parameter="lr_decay_epochs",
                value=_text(drops),
            )
        if self.schedule == "cosine" and self.lr_decay_epochs:
            raise UserError(
                "`lr_decay_epochs` does not go with `schedule=cosine`: give one of them"
            )
        self.checkpoint_steps(1)

    def checkpoint_steps(self, steps_per_epoch: int) -> int:
        """Returns how many steps lie between checkpoints."""
        match = re.fullmatch(r"(\d+)(?:(steps?)|(epochs?))", self.checkpoint_every)
        if not match or not int(match[1]):
            raise UserError(
                "give a number of steps or epochs, such as 500steps or 2epochs",
                parameter="checkpoint_every",
                value=self.checkpoint_every,
            )
        return int(match[1]) * (steps_per_epoch if match[3] else 1)

    def as_flags(self) -> dict[str, str]:
        """Returns {flag's name: text} of all that is not None."""
        given = {name: getattr(self, name) for name in names()}
        return {name: _text(value) for name, value in given.items() if value is not None}

    def told(self, always: Sequence[str] = ("method", "network", "dataset")) -> dict[str, str]:
        """Returns {flag's name: text} of all but defaults, and of the options in `always`."""
        usual = Options().as_flags()
        return {
            name: text
            for name, text in self.as_flags().items()
            if name in always or usual.get(name) != text
        }

    def run_only(self) -> set[str]:
        """Returns the names of the options that do not affect the result."""
        return {f.name for f in dataclasses.fields(self) if f.metadata["run_only"]}


def names() -> list[str]:
    """Returns the names of all options."""
    return [field.name for field in dataclasses.fields(Options)]


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(f"{e:.15g}" for e in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _count_or_share(name: str, value: Optional[float]) -> Optional[float]:
    """Returns a number of images as an int and a share of them, less than 1, as it is."""
    if value is None or value < 1:
        return value
    if value != int(value):
        raise UserError(
            "give a whole number of images, or a share less than 1", parameter=name, value=value
        )
    return int(value)


def kind_of(option: dataclasses.Field) -> Any:
    """Returns the words that an option may be, or the type in its annotation."""
    return option.metadata["words"] or next(iter(get_args(option.type)), option.type)


def _check(option: dataclasses.Field, value: Any) -> None:
    name, kind = option.name, kind_of(option)
    if isinstance(kind, tuple):
        choose(name, value, kind, parameter=name)
    elif kind is str and not value:
        raise UserError("it is empty: give a value or leave it out", parameter=name, value=value)
    elif kind is str and re.search("[\x00-\x1f\x7f\ud800-\udfff]", value):
        raise UserError(
            "it has line breaks, other control characters or bytes that are not UTF-8: give a name "
            "without them",
            parameter=name,
            value=value.encode("unicode_escape", "backslashreplace").decode(),
        )
    elif kind in (int, float):
        allowed = ranges.OF_PARAMETERS.get(name, option.metadata["range"])
        allowed.check(name, value, whole=kind is int)


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines an absl flag for every option, in the given absl FlagValues."""
    define: dict[Any, Any] = {
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        bool: flags.DEFINE_boolean,
        str: flags.DEFINE_string,
        tuple[float, ...]: flags.DEFINE_list,
    }
    for f in dataclasses.fields(Options):
        kind, text = kind_of(f), f.metadata["help"]
        default: Any = f.default
        if isinstance(kind, tuple):
            flags.DEFINE_enum(f.name, default, kind, text, flag_values=values)
        else:
            define[kind](f.name, default, text, flag_values=values)


def further_help(
    methods: Mapping[str, Any], networks: Iterable[str], datasets: Mapping[str, Any]
) -> dict[str, str]:
    """Returns what the tables of methods, networks and data sets add to the help of flags.

    A flag that only some of the methods take names these, with their defaults.

    Args:
      methods: {name: Distiller}.
      networks: names.
      datasets: {name: data.datasets.Dataset}, as data.datasets.described() gives them.

    Returns:
      {name of the flag: text that follows its own}.
    """
    folders = [f"{name}: {row.folder}" for name, row in datasets.items() if row.folder]
    readers = [name for name, row in datasets.items() if row.reads_files]
    summaries = [f"{name} ({row.summary})" for name, row in datasets.items()]
    texts = {
        "method": f": {', '.join(methods)}. Flags that not all of them take name those that do, "
        "with their defaults, in brackets",
        "network": ". Names: " + ", ".join(networks),
        "dataset": ": " + "; ".join(summaries),
        "data_dir": ": " + "; ".join(folders),
        "on_bad_image": f" ({', '.join(readers)})",
    }
    taken = {method: cls.parameters() for method, cls in methods.items()}
    for name in sorted(set(names()) - {"network", "preprocess"}):
        takers = [
            method + ("" if own[name] is None else f": {own[name]}")
            for method, own in taken.items()
            if name in own
        ]
        if takers:
            texts[name] = texts.get(name, "") + f" ({', '.join(takers)})"
    return texts


def from_flags(values: flags.FlagValues = flags.FLAGS) -> Options:
    """Returns the Options that parsed absl FlagValues ask for.

    Raises:
      UserError: if they are out of range or do not fit together.
    """
    return Options(**given(values))


def given(values: flags.FlagValues = flags.FLAGS) -> dict[str, Any]:
    """Returns {name: value} of the options that parsed absl FlagValues were given.

    Raises:
      UserError: for invalid numbers.
    """
    found: dict[str, Any] = {name: values[name].value for name in names() if values[name].present}
    drops = found.get("lr_decay_epochs")
    if drops is not None:
        try:
            found["lr_decay_epochs"] = tuple(float(e) for e in drops)
        except ValueError as e:
            raise UserError(
                f"{e}; give numbers, such as 150,225",
                parameter="lr_decay_epochs",
                value=",".join(drops),
            ) from e
    return found


def from_file(path: str) -> Options:
    """Returns the Options in a flagfile, such as the flags.txt of a workdir.

    Raises:
      UserError: if it is not such a file, or comes from a version with other options.
    """
    values = flags.FlagValues()
    define_flags(values)
    try:
        rest = values(["", f"--flagfile={path}"])[1:]
    except (flags.Error, UnicodeError) as e:
        raise UserError(f"{path} is not a list of a run's options: {e}") from e
    if rest:
        raise UserError(f"{path} is not a list of a run's options: {rest[0]!r} is not one")
    return from_flags(values)
