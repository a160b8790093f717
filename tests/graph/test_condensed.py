import json

import numpy as np
import pytest
import torch
from given import Given
from torch_geometric.nn import GCNConv
from torch_geometric.nn.models import GAT, GCN, GIN
from torch_geometric.utils import dense_to_sparse

from lit_distill.core.errors import RunError, UsageError
from lit_distill.graph.classifier import GraphClassifier
from lit_distill.graph.condensed import (
    CondensedGraphs,
    SyntheticGraphs,
    annealed_temperature,
    dense,
    relaxed_adjacency,
    soft_labels,
)
from lit_distill.graph.data import DistilledGraphs
from lit_distill.graph.models import GraphNetwork


def synthetic_graphs(graphs, nodes=12, per_class=2, values=(3,)):
    torch.manual_seed(0)
    return SyntheticGraphs.from_graphs(graphs, values, nodes=nodes, per_class=per_class, classes=("a", "b"))


# ---- the adjacency -------------------------------------------------------------------------------------------------


def test_the_adjacency_is_that_of_the_formula():
    logits, noise = torch.randn(2, 5, 5), torch.rand(2, 5, 5)
    found = relaxed_adjacency(logits, noise, temperature=0.7)
    for g in range(2):
        for i in range(5):
            for j in range(5):
                o = (logits[g, i, j].item() + logits[g, j, i].item()) / 2
                u = noise[g, min(i, j), max(i, j)].item()
                wanted = 0.0 if i == j else 1 / (1 + np.exp(-(o + np.log(u) - np.log(1 - u)) / 0.7))
                assert found[g, i, j].item() == pytest.approx(wanted, abs=1e-5)


def test_the_adjacency_is_symmetric_between_0_and_1_without_loops():
    logits = torch.randn(3, 6, 6, dtype=torch.double)
    found = relaxed_adjacency(logits, torch.rand_like(logits), temperature=1.0)
    off = ~torch.eye(6, dtype=torch.bool)
    assert torch.equal(found, found.mT)
    assert not found.diagonal(dim1=1, dim2=2).any()
    assert ((found[:, off] > 0) & (found[:, off] < 1)).all()


def test_noise_of_0_and_1_is_kept_away_from_both_ends():
    logits = torch.zeros(1, 3, 3, dtype=torch.double, requires_grad=True)
    noise = torch.tensor([[[0.5, 0.0, 1.0], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]], dtype=torch.double)
    found = relaxed_adjacency(logits, noise, temperature=1.0)
    torch.testing.assert_close(found[0, 0], torch.tensor([0.0, 1e-4, 1 - 1e-4], dtype=torch.double))
    found.sum().backward()
    assert logits.grad.isfinite().all()


def test_a_cold_adjacency_is_almost_binary():
    logits = torch.randn(4, 8, 8)
    logits = (logits + logits.mT) / 2
    found = relaxed_adjacency(logits, torch.full((4, 8, 8), 0.5), temperature=0.01)
    clear = (logits.abs() > 0.1) & ~torch.eye(8, dtype=torch.bool)
    torch.testing.assert_close(found[clear], (logits[clear] > 0).float(), rtol=0, atol=1e-3)


def test_draws_are_edges_as_often_as_their_probability_says():
    logits = torch.full((4000, 2, 2), 1.2)
    found = relaxed_adjacency(logits, torch.rand(4000, 2, 2), temperature=0.01)[:, 0, 1]
    assert float((found > 0.5).float().mean()) == pytest.approx(1 / (1 + np.exp(-1.2)), abs=0.025)


def test_gradients_reach_both_directions_of_an_edge_alike_and_no_loop():
    logits = torch.randn(1, 4, 4, dtype=torch.double, requires_grad=True)
    noise = torch.rand(1, 4, 4, dtype=torch.double)
    weights = torch.randn(1, 4, 4, dtype=torch.double)
    (relaxed_adjacency(logits, noise, temperature=0.5) * weights).sum().backward()
    torch.testing.assert_close(logits.grad, logits.grad.mT)
    assert not logits.grad.diagonal(dim1=1, dim2=2).any()
    assert torch.autograd.gradcheck(lambda x: relaxed_adjacency(x, noise, temperature=0.5), logits)


@pytest.mark.parametrize(("iteration", "expected"), [(0, 1.0), (100, 0.1), (150, 0.1**1.5), (200, 0.01), (999, 0.01)])
def test_the_temperature_falls_by_powers(iteration, expected):
    assert annealed_temperature(iteration) == pytest.approx(expected)


# ---- synthetic graphs ----------------------------------------------------------------------------------------------


