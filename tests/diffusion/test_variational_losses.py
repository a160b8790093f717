"""Pure parts of SiD, SwiftBrush, f-distill and SwiftBrush v2 against closed forms."""

import math

import pytest
import torch

from lit_distill.core.errors import UsageError
from lit_distill.diffusion.losses import (
    clamped_similarity_loss,
    divergence_weight,
    score_gradient,
    sid_loss,
    variational_score_gradient,
)
from lit_distill.diffusion.paths import EDMPath, FlowPath, VPPath

# ---- SiD ------------------------------------------------------------------------------------------------------------


def estimate(x_t, sigma, mean, std):
    """E[x0 | x_t] of data N(mean, std^2) with noise sigma."""
    return mean + std**2 / (std**2 + sigma**2) * (x_t - mean)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_sid_with_an_exact_fake_score_expects_one_minus_alpha_times_the_squared_difference(alpha):
    """x ~ N(0.3, 0.4^2), data N(0, 0.5^2). The difference of the posterior means is linear in x_t: its second moment is
    known."""
    generator = torch.Generator().manual_seed(0)
    n, sigma, (m_f, s_f), (m_r, s_r) = 400_000, 0.7, (0.3, 0.4), (0.0, 0.5)
    x = m_f + s_f * torch.randn(n, 1, generator=generator)
    x_t = x + sigma * torch.randn(n, 1, generator=generator)
    # The divisor is set to 1 by a floor that is above every distance: 1000 times the loss at divisor 1000.
    value = 1000 * sid_loss(
        x, estimate(x_t, sigma, m_f, s_f), estimate(x_t, sigma, m_r, s_r), alpha=alpha, floor=1000.0
    )
    k_f, k_r = s_f**2 / (s_f**2 + sigma**2), s_r**2 / (s_r**2 + sigma**2)
    slope = k_r - k_f
    mean = (m_r - m_f) + k_r * (m_f - m_r)  # d at x_t = m_f
    squared = mean**2 + slope**2 * (s_f**2 + sigma**2)
    assert value.item() == pytest.approx((1 - alpha) * squared, abs=2e-3)
    if alpha != 1:
        assert abs((1 - alpha) * squared) > 8e-3  # what is compared is not noise


def test_sid_is_a_sum_over_pixels_over_the_detached_mean_distance():
    x = torch.tensor([[1.0, 2.0], [0.0, 0.0]], requires_grad=True)
    fake = torch.tensor([[0.5, 1.0], [1.0, 1.0]], requires_grad=True)
    teacher = torch.tensor([[2.0, 1.0], [1.0, -3.0]], requires_grad=True)
    value = sid_loss(x, fake, teacher, alpha=1.2, reduction="none")
    # d = (1.5, 0), (0, -4); real - x = (1, -1), (1, -3); divisors 1 and 2.
    expected = torch.tensor([1.5 * (1 - 1.2 * 1.5), -4 * (-3 + 1.2 * 4) / 2])
    torch.testing.assert_close(value, expected)
    assert sid_loss(x, fake, teacher).item() == pytest.approx(expected.mean().item())
    value.sum().backward()
    n = torch.tensor([[1.0], [2.0]])
    d, e = teacher.detach() - fake.detach(), teacher.detach() - x.detach()
    torch.testing.assert_close(x.grad, -d / n)
    torch.testing.assert_close(teacher.grad, (e - 1.2 * d + d * (1 - 1.2)) / n)
    torch.testing.assert_close(fake.grad, (-(e - 1.2 * d) + 1.2 * d) / n)
    same = sid_loss(x, fake, x, alpha=1.2)  # the divisor is 0 here
    assert same.isfinite()


# ---- SwiftBrush -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [VPPath(), FlowPath(0.01, 0.99), EDMPath(0.01, 20.0)], ids=lambda p: type(p).__name__)
def test_the_difference_of_noise_is_sigma_alpha_times_that_of_data(path):
    torch.manual_seed(0)
    t = path.t_min + torch.tensor([0.2, 0.5, 0.9]).double() * (path.t_max - path.t_min)
    x_t, fake, teacher = (torch.randn(3, 2, 4, 4, dtype=torch.float64) for _ in range(3))
    eps = [path.convert(x0, x_t, t, "x0", "eps") for x0 in (fake, teacher)]
    alpha, sigma, _, _ = path.at(t, x_t)
    g = variational_score_gradient(*eps, sigma=sigma)
    torch.testing.assert_close(g.double(), sigma * alpha * (fake - teacher), rtol=1e-4, atol=1e-4)
    # The sign is that of distribution matching.
    torch.testing.assert_close(
        g.double(),
        score_gradient(x_t, fake, teacher, weight=sigma * alpha, normalize=False).double(),
        rtol=1e-4,
        atol=1e-4,
    )


