"""Several trained networks that decide together, and what each one's voice weighs."""

from collections.abc import Sequence
from itertools import combinations
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.core.loading import derived_seed
from lit_distill.core.networks import freeze
from lit_distill.core.taps import probe
from lit_distill.image.distillation import count_classes

Voting = Literal["prior", "equal", "random"]


class Committee(nn.Module):
    r"""Frozen networks of the same classes, with weights from what each has proved to be worth.

    .. math:: \omega_m = \frac{\exp(\alpha_m / \tau)}{\sum_{j \in \text{chosen}} \exp(\alpha_j / \tau)}

    Args:
        members: The networks; images (B, C, H, W) to logits (B, K).
        priors: alpha, a number for each member, in percent: the accuracy that data distilled by this member alone give.
            Not the member's own accuracy.
        voting: "prior" as above, "equal" weights, or "random" ones: uniform numbers, divided by their sum.

    Raises:
        UsageError: There are no members, or not one prior for each, or priors that are shares.

    Reference: Cui et al., Dataset Distillation via Committee Voting, 2025, arXiv 2501.07575.
    """

    def __init__(
        self, members: Sequence[nn.Module], priors: Sequence[float] | None = None, voting: Voting = "prior"
    ) -> None:
        super().__init__()
        if not members:
            raise UsageError("model.members is empty; give one trained network or more")
        if priors is None and voting == "prior" and len(members) > 1:
            raise UsageError(
                f"model.priors is missing; give {len(members)} numbers in percent, one for each member, or set "
                "model.voting to 'equal'"
            )
        if priors is not None and len(priors) != len(members):
            raise UsageError(f"model.priors has {len(priors)} numbers for {len(members)} members; give one for each")
        if priors is not None and len(members) > 1 and max(priors) <= 1:
            raise UsageError(
                f"model.priors are {list(priors)}; give percent, not shares: temperatures are meant for it"
            )
        self.members = nn.ModuleList(members)
        self.priors = None if priors is None else tuple(map(float, priors))
        self.voting: Voting = voting
        freeze(self)

    def __len__(self) -> int:
        return len(self.members)

    def check(self, sample_shape: Sequence[int], num_classes: int) -> None:
        """Runs every member once, and checks its classes.

        Raises:
            UsageError: A member does not take such images, or has other classes than the data or than the others.
        """
        counts = [count_classes(probe(m, sample_shape)[0], m, f"member {i}") for i, m in enumerate(self.members)]
        if len(set(counts)) > 1:
            raise UsageError(
                f"model.members have {', '.join(map(str, counts))} classes; give networks of the same data"
            )
        if counts[0] != num_classes:
            raise UsageError(
                f"model.members have {counts[0]} classes, the data has {num_classes}; train them on this data"
            )

    def weights(
        self,
        chosen: Sequence[int] | None = None,
        *,
        temperature: float,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, " m"]:
        """Computes the weights of chosen members, which sum to 1.

        Args:
            chosen: Their positions; None for all.
            temperature: tau; the larger, the more equal.
            generator: What "random" draws from.

        Returns:
            One weight for each, on the CPU.
        """
        chosen = range(len(self)) if chosen is None else chosen
        if self.voting == "random":
            drawn = torch.rand(len(chosen), generator=generator)
            return drawn / drawn.sum()
        if self.voting == "equal" or self.priors is None:
            return torch.full((len(chosen),), 1 / len(chosen))
        return (torch.tensor([self.priors[place] for place in chosen]) / temperature).softmax(0)

    def voters(self, number: int, per_class: int, *, count: int = 2, seed: int = 0) -> tuple[int, ...]:
        """Chooses the members that vote on the images number `number` of all classes.

        For a single image a class, those with the largest priors. For as many images as there are groups of this size,
        each group once, in the order of `itertools.combinations` (five members: ten pairs). Otherwise, and for a single
        image where there are no priors, a random group.

        Args:
            number: The image's number among those of its class, from 0.
            per_class: Images of each class.
            count: Members of a group.
            seed: Seed of random groups.

        Returns:
            Positions of the members, in ascending order.
        """
        if per_class == 1 and self.priors is not None:
            ranked = sorted(range(len(self)), key=self.priors.__getitem__, reverse=True)
            return tuple(sorted(ranked[:count]))
        groups = list(combinations(range(len(self)), min(count, len(self))))
        if per_class == len(groups):
            return groups[number]
        generator = torch.Generator().manual_seed(derived_seed("voters", seed, number))
        return groups[int(torch.randint(len(groups), (), generator=generator))]
