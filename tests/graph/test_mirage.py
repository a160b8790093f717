import itertools
import json
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from given import Given, distilled, trees_by_hand, written
from torch_geometric.nn.models import GAT, GIN, GraphSAGE

from lit_distill.core.errors import RunError, UsageError
from lit_distill.graph import mirage
from lit_distill.graph.classifier import GraphClassifier
from lit_distill.graph.data import DistilledGraphs
from lit_distill.graph.distilled import DistilledTrees
from lit_distill.graph.methods.mirage import Mirage
from lit_distill.graph.mirage import _interned
from lit_distill.graph.models import GraphNetwork
from lit_distill.graph.trees import computation_trees


def expected(graphs, number, least, depth):
    """Frequent itemsets of a class by the definition: nested tuples, every subset counted."""
    trees, owner = trees_by_hand(graphs, depth), graphs.graph().tolist()
    transactions = [
        {tree for tree, own in zip(trees, owner, strict=True) if own == graph}
        for graph in range(graphs.size)
        if int(graphs.labels[graph]) == number
    ]
    supports = Counter(t for own in transactions for t in own)
    candidates = sorted(t for t, support in supports.items() if support >= least)
    found = {}
    for size in range(1, len(candidates) + 1):
        for chosen in itertools.combinations(candidates, size):
            support = sum(set(chosen) <= own for own in transactions)
            if support >= least:
                found[frozenset(chosen)] = support
    return found


@pytest.mark.parametrize("kinds", [None, 2])
def test_it_keeps_the_frequent_sets_of_trees_of_each_class(random_set, kinds):
    graphs = random_set(count=24, nodes=6, labels=2, kinds=kinds, density=0.3, classes=3)
    found = distilled(graphs, (0.5, 3, 0.4), classes=("a", "b", "c"))
    for number, least in enumerate((4, 3, 4)):  # of 8 graphs each; 3.2 is rounded up
        own = {
            frozenset(written(found, tree) for tree in found.member[first:last].tolist()): support
            for first, last, label, support in zip(
                found.set_start[:-1].tolist(),
                found.set_start[1:].tolist(),
                found.labels.tolist(),
                found.support.tolist(),
                strict=True,
            )
            if label == number
        }
        assert own == expected(graphs, number, least, 1)
        assert len(own) >= 2


def test_a_share_that_is_a_whole_number_of_graphs_is_that_number(random_set):
    assert 0.28 * 25 > 7  # in floating point
    assert distilled(random_set(count=50, nodes=6, labels=2), (0.28, 0.3)).description["min_support"] == [7, 8]


def test_synthetic_graphs_are_trees_side_by_side_with_their_roots_marked(random_set):
    found = distilled(random_set(nodes=6, labels=2, kinds=2, density=0.3))
    graphs = found.graphs()
    assert graphs.labels.tolist() == found.labels.tolist()
    sizes = found.tree_start.diff()
    assert sizes.max() > 2
    for number in range(found.size):
        members = found.member[found.set_start[number] : found.set_start[number + 1]]
        one = graphs.take(torch.tensor([number]))
        assert len(one.nodes) == int(sizes[members].sum())
        assert int(one.roots.sum()) == len(members)
        source = one.edge_index[0]
        assert not one.roots[source].any()  # edges lead from child to parent
        assert source.bincount(minlength=len(one.nodes)).tolist() == (~one.roots).long().tolist()
        expanded = torch.cat([found.nodes[found.tree_start[t] : found.tree_start[t + 1]] for t in members])
        assert torch.equal(one.nodes, expanded)


@pytest.mark.parametrize("gnn", [GIN, GraphSAGE, GAT], ids=["GIN", "SAGE", "GAT"])
def test_a_graph_of_different_trees_is_seen_as_its_itemset(make_set, gnn):
    # A path whose nodes all differ at two hops, and one of the other class.
    one = ([0, 1, 2, 1, 1], [(0, 1), (1, 2), (2, 3), (3, 4)], None)
    graphs = make_set([one, one, ([2, 2], [(0, 1)], None), ([2, 2], [(0, 1)], None)], [0, 0, 1, 1])
    found = distilled(graphs, (1, 1), depth=2, kind="maximal")
    network = GraphNetwork(gnn(8, 8, 2), [3], 2).double().eval()
    with torch.no_grad():
        real = network(graphs.batch(torch.tensor([0])))
        synthetic = network(found.graphs().batch(torch.tensor([0])))
    assert found.labels.tolist() == [0, 1]
    assert int(found.set_start[1]) == 5
    torch.testing.assert_close(real, synthetic, rtol=0, atol=1e-12)


