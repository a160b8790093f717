from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import torch
from torch_geometric.nn import WLConv
from torch_geometric.nn.models import GAT, GCN, GIN, GraphSAGE

from lit_distill.core.errors import UsageError
from lit_distill.graph import trees as module
from lit_distill.graph.data import TUDataModule
from lit_distill.graph.trees import computation_trees, computation_trees_by_graph, ranges

SHARED = Path(__file__).parents[3] / "shared/data/tu"


def trees_of(graphs, depth):
    edges = graphs.edges[:, 0].numpy() if graphs.edges.shape[1] else None
    return computation_trees(graphs.nodes[:, 0].numpy(), graphs.edge_index.numpy(), edges, depth)


def canonical(graphs, depth):
    """The definition, written as nested tuples."""
    neighbors = {node: [] for node in range(len(graphs.nodes))}
    for number, (source, target) in enumerate(graphs.edge_index.T.tolist()):
        kind = int(graphs.edges[number, 0]) if graphs.edges.shape[1] else 0
        neighbors[target].append((kind, source))

    def tree(node, left):
        label = int(graphs.nodes[node, 0])
        children = () if left == 0 else tuple(sorted((kind, tree(u, left - 1)) for kind, u in neighbors[node]))
        return label, children

    return [tree(node, depth) for node in neighbors]


def same_partition(first, second):
    pairs = set(zip(first, second, strict=True))
    return len(pairs) == len(set(first)) == len(set(second))


@pytest.mark.parametrize("kinds", [None, 2])
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_nodes_share_a_tree_exactly_where_the_definition_is_equal(random_set, depth, kinds):
    graphs = random_set(kinds=kinds)
    table, ids = trees_of(graphs, depth)
    assert same_partition(ids.tolist(), canonical(graphs, depth))
    assert table.depth == depth
    # Numbered as they are first met.
    assert list(dict.fromkeys(ids.tolist())) == list(range(table.level[depth], table.level[depth + 1]))


def test_the_partition_is_that_of_weisfeiler_and_leman(random_set):
    graphs = random_set(count=40)
    colors = graphs.nodes[:, 0]
    for _ in range(3):
        colors = WLConv()(colors, graphs.edge_index)
    assert same_partition(trees_of(graphs, 3)[1].tolist(), colors.tolist())


def hashes_of_nodes(graphs, rounds):
    """Colors of nodes that see the labels of edges, by networkx."""
    drawn = nx.Graph()
    drawn.add_nodes_from((node, {"label": str(label)}) for node, label in enumerate(graphs.nodes[:, 0].tolist()))
    drawn.add_edges_from(
        (u, v, {"kind": str(kind)})
        for (u, v), kind in zip(graphs.edge_index.T.tolist(), graphs.edges[:, 0].tolist(), strict=True)
    )
    hashes = nx.weisfeiler_lehman_subgraph_hashes(
        drawn, edge_attr="kind", node_attr="label", iterations=rounds, digest_size=16, include_initial_labels=True
    )
    return [hashes[node][-1] for node in range(len(graphs.nodes))]


def test_with_edge_labels_too(random_set):
    graphs = random_set(kinds=3)
    assert same_partition(trees_of(graphs, 3)[1].tolist(), hashes_of_nodes(graphs, 3))


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data/tu is not there")
def test_molecules_have_the_trees_of_both_and_their_roots_the_embeddings_of_nodes():
    graphs = TUDataModule(SHARED, "MUTAG").read().graphs
    colors = graphs.nodes[:, 0]
    for _ in range(3):
        colors = WLConv()(colors, graphs.edge_index)
    _, plain = computation_trees(graphs.nodes[:, 0].numpy(), graphs.edge_index.numpy(), None, 3)
    assert same_partition(plain.tolist(), colors.tolist())
    table, ids = trees_of(graphs, 3)
    assert same_partition(ids.tolist(), hashes_of_nodes(graphs, 3))
    assert (len(set(plain.tolist())), len(set(ids.tolist()))) == (572, 796)
    some = graphs.take(torch.arange(20))
    for kind, exact in ((GIN, True), (GraphSAGE, True), (GAT, True), (GCN, False)):
        network = kind(7, 8, 3).double().eval()
        with torch.no_grad():
            wanted = network(torch.nn.functional.one_hot(some.nodes[:, 0], 7).double(), some.edge_index)
            found = torch.stack([root_embedding(network, table.expand(int(tree)), 7) for tree in ids[: len(wanted)]])
        assert (float((found - wanted).abs().max()) < 1e-12) is exact


