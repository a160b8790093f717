"""Attention transfer."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from lit_distill.core.reference import Reference
from lit_distill.core.schedules import Schedule
from lit_distill.image.distillation import ImageDistiller, Term
from lit_distill.image.losses.maps import AttentionTransfer


class AT(ImageDistiller):
    r"""Spatial attention maps of the student follow the teacher's, stage by stage.

    .. math:: L = \gamma \, \mathrm{CE}(y, z^s) + \beta \sum_i \tfrac{1}{HW} \lVert Q(f^s_i) - Q(f^t_i) \rVert_2^2

    Args:
        student: The classifier to train.
        teacher: The frozen classifier.
        student_taps: Module names, shallow to deep; the student's stages if None.
        teacher_taps: As many module names; the teacher's stages if None.
        at_weight: The beta above.
        label_weight: The gamma above.
        kwargs: See `ImageDistiller` and `Distiller`.
    """

    reference = Reference(
        title="Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks via "
        "Attention Transfer",
        authors="Zagoruyko, Komodakis",
        year=2016,
        arxiv="1612.03928",
    )

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        student_taps: Sequence[str] | None = None,
        teacher_taps: Sequence[str] | None = None,
        at_weight: float | Schedule = 1000.0,
        label_weight: float | Schedule = 1.0,
        **kwargs: Any,
    ) -> None:
        loss = AttentionTransfer(student_taps, teacher_taps)
        super().__init__(student, teacher, [Term(loss, at_weight)], label_weight, **kwargs)
