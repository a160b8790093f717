"""FitNets: hints from a teacher's middle layer."""

from typing import Any

from torch import nn

from lit_distill.core.reference import Reference
from lit_distill.core.schedules import Schedule
from lit_distill.image.distillation import ImageDistiller, Term
from lit_distill.image.losses.maps import Hint


class FitNets(ImageDistiller):
    r"""A regressor carries a student feature into the teacher's shape, where it is matched.

    .. math:: L = \gamma \, \mathrm{CE}(y, z^s) + \beta \, \mathrm{MSE}(r(f^s), f^t)

    In one stage, as later comparisons do it. The paper first trains the lower half on the hint, then distils logits:
    that is a recipe of two runs.

    Args:
        student: The classifier to train.
        teacher: The frozen classifier.
        student_tap: Guided layer, a module name; the middle stage if None.
        teacher_tap: Hint layer, a module name; the middle stage if None.
        hint_weight: The beta above.
        label_weight: The gamma above.
        kwargs: See `ImageDistiller` and `Distiller`.
    """

    reference = Reference(
        title="FitNets: Hints for Thin Deep Nets",
        authors="Romero, Ballas, Kahou, Chassang, Gatta, Bengio",
        year=2014,
        arxiv="1412.6550",
    )

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        student_tap: str | None = None,
        teacher_tap: str | None = None,
        hint_weight: float | Schedule = 100.0,
        label_weight: float | Schedule = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, [Term(Hint(student_tap, teacher_tap), hint_weight)], label_weight, **kwargs)
