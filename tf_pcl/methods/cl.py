"""Collaborative Learning for Deep Neural Networks (Song and Chai, NeurIPS 2018).

m heads share a trunk. Head h learns from the label and from the consensus of the other heads. With
z_h the logits of head h and p^T(z) = softmax(z / T), T = 2, its target and the loss are
(section 3.2)

    q_h = p^T(1/(m−1) Σ_{j≠h} z_j)
    L = Σ_h [β CE(y, z_h) + (1−β) T² KL(q_h ‖ p^T(z_h))]     terms `ce` and `consensus`

with β = 0.5; the terms include β and 1−β. No gradient flows into a target.

*Backpropagation rescaling* (section 3.3): the trunk would get the sum of m heads' gradients, m
times what the rest of the recipe is tuned for. So the fork between trunk and heads is the identity
in the forward pass and multiplies the gradient by 1/m in the backward pass. Head 1 is deployed.

The paper leaves the forks open. Here there is one, at `split_at`, and all heads see one view.
"""

import tensorflow as tf

from tf_pcl.losses import cross_entropy, distillation
from tf_pcl.methods.distiller import Distiller
from tf_pcl.methods.peers import Peers, peer_names


class CL(Distiller):
    """Heads that learn from their consensus, on a trunk whose gradient is rescaled.

    Args:
      network: the target network: a keras.Model from images to logits or probabilities, or a
        function that builds one.
      split_at: the name of the last layer that the heads share. By default they share all before
        the last section of the network.
      peers: m ≥ 2 heads.
      temperature: T > 0.
      distill_share: 1 − β in [0, 1], the share of the consensus in a head's loss.
      preprocess: a layer in front of the network, such as networks.standardise(mean, std).
    """

    terms = ("ce", "consensus")
    deployed_exit = "peer_1"

    def __init__(
        self,
        network,
        *,
        split_at=None,
        peers=3,
        temperature=2.0,
        distill_share=0.5,
        preprocess=None,
    ):
        super().__init__(preprocess)
        self.temperature, self.distill_share = temperature, distill_share
        self.exits = self.peer_exits = peer_names(peers)
        self.peers = Peers(
            self.target_of(network), self.exits, split_at=split_at, preprocess=self.preprocess
        )

    def students(self, views, training):
        low = self.peers.low(views, training)
        return self.peers.high([rescaled(x, 1 / len(self.exits)) for x in low], training)

    def loss_terms(self, labels, student, teacher):
        z = [student[name].logits for name in self.exits]
        consensus = [(sum(z) - z_h) / (len(z) - 1) for z_h in z]
        return {
            "ce": (1 - self.distill_share) * sum(cross_entropy(labels, z_h) for z_h in z),
            "consensus": self.distill_share
            * sum(distillation(c_h, z_h, self.temperature) for c_h, z_h in zip(consensus, z)),
        }

    def deployed(self):
        return self.peers.target()


def rescaled(x, factor):
    """Returns `x` unchanged, and multiplies the gradient through it by `factor`."""

    @tf.custom_gradient
    def fork(x):
        return tf.identity(x), lambda gradient: factor * gradient

    return fork(x)
