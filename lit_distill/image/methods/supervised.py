"""Training on labels alone: how teachers are made, and the baseline of every comparison."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.core.schedules import value_at
from lit_distill.image.data import ImageBatch
from lit_distill.image.distillation import ImageDistiller


class Supervised(ImageDistiller):
    """Cross-entropy on labels, no teacher.

    Args:
        student: The classifier to train.
        temperature: Divisor of the logits in training, T; evaluation is at 1. Above 1 it makes the teacher of
            defensive distillation (Papernot et al., 2015, arXiv 1511.04508). The gradient is 1/T of the usual one to
            begin with, which plain SGD feels and Adam does not.
        kwargs: See `Distiller`.
    """

    def __init__(self, student: nn.Module, temperature: float = 1.0, **kwargs: Any) -> None:
        super().__init__(student, **kwargs)
        if temperature <= 0:
            raise UsageError(f"model.temperature is {temperature}; it must be above 0 (1 for ordinary training)")
        self.temperature = temperature

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Labels, at the temperature."""
        weight = value_at(self.label_weight, self.iteration)
        if self.temperature == 1.0 or not weight:
            return super().training_step(batch, batch_idx)
        logits = self.student(batch.images).float()
        return self.combine({"ce": weight * F.cross_entropy(logits / self.temperature, batch.labels)})
