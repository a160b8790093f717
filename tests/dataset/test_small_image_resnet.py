import pytest
import torch

from lit_distill.core.errors import UsageError
from lit_distill.core.networks import check_redrawable, count_parameters
from lit_distill.core.taps import probe
from lit_distill.dataset.models import SmallImageResNet


# Counts of the widely used CIFAR variants of these networks.
@pytest.mark.parametrize(("depth", "parameters"), [(18, 11_173_962), (50, 23_520_842)])
def test_networks_are_those_of_the_literature(depth, parameters):
    with torch.device("meta"):
        network = SmallImageResNet(depth, 10)
    assert count_parameters(network) == parameters


def test_the_first_stage_keeps_the_grid():
    network = SmallImageResNet(18, 7)
    logits, shapes = probe(network, (3, 32, 32), [*network.stages, network.penultimate])
    assert logits.shape == (2, 7)
    assert list(shapes.values()) == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512,)]
    check_redrawable(network)


def test_other_depths_are_refused():
    with pytest.raises(UsageError, match="no ResNet-20"):
        SmallImageResNet(20, 10)
