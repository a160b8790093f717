import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.integrate import quad
from scipy.stats import norm, truncnorm

from lit_distill.losses.maps import (
    activation_boundary,
    expected_negative,
    factor_transfer,
    flow_matrix,
    flow_of_solution,
    hierarchical_context,
    margin_relu,
    on_smaller_grid,
    partial_l2,
    variational_information,
)


@pytest.fixture
def maps():
    return torch.randn(3, 4, 6, 5), torch.randn(3, 4, 6, 5)


@pytest.fixture
def variance():
    return torch.tensor([0.5, 1.0, 2.0, 5.0])


def losses(variance):
    """All losses of two equal shapes."""
    return {
        "vid": lambda s, t, **k: variational_information(s, t, variance, **k),
        "ft": factor_transfer,
        "fsp": lambda s, t, **k: flow_of_solution(s, s, t, t, **k),
        "ab": activation_boundary,
        "ofd": partial_l2,
        "review": hierarchical_context,
    }


NAMES = ["vid", "ft", "fsp", "ab", "ofd", "review"]


@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_gets_no_gradient_and_the_student_does(maps, variance, name):
    student, teacher = maps[0].requires_grad_(), maps[1].requires_grad_()
    losses(variance)[name](student, teacher).backward()
    assert teacher.grad is None
    assert float(student.grad.norm()) > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_reductions_are_of_samples_that_do_not_know_each_other(maps, variance, name):
    loss = losses(variance)[name]
    single = [float(loss(maps[0][i : i + 1], maps[1][i : i + 1])) for i in range(3)]
    assert loss(*maps, reduction="none").tolist() == pytest.approx(single, rel=1e-5)
    assert float(loss(*maps, reduction="sum")) == pytest.approx(sum(single), rel=1e-5)
    assert float(loss(*maps)) == pytest.approx(sum(single) / 3, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_values_are_float32_under_autocast(maps, variance, name):
    loss = losses(variance)[name]
    half = [x.bfloat16() for x in maps]
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(*half)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(loss(*(x.float() for x in half))), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_difference_quotients(variance, name):
    student, teacher = (torch.randn(1, 4, 5, 5, dtype=torch.float64) for _ in range(2))
    loss = losses(variance.double())[name]
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student.requires_grad_())


# ---- variational information ---------------------------------------------------------------------------------------


def test_variational_information_is_torchs_gaussian_likelihood_without_its_constant(maps, variance):
    expected = F.gaussian_nll_loss(maps[0], maps[1], variance.view(-1, 1, 1).expand(3, 4, 6, 5))
    torch.testing.assert_close(variational_information(*maps, variance), expected)


def test_variational_information_is_lowest_where_the_variance_is_the_mean_squared_residual(maps):
    residual = torch.from_numpy(((maps[0] - maps[1]).double().numpy() ** 2).mean((0, 2, 3))).requires_grad_()
    student, teacher = (x.double() for x in maps)
    lowest = variational_information(student, teacher, residual)
    lowest.backward()
    assert residual.grad.abs().max() < 1e-8
    for factor in (0.9, 1.1):
        assert variational_information(student, teacher, factor * residual) > lowest + 1e-4


def test_variational_information_of_equal_maps_is_half_the_log_variance(maps, variance):
    value = variational_information(maps[0], maps[0], variance)
    assert float(value) == pytest.approx(0.5 * np.log(variance.numpy()).mean(), rel=1e-5)


def test_variances_get_a_gradient(maps, variance):
    variational_information(*maps, variance.requires_grad_()).backward()
    residual = ((maps[0] - maps[1]).numpy() ** 2).mean((0, 2, 3))
    v = variance.detach().numpy()
    # Each channel is a quarter of the elements.
    np.testing.assert_allclose(variance.grad.numpy(), 0.5 * (1 / v - residual / v**2) / 4, rtol=1e-4)


# ---- factor transfer -----------------------------------------------------------------------------------------------


def test_factor_transfer_equals_numpys(maps):
    s, t = (x.double().numpy().reshape(3, -1) for x in maps)
    s, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (s, t))
    assert factor_transfer(*maps, reduction="none").tolist() == pytest.approx(np.abs(s - t).mean(1), rel=1e-5)


def test_factor_transfer_ignores_scale_and_vanishes_for_equal_directions(maps):
    value = float(factor_transfer(*maps))
    assert float(factor_transfer(7.0 * maps[0], 0.1 * maps[1])) == pytest.approx(value, rel=1e-5)
    assert float(factor_transfer(maps[0], 3.0 * maps[0])) == pytest.approx(0.0, abs=1e-7)
    # Opposite: twice the mean absolute entry of a unit vector.
    unit = maps[0].flatten(1).numpy() / np.linalg.norm(maps[0].flatten(1).numpy(), axis=1, keepdims=True)
    assert float(factor_transfer(-maps[0], maps[0])) == pytest.approx(2 * np.abs(unit).mean(), rel=1e-5)