def test_edge_labels_reach_a_network_that_reads_them(make_set):
    one = ([0, 1, 2, 1], [(0, 1), (1, 2), (2, 3)], [0, 1, 1])
    graphs = make_set([one, one, ([2, 2], [(0, 1)], [0]), ([2, 2], [(0, 1)], [0])], [0, 0, 1, 1])
    found = distilled(graphs, (1, 1), depth=2, kind="maximal")
    network = GraphNetwork(GAT(8, 8, 2, edge_dim=4, add_self_loops=False), [3], 2, edge_values=[2]).double().eval()
    with torch.no_grad():
        real = network(graphs.batch(torch.tensor([0])))
        synthetic = network(found.graphs().batch(torch.tensor([0])))
        batch = graphs.batch(torch.tensor([0]))
        other = network(batch._replace(edges=1 - batch.edges))
    torch.testing.assert_close(real, synthetic, rtol=0, atol=1e-12)
    assert (real - other).abs().max() > 1e-4
    with pytest.raises(UsageError, match="GIN takes no edge_attr; leave edge_values out"):
        GraphNetwork(GIN(8, 8, 2), [3], 2, edge_values=[2])


def test_only_roots_are_read_out(random_set):
    graphs = distilled(random_set(nodes=6, labels=2, density=0.3), (0.2, 0.2)).graphs()
    batch = graphs.batch(torch.tensor([0, graphs.size - 1]))
    network = GraphNetwork(GIN(8, 8, 1), [2], 2).eval()
    nodes = network.embed_nodes(batch)
    wanted = torch.stack([nodes[(batch.graph == g) & batch.roots].sum(0) for g in range(2)])
    torch.testing.assert_close(network.embed(batch), wanted)
    mean = GraphNetwork(GIN(8, 8, 1), [2], 2, readout="mean").eval()
    mean.load_state_dict(network.state_dict())
    counts = torch.stack([((batch.graph == g) & batch.roots).sum() for g in range(2)])
    assert counts.max() > 1
    torch.testing.assert_close(mean.embed(batch), wanted / counts[:, None])


def test_bytes_are_counted_once_stored_and_as_often_as_used(random_set):
    found = distilled(random_set(nodes=6, labels=2, kinds=2, density=0.3))
    sizes = found.tree_start.diff()
    nodes, edges = int(sizes.sum()), int((sizes - 1).sum())
    stored = 4 * nodes + 8 * edges + 4 * edges + 4 * len(found.member) + 4 * found.size
    nodes, edges = int(sizes[found.member].sum()), int((sizes - 1)[found.member].sum())
    assert found.footprint() == {"bytes": stored, "bytes_expanded": 4 * nodes + 12 * edges}
    assert len(found.member) > len(sizes)
    assert edges > 5


def test_several_node_features_are_one_label(make_set):
    pair = ([(0, 1), (1, 0)], [(0, 1)], None)
    other = ([(1, 1), (1, 0)], [(0, 1)], None)
    graphs = make_set([pair, pair, other, other], [0, 0, 1, 1], columns=2)
    found = distilled(graphs, (2, 2))
    trees = {written(found, tree) for tree in range(len(found.tree_start) - 1)}
    assert ((0, 1), (((), ((1, 0), ())),)) in trees
    assert found.nodes.shape[1] == 2


def test_a_root_has_no_edge_to_a_parent_whatever_labels_there_are(make_set):
    pair = ([0, 1], [(0, 1)], [1])  # no edge has label 0
    found = distilled(make_set([pair] * 4, [0, 0, 1, 1]))
    assert found.edges[:, 0].tolist() == (found.parent >= 0).long().tolist() == [0, 1, 0, 1]


def test_exclusive_leaves_out_what_two_classes_share(random_set):
    graphs = random_set(nodes=6, labels=2, density=0.3)
    every, own = distilled(graphs, (0.4, 0.4)), distilled(graphs, (0.4, 0.4), exclusive=True)

    def sets(found):
        bounds = zip(found.set_start[:-1].tolist(), found.set_start[1:].tolist(), found.labels.tolist(), strict=True)
        return [(label, frozenset(written(found, t) for t in found.member[a:b].tolist())) for a, b, label in bounds]

    both = {trees for label, trees in sets(every) if label == 0} & {trees for label, trees in sets(every) if label == 1}
    assert both
    assert set(sets(own)) == {(label, trees) for label, trees in sets(every) if trees not in both}


