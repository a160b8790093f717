"""Wide residual networks (Zagoruyko and Komodakis, 2016, arXiv:1605.07146)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.image.models.layers import GlobalPool, initialize


class WideResNet(nn.Module):
    """A residual network with normalization and ReLU before each convolution, and `width` times the usual channels.

    A stage's own output is a sum before any ReLU. So the stage features are taken one step later, where the next stage
    (or the head) has normalized and rectified that output.

    Parameters with 100 classes: WRN-16-2 0.70 M, WRN-40-1 0.57 M, WRN-40-2 2.26 M.

    Args:
        depth: 6 n + 4, for example 16, 22, 28 or 40.
        width: Factor on the channels 16, 32, 64 of the three stages.
        num_classes: Number of classes.
    """

    stages = ("layer2.0.relu1", "layer3.0.relu1", "relu")
    pre_activations = tuple(f"{stage}@input" for stage in stages)
    penultimate = "pool"

    def __init__(self, depth: int, width: int, num_classes: int) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise UsageError(f"depth: {depth} is not 6 n + 4; give 10, 16, 22, 28 or 40")
        if width < 1:
            raise UsageError(f"width: {width} is not a factor on channels; give 1 or more")
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.layer1 = _stage(16, 16 * width, blocks, 1)
        self.layer2 = _stage(16 * width, 32 * width, blocks, 2)
        self.layer3 = _stage(32 * width, 64 * width, blocks, 2)
        self.bn = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU(inplace=True)
        self.pool = GlobalPool()
        self.linear = nn.Linear(64 * width, num_classes)
        initialize(self)
        nn.init.zeros_(self.linear.bias)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Computes logits."""
        features = self.layer3(self.layer2(self.layer1(self.conv1(images))))
        return self.linear(self.pool(self.relu(self.bn(features))))


class PreactivationBlock(nn.Module):
    """Twice normalization, ReLU, 3x3 convolution; where the shape changes, the shortcut is a 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        same = in_channels == out_channels
        self.shortcut = None if same else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        """Computes the block."""
        active = self.relu1(self.bn1(x))
        inner = self.conv2(F.relu(self.bn2(self.conv1(active)), inplace=True))
        return inner + (x if self.shortcut is None else self.shortcut(active))


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = PreactivationBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(PreactivationBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))