def test_factors_of_other_grids_are_pooled_to_the_smaller(maps):
    doubled = maps[1].repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert float(factor_transfer(maps[0], doubled)) == pytest.approx(float(factor_transfer(*maps)), rel=1e-5)
    assert float(factor_transfer(doubled, maps[0])) == pytest.approx(float(factor_transfer(*maps)), rel=1e-5)


# ---- flow of solution ----------------------------------------------------------------------------------------------


def test_flow_matrix_is_the_mean_product_over_positions():
    first, second = torch.randn(2, 3, 4, 2), torch.randn(2, 5, 4, 2)
    f, g = first.numpy(), second.numpy()
    expected = [
        [[np.mean([f[b, i, y, x] * g[b, j, y, x] for y in range(4) for x in range(2)]) for j in range(5)]]
        for b in range(2)
        for i in range(3)
    ]
    np.testing.assert_allclose(flow_matrix(first, second).numpy(), np.reshape(expected, (2, 3, 5)), atol=1e-6)


def test_flow_matrix_pools_the_larger_grid_by_its_mean():
    first, second = torch.randn(2, 3, 4, 6), torch.randn(2, 5, 2, 3)
    pooled = first.numpy().reshape(2, 3, 2, 2, 3, 2).mean((3, 5))
    expected = np.einsum("bihw,bjhw->bij", pooled, second.numpy()) / 6
    np.testing.assert_allclose(flow_matrix(first, second).numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(flow_matrix(second, first).numpy(), expected.swapaxes(1, 2), atol=1e-6)


def test_flow_of_solution_is_the_mean_squared_difference_of_matrices():
    s1, t1 = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 8, 8)
    s2, t2 = torch.randn(2, 5, 2, 2), torch.randn(2, 5, 8, 8)
    pooled = s1.numpy().reshape(2, 3, 2, 2, 2, 2).mean((3, 5))
    student = np.einsum("bihw,bjhw->bij", pooled, s2.numpy()) / 4
    teacher = np.einsum("bihw,bjhw->bij", t1.numpy(), t2.numpy()) / 64
    assert float(flow_of_solution(s1, s2, t1, t2)) == pytest.approx(((student - teacher) ** 2).mean(), rel=1e-4)


def test_flow_of_solution_is_blind_to_where_things_happen():
    s1, s2 = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    order = torch.randperm(16)
    moved = [x.flatten(2)[:, :, order].unflatten(2, (4, 4)) for x in (s1, s2)]
    assert float(flow_of_solution(s1, s2, *moved)) == pytest.approx(0.0, abs=1e-10)


# ---- activation boundaries -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [1.0, 0.5])
def test_activation_boundary_is_the_sum_that_the_paper_writes(maps, margin):
    s, t = (x.double().numpy() for x in maps)
    value = (s + margin) ** 2 * ((s > -margin) & (t <= 0)) + (s - margin) ** 2 * ((s <= margin) & (t > 0))
    expected = value.reshape(3, -1).sum(1)
    assert activation_boundary(*maps, margin=margin, reduction="none").tolist() == pytest.approx(expected, rel=1e-5)


def test_activation_boundary_by_hand():
    student = torch.tensor([[2.0, 0.5, -0.5, -2.0], [2.0, 0.5, -0.5, -2.0]])
    teacher = torch.tensor([[3.0, 0.1, 0.1, 0.1], [0.0, -0.1, -0.1, -3.0]])
    # On the right side beyond the margin nothing is left; else the squared way to the margin.
    expected = [0 + 0.25 + 2.25 + 9, 9 + 2.25 + 0.25 + 0]
    assert activation_boundary(student, teacher, reduction="none").tolist() == pytest.approx(expected)


def test_activation_boundary_asks_for_the_teachers_signs_alone(maps):
    assert float(activation_boundary(*maps)) == float(activation_boundary(maps[0], 50 * maps[1]))
    assert float(activation_boundary(1.5 * maps[1].sign(), maps[1])) == 0.0


# ---- overhaul ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (0.4, 0.3), (-1.0, 0.5), (2.0, -1.0), (-3.0, 0.1)])
def test_expected_negative_equals_the_integral(mean, deviation):
    density = norm(mean, abs(deviation)).pdf
    low = mean - 12 * abs(deviation)
    moment, mass = (quad(f, low, 0, epsabs=1e-12)[0] for f in (lambda x: x * density(x), density))
    value = expected_negative(torch.tensor([mean]), torch.tensor([deviation]))
    assert float(value) == pytest.approx(moment / mass, rel=1e-5)


