"""Losses that compare feature maps."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.projectors import hint_regressor
from lit_distill.image.data import ImageBatch
from lit_distill.image.distillation import DistillationLoss, Outputs, Shapes, stages
from lit_distill.image.losses.pairs import PairedMaps
from lit_distill.losses import attention_transfer, hint_mse


class Hint(DistillationLoss):
    """Mean squared error between a regressed student feature and the teacher's hint, see `lit_distill.losses.hint_mse`.

    Args:
        student_tap: Module name in the student (the guided layer); its middle stage if None.
        teacher_tap: Module name in the teacher (the hint layer); its middle stage if None.
    """

    name = "hint"

    def __init__(self, student_tap: str | None = None, teacher_tap: str | None = None) -> None:
        super().__init__([student_tap] if student_tap else [], [teacher_tap] if teacher_tap else [])
        self.regressor: nn.Module = nn.Identity()

    def resolve(self, student: nn.Module, teacher: nn.Module) -> None:
        """Takes the middle stages where no tap was given."""
        self.student_taps = self.student_taps or (_middle(stages(student)),)
        self.teacher_taps = self.teacher_taps or (_middle(stages(teacher)),)

    def build(self, shapes: Shapes) -> None:
        """Makes the regressor from the student's to the teacher's shape."""
        self.regressor = hint_regressor(shapes.student[self.student_taps[0]], shapes.teacher[self.teacher_taps[0]])

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        regressed = self.regressor(student.features[self.student_taps[0]])
        return hint_mse(regressed, teacher.features[self.teacher_taps[0]])


class AttentionTransfer(PairedMaps):
    """Sum over stages of the difference of spatial attention, see `lit_distill.losses.attention_transfer`.

    Args:
        student_taps: Module names in the student, shallow to deep; its stages if None.
        teacher_taps: As many in the teacher; its stages if None.
        power: Exponent of the attention map.
    """

    name = "at"

    def __init__(
        self,
        student_taps: Sequence[str] | None = None,
        teacher_taps: Sequence[str] | None = None,
        power: float = 2.0,
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        self.power = power

    def build(self, shapes: Shapes) -> None:
        """Checks that the taps are maps, in pairs."""
        self.paired_shapes(shapes)

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        pairs = self.paired_features(student, teacher)
        return torch.stack([attention_transfer(s, t, power=self.power) for s, t in pairs]).sum()


def _middle(names: tuple[str, ...]) -> str:
    return names[len(names) // 2]
