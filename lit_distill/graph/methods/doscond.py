"""DosCond: one step of gradient matching, at weights drawn anew each time."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn
from torch.func import functional_call

from lit_distill.core.errors import check_least
from lit_distill.core.networks import redraw
from lit_distill.core.reference import Reference
from lit_distill.graph.condensed import annealed_temperature
from lit_distill.graph.graphs import GraphBatch, GraphSet
from lit_distill.graph.synthesizer import GraphSynthesizer
from lit_distill.losses.gradients import Metric, gradient_distance


class DosCond(GraphSynthesizer):
    r"""Synthetic graphs give a network of random weights the gradient that real ones give it.

    .. math:: L = \sum_c D\big(\nabla_\theta \mathrm{CE}(f_\theta(X'_c, A_c), c), \nabla_\theta
        \mathrm{CE}(f_\theta(\mathcal{T}_c), c)\big) + \beta \max\big(0, \overline{\sigma(\Omega)} - s\big),
        \qquad \theta \sim P_0

    New weights are drawn each iteration, and the network is never trained in between: that is the one step. The
    adjacency A is drawn from the logits by a Gumbel-sigmoid whose temperature falls from 1 to 0.01 in the first 200
    iterations; the public code counts its draws for that. s is the share of entries that are edges in the graphs to
    begin with.

    Real and synthetic graphs go through the same network, the latter as complete graphs whose edges have weights: for a
    GCN that is the dense computation. The public network takes one-hot node labels, here they are embedded first, as
    everywhere; so the gradient has one more part. It has a ReLU behind its last layer, too, which the networks of
    torch-geometric have not, and a single logit for the classes of ogb's sets. The term of propagated features that the
    code adds for one data set is left out.

    Args:
        student: The `GraphNetwork` whose gradients are matched, and which is trained on the result. It must take edge
            weights, as GCN does. While gradients are matched dropout is off, and batch normalization has no statistics.
        metric: D, see `gradient_distance`.
        sparsity_weight: beta.
        real_batch: Real graphs of each class drawn for a gradient; a class that has fewer is taken whole.
        match_classes: Whether each class has a gradient of its own; otherwise one gradient is that of all classes
            together, with as many graphs of each, as the public code has it for ogbg-molbace.
        kwargs: See `GraphSynthesizer`.
    """

    reference = Reference(
        title="Condensing Graphs via One-Step Gradient Matching",
        authors="Jin, Tang, Jiang, Li, Zhang, Tang, Yin",
        year=2022,
        arxiv="2206.07746",
    )

    def __init__(
        self,
        student: nn.Module,
        metric: Metric = "mse",
        sparsity_weight: float = 0.1,
        real_batch: int = 256,
        match_classes: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, **kwargs)
        check_least("model", 1, real_batch=real_batch)
        self.metric: Metric = metric
        self.sparsity_weight = sparsity_weight
        self.real_batch = real_batch
        self.match_classes = match_classes

    def build(self) -> None:
        """Checks the network, and says which real and synthetic graphs belong together."""
        super().build()
        self.student.check_edge_weight()
        self._pools = self._matched()
        self._real: GraphSet | None = None

    def _matched(self) -> list[tuple[list[Int[Tensor, " _"]], Int[Tensor, " m"]]]:
        """Lists what is compared: real graphs, those of a class together, and the synthetic graphs beside them."""
        real, synthetic = self._data().train_labels(), self.synthetic.labels
        classes = [(real == number).nonzero()[:, 0] for number in range(self.num_classes)]
        if not self.match_classes:
            return [(classes, torch.arange(len(synthetic)))]
        return [([own], (synthetic == number).nonzero()[:, 0]) for number, own in enumerate(classes)]

    def on_train_start(self) -> None:
        """Puts the real graphs where the training is."""
        super().on_train_start()
        self._real = self._data().part("train").to(self.device)
        self._pools = [(classes, synthetic.to(self.device)) for classes, synthetic in self._pools]

    def training_step(self, batch: GraphBatch, batch_idx: int) -> Tensor:
        """Draws weights, edges and real graphs, and compares gradients."""
        assert self._real is not None
        redraw(self.student)
        synthetic = self.synthetic
        adjacency = synthetic.adjacency(annealed_temperature(self.iteration))
        distances = []
        for classes, own in self._pools:
            drawn = torch.cat([pool[torch.randperm(len(pool))[: self.real_batch]] for pool in classes]).to(self.device)
            target = self.gradient(self._real.batch(drawn))
            matched = self.gradient(synthetic.batch(own, adjacency[own]), create_graph=True)
            distances.append(gradient_distance(matched, target, metric=self.metric))
        excess = F.relu(synthetic.logits.sigmoid().mean() - synthetic.density)
        return self.combine({"match": torch.stack(distances).sum(), "sparsity": self.sparsity_weight * excess})

    def gradient(self, batch: GraphBatch, *, create_graph: bool = False) -> tuple[Tensor, ...]:
        """Computes the gradient of the cross-entropy with respect to all weights of the student.

        Args:
            batch: Real or synthetic graphs.
            create_graph: Whether the gradient can be differentiated in turn.
        """
        weights = {name: value.detach().requires_grad_() for name, value in self.student.named_parameters()}
        loss = F.cross_entropy(functional_call(self.student, weights, (batch,)), batch.labels)
        return torch.autograd.grad(loss, list(weights.values()), create_graph=create_graph, materialize_grads=True)
