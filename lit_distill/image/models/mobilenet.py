"""MobileNetV2 for 32x32 images (Sandler et al., 2018, arXiv:1801.04381)."""

from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.image.models.layers import GlobalPool, conv_bn, conv_bn_relu, initialize

_STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
_HEAD = 1280


class MobileNetV2CIFAR(nn.Module):
    """MobileNetV2 as the distillation literature runs it on CIFAR: half width, ReLU, 2x2 pixels in the last stage.

    Against the paper: the second stage keeps its resolution, and ReLU replaces ReLU6. The stages end in linear
    bottlenecks, which have no activation by design; their outputs are the features that the literature matches, and so
    are `stages` here, in contrast to the other networks.

    Parameters with 100 classes at half width: 0.81 M.

    Args:
        num_classes: Number of classes.
        width: Factor on the channels of all stages; the 1,280 channels before the pooling stay, unless it is above 1.
    """

    stages = ("blocks.1", "blocks.2", "blocks.4", "blocks.6")
    pre_activations = stages
    penultimate = "pool"

    def __init__(self, num_classes: int, width: float = 0.5) -> None:
        super().__init__()
        if int(16 * width) < 1:
            raise UsageError(f"width: {width} leaves no channels; give 0.0625 or more")
        channels = int(32 * width)
        self.stem = nn.Sequential(*conv_bn_relu(3, channels, 3, stride=2))
        blocks = []
        for expansion, base, count, stride in _STAGES:
            wide = int(base * width)
            stage = [InvertedResidual(channels, wide, stride, expansion)]
            stage += [InvertedResidual(wide, wide, 1, expansion) for _ in range(count - 1)]
            blocks.append(nn.Sequential(*stage))
            channels = wide
        self.blocks = nn.Sequential(*blocks)
        head = int(_HEAD * max(1.0, width))
        self.head = nn.Sequential(*conv_bn_relu(channels, head, 1))
        self.pool = GlobalPool()
        self.linear = nn.Linear(head, num_classes)
        initialize(self, linear_std=0.01)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Computes logits."""
        return self.linear(self.pool(self.head(self.blocks(self.stem(images)))))


class InvertedResidual(nn.Module):
    """1x1 convolution to more channels, 3x3 by channel, 1x1 back without activation; added to the input if it fits."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        self.conv = nn.Sequential(
            *conv_bn_relu(in_channels, inner, 1),
            *conv_bn_relu(inner, inner, 3, stride, groups=inner),
            *conv_bn(inner, out_channels, 1),
        )
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        """Computes the block."""
        return x + self.conv(x) if self.residual else self.conv(x)
