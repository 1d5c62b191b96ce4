"""One run, from options to the SavedModel."""

import functools
import shlex
from collections.abc import Mapping
from typing import Any, Optional

import tensorflow as tf

from tf_pcl import networks, surgery
from tf_pcl.data import datasets, storage
from tf_pcl.data.splits import Loaded
from tf_pcl.errors import choose
from tf_pcl.methods import METHODS
from tf_pcl.methods.cost import alone_flop, training_flop
from tf_pcl.methods.distiller import Distiller, Stage
from tf_pcl.options import Options
from tf_pcl.training import beside, export, report, selection, trackers
from tf_pcl.training import cluster as clusters
from tf_pcl.training import strategy as strategies
from tf_pcl.training.assemble import Assembly, method_arguments
from tf_pcl.training.progress import Laps
from tf_pcl.training.stages import Trainer
from tf_pcl.training.workdir import Workdir

# The options that say which images of its data set a run has; arguments of `data.load`.
_NUMBERS = ("train_examples", "validation_examples", "test_examples", "seed")
OF_DATA = ("data_dir", "image_size", "on_bad_image", "labels", "labels_columns", *_NUMBERS)


def run(options: Options) -> dict[str, Any]:
    """Trains a network and exports it, or resumes the run in the workdir.

    The stages of a method are trained one after another: the last one in the workdir itself, each
    earlier one in a folder N-NAME of it.

    Args:
      options: the run's options.

    Returns:
      The contents of results.json.

    Raises:
      UserError: if the options, the data or the workdir cannot be used; then nothing is written.
      Stopped: if a signal, a bad loss or an error ended the run early.
    """
    laps = Laps()
    _check_names(options)
    trackers.check(options)
    together = clusters.find() if options.strategy == "multi_worker" else None
    with clusters.watched(together):
        workdir = _workdir(options, together.own if together else 0)
        versions = report.versions()
        workdir.check_versions(versions)
        strategy = strategies.start(options)
        return _run(options, workdir, strategy, versions, laps)


def _run(
    options: Options,
    workdir: Workdir,
    strategy: tf.distribute.Strategy,
    versions: Mapping[str, str],
    laps: Laps,
) -> dict[str, Any]:
    """Runs in a folder that has been checked, under a strategy; see `run`."""
    data = load_data(options, workdir.read_images())
    selection.check(options, data)
    facts = report.facts_of(data)
    trainer = Trainer(options, data, strategy)
    steps, replicas = trainer.steps_per_epoch, strategy.num_replicas_in_sync
    workdir.check_data(facts)

    with strategy.scope():
        make, stages = assemble(options, data)
    models = trainer.build_all(stages)
    bound = [b for m in models for b in surgery.replica_bound(m, options.sync_batch_norm)]
    workdir.check_replicas(replicas, bound)
    gflop = [options.batch_size * training_flop(model) / 1e9 for model in models]
    alone = options.batch_size * alone_flop(models[-1].deployed()) / 1e9
    # The other stages are built again when their turn comes, and do not stay in memory until then.
    first = models[0]
    del models

    reading = datasets.reading_of(data)
    with workdir.locked(), storage.watched(reading):
        # Another process may have begun a run here since the folder was checked.
        workdir.check(options, alone=False)
        workdir.check_data(facts)
        workdir.begin(options, facts, {**versions, "replicas": replicas})
        workdir.write_images(datasets.record(data))
        workdir.write_lists(data.lists)
        opening = report.opening(options, data, steps, replicas, sum(gflop), alone)
        checked = (
            f"networks checked in {surgery.trials.seconds:.1f} s: parts compute what the whole does"
        )
        where = f"workdir: {workdir.path}"
        print(opening, *make.lines, *trainer.lines, checked, where, sep="\n", flush=True)
        laps.end("load and build")
        results = _train_all(trainer, stages, first, workdir, gflop, laps)
        if reading and (left_out := reading.summary()):
            print(left_out, flush=True)
        return results


def _workdir(options: Options, worker: int) -> Workdir:
    """Returns the workdir of this process, after checking it."""
    first = Workdir.of_run(options)
    first.check(options, alone=not worker)
    first.check_checkpoints()
    if not worker:
        return first
    workdir = Workdir.of_run(options, worker)
    workdir.follow(first)
    workdir.check(options)
    return workdir


