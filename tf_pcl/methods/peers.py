"""Peers: branches on a shared trunk, or whole networks."""

import tensorflow as tf

from tf_pcl.compat import keras
from tf_pcl.errors import UserError
from tf_pcl.methods.distiller import Exit
from tf_pcl.surgery import clone, with_features


class Peers(keras.Model):
    """Peers on a shared trunk.

    Args:
      trunk, branch: as surgery.split gives them.
      names: the peers' exits; each gets a freshly initialised copy of the branch.
      preprocess: a layer in front of the trunk.
      trunk_batch: "together" or "apart", whether the views pass the trunk as one batch, which shares BatchNorm's
        statistics, or one after another.
    """

    def __init__(self, trunk, branch, names, preprocess, trunk_batch="together", name="peers"):
        super().__init__(name=name)
        self.preprocess, self.trunk_batch = preprocess, trunk_batch
        self.trunk = trunk
        self.names = tuple(names)
        self.branches = []
        for j in range(len(names)):
            own = clone(branch, salt=j)
            # Keras wants different names for models that meet in one, as in an ensemble.
            self.branches.append(keras.Model(own.input, own.output, name=f"branch_{j + 1}"))
        self.built = True

    def call(self, views, training=False):
        """{name: Exit} of the peers for views [B, v, H, W, C]."""
        return self.high(self.low(views, training), training)

    def low(self, views, training=False):
        """The trunk's output [B, …] for each of the v views, a list."""
        if self.trunk_batch == "apart":
            return [
                self.trunk(self.preprocess(view), training=training)
                for view in tf.unstack(views, axis=1)
            ]
        # One batch of v·B images, which share the trunk's BatchNorm statistics.
        images = tf.reshape(tf.transpose(views, [1, 0, 2, 3, 4]), [-1, *views.shape[2:]])
        return tf.split(self.trunk(self.preprocess(images), training=training), views.shape[1])

    def high(self, low, training=False):
        """{name: Exit} of the branches: peer j takes low[j], or all take the one."""
        low = low * len(self.branches) if len(low) == 1 else low
        return {
            name: Exit(**branch(x, training=training))
            for name, branch, x in zip(self.names, self.branches, low)
        }

    def target(self, j=0):
        """The peer names[j] to deploy: trunk and its branch."""
        return from_raw_images(self.preprocess, self.trunk, self.branches[j])


def from_raw_images(preprocess, *models):
    """A functional keras.Model from raw images uint8 [B, H, W, C], through `preprocess` and `models`, the last of which
    gives {"logits": …}, to logits float32 [B, C]."""
    images = keras.Input(models[0].input_shape[1:], dtype=tf.uint8, name="images")
    x = preprocess(images)
    for model in models:
        x = model(x)
    return classifier(images, x["logits"])


def classifier(images, logits):
    """keras.Model from `images` to float32 `logits`, under that output name."""
    return keras.Model(
        images, keras.layers.Activation("linear", dtype="float32", name="logits")(logits)
    )


def whole_networks(network, peers=None):
    """{peer's name: network} of peers that share nothing.

    Args:
      network: a functional keras.Model from images to logits or probabilities, of which all but the first peer are freshly
        initialised copies; or a list of different ones.
      peers: m ≥ 2; by default 3, or as many as the list has.
    Returns:
      Networks as surgery.with_features gives them.
    """
    if not isinstance(network, (list, tuple)):
        first, names = with_features(network), peer_names(3 if peers is None else peers)
        return dict(zip(names, [first, *(clone(first, salt=j) for j in range(1, len(names)))]))
    check_peers(network, peers)
    return dict(zip(peer_names(len(network)), map(with_features, network)))


def check_peers(several, peers):
    """UserError if `peers` is given and is not the number of networks in the list `several`."""
    if peers not in (None, len(several)):
        raise UserError(f"--peers={peers} does not go with {len(several)} networks: leave it out")


def peer_names(count):
    """["peer_1", …]; UserError for fewer than 2."""
    if count < 2:
        raise UserError(
            f"--peers={count}: this method needs at least 2 peers, who teach each other"
        )
    return [f"peer_{j + 1}" for j in range(count)]
