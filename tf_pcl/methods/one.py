"""Knowledge Distillation by On-the-Fly Native Ensemble (Lan, Zhu and Gong, NeurIPS 2018).

m branches share a trunk. A gate weighs their logits z_j into an ensemble that teaches them. With
x_l the trunk's output, p^T(z) = softmax(z / T) and the ramp-up weight ω, the ensemble and the loss
are (section 3)

    g = softmax(ReLU(BN(W · GAP(x_l)))) ∈ R^m,   z_e = Σ_j g_j z_j
    L = Σ_j CE(y, z_j) + CE(y, z_e)                 term `ce`
        + ω T² Σ_j KL(p^T(z_e) ‖ p^T(z_j))          term `ensemble`, ω included

No gradient flows into the ensemble as a teacher: the gate learns from CE(y, z_e) alone. Branch 1 is
deployed.

W has no bias, which the paper leaves open: BN subtracts the mean.
"""

import tensorflow as tf

from tf_pcl.compat import keras, layers
from tf_pcl.errors import UserError
from tf_pcl.losses import cross_entropy, distillation
from tf_pcl.methods.distiller import Exit
from tf_pcl.methods.peers import Branched
from tf_pcl.networks.blocks import norm


class ONE(Branched):
    """Branches that learn from their gated ensemble.

    Args:
      network: the target network: a keras.Model from images to logits or probabilities, or a
        function that builds one.
      split_at: the name of the last layer that the branches share. By default they share all
        before the last section of the network. That layer must give a feature map [B, H, W, c].
      peers: m ≥ 2 branches.
      temperature: T > 0.
      rampup_epochs: α, the epochs until ω reaches its full value; by default 80 of 300, scaled to
        the run. With 0, the weight is constant.
      distill_weight: λ, the full value of ω.
      preprocess: a layer in front of the network, such as networks.standardise(mean, std).
    """

    terms = ("ce", "ensemble")

    def build_further(self):
        self.gate = gate(self.peers.trunk, len(self.peer_exits))

    def students(self, views, training):
        low = self.peers.low(views, training)
        exits = self.peers.high(low, training)
        g = self.gate(low[0], training=training)
        z = tf.stack([e.logits for e in exits.values()], axis=1)
        return {**exits, "ensemble": Exit(tf.reduce_sum(g[:, :, None] * z, axis=1))}

    def loss_terms(self, labels, student, teacher):
        z_e = student["ensemble"].logits
        return {
            "ce": sum(cross_entropy(labels, e.logits) for e in student.values()),
            "ensemble": self.ramp_up()
            * sum(
                distillation(z_e, student[name].logits, self.temperature)
                for name in self.peer_exits
            ),
        }


def gate(trunk, count):
    """Returns a keras.Model from the trunk's map [B, H, W, c] to weights float32 [B, count].

    Raises:
      UserError: if the trunk ends in anything else.
    """
    if len(trunk.output_shape) != 4:
        raise UserError(
            f"the network has the output {trunk.output_shape} where it is cut, and the gate needs "
            "a feature map [batch, height, width, channels]: cut earlier with `split_at`"
        )
    low = keras.Input(trunk.output_shape[1:])
    x = layers.Dense(count, use_bias=False)(layers.GlobalAveragePooling2D()(low))
    return keras.Model(low, layers.Softmax(dtype="float32")(layers.ReLU()(norm(x))), name="gate")
