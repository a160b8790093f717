"""Graphs: labelled graphs distilled to a few, and graph networks distilled into others.

Names are loaded when they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_distill.graph.classifier import GraphClassifier
    from lit_distill.graph.condensed import CondensedGraphs
    from lit_distill.graph.data import (
        DistilledGraphs,
        GraphDataModule,
        OGBDataModule,
        SolubilityDataModule,
        TUDataModule,
    )
    from lit_distill.graph.distilled import DistilledTrees
    from lit_distill.graph.graphs import GraphBatch, GraphSet
    from lit_distill.graph.methods.coresets import Herding, KCenter
    from lit_distill.graph.methods.doscond import DosCond
    from lit_distill.graph.methods.feature_kd import FeatureKD
    from lit_distill.graph.methods.glnn import GLNN
    from lit_distill.graph.methods.kd import KD
    from lit_distill.graph.methods.kidd import KiDD
    from lit_distill.graph.methods.lsp import LSP
    from lit_distill.graph.methods.mirage import Mirage
    from lit_distill.graph.methods.random_subset import RandomSubset
    from lit_distill.graph.models import DeepSets, GraphNetwork
    from lit_distill.graph.nodes import DigitsNodesDataModule, NodeClassifier, NodeDataModule, PlanetoidDataModule

_MODULES = {
    "DosCond": "methods.doscond",
    "FeatureKD": "methods.feature_kd",
    "GLNN": "methods.glnn",
    "Herding": "methods.coresets",
    "KCenter": "methods.coresets",
    "KD": "methods.kd",
    "KiDD": "methods.kidd",
    "LSP": "methods.lsp",
    "Mirage": "methods.mirage",
    "RandomSubset": "methods.random_subset",
    "CondensedGraphs": "condensed",
    "DeepSets": "models",
    "DistilledTrees": "distilled",
    "GraphBatch": "graphs",
    "GraphClassifier": "classifier",
    "GraphNetwork": "models",
    "GraphSet": "graphs",
    "NodeClassifier": "nodes",
    "DigitsNodesDataModule": "nodes",
    "DistilledGraphs": "data",
    "GraphDataModule": "data",
    "NodeDataModule": "nodes",
    "OGBDataModule": "data",
    "PlanetoidDataModule": "nodes",
    "SolubilityDataModule": "data",
    "TUDataModule": "data",
}

__all__ = [  # noqa: RUF022 (methods first, then base, data)
    "DosCond",
    "FeatureKD",
    "GLNN",
    "Herding",
    "KCenter",
    "KD",
    "KiDD",
    "LSP",
    "Mirage",
    "RandomSubset",
    "CondensedGraphs",
    "DeepSets",
    "DistilledTrees",
    "GraphBatch",
    "GraphClassifier",
    "GraphNetwork",
    "GraphSet",
    "NodeClassifier",
    "DigitsNodesDataModule",
    "DistilledGraphs",
    "GraphDataModule",
    "NodeDataModule",
    "OGBDataModule",
    "PlanetoidDataModule",
    "SolubilityDataModule",
    "TUDataModule",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lit_distill.graph' has no attribute '{name}'")
    return getattr(import_module(f"lit_distill.graph.{_MODULES[name]}"), name)
