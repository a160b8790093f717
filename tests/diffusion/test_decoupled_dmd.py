"""Decoupled DMD: its two terms against the guided gradient that they come from, its schedule, its regularizers."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributions import Normal, kl_divergence

from lit_distill.core.errors import UsageError
from lit_distill.diffusion.denoiser import Denoiser
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.losses import mean_variance_kl
from lit_distill.diffusion.methods.decoupled_dmd import DecoupledDMD
from lit_distill.diffusion.methods.dmd2 import DMD2
from lit_distill.diffusion.paths import EDMPath, FlowPath, VPPath
from lit_distill.diffusion.rollout import Sample
from lit_distill.diffusion.times import Listed, Uniform

TAPS = ["network.blocks.1"]
PATHS = {
    "flow": (FlowPath(), "u", [1.0, 0.75, 0.5, 0.25]),
    "edm": (EDMPath(), "edm", [80.0, 2.5, 0.8]),
    "vp": (VPPath(), "eps", [999.0, 749.0, 499.0, 1.0]),
}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.01)


class Level(torch.nn.Module):
    """Says whole numbers, so that float32 makes no error: 3 with a class, 1 without; or one number always."""

    def __init__(self, given, none):
        super().__init__()
        self.given, self.none = given, none

    def forward(self, x, time, condition):
        level = torch.where(condition == 10, self.none, self.given)
        return level.view(-1, 1, 1, 1).expand_as(x).to(x.dtype)


class OneNoise(Draws):
    """Gives the same noise each time."""

    def normal(self, shape):
        return torch.ones(shape)


def levels(path, guidance, **options):
    teacher = Denoiser(Level(3.0, 1.0), path, "x0", 10)
    module = DecoupledDMD(
        Denoiser(Level(0.0, 0.0), path, "x0", 10), teacher, [1.0], guidance=guidance, hybrid=False,
        student_times=Listed([0.5]), ca_times=Listed([0.5]), floor=1e-5, **options,
    )  # fmt: skip
    module.fake = Denoiser(Level(8.0, 8.0), path, "x0", 10)
    return module


@pytest.mark.parametrize("guidance", [1.0, 2.0, 5.0])
def test_the_terms_add_up_to_the_guided_gradient(guidance):
    module = levels(FlowPath(), guidance)
    x0 = torch.where(torch.rand(4, 1, 8, 8) < 0.5, 5.0, 1.0)  # everywhere 2 from what the teacher says
    sample = Sample(x0, x0, torch.ones(4).double(), 0)
    found = module.student_gradient(sample, torch.arange(4), OneNoise(0))
    target = 1.0 + guidance * (3.0 - 1.0)
    expected = torch.full_like(x0, (8.0 - target) / 2.0)  # both terms are divided by 2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_weights_are_of_their_own_terms():
    x0 = torch.full((2, 1, 8, 8), 5.0)
    sample = Sample(x0, x0, torch.ones(2).double(), 0)
    for weights, expected in (((1.0, 0.0), 2.5), ((0.0, 1.0), -4.0), ((2.0, 0.5), 3.0)):
        module = levels(FlowPath(), 5.0, dm_weight=weights[0], ca_weight=weights[1])
        found = module.student_gradient(sample, torch.arange(2), OneNoise(0))
        assert torch.equal(found, torch.full_like(x0, expected))
    for regularizer in ("meanvar", "gan"):
        module = levels(FlowPath(), 5.0, regularizer=regularizer, taps=TAPS if regularizer == "gan" else [])
        assert torch.equal(module.student_gradient(sample, torch.arange(2), OneNoise(0)), torch.full_like(x0, -4.0))


def test_each_term_sees_its_own_time_and_noise(make_denoiser):
    path = FlowPath()
    make = lambda seed: make_denoiser(seed, path, "u")  # noqa: E731
    module = DecoupledDMD(make(1), make(0), [1.0, 0.5], guidance=3.0, floor=1e-5)
    module.fake = make(2)
    x0, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    t = torch.full((4,), 0.5).double()
    found = module.student_gradient(Sample(x0, x0, t, 1), labels, Draws(3))
    draws = Draws(3)
    dm = (0.02 + 0.96 * draws.uniform(4)) * 0.999 + 0.001  # the whole path
    s = dm.float().view(-1, 1, 1, 1)
    x_t = (1 - s) * x0 + s * draws.normal(x0.shape)
    with torch.no_grad():
        target = module.teacher(x_t, dm, labels)
        expected = (module.fake(x_t, dm, labels) - target) / (x0 - target).abs().mean((1, 2, 3), keepdim=True)
        ca = ((0.02 + 0.96 * draws.uniform(4)) * 0.999 + 0.001) * 0.5  # below 0.5
        s = ca.float().view(-1, 1, 1, 1)
        x_t = (1 - s) * x0 + s * draws.normal(x0.shape)
        given, none = module.teacher(x_t, ca, labels), module.teacher(x_t, ca, torch.full((4,), 10))
        expected = expected - 2 * (given - none) / (x0 - given).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PATHS)
def test_the_hybrid_schedule_stays_cleaner_than_the_input(make_denoiser, name):
    path, prediction, steps = PATHS[name]
    make = lambda: make_denoiser(0, path, prediction)  # noqa: E731
    for times in (Uniform(0.0, 1.0), Listed([path.t_max])):
        module = DecoupledDMD(make(), make(), steps, ca_times=times)
        for step in steps:
            t = torch.full((2000,), step, dtype=torch.float64)
            tau = module.ca_time(t, Draws(0))
            assert (tau < t).all()
            assert (tau >= path.t_min).all()
            assert not path.discrete or torch.equal(tau, tau.round())
    full = DecoupledDMD(make(), make(), steps, ca_times=Uniform(0.0, 1.0), hybrid=False)
    t = torch.full((2000,), steps[-1], dtype=torch.float64)
    assert (full.ca_time(t, Draws(0)) > t).any()


def test_on_a_flow_the_hybrid_schedule_is_uniform_below_the_input(make_denoiser):
    make = lambda: make_denoiser(0, FlowPath(0.0), "u")  # noqa: E731
    module = DecoupledDMD(make(), make(), [1.0, 0.4], ca_times=Uniform(0.0, 1.0))
    tau = module.ca_time(torch.full((4000,), 0.4, dtype=torch.float64), Draws(1))
    expected = 0.4 * torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9]).double()
    found = tau.quantile(torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9]).double())
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0)


def test_mean_and_variance_diverge_as_gaussians_do():
    torch.manual_seed(0)
    x = torch.randn(5, 3, 4, 4) * torch.linspace(0.5, 2.0, 5).view(-1, 1, 1, 1) + 0.3
    flat = x.flatten(1)
    own = Normal(flat.mean(1), flat.std(1, correction=0))
    expected = kl_divergence(own, Normal(0.075, 0.9))
    torch.testing.assert_close(mean_variance_kl(x, mean=0.075, variance=0.81, reduction="none"), expected)
    torch.testing.assert_close(mean_variance_kl(x, mean=0.075, variance=0.81), expected.mean())
    at = (flat - flat.mean(1, keepdim=True)) / flat.std(1, correction=0, keepdim=True) * 0.9 + 0.075
    at.requires_grad_(True)
    value = mean_variance_kl(at, mean=0.075, variance=0.81)
    value.backward()
    assert abs(value.item()) < 1e-6
    assert at.grad.abs().max() < 1e-6


# ---- runs ------------------------------------------------------------------------------------------------------------


def run(trainer, digits, method, make_denoiser, little, **options):
    torch.manual_seed(0)
    module = method(
        make_denoiser(1), make_denoiser(0), [2.5, 0.8], fake_updates=2, evaluation=little, optimizer=sgd, **options
    )
    trainer(limit_train_batches=4).fit(module, datamodule=copy.deepcopy(digits))
    return module


def test_without_guidance_it_is_dmd(trainer, digits, make_denoiser, little):
    found = run(trainer, digits, DecoupledDMD, make_denoiser, little, guidance=1.0, floor=1e-5)
    base = run(trainer, digits, DMD2, make_denoiser, little)
    for name, value in base.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    guided = run(trainer, digits, DecoupledDMD, make_denoiser, little, guidance=2.0, floor=1e-5)
    assert any(not torch.equal(guided.state_dict()[name], value) for name, value in base.state_dict().items())


@pytest.mark.parametrize(
    ("regularizer", "moving"),
    [("dm", {"student", "fake"}), ("meanvar", {"student"}), ("gan", {"student", "fake", "head"})],
)
def test_what_moves_and_which_terms_there_are(trainer, digits, make_denoiser, little, regularizer, moving):
    taps = TAPS if regularizer == "gan" else []
    module = DecoupledDMD(
        make_denoiser(1), make_denoiser(0), [2.5, 0.8], regularizer=regularizer, taps=taps, evaluation=little,
        fake_updates=1, optimizer=lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    )  # fmt: skip
    fit = trainer(limit_train_batches=1)
    module.trainer = fit
    fit.datamodule = digits
    digits.setup()
    module.configure_model()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    fit.fit(module, datamodule=digits)
    after = module.state_dict()
    assert {name.partition(".")[0] for name in after if not torch.equal(after[name], before[name])} == moving
    terms = {"dm": set(), "meanvar": {"meanvar"}, "gan": {"gan", "discriminator"}}[regularizer]
    assert set(module.terms) == {"surrogate", "fake"} | terms


def test_a_resumed_run_is_the_uninterrupted_one(trainer, digits, make_denoiser, little, tmp_path):
    def build(seed=1):
        return DecoupledDMD(make_denoiser(seed), make_denoiser(0), [2.5, 0.8], fake_updates=2, evaluation=little)

    whole = build()
    trainer().fit(whole, datamodule=copy.deepcopy(digits))
    keep = ModelCheckpoint(tmp_path, filename="half", every_n_train_steps=1, save_top_k=1)
    trainer(limit_train_batches=6, max_steps=4, callbacks=[keep], enable_checkpointing=True).fit(
        build(), datamodule=copy.deepcopy(digits)
    )
    torch.manual_seed(9)
    again = build(seed=7)
    trainer().fit(again, datamodule=copy.deepcopy(digits), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert again.iteration == whole.iteration == 6
    for name, value in again.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


def test_mistakes_are_told(make_denoiser):
    cases = [
        ({"regularizer": "gan"}, "model.regularizer is 'gan' and model.taps are"),
        ({"taps": TAPS}, "model.regularizer is 'dm' and model.taps are"),
        ({"variance": 0.0}, "model.variance is 0.0; it must be above 0"),
        ({"ca_weight": -1.0}, "model.ca_weight is -1.0"),
    ]
    for options, message in cases:
        with pytest.raises(UsageError, match=message):
            DecoupledDMD(make_denoiser(), make_denoiser(), [2.5], **options)
    none = [make_denoiser(num_classes=None) for _ in range(2)]
    with pytest.raises(UsageError, match=r"model.guidance needs a network that knows 'no condition'"):
        DecoupledDMD(*none, [2.5])
