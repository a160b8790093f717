"""Augmentation of distilled images by a library's transforms, as DC-Bench tests sets with them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from lit_distill.core.errors import UsageError
from lit_distill.image.augment import Normalize


@dataclass(frozen=True)
class ByteAugment:
    """Gives each image of bytes alone to a transform, with a seed of its own, and normalizes the outcome.

    It takes a fraction of a millisecond an image, so it is for small sets.

    Args:
        transform: Takes and returns an image (c, h, w) of bytes, such as `torchvision.transforms.v2.AutoAugment`.
        normalize: What follows.

    Reference: Cui, Wang, Si, Hsieh, DC-BENCH: Dataset Condensation Benchmark, 2022, arXiv 2207.09639.
    """

    transform: Callable[[UInt8[Tensor, "c h w"]], Tensor]
    normalize: Normalize

    random = True

    def draw(self, count: int, generator: torch.Generator | None = None) -> Int[Tensor, "b 1"]:
        """Draws a seed for each image."""
        return torch.randint(2**62, (count, 1), generator=generator)

    def __call__(self, images: UInt8[Tensor, "b c h w"], draws: Int[Tensor, "b 1"]) -> Float[Tensor, "b c h w"]:
        """Augments and normalizes.

        Raises:
            UsageError: The transform changes the shape or the type of an image.
        """
        with torch.random.fork_rng(devices=[]):
            made = [self._one(image, seed) for image, seed in zip(images, draws[:, 0].tolist(), strict=True)]
        return self.normalize(torch.stack(made))

    def _one(self, image: UInt8[Tensor, "c h w"], seed: int) -> UInt8[Tensor, "c h w"]:
        torch.manual_seed(seed)  # library transforms draw from torch's own generator
        found = self.transform(image)
        if found.shape != image.shape or found.dtype != torch.uint8:
            raise UsageError(
                f"data.transform: {type(self.transform).__name__} makes {found.dtype} of {tuple(found.shape)} from "
                f"bytes of {tuple(image.shape)}; give one that keeps both"
            )
        return found
