"""Similarity-preserving distillation."""

from typing import Any

from torch import nn

from lit_distill.core.reference import Reference
from lit_distill.core.schedules import Schedule
from lit_distill.image.distillation import ImageDistiller, Term
from lit_distill.image.losses.relations import SimilarityPreserving


class SP(ImageDistiller):
    r"""Samples that the teacher finds alike shall be alike to the student.

    .. math:: L = \gamma \, \mathrm{CE}(y, z^s) + \beta \, \tfrac{1}{B^2}
        \lVert N(F^s {F^s}^\top) - N(F^t {F^t}^\top) \rVert_F^2

    F (B, C H W) are the last maps of a batch, one row per sample; N brings rows to unit length. Under DDP each process
    compares the samples of its own share of the batch.

    Args:
        student: The classifier to train.
        teacher: The frozen classifier.
        student_tap: Module name, of any output shape; the student's last stage if None.
        teacher_tap: The same in the teacher.
        sp_weight: The beta above.
        label_weight: The gamma above.
        kwargs: See `ImageDistiller` and `Distiller`.
    """

    reference = Reference(
        title="Similarity-Preserving Knowledge Distillation",
        authors="Tung, Mori",
        year=2019,
        arxiv="1907.09682",
    )

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        student_tap: str | None = None,
        teacher_tap: str | None = None,
        sp_weight: float | Schedule = 3000.0,
        label_weight: float | Schedule = 1.0,
        **kwargs: Any,
    ) -> None:
        loss = SimilarityPreserving(student_tap, teacher_tap)
        super().__init__(student, teacher, [Term(loss, sp_weight)], label_weight, **kwargs)
