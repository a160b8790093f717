"""Subsets chosen by the embeddings of a trained network: herding and k-center."""

from abc import abstractmethod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lit_distill.core.coresets import herding, k_center
from lit_distill.core.errors import UsageError
from lit_distill.core.reference import Reference
from lit_distill.graph.classifier import check_network
from lit_distill.graph.data.base import GraphDataModule
from lit_distill.graph.data.subset import Subset
from lit_distill.graph.graphs import GraphSet
from lit_distill.graph.models import GraphNetwork

BATCH = 1000


class _EmbeddingSubset(Subset):
    """Base: orders the graphs of a class by a function of their embeddings.

    Args:
        source: The real graphs.
        network: A `GraphNetwork` that was trained on all of them; its readout is the embedding. So the cost of these
            subsets is that of training on everything.
        kwargs: See `Subset`.
    """

    def __init__(self, source: GraphDataModule, network: nn.Module, **kwargs: Any) -> None:
        super().__init__(source, **kwargs)
        self.network = network

    def orders(self, train: GraphSet) -> list[Int[Tensor, " _"]]:
        """Embeds the graphs, and orders those of each class."""
        check_network(self.network, self.source, "network", key="data")
        embeddings = embed(self.network, train)
        own = [(train.labels == number).nonzero()[:, 0] for number in range(self.num_classes)]
        counts = [len(index) if self.per_class is None else min(self.per_class, len(index)) for index in own]
        chosen = [self.select(embeddings[index], count) for index, count in zip(own, counts, strict=True)]
        if self.per_class is not None and min(map(len, own)) < self.per_class:
            raise UsageError(
                f"data.per_class is {self.per_class}; the smallest class has {min(map(len, own))} graphs, lower it"
            )
        return [index[places] for index, places in zip(own, chosen, strict=True)]

    @abstractmethod
    def select(self, embeddings: Float[Tensor, "n d"], count: int) -> Int[Tensor, " m"]:
        """Chooses `count` of the rows, the most important first."""


class Herding(_EmbeddingSubset):
    """Graphs whose embeddings' sum stays as near as can be to that many times the mean of their class.

    Args:
        source: The real graphs.
        network: A `GraphNetwork` that was trained on all of them; its readout is the embedding.
        kwargs: See `Subset`.
    """

    reference = Reference(title="Herding Dynamical Weights to Learn", authors="Welling", year=2009)

    def select(self, embeddings: Float[Tensor, "n d"], count: int) -> Int[Tensor, " m"]:
        """Chooses by `herding`."""
        return herding(embeddings, count)


class KCenter(_EmbeddingSubset):
    """Graphs from which no other of their class is far: the farthest from those already chosen comes next.

    Args:
        source: The real graphs.
        network: A `GraphNetwork` that was trained on all of them; its readout is the embedding.
        kwargs: See `Subset`.
    """

    reference = Reference(
        title="Active Learning for Convolutional Neural Networks: A Core-Set Approach",
        authors="Sener, Savarese",
        year=2017,
        arxiv="1708.00489",
    )

    def select(self, embeddings: Float[Tensor, "n d"], count: int) -> Int[Tensor, " m"]:
        """Chooses by `k_center`."""
        return k_center(embeddings, count)


@torch.no_grad()
def embed(network: nn.Module, graphs: GraphSet) -> Float[Tensor, "g d"]:
    """Computes the readout of every graph, in eval mode."""
    assert isinstance(network, GraphNetwork)
    mode = network.training
    network.eval()
    parts = torch.arange(graphs.size).split(BATCH)
    embeddings = torch.cat([network.embed(graphs.batch(index)) for index in parts])
    network.train(mode)
    return embeddings
