"""Small networks for digits: 28x28, 8x8, or any other size."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.image.models.layers import GlobalPool, conv_bn_relu, initialize


class ConvNet(nn.Module):
    """One 3x3 convolution with batch normalization and ReLU a stage; 2x2 max pooling between stages.

    Args:
        num_classes: Number of classes.
        widths: Channels of each stage. Images must be at least 2^(stages - 1) pixels high and wide.
        in_channels: Channels of the images.
    """

    penultimate = "pool"

    def __init__(self, num_classes: int, widths: Sequence[int] = (32, 64, 128), in_channels: int = 1) -> None:
        super().__init__()
        if not widths:
            raise UsageError("widths: it is empty; give the channels of one stage or more")
        self.stages = tuple(f"layer{number}" for number in range(1, len(widths) + 1))
        channels, pre_activations = in_channels, []
        for stage, width in zip(self.stages, widths, strict=True):
            pool = [] if stage == self.stages[0] else [nn.MaxPool2d(2)]
            layers = [*pool, *conv_bn_relu(channels, width, 3)]
            self.add_module(stage, nn.Sequential(*layers))
            pre_activations.append(f"{stage}.{len(layers) - 1}@input")
            channels = width
        self.pre_activations = tuple(pre_activations)
        self.pool = GlobalPool()
        self.linear = nn.Linear(channels, num_classes)
        initialize(self)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Computes logits."""
        features = images
        for stage in self.stages:
            features = self.get_submodule(stage)(features)
        return self.linear(self.pool(features))


class LeNet(nn.Module):
    """A 3x3 convolution, ReLU and 2x2 max pooling a stage; then the flat map, one hidden layer if wanted, and logits.

    No BatchNorm, so that a process computes the same on its share of a batch as one process on the whole.

    Args:
        num_classes: Number of classes.
        widths: Channels of each stage; each halves the grid.
        hidden: Width of the hidden layer; 0 for none.
        image_size: Height and width of the images, in pixels.
        in_channels: Channels of the images.

    Reference: LeCun, Bottou, Bengio, Haffner, Gradient-Based Learning Applied to Document Recognition, 1998 (the idea;
    ReLU, max pooling and 3x3 kernels are today's habit).
    """

    penultimate = "embedding"

    def __init__(
        self,
        num_classes: int,
        widths: Sequence[int] = (16, 32),
        hidden: int = 128,
        image_size: int = 28,
        in_channels: int = 1,
    ) -> None:
        super().__init__()
        if not widths or image_size >> len(widths) < 1:
            raise UsageError(f"widths: {len(widths)} stages do not fit {image_size} pixels; each stage halves the grid")
        self.stages = tuple(f"layer{number}" for number in range(1, len(widths) + 1))
        channels, size = in_channels, image_size
        for stage, width in zip(self.stages, widths, strict=True):
            convolution = nn.Conv2d(channels, width, 3, padding=1)
            self.add_module(stage, nn.Sequential(convolution, nn.ReLU(), nn.MaxPool2d(2)))
            channels, size = width, size // 2
        self.pre_activations = tuple(f"{stage}.1@input" for stage in self.stages)
        features = channels * size * size
        layers = [nn.Linear(features, hidden), nn.ReLU()] if hidden else []
        self.embedding = nn.Sequential(nn.Flatten(), *layers)
        self.linear = nn.Linear(hidden or features, num_classes)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Computes logits."""
        features = images
        for stage in self.stages:
            features = self.get_submodule(stage)(features)
        return self.linear(self.embedding(features))


class MLP(nn.Module):
    """Fully connected layers with ReLU; the hidden layers are the stages, the last of them is the penultimate.

    Args:
        in_features: Numbers in an image: channels * height * width.
        num_classes: Number of classes.
        hidden: Width of each hidden layer.
    """

    def __init__(self, in_features: int, num_classes: int, hidden: Sequence[int] = (256, 256)) -> None:
        super().__init__()
        if not hidden:
            raise UsageError("hidden: it is empty; give the width of one hidden layer or more")
        self.stages = tuple(f"layer{number}" for number in range(1, len(hidden) + 1))
        self.pre_activations = tuple(f"{stage}.1@input" for stage in self.stages)
        self.penultimate = self.stages[-1]
        features = in_features
        for stage, width in zip(self.stages, hidden, strict=True):
            self.add_module(stage, nn.Sequential(nn.Linear(features, width), nn.ReLU()))
            features = width
        self.linear = nn.Linear(features, num_classes)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Computes logits."""
        features = images.flatten(1)
        for stage in self.stages:
            features = self.get_submodule(stage)(features)
        return self.linear(features)
