"""Diff-Instruct."""

from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from lit_distill.core.reference import Reference
from lit_distill.diffusion.denoiser import Denoiser
from lit_distill.diffusion.distillation import ScoreDistiller
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.losses import score_gradient
from lit_distill.diffusion.networks import Condition
from lit_distill.diffusion.rollout import Sample


class DiffInstruct(ScoreDistiller):
    r"""Descends the integral over noise levels of w(t) KL(generated || real); no normalization, no data.

    .. math:: g = w(t) \, (s_{fake}(x_t) - s_{real}(x_t)) \, \frac{\partial x_t}{\partial x},
        \qquad \frac{\partial x_t}{\partial x} = \alpha

    Args:
        student: The generator.
        teacher: The frozen denoiser.
        weight: w: "one", "sigma2" (sigma^2), or "sigma2_over_alpha2", with which g is the difference of the estimates
            of the data.
        kwargs: See `ScoreDistiller`.
    """

    reference = Reference(
        title="Diff-Instruct: A Universal Approach for Transferring Knowledge From Pre-trained Diffusion Models",
        authors="Luo, Hu, Zhang, Sun, Li, Zhang",
        year=2023,
        arxiv="2305.18455",
    )

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        *args: Any,
        weight: Literal["one", "sigma2", "sigma2_over_alpha2"] = "sigma2",
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, *args, **kwargs)
        self.weight = weight

    def student_gradient(self, sample: Sample, condition: Condition, draws: Draws) -> Float[Tensor, "b *sample"]:
        """The weighted difference of scores, without a normalizer."""
        x_t, t = self.noised(sample.x0, self.student_times, draws)
        fake, teacher = self.scores(x_t, t, condition)
        alpha, sigma, _, _ = self.path.at(t, x_t)
        # alpha (s_fake - s_real) = (alpha / sigma)^2 (D_fake - D_real)
        factor = {"one": (alpha / sigma) ** 2, "sigma2": alpha**2, "sigma2_over_alpha2": alpha**0}[self.weight]
        return score_gradient(sample.x0, fake, teacher, weight=factor.float(), normalize=False)
