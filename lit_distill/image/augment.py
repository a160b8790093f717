"""Image transforms that work on whole batches of uint8 images, in memory, on any device.

Each sample's random numbers are drawn apart from the work (see `lit_distill.core.loading.Transform`); for given numbers
a transform is a pure function, equal in value to torchvision's. `repr` says everything a transform does: it serves as a
fingerprint.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from lit_distill.core.loading import Transform

# Mean and standard deviation per channel, of pixels / 255.
CIFAR10_STATISTICS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR100_STATISTICS = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
MNIST_STATISTICS = ((0.1307,), (0.3081,))


class Augmentation(Transform, Protocol):
    """A transform of uint8 images to others of the same size."""

    @property
    def random(self) -> bool:
        """Whether an image comes out differently each time."""


@dataclass(frozen=True)
class Augment:
    """Random crop after padding, and random mirroring: the field's augmentation for small images (He et al. 2015).

    A crop of the padded image is a shift of the image, so `Augment(2, flip=False)` is a random shift by up to 2 px.

    Args:
        crop_padding: Pixels of padding on each side, p. Shifts are uniform over -p ... p in both directions.
        flip: Mirror left and right with probability 1/2.
        padding_mode: What is outside the image: "zero", or "reflect" (the image mirrored, its edge not repeated).
    """

    crop_padding: int = 4
    flip: bool = True
    padding_mode: Literal["zero", "reflect"] = "zero"

    @property
    def random(self) -> bool:
        """Whether an image comes out differently each time."""
        return self.crop_padding > 0 or self.flip

    def draw(self, count: int, generator: torch.Generator) -> Int[Tensor, "b 3"]:
        """Draws top and left corner of the crop in the padded image, 0 ... 2p, and 1 for a mirrored image, 0 for not.

        The crop is taken first and mirrored after, as torchvision's usual chain does.
        """
        corners = torch.randint(0, 2 * self.crop_padding + 1, (count, 2), generator=generator)
        flips = torch.randint(0, 1 + self.flip, (count, 1), generator=generator)
        return torch.cat([corners, flips], dim=1)

    def __call__(self, images: UInt8[Tensor, "b c h w"], draws: Int[Tensor, "b 3"]) -> UInt8[Tensor, "b c h w"]:
        """Crops and mirrors; the result is channels_last."""
        b, c, h, w = images.shape
        p = self.crop_padding
        top, left, flip = draws.to(images.device).unbind(1)
        pixels = images.permute(0, 2, 3, 1)  # (b h w c), in which one row of a crop is w * c consecutive bytes
        padded = self._pad(torch.cat([pixels, pixels.flip(2)]) if self.flip else pixels)
        height, width = h + 2 * p, w + 2 * p
        # Every run of w pixels in the padded images, as overlapping views; a crop is h of them.
        runs = padded.reshape(-1).unfold(0, w * c, c)
        # The mirrored crop is a crop of the mirrored image, with its left edge counted from the other side.
        left = torch.where(flip.bool(), 2 * p - left, left)
        image = torch.arange(b, device=images.device) + b * flip
        rows = (image * height + top)[:, None] + torch.arange(h, device=images.device)
        # index_select over rows copies bytes in blocks; indexing by [...] would go pixel by pixel, ten times slower.
        crops = runs.index_select(0, (rows * width + left[:, None]).reshape(-1))
        return crops.reshape(b, h, w, c).permute(0, 3, 1, 2)

    def _pad(self, pixels: Tensor) -> Tensor:
        p = self.crop_padding
        if self.padding_mode == "zero":
            return F.pad(pixels, (0, 0, p, p, p, p))
        # F.pad reflects floats only.
        for dim in (1, 2):
            pixels = pixels.index_select(dim, _reflected(pixels.shape[dim], p, pixels.device))
        return pixels


@dataclass(frozen=True)
class Normalize:
    """uint8 images to float32, channels_last: (pixel / 255 - mean) / std by channel.

    Args:
        mean: Mean per channel, of pixels / 255. A single one holds for all channels.
        std: Standard deviation per channel, likewise.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    random = False

    def draw(self, count: int, generator: torch.Generator) -> Int[Tensor, "b 0"]:
        """Draws nothing."""
        return torch.empty((count, 0), dtype=torch.int64)

    def __call__(
        self, images: UInt8[Tensor, "b c h w"], draws: Int[Tensor, "b 0"] | None = None
    ) -> Float[Tensor, "b c h w"]:
        """Normalizes."""
        b, c, h, w = images.shape
        scale, shift = _row_constants(self.mean, self.std, c, w, images.device)
        rows = images.permute(0, 2, 3, 1).reshape(b * h, w * c)
        return torch.addcmul(shift, rows.float(), scale).view(b, h, w, c).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class ImageTransform:
    """What a network sees of uint8 images: augmented (in training), then normalized.

    Args:
        normalize: The normalization.
        augment: The augmentation; None for evaluation.
    """

    normalize: Normalize
    augment: Augmentation | None = None

    @property
    def random(self) -> bool:
        """Whether an image comes out differently each time."""
        return self.augment is not None and self.augment.random

    def draw(self, count: int, generator: torch.Generator) -> Int[Tensor, "b k"]:
        """Draws for the augmentation."""
        return (self.augment or self.normalize).draw(count, generator)

    def __call__(self, images: UInt8[Tensor, "b c h w"], draws: Int[Tensor, "b k"]) -> Float[Tensor, "b c h w"]:
        """Augments and normalizes."""
        return self.normalize(images if self.augment is None else self.augment(images, draws))


@lru_cache(maxsize=32)  # else each step would copy the constants to the device anew
def _row_constants(
    mean: tuple[float, ...], std: tuple[float, ...], channels: int, width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Scale and shift for a row of pixels, (1, width * channels): a broadcast over 3 channels is not vectorized."""
    means = torch.tensor(mean, dtype=torch.float64).expand(channels)
    stds = torch.tensor(std, dtype=torch.float64).expand(channels)
    scale, shift = 1 / (255 * stds), -means / stds
    return scale.float().repeat(width)[None].to(device), shift.float().repeat(width)[None].to(device)


def _reflected(size: int, padding: int, device: torch.device) -> Tensor:
    position = torch.arange(-padding, size + padding, device=device).abs()
    return torch.where(position >= size, 2 * (size - 1) - position, position)
