"""Pictures of distilled sets: what is drawn, how often, and that every number in them is that of an own count."""

import math
import sys
from xml.etree import ElementTree as Xml

import numpy as np
import pytest
import torch
from given import Given, distilled, trees_by_hand, written
from torch_geometric.nn.models import GIN

from lit_distill.graph.classifier import GraphClassifier
from lit_distill.graph.data import DistilledGraphs
from lit_distill.graph.data.molecules import BONDS, ELEMENTS, molecule_graphs
from lit_distill.graph.methods.mirage import Mirage
from lit_distill.graph.models import GraphNetwork
from lit_distill.graph.pictures import FILE, draw_trees, save_picture, tree_rows
from lit_distill.graph.pictures.examples import coordinates
from lit_distill.graph.pictures.supports import top_trees, tree_supports, trees_of_nodes
from lit_distill.graph.pictures.words import PALETTE

SVG = "{http://www.w3.org/2000/svg}"


def supports_by_hand(graphs, depth, classes=2):
    """Class -> tree -> number of its graphs that have it."""
    counts = [{} for _ in range(classes)]
    trees, owner = trees_by_hand(graphs, depth), graphs.graph().tolist()
    for graph in range(graphs.size):
        for tree in {tree for tree, own in zip(trees, owner, strict=True) if own == graph}:
            of_class = counts[int(graphs.labels[graph])]
            of_class[tree] = of_class.get(tree, 0) + 1
    return counts


def texts(svg):
    return [element.text for element in Xml.fromstring(svg).iter(f"{SVG}text")]


def rings(svg):
    return [e.get("stroke") for e in Xml.fromstring(svg).iter(f"{SVG}circle") if e.get("fill") == "none"]


def elements(svg, tag, kind):
    return [element for element in Xml.fromstring(svg).iter(SVG + tag) if element.get("class") == kind]


# Labels A, B, C. Class a: two edges A-B, a path A-A-B, a C alone. Class b: an edge A-B, a star of B, one around A.
HAND = [
    ([0, 1], [(0, 1)], None),
    ([0, 1], [(0, 1)], None),
    ([0, 0, 1], [(0, 1), (1, 2)], None),
    ([2], [], None),
    ([0, 1], [(0, 1)], None),
    ([1, 1, 1], [(0, 1), (0, 2)], None),
    ([0, 1, 1], [(0, 1), (0, 2)], None),
]


@pytest.fixture
def hand(make_set):
    return distilled(make_set(HAND, [0, 0, 0, 0, 1, 1, 1]), (2, 1))


def test_the_rows_are_what_is_counted_by_hand(hand):
    times = "\N{MULTIPLICATION SIGN}"
    assert tree_rows(hand, node_names=("A", "B", "C")) == [
        ("a", "B(A)", "3 of 4 graphs, 75 %"),
        ("a", "A(B)", "2 of 4 graphs, 50 %"),
        ("b", "B(A)", "2 of 3 graphs, 67 %"),
        ("b", "A(B)", "1 of 3 graphs, 33 %"),
        ("b", f"B(B {times}2)", "1 of 3 graphs, 33 %"),
        ("b", "B(B)", "1 of 3 graphs, 33 %"),
        ("b", f"A(B {times}2)", "1 of 3 graphs, 33 %"),
    ]
    assert [row[1] for row in tree_rows(hand, most=1)] == ["1(0)", "1(0)"]


def test_the_picture_names_every_class_and_draws_the_trees_with_their_support(hand):
    svg = draw_trees(hand, node_names=("A", "B", "C"))
    said = texts(svg)
    assert [text for text in said if text.startswith("class ")] == ["class a", "class b"]
    assert len(elements(svg, "rect", "card")) == 2 + 5
    assert said.count("75 %") == 2  # B(A) of class a, in its own card and in that of class b
    assert said.count("33 %") == 1 + 4  # A(B) of class b in a card of class a, and four cards of class b
    assert said.count("< 50 %") == 3  # what class a has too seldom
    card = 130 - 20  # a bar of 100 %
    own = sorted(float(bar.get("width")) for bar in elements(svg, "rect", "own"))
    assert own == pytest.approx(sorted(card * share for share in (3 / 4, 2 / 4, 2 / 3, *[1 / 3] * 4)), abs=0.06)
    rest = sorted(float(bar.get("width")) for bar in elements(svg, "rect", "rest"))
    assert rest == pytest.approx(sorted(card * share for share in (2 / 3, 1 / 3, 3 / 4, 2 / 4)), abs=0.06)
    letters = [text for text in said if text in ("A", "B", "C")]
    assert sorted(letters) == sorted("BA AB BA AB BBB BB ABB".replace(" ", ""))