def test_a_tree_written_out_is_the_definition_and_as_large_as_said(random_set):
    graphs = random_set(count=5, kinds=2, nodes=8)
    table, ids = trees_of(graphs, 3)
    sizes = table.sizes()
    for node, wanted in enumerate(canonical(graphs, 3)):
        tree = table.expand(int(ids[node]))
        assert sizes[ids[node]] == len(tree.label)
        assert (tree.parent[1:] < np.arange(1, len(tree.parent))).all()

        def rebuilt(place, tree=tree):
            children = sorted((int(tree.edge_label[c]), rebuilt(c)) for c in np.flatnonzero(tree.parent == place))
            return int(tree.label[place]), tuple(children)

        assert rebuilt(0) == wanted


def root_embedding(network, tree, labels):
    edges = torch.tensor(np.stack([np.arange(1, len(tree.parent)), tree.parent[1:]]))
    return network(torch.nn.functional.one_hot(torch.tensor(tree.label), labels).double(), edges)[0]


@pytest.mark.parametrize(
    ("kind", "exact"), [(GIN, True), (GraphSAGE, True), (GAT, True), (GCN, False)], ids=["GIN", "SAGE", "GAT", "GCN"]
)
def test_a_root_has_the_embedding_of_its_node(random_set, kind, exact):
    graphs = random_set(count=20, labels=4)
    network = kind(4, 8, 3).double().eval()
    with torch.no_grad():
        features = torch.nn.functional.one_hot(graphs.nodes[:, 0], 4).double()
        wanted = network(features, graphs.edge_index)
        table, ids = trees_of(graphs, 3)
        largest = 0.0
        for node in range(len(graphs.nodes)):
            found = root_embedding(network, table.expand(int(ids[node])), 4)
            largest = max(largest, float((found - wanted[node]).abs().max()))
    assert (largest < 1e-12) is exact
    assert exact or largest > 1e-3


def test_too_shallow_a_tree_and_edges_both_ways_are_not_exact(random_set):
    graphs = random_set(count=5, labels=4)
    network = GIN(4, 8, 3).double().eval()
    one_hot = torch.nn.functional.one_hot
    with torch.no_grad():
        wanted = network(one_hot(graphs.nodes[:, 0], 4).double(), graphs.edge_index)
        errors = {}
        for depth, both in ((2, False), (3, True), (4, False)):
            table, ids = trees_of(graphs, depth)
            found = []
            for node in range(len(graphs.nodes)):
                tree = table.expand(int(ids[node]))
                edges = torch.tensor(np.stack([np.arange(1, len(tree.parent)), tree.parent[1:]]))
                edges = torch.cat([edges, edges.flip(0)], dim=1) if both else edges
                found.append(network(one_hot(torch.tensor(tree.label), 4).double(), edges)[0])
            errors[depth, both] = float((torch.stack(found) - wanted).abs().max())
    assert errors[4, False] < 1e-12
    assert errors[2, False] > 1e-3
    assert errors[3, True] > 1e-3


