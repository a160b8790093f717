"""Computation trees: what a message-passing network of L layers can see of a node, interned.

Two nodes have equal trees of depth L exactly if the Weisfeiler-Leman algorithm gives them one color after L rounds. So
trees are never expanded to be compared: a tree is a label and a multiset of (edge label, tree of the next lower depth),
and each such pair is looked up as one number. Whole arrays at a time; nothing here has a Python object per node.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int64, UInt64

from lit_distill.core.errors import UsageError

SALTS = 8
LARGEST = 2**62


class TreeTable(NamedTuple):
    """Distinct computation trees, each once, with the trees that hang in them.

    The children of tree t are entries `start[t]` to `start[t + 1]` of `child` and `edge_label`. A child stands for a
    whole subtree, by its place in this table.

    Attributes:
        label: Label of each tree's root, (T,).
        start: Where each tree's children begin, (T + 1,).
        edge_label: Label of the edge to each child, (C,).
        child: Place of each child in the table, (C,).
        level: Where the trees of each depth begin: those of depth k are `level[k]` to `level[k + 1]`, (L + 2,).
    """

    label: Int64[np.ndarray, " t"]
    start: Int64[np.ndarray, " t1"]
    edge_label: Int64[np.ndarray, " c"]
    child: Int64[np.ndarray, " c"]
    level: Int64[np.ndarray, " l2"]

    @property
    def depth(self) -> int:
        """L."""
        return len(self.level) - 2

    def sizes(self) -> Int64[np.ndarray, " t"]:
        """Counts the nodes of every tree when it is expanded; at most 2^62."""
        sizes = np.ones(len(self.label))
        for first, last in zip(self.level[1:-1], self.level[2:], strict=True):  # of a depth from those one lower
            begin, end = self.start[first:last], self.start[first + 1 : last + 1]
            sums = np.concatenate([[0.0], np.cumsum(sizes[self.child[self.start[first] : self.start[last]]])])
            sizes[first:last] += sums[end - self.start[first]] - sums[begin - self.start[first]]
        return np.minimum(sizes, LARGEST).astype(np.int64)

    def expand(self, tree: int) -> "Tree":
        """Writes one tree out, its root first, level by level."""
        places = np.array([tree])
        labels, parents, edges = [self.label[places]], [np.array([-1])], [np.array([0])]
        before = 0
        while True:
            counts = self.start[places + 1] - self.start[places]
            if not counts.sum():
                break
            entries = ranges(self.start[places], counts)
            parents.append(before + np.repeat(np.arange(len(places)), counts))
            before += len(places)
            edges.append(self.edge_label[entries])
            places = self.child[entries]
            labels.append(self.label[places])
        return Tree(np.concatenate(labels), np.concatenate(parents), np.concatenate(edges))


class Tree(NamedTuple):
    """A computation tree, written out: node 0 is the root, and parents come before their children.

    Attributes:
        label: Node labels, (n,).
        parent: Place of each node's parent, (n,); -1 for the root.
        edge_label: Label of the edge to the parent, (n,); 0 for the root.
    """

    label: Int64[np.ndarray, " n"]
    parent: Int64[np.ndarray, " n"]
    edge_label: Int64[np.ndarray, " n"]


def computation_trees(
    labels: Int[np.ndarray, " n"],
    edge_index: Int[np.ndarray, "2 e"],
    edge_labels: Int[np.ndarray, " e"] | None,
    depth: int,
) -> tuple[TreeTable, Int64[np.ndarray, " n"]]:
    """Finds the distinct computation trees of all nodes of a set of graphs.

    A copy of node u has a child for every neighbor of u, also for the one from which it was reached. Nodes of depth L
    are leaves.

    Cost: a sort of the edges and one of the nodes for each depth. Memory: a few arrays of the length of nodes and
    edges, and the table, which grows with the number of distinct trees.

    Args:
        labels: Node labels, whole numbers from 0, (N,).
        edge_index: (2, E) source and target of each edge; an undirected edge stands there in both directions.
        edge_labels: (E,) whole numbers from 0; all 0 if None.
        depth: L >= 0.

    Returns:
        The table, and for each node the place of its tree of depth L. Places of one depth are in the order in which
        their trees are first met.

    Raises:
        UsageError: The depth is negative.
    """
    if depth < 0:
        raise UsageError(f"depth is {depth}; give 0 or more")
    labels = np.ascontiguousarray(labels, dtype=np.int64)
    source, target = np.ascontiguousarray(edge_index, dtype=np.int64)
    edges = np.zeros(len(source), dtype=np.int64) if edge_labels is None else edge_labels.astype(np.int64)
    ids, first = _by_first_met(labels)
    places = ids
    table_labels, counts = [labels[first]], [np.zeros(len(first), dtype=np.int64)]
    table_edges: list[np.ndarray] = [edges[:0]]
    table_children: list[np.ndarray] = [edges[:0]]
    level = [0, len(first)]
    degrees = np.bincount(target, minlength=len(labels))
    start = np.concatenate([[0], np.cumsum(degrees)])
    for _ in range(depth):
        below = len(first)
        pairs = _sorted_within(target, edges * below + ids[source], len(labels))
        ids, first = _intern(labels, pairs, start, degrees)
        entries = ranges(start[first], degrees[first])
        edge_label, child = np.divmod(pairs[entries], below)
        table_labels.append(labels[first])
        counts.append(degrees[first])
        table_edges.append(edge_label)
        table_children.append(child + level[-2])
        places = ids + level[-1]
        level.append(level[-1] + len(first))
    return _table(table_labels, counts, table_edges, table_children, level), places


def computation_trees_by_graph(
    labels: Int[np.ndarray, " n"],
    edge_index: Int[np.ndarray, "2 e"],
    edge_labels: Int[np.ndarray, " e"] | None,
    depth: int,
    *,
    node_start: Int[np.ndarray, " g1"],
    edge_start: Int[np.ndarray, " g1"],
    nodes_at_once: int = 200_000,
) -> tuple[TreeTable, Int64[np.ndarray, " n"]]:
    """As `computation_trees`, graphs after graphs: memory grows with the distinct trees, and by 8 bytes a node.

    Args:
        labels: See `computation_trees`.
        edge_index: See `computation_trees`; the edges of a graph stand together, and join nodes of that graph.
        edge_labels: See `computation_trees`.
        depth: L.
        node_start: Where the nodes of each graph begin, (G + 1,).
        edge_start: Where its edges begin, (G + 1,).
        nodes_at_once: How many nodes are looked at together, or as many as the largest graph has.

    Returns:
        The table and the places of all nodes' trees, the same as those of `computation_trees`.
    """
    whole: TreeTable | None = None
    places = np.empty(len(labels), dtype=np.int64)
    graph = level = 0
    while graph < len(node_start) - 1:
        last = int(np.searchsorted(node_start, node_start[graph] + nodes_at_once, side="right")) - 1
        last = max(last, graph + 1)
        nodes = slice(int(node_start[graph]), int(node_start[last]))
        edges = slice(int(edge_start[graph]), int(edge_start[last]))
        own = None if edge_labels is None else edge_labels[edges]
        table, ids = computation_trees(labels[nodes], edge_index[:, edges] - nodes.start, own, depth)
        if whole is None:
            whole, moved = table, np.arange(len(table.label))
        else:
            whole, moved = _merged(whole, table)
            # What was there keeps its order within its depth, so that only the beginning of the depth may have moved.
            places[: nodes.start] += whole.level[depth] - level
        level = whole.level[depth]
        places[nodes] = moved[ids]
        graph = last
    if whole is None:
        return computation_trees(labels, edge_index, edge_labels, depth)
    return whole, places


def _merged(first: TreeTable, second: TreeTable) -> tuple[TreeTable, Int64[np.ndarray, " t"]]:
    """Joins two tables of equal depth; returns the joint one and where the trees of the second are in it."""
    both = (first, second)
    moved = [np.empty(len(table.label), dtype=np.int64) for table in both]
    labels, counts, edges, children, level = [], [], [], [], [0]
    for number in range(first.depth + 1):
        spans = [slice(int(table.level[number]), int(table.level[number + 1])) for table in both]
        own = np.concatenate([table.label[span] for table, span in zip(both, spans, strict=True)])
        degrees = np.concatenate([np.diff(table.start)[span] for table, span in zip(both, spans, strict=True)])
        entries = [
            slice(int(t.start[span.start]), int(t.start[span.stop])) for t, span in zip(both, spans, strict=True)
        ]
        below = level[-1] - level[-2] if number else 1
        base = level[-2] if number else 0
        pairs = np.concatenate(
            [
                table.edge_label[entry] * below + moved[which][table.child[entry]] - base
                for which, (table, entry) in enumerate(zip(both, entries, strict=True))
            ]
        )
        pairs = _sorted_within(np.repeat(np.arange(len(own)), degrees), pairs, len(own))
        start = np.concatenate([[0], np.cumsum(degrees)])
        ids, met = _intern(own, pairs, start, degrees)
        for which, span in enumerate(spans):
            size = spans[0].stop - spans[0].start
            moved[which][span] = level[-1] + (ids[size:] if which else ids[:size])
        kept = ranges(start[met], degrees[met])
        edge_label, child = np.divmod(pairs[kept], below)
        labels.append(own[met])
        counts.append(degrees[met])
        edges.append(edge_label)
        children.append(child + base)
        level.append(level[-1] + len(met))
    return _table(labels, counts, edges, children, level), moved[1]


def _table(
    labels: list[np.ndarray],
    counts: list[np.ndarray],
    edges: list[np.ndarray],
    children: list[np.ndarray],
    level: list[int],
) -> TreeTable:
    """Puts a table together from what each depth gave; counts are those of each tree's children."""
    start = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    return TreeTable(np.concatenate(labels), start, np.concatenate(edges), np.concatenate(children), np.array(level))


