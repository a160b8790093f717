"""Graph-less neural networks: a graph network teaches one that sees no edges."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.core.reference import Reference
from lit_distill.graph.nodes.classifier import (
    NodeClassifier,
    check_node_network,
    graph_logits,
    node_logits,
    reads_edges,
)
from lit_distill.graph.nodes.data import NodeBatch
from lit_distill.losses import forward_kl


class GLNN(NodeClassifier):
    r"""A network of node features alone follows a frozen graph network on all visible nodes, labelled or not.

    .. math:: L = \frac{\lambda}{|V_L|} \sum_{v \in V_L} \mathrm{CE}(y_v, z^s_v)
        + \frac{1 - \lambda}{|V|} \sum_{v \in V} \mathrm{KL}(p^t_v \,\|\, p^s_v)

    There is no temperature. V are the nodes of the observed graph, validation and visible test nodes among them, V_L
    those with a label. The teacher runs once, as a fit starts, over the observed graph, so that hidden nodes reach the
    student neither as samples nor through their neighbors. Batches are of visible nodes; where lambda is above 0, each
    step draws as many labelled ones, or takes all if there are fewer.

    This is the paper's sum. The public code takes turns instead: an epoch of steps along the first term, then one along
    the second, each scaled by its weight; and its lambda is 0, as here, where weight decay and the averages of Adam are
    all that the first steps then do.

    Args:
        student: The network to train, without edges, such as `torch_geometric.nn.models.MLP`.
        teacher: The frozen network.
        label_weight: The lambda above, from 0 to 1.
        kwargs: See `Distiller`.
    """

    reference = Reference(
        title="Graph-less Neural Networks: Teaching Old MLPs New Tricks via Distillation",
        authors="Zhang, Liu, Sun, Shah",
        year=2021,
        arxiv="2110.08727",
    )
    train_part: ClassVar[str] = "visible"
    targets: Tensor

    def __init__(self, student: nn.Module, teacher: nn.Module, label_weight: float = 0.0, **kwargs: Any) -> None:
        super().__init__(student, teacher=teacher, **kwargs)
        if not 0 <= label_weight <= 1:
            raise UsageError(f"model.label_weight is {label_weight}; give a share of the loss, from 0 to 1")
        if reads_edges(student):
            raise UsageError(
                f"model.student: {type(student).__name__} reads edges; give a network of node features alone, such as "
                "torch_geometric.nn.models.MLP"
            )
        self.label_weight = label_weight

    def build(self) -> None:
        """Checks that both networks and the data fit, and makes the metrics."""
        super().build()
        assert self.teacher is not None
        check_node_network(self.teacher, self._data(), "teacher")

    def on_fit_start(self) -> None:
        """Runs the teacher over the observed graph, and brings the labelled nodes to the device."""
        assert self.teacher is not None
        data = self._data()
        with torch.no_grad():
            self.targets = graph_logits(self.teacher, data.observed.to(self.device)).log_softmax(1)
        labelled = data.part("train")
        self.labelled = labelled.features.to(self.device), labelled.labels.to(self.device)

    def training_step(self, batch: NodeBatch, batch_idx: int) -> Tensor:
        """Labels and teacher; a term of weight 0 is not computed."""
        terms = {}
        if self.label_weight > 0:
            features, labels = self.labelled
            drawn = torch.randperm(len(labels))[: len(batch.labels)].to(self.device)
            terms["ce"] = self.label_weight * F.cross_entropy(self.student(features[drawn]), labels[drawn])
        if self.label_weight < 1:
            divergence = forward_kl(self.student(batch.features), self.targets[batch.place])
            terms["kd"] = (1 - self.label_weight) * divergence
        return self.combine(terms)

    def teacher_hits(self, batch: NodeBatch) -> tuple[Tensor, float] | None:
        """Says where the teacher is right."""
        assert self.teacher is not None
        with torch.no_grad():
            return node_logits(self.teacher, batch).argmax(1) == batch.labels, 1.0 / self.num_classes
