"""Born-Again Neural Networks (Furlanello, Lipton, Tschannen, Itti and Anandkumar, ICML 2018).

A network is trained with cross-entropy. Then the same network is trained again and again from a
fresh start, and learns from the labels and from the generation before. With z_k the logits of
generation k and p(z) = softmax(z / T), T = 1, the losses are (section 3)

    L_0 = CE(y, z_0),    L_k = CE(y, z_k) + T² KL(p(z_{k−1}) ‖ p(z_k))     terms `ce` and `parent`

The generations before are frozen. The last one is deployed. The ensemble of all, the mean of their
probabilities, is reported beside it (section 3.1).

The parent sees the child's view, in inference mode, which the paper leaves open.
"""

import tensorflow as tf

from tf_pcl.compat import keras
from tf_pcl.errors import UserError
from tf_pcl.losses import cross_entropy, distillation
from tf_pcl.methods.baseline import Baseline
from tf_pcl.methods.distiller import Exit, Stage
from tf_pcl.methods.peers import check_ends
from tf_pcl.surgery import with_logits


class BAN(Baseline):
    """One generation of a network, which learns from the one before.

    Args:
      network: the target network: a keras.Model from images to logits or probabilities, or a
        function that builds one.
      ancestors: the trained generations before, the oldest first: keras.Models from raw images
        uint8 [B, H, W, C] to logits [B, C], such as deployed() gives. None in generation 0.
      temperature: T > 0.
      preprocess: a layer in front of the network, such as networks.standardise(mean, std).
    """

    terms = ("ce", "parent")

    def __init__(self, network, *, ancestors=(), temperature=1.0, preprocess=None):
        if isinstance(ancestors, keras.Model):
            raise UserError("`ancestors` is one network: give a list, the oldest first")
        super().__init__(network, exit_name=f"generation_{len(ancestors)}", preprocess=preprocess)
        self.temperature = temperature
        self.ancestors = [with_logits(one) for one in ancestors]
        self.ancestor_names = [f"generation_{k}" for k in range(len(ancestors))]
        check_ends(self.network, self.given_teachers)
        self.exits = (
            self.deployed_exit,
            *self.ancestor_names,
            *(["ensemble"] if ancestors else []),
        )

    @classmethod
    def stages(cls, make, network, generations=3, **arguments):
        """Returns a stage for each of the `generations` ≥ 2, generation 0 among them."""
        if generations < 2:
            raise UserError(
                "at least 2 are needed: the first one has no teacher",
                parameter="generations",
                value=generations,
                allowed="at least 2",
            )
        return [
            Stage(
                f"generation_{k}",
                network,
                lambda trained: make(
                    cls, network, ancestors=[one.deployed() for one in trained], **arguments
                ),
                alone=k == 0,
            )
            for k in range(generations)
        ]

    @property
    def untrained(self):
        return self.ancestors

    @property
    def given_teachers(self):
        return dict(zip(self.ancestor_names, self.ancestors))

    def teachers(self, views, training):
        ancestors = list(self.given_teachers.items())
        # Only the parent teaches; the others are needed for the ensemble alone.
        return {
            name: Exit(**ancestor(views[:, 0], training=False))
            for name, ancestor in (ancestors[-1:] if training else ancestors)
        }

    def all_exits(self, images):
        exits = super().all_exits(images)
        if self.ancestors:
            exits["ensemble"] = Exit(
                tf.math.log(sum(tf.nn.softmax(e.logits) for e in exits.values()) / len(exits))
            )
        return exits

    def loss_terms(self, labels, student, teacher):
        z = student[self.deployed_exit].logits
        terms = {"ce": cross_entropy(labels, z)}
        if teacher:
            terms["parent"] = distillation(
                teacher[self.ancestor_names[-1]].logits, z, self.temperature
            )
        return terms
