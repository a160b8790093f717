import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from scipy.stats import entropy

from lit_distill.losses.balanced import balance_weights, balanced_divergence


@pytest.fixture
def logits():
    """Student and teacher for 40 samples, in float64; either is the surer on some."""
    generator = torch.Generator().manual_seed(3)
    shape = (40, 7)
    return tuple(3 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))


def by_hand(student, teacher, nu, temperature, swapped=False):
    """The objective sample by sample, by scipy."""
    values = []
    for z_s, z_t in zip(student.detach().numpy(), teacher.detach().numpy(), strict=True):
        p_s, p_t = softmax(z_s / temperature), softmax(z_t / temperature)
        a, b = (nu, 1.0) if entropy(p_s) < entropy(p_t) else (1.0, nu)
        if swapped:
            a, b = b, a
        values.append(temperature**2 * (a * rel_entr(p_t, p_s).sum() + b * rel_entr(p_s, p_t).sum()))
    return np.array(values)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("nu", [0.5, 2.0])
@pytest.mark.parametrize("rule", ["entropy", "entropy_swapped"])
def test_it_is_the_weighted_sum_of_both_divergences(logits, rule, nu, temperature):
    expected = by_hand(*logits, nu, temperature, swapped=rule == "entropy_swapped")
    options = {"rule": rule, "nu": nu, "temperature": temperature}
    found = balanced_divergence(*logits, **options, reduction="none")
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
    assert float(balanced_divergence(*logits, **options)) == pytest.approx(expected.mean(), rel=1e-5)
    bare = balanced_divergence(*logits, **options, scale_by_t2=False)
    assert float(bare) == pytest.approx(expected.mean() / temperature**2, rel=1e-5)


def test_a_sure_student_is_made_to_cover_and_a_flat_one_to_seek():
    sure, flat = torch.tensor([[5.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    assert [float(weight) for weight in balance_weights(sure, flat, nu=3.0)] == [3.0, 1.0]
    assert [float(weight) for weight in balance_weights(flat, sure, nu=3.0)] == [1.0, 3.0]
    assert [float(weight) for weight in balance_weights(flat, sure, rule="entropy_swapped", nu=3.0)] == [3.0, 1.0]
    # Equal entropy counts as flat.
    assert [float(weight) for weight in balance_weights(flat, flat, nu=3.0)] == [1.0, 3.0]


def test_the_entropies_are_those_of_the_tempered_distributions():
    # In nats: 0.69 and 0.53 at T = 1, 1.29 and 1.38 (nearly log 4) at T = 10. The order turns.
    student, teacher = torch.tensor([[0.0, 0.0, -9.0, -9.0]]), torch.tensor([[3.0, 0.0, 0.0, 0.0]])
    found = {t: [float(weight) for weight in balance_weights(student, teacher, temperature=t)] for t in (1.0, 10.0)}
    assert found == {1.0: [1.0, 2.0], 10.0: [2.0, 1.0]}


@pytest.mark.parametrize("rule", ["entropy", "entropy_swapped", "constant"])
def test_with_nu_one_it_is_jeffreys_divergence_for_every_sample(logits, rule):
    p_s, p_t = (softmax(z.numpy(), 1) for z in logits)
    expected = ((p_t - p_s) * (np.log(p_t) - np.log(p_s))).sum(1)
    found = balanced_divergence(*logits, rule=rule, nu=1.0, reduction="none")
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("rule", ["entropy", "entropy_swapped", "constant", "forward"])
def test_every_rule_spends_the_same_total(logits, rule):
    assert torch.equal(sum(balance_weights(*logits, rule=rule, nu=2.0)), torch.full((40,), 3.0).double())


def test_the_forward_rule_is_the_forward_divergence_alone(logits):
    p_s, p_t = (softmax(z.numpy(), 1) for z in logits)
    found = balanced_divergence(*logits, rule="forward", nu=0.5, reduction="none")
    np.testing.assert_allclose(found.numpy(), 1.5 * rel_entr(p_t, p_s).sum(1), rtol=1e-5)


def test_gradients_of_the_two_parts_have_their_closed_forms_and_weights_have_none(logits):
    student, teacher = logits[0].requires_grad_(), logits[1].requires_grad_()
    balanced_divergence(student, teacher, nu=2.0, reduction="sum").backward()
    p_s, p_t = (softmax(z.detach().numpy(), 1) for z in (student, teacher))
    ratio = np.log(p_s) - np.log(p_t)
    reverse = p_s * (ratio - (p_s * ratio).sum(1, keepdims=True))
    forward = p_s - p_t
    surer = (entropy(p_s, axis=1) < entropy(p_t, axis=1))[:, None]
    assert 0 < surer.sum() < 40
    expected = np.where(surer, 2.0, 1.0) * forward + np.where(surer, 1.0, 2.0) * reverse
    np.testing.assert_allclose(student.grad.numpy(), expected, atol=1e-5)
    assert teacher.grad is None
    assert not any(weight.requires_grad for weight in balance_weights(student, teacher))


def test_value_and_gradient_vanish_where_the_two_agree(logits):
    student = logits[0].requires_grad_()
    # Logits that differ by a constant are the same distribution.
    value = balanced_divergence(student, logits[0].detach() + 2.0)
    value.backward()
    assert float(value.detach()) == pytest.approx(0.0, abs=1e-6)
    assert float(student.grad.abs().max()) < 1e-7


def test_half_precision_in_float32_out_without_underflow():
    # The student gives the second class e^-60, which no half-precision probability can hold.
    student, teacher = torch.tensor([[60.0, 0.0]]).half(), torch.tensor([[0.0, 60.0]]).half()
    value = balanced_divergence(student, teacher, nu=1.0)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(120.0, rel=1e-4)


def test_another_rule_is_refused(logits):
    with pytest.raises(Exception, match="confidence"):
        balance_weights(*logits, rule="confidence")
