"""An autoencoder of diffusers, at rest: images to latents and back."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lit_distill.core.errors import UsageError

_KINDS = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderKLWan")


class Autoencoder:
    """The autoencoder in a folder of diffusers, at rest. Its weights are read when they are needed.

    Latents are scaled as diffusion models see them: (z - shift_factor) * scaling_factor of its configuration, and of
    Wan, whose images are videos of one frame, (z - latents_mean) / latents_std. An `AutoencoderTiny` has no variance.

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
            if config["_class_name"] not in _KINDS:
                raise UsageError(
                    f"data.autoencoder: {self.folder} holds a {config['_class_name']}; known are {', '.join(_KINDS)}"
                )
            self._config = dict(config)
        return self._config

    @property
    def kind(self) -> str:
        """Its class in diffusers."""
        return self.config["_class_name"]

    @property
    def factor(self) -> int:
        """Pixels to a latent, along each side."""
        if self.kind == "AutoencoderKLWan":
            return self.config["scale_factor_spatial"]
        widths = "encoder_block_out_channels" if self.kind == "AutoencoderTiny" else "block_out_channels"
        return 2 ** (len(self.config[widths]) - 1)

    def shape(self, resolution: int) -> tuple[int, ...]:
        """Returns the shape of the latents of square images, of Wan (channels, 1, height, width).

        Raises:
            UsageError: The resolution is no multiple of what it makes one latent of.
        """
        if resolution < 1 or resolution % self.factor:
            raise UsageError(
                f"data.resolution: {resolution} pixels do not fit the autoencoder, which makes one latent of "
                f"{self.factor}; give a multiple of {self.factor}"
            )
        side = resolution // self.factor
        if self.kind == "AutoencoderKLWan":
            return (self.config["z_dim"], 1, side, side)
        return (self.config["latent_channels"], side, side)

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b latents *place"]:
        """Returns the means of the latents of images in [-1, 1]."""
        network = self._at(images.device)
        given = images[:, :, None] if self.kind == "AutoencoderKLWan" else images
        found = [network.encode(some) for some in given.split(self.batch_size)]
        tiny = self.kind == "AutoencoderTiny"
        latents = torch.cat([some.latents if tiny else some.latent_dist.mode() for some in found])
        shift, scale = self._scaling(latents)
        return (latents - shift) * scale

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b latents *place"]) -> Float[Tensor, "b c h w"]:
        """Returns images in [-1, 1], or a little beyond."""
        network = self._at(latents.device)
        shift, scale = self._scaling(latents)
        parts = [network.decode(some).sample for some in (latents / scale + shift).split(self.batch_size)]
        images = torch.cat(parts)
        return images[:, :, 0] if self.kind == "AutoencoderKLWan" else images

    def _scaling(self, like: Tensor) -> tuple[Any, Any]:
        if self.kind == "AutoencoderKLWan":
            mean, std = (
                torch.tensor(self.config[key], device=like.device).view(1, -1, 1, 1, 1)
                for key in ("latents_mean", "latents_std")
            )
            return mean, 1 / std
        default = 1.0 if self.kind == "AutoencoderTiny" else 0.18215
        return self.config.get("shift_factor") or 0.0, self.config.get("scaling_factor", default)

    def _at(self, device: torch.device) -> Any:
        if self._network is None:
            import diffusers

            made: Any = getattr(diffusers, self.kind)
            try:
                network = made.from_pretrained(self.folder, subfolder=self.subfolder, local_files_only=True)
            except (OSError, ValueError) as error:
                raise self._missing() from error
            self._network = network.requires_grad_(False).eval()
        return self._network.to(device)

    def _missing(self) -> UsageError:
        return UsageError(
            f"data.autoencoder: {self.folder} has no autoencoder in '{self.subfolder}' on this machine; put it there"
        )
