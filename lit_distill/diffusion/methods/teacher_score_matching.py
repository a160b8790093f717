"""Teacher score matching: a smaller denoiser learns what a larger one says."""

from typing import Any

import torch
from torch import Tensor

from lit_distill.core.reference import Reference
from lit_distill.diffusion.base import DiffusionDistiller
from lit_distill.diffusion.denoiser import Denoiser
from lit_distill.diffusion.distillation import ScoreDistiller, natural_weighting
from lit_distill.diffusion.losses import Weighting, denoising_loss, denoising_weight
from lit_distill.diffusion.samplers import Heun, Sampler
from lit_distill.diffusion.times import LogNormal, TimeSampler


class TeacherScoreMatching(DiffusionDistiller):
    r"""The first stage of MSD's smaller students, which cannot begin as the teacher.

    .. math:: L = E_{x_0, \epsilon, t} \; w(t) \, \lVert D_{student}(x_t, t, c) - D_{teacher}(x_t, t, c) \rVert^2

    x_t are noised real data. w makes it the squared error in the teacher's own output.

    Args:
        student: The denoiser to train, on the teacher's path.
        teacher: The frozen denoiser.
        times: Times that are trained at.
        weighting: Space in which the difference is squared; that of the teacher's output if None.
        sampler: How validation and test generate; 18 steps of Heun if None.
        kwargs: See `Distiller` and `DiffusionDistiller`.
    """

    reference = Reference(
        title="Multi-student Diffusion Distillation for Better One-step Generators",
        authors="Song, Lorraine, Nie, Kreis, Lucas",
        year=2024,
        arxiv="2410.23274",
        reconstruction=True,
    )

    teacher: Denoiser

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        times: TimeSampler | None = None,
        weighting: Weighting | None = None,
        sampler: Sampler | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, sampler=sampler if sampler is not None else Heun(18), **kwargs)
        self.times = times if times is not None else LogNormal()
        self.weighting = weighting or natural_weighting(teacher)

    def build(self) -> None:
        """Refuses a student on another path, or with other classes, than the teacher's."""
        super().build()
        ScoreDistiller._check_networks(self.student, self.teacher)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compares both at noisy real data."""
        clean, condition = self.real(batch)
        draws = self.draws("step")
        t = self.times(len(clean), self.path, draws)
        x_t = self.path.add_noise(clean, draws.normal(clean.shape).to(clean), t)
        with torch.no_grad():
            target = self.teacher(x_t, t, condition)
        weight = denoising_weight(self.path, t, self.weighting, data_std=self.teacher.data_std)
        return self.combine({"tsm": denoising_loss(self.student(x_t, t, condition), target, weight)})
