import math

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge

from lit_distill.losses.kernel_ridge import (
    kernel_orthogonality,
    kernel_ridge_cross_entropy,
    kernel_ridge_prediction,
)


@pytest.fixture
def kernels():
    """A kernel (6, 6), a cross kernel (9, 6), and one-hot targets of two classes, from features with some noise."""
    rng = np.random.default_rng(3)
    fitted, asked = rng.normal(size=(6, 8)), rng.normal(size=(9, 8))
    targets = np.eye(2)[[0, 1, 0, 1, 1, 0]]
    return fitted @ fitted.T, asked @ fitted.T, targets


def as_tensors(*arrays):
    return tuple(torch.from_numpy(array) for array in arrays)


@pytest.mark.parametrize("ridge", [1e-6, 0.3, 20.0])
def test_the_prediction_is_scikit_learn_s_with_the_ridge_as_a_share_of_the_mean_diagonal(kernels, ridge):
    kernel, cross, targets = kernels
    alpha = ridge * np.trace(kernel) / len(kernel)
    expected = KernelRidge(alpha=alpha, kernel="precomputed").fit(kernel, targets).predict(cross)
    found = kernel_ridge_prediction(*as_tensors(kernel, cross, targets), ridge=ridge)
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-7, atol=1e-9)


def test_without_a_ridge_the_fitted_samples_get_their_targets_and_with_much_of_it_nothing(kernels):
    kernel, _, targets = as_tensors(*kernels)
    exact = kernel_ridge_prediction(kernel, kernel, targets, ridge=1e-12)
    torch.testing.assert_close(exact, targets, rtol=0, atol=1e-8)
    strong = kernel_ridge_prediction(kernel, kernel, targets, ridge=1e9)
    assert strong.abs().max() < 1e-7


def test_the_unit_of_the_kernel_plays_no_part(kernels):
    kernel, cross, targets = as_tensors(*kernels)
    for ridge in (1e-6, 0.5):
        plain = kernel_ridge_prediction(kernel, cross, targets, ridge=ridge)
        torch.testing.assert_close(kernel_ridge_prediction(1e5 * kernel, 1e5 * cross, targets, ridge=ridge), plain)


def test_kernels_in_single_precision_are_solved_in_double(kernels):
    # Two samples that differ by a ten-thousandth: float32 arithmetic would lose most of the difference.
    kernel = torch.tensor([[1.0, 1 - 2.0**-13], [1 - 2.0**-13, 1.0]])
    targets = torch.eye(2)
    strength = 1e-6
    a, b = 1 + strength, float(kernel[0, 1])
    expected = np.linalg.inv(np.array([[a, b], [b, a]]))
    found = kernel_ridge_prediction(kernel, torch.eye(2), targets)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-7)


def test_the_loss_is_the_likelihood_with_predictions_as_logits(kernels):
    kernel, cross, targets = kernels
    labels = np.array([0, 1, 1, 0, 1, 0, 0, 1, 1])
    alpha = 0.1 * np.trace(kernel) / len(kernel)
    logits = KernelRidge(alpha=alpha, kernel="precomputed").fit(kernel, targets).predict(cross)
    expected = np.mean(
        [math.log(sum(math.exp(z) for z in row)) - row[y] for row, y in zip(logits, labels, strict=True)]
    )
    found = kernel_ridge_cross_entropy(*as_tensors(kernel, cross, targets, labels), ridge=0.1)
    assert float(found) == pytest.approx(expected, rel=1e-9)


def test_the_gradient_reaches_both_kernels_and_the_ridge_s_trace(kernels):
    kernel, cross, targets = as_tensors(*kernels)
    labels = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1])
    inputs = kernel.requires_grad_(), cross.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b: kernel_ridge_cross_entropy(a, b, targets, labels, ridge=0.2), inputs, eps=1e-6, atol=1e-6
    )


def test_samples_that_are_all_alike_are_as_far_from_orthogonal_as_can_be(kernels):
    assert float(kernel_orthogonality(torch.diag(torch.tensor([3.0, 0.1, 7.0])))) == pytest.approx(0, abs=1e-6)
    assert float(kernel_orthogonality(torch.full((5, 5), 2.0))) == pytest.approx(math.sqrt(5 * 4), rel=1e-6)
    kernel = kernels[0]
    squares = [
        (kernel[i, j] / math.sqrt(kernel[i, i] * kernel[j, j])) ** 2 for i in range(6) for j in range(6) if i != j
    ]
    expected = math.sqrt(sum(squares))
    assert float(kernel_orthogonality(torch.from_numpy(kernel))) == pytest.approx(expected, rel=1e-9)


def test_its_gradient_is_zero_where_there_is_nothing_to_gain(kernels):
    kernel = torch.eye(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(kernel_orthogonality(kernel), kernel)
    assert gradient.tolist() == [[0.0] * 3] * 3
    kernel = torch.from_numpy(kernels[0]).requires_grad_()
    assert torch.autograd.gradcheck(kernel_orthogonality, (kernel,), eps=1e-6, atol=1e-6)
