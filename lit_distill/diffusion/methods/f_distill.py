"""f-distill: distribution matching along any f-divergence."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lit_distill.core.errors import UsageError, check_least
from lit_distill.core.reference import Reference
from lit_distill.core.taps import FeatureTaps
from lit_distill.diffusion.denoiser import Denoiser, guided
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.losses import Divergence, divergence_weight, score_gradient
from lit_distill.diffusion.methods.dmd2 import DMD2
from lit_distill.diffusion.networks import Condition
from lit_distill.diffusion.rollout import Sample

_LARGEST_LOGIT = 10.0


class FDistill(DMD2):
    r"""DMD2 whose samples weigh as the density ratio says: the reverse KL becomes any f-divergence.

    .. math:: g = h(r) \, g_{DMD2}, \qquad h(r) = r^2 f''(r), \qquad r = \frac{p_{real}(x_t)}{p_{fake}(x_t)} =
        e^{\text{logit}(x_t)}

    r is what the discriminator of DMD2 says of the same noisy samples, detached: its logit is clamped to 10 either way,
    r to `ratio_range`, then divided by a running mean of r at about this noise (`bins` of equal width in
    r_noise / (1 + r_noise)). h is divided by its mean over the batch. With reverse_kl it is DMD2.

    Args:
        student: The generator.
        teacher: The frozen denoiser.
        steps: Times of the generator's steps.
        divergence: f, see `divergence_weight`.
        ratio_range: Smallest and largest r.
        bins: Bins of noise for the running mean of r; 0 to leave it out.
        ratio_decay: Weight of the old mean, per step of the student.
        kwargs: See `DMD2`; it needs its discriminator, of kind "ns", whose best logit is log r.

    Raises:
        UsageError: There is no discriminator, or one whose logit is no log ratio.
    """

    reference = Reference(
        title="One-step Diffusion Models with f-Divergence Distribution Matching",
        authors="Xu, Nie, Vahdat",
        year=2025,
        arxiv="2502.15681",
    )

    ratio_means: Tensor

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        steps: Sequence[float],
        divergence: Divergence = "js",
        ratio_range: tuple[float, float] = (0.1, 20.0),
        bins: int = 10,
        ratio_decay: float = 0.99,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, steps, **kwargs)
        check_least("model", 0, bins=bins)
        if not self.taps or self.gan_weight == 0:
            raise UsageError("model.taps: f-distill takes the ratio from a discriminator; give taps and a gan_weight")
        if self.gan_kind != "ns":
            raise UsageError(f"model.gan_kind: the logit of '{self.gan_kind}' is no log ratio; give 'ns'")
        if not 0 < ratio_range[0] < ratio_range[1]:
            raise UsageError(f"model.ratio_range is {list(ratio_range)}; give two positive numbers that grow")
        if not 0 <= ratio_decay < 1:
            raise UsageError(f"model.ratio_decay is {ratio_decay}; it must be at least 0 and below 1")
        self.divergence = divergence
        self.ratio_range = ratio_range
        self.ratio_decay = ratio_decay
        self.register_buffer("ratio_means", torch.ones(bins))

    def student_gradient(self, sample: Sample, condition: Condition, draws: Draws) -> Float[Tensor, "b *sample"]:
        """DMD2's, weighted."""
        x_t, t = self.noised(sample.x0, self.student_times, draws)
        with torch.no_grad():
            if self.features == "fake":  # its score and its features come from one run
                fake, seen = FeatureTaps(self.fake, self.taps)(x_t, t, condition)
                logits = self.head(seen)  # type: ignore[misc]  # there is one, see the constructor
            else:
                fake, logits = self.fake(x_t, t, condition), self.logits(x_t, t, condition)
            teacher = guided(self.teacher, x_t, t, condition, self.guidance)
            weight = self.weight(logits, t).reshape(-1, *(1,) * (x_t.ndim - 1))
        return score_gradient(sample.x0, fake, teacher, weight=weight)

    def weight(self, logits: Float[Tensor, "b heads"], t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Returns h of each sample over its mean, and keeps the means of r."""
        ratio = logits.float().mean(1).clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT).exp().clamp(*self.ratio_range)
        if len(self.ratio_means):
            ratio = ratio / self._running_mean(ratio, t)
        weight = divergence_weight(ratio, divergence=self.divergence)
        return weight / self._mean(weight.mean())

    def _running_mean(self, ratio: Tensor, t: Tensor) -> Tensor:
        """Updates the bins of these times and returns their means, (B,)."""
        bins = len(self.ratio_means)
        alpha, sigma, _, _ = self.path.at(t)
        place = (bins * sigma / (alpha + sigma)).long().clamp(max=bins - 1)
        sums = torch.zeros(2, bins, device=ratio.device)
        total, count = self._mean(sums.index_add_(1, place, torch.stack([ratio, torch.ones_like(ratio)])))
        old = self.ratio_means
        new = self.ratio_decay * old + (1 - self.ratio_decay) * total / count.clamp(min=1e-6)
        self.ratio_means = torch.where(count > 0, new, old)
        return self.ratio_means[place]

    def _mean(self, value: Tensor) -> Tensor:
        """The mean over processes."""
        return self.trainer.strategy.reduce(value, reduce_op="mean")
