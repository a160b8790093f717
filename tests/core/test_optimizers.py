import math

import pytest
import torch
from torch import nn

from lit_distill.core.errors import UsageError
from lit_distill.core.optimizers import MatrixDecayAdamW, SmoothedCosine


def test_only_weights_of_more_than_one_dimension_decay():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 3))
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    optimizer = MatrixDecayAdamW(list(network.parameters()), lr=0.1, weight_decay=0.5)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in network.named_parameters():
        factor = 1 - 0.1 * 0.5 if name in ("0.weight", "2.weight") else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_without_decay_it_is_adamw():
    own, other = nn.Linear(3, 2), nn.Linear(3, 2)
    other.load_state_dict(own.state_dict())
    inputs = torch.randn(5, 3)
    for network, optimizer in (
        (own, MatrixDecayAdamW(own.parameters(), lr=0.01, weight_decay=0.0)),
        (other, torch.optim.AdamW(other.parameters(), lr=0.01, weight_decay=0.0)),
    ):
        for _ in range(3):
            optimizer.zero_grad()
            network(inputs).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(own.weight, other.weight, rtol=0, atol=0)


@pytest.mark.parametrize(("stretch", "last"), [(1.0, 0.0), (2.0, 0.5)])
def test_the_schedule_ends_where_its_stretch_says(stretch, last):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    schedule = SmoothedCosine(optimizer, epochs=8, stretch=stretch)
    rates = [schedule.get_last_lr()[0]]
    for _ in range(10):
        optimizer.step()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    assert rates[0] == 0.4
    assert rates[3] == pytest.approx(0.4 * 0.5 * (1 + math.cos(3 * math.pi / (8 * stretch))))
    assert rates[8:] == pytest.approx([0.4 * last] * 3, abs=1e-12)


def test_a_resumed_schedule_goes_on():
    def build():
        return SmoothedCosine(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), epochs=8)

    first, second = build(), build()
    for _ in range(3):
        first.optimizer.step()
        first.step()
    second.load_state_dict(first.state_dict())
    first.step()
    second.step()
    assert first.get_last_lr() == second.get_last_lr() == pytest.approx([0.5])


def test_nonsense_is_refused():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(UsageError, match="epochs is 0"):
        SmoothedCosine(optimizer, epochs=0)
    with pytest.raises(UsageError, match=r"stretch is 0\.5"):
        SmoothedCosine(optimizer, epochs=5, stretch=0.5)
