"""One run, from settings to SavedModel."""

import dataclasses
import functools
import os
import platform
import sys

import keras as keras_package
import numpy as np
import tensorflow as tf

import tf_pcl
from tf_pcl import data as datasets
from tf_pcl import networks, optimizer, surgery
from tf_pcl.compat import keras
from tf_pcl.errors import Stopped, UserError, choose
from tf_pcl.methods import METHODS
from tf_pcl.training import export
from tf_pcl.training import strategy as strategies
from tf_pcl.training import workdir as workdirs
from tf_pcl.training.callbacks import Progress, Record, Save
from tf_pcl.training.checkpoints import Checkpoints


def run(options):
    """Trains as `options` (options.Options) say, or goes on where the workdir stands, and exports the deployed network.

    The stages of a method are trained one after another: the last in the workdir itself, each of those before in a folder
    N-NAME of it.

    Raises:
      UserError: for settings, data or a workdir that cannot be used; nothing is written then.
      Stopped: when a signal or a bad loss ended the run early.
    Returns:
      The contents of results.json.
    """
    method = METHODS[choose("--method", options.method, METHODS)]
    arguments = method_arguments(method, options)
    names = options.network.split(",")
    for name in [*names, *filter(None, [options.teacher_network])]:
        networks.find(name)
    workdir = options.workdir or os.path.join(
        "runs",
        "-".join(
            [
                options.dataset,
                options.network.replace(":", ".").replace(",", "+"),
                options.method,
                f"seed{options.seed}",
            ]
        ),
    )
    if options.strategy == "multi_worker" and strategies.worker():
        # All workers must save, since statistics are gathered from all; what counts is what the first wrote.
        workdir = os.path.join(workdir, f"worker-{strategies.worker()}")
    workdirs.check_workdir(workdir, options.as_flags(), options.run_only(), options.resume)
    strategies.prepare(options)
    strategy = strategies.make(options.strategy)
    strategies.check(strategy, options)

    data = datasets.load(
        options.dataset,
        options.data_dir,
        options.image_size,
        options.train_examples,
        options.seed,
        options.on_bad_image,
    )
    steps = datasets.steps_per_epoch(data, options.batch_size)
    # The means tell of the images themselves; rounded, since machines may differ in the last digits.
    of_data = {
        "classes": list(data.classes),
        "image_shape": list(data.image_shape),
        "training images": len(data.train),
        "test images": len(data.test),
        "means": [round(float(m), 3) for m in data.mean],
    }
    workdirs.check_data(workdir, of_data)
    if options.teacher:
        with strategy.scope():
            arguments["teacher"] = export.load(options.teacher, data.classes)
    notes = {}
    make = functools.partial(
        around,
        data,
        weights={options.network: options.weights},
        initializer=options.initializer,
        notes=notes,
    )
    stages = method.stages(make, names if len(names) > 1 else names[0], **arguments)

    def built(i, trained):
        """The model of stage i, compiled."""
        # The last stage begins with the weights that a method of one stage has.
        last = i == len(stages) - 1
        keras.utils.set_random_seed(
            options.seed
            if last
            else int(np.random.SeedSequence([options.seed, i]).generate_state(1)[0])
        )
        with strategy.scope():
            model = stages[i].build(trained)
            model.compile(
                optimizer.recipe(
                    options.epochs,
                    steps,
                    options.learning_rate,
                    options.lr_decay_epochs,
                    options.weight_decay,
                ),
                epochs=options.epochs,
                steps_per_epoch=steps,
                jit_compile=options.jit_compile,
            )
            model.optimizer.build(model.trainable_weights)
        model.deployed()
        # TensorFlow's seed enters the shuffling of streams, which is to be the same in all stages.
        tf.random.set_seed(options.seed)
        return model

    # All stages once, so that what cannot be built is known before anything is written.
    models = []
    for i in range(len(stages)):
        models.append(built(i, models))
    os.makedirs(workdir, exist_ok=True)
    workdirs.write(
        os.path.join(workdir, "flags.txt"),
        "".join(
            f"--{name}={value}\n" for name, value in options.as_flags().items() if name != "workdir"
        ),
    )
    workdirs.write_json(os.path.join(workdir, "data.json"), of_data)
    print(
        f"{options.method} on {options.dataset}: {len(data.train):,} training and {len(data.test):,} test images "
        f"{'×'.join(map(str, data.image_shape))}, {len(data.classes)} classes\n{options.epochs} epochs of {steps} steps, "
        f"replicas: {strategy.num_replicas_in_sync} ({'GPU' if tf.config.list_physical_devices('GPU') else 'CPU'}), "
        f"{options.precision}",
        *notes,
        sep="\n",
        flush=True,
    )
    before = [os.path.join(workdir, f"{i + 1}-{stage.name}") for i, stage in enumerate(stages[:-1])]
    models, results = models[:1], {"wall_seconds": 0.0}
    for i, folder in enumerate([*before, workdir]):
        if i:
            models.append(built(i, models))
        title = f"stage {i + 1} of {len(stages)}, {stages[i].name}" if before else ""
        deployed = models[i].deployed()
        describe = functools.partial(
            _describe, options=options, stage=stages[i], model=models[i], deployed=deployed
        )
        results = _train(
            models[i], data, strategy, options, folder, title, describe, results["wall_seconds"]
        )
        saved_model = export.export(deployed, data.classes, os.path.join(folder, "export"))
    print("Checking the SavedModel in a fresh process …", flush=True)
    export.check(saved_model, deployed, data.test.first(32))
    print(report(results))
    print(
        f"SavedModel:   {saved_model}\nTensorBoard:  tensorboard --logdir {workdir}\n"
        f"Results:      {os.path.join(workdir, 'results.json')}"
    )
    return results


