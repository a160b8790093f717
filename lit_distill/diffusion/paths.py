"""Gaussian paths from data to noise: coefficients, noising, and what a network may predict about them.

    x_t = alpha(t) x0 + sigma(t) eps,    r(t) = sigma / alpha

Time grows with noise. All paths are the same process up to a factor, x_t / alpha = x0 + r eps. So a loss asks its path
for what it needs, and never which path it is. Everything is computed in float64 and given back in the type of the
samples.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lit_distill.core.errors import UsageError

Prediction = Literal["x0", "eps", "v", "u", "score"]


class Coefficients(NamedTuple):
    """Coefficients of a path and their derivatives in time, float64, in the shape of the times."""

    alpha: Tensor
    sigma: Tensor
    alpha_dot: Tensor
    sigma_dot: Tensor


class GaussianPath(ABC):
    """A path from data at small t to noise at large t.

    A subclass says its coefficients and how to find a time by its noise. Times are (B,) or single numbers.

    Attributes:
        t_min: Smallest time at which networks are used.
        t_max: Largest time; sampling starts there.
        discrete: Whether times are whole numbers.
        prediction: What networks for this path predict, where the scheduler that it comes from says so.
    """

    t_min: float
    t_max: float
    discrete: bool = False
    prediction: Prediction | None = None

    @abstractmethod
    def coefficients(self, t: Tensor) -> Coefficients:
        """Returns alpha, sigma and their derivatives at times of float64."""

    @abstractmethod
    def t_from_r(self, r: Tensor) -> Tensor:
        """Returns the times at which sigma / alpha is r."""

    def at(self, t: Tensor | float, like: Tensor | None = None) -> Coefficients:
        """Returns the coefficients; shaped to multiply samples such as `like`, if those are given."""
        t = torch.as_tensor(t, dtype=torch.float64, device=None if like is None else like.device)
        found = self.coefficients(t)
        if like is None:
            return found
        return Coefficients(*(value.reshape(-1, *(1,) * (like.ndim - 1)) for value in found))

    def alpha(self, t: Tensor | float) -> Tensor:
        """Returns the factor of the data."""
        return self.at(t).alpha

    def sigma(self, t: Tensor | float) -> Tensor:
        """Returns the factor of the noise."""
        return self.at(t).sigma

    def r(self, t: Tensor | float) -> Tensor:
        """Returns the ratio of noise to signal, the "sigma" of EDM on any path."""
        found = self.at(t)
        return found.sigma / found.alpha

    def add_noise(
        self, x0: Float[Tensor, "b *sample"], eps: Float[Tensor, "b *sample"], t: Tensor | float
    ) -> Float[Tensor, "b *sample"]:
        """Returns alpha x0 + sigma eps."""
        found = self.at(t, x0)
        return (found.alpha * x0 + found.sigma * eps).to(x0.dtype)

    def start(self, eps: Float[Tensor, "b *sample"], t: Tensor | float) -> Float[Tensor, "b *sample"]:
        """Returns what sampling starts from at time t: sigma eps, noise without data."""
        return (self.at(t, eps).sigma * eps).to(eps.dtype)

    def convert(
        self,
        out: Float[Tensor, "b *sample"],
        x_t: Float[Tensor, "b *sample"],
        t: Tensor | float,
        src: Prediction,
        dst: Prediction,
    ) -> Float[Tensor, "b *sample"]:
        r"""Turns one prediction at (x_t, t) into another.

        ===== =========================================================================================
        x0    the data
        eps   the noise, (x_t - alpha x0) / sigma
        v     alpha eps - sigma x0; only where alpha^2 + sigma^2 = 1
        u     alpha' x0 + sigma' eps, the velocity of the probability flow
        score the gradient of the log density, -eps / sigma
        ===== =========================================================================================

        Nothing is divided by alpha unless `src` is eps or score, so v and u may be used where alpha is 0.

        Raises:
            UsageError: v is asked for on a path where alpha^2 + sigma^2 is not 1.
        """
        if src == dst:
            return out
        alpha, sigma, alpha_dot, sigma_dot = self.at(t, x_t)
        given, x = out.double(), x_t.double()
        if "v" in (src, dst) and not self.variance_preserving:
            raise UsageError(
                f"prediction: v needs alpha^2 + sigma^2 = 1, which {type(self).__name__} has not; take u, eps or x0"
            )
        # First data and noise, as far as they can be had without dividing by what may be 0.
        if src == "x0":
            x0, eps = given, None
        elif src in ("eps", "score"):
            eps = given if src == "eps" else -sigma * given
            x0 = (x - sigma * eps) / alpha
        elif src == "v":
            x0, eps = alpha * x - sigma * given, sigma * x + alpha * given
        else:
            wronskian = alpha * sigma_dot - alpha_dot * sigma
            x0, eps = (sigma_dot * x - sigma * given) / wronskian, (alpha * given - alpha_dot * x) / wronskian
        if dst == "x0":
            return x0.to(out.dtype)
        if eps is None:
            eps = (x - alpha * x0) / sigma
        result = {
            "eps": lambda: eps,
            "score": lambda: -eps / sigma,
            "v": lambda: alpha * eps - sigma * x0,
            "u": lambda: alpha_dot * x0 + sigma_dot * eps,
        }[dst]()
        return result.to(out.dtype)

    def bridge(self, s: Tensor | float, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Returns a and b of the step from s to a noisier t: x_t = a x_s + b eps has the marginal of the path.

        a = alpha_t / alpha_s and b^2 = sigma_t^2 - a^2 sigma_s^2.
        """
        a = self.alpha(t) / self.alpha(s)
        return a, (self.sigma(t).square() - (a * self.sigma(s)).square()).clamp(min=0).sqrt()

    def described(self) -> dict[str, Any]:
        """Returns class and arguments, from which the path can be made again."""
        return {"class": type(self).__name__, "t_min": self.t_min, "t_max": self.t_max}

    @property
    def variance_preserving(self) -> bool:
        """Whether alpha^2 + sigma^2 = 1."""
        middle = self.at((self.t_min + self.t_max) / 2)
        return math.isclose(float(middle.alpha**2 + middle.sigma**2), 1.0, rel_tol=1e-9)

    @property
    def ends_in_noise(self) -> bool:
        """Whether nothing of the data is left at the largest time (a signal-to-noise ratio of zero)."""
        return float(self.alpha(self.t_max)) < 1e-8


