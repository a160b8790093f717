"""A pool of small discriminators, of which a few judge at a time and some are always new."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_distill.core.errors import UsageError, check_least
from lit_distill.core.networks import redraw
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.heads import DiscriminatorHead

HeadKind = Literal["global", "local", "local_unconditional"]
KINDS: tuple[HeadKind, ...] = ("global", "local", "local_unconditional")


class DiscriminatorPool(nn.Module):
    """Heads in equal groups, one group for each noise level and kind; in a group the taps take turns.

    Args:
        size: Heads in all; a multiple of the number of groups.
        times: Noise levels, by their times.
        shapes: Shapes of the features by tap, without the batch.

    Raises:
        UsageError: The groups are not equal.
    """

    def __init__(self, size: int, times: Sequence[float], shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        check_least("model", 1, pool_size=size)
        groups = [(float(t), kind) for t in times for kind in KINDS]
        if size % len(groups):
            raise UsageError(
                f"model.pool_size is {size}; give a multiple of {len(groups)}: {len(times)} noise levels with "
                f"{len(KINDS)} kinds of heads"
            )
        self.each = size // len(groups)
        self._first = {group: number * self.each for number, group in enumerate(groups)}
        taps = list(shapes)
        self.tap_of = [taps[number % self.each % len(taps)] for number in range(size)]
        self.heads = nn.ModuleList(DiscriminatorHead(shapes[tap]) for tap in self.tap_of)

    def sample(self, count: int, t: float, kind: HeadKind, draws: Draws) -> list[int]:
        """Draws different heads of a group, the same in all processes.

        Raises:
            UsageError: The group has not so many.
        """
        if count > self.each:
            raise UsageError(
                f"model.heads is {count}, but a group of the pool has {self.each}; give fewer, or a larger pool"
            )
        left = [self._first[float(t), kind] + number for number in range(self.each)]
        return [left.pop(draws.shared_integer(len(left))) for _ in range(count)]

    def forward(self, features: Mapping[str, Tensor], heads: Sequence[int]) -> Float[Tensor, "b heads"]:
        """Computes the logits of some heads, from features by the names of their taps."""
        return torch.stack([self.heads[head](features[self.tap_of[head]]) for head in heads], dim=1)

    def refresh(self, count: int, optimizer: Optimizer, draws: Draws) -> list[int]:
        """Draws the weights of some heads anew, and lets the optimizer forget them.

        Otherwise the momentum of the old head would kick the new one.

        Args:
            count: How many.
            optimizer: That of the heads.
            draws: Says which, and seeds their weights: the same in all processes.

        Returns:
            The heads.
        """
        left = list(range(len(self.heads)))
        chosen = [left.pop(draws.shared_integer(len(left))) for _ in range(count)]
        seed = draws.shared_integer(2**32)
        if not chosen:
            return chosen
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            for head in chosen:
                place = next(self.heads[head].parameters()).device
                redraw(self.heads[head].cpu())  # on the CPU the numbers are the same for all devices
                self.heads[head].to(place)
        for head in chosen:
            for parameter in self.heads[head].parameters():
                optimizer.state.pop(parameter, None)
        return chosen


def due(iteration: int, share: float, size: int) -> int:
    """Returns how many heads are refreshed in an iteration, so that over many it is that share of the pool in each."""
    return int((iteration + 1) * share * size + 1e-9) - int(iteration * share * size + 1e-9)
