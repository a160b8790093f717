"""A graph classifier around any message-passing network."""

from collections.abc import Sequence
from inspect import signature
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.graph.graphs import GraphBatch


class GraphNetwork(nn.Module):
    """Embeds labels, passes messages, and reads out a class from the nodes that the batch marks as roots.

    In a real graph every node is a root. In a set of computation trees only the first node of each tree is: its
    embedding is that of the node from which the tree was taken, if the messages depend on nothing but the tree (sums
    and attention do, the normalization by degree of a GCN does not, nor does batch normalization in training).

    A batch may have weights on its edges, for networks that read them, and soft node labels: a row is then a mixture of
    values, and its embedding the mixture of theirs.

    Args:
        gnn: Computes node embeddings (n, out) from node features (n, in) and an edge index, such as any of
            `torch_geometric.nn.models` (GIN, GCN, GAT, GraphSAGE).
        node_values: Number of values of each node feature; each has an embedding of its own, and they are added.
        num_classes: K.
        edge_values: The same of edge features, for networks that take `edge_attr`; edge features are not read if empty.
        readout: How the roots of a graph become one vector.
        dropout: Share of the readout's entries that are dropped in training.
        in_channels: Width of the embeddings; that of the network's input if None.
        out_channels: Width of what the network returns; that which it names if None.
    """

    def __init__(
        self,
        gnn: nn.Module,
        node_values: Sequence[int],
        num_classes: int,
        edge_values: Sequence[int] = (),
        readout: Literal["sum", "mean"] = "sum",
        dropout: float = 0.0,
        in_channels: int | None = None,
        out_channels: int | None = None,
    ) -> None:
        super().__init__()
        width_in = in_channels or getattr(gnn, "in_channels", None)
        width_out = out_channels or getattr(gnn, "out_channels", None)
        if not isinstance(width_in, int) or not isinstance(width_out, int):
            raise UsageError(f"{type(gnn).__name__} does not name its widths; give in_channels and out_channels")
        if edge_values and not _reads(gnn, "edge_attr"):
            raise UsageError(f"{type(gnn).__name__} takes no edge_attr; leave edge_values out, or take another network")
        self.gnn = gnn
        self.reads_edge_weight = _reads(gnn, "edge_weight")
        self.node_values, self.edge_values = tuple(node_values), tuple(edge_values)
        self.num_classes = num_classes
        self.readout = readout
        self.node_embeddings = nn.ModuleList(nn.Embedding(values, width_in) for values in self.node_values)
        widths = (getattr(module, "edge_dim", None) for module in gnn.modules())  # of the convolutions inside
        edge_width = next((width for width in widths if isinstance(width, int)), width_in)
        self.edge_embeddings = nn.ModuleList(nn.Embedding(values, edge_width) for values in self.edge_values)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width_out, num_classes)

    def forward(self, batch: GraphBatch) -> Float[Tensor, "b k"]:
        """Computes logits."""
        return self.head(self.dropout(self.embed(batch)))

    def embed(self, batch: GraphBatch) -> Float[Tensor, "b d"]:
        """Computes what the head reads: the sum or mean of the roots' embeddings."""
        roots = self.embed_nodes(batch)[batch.roots]
        graph = batch.graph[batch.roots]
        total = roots.new_zeros((len(batch.labels), roots.shape[1])).index_add(0, graph, roots)
        if self.readout == "sum":
            return total
        return total / torch.bincount(graph, minlength=len(total)).clamp(min=1).unsqueeze(1)

    def embed_nodes(self, batch: GraphBatch) -> Float[Tensor, "n d"]:
        """Computes the embeddings of all nodes."""
        of_edges: dict[str, Tensor] = {}
        if self.edge_values:
            of_edges["edge_attr"] = _added(self.edge_embeddings, batch.edges)
        if batch.edge_weight is not None:
            self.check_edge_weight()
            of_edges["edge_weight"] = batch.edge_weight
        return self.gnn(_added(self.node_embeddings, batch.nodes), batch.edge_index, **of_edges)

    def check_edge_weight(self) -> None:
        """Checks that the network reads weights of edges.

        Raises:
            UsageError: It does not.
        """
        if not self.reads_edge_weight:
            raise UsageError(f"{type(self.gnn).__name__} takes no edge_weight; take another network, such as GCN")


class DeepSets(nn.Module):
    """A network without messages: the same perceptron on every node. What a graph network is measured against.

    Args:
        in_channels: Width of the node features.
        hidden_channels: Width of the layers.
        num_layers: Number of layers.

    Reference: Zaheer, Kottur, Ravanbakhsh, Poczos, Salakhutdinov, Smola, Deep Sets, 2017, arXiv 1703.06114.
    """

    def __init__(self, in_channels: int, hidden_channels: int, num_layers: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, hidden_channels
        widths = [in_channels, *[hidden_channels] * num_layers]
        layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Float[Tensor, "n d"], edge_index: Int[Tensor, "2 e"]) -> Float[Tensor, "n h"]:
        """Computes node embeddings; edges are not looked at."""
        return self.layers(x)


def _added(embeddings: nn.ModuleList, features: Tensor) -> Tensor:
    if features.is_floating_point():
        return features @ torch.cat([embedding.weight for embedding in embeddings])  # type: ignore[misc]  # a ModuleList does not say what it holds
    columns = [embedding(features[:, number]) for number, embedding in enumerate(embeddings)]
    return sum(columns[1:], start=columns[0])


def _reads(gnn: nn.Module, argument: str) -> bool:
    # torch-geometric's networks all have the arguments, and say of themselves which they read.
    return getattr(gnn, f"supports_{argument}", argument in signature(gnn.forward).parameters)
