import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax, rel_entr, softmax
from scipy.stats import pearsonr, zscore

from lit_distill.losses.logits import (
    confidence_weights,
    decoupled_kl,
    forward_kl_at,
    multi_level,
    pearson_relation,
    permute_other_classes,
    scale_gradient,
    standardize_logits,
    virtual_teacher_kl,
)

LABELS = torch.tensor([0, 6, 3, 2, 2, 5])


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(13)
    return 3 * torch.randn(6, 7, generator=generator), 3 * torch.randn(6, 7, generator=generator)


@pytest.fixture
def wide(logits):
    return [x.double().numpy() for x in logits]


def with_gradient(logits):
    return logits[0].requires_grad_(), logits[1].requires_grad_()


def quotient(loss, student, place, step=1e-6):
    """The difference quotient of a loss of float64 numpy logits."""
    values = []
    for sign in (1, -1):
        moved = student.copy()
        moved[place] += sign * step
        values.append(loss(moved))
    return (values[0] - values[1]) / (2 * step)


# ---- standardization -----------------------------------------------------------------------------------------------


def test_standardized_logits_are_scipys_z_scores(logits, wide):
    found = standardize_logits(logits[0])
    np.testing.assert_allclose(found, zscore(wide[0], axis=1, ddof=1), rtol=1e-4, atol=1e-5)
    assert found.square().sum(1).tolist() == pytest.approx([6.0] * 6, rel=1e-5)  # K - 1


def test_standardized_logits_see_neither_shift_nor_positive_scale(logits):
    torch.testing.assert_close(standardize_logits(5 * logits[0] + 3), standardize_logits(logits[0]))
    torch.testing.assert_close(standardize_logits(-2 * logits[0]), -standardize_logits(logits[0]))


def test_gradient_goes_through_mean_and_deviation(logits):
    student = logits[0].requires_grad_()
    (standardize_logits(student) * logits[1]).sum().backward()
    # Neither direction changes the value: the gradient is orthogonal to both.
    assert student.grad.sum(1).tolist() == pytest.approx([0.0] * 6, abs=1e-5)
    assert (student.grad * student.detach()).sum(1).tolist() == pytest.approx([0.0] * 6, abs=1e-5)
    assert float(student.grad.norm()) > 0.1


def test_logits_that_are_all_equal_stay_finite():
    student = torch.full((2, 3), 4.0, requires_grad=True)
    value = standardize_logits(student)
    assert value.tolist() == [[0.0] * 3] * 2


# ---- decoupled -----------------------------------------------------------------------------------------------------


def decoupled_by_numpy(student, teacher, labels, temperature):
    """Target and non-target divergences per sample, by loops over probabilities."""
    target, others = [], []
    for z_s, z_t, y in zip(student, teacher, labels, strict=True):
        p, q = softmax(z_t / temperature), softmax(z_s / temperature)
        target.append(rel_entr([p[y], 1 - p[y]], [q[y], 1 - q[y]]).sum())
        p_rest, q_rest = np.delete(p, y), np.delete(q, y)
        others.append(rel_entr(p_rest / p_rest.sum(), q_rest / q_rest.sum()).sum())
    return np.array(target), np.array(others)


@pytest.mark.parametrize(
    ("temperature", "alpha", "beta"), [(1.0, 1.0, 1.0), (4.0, 1.0, 8.0), (2.0, 0.0, 3.0), (2.0, 5.0, 0.0)]
)
def test_decoupled_kl_equals_a_loop_over_probabilities(logits, wide, temperature, alpha, beta):
    target, others = decoupled_by_numpy(*wide, LABELS.numpy(), temperature)
    expected = temperature**2 * (alpha * target + beta * others)
    options = {"temperature": temperature, "alpha": alpha, "beta": beta}
    np.testing.assert_allclose(decoupled_kl(*logits, LABELS, **options, reduction="none"), expected, rtol=1e-4)
    assert float(decoupled_kl(*logits, LABELS, **options)) == pytest.approx(expected.mean(), rel=1e-4)
    assert float(decoupled_kl(*logits, LABELS, **options, reduction="sum")) == pytest.approx(expected.sum(), rel=1e-4)


