"""The network of a run that has ended, and what there is to know of it."""

import dataclasses
import glob
import json
import os
from collections.abc import Sequence
from typing import Any, Optional

from tf_pcl import options
from tf_pcl.compat import keras
from tf_pcl.data import ImageData
from tf_pcl.errors import UserError, choose, one_line
from tf_pcl.options import Options
from tf_pcl.training import export, report, run
from tf_pcl.training import strategy as strategies
from tf_pcl.training import workdir as workdirs
from tf_pcl.training.beside import same_test
from tf_pcl.training.checkpoints import Checkpoints
from tf_pcl.training.workdir import Workdir

# The exit that a run has exported itself.
DEPLOYED = "deployed"
ENSEMBLE = "ensemble"


@dataclasses.dataclass(frozen=True)
class Finished:
    """A run that has ended.

    Attributes:
      path: its workdir.
      options: what it was asked for.
      results: the contents of results.json.
    """

    path: str
    options: Options
    results: dict[str, Any]

    @classmethod
    def of(cls, path: str) -> "Finished":
        """Reads the workdir of a run.

        Raises:
          UserError: if it is none, or the run has not ended.
        """
        path = os.path.expanduser(path)
        workdir = Workdir(path)
        if not os.path.isfile(workdir.flags):
            raise UserError(f"{path} is no workdir of a run: it has no flags.txt; give one")
        chosen = options.from_file(workdir.flags)
        if not os.path.isfile(workdir.results) or not workdirs.saved_model(workdir.export):
            raise UserError(
                f"the run in {path} has not ended, since it has no SavedModel yet: the command "
                "that began it goes on with it"
            )
        try:
            with open(workdir.results, encoding="utf-8") as f:
                results = dict(json.load(f))
            results["error"][results["deployed"]], results["epochs"]
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(
                f"{workdir.results} is damaged ({one_line(e)}): the command of the run writes it "
                "anew"
            ) from e
        return cls(path, chosen, results)

    def exit_name(self, wanted: str) -> str:
        """Returns the name in results.json of an exit.

        Args:
          wanted: "deployed"; "ensemble", which is the mean teachers' where the run has these; or a
            name in results.json.

        Raises:
          UserError: if the run has no such exit.
        """
        errors = self.results["error"]
        if wanted == DEPLOYED:
            return str(self.results["deployed"])
        if wanted == ENSEMBLE and f"mean_{ENSEMBLE}" in errors:
            return f"mean_{ENSEMBLE}"
        return str(choose("exit", wanted, [DEPLOYED, *errors], parameter="exit"))

    def load_data(self, data_dir: Optional[str] = None) -> ImageData:
        """Loads the data set of the run.

        Args:
          data_dir: the folder where the data lie now; by default where they lay for the run.

        Raises:
          UserError: if they cannot be had, or are not those of the run.
        """
        moved = data_dir or self.options.data_dir
        data = run.load_data(dataclasses.replace(self.options, data_dir=moved))
        Workdir(self.path).check_data(report.facts_of(data))
        return data

    def network(self, exit_name: str, data: ImageData) -> keras.Model:
        """Returns the network of an exit.

        That of the deployed exit is the SavedModel of the run. Others, and networks that were
        trained in mixed precision, are built anew in float32 with the weights of the checkpoint.

        Args:
          exit_name: its name in results.json.
          data: the data set of the run.

        Returns:
          A keras.Model from raw images uint8 [B, H, W, C] to logits float32 [B, K].

        Raises:
          UserError: if the method has no network for this exit, or the checkpoint cannot be read.
        """
        if exit_name == self.results["deployed"] and self.options.precision == "float32":
            return export.load(Workdir(self.path).export, data.classes)
        plain = dataclasses.replace(self.options, precision="float32", deterministic=False)
        strategies.prepare(plain)
        stages = run.assemble(plain, data)[1]
        models: list[Any] = []
        for stage in stages:
            models.append(stage.build(models))
        network = models[-1].network_of(exit_name)
        self._restore(models[-1], exit_name)
        return network

    def _restore(self, model: Any, exit_name: str) -> None:
        """Gives a method the weights of the epoch that the run has exported, of no other one."""
        epochs = self.results["epochs"]
        exported = self.results.get("exported_epoch", epochs)
        step = self.results["steps"] // epochs * exported
        checkpoints = Checkpoints(model, Workdir(self.path).checkpoints)
        problem = "no checkpoint"
        if checkpoints.has(step):
            try:
                checkpoints.read(step)
                return
            except Exception as e:  # A damaged file raises whatever its damage leads to.
                problem = f"a damaged checkpoint ({one_line(e)})"
        raise UserError(
            f"{self.path} holds {problem} of epoch {exported}, and the network of "
            f"`exit={exit_name}` is nowhere else: train the run again with `deploy`, or export the "
            "deployed exit"
        )

    def siblings(self) -> list["Finished"]:
        """Returns the runs beside this one that differ from it by nothing but the seed.

        They are in the order of their seeds, this one among them, each seed once.
        """
        found = {self.options.seed: self}
        for flags in sorted(glob.glob(os.path.join(glob.escape(self._beside), "*", "flags.txt"))):
            try:
                other = Finished.of(os.path.dirname(flags))
            except UserError:
                continue
            mine, its = map(_settings, (self, other))
            data, its_data = (Workdir(run.path).read_data() for run in (self, other))
            if mine == its and same_test(data, its_data):
                found.setdefault(other.options.seed, other)
        return [found[seed] for seed in sorted(found)]

    @property
    def _beside(self) -> str:
        return os.path.dirname(os.path.abspath(self.path))


def errors_by_exit(runs: Sequence[Finished]) -> dict[str, list[float]]:
    """Returns {exit: test errors in percent of what was exported, one of each run}."""
    return {name: [one.results["error"][name] for one in runs] for name in runs[0].results["error"]}


def _settings(finished: Finished) -> dict[str, str]:
    """Returns what must be the same for two runs to differ by nothing but the seed."""
    leave = {"seed", *finished.options.run_only()}
    flags = finished.options.as_flags()
    return {name: value for name, value in flags.items() if name not in leave}
