"""Average velocities of a flow, from a noisy sample to its data, and how they change along it."""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lit_distill.losses.reduction import Reduction, reduce

TangentNorm = Literal["none", "l2", "rms"]


@torch.no_grad()
def finite_difference_tangent(
    function: Callable[[Tensor, Tensor], Tensor],
    value: Float[Tensor, "b *sample"],
    x_t: Float[Tensor, "b *sample"],
    t: Float[Tensor, " b"],
    velocity: Float[Tensor, "b *sample"],
    *,
    dt: float,
) -> Float[Tensor, "b *sample"]:
    r"""Differentiates a function of (x, t) along a flow, backward in time.

    .. math:: \frac{d f}{d t} \approx \frac{f(x_t, t) - f(x_t - v \, dt, t - dt)}{dt}

    All of it is detached.

    Args:
        function: f.
        value: f(x_t, t), which is at hand (B, ...).
        x_t: Noisy samples.
        t: Their times, at least dt.
        velocity: v, that of the flow at (x_t, t).
        dt: Step.
    """
    earlier = function((x_t - dt * velocity).to(x_t.dtype), t - dt)
    return (value - earlier) / dt


def normalized_tangent(
    tangent: Float[Tensor, "b *sample"], *, norm: TangentNorm, floor: float = 0.1
) -> Float[Tensor, "b *sample"]:
    """Divides each sample's derivative by its length plus a floor.

    "l2" is the length itself, as published: then what is left of a derivative goes with the root of the number of
    elements. "rms" is the root mean square, which does not depend on it. "none" divides by 1.
    """
    if norm == "none":
        return tangent
    square = tangent.flatten(1).square()
    length = (square.sum(1) if norm == "l2" else square.mean(1)).sqrt()
    return tangent / (length + floor).reshape(-1, *(1,) * (tangent.ndim - 1))


def implied_velocity(
    student_phi: Float[Tensor, "b *sample"], tangent: Float[Tensor, "b *sample"], t: Float[Tensor, " b"]
) -> Float[Tensor, "b *sample"]:
    """Returns phi + t dphi/dt: the velocity of the flow whose average velocity from data to t is phi."""
    return student_phi + _beside(t, student_phi) * tangent


def velocity_matching(
    student_phi: Float[Tensor, "b *sample"],
    teacher_velocity: Float[Tensor, "b *sample"],
    tangent: Float[Tensor, "b *sample"],
    t: Float[Tensor, " b"],
    *,
    reduction: Reduction = "batchmean",
) -> Tensor:
    r"""Teaches the average velocity by the velocity that it implies.

    .. math:: \lVert \phi - \operatorname{sg}(v - t \, d\phi/dt) \rVert^2 / D

    Args:
        student_phi: phi(x_t, t) (B, ...).
        teacher_velocity: v(x_t, t), detached here.
        tangent: dphi/dt along the flow, detached here.
        t: Times (B,).
        reduction: Of the samples' means (B,).

    Reference: Few-step Flow for 3D Generation via Marginal-Data Transport Distillation, 2025, arXiv 2509.04406.
    """
    target = (teacher_velocity - _beside(t, student_phi) * tangent).detach()
    return reduce((student_phi - target).square().flatten(1).mean(1), reduction)


def velocity_distillation(
    student_phi: Float[Tensor, "b *sample"],
    student_implied: Float[Tensor, "b *sample"],
    teacher_velocity: Float[Tensor, "b *sample"],
    *,
    reduction: Reduction = "batchmean",
) -> Tensor:
    r"""Moves generated samples x' = z - phi(z, 1) to where the teacher's velocity is the one that phi implies.

    .. math:: \lVert d + \phi - \operatorname{sg}(\phi) \rVert^2 / D, \qquad d = \operatorname{sg}(u_\phi - v)

    The gradient at phi is 2 d / (B D): x' moves along d, which is along the teacher's score minus that of the
    generated samples. Its value is the mean square of d.

    Args:
        student_phi: phi(z, 1) (B, ...), the only way for gradients.
        student_implied: u_phi at the noised x', see `implied_velocity`.
        teacher_velocity: v there.
        reduction: Of the samples' means (B,).

    Reference: As `velocity_matching`.
    """
    difference = (student_implied - teacher_velocity).detach()
    return reduce((difference + student_phi - student_phi.detach()).square().flatten(1).mean(1), reduction)


def _beside(t: Tensor, like: Tensor) -> Tensor:
    return t.to(like).reshape(-1, *(1,) * (like.ndim - 1))
