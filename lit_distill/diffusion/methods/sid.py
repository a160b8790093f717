"""SiD: score identity distillation."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lit_distill.core.errors import UsageError
from lit_distill.core.reference import Reference
from lit_distill.diffusion.denoiser import Denoiser, guided
from lit_distill.diffusion.distillation import ScoreDistiller
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.losses import sid_loss
from lit_distill.diffusion.networks import Condition
from lit_distill.diffusion.rollout import Sample
from lit_distill.diffusion.times import Karras, LogNormal, TimeSampler


class SiD(ScoreDistiller):
    r"""Descends the Fisher divergence of noised samples, with gradients through both scores to what they are given.

    .. math:: L = \frac{100}{B} \sum \frac{(D_{real} - D_{fake}) \, \big((D_{real} - x) - a (D_{real} - D_{fake})\big)}
        {\operatorname{sg}[\operatorname{mean} |x - D_{real}|]}, \qquad D = D(x + r \epsilon)

    The gradient to x is computed first, and the generator goes backward from there: the graphs of the two scores are
    gone by then. Samples whose gradient is not finite are left out. The paper's order is a step of the fake score, then
    one of the generator, each on samples of its own; here both share them, the generator first.

    Args:
        student: The generator.
        teacher: The frozen denoiser.
        steps: Times of the generator's steps; the paper's one step starts at noise 2.5.
        alpha: a.
        scale: The 100 above; it matters where gradients are clipped.
        student_times: Times at which the two scores are compared; EDM's curve up to 0.8 if None.
        fake_times: Times at which the fake score is trained; EDM's if None.
        kwargs: See `ScoreDistiller`.
    """

    reference = Reference(
        title="Score identity Distillation: Exponentially Fast Distillation of Pretrained Diffusion Models for "
        "One-Step Generation",
        authors="Zhou, Zheng, Wang, Yin, Huang",
        year=2024,
        arxiv="2404.04057",
    )

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        steps: Sequence[float] = (2.5,),
        alpha: float = 1.2,
        scale: float = 100.0,
        student_times: TimeSampler | None = None,
        fake_times: TimeSampler | None = None,
        **kwargs: Any,
    ) -> None:
        times = student_times if student_times is not None else Karras(0.0, 0.8)
        fake_times = fake_times if fake_times is not None else LogNormal(-1.2, 1.2)
        super().__init__(student, teacher, steps, student_times=times, fake_times=fake_times, **kwargs)
        if scale <= 0:
            raise UsageError(f"model.scale is {scale}; give more than 0")
        self.alpha = alpha
        self.scale = scale

    def student_gradient(self, sample: Sample, condition: Condition, draws: Draws) -> Float[Tensor, "b *sample"]:
        """The loss's own gradient, which `surrogate_loss` divides by the number of elements."""
        x0 = sample.x0.detach().requires_grad_(True)
        t = self.student_times(len(x0), self.path, draws)
        x_t = self.path.add_noise(x0, draws.normal(x0.shape).to(x0), t)
        teacher = guided(self.teacher, x_t, t, condition, self.guidance)
        loss = sid_loss(x0, self.fake(x_t, t, condition), teacher, alpha=self.alpha)
        (gradient,) = torch.autograd.grad(self.scale * loss, x0)
        finite = gradient.flatten(1).isfinite().all(1).reshape(-1, *(1,) * (x0.ndim - 1))
        return torch.where(finite, gradient * x0.numel(), 0.0)
