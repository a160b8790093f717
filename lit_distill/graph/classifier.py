"""The graph classifier: one module for full data, subsets and distilled sets, so that runs differ by data alone."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAUROC

from lit_distill.core.distiller import Distiller
from lit_distill.core.errors import UsageError
from lit_distill.core.metrics import classification_metrics, classifier_panels
from lit_distill.graph.graphs import GraphBatch
from lit_distill.graph.models import GraphNetwork

EXAMPLES = 128  # graphs whose mean cost is that of the network


class GraphClassifier(Distiller):
    r"""Trains a graph network on labelled graphs, real or distilled.

    .. math:: L = \mathrm{CE}(y, z)

    Validation and test are on real graphs. `auroc` is the mean over classes of one against the rest, which for two
    classes is the ordinary one; like all metrics here, it is computed once over all batches.

    Args:
        student: The `GraphNetwork` to train.
        kwargs: See `Distiller`.
    """

    asks_data: ClassVar[str] = "graph methods ask the data module for num_classes and node_values"
    headline: ClassVar[str] = "test/auroc"  # classes of these sets are seldom of one size

    def __init__(self, student: nn.Module, **kwargs: Any) -> None:
        super().__init__(student, **kwargs)

    def build(self) -> None:
        """Checks that network and data fit, and makes the metrics."""
        data = self._data()
        data.setup()
        check_network(self.student, data, "student")
        self.num_classes = data.num_classes
        self.val_metrics = graph_metrics(self.num_classes, prefix="val/")
        self.test_metrics = graph_metrics(self.num_classes, prefix="test/")

    def example_inputs(self) -> tuple[Any, ...]:
        """A batch of real graphs, since graphs have no size of their own: the first of the test part."""
        data = self._data()
        graphs = data.part("test" if data.has_part("test") else "train")
        index = torch.arange(min(EXAMPLES, graphs.size))
        return (graphs.take(index).to(self.device).batch(index.to(self.device)),)

    def training_step(self, batch: GraphBatch, batch_idx: int) -> Tensor:
        """Cross-entropy of a batch."""
        return self.combine({"ce": F.cross_entropy(self.student(batch), batch.labels)})

    def validation_step(self, batch: GraphBatch, batch_idx: int) -> None:
        """Adds a batch to the metrics."""
        self.val_metrics.update(self.student(batch), batch.labels)

    def on_validation_epoch_end(self) -> None:
        """Logs `val/*`."""
        self._log_metrics(self.val_metrics)

    def test_step(self, batch: GraphBatch, batch_idx: int) -> None:
        """Adds a batch to the metrics, and what a teacher says of it."""
        logits = self.student(batch)
        self.test_metrics.update(logits, batch.labels)
        if self.teacher is not None:
            self._log_teacher(self.teacher(batch), logits, batch.labels)

    def on_test_epoch_end(self) -> None:
        """Logs `test/*`, with what the training set weighs, and keeps the calibration and the confusion."""
        self.panels |= classifier_panels(self.test_metrics, self._data())
        self._log_metrics(self.test_metrics)
        for name, value in self.footprint().items():
            self.log(f"test/{name}", float(value))

    def footprint(self) -> dict[str, int]:
        """Counts the bytes of the training set."""
        return self._data().footprint()

    def predict_step(self, batch: GraphBatch, batch_idx: int) -> dict[str, Tensor]:
        """Returns index, label and class probabilities."""
        return {"index": batch.index, "label": batch.labels, "probabilities": self.student(batch).softmax(1)}


def graph_metrics(num_classes: int, *, prefix: str) -> MetricCollection:
    """Builds the metrics of classifiers (see `classification_metrics`) and `<prefix>auroc`; logits (B, K) go in."""
    metrics = classification_metrics(num_classes, prefix=prefix)
    metrics.add_metrics({"auroc": MulticlassAUROC(num_classes, thresholds=None)})
    return metrics


def check_network(network: nn.Module, data: Any, role: str, key: str = "model") -> None:
    """Checks that a network knows the labels and classes of the data.

    Args:
        network: The network.
        data: A graph data module, set up.
        role: Its argument in the configuration, such as "student".
        key: What has that argument.

    Raises:
        UsageError: It does not.
    """
    if not isinstance(network, GraphNetwork):
        raise UsageError(
            f"{key}.{role} is {type(network).__name__}; put it as `gnn` into lit_distill.graph.models.GraphNetwork"
        )
    if network.num_classes != data.num_classes:
        raise UsageError(
            f"{key}.{role} has {network.num_classes} classes, the data {data.num_classes}; set num_classes to "
            f"{data.num_classes}"
        )
    checks = [("node_values", network.node_values, data.node_values)]
    if network.edge_values:
        checks.append(("edge_values", network.edge_values, data.edge_values))
    for name, own, needed in checks:
        if len(own) != len(needed) or any(a < b for a, b in zip(own, needed, strict=True)):
            raise UsageError(f"{key}.{role}.{name} is {list(own)}, the data have {list(needed)}; set it to that")
