import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax

from lit_distill.losses.exits import one_for_all, squared_distance

LABELS = torch.tensor([2, 0, 4, 1])


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(4, 5, generator=generator, dtype=torch.double) * 2 for _ in range(2))
    return student, teacher


def targets_by_numpy(teacher, exponent, temperature=1.0):
    target = softmax(teacher.numpy() / temperature, 1)
    for row, label in enumerate(LABELS.tolist()):
        target[row, label] += 1
    target = target**exponent
    for row, label in enumerate(LABELS.tolist()):
        target[row, label] -= 1
    return target


# ---- one for all ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("exponent", "temperature"), [(1.0, 1.0), (1.4, 1.0), (1.3, 4.0), (2.0, 0.5)])
def test_value_equals_numpys(logits, exponent, temperature):
    student, teacher = logits
    log_p = log_softmax(student.numpy() / temperature, 1)
    expected = -(targets_by_numpy(teacher, exponent, temperature) * log_p).sum(1)  # no factor T^2
    options = {"exponent": exponent, "temperature": temperature}
    np.testing.assert_allclose(one_for_all(student, teacher, LABELS, **options, reduction="none"), expected, rtol=1e-7)
    assert float(one_for_all(student, teacher, LABELS, **options)) == pytest.approx(expected.mean())
    assert float(one_for_all(student, teacher, LABELS, **options, reduction="sum")) == pytest.approx(expected.sum())


def test_with_exponent_one_it_is_kl_plus_the_teachers_entropy(logits):
    p_s, p_t = (softmax(z.numpy(), 1) for z in logits)
    entropy = -(p_t * np.log(p_t)).sum(1)
    found = one_for_all(*logits, LABELS, reduction="none")
    np.testing.assert_allclose(found, rel_entr(p_t, p_s).sum(1) + entropy, rtol=1e-7)


def test_gradient_with_exponent_one_is_the_difference_of_probabilities(logits):
    student, teacher = (z.requires_grad_() for z in logits)
    one_for_all(student, teacher, LABELS, reduction="sum").backward()
    expected = softmax(student.detach().numpy(), 1) - softmax(teacher.detach().numpy(), 1)
    np.testing.assert_allclose(student.grad, expected, atol=1e-12)
    assert teacher.grad is None


@pytest.mark.parametrize(("exponent", "temperature"), [(1.3, 1.0), (1.3, 2.5), (2.0, 1.0)])
def test_gradient_is_the_mass_of_the_targets_times_p_minus_the_targets(logits, exponent, temperature):
    student, teacher = (z.requires_grad_() for z in logits)
    one_for_all(student, teacher, LABELS, exponent=exponent, temperature=temperature).backward()
    target = targets_by_numpy(teacher.detach(), exponent, temperature)
    p = softmax(student.detach().numpy() / temperature, 1)
    np.testing.assert_allclose(student.grad, (target.sum(1, keepdims=True) * p - target) / temperature / 4, atol=1e-12)
    assert teacher.grad is None


@pytest.mark.parametrize("exponent", [1.0, 1.4, 2.0])
def test_a_teacher_that_is_sure_and_right_gives_cross_entropy_times_two_to_the_exponent_minus_one(logits, exponent):
    sure = torch.full((4, 5), -1e4, dtype=torch.double)
    sure[torch.arange(4), LABELS] = 1e4
    cross_entropy = -log_softmax(logits[0].numpy(), 1)[np.arange(4), LABELS.numpy()].mean()
    found = one_for_all(logits[0], sure, LABELS, exponent=exponent)
    assert float(found) == pytest.approx((2**exponent - 1) * cross_entropy)


def test_a_confused_teachers_targets_have_little_mass_beside_a_sure_ones():
    # The mass is the loss of a uniform student in units of log K.
    uniform, labels = torch.zeros(1, 100), torch.tensor([7])
    flat = one_for_all(uniform, torch.zeros(1, 100), labels, exponent=1.4) / np.log(100)
    assert float(flat) == pytest.approx(1.01**1.4 - 1 + 99 * 0.01**1.4, rel=1e-5)
    assert float(flat) < 0.2


def test_extreme_logits_stay_finite():
    student = torch.tensor([[1000.0, 0.0, -1000.0]], requires_grad=True)
    value = one_for_all(student, torch.tensor([[0.0, 0.0, 1000.0]]), torch.tensor([2]), exponent=1.4)
    value.backward()
    assert value.item() == pytest.approx((2**1.4 - 1) * 2000)
    assert bool(student.grad.isfinite().all())


def test_it_is_computed_in_float32_under_autocast(logits):
    student, teacher = (z.bfloat16() for z in logits)
    with torch.autocast("cpu", torch.bfloat16):
        value = one_for_all(student, teacher, LABELS, exponent=1.3)
    assert value.dtype == torch.float32
    log_p = log_softmax(student.double().numpy(), 1)
    expected = -(targets_by_numpy(teacher.double(), 1.3) * log_p).sum(1).mean()
    assert float(value) == pytest.approx(expected, rel=1e-5)


# ---- features of exits ---------------------------------------------------------------------------------------------


def test_squared_distance_sums_over_features_and_averages_over_samples():
    first, second = torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    assert squared_distance(first, second, reduction="none").tolist() == [5.0, 4.0]
    assert float(squared_distance(first, second)) == 4.5
    assert float(squared_distance(first, first)) == 0.0


def test_gradient_of_the_distance_is_twice_the_difference_and_spares_the_deepest():
    first, second = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    squared_distance(first, second).backward()
    torch.testing.assert_close(first.grad, 2 * (first - second).detach() / 3)
    assert second.grad is None
