from dataclasses import replace

import pytest
import torch
from torch_geometric.data import Batch, Data

from lit_distill.core.loading import EpochPermutation
from lit_distill.graph.graphs import GraphLoader, WeightedSampler, join

CPU = torch.device("cpu")


def as_data(graphs):
    """The same graphs, one object each."""
    found = []
    for number in range(graphs.size):
        n, m = graphs.node_start[number : number + 2].tolist()
        e, f = graphs.edge_start[number : number + 2].tolist()
        found.append(Data(x=graphs.nodes[n:m], edge_index=graphs.edge_index[:, e:f] - n, edge_attr=graphs.edges[e:f]))
    return found


def test_a_batch_is_that_of_torch_geometric(random_set):
    graphs = random_set(kinds=3)
    index = torch.tensor([4, 0, 17, 4])
    batch = graphs.batch(index)
    theirs = Batch.from_data_list([as_data(graphs)[number] for number in index.tolist()])
    assert torch.equal(batch.nodes, theirs.x)
    assert torch.equal(batch.edge_index, theirs.edge_index)
    assert torch.equal(batch.edges, theirs.edge_attr)
    assert torch.equal(batch.graph, theirs.batch)
    assert batch.labels.tolist() == graphs.labels[index].tolist()
    assert batch.roots.all()
    assert batch.index.tolist() == index.tolist()


def test_sets_are_joined_and_taken_apart_again(random_set):
    first, second = random_set(count=3, kinds=2), random_set(count=4, kinds=2, seed=1)
    both = join([first, second])
    assert both.size == 7
    again = both.take(torch.arange(3, 7))
    assert again.edge_weight is None
    for name, value in vars(second).items():
        assert value is None or torch.equal(getattr(again, name), value)


def test_weights_of_edges_go_with_them(random_set):
    plain, graphs = random_set(count=2, seed=1), random_set(count=5)
    edges = graphs.edge_index.shape[1]
    weighted = replace(graphs, edge_weight=torch.arange(1.0, edges + 1))
    index = torch.tensor([3, 0])
    wanted = [torch.arange(1.0, edges + 1)[graphs.edge_start[g] : graphs.edge_start[g + 1]] for g in (3, 0)]
    assert torch.equal(weighted.batch(index).edge_weight, torch.cat(wanted))
    assert graphs.batch(index).edge_weight is None
    both = join([plain, weighted]).to(CPU)  # an edge without a weight is whole
    assert both.edge_weight.tolist() == [1.0] * plain.edge_index.shape[1] + list(range(1, edges + 1))
    assert weighted.stored_bytes() == graphs.stored_bytes() + 4 * edges


def test_bytes_are_counted_by_the_formula(random_set):
    graphs = random_set(kinds=2)
    nodes, edges = len(graphs.nodes), graphs.edge_index.shape[1]
    assert graphs.stored_bytes() == 4 * nodes + 8 * edges + 4 * edges


def test_the_loader_gives_every_graph_once_an_epoch_and_another_order_each(random_set):
    graphs = random_set()
    loader = GraphLoader(graphs, EpochPermutation(20, seed=1), 8, device=CPU)
    epochs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        batches = list(loader)
        assert [len(batch.labels) for batch in batches] == [8, 8, 4]
        epochs.append([number for batch in batches for number in batch.index.tolist()])
        assert sorted(epochs[-1]) == list(range(20))
    assert epochs[0] != epochs[1]


def test_the_loader_goes_on_within_an_epoch(random_set):
    loader = GraphLoader(random_set(), EpochPermutation(20, seed=1), 8, device=CPU)
    whole = [batch.index.tolist() for batch in loader]
    steps = iter(loader)
    next(steps)
    again = GraphLoader(random_set(), EpochPermutation(20, seed=1), 8, device=CPU)
    again.load_state_dict(loader.state_dict())
    assert [batch.index.tolist() for batch in again] == whole[1:]


def test_ranks_share_a_batch(random_set):
    shares = [
        [b.index.tolist() for b in GraphLoader(random_set(), EpochPermutation(20), 8, device=CPU, rank=r, world_size=2)]
        for r in range(2)
    ]
    alone = [batch.index.tolist() for batch in GraphLoader(random_set(), EpochPermutation(20), 8, device=CPU)]
    assert [a + b for a, b in zip(*shares, strict=True)] == alone


def test_a_set_of_one_batch_is_batched_once(random_set):
    loader = GraphLoader(random_set(), EpochPermutation(20), 64, device=CPU)
    [first], [second] = list(loader), list(loader)
    assert first is second
    assert first.index.tolist() == list(range(20))
    weighted = GraphLoader(random_set(), WeightedSampler(torch.ones(20)), 64, device=CPU)
    [first] = list(weighted)
    weighted.sampler.set_epoch(1)
    [second] = list(weighted)
    assert first.index.tolist() != second.index.tolist()


def test_weighted_draws_have_the_frequencies_asked_for():
    sampler = WeightedSampler(torch.tensor([1.0, 0.0, 3.0]).repeat(4000), seed=2)
    counts = sampler.order().remainder(3).bincount(minlength=3) / 12_000
    assert counts[1] == 0
    assert counts[2] == pytest.approx(0.75, abs=0.015)
    first = sampler.order()
    sampler.set_epoch(1)
    assert not torch.equal(first, sampler.order())
    sampler.set_epoch(0)
    assert torch.equal(first, sampler.order())