class EDMPath(GaussianPath):
    """alpha = 1, sigma = t: the data stay, the noise grows.

    Args:
        t_min: Smallest noise.
        t_max: Largest noise.

    Reference: Karras, Aittala, Aila, Laine, Elucidating the Design Space of Diffusion-Based Generative Models, 2022,
    arXiv 2206.00364.
    """

    def __init__(self, t_min: float = 0.002, t_max: float = 80.0) -> None:
        self.t_min, self.t_max = t_min, t_max

    def coefficients(self, t: Tensor) -> Coefficients:
        """See `GaussianPath`."""
        one = torch.ones_like(t)
        return Coefficients(one, t, torch.zeros_like(t), one)

    def t_from_r(self, r: Tensor) -> Tensor:
        """See `GaussianPath`."""
        return r.double()


class FlowPath(GaussianPath):
    """alpha = 1 - t, sigma = t: a straight line from data to noise (rectified flow).

    Args:
        t_min: Smallest time.
        t_max: Largest time, at most 1.

    Reference: Liu, Gong, Liu, Flow Straight and Fast, 2022, arXiv 2209.03003; Lipman et al., Flow Matching for
    Generative Modeling, 2022, arXiv 2210.02747.
    """

    def __init__(self, t_min: float = 0.001, t_max: float = 1.0) -> None:
        if not 0 <= t_min < t_max <= 1:
            raise UsageError(f"path: times of a flow lie between 0 and 1, given are {t_min} and {t_max}")
        self.t_min, self.t_max = t_min, t_max

    def coefficients(self, t: Tensor) -> Coefficients:
        """See `GaussianPath`."""
        one = torch.ones_like(t)
        return Coefficients(1 - t, t, -one, one)

    def t_from_r(self, r: Tensor) -> Tensor:
        """See `GaussianPath`."""
        r = r.double()
        return torch.where(r.isinf(), torch.ones_like(r), r / (1 + r))


class TrigPath(GaussianPath):
    """alpha = cos t, sigma = sin t.

    Args:
        t_min: Smallest time.
        t_max: Largest time, at most pi / 2.

    Reference: Lu, Song, Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models, 2024, arXiv
    2410.11081.
    """

    def __init__(self, t_min: float = 0.001, t_max: float = math.pi / 2) -> None:
        self.t_min, self.t_max = t_min, t_max

    def coefficients(self, t: Tensor) -> Coefficients:
        """See `GaussianPath`."""
        return Coefficients(t.cos(), t.sin(), -t.sin(), t.cos())

    def t_from_r(self, r: Tensor) -> Tensor:
        """See `GaussianPath`."""
        return r.double().atan()


