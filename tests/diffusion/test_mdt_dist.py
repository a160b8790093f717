"""MDT-dist: against flows of Gaussians in closed form, and a step of it against the one written by hand."""

import copy
import math

import pytest
import torch

from lit_distill.core.errors import UsageError
from lit_distill.core.loading import derived_seed
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.methods.mdt_dist import MDTDist
from lit_distill.diffusion.paths import EDMPath, FlowPath
from lit_distill.diffusion.samplers import DDIM
from lit_distill.diffusion.transport import (
    finite_difference_tangent,
    implied_velocity,
    normalized_tangent,
    velocity_distillation,
    velocity_matching,
)


class Gaussian:
    """Data N(mean, std^2) on the flow path: velocity, average velocity and score from textbook formulas."""

    def __init__(self, mean, std):
        self.mean, self.std = mean, std

    def parts(self, x, t):
        t = t.view(-1, 1)
        return t, x - (1 - t) * self.mean, (1 - t) ** 2 * self.std**2 + t**2

    def velocity(self, x, t):
        t, centered, variance = self.parts(x, t)
        return t / variance * centered - self.mean - (1 - t) * self.std**2 / variance * centered

    def phi(self, x, t):
        at, centered, variance = self.parts(x, t)
        return (x - self.mean - self.std * centered / variance.sqrt()) / at

    def score(self, x, t):
        _, centered, variance = self.parts(x, t)
        return -centered / variance


@pytest.fixture
def noisy():
    t = torch.linspace(0.05, 0.99, 40, dtype=torch.float64)
    return torch.randn(40, 3, dtype=torch.float64), t


def exact(function, x, t, velocity):
    return torch.func.jvp(function, (x, t), (velocity, torch.ones_like(t)))[1]


def test_the_closed_form_average_velocity_satisfies_velocity_matching(noisy):
    x, t = noisy
    data = Gaussian(0.4, 0.6)
    v, phi = data.velocity(x, t), data.phi(x, t)
    tangent = exact(data.phi, x, t, v)
    torch.testing.assert_close(implied_velocity(phi, tangent, t), v, rtol=0, atol=1e-12)
    assert velocity_matching(phi, v, tangent, t).item() < 1e-24
    approximate = finite_difference_tangent(data.phi, phi, x, t, v, dt=0.01)
    assert (implied_velocity(phi, approximate, t) - v).abs().max() < 0.02
    assert 0 < velocity_matching(phi, v, approximate, t).item() < 4e-4
    # The other direction of time is another derivative.
    assert (implied_velocity(phi, -approximate, t) - v).abs().max() > 0.2


def test_velocity_matching_is_a_mean_square_with_one_way_for_gradients(noisy):
    x, t = noisy
    phi, v, tangent = (torch.randn_like(x).requires_grad_() for _ in range(3))
    loss = velocity_matching(phi, v, tangent, t)
    loss.backward()
    residual = (phi - v + t[:, None] * tangent).detach()
    assert loss.item() == pytest.approx(residual.square().mean().item())
    torch.testing.assert_close(phi.grad, 2 * residual / residual.numel())
    assert v.grad is None
    assert tangent.grad is None
    assert velocity_matching(phi, v, tangent, t, reduction="none").shape == (40,)


def test_the_derivative_is_detached_as_a_whole(noisy):
    x, t = noisy
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def function(x, t):
        return weight * x * t[:, None]

    tangent = finite_difference_tangent(function, function(x, t), x, t, torch.ones_like(x), dt=1e-4)
    assert not tangent.requires_grad
    torch.testing.assert_close(tangent, (2 * (x + t[:, None])).detach(), rtol=0, atol=1e-3)


def test_the_difference_of_velocities_is_that_of_scores(noisy):
    """Generated data and real data are two Gaussians."""
    x, t = noisy
    real, made = Gaussian(0.4, 0.6), Gaussian(-0.2, 0.9)
    at = t[:, None]
    by_scores = -(at / (1 - at)) * (made.score(x, t) - real.score(x, t))
    phi = made.phi(x, t)
    own = implied_velocity(phi, exact(made.phi, x, t, made.velocity(x, t)), t)
    torch.testing.assert_close(own - real.velocity(x, t), by_scores, rtol=0, atol=1e-11)
    # Along the teacher's velocity, as the method takes it, times the derivative of the student's map: the sign stays.
    along_teacher = implied_velocity(phi, exact(made.phi, x, t, real.velocity(x, t)), t)
    slope = made.std / made.parts(x, t)[2].sqrt()
    torch.testing.assert_close(along_teacher - real.velocity(x, t), slope * by_scores, rtol=0, atol=1e-11)


def test_velocity_distillation_moves_samples_to_where_the_teacher_finds_them_likelier():
    real, made = Gaussian(1.0, 0.5), Gaussian(0.0, 0.5)
    t = torch.full((4000,), 0.5, dtype=torch.float64)
    phi = torch.zeros(4000, 1, dtype=torch.float64, requires_grad=True)
    x = 0.5 * 0.5 * torch.randn(4000, 1, dtype=torch.float64) + 0.5 * torch.randn(4000, 1, dtype=torch.float64)
    v = real.velocity(x, t)
    implied = implied_velocity(made.phi(x, t), exact(made.phi, x, t, v), t)
    velocity_distillation(phi, implied, v).backward()
    moved = phi.grad.mean()  # phi goes along -grad, x' = z - phi along +grad
    assert moved * 4000 > 0.1
    torch.testing.assert_close(phi.grad, 2 * (implied - v) / 4000)


