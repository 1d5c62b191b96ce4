"""Be Your Own Teacher: self distillation (Zhang, Song, Gao, Chen, Bao and Ma, ICCV 2019).

One network of S sections teaches its own shallow parts. Each section but the last gets an exit, a
shallow classifier: a bottleneck turns the section's feature map into a feature F_i as long as the
last one, and a fully connected layer classifies it. With F_last ∈ R^d and z_last the feature and
the logits of the whole network, z_i the logits of exit i and p^T(z) = softmax(z / T), the loss is
(section 3.2)

    L = Σ_{i<S} (1−α) CE(y, z_i) + CE(y, z_last)                 term `ce`
        + α Σ_{i<S} T² KL(p^T(z_last) ‖ p^T(z_i))                term `deepest`, α included
        + λ Σ_{i<S} ‖F_i − F_last‖²                              term `hint`, λ included

with α = 0.3 and λ = 0.03. No gradient flows into z_last or F_last as a teacher. The network without
its shallow exits is deployed.

The paper leaves the bottleneck open. Here it is a 1×1 conv to d/4, a 3×3 conv with stride 2 for
each later section, and a 1×1 conv to d, each with BN and ReLU, and then global average pooling.

Published implementations weigh the terms differently. One by the authors has no T² in the
distillation, which at T = 3 is a ninth of the weight here; `distill_share` = 0.045 gives a shallow
exit its proportion of cross-entropy to distillation. Another, on which many build, has α = 0.1,
weighs the last exit's cross-entropy with 1 − α too, and adds 1e-6 times the squared distances
summed over the batch. With 128 images that is `hint_weight` = 1.28e-4, a 234th of the paper's
0.03.
"""

import tensorflow as tf

from tf_pcl.compat import keras, layers
from tf_pcl.errors import UserError
from tf_pcl.losses import batch_mean, cross_entropy, distillation
from tf_pcl.methods.distiller import Distiller, Exit
from tf_pcl.networks.blocks import conv_norm_relu
from tf_pcl.surgery import Target, deployable, section_names, with_features


class BYOT(Distiller):
    """A network that is the teacher of its own shallow exits.

    Args:
      network: the target network: a keras.Model from images to logits or probabilities, or a
        function that builds one. The last layers of its sections are called stage_1 … stage_S, S ≥
        2, and give feature maps [B, H, W, c].
      temperature: T > 0.
      distill_share: α in [0, 1], the share of distillation in a shallow exit's loss.
      hint_weight: λ ≥ 0.
      preprocess: a layer in front of the network, such as networks.standardise(mean, std).
    """

    terms = ("ce", "deepest", "hint")
    deployed_exit = "deepest"

    def __init__(
        self, network, *, temperature=3.0, distill_share=0.3, hint_weight=0.03, preprocess=None
    ):
        super().__init__(preprocess)
        self.temperature = temperature
        self.distill_share, self.hint_weight = distill_share, hint_weight
        whole = with_features(Target.of(network).new())
        maps = [whole.get_layer(name).output for name in section_names(whole)[:-1]]
        if not maps or any(x.shape.rank != 4 for x in maps):
            found = ", ".join(section_names(whole)) or "no layer stage_1, stage_2, …"
            raise UserError(
                f"network {whole.name!r} has {found}: each section but the last gets an exit, so "
                "name the last layers of at least two sections stage_1, stage_2, …; all but the "
                "last must give a feature map [batch, height, width, channels]"
            )
        self.shallow_names = [f"exit_{i + 1}" for i in range(len(maps))]
        self.exits = (*self.shallow_names, self.deployed_exit)
        self.network = keras.Model(
            whole.input, {**whole.output, **dict(zip(self.shallow_names, maps))}, name=whole.name
        )
        d, classes = whole.output_shape["features"][-1], whole.output_shape["logits"][-1]
        self.shallow = [
            shallow_exit(x.shape[1:], len(maps) - i, d, classes, name)
            for i, (x, name) in enumerate(zip(maps, self.shallow_names))
        ]

    def students(self, views, training):
        outputs = dict(self.network(self.prepared_view(views, training), training=training))
        exits = {
            name: Exit(**classify(outputs.pop(name), training=training))
            for name, classify in zip(self.shallow_names, self.shallow)
        }
        return {**exits, "deepest": Exit(**outputs)}

    def loss_terms(self, labels, student, teacher):
        alpha, last = self.distill_share, student["deepest"]
        shallow = [student[name] for name in self.shallow_names]
        return {
            "ce": (1 - alpha) * sum(cross_entropy(labels, e.logits) for e in shallow)
            + cross_entropy(labels, last.logits),
            "deepest": alpha
            * sum(distillation(last.logits, e.logits, self.temperature) for e in shallow),
            "hint": self.hint_weight
            * sum(squared_distance(e.features, tf.stop_gradient(last.features)) for e in shallow),
        }

    def deployed(self):
        return deployable(self.preprocess, self.network)


def squared_distance(f, g):
    """Returns ‖f − g‖² of features [B, d], a mean over the batch, as a float32 scalar."""
    difference = tf.cast(f, tf.float32) - tf.cast(g, tf.float32)
    return batch_mean(tf.reduce_sum(tf.square(difference), axis=-1))


def shallow_exit(map_shape, halvings, width, classes, name):
    """Returns a keras.Model of a bottleneck and a classifier.

    Args:
      map_shape: (H, W, c) of the section's feature map.
      halvings: how many times the bottleneck halves the map's sides.
      width: d, the length of the feature.
      classes: C.
      name: the name of the model.

    Returns:
      A model from maps [B, H, W, c] to {"features": [B, d], "logits": float32 [B, C]}.
    """
    x = section_map = keras.Input(map_shape)
    for filters, size, strides in [
        (max(1, width // 4), 1, 1),
        *[(max(1, width // 4), 3, 2)] * halvings,
        (width, 1, 1),
    ]:
        x = conv_norm_relu(x, filters, size, strides)
    features = layers.GlobalAveragePooling2D()(x)
    logits = layers.Dense(classes, dtype="float32")(features)
    return keras.Model(section_map, {"features": features, "logits": logits}, name=name)
