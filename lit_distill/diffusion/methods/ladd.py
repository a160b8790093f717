"""LADD: latent adversarial distillation, with the teacher's own features as discriminator."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_distill.core.errors import UsageError, check_least
from lit_distill.core.reference import Reference
from lit_distill.core.taps import FeatureTaps
from lit_distill.diffusion.adversarial import AdversarialDistiller
from lit_distill.diffusion.denoiser import Denoiser, joined
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.heads import Discriminator
from lit_distill.diffusion.losses import GANKind, approximate_r1, gan_loss, generator_gan_loss
from lit_distill.diffusion.networks import Condition
from lit_distill.diffusion.rollout import Sample
from lit_distill.diffusion.times import TimeSampler, Uniform


class LADD(AdversarialDistiller):
    r"""A GAN on noised samples: heads h on the frozen teacher's features T, and no distillation term.

    .. math:: L_D = E[\zeta(h(T(y_{fake}))) + \zeta(-h(T(y_{real})))] + \gamma R, \qquad
        L_G = E[\zeta(-h(T(y_{fake})))], \qquad
        R = E \big( h(T(y_{real})) - h(T(y'_{real})) \big)^2

    y are samples with noise of a random level, and y' has the same noise on a real sample that was shaken. The form of
    loss and R is that of public code of others; the paper's code was not published.

    Args:
        student: The generator.
        teacher: The frozen denoiser.
        steps: Times of the generator's steps, see `AdversarialDistiller`.
        taps: Modules of the teacher that heads see, such as "network.mid_block".
        gan_kind: Which GAN, see `gan_loss`.
        gan_times: Times of the noise on what the heads see.
        r1_weight: gamma; 0 for none.
        r1_std: Standard deviation of the noise that shakes a sample.
        kwargs: See `AdversarialDistiller`.
    """

    reference = Reference(
        title="Fast High-Resolution Image Synthesis with Latent Adversarial Diffusion Distillation",
        authors="Sauer, Boesel, Dockhorn, Blattmann, Esser, Rombach",
        year=2024,
        arxiv="2403.12015",
        reconstruction=True,
    )

    head: Discriminator

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        steps: Sequence[float],
        taps: Sequence[str],
        gan_kind: GANKind = "ns",
        gan_times: TimeSampler | None = None,
        r1_weight: float = 0.0,
        r1_std: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, steps, **kwargs)
        if not taps:
            raise UsageError("model.taps: none are given; name modules of the teacher, such as network.mid_block")
        check_least("model", 0, r1_weight=r1_weight, r1_std=r1_std)
        self.taps = list(taps)
        self.gan_kind = gan_kind
        self.gan_times = gan_times if gan_times is not None else Uniform(0.0, 1.0)
        self.r1_weight, self.r1_std = r1_weight, r1_std

    def build(self) -> None:
        """Makes the heads."""
        super().build()
        example = self.classes_of(torch.zeros(2, dtype=torch.long, device=self.device))
        self.head = Discriminator(self.teacher, self.taps, tuple(self._data().sample_shape), example)

    def student_terms(self, sample: Sample, real: Tensor, condition: Condition, draws: Draws) -> Mapping[str, Tensor]:
        """The generator's side of the GAN."""
        generated, real_logits = self.logits(*self.noisy(sample.x0, draws), condition), None
        if self.gan_kind == "rpgan":
            with torch.no_grad():
                real_logits = self.logits(*self.noisy(real, draws), condition)
        return {"gan": generator_gan_loss(generated, real_logits, kind=self.gan_kind)}

    def head_terms(self, made: Tensor, real: Tensor, condition: Condition, draws: Draws) -> Mapping[str, Tensor]:
        """The heads' side, generated and real samples in one batch."""
        count = len(made)
        times = [self.gan_times(count, self.path, draws) for _ in range(2)]
        noises = [draws.normal(made.shape).to(made) for _ in range(2)]
        samples, conditions = [made, real], joined(condition, condition)
        if self.r1_weight:
            samples.append(real + self.r1_std * draws.normal(real.shape).to(real))
            times.append(times[1])
            noises.append(noises[1])
            conditions = joined(conditions, condition)
        t = torch.cat(times)
        x_t = self.path.add_noise(torch.cat(samples), torch.cat(noises), t)
        generated, true, *shaken = self.logits(x_t, t, conditions).split(count)
        terms = {"discriminator": gan_loss(generated, true, kind=self.gan_kind)}
        if shaken:
            terms["r1"] = self.r1_weight * approximate_r1(true, shaken[0])
        return terms

    def noisy(self, x0: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Returns samples with noise of random times, with gradients to them, and the times."""
        t = self.gan_times(len(x0), self.path, draws)
        return self.path.add_noise(x0, draws.normal(x0.shape).to(x0), t), t

    def logits(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Returns the heads' logits (B, heads) of noisy samples."""
        return self.head(FeatureTaps(self.teacher, self.taps).features(x_t, t, condition))
