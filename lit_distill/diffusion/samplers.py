"""Sampling with any function that denoises: (x_t, t) -> x0. For large networks, pipelines of diffusers do it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lit_distill.core.errors import UsageError
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.paths import GaussianPath
from lit_distill.diffusion.times import karras_noise

Denoise = Callable[[Tensor, Tensor], Tensor]


class Sampler(ABC):
    """Makes data of noise."""

    @abstractmethod
    def __call__(
        self, denoise: Denoise, path: GaussianPath, noise: Float[Tensor, "b *sample"], draws: Draws
    ) -> Float[Tensor, "b *sample"]:
        """Returns data, from standard normal noise; `draws` is for samplers that add noise on the way."""

    @abstractmethod
    def evaluations(self) -> int:
        """Returns how many times the network runs for a sample."""

    def described(self) -> dict[str, Any]:
        """Returns class and arguments, as in YAML."""
        return {"class_path": f"{type(self).__module__}.{type(self).__name__}", "init_args": dict(vars(self))}


class _Solver(Sampler):
    """The probability flow, in the variables x_t / alpha and r of which every path is EDM's.

    Args:
        steps: Steps.
        r_min: Noise of the last step but one; the last goes to 0.
        r_max: Noise to start from; that of the path's largest time, but 80 at most, if None.
        rho: Exponent of the spacing, see `Karras`.
    """

    def __init__(self, steps: int, r_min: float = 0.002, r_max: float | None = None, rho: float = 7.0) -> None:
        if steps < 1:
            raise UsageError(f"sampler.steps is {steps}; give 1 or more")
        self.steps, self.r_min, self.r_max, self.rho = steps, r_min, r_max, rho

    def _start(self, path: GaussianPath, noise: Tensor) -> tuple[Tensor, list[Tensor]]:
        largest = min(float(path.r(path.t_max)), 80.0) if self.r_max is None else self.r_max
        u = torch.linspace(1, 0, self.steps, dtype=torch.float64, device=noise.device)
        noises = karras_noise(u, self.r_min, largest, self.rho)
        return noises[0] * noise.double(), [*noises, torch.zeros_like(noises[0])]

    @staticmethod
    def _slope(denoise: Denoise, path: GaussianPath, z: Tensor, r: Tensor, like: Tensor) -> Tensor:
        """D z / d r at z = x_t / alpha."""
        t = path.t_from_r(r)
        x_t = (path.at(t).alpha * z).to(like.dtype)
        return (z - denoise(x_t, t.expand(len(z))).double()) / r


class Euler(_Solver):
    """Euler's method on the probability flow; the same as DDIM (Song, Meng, Ermon, 2020, arXiv 2010.02502)."""

    def __call__(
        self, denoise: Denoise, path: GaussianPath, noise: Float[Tensor, "b *sample"], draws: Draws
    ) -> Float[Tensor, "b *sample"]:
        """See `Sampler`."""
        z, noises = self._start(path, noise)
        for r, following in pairwise(noises):
            z = z + (following - r) * self._slope(denoise, path, z, r, noise)
        return z.to(noise.dtype)

    def evaluations(self) -> int:
        """See `Sampler`."""
        return self.steps


class Heun(_Solver):
    """Heun's method on the probability flow, the sampler of EDM without its churn (2206.00364, algorithm 1)."""

    def __call__(
        self, denoise: Denoise, path: GaussianPath, noise: Float[Tensor, "b *sample"], draws: Draws
    ) -> Float[Tensor, "b *sample"]:
        """See `Sampler`."""
        z, noises = self._start(path, noise)
        for r, following in pairwise(noises):
            slope = self._slope(denoise, path, z, r, noise)
            ahead = z + (following - r) * slope
            if following > 0:  # on the CPU or not, this is a handful of comparisons a batch of samples
                slope = (slope + self._slope(denoise, path, ahead, following, noise)) / 2
                ahead = z + (following - r) * slope
            z = ahead
        return z.to(noise.dtype)

    def evaluations(self) -> int:
        """See `Sampler`."""
        return 2 * self.steps - 1


class Renoise(Sampler):
    """Data at once, then noise anew for the next time: the sampler of few-step generators, and of LCM.

    Args:
        times: Times, from noisy to clean. The first is where pure noise goes in.
    """

    def __init__(self, times: Sequence[float]) -> None:
        self.times = list(times)

    def __call__(
        self, denoise: Denoise, path: GaussianPath, noise: Float[Tensor, "b *sample"], draws: Draws
    ) -> Float[Tensor, "b *sample"]:
        """See `Sampler`."""
        first, *others = self.times
        x0 = denoise(path.start(noise, first), _times(first, noise))
        for t in others:
            x0 = denoise(path.add_noise(x0, draws.normal(noise.shape).to(noise), t), _times(t, noise))
        return x0

    def evaluations(self) -> int:
        """See `Sampler`."""
        return len(self.times)


class DDIM(Sampler):
    """The probability flow at listed times: data at once, then back on the line to the noise that they imply.

    On a flow this is Euler's method with these times. The last step goes to the data.

    Args:
        times: Times, from noisy to clean. The first is where pure noise goes in.

    Reference: Song, Meng, Ermon, Denoising Diffusion Implicit Models, 2020, arXiv 2010.02502.
    """

    def __init__(self, times: Sequence[float]) -> None:
        self.times = list(times)

    def __call__(
        self, denoise: Denoise, path: GaussianPath, noise: Float[Tensor, "b *sample"], draws: Draws
    ) -> Float[Tensor, "b *sample"]:
        """See `Sampler`."""
        x_t = path.start(noise, self.times[0])
        for now, following in pairwise(self.times):
            x0 = denoise(x_t, _times(now, noise))
            x_t = path.add_noise(x0, path.convert(x0, x_t, now, "x0", "eps"), following)
        return denoise(x_t, _times(self.times[-1], noise))

    def evaluations(self) -> int:
        """See `Sampler`."""
        return len(self.times)


def _times(t: float, like: Tensor) -> Tensor:
    return torch.full((len(like),), t, dtype=torch.float64, device=like.device)
