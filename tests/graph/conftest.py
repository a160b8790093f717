"""Graphs small enough to reason about."""

import numpy as np
import pytest
import torch
from given import Given

from lit_distill.graph.graphs import GraphSet, starts


def graph_set(graphs, labels, columns=1):
    """Makes a set of (node labels, undirected edges, edge labels or None) triples."""
    nodes, ends, kinds, node_counts, edge_counts = [], [], [], [], []
    with_kinds = any(edge_labels is not None for _, _, edge_labels in graphs)
    for own, edges, edge_labels in graphs:
        first = len(nodes)
        for number, (u, v) in enumerate(edges):
            ends += [(first + u, first + v), (first + v, first + u)]
            kinds += [edge_labels[number] if edge_labels is not None else 0] * 2
        nodes += list(own)
        node_counts.append(len(own))
        edge_counts.append(2 * len(edges))
    return GraphSet(
        labels=torch.tensor(labels),
        nodes=torch.tensor(nodes).reshape(-1, columns) if columns else torch.zeros((len(nodes), 0), dtype=torch.long),
        edge_index=torch.tensor(ends, dtype=torch.long).reshape(-1, 2).T.contiguous(),
        edges=torch.tensor(kinds, dtype=torch.long).reshape(-1, 1)[:, : int(with_kinds)],
        node_start=starts(torch.tensor(node_counts)),
        edge_start=starts(torch.tensor(edge_counts)),
        roots=torch.ones(len(nodes), dtype=torch.bool),
    )


def random_graph(rng, nodes=12, labels=3, kinds=None, density=0.25):
    pairs = [(u, v) for u in range(nodes) for v in range(u) if rng.random() < density]
    edge_labels = None if kinds is None else rng.integers(0, kinds, len(pairs)).tolist()
    return rng.integers(0, labels, nodes).tolist(), pairs, edge_labels


@pytest.fixture
def make_set():
    return graph_set


@pytest.fixture
def random_set():
    """Builds a set of random graphs: labels of nodes and perhaps of edges, isolated nodes among them."""

    def build(count=20, classes=2, seed=0, **kwargs):
        rng = np.random.default_rng(seed)
        graphs = [random_graph(rng, **kwargs) for _ in range(count)]
        return graph_set(graphs, [number % classes for number in range(count)])

    return build


@pytest.fixture
def data(random_set):
    """A module over 40 random graphs, all training graphs in one batch."""
    data = Given(random_set(count=40), batch_size=100)
    data.setup()
    return data
