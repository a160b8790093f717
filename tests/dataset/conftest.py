"""Digits and networks small enough for every test."""

import pytest
import torch

from lit_distill.dataset import DistillationConvNet
from lit_distill.image import DigitsDataModule
from lit_distill.image.models import ConvNet


@pytest.fixture
def digits():
    """Builds the digits, 8x8, with few training images unless told otherwise."""

    def build(**kwargs):
        return DigitsDataModule(**({"train_size": 200, "batch_size": 50} | kwargs))

    return build


@pytest.fixture
def small_net():
    """Builds a network for digits, the same for the same seed."""

    def build(seed=0, **kwargs):
        torch.manual_seed(seed)
        options = {"num_classes": 10, "width": 8, "depth": 2, "image_size": 8, "in_channels": 1}
        return DistillationConvNet(**(options | kwargs))

    return build


@pytest.fixture
def networks(digits, small_net):
    """Builds up to three networks of two architectures, whose batch normalizations have the statistics of digits."""

    def build(count=3, *, second_norm):
        data = digits()
        data.setup()
        made = [small_net(1, norm="batch"), small_net(2, norm=second_norm, width=4, depth=1)]
        torch.manual_seed(3)
        made = [*made, ConvNet(10, widths=(4, 6))][:count]
        with torch.no_grad():
            for network in made:
                network.train()(data.normalize(data.part("train").images))
                network.eval()
        return made

    return build
