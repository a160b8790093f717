import pytest
import torch
from score_methods import attach, check_score_method

from lit_distill.core.errors import UsageError
from lit_distill.diffusion.denoiser import Denoiser
from lit_distill.diffusion.distillation import at_rest
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.losses import surrogate_loss
from lit_distill.diffusion.methods.sid import SiD
from lit_distill.diffusion.models import GaussianMixture
from lit_distill.diffusion.paths import EDMPath
from lit_distill.diffusion.rollout import Sample
from lit_distill.diffusion.times import Karras, Listed


def test_method(trainer, digits, make_denoiser, little, tmp_path):
    def build(cls):
        return cls(make_denoiser(1), make_denoiser(0), [2.5], evaluation=little)

    module = check_score_method(build, SiD, trainer, digits, tmp_path)
    assert (module.student_times.low, module.student_times.high) == (0.0, 0.8)
    assert isinstance(module.student_times, Karras)


def test_the_gradient_goes_through_both_scores_and_stays_in_neither(trainer, digits, make_denoiser, little):
    """Against the formula of one Gaussian: both scores are D(x_t) = m + k (x_t - m), so L is a polynomial of x."""
    path, n = EDMPath(), 6
    scores = [
        Denoiser(GaussianMixture([[m] * 4], std, path), path, "x0", time_input="time")
        for m, std in ((0.3, 0.4), (0.0, 0.5))
    ]
    module = SiD(
        make_denoiser(1), make_denoiser(0), [2.5], alpha=1.2, scale=3.0, evaluation=little, student_times=Listed([0.7])
    )
    attach(module, trainer, digits)
    x = torch.randn(n, 4)
    sample = Sample(x, x, torch.full((n,), 2.5).double(), 0)
    module.fake, module.teacher = scores
    g = module.student_gradient(sample, None, Draws(3))

    draws = Draws(3)
    draws.integers(1, n)
    x_t = x + 0.7 * draws.normal(x.shape)
    k_f, k_r = 0.4**2 / (0.4**2 + 0.7**2), 0.5**2 / (0.5**2 + 0.7**2)
    fake, real = 0.3 + k_f * (x_t - 0.3), k_r * x_t
    d, e = real - fake, real - x
    divisor = (x - real).abs().mean(1, keepdim=True)
    # L = d (e - a d) / divisor with dd/dx = k_r - k_f and de/dx = k_r - 1.
    slope = ((k_r - k_f) * (e - 1.2 * d) + d * (k_r - 1 - 1.2 * (k_r - k_f))) / divisor
    expected = 3.0 * slope / n  # the mean over samples of the sum over pixels
    leaf = x.clone().requires_grad_()
    surrogate_loss(leaf, g).backward()
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-4, atol=1e-6)


def test_nothing_is_left_in_the_scores_and_samples_that_are_not_finite_are_left_out(
    trainer, digits, make_denoiser, little
):
    module = attach(SiD(make_denoiser(1), make_denoiser(0), [2.5], evaluation=little), trainer, digits)
    x = torch.randn(4, 1, 8, 8)
    x[2, 0, 3, 3] = torch.inf
    labels = torch.arange(4)
    with at_rest(module.fake):
        g = module.student_gradient(Sample(x, x, torch.full((4,), 2.5).double(), 0), labels, Draws(0))
    assert g.isfinite().all()
    assert (g.flatten(1) != 0).any(1).tolist() == [True, True, False, True]
    assert all(p.grad is None for p in [*module.fake.parameters(), *module.teacher.parameters()])


def test_scale_must_be_positive(make_denoiser):
    with pytest.raises(UsageError, match=r"model\.scale is 0"):
        SiD(make_denoiser(1), make_denoiser(0), [2.5], scale=0.0)
