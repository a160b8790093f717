"""The base of methods that learn a small set of graphs by gradient descent on the graphs themselves."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn
from torch.optim import Optimizer

from lit_distill.core.errors import UsageError, check_least
from lit_distill.core.networks import check_redrawable, freeze, redraw
from lit_distill.core.synthesis import Synthesizer
from lit_distill.graph.classifier import GraphClassifier
from lit_distill.graph.condensed import CondensedGraphs, SyntheticGraphs
from lit_distill.graph.models import GraphNetwork

STUDENT_LR = 1e-3


def adam(parameters: Iterable[Any]) -> Optimizer:
    """Builds the default optimizer; the learning rates are the method's own."""
    return torch.optim.Adam(parameters)


class GraphSynthesizer(Synthesizer, GraphClassifier):
    """Learns `synthetic`, a few dense graphs of each class that stand in for the training graphs. There is no teacher.

    A subclass has the loss. Features and adjacency are two groups of one optimizer, each with its learning rate. The
    batches of the data module count iterations; a loss may read them, or draw real graphs of its own.

    Validation and test say what the set is worth: a network is drawn anew, trained on the graphs as they are then, with
    edges where the probability is above one half, and its accuracy on real graphs is reported. Nothing is chosen by
    validation. The run keeps the set in its folder, as `distilled/`, for `DistilledGraphs` to train others on, and the
    network that was trained on it at last as `student/`. The student is not part of checkpoints: it follows from the
    set.

    Args:
        student: The `GraphNetwork` that is trained on the set. Its weights are drawn anew each time.
        per_class: Graphs of each class.
        nodes: Nodes of every graph; the mean number of the training graphs if None.
        feature_lr: Learning rate of the features.
        adjacency_lr: Learning rate of the adjacency logits; 0 leaves the edges as they are.
        student_epochs: Steps in which the student is trained, on the whole set each time, by Adam with a learning rate
            of 1e-3, and 1e-4 in the second half.
        optimizer: Builds the optimizer of the set.
        lr_scheduler: See `Distiller`.
        scheduler_interval: See `Distiller`.
    """

    student: GraphNetwork

    def __init__(
        self,
        student: nn.Module,
        per_class: int = 1,
        nodes: int | None = None,
        feature_lr: float = 0.01,
        adjacency_lr: float = 0.01,
        student_epochs: int = 500,
        optimizer: OptimizerCallable = adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        scheduler_interval: Literal["epoch", "step"] = "step",
    ) -> None:
        super().__init__(student, optimizer=optimizer, lr_scheduler=lr_scheduler, scheduler_interval=scheduler_interval)
        check_least("model", 1, per_class=per_class, student_epochs=student_epochs)
        check_least("model", 0, feature_lr=feature_lr, adjacency_lr=adjacency_lr)
        if feature_lr == adjacency_lr == 0:
            raise UsageError("model.feature_lr, model.adjacency_lr: both are 0, so nothing is learned; raise one")
        self.per_class = per_class
        self.nodes = nodes
        self.feature_lr = feature_lr
        self.adjacency_lr = adjacency_lr
        self.student_epochs = student_epochs

    def build(self) -> None:
        """Checks network and data, and begins with real graphs."""
        super().build()
        if self.device_mesh is not None:
            raise UsageError("trainer.strategy: fsdp2 has nothing to shard in a few graphs; take ddp or one device")
        if self.student.edge_values:
            raise UsageError(
                f"model.student.edge_values is {list(self.student.edge_values)}; condensed graphs have no edge labels, "
                "leave it out"
            )
        check_redrawable(self.student)
        data = self._data()
        train = data.part("train")
        nodes = round(len(train.nodes) / train.size) if self.nodes is None else self.nodes
        self.synthetic = SyntheticGraphs.from_graphs(
            train, data.node_values, nodes=nodes, per_class=self.per_class, classes=data.classes
        )
        self.synthetic.features.requires_grad_(self.feature_lr > 0)
        self.synthetic.logits.requires_grad_(self.adjacency_lr > 0)

    def configure_optimizers(self) -> Any:
        """One optimizer, with a group for what has a learning rate above 0."""
        groups: Any = [
            {"params": [parameter], "lr": rate}
            for parameter, rate in (
                (self.synthetic.features, self.feature_lr),
                (self.synthetic.logits, self.adjacency_lr),
            )
            if rate > 0
        ]
        return self.optimizer_with_schedule(groups, self.optimizer)

    def condensed(self) -> CondensedGraphs:
        """Returns the set as it is now."""
        data, synthetic = self._data(), self.synthetic
        return CondensedGraphs(
            features=synthetic.features.detach().cpu().clone(),
            adjacency=synthetic.hard().cpu(),
            labels=synthetic.labels.cpu(),
            classes=tuple(data.classes),
            node_values=tuple(data.node_values),
            edge_values=(),
            description={
                "method": type(self).__name__,
                "iterations": self.iteration,
                "graphs": data.part_size("train"),
                "source_bytes": data.part("train").stored_bytes(),
            },
        )

    def fit_student(self) -> None:
        """Trains the student on all graphs at once."""
        graphs = self.condensed().graphs().to(self.device)
        batch = graphs.batch(torch.arange(graphs.size, device=self.device))
        redraw(self.student)
        self.student.requires_grad_(True).train()
        optimizer = torch.optim.Adam(self.student.parameters(), lr=STUDENT_LR)
        half = torch.optim.lr_scheduler.MultiStepLR(optimizer, [self.student_epochs // 2])
        for _ in range(self.student_epochs):
            optimizer.zero_grad()
            F.cross_entropy(self.student(batch), batch.labels).backward()
            optimizer.step()
            half.step()
        optimizer.zero_grad()
        freeze(self.student)

    def footprint(self) -> dict[str, int]:
        """Counts the bytes of the set as it is now."""
        return self.condensed().footprint()

    def save_distilled(self, folder: Path) -> None:
        """Writes the set as it is now to a folder."""
        self.condensed().save(folder)
