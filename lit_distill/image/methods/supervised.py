"""Training on labels alone: how teachers are made, and the baseline of every comparison."""

from typing import Any

from torch import nn

from lit_distill.image.distillation import ImageDistiller


class Supervised(ImageDistiller):
    """Cross-entropy on labels, no teacher.

    Args:
        student: The classifier to train.
        kwargs: See `Distiller`.
    """

    def __init__(self, student: nn.Module, **kwargs: Any) -> None:
        super().__init__(student, **kwargs)
