"""Two-stage distillation: Distilling the Knowledge in a Neural Network (Hinton et al., 2015).

A teacher is trained first, with cross-entropy alone. Then the student learns from the labels and
from the frozen teacher. With z the student's and z_teacher the teacher's logits and
p^T(z) = softmax(z / T), the student's loss is (section 2)

    L = CE(y, z) + T² KL(p^T(z_teacher) ‖ p^T(z))        terms `ce` and `teacher`

The student is deployed.

The paper leaves some things open. Here the teacher sees the student's view, in inference mode; both
terms have the weight 1; and T = 3.
"""

from tf_pcl.errors import UserError
from tf_pcl.losses import cross_entropy, distillation
from tf_pcl.methods.baseline import Baseline
from tf_pcl.methods.distiller import Exit, Stage
from tf_pcl.methods.peers import check_ends
from tf_pcl.surgery import with_logits


class KD(Baseline):
    """A student that learns from a teacher trained before.

    Args:
      network: the student: a keras.Model from images to logits or probabilities, or a function
        that builds one.
      teacher: a trained keras.Model from raw images uint8 [B, H, W, C] to logits or probabilities
        [B, C], such as deployed() gives.
      temperature: T > 0.
      preprocess: a layer in front of the network, such as networks.standardise(mean, std).
    """

    terms = ("ce", "teacher")

    def __init__(self, network, *, teacher, temperature=3.0, preprocess=None):
        super().__init__(network, exit_name="student", preprocess=preprocess)
        self.temperature = temperature
        self.teacher = with_logits(teacher)
        self.exits = ("student", "teacher")
        check_ends(self.network, {"`teacher`": self.teacher})

    @classmethod
    def stages(cls, make, network, teacher=None, teacher_network=None, **arguments):
        """Returns a stage for the teacher, by default a resnet110, and one for the student.

        With `teacher`, the path of an earlier run or of its SavedModel, there is only the latter.
        """
        if teacher and teacher_network:
            raise UserError(
                "`teacher_network` does not go with `teacher`, which brings its own network: give "
                "one of them"
            )
        given = make.trained(teacher) if teacher else None
        teacher_network = teacher_network or "resnet110"

        def build(trained):
            taught_by = trained[0].deployed() if given is None else given
            return make(cls, network, teacher=taught_by, **arguments)

        alone = lambda trained: make(Baseline, teacher_network, exit_name="teacher")
        first = [] if teacher else [Stage("teacher", teacher_network, alone, alone=True)]
        return [*first, Stage("student", network, build)]

    @property
    def untrained(self):
        return [self.teacher]

    @property
    def given_teachers(self):
        return {"teacher": self.teacher}

    def teachers(self, views, training):
        return {"teacher": Exit(**self.teacher(views[:, 0], training=False))}

    def loss_terms(self, labels, student, teacher):
        z = student["student"].logits
        return {
            "ce": cross_entropy(labels, z),
            "teacher": distillation(teacher["teacher"].logits, z, self.temperature),
        }
