"""Deep Mutual Learning (Zhang, Xiang, Hospedales and Lu, CVPR 2018).

m whole networks share nothing and see the same images. Each learns from the labels and from the
others' present predictions. With z_j the logits of network j and p(z) = softmax(z / T), T = 1,
the loss is L = Σ_j L_j, where

    L_j = CE(y, z_j) + 1/(m−1) Σ_{i≠j} T² KL(p(z_i) ‖ p(z_j))     terms `ce` and `mutual`

No gradient flows into the network that teaches, and there is no ramp-up. Network 1 is deployed.

Here all networks step together, on the logits of one forward pass; in the paper they take turns.
"""

from tf_pcl.losses import cross_entropy, distillation
from tf_pcl.methods.distiller import Distiller, Exit
from tf_pcl.methods.peers import check_ends, whole_networks
from tf_pcl.surgery import deployable, with_logits


class DML(Distiller):
    """Whole networks that learn from each other.

    Args:
      network: the target network: a keras.Model from images to logits or probabilities, or a
        function that builds one, of which all peers are instances; or a list of m different
        networks, the one to deploy first.
      peers: m ≥ 2; by default 3, or the length of the list.
      temperature: T > 0.
      preprocess: a layer in front of the network, such as networks.standardise(mean, std).
    """

    terms = ("ce", "mutual")
    deployed_exit = "peer_1"

    def __init__(self, network, *, peers=None, temperature=1.0, preprocess=None):
        super().__init__(preprocess)
        self.temperature = temperature
        self.networks = {
            name: with_logits(one)
            for name, one in whole_networks(network, peers, self.target_of).items()
        }
        self.exits = self.peer_exits = list(self.networks)
        check_ends(self.networks["peer_1"], self.networks)

    def students(self, views, training):
        images = self.prepared_view(views, training)
        return {
            name: Exit(**network(images, training=training))
            for name, network in self.networks.items()
        }

    def loss_terms(self, labels, student, teacher):
        z = [student[name].logits for name in self.exits]
        m = len(z)
        return {
            "ce": sum(cross_entropy(labels, z_j) for z_j in z),
            "mutual": 1
            / (m - 1)
            * sum(
                distillation(z[i], z[j], self.temperature)
                for j in range(m)
                for i in range(m)
                if i != j
            ),
        }

    def deployed(self):
        return deployable(self.preprocess, self.networks["peer_1"])
