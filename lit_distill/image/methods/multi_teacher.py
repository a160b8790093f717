"""Knowledge distillation from several teachers at once."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.core.reference import Reference
from lit_distill.core.schedules import Schedule, value_at
from lit_distill.image.data import ImageBatch
from lit_distill.image.distillation import DistillationLoss, ImageDistiller, Outputs, Term
from lit_distill.image.ensemble import Ensemble
from lit_distill.losses import forward_kl

Combination = Literal["logits", "probabilities", "confidence"]


def confidence_weights(teacher_logits: Float[Tensor, "m b k"], labels: Int[Tensor, " b"]) -> Float[Tensor, "m b"]:
    r"""Weighs teachers sample by sample: the more a teacher is sure of the label, the more.

    .. math:: w_m = \frac{1}{M - 1} \left(1 - \frac{\exp \mathrm{CE}_m}{\sum_j \exp \mathrm{CE}_j}\right)

    Args:
        teacher_logits: (M, B, K) of M > 1 teachers, detached here.
        labels: (B,).

    Returns:
        (M, B), which sums to 1 over teachers.

    Reference: Zhang, Chen, Wang, Confidence-Aware Multi-Teacher Knowledge Distillation, 2022, arXiv 2201.00007.
    """
    teachers, samples, _ = teacher_logits.shape
    flat = teacher_logits.detach().float().flatten(0, 1)
    losses = F.cross_entropy(flat, labels.repeat(teachers), reduction="none").view(teachers, samples)
    return (1 - losses.softmax(0)) / (teachers - 1)


class MultiTeacherKD(ImageDistiller):
    r"""Softened targets of several frozen teachers, combined in one of three ways.

    .. math:: L = \gamma \, \mathrm{CE}(y, z^s) + \alpha \, T^2 \, D, \qquad D = \begin{cases}
        \mathrm{KL}(\mathrm{softmax}(\tfrac{1}{M} \sum_m z_m / T) \,\|\, p^s(T)) & \text{logits} \\
        \mathrm{KL}(\tfrac{1}{M} \sum_m p_m(T) \,\|\, p^s(T)) & \text{probabilities} \\
        \sum_m w_m \, \mathrm{KL}(p_m(T) \,\|\, p^s(T)) & \text{confidence} \end{cases}

    The weights of "confidence" are those of CA-MKD, see `confidence_weights`; its term for intermediate features is not
    part of this method. CA-MKD writes the cross-entropy where KL stands, which differs by a constant. The two means are
    the usual baselines of its comparison. `teacher` is the ensemble of all, by mean probabilities: of it are
    `test/teacher_acc` and `test/agreement`.

    Args:
        student: The classifier to train.
        teachers: Two frozen classifiers or more.
        combination: "logits", "probabilities" or "confidence".
        temperature: T.
        kd_weight: The alpha above.
        label_weight: The gamma above.
        kwargs: See `ImageDistiller` and `Distiller`.

    Raises:
        UsageError: There are fewer than two teachers.
    """

    reference = Reference(
        title="Confidence-Aware Multi-Teacher Knowledge Distillation",
        authors="Zhang, Chen, Wang",
        year=2022,
        arxiv="2201.00007",
    )

    def __init__(
        self,
        student: nn.Module,
        teachers: Sequence[nn.Module],
        combination: Combination = "confidence",
        temperature: float | Schedule = 4.0,
        kd_weight: float | Schedule = 1.0,
        label_weight: float | Schedule = 1.0,
        **kwargs: Any,
    ) -> None:
        if len(teachers) < 2:
            raise UsageError(
                f"model.teachers holds {len(teachers)} network{'s' * (len(teachers) != 1)}; give two or more "
                "(for one there is lit_distill.image.KD)"
            )
        loss = _TeachersKL(combination, temperature)
        super().__init__(student, Ensemble(teachers), [Term(loss, kd_weight)], label_weight, **kwargs)


class _TeachersKL(DistillationLoss):
    """T^2 KL(teachers || student), the teachers combined; see `MultiTeacherKD`."""

    name = "kd"

    def __init__(self, combination: Combination, temperature: float | Schedule) -> None:
        super().__init__()
        if not isinstance(temperature, Schedule) and temperature <= 0:
            raise UsageError(f"temperature is {temperature}; it must be above 0 (usual: 1 to 8)")
        if combination not in ("logits", "probabilities", "confidence"):
            raise UsageError(f"model.combination is '{combination}'; use 'logits', 'probabilities' or 'confidence'")
        self.combination = combination
        self.temperature = temperature

    def resolve(self, student: nn.Module, teacher: nn.Module) -> None:
        """Taps the logits of every member of the ensemble."""
        assert isinstance(teacher, Ensemble)
        self.teacher_taps = tuple(f"networks.{number}" for number in range(len(teacher.networks)))

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        temperature = value_at(self.temperature, iteration)
        logits = torch.stack([teacher.features[tap].detach().float() for tap in self.teacher_taps])
        if self.combination == "logits":
            return forward_kl(student.logits, logits.mean(0), temperature=temperature)
        if self.combination == "probabilities":
            # Logits that are T times the log of a sum of probabilities have the mean probability at temperature T.
            mean = temperature * (logits / temperature).log_softmax(2).logsumexp(0)
            return forward_kl(student.logits, mean, temperature=temperature)
        each = [forward_kl(student.logits, own, temperature=temperature, reduction="none") for own in logits]
        return (confidence_weights(logits, batch.labels) * torch.stack(each)).sum(0).mean()
