"""Random images of each class: what every distilled set has to beat at the same size."""

import torch
from jaxtyping import Int
from torch import Tensor

from lit_distill.core.loading import derived_seed
from lit_distill.dataset.data.subset import Subset


class RandomSubset(Subset):
    """Training images drawn at random, as many of each class.

    The seed decides the draw, too, so that runs see different subsets.
    """

    def select(self, labels: Int[Tensor, " n"]) -> Int[Tensor, " m"]:
        """Draws."""
        generator = torch.Generator().manual_seed(derived_seed("subset", self.run_seed))
        order = torch.randperm(len(labels), generator=generator)
        own = labels[order]
        return torch.cat([order[own == number][: self.per_class] for number in range(self.num_classes)])
