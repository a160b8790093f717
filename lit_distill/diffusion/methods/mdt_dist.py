"""MDT-dist: few-step flows by marginal-data transport."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_distill.core.errors import UsageError, check_least
from lit_distill.core.reference import Reference
from lit_distill.diffusion.base import DiffusionDistiller
from lit_distill.diffusion.denoiser import Denoiser, guided
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.networks import Condition
from lit_distill.diffusion.paths import FlowPath
from lit_distill.diffusion.samplers import DDIM
from lit_distill.diffusion.times import LogitNormal, TimeSampler, check_steps
from lit_distill.diffusion.transport import (
    TangentNorm,
    finite_difference_tangent,
    implied_velocity,
    normalized_tangent,
    velocity_distillation,
    velocity_matching,
)


class MDTDist(DiffusionDistiller):
    r"""Learns the average velocity phi of the teacher's flow from any time to data: t phi(x_t, t) = int_0^t v.

    .. math:: L = L_{VM} + \lambda L_{VD}

    Velocity matching holds the velocity that phi implies, u_phi = phi + t dphi/dt, to the teacher's on noised real
    samples. Velocity distillation compares the two on noised samples x' = z - phi(z, 1) and moves those: phi itself is
    the fake score, and there is no third network. Both derivatives are taken along the (guided) teacher's velocity.

    Nothing here is about images: samples may be grids in space, and conditions whatever the networks take.

    Args:
        student: Begins as the teacher; phi is its velocity "u".
        teacher: The frozen flow.
        steps: Times at which the student generates, from noisy to clean; 1 first.
        times: Times that are trained at, before they are moved to at least dt.
        dt: Step of the finite difference.
        guidance: Guidance scale of the teacher in L_VM. The paper's w' is this less 1.
        distillation_guidance: The same in L_VD.
        distillation_weight: lambda; 0 leaves L_VD out.
        tangent_norm: What the derivative is divided by, see `normalized_tangent`.
        kwargs: See `Distiller` and `DiffusionDistiller`.
    """

    reference = Reference(
        title="Few-step Flow for 3D Generation via Marginal-Data Transport Distillation",
        authors="Zhou, Yi, Fang, Yang, Xie, Wang, Shen, Tian",
        year=2025,
        arxiv="2509.04406",
    )

    teacher: Denoiser

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        steps: Sequence[float] = (1.0,),
        times: TimeSampler | None = None,
        dt: float = 0.01,
        guidance: float = 1.0,
        distillation_guidance: float = 1.0,
        distillation_weight: float = 1.0,
        tangent_norm: TangentNorm = "l2",
        **kwargs: Any,
    ) -> None:
        for role, network in (("student", student), ("teacher", teacher)):
            if not isinstance(network.path, FlowPath):
                raise UsageError(
                    f"model.{role}: it is on {type(network.path).__name__}; average velocities need a FlowPath, so "
                    "train a teacher on that"
                )
        super().__init__(student, teacher, sampler=DDIM(check_steps(steps, student.path)), **kwargs)
        check_least("model", 0, distillation_weight=distillation_weight)
        if not 0 < dt < student.path.t_max - student.path.t_min:
            raise UsageError(f"model.dt is {dt}; give a small share of the time from data to noise, such as 0.01")
        self.times = times if times is not None else LogitNormal(1.0, 1.0)
        self.dt = dt
        self.guidance, self.distillation_guidance = guidance, distillation_guidance
        self.distillation_weight = distillation_weight
        self.tangent_norm = tangent_norm

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Matches velocities on real samples, and distils them on generated ones."""
        real, condition = self.real(batch)
        draws = self.draws("step")
        terms = {"vm": self.match(real, condition, draws)}
        if self.distillation_weight:
            terms["vd"] = self.distillation_weight * self.distil(real, condition, draws)
        return self.combine(terms)

    def match(self, real: Tensor, condition: Condition, draws: Draws) -> Tensor:
        """Returns L_VM."""
        x_t, t = self.noised(real, draws)
        phi = self.student(x_t, t, condition, "u")
        velocity, tangent = self.along(phi, x_t, t, condition, self.guidance)
        return velocity_matching(phi, velocity, tangent, t)

    def distil(self, real: Tensor, condition: Condition, draws: Draws) -> Tensor:
        """Returns L_VD; of the real samples it takes shape and conditions."""
        z = draws.normal(real.shape).to(real)
        phi = self.student(z, 1.0, condition, "u")
        x_t, t = self.noised(z - phi.detach(), draws)
        with torch.no_grad():
            here = self.student(x_t, t, condition, "u")
            velocity, tangent = self.along(here, x_t, t, condition, self.distillation_guidance)
            implied = implied_velocity(here, tangent, t)
        return velocity_distillation(phi, implied, velocity)

    def noised(self, x0: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Returns noised samples and their times, of which none is below dt."""
        low, high = self.path.t_min, self.path.t_max
        t = self.times(len(x0), self.path, draws)
        t = low + self.dt + (t - low) * (high - low - self.dt) / (high - low)
        return self.path.add_noise(x0, draws.normal(x0.shape).to(x0), t), t

    @torch.no_grad()
    def along(
        self, phi: Tensor, x_t: Tensor, t: Tensor, condition: Condition, guidance: float
    ) -> tuple[Tensor, Tensor]:
        """Returns the teacher's velocity, and the (normalized) derivative of phi along it."""
        velocity = guided(self.teacher, x_t, t, condition, guidance, "u")

        def student(x: Tensor, at: Tensor) -> Tensor:
            return self.student(x, at, condition, "u")

        tangent = finite_difference_tangent(student, phi, x_t, t, velocity, dt=self.dt)
        return velocity, normalized_tangent(tangent, norm=self.tangent_norm)
