"""TAEF2, a tiny autoencoder for the latents of FLUX.2; diffusers' `AutoencoderTiny` has no pooling branch."""

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.core.networks import freeze, load_weights, read_weights
from lit_distill.diffusion.autoencoder import Autoencoder

_WIDTH = 64


class TAEF2(Autoencoder):
    """The autoencoder in a folder with `encoder.safetensors` and `decoder.safetensors`.

    Latents have 32 channels and an eighth of the side. They need no scale: their standard deviation is about 0.8.

    Args:
        folder: The folder.
        batch_size: Images at once.

    Reference: madebyollin, TAESD, github.com/madebyollin/taesd.
    """

    factor = 8

    def __init__(self, folder: str, batch_size: int = 64) -> None:
        super().__init__(folder, subfolder="", batch_size=batch_size)
        self._config = {"_class_name": "TAEF2", "in_channels": 3, "latent_channels": 32}

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b latents *place"]:
        """Returns the latents of images in [-1, 1]."""
        encoder = self._at(images.device)["encoder"]
        return torch.cat([encoder(some / 2 + 0.5) for some in images.split(self.batch_size)])

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b latents *place"]) -> Float[Tensor, "b c h w"]:
        """Returns images in [-1, 1], or a little beyond."""
        decoder = self._at(latents.device)["decoder"]
        return torch.cat([decoder(some) * 2 - 1 for some in latents.split(self.batch_size)])

    def _at(self, device: torch.device) -> nn.ModuleDict:
        if self._network is None:
            parts = nn.ModuleDict({"encoder": encoder(), "decoder": decoder()})
            for name, part in parts.items():
                file = Path(self.folder) / f"{name}.safetensors"
                if not file.is_file():
                    raise UsageError(
                        f"data.autoencoder: {self.folder} has no {file.name} on this machine; put it there"
                    )
                load_weights(part, read_weights(file), origin=str(file))
            self._network = freeze(parts)
        return self._network.to(device)


class Clamp(nn.Module):
    """Keeps numbers within -3 and 3, softly."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns 3 tanh(x / 3)."""
        return 3 * (x / 3).tanh()


class Block(nn.Module):
    """Three convolutions around which the input goes.

    Args:
        pooled: Add what four groups of channels say of each place first.
    """

    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(), nn.ReLU(), _conv(), nn.ReLU(), _conv())
        wide = 4 * _WIDTH
        self.pool = (
            nn.Sequential(
                nn.Conv2d(_WIDTH, wide, 1, bias=False),
                nn.GroupNorm(4, wide),
                nn.ReLU(),
                nn.Conv2d(wide, _WIDTH, 1, bias=False),
            )
            if pooled
            else None
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Computes what the next block is given."""
        if self.pool is not None:
            x = x + self.pool(x)
        return F.relu(self.conv(x) + x)


def encoder() -> nn.Sequential:
    """Makes the encoder of images in [0, 1]."""
    layers: list[nn.Module] = [_conv(3), Block()]
    for pooled in (False, False, True):
        layers += [_conv(stride=2, bias=False), *(Block(pooled) for _ in range(3))]
    return nn.Sequential(*layers, _conv(_WIDTH, 32))


def decoder() -> nn.Sequential:
    """Makes the decoder to images in [0, 1]."""
    layers: list[nn.Module] = [Clamp(), _conv(32), nn.ReLU()]
    for pooled in (True, False, False):
        layers += [*(Block(pooled) for _ in range(3)), nn.Upsample(scale_factor=2), _conv(bias=False)]
    return nn.Sequential(*layers, Block(), _conv(_WIDTH, 3))


def _conv(inputs: int = _WIDTH, outputs: int = _WIDTH, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=bias)
