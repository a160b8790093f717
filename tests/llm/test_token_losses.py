import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import entropy, wasserstein_distance
from torch.autograd.functional import jacobian

from lit_distill.core.errors import UsageError
from lit_distill.llm.losses import (
    adaptive_kl,
    calibrate_topk,
    cross_entropy,
    forward_kl,
    generalized_jsd,
    reverse_kl,
    sampled_reverse_kl,
    skew_kl,
    skew_reverse_kl,
    smooth_topk,
    taid,
    topk_kl,
    total_variation,
)
from lit_distill.llm.signals import TopK
from lit_distill.llm.vocabularies import uld

N, V = 6, 17
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


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(3)
    student, teacher = (2 * torch.randn(N, V, dtype=torch.float64, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher.requires_grad_()


def probabilities(*logits, temperature=1.0):
    """By numpy."""
    shifted = (np.exp(x.detach().numpy() / temperature - x.detach().numpy().max(-1, keepdims=True)) for x in logits)
    return [x / x.sum(-1, keepdims=True) for x in shifted]


def gradient(loss, student):
    """Of each token's value; a tensor of the same shape, since a value depends on its own token alone."""
    (grad,) = torch.autograd.grad(loss.sum(), student)
    return grad.numpy()


def close(found, expected, tolerance=1e-12):
    found = found.detach().numpy() if isinstance(found, torch.Tensor) else found
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def topk(logits, k):
    return TopK(logits.topk(k, -1).indices, logits.log_softmax(-1).topk(k, -1).values)


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


# ---- gradients in closed form --------------------------------------------------------------------------------------


def centered(q, r):
    return q * (r - (q * r).sum(-1, keepdims=True))


def test_gradient_of_forward_kl(logits):
    q, p = probabilities(*logits)
    close(gradient(forward_kl(*logits), logits[0]), q - p)
    q, p = probabilities(*logits, temperature=3.0)
    close(gradient(forward_kl(*logits, temperature=3.0), logits[0]), 3 * (q - p))
    close(gradient(forward_kl(*logits, temperature=3.0, scale_by_t2=False), logits[0]), (q - p) / 3)


def test_gradient_of_reverse_kl(logits):
    q, p = probabilities(*logits)
    close(gradient(reverse_kl(*logits), logits[0]), centered(q, np.log(q / p)))
    q, p = probabilities(*logits, temperature=3.0)
    close(gradient(reverse_kl(*logits, temperature=3.0), logits[0]), 3 * centered(q, np.log(q / p)))


@pytest.mark.parametrize("skew", [0.1, 0.7])
def test_gradient_of_skew_kl(skew, logits):
    q, p = probabilities(*logits)
    w = (1 - skew) * p * q / (skew * p + (1 - skew) * q)
    close(gradient(skew_kl(*logits, skew=skew), logits[0]), q * w.sum(-1, keepdims=True) - w)


@pytest.mark.parametrize("skew", [0.1, 0.7])
def test_gradient_of_skew_reverse_kl(skew, logits):
    q, p = probabilities(*logits)
    m = (1 - skew) * p + skew * q
    close(gradient(skew_reverse_kl(*logits, skew=skew), logits[0]), centered(q, np.log(q / m) - skew * q / m))


@pytest.mark.parametrize("b", [0.1, 0.5, 0.8])
def test_gradient_of_the_generalized_jsd(b, logits):
    q, p = probabilities(*logits)
    expected = (1 - b) * centered(q, np.log(q / (b * p + (1 - b) * q)))
    close(gradient(generalized_jsd(*logits, teacher_weight=b), logits[0]), expected)
    found = gradient(generalized_jsd(*logits, teacher_weight=b, normalize="endpoint"), logits[0])
    close(found, expected / (b * (1 - b)))


@pytest.mark.parametrize("value", ["kl", "cross_entropy"])
def test_gradient_of_taid(value, logits):
    q, p = probabilities(*logits)
    geometric = q**0.7 * p**0.3
    target = geometric / geometric.sum(-1, keepdims=True)
    close(gradient(taid(*logits, t=0.3, value=value), logits[0]), q - target)


# ---- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_both_kls_are_scipys(temperature, logits):
    q, p = probabilities(*logits, temperature=temperature)
    close(forward_kl(*logits, temperature=temperature), temperature**2 * entropy(p, q, axis=-1))
    close(reverse_kl(*logits, temperature=temperature), temperature**2 * entropy(q, p, axis=-1))
    close(reverse_kl(*logits, temperature=temperature, scale_by_t2=False), entropy(q, p, axis=-1))


def test_forward_kl_is_torchs(logits):
    log_q, log_p = (x.log_softmax(-1) for x in logits)
    close(forward_kl(*logits), F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).detach().numpy())


def test_a_point_mass_makes_forward_kl_the_cross_entropy_of_its_token(logits):
    labels = torch.tensor([0, 5, 16, 2, 2, 9])
    close(forward_kl(logits[0], 1e4 * F.one_hot(labels, V).double()), cross_entropy(logits[0], labels).detach().numpy())


def test_cross_entropy_is_minus_the_log_probability(logits):
    labels = torch.tensor([0, 5, 16, 2, 2, 9])
    (q,) = probabilities(logits[0])
    close(cross_entropy(logits[0], labels), -np.log(q[np.arange(N), labels.numpy()]))


def test_skew_kls_are_kls_to_a_mixture(logits):
    q, p = probabilities(*logits)
    close(skew_kl(*logits, skew=0.2), entropy(p, 0.2 * p + 0.8 * q, axis=-1))
    close(skew_reverse_kl(*logits, skew=0.2), entropy(q, 0.8 * p + 0.2 * q, axis=-1))
    q, p = probabilities(*logits)
    close(skew_kl(*logits), entropy(p, 0.1 * p + 0.9 * q, axis=-1))


def test_skew_kls_become_kls(logits):
    close(skew_kl(*logits, skew=0.0), forward_kl(*logits).detach().numpy())
    close(skew_reverse_kl(*logits, skew=0.0), reverse_kl(*logits).detach().numpy())
    close(skew_kl(*logits, skew=1e-9), forward_kl(*logits).detach().numpy(), 1e-5)


def test_skew_kls_reach_their_bound_where_nothing_is_shared():
    student, teacher = torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]])
    for loss in (skew_kl, skew_reverse_kl):
        assert float(loss(student, teacher)) == pytest.approx(-math.log(0.1), abs=1e-6)
        assert float(loss(student, teacher, skew=0.4)) == pytest.approx(-math.log(0.4), abs=1e-6)


