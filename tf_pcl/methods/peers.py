"""Peers: branches on a shared trunk, or whole networks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional

import tensorflow as tf

from tf_pcl.compat import keras
from tf_pcl.errors import UserError
from tf_pcl.methods.distiller import Distiller, Exit
from tf_pcl.surgery import Target, deployable, prepared, proof, slice_at, with_features
from tf_pcl.surgery.cuts import Cut, find_cut
from tf_pcl.surgery.described import described
from tf_pcl.surgery.target import start_apart


class Peers(keras.Model):
    """Peers on a shared trunk.

    Every peer's branch is sliced from a network of its own. The trunk is that of the first.

    Args:
      target: the target network.
      names: the peers' exits.
      split_at: the name of the trunk's last layer, or a Cut; by default the cut of propose_cut.
      preprocess: a layer in front of the trunk.
      trunk_batch: "together" if the views pass the trunk as one batch and share the statistics of
        its BatchNorm, "apart" if they pass it one after another.

    Attributes:
      cut: where the networks were cut.
      trunk: a keras.Model from images to the trunk's output.
      branches: for each peer a keras.Model from there to the outputs of with_features.
    """

    def __init__(
        self,
        target: Target,
        names: Sequence[str],
        *,
        preprocess: keras.layers.Layer,
        split_at: Any = None,
        trunk_batch: str = "together",
    ):
        super().__init__(name="peers", autocast=False)
        self.preprocess, self.names, self.trunk_batch = preprocess, tuple(names), trunk_batch
        branches: list = []
        for _ in names:
            network = target.new()
            whole = with_features(network, target.proven)
            if not branches:
                self.cut = split_at if isinstance(split_at, Cut) else find_cut(whole, split_at)
            trunk, branch = slice_at(whole, self.cut.path)
            text = described(network)
            known = (target.proven, ("cut", self.cut.path, text)) if text else None
            _prove(network, whole, trunk, branch, training=network is target.first, known=known)
            if branches:
                start_apart(branches, branch)
            else:
                self.trunk = trunk
                # Called once, so that it has its weights, if any, before somebody pairs them.
                preprocess(keras.Input(trunk.input_shape[1:], dtype=tf.uint8))
            # Models that are joined in one, as in an ensemble, need different names in Keras.
            numbered = f"branch_{len(branches) + 1}"
            branches.append(keras.Model(branch.input, branch.output, name=numbered))
        self.branches = branches
        self.built = True

    def call(self, views, training=False):
        """Returns {name: Exit} of the peers for views [B, v, H, W, C]."""
        return self.high(self.low(views, training), training)

    def low(self, views: tf.Tensor, training: bool = False) -> list:
        """Returns the trunk's output [B, …] for each of the v views."""
        if self.trunk_batch == "apart":
            return [
                self.trunk(prepared(self.preprocess, view, training), training=training)
                for view in tf.unstack(views, axis=1)
            ]
        # One batch of v·B images, which share the statistics of the trunk's BatchNorm.
        images = tf.reshape(tf.transpose(views, [1, 0, 2, 3, 4]), [-1, *views.shape[2:]])
        images = prepared(self.preprocess, images, training)
        return tf.split(self.trunk(images, training=training), views.shape[1])

    def high(self, low: list, training: bool = False) -> dict:
        """Returns {name: Exit} of the branches: peer j takes low[j], or all take the only one."""
        low = low * len(self.branches) if len(low) == 1 else low
        return {
            name: Exit(**branch(x, training=training))
            for name, branch, x in zip(self.names, self.branches, low)
        }

    def target(self, j: int = 0) -> keras.Model:
        """Returns the peer names[j] to deploy: the trunk and its branch."""
        return deployable(self.preprocess, self.trunk, self.branches[j])


def _prove(network, whole, trunk, branch, training, known):
    """Proves that trunk and branch together compute what `whole`, the network's graph, does."""

    def joined(images, training):
        return branch(trunk(images, training=training), training=training)

    def reference(images, training):
        outputs = whole(images, training=training)
        return {key: outputs[key] for key in branch.output}

    what = f"network {network.name!r}, cut after {trunk.output_names[0]!r},"
    parts = [whole], [trunk, branch]
    proof.same(
        network, joined, what, reference=reference, parts=parts, training=training, known=known
    )


