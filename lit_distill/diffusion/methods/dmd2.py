"""DMD2: distribution matching with a discriminator on real data, and a fake score that keeps up."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lit_distill.core.errors import UsageError
from lit_distill.core.reference import Reference
from lit_distill.core.taps import FeatureTaps
from lit_distill.diffusion.denoiser import Denoiser, joined
from lit_distill.diffusion.distillation import ScoreDistiller
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.heads import Discriminator
from lit_distill.diffusion.losses import GANKind, gan_loss, generator_gan_loss
from lit_distill.diffusion.networks import Condition
from lit_distill.diffusion.rollout import Sample
from lit_distill.diffusion.times import TimeSampler, Uniform

_PUBLISHED_WEIGHT, _PUBLISHED_SIZE = 3e-3, 3 * 64 * 64  # ImageNet-64


class DMD2(ScoreDistiller):
    r"""DMD without pairs: several steps of the fake score for one of the student, and a discriminator on real data.

    The discriminator is a head on what the fake score computes inside of noised samples, generated and real:

    .. math:: L_D = w_D \, E[\zeta(h(F(y_{fake}))) + \zeta(-h(F(y_{real})))], \qquad
        L_G = w_G \, E[\zeta(-h(F(y_{fake})))], \qquad \zeta = \text{softplus}

    L_D trains the fake score, too: the two have one optimizer. As the distribution matching loss is a mean over the D
    numbers of a sample and L_G is not, w_G goes with 1 / D.

    Args:
        student: The generator.
        teacher: The frozen denoiser.
        steps: Times of the generator's steps, see `ScoreDistiller`.
        fake_updates: Steps of the fake score for one of the student.
        taps: Modules of the fake score (or teacher) that the discriminator sees, such as "network.mid_block"; none
            turns it off.
        gan_weight: w_G; 0.003 * 12288 / D if None, which is the published 0.003 on 3 x 64 x 64.
        discriminator_weight: w_D.
        gan_kind: Which GAN, see `gan_loss`.
        gan_times: Times of the noise on what the discriminator sees.
        features: Whose inside the discriminator sees: that of "fake" (the paper), or of the frozen "teacher".
        kwargs: See `ScoreDistiller`.
    """

    reference = Reference(
        title="Improved Distribution Matching Distillation for Fast Image Synthesis",
        authors="Yin, Gharbi, Park, Zhang, Shechtman, Durand, Freeman",
        year=2024,
        arxiv="2405.14867",
    )

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        steps: Sequence[float],
        fake_updates: int = 5,
        taps: Sequence[str] = (),
        gan_weight: float | None = None,
        discriminator_weight: float = 1e-2,
        gan_kind: GANKind = "ns",
        gan_times: TimeSampler | None = None,
        features: Literal["fake", "teacher"] = "fake",
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, steps, fake_updates=fake_updates, **kwargs)
        for key, value in (("gan_weight", gan_weight), ("discriminator_weight", discriminator_weight)):
            if value is not None and value < 0:
                raise UsageError(f"model.{key} is {value}; it must be 0 or more")
        self.taps = list(taps)
        self.gan_weight = gan_weight
        self.discriminator_weight = discriminator_weight
        self.gan_kind = gan_kind
        self.gan_times = gan_times if gan_times is not None else Uniform(0.0, 1.0)
        self.features = features

    def build(self) -> None:
        """Makes fake score and discriminator."""
        super().build()
        shape = tuple(self._data().sample_shape)
        if self.gan_weight is None:
            self.gan_weight = _PUBLISHED_WEIGHT * _PUBLISHED_SIZE / math.prod(shape)
        if self.taps and self.gan_weight:
            self.head = Discriminator(self._critic(), self.taps, shape, self.example_condition(2))
        elif self.gan_weight and not self.taps:
            self.gan_weight = 0.0

    def extra_student_loss(
        self, sample: Sample, condition: Condition, batch: Any, draws: Draws
    ) -> Mapping[str, Tensor]:
        """The generator's side of the GAN."""
        if self.head is None:
            return {}
        assert self.gan_weight is not None
        generated = self.logits(*self._noisy(sample.x0, draws), condition)
        real_logits = None
        if self.gan_kind == "rpgan":
            real, real_condition = self.real(batch)
            with torch.no_grad():
                real_logits = self.logits(*self._noisy(real, draws), real_condition)
        return {"gan": self.gan_weight * generator_gan_loss(generated, real_logits, kind=self.gan_kind)}

    def extra_fake_loss(self, sample: Sample, condition: Condition, batch: Any, draws: Draws) -> Mapping[str, Tensor]:
        """The discriminator's side, generated and real samples in one batch."""
        if self.head is None:
            return {}
        real, real_condition = self.real(batch)
        # Noise is drawn for each on its own, so that it is the same on any number of processes.
        pairs = zip(self._noisy(sample.x0, draws), self._noisy(real, draws), strict=True)
        x_t, t = (torch.cat(pair) for pair in pairs)
        generated, true = self.logits(x_t, t, joined(condition, real_condition)).chunk(2)
        return {"discriminator": self.discriminator_weight * gan_loss(generated, true, kind=self.gan_kind)}

    def logits(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Returns the discriminator's logits (B, heads) of noisy samples, with gradients to them."""
        assert isinstance(self.head, Discriminator)
        return self.head(FeatureTaps(self._critic(), self.head.taps).features(x_t, t, condition))

    def _noisy(self, x0: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        t = self.gan_times(len(x0), self.path, draws)
        return self.path.add_noise(x0, draws.normal(x0.shape).to(x0), t), t

    def _critic(self) -> Denoiser:
        return self.fake if self.features == "fake" else self.teacher
