"""How the times of a training step are drawn. A method has one sampler for its student and one for its fake score."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from lit_distill.core.errors import UsageError
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.paths import GaussianPath


class TimeSampler(ABC):
    """Draws times on a path."""

    @abstractmethod
    def __call__(self, count: int, path: GaussianPath, draws: Draws) -> Float[Tensor, " b"]:
        """Returns (b,) times, float64; whole numbers where the path is discrete."""


class Uniform(TimeSampler):
    """Uniform over a part of the path's range of times.

    Args:
        low: Lower end, as a share of the range.
        high: Upper end.
    """

    def __init__(self, low: float = 0.02, high: float = 0.98) -> None:
        self.low, self.high = _part(low, high)

    def __call__(self, count: int, path: GaussianPath, draws: Draws) -> Float[Tensor, " b"]:
        """See `TimeSampler`."""
        share = self.low + (self.high - self.low) * draws.uniform(count)
        return _on(path, path.t_min + share * (path.t_max - path.t_min))


class Karras(TimeSampler):
    r"""Noise on the curve of EDM's sampling steps.

    .. math:: r = \big(r_{min}^{1/\rho} + u \, (r_{max}^{1/\rho} - r_{min}^{1/\rho})\big)^\rho,
        \quad u \sim U(low, high)

    Args:
        low: Lower end of u.
        high: Upper end of u.
        r_min: Noise at u = 0.
        r_max: Noise at u = 1.
        rho: Exponent.

    Reference: Karras, Aittala, Aila, Laine, 2022, arXiv 2206.00364.
    """

    def __init__(
        self, low: float = 0.02, high: float = 0.98, r_min: float = 0.002, r_max: float = 80.0, rho: float = 7.0
    ) -> None:
        self.low, self.high = _part(low, high)
        self.r_min, self.r_max, self.rho = r_min, r_max, rho

    def __call__(self, count: int, path: GaussianPath, draws: Draws) -> Float[Tensor, " b"]:
        """See `TimeSampler`."""
        u = self.low + (self.high - self.low) * draws.uniform(count)
        return _on(path, path.t_from_r(karras_noise(u, self.r_min, self.r_max, self.rho)))


class LogNormal(TimeSampler):
    """ln r is normal: EDM's training distribution.

    Args:
        mean: Mean of ln r.
        std: Standard deviation of ln r.
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2) -> None:
        self.mean, self.std = mean, std

    def __call__(self, count: int, path: GaussianPath, draws: Draws) -> Float[Tensor, " b"]:
        """See `TimeSampler`."""
        return _on(path, path.t_from_r((self.mean + self.std * draws.gaussian(count)).exp()))


class LogitNormal(TimeSampler):
    """The sigmoid of a normal number, as a share of the range of times: the training distribution of SD3.

    Args:
        mean: Mean of the normal number.
        std: Its standard deviation.

    Reference: Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, 2024, arXiv
    2403.03206.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        self.mean, self.std = mean, std

    def __call__(self, count: int, path: GaussianPath, draws: Draws) -> Float[Tensor, " b"]:
        """See `TimeSampler`."""
        share = (self.mean + self.std * draws.gaussian(count)).sigmoid()
        return _on(path, path.t_min + share * (path.t_max - path.t_min))


class Shifted(TimeSampler):
    """Uniform times of a flow, moved towards noise: t' = s t / (1 + (s - 1) t).

    Args:
        shift: s; 1 moves nothing.
        low: Lower end of t.
        high: Upper end of t.
    """

    def __init__(self, shift: float = 3.0, low: float = 0.02, high: float = 0.98) -> None:
        self.shift = shift
        self.low, self.high = _part(low, high)

    def __call__(self, count: int, path: GaussianPath, draws: Draws) -> Float[Tensor, " b"]:
        """See `TimeSampler`."""
        t = self.low + (self.high - self.low) * draws.uniform(count)
        share = self.shift * t / (1 + (self.shift - 1) * t)
        return _on(path, path.t_min + share * (path.t_max - path.t_min))


class Listed(TimeSampler):
    """One of a few times, each as likely as the others.

    Args:
        times: The times.
    """

    def __init__(self, times: Sequence[float]) -> None:
        if not times:
            raise UsageError("times: the list is empty; give one time or more")
        self.times = list(times)

    def __call__(self, count: int, path: GaussianPath, draws: Draws) -> Float[Tensor, " b"]:
        """See `TimeSampler`."""
        times = torch.tensor(self.times, dtype=torch.float64, device=draws.device)
        return times[draws.integers(len(self.times), count)]


class Interval(TimeSampler):
    """Uniform between two times, in the path's own units.

    Args:
        low: Lower end.
        high: Upper end.
    """

    def __init__(self, low: float, high: float) -> None:
        if low >= high:
            raise UsageError(f"times: the interval from {low} to {high} is empty; low must be below high")
        self.low, self.high = low, high

    def __call__(self, count: int, path: GaussianPath, draws: Draws) -> Float[Tensor, " b"]:
        """See `TimeSampler`."""
        return _on(path, self.low + (self.high - self.low) * draws.uniform(count))


def karras_noise(u: Tensor, r_min: float, r_max: float, rho: float = 7.0) -> Tensor:
    """Returns the noise on EDM's curve, r_min at u = 0 and r_max at u = 1."""
    low, high = r_min ** (1 / rho), r_max ** (1 / rho)
    return (low + u * (high - low)) ** rho


def check_steps(steps: Sequence[float], path: GaussianPath, key: str = "model.steps") -> list[float]:
    """Checks the times of a few-step generator: from noisy to clean, on the path.

    Raises:
        UsageError: They are not.
    """
    found = [float(step) for step in steps]
    if not found or any(later >= earlier for earlier, later in pairwise(found)):
        raise UsageError(f"{key}: {found} does not decrease; time grows with noise, and sampling goes the other way")
    if found[0] > path.t_max or found[-1] <= 0:
        raise UsageError(f"{key}: {found} leaves the times of the path, 0 to {path.t_max:g}")
    return found


def _part(low: float, high: float) -> tuple[float, float]:
    if not 0 <= low < high <= 1:
        raise UsageError(f"times: low {low} and high {high} are shares of a range; give 0 <= low < high <= 1")
    return low, high


def _on(path: GaussianPath, t: Tensor) -> Tensor:
    t = t.clamp(path.t_min, path.t_max)
    return t.round() if path.discrete else t
