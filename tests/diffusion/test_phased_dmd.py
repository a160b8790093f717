"""Phased DMD: its target against closed forms, its experts, and runs across a change of phase."""

import copy
import shutil

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_distill.core.errors import UsageError
from lit_distill.core.networks import instantiate
from lit_distill.diffusion.denoiser import Denoiser, pretrained
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.experts import EulerSteps, PhaseExperts
from lit_distill.diffusion.fake import OwnNetwork
from lit_distill.diffusion.methods import phased_dmd
from lit_distill.diffusion.methods.phased_dmd import PhasedDMD
from lit_distill.diffusion.metrics import squared_mmd
from lit_distill.diffusion.mixtures import MixtureDataModule, exact_denoiser, ring, sample_mixture
from lit_distill.diffusion.models import GaussianMixture, ResidualMLP
from lit_distill.diffusion.paths import CosinePath, EDMPath, FlowPath, TrigPath, VPPath
from lit_distill.diffusion.rollout import Sample
from lit_distill.diffusion.samplers import Euler
from lit_distill.diffusion.subintervals import (
    bridge,
    euler_step,
    noised_further,
    subinterval_target,
    subinterval_weight,
)
from lit_distill.diffusion.times import Uniform
from lit_distill.experiment.export import save_student

PATHS = [FlowPath(), EDMPath(), CosinePath(), VPPath()]


def name(path):
    return type(path).__name__


