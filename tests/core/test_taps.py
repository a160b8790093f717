import copy

import pytest
import torch
from torch import nn

from lit_distill.core.errors import UsageError
from lit_distill.core.taps import FeatureTaps, probe


class Shared(nn.Module):
    """One ReLU that runs twice, a module that never runs, one that returns a tuple."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 2)
        self.relu = nn.ReLU()
        self.idle = nn.Linear(3, 3)
        self.recurrent = nn.GRU(2, 2, batch_first=True)

    def forward(self, x):
        hidden = self.relu(self.first(x))
        self.recurrent(hidden[:, None, :2])
        return self.relu(self.second(hidden))


@pytest.fixture
def network():
    return Shared()


def hooks(network):
    return sum(len(module._forward_hooks) for module in network.modules())


def test_features_are_what_the_modules_return_and_the_output_is_untouched(network):
    x = torch.randn(5, 3)
    output, features = FeatureTaps(network, ["first", "second"])(x)
    hidden = x @ network.first.weight.T + network.first.bias
    torch.testing.assert_close(features["first"], hidden)
    torch.testing.assert_close(features["second"], hidden.clamp(min=0) @ network.second.weight.T + network.second.bias)
    torch.testing.assert_close(output, features["second"].clamp(min=0))
    assert list(features) == ["first", "second"]


def test_gradients_flow_through_features(network):
    _, features = FeatureTaps(network, ["first"])(torch.ones(1, 3))
    features["first"].sum().backward()
    assert network.first.weight.grad.tolist() == [[1.0] * 3] * 4
    assert network.second.weight.grad is None


def test_a_module_that_runs_twice_is_told_apart_by_run(network):
    x = torch.randn(5, 3)
    output, features = FeatureTaps(network, ["relu:0", "relu:-1", "relu:1"])(x)
    torch.testing.assert_close(features["relu:0"], network.first(x).clamp(min=0))
    assert features["relu:-1"] is output
    assert features["relu:1"] is output
    with pytest.raises(UsageError, match=r"'relu' ran 2 times.*relu:0"):
        FeatureTaps(network, ["relu"])(x)
    with pytest.raises(UsageError, match="ran 2 times; use :0 to :1"):
        FeatureTaps(network, ["relu:2"])(x)
    with pytest.raises(UsageError, match="whole number"):
        FeatureTaps(network, ["relu:last"])


def test_an_unknown_name_is_refused_with_the_nearest(network):
    with pytest.raises(UsageError, match=r"tap 'frist' is not a module of Shared; nearest: first"):
        FeatureTaps(network, ["frist"])
    with pytest.raises(UsageError, match="not a module"):
        FeatureTaps(network, [""])


def test_a_module_that_does_not_run_or_returns_no_tensor_is_refused(network):
    with pytest.raises(UsageError, match="'idle' did not run"):
        FeatureTaps(network, ["idle"])(torch.ones(1, 3))
    with pytest.raises(UsageError, match="'recurrent' returned tuple"):
        FeatureTaps(network, ["recurrent"])(torch.ones(1, 3))


def test_a_feature_that_is_overwritten_later_is_refused():
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    _, features = FeatureTaps(network, ["1"])(torch.ones(1, 3))
    assert bool((features["1"] >= 0).all())
    with torch.no_grad(), pytest.raises(UsageError, match="tap '0' was overwritten by an operation in place"):
        FeatureTaps(network, ["0"])(torch.ones(1, 3))
    with torch.inference_mode():  # cannot be noticed there; must work nonetheless
        FeatureTaps(network, ["1"])(torch.ones(1, 3))


def test_hooks_are_gone_after_a_forward_and_after_a_failed_one(network):
    taps = FeatureTaps(network, ["first"])
    taps(torch.ones(1, 3))
    assert hooks(network) == 0
    with pytest.raises(RuntimeError):
        taps(torch.ones(1, 99))
    assert hooks(network) == 0


def test_a_deep_copy_taps_the_copy(network):
    taps = copy.deepcopy(FeatureTaps(network, ["first"]))
    assert taps.network is not network
    with torch.no_grad():
        network.first.bias.fill_(100.0)
    _, features = taps(torch.zeros(1, 3))
    assert bool((features["first"].abs() < 50).all())


def test_probe_finds_shapes_and_leaves_mode_and_buffers_alone():
    network = nn.Sequential(nn.Conv2d(1, 6, 3, stride=2), nn.BatchNorm2d(6), nn.Flatten(), nn.LazyLinear(5))
    network(torch.randn(2, 1, 9, 9))
    network[0].eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    output, shapes = probe(network, (1, 9, 9), ["1", "2"])
    assert output.shape == (2, 5)
    assert shapes == {"1": (6, 4, 4), "2": (96,)}
    assert [module.training for module in network] == [False, True, True, True]
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_probe_says_which_sample_a_network_does_not_take():
    with pytest.raises(UsageError, match=r"Linear does not accept a sample of shape \(4,\): mat1"):
        probe(nn.Linear(3, 2), (4,))


def test_probe_survives_an_assertion_without_words():
    class Strict(nn.Module):
        def forward(self, x):
            raise AssertionError

    with pytest.raises(UsageError, match="AssertionError"):
        probe(Strict(), (4,))


def test_a_tap_at_the_input_is_what_the_module_was_given(network):
    x = torch.randn(5, 3)
    _, features = FeatureTaps(network, ["relu:0@input", "relu:1@input", "first@input"])(x)
    torch.testing.assert_close(features["relu:0@input"], network.first(x))
    torch.testing.assert_close(features["relu:1@input"], network.second(network.first(x).clamp(min=0)))
    assert features["first@input"] is x
    with pytest.raises(UsageError, match="after the @ stands 'input'"):
        FeatureTaps(network, ["first@output"])


def test_the_input_of_an_activation_in_place_is_kept_and_has_its_gradient():
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    output, features = FeatureTaps(network, ["1@input"])(x)
    torch.testing.assert_close(features["1@input"], network[0](x))
    assert (features["1@input"] < 0).any()
    torch.testing.assert_close(output, network(x))
    features["1@input"].sum().backward()
    torch.testing.assert_close(network[0].weight.grad, x.sum(0).expand(4, 3))
    assert not any(module._forward_pre_hooks for module in network.modules())