def test_norms_of_the_derivative():
    tangent = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert torch.equal(normalized_tangent(tangent, norm="none"), tangent)
    torch.testing.assert_close(normalized_tangent(tangent, norm="l2")[0], tangent[0] / 5.1)
    torch.testing.assert_close(normalized_tangent(tangent, norm="rms")[0], tangent[0] / (math.sqrt(12.5) + 0.1))
    assert not normalized_tangent(tangent, norm="l2")[1].any()


@pytest.fixture
def build(make_denoiser, little):
    def make(seed=1, **options):
        path = FlowPath()
        student, teacher = (make_denoiser(number, path, "u") for number in (seed, 0))
        for denoiser in (student, teacher):
            denoiser.time_input = "time"
        options = {"guidance": 1.5, "distillation_guidance": 2.5, "tangent_norm": "rms", **options}
        return MDTDist(student, teacher, evaluation=little, **options)

    return make


def test_a_step_is_the_one_written_by_hand(trainer, digits, build):
    """Both losses with guidance: same draws, plain gradient descent."""
    module = build(optimizer=lambda p: torch.optim.SGD(p, lr=0.1), distillation_weight=0.7)
    g, f = copy.deepcopy(module.student.network), copy.deepcopy(module.teacher.network)
    trainer(limit_train_batches=1).fit(module, datamodule=digits)
    digits.setup()
    batch = next(iter(digits.train_dataloader()))
    draws, labels, none = Draws(derived_seed("step", 0, 0)), batch.labels, torch.full((8,), 10)

    def noised(x0):
        share = (1.0 + draws.gaussian(8)).sigmoid()
        t = 0.001 + 0.01 + 0.989 * share  # sigma_min + dt + (1 - sigma_min - dt) sigmoid
        s = t.float().view(-1, 1, 1, 1)
        return (1 - s) * x0 + s * draws.normal(x0.shape), t

    def target(x, t, phi, scale):
        with torch.no_grad():
            cond, uncond = f(x, t.float(), labels), f(x, t.float(), none)
            v = uncond + scale * (cond - uncond)
            derivative = (phi - g(x - 0.01 * v, (t - 0.01).float(), labels)) / 0.01
            root = derivative.square().mean((1, 2, 3), keepdim=True).sqrt()
            return v - t.float().view(-1, 1, 1, 1) * derivative / (root + 0.1)

    x, t = noised(batch.images)
    phi = g(x, t.float(), labels)
    loss = (phi - target(x, t, phi, 1.5)).square().mean()
    z = draws.normal(x.shape)
    phi_z = g(z, torch.ones(8), labels)
    x, t = noised((z - phi_z).detach())
    with torch.no_grad():
        phi = g(x, t.float(), labels)
        d = phi - target(x, t, phi, 2.5)
    loss = loss + 0.7 * 2 * (d * phi_z).mean()
    gradients = torch.autograd.grad(loss, list(g.parameters()))
    for old, gradient, new in zip(g.parameters(), gradients, module.student.network.parameters(), strict=True):
        torch.testing.assert_close(new, old - 0.1 * gradient, rtol=1e-3, atol=1e-5)
    for old, new in zip(f.parameters(), module.teacher.network.parameters(), strict=True):
        assert torch.equal(old, new)


def test_a_resumed_run_is_the_uninterrupted_one(check_resumed, build):
    check_resumed(build)


def test_without_distillation_there_is_one_loss(trainer, digits, build):
    module = build(distillation_weight=0.0)
    trainer(limit_train_batches=1).fit(module, datamodule=digits)
    assert set(module.terms) == {"vm"}


def test_listed_times_of_a_flow_are_steps_of_euler():
    data, noise = Gaussian(0.4, 0.6), torch.randn(50, 3, dtype=torch.float64)
    x = noise
    for t, following in ((1.0, 0.6), (0.6, 0.2), (0.2, 0.0)):
        x = x - (t - following) * data.velocity(x, torch.full((50,), t, dtype=torch.float64))
    found = DDIM([1.0, 0.6, 0.2])(
        lambda x, t: x - t[:, None] * data.velocity(x, t), FlowPath(), noise, Draws(0)
    )  # fmt: skip
    torch.testing.assert_close(found, x)
    assert DDIM([1.0, 0.6]).evaluations() == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": EDMPath(), "prediction": "edm"}, "model.teacher: it is on EDMPath; average velocities need a Flow"),
        ({"dt": 0.0}, r"model.dt is 0\.0"),
        ({"distillation_weight": -1.0}, "model.distillation_weight is -1.0"),
    ],
)
def test_mistakes_are_told(make_denoiser, options, message):
    flow = make_denoiser(1, FlowPath(), "u")
    teacher = make_denoiser(0, options.pop("path", FlowPath()), options.pop("prediction", "u"))
    with pytest.raises(UsageError, match=message):
        MDTDist(flow, teacher, **options)
