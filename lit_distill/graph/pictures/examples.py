"""Real molecules that have the trees of an itemset."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lit_distill.graph.distilled import DistilledTrees
from lit_distill.graph.graphs import GraphSet
from lit_distill.graph.pictures.supports import trees_of_nodes
from lit_distill.graph.pictures.words import ELEMENTS, Words, texts

SEARCHED = 1_000  # graphs of each class among which the example is sought


class Example(NamedTuple):
    """A molecule: nodes, edges, where they lie, and which trees hang from which nodes."""

    labels: list[str]
    edges: list[tuple[int, int, str]]
    places: Float[np.ndarray, "n 2"]
    trees: list[int]
    itemset: tuple[int, ...]
    support: int


def find_examples(
    distilled: DistilledTrees, words: Words, graphs: GraphSet, tops: list[list[int]]
) -> dict[int, Example]:
    """Finds an example for each class that has one; none without RDKit."""
    try:
        import rdkit  # noqa: F401  # asks only whether it is there
    except ImportError:
        return {}
    of_class = [(graphs.labels == number).nonzero()[:SEARCHED, 0] for number in range(len(distilled.classes))]
    graphs = graphs.take(torch.cat(of_class))
    tree_of_node, graph = trees_of_nodes(distilled, graphs), graphs.graph()
    found = {}
    for number, shown in enumerate(tops):
        itemsets = [
            (len(members), support, members)
            for members, label, support in _itemsets(distilled)
            if label == number and set(members) <= set(shown)
        ]
        if not itemsets:
            continue
        _, support, members = max(itemsets, key=lambda itemset: itemset[:2])
        has_all = graphs.labels == number
        for tree in members:
            has_all &= torch.bincount(graph[tree_of_node == tree], minlength=graphs.size) > 0
        if has_all.any():
            sizes = torch.where(has_all, graphs.node_start.diff(), len(graph) + 1)
            found[number] = _example(words, graphs, tree_of_node, int(sizes.argmin()), members, support)
    return found


def _itemsets(distilled: DistilledTrees) -> Iterator[tuple[tuple[int, ...], int, int]]:
    members, start = distilled.member.tolist(), distilled.set_start.tolist()
    for number, (label, support) in enumerate(zip(distilled.labels.tolist(), distilled.support.tolist(), strict=True)):
        yield tuple(members[start[number] : start[number + 1]]), label, support


def _example(
    words: Words, graphs: GraphSet, trees: Int[Tensor, " n"], graph: int, members: tuple[int, ...], support: int
) -> Example:
    begin, end = graphs.node_start[graph : graph + 2].tolist()
    first, last = graphs.edge_start[graph : graph + 2].tolist()
    kinds = texts(graphs.edges[first:last], words.edge_names)
    pairs = (graphs.edge_index[:, first:last] - begin).T.tolist()
    edges = [(u, v, kind) for (u, v), kind in zip(pairs, kinds, strict=True) if u < v]
    labels = texts(graphs.nodes[begin:end], words.node_names)
    return Example(
        labels, edges, coordinates(labels, [(u, v) for u, v, _ in edges]), trees[begin:end].tolist(), members, support
    )


def coordinates(labels: Sequence[str], bonds: Sequence[tuple[int, int]]) -> Float[np.ndarray, "n 2"]:
    """Places atoms in the plane by RDKit.

    Args:
        labels: Elements; what is none is an atom without a kind.
        bonds: Atoms of each bond.

    Returns:
        (n, 2) in angstrom.
    """
    from rdkit import Chem
    from rdkit.Chem import rdDepictor

    molecule = Chem.RWMol()
    for label in labels:
        molecule.AddAtom(Chem.Atom(label if label in ELEMENTS else 0))
    for first, second in bonds:
        molecule.AddBond(first, second, Chem.BondType.SINGLE)
    molecule.UpdatePropertyCache(strict=False)
    Chem.FastFindRings(molecule)
    rdDepictor.Compute2DCoords(molecule)
    return molecule.GetConformer().GetPositions()[:, :2]
