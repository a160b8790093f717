"""Any weighted list of losses, written in YAML."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from lit_distill.core.schedules import Schedule
from lit_distill.image.distillation import ImageDistiller, Term


class Combined(ImageDistiller):
    """Labels plus whatever terms the configuration lists: "KD + AT" is a file, not a class.

    Args:
        student: The classifier to train.
        teacher: The frozen classifier.
        terms: Losses with weights.
        label_weight: Weight of the cross-entropy on labels.
        kwargs: See `ImageDistiller` and `Distiller`.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        terms: Sequence[Term],
        label_weight: float | Schedule = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, terms, label_weight, **kwargs)
