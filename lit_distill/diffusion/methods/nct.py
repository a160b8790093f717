"""NCT: new controls for one-step generators, without images and without the teacher."""

import math
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lit_distill.core.errors import UsageError, check_least
from lit_distill.core.reference import Reference
from lit_distill.diffusion.base import DiffusionDistiller
from lit_distill.diffusion.control import Adapter, ControlExtractor
from lit_distill.diffusion.denoiser import Denoiser
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.networks import Condition
from lit_distill.diffusion.paths import GaussianPath
from lit_distill.diffusion.samplers import Renoise
from lit_distill.diffusion.times import check_steps

Distance = Literal["l2", "huber"]


def noise_level(level: Int[Tensor, " b"], *, levels: int) -> Float[Tensor, " b"]:
    """Returns sin(pi k / 2N), float64: 0 at level k = 0, 1 at k = N."""
    return (level.double() * (math.pi / (2 * levels))).sin()


def diffused_noise(
    z: Float[Tensor, "b *sample"], eps: Float[Tensor, "b *sample"], sigma: Float[Tensor, " b"]
) -> Float[Tensor, "b *sample"]:
    """Returns sqrt(1 - sigma^2) z + sigma eps: standard normal again, and z itself where sigma is 0."""
    sigma = sigma.double().reshape(-1, *(1,) * (z.ndim - 1))
    return ((1 - sigma.square()).sqrt() * z + sigma * eps).to(z.dtype)


def sample_distance(
    student_x0: Float[Tensor, "b *sample"], target_x0: Float[Tensor, "b *sample"], *, kind: Distance = "l2"
) -> Tensor:
    """Returns the mean over samples of a distance: mean square ("l2"), or pseudo-Huber ("huber").

    Pseudo-Huber is sqrt(|a - b|^2 + c^2) - c with c = 0.00054 sqrt(D), of a whole sample.

    Args:
        student_x0: a (B, ...).
        target_x0: b, detached here.
        kind: Which.

    Reference: Song, Dhariwal, Improved Techniques for Training Consistency Models, 2023, arXiv 2310.14189 (c).
    """
    square = (student_x0 - target_x0.detach()).square().flatten(1)
    if kind == "l2":
        return square.mean()
    c = 0.00054 * math.sqrt(square.shape[1])
    return ((square.sum(1) + c**2).sqrt() - c).mean()


