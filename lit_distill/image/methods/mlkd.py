"""Multi-level logit distillation."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from lit_distill.core.reference import Reference
from lit_distill.core.schedules import Schedule
from lit_distill.image.distillation import ImageDistiller, Term
from lit_distill.image.losses.logits import MultiLevel


class MLKD(ImageDistiller):
    r"""The teacher's probabilities at several temperatures, its similarities of samples, and of classes.

    .. math:: L = \gamma \, \mathrm{CE}(y, z^s) + \alpha \sum_T \Big[
        \frac{T^2}{B} \sum_i \mathrm{KL}(p^t_i \,\|\, p^s_i)
        + \frac{1}{B} \lVert P^s {P^s}^\top - P^t {P^t}^\top \rVert_F^2
        + \frac{1}{K} \lVert {P^s}^\top P^s - {P^t}^\top P^t \rVert_F^2 \Big]

    This is the loss on one view of the images. The published numbers come from code that does more and other things:
    it adds a second, strongly augmented view (labels and sample-wise term, and the batch term); its confidence masks
    multiply a loss that is averaged already, which halves the term instead of leaving samples out; and on the second
    view temperatures 2 and 6 of the sample-wise term read the logits of the first.

    Args:
        student: The classifier to train.
        teacher: The frozen classifier.
        temperatures: The T summed over.
        unsure_only: Whether only samples and classes count of which the teacher is less sure than the median: what the
            masks of the public code are named for.
        standardize: Whether both networks' logits are standardized first.
        mlkd_weight: The alpha above.
        label_weight: The gamma above.
        kwargs: See `ImageDistiller` and `Distiller`.
    """

    reference = Reference(
        title="Multi-Level Logit Distillation",
        authors="Jin, Wang, Lin",
        year=2023,
    )

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0),
        unsure_only: bool = False,
        standardize: bool = False,
        mlkd_weight: float | Schedule = 0.9,
        label_weight: float | Schedule = 0.1,
        **kwargs: Any,
    ) -> None:
        loss = MultiLevel(temperatures, unsure_only, standardize)
        super().__init__(student, teacher, [Term(loss, mlkd_weight)], label_weight, **kwargs)
