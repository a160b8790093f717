"""Sets of labelled graphs as flat tensors, and batches of them: no Python object per graph."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lit_distill.core.loading import EpochLoader, EpochPermutation


class GraphBatch(NamedTuple):
    """A batch of graphs, joined into one graph without edges between them.

    Attributes:
        labels: Class of each graph, (b,).
        nodes: Node features, (n, c) whole numbers, one column for each kind of feature; or soft ones, (n, v), a column
            for each value of each kind.
        edge_index: Source and target of each edge, (2, e).
        edges: Edge features, (e, d).
        graph: The graph of each node, (n,).
        roots: Which nodes the readout sees, (n,): all of a real graph, the roots of a computation tree.
        index: Positions of the graphs in their set, (b,).
        edge_weight: How much of each edge there is, (e,); None where all are whole.
    """

    labels: Int[Tensor, " b"]
    nodes: Int[Tensor, "n c"] | Float[Tensor, "n v"]
    edge_index: Int[Tensor, "2 e"]
    edges: Int[Tensor, "e d"]
    graph: Int[Tensor, " n"]
    roots: Bool[Tensor, " n"]
    index: Int[Tensor, " b"]  # type: ignore[assignment]  # tuple has a method of this name; nobody searches a batch
    edge_weight: Float[Tensor, " e"] | None = None


@dataclass(frozen=True)
class GraphSet:
    """Graphs joined into one: node numbers run through the whole set, and the parts of a graph stand together.

    Attributes:
        labels: Class of each graph, (g,).
        nodes: Node features, (n, c) whole numbers from 0, or soft ones, see `GraphBatch`.
        edge_index: (2, e). An undirected edge stands there in both directions.
        edges: Edge features, (e, d); d may be 0.
        node_start: Where the nodes of each graph begin, (g + 1,).
        edge_start: Where its edges begin, (g + 1,).
        roots: Which nodes the readout sees, (n,).
        edge_weight: How much of each edge there is, (e,); None where all are whole.
    """

    labels: Int[Tensor, " g"]
    nodes: Int[Tensor, "n c"] | Float[Tensor, "n v"]
    edge_index: Int[Tensor, "2 e"]
    edges: Int[Tensor, "e d"]
    node_start: Int[Tensor, " g1"]
    edge_start: Int[Tensor, " g1"]
    roots: Bool[Tensor, " n"]
    edge_weight: Float[Tensor, " e"] | None = None

    @property
    def size(self) -> int:
        """Number of graphs."""
        return len(self.labels)

    def graph(self) -> Int[Tensor, " n"]:
        """Returns the graph of each node."""
        return torch.arange(self.size, device=self.labels.device).repeat_interleave(self.node_start.diff())

    def take(self, index: Int[Tensor, " b"]) -> "GraphSet":
        """Returns some of the graphs, in the given order."""
        node_counts, edge_counts = self.node_start.diff()[index], self.edge_start.diff()[index]
        nodes = ranges(self.node_start[index], node_counts)
        edges = ranges(self.edge_start[index], edge_counts)
        node_start, edge_start = starts(node_counts), starts(edge_counts)
        moved = (node_start[:-1] - self.node_start[index]).repeat_interleave(edge_counts)
        return GraphSet(
            labels=self.labels[index],
            nodes=self.nodes[nodes],
            edge_index=self.edge_index[:, edges] + moved,
            edges=self.edges[edges],
            node_start=node_start,
            edge_start=edge_start,
            roots=self.roots[nodes],
            edge_weight=None if self.edge_weight is None else self.edge_weight[edges],
        )

    def batch(self, index: Int[Tensor, " b"]) -> GraphBatch:
        """Returns some of the graphs as a batch."""
        taken = self.take(index)
        return GraphBatch(
            labels=taken.labels,
            nodes=taken.nodes,
            edge_index=taken.edge_index,
            edges=taken.edges,
            graph=taken.graph(),
            roots=taken.roots,
            index=index,
            edge_weight=taken.edge_weight,
        )

    def to(self, device: torch.device) -> "GraphSet":
        """Returns the same on a device."""
        moved: dict[str, Any] = {
            name: value if value is None else value.to(device) for name, value in vars(self).items()
        }
        return GraphSet(**moved)

    def stored_bytes(self) -> int:
        """Counts the bytes that rebuild the set: 4 a node feature, edge feature and edge weight, 8 an edge.

        Labels and the starts of graphs are not in it, for any method.
        """
        weights = 0 if self.edge_weight is None else len(self.edge_weight)
        return 4 * self.nodes.numel() + 8 * self.edge_index.shape[1] + 4 * self.edges.numel() + 4 * weights


def join(sets: list[GraphSet]) -> GraphSet:
    """Puts sets of graphs one behind the other."""
    weighted = any(part.edge_weight is not None for part in sets)
    nodes = torch.tensor([0, *(len(part.nodes) for part in sets)]).cumsum(0)
    edges = torch.tensor([0, *(part.edge_index.shape[1] for part in sets)]).cumsum(0)
    return GraphSet(
        labels=torch.cat([part.labels for part in sets]),
        nodes=torch.cat([part.nodes for part in sets]),
        edge_index=torch.cat([part.edge_index + first for part, first in zip(sets, nodes, strict=False)], dim=1),
        edges=torch.cat([part.edges for part in sets]),
        node_start=torch.cat([*(s.node_start[:-1] + first for s, first in zip(sets, nodes, strict=False)), nodes[-1:]]),
        edge_start=torch.cat([*(s.edge_start[:-1] + first for s, first in zip(sets, edges, strict=False)), edges[-1:]]),
        roots=torch.cat([part.roots for part in sets]),
        edge_weight=torch.cat([_weights(part) for part in sets]) if weighted else None,
    )


def _weights(graphs: GraphSet) -> Float[Tensor, " e"]:
    return torch.ones(graphs.edge_index.shape[1]) if graphs.edge_weight is None else graphs.edge_weight


class GraphLoader(EpochLoader):
    """Batches of a set of graphs that lies in memory, selected whole.

    A set that fits into one batch is batched once: the order within a batch does not matter.

    Args:
        graphs: The set.
        sampler: The order of graphs.
        batch_size: Graphs per step over all ranks.
        device: Where the set lies.
        kwargs: See `EpochLoader`.
    """

    def __init__(
        self, graphs: GraphSet, sampler: EpochPermutation, batch_size: int, *, device: torch.device, **kwargs: Any
    ) -> None:
        super().__init__(sampler, batch_size, **kwargs)
        self.graphs = graphs.to(device)
        self.device = device
        self._whole: GraphBatch | None = None

    def _batches(self, epoch: int, start: int) -> Iterator[GraphBatch]:
        if len(self) == 1 and self.world_size == 1 and self._every_graph_once():
            if start == 0:
                if self._whole is None:
                    self._whole = self.graphs.batch(torch.arange(self.graphs.size, device=self.device))
                yield self._whole
            return
        order = self.sampler.order()
        for number in range(start, len(self)):
            first, stop = self._bounds(number)
            index = order[first:stop][self._share(stop - first)]
            yield self.graphs.batch(index.to(self.device))

    def _every_graph_once(self) -> bool:
        return type(self.sampler) is EpochPermutation


class WeightedSampler(EpochPermutation):
    """Draws as many graphs an epoch as there are, each time one with a probability of its own.

    Args:
        weights: Probabilities up to a factor, (g,).
        seed: Seed of the draws, with the epoch.
    """

    def __init__(self, weights: Tensor, seed: int = 0) -> None:
        super().__init__(len(weights), seed)
        self.weights = weights.double()

    def order(self) -> Tensor:
        """Returns the graphs of the current epoch, (g,)."""
        # Where the cumulated weights pass a random height; torch.multinomial takes no more than 2^24 of them.
        heights = torch.rand(self.size, generator=self.generator(), dtype=torch.float64)
        steps = self.weights.cumsum(0)
        return torch.searchsorted(steps, heights * steps[-1], right=True).clamp(max=self.size - 1)


def ranges(firsts: Int[Tensor, " n"], counts: Int[Tensor, " n"]) -> Int[Tensor, " total"]:
    """Joins the ranges of whole numbers that begin at `firsts` and have `counts` members."""
    total = int(counts.sum())
    before = starts(counts)[:-1]
    return torch.arange(total, device=firsts.device) + (firsts - before).repeat_interleave(counts)


def starts(counts: Int[Tensor, " n"]) -> Int[Tensor, " n1"]:
    """Returns where parts of the given lengths begin, and at last where they end."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
