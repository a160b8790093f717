import math
from itertools import combinations

import pytest
import torch

from lit_distill.core.errors import UsageError
from lit_distill.dataset.committee import Committee

CIFAR100 = (64.0, 60.6, 51.6, 59.4, 56.4)


@pytest.fixture
def committee(tiny):
    def build(priors=CIFAR100, size=None, **kwargs):
        size = len(priors) if size is None else size
        return Committee([tiny(3 + number, seed=number) for number in range(size)], priors, **kwargs)

    return build


# ---- weights -------------------------------------------------------------------------------------------------------


def test_weights_are_those_of_the_published_priors(committee):
    made = committee()
    assert made.weights([0, 1], temperature=5.0).tolist() == pytest.approx([0.664, 0.336], abs=5e-4)
    five = [0.323, 0.230, 0.093, 0.204, 0.151]
    assert made.weights(temperature=10.0).tolist() == pytest.approx(five, abs=1e-3)


def test_weights_are_a_softmax_over_the_chosen_alone(committee):
    found = committee().weights([1, 4], temperature=3.0).tolist()
    parts = [math.exp(60.6 / 3), math.exp(56.4 / 3)]
    assert found == pytest.approx([part / sum(parts) for part in parts], rel=1e-5)
    assert sum(found) == pytest.approx(1)


def test_equal_priors_and_large_temperatures_make_equal_weights(committee):
    assert committee([7.0] * 4).weights(temperature=5.0).tolist() == [0.25] * 4
    assert committee().weights(temperature=1e9).tolist() == pytest.approx([0.2] * 5)
    assert committee(voting="equal").weights([0, 2], temperature=5.0).tolist() == [0.5, 0.5]
    assert committee(None, size=3, voting="equal").weights(temperature=5.0).tolist() == pytest.approx([1 / 3] * 3)


def test_one_voice_is_all(committee):
    assert committee().weights([2], temperature=5.0).tolist() == [1.0]
    assert committee(None, size=1).weights(temperature=5.0).tolist() == [1.0]


def test_random_weights_are_shares_of_their_sum(committee):
    made = committee(voting="random")
    drawn = made.weights([0, 3, 4], temperature=5.0, generator=torch.Generator().manual_seed(4))
    uniform = torch.rand(3, generator=torch.Generator().manual_seed(4))
    assert drawn.tolist() == pytest.approx((uniform / uniform.sum()).tolist())
    assert sum(drawn.tolist()) == pytest.approx(1)


# ---- voters --------------------------------------------------------------------------------------------------------


def test_a_single_image_has_those_with_the_largest_priors(committee):
    assert committee().voters(0, 1) == (0, 1)
    assert committee((1.5, 9.0, 3.0, 8.0)).voters(0, 1) == (1, 3)
    assert committee((1.5, 9.0, 3.0, 8.0)).voters(0, 1, count=1) == (1,)


def test_ten_images_have_the_ten_pairs_in_their_order(committee):
    pairs = [committee().voters(number, 10) for number in range(10)]
    assert pairs == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, 4)]
    assert [committee().voters(number, 5, count=1) for number in range(5)] == [(0,), (1,), (2,), (3,), (4,)]


def test_other_numbers_of_images_have_random_pairs(committee):
    made = committee()
    pairs = [made.voters(number, 50, seed=3) for number in range(50)]
    assert set(pairs) <= set(combinations(range(5), 2))
    assert len(set(pairs)) > 5
    assert pairs == [made.voters(number, 50, seed=3) for number in range(50)]
    assert pairs != [made.voters(number, 50, seed=4) for number in range(50)]


def test_a_committee_smaller_than_a_group_votes_whole(committee):
    for per_class in (1, 4):
        assert committee((5.0, 6.0)).voters(0, per_class, count=2) == (0, 1)
        assert committee(None, size=1).voters(0, per_class, count=2) == (0,)


# ---- the networks --------------------------------------------------------------------------------------------------


def test_members_are_frozen(committee):
    made = committee()
    assert not any(parameter.requires_grad for parameter in made.parameters())
    assert not any(module.training for module in made.modules())


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"size": 0}, r"^model\.members is empty; give one trained network or more$"),
        (
            {"priors": None, "size": 3},
            r"^model\.priors is missing; give 3 numbers in percent, one for each member, or set",
        ),
        ({"priors": (4.0, 5.0), "size": 3}, r"^model\.priors has 2 numbers for 3 members; give one for each$"),
        ({"priors": (0.6, 0.7)}, r"^model\.priors are \[0\.6, 0\.7\]; give percent, not shares"),
    ],
)
def test_mistakes_are_told_in_one_line(committee, options, says):
    with pytest.raises(UsageError, match=says):
        committee(**options)


def test_members_of_other_classes_are_refused_in_one_line(tiny):
    with pytest.raises(UsageError, match=r"^model\.members have 3, 5 classes; give networks of the same data$"):
        Committee([tiny(), tiny(num_classes=5)], voting="equal").check((2, 8, 8), 3)
    says = r"^model\.members have 3 classes, the data has 10; train them on this data$"
    with pytest.raises(UsageError, match=says):
        Committee([tiny(), tiny()], voting="equal").check((2, 8, 8), 10)
    with pytest.raises(UsageError, match=r"TinyNet does not accept a sample of shape \(1, 8, 8\)"):
        Committee([tiny()]).check((1, 8, 8), 3)
