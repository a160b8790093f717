"""Relational knowledge distillation."""

from typing import Any

from torch import nn

from lit_distill.core.reference import Reference
from lit_distill.core.schedules import Schedule
from lit_distill.image.distillation import ImageDistiller, Term
from lit_distill.image.losses.relations import RelationalKD


class RKD(ImageDistiller):
    r"""Distances between samples, and angles between three of them, follow the teacher's.

    .. math:: L = \gamma \, \mathrm{CE}(y, z^s) + \beta \, \big[ 25 \, \tfrac{1}{B^2} \sum_{ij} \ell(d^s_{ij}, d^t_{ij})
        + 50 \, \tfrac{1}{B^3} \sum_{ijk} \ell(a^s_{ijk}, a^t_{ijk}) \big]

    d are the distances of embeddings in units of their mean, a the cosines of the angles at sample i, and l the Huber
    loss. The angles of a batch are B^3 numbers. Under DDP each process relates the samples of its own share of
    the batch.

    Args:
        student: The classifier to train.
        teacher: The frozen classifier.
        student_tap: Module name; what the student calls its penultimate layer if None. A map is averaged to a vector.
        teacher_tap: The same in the teacher.
        distance_weight: The 25 above.
        angle_weight: The 50 above.
        rkd_weight: The beta above.
        label_weight: The gamma above.
        kwargs: See `ImageDistiller` and `Distiller`.
    """

    reference = Reference(
        title="Relational Knowledge Distillation",
        authors="Park, Kim, Lu, Cho",
        year=2019,
        arxiv="1904.05068",
    )

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        student_tap: str | None = None,
        teacher_tap: str | None = None,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
        rkd_weight: float | Schedule = 1.0,
        label_weight: float | Schedule = 1.0,
        **kwargs: Any,
    ) -> None:
        loss = RelationalKD(student_tap, teacher_tap, distance_weight, angle_weight)
        super().__init__(student, teacher, [Term(loss, rkd_weight)], label_weight, **kwargs)
