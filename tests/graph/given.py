"""What tests of graphs share: a data module over graphs that a test has made, and trees by the definition."""

from lit_distill.graph.data import GraphDataModule, GraphSource
from lit_distill.graph.mirage import distil


class Given(GraphDataModule):
    """A module over graphs that a test has made."""

    def __init__(self, graphs, classes=("a", "b"), split=None, attributes=None, **kwargs):
        super().__init__(**{"val_share": 0.2, "test_share": 0.2, "batch_size": 10, **kwargs})
        self.given = GraphSource(classes, graphs, split, attributes)

    def read(self):
        return self.given


def distilled(graphs, threshold=(0.2, 0.2), depth=1, classes=("a", "b"), **kwargs):
    values = tuple((graphs.nodes.amax(0) + 1).tolist())
    kinds = tuple((graphs.edges.amax(0) + 1).tolist())
    return distil(graphs, classes, depth=depth, threshold=threshold, node_values=values, edge_values=kinds, **kwargs)


def trees_by_hand(graphs, depth):
    """The tree of every node, as nested tuples of features, by the definition."""
    neighbors = {node: [] for node in range(len(graphs.nodes))}
    for edge, (source, target) in enumerate(graphs.edge_index.T.tolist()):
        neighbors[target].append((tuple(graphs.edges[edge].tolist()), source))

    def tree(node, left):
        children = sorted((kind, tree(u, left - 1)) for kind, u in neighbors[node]) if left else []
        return tuple(graphs.nodes[node].tolist()), tuple(children)

    return [tree(node, depth) for node in neighbors]


def written(found, tree):
    """A tree of a distilled set, likewise."""
    first, last = found.tree_start[tree : tree + 2].tolist()

    def build(place):
        children = [node for node in range(first, last) if int(found.parent[node]) == place]
        below = sorted((tuple(found.edges[node].tolist()), build(node - first)) for node in children)
        return tuple(found.nodes[first + place].tolist()), tuple(below)

    return build(0)
