import numpy as np
import pytest
import torch
from torch import nn

from lit_distill.core.errors import UsageError
from lit_distill.dataset.batchnorm import BatchNormMatcher, channel_moments
from lit_distill.dataset.losses import statistics_distance
from lit_distill.dataset.models import DistillationConvNet
from lit_distill.image.models import ConvNet


def trained(seed=0):
    """A network whose running statistics and affine parameters are not those it began with."""
    torch.manual_seed(seed)
    network = DistillationConvNet(3, width=4, depth=2, norm="batch", image_size=8, in_channels=2)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return network.requires_grad_(False).eval()


def by_hand(network, images, first_weight):
    """R with hooks of its own, from numpy in double precision."""
    layers = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    given = {}
    handles = [
        layer.register_forward_hook(lambda module, args, _: given.__setitem__(module, args[0])) for layer in layers
    ]
    network(images)
    for handle in handles:
        handle.remove()
    total = 0.0
    for number, layer in enumerate(layers):
        maps = given[layer].detach().double().numpy().transpose(1, 0, 2, 3).reshape(layer.num_features, -1)
        off_mean = np.sqrt(((maps.mean(1) - layer.running_mean.double().numpy()) ** 2).sum())
        off_variance = np.sqrt(((maps.var(1) - layer.running_var.double().numpy()) ** 2).sum())  # numpy's is biased
        total += (first_weight if number == 0 else 1.0) * (off_mean + off_variance)
    return total


# ---- moments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_moments_are_those_of_torch_with_their_gradients(layout):
    maps = (torch.randn(5, 3, 4, 6) * 2 + 7).contiguous(memory_format=layout).requires_grad_()
    twin = maps.detach().clone().requires_grad_()
    mean, variance = channel_moments(maps)
    expected_variance, expected_mean = torch.var_mean(twin, (0, 2, 3), correction=0)
    torch.testing.assert_close(mean, expected_mean)
    torch.testing.assert_close(variance, expected_variance)
    directions = torch.randn(2, 3)
    ((mean * directions[0]).sum() + (variance * directions[1]).sum()).backward()
    ((expected_mean * directions[0]).sum() + (expected_variance * directions[1]).sum()).backward()
    torch.testing.assert_close(maps.grad, twin.grad)


