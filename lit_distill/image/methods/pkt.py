"""Probabilistic knowledge transfer."""

from typing import Any

from torch import nn

from lit_distill.core.reference import Reference
from lit_distill.core.schedules import Schedule
from lit_distill.image.distillation import ImageDistiller, Term
from lit_distill.image.losses.relations import ProbabilisticTransfer


class PKT(ImageDistiller):
    r"""The probabilities that one sample has another as its neighbor follow the teacher's.

    .. math:: L = \gamma \, \mathrm{CE}(y, z^s) + \beta \, \tfrac{1}{B^2} \sum_{ij} q_{ij} \log \frac{q_{ij}}{p_{ij}},
        \qquad p_{ij} = \frac{1 + \cos(f_i, f_j)}{\sum_k 1 + \cos(f_i, f_k)}

    p is the student's and q the teacher's. The mean over all pairs is why the weight is so large. Under DDP each
    process relates the samples of its own share of the batch.

    Args:
        student: The classifier to train.
        teacher: The frozen classifier.
        student_tap: Module name; what the student calls its penultimate layer if None. A map is averaged to a vector.
        teacher_tap: The same in the teacher.
        pkt_weight: The beta above.
        label_weight: The gamma above.
        kwargs: See `ImageDistiller` and `Distiller`.
    """

    reference = Reference(
        title="Learning Deep Representations with Probabilistic Knowledge Transfer",
        authors="Passalis, Tefas",
        year=2018,
        arxiv="1803.10837",
    )

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        student_tap: str | None = None,
        teacher_tap: str | None = None,
        pkt_weight: float | Schedule = 30000.0,
        label_weight: float | Schedule = 1.0,
        **kwargs: Any,
    ) -> None:
        loss = ProbabilisticTransfer(student_tap, teacher_tap)
        super().__init__(student, teacher, [Term(loss, pkt_weight)], label_weight, **kwargs)