def test_expected_negative_without_negative_mass_is_minus_three_deviations():
    # The mass below zero is 0.001 at 3.0902 deviations.
    value = expected_negative(torch.tensor([3.10, 3.08, 50.0]), torch.tensor([1.0, 1.0, -2.0]))
    assert float(value[0]) == -3.0
    assert float(value[1]) == pytest.approx(truncnorm(-np.inf, -3.08, 3.08, 1.0).mean(), rel=1e-4)
    assert float(value[2]) == -6.0


def test_expected_negative_of_a_pruned_channel_is_finite():
    value = expected_negative(torch.tensor([-0.5, 0.0, 0.5]), torch.zeros(3))
    assert value.tolist() == pytest.approx([-0.5, 0.0, 0.0], abs=1e-6)


def test_margin_relu_ends_at_each_channels_margin(maps):
    margin = torch.tensor([-0.1, -0.5, -1.0, -2.0])
    expected = np.maximum(maps[0].numpy(), margin.numpy()[None, :, None, None])
    np.testing.assert_array_equal(margin_relu(maps[0], margin).numpy(), expected)


def test_partial_l2_by_hand():
    student = torch.tensor([[-2.0, -0.5, 1.0, -2.0, 3.0]])
    teacher = torch.tensor([[-1.0, -1.0, -1.0, 1.0, 1.0]])
    # The first is below a teacher that is not positive: the ReLU hides it.
    assert float(partial_l2(student, teacher)) == pytest.approx(0 + 0.25 + 4 + 9 + 4)
    assert float(partial_l2(torch.tensor([[-3.0]]), torch.tensor([[0.0]]))) == 0.0


def test_partial_l2_after_the_margin_relu_is_the_three_cases_of_the_public_code(maps):
    margin = torch.tensor([-0.1, -0.5, -1.0, -2.0])
    m = margin.double().numpy()[None, :, None, None]
    s, t = (x.double().numpy() for x in maps)
    cases = (s - m) ** 2 * ((s > m) & (t <= m))
    cases = cases + (s - t) ** 2 * ((s > t) & (t > m) & (t <= 0)) + (s - t) ** 2 * (t > 0)
    assert float(partial_l2(maps[0], margin_relu(maps[1], margin))) == pytest.approx(cases.sum() / 3, rel=1e-5)


def test_partial_l2_has_no_gradient_where_it_is_skipped(maps):
    student, teacher = maps[0].requires_grad_(), maps[1]
    partial_l2(student, teacher).backward()
    skipped = (student.detach() <= teacher) & (teacher <= 0)
    expected = torch.where(skipped, 0.0, 2 * (student.detach() - teacher) / 3)
    torch.testing.assert_close(student.grad, expected)


# ---- knowledge review ----------------------------------------------------------------------------------------------


def test_hierarchical_context_is_the_weighted_mean_over_scales():
    student, teacher = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    s, t = student.double().numpy(), teacher.double().numpy()

    def pooled(x, size):
        cell = 8 // size
        return x.reshape(2, 3, size, cell, size, cell).mean((3, 5))

    parts = [((pooled(s, size) - pooled(t, size)) ** 2).mean() for size in (8, 4, 2, 1)]
    expected = np.dot([1, 0.5, 0.25, 0.125], parts) / 1.875
    assert float(hierarchical_context(student, teacher)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("size", "scales"), [(4, (2, 1)), (2, (1,)), (1, ())])
def test_scales_that_are_not_smaller_are_left_out(size, scales):
    student, teacher = torch.randn(2, 3, size, size), torch.randn(2, 3, size, size)
    values, weights = [((student - teacher) ** 2).mean()], [1.0]
    for scale in scales:
        weights.append(weights[-1] / 2)
        values.append(((F.adaptive_avg_pool2d(student, scale) - F.adaptive_avg_pool2d(teacher, scale)) ** 2).mean())
    expected = np.dot(weights, values) / sum(weights)
    assert float(hierarchical_context(student, teacher)) == pytest.approx(float(expected), rel=1e-5)


def test_hierarchical_context_of_a_constant_difference_is_its_square(maps):
    assert float(hierarchical_context(maps[0], maps[0] + 0.5)) == pytest.approx(0.25, rel=1e-4)
    assert float(hierarchical_context(maps[0], maps[0].clone())) == 0.0


# ---- grids ---------------------------------------------------------------------------------------------------------


def test_maps_meet_on_the_smaller_height_and_width():
    first, second = on_smaller_grid(torch.randn(2, 3, 8, 3), torch.randn(2, 5, 4, 6))
    assert (first.shape, second.shape) == ((2, 3, 4, 3), (2, 5, 4, 3))
