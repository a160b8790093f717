"""Activation boundaries."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.projectors import connector
from lit_distill.image.data import ImageBatch
from lit_distill.image.distillation import Outputs, Shapes, pre_activations
from lit_distill.image.losses.pairs import PairedMaps
from lit_distill.losses.maps import activation_boundary


class ActivationBoundary(PairedMaps):
    """Student neurons on the teacher's side of zero, see `lit_distill.losses.maps.activation_boundary`.

    The deepest tap counts 1, the one before 1/2, then 1/4. Connectors of a convolution and BatchNorm carry the
    student's maps into the teacher's shape; they are trained with it.

    Args:
        student_taps: Module names in the student, shallow to deep, before activations; what it names if None.
        teacher_taps: As many in the teacher; what it names if None.
        margin: How far beyond zero a neuron has to be.
    """

    name = "ab"

    def __init__(
        self,
        student_taps: Sequence[str] | None = None,
        teacher_taps: Sequence[str] | None = None,
        margin: float = 1.0,
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        self.margin = margin
        self.connectors = nn.ModuleList()

    def default_taps(self, network: nn.Module) -> tuple[str, ...]:
        """Returns a network's stages before their activations."""
        return pre_activations(network)

    def build(self, shapes: Shapes) -> None:
        """Makes the connectors."""
        self.connectors.extend(connector(student, teacher) for student, teacher in self.pairs_of_shapes(shapes))

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        pairs = zip(self.connectors, self.pairs(student, teacher), strict=True)
        values = [activation_boundary(connect(s), t, margin=self.margin) for connect, (s, t) in pairs]
        return torch.stack([value / 2**depth for depth, value in enumerate(reversed(values))]).sum()
