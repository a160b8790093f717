"""The random numbers of a step, the same on any number of processes."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor


class Draws:
    """Draws for the whole batch in every process, and gives each its share.

    So a step on two processes is the step of one. What is drawn follows from the seed alone.

    Args:
        seed: Seed, the same in all processes.
        device: Where numbers are wanted.
        rank: This process.
        world_size: Number of processes; each has the same number of samples.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu", *, rank: int = 0, world_size: int = 1) -> None:
        self.device = torch.device(device)
        self.rank, self.world_size = rank, world_size
        self._generator = torch.Generator(self.device).manual_seed(seed)
        self._shared = random.Random(seed)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Draws standard normal numbers (b, ...)."""
        whole = torch.randn((shape[0] * self.world_size, *shape[1:]), generator=self._generator, device=self.device)
        return self._share(whole)

    def uniform(self, count: int) -> Tensor:
        """Draws (b,) uniform numbers in [0, 1), float64."""
        whole = torch.rand(count * self.world_size, generator=self._generator, device=self.device, dtype=torch.float64)
        return self._share(whole)

    def gaussian(self, count: int) -> Tensor:
        """Draws (b,) standard normal numbers, float64."""
        whole = torch.randn(count * self.world_size, generator=self._generator, device=self.device, dtype=torch.float64)
        return self._share(whole)

    def integers(self, below: int, count: int) -> Tensor:
        """Draws (b,) whole numbers from 0."""
        whole = torch.randint(below, (count * self.world_size,), generator=self._generator, device=self.device)
        return self._share(whole)

    def shared_integer(self, below: int) -> int:
        """Draws one whole number, the same in all processes, without asking the device."""
        return self._shared.randrange(below)

    def _share(self, whole: Tensor) -> Tensor:
        return whole.tensor_split(self.world_size)[self.rank]
