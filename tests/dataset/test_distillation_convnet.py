"""The network of the tables, by its published sizes."""

import pytest
import torch

from lit_distill.core.errors import UsageError
from lit_distill.dataset import DistillationConvNet


def test_parameters_of_convnet_3():
    # 3 convolutions with bias, scale and shift of each normalization, 2048 x 10 + 10: 320,010 in the literature.
    assert sum(p.numel() for p in DistillationConvNet(10).parameters()) == 320_010


def test_instance_norm_is_torchs():
    layer = DistillationConvNet(10, width=6).layer1[1]
    images = torch.randn(3, 6, 5, 5)
    expected = torch.nn.InstanceNorm2d(6, affine=True)(images)
    assert torch.allclose(layer(images), expected, atol=1e-6)


def test_28_pixels_are_padded_to_32():
    network = DistillationConvNet(10, width=4, image_size=28, in_channels=1)
    assert network.embed(torch.zeros(2, 1, 28, 28)).shape == (2, 4 * 16)


def test_too_deep():
    with pytest.raises(UsageError, match="4 blocks do not fit 8 pixels"):
        DistillationConvNet(10, depth=4, image_size=8)