@pytest.mark.parametrize("kind", ["all", "closed", "maximal"])
def test_supports_are_those_of_an_own_count(random_set, kind):
    graphs = random_set(count=40, nodes=6, labels=2, density=0.3, kinds=2)
    found = distilled(graphs, (3, 4), kind=kind)
    counts = supports_by_hand(graphs, 1)
    supports = tree_supports(found)
    for number, least in enumerate((3, 4)):
        for tree in range(len(found.tree_start) - 1):
            own, true = int(supports[number, tree]), counts[number].get(written(found, tree), 0)
            if kind == "maximal":
                assert own <= true
                assert bool(own) == (true >= least)
            else:
                assert own == (true if true >= least else 0)
    said = " ".join(row[2] for row in tree_rows(found))
    assert ("at least" in said) == (kind == "maximal")
    assert ("≥ " in draw_trees(found)) == (kind == "maximal")


def test_the_trees_drawn_are_the_most_frequent_ones(random_set):
    graphs = random_set(count=40, nodes=6, labels=2, density=0.3)
    found = distilled(graphs, (2, 2))
    for number, top in enumerate(top_trees(found, 3)):
        largest = sorted(supports_by_hand(graphs, 1)[number].values(), reverse=True)[:3]
        assert [int(tree_supports(found)[number, tree]) for tree in top] == largest


@pytest.mark.parametrize(("columns", "kinds", "depth"), [(1, None, 1), (1, 2, 2), (2, 2, 1)])
def test_the_trees_of_real_nodes_are_found(random_set, make_set, columns, kinds, depth):
    def with_columns(graphs):
        nodes = torch.stack([graphs.nodes[:, 0], graphs.nodes[:, 0] * 3 % 2], 1)[:, :columns]
        return type(graphs)(**{**vars(graphs), "nodes": nodes})

    graphs = with_columns(random_set(count=30, nodes=4, labels=2, kinds=kinds, density=0.25))
    others = with_columns(random_set(count=10, nodes=4, labels=3, kinds=kinds, density=0.25, seed=1))
    found = distilled(graphs, (2, 2), depth=depth)
    place = {written(found, tree): tree for tree in range(len(found.tree_start) - 1)}
    expected = [place.get(tree, -1) for tree in trees_by_hand(others, depth)]
    assert -1 in expected
    assert max(expected) > 0
    assert trees_of_nodes(found, others).tolist() == expected


def test_a_set_without_sizes_of_classes_shows_numbers_of_graphs(hand):
    del hand.description["class_graphs"]
    assert tree_rows(hand)[0] == ("a", "1(0)", "3 graphs")
    svg = draw_trees(hand)
    assert "%" not in " ".join(texts(svg))
    assert elements(svg, "rect", "own") == []


def test_what_is_left_out_as_shared_is_not_called_rare(hand, make_set):
    shared = distilled(make_set(HAND, [0, 0, 0, 0, 1, 1, 1]), (1, 1), exclusive=True)
    assert "<" not in " ".join(texts(draw_trees(shared)))


@pytest.mark.parametrize(("kind", "lines"), [("single", 1), ("double", 2), ("triple", 3), ("aromatic", 2)])
def test_kinds_of_bonds_are_kinds_of_lines(make_set, kind, lines):
    graphs = make_set([([0, 2], [(0, 1)], [BONDS.index(kind)])] * 4, [0, 0, 1, 1])
    svg = draw_trees(distilled(graphs, (1, 1)), node_names=ELEMENTS, edge_names=BONDS)
    drawn = elements(svg, "line", "edge")
    assert len(drawn) == (4 + 1) * lines  # two trees of two classes, and the legend
    assert sum("stroke-dasharray" in line.attrib for line in drawn) == (5 if kind == "aromatic" else 0)
    assert kind in texts(svg)


