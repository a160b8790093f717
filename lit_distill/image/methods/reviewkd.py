"""Knowledge review."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from lit_distill.core.reference import Reference
from lit_distill.core.schedules import Schedule
from lit_distill.image.distillation import ImageDistiller, Term
from lit_distill.image.losses.review import KnowledgeReview


class ReviewKD(ImageDistiller):
    r"""Each level of the teacher teaches the student's level and, through fusion, all deeper ones.

    .. math:: L = \gamma \, \mathrm{CE}(y, z^s) + \beta \sum_{i=1}^{L} \mathrm{HCL}(U_i(f^s_i, \dots, f^s_L), f^t_i)

    U is a chain of attention based fusions from deep to shallow, HCL
    `lit_distill.losses.maps.hierarchical_context`.

    Args:
        student: The classifier to train.
        teacher: The frozen classifier.
        student_taps: Module names, shallow to deep and then the embedding; stages and penultimate layer if None.
        teacher_taps: As many module names; the teacher's maps before activations and its penultimate layer if None.
        max_mid_channels: Most channels of the fused maps.
        review_weight: The beta above; published per pair of networks, and with a linear warm-up of 20 epochs.
        label_weight: The gamma above.
        kwargs: See `ImageDistiller` and `Distiller`.
    """

    reference = Reference(
        title="Distilling Knowledge via Knowledge Review",
        authors="Chen, Liu, Zhao, Jia",
        year=2021,
        arxiv="2104.09044",
    )

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        student_taps: Sequence[str] | None = None,
        teacher_taps: Sequence[str] | None = None,
        max_mid_channels: int = 512,
        review_weight: float | Schedule = 1.0,
        label_weight: float | Schedule = 1.0,
        **kwargs: Any,
    ) -> None:
        loss = KnowledgeReview(student_taps, teacher_taps, max_mid_channels)
        super().__init__(student, teacher, [Term(loss, review_weight)], label_weight, **kwargs)