def ranges(starts: Int[np.ndarray, " n"], counts: Int[np.ndarray, " n"]) -> Int64[np.ndarray, " total"]:
    """Joins the ranges of whole numbers that begin at `starts` and have `counts` members."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - counts), counts)


def _sorted_within(group: np.ndarray, values: np.ndarray, groups: int) -> np.ndarray:
    """Returns the values, group after group, sorted within each."""
    span = int(values.max()) + 1 if len(values) else 1
    if groups * span < LARGEST:  # one number for both sorts several times as fast as two keys
        keys = group * span + values
        keys.sort()
        return keys % span
    return values[np.lexsort((values, group))]


def _intern(
    labels: np.ndarray, pairs: np.ndarray, start: np.ndarray, degrees: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers the nodes by equality of (label, multiset of pairs); exact.

    Nodes are grouped by a hash of 64 bits, then each is compared with the first of its group. Should two differ, the
    hash is changed.
    """
    for salt in range(SALTS):
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(_mix(pairs.astype(np.uint64), 2 * salt + 1))])
        hashes = _mix(labels.astype(np.uint64), 2 * salt) + (sums[start[1:]] - sums[start[:-1]])
        ids, first = _by_first_met(hashes)
        if _same(labels, pairs, start, degrees, first[ids]):
            return ids, first
    raise AssertionError(f"{SALTS} hash functions in a row made different trees equal")


def _same(labels: np.ndarray, pairs: np.ndarray, start: np.ndarray, degrees: np.ndarray, model: np.ndarray) -> bool:
    """Says whether every node has the label and the pairs of its model."""
    if not (np.array_equal(labels, labels[model]) and np.array_equal(degrees, degrees[model])):
        return False
    return np.array_equal(pairs, pairs[ranges(start[model], degrees)])


def _by_first_met(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers the distinct values in the order in which they are met; returns numbers, and where each is met first."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank[inverse], first[order]


def _mix(values: UInt64[np.ndarray, " n"], salt: int) -> UInt64[np.ndarray, " n"]:
    """Hashes whole numbers to 64 bits (splitmix64)."""
    values = values + np.uint64((0x9E3779B97F4A7C15 * (salt + 1)) % 2**64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
