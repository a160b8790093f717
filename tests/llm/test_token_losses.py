import numpy as np
import pytest
import torch
from scipy.stats import entropy, wasserstein_distance
from tiny_logits import N, V, close, gradient, probabilities, topk
from torch.autograd.functional import jacobian

from lit_distill.llm.losses import (
    adaptive_kl,
    cross_entropy,
    forward_kl,
    generalized_jsd,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    taid,
    topk_kl,
    total_variation,
)
from lit_distill.llm.signals import TopK
from lit_distill.llm.vocabularies import uld

DENSE = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "generalized_jsd": generalized_jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "adaptive_kl": adaptive_kl,
    "total_variation": total_variation,
    "taid": lambda s, t: taid(s, t, t=0.3),
    "uld": uld,
}


# ---- what holds for all --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DENSE)
def test_a_loss_gives_one_value_per_token_and_the_teacher_no_gradient(name, logits):
    student, teacher = logits
    value = DENSE[name](student, teacher)
    assert value.shape == (N,)
    value.sum().backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("name", DENSE)
def test_a_divergence_is_zero_for_equal_distributions_alone(name, logits):
    student = logits[0]
    close(DENSE[name](student, student.detach() + 3.0), 0, 1e-14)
    assert (DENSE[name](*logits) > 1e-3).all()


@pytest.mark.parametrize("name", DENSE)
def test_a_token_does_not_change_the_others(name, logits):
    whole = DENSE[name](*logits)
    parts = [DENSE[name](student[None], teacher[None]) for student, teacher in zip(*logits, strict=True)]
    close(whole, torch.cat(parts).detach().numpy(), 1e-14)


@pytest.mark.parametrize("name", DENSE)
def test_half_precision_is_widened_before_anything_is_computed(name, logits):
    student, teacher = (x.detach().bfloat16() for x in logits)
    with torch.autocast("cpu", torch.bfloat16):
        value = DENSE[name](student, teacher)
    assert value.dtype == torch.float32
    close(value, DENSE[name](student.double(), teacher.double()).numpy(), 1e-5)


@pytest.mark.parametrize("name", DENSE)
def test_huge_logits_give_finite_gradients(name):
    student = torch.tensor([[300.0, -300.0, 0.0], [-300.0, 300.0, 0.0]], requires_grad=True)
    value = DENSE[name](student, student.detach().flip(0))
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad.isfinite().all()


# ---- values --------------------------------------------------------------------------------------------------------


def test_cross_entropy_is_minus_the_log_probability(logits):
    labels = torch.tensor([0, 5, 16, 2, 2, 9])
    (q,) = probabilities(logits[0])
    close(cross_entropy(logits[0], labels), -np.log(q[np.arange(N), labels.numpy()]))


# ---- ULD -----------------------------------------------------------------------------------------------------------


def test_uld_is_the_wasserstein_distance_of_the_two_sets_of_probabilities(logits):
    q, p = probabilities(*logits)
    close(uld(*logits), [V * wasserstein_distance(a, b) for a, b in zip(q, p, strict=True)])


@pytest.mark.parametrize("width", [11, 23])
def test_uld_fills_the_smaller_vocabulary_with_zeros(width, logits):
    teacher = torch.randn(N, width, dtype=torch.float64)
    q, p = probabilities(logits[0], teacher)
    expected = []
    for a, b in zip(q, p, strict=True):
        longer = max(V, width)
        a, b = np.pad(a, (0, longer - V)), np.pad(b, (0, longer - width))
        expected.append(longer * wasserstein_distance(a, b))
    close(uld(logits[0], teacher), expected)


def test_uld_does_not_know_which_token_is_which(logits):
    student = logits[0]
    close(uld(student, student.detach()[:, torch.randperm(V)]), 0, 1e-14)


# ---- top-k ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("support", ["bucket", "renormalized", "gathered", "both"])
def test_all_tokens_are_the_dense_forward_kl(support, logits):
    found = topk_kl(logits[0], topk(logits[1].detach(), V), support=support)
    close(found, forward_kl(*logits).detach().numpy())
    close(gradient(found, logits[0]), gradient(forward_kl(*logits), logits[0]))


def test_the_bucket_lacks_the_divergence_within_the_rest(logits):
    k = 5
    q, p = probabilities(*logits)
    target = topk(logits[1].detach(), k)
    found = topk_kl(logits[0], target)
    gaps = []
    for row in range(N):
        rest = np.setdiff1d(np.arange(V), target.ids[row].numpy())
        gaps.append(p[row, rest].sum() * entropy(p[row, rest], q[row, rest]))  # scipy normalizes both
    close(found, entropy(p, q, axis=-1) - np.array(gaps))
    assert (found < forward_kl(*logits)).all()