def test_total_variation_is_half_the_l1_distance(logits):
    q, p = probabilities(*logits)
    close(total_variation(*logits), np.maximum(p - q, 0).sum(-1))
    assert float(total_variation(torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]]))) == 1.0


# ---- generalized JSD -----------------------------------------------------------------------------------------------


def test_the_symmetric_jsd_is_scipys_distance_squared(logits):
    q, p = probabilities(*logits)
    m = (p + q) / 2
    close(generalized_jsd(*logits), (entropy(p, m, axis=-1) + entropy(q, m, axis=-1)) / 2)
    close(generalized_jsd(*logits), generalized_jsd(*logits[::-1]).detach().numpy())


@pytest.mark.parametrize("b", [0.1, 0.5, 0.9])
def test_the_jsd_reaches_the_binary_entropy(b):
    student, teacher = torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]])
    bound = -b * math.log(b) - (1 - b) * math.log(1 - b)
    assert float(generalized_jsd(student, teacher, teacher_weight=b)) == pytest.approx(bound, abs=1e-6)


@pytest.mark.parametrize("b", [0.2, 0.7])
def test_the_teachers_weight_is_the_teachers(b, logits):
    q, p = probabilities(*logits)
    m = b * p + (1 - b) * q
    expected = b * entropy(p, m, axis=-1) + (1 - b) * entropy(q, m, axis=-1)
    close(generalized_jsd(*logits, teacher_weight=b), expected)
    q, p = probabilities(*logits, temperature=2.0)
    m = b * p + (1 - b) * q
    expected = b * entropy(p, m, axis=-1) + (1 - b) * entropy(q, m, axis=-1)
    close(generalized_jsd(*logits, teacher_weight=b, temperature=2.0), expected)


