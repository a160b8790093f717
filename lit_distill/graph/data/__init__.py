"""Sets of labelled graphs as data modules."""

from lit_distill.graph.data.base import GraphDataModule, GraphSource
from lit_distill.graph.data.distilled import DistilledGraphs
from lit_distill.graph.data.molecules import SolubilityDataModule
from lit_distill.graph.data.ogb import OGBDataModule
from lit_distill.graph.data.tu import TUDataModule

__all__ = ["DistilledGraphs", "GraphDataModule", "GraphSource", "OGBDataModule", "SolubilityDataModule", "TUDataModule"]