def test_the_bucket_keeps_the_gradient_in_the_support(logits):
    q, p = probabilities(*logits)
    target = topk(logits[1].detach(), 5)
    found = gradient(topk_kl(logits[0], target, support="bucket"), logits[0])
    inside = np.zeros((N, V), bool)
    np.put_along_axis(inside, target.ids.numpy(), True, -1)
    of_rest = (p * ~inside).sum(-1, keepdims=True) * q / (q * ~inside).sum(-1, keepdims=True)
    close(found, np.where(inside, q - p, q - of_rest))


def test_the_bucket_survives_a_rest_without_probability():
    target = TopK(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]).log() + 1e-7)  # rounding: more than 1 in sum
    student = torch.tensor([[40.0, 40.0, -40.0, -40.0]], requires_grad=True)
    value = topk_kl(student, target)
    value.sum().backward()
    assert float(value.detach()) == pytest.approx(0.0, abs=1e-6)
    assert student.grad.isfinite().all()
    target = TopK(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.4]]).log())
    (grad,) = torch.autograd.grad(topk_kl(student, target).sum(), student)
    torch.testing.assert_close(grad, torch.tensor([[0.0, 0.1, -0.05, -0.05]]), atol=1e-6, rtol=0)


def test_renormalizing_the_teacher_errs_by_twice_the_missing_mass(logits):
    q, p = probabilities(*logits)
    target = topk(logits[1].detach(), 5)
    found = gradient(topk_kl(logits[0], target, support="renormalized"), logits[0])
    captured = np.take_along_axis(p, target.ids.numpy(), -1).sum(-1)
    close(np.abs(found - (q - p)).sum(-1), 2 * (1 - captured))


def test_renormalized_is_the_kl_of_the_scaled_teacher(logits):
    q, p = probabilities(*logits)
    target = topk(logits[1].detach(), 5)
    on_support = [np.take_along_axis(x, target.ids.numpy(), -1) for x in (p, q)]
    scaled = on_support[0] / on_support[0].sum(-1, keepdims=True)
    expected = (scaled * np.log(scaled / on_support[1])).sum(-1)
    close(topk_kl(logits[0], target, support="renormalized"), expected)
    scaled_target = TopK(target.ids, torch.from_numpy(np.log(scaled)))
    close(topk_kl(logits[0], scaled_target, support="gathered"), expected)


def test_gathered_is_the_sum_over_the_support_as_it_is(logits):
    q, p = probabilities(*logits)
    target = topk(logits[1].detach(), 5)
    a, b = (np.take_along_axis(x, target.ids.numpy(), -1) for x in (p, q))
    close(topk_kl(logits[0], target, support="gathered"), (a * np.log(a / b)).sum(-1))


def test_with_both_sides_renormalized_the_rest_is_free(logits):
    q, p = probabilities(*logits)
    target = topk(logits[1].detach(), 5)
    a, b = (np.take_along_axis(x, target.ids.numpy(), -1) for x in (p, q))
    found = topk_kl(logits[0], target, support="both")
    close(found, entropy(a, b, axis=-1))
    outside = torch.ones(N, V, dtype=torch.bool).scatter(-1, target.ids, False).numpy()
    grad = gradient(found, logits[0])
    assert (grad[outside] == 0).all()
    raised = logits[0].detach() + torch.from_numpy(outside) * 2.0
    close(topk_kl(raised, target, support="both"), found.detach().numpy())


@pytest.mark.parametrize("support", ["bucket", "renormalized", "gathered", "both"])
def test_kept_probabilities_get_no_gradient_and_may_be_half(support, logits):
    target = topk(logits[1], 5)
    topk_kl(logits[0], target, support=support).sum().backward()
    assert logits[1].grad is None
    half = TopK(target.ids, target.logprobs.detach().half())
    found = topk_kl(logits[0].detach().float(), half, support=support)
    close(found, topk_kl(logits[0].detach().float(), TopK(half.ids, half.logprobs.float()), support=support).numpy())


# ---- sampled reverse KL --------------------------------------------------------------------------------------------


def test_tokens_do_not_mix_in_any_gradient(logits):
    found = jacobian(lambda student: generalized_jsd(student, logits[1]), logits[0].detach())
    assert (found[0, 1:] == 0).all()
