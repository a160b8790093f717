"""Pictures of a distilled set: the most frequent computation trees of each class, and a molecule that has them.

SVG, in light and dark, that needs no other file. Where node labels are elements and RDKit is there (extra 'molecules'),
trees are drawn as atoms and bonds, and each class shows a training molecule with the roots of an itemset ringed.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree as Xml

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lit_distill.core.files import write_text
from lit_distill.graph.distilled import DistilledTrees
from lit_distill.graph.graphs import GraphSet, join
from lit_distill.graph.trees import computation_trees

FILE = "trees.svg"
MOST_TREES = 5  # fit beside the molecule
MOST_LEAVES = 12  # of a tree with more, equal branches are drawn once
LARGEST_DRAWN = 2_000  # nodes
SEARCHED = 1_000  # graphs of each class among which the example is sought

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

WIDTH, GAP, MARGIN = 960.0, 8.0, 16.0
CARD, EXAMPLE = 130.0, 232.0  # widths
NODE, STEP = 11.0, 23.0  # radius of a node, and room for a leaf
LEVEL = 44.0  # from a level of a tree to the next
BAR = 21.0  # from a bar to the next
STYLE = (
    "text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;font-size:11px}"
    ".page{fill:#fff}.card{fill:#f7f7f5;stroke:#e3e5e7}.ink{fill:#1b1f23}.muted{fill:#5a636c}.own{fill:#0072b2}"
    ".rest{fill:#9aa3ab}.track{fill:#e3e5e7}.edge{stroke:#7d868e;stroke-width:1.8}"
    "@media(prefers-color-scheme:dark){.page{fill:#1a1e21}.card{fill:#23292d;stroke:#2e3438}.ink{fill:#e7eaec}"
    ".muted{fill:#a2abb3}.own{fill:#56b4e9}.rest{fill:#7d868e}.track{fill:#2e3438}.edge{stroke:#a2abb3}}"
)


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


# ---------------------------------------------------------------------------------------------------------------------
# What is drawn


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


def tree_rows(
    distilled: DistilledTrees, *, node_names: Sequence[str] = (), edge_names: Sequence[str] = (), most: int = MOST_TREES
) -> list[tuple[str, str, str]]:
    """Writes down what `draw_trees` draws: class, tree, support."""
    words = _Words(distilled, node_names, edge_names)
    supports = tree_supports(distilled)
    return [
        (name, words.text(tree), words.support(number, int(supports[number, tree])))
        for number, (name, trees) in enumerate(zip(distilled.classes, top_trees(distilled, most), strict=True))
        for tree in trees
    ]


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


class _Words:
    """How the labels of a distilled set read, and what color and lines they have."""

    def __init__(self, distilled: DistilledTrees, node_names: Sequence[str], edge_names: Sequence[str]) -> None:
        self.distilled = distilled
        self.node_names, self.edge_names = node_names, edge_names
        self.nodes = _texts(distilled.nodes, node_names)
        self.edges = _texts(distilled.edges, edge_names)
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
        return _text(_folded(node))

    def support(self, number: int, support: int) -> str:
        """Reads a support: graphs of the class, and their share where its size is known."""
        least = "at least " if self.is_bound and support else ""
        counts = self.distilled.description.get("class_graphs")
        if counts is None:
            return f"{least}{support:,} graphs"
        return f"{least}{support:,} of {counts[number]:,} graphs, {_percent(support, counts[number])}"

    @property
    def is_bound(self) -> bool:
        """Whether supports of trees are lower bounds."""
        description = self.distilled.description
        return description.get("kind") == "maximal" or bool(description.get("exclusive"))


def _texts(features: Int[Tensor, "n c"], names: Sequence[str]) -> list[str]:
    if features.shape[1] == 1 and names:
        return [names[value] if value < len(names) else str(value) for value in features[:, 0].tolist()]
    return [",".join(map(str, row)) for row in features.tolist()]


def _text(node: Node) -> str:
    sign = BOND_SIGNS.get(node.edge, f"[{node.edge}]" if node.edge else "")
    branches = ", ".join(_text(child) for child in node.children)
    times = f" {TIMES}{node.times}" if node.times > 1 else ""
    return sign + node.label + (f"({branches})" if branches else "") + times


def _folded(node: Node) -> Node:
    """Puts one branch for each set of equal ones."""
    counts = Counter(_folded(child) for child in node.children)
    return node._replace(children=tuple(child._replace(times=times) for child, times in counts.items()))


def _leaves(node: Node) -> int:
    return sum(map(_leaves, node.children)) or 1


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %"


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def draw_trees(
    distilled: DistilledTrees,
    *,
    node_names: Sequence[str] = (),
    edge_names: Sequence[str] = (),
    graphs: GraphSet | None = None,
    most: int = MOST_TREES,
) -> str:
    """Draws the trees of each class with the largest support.

    Below a tree stands the share of each class's training graphs that have it. Where node labels are elements and
    there are real graphs, each class shows the smallest of those that has all trees of an itemset: the largest itemset
    of the trees drawn, with the largest support among equals. Molecules are drawn as the network sees them, without
    kinds of bonds where edges have no labels.

    Args:
        distilled: The set.
        node_names: How the values of the one node feature read, such as elements; numbers if empty.
        edge_names: The same of the edge feature. "single", "double", "triple" and "aromatic" are drawn as bonds.
        graphs: Real graphs, to take an example of each class from.
        most: Most trees of a class.

    Returns:
        The SVG.
    """
    words = _Words(distilled, node_names, edge_names)
    supports = tree_supports(distilled)
    tops = top_trees(distilled, most)
    examples = _examples(distilled, words, graphs, tops) if graphs is not None and words.are_elements else {}
    canvas = _Canvas()
    y = MARGIN
    for number, (name, trees) in enumerate(zip(distilled.classes, tops, strict=True)):
        y = _draw_class(canvas, y, words, number, name, trees, supports, examples.get(number))
    y = _draw_legend(canvas, y, words, with_rings=bool(examples))
    return canvas.finished(y)


class _Example(NamedTuple):
    """A molecule: nodes, edges, where they lie, and which trees hang from which nodes."""

    labels: list[str]
    edges: list[tuple[int, int, str]]
    places: Float[np.ndarray, "n 2"]
    trees: list[int]
    itemset: tuple[int, ...]
    support: int


class _Canvas:
    """An SVG that is being drawn."""

    def __init__(self) -> None:
        self.root = Xml.Element("svg", xmlns="http://www.w3.org/2000/svg")
        Xml.SubElement(self.root, "style").text = STYLE
        self.page = self.rect(0.0, 0.0, WIDTH, 0.0, "page", rx="10")

    def add(self, tag: str, **attributes: float | str) -> Xml.Element:
        written = {name.rstrip("_").replace("_", "-"): _number(value) for name, value in attributes.items()}
        return Xml.SubElement(self.root, tag, written)

    def rect(self, x: float, y: float, width: float, height: float, kind: str, rx: str = "2") -> Xml.Element:
        return self.add("rect", class_=kind, x=x, y=y, width=width, height=height, rx=rx)

    def text(self, x: float, y: float, text: str, kind: str = "ink", **attributes: float | str) -> Xml.Element:
        element = self.add("text", class_=kind, x=x, y=y, **attributes)
        element.text = text
        return element

    def node(self, x: float, y: float, label: str, color: str, radius: float, ring: str | None = None) -> None:
        if ring:
            self.add("circle", cx=x, cy=y, r=radius + 3.5, fill="none", stroke=ring, stroke_width="3")
        self.add("circle", cx=x, cy=y, r=radius, fill=color)
        size = min(radius * 1.05, 2.6 * radius / max(len(label), 1))
        if size >= 4:
            style = f"font-size:{size:.1f}px;fill:{_letters(color)}"
            self.text(x, y + 0.36 * size, label, text_anchor="middle", style=style)

    def edge(self, start: tuple[float, float], end: tuple[float, float], lines: Sequence[tuple[float, str]]) -> None:
        across = np.array([start[1] - end[1], end[0] - start[0]])
        across /= max(float(np.hypot(*across)), 1e-9)
        for offset, dashes in lines:
            dx, dy = (offset * across).tolist()
            ends = {"x1": start[0] + dx, "y1": start[1] + dy, "x2": end[0] + dx, "y2": end[1] + dy}
            self.add("line", class_="edge", **ends, **({"stroke_dasharray": dashes} if dashes else {}))

    def finished(self, height: float) -> str:
        self.page.set("height", f"{height:.0f}")
        self.root.set("viewBox", f"0 0 {WIDTH:.0f} {height:.0f}")
        self.root.set("width", f"{WIDTH:.0f}")
        self.root.set("height", f"{height:.0f}")
        return Xml.tostring(self.root, encoding="unicode") + "\n"


def _draw_class(
    canvas: _Canvas,
    y: float,
    words: _Words,
    number: int,
    name: str,
    trees: list[int],
    supports: Int[Tensor, "k t"],
    example: _Example | None,
) -> float:
    """Draws a class below y, and returns where the next begins."""
    distilled = words.distilled
    canvas.text(MARGIN, y + 14, f"class {name}", style="font-size:16px;font-weight:650")
    of_class = int((distilled.labels == number).sum())
    least = distilled.description.get("min_support")
    kept = int((supports[number] > 0).sum())
    about = f"{of_class:,} itemset{'s' * (of_class > 1)} of {kept:,} tree{'s' * (kept > 1)}"
    if least is not None:
        counts = distilled.description.get("class_graphs")
        of_all = f" of {counts[number]:,}" if counts is not None else ""
        about += f", each in {least[number]:,}{of_all} training graphs or more"
    if len(trees) < kept:
        about += f"; the {len(trees)} most frequent trees:"
    canvas.text(MARGIN, y + 32, about, "muted", style="font-size:12.5px")
    y += 44
    drawn = [words.tree(tree) for tree in trees]
    folds = [node is not None and _leaves(node) > MOST_LEAVES for node in drawn]
    drawn = [_folded(node) if node is not None and fold else node for node, fold in zip(drawn, folds, strict=True)]
    height = 2 * NODE + 24 + LEVEL * max([_depth(node) for node in drawn if node is not None], default=1)
    below = 16.0 + BAR * len(_bars(words, number))
    cards: list[tuple[float, Any]] = []
    for tree, node, fold in zip(trees, drawn, folds, strict=True):
        step = STEP * (1.6 if fold else 1)  # beside a folded branch stands how often it is there
        room = step * _leaves(node) + 14 if node is not None else CARD
        cards.append((min(max(CARD, room), WIDTH - 2 * MARGIN), (tree, node, step)))
    rings = {}
    if example is not None:
        height, below = max(height, 128.0), max(below, 60.0)
        rings = {tree: PALETTE[place % len(PALETTE)] for place, tree in enumerate(example.itemset)}
        cards.append((EXAMPLE, example))
    x = MARGIN
    for width, content in cards:
        if x > MARGIN and x + width > WIDTH - MARGIN + 0.5:
            x, y = MARGIN, y + height + below + GAP
        canvas.rect(x, y, width, height + below, "card", rx="8")
        if isinstance(content, _Example):
            _draw_example(canvas, x, y, width, height, words, number, content, rings)
        else:
            tree, node, step = content
            if node is None:
                canvas.text(x + width / 2, y + height / 2, words.text(tree), "muted", text_anchor="middle")
            else:
                step = min(step, (width - 14) / _leaves(node))
                left, top = x + (width - step * _leaves(node)) / 2, y + (height - LEVEL * _depth(node)) / 2
                _draw_tree(canvas, node, left, top, step, words, rings.get(tree))
            _draw_bars(canvas, x, y + height, width, words, number, tree, supports)
        x += width + GAP
    return y + height + below + 26


def _draw_tree(
    canvas: _Canvas, root: Node, left: float, top: float, step: float, words: _Words, ring: str | None
) -> None:
    """Draws a tree: edges first, so that they end behind the nodes."""
    nodes: list[tuple[Node, float, float]] = []
    edges: list[tuple[tuple[float, float], tuple[float, float], str]] = []

    def place(node: Node, left: float, y: float) -> tuple[float, float]:
        ends = []
        for child in node.children:
            ends.append((place(child, left, y + LEVEL), child.edge))
            left += step * _leaves(child)
        x = sum(end[0] for end, _ in ends) / len(ends) if ends else left + step / 2
        edges.extend(((x, y), end, edge) for end, edge in ends)
        nodes.append((node, x, y))
        return x, y

    place(root, left, top)
    for start, end, edge in edges:
        canvas.edge(start, end, words.lines.get(edge, OTHER_LINES[0]))
    radius = min(NODE, 0.48 * step)
    for node, x, y in nodes:
        color = words.colors.get(node.label, PALETTE[-1])
        canvas.node(x, y, node.label, color, radius, ring if node is root else None)
        if node.times > 1:
            canvas.text(x + radius + 1, y + 4, f"{TIMES}{node.times}", "muted", style="font-size:9.5px")


def _bars(words: _Words, number: int) -> list[int]:
    """Classes that get a bar: all if they are few, else the own one."""
    classes = range(len(words.distilled.classes))
    return list(classes) if len(classes) <= 4 else [number]


def _draw_bars(
    canvas: _Canvas,
    x: float,
    y: float,
    width: float,
    words: _Words,
    number: int,
    tree: int,
    supports: Int[Tensor, "k t"],
) -> None:
    """Draws the share of each class that has the tree, or the number of graphs where the class's size is unknown."""
    distilled = words.distilled
    counts = distilled.description.get("class_graphs")
    least = distilled.description.get("min_support")
    bound = "≥ " if words.is_bound else ""
    for row, other in enumerate(_bars(words, number)):
        line = y + 12 + BAR * row
        support = int(supports[other, tree])
        weight = "font-weight:650" if other == number else ""
        kind = "ink" if other == number else "muted"
        name = distilled.classes[other]
        short = name if len(name) <= 12 else name[:11] + "…"
        label = canvas.text(x + 10, line, short, kind, style=f"font-size:10.5px;{weight}")
        Xml.SubElement(label, "title").text = f"{name}: {words.support(other, support)}"
        canvas.rect(x + 10, line + 4, width - 20, 4.0, "track")
        if counts is None:
            value = f"{bound}{support:,}" if support else "\N{EN DASH}"
        elif not support:
            is_left_out = least is None or distilled.description.get("exclusive")
            value = "\N{EN DASH}" if least is None or is_left_out else f"< {_percent(least[other], counts[other])}"
        else:
            value = f"{bound}{_percent(support, counts[other])}"
            bar = "own" if other == number else "rest"
            canvas.rect(x + 10, line + 4, (width - 20) * support / counts[other], 4.0, bar)
        canvas.text(x + width - 10, line, value, kind, text_anchor="end", style=f"font-size:10.5px;{weight}")