def test_moments_have_the_gradient_of_finite_differences():
    maps = torch.randn(3, 2, 2, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(channel_moments, maps)


def test_moments_of_half_precision_are_computed_in_full():
    maps = (torch.randn(8, 2, 8, 8) + 30).bfloat16()
    mean, variance = channel_moments(maps)
    assert mean.dtype == variance.dtype == torch.float32
    np.testing.assert_allclose(variance, maps.float().numpy().var((0, 2, 3)), rtol=1e-5)


# ---- the distance --------------------------------------------------------------------------------------------------


def test_the_distance_is_two_plain_norms():
    mean, variance = torch.tensor([3.0, 4.0]), torch.tensor([5.0, 13.0])
    found = statistics_distance(mean, variance, torch.zeros(2), torch.tensor([0.0, 1.0]))
    assert float(found) == pytest.approx(5 + 13)


def test_equal_statistics_have_distance_0_and_gradient_0():
    mean, variance = torch.randn(4, requires_grad=True), torch.rand(4, requires_grad=True)
    found = statistics_distance(mean, variance, mean.detach().clone(), variance.detach().clone())
    assert found.item() == 0
    found.backward()
    assert mean.grad.tolist() == variance.grad.tolist() == [0.0] * 4


def test_no_gradient_reaches_what_is_remembered():
    values = torch.rand(4, 5, requires_grad=True)
    statistics_distance(*values).backward()
    # A norm's gradient is the unit vector away from what is remembered.
    away = (values[:2] - values[2:]).detach()
    assert torch.allclose(values.grad[:2], away / away.norm(dim=1, keepdim=True))
    assert values.grad[2:].abs().max() == 0


# ---- the matcher ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_weight", [10.0, 1.0])
def test_it_is_what_hooks_find(first_weight):
    network, images = trained(), torch.randn(6, 2, 8, 8)
    logits, distance = BatchNormMatcher(network, first_weight)(images)
    assert float(distance) == pytest.approx(by_hand(network, images, first_weight), rel=1e-5)
    torch.testing.assert_close(logits, network(images))


def test_it_is_0_where_the_batch_is_what_is_remembered():
    network, images = trained(), torch.randn(6, 2, 8, 8)
    # In the order of the layers, since in eval mode a layer passes on what its own statistics made of the batch.
    for layer in [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]:

        def remember(module, args):
            module.running_mean.copy_(args[0].mean((0, 2, 3)))
            module.running_var.copy_(args[0].var((0, 2, 3), correction=0))

        handle = layer.register_forward_pre_hook(remember)
        network(images)
        handle.remove()
    assert float(BatchNormMatcher(network)(images)[1]) == pytest.approx(0, abs=1e-4)
    assert float(BatchNormMatcher(network)(images + 0.1)[1]) > 0.1


def test_the_gradient_is_that_of_the_plain_computation():
    network, images = trained(), torch.randn(6, 2, 8, 8, requires_grad=True)
    BatchNormMatcher(network, 10.0)(images)[1].backward()
    twin = images.detach().clone().requires_grad_()
    layers = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    given = []
    handles = [layer.register_forward_hook(lambda _, args, __: given.append(args[0])) for layer in layers]
    network(twin)
    for handle in handles:
        handle.remove()
    total = 0.0
    for weight, layer, maps in zip((10.0, 1.0), layers, given, strict=True):
        variance, mean = torch.var_mean(maps, (0, 2, 3), correction=0)
        total = total + weight * ((mean - layer.running_mean).norm() + (variance - layer.running_var).norm())
    total.backward()
    torch.testing.assert_close(images.grad, twin.grad)
    assert twin.grad.abs().max() > 0.01


def test_hooks_do_not_outlive_the_forward():
    network = trained()
    matcher = BatchNormMatcher(network)
    matcher(torch.randn(2, 2, 8, 8))
    with pytest.raises(RuntimeError):
        matcher(torch.randn(2, 5, 8, 8))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in network.modules())


def test_one_forward_gives_both():
    network, runs = trained(), []
    network.register_forward_hook(lambda *_: runs.append(1))
    BatchNormMatcher(network)(torch.randn(2, 2, 8, 8))
    assert runs == [1]


def test_it_changes_nothing_in_the_network():
    network = trained()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    BatchNormMatcher(network)(torch.randn(2, 2, 8, 8, requires_grad=True))[1].backward()
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_statistics_are_in_float32_under_autocast():
    network, images = trained(), torch.randn(6, 2, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        distance = BatchNormMatcher(network)(images)[1]
    assert distance.dtype == torch.float32
    assert float(distance) == pytest.approx(by_hand(network, images, 10.0), rel=0.02)


@pytest.mark.parametrize(
    "network",
    [
        DistillationConvNet(3, width=4, depth=1, norm="instance", image_size=8),
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False)),
    ],
)
def test_a_network_without_statistics_is_refused_in_one_line(network):
    says = (
        rf"^model: {type(network).__name__} has no BatchNorm2d, whose statistics are matched; give another network, or"
    )
    with pytest.raises(UsageError, match=says):
        BatchNormMatcher(network)


def test_max_pooling_networks_are_matched_too():
    torch.manual_seed(0)
    network = ConvNet(3, widths=(4, 6), in_channels=2).requires_grad_(False).eval()
    images = torch.randn(5, 2, 8, 8)
    assert float(BatchNormMatcher(network)(images)[1]) == pytest.approx(by_hand(network, images, 10.0), rel=1e-5)
