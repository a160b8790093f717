"""Small networks for small images, and a teacher in closed form."""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.errors import UsageError


class _Block(nn.Module):
    """A residual perceptron whose normalization is moved and scaled by the condition (adaLN-zero)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 3 * width)
        self.layers = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition).chunk(3, dim=1)
        return hidden + gate * self.layers(self.norm(hidden) * (1 + scale) + shift)


class ResidualMLP(nn.Module):
    """A residual perceptron with adaLN-zero on flat samples: 0.39 million parameters at the defaults, for 8x8 digits.

    Called with samples (B, ...), times (B,) of order 1 (such as ln r / 4), and class numbers (B,), of which
    `num_classes` itself means no class.

    Args:
        features: Numbers in a sample.
        num_classes: Classes; 0 for none.
        width: Width of the blocks.
        depth: Number of blocks.

    Reference: Peebles, Xie, Scalable Diffusion Models with Transformers, 2022, arXiv 2212.09748 (adaLN-zero).
    """

    frequencies: Tensor

    def __init__(self, features: int = 64, num_classes: int = 10, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        if width % 4:
            raise UsageError(f"network.width: {width} is no multiple of 4")
        frequencies = torch.linspace(math.log(0.25), math.log(16.0), width // 4).exp() * math.pi / 2
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.time = nn.Sequential(nn.Linear(width // 2, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.first = nn.Linear(features, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, features)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, time: Tensor, condition: Tensor | None = None) -> Tensor:
        """Computes the output (B, ...).

        Raises:
            UsageError: Samples have another number of pixels than the network was made for.
        """
        if x[0].numel() != self.first.in_features:
            raise UsageError(
                f"network.features: it was made for samples of {self.first.in_features} numbers, these have "
                f"{x[0].numel()}; give data of that size, or another network"
            )
        angles = time[:, None] * self.frequencies.to(time)
        embedding = self.time(torch.cat([angles.cos(), angles.sin()], dim=1))
        if self.classes is not None and condition is not None:
            embedding = embedding + self.classes(condition)
        embedding = nn.functional.silu(embedding)
        hidden = self.first(x.flatten(1))
        for block in self.blocks:
            hidden = block(hidden, embedding)
        return self.last(self.norm(hidden)).view_as(x)


def small_unet(
    image_size: int = 16, channels: int = 1, num_classes: int = 10, widths: Sequence[int] = (32, 64), layers: int = 1
) -> nn.Module:
    """Makes a class-conditional UNet of diffusers for small images: 0.64 million parameters at the defaults.

    For a `Denoiser` with time_input "saturating": its embedding of times is made for 0 ... 1000.

    Args:
        image_size: Height and width of the images.
        channels: Channels of the images.
        num_classes: Classes; one more embedding stands for no class.
        widths: Channels of each resolution.
        layers: Residual blocks of each resolution.
    """
    from diffusers import UNet2DModel

    network: Any = UNet2DModel(
        sample_size=image_size,
        in_channels=channels,
        out_channels=channels,
        num_class_embeds=num_classes + 1,
        block_out_channels=tuple(widths),
        layers_per_block=layers,
        down_block_types=("DownBlock2D",) * len(widths),
        up_block_types=("UpBlock2D",) * len(widths),
        norm_num_groups=min(32, *widths) // 4,
        add_attention=False,
    )
    return cast(nn.Module, network)


class GaussianMixture(nn.Module):
    """The denoiser of a mixture of spherical Gaussians in closed form: a teacher that makes no error.

    For a `Denoiser` with prediction "x0" and time_input "time" on the same path.

    Args:
        means: (K, D) centers.
        std: Standard deviation of all components.
        path: The path.
        weights: (K,) shares; equal if None.

    Attributes:
        means: (K, D).
    """

    means: Float[Tensor, "k d"]
    log_shares: Float[Tensor, " k"]

    def __init__(self, means: Any, std: float, path: Any, weights: Any = None) -> None:
        super().__init__()
        centers = torch.as_tensor(means, dtype=torch.float64)
        shares = torch.ones(len(centers)) if weights is None else torch.as_tensor(weights)
        self.register_buffer("means", centers)
        self.register_buffer("log_shares", (shares.double() / shares.sum()).log())
        self.std, self.path = std, path

    def forward(self, x: Tensor, time: Tensor, condition: Tensor | None = None) -> Tensor:
        """Computes E[x0 | x_t], (B, ...); with class numbers, of that component alone (K or more: of all)."""
        alpha, sigma, _, _ = self.path.at(time, x.flatten(1))
        variance = (alpha * self.std).square() + sigma.square()
        flat = x.double().flatten(1)
        offset = flat[:, None] - alpha[..., None] * self.means  # (B, K, D)
        logits = self.log_shares - offset.square().sum(-1) / (2 * variance)
        if condition is not None:
            own = torch.arange(len(self.means), device=x.device) == condition[:, None]
            logits = logits.where(own | (condition >= len(self.means))[:, None], -torch.inf)
        posterior = self.means + (alpha * self.std**2 / variance)[..., None] * offset
        return (logits.softmax(1)[..., None] * posterior).sum(1).view_as(x).to(x.dtype)
