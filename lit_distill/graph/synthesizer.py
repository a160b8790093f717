"""The base of methods that learn a small set of graphs by gradient descent on the graphs themselves."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn
from torch.optim import Optimizer

from lit_distill.core.errors import UsageError
from lit_distill.core.loading import derived_seed
from lit_distill.core.metrics import reliability
from lit_distill.core.networks import freeze
from lit_distill.graph.classifier import GraphClassifier
from lit_distill.graph.condensed import CondensedGraphs, SyntheticGraphs
from lit_distill.graph.models import GraphNetwork

FOLDER = "distilled"
STUDENT_LR = 1e-3


def adam(parameters: Iterable[Any]) -> Optimizer:
    """Builds the default optimizer; the learning rates are the method's own."""
    return torch.optim.Adam(parameters)


class GraphSynthesizer(GraphClassifier):
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

    frozen = ("student",)
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
        for key, value in {"per_class": per_class, "student_epochs": student_epochs}.items():
            if value < 1:
                raise UsageError(f"model.{key} is {value}; give 1 or more")
        for key, rate in {"feature_lr": feature_lr, "adjacency_lr": adjacency_lr}.items():
            if rate < 0:
                raise UsageError(f"model.{key} is {rate}; give 0 or more")
        if feature_lr == adjacency_lr == 0:
            raise UsageError("model.feature_lr, model.adjacency_lr: both are 0, so nothing is learned; raise one")
        self.per_class = per_class
        self.nodes = nodes
        self.feature_lr = feature_lr
        self.adjacency_lr = adjacency_lr
        self.student_epochs = student_epochs
        self._student_of: int | None = None  # the iteration whose set the student was trained on

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
        _check_redrawable(self.student)
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

    def train_student(self) -> None:
        """Trains a new student on the set as it is now, unless that has been done."""
        if self._student_of == self.iteration:
            return
        # All processes train the same one; the steps of training have a randomness of their own.
        torch.manual_seed(derived_seed("student", self._data().run_seed, self.iteration))
        graphs = self.condensed().graphs().to(self.device)
        with torch.inference_mode(False), torch.enable_grad():
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
        self._student_of = self.iteration

    def on_validation_epoch_start(self) -> None:
        """Trains a student on the set, but not for the check before training."""
        if not self.trainer.sanity_checking:
            self.train_student()

    def on_test_epoch_start(self) -> None:
        """Trains a student on the set."""
        self.train_student()

    def on_predict_epoch_start(self) -> None:
        """Trains a student on the set."""
        self.train_student()

    def on_test_epoch_end(self) -> None:
        """Logs `test/*`, with what the set weighs, and keeps the reliability bins."""
        self.panels["reliability"] = reliability(self.test_metrics)
        self._log_metrics(self.test_metrics)
        for name, value in self.condensed().footprint().items():
            self.log(f"test/{name}", float(value))

    def on_fit_end(self) -> None:
        """Keeps the set in the run's folder, and trains the student that goes beside it."""
        self.train_student()
        folder = self.trainer.log_dir  # asked by all processes: one tells the others
        if folder and self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning sets it late
            self.condensed().save(Path(folder) / FOLDER)


def redraw(network: nn.Module) -> None:
    """Draws all weights of a network anew, the way its modules do it themselves."""
    reset = getattr(network, "reset_parameters", None)
    if reset is not None:
        reset()
        return
    for child in network.children():
        redraw(child)


@torch.no_grad()
def _check_redrawable(network: nn.Module) -> None:
    for parameter in network.parameters():
        parameter.fill_(torch.nan)
    redraw(network)
    for name, parameter in network.named_parameters():
        if parameter.isnan().any():
            raise UsageError(
                f"model.student: {name} cannot be drawn anew; give its module a reset_parameters that does it"
            )
