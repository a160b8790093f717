"""KiDD: the network that is trained on the synthetic graphs is replaced by kernel ridge regression."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lit_distill.core.errors import UsageError, check_least
from lit_distill.core.reference import Reference
from lit_distill.graph.classifier import graph_metrics
from lit_distill.graph.condensed import annealed_temperature, relaxed_adjacency, soft_labels
from lit_distill.graph.graphs import GraphBatch, starts
from lit_distill.graph.lite_gntk import GraphPoints, Scale, dense_points, lite_gntk, sparse_points
from lit_distill.graph.synthesizer import GraphSynthesizer
from lit_distill.losses.kernel_ridge import (
    kernel_orthogonality,
    kernel_ridge_cross_entropy,
    kernel_ridge_prediction,
)


class KiDD(GraphSynthesizer):
    r"""Synthetic graphs from which kernel ridge regression predicts the classes of real ones.

    .. math:: L = \mathrm{CE}\big(K_{TS} (K_{SS} + \lambda \tfrac{\mathrm{tr} K_{SS}}{n} I)^{-1} Y_S, \; y_T\big)
        + \eta \, \lVert \tilde K_{SS} - I \rVert_F

    K is the LiteGNTK, the tangent kernel of a wide graph network with one nonlinearity (`lite_gntk`), so that what a
    network would learn from the synthetic graphs S is known in closed form, and no network is trained for it. A step
    takes a batch T of real graphs from the data module and some of the synthetic ones, whose adjacency is drawn from
    the logits as in DosCond: symmetric and without a diagonal. The public code draws edges from a node to itself, too,
    and lets the two directions of an edge part as they are learned. After the step features and logits are clamped to
    [0, 1], as there.

    So where there is no edge the logit becomes 0, an edge drawn with probability one half; the set that is kept has
    edges above one half. From the second step on, training sees graphs that are half full or more, and what is kept is
    others, even in the published settings that do not learn the adjacency. `sample_edges` turns that off.

    Validation and test report beside the student's metrics those of the regression on all synthetic graphs as they are
    kept: `val/krr_acc`, `test/krr_auroc` and so on.

    The graphs to begin with are random ones here; the public code takes those that herding or k-center choose, and cuts
    off what is larger than `nodes`.

    Args:
        student: The `GraphNetwork` that is trained on the result; the method itself does not use it.
        per_class: Graphs of each class.
        feature_lr: Learning rate of the features.
        adjacency_lr: Learning rate of the adjacency logits; 0 in most of the published settings.
        sample_edges: Whether the adjacency is drawn in every step. If not, it is the one that will be kept, which can
            only be where it is not learned.
        synthetic_batch: n, synthetic graphs drawn for a step; all if there are fewer.
        depth: Aggregations of the kernel.
        scale: "uniform" sums over neighbors, "degree" takes their mean.
        ridge: lambda.
        orthogonality_weight: eta.
        kwargs: See `GraphSynthesizer`.
    """

    reference = Reference(
        title="Kernel Ridge Regression-Based Graph Dataset Distillation",
        authors="Xu, Chen, Pan, Chen, Das, Yang, Tong",
        year=2023,
    )

    def __init__(
        self,
        student: nn.Module,
        per_class: int = 10,
        feature_lr: float = 1e-4,
        adjacency_lr: float = 0.0,
        sample_edges: bool = True,
        synthetic_batch: int = 16,
        depth: int = 5,
        scale: Scale = "uniform",
        ridge: float = 1e-6,
        orthogonality_weight: float = 1e-3,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, per_class=per_class, feature_lr=feature_lr, adjacency_lr=adjacency_lr, **kwargs)
        check_least("model", 1, synthetic_batch=synthetic_batch, depth=depth)
        if ridge <= 0:
            raise UsageError(f"model.ridge is {ridge}; it must be above 0 (usual: 1e-6)")
        if adjacency_lr > 0 and not sample_edges:
            raise UsageError(
                f"model.sample_edges is false and model.adjacency_lr {adjacency_lr}; edges that are not drawn have no "
                "gradient, set one of them to true or 0"
            )
        self.sample_edges = sample_edges
        self.synthetic_batch = synthetic_batch
        self.depth = depth
        self.scale: Scale = scale
        self.ridge = ridge
        self.orthogonality_weight = orthogonality_weight

    def build(self) -> None:
        """Adds the metrics of the regression."""
        super().build()
        self.val_krr_metrics = graph_metrics(self.num_classes, prefix="val/krr_")
        self.test_krr_metrics = graph_metrics(self.num_classes, prefix="test/krr_")

    def on_train_start(self) -> None:
        """Aggregates the real graphs, once."""
        super().on_train_start()
        real = self._data().part("train").to(self.device)
        self._real = self.points(real.nodes, real.edge_index, real.node_start)

    def training_step(self, batch: GraphBatch, batch_idx: int) -> Tensor:
        """Fits some of the synthetic graphs, and predicts real ones."""
        index = torch.randperm(len(self.synthetic.labels))[: self.synthetic_batch].to(self.device)
        kernel, cross_kernel, targets = self.kernels(index, self.edges(index), self._real.take(batch.index))
        loss = kernel_ridge_cross_entropy(kernel, cross_kernel, targets, batch.labels, ridge=self.ridge)
        return self.combine({"krr": loss, "orthogonality": self.orthogonality_weight * kernel_orthogonality(kernel)})

    def edges(self, index: Int[Tensor, " n"]) -> Float[Tensor, "n d d"]:
        """Returns the adjacency of some of the synthetic graphs for a step."""
        logits = self.synthetic.logits[index]
        if not self.sample_edges:
            return self.synthetic.hard()[index].to(logits.dtype)
        return relaxed_adjacency(logits, torch.rand_like(logits), temperature=annealed_temperature(self.iteration))

    def kernels(
        self, index: Int[Tensor, " n"], adjacency: Float[Tensor, "n d d"], real: GraphPoints
    ) -> tuple[Float[Tensor, "n n"], Float[Tensor, "m n"], Float[Tensor, "n k"]]:
        """Computes what the regression is made of.

        Args:
            index: Positions of the synthetic graphs.
            adjacency: Of these graphs.
            real: The real graphs.

        Returns:
            K_SS, K_TS and Y_S.
        """
        features = self.synthetic.features[index]
        fitted = dense_points(features, adjacency, depth=self.depth, scale=self.scale)
        targets = F.one_hot(self.synthetic.labels[index], self.num_classes).to(features.dtype)
        return lite_gntk(fitted, fitted), lite_gntk(real, fitted), targets

    def points(
        self, nodes: Int[Tensor, "n c"], edge_index: Int[Tensor, "2 e"], node_start: Int[Tensor, " b1"]
    ) -> GraphPoints:
        """Aggregates real graphs."""
        features = soft_labels(nodes, self._data().node_values).to(self.synthetic.features.dtype)
        return sparse_points(features, edge_index, node_start, depth=self.depth, scale=self.scale)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Takes a step, and clamps features and logits."""
        super().optimizer_step(*args, **kwargs)
        # Not at the end of the batch: callbacks that save then do so before the module has its turn.
        with torch.no_grad():
            self.synthetic.features.clamp_(0, 1)
            if self.sample_edges:
                self.synthetic.logits.clamp_(0, 1)

    @torch.no_grad()
    def predict_by_kernel(self, batch: GraphBatch) -> Float[Tensor, "b k"]:
        """Predicts the classes of real graphs from all synthetic ones as they are kept; not probabilities."""
        adjacency = self.synthetic.hard().to(self.synthetic.features.dtype)
        index = torch.arange(len(adjacency), device=self.device)
        real = self.points(batch.nodes, batch.edge_index, starts(batch.graph.bincount()))
        return kernel_ridge_prediction(*self.kernels(index, adjacency, real), ridge=self.ridge)

    def validation_step(self, batch: GraphBatch, batch_idx: int) -> None:
        """Adds a batch to the metrics of the student and of the regression."""
        super().validation_step(batch, batch_idx)
        self.val_krr_metrics.update(self.predict_by_kernel(batch), batch.labels)

    def on_validation_epoch_end(self) -> None:
        """Logs `val/*`."""
        super().on_validation_epoch_end()
        self._log_metrics(self.val_krr_metrics)

    def test_step(self, batch: GraphBatch, batch_idx: int) -> None:
        """Adds a batch to the metrics of the student and of the regression."""
        super().test_step(batch, batch_idx)
        self.test_krr_metrics.update(self.predict_by_kernel(batch), batch.labels)

    def on_test_epoch_end(self) -> None:
        """Logs `test/*`."""
        super().on_test_epoch_end()
        self._log_metrics(self.test_krr_metrics)