class NCT(DiffusionDistiller):
    r"""Trains an adapter so that a frozen one-step generator f follows a control c = h(f(z)).

    The input noise itself is diffused, z_k = sqrt(1 - sigma_k^2) z + sigma_k eps, from what belongs to the control to
    what is independent of it:

    .. math:: L_{con} = d(f_\phi(z_{k+1}, c), \operatorname{sg} f_\phi(z_k, c)), \qquad
        L_{bound} = d(f_\phi(z, c), f(z))

    .. math:: L = L_{con} + \lambda L_{bound}, \qquad
        \lambda \leftarrow \max(0, \lambda + \eta \, (L_{bound} - \xi))

    Alone, L_bound is met by an adapter that ignores c, and L_con by one that ignores z. sigma_k = sin(pi k / 2N), N,
    xi, eta and the form of the ascent are ours: the paper's text that was read does not say them.

    Args:
        student: The adapter, which is what is trained and kept.
        teacher: The frozen one-step generator.
        extractor: h.
        start: Time at which the generator starts.
        levels: N; 1 is a regression on independent noise, which blurs.
        distance: d, see `sample_distance`.
        multiplier: lambda at first.
        multiplier_rate: eta; 0 holds lambda.
        boundary: xi, what L_bound may be.
        kwargs: See `Distiller` and `DiffusionDistiller`.
    """

    reference = Reference(
        title="Noise Consistency Training: A Native Approach for One-Step Generator in Learning Additional Controls",
        authors="Luo, Xue, Hu, Tang",
        year=2025,
        arxiv="2506.19741",
        reconstruction=True,
    )

    student: Adapter  # type: ignore[assignment]  # the adapter is trained, and the generator is its teacher
    teacher: Denoiser
    multiplier: Tensor

    def __init__(
        self,
        student: Adapter,
        teacher: Denoiser,
        extractor: ControlExtractor,
        start: float,
        levels: int = 16,
        distance: Distance = "l2",
        multiplier: float = 1.0,
        multiplier_rate: float = 0.5,
        boundary: float = 0.01,
        **kwargs: Any,
    ) -> None:
        steps = check_steps([start], teacher.path, "model.start")
        super().__init__(teacher, teacher, sampler=Renoise(steps), **kwargs)
        self.student = student
        check_least("model", 0, multiplier=multiplier, multiplier_rate=multiplier_rate, boundary=boundary)
        check_least("model", 1, levels=levels)
        if self.sample_guidance != 1.0:
            raise UsageError("model.sample_guidance: a controlled generator has its guidance within; leave it out")
        self.extractor = extractor
        self.start = steps[0]
        self.levels = levels
        self.distance = distance
        self.multiplier_rate = multiplier_rate
        self.boundary = boundary
        self.register_buffer("multiplier", torch.tensor(float(multiplier)))
        self._errors: list[Tensor] = []

    @property
    def path(self) -> GaussianPath:
        """The path of the generator."""
        return self.teacher.path

    def build(self) -> None:
        """Lets the adapter begin with the generator."""
        super().build()
        self.student.begin(self.teacher)

    def classes_of(self, labels: Tensor) -> Condition:
        """See `DiffusionDistiller`; the generator knows the classes."""
        return labels if self.teacher.num_classes else None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Takes noise, and the control that belongs to it; real samples are not looked at."""
        draws = self.draws("step")
        count = len(batch.index)
        condition = self.conditions(batch, draws)
        z, eps = (draws.normal((count, *self._data().sample_shape)) for _ in range(2))
        level = draws.integers(self.levels, count)
        consistency, bound = self.losses(z, eps, level, condition)
        loss = self.combine({"consistency": consistency, "boundary": self.multiplier.clone() * bound})
        self.ascend(bound)
        return loss

    def conditions(self, batch: Any, draws: Draws) -> Condition:
        """Returns what to generate for: the batch's own conditions, or classes at random."""
        if hasattr(batch, "condition"):
            return batch.condition
        return draws.integers(self.teacher.num_classes, len(batch.index)) if self.teacher.num_classes else None

    def losses(self, z: Tensor, eps: Tensor, level: Int[Tensor, " b"], condition: Condition) -> tuple[Tensor, Tensor]:
        """Returns L_con and L_bound for levels k (B,) of 0 ... N - 1."""
        made, control = self.reference_of(z, condition)
        later, earlier = (diffused_noise(z, eps, noise_level(k, levels=self.levels)) for k in (level + 1, level))
        with torch.no_grad():
            target = self.controlled(earlier, condition, control)
        consistency = sample_distance(self.controlled(later, condition, control), target, kind=self.distance)
        bound = sample_distance(self.controlled(z, condition, control), made, kind=self.distance)
        return consistency, bound

    @torch.no_grad()
    def reference_of(self, z: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """Returns what the generator alone makes of noise, and its control."""
        made = self.teacher(self.path.start(z, self.start), self.start, condition)
        return made, self.extractor(made)

    def controlled(self, z: Tensor, condition: Condition, control: Tensor) -> Tensor:
        """Generates with a control."""
        return self.student(self.teacher, self.path.start(z, self.start), self.start, condition, control)

    @torch.no_grad()
    def ascend(self, bound: Tensor) -> None:
        """Takes the dual step: lambda grows where L_bound is above xi, falls where it is below, never under 0."""
        bound = self.trainer.strategy.reduce(bound.detach(), reduce_op="mean")
        self.multiplier.add_(self.multiplier_rate * (bound - self.boundary)).clamp_(min=0.0)

    # ---- evaluation ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, condition: Condition, noise: Float[Tensor, "b *sample"], draws: Draws) -> Tensor:
        """Makes samples of noise for controls of other samples, of the same conditions."""
        _, control = self.reference_of(draws.normal(noise.shape).to(noise), condition)
        made = self.controlled(noise, condition, control)
        self._errors.append((self.extractor(made) - control).abs().mean())
        return made

    def _evaluate(self, part: str) -> None:
        """Also logs `control_error`: the mean absolute difference of the control that was asked for and is there."""
        self._errors.clear()
        super()._evaluate(part)
        self.log(f"{part}/control_error", torch.stack(self._errors).mean(), batch_size=1, sync_dist=True)

    def example_inputs(self) -> tuple[Any, ...]:
        """One noise and its control, for the generator with the adapter."""
        noise = torch.zeros(1, *self._data().sample_shape, device=self.device)
        condition = self.classes_of(torch.zeros(1, dtype=torch.long, device=self.device))
        _, control = self.reference_of(noise, condition)
        return self.teacher, noise, self.start, condition, control
