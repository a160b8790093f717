"""Molecules of the Open Graph Benchmark, from the folders that its archives unpack to."""

import gzip
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_distill.core.errors import RunError, UsageError
from lit_distill.graph.data.base import GraphDataModule, GraphSource
from lit_distill.graph.graphs import GraphSet, starts

NAMES = ("ogbg-molbace", "ogbg-molbbbp", "ogbg-molhiv")
URL = "http://snap.stanford.edu/ogb/data/graphproppred/csv_mol_download"
# Columns and their numbers of values, as `ogb.utils.features` writes them; the last value of most is "anything else".
ATOM_VALUES = {
    "atomic number": 119,
    "chirality": 5,
    "degree": 12,
    "formal charge": 12,
    "hydrogen atoms": 10,
    "radical electrons": 6,
    "hybridization": 6,
    "aromatic": 2,
    "in a ring": 2,
}
BOND_VALUES = {"type": 5, "stereo": 6, "conjugated": 2}


class OGBDataModule(GraphDataModule):
    """The sets of the Open Graph Benchmark with molecules of two classes: molbace, molbbbp, molhiv.

    The set's own split is used: molecules of one scaffold are in one part. Nodes are atoms with nine features, edges
    bonds with three. Each feature is a column of its own, for networks as for computation trees: two atoms have equal
    trees if all nine columns agree, and so it is in the public code of Mirage, too. `node_values` and `edge_values` are
    those of the benchmark, the same for every set.

    The archive's folder is looked for under the names that it unpacks to and that the package ogb gives it: for
    ogbg-molbace `root/bace`, `root/ogbg_molbace`, `root/ogbg_molbace_pyg`. In it are `raw/*.csv.gz` and
    `split/scaffold/*.csv.gz`. They are read here: the package asks on the terminal, reads pickles, looks for updates
    of itself when it is imported, and makes an object of each graph.

    Args:
        root: Folder of the data.
        name: One of "ogbg-molbace", "ogbg-molbbbp", "ogbg-molhiv".
        kwargs: See `GraphDataModule`; `val_share` and `test_share` have no effect.

    Reference: Hu, Fey, Zitnik, Dong, Ren, Liu, Catasta, Leskovec, Open Graph Benchmark: Datasets for Machine Learning
    on Graphs, 2020, arXiv 2005.00687.
    """

    def __init__(self, root: str | Path, name: str, **kwargs: Any) -> None:
        super().__init__(root=root, **kwargs)
        if name not in NAMES:
            raise UsageError(
                f"data.name is {name!r}; give one of {', '.join(NAMES)}: the others of the collection have several "
                "targets, or none that is a class"
            )
        self._set = name

    def read(self) -> GraphSource:
        """Reads the tables of the set."""
        folder = self._folder()
        raw, scaffold = folder / "raw", folder / "split/scaffold"
        labels = _table(raw / "graph-label.csv.gz")
        if labels.shape[1] != 1:
            raise UsageError(
                f"data.root: the graphs in {folder} have {labels.shape[1]} targets; give a set with one, such as "
                f"{NAMES[0]}"
            )
        atoms, bonds = (_table(raw / f"num-{kind}-list.csv.gz", 1, rows=len(labels))[:, 0] for kind in ("node", "edge"))
        ends = _table(raw / "edge.csv.gz", 2, rows=int(bonds.sum()))
        if ((ends < 0) | (ends >= atoms.repeat_interleave(bonds)[:, None])).any():
            raise RunError(f"data.root: {raw}/edge.csv.gz has an edge to a node that is not in its graph; get it again")
        node_start = starts(atoms)
        ends += node_start[:-1].repeat_interleave(bonds)[:, None]
        nodes = _table(raw / "node-feat.csv.gz", len(ATOM_VALUES), rows=int(atoms.sum()))
        edges = _table(raw / "edge-feat.csv.gz", len(BOND_VALUES), rows=len(ends))
        graphs = GraphSet(
            labels=labels[:, 0],
            nodes=nodes,
            edge_index=torch.stack([ends, ends.flip(1)], dim=1).reshape(-1, 2).T.contiguous(),  # and the way back
            edges=edges.repeat_interleave(2, dim=0),
            node_start=node_start,
            edge_start=starts(2 * bonds),
            roots=torch.ones(len(nodes), dtype=torch.bool),
        )
        split = {
            part: _table(scaffold / f"{file}.csv.gz", 1)[:, 0]
            for part, file in (("train", "train"), ("val", "valid"), ("test", "test"))
        }
        numbers = torch.cat(list(split.values()))
        if len(numbers) and (numbers.min() < 0 or numbers.max() >= len(labels)):
            raise RunError(f"data.root: {scaffold} names graphs that {raw} does not have; get it again")
        return GraphSource(
            ("0", "1"),
            graphs,
            split,
            node_values=tuple(ATOM_VALUES.values()),
            edge_values=tuple(BOND_VALUES.values()),
        )

    def _folder(self) -> Path:
        assert self.root is not None
        archive, package = self._set.removeprefix("ogbg-mol"), self._set.replace("-", "_")
        folders = [self.root / name for name in (archive, package, f"{package}_pyg")]
        found = next((folder for folder in folders if (folder / "raw/edge.csv.gz").is_file()), None)
        if found is None:
            raise UsageError(
                f"data.root: {self.root} holds no {archive}/raw/edge.csv.gz; unpack {URL}/{archive}.zip there, or "
                "correct it"
            )
        return found


def _table(path: Path, columns: int | None = None, rows: int | None = None) -> Tensor:
    """Reads whole numbers, (rows, columns)."""
    try:
        with gzip.open(path) as file:
            empty = not file.read(1)  # no mistake: molecules of one atom have no edges
        table = np.empty((0, columns or 0)) if empty else np.loadtxt(path, delimiter=",", ndmin=2)
        whole = table.astype(np.int64)
        if (whole != table).any():
            raise ValueError("not only whole numbers")
    except FileNotFoundError as error:
        raise UsageError(f"data.root: {path} is missing; unpack the archive again") from error
    except (OSError, EOFError, ValueError, zlib.error) as error:
        reason = str(error).partition("\n")[0]
        raise RunError(f"data.root: {path} cannot be read ({reason}); get it again") from error
    expected = (len(whole) if rows is None else rows, whole.shape[1] if columns is None else columns)
    if whole.shape != expected:
        raise RunError(
            f"data.root: {path} has {len(whole)} rows of {whole.shape[1]} numbers, not {expected[0]} of {expected[1]}; "
            "get it again"
        )
    return torch.from_numpy(whole)
