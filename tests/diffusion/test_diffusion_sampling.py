import math

import pytest
import torch

from lit_distill.core.errors import UsageError
from lit_distill.diffusion.denoiser import Denoiser
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.paths import CosinePath, EDMPath, FlowPath, TrigPath, VPPath
from lit_distill.diffusion.rollout import FewStepRollout
from lit_distill.diffusion.samplers import Euler, Heun, Renoise
from lit_distill.diffusion.times import (
    Interval,
    Karras,
    Listed,
    LogitNormal,
    LogNormal,
    Shifted,
    Uniform,
    check_steps,
    karras_noise,
)

STD = 0.5


def gaussian(path):
    """The exact denoiser of data N(1, STD^2)."""

    def denoise(x_t, t):
        alpha, sigma, _, _ = path.at(t, x_t)
        return (1 + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x_t - alpha)).to(x_t.dtype)

    return denoise


@pytest.mark.parametrize(
    "path", [EDMPath(), FlowPath(), TrigPath(), CosinePath(), VPPath()], ids=lambda p: type(p).__name__
)
def test_the_flow_of_a_gaussian_is_a_scaling(path):
    """Closed form: x = 1 + (x_start - alpha) * STD / sqrt(alpha^2 STD^2 + sigma^2), from x_start = sigma noise."""
    noise = torch.randn(50, 2, dtype=torch.float64)
    r = min(float(path.r(path.t_max)), 80.0)
    expected = 1 + (r * noise - 1) * STD / math.sqrt(STD**2 + r**2)
    heun = Heun(60)(gaussian(path), path, noise, Draws(0))
    torch.testing.assert_close(heun, expected, atol=0.01, rtol=0)
    errors = [
        float((sampler(gaussian(path), path, noise, Draws(0)) - expected).abs().max())
        for sampler in (Euler(30), Euler(60), Heun(30), Heun(60))
    ]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.4)  # first order
    assert errors[2] < errors[0] / 5


def test_evaluations_are_counted():
    path, calls = EDMPath(), []

    def denoise(x_t, t):
        calls.append(float(t[0]))
        return x_t * 0

    for sampler, times in ((Heun(18), 35), (Euler(4), 4), (Renoise([80.0, 2.0]), 2)):
        calls.clear()
        sampler(denoise, path, torch.randn(2, 3), Draws(0))
        assert len(calls) == times == sampler.evaluations()
    assert calls == [80.0, 2.0]


def test_noise_levels_are_those_of_edm():
    u = torch.linspace(1, 0, 18, dtype=torch.float64)
    steps = karras_noise(u, 0.002, 80.0)
    # 2206.00364, eq. 5, from its public code.
    i = torch.arange(18).double()
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(steps, expected)


def test_renoising_adds_fresh_noise_of_the_next_time():
    path, given = FlowPath(), []

    def denoise(x_t, t):
        given.append((x_t, float(t[0])))
        return torch.full_like(x_t, 3.0)

    noise = torch.randn(20_000, 1)
    out = Renoise([1.0, 0.5])(denoise, path, noise, Draws(7))
    assert torch.equal(out, torch.full_like(noise, 3.0))
    assert torch.equal(given[0][0], noise)
    added = (given[1][0] - 0.5 * 3.0) / 0.5
    assert added.std().item() == pytest.approx(1, abs=0.02)
    assert abs(torch.corrcoef(torch.stack([added[:, 0], noise[:, 0]]))[0, 1].item()) < 0.03


# ---- times -----------------------------------------------------------------------------------------------------------


def drawn(sampler, path, count=40_000):
    return sampler(count, path, Draws(1))


