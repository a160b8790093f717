"""An autoencoder of diffusers, at rest: images to latents and back."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lit_distill.core.errors import UsageError


class Autoencoder:
    """The autoencoder in a folder of diffusers (AutoencoderKL), at rest. Its weights are read when they are needed.

    Latents are scaled as diffusion models see them: (z - shift_factor) * scaling_factor of its configuration.

    Args:
        folder: A pipeline's folder, or its name where it is in the local cache. Nothing is downloaded.
        subfolder: The autoencoder in it.
        batch_size: Images at once.
    """

    def __init__(self, folder: str, subfolder: str = "vae", batch_size: int = 8) -> None:
        self.folder, self.subfolder, self.batch_size = folder, subfolder, batch_size
        self._network: Any = None
        self._config: dict[str, Any] | None = None

    @property
    def config(self) -> dict[str, Any]:
        """Its configuration.

        Raises:
            UsageError: There is none in the folder.
        """
        if self._config is None:
            from diffusers import AutoencoderKL

            try:
                config = AutoencoderKL.load_config(self.folder, subfolder=self.subfolder, local_files_only=True)
            except (OSError, ValueError) as error:
                raise self._missing() from error
            self._config = dict(config)
        return self._config

    @property
    def factor(self) -> int:
        """Pixels to a latent, along each side."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    def shape(self, resolution: int) -> tuple[int, int, int]:
        """Returns the shape of the latents of square images.

        Raises:
            UsageError: The resolution is no multiple of what it makes one latent of.
        """
        if resolution < 1 or resolution % self.factor:
            raise UsageError(
                f"data.resolution: {resolution} pixels do not fit the autoencoder, which makes one latent of "
                f"{self.factor}; give a multiple of {self.factor}"
            )
        return (self.config["latent_channels"], resolution // self.factor, resolution // self.factor)

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b latents lh lw"]:
        """Returns the means of the latents of images in [-1, 1]."""
        network = self._at(images.device)
        parts = [network.encode(some).latent_dist.mode() for some in images.split(self.batch_size)]
        return (torch.cat(parts) - self._shift) * self.config.get("scaling_factor", 0.18215)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b latents lh lw"]) -> Float[Tensor, "b c h w"]:
        """Returns images in [-1, 1], or a little beyond."""
        network = self._at(latents.device)
        scaled = latents / self.config.get("scaling_factor", 0.18215) + self._shift
        return torch.cat([network.decode(some).sample for some in scaled.split(self.batch_size)])

    @property
    def _shift(self) -> float:
        return self.config.get("shift_factor") or 0.0

    def _at(self, device: torch.device) -> Any:
        if self._network is None:
            from diffusers import AutoencoderKL

            try:
                network = AutoencoderKL.from_pretrained(self.folder, subfolder=self.subfolder, local_files_only=True)
            except (OSError, ValueError) as error:
                raise self._missing() from error
            self._network = network.requires_grad_(False).eval()
        return self._network.to(device)

    def _missing(self) -> UsageError:
        return UsageError(
            f"data.autoencoder: {self.folder} has no autoencoder in '{self.subfolder}' on this machine; put it there"
        )