def test_kl_is_the_target_part_plus_the_rest_weighted_by_its_probability(logits, wide):
    kl = rel_entr(softmax(wide[1], 1), softmax(wide[0], 1)).sum(1)
    rest = 1 - softmax(wide[1], 1)[np.arange(6), LABELS]
    options = {"temperature": 1.0, "reduction": "none"}
    target = decoupled_kl(*logits, LABELS, alpha=1.0, beta=0.0, **options)
    others = decoupled_kl(*logits, LABELS, alpha=0.0, beta=1.0, **options)
    np.testing.assert_allclose(target + torch.from_numpy(rest) * others, kl, rtol=1e-4)


def test_decoupled_kl_vanishes_for_equal_distributions(logits):
    assert float(decoupled_kl(logits[0], logits[0] + 2.0, LABELS)) == pytest.approx(0.0, abs=1e-4)


def test_gradient_among_the_others_does_not_reach_the_label(logits, wide):
    student, teacher = with_gradient(logits)
    decoupled_kl(student, teacher, LABELS, temperature=4.0, alpha=0.0, beta=1.0, reduction="sum").backward()
    assert teacher.grad is None
    rows = np.arange(6)
    assert student.grad[rows, LABELS].tolist() == [0.0] * 6
    p, q = (softmax(x / 4, 1) for x in (wide[1], wide[0]))
    for x in (p, q):
        x[rows, LABELS] = 0
        x /= x.sum(1, keepdims=True)
    np.testing.assert_allclose(student.grad, 4 * (q - p), atol=1e-5)


def test_with_two_classes_nothing_is_left_among_the_others(logits):
    student, teacher = logits[0][:, :2], logits[1][:, :2]
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    kl = F.kl_div(F.log_softmax(student, 1), F.log_softmax(teacher, 1), reduction="batchmean", log_target=True)
    assert float(decoupled_kl(student, teacher, labels, temperature=1.0, beta=100.0)) == pytest.approx(
        float(kl), rel=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decoupled_kl_of_certain_networks_is_exact(dtype):
    # To either sample's student the teacher's class is 6e4 less likely than the labelled one, and again among the
    # others. Divided by T = 4, times T^2 = 16, with weights 1 and 8. (In bfloat16 6e4 is 59,904.)
    student = torch.tensor([[6e4, 0.0, -6e4], [0.0, -6e4, 6e4]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-6e4, 0.0, 6e4], [0.0, 6e4, -6e4]], dtype=dtype)
    value = decoupled_kl(student, teacher, torch.tensor([0, 2]))
    value.backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx((1 + 8) * 16 * 6e4 / 4, rel=2e-3)
    # T (b^s - b^t) for the labelled class and its opposite, which is that of the likeliest other; and 8 T (n^s - n^t).
    gradient = torch.tensor([[4.0, -4.0 + 8 * 4, -8 * 4], [8 * 4 - 4.0, -8 * 4, 4.0]]) / 2
    torch.testing.assert_close(student.grad.float(), gradient)


# ---- correlations --------------------------------------------------------------------------------------------------


def relation_by_scipy(student, teacher, temperature, inter, intra):
    p, q = softmax(student / temperature, 1), softmax(teacher / temperature, 1)
    rows = np.mean([pearsonr(a, b).statistic for a, b in zip(p, q, strict=True)])
    columns = np.mean([pearsonr(a, b).statistic for a, b in zip(p.T, q.T, strict=True)])
    return temperature**2 * (inter * (1 - rows) + intra * (1 - columns))


@pytest.mark.parametrize("options", [(4.0, 1.0, 1.0), (1.0, 2.0, 0.0), (2.0, 0.0, 3.0)])
def test_relation_equals_scipys_pearson(logits, wide, options):
    temperature, inter, intra = options
    found = pearson_relation(*logits, temperature=temperature, inter_weight=inter, intra_weight=intra)
    assert float(found) == pytest.approx(relation_by_scipy(*wide, *options), rel=1e-4)


