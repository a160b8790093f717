"""Discriminators on what a denoiser computes inside."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.taps import FeatureTaps
from lit_distill.diffusion.denoiser import Denoiser
from lit_distill.diffusion.networks import Condition


class DiscriminatorHead(nn.Module):
    """A logit from one feature: of a vector by a perceptron, of tokens by their mean, of a map by convolutions.

    A map is brought to 4 x 4 by convolutions of stride 2 and then to 1 x 1, with group normalization: DMD2's head.

    Args:
        shape: Shape of the feature without the batch: (d,), (tokens, d) or (c, h, w).
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        if len(shape) < 3:
            width = shape[-1]
            self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
            return
        channels, size = shape[0], min(shape[1:])
        layers: list[nn.Module] = []
        while size > 4:
            layers += [nn.Conv2d(channels, channels, 4, 2, 1), _groups(channels), nn.SiLU()]
            size //= 2
        layers += [nn.Conv2d(channels, channels, size, size), _groups(channels), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))

    def forward(self, feature: Tensor) -> Float[Tensor, " b"]:
        """Computes logits; large means "real"."""
        if feature.ndim == 3:
            feature = feature.mean(1)
        return self.layers(feature.float()).flatten(1).mean(1)


class Discriminator(nn.Module):
    """One head for each tap in a denoiser, which is not part of it and may be any role: fake score or teacher.

    Args:
        denoiser: Whose features it sees.
        taps: Modules in it, such as "network.mid_block".
        sample_shape: Shape of a sample.
        condition: Two conditions, to run it with.

    Raises:
        UsageError: A tap does not exist; the message names the nearest ones.
    """

    def __init__(
        self, denoiser: Denoiser, taps: list[str], sample_shape: tuple[int, ...], condition: Condition
    ) -> None:
        super().__init__()
        self.taps = list(taps)
        weight = next(denoiser.parameters())
        with torch.no_grad():
            sample = torch.zeros(2, *sample_shape, device=weight.device)
            time = (denoiser.path.t_min + denoiser.path.t_max) / 2
            found = FeatureTaps(denoiser, self.taps)(sample, time, condition)[1]
        self.heads = nn.ModuleList(DiscriminatorHead(tuple(found[tap].shape[1:])) for tap in self.taps)

    def forward(self, features: Mapping[str, Tensor]) -> Float[Tensor, "b heads"]:
        """Computes the logits of features by the names of their taps."""
        return torch.stack([head(features[tap]) for tap, head in zip(self.taps, self.heads, strict=True)], dim=1)


def _groups(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(next(groups for groups in (32, 16, 8, 4, 2, 1) if channels % groups == 0), channels)
