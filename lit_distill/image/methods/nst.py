"""Neuron selectivity transfer."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from lit_distill.core.reference import Reference
from lit_distill.core.schedules import Schedule
from lit_distill.image.distillation import ImageDistiller, Term
from lit_distill.image.losses.relations import NeuronSelectivity


class NST(ImageDistiller):
    r"""The set of the student's channels has the distribution of the teacher's, stage by stage.

    .. math:: L = \gamma \, \mathrm{CE}(y, z^s) + \beta \sum_i
        \Big\lVert \tfrac{1}{C_s} {U^s_i}^\top U^s_i - \tfrac{1}{C_t} {U^t_i}^\top U^t_i \Big\rVert_F^2

    U (C, H W) holds one channel per row, at unit length. The term is the squared maximum mean discrepancy under the
    kernel <a, b>^2.

    Args:
        student: The classifier to train.
        teacher: The frozen classifier.
        student_taps: Module names of maps, shallow to deep; the student's stages if None.
        teacher_taps: As many in the teacher; its stages if None.
        nst_weight: The beta above.
        label_weight: The gamma above.
        kwargs: See `ImageDistiller` and `Distiller`.
    """

    reference = Reference(
        title="Like What You Like: Knowledge Distill via Neuron Selectivity Transfer",
        authors="Huang, Wang",
        year=2017,
        arxiv="1707.01219",
    )

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        student_taps: Sequence[str] | None = None,
        teacher_taps: Sequence[str] | None = None,
        nst_weight: float | Schedule = 50.0,
        label_weight: float | Schedule = 1.0,
        **kwargs: Any,
    ) -> None:
        loss = NeuronSelectivity(student_taps, teacher_taps)
        super().__init__(student, teacher, [Term(loss, nst_weight)], label_weight, **kwargs)
