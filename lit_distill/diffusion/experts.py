"""One generator of several networks, each for a part of the steps from noise to data."""

import copy
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.diffusion.denoiser import Denoiser
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.networks import Condition
from lit_distill.diffusion.paths import GaussianPath, Prediction
from lit_distill.diffusion.samplers import Denoise, Sampler
from lit_distill.diffusion.subintervals import euler_step
from lit_distill.diffusion.times import check_steps


class PhaseExperts(Denoiser):
    """Experts for phases of sampling: the first goes from noise to the first step of the second, and so on.

    Nothing is learned about who does what: steps say it. Called as a denoiser, the expert of the phase in which t lies
    answers, one for the whole batch; sampling goes by the number of the step instead, see `number_of_step`.

    Args:
        expert: What all experts begin as; each is a copy.
        steps: Times of each expert's steps, from noisy to clean, such as [[1.0, 0.75], [0.5, 0.25]].

    Raises:
        UsageError: There are no steps, a phase has none, or they do not decrease.

    Attributes:
        network: The experts, each a `Denoiser`.
        boundaries: Where the steps of each phase end: at the first step of the next, or at 0, the data.
    """

    network: nn.ModuleList

    def __init__(self, expert: Denoiser, steps: Sequence[Sequence[float]]) -> None:
        if not steps or not all(steps):
            raise UsageError(f"student.steps: {steps} has a phase without steps; give each phase one or more")
        super().__init__(
            nn.ModuleList(copy.deepcopy(expert) for _ in steps),
            expert.path,
            expert.prediction,
            expert.num_classes,
            expert.data_std,
            expert.time_input,
            expert.no_condition,
        )
        self.steps = [[float(step) for step in phase] for phase in steps]
        self.times = check_steps([step for phase in self.steps for step in phase], expert.path, "student.steps")
        self.boundaries = [phase[0] for phase in self.steps[1:]] + [0.0]
        self.number_of_step = [number for number, phase in enumerate(self.steps) for _ in phase]

    def forward(
        self,
        x_t: Float[Tensor, "b *sample"],
        t: Float[Tensor, " b"] | float,
        condition: Condition = None,
        prediction: Prediction = "x0",
    ) -> Float[Tensor, "b *sample"]:
        """Denoises with the expert for the first of the times."""
        time = float(t.reshape(-1)[0]) if isinstance(t, Tensor) else t
        number = sum(time <= boundary for boundary in self.boundaries[:-1])
        return self.network[number](x_t, t, condition, prediction)

    def set_null(self, condition: Mapping[str, Tensor]) -> None:
        """See `Denoiser`."""
        super().set_null(condition)
        for expert in self.network:
            expert.set_null(condition)  # type: ignore[operator]  # torch takes modules in a list for tensors


class EulerSteps(Sampler):
    """Euler's method at given times, and from the last of them to the data.

    Args:
        times: Times, from noisy to clean. The first is where pure noise goes in.
    """

    def __init__(self, times: Sequence[float]) -> None:
        self.times = list(times)

    def __call__(
        self, denoise: Denoise, path: GaussianPath, noise: Float[Tensor, "b *sample"], draws: Draws
    ) -> Float[Tensor, "b *sample"]:
        """See `Sampler`. One call of the denoiser a step, in their order."""
        x = path.start(noise, self.times[0])
        for t, following in pairwise([*self.times, 0.0]):
            times = torch.full((len(x),), t, dtype=torch.float64, device=x.device)
            x = euler_step(path, x, denoise(x, times), times, following)
        return x

    def evaluations(self) -> int:
        """See `Sampler`."""
        return len(self.times)
