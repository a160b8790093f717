"""What a search may choose from: architectures as tuples of whole numbers, and the networks they stand for."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from random import Random
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.core.networks import instantiate
from lit_distill.image.models.layers import GlobalPool, conv_bn, initialize
from lit_distill.image.models.resnet import BasicBlock, Shortcut

Architecture = tuple[int, ...]


class SearchSpace(ABC):
    """A finite set of architectures; each is one choice for each of several genes.

    Args:
        genes: The choices of each gene.
    """

    def __init__(self, genes: Sequence[Sequence[int]]) -> None:
        self.genes = tuple(tuple(choices) for choices in genes)
        if not all(self.genes) or any(len(set(choices)) < len(choices) for choices in self.genes):
            raise UsageError(f"space: {[list(choices) for choices in self.genes]} has an empty or repeated choice")

    def __len__(self) -> int:
        size = 1
        for choices in self.genes:
            size *= len(choices)
        return size

    def architectures(self) -> list[Architecture]:
        """Lists the whole space."""
        return list(itertools.product(*self.genes))

    def sample(self, random: Random) -> Architecture:
        """Draws an architecture, all with the same probability."""
        return tuple(random.choice(choices) for choices in self.genes)

    def mutate(self, architecture: Architecture, random: Random) -> Architecture:
        """Changes exactly one gene to another of its choices, both drawn evenly."""
        open_genes = [place for place, choices in enumerate(self.genes) if len(choices) > 1]
        if not open_genes:
            return architecture
        place = random.choice(open_genes)
        others = [choice for choice in self.genes[place] if choice != architecture[place]]
        return (*architecture[:place], random.choice(others), *architecture[place + 1 :])

    def build(self, architecture: Architecture) -> nn.Module:
        """Makes the network, initialized as its class does."""
        return instantiate(self.spec(architecture))

    @abstractmethod
    def spec(self, architecture: Architecture) -> dict[str, Any]:
        """Returns the network's `{class_path, init_args}`, as a configuration has it."""

    @abstractmethod
    def depth(self, architecture: Architecture) -> int:
        """Returns the number of layers with weights on the longest way through the network."""


class ResNetSpace(SearchSpace):
    """Residual networks of three stages; depths and widths are chosen stage by stage.

    The defaults are the space S0 of the paper: 64 networks like ResNet-20. An architecture is the blocks of each stage,
    then the channels of each.

    Args:
        num_classes: Number of classes.
        depths: Numbers of blocks that each stage may have.
        widths: For each stage, the numbers of channels that it may have. The semantic metric compares networks of one
            last width, that of the teacher.
        in_channels: Channels of the images.
    """

    def __init__(
        self,
        num_classes: int,
        depths: Sequence[int] = (1, 3, 5, 7),
        widths: Sequence[Sequence[int]] = ((16,), (32,), (64,)),
        in_channels: int = 3,
    ) -> None:
        if len(widths) != 3:
            raise UsageError(f"space.widths: {len(widths)} stages; give the choices of three")
        super().__init__([*[depths] * 3, *widths])
        self.num_classes = num_classes
        self.in_channels = in_channels

    def spec(self, architecture: Architecture) -> dict[str, Any]:
        """Describes a `StagedResNet`."""
        return {
            "class_path": "lit_distill.image.search.StagedResNet",
            "init_args": {
                "depths": list(architecture[:3]),
                "num_classes": self.num_classes,
                "widths": [architecture[3], *architecture[3:]],
                "in_channels": self.in_channels,
            },
        }

    def depth(self, architecture: Architecture) -> int:
        """Two layers a block, the first convolution and the last layer: 20 for 3, 3, 3."""
        return 2 * sum(architecture[:3]) + 2


class ArgumentSpace(SearchSpace):
    """Networks of one class that differ in their arguments. An architecture is the place of each argument's choice.

    Args:
        network: The class path.
        choices: For each argument the values that it may have; a single one for what is fixed.
    """

    def __init__(self, network: str, choices: dict[str, list[Any]]) -> None:
        super().__init__([range(len(values)) for values in choices.values()])
        self.network = network
        self.choices = choices

    def spec(self, architecture: Architecture) -> dict[str, Any]:
        """Describes the network."""
        chosen = zip(self.choices.items(), architecture, strict=True)
        return {"class_path": self.network, "init_args": {name: values[place] for (name, values), place in chosen}}

    def depth(self, architecture: Architecture) -> int:
        """Counts convolutions and linear layers, those beside one another too."""
        return sum(isinstance(part, nn.Conv2d | nn.Linear) for part in self.build(architecture).modules())


class StagedResNet(nn.Module):
    """`ResNetCIFAR` with a number of blocks for each stage, and images of any number of channels.

    With depths (n, n, n) it is `ResNetCIFAR` of depth 6 n + 2, weights and their names included.

    Args:
        depths: Blocks of the three stages.
        num_classes: Number of classes.
        widths: Channels of the first convolution and of the three stages.
        in_channels: Channels of the images.
        shortcut: See `ResNetCIFAR`.
    """

    stages = ("layer1", "layer2", "layer3")
    penultimate = "pool"

    def __init__(
        self,
        depths: Sequence[int],
        num_classes: int,
        widths: Sequence[int] = (16, 16, 32, 64),
        in_channels: int = 3,
        shortcut: Shortcut = "B",
    ) -> None:
        super().__init__()
        if len(depths) != 3 or min(depths) < 1:
            raise UsageError(f"depths: {list(depths)}; give the blocks of three stages, 1 or more each")
        if len(widths) != 4:
            raise UsageError(f"widths: {list(widths)}; give the channels of the first convolution and of three stages")
        self.conv1, self.bn1 = conv_bn(in_channels, widths[0], 3)
        for number, blocks in enumerate(depths):
            before, width, stride = widths[number], widths[number + 1], 1 if number == 0 else 2
            first = BasicBlock(before, width, stride, shortcut)
            rest = (BasicBlock(width, width, 1, shortcut) for _ in range(blocks - 1))
            self.add_module(self.stages[number], nn.Sequential(first, *rest))
        self.pool = GlobalPool()
        self.linear = nn.Linear(widths[3], num_classes)
        initialize(self)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Computes logits."""
        features = F.relu(self.bn1(self.conv1(images)), inplace=True)
        for stage in self.stages:
            features = self.get_submodule(stage)(features)
        return self.linear(self.pool(features))