def test_no_gradient_flows_and_what_is_not_finite_is_left_out():
    fake = torch.tensor([[1.0, math.nan]], requires_grad=True)
    g = variational_score_gradient(fake, torch.tensor([[3.0, 1.0]]), sigma=torch.tensor([[0.5]]))
    assert g.tolist() == [[0.5, 0.0]]
    assert not g.requires_grad


# ---- f-distill ------------------------------------------------------------------------------------------------------

F = {
    "reverse_kl": lambda r: -r.log(),
    "forward_kl": lambda r: r * r.log(),
    "js": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "hellinger": lambda r: 1 - r.sqrt(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "neyman": lambda r: (1 - r) ** 2 / r,
    "softened_rkl": lambda r: (1 + r) * ((1 + r) / r).log(),
}


@pytest.mark.parametrize("divergence", F)
def test_weights_are_r_squared_times_the_second_derivative(divergence):
    ratio = torch.tensor([0.1, 0.5, 1.0, 2.0, 20.0], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(F[divergence](ratio).sum(), ratio, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), ratio)
    expected = ratio.detach() ** 2 * second
    found = divergence_weight(ratio.detach(), divergence=divergence)
    torch.testing.assert_close(found / found[2], expected / expected[2])  # up to a constant


# ---- SwiftBrush v2 --------------------------------------------------------------------------------------------------


def test_similar_enough_embeddings_are_left_alone():
    image = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]], requires_grad=True)
    text = torch.tensor([[1.0, 0.0], [1.0, 0.0], [5.0, 0.0]], requires_grad=True)
    value = clamped_similarity_loss(image, text, threshold=0.9, reduction="none")
    assert value.tolist() == pytest.approx([0.0, 0.9, 0.9 - math.sqrt(0.5)], abs=1e-6)
    value.sum().backward()
    assert text.grad is None
    assert image.grad[0].tolist() == [0, 0]
    assert image.grad[1, 0] < 0  # moves towards the text
    assert clamped_similarity_loss(image, text, threshold=0.9).item() == pytest.approx(value.mean().item())


def test_merged_weights_lie_between(tmp_path):
    from lit_distill.core.networks import pretrained
    from lit_distill.diffusion.merge import merged_weights, weight_merge
    from lit_distill.experiment.export import save_student

    spec = {"class_path": "lit_distill.diffusion.ResidualMLP", "init_args": {"features": 4, "width": 8, "depth": 1}}
    from lit_distill.diffusion import ResidualMLP

    networks = [ResidualMLP(**spec["init_args"]) for _ in range(2)]
    for name, network in zip("ab", networks, strict=True):
        save_student(network.state_dict(), spec, tmp_path / name / "student")
    weight_merge(str(tmp_path / "a"), str(tmp_path / "b/student"), str(tmp_path / "c"), share=0.25)
    made = pretrained(str(tmp_path / "c"))
    for (name, value), a, b in zip(
        made.named_parameters(), networks[0].parameters(), networks[1].parameters(), strict=True
    ):
        torch.testing.assert_close(value, 0.25 * a + 0.75 * b, msg=name)
    for share, network in ((1.0, networks[0]), (0.0, networks[1])):
        merged = merged_weights(*(n.state_dict() for n in networks), share=share)
        assert all(torch.equal(value, network.state_dict()[name]) for name, value in merged.items())
    with pytest.raises(UsageError, match=r"--share is 1\.5"):
        merged_weights({}, {}, share=1.5)
    with pytest.raises(UsageError, match="is not empty; name a new folder"):
        weight_merge(str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "c"))
    with pytest.raises(UsageError, match=r"holds no model\.safetensors"):
        weight_merge(str(tmp_path / "none"), str(tmp_path / "b"), str(tmp_path / "d"))
    other = ResidualMLP(features=4, width=12, depth=1)
    save_student(other.state_dict(), spec, tmp_path / "e/student")
    with pytest.raises(UsageError, match=r"student_b: .* has shape .*; merge equal networks"):
        weight_merge(str(tmp_path / "a"), str(tmp_path / "e"), str(tmp_path / "d"))