def test_kinds_of_edges_without_names_differ_and_are_explained(make_set):
    graphs = make_set([([0, 1, 1], [(0, 1), (0, 2)], [0, 1])] * 4, [0, 0, 1, 1])
    svg = draw_trees(distilled(graphs, (1, 1)))
    legend = [line.get("stroke-dasharray") for line in elements(svg, "line", "edge")][-2:]
    assert legend[0] is None
    assert legend[1]
    assert tree_rows(distilled(graphs, (1, 1)))[0][1] == "0([0]1, [1]1)"


@pytest.mark.parametrize(("leaves", "circles"), [(12, 13), (13, 2)])
def test_equal_branches_of_large_trees_are_drawn_once(make_set, leaves, circles):
    star = ([0] + [1] * leaves, [(0, leaf) for leaf in range(1, leaves + 1)], None)
    found = distilled(make_set([star] * 4, [0, 0, 1, 1]), (1, 1), kind="maximal")
    svg = draw_trees(found)
    assert len(list(Xml.fromstring(svg).iter(f"{SVG}circle"))) == 2 * (circles + 2)  # of both classes, with 1(0)
    assert (f"\N{MULTIPLICATION SIGN}{leaves}" in texts(svg)) == (circles == 2)


def test_a_tree_too_large_to_draw_is_told_by_its_size(make_set):
    star = ([0] * 60, [(0, leaf) for leaf in range(1, 60)], None)
    found = distilled(make_set([star] * 4, [0, 0, 1, 1]), (1, 1), depth=3, kind="maximal")
    # The center's tree has 1 + 59 (1 + 1 (1 + 58 + ...)): its leaves see the center, which sees 59 again.
    size = 1 + 59 + 59 + 59 * 59
    assert f"tree of {size:,} nodes" in texts(draw_trees(found))


def test_names_are_text_and_nothing_else(hand):
    from dataclasses import replace

    svg = draw_trees(replace(hand, classes=("<script>alert(1)</script>", '"&b')))
    assert "<script" not in svg
    assert "class <script>alert(1)</script>" in texts(svg)


def test_the_picture_is_whole_in_light_and_dark(hand):
    svg = draw_trees(hand)
    root = Xml.fromstring(svg)
    page = elements(svg, "rect", "page")[0]
    assert root.get("viewBox") == f"0 0 {page.get('width')} {page.get('height')}"
    assert "prefers-color-scheme:dark" in root.find(f"{SVG}style").text
    width, height = (float(root.get(side)) for side in ("width", "height"))
    for card in elements(svg, "rect", "card"):
        x, y, w, h = (float(card.get(side)) for side in ("x", "y", "width", "height"))
        assert x >= 0
        assert x + w <= width
        assert y + h <= height


# ---- molecules -------------------------------------------------------------------------------------------------------

SMILES, LABELS = ["CCO", "CCCO", "CCO", "CO", "C=O", "CC=O", "CCC=O"], [0, 0, 0, 0, 1, 1, 1]


def molecules(smiles, labels, **kwargs):
    chem = pytest.importorskip("rdkit.Chem", reason="RDKit is not installed (extra 'molecules')")
    return molecule_graphs([chem.MolFromSmiles(text) for text in smiles], torch.tensor(labels), **kwargs)


