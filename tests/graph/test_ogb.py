import gzip
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_distill.core.errors import RunError, UsageError
from lit_distill.graph.data.ogb import ATOM_VALUES, BOND_VALUES, OGBDataModule
from lit_distill.graph.methods.mirage import Mirage

CARBON, OXYGEN, SODIUM = [5, 0, 4, 5, 3, 0, 2, 0, 0], [7, 0, 2, 5, 1, 0, 2, 0, 0], [10, 0, 0, 6, 0, 0, 5, 0, 0]
RING = [*CARBON[:-1], 1]  # differs from CARBON in the last feature alone
SINGLE, DOUBLE = [0, 0, 0], [1, 0, 1]
MOLECULES = [  # atoms, bonds, features of the bonds, class
    ([CARBON, OXYGEN], [(0, 1)], [SINGLE], 1),
    ([CARBON], [], [], 0),
    ([SODIUM, CARBON, OXYGEN], [(2, 1)], [DOUBLE], 0),
    ([RING, RING, RING], [(0, 1), (1, 2), (2, 0)], [SINGLE] * 3, 1),
    ([CARBON, OXYGEN], [(0, 1)], [SINGLE], 1),
    ([SODIUM], [], [], 0),
]
SPLIT = {"train": [5, 0, 1, 4], "valid": [2], "test": [3]}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        file.writelines(",".join(map(str, np.atleast_1d(row).tolist())) + "\n" for row in rows)


def write_ogb(folder, molecules=MOLECULES, split=SPLIT):
    tables = {
        "graph-label": [label for *_, label in molecules],
        "num-node-list": [len(atoms) for atoms, *_ in molecules],
        "num-edge-list": [len(bonds) for _, bonds, *_ in molecules],
        "node-feat": [row for atoms, *_ in molecules for row in atoms],
        "edge": [ends for _, bonds, *_ in molecules for ends in bonds],
        "edge-feat": [row for _, _, kinds, _ in molecules for row in kinds],
    }
    for name, rows in tables.items():
        write(folder / f"raw/{name}.csv.gz", rows)
    for part, numbers in split.items():
        write(folder / f"split/scaffold/{part}.csv.gz", numbers)


@pytest.fixture
def root(tmp_path):
    write_ogb(tmp_path / "bace")
    return tmp_path


def test_atoms_are_nodes_and_bonds_edges_in_both_directions(root):
    graphs = OGBDataModule(root, "ogbg-molbace").read().graphs
    assert graphs.labels.tolist() == [1, 0, 0, 1, 1, 0]
    assert graphs.node_start.tolist() == [0, 2, 3, 6, 9, 11, 12]
    assert graphs.edge_start.tolist() == [0, 2, 2, 4, 10, 12, 12]
    assert graphs.nodes.tolist() == [row for atoms, *_ in MOLECULES for row in atoms]
    assert graphs.edge_index[:, :6].T.tolist() == [[0, 1], [1, 0], [5, 4], [4, 5], [6, 7], [7, 6]]
    assert graphs.edges[:6].tolist() == [SINGLE] * 2 + [DOUBLE] * 2 + [SINGLE] * 2
    assert graphs.roots.all()


def test_the_split_is_that_of_the_set(root):
    data = OGBDataModule(root, "ogbg-molbace", val_share=0.5, test_share=0.4, split_seed=3)
    assert data.part("train").labels.tolist() == [0, 1, 0, 1]
    assert data.part("train").nodes[0].tolist() == SODIUM
    assert data.part("val").nodes.tolist() == MOLECULES[2][0]
    assert data.part("test").nodes.tolist() == MOLECULES[3][0]
    assert (data.classes, data.num_classes) == (("0", "1"), 2)


@pytest.mark.parametrize("name", ["hiv", "ogbg_molhiv", "ogbg_molhiv_pyg"])
def test_the_folder_is_found_under_the_names_it_has_been_given(tmp_path, name):
    write_ogb(tmp_path / name)
    assert OGBDataModule(tmp_path, "ogbg-molhiv").part_size("train") == 4


def test_numbers_of_values_are_those_of_the_benchmark_for_every_set(root):
    data = OGBDataModule(root, "ogbg-molbace")
    data.setup()
    assert data.node_values == (119, 5, 12, 12, 10, 6, 6, 2, 2)
    assert data.edge_values == (5, 6, 2)


def test_they_are_those_of_the_package():
    package = importlib.util.find_spec("ogb")
    if package is None:
        pytest.skip("ogb is not installed")
    file = Path(package.submodule_search_locations[0]) / "utils/features.py"  # the package itself looks for updates
    spec = importlib.util.spec_from_file_location("features", file)
    features = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(features)
    assert list(ATOM_VALUES.values()) == features.get_atom_feature_dims()
    assert list(BOND_VALUES.values()) == features.get_bond_feature_dims()


