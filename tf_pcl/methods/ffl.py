"""Feature Fusion for Online Mutual Knowledge Distillation (Kim, Hyun, Chung and Kwak, ICPR 2020).

This is the variant with a shared trunk, FFL-S. m branches share a trunk, and a fusion module
classifies their last feature maps M_j together. With z_j the logits of branch j, p^T(z) = softmax(z
/ T) and the ramp-up weight ω, the two ensembles and the loss are (section III)

    z_f: concat(M_1, …, M_m) → depthwise 3×3 conv → BN → ReLU
         → pointwise 1×1 conv to the width of M_j → BN → ReLU → GAP → fully connected
    z_a = 1/m Σ_j z_j
    L = Σ_j CE(y, z_j) + CE(y, z_f)                 term `ce`
        + ω T² Σ_j KL(p^T(z_f) ‖ p^T(z_j))          term `fused`, ω included
        + ω T² KL(p^T(z_a) ‖ p^T(z_f))              term `average`, ω included

Branches and fusion module teach each other. No gradient flows into a teacher. The fusion module's
weight decay is 1e-5. Branch 1 is deployed; z_f is the exit `ensemble`.

The module's convolutions have no bias, which the paper leaves open: BN subtracts the mean.
"""

import tensorflow as tf

from tf_pcl.compat import keras, layers
from tf_pcl.errors import UserError
from tf_pcl.losses import cross_entropy, distillation
from tf_pcl.methods.distiller import Exit
from tf_pcl.methods.peers import Branched
from tf_pcl.networks.blocks import conv_norm_relu, norm


class FFL(Branched):
    """Branches and the fusion of their feature maps that teach each other.

    Args:
      network: the target network: a keras.Model from images to logits or probabilities, or a
        function that builds one. It must pool or flatten a feature map after `split_at`.
      split_at: the name of the last layer that the branches share. By default they share all
        before the last section of the network.
      peers: m ≥ 2 branches.
      temperature: T > 0.
      rampup_epochs: α, the epochs until ω reaches its full value; by default 80 of 300, scaled to
        the run. With 0, the weight is constant.
      distill_weight: λ, the full value of ω.
      preprocess: a layer in front of the network, such as networks.standardise(mean, std).
    """

    terms = ("ce", "fused", "average")

    def build_further(self):
        self.fusion = fusion(self.peers.branches[0], len(self.peer_exits))

    @property
    def decay_exceptions(self):
        return [(self.fusion.trainable_weights, 1e-5)]

    def students(self, views, training):
        exits = self.peers(views, training)
        maps = tf.concat([e.feature_map for e in exits.values()], axis=-1)
        return {**exits, "ensemble": Exit(self.fusion(maps, training=training))}

    def loss_terms(self, labels, student, teacher):
        T, w = self.temperature, self.ramp_up()
        z, z_f = [student[name].logits for name in self.peer_exits], student["ensemble"].logits
        z_a = sum(z) / len(z)
        return {
            "ce": sum(cross_entropy(labels, e.logits) for e in student.values()),
            "fused": w * sum(distillation(z_f, z_j, T) for z_j in z),
            "average": w * distillation(z_a, z_f, T),
        }


def fusion(branch, count):
    """Returns a keras.Model from the branches' maps [B, H, W, count · c] to z_f float32 [B, C].

    Raises:
      UserError: if the branch makes no feature map.
    """
    if "feature_map" not in branch.output_shape:
        raise UserError(
            "the network has no feature map [batch, height, width, channels] between the cut and "
            "its classifier, and this method fuses such maps: cut earlier with `split_at`"
        )
    *size, width = branch.output_shape["feature_map"][1:]
    maps = keras.Input([*size, count * width])
    x = layers.DepthwiseConv2D(
        3, padding="same", use_bias=False, depthwise_initializer="he_normal"
    )(maps)
    x = conv_norm_relu(layers.ReLU()(norm(x)), width, 1)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(
        maps, layers.Dense(branch.output_shape["logits"][-1], dtype="float32")(x), name="fusion"
    )
