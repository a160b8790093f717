"""Correlation congruence."""

from typing import Any

from torch import nn

from lit_distill.core.reference import Reference
from lit_distill.core.schedules import Schedule
from lit_distill.image.distillation import ImageDistiller, Term
from lit_distill.image.losses.relations import CorrelationCongruence


class CC(ImageDistiller):
    r"""Products of neighboring samples' embedding differences, as the published comparisons compute it.

    .. math:: L = \gamma \, \mathrm{CE}(y, z^s) + \beta \, \tfrac{1}{B - 1}
        \sum_i \langle |\delta_i|, |\delta_{i+1}| \rangle, \qquad \delta = e^s - e^t

    e are trained linear embeddings of both networks' features. The paper compares correlations of samples under a
    Gaussian kernel: that is the loss `KernelCongruence`, for `Combined`. Under DDP each process relates the samples of
    its own share of the batch.

    Args:
        student: The classifier to train.
        teacher: The frozen classifier.
        student_tap: Module name; what the student calls its penultimate layer if None. A map is averaged to a vector.
        teacher_tap: The same in the teacher.
        dimensions: Width of the embeddings.
        cc_weight: The beta above.
        label_weight: The gamma above.
        kwargs: See `ImageDistiller` and `Distiller`.
    """

    reference = Reference(
        title="Correlation Congruence for Knowledge Distillation",
        authors="Peng, Jin, Liu, Zhou, Wu, Liu, Li, Zhang",
        year=2019,
        arxiv="1904.01802",
    )

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        student_tap: str | None = None,
        teacher_tap: str | None = None,
        dimensions: int = 128,
        cc_weight: float | Schedule = 0.02,
        label_weight: float | Schedule = 1.0,
        **kwargs: Any,
    ) -> None:
        loss = CorrelationCongruence(student_tap, teacher_tap, dimensions)
        super().__init__(student, teacher, [Term(loss, cc_weight)], label_weight, **kwargs)