def _draw_example(
    canvas: _Canvas,
    x: float,
    y: float,
    width: float,
    height: float,
    words: _Words,
    number: int,
    example: _Example,
    rings: dict[int, str],
) -> None:
    """Draws a molecule, the roots of the itemset's trees ringed."""
    places = example.places - example.places.mean(0)
    span = np.maximum(np.ptp(places, axis=0), 1e-6)
    scale = min((width - 52) / span[0], (height - 44) / span[1], 24.0)  # a bond is 1.5 long
    radius = min(9.5, 0.42 * 1.5 * scale)
    middle = (places.max(0) + places.min(0)) / 2
    spots = (places - middle) * scale * [1, -1] + [x + width / 2, y + height / 2]
    for first, second, kind in example.edges:
        canvas.edge(tuple(spots[first]), tuple(spots[second]), words.lines.get(kind, OTHER_LINES[0]))
    for (left, top), label, tree in zip(spots.tolist(), example.labels, example.trees, strict=True):
        canvas.node(left, top, label, words.colors.get(label, PALETTE[-1]), radius, rings.get(tree))
    trees = f"the {len(example.itemset)} ringed trees, together" if len(example.itemset) > 1 else "the ringed tree,"
    lines = ["The smallest training molecule with", trees, f"in {words.support(number, example.support)}"]
    for row, line in enumerate(lines):
        canvas.text(x + 12, y + height + 12 + 16 * row, line, "muted")


