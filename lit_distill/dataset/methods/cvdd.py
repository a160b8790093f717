"""CV-DD: images recovered from a committee of trained networks, two of which vote at a time."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lit_distill.core.errors import UsageError
from lit_distill.core.loading import derived_seed
from lit_distill.core.reference import Reference
from lit_distill.dataset.committee import Committee, Voting
from lit_distill.dataset.recovery import Recovery


class CommitteeRecovery(Recovery):
    r"""Several networks must agree on the class of an image; who has proved to be worth more has the louder voice.

    .. math:: L = \sum_{m \in \text{voters}} \omega_m \big( \mathrm{CE}_m + r R_m \big), \qquad
        \omega = \mathrm{softmax}(\alpha / \tau) \text{ over the voters}

    The voters change with the number of the image within its class and are the same for all classes; see
    `Committee.voters`. With one member it is SRe2L++. The parts can be left out one by one: `voting: equal`,
    `voters: 1`, `init: noise`, `crop_scale: null` with `flip` and `roll`, `bn_weight: 0`.

    Args:
        student: See `Recovery`.
        members: The trained networks.
        priors: alpha, a number for each member, in percent, see `Committee`.
        voting: "prior", "equal" or "random"; random weights are drawn for each number of image.
        voters: Members that vote on an image.
        single: The voters where there is one image of each class, by position; None takes those with the largest
            priors.
        temperature: tau.
        kwargs: See `Recovery`.
    """

    reference = Reference(
        title="Dataset Distillation via Committee Voting",
        authors="Cui, Li, Ma, Bi, Luo, Shen",
        year=2025,
        arxiv="2501.07575",
    )

    def __init__(
        self,
        student: nn.Module,
        members: Sequence[nn.Module],
        priors: Sequence[float] | None = None,
        voting: Voting = "prior",
        voters: int = 2,
        single: Sequence[int] | None = None,
        temperature: float = 5.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, Committee(members, priors, voting), **kwargs)
        if voters < 1:
            raise UsageError(f"model.voters is {voters}; give 1 or more (published: 2)")
        if temperature <= 0:
            raise UsageError(f"model.temperature is {temperature}; it must be above 0 (published: 5)")
        for place in single or ():
            if not 0 <= place < len(members):
                raise UsageError(
                    f"model.single: there is no member {place}; give positions from 0 to {len(members) - 1}"
                )
        self.voters = voters
        self.single = None if single is None else tuple(single)
        self.temperature = temperature

    def votes(self, number: int) -> dict[int, float]:
        """Chooses the voters, and weighs them."""
        seed = self.run_seed()
        if self.per_class == 1 and self.single:
            chosen = self.single
        else:
            chosen = self.committee.voters(number, self.per_class, count=self.voters, seed=seed)
        generator = torch.Generator().manual_seed(derived_seed("votes", seed, number))
        weights = self.committee.weights(chosen, temperature=self.temperature, generator=generator)
        return dict(zip(chosen, weights.tolist(), strict=True))