def test_relation_equals_torchmetrics(logits):
    from torchmetrics.functional import pearson_corrcoef

    p, q = logits[0].softmax(1), logits[1].softmax(1)
    inter = (1 - pearson_corrcoef(p.T, q.T)).mean()  # it takes one variable per column
    found = pearson_relation(*logits, temperature=1.0, intra_weight=0.0)
    torch.testing.assert_close(found, inter, rtol=1e-4, atol=1e-5)
    found = pearson_relation(*logits, temperature=1.0, inter_weight=0.0)
    torch.testing.assert_close(found, (1 - pearson_corrcoef(p, q)).mean(), rtol=1e-4, atol=1e-5)


def test_relation_between_classes_sees_neither_shift_nor_scale_of_probabilities(logits):
    # A student whose probabilities are half the teacher's plus an even half is perfectly correlated, and not equal.
    teacher = logits[1].softmax(1)
    student = (0.5 * teacher + 0.5 / 7).log()
    assert float(pearson_relation(student, teacher.log(), temperature=1.0)) == pytest.approx(0.0, abs=1e-5)
    assert float(pearson_relation(*logits, temperature=1.0)) > 0.1
    assert float(pearson_relation(teacher.log().flip(1), teacher.log(), temperature=1.0)) > 0.1


def test_gradient_of_the_relation_equals_the_difference_quotient(logits, wide):
    student, teacher = with_gradient(logits)
    pearson_relation(student, teacher, temperature=2.0, inter_weight=1.0, intra_weight=2.0).backward()
    assert teacher.grad is None
    for place in ((0, 0), (3, 5)):
        expected = quotient(lambda moved: relation_by_scipy(moved, wide[1], 2.0, 1.0, 2.0), wide[0], place)
        assert float(student.grad[place]) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_even_probabilities_count_as_uncorrelated_and_stay_finite(logits):
    student = torch.zeros(6, 7, requires_grad=True)
    value = pearson_relation(student, logits[1], temperature=1.0)
    value.backward()
    assert value.item() == pytest.approx(2.0, rel=1e-5)
    assert bool(student.grad.isfinite().all())


# ---- several levels ------------------------------------------------------------------------------------------------


def levels_by_numpy(student, teacher, temperatures, samples=None, classes=None):
    b, k = student.shape
    samples, classes = (
        np.ones(b, bool) if samples is None else samples,
        np.ones(k, bool) if classes is None else classes,
    )
    total = 0.0
    for t in temperatures:
        p, q = softmax(teacher / t, 1), softmax(student / t, 1)
        for i in range(b):
            if samples[i]:
                total += t**2 * rel_entr(p[i], q[i]).sum() / b
                total += sum((q[i] @ q[j] - p[i] @ p[j]) ** 2 for j in range(b)) / b
        for m in range(k):
            if classes[m]:
                total += sum((q[:, m] @ q[:, n] - p[:, m] @ p[:, n]) ** 2 for n in range(k)) / k
    return total


@pytest.mark.parametrize("temperatures", [(1.0,), (4.0,), (2.0, 3.0, 4.0, 5.0, 6.0)])
def test_levels_equal_loops(logits, wide, temperatures):
    found = multi_level(*logits, temperatures=temperatures)
    assert float(found) == pytest.approx(levels_by_numpy(*wide, temperatures), rel=1e-4)


