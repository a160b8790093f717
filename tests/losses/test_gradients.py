import numpy as np
import pytest
import torch

from lit_distill.losses.gradients import gradient_distance


@pytest.fixture
def gradients():
    """Two gradients of a network with a matrix, a convolution, a bias and a scale."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(4, 3), (2, 3, 2, 2), (4,), ()]
    return [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2)]


def cosine(a, b):
    return (a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum())


def by_numpy(synthetic, real, metric):
    """The definitions, in float64, row by row."""
    pairs = [(a.double().numpy(), b.double().numpy()) for a, b in zip(synthetic, real, strict=True)]
    if metric == "mse":
        return sum(((a - b) ** 2).sum() for a, b in pairs) / sum((b**2).sum() for _, b in pairs)
    if metric == "cos":
        return 1 - cosine(*(np.concatenate([side.ravel() for side in sides]) for sides in zip(*pairs, strict=True)))
    return sum(1 - cosine(a[row], b[row]) for a, b in pairs if a.ndim > 1 for row in range(len(a)))


@pytest.mark.parametrize("metric", ["mse", "rows", "cos"])
def test_the_distances_are_those_of_the_definitions(gradients, metric):
    value = gradient_distance(*gradients, metric=metric)
    assert float(value) == pytest.approx(by_numpy(*gradients, metric), rel=1e-5)


@pytest.mark.parametrize(
    ("factor", "mse", "rows", "cos"),
    [(1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 6.0, 1.0), (-1.0, 4.0, 12.0, 2.0), (3.0, 4.0, 0.0, 0.0)],
)
def test_equal_absent_opposite_and_longer_gradients(gradients, factor, mse, rows, cos):
    real = gradients[1]
    scaled = [factor * gradient for gradient in real]
    for metric, expected in {"mse": mse, "rows": rows, "cos": cos}.items():  # 6 rows: 4 of the matrix, 2 filters
        assert float(gradient_distance(scaled, real, metric=metric)) == pytest.approx(expected, abs=2e-6)


def test_mse_is_relative_to_the_real_gradient(gradients):
    doubled = [[2 * g for g in side] for side in gradients]
    torch.testing.assert_close(gradient_distance(*doubled), gradient_distance(*gradients))
    swapped = gradient_distance(gradients[1], gradients[0])
    assert abs(float(swapped) - float(gradient_distance(*gradients))) > 0.01


def test_the_gradient_reaches_the_synthetic_side_alone(gradients):
    synthetic, real = ([g.requires_grad_() for g in side] for side in gradients)
    gradient_distance(synthetic, real).backward()
    norm = sum(g.detach().square().sum() for g in real)
    for own, other in zip(synthetic, real, strict=True):
        torch.testing.assert_close(own.grad, 2 * (own - other).detach() / norm)
        assert other.grad is None


def test_rows_leave_biases_alone_and_bear_rows_without_a_gradient(gradients):
    synthetic, real = ([g.clone() for g in side] for side in gradients)
    synthetic[0][1], real[0][2] = 0.0, 0.0
    synthetic = [g.requires_grad_() for g in synthetic]
    gradient_distance(synthetic, real, metric="rows").backward()
    assert synthetic[2].grad is None
    assert all(bool(g.grad.isfinite().all()) for g in synthetic[:2])
    # A cosine does not change along the vector itself.
    along = (synthetic[0].grad * synthetic[0]).sum(1)
    torch.testing.assert_close(along, torch.zeros(4), rtol=0, atol=1e-5)


def test_half_precision_is_computed_in_float32(gradients):
    half = [[g.bfloat16() for g in side] for side in gradients]
    value = gradient_distance(*half)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(by_numpy(*([g.float() for g in side] for side in half), "mse"), rel=1e-5)
