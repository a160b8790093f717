"""How a few-step generator makes the sample that it is trained on."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lit_distill.core.errors import UsageError
from lit_distill.diffusion.denoiser import Denoiser
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.networks import Condition
from lit_distill.diffusion.paths import GaussianPath
from lit_distill.diffusion.times import check_steps

Inputs = Literal["simulate", "data"]


class Sample(NamedTuple):
    """What the generator made, and from what.

    Attributes:
        x0: Generated data, with the graph of the last call.
        x_t: What that call was given.
        t: Its time (B,).
        step: Which of the generator's steps it was, from 0 (pure noise).
    """

    x0: Float[Tensor, "b *sample"]
    x_t: Float[Tensor, "b *sample"]
    t: Float[Tensor, " b"]
    step: int


class FewStepRollout:
    """Draws one of the generator's steps, and gives the generator what it would see there.

    - "simulate": the generator itself goes from noise to that step, data at once and noise anew each time, without a
      graph. It is trained on what it will meet (backward simulation).
    - "data": real samples with noise of that step.

    The step is the same for all samples, and in all processes: they call their networks equally often. Only the last
    call has a graph.

    Args:
        steps: Times, from noisy to clean. One for a one-step generator.
        path: The path.
        inputs: "simulate" or "data".

    Raises:
        UsageError: The times do not decrease, or leave the path.

    Reference: Yin et al., Improved Distribution Matching Distillation, 2024, arXiv 2405.14867, section 4.5.
    """

    def __init__(self, steps: Sequence[float], path: GaussianPath, inputs: Inputs = "simulate") -> None:
        self.steps = check_steps(steps, path)
        self.path = path
        self.inputs = inputs

    def __call__(
        self,
        student: Denoiser,
        noise: Float[Tensor, "b *sample"],
        condition: Condition,
        draws: Draws,
        real: Float[Tensor, "b *sample"] | None = None,
    ) -> Sample:
        """Makes a sample.

        Args:
            student: The generator.
            noise: Standard normal noise, to start from.
            condition: Conditions.
            draws: Gives the step, and noise on the way.
            real: Real samples, for "data".
        """
        step = draws.shared_integer(len(self.steps)) if len(self.steps) > 1 else 0
        if step == 0:
            x_t = self.path.start(noise, self.steps[0])
        elif self.inputs == "data":
            if real is None:
                raise UsageError("model.inputs: 'data' needs real samples; give data, or take 'simulate'")
            x_t = self.path.add_noise(real, noise, self.steps[step])
        else:
            x_t = self._simulate(student, noise, condition, draws, step)
        t = torch.full((len(noise),), self.steps[step], dtype=torch.float64, device=noise.device)
        return Sample(student(x_t, t, condition), x_t, t, step)

    @torch.no_grad()
    def _simulate(self, student: Denoiser, noise: Tensor, condition: Condition, draws: Draws, step: int) -> Tensor:
        x_t = self.path.start(noise, self.steps[0])
        for now, following in zip(self.steps[:step], self.steps[1 : step + 1], strict=True):
            x0 = student(x_t, now, condition)
            x_t = self.path.add_noise(x0, draws.normal(noise.shape).to(noise), following)
        return x_t