def around(
    data, cls, network, *, weights=None, initializer=None, trunk_share=None, notes=None, **arguments
):
    """A `cls` around one network or a list, each a name or a keras.Model, for the images of `data`.

    Args:
      weights: {name: file of the weights that this network starts from, or None}.
      initializer: as in networks.build.
      trunk_share: as in surgery.propose_cut.
      notes: a dict that gets lines for people as keys.
    """
    several = network if isinstance(network, (list, tuple)) else [network]
    several = [
        networks.build(one, data.image_shape, len(data.classes), initializer)
        if isinstance(one, str)
        else one
        for one in several
    ]
    raw = {networks.standardises_itself(one) for one in several}
    if len(raw) > 1:
        raise UserError(
            "of the networks, some scale raw images themselves and some do not: they cannot see the same images"
        )
    preprocess = None if raw.pop() else networks.standardise(data.mean, data.std)
    notes = {} if notes is None else notes
    if isinstance(network, str) and (path := (weights or {}).get(network)):
        loaded, fresh = surgery.load_weights(several[0], workdirs.saved_model(path) or path)
        notes[
            f"--weights={path}: {len(loaded)} layers loaded{', not ' + fresh[0] if fresh else ''}"
            + ("; peers' own classifiers start afresh" if "peers" in _parameters(cls) else "")
        ] = True
        preprocess = preprocess and (
            networks.preprocessing(network, data.image_shape) or preprocess
        )
    if (
        "split_at" in _parameters(cls)
        and not arguments.get("split_at")
        and (trunk_share or len(surgery.section_names(several[0])) < 2)
    ):
        arguments["split_at"], share = surgery.propose_cut(several[0], trunk_share)
        notes[
            f"no --split_at: the peers share the network up to layer {arguments['split_at']}, {100 * share:.0f} % of its "
            "forward cost"
        ] = True
    return cls(
        several if isinstance(network, (list, tuple)) else several[0],
        preprocess=preprocess,
        **arguments,
    )


def _train(model, data, strategy, options, folder, title, describe, seconds):
    """Trains a stage, or goes on where its folder stands.

    Args:
      model: the compiled Distiller.
      folder: of its checkpoints, metrics, results and logs.
      title: what it is, for people; "" if there is one stage.
      describe: a function rows -> contents of results.json.
      seconds: what the stages before took.
    Returns:
      The contents of results.json.
    """
    steps, total = model.steps_per_epoch, model.steps_per_epoch * options.epochs
    os.makedirs(folder, exist_ok=True)
    checkpoints = Checkpoints(model, os.path.join(folder, "checkpoints"))
    start = checkpoints.restore()
    rows = [
        row
        for row in workdirs.read_rows(os.path.join(folder, "metrics.csv"))
        if row["step"] <= start
    ]
    lines = [
        title,
        "done" if start == total else f"goes on at step {start} of {total}" if start else "",
    ]
    if any(lines):
        print(": ".join(filter(None, lines)), flush=True)
    batches = functools.partial(
        datasets.train_batches,
        data,
        options.batch_size,
        options.epochs,
        views=model.num_views,
        seed=options.seed,
        flip=options.flip,
        augment=options.augment,
        color_jitter=options.color_jitter,
        cutout=options.cutout,
    )
    record = Record(folder, rows, options.batch_size, describe, seconds)
    if not start:
        record.show_views(next(iter(batches()))[0])
    with Save(checkpoints, options.checkpoint_steps(steps), start, total, title) as save:
        fit = functools.partial(
            model.fit,
            validation_data=datasets.test_batches(data, 4 * options.batch_size),
            validation_freq=[
                *range(options.test_every, options.epochs, options.test_every),
                options.epochs,
            ],
            callbacks=[Progress("steps"), record, save],
            verbose=1 if sys.stdout.isatty() else 2,
        )
        epoch, done = divmod(start, steps)
        try:
            if done:
                fit(
                    strategies.distribute(strategy, functools.partial(batches, start=start)),
                    initial_epoch=epoch,
                    epochs=epoch + 1,
                    steps_per_epoch=steps - done,
                )
                epoch += 1
            if epoch < options.epochs:
                fit(
                    strategies.distribute(
                        strategy, functools.partial(batches, start=epoch * steps)
                    ),
                    initial_epoch=epoch,
                    epochs=options.epochs,
                    steps_per_epoch=steps,
                )
        except (UserError, Stopped):
            raise
        except Exception as e:
            raise Stopped(
                f"failed at step {save.step} of {save.of}: {type(e).__name__}; the newest checkpoint in {folder} is "
                f"of step {save.saved}, and the same command goes on from there"
            ) from e
    return describe(rows)


