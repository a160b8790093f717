"""One for all."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from lit_distill.core.reference import Reference
from lit_distill.core.schedules import Schedule
from lit_distill.image.distillation import ImageDistiller, Term
from lit_distill.image.losses.exits import OneForAll, OneForAllLogits


class OFA(ImageDistiller):
    r"""Exits at the student's stages learn from the teacher's logits, whatever the two networks are made of.

    .. math:: L = \gamma \, \mathrm{CE}(y, z^s) + w_{kd} \, \mathrm{OFA}(z^s, z^t)
        + w_{ofa} \sum_i \mathrm{OFA}(g_i(f^s_i), z^t)

    with OFA as in `lit_distill.losses.exits.one_for_all` and the exits g as in `lit_distill.image.losses.exits`. The
    terms are logged as `ofa_logits` and `ofa`.

    Args:
        student: The classifier to train: maps or tokens at its stages.
        teacher: The frozen classifier, of any kind.
        student_taps: Module names, shallow to deep; the student's stages if None.
        teacher_tap: The teacher's embedding, of which only the width is asked; its penultimate layer if None.
        exponent: epsilon, 1 or more: how much the labelled class is enhanced. Weaker teachers want a larger one.
        temperature: T.
        kd_weight: The weight of the student's own logits above.
        ofa_weight: The weight of the exits above.
        label_weight: The gamma above.
        kwargs: See `ImageDistiller` and `Distiller`.
    """

    reference = Reference(
        title="One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation",
        authors="Hao, Guo, Han, Tang, Hu, Wang, Xu",
        year=2023,
        arxiv="2310.19444",
    )

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        student_taps: Sequence[str] | None = None,
        teacher_tap: str | None = None,
        exponent: float = 1.0,
        temperature: float = 1.0,
        kd_weight: float | Schedule = 1.0,
        ofa_weight: float | Schedule = 1.0,
        label_weight: float | Schedule = 1.0,
        **kwargs: Any,
    ) -> None:
        terms = [
            Term(OneForAllLogits(exponent, temperature), kd_weight),
            Term(OneForAll(student_taps, teacher_tap, exponent, temperature), ofa_weight),
        ]
        super().__init__(student, teacher, terms, label_weight, **kwargs)
