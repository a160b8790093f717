"""Graphs: labelled graphs distilled to a few computation trees, and what that is compared with.

Names are loaded when they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_distill.graph.classifier import GraphClassifier
    from lit_distill.graph.data import DistilledGraphs, GraphDataModule, SolubilityDataModule, TUDataModule
    from lit_distill.graph.distilled import DistilledTrees
    from lit_distill.graph.graphs import GraphBatch, GraphSet
    from lit_distill.graph.methods.coresets import Herding, KCenter
    from lit_distill.graph.methods.kd import KD
    from lit_distill.graph.methods.mirage import Mirage
    from lit_distill.graph.methods.random_subset import RandomSubset
    from lit_distill.graph.models import DeepSets, GraphNetwork

_MODULES = {
    "Herding": "methods.coresets",
    "KCenter": "methods.coresets",
    "KD": "methods.kd",
    "Mirage": "methods.mirage",
    "RandomSubset": "methods.random_subset",
    "DeepSets": "models",
    "DistilledTrees": "distilled",
    "GraphBatch": "graphs",
    "GraphClassifier": "classifier",
    "GraphNetwork": "models",
    "GraphSet": "graphs",
    "DistilledGraphs": "data",
    "GraphDataModule": "data",
    "SolubilityDataModule": "data",
    "TUDataModule": "data",
}

__all__ = [  # noqa: RUF022 (methods first, then base, data)
    "Herding",
    "KCenter",
    "KD",
    "Mirage",
    "RandomSubset",
    "DeepSets",
    "DistilledTrees",
    "GraphBatch",
    "GraphClassifier",
    "GraphNetwork",
    "GraphSet",
    "DistilledGraphs",
    "GraphDataModule",
    "SolubilityDataModule",
    "TUDataModule",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lit_distill.graph' has no attribute '{name}'")
    return getattr(import_module(f"lit_distill.graph.{_MODULES[name]}"), name)
