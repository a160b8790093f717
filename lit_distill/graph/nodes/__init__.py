"""One graph whose nodes are the samples: data, and the classifier that learns them."""

from lit_distill.graph.nodes.classifier import NodeClassifier, graph_logits, node_logits, reads_edges
from lit_distill.graph.nodes.data import NodeBatch, NodeDataModule, NodeGraph, NodePart, NodeSource
from lit_distill.graph.nodes.sets import DigitsNodesDataModule, PlanetoidDataModule

__all__ = [
    "DigitsNodesDataModule",
    "NodeBatch",
    "NodeClassifier",
    "NodeDataModule",
    "NodeGraph",
    "NodePart",
    "NodeSource",
    "PlanetoidDataModule",
    "graph_logits",
    "node_logits",
    "reads_edges",
]
