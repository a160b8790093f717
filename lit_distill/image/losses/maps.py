"""Losses that compare feature maps."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.projectors import hint_regressor
from lit_distill.image.data import ImageBatch
from lit_distill.image.distillation import Outputs, Shapes, stages
from lit_distill.image.losses.pairs import PairedFeature, PairedMaps
from lit_distill.losses import attention_transfer, hint_mse


class Hint(PairedFeature):
    """Mean squared error between a regressed student feature and the teacher's hint, see `lit_distill.losses.hint_mse`.

    Args:
        student_tap: Module name in the student (the guided layer); its middle stage if None.
        teacher_tap: Module name in the teacher (the hint layer); its middle stage if None.
    """

    name = "hint"

    def __init__(self, student_tap: str | None = None, teacher_tap: str | None = None) -> None:
        super().__init__(student_tap, teacher_tap)
        self.regressor: nn.Module = nn.Identity()

    def default_tap(self, network: nn.Module) -> str:
        """Returns a network's middle stage."""
        names = stages(network)
        return names[(len(names) - 1) // 2]

    def build(self, shapes: Shapes) -> None:
        """Makes the regressor from the student's to the teacher's shape."""
        self.regressor = hint_regressor(*self.pair_of_shapes(shapes))

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        own, target = self.pair(student, teacher)
        return hint_mse(self.regressor(own), target)


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

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        pairs = self.pairs(student, teacher)
        return torch.stack([attention_transfer(s, t, power=self.power) for s, t in pairs]).sum()