def assemble(options: Options, data: datasets.ImageData) -> tuple[Assembly, list[Stage]]:
    """Returns the Assembly of a run's networks, and the stages of its method.

    Raises:
      UserError: if the options do not fit the method, or its networks cannot be built.
    """
    make = Assembly(
        data,
        weights={options.network: options.weights} if options.weights else {},
        trunk_share=options.trunk_share,
        initializer=options.initializer,
        preprocess=options.preprocess,
        trust_files=options.trust_files,
    )
    method = METHODS[options.method]
    return make, method.stages(make, _target(options), **method_arguments(options))


def _check_names(options: Options) -> None:
    """Checks the names in the options, and that they fit the method."""
    choose("method", options.method, METHODS, parameter="method")
    method_arguments(options)
    for name in [*options.network.split(","), *filter(None, [options.teacher_network])]:
        networks.find(name)


def _target(options: Options) -> Any:
    names = options.network.split(",")
    return names if len(names) > 1 else names[0]


def load_data(options: Options, began: Optional[Mapping[str, Any]] = None) -> datasets.ImageData:
    """Loads the data set of a run; UserError if it cannot be loaded or used.

    Args:
      options: the run's options.
      began: the record of the image files from the beginning of the run (datasets.load).
    """
    return datasets.load(**_data_asked(options), began=began)


def look_at_data(options: Options) -> tuple[tuple[int, ...], Loaded]:
    """Returns what `data.look` finds about the data set of a run; UserError as there."""
    return datasets.look(**_data_asked(options))


def _data_asked(options: Options) -> dict[str, Any]:
    return {"name": options.dataset, **{name: getattr(options, name) for name in OF_DATA}}


def _train_all(
    trainer: Trainer,
    stages: list[Stage],
    first: Distiller,
    workdir: Workdir,
    gflop: list[float],
    laps: Laps,
) -> dict[str, Any]:
    """Trains and exports every stage, and returns the results of the last.

    Args:
      trainer: trains a stage.
      stages: the stages.
      first: the model of the first stage, which is built already.
      workdir: the folder of the run.
      gflop: the cost of a step in each stage.
      laps: measures what the run spends its time on.
    """
    folders = [workdir.of_stage(i, stage.name) for i, stage in enumerate(stages[:-1], 1)]
    models, results = [first], {"wall_seconds": 0.0}
    spent = 0.0
    for i, (stage, folder) in enumerate(zip(stages, [*folders, workdir])):
        if i:
            models.append(trainer.build(stages, models))
        deployed = models[i].deployed()
        describe = functools.partial(
            report.results,
            options=trainer.options,
            stage=stage,
            model=models[i],
            deployed=deployed,
            gflop=(spent, gflop[i]),
        )
        title = f"stage {i + 1} of {len(stages)}, {stage.name}" if folders else ""
        later = [cost / gflop[i] for cost in gflop[i + 1 :]]
        results = trainer.train(models[i], folder, describe, title, results["wall_seconds"], later)
        laps.end(f"train {stage.name}".rstrip())
        spent += gflop[i] * results["steps"]
        export.check_finite(deployed, trainer.data.test.first(32))
        saved_model = export.export(deployed, trainer.data.classes, folder.export)
        warning = report.warning(results, trainer.data)
        if warning and folder is not workdir:
            print(warning, flush=True)
        laps.end("export")
    print("Checking the SavedModel in a fresh process …", flush=True)
    export.check(saved_model, deployed, trainer.data.test.first(32))
    laps.end("check the SavedModel")
    again = (
        f"The run was done before, nothing was trained now: test error "
        f"{results['deployed_error']:.2f} % ({results['deployed']}), results in {workdir.results}"
    )
    lines = [
        None if trainer.trained else again,
        report.table(results),
        beside.gain(results, trainer.options, workdir),
        f"Time:         {laps}" if trainer.trained else None,
        f"SavedModel:   {saved_model}",
        f"TensorBoard:  tensorboard --logdir {shlex.quote(workdir.path)}",
        f"Results:      {workdir.results}",
        warning,
    ]
    print(*filter(None, lines), sep="\n")
    return results
