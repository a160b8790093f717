"""What distillation between graph networks shares: labels, a frozen teacher, and one term between their features."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.core.schedules import Schedule, value_at
from lit_distill.core.taps import FeatureTaps
from lit_distill.graph.classifier import GraphClassifier, check_network
from lit_distill.graph.graphs import GraphBatch
from lit_distill.losses import forward_kl


class GraphDistiller(GraphClassifier):
    r"""Trains a graph network on labels and on a frozen graph network.

    .. math:: L = \gamma \, \mathrm{CE}(y, z^s) + \alpha T^2 \, \mathrm{KL}(p^t(T) \,\|\, p^s(T)) + \beta D(f^s, f^t)

    A method says with `tap` which feature of both networks D compares, and with `compare` how. The teacher runs in eval
    mode, on its running statistics: batches mix graphs of very different size. A term of weight 0 is not computed.

    Args:
        student: The `GraphNetwork` to train. One around `DeepSets` sees no edges.
        teacher: The frozen `GraphNetwork`.
        feature_weight: The beta above.
        temperature: T.
        kd_weight: The alpha above.
        label_weight: The gamma above.
        kwargs: See `Distiller`.

    Attributes:
        term: Name of D in logs.
        tap: Module of a `GraphNetwork` whose output, or with `@input` whose input, D compares; None if there is no D.
    """

    term: ClassVar[str] = "feature"
    tap: ClassVar[str | None] = None

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        feature_weight: float | Schedule = 0.0,
        temperature: float | Schedule = 4.0,
        kd_weight: float | Schedule = 0.0,
        label_weight: float | Schedule = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher=teacher, **kwargs)
        if not isinstance(temperature, Schedule) and temperature <= 0:
            raise UsageError(f"model.temperature is {temperature}; it must be above 0 (usual: 1 to 8)")
        self.temperature = temperature
        self.weights = {"ce": label_weight, "kd": kd_weight, self.term: feature_weight}

    def build(self) -> None:
        """Checks that both networks and the data fit, and makes the metrics."""
        if self.teacher is None:
            raise UsageError("model.teacher is missing; this method learns from a teacher")
        super().build()
        check_network(self.teacher, self._data(), "teacher")
        taps = () if self.tap is None else (self.tap,)
        self._student_taps, self._teacher_taps = FeatureTaps(self.student, taps), FeatureTaps(self.teacher, taps)

    def compare(self, student: Tensor, teacher: Tensor, batch: GraphBatch) -> Tensor:
        """Returns the unweighted D between the tapped features of a batch."""
        raise AssertionError(f"{type(self).__name__} taps {self.tap}; a method that does so defines compare")

    def training_step(self, batch: GraphBatch, batch_idx: int) -> Tensor:
        """Labels, teacher, and what the method adds."""
        weights = {name: value_at(weight, self.iteration) for name, weight in self.weights.items()}
        logits, feature = self._student_taps(batch)
        terms = {}
        if weights["ce"]:
            terms["ce"] = weights["ce"] * F.cross_entropy(logits, batch.labels)
        if weights["kd"] or weights[self.term]:
            with torch.no_grad():
                target, target_feature = self._teacher_taps(batch)
            if weights["kd"]:
                temperature = value_at(self.temperature, self.iteration)
                terms["kd"] = weights["kd"] * forward_kl(logits, target, temperature=temperature)
            if self.tap is not None and weights[self.term]:
                terms[self.term] = weights[self.term] * self.compare(feature[self.tap], target_feature[self.tap], batch)
        if not terms:
            raise UsageError("model.label_weight is 0 and so are the others; nothing is left to train on")
        return self.combine(terms)

    def teacher_hits(self, batch: GraphBatch) -> tuple[Tensor, float] | None:
        """Says where the teacher is right."""
        assert self.teacher is not None
        with torch.no_grad():
            return self.teacher(batch).argmax(1) == batch.labels, 1.0 / self.num_classes
