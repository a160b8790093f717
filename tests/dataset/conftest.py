"""Digits and networks small enough for every test."""

import pytest
import torch

from lit_distill.dataset import DistillationConvNet
from lit_distill.image import DigitsDataModule


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
