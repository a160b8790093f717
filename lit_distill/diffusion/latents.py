"""Image data seen through an autoencoder."""

import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lit_distill.core.errors import UsageError
from lit_distill.diffusion.autoencoder import Autoencoder
from lit_distill.diffusion.data import GeneratorImages
from lit_distill.diffusion.text import TextBatch, TextEncoder, TextTable, embedded
from lit_distill.image.data.base import ImageBatch, ImageDataModule


class GeneratorLatents(GeneratorImages):
    """Images of another data module as the latents of an autoencoder, with their classes or captions made of these.

    Each training batch is augmented as images and then encoded, on the device of the run.

    Args:
        source: The images, in [-1, 1]: mean and std 0.5 of each channel.
        autoencoder: The autoencoder.
        text: Makes conditions of captions, for networks that are conditioned on text.
        caption: The caption of a class, with its name in place of {}; "{}" for `CaptionedImages`, whose classes are
            captions.
        cache_file: Safetensors file to keep embedded captions in, and to take them from.
        kwargs: See `GeneratorImages`.

    Raises:
        UsageError: The images are not in [-1, 1]; later, their channels or resolution do not fit the autoencoder.
    """

    def __init__(
        self,
        source: ImageDataModule,
        autoencoder: Autoencoder,
        text: TextEncoder | None = None,
        caption: str = "a photo of a {}",
        cache_file: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(source, **kwargs)
        spread = [*source.normalize.mean, *source.normalize.std]
        if not all(math.isclose(value, 0.5) for value in spread):
            raise UsageError("data.source: autoencoders take pixels in [-1, 1]; give mean and std 0.5 for each channel")
        self.autoencoder = autoencoder
        self.text = text
        self.caption = caption
        self.cache_file = None if cache_file is None else Path(cache_file)
        self._captions: TextTable | None = None

    def read_parts(self) -> dict[str, Any]:
        """See `GeneratorImages`."""
        parts = super().read_parts()
        channels, height, width = self.sample_shape
        wanted = self.autoencoder.config.get("in_channels", 3)
        if channels != wanted:
            raise UsageError(f"data.source: its images have {channels} channels, the autoencoder takes {wanted}")
        if height != width:
            raise UsageError(f"data.source: images of {height} x {width} pixels are not square; crop them")
        self.sample_shape = self.autoencoder.shape(height)  # type: ignore[assignment]  # videos have four
        return parts

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Encodes a batch."""
        if not isinstance(batch, ImageBatch):
            return batch
        latents, captions = self.autoencoder.encode(batch.images), self.captions(batch.labels)
        return batch._replace(images=latents) if captions is None else TextBatch(captions, batch.index, latents)

    @property
    def caption_count(self) -> int:
        """Number of captions; 0 where there are none."""
        return 0 if self.text is None else len(self.classes)

    def captions(self, labels: Int[Tensor, " b"]) -> dict[str, Tensor] | None:
        """Returns the embedded captions of classes; none where conditions are the classes themselves."""
        return None if self.text is None else self._table(self.text)(labels + 1)

    def null_condition(self) -> dict[str, Tensor] | None:
        """Returns the embedding of the empty prompt, (1, ...) by name; none likewise."""
        return None if self.text is None else self._table(self.text)(torch.zeros(1, dtype=torch.long))

    def real(self, part: str, most: int) -> tuple[Float[Tensor, "n c h w"], Int[Tensor, " n"]]:
        """See `GeneratorImages`; latents."""
        images, labels = super().real(part, most)
        return self.autoencoder.encode(images), labels

    def pixels(self, samples: Float[Tensor, "n c h w"]) -> Float[Tensor, "n channels height width"]:
        """See `GeneratorImages`."""
        return (self.autoencoder.decode(samples) / 2 + 0.5).clamp(0, 1)

    def _table(self, text: TextEncoder) -> TextTable:
        if self._captions is None:
            self.setup()
            prompts = ["", *(self.caption.format(name) for name in self.classes)]
            self._captions = TextTable(embedded(text, prompts, self._placement()[2], self.cache_file))
        return self._captions
