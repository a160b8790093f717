"""What the labels of a distilled set read, and the colors and lines that stand for them."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Int
from torch import Tensor

from lit_distill.graph.distilled import DistilledTrees
from lit_distill.graph.pictures.supports import MOST_TREES, top_trees, tree_supports

LARGEST_DRAWN = 2_000  # nodes
# The usual colors of atoms (Corey, Pauling, Koltun), dark enough for white letters or light enough for black ones.
ELEMENTS = {
    "H": "#f2f2f2",
    "B": "#ffb5b5",
    "C": "#5b6168",
    "N": "#2f50d8",
    "O": "#d81e1e",
    "F": "#7ac943",
    "Si": "#d8b88f",
    "P": "#f08a00",
    "S": "#f2d21b",
    "Cl": "#1fa83c",
    "Br": "#98322b",
    "I": "#7a1fa2",
}
OTHER = "other"
# Those of the dashboard (Okabe, Ito, 2008).
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b6168")
BOND_SIGNS = {"single": "", "double": "=", "triple": "#", "aromatic": ":"}  # as in SMILES
# Lines of an edge: how far each is from the middle, and its dashes.
BOND_LINES = {
    "single": ((0.0, ""),),
    "double": ((-2.2, ""), (2.2, "")),
    "triple": ((-3.6, ""), (0.0, ""), (3.6, "")),
    "aromatic": ((-2.2, ""), (2.2, "3 2.5")),
}
OTHER_LINES = (((0.0, ""),), ((0.0, "6 3"),), ((0.0, "2 2.5"),), ((0.0, "8 2.5 2 2.5"),))
TIMES = "\N{MULTIPLICATION SIGN}"


class Node(NamedTuple):
    """A node of a tree, with what hangs below it.

    Attributes:
        label: What its features read.
        edge: What the edge to its parent reads.
        children: Sorted, so that equal trees are equal.
        times: How many equal branches it stands for.
    """

    label: str
    edge: str
    children: tuple["Node", ...] = ()
    times: int = 1

    @property
    def leaves(self) -> int:
        """How many leaves the tree has, each branch counted once."""
        return sum(child.leaves for child in self.children) or 1

    @property
    def depth(self) -> int:
        """Levels below the root."""
        return 1 + max(child.depth for child in self.children) if self.children else 0

    def folded(self) -> "Node":
        """Puts one branch for each set of equal ones."""
        counts = Counter(child.folded() for child in self.children)
        return self._replace(children=tuple(child._replace(times=times) for child, times in counts.items()))

    def text(self) -> str:
        """Writes the tree in a line, bonds as in SMILES."""
        sign = BOND_SIGNS.get(self.edge, f"[{self.edge}]" if self.edge else "")
        branches = ", ".join(child.text() for child in self.children)
        times = f" {TIMES}{self.times}" if self.times > 1 else ""
        return sign + self.label + (f"({branches})" if branches else "") + times


class Words:
    """How the labels of a distilled set read, and what color and lines they have."""

    def __init__(self, distilled: DistilledTrees, node_names: Sequence[str], edge_names: Sequence[str]) -> None:
        self.distilled = distilled
        self.node_names, self.edge_names = node_names, edge_names
        self.nodes = texts(distilled.nodes, node_names)
        self.edges = texts(distilled.edges, edge_names)
        self.are_elements = bool(node_names) and set(node_names) <= {*ELEMENTS, OTHER}
        known = list(node_names) or sorted(set(self.nodes), key=lambda text: (len(text), text))
        colors = {name: PALETTE[number % len(PALETTE)] for number, name in enumerate(known)}
        self.colors = colors | ELEMENTS | {OTHER: "#b83280"} if self.are_elements else colors
        inner = {text for text, parent in zip(self.edges, distilled.parent.tolist(), strict=True) if parent >= 0}
        kinds = list(edge_names) or sorted(inner, key=lambda text: (len(text), text))
        self.kinds = [kind for kind in kinds if kind in inner and kind]
        lines = {kind: OTHER_LINES[number % len(OTHER_LINES)] for number, kind in enumerate(kinds)}
        self.lines = lines | BOND_LINES if set(kinds) <= set(BOND_LINES) else lines

    def tree(self, tree: int) -> Node | None:
        """Writes a tree out; None if it is too large for a picture."""
        first, last = self.distilled.tree_start[tree : tree + 2].tolist()
        if last - first > LARGEST_DRAWN:
            return None
        children: list[list[Node]] = [[] for _ in range(last - first)]
        parents = self.distilled.parent[first:last].tolist()
        node = Node("", "")
        for place in reversed(range(last - first)):  # parents come before their children
            edge = self.edges[first + place] if place else ""
            node = Node(self.nodes[first + place], edge, tuple(sorted(children[place])))
            if place:
                children[parents[place]].append(node)
        return node

    def text(self, tree: int) -> str:
        """Writes a tree in a line: the root, its branches in parentheses, the number of equal ones behind."""
        node = self.tree(tree)
        if node is None:
            return f"tree of {int(self.distilled.tree_start.diff()[tree]):,} nodes"
        return node.folded().text()

    def support(self, number: int, support: int) -> str:
        """Reads a support: graphs of the class, and their share where its size is known."""
        least = "at least " if self.is_bound and support else ""
        counts = self.distilled.description.get("class_graphs")
        if counts is None:
            return f"{least}{support:,} graphs"
        return f"{least}{support:,} of {counts[number]:,} graphs, {percent(support, counts[number])}"

    @property
    def is_bound(self) -> bool:
        """Whether supports of trees are lower bounds."""
        description = self.distilled.description
        return description.get("kind") == "maximal" or bool(description.get("exclusive"))


def tree_rows(
    distilled: DistilledTrees, *, node_names: Sequence[str] = (), edge_names: Sequence[str] = (), most: int = MOST_TREES
) -> list[tuple[str, str, str]]:
    """Writes down what `draw_trees` draws: class, tree, support."""
    words = Words(distilled, node_names, edge_names)
    supports = tree_supports(distilled)
    return [
        (name, words.text(tree), words.support(number, int(supports[number, tree])))
        for number, (name, trees) in enumerate(zip(distilled.classes, top_trees(distilled, most), strict=True))
        for tree in trees
    ]


def texts(features: Int[Tensor, "n c"], names: Sequence[str]) -> list[str]:
    """Reads features: the name of each value where there is one feature and it has names, else the numbers."""
    if features.shape[1] == 1 and names:
        return [names[value] if value < len(names) else str(value) for value in features[:, 0].tolist()]
    return [",".join(map(str, row)) for row in features.tolist()]


def percent(part: int, whole: int) -> str:
    """Reads a share."""
    return f"{100 * part / whole:.0f} %"
