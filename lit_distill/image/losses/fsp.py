"""Flow of solution procedure."""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.image.data import ImageBatch
from lit_distill.image.distillation import Outputs, Shapes, stages
from lit_distill.image.losses.pairs import PairedMaps
from lit_distill.losses.maps import flow_of_solution


class FlowOfSolution(PairedMaps):
    """Sum over neighbouring taps of the difference of FSP matrices, see `lit_distill.losses.maps.flow_of_solution`.

    Args:
        student_taps: Module names in the student, shallow to deep, two or more; if None what its first stage is given
            and its stages, so that each stage's flow is there.
        teacher_taps: As many in the teacher, with as many channels; the same if None.
    """

    name = "fsp"

    def default_taps(self, network: nn.Module) -> tuple[str, ...]:
        """Returns the input of a network's first stage and its stages."""
        names = stages(network)
        return (f"{names[0]}@input", *names)

    def build(self, shapes: Shapes) -> None:
        """Checks that the channels agree, and that there is a flow at all."""
        pairs = self.pairs_of_shapes(shapes)
        if len(pairs) < 2:
            raise UsageError("fsp: it compares neighbouring maps of a network and got one; give 2 student_taps or more")
        for student, teacher in pairs:
            if student[0] != teacher[0]:
                raise UsageError(
                    f"fsp: student feature {student} and teacher feature {teacher} differ in channels, so their FSP "
                    "matrices do too; give networks of equal widths, student_taps and teacher_taps with equal "
                    "channels, or a method with projectors such as VID"
                )

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        neighbours = pairwise(self.pairs(student, teacher))
        return torch.stack([flow_of_solution(s1, s2, t1, t2) for (s1, t1), (s2, t2) in neighbours]).sum()
