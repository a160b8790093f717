"""Score matching between two noise levels, where no clean samples are known: a step down, the way up, and its target.

In all of it s is the cleaner level, and s = 0 means the data themselves, on any path.
"""

from jaxtyping import Float
from torch import Tensor

from lit_distill.diffusion.paths import GaussianPath

_LARGEST = 10.0  # of 1 / b^2


def euler_step(
    path: GaussianPath,
    x_t: Float[Tensor, "b *sample"],
    student_x0: Float[Tensor, "b *sample"],
    t: Float[Tensor, " b"] | float,
    s: float,
) -> Float[Tensor, "b *sample"]:
    r"""Goes from t to a cleaner s along the velocity that an estimate of the data says; gradients flow to that.

    .. math:: x_s = \alpha_s \hat x_0 + \sigma_s \hat\epsilon, \qquad
        \hat\epsilon = (x_t - \alpha_t \hat x_0) / \sigma_t

    On a flow it is Euler's step x_t + (s - t) u, and DDIM on other paths.
    """
    alpha, sigma, _, _ = path.at(t, x_t)
    alpha_s, sigma_s = _level(path, s)
    x0 = student_x0.double()
    return (alpha_s * x0 + sigma_s * (x_t.double() - alpha * x0) / sigma).to(x_t.dtype)


def bridge(path: GaussianPath, s: float, t: Float[Tensor, " b"]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Returns a and b of x_t = a x_s + b eps, see `GaussianPath.bridge`; alpha and sigma for s = 0."""
    return path.bridge(s, t) if s else (path.alpha(t), path.sigma(t))


def noised_further(
    path: GaussianPath,
    x_s: Float[Tensor, "b *sample"],
    eps: Float[Tensor, "b *sample"],
    s: float,
    t: Float[Tensor, " b"],
) -> Float[Tensor, "b *sample"]:
    """Takes samples of level s to a noisier t: a x_s + b eps."""
    a, b = (_shaped(value, x_s) for value in bridge(path, s, t))
    return (a * x_s + b * eps).to(x_s.dtype)


def subinterval_target(
    path: GaussianPath,
    x_s: Float[Tensor, "b *sample"],
    eps: Float[Tensor, "b *sample"],
    s: float,
    t: Float[Tensor, " b"],
) -> Float[Tensor, "b *sample"]:
    r"""What a denoiser at x_t = a x_s + b eps is to say, so that its mean is the data that x_s came from.

    .. math:: x_0^* = \frac{x_s}{\alpha_s} - \frac{\alpha_t \sigma_s^2}{\alpha_s^2 b} \, \epsilon, \qquad
        \epsilon^* = \frac{\sigma_t}{b} \, \epsilon, \qquad x_t = \alpha_t x_0^* + \sigma_t \epsilon^*

    E[x_0^* | x_t] = E[x_0 | x_t], though x_0 is not in it. On a flow eps^* - x_0^* is the paper's target of the
    velocity; the naive eps - x_s would be biased. It has no bound where t comes near s, see `subinterval_weight`.

    Args:
        path: The path.
        x_s: Samples of level s.
        eps: The noise that took them to t.
        s: Their level; 0 for data, with which the target is x_s.
        t: Noisier times (B,).

    Reference: Fan et al., Phased DMD, 2025, arXiv 2510.27684.
    """
    alpha_s, sigma_s = _level(path, s)
    _, b = bridge(path, s, t)
    factor = path.alpha(t) * sigma_s**2 / (alpha_s**2 * b)
    return (x_s.double() / alpha_s - _shaped(factor, x_s) * eps).to(x_s.dtype)


def subinterval_weight(path: GaussianPath, s: float, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Weight of the squared error against `subinterval_target`: min(1, 10 b^2).

    Our reading of a summary: the loss is written with both sides times b, and 1 / b^2, at most 10, before it.
    """
    return (_LARGEST * bridge(path, s, t)[1].square()).clamp(max=1.0)


def _level(path: GaussianPath, s: float) -> tuple[float, float]:
    return (float(path.alpha(s)), float(path.sigma(s))) if s else (1.0, 0.0)


def _shaped(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.device).reshape(-1, *(1,) * (like.ndim - 1))
