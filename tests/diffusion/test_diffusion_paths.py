import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from lit_distill.core.errors import UsageError
from lit_distill.diffusion.denoiser import Denoiser
from lit_distill.diffusion.paths import CosinePath, EDMPath, FlowPath, TrigPath, VPPath, from_scheduler

PATHS = {
    "edm": (EDMPath(), 2.5),
    "flow": (FlowPath(), 0.3),
    "trig": (TrigPath(), 0.9),
    "cosine": (CosinePath(), 0.6),
    "vp": (VPPath(), 421.0),
    "scaled": (VPPath(beta_start=0.00085, beta_end=0.012, schedule="scaled_linear"), 421.5),
}


@pytest.fixture(params=PATHS, ids=str)
def path(request):
    return PATHS[request.param][0]


@pytest.fixture
def time(request):
    return PATHS[request.node.callspec.params["path"]][1]


def samples(seed=0, count=4):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2)]


def test_noise_follows_the_table_of_the_definition():
    t = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)
    rows = {
        "edm": (torch.ones(3).double(), t),
        "flow": (1 - t, t),
        "trig": (torch.cos(t), torch.sin(t)),
        "cosine": (torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)),
    }
    for name, (alpha, sigma) in rows.items():
        torch.testing.assert_close(PATHS[name][0].alpha(t), alpha)
        torch.testing.assert_close(PATHS[name][0].sigma(t), sigma)


def test_derivatives_are_those_of_the_coefficients(path, time):
    # Away from whole numbers, where the interpolated table has a corner.
    t = torch.tensor([time + 0.01], dtype=torch.float64, requires_grad=True)
    found = path.at(t)
    for value, rate in ((found.alpha, found.alpha_dot), (found.sigma, found.sigma_dot)):
        if value.requires_grad:
            (slope,) = torch.autograd.grad(value.sum(), t, retain_graph=True, allow_unused=True)
            expected = torch.zeros_like(t) if slope is None else slope
            torch.testing.assert_close(rate.detach(), expected, rtol=1e-9, atol=1e-12)


def test_time_and_noise_are_inverse(path, time):
    t = torch.tensor([time, time * 1.01, time * 0.5], dtype=torch.float64)
    torch.testing.assert_close(path.t_from_r(path.r(t)), t, rtol=1e-9, atol=1e-9)


def test_equal_noise_is_the_same_sample_up_to_a_factor():
    x0, eps = samples()
    r = torch.full((4,), 1.7, dtype=torch.float64)
    edm = EDMPath().add_noise(x0, eps, EDMPath().t_from_r(r))
    expected = {"flow": edm / 2.7, "vp": edm / math.sqrt(1 + 1.7**2), "trig": edm / math.sqrt(1 + 1.7**2)}
    for name, value in expected.items():
        path = PATHS[name][0]
        torch.testing.assert_close(path.add_noise(x0, eps, path.t_from_r(r)), value, rtol=1e-9, atol=1e-9)


def test_every_conversion_gives_what_the_definition_says(path, time):
    x0, eps = samples()
    t = torch.full((4,), time, dtype=torch.float64)
    alpha, sigma, alpha_dot, sigma_dot = path.at(t, x0)
    x_t = alpha * x0 + sigma * eps
    truth = {"x0": x0, "eps": eps, "score": -eps / sigma, "u": alpha_dot * x0 + sigma_dot * eps}
    if path.variance_preserving:
        truth["v"] = alpha * eps - sigma * x0
    assert path.variance_preserving == (type(path) not in (EDMPath, FlowPath))
    for src, given in truth.items():
        for dst, expected in truth.items():
            torch.testing.assert_close(path.convert(given, x_t, t, src, dst), expected, rtol=1e-8, atol=1e-8)


def test_velocity_of_the_trigonometric_path_is_v_and_of_edm_is_eps():
    x0, eps = samples()
    trig, edm = TrigPath(), EDMPath()
    x_t = trig.add_noise(x0, eps, 0.8)
    torch.testing.assert_close(trig.convert(x0, x_t, 0.8, "x0", "u"), trig.convert(x0, x_t, 0.8, "x0", "v"))
    torch.testing.assert_close(edm.convert(x0, edm.add_noise(x0, eps, 3.0), 3.0, "x0", "u"), eps)


