"""Losses between the local structures of graph embeddings: how a node's neighbors are placed around it."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lit_distill.losses.precision import in_float32
from lit_distill.losses.reduction import Reduction, reduce

Kernel = Literal["rbf", "linear", "polynomial", "euclidean"]


@in_float32
def local_structure_kl(
    student_nodes: Float[Tensor, "n ds"],
    teacher_nodes: Float[Tensor, "n dt"],
    edge_index: Int[Tensor, "2 e"],
    *,
    kernel: Kernel = "rbf",
    sigma: float = 100.0,
    reduction: Reduction = "batchmean",
) -> Tensor:
    r"""Computes KL(teacher || student) between each node's distributions over its neighbors.

    .. math:: \sum_{j \in N(i)} P^t_{ij} (\log P^t_{ij} - \log P^s_{ij}), \qquad
        P_{ij} = \frac{\exp k(z_i, z_j)}{\sum_{l \in N(i)} \exp k(z_i, z_l)}

    Neighbors of i are the sources of the edges that end in i. A node with one neighbor or none has a loss of 0, and
    counts in the mean over nodes. The widths of the embeddings may differ. Kernels:

    .. math:: \text{rbf: } e^{-\lVert z_i - z_j \rVert^2 / 2 \sigma}, \quad \text{linear: } z_i^\top z_j, \quad
        \text{polynomial: } (z_i^\top z_j)^2, \quad \text{euclidean: } \lVert z_i - z_j \rVert

    The last is a distance, so that there the far neighbors weigh most. The public code has one kernel,
    :math:`e^{-\lVert z_i - z_j \rVert_1 / 100}`, and the direction of KL that stands here; the other kernels, the
    squared norm and the constants are reconstructions.

    Args:
        student_nodes: (N, D_s).
        teacher_nodes: (N, D_t), detached here.
        edge_index: Source and target of each edge, (2, E).
        kernel: Which similarity.
        sigma: Width of the rbf kernel, in units of squared distance.
        reduction: "batchmean" (mean over nodes), "sum", or "none" for one value per node, (N,).

    Returns:
        Scalar, or (N,).

    Reference: Yang, Qiu, Song, Tao, Wang, Distilling Knowledge from Graph Convolutional Networks, 2020, arXiv
    2003.10477.
    """
    log_student = _local_structure(student_nodes, edge_index, kernel, sigma)
    log_teacher = _local_structure(teacher_nodes.detach(), edge_index, kernel, sigma)
    of_edges = log_teacher.exp() * (log_teacher - log_student)
    return reduce(of_edges.new_zeros(len(student_nodes)).index_add(0, edge_index[1], of_edges), reduction)


def _local_structure(nodes: Tensor, edge_index: Tensor, kernel: Kernel, sigma: float) -> Float[Tensor, " e"]:
    """Computes the log-probability of each edge among those with the same target."""
    source, target = edge_index
    similarity = _similarity(nodes[target], nodes[source], kernel, sigma)
    # In log space: where the kernel is not bounded, a softmax would underflow to 0, whose logarithm is not finite.
    largest = similarity.new_full((len(nodes),), -torch.inf)
    largest = largest.scatter_reduce(0, target, similarity.detach(), "amax")
    similarity = similarity - largest[target]
    totals = similarity.new_zeros(len(nodes)).index_add(0, target, similarity.exp())
    return similarity - totals[target].log()


def _similarity(first: Tensor, second: Tensor, kernel: Kernel, sigma: float) -> Float[Tensor, " e"]:
    if kernel == "rbf":
        return ((first - second).square().sum(1) / (-2 * sigma)).exp()
    if kernel == "linear":
        return (first * second).sum(1)
    if kernel == "polynomial":
        return (first * second).sum(1).square()
    if kernel == "euclidean":
        return torch.linalg.vector_norm(first - second, dim=1)
    raise ValueError(f"kernel is '{kernel}'; use 'rbf', 'linear', 'polynomial' or 'euclidean'")
