"""Knowledge distillation between graph networks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.core.reference import Reference
from lit_distill.core.schedules import Schedule, value_at
from lit_distill.graph.classifier import GraphClassifier, check_network
from lit_distill.graph.graphs import GraphBatch
from lit_distill.losses import forward_kl


class KD(GraphClassifier):
    r"""The student's tempered probabilities follow those of a frozen graph network, beside the labels.

    .. math:: L = \gamma \, \mathrm{CE}(y, z^s) + \alpha T^2 \, \mathrm{KL}(p^t(T) \,\|\, p^s(T))

    The teacher runs in eval mode, on its running statistics: batches mix graphs of very different size. A student
    around `DeepSets` sees no edges, which is the graph-level form of a graph-free student (Zhang, Liu, Sun, Shah,
    Graph-less Neural Networks, 2021, arXiv 2110.08727).

    Args:
        student: The `GraphNetwork` to train.
        teacher: The frozen `GraphNetwork`.
        temperature: T.
        kd_weight: The alpha above.
        label_weight: The gamma above.
        kwargs: See `Distiller`.
    """

    reference = Reference(
        title="Distilling the Knowledge in a Neural Network",
        authors="Hinton, Vinyals, Dean",
        year=2015,
        arxiv="1503.02531",
    )

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        temperature: float | Schedule = 4.0,
        kd_weight: float | Schedule = 0.9,
        label_weight: float | Schedule = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher=teacher, **kwargs)
        if isinstance(temperature, float) and temperature <= 0:
            raise UsageError(f"model.temperature is {temperature}; it must be above 0 (usual: 1 to 8)")
        self.temperature = temperature
        self.kd_weight = kd_weight
        self.label_weight = label_weight

    def build(self) -> None:
        """Checks that both networks and the data fit, and makes the metrics."""
        if self.teacher is None:
            raise UsageError("model.teacher is missing; this method learns from a teacher")
        super().build()
        check_network(self.teacher, self._data(), "teacher")

    def training_step(self, batch: GraphBatch, batch_idx: int) -> Tensor:
        """Labels and teacher of a batch."""
        assert self.teacher is not None
        with torch.no_grad():
            target = self.teacher(batch)
        logits = self.student(batch)
        temperature = value_at(self.temperature, self.iteration)
        return self.combine(
            {
                "ce": value_at(self.label_weight, self.iteration) * F.cross_entropy(logits, batch.labels),
                "kd": value_at(self.kd_weight, self.iteration) * forward_kl(logits, target, temperature=temperature),
            }
        )

    def teacher_hits(self, batch: GraphBatch) -> tuple[Tensor, float] | None:
        """Says where the teacher is right."""
        assert self.teacher is not None
        with torch.no_grad():
            return self.teacher(batch).argmax(1) == batch.labels, 1.0 / self.num_classes
