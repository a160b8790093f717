"""The two metrics of DisWOT as losses."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from lit_distill.core.errors import UsageError
from lit_distill.image.data import ImageBatch
from lit_distill.image.distillation import Outputs, Shapes
from lit_distill.image.losses.pairs import PairedEmbedding, PairedFeature
from lit_distill.losses.diswot import head_gradient, relation_similarity, semantic_similarity


class SemanticSimilarity(PairedEmbedding):
    """Which features speak for which class, by the last layer's gradient; see `lit_distill.losses.diswot`.

    Args:
        student_tap: Module in the student whose output (D,) its last linear layer reads, or the map that is averaged to
            it; what the student calls `penultimate` if None.
        teacher_tap: The same in the teacher; D must be the same.
    """

    name: ClassVar[str] = "semantic"

    def build(self, shapes: Shapes) -> None:
        """Checks that both networks' last layers read the same number of features."""
        super().build(shapes)
        (student, *_), (teacher, *_) = self.pair_of_shapes(shapes)
        if student != teacher:
            raise UsageError(
                f"semantic similarity: the student's last layer reads {student} features, the teacher's "
                f"{teacher}; choose a student of the same last width, or the relation term alone"
            )

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        own, target = self.pair(student, teacher)
        return semantic_similarity(
            head_gradient(student.logits, own, batch.labels), head_gradient(teacher.logits, target, batch.labels)
        )


class RelationSimilarity(PairedFeature):
    """Which samples of a batch are alike, by the last map; see `lit_distill.losses.diswot`.

    Under DDP each process compares the samples of its own share of the batch.

    Args:
        student_tap: Module in the student; its last stage if None.
        teacher_tap: Module in the teacher, of any shape; its last stage if None.
    """

    name: ClassVar[str] = "relation"

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        return relation_similarity(*self.pair(student, teacher))
