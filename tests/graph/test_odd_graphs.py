"""Graphs at the edge: of one node, with isolated nodes, with labels that training lacks, the only one of a class."""

from functools import partial

import pytest
import torch
from given import Given
from torch_geometric.nn.models import GAT, GCN, GIN

from lit_distill.core.errors import UsageError
from lit_distill.graph.classifier import GraphClassifier
from lit_distill.graph.data import DistilledGraphs
from lit_distill.graph.methods.mirage import Mirage
from lit_distill.graph.methods.random_subset import RandomSubset
from lit_distill.graph.models import GraphNetwork

ATOM, PAIR, SALT = ([0], [], None), ([0, 1], [(0, 1)], None), ([1, 0, 1], [(1, 2)], None)


def halves(graphs, labels, make_set, **kwargs):
    """A set whose second half is for testing."""
    half = len(graphs) // 2
    split = {"train": torch.arange(half), "test": torch.arange(half, 2 * half)}
    return Given(make_set(graphs, labels, **kwargs), split=split)


@pytest.mark.parametrize("gnn", [GIN, GAT, GCN], ids=["GIN", "GAT", "GCN"])
def test_graphs_of_one_node_and_isolated_nodes_are_distilled_trained_on_and_tested(make_set, trainer, gnn):
    graphs = [ATOM, ATOM, SALT, SALT, PAIR, PAIR] * 2
    data = Mirage(halves(graphs, [0, 0, 1, 1, 0, 0] * 2, make_set), depth=2, threshold=2)
    network = GraphNetwork(gnn(8, 8, 2), [2], 2)
    module, fit = GraphClassifier(network), trainer(max_epochs=2)
    fit.fit(module, datamodule=data)
    sizes = data.distilled.tree_start.diff().tolist()
    first = data.distilled.tree_start[:-1].tolist()
    alone = {int(data.distilled.nodes[place, 0]) for size, place in zip(sizes, first, strict=True) if size == 1}
    assert alone == {0, 1}  # the atom, and the isolated node of the salt
    synthetic = data.part("train")
    single = (synthetic.node_start.diff() == 1).nonzero()[:, 0]
    assert synthetic.edge_start.diff()[single].tolist() == [0, 0]
    result = fit.test(module, datamodule=data, verbose=False)[0]
    assert torch.isfinite(torch.tensor(list(result.values()))).all()
    # The atom is a whole graph, so that its one tree is seen as the graph is, also by a GCN.
    graph = network.eval()(data.part("test").batch(torch.tensor([0])))
    atom = next(n for n in single.tolist() if int(synthetic.nodes[synthetic.node_start[n], 0]) == 0)
    torch.testing.assert_close(network(synthetic.batch(torch.tensor([atom]))), graph)


def test_random_graphs_may_be_single_nodes(make_set, trainer):
    data = RandomSubset(halves([ATOM, SALT] * 8, [0, 1] * 8, make_set), bytes=4 + 3 * 4 + 16 + 7)
    fit, module = trainer(), GraphClassifier(GraphNetwork(GIN(8, 8, 1), [2], 2))
    fit.fit(module, datamodule=data)
    train = data.part("train")
    assert train.node_start.diff().tolist() == [1, 3, 1]  # a second atom fits, a second salt does not
    assert data.footprint()["bytes"] == 4 + 28 + 4
    exact = RandomSubset(halves([ATOM, SALT] * 8, [0, 1] * 8, make_set), bytes=2 * (4 + 28))
    assert exact.footprint()["bytes"] == 2 * (4 + 28)  # what fits to the byte fits
    assert 0 <= fit.test(module, datamodule=data, verbose=False)[0]["test/acc"] <= 1


