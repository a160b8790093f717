"""The node classifier: one module for networks that read edges and networks that do not."""

from inspect import signature
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lit_distill.core.distiller import Distiller
from lit_distill.core.errors import UsageError
from lit_distill.core.metrics import classifier_panels
from lit_distill.graph.classifier import graph_metrics
from lit_distill.graph.nodes.data import NodeBatch, NodeGraph


class NodeClassifier(Distiller):
    r"""Trains a network on the labelled nodes of a graph.

    .. math:: L = \mathrm{CE}(y, z)

    A network that reads edges computes the whole graph in every step, of which the batch's nodes are compared with
    their labels; with all labelled nodes in one batch, an epoch is one step. A network without edges, such as
    `torch_geometric.nn.models.MLP`, sees the batch's nodes alone.

    Where nodes were hidden in training, `test/acc` over all test nodes is accompanied by `test/acc_transductive` of the
    visible ones, `test/acc_inductive` of the hidden ones, and `test/acc_production`, which weighs the two by
    `unseen_share`; it differs from `test/acc` by no more than the rounding of a share to whole nodes.

    Args:
        student: The network to train: node features (n, d) and an edge index (2, e), or features alone, to logits
            (n, K). Any of `torch_geometric.nn.models`, with `out_channels`.
        kwargs: See `Distiller`.
    """

    asks_data: ClassVar[str] = "node methods ask the data module for num_classes and num_features"
    train_part: ClassVar[str] = "train"

    def __init__(self, student: nn.Module, **kwargs: Any) -> None:
        super().__init__(student, **kwargs)

    def build(self) -> None:
        """Checks that network and data fit, chooses the training nodes, and makes the metrics."""
        data = self._data()
        data.setup()
        data.train_part = self.train_part
        check_node_network(self.student, data, "student")
        self.num_classes = data.num_classes
        self.val_metrics = graph_metrics(self.num_classes, prefix="val/")
        self.test_metrics = graph_metrics(self.num_classes, prefix="test/")
        self.transductive, self.inductive = MeanMetric(), MeanMetric()

    def example_inputs(self) -> tuple[Tensor, ...] | None:
        """One node of zeros; none for a network that reads edges, since there is no cost of a node alone."""
        if reads_edges(self.student):
            return None
        return (torch.zeros((1, self._data().num_features), device=self.device),)

    def training_step(self, batch: NodeBatch, batch_idx: int) -> Tensor:
        """Cross-entropy of a batch."""
        return self.combine({"ce": F.cross_entropy(node_logits(self.student, batch), batch.labels)})

    def validation_step(self, batch: NodeBatch, batch_idx: int) -> None:
        """Adds a batch to the metrics."""
        self.val_metrics.update(node_logits(self.student, batch), batch.labels)

    def on_validation_epoch_end(self) -> None:
        """Logs `val/*`."""
        self._log_metrics(self.val_metrics)

    def test_step(self, batch: NodeBatch, batch_idx: int) -> None:
        """Adds a batch to the metrics, and what a teacher says of it."""
        logits = node_logits(self.student, batch)
        self.test_metrics.update(logits, batch.labels)
        hits = (logits.argmax(1) == batch.labels).float()
        self.transductive.update(hits, weight=(~batch.unseen).float())
        self.inductive.update(hits, weight=batch.unseen.float())
        if self.teacher is not None:
            self._log_teacher(node_logits(self.teacher, batch), logits, batch.labels)

    def on_test_epoch_end(self) -> None:
        """Logs `test/*`, and keeps the calibration and the confusion."""
        self.panels |= classifier_panels(self.test_metrics, self._data())
        self._log_metrics(self.test_metrics)
        data = self._data()
        if data.part("test").unseen.any():
            share, seen, unseen = data.unseen_share, self.transductive.compute(), self.inductive.compute()
            self.log("test/acc_transductive", seen, sync_dist=True)
            self.log("test/acc_inductive", unseen, sync_dist=True)
            self.log("test/acc_production", (1 - share) * seen + share * unseen, sync_dist=True)
        self.transductive.reset()
        self.inductive.reset()

    def predict_step(self, batch: NodeBatch, batch_idx: int) -> dict[str, Tensor]:
        """Returns the node's number, label and class probabilities."""
        probabilities = node_logits(self.student, batch).softmax(1)
        return {"index": batch.index, "label": batch.labels, "probabilities": probabilities}


def reads_edges(network: nn.Module) -> bool:
    """Says whether a network takes an edge index beside features."""
    return "edge_index" in signature(network.forward).parameters


def graph_logits(network: nn.Module, graph: NodeGraph) -> Float[Tensor, "n k"]:
    """Computes the logits of all nodes of a graph."""
    return network(*graph) if reads_edges(network) else network(graph.features)


def node_logits(network: nn.Module, batch: NodeBatch) -> Float[Tensor, "b k"]:
    """Computes the logits of a batch's nodes: within their graph, or each for itself."""
    return network(*batch.graph)[batch.place] if reads_edges(network) else network(batch.features)


def check_node_network(network: nn.Module, data: Any, role: str) -> None:
    """Checks that a network knows the features and classes of the data, as far as it names its widths.

    Args:
        network: The network.
        data: A node data module, set up.
        role: Its argument in the configuration, such as "student".

    Raises:
        UsageError: It does not.
    """
    for key, needed, what in (
        ("in_channels", data.num_features, "features"),
        ("out_channels", data.num_classes, "classes"),
    ):
        own = getattr(network, key, needed)
        if own != needed:
            raise UsageError(f"model.{role} has {own} {what}, the data {needed}; set {key} to {needed}")
