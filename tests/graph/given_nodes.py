"""What tests of node networks share: a graph of two classes, and a data module over a graph that a test has made."""

import torch
from torch_geometric.nn.models import GraphSAGE

from lit_distill.graph.nodes import NodeDataModule, NodeGraph, NodeSource


def source(count=60, seed=0, width=5, split=None):
    """Nodes of two classes that differ in their mean, on a ring with random chords."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    features = torch.randn(count, width, generator=generator) + labels[:, None]
    ring = torch.stack([torch.arange(count), (torch.arange(count) + 1) % count])
    edges = torch.cat([ring, torch.randint(count, (2, count), generator=generator)], dim=1)
    return NodeSource(("a", "b"), NodeGraph(features, torch.cat([edges, edges.flip(0)], dim=1)), labels, split)


class Given(NodeDataModule):
    """A module over a graph that a test has made."""

    def __init__(self, given, **kwargs):
        super().__init__(**{"labels_per_class": 5, "val_per_class": 5, **kwargs})
        self.given = given

    def read(self):
        return self.given


def sage(seed=0, width=5, classes=2, **kwargs):
    torch.manual_seed(seed)
    return GraphSAGE(width, 8, 2, classes, **kwargs)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


def with_other_hidden_nodes():
    """The graph with other features and edges of the nodes that training must not see."""
    given = source()
    test = Given(given).part("test")
    hidden = test.index[test.unseen]
    given.graph.features[hidden] = 100.0
    touched = torch.isin(given.graph.edge_index, hidden).any(0)
    given.graph.edge_index[:, touched] = given.graph.edge_index[:, touched].flip(1)
    return given
