import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mlxtend.frequent_patterns import fpgrowth, fpmax

from lit_distill.core.errors import UsageError
from lit_distill.graph.data import TUDataModule
from lit_distill.graph.itemsets import frequent_itemsets
from lit_distill.graph.trees import computation_trees

SHARED = Path(__file__).parents[3] / "shared/data/tu"


def pairs(transactions):
    rows = [(number, item) for number, items in enumerate(transactions) for item in items]
    return tuple(np.array(rows, dtype=int).reshape(-1, 2).T)


def by_counting(transactions, least):
    items = sorted(set().union(*transactions))
    found = {}
    for size in range(1, len(items) + 1):
        for chosen in itertools.combinations(items, size):
            support = sum(set(chosen) <= own for own in transactions)
            if support >= least:
                found[chosen] = support
    return found


@pytest.mark.parametrize("seed", range(30))
def test_all_closed_and_maximal_sets_are_those_of_counting_every_subset(seed):
    rng = np.random.default_rng(seed)
    count, items, density = rng.integers(1, 150), rng.integers(1, 9), rng.uniform(0.1, 0.95)
    transactions = [set((np.flatnonzero(rng.random(items) < density) * 3 + 5).tolist()) for _ in range(count)]
    least = int(rng.integers(1, max(2, count // 2)))
    every = by_counting(transactions, least)
    closed = {s: n for s, n in every.items() if not any(set(s) < set(o) and every[o] == n for o in every)}
    maximal = {s: n for s, n in every.items() if not any(set(s) < set(o) for o in every)}
    for kind, wanted in (("all", every), ("closed", closed), ("maximal", maximal)):
        found = frequent_itemsets(*pairs(transactions), least, kind=kind)
        assert len(found) == len(wanted)
        assert dict(found) == wanted


@pytest.mark.parametrize(("kind", "miner"), [("all", fpgrowth), ("maximal", fpmax)])
def test_they_are_those_of_mlxtend(kind, miner):
    table = np.random.default_rng(0).random((300, 14)) < 0.5
    theirs = miner(pd.DataFrame(table), min_support=(30 - 1e-6) / 300)
    wanted = {tuple(sorted(row.itemsets)): round(row.support * 300) for row in theirs.itertuples()}
    assert len(wanted) > 100
    assert dict(frequent_itemsets(*np.nonzero(table), 30, kind=kind)) == wanted


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data/tu is not there")
def test_mutagens_have_179_frequent_sets_of_trees_where_the_public_code_s_miner_finds_175():
    graphs = TUDataModule(SHARED, "MUTAG").read().graphs
    _, trees = computation_trees(graphs.nodes[:, 0].numpy(), graphs.edge_index.numpy(), graphs.edges[:, 0].numpy(), 2)
    own = (graphs.labels == 1)[graphs.graph()].numpy()
    found = dict(frequent_itemsets(graphs.graph().numpy()[own], trees[own], 37))
    assert len(found) == 179
    table = pd.crosstab(graphs.graph().numpy()[own], trees[own]).astype(bool)
    theirs = fpgrowth(table, min_support=(37 - 1e-6) / len(table), use_colnames=True)
    assert found == {tuple(sorted(row.itemsets)): round(row.support * len(table)) for row in theirs.itertuples()}
    assert all(found[rest] >= n for s, n in found.items() for rest in itertools.combinations(s, len(s) - 1) if rest)


def test_the_boundary_counts_and_repeats_do_not():
    transactions, items = np.array([0, 0, 0, 1, 2]), np.array([7, 7, 8, 7, 8])
    assert frequent_itemsets(transactions, items, 2) == [((7,), 2), ((8,), 2)]
    assert frequent_itemsets(transactions, items, 3) == []
    assert frequent_itemsets(transactions, items, 1)[-1] == ((7, 8), 1)
    assert frequent_itemsets(transactions[:0], items[:0], 1) == []


def test_order_is_by_support_then_size_then_items():
    found = frequent_itemsets(*pairs([{1, 2, 3}, {1, 2, 3}, {1, 2}, {4}]), 2)
    assert [itemset.items for itemset in found] == [(1,), (2,), (1, 2), (3,), (1, 3), (2, 3), (1, 2, 3)]


def test_sizes_can_be_limited():
    found = frequent_itemsets(*pairs([{1, 2, 3, 4}] * 5), 5, max_size=2)
    assert sorted(len(itemset.items) for itemset in found) == [1] * 4 + [2] * 6
    with pytest.raises(UsageError, match="max_size is 2 for closed itemsets"):
        frequent_itemsets(*pairs([{1}]), 1, kind="closed", max_size=2)


def test_an_explosion_stops_at_the_bound_and_closed_sets_have_none():
    transactions = pairs([set(range(60))] * 4)  # 2^60 - 1 itemsets, one closed
    with pytest.raises(UsageError, match="more than 1000 itemsets have a support of 4 or more; raise the threshold"):
        frequent_itemsets(*transactions, 4, max_itemsets=1000)
    assert frequent_itemsets(*transactions, 4, kind="closed") == [(tuple(range(60)), 4)]
    assert len(frequent_itemsets(*pairs([{1}, {2}, {3}]), 1, max_itemsets=3)) == 3
    with pytest.raises(UsageError, match="more than 2 itemsets"):
        frequent_itemsets(*pairs([{1}, {2}, {3}]), 1, max_itemsets=2)


def test_a_support_below_one_is_refused():
    with pytest.raises(UsageError, match="support is 0; give 1 transaction or more"):
        frequent_itemsets(*pairs([{1}]), 0)
