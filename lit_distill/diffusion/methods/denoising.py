"""Training of teachers."""

from typing import Any

import torch
from torch import Tensor

from lit_distill.core.errors import UsageError
from lit_distill.core.reference import Reference
from lit_distill.diffusion.base import DiffusionDistiller
from lit_distill.diffusion.denoiser import Denoiser
from lit_distill.diffusion.distillation import natural_weighting
from lit_distill.diffusion.losses import Weighting, denoising_loss, denoising_weight
from lit_distill.diffusion.samplers import Heun, Sampler
from lit_distill.diffusion.times import LogNormal, TimeSampler


class Denoising(DiffusionDistiller):
    r"""Trains a diffusion or flow model on data; the path of the student says which kind.

    .. math:: L = E_{x_0, \epsilon, t} \; w(t) \, \lVert D(\alpha x_0 + \sigma \epsilon, t) - x_0 \rVert^2

    w makes it the squared error of the student's own output.

    Args:
        student: The denoiser to train.
        times: Times that are trained at.
        weighting: Space in which the error is squared; that of the student's output if None.
        label_dropout: Share of samples whose class is hidden, for guidance later.
        sampler: How validation and test generate; 18 steps of Heun if None.
        kwargs: See `Distiller` and `DiffusionDistiller`.
    """

    reference = Reference(
        title="Elucidating the Design Space of Diffusion-Based Generative Models",
        authors="Karras, Aittala, Aila, Laine",
        year=2022,
        arxiv="2206.00364",
    )

    def __init__(
        self,
        student: Denoiser,
        times: TimeSampler | None = None,
        weighting: Weighting | None = None,
        label_dropout: float = 0.1,
        sampler: Sampler | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, None, sampler=sampler if sampler is not None else Heun(18), **kwargs)
        if not 0 <= label_dropout < 1:
            raise UsageError(f"model.label_dropout is {label_dropout}; it is a share, at least 0 and below 1")
        self.times = times if times is not None else LogNormal()
        self.weighting = weighting or natural_weighting(student)
        self.label_dropout = label_dropout

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Denoises the batch."""
        clean, condition = self.real(batch)
        draws = self.draws("step")
        t = self.times(len(clean), self.path, draws)
        x_t = self.path.add_noise(clean, draws.normal(clean.shape).to(clean), t)
        if isinstance(condition, Tensor) and self.label_dropout:
            hidden = draws.uniform(len(clean)) < self.label_dropout
            null = self.student.null_condition(condition)
            assert isinstance(null, Tensor)
            condition = torch.where(hidden, null, condition)
        weight = denoising_weight(self.path, t, self.weighting, data_std=self.student.data_std)
        return self.combine({"denoise": denoising_loss(self.student(x_t, t, condition), clean, weight)})