def method_arguments(method, options):
    """The settings that go to the method's class; UserError if one is set that it does not take."""
    settings = {field.name for field in dataclasses.fields(options)} - {"network"}
    taken = {name: settings & _parameters(cls) for name, cls in METHODS.items()}
    chosen = settings & _parameters(method)
    given = {
        name: value
        for name in sorted(set().union(*taken.values()))
        if (value := getattr(options, name)) is not None
    }
    for name in given:
        if name not in chosen:
            takers = ", ".join(m for m, arguments in taken.items() if name in arguments)
            raise UserError(
                f"--{name} does not go with --method={options.method}: it is for {takers}. "
                f"{options.method} takes {', '.join('--' + n for n in sorted(chosen)) or 'no such flags'}."
            )
    return given


def _parameters(method):
    """Names of what a method's constructor and stages take."""
    own = set(method.parameters())
    return own | ({"trunk_share"} if "split_at" in own else set())


def _describe(rows, options, stage, model, deployed):
    """The contents of results.json after the epochs of `rows`, the last of which was tested."""
    errors = {name: rows[-1][f"val_error/{name}"] for name in model.exits}
    speeds = [row["images_per_second"] for row in rows if "images_per_second" in row]
    count = lambda weights: int(sum(np.prod(w.shape) for w in weights))
    best = min(row[key] for row in rows if (key := f"val_error/{model.deployed_exit}") in row)
    return {
        "method": options.method,
        **({"stage": stage.name} if stage.name else {}),
        "dataset": options.dataset,
        "network": ",".join(stage.network) if isinstance(stage.network, list) else stage.network,
        "peers": max(1, sum(name.startswith("peer_") for name in model.exits)),
        "seed": options.seed,
        "epochs": int(rows[-1]["epoch"]),
        "steps": int(rows[-1]["step"]),
        "deployed": model.deployed_exit,
        "deployed_error": round(errors[model.deployed_exit], 4),
        "best_deployed_error": round(best, 4),
        "error": {name: round(error, 4) for name, error in errors.items()},
        "parameters": {
            "deployed": count(deployed.trainable_weights),
            "training": count(model.trainable_weights),
        },
        "images_per_second": round(len(speeds) / sum(1 / s for s in speeds), 1) if speeds else None,
        "wall_seconds": round(rows[-1]["wall_seconds"], 1),
        "settings": _settings(options),
        "versions": {
            "tf_pcl": tf_pcl.__version__,
            "python": platform.python_version(),
            "tensorflow": tf.__version__,
            "keras": keras_package.__version__,
            "numpy": np.__version__,
        },
    }


def _settings(options):
    """{name: value} of what was set, and of the method's own defaults."""
    defaults = METHODS[options.method].parameters()
    settings = {
        name: defaults.get(name) if value is None else value
        for name, value in dataclasses.asdict(options).items()
    }
    return {name: value for name, value in settings.items() if value is not None}


def report(results):
    """A table of the test errors, for people."""
    width = max(map(len, results["error"]))
    lines = [f"{'exit':{width}}  test error after {results['epochs']} epochs"]
    for name, error in results["error"].items():
        lines.append(
            f"{name:{width}}  {error:6.2f} %"
            + ("  (deployed)" if name == results["deployed"] else "")
        )
    lines.append(
        f"{results['parameters']['deployed']:,} parameters are deployed, of {results['parameters']['training']:,} "
        f"trained; {results['images_per_second'] or 0:.0f} training images/s, without the first step"
    )
    return "\n".join(lines)