def test_the_only_graph_of_a_class_is_taken_by_number_and_by_bytes(make_set):
    source = halves([ATOM, ATOM, PAIR, ATOM, ATOM, PAIR], [0, 0, 1, 0, 0, 1], make_set)
    for budget in ({"per_class": 1}, {"bytes": 1}):
        data = RandomSubset(source, **budget)
        assert data.part("train").labels.tolist() == [0, 1]
        assert data.part("train").node_start.diff().tolist() == [1, 2]
    with pytest.raises(UsageError, match=r"data\.per_class is 2; the smallest class has 1 graphs"):
        RandomSubset(source, per_class=2).setup()
    with pytest.raises(UsageError, match="class 'b' has 1 training graph; give 2 or more"):
        Mirage(source, depth=1, threshold=1).setup()


# ---- labels that training lacks --------------------------------------------------------------------------------------


UNSEEN = ([0, 2], [(0, 1)], [1])
SEEN = ([0, 1], [(0, 1)], [0])


def source(make_set, test):
    return halves([SEEN] * 4 + [test] * 4, [0, 1] * 4, make_set)


def test_a_label_that_training_lacks_has_an_embedding_that_stays_as_it_began(make_set, trainer):
    data = Mirage(source(make_set, UNSEEN), depth=1, threshold=2)
    network = GraphNetwork(GAT(8, 8, 1, edge_dim=4), [3], 2, edge_values=[2])
    before = [table.weight.detach().clone() for table in (network.node_embeddings[0], network.edge_embeddings[0])]
    adam = partial(torch.optim.Adam, lr=1e-2)  # weight decay would shrink it
    fit, module = trainer(max_epochs=3), GraphClassifier(network, optimizer=adam)
    fit.fit(module, datamodule=data)
    assert (data.node_values, data.edge_values) == ((3,), (2,))
    assert int(data.distilled.nodes.max()) == 1
    after = [network.node_embeddings[0].weight, network.edge_embeddings[0].weight]
    assert torch.equal(before[0][2], after[0][2])
    assert torch.equal(before[1][1], after[1][1])
    assert not torch.equal(before[0][0], after[0][0])
    assert torch.isfinite(torch.tensor(fit.test(module, datamodule=data, verbose=False)[0]["test/nll"]))


def test_a_distilled_set_and_a_source_of_other_labels_are_not_joined(make_set, tmp_path):
    made = Mirage(source(make_set, SEEN), depth=1, threshold=2)
    made.setup()
    made.distilled.save(tmp_path)
    more = [
        (UNSEEN, r"node_values \[2\], data\.source has \[3\]; give the source that it was made from"),
        (([0, 1], [(0, 1)], [1]), r"edge_values \[1\], data\.source has \[2\]"),
    ]
    for test, says in more:
        with pytest.raises(UsageError, match=says):
            DistilledGraphs(tmp_path, source(make_set, test)).setup()
    assert DistilledGraphs(tmp_path, source(make_set, SEEN)).part_size("test") == 4


def test_a_network_of_fewer_labels_is_refused_also_if_training_would_do(make_set, trainer):
    for node_values, edge_values in (([2], [2]), ([3], [1])):
        network = GraphNetwork(GAT(8, 8, 1, edge_dim=4), node_values, 2, edge_values=edge_values)
        with pytest.raises(
            UsageError, match=r"model\.student\.(node|edge)_values is \[.\], the data have \[.\]; set it"
        ):
            trainer().fit(GraphClassifier(network), datamodule=Mirage(source(make_set, UNSEEN), depth=1, threshold=2))


def test_degrees_of_another_training_part_are_not_joined_with_a_set(make_set, tmp_path):
    star, path = ([[]] * 5, [(0, v) for v in range(1, 5)], None), ([[]] * 3, [(0, 1), (1, 2)], None)
    graphs = make_set([path, path, path, path, star, star], [0, 1, 0, 1, 0, 1], columns=0)
    few = {"train": torch.arange(4), "test": torch.tensor([4, 5])}
    made = Mirage(Given(graphs, split=few), depth=1, threshold=2)
    made.setup()
    assert made.node_values == (3,)
    made.distilled.save(tmp_path)
    every = {"train": torch.arange(6), "test": torch.tensor([0])}
    with pytest.raises(UsageError, match=r"node_values \[3\], data\.source has \[5\]"):
        DistilledGraphs(tmp_path, Given(graphs, split=every)).setup()
