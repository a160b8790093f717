"""A few-step generator's own way of sampling, as a scheduler that pipelines of diffusers take."""

from typing import Any, Literal

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.diffusion import paths
from lit_distill.diffusion.denoiser import Denoiser


class FewStepScheduler(SchedulerMixin, ConfigMixin):
    """The sampler that a few-step generator was trained for: data at once, then noise for the next of its steps.

    A generator knows its own steps and no others, so the number of steps that a pipeline asks for is not heeded, nor
    are `sigmas` and `mu`, which some pipelines give. Call the pipeline with guidance 1 (Stable Diffusion: 0, too),
    unless the generator was to be guided.

    It is loaded by `FewStepScheduler.from_pretrained(folder, subfolder="scheduler")`, which needs this package. Nothing
    in its file is run.

    Args:
        steps: Times on the path, from noisy to clean.
        path: The path: its class in `lit_distill.diffusion.paths`, under "class", and its arguments.
        prediction: What the network predicts, see `Denoiser`.
        data_std: See `Denoiser`.
        time_input: See `Denoiser`.
        time_factor: What times of the network are multiplied by for the pipeline: 1000 where that divides by it.
        renoise: Whether the noise for the next step is new (`Renoise`), or what the data imply (`DDIM`, `EulerSteps`).
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        steps: list[float],
        path: dict[str, Any],
        prediction: Literal["x0", "eps", "v", "u", "score", "edm"],
        data_std: float = 0.5,
        time_input: Literal["log_noise", "time", "thousandths", "saturating"] = "time",
        time_factor: float = 1.0,
        renoise: bool = True,
    ) -> None:
        found = {key: value for key, value in path.items() if key != "class"}
        made = getattr(paths, path["class"], None)
        if not (isinstance(made, type) and issubclass(made, paths.GaussianPath)):
            raise UsageError(f"scheduler.path: '{path['class']}' is no path of lit_distill.diffusion.paths")
        self.path: paths.GaussianPath = made(**found)
        self.steps = list(steps)
        self.denoiser = Denoiser(nn.Identity(), self.path, prediction, data_std=data_std, time_input=time_input)
        times = time_factor * self.denoiser.network_time(torch.tensor(self.steps, dtype=torch.float64))
        self.timesteps = times.float()
        self.init_noise_sigma = float(self.path.sigma(self.steps[0]))
        self.num_inference_steps = len(self.steps)
        self._index = 0

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Any = None,
        mu: float | None = None,
    ) -> None:
        """Begins a batch of samples. Only the device is heeded."""
        self.timesteps = self.timesteps.to(device)
        self._index = 0

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begins with another step, as pipelines do that start from an image."""
        self._index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Returns what the network is to see: with EDM's preconditioning a scaled sample, otherwise the sample."""
        return self.denoiser.network_input(sample, self._time(sample)).to(sample.dtype)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Goes from one step to the next, or to the data.

        Args:
            model_output: (B, ...) what the network says.
            timestep: Not heeded; steps are counted.
            sample: (B, ...) the noisy sample, not scaled.
            generator: Gives the noise of the next step.
            return_dict: Whether to return an object, or a tuple.
        """
        t = self._time(sample)
        x0 = self.denoiser.estimate(model_output, sample, t, "x0")
        self._index += 1
        if self._index < len(self.steps):
            if self.config["renoise"]:
                eps = randn_tensor(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
            else:
                eps = self.path.convert(x0, sample.float(), t, "x0", "eps")
            x0 = self.path.add_noise(x0, eps, self.steps[self._index])
        found = x0.to(sample.dtype)
        return SchedulerOutput(prev_sample=found) if return_dict else (found,)

    def _time(self, sample: Tensor) -> Tensor:
        return torch.full((len(sample),), self.steps[self._index], dtype=torch.float64, device=sample.device)
