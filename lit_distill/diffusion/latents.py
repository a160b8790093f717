"""Latent images: an autoencoder of diffusers, and image data seen through it."""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.diffusion.data import GeneratorImages
from lit_distill.diffusion.text import TextBatch, TextEncoder, TextTable
from lit_distill.image.data.base import ImageBatch, ImageDataModule


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
        self._network: nn.Module | None = None
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
                self._config = dict(AutoencoderKL.load_config(self.folder, subfolder=self.subfolder, local_files_only=True))
            except (OSError, ValueError) as error:
                raise self._missing() from error
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
        parts = [network.encode(some).latent_dist.mode() for some in images.split(self.batch_size)]  # type: ignore[operator]
        return (torch.cat(parts) - self._shift) * self.config.get("scaling_factor", 0.18215)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b latents lh lw"]) -> Float[Tensor, "b c h w"]:
        """Returns images in [-1, 1], or a little beyond."""
        network = self._at(latents.device)
        scaled = latents / self.config.get("scaling_factor", 0.18215) + self._shift
        return torch.cat([network.decode(some).sample for some in scaled.split(self.batch_size)])  # type: ignore[operator]

    @property
    def _shift(self) -> float:
        return self.config.get("shift_factor") or 0.0

    def _at(self, device: torch.device) -> nn.Module:
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


class GeneratorLatents(GeneratorImages):
    """Images of another data module as the latents of an autoencoder, with their classes or captions made of these.

    Each training batch is augmented as images and then encoded, on the device of the run.

    Args:
        source: The images, in [-1, 1]: mean and std 0.5 of each channel.
        autoencoder: The autoencoder.
        text: Makes conditions of captions, for networks that are conditioned on text.
        caption: The caption of a class, with its name in place of {}.
        kwargs: See `GeneratorImages`.

    Raises:
        UsageError: Channels or resolution of the images do not fit the autoencoder, or they are not in [-1, 1].
    """

    def __init__(
        self,
        source: ImageDataModule,
        autoencoder: Autoencoder,
        text: TextEncoder | None = None,
        caption: str = "a photo of a {}",
        **kwargs: Any,
    ) -> None:
        super().__init__(source, **kwargs)
        channels, height, width = source.sample_shape
        wanted = autoencoder.config.get("in_channels", 3)
        if channels != wanted:
            raise UsageError(f"data.source: images of {channels} channels do not fit the autoencoder, which takes {wanted}")
        if height != width:
            raise UsageError(f"data.source: images of {height} x {width} pixels are not square; crop them")
        spread = [*source.normalize.mean, *source.normalize.std]
        if not all(math.isclose(value, 0.5) for value in spread):
            raise UsageError("data.source: autoencoders take pixels in [-1, 1]; give mean and std 0.5 for each channel")
        self.autoencoder = autoencoder
        self.text = text
        self.caption = caption
        self.sample_shape = autoencoder.shape(height)
        self._captions: TextTable | None = None

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Encodes a batch."""
        if not isinstance(batch, ImageBatch):
            return batch
        latents = self.autoencoder.encode(batch.images)
        if self.text is None:
            return batch._replace(images=latents)
        return TextBatch(self.captions(batch.labels), batch.index, latents)

    def captions(self, labels: Int[Tensor, " b"]) -> dict[str, Tensor]:
        """Returns the embedded captions of classes."""
        return self._table()(labels + 1)

    @property
    def null_condition(self) -> Any:
        """What returns the embedding of the empty prompt; there is none where conditions are classes."""
        if self.text is None:
            raise AttributeError("null_condition")
        return lambda: self._table()(torch.zeros(1, dtype=torch.long))

    def real(self, part: str, most: int) -> tuple[Float[Tensor, "n c h w"], Int[Tensor, " n"]]:
        """See `GeneratorImages`; latents."""
        images, labels = super().real(part, most)
        return self.autoencoder.encode(images), labels

    def pixels(self, samples: Float[Tensor, "n c h w"]) -> Float[Tensor, "n channels height width"]:
        """See `GeneratorImages`."""
        return (self.autoencoder.decode(samples) / 2 + 0.5).clamp(0, 1)

    def _table(self) -> TextTable:
        assert self.text is not None
        if self._captions is None:
            self.setup()
            self._captions = TextTable(self.text(["", *(self.caption.format(name) for name in self.classes)]))
        return self._captions