def test_an_example_has_the_roots_of_an_itemset_ringed():
    graphs = molecules(SMILES, LABELS)
    found = distilled(graphs, (3, 3), classes=("alcohol", "aldehyde"))
    # Three alcohols have C(C), C(C, O) and O(C), which is one itemset, and CO has O(C) alone; all aldehydes have O(=C).
    svg = draw_trees(found, node_names=ELEMENTS, edge_names=BONDS, graphs=graphs)
    ringed = rings(svg)
    assert sorted(ringed) == sorted(
        [*PALETTE[:3] * 2, PALETTE[0], PALETTE[0]]
    )  # the trees' roots, and atoms of CCO, C=O
    said = texts(svg)
    assert "the 3 ringed trees, together" in said
    assert "the ringed tree," in said
    assert said.count("in 3 of 4 graphs, 75 %") == said.count("in 3 of 3 graphs, 100 %") == 1
    without = draw_trees(found, node_names=ELEMENTS, edge_names=BONDS)
    atoms = {name: texts(svg).count(name) - texts(without).count(name) for name in ("C", "O", "N")}
    assert atoms == {"C": 2 + 1, "O": 1 + 1, "N": 0}  # CCO and C=O, the smallest that have all
    assert rings(without) == []


def test_without_rdkit_trees_are_drawn_and_no_example(monkeypatch):
    graphs = molecules(SMILES, LABELS)
    found = distilled(graphs, (3, 3))
    monkeypatch.setitem(sys.modules, "rdkit", None)
    svg = draw_trees(found, node_names=ELEMENTS, edge_names=BONDS, graphs=graphs)
    assert rings(svg) == []
    assert len(elements(svg, "rect", "card")) == 3 + 1


def test_bonds_without_a_kind_are_drawn_single():
    graphs = molecules(SMILES, LABELS, bonds=False)
    found = distilled(graphs, (3, 3))
    svg = draw_trees(found, node_names=ELEMENTS, edge_names=BONDS, graphs=graphs)
    assert not any("stroke-dasharray" in line.attrib for line in elements(svg, "line", "edge"))
    assert "in 3 of 4 graphs, 75 %" in texts(svg)


def test_letters_that_are_no_elements_get_no_example(make_set):
    graphs = make_set(HAND, [0, 0, 0, 0, 1, 1, 1])
    assert rings(draw_trees(distilled(graphs, (2, 1)), node_names=("C", "Q", "X"), graphs=graphs)) == []


def test_a_ring_of_six_is_a_regular_hexagon():
    pytest.importorskip("rdkit", reason="RDKit is not installed (extra 'molecules')")
    places = coordinates(["C"] * 6, [(i, (i + 1) % 6) for i in range(6)])
    from_first = np.linalg.norm(places - places[0], axis=1) / np.linalg.norm(places[1] - places[0])
    assert from_first == pytest.approx([0, 1, math.sqrt(3), 2, math.sqrt(3), 1], abs=1e-3)
    assert coordinates(["other", "C"], [(0, 1)]).shape == (2, 2)


# ---- in a run --------------------------------------------------------------------------------------------------------


@pytest.fixture
def given(random_set):
    return lambda: Given(random_set(count=60, nodes=6, labels=2, density=0.3))


def test_a_run_keeps_the_picture_beside_the_set_and_tells_the_dashboard(given, trainer, tmp_path):
    def fit(data, folder):
        trainer(default_root_dir=folder).fit(GraphClassifier(GraphNetwork(GIN(8, 8, 1), [2], 2)), datamodule=data)
        return (folder / FILE).read_text(), data.panels["picture"]

    mirage = Mirage(given(), depth=1, threshold=0.4)
    svg, panel = fit(mirage, tmp_path / "a")
    assert (tmp_path / "a" / "distilled").is_dir()
    assert panel["file"] == FILE
    assert panel["rows"] == tree_rows(mirage.distilled)
    assert all(" graphs, " in row[2] for row in panel["rows"])
    again, loaded_panel = fit(DistilledGraphs(tmp_path / "a" / "distilled", given()), tmp_path / "b")
    assert again == svg
    assert loaded_panel == panel


def test_without_a_run_no_picture_is_kept(given):
    data = Mirage(given(), depth=1, threshold=0.4)
    data.setup()
    assert data.panels == {}


def test_names_reach_the_picture(given, tmp_path):
    data = Mirage(given(), depth=1, threshold=0.4)
    data.source.given = data.source.given._replace(node_names=("left", "right"))
    data.setup()
    assert data.node_names == ("left", "right")
    panel = save_picture(tmp_path, data.distilled, data.source)
    assert panel["rows"][0][1].startswith(("left", "right"))
    assert "left" in texts((tmp_path / FILE).read_text())
