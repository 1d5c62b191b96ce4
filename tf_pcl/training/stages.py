"""The stages of a run: how each is built, and how it is trained."""

import dataclasses
import functools
import os
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Optional

import numpy as np
import tensorflow as tf
from absl import logging

from tf_pcl import data as datasets
from tf_pcl import losses, optimizer, surgery
from tf_pcl.compat import keras
from tf_pcl.errors import Stopped, UserError, one_line
from tf_pcl.methods.distiller import Distiller, Stage
from tf_pcl.options import Options, names
from tf_pcl.training import events, progress, report, trackers
from tf_pcl.training import strategy as strategies
from tf_pcl.training import workdir as workdirs
from tf_pcl.training.callbacks import Record, Row, Save, StopEarly
from tf_pcl.training.checkpoints import Checkpoints
from tf_pcl.training.feeding import Feeding
from tf_pcl.training.selection import Selection
from tf_pcl.training.workdir import Workdir

# A function that gathers a number of all processes, where there are several.
OfAll = Optional[Callable[[int], set[int]]]


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Builds and trains the stages of one run.

    Attributes:
      options: the run's options.
      data: the data set.
      strategy: where the training runs.
      lines: what was decided in building, for people: whole lines, each once, in order.
      trained: the folders of the stages in which `train` found anything to train.
    """

    options: Options
    data: datasets.ImageData
    strategy: tf.distribute.Strategy
    lines: list[str] = dataclasses.field(default_factory=list)
    trained: set[str] = dataclasses.field(default_factory=set)

    @property
    def steps_per_epoch(self) -> int:
        """Steps an epoch; UserError if a batch is larger than the data set."""
        return datasets.steps_per_epoch(self.data, self.options.batch_size)

    def build(self, stages: Sequence[Stage], before: Sequence[Distiller]) -> Distiller:
        """Builds and compiles the stage after those of the models `before`."""
        options, number = self.options, len(before)
        keras.utils.set_random_seed(self._seed(number, last=number == len(stages) - 1))
        with self.strategy.scope():
            model = stages[number].build(list(before))
            model.compile(
                optimizer.recipe(
                    options.epochs,
                    self.steps_per_epoch,
                    options.learning_rate,
                    options.lr_decay_epochs,
                    options.weight_decay,
                    optimizer=options.optimizer,
                    schedule=options.schedule,
                    warmup_epochs=options.warmup_epochs,
                    clip_norm=options.clip_norm,
                ),
                epochs=options.epochs,
                steps_per_epoch=self.steps_per_epoch,
                label_smoothing=options.label_smoothing,
                jit_compile=options.jit_compile,
                recompute=options.recompute,
            )
            model.build_optimizer()
        if options.optimizer == "lamb" and model.decay_exceptions:
            raise UserError(
                f"it does not go with `method={options.method}`, some of whose weights have a "
                "weight decay of their own: take sgd or adamw",
                parameter="optimizer",
                value=options.optimizer,
            )
        if options.sync_batch_norm:
            self._synchronize(model)
        # If the network cannot be deployed, this fails before the training.
        deployed = model.deployed()
        if options.precision == "mixed_bfloat16":
            self._say(strategies.slow_in_bfloat16(deployed))
        # The shuffling of streams depends on TensorFlow's seed, and must be the same in all stages.
        tf.random.set_seed(options.seed)
        return model

    def _synchronize(self, model: Distiller) -> None:
        if self.strategy.num_replicas_in_sync == 1:
            self._say(
                "`sync_batch_norm`: there is one replica, so BatchNorm sees all images anyway"
            )
        elif left := surgery.synchronize(model):
            layers = ", ".join(left)
            self._say(f"`sync_batch_norm`: {layers} still see only the images of their own replica")

    def _say(self, line: str) -> None:
        if line and line not in self.lines:
            self.lines.append(line)

    def build_all(self, stages: Sequence[Stage]) -> list[Distiller]:
        """Builds every stage once, untrained, so that errors in building appear at once."""
        models: list[Distiller] = []
        for _ in stages:
            models.append(self.build(stages, models))
        return models

    def train(
        self,
        model: Distiller,
        workdir: Workdir,
        describe: Callable[..., dict[str, Any]],
        title: str = "",
        seconds: float = 0.0,
        later: Sequence[float] = (),
    ) -> dict[str, Any]:
        """Trains a stage, or resumes it; afterwards the model has the weights to export.

        Args:
          model: the compiled Distiller.
          workdir: the folder of the stage.
          describe: a function (rows, selection, tested) -> contents of results.json; `tested` is
            {name: value} of the test of the exported network, if there are validation images.
          title: what the stage is, for people; "" if there is one stage.
          seconds: the seconds of the stages before.
          later: the costs of a step in the later stages, divided by that in this stage.

        Returns:
          The contents of results.json.

        Raises:
          Stopped: if a signal, a bad loss or an error ended the training early.
        """
        os.makedirs(workdir.path, exist_ok=True)
        workdir.tidy()
        selection = self._selection(model)
        rows: list[Row] = []
        checkpoints = Checkpoints(
            model,
            workdir.checkpoints,
            needed=lambda step: selection.step_needed(rows, step) if selection else None,
        )
        of_all = strategies.gatherer(self.strategy)
        start = self._restore(checkpoints, of_all)
        rows += self._rows(model, workdir, start, of_all)
        _check_same(rows, selection, of_all)
        checkpoints.tidy(start)
        _check_needed(checkpoints, start)
        total = model.steps_per_epoch * self.options.epochs
        ends = selection.ends if selection else lambda rows: False
        ended = ends(rows)
        _say_where(title, start, total, ended)
        settings = self._settings(title)
        tested = "validation" if selection else "test"
        log = events.Events(workdir, rows, model.deployed_exit, settings, tested)
        told = functools.partial(describe, selection=selection)
        record = Record(workdir, rows, log, self.options.batch_size, told, seconds)
        record.show_views(next(iter(self._batches(model)))[0])
        every = self.options.checkpoint_steps(model.steps_per_epoch)
        # Several workers are one run.
        if unfinished := start < total and not ended:
            self.trained.add(workdir.path)
        tracked = unfinished and self.strategy.extended.should_save_summary
        asked = [name for name in trackers.TRACKERS if tracked and getattr(self.options, name)]
        tracking = trackers.tracked(asked, workdir, rows, settings)
        saving = Save(checkpoints, every, start, total, title, of_all, last=not later)
        with saving as save, tracking as further:
            try:
                feeding, stop = Feeding(self.data), StopEarly(ends, rows)
                with self._progress(model, start, rows, title, later) as shown:
                    callbacks = [*shown.callbacks(), record, feeding, *further, stop, save]
                    self._fit(model, start, callbacks, feeding, lambda: ends(rows))
            except (UserError, Stopped):
                raise
            except Exception as e:
                raise Stopped(
                    f"failed at step {save.step} of {save.of}: {type(e).__name__}; the newest "
                    f"checkpoint in {workdir.path} is of step {save.saved}, and the same command "
                    "goes on from there"
                ) from e
        if selection is None:
            results = told(rows)
            # The file of a run that was done before may be lost or damaged.
            workdirs.write_json(workdir.results, results)
        else:
            results = self._test(model, workdir, checkpoints, selection, rows, told)
            exported = selection.exported(rows)
            assert exported is not None
            log.write_tested(int(exported["step"]), results["deployed_error"])
        record.show_answers(int(rows[-1]["step"]), self._answers(model), self.data.classes)
        return results

    def _progress(
        self, model: Distiller, start: int, rows: list[Row], title: str, later: Sequence[float]
    ) -> progress.Progress:
        """Returns the callback that shows the progress of the stage; arguments as in `train`."""
        options, tested = self.options, self.data.validation or self.data.test
        plan = progress.Plan(
            model.steps_per_epoch * options.epochs,
            model.steps_per_epoch,
            options.batch_size,
            options.test_every,
            len(tested),
            later,
        )
        column = f"val_error/{model.deployed_exit}"
        return progress.Progress(
            progress.Pace(plan),
            title or options.method,
            start,
            "test" if self.data.validation is None else "validation",
            next((row[column] for row in reversed(rows) if column in row), None),
            progress.terminal(),
        )

    def _selection(self, model: Distiller) -> Optional[Selection]:
        """Returns the Selection by validation images; None if there are none."""
        if self.data.validation is None:
            return None
        best, patience = self.options.export == "best", self.options.early_stop
        return Selection(f"val_error/{model.deployed_exit}", best, patience)

    def _test(
        self,
        model: Distiller,
        workdir: Workdir,
        checkpoints: Checkpoints,
        selection: Selection,
        rows: list[Row],
        describe: Callable[..., dict[str, Any]],
    ) -> dict[str, Any]:
        """Restores the exported epoch, tests it, and writes and returns results.json."""
        lowest, last = selection.lowest(rows), rows[-1]
        if lowest and last["epoch"] < self.options.epochs:
            print(
                f"Ended after epoch {last['epoch']:.0f} of {self.options.epochs}: the validation "
                f"error is at its lowest, {lowest[selection.column]:.2f} %, in epoch "
                f"{lowest['epoch']:.0f}",
                flush=True,
            )
        step = selection.step_needed(rows, int(last["step"]))
        if step is not None and step != int(last["step"]):
            try:
                checkpoints.read(step)
            except Exception as e:
                raise Stopped(
                    f"the checkpoint of the best epoch, of step {step} in {workdir.path}, cannot "
                    f"be read ({one_line(e)}): nothing was exported; train again in another "
                    "`workdir`"
                ) from e
        test = datasets.test_batches(self.data, 4 * self.options.batch_size)
        results = describe(rows, tested=model.evaluate(test, verbose=0, return_dict=True))
        workdirs.write_json(workdir.results, results)
        return results

    def _restore(self, checkpoints: Checkpoints, of_all: OfAll) -> int:
        """Restores the newest checkpoint that all processes have and returns its step."""
        start = checkpoints.restore()
        while of_all and len(steps := of_all(start)) > 1:
            if not min(steps):
                raise UserError(
                    f"the checkpoints of the workers are of the steps {sorted(steps)}, 0 where "
                    "there is none: copy `checkpoints` from the `workdir` of the first worker into "
                    "those of the others"
                )
            start = checkpoints.restore(min(steps))
        return start

    def _settings(self, title: str) -> dict[str, Any]:
        """Returns the options that have a value and affect the result."""
        free = self.options.run_only()
        settings = {k: v for k, v in report.effective(self.options).items() if k not in free}
        return {**settings, **({"stage": title} if title else {})}

    def _answers(self, model: Distiller) -> np.ndarray:
        """Returns how many test images of class i are predicted as class j, int [K, K]."""
        network = tf.function(model.deployed(), reduce_retracing=True)
        classes = len(self.data.classes)
        counts = np.zeros([classes, classes], int)
        for images, labels in datasets.test_batches(self.data, 4 * self.options.batch_size):
            answers = tf.argmax(network(images), -1)
            counts += tf.math.confusion_matrix(labels, answers, classes).numpy()
        return counts

    def _rows(self, model: Distiller, workdir: Workdir, start: int, of_all: OfAll) -> list[Row]:
        """Returns the rows of the epochs up to step `start`.

        Rows that metrics.csv lacks are taken from TensorBoard's files; the errors of the last epoch
        are measured again.
        """
        steps, last = model.steps_per_epoch, self.options.epochs
        done = start // steps
        rows = {int(row["epoch"]): row for row in workdir.read_rows() if row["epoch"] <= done}
        lacking = [e for e in range(1, done + 1) if e not in rows]
        found = events.read(workdir) if lacking else {}
        rows.update({e: {"epoch": e, **found[e * steps]} for e in lacking if e * steps in found})
        tests = last in lacking and f"val_error/{model.deployed_exit}" not in rows.get(last, {})
        # A test is of all processes together.
        if 1 in of_all(int(tests)) if of_all else tests:
            tested = model.evaluate(self._every_epoch(), verbose=0, return_dict=True)
            known = {"epoch": last, "step": start, "wall_seconds": 0.0, **rows.get(last, {})}
            rows[last] = {**known, **{f"val_{name}": v for name, v in tested.items()}}
        if not lacking:
            return list(rows.values())
        lost = ", ".join(str(e) for e in lacking if e not in rows)
        logging.warning(
            "%s lacked the rows of %d epochs; %s",
            workdir.metrics,
            len(lacking),
            f"those of epochs {lost} are lost" if lost else "they were recovered",
        )
        ordered = [rows[epoch] for epoch in sorted(rows)]
        workdir.write_rows(ordered)
        return ordered

    def _every_epoch(self) -> tf.data.Dataset:
        """Returns the batches that every epoch is tested on: validation images if there are any."""
        split = "test" if self.data.validation is None else "validation"
        return datasets.test_batches(self.data, 4 * self.options.batch_size, split)

    def _fit(
        self,
        model: Distiller,
        start: int,
        callbacks: list[Any],
        feeding: Feeding,
        ended: Callable[[], bool],
    ) -> None:
        """Trains from step `start` to the end: the rest of an epoch first, then whole epochs."""
        steps, epochs = model.steps_per_epoch, self.options.epochs
        epoch, done = divmod(start, steps)
        parts = [(start, epoch, epoch + 1, steps - done)] if done else []
        epoch += bool(done)
        parts += [(epoch * steps, epoch, epochs, steps)] if epoch < epochs else []
        tests = [*range(self.options.test_every, epochs, self.options.test_every), epochs]
        class_weight = self._class_weight()
        for first_step, first_epoch, last_epoch, steps_per_epoch in parts:
            if ended():
                return
            model.fit(
                strategies.distribute(
                    self.strategy,
                    functools.partial(self._noted, feeding, model=model, start=first_step),
                ),
                initial_epoch=first_epoch,
                epochs=last_epoch,
                steps_per_epoch=steps_per_epoch,
                validation_data=self._every_epoch(),
                validation_freq=tests,
                class_weight=class_weight,
                callbacks=callbacks,
                verbose=2 * any(isinstance(c, progress.Epochs) for c in callbacks),
            )

    def _class_weight(self) -> Optional[dict[int, float]]:
        if not self.options.class_weights:
            return None
        labels = self.data.train.all_labels()
        return losses.balanced_class_weights(labels, len(self.data.classes))

    def _noted(self, feeding: Feeding, **arguments: Any) -> tf.data.Dataset:
        """Returns _batches, and notes when they are made if this process can know it."""
        batches = self._batches(**arguments)
        # A TPU's host cannot run Python code of this process.
        elsewhere = isinstance(self.strategy, tf.distribute.TPUStrategy)
        return batches if elsewhere else feeding.noted(batches)

    def _batches(
        self, model: Distiller, *, start: int = 0, shard: tuple[int, int] = (0, 1)
    ) -> tf.data.Dataset:
        options = self.options
        return datasets.train_batches(
            self.data,
            options.batch_size,
            options.epochs,
            views=model.num_views,
            seed=options.seed,
            start=start,
            shard=shard,
            mixup=options.mixup,
            cutmix=options.cutmix,
            **{name: getattr(options, name) for name in datasets.AUGMENTATIONS if name in names()},
        )

    def _seed(self, number: int, last: bool) -> int:
        # Seed the last stage like a single-stage run, so that both start from the same weights.
        if last:
            return self.options.seed
        return int(np.random.SeedSequence([self.options.seed, number]).generate_state(1)[0])


def _check_same(rows: list[Row], selection: Optional[Selection], of_all: OfAll) -> None:
    """Checks that all processes decide the same by their rows; UserError if not."""
    if not (selection and of_all):
        return
    decisive = [(row["epoch"], row.get(selection.column, -1)) for row in rows]
    if len(of_all(zlib.crc32(np.array(decisive, np.float32).tobytes()))) > 1:
        raise UserError(
            "the validation errors in the `metrics.csv` of the workers differ: copy it from the "
            "`workdir` of the first worker into those of the others"
        )


def _check_needed(checkpoints: Checkpoints, step: int) -> None:
    """Checks that the checkpoint that a run at `step` may export exists; UserError if not."""
    needed = checkpoints.needed(step)
    if needed is not None and not checkpoints.has(needed):
        raise UserError(
            f"the checkpoint of the best epoch, of step {needed}, is no longer in "
            f"{checkpoints.folder}: give another `workdir`, or remove the folder to begin again"
        )


def _say_where(title: str, start: int, total: int, ended: bool) -> None:
    where: Optional[str] = None
    if start:
        where = "done" if ended or start == total else f"goes on at step {start} of {total}"
    if title or where:
        print(": ".join(filter(None, [title, where])), flush=True)