class CosinePath(TrigPath):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): the cosine schedule of VP diffusion without its offset.

    Args:
        t_min: Smallest time.
        t_max: Largest time, at most 1.
    """

    _rate = math.pi / 2

    def __init__(self, t_min: float = 0.001, t_max: float = 0.999) -> None:
        super().__init__(t_min, t_max)

    def coefficients(self, t: Tensor) -> Coefficients:
        """See `GaussianPath`."""
        alpha, sigma, alpha_dot, sigma_dot = super().coefficients(self._rate * t)
        return Coefficients(alpha, sigma, self._rate * alpha_dot, self._rate * sigma_dot)

    def t_from_r(self, r: Tensor) -> Tensor:
        """See `GaussianPath`."""
        return super().t_from_r(r) / self._rate


class VPPath(GaussianPath):
    """alpha = sqrt(abar_k), sigma = sqrt(1 - abar_k) from the table of a discrete diffusion with times 0 ... T - 1.

    Between whole numbers the angle atan(sigma / alpha) is interpolated, which keeps alpha^2 + sigma^2 = 1.

    Args:
        steps: T.
        beta_start: First beta.
        beta_end: Last beta.
        schedule: How betas grow: "linear", or "scaled_linear" (their roots do).
        alphas_cumprod: The table itself, in place of all of these.

    Reference: Ho, Jain, Abbeel, Denoising Diffusion Probabilistic Models, 2020, arXiv 2006.11239.
    """

    discrete = True

    def __init__(
        self,
        steps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        schedule: Literal["linear", "scaled_linear"] = "linear",
        alphas_cumprod: Sequence[float] | None = None,
    ) -> None:
        if alphas_cumprod is None:
            power = 1.0 if schedule == "linear" else 0.5
            betas = torch.linspace(beta_start**power, beta_end**power, steps, dtype=torch.float64) ** (1 / power)
            table = (1 - betas).cumprod(0)
        else:
            table = torch.as_tensor(alphas_cumprod, dtype=torch.float64)
        self._angle = torch.atan2((1 - table).sqrt(), table.sqrt())
        self.t_min, self.t_max = 0.0, float(len(table) - 1)

    def coefficients(self, t: Tensor) -> Coefficients:
        """See `GaussianPath`."""
        self._angle = self._angle.to(t.device)
        low = t.floor().clamp(0, len(self._angle) - 2).long()
        slope = self._angle[low + 1] - self._angle[low]
        angle = self._angle[low] + (t - low) * slope
        alpha, sigma = angle.cos(), angle.sin()
        alpha = torch.where(alpha < 1e-12, torch.zeros_like(alpha), alpha)  # cos(pi / 2) is not quite 0
        return Coefficients(alpha, sigma, -sigma * slope, alpha * slope)

    def t_from_r(self, r: Tensor) -> Tensor:
        """See `GaussianPath`; r beyond the table gives its ends."""
        angle, table = r.double().atan(), self._angle.to(r.device)
        low = (torch.searchsorted(table, angle.contiguous()) - 1).clamp(0, len(table) - 2)
        share = (angle - table[low]) / (table[low + 1] - table[low])
        return (low + share).clamp(self.t_min, self.t_max)

    def described(self) -> dict[str, Any]:
        """See `GaussianPath`; with the table, whatever it came from."""
        return {"class": type(self).__name__, "alphas_cumprod": self._angle.cos().square().tolist()}


_DIFFUSERS: dict[str, Prediction] = {
    "epsilon": "eps",
    "sample": "x0",
    "v_prediction": "v",
    "flow_prediction": "u",
}


def from_scheduler(scheduler: Any) -> GaussianPath:
    """Returns the path of a scheduler of diffusers, with what its networks predict.

    A scheduler with a table of `alphas_cumprod` gives a `VPPath` with its whole-number times, one of flow matching a
    `FlowPath` (its `shift` concerns the choice of times, not the path), `EDMEulerScheduler` an `EDMPath`.

    Raises:
        UsageError: The path of such a scheduler is not known.
    """
    name, config = type(scheduler).__name__, scheduler.config
    path: GaussianPath
    if "FlowMatch" in name or config.get("use_flow_sigmas", False):
        path, said = FlowPath(), "flow_prediction"
    elif name.startswith("EDM"):
        # The prediction of these is the preconditioned network's own affair.
        return EDMPath(config["sigma_min"], config["sigma_max"])
    elif hasattr(scheduler, "alphas_cumprod"):
        path, said = VPPath(alphas_cumprod=scheduler.alphas_cumprod.tolist()), config.get("prediction_type", "epsilon")
    else:
        raise UsageError(f"path: the path of {name} is not known; give a path of lit_distill.diffusion.paths")
    path.prediction = _DIFFUSERS.get(said)
    return path


def scheduler_path(folder: str, subfolder: str = "scheduler") -> GaussianPath:
    """Returns the path of the scheduler in a folder of diffusers, for YAML.

    Args:
        folder: A pipeline's folder, or its name where it is in the local cache.
        subfolder: The scheduler in it.

    Raises:
        UsageError: It is not there.
    """
    import diffusers

    try:
        config = diffusers.DDPMScheduler.load_config(folder, subfolder=subfolder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UsageError(f"path: {folder} has no scheduler in '{subfolder}' on this machine; put it there") from error
    return from_scheduler(getattr(diffusers, config["_class_name"]).from_config(config))


def check_prediction(prediction: str, path: GaussianPath) -> None:
    """Checks that a network may predict this on this path.

    Raises:
        UsageError: The scheduler of the path says otherwise, or the prediction leaves the data open at the largest
            time.
    """
    if path.prediction is not None and prediction != path.prediction:
        raise UsageError(
            f"prediction: it is '{prediction}', but the scheduler says '{path.prediction}'; give that, or another path"
        )
    if prediction in ("eps", "score") and path.ends_in_noise:
        raise UsageError(
            f"prediction: '{prediction}' says nothing of the data at t = {path.t_max:g}, where the path is all noise "
            "(zero terminal signal-to-noise ratio); take a network that predicts v, u or x0"
        )
