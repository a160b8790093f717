"""Inter-channel correlation."""

from typing import Any

from torch import nn

from lit_distill.core.reference import Reference
from lit_distill.core.schedules import Schedule
from lit_distill.image.distillation import ImageDistiller, Term
from lit_distill.image.losses.relations import ChannelCorrelation


class ICKD(ImageDistiller):
    r"""Channels that the teacher finds alike shall be alike in the student: the classification form, ICKD-C.

    .. math:: L = \gamma \, \mathrm{CE}(y, z^s) + \beta \, \tfrac{1}{C}
        \lVert N(r(F^s) \, r(F^s)^\top) - N(F^t {F^t}^\top) \rVert_F^2

    F (C, H W) are the last maps, one row per channel; r carries the student's to the teacher's number of channels; N
    brings rows to unit length. For the variant with KL, add the term `LogitKL` of weight 1 in `Combined`.

    Args:
        student: The classifier to train.
        teacher: The frozen classifier.
        student_tap: Module name of a map; the student's last stage if None.
        teacher_tap: The same in the teacher.
        ickd_weight: The beta above.
        label_weight: The gamma above.
        kwargs: See `ImageDistiller` and `Distiller`.
    """

    reference = Reference(
        title="Exploring Inter-Channel Correlation for Diversity-preserved Knowledge Distillation",
        authors="Liu, Huang, Lin, Xie, Wang, Chang, Liang",
        year=2021,
        arxiv="2202.03680",
    )

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        student_tap: str | None = None,
        teacher_tap: str | None = None,
        ickd_weight: float | Schedule = 2.5,
        label_weight: float | Schedule = 1.0,
        **kwargs: Any,
    ) -> None:
        loss = ChannelCorrelation(student_tap, teacher_tap)
        super().__init__(student, teacher, [Term(loss, ickd_weight)], label_weight, **kwargs)
