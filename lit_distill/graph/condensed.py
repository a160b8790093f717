"""Condensed graphs: a few dense graphs with learned features and adjacency, in training and on disk."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.core.files import atomic_path, write_json
from lit_distill.graph.distilled import DESCRIPTION, load_set
from lit_distill.graph.graphs import GraphBatch, GraphSet, ranges, starts

KIND, VERSION = "graphs", 1
TENSORS = "graphs.safetensors"
EDGE_LOGIT = 5.0
NOISE_MARGIN = 1e-4


def relaxed_adjacency(
    logits: Float[Tensor, "g n n"], noise: Float[Tensor, "g n n"], *, temperature: float
) -> Float[Tensor, "g n n"]:
    r"""Draws adjacency matrices from Bernoulli logits such that gradients pass (Gumbel-sigmoid).

    .. math:: A = \sigma\!\left(\frac{O + \log u - \log(1 - u)}{t}\right), \qquad O = \frac{\Omega + \Omega^\top}{2},
        \qquad A_{ii} = 0

    Args:
        logits: Omega (g, n, n).
        noise: u (g, n, n), uniform between 0 and 1. What stands above the diagonal is used, for both directions, and
            kept 1e-4 away from 0 and 1. One half everywhere is no noise.
        temperature: t > 0; the smaller, the nearer are the entries to 0 and 1.

    Returns:
        (g, n, n), symmetric, with a zero diagonal.

    Reference: Jin et al., Condensing Graphs via One-Step Gradient Matching, 2022, arXiv 2206.07746; the relaxation is
    that of Maddison, Mnih, Teh, The Concrete Distribution, 2016, arXiv 1611.00712.
    """
    upper = noise.clamp(NOISE_MARGIN, 1 - NOISE_MARGIN).logit().triu(1)
    relaxed = ((_symmetric(logits) + upper + upper.mT) / temperature).sigmoid()
    return relaxed * _off_diagonal(logits)


def annealed_temperature(iteration: int, *, start: float = 1.0, end: float = 0.01, iterations: int = 200) -> float:
    r"""Returns the temperature of `relaxed_adjacency` at an iteration.

    .. math:: t_k = \max\big(t_{end},\; t_{start} (t_{end} / t_{start})^{k / K}\big)

    Args:
        iteration: k, from 0.
        start: Temperature at the beginning.
        end: Temperature from iteration K on.
        iterations: K.
    """
    return max(end, start * (end / start) ** (iteration / iterations))


class SyntheticGraphs(nn.Module):
    """Graphs as parameters: features and the logits of an adjacency, all graphs of the same number of nodes.

    All nodes are read out, also those that have neither features nor edges at the beginning.

    Args:
        features: Soft node labels X', (g, n, v): a column for each value of each kind of feature.
        adjacency: Of the graphs to begin with, (g, n, n).
        labels: Class of each graph, (g,).

    Attributes:
        features: The parameter X'.
        logits: The parameter Omega, (g, n, n): 5 where there is an edge at the beginning, -5 elsewhere.
        labels: (g,).
        density: Share of entries of the adjacency that are edges at the beginning, a scalar.
    """

    labels: Int[Tensor, " g"]
    density: Float[Tensor, ""]
    ends: Int[Tensor, "2 m"]

    def __init__(
        self, features: Float[Tensor, "g n v"], adjacency: Bool[Tensor, "g n n"], labels: Int[Tensor, " g"]
    ) -> None:
        super().__init__()
        self.features = nn.Parameter(features.clone())
        self.logits = nn.Parameter((2 * adjacency.to(features.dtype) - 1) * EDGE_LOGIT)
        self.register_buffer("labels", labels.clone())
        self.register_buffer("density", adjacency.to(features.dtype).mean())
        every = _off_diagonal(self.logits).nonzero().T.contiguous()
        self.register_buffer("ends", every, persistent=False)

    @classmethod
    def from_graphs(
        cls, graphs: GraphSet, node_values: Sequence[int], *, nodes: int, per_class: int, classes: Sequence[str]
    ) -> "SyntheticGraphs":
        """Begins with real graphs that are drawn at random from those small enough, class after class.

        Nodes up to the number asked for are added, without features and edges. Edge labels are dropped.

        Args:
            graphs: The real graphs.
            node_values: Number of values of each node feature.
            nodes: n.
            per_class: Graphs of each class.
            classes: Names of the classes.

        Raises:
            UsageError: `nodes` is more than the largest graph has, or a class has too few graphs that small.
        """
        sizes = graphs.node_start.diff()
        if not 1 <= nodes <= sizes.max():
            raise UsageError(
                f"model.nodes is {nodes}; the largest training graph has {int(sizes.max())} nodes, give 1 up to that"
            )
        chosen = []
        for number, name in enumerate(classes):
            fitting = ((graphs.labels == number) & (sizes <= nodes)).nonzero()[:, 0]
            if len(fitting) < per_class:
                raise UsageError(
                    f"model.per_class is {per_class}; class '{name}' has {len(fitting)} training graphs of at most "
                    f"{nodes} nodes; lower it, or raise model.nodes"
                )
            chosen.append(fitting[torch.randperm(len(fitting))[:per_class]])
        return cls(*dense(graphs.take(torch.cat(chosen)), node_values, nodes=nodes))

    def adjacency(self, temperature: float, noise: Float[Tensor, "g n n"] | None = None) -> Float[Tensor, "g n n"]:
        """Draws the adjacency of all graphs, see `relaxed_adjacency`; with new noise if none is given."""
        noise = torch.rand_like(self.logits) if noise is None else noise
        return relaxed_adjacency(self.logits, noise, temperature=temperature)

    @torch.no_grad()
    def hard(self) -> Bool[Tensor, "g n n"]:
        """Returns the edges whose probability is above one half."""
        return (_symmetric(self.logits) > 0) & _off_diagonal(self.logits)

    def batch(self, index: Int[Tensor, " b"], adjacency: Float[Tensor, "b n n"]) -> GraphBatch:
        """Makes a batch of some of the graphs: all pairs of nodes are edges, and the adjacency is their weight.

        Args:
            index: Positions of the graphs.
            adjacency: Of these graphs.
        """
        count, size = len(index), self.features.shape[1]
        device = index.device
        first = torch.arange(count, device=device)[:, None] * size
        source, target = self.ends
        return GraphBatch(
            labels=self.labels[index],
            nodes=self.features[index].flatten(0, 1),
            edge_index=torch.stack([(source + first).flatten(), (target + first).flatten()]),
            edges=torch.zeros((count * len(source), 0), dtype=torch.long, device=device),
            graph=torch.arange(count * size, device=device) // size,
            roots=torch.ones(count * size, dtype=torch.bool, device=device),
            index=index,
            edge_weight=adjacency[:, source, target].flatten(),
        )


def dense(
    graphs: GraphSet, node_values: Sequence[int], *, nodes: int
) -> tuple[Float[Tensor, "g n v"], Bool[Tensor, "g n n"], Int[Tensor, " g"]]:
    """Writes graphs as padded matrices.

    Args:
        graphs: Graphs of at most `nodes` nodes.
        node_values: Number of values of each node feature.
        nodes: n.

    Returns:
        One-hot features, zero where there is no node; adjacency; labels.
    """
    owner = graphs.graph()
    place = ranges(torch.zeros_like(graphs.labels), graphs.node_start.diff())
    features = torch.zeros((graphs.size, nodes, sum(node_values)), device=owner.device)
    features[owner, place] = soft_labels(graphs.nodes, node_values)
    adjacency = torch.zeros((graphs.size, nodes, nodes), dtype=torch.bool, device=owner.device)
    source, target = graphs.edge_index
    adjacency[owner[source], place[source], place[target]] = True
    return features, adjacency, graphs.labels


def soft_labels(nodes: Int[Tensor, "n c"], node_values: Sequence[int]) -> Float[Tensor, "n v"]:
    """Writes node features as rows of zeros and ones: a block of columns for each kind, a column for each value."""
    blocks = [F.one_hot(nodes[:, number], values) for number, values in enumerate(node_values)]
    return torch.cat(blocks, dim=1).float()


@dataclass(frozen=True)
class CondensedGraphs:
    """A condensed training set. Needs nothing of the data that it was made from.

    Attributes:
        features: Soft node labels, (g, n, v).
        adjacency: (g, n, n), symmetric.
        labels: Class of each graph, (g,).
        classes: Names of the classes.
        node_values: Number of values of each node feature in the data; v is their sum.
        edge_values: Empty: edges have no labels.
        description: How it was made.
    """

    features: Float[Tensor, "g n v"]
    adjacency: Bool[Tensor, "g n n"]
    labels: Int[Tensor, " g"]
    classes: tuple[str, ...]
    node_values: tuple[int, ...]
    edge_values: tuple[int, ...]
    description: dict[str, Any]

    @property
    def size(self) -> int:
        """Number of graphs."""
        return len(self.labels)

    def graphs(self) -> GraphSet:
        """Makes ordinary graphs with soft node labels; any network trains on them."""
        nodes = self.features.shape[1]
        graph, source, target = self.adjacency.nonzero().unbind(1)
        count = torch.full((self.size,), nodes, device=graph.device)
        return GraphSet(
            labels=self.labels,
            nodes=self.features.flatten(0, 1),
            edge_index=torch.stack([source, target]) + nodes * graph,
            edges=torch.zeros((len(graph), 0), dtype=torch.long, device=graph.device),
            node_start=starts(count),
            edge_start=starts(self.adjacency.sum((1, 2))),
            roots=torch.ones(self.size * nodes, dtype=torch.bool, device=graph.device),
        )

    def footprint(self) -> dict[str, int]:
        """Counts bytes.

        Returns:
            "bytes": 4 for each entry of features and adjacency, both dense, as the literature counts condensed graphs.
            "bytes_expanded": of the graphs that networks train on, by `GraphSet.stored_bytes`.
        """
        dense_bytes = 4 * (self.features.numel() + self.adjacency.numel())
        return {"bytes": dense_bytes, "bytes_expanded": self.graphs().stored_bytes()}

    # ---- on disk ---------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Writes the set to a folder: tensors as safetensors, everything else as JSON."""
        tensors = {name: value.contiguous() for name, value in vars(self).items() if isinstance(value, Tensor)}
        with atomic_path(Path(folder) / TENSORS) as path:
            save_file(tensors, path)
        rest = {name: value for name, value in vars(self).items() if name not in tensors}
        write_json(Path(folder) / DESCRIPTION, {"kind": KIND, "version": VERSION, **rest})

    @classmethod
    def load(cls, folder: str | Path) -> "CondensedGraphs":
        """Reads a set that `save` wrote.

        Raises:
            UsageError: There is none, or it is of another version.
            RunError: A file cannot be read.
        """
        return load_set(cls, folder, TENSORS, kind=KIND, version=VERSION, remedy="condense again")


def _symmetric(logits: Float[Tensor, "g n n"]) -> Float[Tensor, "g n n"]:
    return (logits + logits.mT) / 2


def _off_diagonal(logits: Float[Tensor, "g n n"]) -> Bool[Tensor, "n n"]:
    return ~torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
