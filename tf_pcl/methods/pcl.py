"""Peer Collaborative Learning for Online Knowledge Distillation (Wu and Gong, AAAI 2021).

m peers share a trunk θ_l. Peer j has a branch θ_h,j of its own and sees its own augmentation x_j of
every image x. Its feature is f_j ∈ R^d, its logits are z_j ∈ R^C. The peers have two teachers:

- The *peer ensemble teacher* is a classifier on all features: z_e = W [f_1; …; f_m] + b
  (section 3.2).
- The *peer mean teacher* is the average over training of trunk, branches and ensemble classifier
  (section 3.3): θ^t_g = φ(g) θ^t_{g−1} + (1 − φ(g)) θ_g, where φ(g) = min(1 − 1/g, β).

With p^T(z) = softmax(z / T) and the ramp-up weight ω, the loss is L = L_c + ω (L_pe + L_pm), where

    L_c  = Σ_j CE(y, z_j) + CE(y, z_e)                          term `ce`
    L_pe = T² Σ_j KL(p^T(z_e) ‖ p^T(z_j))                       term `ensemble`, ω included
    L_pm = T² Σ_j 1/(m−1) Σ_{i≠j} KL(p^T(z^t_i) ‖ p^T(z_j))     term `mean`, ω included

No gradient flows into a teacher. The mean model of peer 1 is deployed.

The paper leaves some things open. This implementation makes these choices:
- g counts training steps, or epochs with `ema_every="epoch"`.
- β is 0.999. If steps are counted, it is capped so that the average spans at most 1 % of training.
- The mean teacher sees the peers' views and uses batch statistics. It is deployed with the
  BatchNorm statistics of its own passes. If epochs are counted, one update moves its weights so far
  that the statistics of earlier passes no longer fit: then the peers' statistics are averaged too,
  by the same φ, as in implementations that average all buffers.
- All views pass the trunk in one batch and share its BatchNorm statistics. With
  `trunk_batch="apart"`, each view has its own statistics, as in the published code.
"""

import functools

import tensorflow as tf

from tf_pcl import schedules
from tf_pcl.compat import keras
from tf_pcl.ema import Shadow
from tf_pcl.errors import UserError, choose
from tf_pcl.losses import cross_entropy, distillation
from tf_pcl.methods.distiller import Distiller, Exit
from tf_pcl.methods.peers import Peers, peer_names
from tf_pcl.surgery.slices import raw_images, renamed, with_logits_output