def test_frequencies_are_even_over_classes_and_by_support_within(random_set):
    found = distilled(random_set(nodes=6, labels=2, density=0.3), (0.3, 0.5))
    weights = found.frequencies()
    for number in range(2):
        own = found.labels == number
        assert float(weights[own].sum()) == pytest.approx(0.5)
        torch.testing.assert_close(weights[own] / weights[own][0], found.support[own] / found.support[own][0].double())


def test_a_set_on_disk_is_the_same_set_and_needs_no_pickle(random_set, tmp_path):
    found = distilled(random_set(kinds=2, nodes=6, labels=2, density=0.3), description={"graphs": 20})
    found.save(tmp_path / "d")
    again = DistilledTrees.load(tmp_path / "d")
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["distilled.json", "trees.safetensors"]
    for name, value in vars(found).items():
        other = getattr(again, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    assert again.description["min_support"] == [2, 2]


def test_other_versions_and_broken_files_are_refused_in_one_line(random_set, tmp_path):
    distilled(random_set(nodes=6, labels=2, density=0.3)).save(tmp_path)
    text = (tmp_path / "distilled.json").read_text()
    (tmp_path / "distilled.json").write_text(json.dumps({**json.loads(text), "version": 7}))
    with pytest.raises(UsageError, match="trees of version 7, this release reads trees of version 1"):
        DistilledTrees.load(tmp_path)
    (tmp_path / "distilled.json").write_text(text)
    (tmp_path / "trees.safetensors").write_bytes((tmp_path / "trees.safetensors").read_bytes()[:50])
    with pytest.raises(RunError, match=r"cannot be read .*; distil again"):
        DistilledTrees.load(tmp_path)
    with pytest.raises(UsageError, match=r"holds no distilled\.json"):
        DistilledTrees.load(tmp_path / "nowhere")


# ---- the data module -----------------------------------------------------------------------------------------------


def gin(layers=1, values=2, **kwargs):
    return GraphNetwork(GIN(8, 8, layers), [values], 2, **kwargs)


def source(random_set, **kwargs):
    graphs = random_set(count=60, nodes=6, labels=2, density=0.3)
    return Given(graphs, **kwargs)


def test_a_student_trains_on_trees_and_is_tested_on_graphs(random_set, trainer):
    data = Mirage(source(random_set), depth=1, threshold=0.4, batch_size=16)
    fit = trainer(max_epochs=2)
    module = GraphClassifier(gin())
    fit.fit(module, datamodule=data)
    assert data.part("test").roots.all()
    assert not data.part("train").roots.all()
    result = fit.test(module, datamodule=data, verbose=False)[0]
    assert {"test/acc", "test/auroc", "test/bytes", "test/bytes_expanded"} <= set(result)
    assert result["test/bytes"] == data.distilled.footprint()["bytes"]
    assert module.iteration == 2 * -(-data.part_size("train") // 16)


def test_only_training_graphs_are_distilled(random_set):
    data = Mirage(source(random_set), depth=1, threshold=[5, 5])
    data.setup()
    train = data.source.part("train")
    _, ids = computation_trees(train.nodes[:, 0].numpy(), train.edge_index.numpy(), None, 1)
    assert data.distilled.support.max() <= 18
    assert data.distilled.description["graphs"] == 36
    assert len(set(ids.tolist())) >= len(data.distilled.tree_start) - 1


def test_sampling_by_frequency_repeats_the_frequent_and_evens_classes(random_set):
    data = Mirage(source(random_set), depth=1, threshold=[0.3, 0.5], sampling="frequency", batch_size=1000)
    loader = data.train_dataloader()
    drawn = []
    for epoch in range(50):
        loader.sampler.set_epoch(epoch)
        drawn += [label for batch in loader for label in batch.labels.tolist()]
    few = data.part("train").labels.float().mean()
    assert few < 0.3
    assert sum(drawn) / len(drawn) == pytest.approx(0.5, abs=0.05)


def test_the_set_alone_trains_another_network(random_set, trainer, tmp_path):
    data = Mirage(source(random_set), depth=2, threshold=0.4)
    data.setup()
    data.distilled.save(tmp_path / "d")
    loaded = DistilledGraphs(tmp_path / "d", source(random_set))
    loaded.setup()
    for name, value in vars(data.part("train")).items():
        assert value is None or torch.equal(getattr(loaded.part("train"), name), value)

    def trained(data):
        torch.manual_seed(0)
        network = GraphNetwork(GAT(8, 8, 2), [2], 2)
        before = [parameter.detach().clone() for parameter in network.parameters()]
        trainer().fit(GraphClassifier(network), datamodule=data)
        return before, list(network.parameters())

    (before, alone), (_, made) = trained(loaded), trained(data)
    assert all(torch.equal(a, b) for a, b in zip(alone, made, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(alone, before, strict=True))
    other = Given(random_set(count=20, nodes=6, labels=3, density=0.3))
    with pytest.raises(UsageError, match=r"node_values \[2\], data\.source has \[3\]"):
        DistilledGraphs(tmp_path / "d", other).setup()


def test_more_layers_than_hops_are_warned_of(random_set, trainer):
    with pytest.warns(UserWarning, match=r"data\.depth is 1 and the student has 2 layers"):
        trainer().fit(GraphClassifier(gin(2)), datamodule=Mirage(source(random_set), depth=1, threshold=0.4))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer().fit(GraphClassifier(gin(1)), datamodule=Mirage(source(random_set), depth=1, threshold=0.4))
    assert not any("data.depth" in str(warning.message) for warning in seen)


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"threshold": (0.5, 0.99)},
            r"no tree is in 10 or more of the 10 graphs of class 'b'; .*most frequent one is in 7",
        ),
        ({"threshold": (0.5,)}, "threshold has 1 values, the data 2 classes"),
        ({"threshold": (0.0, 0.5)}, r"threshold is 0\.0; give a number of graphs .* or a share"),
        ({"threshold": (0.5, 2.5)}, r"threshold is 2\.5"),
        ({"threshold": (1, 1), "max_itemsets": 20}, "more than 20 itemsets have a support of 1 or more"),
    ],
)
def test_thresholds_that_lead_nowhere_say_what_would(random_set, options, says):
    with pytest.raises(UsageError, match=says):
        distilled(random_set(nodes=6, labels=2, density=0.3, seed=4), **options)


