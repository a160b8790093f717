"""RandAugment with Cutout on whole batches of uint8 images: the strong view of methods that train on two views.

Each image gets operations and strengths of its own. Operations run once per batch over the images that drew them, and
equal Pillow's to one gray level.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from lit_distill.image.augment import Augment, Normalize

STEPS = 2**24  # of a strength between its ends


@dataclass(frozen=True)
class RandAugment:
    """Random operations in a row, each with a random strength, and a square painted over.

    This is the form of semi-supervised learning, which multi-level logit distillation uses: operations are drawn with
    replacement, strengths are uniform, and a square of up to half the image's side is painted over last.

    Args:
        fill: Color of the square, 0 to 255 by channel.
        operations: How many operations an image gets.

    Reference: Cubuk, Zoph, Shlens, Le, RandAugment, 2019, arXiv 1909.13719; random strengths and the square: Sohn et
    al., FixMatch, 2020, arXiv 2001.07685.
    """

    fill: tuple[int, ...]
    operations: int = 2

    random = True

    def draw(self, count: int, generator: torch.Generator) -> Int[Tensor, "b k"]:
        """Draws operation and strength for each place in the row, then side, row and column of the square."""
        kinds = torch.randint(len(OPERATIONS), (count, self.operations), generator=generator)
        strengths = torch.randint(STEPS + 1, (count, self.operations), generator=generator)
        square = torch.randint(STEPS, (count, 3), generator=generator)
        return torch.cat([kinds, strengths, square], dim=1)

    def __call__(self, images: UInt8[Tensor, "b c h w"], draws: Int[Tensor, "b k"]) -> UInt8[Tensor, "b c h w"]:
        """Applies the operations and paints the squares; draws stay on the CPU, where the images are grouped."""
        kinds, strengths, square = draws.split([self.operations, self.operations, 3], dim=1)
        strengths = (strengths.double() / STEPS).to(images.device, torch.float32)
        for place in range(self.operations):
            changed = images.clone()
            for kind in kinds[:, place].unique().tolist():
                low, high, operation = OPERATIONS[kind]
                rows = (kinds[:, place] == kind).nonzero()[:, 0].to(images.device)
                changed[rows] = operation(images[rows], low + (high - low) * strengths[rows, place])
            images = changed
        return self._paint(images, (square.double() / STEPS).to(images.device, torch.float32))

    def _paint(self, images: Tensor, square: Tensor) -> Tensor:
        _, channels, height, width = images.shape
        side = square[:, 0] * 0.5 * width
        top, left = ((center * size - side / 2).clamp(min=0).floor() for center, size in _centers(square, images))
        rows = torch.arange(height, device=images.device)
        columns = torch.arange(width, device=images.device)
        in_rows = (rows >= top[:, None]) & (rows <= (top + side)[:, None])
        in_columns = (columns >= left[:, None]) & (columns <= (left + side)[:, None])
        inside = in_rows[:, None, :, None] & in_columns[:, None, None, :]
        fill = torch.tensor(self.fill, dtype=torch.uint8).expand(channels).to(images.device)
        return torch.where(inside, fill[:, None, None], images)


@dataclass(frozen=True)
class StrongAugment:
    """The usual augmentation, if there is one, and then RandAugment.

    Args:
        strong: RandAugment.
        weak: Crop and mirroring; None for none.
    """

    strong: RandAugment
    weak: Augment | None = None

    random = True

    def draw(self, count: int, generator: torch.Generator) -> Int[Tensor, "b k"]:
        """Draws for both."""
        strong = self.strong.draw(count, generator)
        return strong if self.weak is None else torch.cat([strong, self.weak.draw(count, generator)], dim=1)

    def __call__(self, images: UInt8[Tensor, "b c h w"], draws: Int[Tensor, "b k"]) -> UInt8[Tensor, "b c h w"]:
        """Applies both."""
        own = 2 * self.strong.operations + 3
        if self.weak is not None:
            images = self.weak(images, draws[:, own:])
        return self.strong(images, draws[:, :own])


def mean_color(normalize: Normalize) -> tuple[int, ...]:
    """Returns the color that normalization makes (nearly) zero."""
    return tuple(round(255 * mean) for mean in normalize.mean)


def _centers(square: Tensor, images: Tensor) -> tuple[tuple[Tensor, int], tuple[Tensor, int]]:
    return (square[:, 1], images.shape[2]), (square[:, 2], images.shape[3])


# ---- operations by a table of gray levels --------------------------------------------------------------------------


def _auto_contrast(images: Tensor, strength: Tensor) -> Tensor:
    low, high = images.amin((2, 3), keepdim=True).float(), images.amax((2, 3), keepdim=True).float()
    stretched = ((images.float() - low) * (255 / (high - low).clamp(min=1))).clamp(0, 255)
    return torch.where(high > low, stretched, images.float()).to(torch.uint8)


def _equalize(images: Tensor, strength: Tensor) -> Tensor:
    count, channels = images.shape[:2]
    levels = images.reshape(count, channels, -1).long()
    histogram = torch.zeros((count, channels, 256), dtype=torch.long, device=images.device)
    histogram.scatter_add_(2, levels, torch.ones_like(levels))
    brightest = histogram.gather(2, levels.amax(2, keepdim=True))
    step = (levels.shape[2] - brightest) // 255
    table = (step // 2 + histogram.cumsum(2) - histogram) // step.clamp(min=1)
    equalized = table.clamp(max=255).gather(2, levels).to(torch.uint8).view_as(images)
    return torch.where((step > 0)[..., None], equalized, images)


def _posterize(images: Tensor, strength: Tensor) -> Tensor:
    kept = (1 << (8 - strength.floor().long())).view(-1, 1, 1, 1)
    return (images.long() // kept * kept).to(torch.uint8)


def _solarize(images: Tensor, strength: Tensor) -> Tensor:
    return torch.where(images < strength.view(-1, 1, 1, 1), images, 255 - images)


# ---- operations that blend with a poorer image ---------------------------------------------------------------------


def _blend(poorer: Tensor, images: Tensor, strength: Tensor) -> Tensor:
    poorer = poorer.float()
    return (poorer + strength.view(-1, 1, 1, 1) * (images.float() - poorer)).to(torch.uint8)


def _gray(images: Tensor) -> Tensor:
    if images.shape[1] != 3:
        return images[:, :1].float()
    red, green, blue = images.long().unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).float()[:, None]


def _brightness(images: Tensor, strength: Tensor) -> Tensor:
    return _blend(torch.zeros_like(images), images, strength)


def _color(images: Tensor, strength: Tensor) -> Tensor:
    return _blend(_gray(images).expand(images.shape), images, strength)


def _contrast(images: Tensor, strength: Tensor) -> Tensor:
    return _blend((_gray(images).mean((1, 2, 3), keepdim=True) + 0.5).floor().expand(images.shape), images, strength)


def _sharpness(images: Tensor, strength: Tensor) -> Tensor:
    channels = images.shape[1]
    kernel = torch.ones((3, 3), device=images.device)
    kernel[1, 1] = 5
    kernel = (kernel / 13).expand(channels, 1, 3, 3)
    smooth = images.float()  # the border stays as it is
    smooth[:, :, 1:-1, 1:-1] = (F.conv2d(smooth, kernel, groups=channels) + 0.5).floor()
    return _blend(smooth, images, strength)


# ---- operations that move pixels -----------------------------------------------------------------------------------


def _moved(images: Tensor, rows: Tensor) -> Tensor:
    """Takes the output pixel whose middle is (x, y) from (x, y, 1) by `rows` (b, 2, 3); black from outside."""
    count, channels, height, width = images.shape
    y, x = torch.meshgrid(
        torch.arange(height, device=images.device) + 0.5, torch.arange(width, device=images.device) + 0.5, indexing="ij"
    )
    places = torch.stack([x, y, torch.ones_like(x)]).view(3, -1)
    column, row = (rows @ places).floor().long().unbind(1)
    outside = (column < 0) | (column >= width) | (row < 0) | (row >= height)
    source = (row * width + column).masked_fill(outside, 0)[:, None].expand(-1, channels, -1)
    moved = images.reshape(count, channels, -1).gather(2, source).masked_fill(outside[:, None], 0)
    return moved.view(count, channels, height, width)


def _affine(x: tuple[Tensor | float, ...], y: tuple[Tensor | float, ...], like: Tensor) -> Tensor:
    return torch.stack([torch.stack([like.new_zeros(len(like)) + entry for entry in row], 1) for row in (x, y)], 1)


def _rotate(images: Tensor, strength: Tensor) -> Tensor:
    angle = -strength * (math.pi / 180)  # counterclockwise is positive, and y points down
    cos, sin = angle.cos(), angle.sin()
    across, down = images.shape[3] / 2, images.shape[2] / 2
    x = (cos, sin, across - cos * across - sin * down)
    y = (-sin, cos, down + sin * across - cos * down)
    return _moved(images, _affine(x, y, strength))


def _shear_x(images: Tensor, strength: Tensor) -> Tensor:
    return _moved(images, _affine((1.0, strength, 0.0), (0.0, 1.0, 0.0), strength))


def _shear_y(images: Tensor, strength: Tensor) -> Tensor:
    return _moved(images, _affine((1.0, 0.0, 0.0), (strength, 1.0, 0.0), strength))


def _translate_x(images: Tensor, strength: Tensor) -> Tensor:
    return _moved(images, _affine((1.0, 0.0, strength * images.shape[3]), (0.0, 1.0, 0.0), strength))


def _translate_y(images: Tensor, strength: Tensor) -> Tensor:
    return _moved(images, _affine((1.0, 0.0, 0.0), (0.0, 1.0, strength * images.shape[2]), strength))


def _identity(images: Tensor, strength: Tensor) -> Tensor:
    return images


# Weakest and strongest, and the operation.
OPERATIONS: tuple[tuple[float, float, Callable[[Tensor, Float[Tensor, " b"]], Tensor]], ...] = (
    (0.0, 1.0, _identity),
    (0.0, 1.0, _auto_contrast),
    (0.0, 1.0, _equalize),
    (4.0, 8.0, _posterize),
    (0.0, 256.0, _solarize),
    (0.05, 0.95, _brightness),
    (0.05, 0.95, _color),
    (0.05, 0.95, _contrast),
    (0.05, 0.95, _sharpness),
    (-30.0, 30.0, _rotate),
    (-0.3, 0.3, _shear_x),
    (-0.3, 0.3, _shear_y),
    (-0.3, 0.3, _translate_x),
    (-0.3, 0.3, _translate_y),
)