@pytest.mark.parametrize("normalize", ["none", "endpoint"])
def test_at_its_ends_the_jsd_is_the_two_kls(normalize, logits):
    forward, reverse = (loss(*logits).detach().numpy() for loss in (forward_kl, reverse_kl))
    close(generalized_jsd(*logits, teacher_weight=0.0, normalize=normalize), forward)
    close(generalized_jsd(*logits, teacher_weight=1.0, normalize=normalize), reverse)


def test_normalized_the_jsd_comes_to_its_ends_without_a_jump(logits):
    forward, reverse = (loss(*logits).detach().numpy() for loss in (forward_kl, reverse_kl))
    close(generalized_jsd(*logits, teacher_weight=1e-6, normalize="endpoint"), forward, 1e-4)
    close(generalized_jsd(*logits, teacher_weight=1 - 1e-6, normalize="endpoint"), reverse, 1e-4)
    close(generalized_jsd(*logits, teacher_weight=1e-6), 1e-6 * forward, 1e-8)


@pytest.mark.parametrize("b", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_the_jsd_is_that_of_trl(b, temperature, logits):
    gkd = pytest.importorskip("trl.experimental.gkd")
    jsd = gkd.GKDTrainer.generalized_jsd_loss
    # Theirs keeps the classes apart, so that its "sum" is over tokens and classes.
    theirs = torch.stack(
        [
            jsd(student[None, None], teacher[None, None].detach(), beta=b, temperature=temperature, reduction="sum")
            for student, teacher in zip(*logits, strict=True)
        ]
    )
    ours = generalized_jsd(*logits, teacher_weight=b, temperature=temperature)
    close(ours, theirs.detach().numpy())
    close(gradient(ours, logits[0]), gradient(theirs, logits[0]))


# ---- adaptive KL ---------------------------------------------------------------------------------------------------


def adaptive_by_loop(student, teacher, head_mass):
    values, shares = [], []
    for q, p in zip(*probabilities(student, teacher), strict=True):
        mass, head = 0.0, np.zeros(V, bool)
        for token in sorted(range(V), key=lambda v: -p[v]):
            if mass >= head_mass:
                break
            head[token] = True
            mass += p[token]
        gap = np.abs(p - q)
        share = gap[head].sum() / gap.sum()
        shares.append(share)
        values.append(share * entropy(p, q) + (1 - share) * entropy(q, p))
    return np.array(values), np.array(shares)[:, None]


@pytest.mark.parametrize("head_mass", [0.2, 0.5, 0.9])
def test_adaptive_kl_is_what_a_loop_over_the_vocabulary_gives(head_mass, logits):
    value, share = adaptive_by_loop(*logits, head_mass)
    assert share.min() > 0.01
    assert share.max() < 0.999
    found = adaptive_kl(*logits, head_mass=head_mass)
    close(found, value)
    q, p = probabilities(*logits)
    close(gradient(found, logits[0]), share * (q - p) + (1 - share) * centered(q, np.log(q / p)))
    if head_mass == 0.5:
        close(adaptive_kl(*logits), value)


def test_adaptive_kl_does_not_care_how_tokens_are_numbered(logits):
    order = torch.randperm(V)
    close(adaptive_kl(logits[0][:, order], logits[1][:, order]), adaptive_kl(*logits).detach().numpy())


def test_adaptive_kl_of_equals_has_no_gradient(logits):
    student = logits[0]
    found = gradient(adaptive_kl(student, student.detach().clone()), student)
    close(found, 0, 1e-14)


# ---- TAID ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [1.0, torch.tensor(1.0)])
def test_at_the_end_taid_is_forward_kl(t, logits):
    close(taid(*logits, t=t), forward_kl(*logits).detach().numpy())
    close(gradient(taid(*logits, t=t), logits[0]), gradient(forward_kl(*logits), logits[0]))


@pytest.mark.parametrize("value", ["kl", "cross_entropy"])
def test_at_the_start_taid_teaches_nothing(value, logits):
    found = taid(*logits, t=0.0, value=value)
    (q,) = probabilities(logits[0])
    close(found, 0.0 if value == "kl" else entropy(q, axis=-1), 1e-14)
    close(gradient(found, logits[0]), 0, 1e-14)


def test_taid_aims_at_the_geometric_mixture(logits):
    q, p = probabilities(*logits)
    geometric = q**0.6 * p**0.4
    target = geometric / geometric.sum(-1, keepdims=True)
    close(taid(*logits, t=0.4), entropy(target, q, axis=-1))
    close(taid(*logits, t=torch.tensor(0.4, dtype=torch.float64)), entropy(target, q, axis=-1))
    close(taid(*logits, t=0.4, value="cross_entropy"), -(target * np.log(q)).sum(-1))


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


# ---- FIRST ---------------------------------------------------------------------------------------------------------


def test_calibration_is_a_softmax_of_probabilities():
    target = TopK(torch.tensor([[4, 2, 7]]), torch.tensor([[0.6, 0.2, 0.1]]).log())
    weights = np.exp(np.array([0.6, 0.2, 0.1]) / 0.3)
    found = calibrate_topk(target, c=0.3)
    assert found.ids.tolist() == [[4, 2, 7]]
    close(found.logprobs.exp(), (weights / weights.sum())[None], 1e-6)


def test_calibration_goes_from_the_first_token_alone_to_equal_shares(logits):
    target = topk(logits[1].detach(), 5)
    assert (calibrate_topk(target, c=0.2).logprobs.diff(dim=-1) < 0).all()  # the ranking stays
    close(calibrate_topk(target, c=1e6).logprobs.exp(), np.full((N, 5), 0.2), 1e-5)
    close(calibrate_topk(target, c=1e-6).logprobs.exp(), np.eye(5)[[0] * N], 1e-5)
    certain = TopK(torch.arange(5)[None], torch.tensor([[1.0, 0, 0, 0, 0]]).log())
    assert float(calibrate_topk(certain, c=1.0).logprobs[0, 0].exp()) == pytest.approx(math.e / (math.e + 4))


def test_a_calibrated_certain_teacher_gives_finite_losses(logits):
    target = calibrate_topk(topk(logits[1].detach(), 5), c=1e-6)
    value = topk_kl(logits[0], target, support="gathered")
    close(value, cross_entropy(logits[0], target.ids[:, 0]).detach().numpy(), 1e-5)
    assert np.isfinite(gradient(value, logits[0])).all()


def test_smoothing_shares_what_it_takes_from_the_first():
    target = TopK(torch.tensor([[4, 2, 7], [1, 2, 3]]), torch.tensor([[0.2, 0.6, 0.1], [0.05, 0.03, 0.02]]).log())
    found = smooth_topk(target, smoothing=0.1)
    close(found.logprobs.exp(), [[0.25, 0.5, 0.15], [0.0, 0.055, 0.045]], 1e-6)
    assert found.ids.tolist() == target.ids.tolist()
    with pytest.raises(UsageError, match=r"k = 1 has none: use k >= 2"):
        smooth_topk(TopK(torch.tensor([[1]]), torch.tensor([[-0.1]])))


# ---- sampled reverse KL --------------------------------------------------------------------------------------------


def test_the_expected_sampled_gradient_is_that_of_reverse_kl(logits):
    (q,) = probabilities(logits[0])
    expected = sum(
        q[:, token, None] * gradient(sampled_reverse_kl(*logits, torch.full((N,), token, dtype=torch.long)), logits[0])
        for token in range(V)
    )
    close(gradient(reverse_kl(*logits), logits[0]), expected)


def test_the_advantage_is_a_constant(logits):
    q, p = probabilities(*logits)
    labels = torch.tensor([0, 5, 16, 2, 2, 9])
    picked = np.arange(N), labels.numpy()
    advantage = np.log(p[picked] / q[picked])
    value = sampled_reverse_kl(*logits, labels)
    close(value, -advantage * np.log(q[picked]))
    close(gradient(value, logits[0]), -advantage[:, None] * (np.eye(V)[labels.numpy()] - q))
    assert logits[1].grad is None


def test_tokens_do_not_mix_in_any_gradient(logits):
    found = jacobian(lambda student: generalized_jsd(student, logits[1]), logits[0].detach())
    assert (found[0, 1:] == 0).all()
