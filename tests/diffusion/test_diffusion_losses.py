import math

import pytest
import torch
from torch import nn

from lit_distill.diffusion.losses import (
    approximate_r1,
    denoising_loss,
    denoising_weight,
    gan_loss,
    generator_gan_loss,
    score_gradient,
    surrogate_loss,
)
from lit_distill.diffusion.paths import EDMPath, FlowPath, TrigPath, VPPath


def test_the_surrogate_has_the_gradient_divided_by_the_number_of_elements():
    x, g = torch.randn(3, 2, 5, requires_grad=True), torch.randn(3, 2, 5)
    loss = surrogate_loss(x, g)
    loss.backward()
    torch.testing.assert_close(x.grad, g / 30)
    assert loss.item() == pytest.approx(0.5 * g.square().mean().item())
    assert surrogate_loss(x, g, reduction="none").shape == (3,)


def test_the_direction_is_fake_minus_real_over_the_samples_own_distance():
    x = torch.tensor([[1.0, 3.0], [0.0, 10.0]], requires_grad=True)
    fake, real = torch.tensor([[2.0, 2.0], [1.0, 1.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    expected = torch.tensor([[2.0, 2.0], [1.0, -1.0]]) / torch.tensor([[2.0], [4.0]])
    found = score_gradient(x, fake, real)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected)
    weight = torch.tensor([[3.0], [0.5]])
    torch.testing.assert_close(score_gradient(x, fake, real, weight=weight), expected * weight)
    torch.testing.assert_close(score_gradient(x, fake, real, normalize=False), fake - real)


def test_equal_scores_move_nothing_and_what_is_not_finite_becomes_zero():
    x, score = torch.randn(2, 3), torch.randn(2, 3)
    assert not score_gradient(x, score, score).any()
    bad = score_gradient(x, torch.tensor([[math.nan] * 3, [1.0] * 3]), torch.zeros(2, 3), normalize=False)
    torch.testing.assert_close(bad, torch.tensor([[0.0] * 3, [1.0] * 3]))
    # A sample that is what the teacher says is divided by the floor.
    assert score_gradient(score, score + 1e-6, score).abs().max() < 0.2


def test_the_direction_is_the_gradient_of_the_divergence_of_gaussians():
    """d KL(N(m, q^2) || N(0, 1)) / dm of the noised distributions, in closed form, with exact denoisers."""
    path, t, m, q = FlowPath(), 0.4, 0.7, 0.5
    alpha, sigma = 1 - t, t
    generator = torch.Generator().manual_seed(0)
    x = m + q * torch.randn(1_000_000, 1, generator=generator, dtype=torch.float64)
    x_t = path.add_noise(x, torch.randn(x.shape, generator=generator, dtype=torch.float64), t)
    fake_variance, real_variance = alpha**2 * q**2 + sigma**2, alpha**2 + sigma**2
    fake = m + alpha * q**2 / fake_variance * (x_t - alpha * m)
    real = alpha / real_variance * x_t
    found = score_gradient(x, fake, real, weight=(alpha / sigma) ** 2, normalize=False).double().mean()
    # KL = log(s_r / s_f) + (s_f^2 + (alpha m)^2) / (2 s_r^2) - 1/2, of which only the middle depends on m.
    assert found.item() == pytest.approx(alpha**2 * m / real_variance, abs=1e-3)


@pytest.mark.parametrize(
    ("path", "time", "weighting", "prediction"),
    [
        (FlowPath(), 0.3, "u", "u"),
        (FlowPath(), 0.3, "eps", "eps"),
        (VPPath(), 400.0, "v", "v"),
        (VPPath(), 400.0, "eps", "eps"),
        (TrigPath(), 0.8, "u", "v"),
        (EDMPath(), 2.0, "u", "eps"),
        (EDMPath(), 2.0, "x0", "x0"),
    ],
)
def test_weights_make_the_error_that_of_another_prediction(path, time, weighting, prediction):
    x0, eps, estimate = torch.randn(3, 6, 5).double()
    t = torch.full((6,), time).double()
    x_t = path.add_noise(x0, eps, t)
    error = path.convert(estimate, x_t, t, "x0", prediction) - path.convert(x0, x_t, t, "x0", prediction)
    found = denoising_loss(estimate, x0, denoising_weight(path, t, weighting), reduction="none")
    torch.testing.assert_close(found.double(), error.square().mean(1), rtol=1e-4, atol=1e-6)


def test_the_weight_of_edm_is_one_over_its_output_scale():
    t = torch.tensor([0.1, 1.0, 30.0]).double()
    expected = (t**2 + 0.75**2) / (t * 0.75) ** 2
    torch.testing.assert_close(denoising_weight(EDMPath(), t, "edm", data_std=0.75), expected)


def test_gan_losses_are_those_of_the_papers():
    fake, real = torch.tensor([[0.5], [-2.0]]), torch.tensor([[1.5], [0.2]])
    softplus = lambda value: math.log1p(math.exp(value))  # noqa: E731
    expected = {
        "ns": (softplus(0.5) + softplus(-2.0) + softplus(-1.5) + softplus(-0.2)) / 2,
        "hinge": (1.5 + 0.0 + 0.0 + 0.8) / 2,
        "linear": (0.5 - 2.0 - 1.5 - 0.2) / 2,
        "rpgan": (softplus(-1.0) + softplus(-2.2)) / 2,
    }
    generator = {
        "ns": (softplus(-0.5) + softplus(2.0)) / 2,
        "hinge": (-0.5 + 2.0) / 2,
        "linear": (-0.5 + 2.0) / 2,
        "rpgan": (softplus(1.0) + softplus(2.2)) / 2,
    }
    for kind, value in expected.items():
        assert gan_loss(fake, real, kind=kind).item() == pytest.approx(value, rel=1e-6)
        assert generator_gan_loss(fake, real, kind=kind).item() == pytest.approx(generator[kind], rel=1e-6)
    zero = torch.zeros(4, 2)
    assert gan_loss(zero, zero).item() == pytest.approx(2 * math.log(2))


def test_the_best_discriminator_is_the_log_ratio_of_densities():
    """Two Gaussians of equal variance: log p_real / p_fake is linear, slope 2 m / v and intercept 0 for means +-m."""
    generator = torch.Generator().manual_seed(0)
    real, fake = (sign * 0.5 + torch.randn(200_000, 1, generator=generator) for sign in (1, -1))
    head = nn.Linear(1, 1)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=50)

    def closure():
        optimizer.zero_grad()
        loss = gan_loss(head(fake), head(real))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert head.weight.item() == pytest.approx(1.0, abs=0.02)
    assert head.bias.item() == pytest.approx(0.0, abs=0.02)


def test_the_generator_goes_to_where_logits_are_large():
    for kind in ("ns", "hinge", "linear", "rpgan"):
        logits = torch.zeros(3, 1, requires_grad=True)
        generator_gan_loss(logits, torch.zeros(3, 1), kind=kind).backward()
        assert (logits.grad < 0).all()


def test_approximate_r1_is_the_squared_gradient_times_the_noise():
    weight, noise = torch.tensor([3.0, -4.0]), 0.01 * torch.randn(200_000, 2)
    x = torch.zeros(200_000, 2)
    found = approximate_r1((x @ weight)[:, None], ((x + noise) @ weight)[:, None])
    assert found.item() == pytest.approx(25 * 1e-4, rel=0.02)
