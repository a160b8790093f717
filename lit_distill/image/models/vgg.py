"""VGG networks for 32x32 images (Simonyan and Zisserman, 2014, arXiv:1409.1556), with batch normalization."""

from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.image.models.layers import GlobalPool, initialize

_CONVOLUTIONS = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Five layers of 3x3 convolutions; one linear layer instead of VGG's three.

    Layers two to four begin with 2x2 max pooling. The fifth keeps the resolution, 4x4 for 32x32 images, as the
    distillation literature has it. That literature matches features from the second layer on; so these are `stages`.

    Parameters with 100 classes: VGG-8 3.97 M, VGG-13 9.46 M.

    Args:
        depth: 8, 11, 13, 16 or 19. 8 is the distillation literature's own.
        num_classes: Number of classes.
    """

    stages = ("layer2", "layer3", "layer4", "layer5")
    penultimate = "pool"

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        if depth not in _CONVOLUTIONS:
            raise UsageError(f"depth: there is no VGG-{depth}; give {', '.join(map(str, _CONVOLUTIONS))}")
        channels = 3
        pre_activations = []
        for number, (count, width) in enumerate(zip(_CONVOLUTIONS[depth], _WIDTHS, strict=True), start=1):
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if 2 <= number <= 4 else []
            for _ in range(count):
                convolution = nn.Conv2d(channels, width, 3, padding=1)
                layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
            self.add_module(f"layer{number}", nn.Sequential(*layers))
            pre_activations.append(f"layer{number}.{len(layers) - 1}@input")
        self.pre_activations = tuple(pre_activations[1:])
        self.pool = GlobalPool()
        self.linear = nn.Linear(channels, num_classes)
        initialize(self, linear_std=0.01)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Computes logits."""
        features = images
        for number in range(1, 1 + len(_WIDTHS)):
            features = self.get_submodule(f"layer{number}")(features)
        return self.linear(self.pool(features))