def _draw_legend(canvas: _Canvas, y: float, words: _Words, *, with_rings: bool) -> float:
    parts = "Roots on top; bars: the share of each class's training graphs that have the tree."
    if with_rings:
        parts += " Rings: the roots of an itemset, in the tree and in a molecule."
    canvas.text(MARGIN, y + 4, parts, "muted")
    if words.kinds:
        x = MARGIN
        for kind in words.kinds:
            canvas.edge((x, y + 22), (x + 28, y + 22), words.lines[kind])
            canvas.text(x + 34, y + 26, kind, "muted")
            x += 54 + 6.2 * len(kind)
        y += 22
    return y + 4 + MARGIN


def _number(value: float | str) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


def _depth(node: Node) -> int:
    return 1 + max(map(_depth, node.children)) if node.children else 0


def _letters(color: str) -> str:
    red, green, blue = (int(color[at : at + 2], 16) for at in (1, 3, 5))
    return "#000" if 0.299 * red + 0.587 * green + 0.114 * blue > 150 else "#fff"


# ---------------------------------------------------------------------------------------------------------------------
# Molecules


def _examples(distilled: DistilledTrees, words: _Words, graphs: GraphSet, tops: list[list[int]]) -> dict[int, _Example]:
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
    words: _Words, graphs: GraphSet, trees: Int[Tensor, " n"], graph: int, members: tuple[int, ...], support: int
) -> _Example:
    begin, end = graphs.node_start[graph : graph + 2].tolist()
    first, last = graphs.edge_start[graph : graph + 2].tolist()
    kinds = _texts(graphs.edges[first:last], words.edge_names)
    pairs = (graphs.edge_index[:, first:last] - begin).T.tolist()
    edges = [(u, v, kind) for (u, v), kind in zip(pairs, kinds, strict=True) if u < v]
    labels = _texts(graphs.nodes[begin:end], words.node_names)
    return _Example(
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


# ---------------------------------------------------------------------------------------------------------------------
# In a run


def save_picture(folder: str | Path, distilled: DistilledTrees, source: Any) -> dict[str, Any]:
    """Draws a distilled set into a run's folder.

    Args:
        folder: The run's folder.
        distilled: The set.
        source: The `GraphDataModule` of the real graphs, set up.

    Returns:
        The panel for the dashboard.
    """
    names = {"node_names": source.node_names, "edge_names": source.edge_names}
    write_text(Path(folder) / FILE, draw_trees(distilled, **names, graphs=source.part("train")))
    rows = tree_rows(distilled, **names)
    size = f"{distilled.size:,} itemsets of {len(distilled.tree_start) - 1:,} computation trees"
    return {
        "file": FILE,
        "title": f"{size}, {distilled.footprint()['bytes']:,} bytes",
        "summary": "Most frequent trees: " + "; ".join(f"{name}: {tree}, {support}" for name, tree, support in rows),
        "head": ["class", "tree", "support"],
        "rows": rows,
    }
