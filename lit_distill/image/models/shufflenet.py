"""ShuffleNet V1 and V2 for 32x32 images: three stages, and no pooling before them."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.image.models.layers import GlobalPool, conv_bn, conv_bn_relu, initialize

_STEM = 24


class ShuffleNetV1CIFAR(nn.Module):
    """ShuffleNet with 3 groups (Zhang, Zhou, Lin, Sun, 2017, arXiv:1707.01083), as the distillation literature runs it.

    Against the paper: the first convolution is 1x1 and keeps the resolution, and a ReLU follows the convolution by
    channel.

    Parameters with 100 classes: 0.95 M.

    Args:
        num_classes: Number of classes.
    """

    stages = ("layer1", "layer2", "layer3")
    pre_activations = ("layer1.3.relu@input", "layer2.7.relu@input", "layer3.3.relu@input")
    penultimate = "pool"

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn_relu(3, _STEM, 1))
        self.layer1 = _stage_v1(_STEM, 240, 4)
        self.layer2 = _stage_v1(240, 480, 8)
        self.layer3 = _stage_v1(480, 960, 4)
        self.pool = GlobalPool()
        self.linear = nn.Linear(960, num_classes)
        initialize(self)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Computes logits."""
        return self.linear(self.pool(self.layer3(self.layer2(self.layer1(self.stem(images))))))


class ShuffleUnitV1(nn.Module):
    """Grouped 1x1, shuffle, 3x3 by channel, grouped 1x1; added to the input, or at stride 2 put beside it."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int = 3) -> None:
        super().__init__()
        self.stride = stride
        added = out_channels - in_channels if stride == 2 else out_channels
        inner = added // 4
        # The stem's 24 channels are too few to be grouped (section 3.2 of the paper).
        first = 1 if in_channels == _STEM else groups
        self.branch = nn.Sequential(
            *conv_bn_relu(in_channels, inner, 1, groups=first),
            ChannelShuffle(first),
            *conv_bn_relu(inner, inner, 3, stride, groups=inner),
            *conv_bn(inner, added, 1, groups=groups),
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        """Computes the unit."""
        inner = self.branch(x)
        if self.stride == 1:
            return self.relu(inner + x)
        return self.relu(torch.cat([inner, F.avg_pool2d(x, 3, stride=2, padding=1)], dim=1))


class ShuffleNetV2CIFAR(nn.Module):
    """ShuffleNetV2 1x (Ma, Zhang, Zheng, Sun, 2018, arXiv:1807.11164), as the distillation literature runs it.

    Against the paper: the first convolution is 1x1 and keeps the resolution.

    Parameters with 100 classes: 1.36 M.

    Args:
        num_classes: Number of classes.
    """

    stages = ("layer1", "layer2", "layer3")
    pre_activations = ("layer1.3.relu@input", "layer2.7.relu@input", "layer3.3.relu@input")
    penultimate = "pool"

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn_relu(3, _STEM, 1))
        self.layer1 = _stage_v2(_STEM, 116, 3)
        self.layer2 = _stage_v2(116, 232, 7)
        self.layer3 = _stage_v2(232, 464, 3)
        self.head = nn.Sequential(*conv_bn_relu(464, 1024, 1))
        self.pool = GlobalPool()
        self.linear = nn.Linear(1024, num_classes)
        initialize(self)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Computes logits."""
        return self.linear(self.pool(self.head(self.layer3(self.layer2(self.layer1(self.stem(images)))))))


class ShuffleUnitV2(nn.Module):
    """Half of the channels passes through three convolutions, the other half passes by; then the halves are mixed."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            *conv_bn_relu(half, half, 1), *conv_bn(half, half, 3, groups=half), *conv_bn(half, half, 1)
        )
        self.shuffle = ChannelShuffle(2)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Computes the unit."""
        kept, changed = x.chunk(2, dim=1)
        # What is kept is positive already; so the activation may come last, where losses can read what it is given.
        return self.relu(self.shuffle(torch.cat([kept, self.branch(changed)], dim=1)))


class DownUnitV2(nn.Module):
    """Two branches at stride 2, each giving half of the new channels; then the halves are mixed."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.left = nn.Sequential(
            *conv_bn(in_channels, in_channels, 3, 2, groups=in_channels), *conv_bn_relu(in_channels, half, 1)
        )
        self.right = nn.Sequential(
            *conv_bn_relu(in_channels, half, 1), *conv_bn(half, half, 3, 2, groups=half), *conv_bn_relu(half, half, 1)
        )
        self.shuffle = ChannelShuffle(2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        """Computes the unit."""
        return self.shuffle(torch.cat([self.left(x), self.right(x)], dim=1))


class ChannelShuffle(nn.Module):
    """Deals channels out from `groups` groups in turn; unlike torch's own, it keeps channels last in memory."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Shuffles."""
        dealt = x.permute(0, 2, 3, 1).unflatten(3, (self.groups, -1)).transpose(3, 4)
        return dealt.flatten(3).permute(0, 3, 1, 2)


def _stage_v1(in_channels: int, out_channels: int, units: int) -> nn.Sequential:
    first = ShuffleUnitV1(in_channels, out_channels, 2)
    return nn.Sequential(first, *(ShuffleUnitV1(out_channels, out_channels, 1) for _ in range(units - 1)))


def _stage_v2(in_channels: int, out_channels: int, units: int) -> nn.Sequential:
    return nn.Sequential(DownUnitV2(in_channels, out_channels), *(ShuffleUnitV2(out_channels) for _ in range(units)))
