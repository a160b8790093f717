"""Graphs of nodes: digits that ship with scikit-learn, and the citation graphs of Planetoid."""

import pickle
from pathlib import Path
from typing import Any

import torch

from lit_distill.core.errors import RunError, UsageError
from lit_distill.graph.nodes.data import NodeDataModule, NodeGraph, NodeSource

PLANETOID = ("Cora", "Citeseer", "Pubmed")
_PARTS = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")


class DigitsNodesDataModule(NodeDataModule):
    """1,797 handwritten digits of 8x8 pixels as nodes, joined to their nearest neighbors. Ships with scikit-learn.

    A usual way to make a semi-supervised task of plain samples: features are the 64 pixels from 0 to 1, and two digits
    have an edge if one is among the other's `neighbors` nearest by Euclidean distance. So the edges follow from
    features, labels are not used, and digits to be hidden are among the neighbors until they are taken out.

    Args:
        neighbors: Number of nearest neighbors.
        kwargs: See `NodeDataModule`; `root` has no effect.
    """

    def __init__(self, neighbors: int = 10, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if neighbors < 1:
            raise UsageError(f"data.neighbors: {neighbors} is not a number of neighbors; give 1 or more")
        self.neighbors = neighbors

    def read(self) -> NodeSource:
        """Reads the digits that scikit-learn ships, and finds their neighbors."""
        from sklearn.datasets import load_digits  # here: it takes a second to import
        from sklearn.neighbors import kneighbors_graph

        digits = load_digits()
        nearest = kneighbors_graph(digits.data, self.neighbors)
        joined = nearest.maximum(nearest.T).tocoo()
        edges = torch.stack([torch.from_numpy(joined.row), torch.from_numpy(joined.col)]).long()
        features = torch.from_numpy(digits.data / 16).float()
        labels = torch.from_numpy(digits.target).long()
        return NodeSource(tuple(str(digit) for digit in range(10)), NodeGraph(features, edges), labels)


class PlanetoidDataModule(NodeDataModule):
    """Cora, Citeseer and Pubmed: papers as nodes, their words as features, citations as edges, topics as classes.

    The files `ind.NAME.x`, `.tx`, `.allx`, `.y`, `.ty`, `.ally`, `.graph`, `.test.index` are looked for in
    `root/NAME/raw`, `root/NAME` and `root`, and nothing is downloaded. They are pickles, which can run code as they
    are read: take them from where you trust them. The set's own split has 20 labelled nodes a class, 500 for validation
    and 1,000 for testing. Features are as they come, not normalized.

    Args:
        root: Folder of the data.
        name: "Cora", "Citeseer" or "Pubmed".
        kwargs: See `NodeDataModule`.

    Reference: Yang, Cohen, Salakhutdinov, Revisiting Semi-Supervised Learning with Graph Embeddings, 2016,
    arXiv 1603.08861.
    """

    def __init__(self, root: str | Path, name: str = "Cora", **kwargs: Any) -> None:
        super().__init__(root=root, **kwargs)
        if name not in PLANETOID:
            raise UsageError(f"data.name is '{name}'; give one of {', '.join(PLANETOID)}")
        self._set = name

    def read(self) -> NodeSource:
        """Reads the files, by torch-geometric's own reader."""
        from torch_geometric.io import read_planetoid_data  # here: it takes a second to import

        folder = self._folder()
        try:
            data = read_planetoid_data(str(folder), self._set)
        except (pickle.UnpicklingError, EOFError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise RunError(
                f"data.root: the files of {self._set} in {folder} cannot be read ({reason}); get them again"
            ) from error
        masks = {"train": data.train_mask, "val": data.val_mask, "test": data.test_mask}
        split = {name: mask.nonzero()[:, 0] for name, mask in masks.items()}
        classes = tuple(str(number) for number in range(int(data.y.max()) + 1))
        return NodeSource(classes, NodeGraph(data.x, data.edge_index), data.y, split)

    def _folder(self) -> Path:
        assert self.root is not None
        files = [f"ind.{self._set.lower()}.{part}" for part in _PARTS]
        folders = (self.root / self._set / "raw", self.root / self._set, self.root)
        folder = next((folder for folder in folders if (folder / files[0]).is_file()), folders[0])
        for file in files:
            if not (folder / file).is_file():
                raise UsageError(
                    f"data.root: {folder} holds no {file}; put the eight files ind.{self._set.lower()}.* of "
                    "https://github.com/kimiyoung/planetoid (its folder data) there"
                )
        return folder
