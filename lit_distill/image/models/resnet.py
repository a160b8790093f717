"""Residual networks for 32x32 images (He, Zhang, Ren, Sun, 2015, arXiv:1512.03385, section 4.2)."""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.image.models.layers import GlobalPool, conv_bn, initialize

Shortcut = Literal["A", "B"]


class ResNetCIFAR(nn.Module):
    """A residual network with three stages of (depth - 2) / 6 blocks of two 3x3 convolutions.

    The wide nets "resnet8x4" and "resnet32x4" are depths 8 and 32 with widths (32, 64, 128, 256).

    Parameters with 100 classes and shortcut B: depth 20 0.28 M, 56 0.86 M, 110 1.74 M, 8x4 1.23 M, 32x4 7.43 M.

    Args:
        depth: 6 n + 2, for example 8, 20, 32, 44, 56 or 110.
        num_classes: Number of classes.
        widths: Channels of the first convolution and of the three stages.
        shortcut: What joins blocks where the shape changes: "A", every second pixel and zeros for the new channels
            (He et al.; no parameters); or "B", a 1x1 convolution with batch normalization (the distillation
            literature).
    """

    stages = ("layer1", "layer2", "layer3")
    penultimate = "pool"

    def __init__(
        self,
        depth: int,
        num_classes: int,
        widths: tuple[int, int, int, int] = (16, 16, 32, 64),
        shortcut: Shortcut = "B",
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise UsageError(f"depth: {depth} is not 6 n + 2; give 8, 20, 32, 44, 56 or 110")
        self.conv1, self.bn1 = conv_bn(3, widths[0], 3)
        self.layer1 = _stage(widths[0], widths[1], blocks, 1, shortcut)
        self.layer2 = _stage(widths[1], widths[2], blocks, 2, shortcut)
        self.layer3 = _stage(widths[2], widths[3], blocks, 2, shortcut)
        self.pool = GlobalPool()
        self.linear = nn.Linear(widths[3], num_classes)
        self.pre_activations = tuple(f"{stage}.{blocks - 1}.relu@input" for stage in self.stages)
        initialize(self)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Computes logits."""
        features = F.relu(self.bn1(self.conv1(images)), inplace=True)
        return self.linear(self.pool(self.layer3(self.layer2(self.layer1(features)))))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; the ReLU comes after the sum."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(in_channels, out_channels, 3, stride)
        self.conv2, self.bn2 = conv_bn(out_channels, out_channels, 3)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            projection = nn.Sequential(*conv_bn(in_channels, out_channels, 1, stride))
            self.shortcut = projection if shortcut == "B" else PadChannels(out_channels - in_channels, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        """Computes the block."""
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        return self.relu(inner + self.shortcut(x))


class PadChannels(nn.Module):
    """Every `stride`-th pixel, and zero channels, as many before as after."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.before = channels // 2
        self.after = channels - channels // 2
        self.stride = stride

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        """Subsamples and pads."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int, shortcut: Shortcut) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1, shortcut) for _ in range(blocks - 1)))
