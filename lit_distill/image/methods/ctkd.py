"""Curriculum temperature."""

from typing import Any

from torch import nn

from lit_distill.core.reference import Reference
from lit_distill.core.schedules import Schedule
from lit_distill.image.distillation import ImageDistiller, Term
from lit_distill.image.losses.logits import CurriculumTemperature


class CTKD(ImageDistiller):
    r"""KD at a temperature that is learned against the student: the lesson grows harder as it can.

    .. math:: \min_s \max_\theta \; \gamma \, \mathrm{CE}(y, z^s)
        + \alpha \, T(\theta)^2 \, \mathrm{KL}(p^t(T) \,\|\, p^s(T)), \qquad
        T = T_0 + R \, \mathrm{sigmoid}(\theta)

    One backward pass does both: theta's gradient is multiplied by a factor that goes from 0 to -1 along half a cosine
    over the first ten epochs, which is a schedule in the configuration.

    Args:
        student: The classifier to train.
        teacher: The frozen classifier.
        minimum: T_0. T begins at 15.6 and stays between T_0 and T_0 + R.
        span: The R above.
        reversal: Factor of theta's gradient, below 0.
        per_sample: Whether each sample has a temperature of its own, which a small perceptron reads off both networks'
            logits. Its size (K hidden units) and start (T near 15.6) are choices made here.
        standardize: Whether both networks' logits are standardized first.
        kd_weight: The alpha above.
        label_weight: The gamma above.
        kwargs: See `ImageDistiller` and `Distiller`.
    """

    reference = Reference(
        title="Curriculum Temperature for Knowledge Distillation",
        authors="Li, Li, Yang, Zhao, Song, Luo, Li, Yang",
        year=2022,
        arxiv="2211.16231",
    )

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        minimum: float = 1.0,
        span: float = 20.0,
        reversal: float | Schedule = -1.0,
        per_sample: bool = False,
        standardize: bool = False,
        kd_weight: float | Schedule = 0.9,
        label_weight: float | Schedule = 0.1,
        **kwargs: Any,
    ) -> None:
        loss = CurriculumTemperature(minimum, span, reversal, per_sample, standardize)
        super().__init__(student, teacher, [Term(loss, kd_weight)], label_weight, **kwargs)
