"""The few pieces that all families use."""

from jaxtyping import Float
from torch import Tensor, nn


class GlobalPool(nn.Module):
    """Mean over all pixels."""

    def forward(self, features: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d"]:
        """Pools."""
        return features.mean(dim=(2, 3))


def conv_bn(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution that keeps the size (but for the stride), without bias, and batch normalization."""
    padding = kernel // 2
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out_channels)]


def conv_bn_relu(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """The same, and a ReLU."""
    return [*conv_bn(in_channels, out_channels, kernel, stride, groups), nn.ReLU(inplace=True)]


def initialize(network: nn.Module, linear_std: float | None = None) -> None:
    """Initializes weights as the literature on these networks does.

    Convolutions: normal with variance 2 / fan-out (He et al. 2015, arXiv:1502.01852), biases 0.

    Args:
        network: The network.
        linear_std: Standard deviation of the linear layers' weights, biases 0; None leaves torch's default.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, std=linear_std)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
