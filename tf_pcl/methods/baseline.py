"""The target network trained alone, with cross-entropy: what every method is compared with."""
from tf_pcl.losses import cross_entropy
from tf_pcl.methods.distiller import Distiller, Exit, from_raw_images
from tf_pcl.networks import with_features


class Baseline(Distiller):
    """One network, one view: L = CE(y, z).

    Args:
      network: the target network, a functional keras.Model from images to logits or probabilities.
      preprocess: a layer in front of it, such as networks.standardise(mean, std), or None.
    """

    terms = ("ce",)
    exits = ("peer_1",)
    deployed_exit = "peer_1"

    def __init__(self, network, *, preprocess=None):
        super().__init__(preprocess)
        self.network = with_features(network)

    def students(self, views, training):
        return {"peer_1": Exit(**self.network(self.preprocess(views[:, 0]), training=training))}

    def loss_terms(self, labels, student, teacher):
        return {"ce": cross_entropy(labels, student["peer_1"].logits)}

    def deployed(self):
        return from_raw_images(self.preprocess, self.network)
