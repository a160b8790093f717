"""How often trees of a distilled set are found: in classes, and at the nodes of real graphs."""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from lit_distill.graph.distilled import DistilledTrees
from lit_distill.graph.graphs import GraphSet, join
from lit_distill.graph.trees import computation_trees

MOST_TREES = 5  # fit beside the molecule


def tree_supports(distilled: DistilledTrees) -> Int[Tensor, "k t"]:
    """Finds in how many graphs of each class a tree is: the largest support of an itemset that has it.

    That is the tree's own support where all frequent or all closed itemsets are kept; where only maximal ones are, or
    those of one class alone, it is at least that. 0: no itemset of the class has it.
    """
    classes = distilled.labels.repeat_interleave(distilled.set_start.diff())
    support = distilled.support.repeat_interleave(distilled.set_start.diff())
    trees = len(distilled.tree_start) - 1
    flat = torch.zeros(len(distilled.classes) * trees, dtype=torch.long)
    flat.scatter_reduce_(0, classes * trees + distilled.member, support, "amax")
    return flat.reshape(len(distilled.classes), trees)


def top_trees(distilled: DistilledTrees, most: int = MOST_TREES) -> list[list[int]]:
    """Returns the trees of each class with the largest support, the largest first; among equals in their order."""
    tops = []
    for supports in tree_supports(distilled):
        order = supports.argsort(descending=True, stable=True)
        tops.append(order[supports[order] > 0][:most].tolist())
    return tops


def trees_of_nodes(distilled: DistilledTrees, graphs: GraphSet) -> Int[Tensor, " n"]:
    """Finds the tree of the distilled set that hangs from each node of real graphs; -1: none of them."""
    trees = len(distilled.tree_start) - 1
    each = torch.arange(trees)
    alone = replace(
        distilled,
        member=each,
        set_start=torch.arange(trees + 1),
        labels=torch.zeros_like(each),
        support=torch.zeros_like(each),
    ).graphs()
    both = join([alone, graphs])
    nodes, edges = (
        np.unique(features.numpy(), axis=0, return_inverse=True)[1].reshape(-1)
        if features.shape[1]
        else np.zeros(len(features), dtype=np.int64)
        for features in (both.nodes, both.edges)
    )
    _, places = computation_trees(nodes, both.edge_index.numpy(), edges, distilled.description["depth"])
    own, real = torch.from_numpy(places).split([len(alone.nodes), len(graphs.nodes)])
    tree_of_place = torch.full((int(places.max()) + 1,), -1)
    tree_of_place[own[alone.roots]] = each
    return tree_of_place[real]
