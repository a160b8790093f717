"""ADD: adversarial distillation with a discriminator on features of images, and a distillation term."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_distill.core.errors import UsageError, check_least
from lit_distill.core.reference import Reference
from lit_distill.core.taps import FeatureTaps, probe
from lit_distill.diffusion.adversarial import AdversarialDistiller
from lit_distill.diffusion.denoiser import Denoiser, guided
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.losses import gan_loss, generator_gan_loss
from lit_distill.diffusion.networks import Condition
from lit_distill.diffusion.projection import ProjectionDiscriminator, exact_r1
from lit_distill.diffusion.rollout import Sample
from lit_distill.diffusion.times import TimeSampler, Uniform


class ADD(AdversarialDistiller):
    r"""A hinge GAN on features f of a frozen image network, and the teacher's opinion of noised samples.

    .. math:: L_D = E[\max(0, 1 + h(f(x))) + \max(0, 1 - h(f(x_{real})))]
        + \tfrac{\gamma}{2} E \lVert \nabla_f h(f(x_{real})) \rVert^2

    .. math:: L_G = -E[h(f(x))] + \lambda \, E \; c(t) \, \lVert x - \hat x_0(\operatorname{sg}(x)_t) \rVert^2 / D

    c(t) is alpha of the variance-preserving path with the same noise, so that noisy opinions count less. R1 is taken at
    the heads' inputs, as the paper does. The heads know the class by projection. The constants are from memory.

    Args:
        student: The generator.
        teacher: The frozen denoiser.
        steps: Times of the generator's steps, see `AdversarialDistiller`.
        image_network: The frozen network, given samples as they are: one that decodes latents, resizes and normalizes
            does it inside.
        image_taps: Modules of it that heads see.
        distillation_weight: lambda; 0 for none.
        distillation_times: Times at which the teacher is asked.
        r1_weight: gamma; 0 for none.
        kwargs: See `AdversarialDistiller`.
    """

    reference = Reference(
        title="Adversarial Diffusion Distillation",
        authors="Sauer, Lorenz, Blattmann, Rombach",
        year=2023,
        arxiv="2311.17042",
        reconstruction=True,
    )
    frozen = ("teacher", "image_network")

    head: ProjectionDiscriminator

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        steps: Sequence[float],
        image_network: nn.Module,
        image_taps: Sequence[str],
        distillation_weight: float = 2.5,
        distillation_times: TimeSampler | None = None,
        r1_weight: float = 1e-5,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, steps, **kwargs)
        if not image_taps:
            raise UsageError("model.image_taps: none are given; name modules of image_network")
        check_least("model", 0, distillation_weight=distillation_weight, r1_weight=r1_weight)
        self.image_network = image_network
        self.image_taps = list(image_taps)
        self.distillation_weight = distillation_weight
        self.distillation_times = distillation_times if distillation_times is not None else Uniform(0.02, 0.98)
        self.r1_weight = r1_weight

    def build(self) -> None:
        """Makes the heads."""
        super().build()
        _, shapes = probe(self.image_network, self._data().sample_shape, self.image_taps)
        self.head = ProjectionDiscriminator(shapes, self.student.num_classes or 0)

    def student_terms(self, sample: Sample, real: Tensor, condition: Condition, draws: Draws) -> Mapping[str, Tensor]:
        """The generator's side of the GAN, and the distillation term."""
        logits = self.head(self.features(sample.x0), self.labels(condition))
        terms = {"gan": generator_gan_loss(logits, kind="hinge")}
        if self.distillation_weight:
            terms["distillation"] = self.distillation_weight * self.distil(sample.x0, condition, draws)
        return terms

    def distil(self, x0: Tensor, condition: Condition, draws: Draws) -> Tensor:
        """Returns the weighted mean square to what the teacher makes of the noised samples, which is detached."""
        t = self.distillation_times(len(x0), self.path, draws)
        with torch.no_grad():
            x_t = self.path.add_noise(x0, draws.normal(x0.shape).to(x0), t)
            target = guided(self.teacher, x_t, t, condition, self.guidance)
        weight = (1 + self.path.r(t).square()).rsqrt().to(x0)
        return (weight * (x0 - target).square().flatten(1).mean(1)).mean()

    def head_terms(self, made: Tensor, real: Tensor, condition: Condition, draws: Draws) -> Mapping[str, Tensor]:
        """The heads' side; generated and real samples go through the image network as one batch."""
        labels = self.labels(condition)
        with torch.no_grad():
            both = [feature.chunk(2) for feature in self.features(torch.cat([made, real]))]
        true = [pair[1].detach().requires_grad_(bool(self.r1_weight)) for pair in both]
        real_logits = self.head(true, labels)
        terms = {"discriminator": gan_loss(self.head([pair[0] for pair in both], labels), real_logits, kind="hinge")}
        if self.r1_weight:
            terms["r1"] = self.r1_weight * exact_r1(real_logits, true)
        return terms

    def features(self, samples: Tensor) -> list[Tensor]:
        """Returns what the image network computes, in the order of the taps, with gradients to the samples."""
        found = FeatureTaps(self.image_network, self.image_taps).features(samples)
        return [found[tap] for tap in self.image_taps]

    def labels(self, condition: Condition) -> Tensor | None:
        """Returns the classes, where conditions are classes; heads on text see no condition."""
        return condition if isinstance(condition, Tensor) else None
