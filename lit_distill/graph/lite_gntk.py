r"""LiteGNTK: the tangent kernel of a wide graph network with a single nonlinearity, between sets of graphs.

For graphs :math:`(X, A)` and :math:`(X', A')` the kernel between nodes is

.. math:: \Sigma = A (X X'^\top + \epsilon) A'^\top, \qquad
    \Theta_0 = \Sigma \odot \dot\kappa(C) + \kappa(C), \qquad
    \Theta_l = A \, \Theta_{l-1} A'^\top, \qquad K = \text{mean of } \Theta_{L-1}

with the cosines :math:`C_{uv} = \Sigma_{uv} / \sqrt{\Sigma_{uu} \Sigma'_{vv}}`, each root from a graph with itself,
:math:`\kappa(c) = \frac{1}{\pi} (c (\pi - \arccos c) + \sqrt{1 - c^2})` and
:math:`\dot\kappa(c) = 1 - \frac{1}{\pi} \arccos c`.

Neither end needs a product over pairs of nodes. :math:`\Sigma` is an inner product of aggregated features, and the
propagations after the nonlinearity are linear, so they are moved onto the mean:

.. math:: \Sigma_{uv} = \langle p_u, p'_v \rangle, \quad p = A [X, \sqrt\epsilon \, 1], \qquad
    K = \sum_{uv} w_u w'_v \Theta_{0,uv}, \quad w = \frac{1}{N} (A^\top)^{L-1} 1

So a graph is a weighted set of points, whether its adjacency is dense or sparse, and a kernel is one matrix product,
one elementwise function and one sum by graph. Nodes with the same label whose neighbors have the same labels are the
same point: the 35,416 nodes of the training part of PROTEINS are 280 points, those of NCI1 97,990 and 268.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lit_distill.graph.graphs import ranges, starts
from lit_distill.losses.precision import in_float32

Scale = Literal["uniform", "degree"]

SELF_WEIGHT = 1e-4  # of a node in its own aggregation
OFFSET = 1e-4  # epsilon above; without it a node without features would have no direction
LARGEST_COSINE = 0.9999  # the slope of arccos is infinite at 1
BLOCK = 2**23  # pairs of points at a time


@dataclass(frozen=True)
class GraphPoints:
    """Graphs as the kernel sees them; the nodes of a graph stand together.

    Attributes:
        points: Aggregated features, (p, d).
        place: The point of each node, (n,).
        weights: Share of each node in its graph, (n,); 0 for padding.
        node_start: Where the nodes of each graph begin, (g + 1,).
    """

    points: Float[Tensor, "p d"]
    place: Int[Tensor, " n"]
    weights: Float[Tensor, " n"]
    node_start: Int[Tensor, " g1"]

    @property
    def size(self) -> int:
        """Number of graphs."""
        return len(self.node_start) - 1

    def graph(self) -> Int[Tensor, " n"]:
        """Returns the graph of each node."""
        return torch.arange(self.size, device=self.place.device).repeat_interleave(self.node_start.diff())

    def take(self, index: Int[Tensor, " b"]) -> "GraphPoints":
        """Returns some of the graphs, in the given order, with their points alone."""
        counts = self.node_start.diff()[index]
        nodes = ranges(self.node_start[index], counts)
        used, place = torch.unique(self.place[nodes], return_inverse=True)
        return GraphPoints(self.points[used], place, self.weights[nodes], starts(counts))


def dense_points(
    features: Float[Tensor, "g n f"],
    adjacency: Float[Tensor, "g n n"],
    mask: Bool[Tensor, "g n"] | None = None,
    *,
    depth: int = 5,
    scale: Scale = "uniform",
) -> GraphPoints:
    """Aggregates graphs of equal or padded size with dense, weighted adjacencies. Costs g n^2 (f + depth).

    Args:
        features: X (g, n, f).
        adjacency: A (g, n, n), without a node's own weight. Need not be symmetric: rows are those that gather.
        mask: Which nodes there are; all if None. What stands in the rest of X and A plays no part.
        depth: L > 0, number of aggregations.
        scale: "uniform" sums over neighbors; "degree" divides by the sum of a row of A at every aggregation.

    Returns:
        A point for each of the g n nodes.
    """
    count, nodes, _ = features.shape
    present = features.new_ones((count, nodes)) if mask is None else mask.to(features.dtype)
    if mask is not None:
        features = torch.where(mask[..., None], features, 0.0)
        adjacency = torch.where(mask[:, :, None] & mask[:, None, :], adjacency, 0.0)
    adjacency = adjacency + SELF_WEIGHT * torch.eye(nodes, dtype=adjacency.dtype, device=adjacency.device)
    if scale == "degree":
        adjacency = adjacency / adjacency.sum(2, keepdim=True)
    weights = (present / present.sum(1, keepdim=True))[:, None, :]  # a row vector, to be moved back along edges
    with torch.autocast(features.device.type, enabled=False):
        points = adjacency @ _with_offset(features)
        for _ in range(depth - 1):
            weights = weights @ adjacency
    each = torch.arange(count * nodes, device=features.device)
    node_start = torch.arange(count + 1, device=features.device) * nodes
    return GraphPoints(points.flatten(0, 1), each, weights.flatten(), node_start)


def sparse_points(
    features: Float[Tensor, "n f"],
    edge_index: Int[Tensor, "2 e"],
    node_start: Int[Tensor, " g1"],
    *,
    depth: int = 5,
    scale: Scale = "uniform",
) -> GraphPoints:
    """Aggregates graphs that are joined into one, edge by edge. Costs (n + e) (f + depth), and a sort of rows.

    Args:
        features: X (n, f), of all graphs; a constant.
        edge_index: Source and target of each edge, (2, e); a target gathers from its sources.
        node_start: Where the nodes of each graph begin, (g + 1,).
        depth: L > 0, number of aggregations.
        scale: As in `dense_points`.

    Returns:
        The distinct points.
    """
    source, target = edge_index
    weight = features.new_ones(len(source))
    own = features.new_full((len(features),), SELF_WEIGHT)
    if scale == "degree":
        total = own.index_add(0, target, weight)
        weight, own = weight / total[target], own / total
    offset = _with_offset(features)
    points = (own[:, None] * offset).index_add(0, target, weight[:, None] * offset[source])
    counts = node_start.diff()
    weights = (1 / counts.to(features.dtype)).repeat_interleave(counts)
    for _ in range(depth - 1):
        weights = (own * weights).index_add(0, source, weight * weights[target])
    distinct, place = torch.unique(points, dim=0, return_inverse=True)
    return GraphPoints(distinct, place, weights, node_start)


def lite_gntk(first: GraphPoints, second: GraphPoints) -> Float[Tensor, "m n"]:
    """Computes the kernel between every graph of one set and every graph of another.

    Some six numbers for each pair of points are kept for the gradient; without a gradient, for 2^23 pairs at a time. 16
    graphs of 60 nodes with themselves are 0.9 million pairs, 22 MB. The clamping of cosines at +-0.9999 is that of the
    public code, which besides adds 1e-6 to what they are divided by. Its mean runs over the padding of a batch, too,
    so that there a kernel depends on the largest graph of the batch; here it runs over a graph's own nodes. With the
    scale "degree" it divides once for all aggregations after the first, here each of them is a mean.

    Args:
        first: Graphs of the rows.
        second: Graphs of the columns; the smaller set, for speed.

    Returns:
        K (m, n), in float32 or what is wider.

    Reference: Xu et al., Kernel Ridge Regression-Based Graph Dataset Distillation, 2023 (KDD, no arXiv entry); after
    Du, Hou, Poczos, Salakhutdinov, Wang, Xu, Graph Neural Tangent Kernel, 2019, arXiv 1905.13192.
    """
    shares = second.weights.new_zeros((len(second.points), second.size))
    shares = shares.index_put((second.place, second.graph()), second.weights, accumulate=True)
    rows = max(1, BLOCK // len(second.points))
    parts = [_weighted_kernel(points, second.points, shares) for points in first.points.split(rows)]
    nodes = torch.cat(parts)[first.place] * first.weights[:, None]
    return nodes.new_zeros((first.size, second.size)).index_add(0, first.graph(), nodes)


@in_float32
def _weighted_kernel(
    first: Float[Tensor, "n d"], second: Float[Tensor, "m d"], shares: Float[Tensor, "m g"]
) -> Float[Tensor, "n g"]:
    """Sums the kernel between points over the nodes of each of the second graphs."""
    inner = first @ second.T
    cosine = F.normalize(first, dim=1, eps=0) @ F.normalize(second, dim=1, eps=0).T
    cosine = cosine.clamp(-LARGEST_COSINE, LARGEST_COSINE)
    slope = 1 - cosine.arccos() / math.pi
    value = cosine * slope + (1 - cosine.square()).sqrt() / math.pi
    return (inner * slope + value) @ shares


def _with_offset(features: Tensor) -> Tensor:
    return F.pad(features, (0, 1), value=math.sqrt(OFFSET))
