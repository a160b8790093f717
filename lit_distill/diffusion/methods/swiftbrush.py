"""SwiftBrush: variational score distillation of a one-step generator, without images."""

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
from lit_distill.diffusion.fake import FakeScore, LoRA
from lit_distill.diffusion.losses import denoising_loss, variational_score_gradient
from lit_distill.diffusion.networks import Condition
from lit_distill.diffusion.rollout import Sample

_FINE = 2**24  # in how many parts chances are drawn


class SwiftBrush(ScoreDistiller):
    r"""Text-to-3D's variational score distillation, with a generator where the 3-D scene was.

    .. math:: g = \sigma_t^2 \, (\epsilon_{real} - \epsilon_{fake}), \qquad
        L_{fake} = E \, \lVert \alpha_t \epsilon_{fake}(x_t, y') - \alpha_t \epsilon \rVert^2

    The fake score is a LoRA on the teacher. Both are guided with the same scale, so the fake score must know "no
    condition", too: y' is that for the whole batch, with a chance of `condition_dropout`. No real image is used; of
    data with images, their number alone counts.

    alpha and sigma are those of a path that preserves the variance; on other paths, those of such a path at equal
    noise. The generator starts from sigma eps, the paper's from eps: at the last time of Stable Diffusion sigma is
    0.998.

    Args:
        student: The generator.
        teacher: The frozen denoiser.
        steps: Time of the generator's step.
        guidance: Guidance scale of teacher and fake score; 1 for none.
        fake: The fake score; `LoRA` on all layers if None.
        condition_dropout: Chance that a batch of the fake score has no conditions.
        kwargs: See `ScoreDistiller`.

    Raises:
        UsageError: `condition_dropout` is no probability.
    """

    reference = Reference(
        title="SwiftBrush: One-Step Text-to-Image Diffusion Model with Variational Score Distillation",
        authors="Nguyen, Tran",
        year=2023,
        arxiv="2312.05239",
    )

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        steps: Sequence[float],
        guidance: float = 4.5,
        fake: FakeScore | None = None,
        condition_dropout: float = 0.1,
        **kwargs: Any,
    ) -> None:
        fake = fake if fake is not None else LoRA()
        super().__init__(student, teacher, steps, guidance=guidance, fake=fake, **kwargs)
        if not 0 <= condition_dropout <= 1:
            raise UsageError(f"model.condition_dropout is {condition_dropout}; give a probability, 0 to 1")
        self.condition_dropout = condition_dropout

    def guidance_scale(self, count: int, draws: Draws) -> float | Tensor:
        """Returns the guidance scale of this iteration, one for all or (B,)."""
        return self.guidance

    def student_gradient(self, sample: Sample, condition: Condition, draws: Draws) -> Float[Tensor, "b *sample"]:
        """The difference of the two guided predictions of the noise."""
        x_t, t = self.noised(sample.x0, self.student_times, draws)
        scale = self.guidance_scale(len(x_t), draws)
        with torch.no_grad():
            fake = guided(self.fake, x_t, t, condition, scale, "eps")
            teacher = guided(self.teacher, x_t, t, condition, scale, "eps", null=self.away_from(condition))
        sigma = self._preserving(t)[1].reshape(-1, *(1,) * (x_t.ndim - 1))
        return variational_score_gradient(fake, teacher, sigma=sigma.float())

    def away_from(self, condition: Condition) -> Condition:
        """Returns what the teacher is guided away from; its own "no condition" if None."""
        return None

    def fake_loss(self, sample: Sample, condition: Condition, draws: Draws) -> Tensor:
        """Denoises the generated samples, now and then without their conditions."""
        x_t, t = self.noised(sample.x0, self.fake_times, draws)
        if condition is not None and draws.shared_integer(_FINE) < self.condition_dropout * _FINE:
            condition = self.fake.null_condition(condition)
        alpha, sigma = self._preserving(t)
        # alpha (eps_fake - eps) = -alpha^2 / sigma (D_fake - x)
        return denoising_loss(self.fake(x_t, t, condition), sample.x0, alpha**4 / sigma**2)

    def _preserving(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns alpha and sigma (B,) of a path with alpha^2 + sigma^2 = 1 at the noise of these times."""
        alpha, sigma, _, _ = self.path.at(t)
        length = (alpha.square() + sigma.square()).sqrt()
        return alpha / length, sigma / length