def test_times_are_distributed_as_they_say():
    edm, flow, vp = EDMPath(), FlowPath(0.0), VPPath()
    uniform = drawn(Uniform(0.02, 0.98), vp)
    assert uniform.dtype == torch.float64
    assert torch.equal(uniform, uniform.round())
    assert (uniform.min().item(), uniform.max().item()) == (20, 979)
    logs = drawn(LogNormal(-1.2, 1.2), EDMPath(1e-9, 1e9)).log()  # nothing is beyond the ends
    assert (logs.mean().item(), logs.std().item()) == (pytest.approx(-1.2, abs=0.02), pytest.approx(1.2, abs=0.02))
    # On another path the same noise.
    torch.testing.assert_close(flow.r(drawn(LogNormal(-1.2, 1.2), flow)).log(), logs, rtol=1e-6, atol=1e-6)
    logits = drawn(LogitNormal(0.5, 0.7), flow).logit()
    assert (logits.mean().item(), logits.std().item()) == (pytest.approx(0.5, abs=0.02), pytest.approx(0.7, abs=0.02))
    karras = drawn(Karras(0.2, 0.8), edm)
    low, high = (float(karras_noise(torch.tensor(u), 0.002, 80.0)) for u in (0.2, 0.8))
    assert (karras.min().item(), karras.max().item()) == (pytest.approx(low, rel=0.01), pytest.approx(high, rel=0.01))
    shifted = drawn(Shifted(3.0, 0.0, 1.0), flow)
    assert shifted.median().item() == pytest.approx(3 * 0.5 / (1 + 2 * 0.5), abs=0.01)
    listed = drawn(Listed([999.0, 249.0]), vp)
    assert (listed == 999).double().mean().item() == pytest.approx(0.5, abs=0.02)
    interval = drawn(Interval(0.2, 0.3), flow)
    assert (interval.min().item(), interval.max().item()) == (
        pytest.approx(0.2, abs=1e-3),
        pytest.approx(0.3, abs=1e-3),
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: check_steps([249.0, 499.0], VPPath()), "model.steps: .249.0, 499.0. does not decrease"),
        (lambda: check_steps([1200.0, 499.0], VPPath()), "leaves the times of the path, 0 to 999"),
        (lambda: check_steps([], VPPath()), "does not decrease"),
        (lambda: Uniform(0.5, 0.5), "0 <= low < high <= 1"),
        (lambda: Interval(3.0, 2.0), "the interval from 3.0 to 2.0 is empty"),
        (lambda: Listed([]), "list is empty"),
        (lambda: Heun(0), "sampler.steps is 0"),
    ],
)
def test_mistakes_are_told(build, message):
    with pytest.raises(UsageError, match=message):
        build()


# ---- rollouts --------------------------------------------------------------------------------------------------------


class Constant(Denoiser):
    """Says the same of any sample, and keeps what it was asked."""

    def __init__(self):
        super().__init__(torch.nn.Identity(), FlowPath(), "x0")
        self.value = torch.nn.Parameter(torch.tensor(2.0))
        self.asked = []

    def forward(self, x_t, t, condition=None):
        self.asked.append((x_t, float(torch.as_tensor(t).reshape(-1)[0]), torch.is_grad_enabled()))
        return self.value.expand_as(x_t)


def test_simulation_goes_to_the_drawn_step_and_only_the_last_call_has_a_graph():
    path, steps, met = FlowPath(), [1.0, 0.75, 0.5, 0.25], set()
    for seed in range(40):
        student = Constant()
        noise = torch.randn(5_000, 1)
        sample = FewStepRollout(steps, path)(student, noise, None, Draws(seed))
        met.add(sample.step)
        assert [time for _, time, _ in student.asked] == steps[: sample.step + 1]
        assert [graph for _, _, graph in student.asked] == [False] * sample.step + [True]
        assert torch.equal(sample.x0, torch.full_like(noise, 2.0))
        assert torch.equal(sample.x_t, student.asked[-1][0])
        assert float(sample.t[0]) == steps[sample.step]
        # A generator that always says 2 is given 2 with the noise of that step.
        assert sample.x_t.mean().item() == pytest.approx(2 * (1 - steps[sample.step]), abs=0.06)
        assert sample.x_t.std().item() == pytest.approx(steps[sample.step], abs=0.04)
    assert met == {0, 1, 2, 3}


def test_data_with_noise_take_the_place_of_simulation():
    path, real = FlowPath(), torch.full((5_000, 1), -1.0)
    for seed in range(10):
        student = Constant()
        sample = FewStepRollout([1.0, 0.5], path, "data")(student, torch.randn(5_000, 1), None, Draws(seed), real)
        assert len(student.asked) == 1
        expected = 0.0 if sample.step == 0 else -0.5
        assert sample.x_t.mean().item() == pytest.approx(expected, abs=0.06)
    seed = next(seed for seed in range(20) if Draws(seed).shared_integer(2) == 1)
    with pytest.raises(UsageError, match="'data' needs real samples"):
        FewStepRollout([1.0, 0.5], path, "data")(Constant(), torch.randn(2, 1), None, Draws(seed))
