"""Vanilla knowledge distillation."""

from typing import Any

from torch import nn

from lit_distill.core.reference import Reference
from lit_distill.core.schedules import Schedule
from lit_distill.image.distillation import ImageDistiller, Term
from lit_distill.image.losses.logits import LogitKL


class KD(ImageDistiller):
    r"""Softened logits of a frozen teacher as targets.

    .. math:: L = \gamma \, \mathrm{CE}(y, z^s) + \alpha \, T^2 \, \mathrm{KL}(p^t(T) \,\|\, p^s(T))

    Args:
        student: The classifier to train.
        teacher: The frozen classifier.
        temperature: T.
        kd_weight: The alpha above.
        label_weight: The gamma above.
        kwargs: See `ImageDistiller` and `Distiller`.
    """

    reference = Reference(
        title="Distilling the Knowledge in a Neural Network",
        authors="Hinton, Vinyals, Dean",
        year=2015,
        arxiv="1503.02531",
    )

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        temperature: float | Schedule = 4.0,
        kd_weight: float | Schedule = 0.9,
        label_weight: float | Schedule = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, [Term(LogitKL(temperature), kd_weight)], label_weight, **kwargs)
