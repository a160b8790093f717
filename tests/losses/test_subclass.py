import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp, softmax
from scipy.stats import entropy

from lit_distill.losses import forward_kl
from lit_distill.losses.subclass import class_logits, subclass_cross_entropy, subclass_targets

B, C, S = 5, 3, 4


@pytest.fixture
def logits():
    """The student's (B, C * S), the teacher's (B, C), the subclasses' (B, C, S)."""
    generator = torch.Generator().manual_seed(4)
    return tuple(3 * torch.randn(*shape, generator=generator) for shape in ((B, C * S), (B, C), (B, C, S)))


# ---- targets -------------------------------------------------------------------------------------------------------


def test_targets_equal_a_loop_over_samples_classes_and_subclasses(logits):
    _, teacher, inner = logits
    found = subclass_targets(teacher, inner, temperature=2.0, subclass_temperature=0.5)
    for b in range(B):
        classes = softmax(teacher[b].double().numpy() / 2.0)
        for c in range(C):
            powers = np.exp(inner[b, c].double().numpy() / 0.5)
            for s in range(S):
                assert float(found[b, c * S + s]) == pytest.approx(classes[c] * powers[s] / powers.sum(), rel=1e-5)


def test_summed_over_subclasses_targets_are_those_of_kd(logits):
    _, teacher, inner = logits
    found = subclass_targets(teacher, inner, temperature=3.0, subclass_temperature=0.3)
    np.testing.assert_allclose(found.view(B, C, S).sum(2), softmax(teacher.numpy() / 3.0, 1), rtol=1e-5)


def test_a_hot_split_is_even_and_a_cold_one_takes_the_largest(logits):
    _, teacher, inner = logits
    classes = softmax(teacher.numpy(), 1)[:, :, None]
    hot = subclass_targets(teacher, inner, subclass_temperature=1e6).view(B, C, S)
    np.testing.assert_allclose(hot, np.repeat(classes / S, S, 2), rtol=1e-4)
    cold = subclass_targets(teacher, inner, subclass_temperature=1e-3).view(B, C, S)
    largest = np.arange(S) == inner.numpy().argmax(2)[:, :, None]
    np.testing.assert_allclose(cold, classes * largest, atol=1e-6)


def test_a_subclass_at_minus_infinity_gets_nothing():
    inner = torch.tensor([[[0.0, -torch.inf], [0.0, 0.0]]])
    assert subclass_targets(torch.zeros(1, 2), inner).tolist() == [[0.5, 0.0, 0.25, 0.25]]


# ---- loss ----------------------------------------------------------------------------------------------------------


def test_loss_equals_numpys_cross_entropy_in_every_reduction(logits):
    student, teacher, inner = logits
    targets = subclass_targets(teacher, inner)
    expected = -(targets.double().numpy() * log_softmax(student.double().numpy(), 1)).sum(1)
    np.testing.assert_allclose(subclass_cross_entropy(student, targets, reduction="none"), expected, rtol=1e-5)
    assert float(subclass_cross_entropy(student, targets)) == pytest.approx(expected.mean(), rel=1e-5)
    assert float(subclass_cross_entropy(student, targets, reduction="sum")) == pytest.approx(expected.sum(), rel=1e-5)


def test_loss_of_a_perfect_student_is_the_entropy_of_the_targets(logits):
    _, teacher, inner = logits
    targets = subclass_targets(teacher, inner)
    perfect = subclass_cross_entropy(targets.log(), targets, reduction="none")
    np.testing.assert_allclose(perfect, entropy(targets.numpy(), axis=1), rtol=1e-5)


def test_one_subclass_is_kd_plus_the_entropy_of_the_teacher(logits):
    _, teacher, inner = logits
    student = inner[:, :, 0].clone().requires_grad_()
    value = subclass_cross_entropy(student, subclass_targets(teacher, inner[:, :, :1]), reduction="none")
    kd = forward_kl(student, teacher, temperature=1.0, reduction="none")
    np.testing.assert_allclose((value - kd).detach(), entropy(softmax(teacher.numpy(), 1), axis=1), rtol=1e-4)
    (gradient,) = torch.autograd.grad(value.sum(), student, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(kd.sum(), student)[0])


def test_one_subclass_has_the_teachers_softened_target(logits):
    _, teacher, inner = logits
    target = subclass_targets(teacher, inner[:, :, :1], temperature=4.0)
    np.testing.assert_allclose(target, softmax(teacher.numpy() / 4.0, 1), rtol=1e-5)


@pytest.mark.parametrize("beta", [1.0, 1e6])
def test_gradient_summed_over_a_classs_subclasses_is_kds(logits, beta):
    student, teacher, inner = logits
    student.requires_grad_()
    targets = subclass_targets(teacher, inner, temperature=2.0, subclass_temperature=beta)
    subclass_cross_entropy(student, targets, reduction="sum").backward()
    marginal = softmax(student.detach().numpy(), 1).reshape(B, C, S).sum(2)
    expected = marginal - softmax(teacher.numpy() / 2.0, 1)
    np.testing.assert_allclose(student.grad.view(B, C, S).sum(2), expected, atol=1e-6)


def test_gradient_is_probability_minus_target_and_never_reaches_the_teacher(logits):
    student, teacher, inner = (tensor.requires_grad_() for tensor in logits)
    targets = subclass_targets(teacher, inner)
    assert not targets.requires_grad
    raw = targets.clone().requires_grad_()
    subclass_cross_entropy(student, raw).backward()
    assert raw.grad is None
    expected = (softmax(student.detach().numpy(), 1) - targets.numpy()) / B
    np.testing.assert_allclose(student.grad, expected, atol=1e-6)


def test_half_precision_is_computed_in_float32(logits):
    student, teacher, inner = (tensor.bfloat16() for tensor in logits)
    with torch.autocast("cpu", torch.bfloat16):
        targets = subclass_targets(teacher, inner)
        value = subclass_cross_entropy(student, targets)
        merged = class_logits(student, subclasses=S)
    assert {targets.dtype, value.dtype, merged.dtype} == {torch.float32}
    expected = -(targets.double().numpy() * log_softmax(student.double().numpy(), 1)).sum(1).mean()
    assert float(value) == pytest.approx(expected, rel=1e-5)


def test_extreme_logits_stay_finite():
    student = torch.tensor([[1e4, -1e4, 0.0, 0.0]], requires_grad=True)
    value = subclass_cross_entropy(student, subclass_targets(torch.tensor([[1e4, -1e4]]), torch.zeros(1, 2, 2)))
    value.backward()
    assert value.item() == pytest.approx(1e4)
    assert bool(student.grad.isfinite().all())


# ---- class logits --------------------------------------------------------------------------------------------------


def test_class_logits_are_the_summed_probabilities(logits):
    student = logits[0]
    merged = class_logits(student, subclasses=S)
    np.testing.assert_allclose(merged, logsumexp(student.numpy().reshape(B, C, S), axis=2), rtol=1e-5)
    summed = softmax(student.numpy(), 1).reshape(B, C, S).sum(2)
    np.testing.assert_allclose(merged.softmax(1), summed, rtol=1e-5)


def test_the_likeliest_class_need_not_hold_the_likeliest_subclass():
    student = torch.tensor([[0.4, 0.0, 0.3, 0.3]]).log()
    assert int(student.argmax()) // 2 == 0
    assert int(class_logits(student, subclasses=2).argmax()) == 1
