"""Mirage's distillation: frequent sets of computation trees, class by class. No network is trained for it."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lit_distill.core.errors import UsageError
from lit_distill.graph.distilled import DistilledTrees, pack
from lit_distill.graph.graphs import GraphSet
from lit_distill.graph.itemsets import Itemset, Kind, frequent_itemsets
from lit_distill.graph.trees import TreeTable, computation_trees_by_graph

LARGEST_TREE = 1_000_000


def distil(
    graphs: GraphSet,
    classes: Sequence[str],
    *,
    depth: int,
    threshold: Sequence[float | int],
    node_values: Sequence[int],
    edge_values: Sequence[int] = (),
    kind: Kind = "all",
    max_size: int | None = None,
    max_itemsets: int = 10_000,
    exclusive: bool = False,
    description: dict[str, Any] | None = None,
) -> DistilledTrees:
    r"""Distils a training set.

    A graph is the set of its nodes' computation trees, t(G); how often a tree occurs in it does not count. Of each
    class c, all sets S of trees are kept that enough of its graphs have:

    .. math:: D_c = \{ (S, \sigma_c(S)) : \sigma_c(S) \ge \theta_c \}, \qquad
        \sigma_c(S) = | \{ G : y_G = c, \; S \subseteq t(G) \} |

    Deterministic. Supports are exact; the public code mines with a library that loses itemsets.

    Args:
        graphs: Training graphs.
        classes: Names of the classes.
        depth: L, hops. Networks with more layers see more of a real graph than the trees have.
        threshold: theta of each class: below 1 a share of the class's graphs, from 1 on a number of graphs.
        node_values: Number of values of each node feature.
        edge_values: The same of edge features.
        kind: Which itemsets are kept, see `frequent_itemsets`.
        max_size: Most trees in an itemset.
        max_itemsets: Where to give up, for each class.
        exclusive: Leave out itemsets that are frequent in more than one class, as some of the public scripts do.
        description: What to note beside depth and thresholds.

    Returns:
        The distilled set. Trees are in the order in which they are first met.

    Raises:
        UsageError: A class is left without an itemset, there are too many, or a tree is too large to be written.

    Reference: Gupta, Manchanda, Kodamana, Ranu, Mirage: Model-Agnostic Graph Distillation for Graph Classification,
    2023, arXiv 2310.09486.
    """
    if len(threshold) != len(classes):
        raise UsageError(f"threshold has {len(threshold)} values, the data {len(classes)} classes; give one for each")
    node_rows, nodes = _interned(graphs.nodes)
    edge_rows, edges = _interned(graphs.edges)
    table, trees = computation_trees_by_graph(
        nodes,
        graphs.edge_index.numpy(),
        edges,
        depth,
        node_start=graphs.node_start.numpy(),
        edge_start=graphs.edge_start.numpy(),
    )
    graph, labels = graphs.graph().numpy(), graphs.labels.numpy()
    found: list[tuple[Itemset, int]] = []
    counts = np.bincount(labels, minlength=len(classes)).tolist()
    least = [_count(*given) for given in zip(threshold, counts, classes, strict=True)]
    for number, name in enumerate(classes):
        own = labels[graph] == number
        itemsets = frequent_itemsets(
            graph[own], trees[own], least[number], kind=kind, max_size=max_size, max_itemsets=max_itemsets
        )
        if not itemsets:
            largest = _largest_support(graph[own], trees[own])
            raise UsageError(
                f"threshold: no tree is in {least[number]} or more of the {counts[number]} graphs of class '{name}'; "
                f"the most frequent one is in {largest}, so lower the threshold to that, or the depth"
            )
        found += [(itemset, number) for itemset in itemsets]
    if exclusive:
        found = _exclusive(found, classes)
    return _packed(
        found,
        table,
        node_rows,
        edge_rows,
        classes=tuple(classes),
        node_values=tuple(node_values),
        edge_values=tuple(edge_values),
        description={
            "depth": depth,
            "threshold": list(threshold),
            "min_support": least,
            "class_graphs": counts,
            "kind": kind,
            "max_size": max_size,
            "exclusive": exclusive,
            **(description or {}),
        },
    )


def _packed(
    found: list[tuple[Itemset, int]], table: TreeTable, node_rows: np.ndarray, edge_rows: np.ndarray, **kwargs: Any
) -> DistilledTrees:
    used = sorted({tree for itemset, _ in found for tree in itemset.items})
    sizes = table.sizes()[used]
    if sizes.max() > LARGEST_TREE:
        raise UsageError(
            f"depth: a frequent tree has {int(sizes.max())} nodes when it is written out, more than {LARGEST_TREE}; "
            "lower the depth"
        )
    place = {tree: number for number, tree in enumerate(used)}
    itemsets = [([place[tree] for tree in itemset.items], number, itemset.support) for itemset, number in found]
    return pack([table.expand(tree) for tree in used], itemsets, node_rows, edge_rows, **kwargs)


def _count(theta: float | int, graphs: int, name: str) -> int:
    if theta <= 0 or (theta >= 1 and theta != int(theta)):
        raise UsageError(
            f"threshold is {theta}; give a number of graphs (1, 2, ...) or a share of those of a class, between 0 and 1"
        )
    if graphs < 2:
        raise UsageError(f"data: class '{name}' has {graphs} training graph; give 2 or more, to say what is frequent")
    return math.ceil(theta * graphs - 1e-9) if theta < 1 else int(theta)


def _interned(features: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Numbers the distinct rows of features; returns the rows, and the number of each."""
    values = features.numpy()
    if values.shape[1] == 0:
        return np.zeros((1, 0), dtype=np.int64), np.zeros(len(values), dtype=np.int64)
    spans = [int(column.max()) + 1 for column in values.T]
    if math.prod(spans) >= 2**63:
        rows, numbers = np.unique(values, axis=0, return_inverse=True)
        return rows, numbers.reshape(-1)
    # One whole number a row, its columns as digits: numbers sort 30 times faster than rows, and in the same order.
    key = np.zeros(len(values), dtype=np.int64)
    for column, span in zip(values.T, spans, strict=True):
        key = key * span + column
    _, first, numbers = np.unique(key, return_index=True, return_inverse=True)
    return values[first], numbers


def _largest_support(graph: np.ndarray, trees: np.ndarray) -> int:
    pairs = np.unique(np.stack([trees, graph]), axis=1)
    return int(np.unique(pairs[0], return_counts=True)[1].max())


def _exclusive(found: list[tuple[Itemset, int]], classes: Sequence[str]) -> list[tuple[Itemset, int]]:
    occurrences: dict[tuple[int, ...], int] = {}
    for itemset, _ in found:
        occurrences[itemset.items] = occurrences.get(itemset.items, 0) + 1
    kept = [(itemset, number) for itemset, number in found if occurrences[itemset.items] == 1]
    for number, name in enumerate(classes):
        if not any(own == number for _, own in kept):
            raise UsageError(
                f"exclusive: every frequent itemset of class '{name}' is frequent in another class too; lower its "
                "threshold, raise the others', or set exclusive to false"
            )
    return kept
