"""Online Knowledge Distillation with Diverse Peers: OKDDip (Chen et al., AAAI 2020).

m auxiliary peers and a group leader share a trunk. Each peer learns from its own mixture of the
peers, so that they stay diverse; the leader learns from their mean. With f_i ∈ R^d the feature and
z_i the logits of peer i, p^T(z) = softmax(z / T) and the ramp-up weight ω, the attention, the
targets and the loss are (section 3)

    a_ij = softmax_j((W_q f_i) · (W_k f_j)),   W_q, W_k ∈ R^{d×d/8},   t_i = Σ_j a_ij z_j
    L = Σ_i CE(y, z_i) + CE(y, z_leader)                  term `ce`
        + ω T² Σ_i KL(p^T(t_i) ‖ p^T(z_i))                term `personal`, ω included
        + ω T² KL(p^T(1/m Σ_i z_i) ‖ p^T(z_leader))       term `group`, ω included

W_q and W_k learn from these targets alone. So in this method only, gradients do flow into the
targets of both terms, as in the authors' published code. The leader is deployed.

Two details are open in the paper. d/8 is rounded down, but not to 0. Attention is computed in
float32; each entry of W_q and W_k starts uniform in ±1/√d, as in the authors' framework.
"""

import tensorflow as tf

from tf_pcl.compat import keras, layers
from tf_pcl.losses import cross_entropy, distillation
from tf_pcl.methods.peers import Branched


class OKDDip(Branched):
    """Peers with targets of their own, and a leader who learns from them all.

    Args:
      network: the target network: a keras.Model from images to logits or probabilities, or a
        function that builds one.
      split_at: the name of the last layer that the peers and the leader share. By default they
        share all before the last section of the network.
      peers: m ≥ 2 auxiliary peers; the leader is one branch more.
      temperature: T > 0.
      rampup_epochs: α, the epochs until ω reaches its full value; by default 80 of 300, scaled to
        the run. With 0, the weight is constant.
      distill_weight: λ, the full value of ω.
      preprocess: a layer in front of the network, such as networks.standardise(mean, std).
    """

    terms = ("ce", "personal", "group")
    further_exit = deployed_exit = "leader"

    def build_further(self):
        d = self.peers.branches[0].output_shape["features"][-1]
        self.query, self.key = (
            layers.Dense(
                max(1, d // 8),
                use_bias=False,
                # Uniform in ±√(3 · scale / d).
                kernel_initializer=keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform"),
                dtype="float32",
                name=name,
            )
            for name in ("query", "key")
        )
        for matrix in (self.query, self.key):
            matrix.build((None, d))

    def students(self, views, training):
        return self.peers(views, training)

    def attention(self, features):
        """Returns a_ij float32 [B, m, m], which sum to 1 over j, for features f_i [B, m, d]."""
        return tf.nn.softmax(tf.matmul(self.query(features), self.key(features), transpose_b=True))

    def loss_terms(self, labels, student, teacher):
        T, w = self.temperature, self.ramp_up()
        stacked = lambda what: tf.stack(
            [getattr(student[name], what) for name in self.peer_exits], axis=1
        )
        z, z_leader = stacked("logits"), student["leader"].logits
        targets = tf.matmul(self.attention(stacked("features")), z)
        return {
            "ce": sum(cross_entropy(labels, e.logits) for e in student.values()),
            "personal": w
            * sum(
                distillation(t_i, z_i, T, cut=False)
                for t_i, z_i in zip(tf.unstack(targets, axis=1), tf.unstack(z, axis=1))
            ),
            "group": w * distillation(tf.reduce_mean(z, axis=1), z_leader, T, cut=False),
        }