def double(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the target ------------------------------------------------------------------------------------------------------


def test_the_target_of_the_velocity_is_the_published_one():
    path, s = FlowPath(), 0.4
    t = torch.tensor([0.5, 0.7, 0.999]).double()
    x_s, eps = double(3, 5), double(3, 5, seed=1)
    x_t = noised_further(path, x_s, eps, s, t)
    found = path.convert(subinterval_target(path, x_s, eps, s, t), x_t, t, "x0", "u")
    column = t[:, None]
    a = (1 - column) / (1 - s)
    b = (column**2 - a**2 * s**2).sqrt()
    factor = (column + (1 - column) * s**2 / (1 - s) ** 2) / b
    torch.testing.assert_close(found, factor * eps - x_s / (1 - s), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_from_clean_data_it_is_that_of_denoising(path):
    t = torch.tensor([0.3, 0.9]).double() * path.t_max
    t = t.round() if path.discrete else t
    x0, eps = double(2, 5), double(2, 5, seed=1)
    x_t = noised_further(path, x0, eps, 0.0, t)
    torch.testing.assert_close(x_t, path.add_noise(x0, eps, t))
    target = subinterval_target(path, x0, eps, 0.0, t)
    torch.testing.assert_close(target, x0)
    if isinstance(path, FlowPath):
        torch.testing.assert_close(path.convert(target, x_t, t, "x0", "u"), eps - x0)


def test_it_is_whole_where_no_data_are_left():
    x_s, eps = double(2, 5), double(2, 5, seed=1)
    target = subinterval_target(FlowPath(), x_s, eps, 0.5, torch.ones(2).double())
    torch.testing.assert_close(target, x_s / 0.5)


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_two_steps_of_noise_have_the_marginal_of_one(path):
    """By the coefficients: x_t = a (alpha_s x0 + sigma_s e1) + b e2."""
    for low, high in ((0.2, 0.5), (0.5, 0.9)):
        s, t = low * path.t_max, torch.tensor([high * path.t_max]).double()
        a, b = bridge(path, s, t)
        torch.testing.assert_close(a * path.alpha(s), path.alpha(t))
        torch.testing.assert_close((a * path.sigma(s)) ** 2 + b**2, path.sigma(t) ** 2)
    x_s, eps = torch.full((200_000, 1), 0.7).double(), double(200_000, 1)
    s, t = 0.2 * path.t_max, torch.full((200_000,), 0.5 * path.t_max).double()
    x_s = path.add_noise(x_s, double(200_000, 1, seed=1), s)
    found = noised_further(path, x_s, eps, s, t)
    sigma = path.sigma(t)[0].item()
    assert found.mean().item() == pytest.approx(0.7 * path.alpha(t)[0].item(), abs=0.01 * sigma)
    assert found.std().item() == pytest.approx(sigma, rel=0.01)


def test_it_is_unbiased_where_the_naive_one_is_not():
    """One dimension, two Gaussians: the mean of the target at x_t against the exact velocity there."""
    path, s = FlowPath(), 0.5
    teacher = exact_denoiser(GaussianMixture([[-1.0], [1.0]], 0.2, path, [0.3, 0.7]), conditional=False)
    generator = torch.Generator().manual_seed(0)
    count = 1_000_000
    which = (torch.rand(count, generator=generator) < 0.7).double() * 2 - 1
    x0 = which[:, None] + 0.2 * torch.randn(count, 1, generator=generator).double()
    x_s = path.add_noise(x0, torch.randn(count, 1, generator=generator).double(), s)
    eps, t = torch.randn(count, 1, generator=generator).double(), torch.full((count,), 0.75).double()
    x_t = noised_further(path, x_s, eps, s, t)
    target = path.convert(subinterval_target(path, x_s, eps, s, t), x_t, t, "x0", "u")
    for point in (-0.6, 0.2, 0.8):
        near = (x_t - point).abs()[:, 0] < 0.02
        exact = teacher(torch.tensor([[point]]), 0.75, None, "u").item()
        assert target[near].mean().item() == pytest.approx(exact, abs=0.05)
        naive = (eps - x_s)[near].mean().item()
        assert abs(naive - exact) > 0.1


def test_it_does_not_depend_on_the_path():
    """At equal noise, x_s / alpha is the same on all paths, and so is the target of the data."""
    r_s, r_t = torch.tensor([0.4]).double(), torch.tensor([1.7]).double()
    z, eps = double(1, 5), double(1, 5, seed=1)
    found = []
    for path in (FlowPath(), EDMPath(), TrigPath(), CosinePath()):
        s, t = path.t_from_r(r_s).item(), path.t_from_r(r_t)
        x_s = path.alpha(s) * (z + 0.4 * double(1, 5, seed=2))
        x_t = noised_further(path, x_s, eps, s, t)
        target = subinterval_target(path, x_s, eps, s, t)
        found.append((target, path.convert(target, x_t, t, "x0", "eps"), x_t / path.alpha(t)))
    for other in found[1:]:
        for value, expected in zip(other, found[0], strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-8)


def test_the_weight_bounds_the_error_near_the_lower_level():
    path, s = EDMPath(), 1.0
    t = (1 + torch.tensor([1e-12, 0.01, 0.09, 0.1, 0.5, 50.0]).double()).sqrt()  # b^2 = t^2 - 1
    expected = torch.tensor([1e-11, 0.1, 0.9, 1.0, 1.0, 1.0]).double()
    torch.testing.assert_close(subinterval_weight(path, s, t), expected, rtol=1e-3, atol=1e-12)
    x_s, eps = double(6, 5), double(6, 5, seed=1)
    error = (subinterval_target(path, x_s, eps, s, t) - x_s).square().mean(1)
    assert error[0] > 1e10
    assert (subinterval_weight(path, s, t) * error < 20).all()


def test_a_step_follows_the_velocity():
    path = FlowPath()
    x_t, x0, t = double(3, 5), double(3, 5, seed=1), torch.tensor([0.4, 0.7, 1.0]).double()
    u = path.convert(x0, x_t, t, "x0", "u")
    torch.testing.assert_close(euler_step(path, x_t, x0, t, 0.25), x_t + (0.25 - t)[:, None] * u)
    for path in PATHS:
        time = torch.full((3,), 0.5 * path.t_max).double()
        torch.testing.assert_close(euler_step(path, x_t, x0, time, 0.0), x0)
    given = x0.clone().requires_grad_(True)
    euler_step(FlowPath(), x_t, given, t, 0.25).sum().backward()
    torch.testing.assert_close(given.grad, ((t - 0.25) / t)[:, None].expand(3, 5))


def test_many_steps_are_those_of_the_solver_of_teachers(make_denoiser):
    """EDM's curve of noise as the times: the same as `Euler`, written in other variables."""
    path, network = EDMPath(0.002, 5.0), make_denoiser(0, EDMPath(0.002, 5.0))
    labels, noise = torch.arange(3), torch.randn(3, 1, 8, 8)
    u = torch.linspace(1, 0, 6).double()
    times = ((0.002 ** (1 / 7) + u * (5.0 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7).tolist()

    @torch.no_grad()
    def denoise(x, t):
        return network(x, t, labels)

    expected = Euler(6)(denoise, path, noise, Draws(0))
    torch.testing.assert_close(EulerSteps(times)(denoise, path, noise, Draws(0)), expected, rtol=1e-4, atol=1e-5)


# ---- experts ---------------------------------------------------------------------------------------------------------

STEPS = [[2.5, 1.6], [0.9, 0.4]]


def experts(make_denoiser, seed=1, steps=STEPS, path=None, prediction="edm"):
    made = PhaseExperts(make_denoiser(seed, path, prediction), steps)
    with torch.no_grad():
        for number, expert in enumerate(made.network):
            for parameter in expert.parameters():
                parameter.add_(0.05 * number)
    return made


def test_each_time_has_its_expert(make_denoiser):
    made = experts(make_denoiser)
    assert (made.times, made.boundaries, made.number_of_step) == ([2.5, 1.6, 0.9, 0.4], [0.9, 0.0], [0, 0, 1, 1])
    x, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    for t, number in ((80.0, 0), (2.5, 0), (0.91, 0), (0.9, 1), (0.4, 1), (0.01, 1)):
        for time in (t, torch.full((4,), t).double()):
            assert torch.equal(made(x, time, labels), made.network[number](x, time, labels))


def test_sampling_calls_experts_by_the_number_of_the_step(trainer, digits, make_denoiser, little):
    made = experts(make_denoiser)
    module = PhasedDMD(made, make_denoiser(0), 4, evaluation=little)
    noise, labels = torch.randn(3, 1, 8, 8), torch.arange(3)
    x = 2.5 * noise
    with torch.no_grad():
        for t, s, number in ((2.5, 1.6, 0), (1.6, 0.9, 0), (0.9, 0.4, 1), (0.4, 0.0, 1)):
            x0 = made.network[number](x, t, labels)
            x = x0 + s / t * (x - x0)
    torch.testing.assert_close(module.generate(labels, noise, Draws(0)), x, rtol=1e-5, atol=1e-5)
    assert module.sampler.evaluations() == 4


def test_an_exported_student_is_built_from_its_description(tmp_path):
    """Also where its experts began as a network from a run, which may be gone by then."""
    network = {"class_path": "lit_distill.diffusion.ResidualMLP", "init_args": {"width": 16}}
    path = {"class_path": "lit_distill.diffusion.FlowPath"}
    expert = {"network": network, "path": path, "prediction": "u", "num_classes": 10}
    spec = {
        "class_path": "lit_distill.diffusion.PhaseExperts",
        "init_args": {
            "expert": {
                "class_path": "lit_distill.diffusion.pretrained",
                "init_args": {"weights": str(tmp_path / "teacher")},
            },
            "steps": [[1.0], [0.5]],
        },
    }
    denoiser = {"class_path": "lit_distill.diffusion.Denoiser", "init_args": expert}
    save_student(instantiate(denoiser).state_dict(), denoiser, tmp_path / "teacher/student")
    save_student(instantiate(spec).state_dict(), spec, tmp_path / "student")
    shutil.rmtree(tmp_path / "teacher")
    made = pretrained(str(tmp_path))
    assert len(made.network) == 2
    assert made.num_classes == 10


# ---- runs ------------------------------------------------------------------------------------------------------------


class Watched(PhasedDMD):
    """Keeps what each step moved."""

    def optimize(self, loss, optimizer=0, *, clip_norm=None):
        before = {key: value.clone() for key, value in self.state_dict().items()}
        super().optimize(loss, optimizer, clip_norm=clip_norm)
        moved = {key for key, value in self.state_dict().items() if not torch.equal(value, before[key])}
        parts = {".".join(key.split(".")[:3]) if key.startswith("student") else key.partition(".")[0] for key in moved}
        self.steps.append((self.iteration, parts))


def test_each_phase_moves_its_expert_alone(trainer, digits, make_denoiser, little):
    module = Watched(
        experts(make_denoiser), make_denoiser(0), 3, fake_updates=2, evaluation=little,
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    )  # fmt: skip
    module.steps = []
    trainer().fit(module, datamodule=digits)
    first, second, fake = {"student.network.0"}, {"student.network.1"}, {"fake"}
    assert module.steps == [
        (0, first), (0, fake), (1, fake), (2, first), (2, fake), (3, fake), (4, second), (4, fake), (5, fake)
    ]  # fmt: skip


def test_a_phase_begins_with_the_fake_score_anew(trainer, digits, make_denoiser, little):
    seen = []

    class Looking(PhasedDMD):
        def on_train_batch_start(self, batch, batch_idx):
            super().on_train_batch_start(batch, batch_idx)
            same = all(
                torch.equal(own, first)
                for own, first in zip(self.fake.parameters(), self.teacher.parameters(), strict=True)
            )
            seen.append((self.phase, same, len(self.optimizers()[1].optimizer.state)))

    module = Looking(experts(make_denoiser), make_denoiser(0), 3, evaluation=little)
    trainer().fit(module, datamodule=digits)
    count = len(list(module.fake.parameters()))
    later = [(phase, False, count) for phase in (0, 0, 1, 1)]
    assert seen == [(0, True, 0), *later[:2], (1, True, 0), *later[2:]]


@pytest.mark.parametrize("stop", [2, 3, 4], ids=["before", "at", "after"])
def test_a_run_resumed_near_a_change_of_phase_is_uninterrupted(trainer, digits, make_denoiser, little, tmp_path, stop):
    def build(seed=1):
        return PhasedDMD(experts(make_denoiser, seed), make_denoiser(0), 3, fake_updates=1, evaluation=little)

    whole = build()
    trainer().fit(whole, datamodule=copy.deepcopy(digits))
    keep = ModelCheckpoint(tmp_path, filename="half", every_n_train_steps=1, save_top_k=1)
    trainer(max_steps=2 * stop, callbacks=[keep], enable_checkpointing=True).fit(
        build(), datamodule=copy.deepcopy(digits)
    )
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert (saved["iteration"], saved["phase"]) == (stop, int(stop > 3))
    torch.manual_seed(9)
    again = build(seed=7)
    trainer().fit(again, datamodule=copy.deepcopy(digits), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert (again.iteration, again.phase) == (6, 1)
    for key, value in again.state_dict().items():
        assert torch.equal(value, whole.state_dict()[key]), key


def test_losses_are_those_written_by_hand(make_denoiser):
    """On a flow, in the second of three phases; the fake score's loss in its velocity."""
    path = FlowPath()
    made = experts(make_denoiser, steps=[[1.0], [0.75], [0.4]], path=path, prediction="u")
    module = PhasedDMD(made, make_denoiser(0, path, "u"), 5, guidance=2.0)
    module.fake, module.phase = make_denoiser(2, path, "u"), 1
    x_t, x0, labels = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.arange(4)
    sample = Sample(x0, x_t, torch.full((4,), 0.75).double(), 1)
    x_s = x_t + (0.4 - 0.75) * (x_t - x0) / 0.75

    def above(low, high):
        t = 0.4 + 0.6 * (0.001 + 0.999 * (low + (high - low) * draws.uniform(4)))
        s = t.float().view(-1, 1, 1, 1)
        a = (1 - s) / 0.6
        b = (s**2 - a**2 * 0.4**2).sqrt()
        eps = draws.normal(x0.shape)
        return t, s, b, eps, a * x_s + b * eps

    draws = Draws(3)
    t, s, b, eps, noisy = above(0.02, 0.98)
    with torch.no_grad():
        given, none = module.teacher(noisy, t, labels), module.teacher(noisy, t, torch.full((4,), 10))
        target = none + 2 * (given - none)
        expected = (module.fake(noisy, t, labels) - target) / (x0 - target).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(module.student_gradient(sample, labels, Draws(3)), expected, rtol=1e-3, atol=1e-5)
    draws = Draws(4)
    t, s, b, eps, noisy = above(0.0, 1.0)
    velocity = (s + (1 - s) * 0.4**2 / 0.6**2) / b * eps - x_s / 0.6
    error = (module.fake(noisy, t, labels, "u") - velocity).square().mean((1, 2, 3), keepdim=True)
    expected = ((10 * b**2).clamp(max=1.0) * error).mean()
    torch.testing.assert_close(module.fake_loss(sample, labels, Draws(4)), expected, rtol=1e-3, atol=1e-5)


def biased_target(path, x_s, eps, s, t):
    """Takes x_s for data: the velocity eps - x_s."""
    return path.convert(eps - x_s, noised_further(path, x_s, eps, s, t), t, "u", "x0")


# 0.0023 with the target, 0.0087 with the biased one (seed 0); samples of the marginal itself are at 0.0001.
@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_only_the_unbiased_target_gives_the_marginal_of_the_level(trainer, monkeypatch, seed):
    """The first phase on a ring of 8 with its exact flow, at equal steps: MMD of x_s to 0.5 x0 + 0.5 eps."""
    monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
    mixture = ring(8, radius=2.0, std=0.2)
    generator = torch.Generator().manual_seed(9)
    z = torch.randn(4000, 2, generator=generator)
    points, _ = sample_mixture(mixture, 4000, generator)
    marginal = mixture.path.add_noise(points, torch.randn(4000, 2, generator=generator), 0.5)

    def discrepancy():
        torch.manual_seed(seed)
        network = Denoiser(ResidualMLP(2, 0, width=64, depth=2), mixture.path, "u", time_input="time")
        module = PhasedDMD(
            PhaseExperts(network, [[1.0], [0.5]]), exact_denoiser(mixture, conditional=False), 900, fake_updates=3,
            fake=OwnNetwork(network), optimizer=lambda p: torch.optim.Adam(p, lr=1e-3, betas=(0.0, 0.999)),
        )  # fmt: skip
        data = MixtureDataModule(mixture, 900 * 128, eval_samples=100, seed=seed)
        trainer().fit(module, datamodule=data)
        with torch.no_grad():
            made = euler_step(mixture.path, z, module.student.network[0](z, 1.0), 1.0, 0.5)
        return squared_mmd(made, marginal).item()

    unbiased = discrepancy()
    monkeypatch.setattr(phased_dmd, "subinterval_target", biased_target)
    assert unbiased < 0.004
    assert discrepancy() > 2 * unbiased


def test_times_lie_above_the_level_on_a_discrete_path(make_denoiser):
    path = VPPath()
    made = experts(make_denoiser, steps=[[999.0, 749.0], [499.0, 249.0]], path=path, prediction="eps")
    module = PhasedDMD(made, make_denoiser(0, path, "eps"), 5, fake_times=Uniform(0.0, 1.0))
    x = torch.randn(5000, 1, 2, 2)
    for phase, least in ((0, 500), (1, 0)):
        module.phase = phase
        sample = Sample(x, x, torch.full((5000,), 749.0 - 500 * phase).double(), 0)
        _, t, _, _ = module._above(sample, module.fake_times, Draws(0))
        assert torch.equal(t, t.round())
        assert (t.min().item(), t.max().item()) == (least, 999)


def test_mistakes_are_told(make_denoiser):
    with pytest.raises(UsageError, match=r"has a phase without steps"):
        PhaseExperts(make_denoiser(), [[2.5], []])
    with pytest.raises(UsageError, match=r"student.steps: .* does not decrease"):
        PhaseExperts(make_denoiser(), [[2.5, 0.4], [0.9]])
    with pytest.raises(UsageError, match=r"model.phase_iterations is 0"):
        PhasedDMD(experts(make_denoiser), make_denoiser(), 0)
    with pytest.raises(UsageError, match=r"model.inputs: phases begin where"):
        PhasedDMD(experts(make_denoiser), make_denoiser(), 3, inputs="data")
