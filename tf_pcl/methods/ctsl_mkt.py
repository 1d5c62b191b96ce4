"""Collaborative Teacher-Student Learning via Multiple Knowledge Transfer (Sun et al., 2021).

Whole networks are first trained alone, and a frozen copy of each is kept. Then they are trained
together. Each learns from its own copy (self-distillation), from the logits of the others, and from
how the others relate the images of a batch (relational knowledge, Park et al., CVPR 2019). With
f_k ∈ R^d the feature and z_k the logits of network k, z̄_k those of its frozen copy,
p^t(z) = softmax(z / t), and k' any other network, the loss is L = Σ_k L_k, where

    L_k  = α CE(y, z_k) + β [L_RD + β_2 KL(p^1(z_k') ‖ p^1(z_k))] + γ L_SD
    L_SD = t² KL(p^t(z̄_k) ‖ p^t(z_k))
    L_RD = L_DD + β_1 L_AD
    L_DD = Σ_{u,v} Huber(‖f_k(u) − f_k(v)‖ / μ_k, ‖f_k'(u) − f_k'(v)‖ / μ_k')
    L_AD = Σ_{u,v,w} Huber(cos∠_k(u, v, w), cos∠_k'(u, v, w))

The terms, with their weights, are `ce`, `mutual` (the KL to other networks), `self` (L_SD),
`distance` (L_DD) and `angle` (L_AD). Sums over images u, v, w are means. μ_k is the mean of those
distances that are not zero, ∠(u, v, w) is the angle at v, and δ = 1 in Huber's loss. No gradient
flows into z_k', f_k' or z̄_k. Network 1 is deployed.

Chosen here: α = β = γ = β_2 = 1, β_1 = 2 and t = 4; with more than two networks, the mean over all
k' ≠ k. The frozen copies see the same view, in inference mode. Each stage has the whole recipe.
Where images have weights, a pair or triple has the geometric mean of theirs, and μ_k is the mean
over all pairs.
"""

import itertools

import tensorflow as tf

from tf_pcl.errors import UserError
from tf_pcl.losses import (
    batch_mean,
    cross_entropy,
    distillation,
    of_all_replicas,
    pairwise_distances,
    triplet_angles,
)
from tf_pcl.methods.baseline import Baseline
from tf_pcl.methods.distiller import Distiller, Exit, Stage
from tf_pcl.methods.peers import check_ends, check_peers, peer_names
from tf_pcl.surgery import deployable, proof, with_features


class CTSLMKT(Distiller):
    """Networks, trained alone before, that transfer three kinds of knowledge to each other.

    Args:
      network: a list of m ≥ 2 trained networks, alike or different, the one to deploy first.
      temperature: t > 0.
      ce_weight, collaboration_weight, self_weight: α, β and γ.
      angle_weight, mutual_weight: β_1 and β_2.
      preprocess: a layer in front of the networks, such as networks.standardise(mean, std).
    """

    terms = ("ce", "mutual", "self", "distance", "angle")
    deployed_exit = "peer_1"

    def __init__(
        self,
        network,
        *,
        temperature=4.0,
        ce_weight=1.0,
        collaboration_weight=1.0,
        self_weight=1.0,
        angle_weight=2.0,
        mutual_weight=1.0,
        preprocess=None,
    ):
        super().__init__(preprocess)
        if not isinstance(network, (list, tuple)):
            raise UserError(
                "ctsl_mkt takes a list of networks that were trained before, one for each peer"
            )
        self.temperature = temperature
        self.ce_weight, self.collaboration_weight = ce_weight, collaboration_weight
        self.self_weight, self.angle_weight = self_weight, angle_weight
        self.mutual_weight = mutual_weight
        targets = dict(zip(peer_names(len(network)), map(self.target_of, network)))
        trained = {name: target.first for name, target in targets.items()}
        proof.apart(trained.values())
        # The copies are trained. Their Dropout layers have drawn nothing yet, whether this process
        # trained the networks or read them from a checkpoint.
        self.networks = {name: with_features(target.copy()) for name, target in targets.items()}
        self.peer_exits = list(self.networks)
        check_ends(self.networks["peer_1"], self.networks)
        self.alone = {name: with_features(one) for name, one in trained.items()}
        self.exits = (*self.networks, *(f"alone_{name}" for name in self.alone))

    @classmethod
    def stages(cls, make, network, peers=None, **arguments):
        """Returns a stage for each network alone, and one for all; `peers` is 2 by default."""
        several = (
            network
            if isinstance(network, (list, tuple))
            else [network] * (2 if peers is None else peers)
        )
        check_peers(several, peers)
        alone = [
            Stage(
                name,
                one,
                lambda trained, one=one, name=name: make(Baseline, one, exit_name=name),
                alone=True,
            )
            for name, one in zip(peer_names(len(several)), several)
        ]
        return [
            *alone,
            Stage(
                "together",
                network,
                lambda trained: make(
                    cls,
                    [peer.target for peer in trained[: len(several)]],
                    preprocess=trained[0].preprocess,  # The images that they were trained on.
                    **arguments,
                ),
            ),
        ]

    @property
    def untrained(self):
        return list(self.alone.values())

    def students(self, views, training):
        images = self.prepared_view(views, training)
        return {
            name: Exit(**network(images, training=training))
            for name, network in self.networks.items()
        }

    def teachers(self, views, training):
        images = self.prepared_view(views, training)
        return {
            f"alone_{name}": Exit(**network(images, training=False))
            for name, network in self.alone.items()
        }

    def loss_terms(self, labels, student, teacher):
        z = [student[name].logits for name in self.networks]
        z_alone = [teacher[f"alone_{name}"].logits for name in self.networks]
        features = [of_all_replicas(student[name].features) for name in self.networks]
        d, a = [pairwise_distances(f) for f in features], [triplet_angles(f) for f in features]
        m, beta = len(z), self.collaboration_weight
        return {
            "ce": self.ce_weight * sum(cross_entropy(labels, z_k) for z_k in z),
            "mutual": beta
            * self.mutual_weight
            / (m - 1)
            * sum(distillation(z[j], z[k]) for k in range(m) for j in range(m) if j != k),
            "self": self.self_weight
            * sum(distillation(own, z_k, self.temperature) for own, z_k in zip(z_alone, z)),
            # Each pair counts once, with the losses of both directions.
            "distance": beta
            / (m - 1)
            * sum(itertools.starmap(mutual_huber, itertools.combinations(d, 2))),
            "angle": beta
            * self.angle_weight
            / (m - 1)
            * sum(itertools.starmap(mutual_huber, itertools.combinations(a, 2))),
        }

    def deployed(self):
        return deployable(self.preprocess, self.networks["peer_1"])


def mutual_huber(x, y):
    """Returns Huber(x, y) with target y plus Huber(y, x) with target x, δ = 1, of equal shapes.

    The targets are constants. The result is a mean over the elements, a float32 scalar.
    """
    # With r = x − y and q, the derivative, r cut to ±1, Huber's loss is q (r − q/2). Its two
    # directions have one value, and the gradient of one without constants is that of the two with
    # constants together.
    r = x - y
    q = tf.stop_gradient(tf.clip_by_value(r, -1.0, 1.0))
    loss = batch_mean(q * (r - q / 2))
    return loss + tf.stop_gradient(loss)
