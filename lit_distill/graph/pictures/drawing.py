"""The picture: a row of cards for each class, a tree or a molecule on each."""

from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree as Xml

import numpy as np
from jaxtyping import Int
from torch import Tensor

from lit_distill.graph.distilled import DistilledTrees
from lit_distill.graph.graphs import GraphSet
from lit_distill.graph.pictures.canvas import WIDTH, Canvas
from lit_distill.graph.pictures.examples import Example, find_examples
from lit_distill.graph.pictures.supports import MOST_TREES, top_trees, tree_supports
from lit_distill.graph.pictures.words import OTHER_LINES, PALETTE, TIMES, Node, Words, percent

MOST_LEAVES = 12  # of a tree with more, equal branches are drawn once
GAP, MARGIN = 8.0, 16.0
CARD, EXAMPLE = 130.0, 232.0  # widths
NODE, STEP = 11.0, 23.0  # radius of a node, and room for a leaf
LEVEL = 44.0  # from a level of a tree to the next
BAR = 21.0  # from a bar to the next


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
    words = Words(distilled, node_names, edge_names)
    supports = tree_supports(distilled)
    tops = top_trees(distilled, most)
    examples = find_examples(distilled, words, graphs, tops) if graphs is not None and words.are_elements else {}
    canvas = Canvas()
    y = MARGIN
    for number, (name, trees) in enumerate(zip(distilled.classes, tops, strict=True)):
        y = _draw_class(canvas, y, words, number, name, trees, supports, examples.get(number))
    y = _draw_legend(canvas, y, words, with_rings=bool(examples))
    return canvas.finished(y)


def _draw_class(
    canvas: Canvas,
    y: float,
    words: Words,
    number: int,
    name: str,
    trees: list[int],
    supports: Int[Tensor, "k t"],
    example: Example | None,
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
    folds = [node is not None and node.leaves > MOST_LEAVES for node in drawn]
    drawn = [node.folded() if node is not None and fold else node for node, fold in zip(drawn, folds, strict=True)]
    height = 2 * NODE + 24 + LEVEL * max([node.depth for node in drawn if node is not None], default=1)
    below = 16.0 + BAR * len(_bars(words, number))
    cards: list[tuple[float, Any]] = []
    for tree, node, fold in zip(trees, drawn, folds, strict=True):
        step = STEP * (1.6 if fold else 1)  # beside a folded branch stands how often it is there
        room = step * node.leaves + 14 if node is not None else CARD
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
        if isinstance(content, Example):
            _draw_example(canvas, x, y, width, height, words, number, content, rings)
        else:
            tree, node, step = content
            if node is None:
                canvas.text(x + width / 2, y + height / 2, words.text(tree), "muted", text_anchor="middle")
            else:
                step = min(step, (width - 14) / node.leaves)
                left, top = x + (width - step * node.leaves) / 2, y + (height - LEVEL * node.depth) / 2
                _draw_tree(canvas, node, left, top, step, words, rings.get(tree))
            _draw_bars(canvas, x, y + height, width, words, number, tree, supports)
        x += width + GAP
    return y + height + below + 26


def _draw_tree(
    canvas: Canvas, root: Node, left: float, top: float, step: float, words: Words, ring: str | None
) -> None:
    """Draws a tree: edges first, so that they end behind the nodes."""
    nodes: list[tuple[Node, float, float]] = []
    edges: list[tuple[tuple[float, float], tuple[float, float], str]] = []

    def place(node: Node, left: float, y: float) -> tuple[float, float]:
        ends = []
        for child in node.children:
            ends.append((place(child, left, y + LEVEL), child.edge))
            left += step * child.leaves
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


def _bars(words: Words, number: int) -> list[int]:
    """Classes that get a bar: all if they are few, else the own one."""
    classes = range(len(words.distilled.classes))
    return list(classes) if len(classes) <= 4 else [number]


def _draw_bars(
    canvas: Canvas,
    x: float,
    y: float,
    width: float,
    words: Words,
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
            value = "\N{EN DASH}" if least is None or is_left_out else f"< {percent(least[other], counts[other])}"
        else:
            value = f"{bound}{percent(support, counts[other])}"
            bar = "own" if other == number else "rest"
            canvas.rect(x + 10, line + 4, (width - 20) * support / counts[other], 4.0, bar)
        canvas.text(x + width - 10, line, value, kind, text_anchor="end", style=f"font-size:10.5px;{weight}")


def _draw_example(
    canvas: Canvas,
    x: float,
    y: float,
    width: float,
    height: float,
    words: Words,
    number: int,
    example: Example,
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


def _draw_legend(canvas: Canvas, y: float, words: Words, *, with_rings: bool) -> float:
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
