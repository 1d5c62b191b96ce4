"""The networks of a run that has ended, its data and its results."""

import dataclasses
import glob
import os
from typing import Any, Optional

from tf_pcl import options
from tf_pcl.compat import keras
from tf_pcl.data import ImageData
from tf_pcl.errors import UserError, choose, one_line
from tf_pcl.methods.distiller import build_all
from tf_pcl.options import Options
from tf_pcl.training import export, report, run
from tf_pcl.training import strategy as strategies
from tf_pcl.training import workdir as workdirs
from tf_pcl.training.beside import drawn, same_test, same_training
from tf_pcl.training.checkpoints import Checkpoints
from tf_pcl.training.workdir import Workdir

# The exit that the run itself has exported.
DEPLOYED = "deployed"
ENSEMBLE = "ensemble"


@dataclasses.dataclass(frozen=True)
class Finished:
    """A run that has ended.

    Attributes:
      path: its workdir.
      options: its options.
      results: the contents of results.json.
    """

    path: str
    options: Options
    results: dict[str, Any]

    @classmethod
    def of(cls, path: str) -> "Finished":
        """Reads the workdir of a run.

        Raises:
          UserError: if it is not a workdir, or the run has not ended.
        """
        path = os.path.expanduser(path)
        workdir = Workdir(path)
        if not os.path.isfile(workdir.flags):
            raise UserError(f"{path} is not a workdir: it has no flags.txt; give that of a run")
        chosen = options.from_file(workdir.flags)
        if not os.path.isfile(workdir.results) or not workdirs.saved_model(workdir.export):
            raise UserError(
                f"the run in {path} has not ended, since it has no SavedModel yet: give its "
                "command again to resume it"
            )
        try:
            results = workdirs.read_json(workdir.results)
            results["error"][results["deployed"]], results["epochs"]
            done = report.ended(results, chosen)
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(
                f"{workdir.results} is damaged ({one_line(e)}): give the command of the run again "
                "to write it"
            ) from e
        if not done:
            raise UserError(
                f"the run in {path} trains anew and has not ended: give its command again to "
                "resume it"
            )
        return cls(path, chosen, results)

    def exit_name(self, wanted: str) -> str:
        """Returns the name in results.json of an exit.

        Args:
          wanted: "deployed"; "ensemble", which is that of the mean teachers if the run has them; or
            a name in results.json.

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
          data_dir: the present folder of the data; by default that of the run.

        Raises:
          UserError: if they cannot be loaded, or are not those of the run.
        """
        moved = data_dir or self.options.data_dir
        data = run.load_data(dataclasses.replace(self.options, data_dir=moved))
        Workdir(self.path).check_data(report.facts_of(data))
        return data

    def network(self, exit_name: str, data: ImageData) -> keras.Model:
        """Returns the network of an exit.

        For the deployed exit, it is the SavedModel of the run. Other networks, those that were
        trained in mixed precision, and those with layers of the user's own are built again in
        float32 with the weights of the checkpoint.

        Args:
          exit_name: its name in results.json.
          data: the data set of the run.

        Returns:
          A keras.Model from raw images uint8 [B, H, W, C] to logits float32 [B, K].

        Raises:
          UserError: if the method has no network for this exit, or the checkpoint cannot be read.
        """
        if exit_name == self.results["deployed"] and self.options.precision == "float32":
            try:
                return export.load(Workdir(self.path).export, data.classes)
            except UserError:
                # No code of a file is run, but the function that builds the network is known.
                if ":" not in self.options.network:
                    raise
        plain = dataclasses.replace(self.options, precision="float32", deterministic=False)
        strategies.prepare(plain)
        model = build_all(run.assemble(plain, data)[1])[-1]
        network = model.network_of(exit_name)
        self._restore(model, exit_name)
        return network

    def _restore(self, model: Any, exit_name: str) -> None:
        """Restores the weights of the epoch that the run has exported."""
        epochs = self.results["epochs"]
        exported = self.results.get("exported_epoch", epochs)
        step = self.results["steps"] // epochs * exported
        checkpoints = Checkpoints(model, Workdir(self.path).checkpoints)
        problem = "no checkpoint"
        if checkpoints.has(step):
            try:
                checkpoints.read(step)
                return
            except Exception as e:  # A damaged file raises anything.
                problem = f"a damaged checkpoint ({one_line(e)})"
        instead = " with `deploy`, or export the deployed exit"
        if exit_name == self.results["deployed"]:
            instead = ""
        raise UserError(
            f"{self.path} has {problem} of epoch {exported}, which the network of "
            f"`exit={exit_name}` needs: train again{instead}"
        )

    def siblings(self) -> list["Finished"]:
        """Returns the runs beside this one that differ from it only by the seed.

        They are sorted by their seeds, this one is among them, and each seed occurs once.
        """
        found, mine = {self.options.seed: self}, _settings(self)
        data = Workdir(self.path).read_data()
        beside = glob.escape(os.path.dirname(os.path.abspath(self.path)))
        for flags in sorted(glob.glob(os.path.join(beside, "*", "flags.txt"))):
            try:
                other = Finished.of(os.path.dirname(flags))
            except UserError:
                continue
            its = Workdir(other.path).read_data()
            # What the seed draws is another choice of the same images.
            same = same_test(its, data) and (drawn(other.options) or same_training(its, data))
            if same and _settings(other) == mine:
                found.setdefault(other.options.seed, other)
        return [found[seed] for seed in sorted(found)]


def _settings(finished: Finished) -> dict[str, str]:
    """Returns what must be equal for two runs to differ only by the seed."""
    leave = {"seed", *finished.options.run_only()}
    flags = finished.options.as_flags()
    return {name: value for name, value in flags.items() if name not in leave}
