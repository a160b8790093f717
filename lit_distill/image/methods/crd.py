"""Contrastive representation distillation."""

from typing import Any

from torch import nn

from lit_distill.core.reference import Reference
from lit_distill.core.schedules import Schedule
from lit_distill.image.distillation import ImageDistiller, Term
from lit_distill.image.losses.contrastive import ContrastiveRepresentation


class CRD(ImageDistiller):
    r"""An embedding of one network finds the other's of the same sample among those of other classes.

    .. math:: L = \gamma \, \mathrm{CE}(y, z^s) - \beta \, \tfrac{1}{B} \sum
        \Big[ \log h(s_0) + \sum_{k=1}^{K} \log(1 - h(s_k)) \Big], \qquad
        h(s) = \frac{e^{s / \tau} / Z}{e^{s / \tau} / Z + K / N}

    summed over both directions: the student's embeddings against a memory of the teacher's, and the reverse. For
    "CRD + KD", list `ContrastiveRepresentation` and `LogitKL` in `Combined`.

    Args:
        student: The classifier to train.
        teacher: The frozen classifier.
        student_tap: Module name; what the student calls its penultimate layer if None. A map is averaged to a vector.
        teacher_tap: The same in the teacher.
        dimensions: Width of the embeddings.
        negatives: K; may exceed the size of the training set.
        temperature: tau.
        momentum: Share of a memory's row that stays in an update.
        crd_weight: The beta above.
        label_weight: The gamma above.
        kwargs: See `ImageDistiller` and `Distiller`.
    """

    reference = Reference(
        title="Contrastive Representation Distillation",
        authors="Tian, Krishnan, Isola",
        year=2019,
        arxiv="1910.10699",
    )

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        student_tap: str | None = None,
        teacher_tap: str | None = None,
        dimensions: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        crd_weight: float | Schedule = 0.8,
        label_weight: float | Schedule = 1.0,
        **kwargs: Any,
    ) -> None:
        loss = ContrastiveRepresentation(student_tap, teacher_tap, dimensions, negatives, temperature, momentum)
        super().__init__(student, teacher, [Term(loss, crd_weight)], label_weight, **kwargs)
        # DDP would send both memories to all processes in every step. They are the same there already.
        self._ddp_params_and_buffers_to_ignore = [f"losses.crd.{name}" for name in loss.shared]
