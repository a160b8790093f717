"""Defensive distillation."""

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.core.reference import Reference
from lit_distill.image.data import ImageBatch
from lit_distill.image.distillation import DistillationLoss, ImageDistiller, Outputs, Term


class DefensiveDistillation(ImageDistiller):
    r"""The teacher's probabilities at a high temperature as the only targets; the student is used at temperature 1.

    .. math:: L = - \sum_k p^t_k(T) \log p^s_k(T), \qquad p(T) = \mathrm{softmax}(z / T)

    The teacher is trained at the same temperature (`Supervised` with `temperature`). No labels and no factor T^2, as
    published. Trained so, logits are about T times larger than usual. At temperature 1 softmax saturates, the
    cross-entropy's gradient is exactly zero in float32, and attacks that follow its sign fail. That is a masked
    gradient, not robustness: attacks on logits (Carlini, Wagner, 2016, arXiv 1608.04644) and on rescaled logits
    succeed. Callback `AdversarialEvaluation` measures all of it.

    The gradient is 1/T of that at T = 1 to begin with; SGD needs a larger learning rate or `defensive_weight`, Adam
    does not. Laid out after the evaluation by Sarkar et al., 2024, arXiv 2404.04245, which lets teacher and student
    differ in architecture; in the original they are the same.

    Args:
        student: The classifier to train.
        teacher: The frozen classifier, trained at the same temperature.
        temperature: T.
        defensive_weight: Weight of the loss.
        label_weight: Weight of the cross-entropy on labels at temperature 1; none in the original.
        kwargs: See `ImageDistiller` and `Distiller`.
    """

    reference = Reference(
        title="Distillation as a Defense to Adversarial Perturbations against Deep Neural Networks",
        authors="Papernot, McDaniel, Wu, Jha, Swami",
        year=2015,
        arxiv="1511.04508",
    )

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        temperature: float = 20.0,
        defensive_weight: float = 1.0,
        label_weight: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, [Term(_SoftLabels(temperature), defensive_weight)], label_weight, **kwargs)


class _SoftLabels(DistillationLoss):
    """Cross-entropy to the teacher's probabilities, both at temperature T."""

    name = "soft_labels"

    def __init__(self, temperature: float) -> None:
        super().__init__()
        if temperature <= 0:
            raise UsageError(f"temperature is {temperature}; it must be above 0 (usual: 20 to 100)")
        self.temperature = temperature

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        targets = (teacher.logits.detach().float() / self.temperature).softmax(1)
        return F.cross_entropy(student.logits.float() / self.temperature, targets)
