"""Controls of generators: what is extracted from samples, and adapters that bring it into a frozen network."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lit_distill.core.errors import UsageError
from lit_distill.diffusion.denoiser import Denoiser
from lit_distill.diffusion.networks import Condition


class ControlExtractor(ABC):
    """Finds the control in samples, such as edges or depth."""

    @abstractmethod
    def __call__(self, samples: Float[Tensor, "b *sample"]) -> Float[Tensor, "b *control"]:
        """Returns the controls."""


class LowResolution(ControlExtractor):
    """Means over squares: the control of super-resolution.

    Args:
        size: Height and width of the control.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, samples: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c size size"]:
        """Returns the controls."""
        return F.adaptive_avg_pool2d(samples, self.size)


class Decoded(ControlExtractor):
    """Another extractor, on what an autoencoder of diffusers makes of latents.

    Args:
        autoencoder: The autoencoder; latents are divided by its scaling factor.
        extractor: Takes images (B, C, H, W).
    """

    def __init__(self, autoencoder: nn.Module, extractor: ControlExtractor) -> None:
        self.autoencoder = autoencoder.requires_grad_(False).eval()
        self.extractor = extractor

    @torch.no_grad()
    def __call__(self, samples: Float[Tensor, "b c h w"]) -> Tensor:
        """Returns the controls."""
        network: Any = self.autoencoder.to(samples.device)
        return self.extractor(network.decode(samples / network.config.scaling_factor).sample)


class Adapter(nn.Module, ABC):
    """Brings a control into a frozen network of another's. At first it changes nothing."""

    def begin(self, generator: Denoiser) -> None:
        """Takes from the generator what the adapter begins with."""

    @abstractmethod
    @contextmanager
    def attached(self, network: nn.Module, control: Tensor) -> Iterator[None]:
        """Lets the network see a control for a while."""

    def forward(
        self, generator: Denoiser, x_t: Tensor, t: Tensor | float, condition: Condition, control: Tensor
    ) -> Float[Tensor, "b *sample"]:
        """Denoises with a control."""
        with self.attached(generator.network, control):
            return generator(x_t, t, condition)


class BlockAdapter(Adapter):
    """A residual perceptron of feature and control for each of some modules, added to what the module computes.

    It acts on the channels: last dimension of vectors, first of maps (C, H, W), at each place alike; controls that are
    maps are brought to their size.

    Args:
        taps: Modules of the generator's network and the channels that they give, such as {"mid_block": 256}.
        control_channels: Channels of a control.
        flat: Whether a control is one vector, flattened.
        hidden: Width of the perceptrons.

    Raises:
        UsageError: Later: a module is not there, or gives other channels.
    """

    def __init__(self, taps: Mapping[str, int], control_channels: int, flat: bool = False, hidden: int = 128) -> None:
        super().__init__()
        if not taps:
            raise UsageError("model.student.taps: none are given; name modules of the generator's network")
        self.taps, self.control_channels, self.flat = dict(taps), control_channels, flat
        self.layers = nn.ModuleList()
        for width in self.taps.values():
            last = nn.Linear(hidden, width)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.layers.append(nn.Sequential(nn.Linear(width + control_channels, hidden), nn.SiLU(), last))

    @contextmanager
    def attached(self, network: nn.Module, control: Tensor) -> Iterator[None]:
        """See `Adapter`."""
        control = control.flatten(1) if self.flat else control
        modules = dict(network.named_modules())
        handles = []
        try:
            for name, layers in zip(self.taps, self.layers, strict=True):
                if name not in modules:
                    raise UsageError(f"model.student.taps: {type(network).__name__} has no module '{name}'")
                handles.append(modules[name].register_forward_hook(partial(self._add, name, layers, control)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(
        self, name: str, layers: nn.Module, control: Tensor, _module: nn.Module, _args: Any, feature: Tensor
    ) -> Tensor:
        if feature.ndim > 2:
            shape = feature.shape[2:]
            control = control[..., None, None].expand(-1, -1, *shape) if control.ndim == 2 else F.interpolate(
                control, shape
            )  # fmt: skip
        joined = torch.cat([feature, control.to(feature)], dim=1)
        wanted = self.taps[name] + self.control_channels
        if joined.shape[1] != wanted:
            raise UsageError(
                f"model.student.taps: '{name}' gives {feature.shape[1]} channels and the control has "
                f"{control.shape[1]}; said are {self.taps[name]} and {self.control_channels}"
            )
        return feature + layers(joined.movedim(1, -1)).movedim(-1, 1)


class ControlNetAdapter(Adapter):
    """A ControlNet of diffusers beside a UNet2DConditionModel.

    Args:
        network: The ControlNetModel; its conditioning image is the control.
        copy_encoder: Begin with the encoder of the generator, as ControlNets do.

    Reference: Zhang, Rao, Agrawala, Adding Conditional Control to Text-to-Image Diffusion Models, 2023, arXiv
    2302.05543.
    """

    def __init__(self, network: nn.Module, copy_encoder: bool = True) -> None:
        super().__init__()
        self.network = network
        self.copy_encoder = copy_encoder

    def begin(self, generator: Denoiser) -> None:
        """Copies the encoder.

        Raises:
            UsageError: The two are of other sizes.
        """
        if not self.copy_encoder:
            return
        for part in ("conv_in", "time_embedding", "down_blocks", "mid_block"):
            source: Any = getattr(generator.network, part)
            try:
                getattr(self.network, part).load_state_dict(source.state_dict())
            except RuntimeError as error:
                raise UsageError(
                    f"model.student: {part} of the ControlNet is not the generator's; give both the same config"
                ) from error

    @contextmanager
    def attached(self, network: nn.Module, control: Tensor) -> Iterator[None]:
        """See `Adapter`."""

        def add(_module: nn.Module, args: tuple[Any, ...], words: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            known = {name: words.get(name) for name in ("encoder_hidden_states", "added_cond_kwargs")}
            down, mid = self.network(*args, controlnet_cond=control.to(args[0]), return_dict=False, **known)
            return args, {**words, "down_block_additional_residuals": down, "mid_block_additional_residual": mid}

        handle = network.register_forward_pre_hook(add, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
