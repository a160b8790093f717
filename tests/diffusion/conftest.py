"""Small denoisers of digits, and real digits to go with them."""

import pytest
import torch
from torch import nn

from lit_distill.diffusion.data import GeneratorImages
from lit_distill.diffusion.denoiser import Denoiser
from lit_distill.diffusion.evaluation import GenerationEvaluation
from lit_distill.diffusion.models import ResidualMLP
from lit_distill.diffusion.paths import EDMPath
from lit_distill.image import DigitsDataModule


@pytest.fixture
def make_denoiser():
    """Builds a denoiser of 8x8 digits with random weights, none of them zero."""

    def build(seed=0, path=None, prediction="edm", num_classes=10):
        torch.manual_seed(seed)
        network = ResidualMLP(64, num_classes or 0, width=16, depth=2)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.15)
        return Denoiser(network, path or EDMPath(), prediction, num_classes, data_std=0.75)

    return build


@pytest.fixture
def digits():
    """Digits in [-1, 1], eight to a batch."""
    return GeneratorImages(DigitsDataModule(mean=(0.5,), std=(0.5,)), epoch_batches=6, batch_size=8, seed=0)


@pytest.fixture
def little():
    """An evaluation that costs nothing."""
    return GenerationEvaluation(samples=20, val_samples=20, real_samples=30)
