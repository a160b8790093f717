"""Differentiable augmentation of normalized images, whose random numbers can be shared between real and synthetic."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lit_distill.core.errors import UsageError

OPERATIONS = ("color", "crop", "cutout", "flip", "scale", "rotate")
_COLUMNS = 4  # the operation, and three uniform numbers for it


@dataclass(frozen=True)
class SiameseAugment:
    """One of several operations for the whole batch, with random numbers of each image or common to all.

    Which operation it is, is drawn for each batch. "color" changes brightness, saturation and contrast; "crop" shifts
    by up to an eighth of the image, "cutout" sets a square of half the image's side to zero, and "scale" and "rotate"
    resample bilinearly, by a factor of 1 / 1.2 to 1.2 in each direction and by up to 15 degrees. Gradients flow to the
    images through all of them.

    Args:
        operations: Names joined by underscores, such as "color_crop_cutout_flip_scale_rotate"; "none" for none. Digits
            go without "flip".

    Reference: Zhao, Bilen, Dataset Condensation with Differentiable Siamese Augmentation, 2021, arXiv 2102.08259.
    """

    operations: str = "color_crop_cutout_flip_scale_rotate"

    flip_probability = 0.5
    scale_ratio = 1.2
    degrees = 15.0
    crop_share = 0.125
    cutout_share = 0.5
    brightness = 1.0
    saturation = 2.0
    contrast = 0.5

    def __post_init__(self) -> None:
        unknown = [name for name in self.names if name not in OPERATIONS]
        if unknown:
            raise UsageError(
                f"augmentation '{self.operations}': there is no '{unknown[0]}'; join names by underscores, of "
                f"{', '.join(OPERATIONS)}, or give none"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The operations to draw from."""
        return () if self.operations == "none" else tuple(self.operations.split("_"))

    @property
    def random(self) -> bool:
        """Whether an image comes out differently each time."""
        return bool(self.names)

    def draw(self, count: int, generator: torch.Generator | None = None) -> Float[Tensor, "b k"]:
        """Draws for `count` images, on the CPU: the operation's number, the same for all, and three numbers of each.

        For the siamese form draw once (`count` 1): a single row holds for a batch of any size.
        """
        if not self.names:
            return torch.empty((count, 0))
        uniform = torch.rand((count, _COLUMNS), generator=generator)
        uniform[:, 0] = (uniform[0, 0] * len(self.names)).floor()
        return uniform

    def __call__(self, images: Float[Tensor, "b c h w"], draws: Float[Tensor, "#b k"]) -> Float[Tensor, "b c h w"]:
        """Augments.

        Args:
            images: Normalized images.
            draws: What `draw` returned, a row for each image or one for all.
        """
        if not self.names:
            return images
        name = self.names[int(draws[0, 0])]  # on the CPU: nothing waits
        uniform = draws[:, 1:].to(images).expand(len(images), -1)
        operation = getattr(self, f"_{name}")
        return operation(images, uniform)

    def _color(self, images: Tensor, uniform: Tensor) -> Tensor:
        brightness, saturation, contrast = (uniform[:, column, None, None, None] for column in range(3))
        images = images + (brightness - 0.5) * self.brightness
        gray = images.mean(dim=1, keepdim=True)
        images = gray + (images - gray) * (saturation * self.saturation)
        mean = images.mean(dim=(1, 2, 3), keepdim=True)
        return mean + (images - mean) * (contrast + self.contrast)

    def _crop(self, images: Tensor, uniform: Tensor) -> Tensor:
        size = torch.tensor(images.shape[2:], device=images.device)
        reach = (size * self.crop_share + 0.5).long()
        shift = (uniform[:, :2] * (2 * reach + 1)).long() - reach
        rows, columns = (
            torch.arange(length, device=images.device) + shift[:, axis, None]
            for axis, length in enumerate(images.shape[2:])
        )
        most = int(max(images.shape[2:]) * self.crop_share + 0.5)
        padded = F.pad(images, (most,) * 4)
        batch = torch.arange(len(images), device=images.device)[:, None, None]
        cropped = padded.permute(0, 2, 3, 1)[batch, rows[:, :, None] + most, columns[:, None, :] + most]
        return cropped.permute(0, 3, 1, 2)

    def _cutout(self, images: Tensor, uniform: Tensor) -> Tensor:
        inside = []
        for axis, length in enumerate(images.shape[2:]):
            side = int(length * self.cutout_share + 0.5)
            center = (uniform[:, axis] * (length + 1 - side % 2)).long()[:, None]
            place = torch.arange(length, device=images.device)
            inside.append((place >= center - side // 2) & (place < center - side // 2 + side))
        hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
        return images.masked_fill(hole, 0.0)

    def _flip(self, images: Tensor, uniform: Tensor) -> Tensor:
        mirrored = (uniform[:, 0] < self.flip_probability)[:, None, None, None]
        return torch.where(mirrored, images.flip(3), images)

    def _scale(self, images: Tensor, uniform: Tensor) -> Tensor:
        least = 1 / self.scale_ratio
        factors = uniform[:, :2] * (self.scale_ratio - least) + least
        matrix = torch.diag_embed(factors)
        return _resample(images, matrix)

    def _rotate(self, images: Tensor, uniform: Tensor) -> Tensor:
        angle = (uniform[:, 0] - 0.5) * (2 * self.degrees * math.pi / 180)
        cos, sin = angle.cos(), angle.sin()
        matrix = torch.stack([torch.stack([cos, -sin], dim=1), torch.stack([sin, cos], dim=1)], dim=1)
        return _resample(images, matrix)


def _resample(images: Float[Tensor, "b c h w"], matrix: Float[Tensor, "b 2 2"]) -> Float[Tensor, "b c h w"]:
    """Reads the images at the places to which a matrix takes the grid of (-1, 1) in x and y; zero outside."""
    grid = F.affine_grid(F.pad(matrix, (0, 1)), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