def test_trees_are_equal_where_all_features_are(tmp_path):
    def pair(*atoms, bond=SINGLE, label=0):
        return list(atoms), [(0, 1)], [bond], label

    same = [pair(CARBON, OXYGEN), pair(OXYGEN, CARBON)]
    other = [pair(RING, OXYGEN, label=1), pair(CARBON, OXYGEN, bond=DOUBLE, label=1)]
    write_ogb(tmp_path / "bace", [*same, *other, *same], {"train": [0, 1, 2, 3], "valid": [4], "test": [5]})
    data = Mirage(OGBDataModule(tmp_path, "ogbg-molbace"), depth=1, threshold=[2, 1], max_size=1)
    data.setup()
    labels, support = data.distilled.labels, data.distilled.support
    assert support[labels == 0].tolist() == [2, 2]  # carbon beside oxygen and the reverse, in both
    assert support[labels == 1].tolist() == [1] * 4  # nothing in common
    assert data.distilled.nodes.shape[1] == 9


def test_a_set_without_any_bond_is_read(tmp_path):
    write_ogb(tmp_path / "bbbp", [([CARBON], [], [], 0), ([SODIUM], [], [], 1)] * 3)
    data = OGBDataModule(tmp_path, "ogbg-molbbbp")
    assert data.part("train").edge_index.shape == (2, 0)
    assert data.part("train").edges.shape == (0, 3)
    batch = data.part("train").batch(torch.arange(4))
    assert batch.graph.tolist() == [0, 1, 2, 3]


# ---- mistakes ------------------------------------------------------------------------------------------------------


def test_nothing_is_downloaded_and_the_address_is_named(tmp_path):
    data = OGBDataModule(tmp_path, "ogbg-molhiv")
    data.prepare_data()
    with pytest.raises(UsageError, match=r"holds no hiv/raw/edge\.csv\.gz; unpack http://snap\S+/hiv\.zip there"):
        data.setup()
    assert list(tmp_path.iterdir()) == []


def test_sets_with_several_targets_are_refused(root):
    with pytest.raises(UsageError, match=r"data\.name is 'ogbg-moltox21'; give one of ogbg-molbace, .*several targets"):
        OGBDataModule(root, "ogbg-moltox21")
    write(root / "bace/raw/graph-label.csv.gz", [(0, 1)] * 6)
    with pytest.raises(UsageError, match="have 2 targets; give a set with one"):
        OGBDataModule(root, "ogbg-molbace").setup()


@pytest.mark.parametrize(
    ("table", "rows", "says"),
    [
        ("raw/num-node-list", [2, 1, 3, 3, 2], r"num-node-list\.csv\.gz has 5 rows of 1 numbers, not 6 of 1; get"),
        ("raw/node-feat", [CARBON] * 11, "has 11 rows of 9 numbers, not 12 of 9"),
        ("raw/edge-feat", [(0, 0)] * 6, "has 6 rows of 2 numbers, not 6 of 3"),
        ("raw/edge", [(0, 2)] * 6, "an edge to a node that is not in its graph"),
        ("raw/edge", [(0, 0.5)] * 6, "not only whole numbers"),
        ("raw/graph-label", ["x"] * 6, r"graph-label\.csv\.gz cannot be read \(could not convert"),
        ("split/scaffold/test", [6], "names graphs that .* does not have"),
    ],
)
def test_tables_that_do_not_fit_are_named(root, table, rows, says):
    write(root / f"bace/{table}.csv.gz", rows)
    with pytest.raises(RunError, match=says):
        OGBDataModule(root, "ogbg-molbace").setup()


def test_values_that_the_benchmark_does_not_have_are_refused(root):
    write(root / "bace/raw/node-feat.csv.gz", [CARBON] * 11 + [[119, *CARBON[1:]]])
    with pytest.raises(UsageError, match="node feature 0 has the value 119; 0 to 118 is expected"):
        OGBDataModule(root, "ogbg-molbace").setup()


def test_files_that_are_missing_or_cut_off_are_named(root):
    file = root / "bace/raw/node-feat.csv.gz"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(RunError, match=r"node-feat\.csv\.gz cannot be read .*; get it again"):
        OGBDataModule(root, "ogbg-molbace").setup()
    file.unlink()
    with pytest.raises(UsageError, match=r"node-feat\.csv\.gz is missing; unpack the archive again"):
        OGBDataModule(root, "ogbg-molbace").setup()