class PCL(Distiller):
    """Peers that learn from their ensemble and from each other's means.

    Args:
      network: the target network: a keras.Model from images to logits or probabilities, or a
        function that builds one.
      split_at: the name of the last layer that the peers share. By default they share all before
        the last section of the network.
      peers: m ≥ 2.
      temperature: T > 0.
      rampup_epochs: α, the epochs until ω reaches its full value; by default 80 of 300, scaled to
        the run. With 0, the weight is constant.
      distill_weight: λ, the full value of ω.
      ema_decay: β in [0, 1]; None for the default above.
      ema_every: what g counts, "step" or "epoch".
      ensemble_teacher: "features" as in the paper, "logits" (z_e is the mean of the peers' logits)
        or "none".
      peer_teacher: "mean" as in the paper, "mutual" (the other peers themselves teach, nothing is
        averaged, and peer 1 is deployed) or "none".
      views: "own", one view for each peer, or "shared", one view for all.
      trunk_batch: "together" or "apart", how the views pass the trunk.
      deploy: "peer" for mean peer 1, or "ensemble" for all mean peers with the ensemble classifier
        (PCL-E).
      preprocess: a layer in front of the network, such as networks.standardise(mean, std).
    """

    terms = ("ce", "ensemble", "mean")

    def __init__(
        self,
        network,
        *,
        split_at=None,
        peers=3,
        temperature=3.0,
        rampup_epochs=None,
        distill_weight=1.0,
        ema_decay=None,
        ema_every="step",
        ensemble_teacher="features",
        peer_teacher="mean",
        views="own",
        trunk_batch="together",
        deploy="peer",
        preprocess=None,
    ):
        super().__init__(preprocess)
        self.peer_exits = peer_names(peers)
        if deploy == "ensemble" and ensemble_teacher == "none":
            raise UserError(
                "`deploy=ensemble` does not go with `ensemble_teacher=none`: there is no ensemble "
                "to deploy"
            )
        self.temperature = temperature
        self.rampup_epochs, self.distill_weight = rampup_epochs, distill_weight
        one_of = lambda name, value, *allowed: choose(name, value, allowed, parameter=name)
        self.ema_decay = ema_decay
        self.ema_every = one_of("ema_every", ema_every, "step", "epoch")
        ensemble = one_of("ensemble_teacher", ensemble_teacher, "features", "logits", "none")
        self.ensemble_teacher = ensemble
        self.peer_teacher = one_of("peer_teacher", peer_teacher, "mean", "mutual", "none")
        self.deploy = one_of("deploy", deploy, "peer", "ensemble")
        self.num_views = peers if one_of("views", views, "own", "shared") == "own" else 1
        one_of("trunk_batch", trunk_batch, "together", "apart")

        collaborators = functools.partial(
            Collaborators,
            self.target_of(network),
            self.peer_exits,
            preprocess=self.preprocess,
            trunk_batch=trunk_batch,
            ensemble=ensemble,
        )
        self.student = collaborators(split_at=split_at)
        self.exits = (*self.peer_exits, *(["ensemble"] if ensemble != "none" else []))
        self.deployed_exit = "ensemble" if deploy == "ensemble" else "peer_1"
        self.mean = None
        if peer_teacher == "mean":
            self.mean = collaborators(split_at=self.student.cut)
            self.shadow = Shadow(self.student, self.mean)
            self.exits += tuple(f"mean_{name}" for name in self.exits)
            self.deployed_exit = f"mean_{self.deployed_exit}"

    @property
    def untrained(self):
        return [self.mean] if self.mean else []

    def students(self, views, training):
        return self.student(views, training)

    def teachers(self, views, training):
        if not self.mean:
            return {}
        return {f"mean_{name}": e for name, e in self.mean(views, training).items()}

    def loss_terms(self, labels, student, teacher):
        T, m = self.temperature, len(self.peer_exits)
        z = [student[name].logits for name in self.peer_exits]
        terms = {"ce": sum(cross_entropy(labels, e.logits) for e in student.values())}
        if self.ensemble_teacher != "none":
            z_e = student["ensemble"].logits
            terms["ensemble"] = self.ramp_up() * sum(distillation(z_e, z_j, T) for z_j in z)
        if self.peer_teacher != "none":
            z_t = [teacher[f"mean_{name}"].logits for name in self.peer_exits] if self.mean else z
            others = [(i, j) for j in range(m) for i in range(m) if i != j]
            terms["mean"] = (
                self.ramp_up() / (m - 1) * sum(distillation(z_t[i], z[j], T) for i, j in others)
            )
        return terms

    def after_step(self, done):
        if self.mean:
            self.shadow.update(self.decay(done), statistics=self.ema_every == "epoch")

    def decay(self, done):
        """Returns φ for the update after `done` steps.

        If epochs are counted, φ is 1 within an epoch, so that nothing changes there.
        """
        if self.ema_every == "epoch":
            largest = 0.999 if self.ema_decay is None else self.ema_decay
            epoch_ends = done % self.steps_per_epoch == 0
            return tf.where(
                epoch_ends,
                schedules.ema_decay(tf.maximum(done // self.steps_per_epoch, 1), largest),
                1.0,
            )
        largest = schedules.default_ema_decay(self.epochs * self.steps_per_epoch)
        return schedules.ema_decay(done, largest if self.ema_decay is None else self.ema_decay)

    def schedules(self):
        values = super().schedules()
        if self.mean:
            values["ema_decay"] = self.decay(tf.maximum(self.step, 1))
        return values

    def deployed(self):
        return self.network_of(self.deployed_exit)

    def network_of(self, exit_name):
        name = choose("exit", exit_name, self.exits, parameter="exit")
        source = self.student
        if self.mean and name.startswith("mean_"):
            source, name = self.mean, name[len("mean_") :]
        return source.joint() if name == "ensemble" else source.target(self.peer_exits.index(name))


class Collaborators(Peers):
    """The peers and their ensemble classifier.

    Args:
      target, names, **arguments: as in Peers.
      ensemble: "features", "logits" or "none", as in PCL.
    """

    def __init__(self, target, names, *, ensemble, **arguments):
        super().__init__(target, names, **arguments)
        self.ensemble = ensemble
        if ensemble == "features":
            shapes = self.branches[0].output_shape
            d, classes = shapes["features"][-1], shapes["logits"][-1]
            self.ensemble_classifier = keras.layers.Dense(
                classes, dtype="float32", name="ensemble_classifier"
            )
            self.ensemble_classifier.build((None, len(names) * d))

    def call(self, views, training=False):
        """Returns {exit name: Exit} for views [B, v, H, W, C]."""
        exits = super().call(views, training)
        if self.ensemble != "none":
            exits["ensemble"] = Exit(self.joint_logits(list(exits.values())))
        return exits

    def joint_logits(self, peers):
        """Returns z_e [B, C] of the peers' Exits."""
        if self.ensemble == "logits":
            return sum(p.logits for p in peers) / len(peers)
        return self.ensemble_classifier(tf.concat([p.features for p in peers], axis=-1))

    def joint(self):
        """Returns all peers with the ensemble classifier (PCL-E), from raw images to z_e."""
        images = raw_images(self.preprocess, self.trunk)
        taken = ["images", "logits", self.trunk.name, *(branch.name for branch in self.branches)]
        low = self.trunk(renamed(self.preprocess, taken, images)(images))
        return with_logits_output(
            images, self.joint_logits([Exit(**branch(low)) for branch in self.branches])
        )
