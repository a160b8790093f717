"""Distillation from a stronger teacher."""

from typing import Any

from torch import nn

from lit_distill.core.reference import Reference
from lit_distill.core.schedules import Schedule
from lit_distill.image.distillation import ImageDistiller, Term
from lit_distill.image.losses.logits import PearsonRelation


class DIST(ImageDistiller):
    r"""Probabilities correlated with the teacher's, between the classes of a sample and between the samples of a class.

    .. math:: L = \delta \, \mathrm{CE}(y, z^s) + w \, \tau^2 \Big[
        \beta \Big(1 - \frac{1}{B} \sum_i \rho(p^s_{i \cdot}, p^t_{i \cdot})\Big)
        + \gamma \Big(1 - \frac{1}{K} \sum_k \rho(p^s_{\cdot k}, p^t_{\cdot k})\Big) \Big]

    Args:
        student: The classifier to train.
        teacher: The frozen classifier.
        temperature: tau; 4 for CIFAR, 1 for ImageNet.
        inter_weight: The beta above.
        intra_weight: The gamma above.
        dist_weight: The w above.
        label_weight: The delta above.
        kwargs: See `ImageDistiller` and `Distiller`.
    """

    reference = Reference(
        title="Knowledge Distillation from A Stronger Teacher",
        authors="Huang, You, Wang, Qian, Xu",
        year=2022,
        arxiv="2205.10536",
    )

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        temperature: float | Schedule = 4.0,
        inter_weight: float = 1.0,
        intra_weight: float = 1.0,
        dist_weight: float | Schedule = 2.0,
        label_weight: float | Schedule = 1.0,
        **kwargs: Any,
    ) -> None:
        loss = PearsonRelation(temperature, inter_weight, intra_weight)
        super().__init__(student, teacher, [Term(loss, dist_weight)], label_weight, **kwargs)
