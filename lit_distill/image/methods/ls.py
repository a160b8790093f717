"""Logit standardization."""

from typing import Any

from torch import nn

from lit_distill.core.reference import Reference
from lit_distill.core.schedules import Schedule
from lit_distill.image.distillation import ImageDistiller, Term
from lit_distill.image.losses.logits import LogitKL


class LS(ImageDistiller):
    r"""KD of standardized logits: the student is free in the shift and scale of its own.

    .. math:: L = \gamma \, \mathrm{CE}(y, z^s) + \alpha \, T^2 \, \mathrm{KL}(p^t(T) \,\|\, p^s(T)), \qquad
        p(T) = \mathrm{softmax}\Big(\frac{z - \bar z}{T \, \sigma(z)}\Big)

    `DKD`, `MLKD` and `CTKD` take the same transform as `standardize`.

    Args:
        student: The classifier to train.
        teacher: The frozen classifier.
        temperature: T; tuned per pair in the paper, 2 to 4.
        kd_weight: The alpha above; tuned per pair, 6 to 18.
        label_weight: The gamma above.
        kwargs: See `ImageDistiller` and `Distiller`.
    """

    reference = Reference(
        title="Logit Standardization in Knowledge Distillation",
        authors="Sun, Ren, Li, Wang, Cao",
        year=2024,
        arxiv="2403.01427",
    )

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        temperature: float | Schedule = 2.0,
        kd_weight: float | Schedule = 9.0,
        label_weight: float | Schedule = 0.1,
        **kwargs: Any,
    ) -> None:
        loss = LogitKL(temperature, standardize=True)
        super().__init__(student, teacher, [Term(loss, kd_weight)], label_weight, **kwargs)
