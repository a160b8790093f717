"""Variational information distillation."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from lit_distill.core.reference import Reference
from lit_distill.core.schedules import Schedule
from lit_distill.image.distillation import ImageDistiller, Term
from lit_distill.image.losses.vid import VariationalInformation


class VID(ImageDistiller):
    r"""The student's maps predict the teacher's as Gaussians: a bound on the information that the two share.

    .. math:: L = \gamma \, \mathrm{CE}(y, z^s) + \beta \sum_i \mathrm{mean}\Big( \tfrac{1}{2} \Big[
        \frac{(\mu_i(f^s_i) - f^t_i)^2}{\sigma_i^2} + \log \sigma_i^2 \Big] \Big)

    The variances, one for each channel of the teacher, are parameters of the optimizer as the regressors are, weight
    decay included.

    Args:
        student: The classifier to train.
        teacher: The frozen classifier.
        student_taps: Module names, shallow to deep; the student's stages if None.
        teacher_taps: As many module names; the teacher's stages if None.
        vid_weight: The beta above.
        label_weight: The gamma above.
        kwargs: See `ImageDistiller` and `Distiller`.
    """

    reference = Reference(
        title="Variational Information Distillation for Knowledge Transfer",
        authors="Ahn, Hu, Damianou, Lawrence, Dai",
        year=2019,
        arxiv="1904.05835",
    )

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        student_taps: Sequence[str] | None = None,
        teacher_taps: Sequence[str] | None = None,
        vid_weight: float | Schedule = 1.0,
        label_weight: float | Schedule = 1.0,
        **kwargs: Any,
    ) -> None:
        loss = VariationalInformation(student_taps, teacher_taps)
        super().__init__(student, teacher, [Term(loss, vid_weight)], label_weight, **kwargs)