class Branched(Distiller):
    """A method of branches on a shared trunk, whose distillation is ramped up.

    Its exits are those of the peers and a further one. Arguments are as the subclasses say.

    Attributes:
      further_exit: the name of the further exit. If it is the one to deploy, it has a branch.
      peers: the Peers, which exist when `build_further` is called.
    """

    further_exit = "ensemble"
    deployed_exit = "peer_1"

    def __init__(
        self,
        network: Any,
        *,
        split_at: Optional[str] = None,
        peers: int = 3,
        temperature: float = 3.0,
        rampup_epochs: Optional[float] = None,
        distill_weight: float = 1.0,
        preprocess: Optional[keras.layers.Layer] = None,
    ):
        super().__init__(preprocess)
        self.temperature = temperature
        self.rampup_epochs, self.distill_weight = rampup_epochs, distill_weight
        self.peer_exits = peer_names(peers)
        self.exits = (*self.peer_exits, self.further_exit)
        names = self.exits if self.deployed_exit == self.further_exit else self.peer_exits
        self.peers = Peers(
            self.target_of(network), names, split_at=split_at, preprocess=self.preprocess
        )
        self.build_further()

    def build_further(self) -> None:
        """Builds the layers that the method has beside its peers."""
        raise NotImplementedError

    def deployed(self) -> keras.Model:
        return self.peers.target(self.peers.names.index(self.deployed_exit))


def whole_networks(networks: Any, peers: Optional[int], target_of: Callable[[Any], Target]) -> dict:
    """Returns {peer's name: keras.Model} of peers that share nothing.

    Args:
      networks: a target network, of which every peer is an instance; or a list of different ones.
      peers: m ≥ 2; None for 3, or for as many as the list has.
      target_of: the function that makes their Targets.

    Returns:
      Models with the outputs of the target networks, without with_logits or with_features.

    Raises:
      UserError: for fewer than 2 peers, or if `peers` is not the length of the list.
    """
    if isinstance(networks, (list, tuple)):
        check_peers(networks, peers)
        targets = [target_of(network) for network in networks]
    else:
        targets = [target_of(networks)] * (3 if peers is None else peers)
    made: dict = {}
    for name, target in zip(peer_names(len(targets)), targets):
        one = target.new()
        if targets[0] is target:
            start_apart(list(made.values()), one)
        made[name] = one
    proof.apart(made.values())
    return made


def check_ends(network: keras.Model, others: Mapping[str, keras.Model]) -> None:
    """Raises UserError if networks are for other images or classes than the one to deploy.

    Args:
      network: the one to deploy.
      others: {what it is in a sentence: the network}. All give {"logits": …}.
    """
    ends = lambda model: (model.input_shape[1:], model.output_shape["logits"][-1])
    given, asked = ends(network)
    for name, other in others.items():
        taught, of = ends(other)
        if of != asked or not tf.TensorShape(taught).is_compatible_with(given):
            raise UserError(
                f"{name} has {of} classes and takes images {taught}; the network has {asked} "
                f"classes and takes images {given}: take one for the same classes and images of "
                "this size"
            )


def check_peers(several: Sequence, peers: Optional[int]) -> None:
    """Raises UserError if `peers` is given and is not the number of networks in `several`."""
    if peers not in (None, len(several)):
        raise UserError(
            f"it does not go with {len(several)} networks: leave it out",
            parameter="peers",
            value=peers,
            allowed=len(several),
        )


def peer_names(count: int) -> list:
    """Returns ["peer_1", …].

    Raises:
      UserError: for fewer than 2.
    """
    if count < 2:
        raise UserError(
            "peers teach each other, so this method needs at least 2 peers",
            parameter="peers",
            value=count,
            allowed="at least 2",
        )
    return [f"peer_{j + 1}" for j in range(count)]
