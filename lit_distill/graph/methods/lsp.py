"""Local structure preserving distillation: each node's neighbors are placed around it as in the teacher."""

from typing import Any

from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.core.reference import Reference
from lit_distill.core.schedules import Schedule
from lit_distill.graph.distillation import GraphDistiller
from lit_distill.graph.graphs import GraphBatch
from lit_distill.losses.local_structure import Kernel, local_structure_kl


class LSP(GraphDistiller):
    r"""The similarities of a node to its neighbors, as a distribution over them, follow the teacher's.

    .. math:: L = \gamma \, \mathrm{CE}(y, z^s) + \alpha T^2 \, \mathrm{KL}(p^t(T) \,\|\, p^s(T))
        + \frac{\beta}{|V|} \sum_{i \in V} \mathrm{KL}(P^t_i \,\|\, P^s_i)

    P is made of the embeddings that are read out (see `local_structure_kl`), so that no projector is needed. The paper
    classifies nodes and compares a middle layer; here graphs are classified, and V are the nodes of a batch. A student
    that sees no edges is compared along the edges that the data have. The public code has the structure term for the
    first 30 of 500 epochs alone, and no logits of the teacher; the `Steps` schedule does the former.

    Args:
        student: The `GraphNetwork` to train.
        teacher: The frozen `GraphNetwork`.
        structure_weight: The beta above.
        kernel: Similarity of two embeddings.
        sigma: Width of the rbf kernel, in units of squared distance.
        kwargs: See `GraphDistiller`, but for `feature_weight`.
    """

    reference = Reference(
        title="Distilling Knowledge from Graph Convolutional Networks",
        authors="Yang, Qiu, Song, Tao, Wang",
        year=2020,
        arxiv="2003.10477",
    )
    term = "structure"
    tap = "gnn"

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        structure_weight: float | Schedule = 100.0,
        kernel: Kernel = "rbf",
        sigma: float = 100.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, feature_weight=structure_weight, **kwargs)
        if sigma <= 0:
            raise UsageError(f"model.sigma is {sigma}; it must be above 0 (public code: 100)")
        self.kernel: Kernel = kernel
        self.sigma = sigma

    def compare(self, student: Tensor, teacher: Tensor, batch: GraphBatch) -> Tensor:
        """Returns the mean divergence over the nodes of a batch."""
        return local_structure_kl(student, teacher, batch.edge_index, kernel=self.kernel, sigma=self.sigma)