def test_a_class_of_one_graph_and_one_without_own_sets_are_refused(make_set, random_set):
    path = ([0, 1], [(0, 1)], None)
    with pytest.raises(UsageError, match="class 'b' has 1 training graph; give 2 or more"):
        distilled(make_set([path] * 3, [0, 0, 1]))
    with pytest.raises(UsageError, match="exclusive: every frequent itemset of class 'a' is frequent in another"):
        distilled(make_set([path] * 4, [0, 0, 1, 1]), exclusive=True)


def test_a_tree_too_large_to_be_written_is_refused(make_set, monkeypatch):
    monkeypatch.setattr(mirage, "LARGEST_TREE", 8)
    star = ([0] * 6, [(0, v) for v in range(1, 6)], None)
    with pytest.raises(
        UsageError, match="a frequent tree has 11 nodes when it is written out, more than 8; lower the depth"
    ):
        distilled(make_set([star] * 4, [0, 0, 1, 1]), depth=2)


def test_networks_that_do_not_know_the_data_are_refused(random_set, trainer):
    def fit(student):
        trainer().fit(GraphClassifier(student), datamodule=source(random_set))

    with pytest.raises(UsageError, match=r"model\.student\.node_values is \[1\], the data have \[2\]; set it to that"):
        fit(gin(values=1))
    with pytest.raises(UsageError, match=r"model\.student has 3 classes, the data 2; set num_classes to 2"):
        fit(GraphNetwork(GIN(8, 8, 1), [2], 3))
    with pytest.raises(UsageError, match=r"model\.student is Linear; put it as `gnn` into"):
        fit(torch.nn.Linear(2, 2))
    with pytest.raises(UsageError, match="Linear does not name its widths; give in_channels"):
        GraphNetwork(torch.nn.Linear(2, 2), [2], 2)


@pytest.mark.parametrize("largest", [3, 2**40])
def test_rows_of_labels_are_numbered_in_their_order(largest):
    rows = torch.randint(0, 3, (200, 3), generator=torch.Generator().manual_seed(0))
    rows[0, 0] = rows[1, 1] = largest  # with 2^40 in two columns, no whole number holds a row
    found, numbers = _interned(rows)
    expected, inverse = torch.unique(rows, dim=0, return_inverse=True)
    assert np.array_equal(found, expected.numpy())
    assert np.array_equal(numbers, inverse.numpy())
