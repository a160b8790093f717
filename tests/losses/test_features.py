import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lit_distill.losses import attention_map, attention_transfer, hint_mse


@pytest.fixture
def maps():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(4, 6, 5, 3, generator=generator), torch.randn(4, 2, 5, 3, generator=generator)


def attention_by_numpy(feature, power=2.0):
    v = (np.abs(feature.double().numpy()) ** power).mean(1).reshape(len(feature), -1)
    return v / np.linalg.norm(v, axis=1, keepdims=True)


# ---- hint ----------------------------------------------------------------------------------------------------------


def test_hint_is_the_mean_of_squares():
    student, teacher = (
        torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]),
        torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 3.0]]),
    )
    assert hint_mse(student, teacher, reduction="none").tolist() == pytest.approx([13 / 3, 3.0])
    assert float(hint_mse(student, teacher)) == pytest.approx((13 / 3 + 3) / 2)
    assert float(hint_mse(student, teacher, reduction="sum")) == pytest.approx(13 / 3 + 3)


def test_hint_of_maps_is_torchs_mse(maps):
    student, teacher = maps[0], maps[0].flip(0)
    torch.testing.assert_close(hint_mse(student, teacher), F.mse_loss(student, teacher))


def test_hint_vanishes_for_equal_features_alone(maps):
    assert float(hint_mse(maps[0], maps[0].clone())) == 0.0
    assert float(hint_mse(maps[0], maps[0] + 0.5)) == pytest.approx(0.25, rel=1e-4)


def test_gradient_of_the_hint_is_two_over_all_elements(maps):
    student, teacher = maps[0].requires_grad_(), maps[0].detach().flip(1).requires_grad_()
    hint_mse(student, teacher).backward()
    expected = 2 / (4 * 6 * 5 * 3) * (student - teacher).detach()
    torch.testing.assert_close(student.grad, expected)
    assert teacher.grad is None


def test_hint_is_float32_under_autocast(maps):
    student, teacher = maps[0].bfloat16(), maps[0].flip(0).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = hint_mse(student, teacher)
    assert value.dtype == torch.float32
    expected = ((student.float().numpy() - teacher.float().numpy()) ** 2).mean()
    assert float(value) == pytest.approx(expected, rel=1e-5)


def test_hint_refuses_shapes_that_would_broadcast(maps):
    with pytest.raises(Exception, match="teacher_feature"):
        hint_mse(maps[0], maps[0][:, :1])


# ---- attention -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_attention_map_equals_numpys(maps, power):
    np.testing.assert_allclose(attention_map(maps[0], power=power), attention_by_numpy(maps[0], power), rtol=1e-5)


def test_attention_map_of_zeros_is_zero_and_of_ones_is_even():
    assert attention_map(torch.zeros(1, 2, 2, 2)).tolist() == [[0.0] * 4]
    assert attention_map(torch.ones(1, 2, 2, 2)).tolist() == [[0.5] * 4]


def test_attention_transfer_of_two_pixels_by_hand():
    # All energy in pixel 0 against energy 3:4 over the two: Q = (1, 0) and (0.6, 0.8).
    student = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    teacher = torch.tensor([3.0, 4.0]).sqrt().view(1, 1, 1, 2)
    assert float(attention_transfer(student, teacher)) == pytest.approx((0.4**2 + 0.8**2) / 2, rel=1e-5)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_attention_transfer_is_two_minus_two_cosines(maps, power):
    q_student, q_teacher = attention_by_numpy(maps[0], power), attention_by_numpy(maps[1], power)
    expected = (2 - 2 * (q_student * q_teacher).sum(1)) / (5 * 3)
    found = attention_transfer(*maps, power=power, reduction="none")
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert float(attention_transfer(*maps, power=power)) == pytest.approx(expected.mean(), rel=1e-4)


def test_attention_transfer_sees_neither_scale_nor_sign_nor_order_of_channels(maps):
    student, teacher = maps
    assert float(attention_transfer(student, -7.0 * student[:, torch.randperm(6)])) == pytest.approx(0.0, abs=1e-9)
    value = float(attention_transfer(student, teacher))
    assert value > 1e-3
    assert float(attention_transfer(3.0 * student.flip(1), teacher)) == pytest.approx(value, rel=1e-5)
    # Pixels are another matter.
    assert float(attention_transfer(student.flip(2), teacher)) != pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("larger", ["student", "teacher"])
def test_grids_that_differ_are_averaged_to_the_smaller(maps, larger):
    small = maps[1]
    # Every pixel twice in both directions: averaging undoes it exactly.
    large = maps[0].repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = (2 - 2 * (attention_by_numpy(maps[0]) * attention_by_numpy(small)).sum(1)).mean() / 15
    pair = (large, small) if larger == "student" else (small, large)
    assert float(attention_transfer(*pair)) == pytest.approx(expected, rel=1e-4)


def test_pooling_keeps_float32_for_bfloat16_features():
    generator = torch.Generator().manual_seed(2)
    student = (torch.randn(2, 3, 9, 9, generator=generator) + 2).bfloat16()
    teacher = torch.randn(2, 3, 3, 3, generator=generator).bfloat16()
    pooled = student.double().numpy().reshape(2, 3, 3, 3, 3, 3).mean((3, 5))
    q_student, q_teacher = attention_by_numpy(torch.from_numpy(pooled)), attention_by_numpy(teacher)
    with torch.autocast("cpu", torch.bfloat16):
        value = attention_transfer(student, teacher)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx((2 - 2 * (q_student * q_teacher).sum(1)).mean() / 9, rel=1e-4)


def test_gradient_of_attention_transfer_is_orthogonal_to_the_feature_and_never_reaches_the_teacher(maps):
    student, teacher = maps[0].requires_grad_(), maps[1].requires_grad_()
    attention_transfer(student, teacher, reduction="sum").backward()
    assert teacher.grad is None
    # Scaling one sample's feature changes nothing (Euler: the gradient has no component along the feature).
    along = (student.grad * student).flatten(1).sum(1).tolist()
    assert along == pytest.approx([0.0] * 4, abs=1e-6)
    assert float(student.grad.norm()) > 1e-3


def test_gradient_of_attention_transfer_equals_the_difference_quotient(maps):
    student, teacher = maps[0][:1, :2, :2, :2].clone().requires_grad_(), maps[1][:1, :, :2, :2]
    attention_transfer(student, teacher).backward()
    step = 1e-5
    for place in ((0, 0, 0, 0), (0, 1, 1, 0)):
        values = []
        for sign in (1, -1):
            moved = student.detach().double().numpy().copy()
            moved[place] += sign * step
            q = attention_by_numpy(torch.from_numpy(moved))
            values.append(((q - attention_by_numpy(teacher)) ** 2).mean())
        assert float(student.grad[place]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-3)


def test_a_dead_feature_gives_a_finite_value_and_gradient(maps):
    student = torch.zeros(4, 6, 5, 3, requires_grad=True)
    value = attention_transfer(student, maps[1])
    value.backward()
    assert math.isfinite(value.item())
    assert value.item() == pytest.approx(1 / 15, rel=1e-4)  # |0 - Q|^2 / (HW)
    assert bool(student.grad.isfinite().all())