def test_it_begins_with_real_graphs_of_each_class(random_set):
    graphs = random_set(count=20, nodes=6)
    found = synthetic_graphs(graphs, nodes=6, per_class=3)
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1]
    real = [dense(graphs.take(torch.tensor([g])), [3], nodes=6) for g in range(20)]
    matches = []
    for g in range(6):
        own = found.hard()[g], found.features[g]
        matches += [n for n, (x, a, y) in enumerate(real) if torch.equal(a[0], own[0]) and torch.equal(x[0], own[1])][
            :1
        ]
        assert int(graphs.labels[matches[-1]]) == int(found.labels[g])
    assert len(set(matches)) == 6
    edges = sum(int(graphs.edge_start[n + 1] - graphs.edge_start[n]) for n in matches)
    assert float(found.density) == pytest.approx(edges / (6 * 36))
    assert sorted(found.logits.unique().tolist()) == [-5.0, 5.0]


def test_added_nodes_have_neither_features_nor_edges(make_set):
    small, large = ([0, 2], [(0, 1)], None), ([1] * 5, [(0, 1), (1, 2)], None)
    graphs = make_set([small, small, large], [0, 1, 0])
    features, adjacency, labels = dense(graphs.take(torch.tensor([1])), [3], nodes=5)
    assert features[0].tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert adjacency[0].nonzero().tolist() == [[0, 1], [1, 0]]
    assert labels.tolist() == [1]
    found = synthetic_graphs(graphs, nodes=4, per_class=1)  # the large one does not fit
    assert found.features.shape == (2, 4, 3)
    assert found.hard().sum((1, 2)).tolist() == [2, 2]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"nodes": 13}, r"model\.nodes is 13; the largest training graph has 12 nodes, give 1 up to that"),
        ({"nodes": 0}, r"model\.nodes is 0; "),
        ({"per_class": 11}, r"model\.per_class is 11; class 'a' has 10 training graphs of at most 12 nodes; lower it"),
        ({"nodes": 5}, "class 'a' has 0 training graphs of at most 5 nodes; lower it, or raise model.nodes"),
    ],
)
def test_sizes_that_the_data_do_not_have_are_refused(random_set, options, says):
    with pytest.raises(UsageError, match=says):
        synthetic_graphs(random_set(count=20), **options)


def dense_gcn(network, features, adjacency):
    """The graph network of one graph by matrices, its layers written out."""
    a = adjacency + torch.eye(len(adjacency), dtype=adjacency.dtype)
    scale = a.sum(1).rsqrt()
    a = scale[:, None] * a * scale
    h = features @ network.node_embeddings[0].weight
    for number, conv in enumerate(network.gnn.convs):
        h = a @ h @ conv.lin.weight.T + conv.bias
        h = h.relu() if number < len(network.gnn.convs) - 1 else h
    return network.head(h.mean(0))


def test_dense_and_sparse_graphs_are_the_same_to_a_gcn(random_set):
    graphs = random_set(count=6, nodes=12)
    network = GraphNetwork(GCN(8, 8, 3), [3], 2, readout="mean").double()
    features, adjacency, labels = dense(graphs, [3], nodes=12)
    index = torch.arange(6)
    found = SyntheticGraphs(features.double(), adjacency, labels)
    real = network(graphs.batch(index))
    torch.testing.assert_close(network(found.batch(index, adjacency.double())), real, rtol=0, atol=1e-12)
    by_hand = torch.stack([dense_gcn(network, found.features[g], adjacency[g].double()) for g in range(6)])
    torch.testing.assert_close(real, by_hand, rtol=0, atol=1e-12)


def test_a_relaxed_adjacency_is_a_dense_one_to_a_gcn(random_set):
    found = synthetic_graphs(random_set(count=6)).double()
    network = GraphNetwork(GCN(8, 8, 2), [3], 2, readout="mean").double()
    adjacency = found.adjacency(0.8)
    index = torch.tensor([3, 1])
    batch = found.batch(index, adjacency[index])
    assert batch.labels.tolist() == [1, 0]
    by_hand = torch.stack([dense_gcn(network, found.features[g], adjacency[g]) for g in (3, 1)])
    torch.testing.assert_close(network(batch), by_hand, rtol=0, atol=1e-12)
    conv = GCNConv(3, 4).double()
    one = found.batch(torch.tensor([2]), adjacency[2:3])
    theirs = conv(found.features[2], *dense_to_sparse(adjacency[2]))
    torch.testing.assert_close(conv(one.nodes, one.edge_index, one.edge_weight), theirs, rtol=0, atol=1e-12)


