"""Makes the Distiller of a stage from names and options."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Optional, Union

from tf_pcl import networks, surgery
from tf_pcl.compat import keras
from tf_pcl.data import ImageData
from tf_pcl.errors import UserError, choose
from tf_pcl.methods import METHODS
from tf_pcl.methods.distiller import Distiller
from tf_pcl.options import Options, names
from tf_pcl.surgery import Target
from tf_pcl.surgery.cuts import Cut
from tf_pcl.training import export
from tf_pcl.training import workdir as workdirs

# A network's name, or what Target.of takes.
Network = Union[str, keras.Model, Target]


class Assembly:
    """Makes Distillers around networks that are given by name, for the data of a run.

    It is what `Distiller.stages` takes as `make`.

    Args:
      data: the data set.
      weights: {network's name: path of its initial weights}.
      trunk_share: how much of a network's forward cost its peers share, as in surgery.propose_cut.
      initializer: how convolutions are drawn, as in networks.build.
      preprocess: what the networks see: "standardise" for standardised images, "none" for raw
        images, "auto" for raw images only if the network scales them itself.
      trust_files: whether code in files of weights and of trained networks may run.

    Attributes:
      lines: what was decided, for people: whole lines, each once, in order.
    """

    def __init__(
        self,
        data: ImageData,
        *,
        weights: Optional[Mapping[str, str]] = None,
        trunk_share: Optional[float] = None,
        initializer: Optional[str] = None,
        preprocess: str = "auto",
        trust_files: bool = False,
    ):
        self.trust_files = trust_files
        self.data, self.weights = data, dict(weights or {})
        self.trunk_share, self.initializer = trunk_share, initializer
        self.preprocess = choose("", preprocess, ("auto", "standardise", "none"), "preprocess")
        self.lines: list[str] = []

    def __call__(
        self,
        cls: type[Distiller],
        network: Union[Network, list[Network]],
        *,
        preprocess: Optional[keras.layers.Layer] = None,
        **arguments: Any,
    ) -> Distiller:
        """Makes a Distiller.

        Args:
          cls: its class.
          network: the target network, or a list of several for methods of whole networks.
          preprocess: the layer in front of networks that were trained before; by default it is
            chosen for the network.
          **arguments: keyword arguments of the constructor.

        Raises:
          UserError: if these networks cannot be built, do not fit together or cannot be cut.
        """
        several = network if isinstance(network, (list, tuple)) else [network]
        targets = [self._target(one, cls) for one in several]
        as_they_are = self._sees_raw([target.first for target in targets])
        if preprocess is None:
            preprocess = self._preprocess(several[0], as_they_are)
        if "split_at" in cls.parameters() and not arguments.get("split_at"):
            arguments["split_at"] = self._cut(targets[0].first)
        # Every method names the arguments of its own constructor.
        construct: Callable[..., Distiller] = cls
        target = targets if several is network else targets[0]
        model = construct(target, preprocess=preprocess, **arguments)
        model.preprocess.takes_uint8 = True  # A run has no other images.
        return model

    def trained(self, path: str) -> keras.Model:
        """Loads the network that an earlier run deployed.

        Args:
          path: the run's workdir, its export folder or a SavedModel.

        Returns:
          A keras.Model from raw images uint8 [B, H, W, C] to logits float32 [B, K].

        Raises:
          UserError: if there is none, or it has other classes.
        """
        return export.load(path, self.data.classes, self.trust_files)

    def _target(self, network: Network, cls: type[Distiller]) -> Target:
        if not isinstance(network, str):
            return Target.of(network)
        load = functools.partial(self._load_weights, network, cls)
        return networks.target(
            network,
            self.data.image_shape,
            len(self.data.classes),
            load=load if network in self.weights else None,
            initializer=self.initializer,
        )

    def _load_weights(self, name: str, cls: type[Distiller], network: keras.Model) -> None:
        path = self.weights[name]
        if path == "imagenet":
            loaded, fresh = networks.load_imagenet(name, network)
        else:
            file = workdirs.saved_model(path) or path
            loaded, fresh = surgery.load_weights(network, file, self.trust_files)
        line = f"weights of {path}: {len(loaded)} layers loaded"
        line += f", not {fresh[0]}" if fresh else ""
        line += "; peers' own classifiers start afresh" if "peers" in cls.parameters() else ""
        self._say(line)

    def _sees_raw(self, several: list[keras.Model]) -> bool:
        """Says whether the networks see raw images; UserError if only some of them should."""
        if self.preprocess != "auto":
            return self.preprocess == "none"
        sample, standard = self.data.train.first(64), self._standard()
        raw = {networks.scales_raw_images(one, sample, standard) for one in several}
        if len(raw) > 1:
            raise UserError(
                "some of the networks scale raw images themselves and some do not, so they "
                "cannot see the same images: give networks of one kind"
            )
        return raw.pop()

    def _standard(self) -> keras.layers.Layer:
        return networks.standardise(self.data.mean, self.data.std)

    def _preprocess(self, network: Network, as_they_are: bool) -> Optional[keras.layers.Layer]:
        chosen = self.preprocess == "auto"
        if as_they_are:
            self._say(
                "images: raw, 0–255" + (", since the network scales them itself" if chosen else "")
            )
            return None
        if chosen and isinstance(network, str) and network in self.weights:
            published = networks.preprocessing(network, self.data.image_shape)
            if published is not None:
                self._say(f"images: through the preprocess_input of {network}")
                return published
        self._say("images: standardised by the mean and deviation of the training images")
        return self._standard()

    def _cut(self, network: keras.Model) -> Cut:
        """Returns where the peers' networks are cut, and says so where their author did not."""
        cut = surgery.propose_cut(network, self.trunk_share)
        extreme = not 0.1 <= cut.share <= 0.9
        if self.trunk_share or extreme or len(surgery.section_names(network)) < 2:
            line = f"no `split_at`: the peers share the network up to layer {cut.name}, "
            line += f"{100 * cut.share:.0f} % of its forward cost"
            line += ", which is unusual: consider the other cuts" if extreme else ""
            self._say(line)
        return cut

    def _say(self, line: str) -> None:
        # A run builds a stage once to try it and once to train it: do not repeat its lines.
        if line not in self.lines:
            self.lines.append(line)


def method_arguments(options: Options) -> dict[str, Any]:
    """Returns {name: value} of the options that the stages of their method take.

    Raises:
      UserError: if an option is given that this method does not take.
    """
    taken = {name: options_of(name) for name in METHODS}
    chosen = taken[options.method]
    given = {
        name: value
        for name in sorted(set().union(*taken.values()))
        if (value := getattr(options, name)) is not None
    }
    for name in given:
        if name not in chosen:
            takers = ", ".join(method for method, own in taken.items() if name in own)
            own = ", ".join(f"`{n}`" for n in sorted(chosen)) or "no options of its own"
            raise UserError(
                f"`{name}` does not go with `method={options.method}`: it is for {takers}. "
                f"{options.method} takes {own}."
            )
    # The Assembly turns trunk_share into a cut.
    return {name: value for name, value in given.items() if name != "trunk_share"}


def options_of(method: str) -> set[str]:
    """Returns the names of the options that a method takes; those with a cut take trunk_share."""
    own = set(METHODS[method].parameters())
    own |= {"trunk_share"} if "split_at" in own else set()
    return own & set(names()) - {"network", "preprocess"}  # These go to the Assembly.
