"""Decoupled DMD: guidance and distribution matching as two terms, each at noise levels of its own."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lit_distill.core.errors import UsageError, check_least
from lit_distill.core.reference import Reference
from lit_distill.diffusion.denoiser import Denoiser, joined
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.losses import mean_variance_kl, score_gradient
from lit_distill.diffusion.methods.dmd2 import DMD2
from lit_distill.diffusion.networks import Condition
from lit_distill.diffusion.paths import GaussianPath
from lit_distill.diffusion.rollout import Sample
from lit_distill.diffusion.times import TimeSampler, Uniform

Regularizer = Literal["dm", "meanvar", "gan"]


class DecoupledDMD(DMD2):
    r"""A guided DMD gradient is two things: guidance, which makes few steps suffice, and matching, which keeps it sane.

    With D_c, D_u the teacher with and without its condition, F the fake score, w the guidance scale (the paper's
    alpha), x the generator's sample:

    .. math:: g = \lambda_{DM} \frac{F(x_{\tau}) - D_c(x_{\tau})}{n_{DM}}
        - \lambda_{CA} (w - 1) \frac{D_c(x_{\tau'}) - D_u(x_{\tau'})}{n_{CA}}, \qquad
        n = \operatorname{mean} |x - D_c|

    The first term is distribution matching (DM), the second what guidance adds (CA). Each has noise of its own, at a
    time of its own. With one time, one noise and one n they add up to the gradient of DMD2 with guidance w; with w = 1
    the second is nothing.

    Where the generator was given its input at time t, the hybrid schedule takes tau' in (0, t), cleaner than that
    input, and tau anywhere. (The paper counts time from noise to data: tau' > t there.)

    Something must hold CA, which alone drives samples ever further. That is DM, or one of two others:

    - "meanvar": mean and variance of each sample are drawn to given ones, see `mean_variance_kl`. The fake score is
      then not used, nor trained.
    - "gan": the discriminator of `DMD2`, which needs real data; unstable, says the paper.

    The paper's code is not public: constants, the two normalizers and the floor of 0.1 under both follow summaries and
    another's trainer of the same two terms.

    Args:
        student: The generator.
        teacher: The frozen denoiser, which must know "no condition".
        steps: Times of the generator's steps. With one, the hybrid schedule is no restriction.
        guidance: w.
        regularizer: What holds the CA term: "dm", "meanvar", "gan".
        dm_weight: Weight of the DM term.
        ca_weight: Weight of the CA term.
        student_times: tau.
        ca_times: tau', drawn for the whole path; with `hybrid` it is then scaled down to (0, t).
        hybrid: Keep tau' below the time of the generator's input.
        floor: Smallest n.
        mean: Mean of a sample for "meanvar"; the default is that for latents of SDXL.
        variance: Variance of a sample for "meanvar", likewise.
        meanvar_weight: Weight of that term.
        kwargs: See `DMD2` and `ScoreDistiller`.
    """

    reference = Reference(
        title="Decoupled DMD: CFG Augmentation as the Spear, Distribution Matching as the Shield",
        authors="Liu et al.",
        year=2025,
        arxiv="2511.22677",
        reconstruction=True,
    )

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        steps: Sequence[float],
        guidance: float = 4.5,
        regularizer: Regularizer = "dm",
        dm_weight: float = 1.0,
        ca_weight: float = 1.0,
        student_times: TimeSampler | None = None,
        ca_times: TimeSampler | None = None,
        hybrid: bool = True,
        floor: float = 0.1,
        mean: float = 0.075,
        variance: float = 0.81,
        meanvar_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, steps, guidance=guidance, student_times=student_times, **kwargs)
        check_least("model", 0, dm_weight=dm_weight, ca_weight=ca_weight, meanvar_weight=meanvar_weight)
        if variance <= 0 or floor <= 0:
            key, value = ("variance", variance) if variance <= 0 else ("floor", floor)
            raise UsageError(f"model.{key} is {value}; it must be above 0")
        if (regularizer == "gan") != bool(self.taps):
            raise UsageError(
                f"model.regularizer is '{regularizer}' and model.taps are {self.taps}; 'gan' needs taps of the fake "
                "score, and the others none"
            )
        self.regularizer = regularizer
        self.dm_weight = dm_weight
        self.ca_weight = ca_weight
        self.ca_times = ca_times if ca_times is not None else Uniform(0.02, 0.98)
        self.hybrid = hybrid
        self.floor = floor
        self.mean, self.variance = mean, variance
        self.meanvar_weight = meanvar_weight

    def student_gradient(self, sample: Sample, condition: Condition, draws: Draws) -> Float[Tensor, "b *sample"]:
        """The DM term, where that is what holds the CA term, and the CA term, each with its own time and noise."""
        gradient = torch.zeros_like(sample.x0)
        if self.regularizer == "dm" and self.dm_weight:
            x_t, t = self.noised(sample.x0, self.student_times, draws)
            with torch.no_grad():
                fake, teacher = self.fake(x_t, t, condition), self.teacher(x_t, t, condition)
            gradient = gradient + self.dm_weight * score_gradient(sample.x0, fake, teacher, floor=self.floor)
        if self.guidance != 1.0 and self.ca_weight:
            t = self.ca_time(sample.t, draws)
            x_t = self.path.add_noise(sample.x0.detach(), draws.normal(sample.x0.shape).to(sample.x0), t)
            given, none = self._with_and_without(x_t, t, condition)
            # From what the teacher says without the condition to what it says with it.
            augmentation = score_gradient(sample.x0, none, given, weight=self.guidance - 1, floor=self.floor)
            gradient = gradient + self.ca_weight * augmentation
        return gradient

    def extra_student_loss(
        self, sample: Sample, condition: Condition, batch: Any, draws: Draws
    ) -> Mapping[str, Tensor]:
        """Mean and variance, or the generator's side of the GAN, where that is what holds the CA term."""
        if self.regularizer != "meanvar":
            return super().extra_student_loss(sample, condition, batch, draws)
        divergence = mean_variance_kl(sample.x0, mean=self.mean, variance=self.variance)
        return {"meanvar": self.meanvar_weight * divergence}

    def fake_loss(self, sample: Sample, condition: Condition, draws: Draws) -> Tensor:
        """Denoises the generated samples, unless nobody asks the fake score."""
        if self.regularizer == "meanvar":
            return sample.x0.new_zeros((), requires_grad=True)  # of no parameter: the optimizer moves none
        return super().fake_loss(sample, condition, draws)

    def ca_time(self, t: Float[Tensor, " b"], draws: Draws) -> Float[Tensor, " b"]:
        """Draws tau' for inputs of the generator at t; below t, where the schedule is hybrid."""
        drawn = self.ca_times(len(t), self.path, draws)
        if not self.hybrid:
            return drawn
        # What was drawn for the whole path is scaled down in the time of a flow, whatever the path.
        share = _flow_time(self.path, drawn) / _flow_time(self.path, self.path.t_max)
        scaled = share.clamp(max=1 - 1e-6) * _flow_time(self.path, t)
        tau = self.path.t_from_r(scaled / (1 - scaled))
        return tau.floor() if self.path.discrete else tau.clamp(min=self.path.t_min)

    @torch.no_grad()
    def _with_and_without(self, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        none = self.teacher.null_condition(condition)
        out = self.teacher(torch.cat([x_t, x_t]), torch.cat([t, t]), joined(condition, none))
        given, unconditional = out.chunk(2)
        return given, unconditional


def _flow_time(path: GaussianPath, t: Tensor | float) -> Tensor:
    """Time of a flow with the same noise: r / (1 + r)."""
    found = path.at(t)
    return found.sigma / (found.alpha + found.sigma)
