"""A random part of the training graphs: what every distilled set has to beat at the same size."""

import torch
from jaxtyping import Int
from torch import Tensor

from lit_distill.core.loading import derived_seed
from lit_distill.graph.data.subset import Subset
from lit_distill.graph.graphs import GraphSet


class RandomSubset(Subset):
    """Training graphs drawn at random, so many of each class or within so many bytes.

    The seed decides the draw, too, so that runs see different subsets.
    """

    def orders(self, train: GraphSet) -> list[Int[Tensor, " _"]]:
        """Returns the graphs of each class in random order."""
        generator = torch.Generator().manual_seed(derived_seed("subset", self.run_seed))
        order = torch.randperm(train.size, generator=generator)
        return [order[train.labels[order] == number] for number in range(self.num_classes)]
