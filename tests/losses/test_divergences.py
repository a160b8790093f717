import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax, rel_entr, softmax

from lit_distill.losses import forward_kl, reverse_kl
from lit_distill.losses.reduction import reduce

TEMPERATURES = (0.5, 1.0, 4.0)


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(3)
    return 3 * torch.randn(5, 7, generator=generator), 3 * torch.randn(5, 7, generator=generator)


def by_scipy(p_logits, q_logits, temperature):
    """KL(p || q) per sample, in float64."""
    p = softmax(p_logits.double().numpy() / temperature, axis=1)
    q = softmax(q_logits.double().numpy() / temperature, axis=1)
    return rel_entr(p, q).sum(1)


def test_two_coins_have_the_divergences_of_the_textbook():
    # Teacher (3/4, 1/4), student (1/2, 1/2): logits are log probabilities.
    teacher, student = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    assert float(forward_kl(student, teacher)) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-5)
    assert float(reverse_kl(student, teacher)) == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2), rel=1e-5)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_values_equal_scipys_relative_entropy(logits, temperature):
    student, teacher = logits
    options = {"temperature": temperature, "reduction": "none"}
    expected_forward = temperature**2 * by_scipy(teacher, student, temperature)
    expected_reverse = temperature**2 * by_scipy(student, teacher, temperature)
    np.testing.assert_allclose(forward_kl(student, teacher, **options), expected_forward, rtol=1e-4)
    np.testing.assert_allclose(reverse_kl(student, teacher, **options), expected_reverse, rtol=1e-4)


def test_batchmean_is_torchs_batchmean_and_not_its_mean(logits):
    student, teacher = logits
    arguments = F.log_softmax(student, 1), F.log_softmax(teacher, 1)
    batchmean = F.kl_div(*arguments, reduction="batchmean", log_target=True)
    torch.testing.assert_close(forward_kl(student, teacher), batchmean)
    with pytest.warns(UserWarning, match="batchmean"):
        mean = F.kl_div(*arguments, reduction="mean", log_target=True)
    torch.testing.assert_close(forward_kl(student, teacher), mean * 7)


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_the_factor_t2_can_be_left_out(logits, divergence):
    plain = divergence(*logits, temperature=4.0, scale_by_t2=False)
    direction = logits[::-1] if divergence is forward_kl else logits
    assert float(plain) == pytest.approx(by_scipy(*direction, 4.0).mean(), rel=1e-4)


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_sum_and_mean_follow_from_the_values_of_the_samples(logits, divergence):
    values = divergence(*logits, reduction="none").tolist()
    assert len(values) == 5
    assert float(divergence(*logits, reduction="sum")) == pytest.approx(sum(values), rel=1e-5)
    assert float(divergence(*logits)) == pytest.approx(sum(values) / 5, rel=1e-5)


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_equal_distributions_have_no_divergence_and_unequal_ones_have_some(logits, divergence):
    student, teacher = logits
    # A constant added to all logits of a sample changes no softmax.
    assert divergence(student, student + 5.0, reduction="none").tolist() == pytest.approx([0.0] * 5, abs=1e-5)
    assert bool((divergence(student, teacher, reduction="none") > 0.1).all())


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_high_temperature_compares_centred_logits(logits, divergence):
    student, teacher = (x.double().numpy() for x in logits)
    difference = (student - student.mean(1, keepdims=True)) - (teacher - teacher.mean(1, keepdims=True))
    expected = (difference**2).sum(1) / (2 * 7)
    found = divergence(*logits, temperature=300.0, reduction="none")
    np.testing.assert_allclose(found, expected, rtol=0.05)  # the next order is 1/T


def test_a_certain_teacher_is_a_label(logits):
    labels = torch.tensor([0, 3, 6, 1, 1])
    teacher = 100.0 * F.one_hot(labels, 7)
    expected = -log_softmax(logits[0].double().numpy(), axis=1)[np.arange(5), labels].mean()
    assert float(forward_kl(logits[0], teacher)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradient_of_forward_kl_is_t_times_the_difference_of_probabilities(logits, temperature):
    student, teacher = logits[0].requires_grad_(), logits[1].requires_grad_()
    forward_kl(student, teacher, temperature=temperature, reduction="sum").backward()
    p_student = softmax(student.detach().double().numpy() / temperature, axis=1)
    p_teacher = softmax(teacher.detach().double().numpy() / temperature, axis=1)
    np.testing.assert_allclose(student.grad, temperature * (p_student - p_teacher), atol=1e-5)
    assert teacher.grad is None


def test_gradient_of_reverse_kl_weighs_by_the_students_own_probabilities(logits):
    student, teacher = logits[0].requires_grad_(), logits[1].requires_grad_()
    reverse_kl(student, teacher, reduction="sum").backward()
    log_s, log_t = (log_softmax(x.detach().double().numpy(), axis=1) for x in (student, teacher))
    kl = by_scipy(student.detach(), teacher.detach(), 1.0)[:, None]
    np.testing.assert_allclose(student.grad, np.exp(log_s) * ((log_s - log_t) - kl), atol=1e-5)
    assert teacher.grad is None


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_arithmetic_is_float32_for_bfloat16_logits_under_autocast(logits, divergence):
    student, teacher = (x.bfloat16() for x in logits)
    with torch.autocast("cpu", torch.bfloat16):
        value = divergence(student, teacher, temperature=4.0)
    assert value.dtype == torch.float32
    direction = (teacher, student) if divergence is forward_kl else (student, teacher)
    assert float(value) == pytest.approx(16 * by_scipy(*(x.float() for x in direction), 4.0).mean(), rel=1e-4)


# Both are sure. To the one, what the other is sure of is 2e4 less likely than its own; the reverse divergence has come
# so far that no small step of the student's logits changes it.
@pytest.mark.parametrize(
    ("divergence", "gradient"),
    [(forward_kl, [1.0, 0.0, -1.0]), (reverse_kl, [0.0, 0.0, 0.0])],
    ids=["forward", "reverse"],
)
def test_large_logits_stay_exact(divergence, gradient):
    student = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    value = divergence(student, torch.tensor([[-1e4, 0.0, 1e4]]))
    value.backward()
    assert value.item() == pytest.approx(2e4)
    assert student.grad[0].tolist() == pytest.approx(gradient)


def test_shapes_that_differ_are_refused(logits):
    with pytest.raises(Exception, match=r"student_logits|teacher_logits"):
        forward_kl(logits[0], logits[1][:, :6])


def test_reduction_mean_is_refused():
    with pytest.raises(Exception, match=r"batchmean|reduction"):
        reduce(torch.ones(2), "mean")