def test_masks_leave_out_the_samples_and_classes_of_which_the_teacher_is_sure(logits, wide):
    # One far sample of which the teacher is sure: multiplying an averaged loss by the mask would halve it, not drop it.
    logits[1][2] = torch.tensor([0.0, 0.0, 0.0, 30.0, 0.0, 0.0, 0.0])
    logits[0][2] = torch.tensor([30.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    student, teacher = (x.double().numpy() for x in logits)
    p = softmax(teacher, 1)
    samples = p.max(1) <= np.percentile(p.max(1), 50)
    classes = p.sum(0) <= np.percentile(p.sum(0), 50)
    assert samples.sum() == 3
    assert classes.sum() == 4
    assert not samples[2]
    assert (classes != (p.max(0) <= np.percentile(p.max(0), 50))).any()  # by how much it sees of them, not by the most
    expected = levels_by_numpy(student, teacher, (2.0, 4.0), samples, classes)
    found = multi_level(*logits, temperatures=(2.0, 4.0), unsure_only=True)
    assert float(found) == pytest.approx(expected, rel=1e-4)
    assert float(found) < 0.4 * float(multi_level(*logits, temperatures=(2.0, 4.0)))


def test_a_masked_sample_gets_no_gradient_of_its_own(logits):
    student = logits[0].requires_grad_()
    confidence = logits[1].softmax(1).amax(1)
    multi_level(student, logits[1], temperatures=(4.0,), unsure_only=True).backward()
    whole = torch.autograd.grad(multi_level(student, logits[1], temperatures=(4.0,)), student)[0]
    share = (student.grad.norm(dim=1) / whole.norm(dim=1)).detach()
    # What is left to them comes from the rows and columns that they share with others.
    assert bool((share[confidence > confidence.median()] < 0.5).all())
    assert bool((share[confidence <= confidence.median()] > 0.5).all())


def test_gradient_of_the_levels_equals_the_difference_quotient(logits, wide):
    student, teacher = with_gradient(logits)
    multi_level(student, teacher, temperatures=(1.0, 2.0)).backward()
    assert teacher.grad is None
    for place in ((0, 0), (3, 5)):
        expected = quotient(lambda moved: levels_by_numpy(moved, wide[1], (1.0, 2.0)), wide[0], place)
        assert float(student.grad[place]) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_levels_vanish_for_equal_distributions(logits):
    assert float(multi_level(logits[0], logits[0] - 4.0)) == pytest.approx(0.0, abs=1e-4)


# ---- learned temperature -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [[3.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
def test_value_and_slope_in_the_temperature(logits, wide, temperature):
    def loss(t):
        t = np.broadcast_to(t, 6)[:, None]
        return (t[:, 0] ** 2 * rel_entr(softmax(wide[1] / t, 1), softmax(wide[0] / t, 1)).sum(1)).sum()

    t = torch.tensor(temperature, requires_grad=True)
    student, teacher = with_gradient(logits)
    value = forward_kl_at(student, teacher, t, reduction="sum")
    value.backward()
    assert value.item() == pytest.approx(loss(np.array(temperature)), rel=1e-4)
    # The teacher's probabilities move with T too, though its logits are constants.
    assert teacher.grad is None
    for place in range(len(temperature)):
        expected = quotient(loss, np.array(temperature), place)
        assert float(t.grad[place]) == pytest.approx(expected, rel=1e-3, abs=1e-4)
    column = np.broadcast_to(temperature, 6)[:, None]
    expected = column * (softmax(wide[0] / column, 1) - softmax(wide[1] / column, 1))
    np.testing.assert_allclose(student.grad, expected, atol=1e-4)


@pytest.mark.parametrize("scale", [-1.0, -0.25, 0.0, 1.0])
def test_scaled_gradient_is_the_identity_forward_and_the_scale_backward(scale):
    x = torch.tensor([1.5, -2.0], requires_grad=True)
    y = scale_gradient(x, scale)
    assert torch.equal(y, x)
    (y**2).sum().backward()
    assert x.grad.tolist() == pytest.approx([scale * 3.0, scale * -4.0])


# ---- no teacher ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("probability", "temperature"), [(0.99, 20.0), (0.9, 1.0), (0.95, 0.05)])
def test_virtual_teacher_equals_a_loop(logits, wide, probability, temperature):
    expected = []
    for z, y in zip(wide[0], LABELS, strict=True):
        u = np.full(7, (1 - probability) / 6)
        u[y] = probability
        expected.append(rel_entr(softmax(u / temperature), softmax(z)).sum())
    options = {"correct_probability": probability, "temperature": temperature}
    np.testing.assert_allclose(virtual_teacher_kl(logits[0], LABELS, **options, reduction="none"), expected, rtol=1e-4)
    assert float(virtual_teacher_kl(logits[0], LABELS, **options)) == pytest.approx(np.mean(expected), rel=1e-4)


def test_virtual_teacher_is_always_right_and_almost_even():
    # Its softened targets are where the loss vanishes: 0.0105 for the label of 100 classes at the published values.
    ratio = math.exp((0.99 - 0.01 / 99) / 20)
    logits = torch.zeros(1, 100)
    logits[0, 7] = math.log(ratio)
    assert float(virtual_teacher_kl(logits, torch.tensor([7]))) == pytest.approx(0.0, abs=1e-6)
    assert ratio / (99 + ratio) == pytest.approx(0.0105, abs=5e-5)


def test_a_virtual_teacher_at_low_temperature_is_a_label(logits, wide):
    expected = -log_softmax(wide[0], 1)[np.arange(6), LABELS].mean()
    assert float(virtual_teacher_kl(logits[0], LABELS, temperature=0.01)) == pytest.approx(expected, rel=1e-4)


def test_gradient_from_a_virtual_teacher_is_the_difference_of_probabilities(logits, wide):
    student = logits[0].requires_grad_()
    virtual_teacher_kl(student, LABELS, reduction="sum").backward()
    targets = softmax(np.where(np.eye(7)[LABELS] > 0, 0.99, 0.01 / 6) / 20, 1)
    np.testing.assert_allclose(student.grad, softmax(wide[0], 1) - targets, atol=1e-5)


# ---- born again ----------------------------------------------------------------------------------------------------


def test_confidence_weights_are_largest_probabilities_and_add_up_to_the_batch(logits, wide):
    largest = softmax(wide[1], 1).max(1)
    teacher = logits[1].requires_grad_()
    weights = confidence_weights(teacher)
    assert not weights.requires_grad
    np.testing.assert_allclose(weights, 6 * largest / largest.sum(), rtol=1e-5)
    assert float(weights.sum()) == pytest.approx(6.0, rel=1e-5)
    assert confidence_weights(torch.zeros(4, 3)).tolist() == pytest.approx([1.0] * 4)


def test_permutation_keeps_the_first_choice_and_the_values(logits):
    teacher = logits[1].requires_grad_()
    permuted = permute_other_classes(teacher)
    assert not permuted.requires_grad
    assert torch.equal(permuted.argmax(1), teacher.argmax(1))
    assert torch.equal(permuted.amax(1), teacher.amax(1))
    assert torch.equal(permuted.sort(1).values, teacher.sort(1).values)
    assert int((permuted != teacher).any(1).sum()) >= 5  # one order in 720 changes nothing; this seed has one


def test_permutations_are_even_differ_by_sample_and_follow_the_seed():
    teacher = torch.tensor([[9.0, 1.0, 2.0, 3.0]]).repeat(6000, 1)
    torch.manual_seed(3)
    permuted = permute_other_classes(teacher)
    orders, counts = np.unique(permuted[:, 1:].numpy(), axis=0, return_counts=True)
    assert len(orders) == 6
    assert counts.min() > 850  # 1000 expected, standard deviation 29
    assert not torch.equal(permute_other_classes(teacher), permuted)
    torch.manual_seed(3)
    assert torch.equal(permute_other_classes(teacher), permuted)


# ---- all -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss",
    [
        lambda s, t: decoupled_kl(s, t, LABELS),
        pearson_relation,
        multi_level,
        lambda s, t: forward_kl_at(s, t, torch.tensor([3.0])),
        lambda s, t: virtual_teacher_kl(s, LABELS),
        lambda s, t: standardize_logits(s).norm(),
    ],
)
def test_arithmetic_is_float32_for_bfloat16_logits_under_autocast(logits, loss):
    student, teacher = (x.bfloat16() for x in logits)
    expected = loss(student.double(), teacher.double())
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(student, teacher)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(expected), rel=1e-4)
