"""The two metrics of DisWOT as losses."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.image.data import ImageBatch
from lit_distill.image.distillation import DistillationLoss, Outputs, Shapes, penultimate, stages
from lit_distill.losses.diswot import head_gradient, relation_similarity, semantic_similarity


class SemanticSimilarity(DistillationLoss):
    """Which features speak for which class, by the last layer's gradient; see `lit_distill.losses.diswot`.

    Args:
        student_tap: Module in the student whose output (D,) its last linear layer reads, or the map that is averaged to
            it; what the student calls `penultimate` if None.
        teacher_tap: The same in the teacher; D must be the same.
    """

    name: ClassVar[str] = "semantic"

    def __init__(self, student_tap: str | None = None, teacher_tap: str | None = None) -> None:
        super().__init__([student_tap] if student_tap else [], [teacher_tap] if teacher_tap else [])

    def resolve(self, student: nn.Module, teacher: nn.Module) -> None:
        """Takes the penultimate layers where no tap was given."""
        self.student_taps = self.student_taps or (penultimate(student),)
        self.teacher_taps = self.teacher_taps or (penultimate(teacher),)

    def build(self, shapes: Shapes) -> None:
        """Checks that both networks' last layers read the same number of features."""
        student, teacher = shapes.student[self.student_taps[0]], shapes.teacher[self.teacher_taps[0]]
        if student[0] != teacher[0]:
            raise UsageError(
                f"semantic similarity: the student's last layer reads {student[0]} features, the teacher's "
                f"{teacher[0]}; choose a student of the same last width, or the relation term alone"
            )

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        gradients = (
            head_gradient(outputs.logits, _pooled(outputs.features[tap]), batch.labels)
            for outputs, tap in ((student, self.student_taps[0]), (teacher, self.teacher_taps[0]))
        )
        return semantic_similarity(*gradients)


class RelationSimilarity(DistillationLoss):
    """Which samples of a batch are alike, by the last map; see `lit_distill.losses.diswot`.

    Under DDP each process compares the samples of its own share of the batch.

    Args:
        student_tap: Module in the student; its last stage if None.
        teacher_tap: Module in the teacher, of any shape; its last stage if None.
    """

    name: ClassVar[str] = "relation"

    def __init__(self, student_tap: str | None = None, teacher_tap: str | None = None) -> None:
        super().__init__([student_tap] if student_tap else [], [teacher_tap] if teacher_tap else [])

    def resolve(self, student: nn.Module, teacher: nn.Module) -> None:
        """Takes the last stages where no tap was given."""
        self.student_taps = self.student_taps or stages(student)[-1:]
        self.teacher_taps = self.teacher_taps or stages(teacher)[-1:]

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        return relation_similarity(student.features[self.student_taps[0]], teacher.features[self.teacher_taps[0]])


def _pooled(feature: Tensor) -> Tensor:
    return feature if feature.ndim == 2 else feature.flatten(2).mean(2)