def test_renumbering_nodes_leaves_the_set_of_trees(random_set, make_set):
    rng = np.random.default_rng(3)
    graphs, renumbered = [], []
    for _ in range(10):
        labels = rng.integers(0, 3, 9).tolist()
        edges = [(u, v) for u in range(9) for v in range(u) if rng.random() < 0.3]
        kinds = rng.integers(0, 2, len(edges)).tolist()
        place = rng.permutation(9)
        graphs.append((labels, edges, kinds))
        moved = [0] * 9
        for old, new in enumerate(place):
            moved[new] = labels[old]
        order = rng.permutation(len(edges))
        renumbered.append(
            (moved, [(int(place[edges[e][0]]), int(place[edges[e][1]])) for e in order], [kinds[e] for e in order])
        )
    both = make_set(graphs + renumbered, [0] * 20)
    _, ids = trees_of(both, 3)
    per_graph = [sorted(ids[first : first + 9].tolist()) for first in range(0, 180, 9)]
    assert per_graph[:10] == per_graph[10:]


def test_a_hash_that_makes_different_trees_equal_is_noticed(random_set, monkeypatch):
    graphs = random_set()
    wanted = trees_of(graphs, 2)[1]
    mix = module._mix
    monkeypatch.setattr(module, "_mix", lambda values, salt: values * np.uint64(0) if salt < 4 else mix(values, salt))
    assert trees_of(graphs, 2)[1].tolist() == wanted.tolist()
    monkeypatch.setattr(module, "_mix", lambda values, salt: values * np.uint64(0))
    edgeless = computation_trees, (np.array([0, 1]), np.zeros((2, 0), dtype=int), None, 1)  # only labels differ
    for run, arguments in ((trees_of, (graphs, 2)), edgeless):
        with pytest.raises(AssertionError, match="hash functions in a row"):
            run(*arguments)


def test_keys_beyond_64_bits_are_sorted_in_two_steps(monkeypatch, random_set):
    graphs = random_set(kinds=2)
    wanted = trees_of(graphs, 3)
    monkeypatch.setattr(module, "LARGEST", 1)
    found = trees_of(graphs, 3)
    assert all(np.array_equal(a, b) for a, b in zip(wanted[0], found[0], strict=True))


@pytest.mark.parametrize("at_once", [1, 30, 10**6])
@pytest.mark.parametrize(("kinds", "depth"), [(None, 0), (None, 2), (2, 3)])
def test_graph_after_graph_gives_the_same_table(random_set, kinds, depth, at_once):
    graphs = random_set(kinds=kinds)
    wanted = trees_of(graphs, depth)
    found = computation_trees_by_graph(
        graphs.nodes[:, 0].numpy(),
        graphs.edge_index.numpy(),
        graphs.edges[:, 0].numpy() if kinds else None,
        depth,
        node_start=graphs.node_start.numpy(),
        edge_start=graphs.edge_start.numpy(),
        nodes_at_once=at_once,
    )
    assert all(np.array_equal(a, b) for a, b in zip(wanted[0], found[0], strict=True))
    assert np.array_equal(wanted[1], found[1])


def test_isolated_nodes_and_sets_without_edges(make_set):
    graphs = make_set([([0, 1, 0], [], None), ([1], [], None)], [0, 1])
    table, ids = trees_of(graphs, 2)
    assert ids.tolist() == [4, 5, 4, 5]
    assert table.sizes()[4:].tolist() == [1, 1]
    assert len(table.expand(4).label) == 1


def test_sizes_stop_at_a_bound_instead_of_running_over():
    star = np.stack(
        [np.concatenate([np.zeros(999), np.arange(1, 1000)]), np.concatenate([np.arange(1, 1000), np.zeros(999)])]
    )
    table, ids = computation_trees(np.zeros(1000, dtype=int), star.astype(int), None, 30)
    assert table.sizes()[ids].max() == 2**62


def test_a_negative_depth_is_refused(random_set):
    with pytest.raises(UsageError, match="depth is -1; give 0 or more"):
        trees_of(random_set(count=1), -1)


def test_ranges_are_joined():
    assert ranges(np.array([5, 9, 2]), np.array([2, 0, 3])).tolist() == [5, 6, 2, 3, 4]
    assert ranges(np.array([], dtype=int), np.array([], dtype=int)).tolist() == []