def test_velocities_need_no_data_left():
    flow, x0, eps = FlowPath(), *samples()
    torch.testing.assert_close(flow.convert(eps - x0, eps, 1.0, "u", "x0"), x0)
    zero = from_scheduler(DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"))
    assert zero.ends_in_noise
    torch.testing.assert_close(zero.convert(-x0, eps, 999.0, "v", "x0"), x0)


def test_conversions_keep_the_type_and_are_exact_inside():
    path, (x0, eps) = EDMPath(), samples()
    x_t = path.add_noise(x0.float(), eps.float(), 80.0)
    found = path.convert(path.convert(x0.float(), x_t, 80.0, "x0", "score"), x_t, 80.0, "score", "x0")
    assert found.dtype == torch.float32
    assert (found - x0.float()).abs().max() < 1e-3  # the score itself was float32: 80^2 times its rounding


def test_a_bridge_keeps_the_marginal(path, time):
    s, t = time * 0.5, time
    a, b = path.bridge(s, t)
    assert float(a * path.alpha(s)) == pytest.approx(float(path.alpha(t)), rel=1e-9)
    assert float((a * path.sigma(s)) ** 2 + b**2) == pytest.approx(float(path.sigma(t) ** 2), rel=1e-9)
    assert b > 0


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler])
def test_paths_of_schedulers_noise_as_these_do(scheduler_class, schedule):
    scheduler = scheduler_class(beta_schedule=schedule)
    path = from_scheduler(scheduler)
    x0, eps = (value.float() for value in samples())
    k = torch.tensor([0, 20, 500, 999])
    torch.testing.assert_close(path.add_noise(x0, eps, k), scheduler.add_noise(x0, eps, k), rtol=1e-4, atol=1e-5)
    v = path.convert(x0, path.add_noise(x0, eps, k), k, "x0", "v")
    torch.testing.assert_close(v, scheduler.get_velocity(x0, eps, k), rtol=1e-3, atol=1e-3)
    assert (path.t_max, path.discrete, path.prediction) == (999.0, True, "eps")


def test_the_table_of_its_own_is_that_of_diffusers():
    own = VPPath(beta_start=0.00085, beta_end=0.012, schedule="scaled_linear")
    theirs = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod.double()
    torch.testing.assert_close(own.alpha(torch.arange(1000)) ** 2, theirs, rtol=1e-4, atol=1e-7)


def test_paths_of_flow_and_edm_schedulers():
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    path = from_scheduler(flow)
    x0, eps = (value.float() for value in samples())
    for step in (0, 400, 900):
        expected = flow.scale_noise(x0, flow.timesteps[step : step + 1], eps)
        torch.testing.assert_close(path.add_noise(x0, eps, float(flow.sigmas[step])), expected)
    assert path.prediction == "u"
    edm = from_scheduler(EDMEulerScheduler(sigma_min=0.01, sigma_max=70.0))
    assert (edm.t_min, edm.t_max) == (0.01, 70.0)


def test_preconditioning_is_that_of_diffusers():
    torch.manual_seed(0)
    scheduler = EDMEulerScheduler(sigma_data=0.6)
    network = Recorded()
    denoiser = Denoiser(network, EDMPath(), "edm", data_std=0.6)
    x_t, sigma = torch.randn(3, 5), torch.tensor([0.1, 1.0, 20.0], dtype=torch.float64)
    out = denoiser(x_t, sigma)
    for row in range(3):
        torch.testing.assert_close(network.x[row], scheduler.precondition_inputs(x_t[row], float(sigma[row])))
        expected = scheduler.precondition_outputs(x_t[row], network.out[row], sigma[row].float())
        torch.testing.assert_close(out[row], expected)
        torch.testing.assert_close(network.time[row], scheduler.precondition_noise(sigma[row].float()))


class Recorded(torch.nn.Module):
    """Keeps what it was given, and gives back something unrelated."""

    def forward(self, x, time, condition):
        self.x, self.time, self.out = x, time, torch.randn_like(x)
        return self.out


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Denoiser(Recorded(), from_scheduler(DDPMScheduler()), "v"), "is 'v', but the scheduler says 'eps'"),
        (
            lambda: Denoiser(Recorded(), VPPath(alphas_cumprod=[0.9, 0.5, 0.0]), "eps"),
            "zero terminal signal-to-noise",
        ),
        (lambda: FlowPath(t_max=2.0), "between 0 and 1"),
    ],
)
def test_mistakes_are_told(build, message):
    with pytest.raises(UsageError, match=message):
        build()


def test_v_is_refused_where_the_variance_is_not_preserved():
    x0, eps = samples()
    with pytest.raises(UsageError, match="alpha\\^2 \\+ sigma\\^2 = 1, which EDMPath has not"):
        EDMPath().convert(x0, eps, 1.0, "x0", "v")
