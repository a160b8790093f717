"""Decoupled knowledge distillation."""

from typing import Any

from torch import nn

from lit_distill.core.reference import Reference
from lit_distill.core.schedules import Schedule
from lit_distill.image.distillation import ImageDistiller, Term
from lit_distill.image.losses.logits import DecoupledKL


class DKD(ImageDistiller):
    r"""What the teacher says of the labeled class and of the others, with weights of their own.

    .. math:: L = \gamma \, \mathrm{CE}(y, z^s)
        + w \, T^2 \big[ \alpha \, \mathrm{KL}(b^t \,\|\, b^s) + \beta \, \mathrm{KL}(n^t \,\|\, n^s) \big]

    The published runs let w rise from 1/20 to 1 over the first 20 epochs: a schedule in the configuration. With
    standardized logits, w is 9 there (the same for `LS`).

    Args:
        student: The classifier to train.
        teacher: The frozen classifier.
        temperature: T.
        alpha: Weight of the labeled class against the rest.
        beta: Weight of the other classes; tuned per pair, 2 for the small ResNets and up to 8.
        standardize: Whether both networks' logits are standardized first.
        dkd_weight: The w above.
        label_weight: The gamma above.
        kwargs: See `ImageDistiller` and `Distiller`.
    """

    reference = Reference(
        title="Decoupled Knowledge Distillation",
        authors="Zhao, Cui, Song, Qiu, Liang",
        year=2022,
        arxiv="2203.08679",
    )

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        temperature: float | Schedule = 4.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        standardize: bool = False,
        dkd_weight: float | Schedule = 1.0,
        label_weight: float | Schedule = 1.0,
        **kwargs: Any,
    ) -> None:
        loss = DecoupledKL(temperature, alpha, beta, standardize)
        super().__init__(student, teacher, [Term(loss, dkd_weight)], label_weight, **kwargs)
