"""The target network trained alone, with cross-entropy: what every method is compared with."""

from tf_pcl.losses import cross_entropy
from tf_pcl.methods.distiller import Distiller, Exit
from tf_pcl.surgery import Target, deployable, with_logits


class Baseline(Distiller):
    """One network, one view: L = CE(y, z).

    Args:
      network: the target network: a keras.Model from images to logits or probabilities, or a
        function that builds one.
      exit_name: the name of its prediction, which a method sets if this is its first stage.
      preprocess: a layer in front of the network, such as networks.standardise(mean, std).
    """

    terms: tuple[str, ...] = ("ce",)

    def __init__(self, network, *, exit_name="peer_1", preprocess=None):
        super().__init__(preprocess)
        self.target = Target.of(network)
        self.network = with_logits(self.target.new())
        self.exits: tuple[str, ...] = (exit_name,)
        self.deployed_exit = exit_name

    def students(self, views, training):
        return {
            self.deployed_exit: Exit(
                **self.network(self.prepared_view(views, training), training=training)
            )
        }

    def loss_terms(self, labels, student, teacher):
        return {"ce": cross_entropy(labels, student[self.deployed_exit].logits)}

    def deployed(self):
        return deployable(self.preprocess, self.network)
