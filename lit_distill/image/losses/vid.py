"""Variational information distillation."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.projectors import variational_regressor
from lit_distill.image.data import ImageBatch
from lit_distill.image.distillation import Outputs, Shapes
from lit_distill.image.losses.pairs import PairedMaps
from lit_distill.losses.maps import on_smaller_grid, variational_information

INITIAL_VARIANCE = 5.0
LEAST_VARIANCE = 1e-5


class VariationalInformation(PairedMaps):
    """Sum over stages of a Gaussian negative log-likelihood, see `lit_distill.losses.maps.variational_information`.

    Regressors and variances are trained with the student. A variance is softplus(a) + 1e-5, one a for each channel of
    the teacher, and starts at 5. Maps of different grids are average-pooled to the smaller one.

    Args:
        student_taps: Module names in the student, shallow to deep; its stages if None.
        teacher_taps: As many in the teacher; its stages if None.
    """

    name = "vid"

    def __init__(self, student_taps: Sequence[str] | None = None, teacher_taps: Sequence[str] | None = None) -> None:
        super().__init__(student_taps, teacher_taps)
        self.regressors = nn.ModuleList()
        self.scales = nn.ParameterList()

    def build(self, shapes: Shapes) -> None:
        """Makes regressors and variances."""
        start = math.log(math.expm1(INITIAL_VARIANCE - LEAST_VARIANCE))
        for student, teacher in self.pairs_of_shapes(shapes):
            self.regressors.append(variational_regressor(student[0], teacher[0]))
            self.scales.append(nn.Parameter(torch.full((teacher[0],), start)))

    def variance(self, stage: int) -> Float[Tensor, " c"]:
        """Returns the variances of a stage's channels."""
        return F.softplus(self.scales[stage]) + LEAST_VARIANCE

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        values = []
        for stage, pair in enumerate(self.pairs(student, teacher)):
            own, target = on_smaller_grid(*pair)
            values.append(variational_information(self.regressors[stage](own), target, self.variance(stage)))
        return torch.stack(values).sum()
