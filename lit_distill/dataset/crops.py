"""What the images of a small set go through before they are labelled: crops, and pieces of one another.

All work on whole batches of normalized float images, on any device, and let gradients through. Random numbers are drawn
apart from the work (see `lit_distill.core.loading.Transform`), so a view that was labelled once can be made again from
its seed alone.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lit_distill.core.errors import UsageError

_ATTEMPTS = 10  # as in torchvision


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random box of each image, brought to a common size bilinearly, and mirrored at random.

    Boxes are distributed as torchvision's: an area uniform over `scale`, a ratio whose logarithm is uniform, up to ten
    attempts until the box fits, else the largest box in the middle whose ratio is allowed. A box that has to shrink is
    smoothed over the pixels that fall into one.

    Args:
        scale: Smallest and largest area of a box, as shares of the image's.
        ratio: Smallest and largest width by height.
        flip: Mirror left and right with probability 1/2.
        size: Height and width of the result, in pixels; None keeps the image's.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    size: int | None = None

    def __post_init__(self) -> None:
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise UsageError(f"crop_scale: {[low, high]} are no shares of an image; give two numbers, 0 < a <= b <= 1")

    def draw(self, count: int, generator: torch.Generator | None = None) -> Float[Tensor, "b 23"]:
        """Draws for `count` images, on the CPU. A single row holds for a batch of any size.

        Area and ratio of ten attempts, the corner, and the mirror; all uniform over 0 ... 1.
        """
        return torch.rand((count, 2 * _ATTEMPTS + 3), generator=generator)

    def boxes(self, draws: Float[Tensor, "b 23"], height: int, width: int) -> Int[Tensor, "b 4"]:
        """Returns top, left, height and width of the boxes, in pixels of an image of this size."""
        areas, ratios, rest = draws.double().split([_ATTEMPTS, _ATTEMPTS, 3], dim=1)
        vertical, horizontal, _ = rest.unbind(1)
        low, high = self.scale
        areas = height * width * (low + (high - low) * areas)
        least, most = (math.log(limit) for limit in self.ratio)
        ratios = (least + (most - least) * ratios).exp()
        widths, heights = (areas * ratios).sqrt().round().long(), (areas / ratios).sqrt().round().long()
        fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
        first = fits.int().argmax(1, keepdim=True)
        found = fits.any(1)
        own_height, own_width = self._fallback(height, width)
        h = torch.where(found, heights.gather(1, first)[:, 0], own_height)
        w = torch.where(found, widths.gather(1, first)[:, 0], own_width)
        top = torch.where(found, (vertical * (height - h + 1)).long(), (height - h) // 2)
        left = torch.where(found, (horizontal * (width - w + 1)).long(), (width - w) // 2)
        return torch.stack([top, left, h, w], dim=1)

    def __call__(self, images: Float[Tensor, "b c h w"], draws: Float[Tensor, "n 23"]) -> Float[Tensor, "b c i j"]:
        """Crops, resizes and mirrors; the result is channels_last.

        Args:
            images: Images.
            draws: What `draw` returned, a row for each image or one for all.
        """
        height, width = images.shape[2:]
        top, left, h, w = self.boxes(draws, height, width).expand(len(images), -1).unbind(1)
        rows = interpolation(top, h, height, self.size or height)
        columns = interpolation(left, w, width, self.size or width)
        if self.flip:
            columns = torch.where(draws[:, -1, None, None] < 0.5, columns.flip(1), columns)
        resized = torch.einsum("bih,bchw,bjw->bcij", rows.to(images), images, columns.to(images))
        return resized.contiguous(memory_format=torch.channels_last)

    def _fallback(self, height: int, width: int) -> tuple[int, int]:
        ratio = width / height
        if ratio < self.ratio[0]:
            return round(width / self.ratio[0]), width
        if ratio > self.ratio[1]:
            return height, round(height * self.ratio[1])
        return height, width


def interpolation(start: Int[Tensor, " b"], length: Int[Tensor, " b"], size: int, out: int) -> Float[Tensor, "b o s"]:
    r"""Computes the matrices that resample a stretch of a line of pixels bilinearly.

    .. math:: W_{ij} \propto \max\Big(0, 1 - \frac{|x_i - j|}{\max(1, \rho)}\Big), \qquad
        x_i = a + \big(i + \tfrac12\big) \rho - \tfrac12, \qquad \rho = l / o

    over the pixels j of the stretch, rows normalized to 1. Beyond its ends a stretch goes on with its last pixel.

    Args:
        start: First pixel of each stretch, a.
        length: Pixels of each stretch, l.
        size: Pixels of the line.
        out: Pixels of the result, o.
    """
    ratio = length[:, None].float() / out
    place = start[:, None] + (torch.arange(out, device=start.device) + 0.5) * ratio - 0.5
    pixel = torch.arange(size, device=start.device)
    weights = (1 - (place[:, :, None] - pixel).abs() / ratio.clamp_min(1)[:, :, None]).clamp_min(0)
    inside = (pixel >= start[:, None]) & (pixel < (start + length)[:, None])
    weights = weights * inside[:, None, :]
    return weights / weights.sum(2, keepdim=True)


@dataclass(frozen=True)
class CutMix:
    """A box of each image comes from another image of the batch: one box and one permutation for all.

    The box has a share 1 - lambda of the image, lambda uniform (Beta(1, 1)), and a center that is uniform over the
    pixels; what lies outside is cut off.

    Reference: Yun, Han, Oh, Chun, Choe, Yoo, CutMix: Regularization Strategy to Train Strong Classifiers with
    Localizable Features, 2019, arXiv 1905.04899.
    """

    def draw(self, count: int, generator: torch.Generator | None = None) -> Float[Tensor, "b 4"]:
        """Draws for `count` images, on the CPU: whose piece each one gets; lambda and the center, in every row."""
        order = torch.randperm(count, generator=generator)
        uniform = torch.rand(3, generator=generator)
        return torch.cat([order[:, None].float(), uniform.expand(count, -1)], dim=1)

    def box(self, draws: Float[Tensor, "b 4"], height: int, width: int) -> tuple[slice, slice]:
        """Returns the rows and the columns of the box."""
        kept, *center = draws[0, 1:].tolist()  # on the CPU: nothing waits
        share = math.sqrt(1 - kept)
        spans = []
        for size, place in zip((height, width), center, strict=True):
            middle, half = int(place * size), int(share * size) // 2
            spans.append(slice(max(middle - half, 0), min(middle + half, size)))
        return spans[0], spans[1]

    def __call__(self, images: Float[Tensor, "b c h w"], draws: Float[Tensor, "b 4"]) -> Float[Tensor, "b c h w"]:
        """Mixes the whole batch; the images given stay as they are."""
        rows, columns = self.box(draws, *images.shape[2:])
        mixed = images.clone()
        mixed[:, :, rows, columns] = images[:, :, rows, columns][draws[:, 0].long().to(images.device)]
        return mixed


@dataclass(frozen=True)
class ShuffleTiles:
    """Images that are put together of tiles get their columns of tiles, then their rows, in random order.

    Args:
        grid: Tiles in each direction.

    Reference: the public code of Sun, Shi, Yu, Lin, 2023, arXiv 2312.03526.
    """

    grid: int

    def draw(self, count: int, generator: torch.Generator | None = None) -> Int[Tensor, "b k"]:
        """Draws for `count` images, on the CPU: the order of the rows, then that of the columns."""
        uniform = torch.rand((count, 2, self.grid), generator=generator)
        return uniform.argsort(2).flatten(1)

    def __call__(self, images: Float[Tensor, "b c h w"], draws: Int[Tensor, "b k"]) -> Float[Tensor, "b c h w"]:
        """Rearranges.

        Raises:
            UsageError: The tiles do not divide the image.
        """
        rows, columns = draws.to(images.device).view(-1, 2, self.grid).unbind(1)
        batch = torch.arange(len(images), device=images.device)[:, None, None]
        shuffled = split_tiles(images, self.grid)[batch, rows[:, :, None], columns[:, None, :]]
        return join_tiles(shuffled).contiguous(memory_format=torch.channels_last)


def split_tiles(images: Float[Tensor, "b c h w"], grid: int) -> Float[Tensor, "b g f c i j"]:
    """Cuts images into `grid` x `grid` tiles; the inverse of `join_tiles`.

    Raises:
        UsageError: They do not divide the image.
    """
    height, width = images.shape[2:]
    if height % grid or width % grid:
        raise UsageError(f"grid: {grid} tiles do not divide {height} x {width} pixels; give a divisor")
    return images.unflatten(3, (grid, -1)).unflatten(2, (grid, -1)).permute(0, 2, 4, 1, 3, 5)


def join_tiles(tiles: Float[Tensor, "b g f c i j"]) -> Float[Tensor, "b c h w"]:
    """Puts images together of rows and columns of tiles."""
    return tiles.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
