"""Overhaul of feature distillation."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from lit_distill.core.reference import Reference
from lit_distill.core.schedules import Schedule
from lit_distill.image.distillation import ImageDistiller, Term
from lit_distill.image.losses.ofd import FeatureOverhaul


class OFD(ImageDistiller):
    r"""Maps before their ReLU follow the teacher's, cut off at a negative margin, where the difference matters.

    .. math:: L = \gamma \, \mathrm{CE}(y, z^s) + \beta \sum_{i=1}^{L} 2^{i-L} \,
        d_p\big(r_i(f^s_i), \max(f^t_i, m_i)\big)

    d_p is the partial distance of `lit_distill.losses.maps.partial_l2`, r the connectors.

    Args:
        student: The classifier to train.
        teacher: The frozen classifier.
        student_taps: Module names, shallow to deep, before activations; what the student names if None.
        teacher_taps: As many module names; what the teacher names if None.
        teacher_norms: Module names of the teacher's BatchNorm before each tap; found by itself if None.
        margins: The m above, one for each teacher tap, for teachers without BatchNorm; from the norms if None.
        ofd_weight: The beta above.
        label_weight: The gamma above.
        kwargs: See `ImageDistiller` and `Distiller`.
    """

    reference = Reference(
        title="A Comprehensive Overhaul of Feature Distillation",
        authors="Heo, Kim, Yun, Park, Kwak, Choi",
        year=2019,
        arxiv="1904.01866",
    )

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        student_taps: Sequence[str] | None = None,
        teacher_taps: Sequence[str] | None = None,
        teacher_norms: Sequence[str] | None = None,
        margins: Sequence[float] | None = None,
        ofd_weight: float | Schedule = 0.001,
        label_weight: float | Schedule = 1.0,
        **kwargs: Any,
    ) -> None:
        loss = FeatureOverhaul(student_taps, teacher_taps, teacher_norms, margins)
        super().__init__(student, teacher, [Term(loss, ofd_weight)], label_weight, **kwargs)
