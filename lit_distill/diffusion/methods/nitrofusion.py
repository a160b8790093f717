"""NitroFusion: dynamic adversarial distillation of a multi-step generator, with a pool of discriminators."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_distill.core.errors import UsageError, check_least
from lit_distill.core.reference import Reference
from lit_distill.core.taps import FeatureTaps
from lit_distill.diffusion.adversarial import AdversarialDistiller
from lit_distill.diffusion.denoiser import Denoiser, joined
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.losses import GANKind, gan_loss, generator_gan_loss
from lit_distill.diffusion.networks import Condition
from lit_distill.diffusion.pool import KINDS, DiscriminatorPool, HeadKind, due
from lit_distill.diffusion.rollout import FewStepRollout, Sample
from lit_distill.diffusion.samplers import Renoise


class NitroFusion(AdversarialDistiller):
    r"""A pure GAN against samples of a multi-step teacher; heads of a large pool judge, some of which are always new.

    .. math:: L_D = E \sum_H \max(0, 1 + H(f_{fake})) + \max(0, 1 - H(f_{real})), \qquad L_G = -E \sum_H H(f_{fake})

    f are features of the frozen teacher on noised samples. The paper's losses are linear in H, and so not bounded:
    `gan_kind="linear"`; "hinge" is ours. Sums over heads are means here.

    In each iteration one of the noise levels is drawn, and a few heads of each kind: global ones see the sample with
    its condition, local ones a crop, local unconditional ones a crop without condition. A crop is cut before noise
    comes on it, and brought back to the sample's size, which all networks take. Generator and heads are trained on the
    same heads. Then a share of the pool is drawn anew, and the optimizer forgets those.

    The number of steps grows: after each `stage_iterations` the next of `schedules` comes in, and each iteration draws
    one of those that are in. The training code was not published; drawing a level, drawing a schedule and the form of
    crops are ours.

    Args:
        student: The generator; it begins as a one-step model, or as the teacher.
        teacher: The frozen multi-step teacher, whose inside is the encoder, too.
        schedules: For 1, 2, ... steps: their times, from noisy to clean.
        taps: Modules of the teacher that heads see.
        stage_iterations: Iterations of a stage.
        noise_times: Times of the noise on what heads see.
        pool_size: Heads in the pool.
        heads: Heads of each kind in an iteration.
        refresh: Share of the pool that is drawn anew in each iteration.
        crop: Height and width of a crop, as a share of the sample's.
        gan_kind: Which GAN, see `gan_loss`.
        teacher_samples: Samples of the teacher, which are "real".
        kwargs: See `AdversarialDistiller`.
    """

    reference = Reference(
        title="NitroFusion: High-Fidelity Single-Step Diffusion through Dynamic Adversarial Training",
        authors="Chen, Bandyopadhyay, Zou, Song",
        year=2024,
        arxiv="2412.02030",
        reconstruction=True,
    )

    head: DiscriminatorPool

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        schedules: Sequence[Sequence[float]],
        taps: Sequence[str],
        noise_times: Sequence[float],
        stage_iterations: int = 1000,
        pool_size: int = 480,
        heads: int = 3,
        refresh: float = 0.01,
        crop: float = 0.5,
        gan_kind: GANKind = "hinge",
        teacher_samples: int = 4000,
        **kwargs: Any,
    ) -> None:
        if not schedules:
            raise UsageError("model.schedules: none are given; give the times of one step, such as [[250.0]]")
        # Samples on the way are the generator's own: the teacher's are never noised for it.
        kwargs = {"inputs": "simulate", **kwargs}
        super().__init__(student, teacher, schedules[-1], teacher_samples=teacher_samples, **kwargs)
        check_least("model", 1, stage_iterations=stage_iterations, heads=heads)
        if not taps or not noise_times:
            raise UsageError("model.taps and model.noise_times: give one of each, or more")
        for key, value in (("refresh", refresh), ("crop", crop)):
            if not 0 <= value <= 1:
                raise UsageError(f"model.{key} is {value}; it is a share, between 0 and 1")
        if gan_kind == "rpgan":
            raise UsageError("model.gan_kind: rpgan compares pairs, of which there are none; take hinge, ns or linear")
        self.rollouts = [FewStepRollout(steps, student.path, self.rollout.inputs) for steps in schedules]
        self.sampler = Renoise(self.rollouts[-1].steps)
        self.stage_iterations = stage_iterations
        self.taps = list(taps)
        self.noise_times = [float(t) for t in noise_times]
        self.pool_size = pool_size
        self.heads = heads
        self.refresh = refresh
        self.crop = crop
        self.gan_kind = gan_kind

    def build(self) -> None:
        """Makes the pool."""
        super().build()
        if self.refresh and self.device_mesh is not None:
            raise UsageError("model.refresh: sharded heads cannot be drawn anew; take DDP, or refresh 0")
        example = self.classes_of(torch.zeros(2, dtype=torch.long, device=self.device))
        sample = torch.zeros(2, *self._data().sample_shape, device=self.device)
        with torch.no_grad():
            found = FeatureTaps(self.teacher, self.taps).features(sample, self.noise_times[0], example)
        shapes = {tap: tuple(feature.shape[1:]) for tap, feature in found.items()}
        self.head = DiscriminatorPool(self.pool_size, self.noise_times, shapes)

    @property
    def stage(self) -> int:
        """Which schedule came in last, from 0."""
        return min(self.iteration // self.stage_iterations, len(self.rollouts) - 1)

    def student_forward(self, real: Tensor, condition: Condition, draws: Draws) -> Sample:
        """Makes the samples of this iteration, by one of the schedules that are in."""
        chosen = draws.shared_integer(self.stage + 1) if self.stage else 0
        return self.rollouts[chosen](self.student, draws.normal(real.shape).to(real), condition, draws, real)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Takes the steps, and refreshes the pool."""
        super().training_step(batch, batch_idx)
        count = due(self.iteration, self.refresh, self.pool_size)
        if count:
            _, optimizer = self.optimizers(use_pl_optimizer=False)  # type: ignore[misc]  # there are two
            self.head.refresh(count, optimizer, self.draws("refresh"))

    def student_terms(self, sample: Sample, real: Tensor, condition: Condition, draws: Draws) -> Mapping[str, Tensor]:
        """The generator's side of the GAN."""
        logits = self.logits([sample.x0], condition, draws)
        return {"gan": torch.stack([generator_gan_loss(own, kind=self.gan_kind) for own in logits]).mean()}

    def head_terms(self, made: Tensor, real: Tensor, condition: Condition, draws: Draws) -> Mapping[str, Tensor]:
        """The heads' side, generated and real samples in one batch."""
        both = self.logits([made, real], joined(condition, condition), draws)
        losses = [gan_loss(*own.chunk(2), kind=self.gan_kind) for own in both]
        return {"discriminator": torch.stack(losses).mean()}

    def logits(self, parts: Sequence[Tensor], condition: Condition, draws: Draws) -> list[Tensor]:
        """Returns the logits (B, heads) of each kind of the heads that judge in this iteration, parts together."""
        judges = self.draws("judges")  # the same for the generator and for the heads
        t = self.noise_times[judges.shared_integer(len(self.noise_times))]
        return [
            self.head(self.features(parts, t, kind, condition, draws), self.head.sample(self.heads, t, kind, judges))
            for kind in KINDS
        ]

    def features(
        self, parts: Sequence[Tensor], t: float, kind: HeadKind, condition: Condition, draws: Draws
    ) -> Mapping[str, Tensor]:
        """Returns what the teacher computes of noised samples, or of crops."""
        x0 = torch.cat(list(parts))
        if kind != "global":
            x0 = self.cropped(x0, draws)
        if kind == "local_unconditional" and condition is not None:
            condition = self.teacher.null_condition(condition)
        # Noise is drawn for each part on its own, so that it is the same on any number of processes.
        noise = torch.cat([draws.normal(part.shape).to(part) for part in parts])
        x_t = self.path.add_noise(x0, noise, t)
        return FeatureTaps(self.teacher, self.taps).features(x_t, t, condition)

    def cropped(self, x0: Tensor, draws: Draws) -> Tensor:
        """Returns one square of all samples (B, C, H, W), as large as they were."""
        size = [max(1, round(self.crop * side)) for side in x0.shape[-2:]]
        top, left = (draws.shared_integer(side - own + 1) for side, own in zip(x0.shape[-2:], size, strict=True))
        part = x0[..., top : top + size[0], left : left + size[1]]
        return F.interpolate(part, x0.shape[-2:], mode="bilinear", align_corners=False)
