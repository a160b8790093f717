"""The distilled set: computation trees, each stored once, and the sets of them that stand for a class."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_distill.core.errors import RunError, UsageError
from lit_distill.core.files import atomic_path, write_json
from lit_distill.graph.graphs import GraphSet, ranges, starts
from lit_distill.graph.trees import Tree

VERSION = 1
TENSORS, DESCRIPTION = "trees.safetensors", "distilled.json"
Set = TypeVar("Set")


@dataclass(frozen=True)
class DistilledTrees:
    """A distilled training set. Needs nothing of the data that it was made from.

    Tree t is the nodes `tree_start[t]` to `tree_start[t + 1]`, its root first; each node names its parent by its place
    in the tree. Itemset s is the trees `member[set_start[s] : set_start[s + 1]]`.

    Attributes:
        nodes: Node features, (n, c) whole numbers.
        parent: Place of each node's parent in its tree, (n,); -1 for a root.
        edges: Features of the edge to the parent, (n, d); 0 for a root.
        tree_start: (t + 1,).
        member: Trees of all itemsets, one itemset behind the other, (m,).
        set_start: (s + 1,).
        labels: Class of each itemset, (s,).
        support: Training graphs of its class that have all trees of an itemset, (s,).
        classes: Names of the classes.
        node_values: Number of values of each node feature in the data.
        edge_values: The same of edge features.
        description: How it was made: depth, thresholds, data.
    """

    nodes: Int[Tensor, "n c"]
    parent: Int[Tensor, " n"]
    edges: Int[Tensor, "n d"]
    tree_start: Int[Tensor, " t1"]
    member: Int[Tensor, " m"]
    set_start: Int[Tensor, " s1"]
    labels: Int[Tensor, " s"]
    support: Int[Tensor, " s"]
    classes: tuple[str, ...]
    node_values: tuple[int, ...]
    edge_values: tuple[int, ...]
    description: dict[str, Any]

    @property
    def size(self) -> int:
        """Number of itemsets, which is that of synthetic graphs."""
        return len(self.labels)

    def graphs(self) -> GraphSet:
        """Makes the synthetic graphs: for each itemset its trees side by side, edges from child to parent.

        Only the roots are read out. Edges point one way: with both, a root would hear of what its children hear of it.
        """
        sizes = self.tree_start.diff()
        places = ranges(self.tree_start[self.member], sizes[self.member])  # nodes of all members, one by one
        counts = sizes[self.member]
        first = starts(counts)  # where each member begins among them
        parent = self.parent[places]
        is_root = parent < 0
        child = (~is_root).nonzero()[:, 0]
        begin = first[:-1].repeat_interleave(counts)
        set_of_member = torch.arange(self.size).repeat_interleave(self.set_start.diff())
        nodes_of_set = torch.zeros(self.size, dtype=torch.long).index_add(0, set_of_member, counts)
        edges_of_set = torch.zeros(self.size, dtype=torch.long).index_add(0, set_of_member, counts - 1)
        return GraphSet(
            labels=self.labels,
            nodes=self.nodes[places],
            edge_index=torch.stack([child, (parent + begin)[child]]),
            edges=self.edges[places][child],
            node_start=starts(nodes_of_set),
            edge_start=starts(edges_of_set),
            roots=is_root,
        )

    def frequencies(self) -> Float[Tensor, " s"]:
        """Returns the probability of drawing each itemset: classes evenly, within a class by support."""
        support = self.support.double()
        totals = torch.zeros(len(self.classes), dtype=torch.double).index_add(0, self.labels, support)
        present = int((totals > 0).sum())
        return support / totals[self.labels] / present

    def footprint(self) -> dict[str, int]:
        """Counts bytes by the measure of `GraphSet.stored_bytes`.

        Returns:
            "bytes": each distinct tree once, and 4 for each member of an itemset and each support, which is what has to
            be kept. "bytes_expanded": of the synthetic graphs written out, a tree in k itemsets k times.
        """
        edges = len(self.parent) - (len(self.tree_start) - 1)
        trees = 4 * self.nodes.numel() + 8 * edges + 4 * edges * self.edges.shape[1]
        stored = trees + 4 * len(self.member) + 4 * self.size
        return {"bytes": stored, "bytes_expanded": self.graphs().stored_bytes()}

    # ---- on disk ---------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Writes the set to a folder: tensors as safetensors, everything else as JSON."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        small = {name: value.to(torch.int32).contiguous() for name, value in tensors.items()}
        with atomic_path(Path(folder) / TENSORS) as path:
            save_file(small, path)
        rest = {name: value for name, value in vars(self).items() if name not in tensors}
        write_json(Path(folder) / DESCRIPTION, {"kind": "trees", "version": VERSION, **rest})

    @classmethod
    def load(cls, folder: str | Path) -> "DistilledTrees":
        """Reads a set that `save` wrote.

        Raises:
            UsageError: There is none, or it is of another version.
            RunError: A file cannot be read.
        """
        return load_set(cls, folder, TENSORS, kind="trees", version=VERSION, remedy="distil again")


def load_set(
    make: Callable[..., Set], folder: str | Path, tensors: str, *, kind: str, version: int, remedy: str
) -> Set:
    """Reads a distilled set of one kind.

    Args:
        make: Makes the set from its fields.
        folder: Folder of the set.
        tensors: Name of the file that holds its tensors.
        kind: What stands in the description as "kind".
        version: The one version that can be read.
        remedy: What to do with a set that cannot be read.

    Raises:
        UsageError: There is none, or it is of another kind or version.
        RunError: A file cannot be read.
    """
    folder = Path(folder)
    if not (folder / DESCRIPTION).is_file():
        raise UsageError(f"{folder} holds no {DESCRIPTION}; give the folder of a distilled set, such as RUN/distilled")
    try:
        rest = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        found = rest.pop("kind"), rest.pop("version")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise RunError(f"{folder / DESCRIPTION} cannot be read ({error}); {remedy}") from error
    if found != (kind, version):
        raise UsageError(
            f"{folder} holds {found[0]} of version {found[1]}, this release reads {kind} of version {version}; "
            f"{remedy}, or use the release that wrote it"
        )
    try:
        for name in ("classes", "node_values", "edge_values"):
            rest[name] = tuple(rest[name])
        for name, value in load_file(folder / tensors).items():
            rest[name] = value.long() if value.dtype == torch.int32 else value
        return make(**rest)
    except (OSError, KeyError, TypeError, SafetensorError) as error:
        raise RunError(f"{folder} cannot be read ({str(error)[:120]}); {remedy}") from error


def pack(
    trees: list[Tree],
    itemsets: list[tuple[list[int], int, int]],
    node_rows: np.ndarray,
    edge_rows: np.ndarray,
    **kwargs: Any,
) -> DistilledTrees:
    """Puts trees and itemsets into tensors.

    Args:
        trees: Distinct trees.
        itemsets: Trees of each, its class and its support.
        node_rows: Features (v, c) for which each node label stands.
        edge_rows: Features (w, d) for which each edge label stands.
        kwargs: The remaining attributes of `DistilledTrees`.
    """
    labels = np.concatenate([tree.label for tree in trees])
    parents = np.concatenate([tree.parent for tree in trees])
    edges = edge_rows[np.concatenate([tree.edge_label for tree in trees])] if edge_rows.size else None
    if edges is not None:
        edges[parents < 0] = 0
    members, classes, supports = zip(*itemsets, strict=True)
    return DistilledTrees(
        nodes=torch.from_numpy(node_rows[labels]),
        parent=torch.from_numpy(parents),
        edges=torch.zeros((len(labels), 0), dtype=torch.long) if edges is None else torch.from_numpy(edges),
        tree_start=starts(torch.tensor([len(tree.label) for tree in trees])),
        member=torch.tensor([tree for itemset in members for tree in itemset]),
        set_start=starts(torch.tensor([len(itemset) for itemset in members])),
        labels=torch.tensor(classes),
        support=torch.tensor(supports),
        **kwargs,
    )