def test_soft_labels_of_one_value_are_the_labels(random_set):
    graphs = random_set(count=5, nodes=10, labels=6)
    two = type(graphs)(**{**vars(graphs), "nodes": torch.stack([graphs.nodes[:, 0] // 2, graphs.nodes[:, 0] % 2], 1)})
    batch = two.batch(torch.arange(5))
    network = GraphNetwork(GCN(8, 8, 1), [3, 2], 2)
    soft = batch._replace(nodes=soft_labels(batch.nodes, [3, 2]))
    assert soft.nodes.sum(1).tolist() == [2.0] * len(soft.nodes)
    torch.testing.assert_close(network(soft), network(batch))
    mixed = batch._replace(nodes=soft.nodes * 0.5)
    tables = [table.weight for table in network.node_embeddings]
    rows = [0.5 * (tables[0][i] + tables[1][j]) for i, j in batch.nodes.tolist()]
    torch.testing.assert_close(network.embed_nodes(mixed), network.gnn(torch.stack(rows), batch.edge_index))


@pytest.mark.parametrize("gnn", [GIN, GAT])
def test_networks_without_weights_of_edges_say_so(random_set, gnn):
    found = synthetic_graphs(random_set(count=6))
    batch = found.batch(torch.arange(4), found.adjacency(1.0))
    with pytest.raises(UsageError, match=f"{gnn.__name__} takes no edge_weight; take another network, such as GCN"):
        GraphNetwork(gnn(8, 8, 1), [3], 2)(batch)


# ---- the set on disk -----------------------------------------------------------------------------------------------


def condensed(random_set):
    found = synthetic_graphs(random_set(count=20), nodes=12)
    return CondensedGraphs(
        features=found.features.detach() + 0.25,
        adjacency=found.hard(),
        labels=found.labels,
        classes=("a", "b"),
        node_values=(3,),
        edge_values=(),
        description={"method": "test"},
    )


def test_a_set_becomes_ordinary_graphs(random_set):
    found = condensed(random_set)
    graphs = found.graphs()
    assert graphs.size == found.size == 4
    assert graphs.roots.all()
    for g in range(4):
        one = graphs.take(torch.tensor([g]))
        assert torch.equal(one.nodes, found.features[g])
        assert one.edge_index.T.tolist() == found.adjacency[g].nonzero().tolist()
        assert one.labels.tolist() == [int(found.labels[g])]
    edges = int(found.adjacency.sum())
    assert found.footprint() == {"bytes": 4 * 4 * (12 * 3 + 12 * 12), "bytes_expanded": 4 * 4 * 12 * 3 + 8 * edges}


def test_a_set_on_disk_is_the_same_set_and_needs_no_pickle(random_set, tmp_path):
    found = condensed(random_set)
    found.save(tmp_path / "d")
    again = CondensedGraphs.load(tmp_path / "d")
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["distilled.json", "graphs.safetensors"]
    for name, value in vars(found).items():
        other = getattr(again, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


def test_other_versions_and_broken_files_are_refused_in_one_line(random_set, tmp_path):
    condensed(random_set).save(tmp_path)
    data = DistilledGraphs(tmp_path, Given(random_set(count=20)))
    description = json.loads((tmp_path / "distilled.json").read_text())
    (tmp_path / "distilled.json").write_text(json.dumps({**description, "version": 7}))
    with pytest.raises(UsageError, match="graphs of version 7, this release reads graphs of version 1; condense again"):
        data.setup()
    (tmp_path / "distilled.json").write_text(json.dumps({**description, "kind": "pictures"}))
    with pytest.raises(UsageError, match="holds pictures of version 1"):
        data.setup()
    (tmp_path / "distilled.json").write_text("{")
    with pytest.raises(RunError, match=r"distilled\.json cannot be read"):
        data.setup()
    (tmp_path / "distilled.json").write_text(json.dumps(description))
    (tmp_path / "graphs.safetensors").write_bytes((tmp_path / "graphs.safetensors").read_bytes()[:50])
    with pytest.raises(RunError, match=r"cannot be read .*; condense again"):
        data.setup()
    with pytest.raises(UsageError, match=r"holds no distilled\.json"):
        DistilledGraphs(tmp_path / "nowhere", Given(random_set(count=20))).setup()


@pytest.mark.parametrize("gnn", [GCN, GIN])
def test_any_network_trains_on_the_set(random_set, trainer, tmp_path, gnn):
    found = condensed(random_set)
    found.save(tmp_path / "d")
    data = DistilledGraphs(tmp_path / "d", Given(random_set(count=30, kinds=2), eval_batch_size=4))
    module, fit = GraphClassifier(GraphNetwork(gnn(8, 8, 2), [3], 2)), trainer(max_epochs=2)
    fit.fit(module, datamodule=data)
    result = fit.test(module, datamodule=data, verbose=False)[0]
    assert module.iteration == 2
    assert result["test/bytes"] == found.footprint()["bytes"]
    wrong = GraphClassifier(GraphNetwork(GAT(8, 8, 2, edge_dim=8), [3], 2, edge_values=[2]))
    with pytest.raises(UsageError, match=r"edge_values is \[2\], the data have \[\]"):
        trainer().fit(wrong, datamodule=data)


def test_what_the_set_does_not_have_is_refused(random_set, tmp_path):
    condensed(random_set).save(tmp_path)
    with pytest.raises(UsageError, match=r"node_values \[3\], data\.source has \[4\]"):
        DistilledGraphs(tmp_path, Given(random_set(count=20, labels=4))).setup()
    with pytest.raises(UsageError, match=r"data\.sampling is frequency; the graphs of .* take uniform"):
        DistilledGraphs(tmp_path, Given(random_set(count=20)), sampling="frequency").setup()
