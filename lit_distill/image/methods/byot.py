"""Be your own teacher."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from lit_distill.core.reference import Reference
from lit_distill.core.schedules import Schedule
from lit_distill.image.distillation import ImageDistiller, Term
from lit_distill.image.losses.exits import SelfDistillation


class BYOT(ImageDistiller):
    r"""The deepest classifier of a network teaches exits at its shallower stages; there is no other teacher.

    .. math:: L = \gamma \, \mathrm{CE}(y, z_C) + w \sum_{i<C} \big[ (1 - \alpha) \, \mathrm{CE}(y, z_i)
        + \alpha \, \mathrm{KL}(p_C(T) \,\|\, p_i(T)) + \lambda \lVert F_i - F_C \rVert_2^2 \big]

    The student is the network as it is used, with its deepest classifier C; the exits are left behind after training.
    The paper does not give alpha, lambda and T. Alpha and T are those of the authors' later code; lambda is that of a
    public implementation of the paper, 1e-6 for the sum over a batch of 128, as a weight of the mean over samples.

    Args:
        student: The classifier to train.
        student_taps: Module names, shallow to deep; all stages but the last if None.
        embedding_tap: What the student's head reads; its penultimate layer if None.
        distillation_weight: The alpha above, 0 to 1.
        feature_weight: The lambda above.
        temperature: T.
        exit_weight: The w above.
        label_weight: The gamma above.
        kwargs: See `Distiller`.
    """

    reference = Reference(
        title="Be Your Own Teacher: Improve the Performance of Convolutional Neural Networks via Self Distillation",
        authors="Zhang, Song, Gao, Chen, Bao, Ma",
        year=2019,
        arxiv="1905.08094",
    )

    def __init__(
        self,
        student: nn.Module,
        student_taps: Sequence[str] | None = None,
        embedding_tap: str | None = None,
        distillation_weight: float = 0.3,
        feature_weight: float = 1e-4,
        temperature: float = 3.0,
        exit_weight: float | Schedule = 1.0,
        label_weight: float | Schedule = 1.0,
        **kwargs: Any,
    ) -> None:
        loss = SelfDistillation(student_taps, embedding_tap, distillation_weight, feature_weight, temperature)
        super().__init__(student, None, [Term(loss, exit_weight)], label_weight, **kwargs)
