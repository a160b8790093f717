"""Mixtures against numerical integration, their measures against closed forms, and a run on an exact teacher."""

import math

import pytest
import torch
from torch import nn

from lit_distill.core.errors import UsageError
from lit_distill.core.networks import instantiate
from lit_distill.diffusion.denoiser import Denoiser
from lit_distill.diffusion.distillation import ScoreDistiller
from lit_distill.diffusion.fake import FullCopy, LoRA, OwnNetwork
from lit_distill.diffusion.mixtures import (
    MixtureDataModule,
    MixtureEvaluation,
    exact_denoiser,
    mass_inside,
    mode_total_variation,
    modes_covered,
    ring,
    sample_mixture,
)
from lit_distill.diffusion.models import GaussianMixture, ResidualMLP
from lit_distill.diffusion.paths import EDMPath, FlowPath, TrigPath, VPPath


def small(seed=0, path=None, num_classes=4):
    torch.manual_seed(seed)
    network = ResidualMLP(2, num_classes, width=16, depth=1)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.15)
    return Denoiser(network, path or FlowPath(), "edm", num_classes or None, data_std=0.7, time_input="time")


@pytest.mark.parametrize(
    ("path", "t"),
    [(EDMPath(), 0.8), (FlowPath(), 0.6), (TrigPath(), 0.9), (VPPath(), 300.0)],
    ids=["edm", "flow", "trig", "vp"],
)
def test_the_denoiser_is_the_posterior_mean_on_any_path(path, t):
    """In one dimension, against the integral of x0 p(x0) p(x_t | x0)."""
    means, shares, std = torch.tensor([-1.0, 0.4]).double(), torch.tensor([0.3, 0.7]).double(), 0.2
    denoiser = exact_denoiser(GaussianMixture(means[:, None], std, path, shares))
    grid = torch.linspace(-4, 4, 40001, dtype=torch.float64)
    density = torch.exp(-((grid[:, None] - means) ** 2) / (2 * std**2)) * shares
    for x in (-1.2, 0.1, 0.9):
        likelihood = torch.exp(-((x - path.alpha(t) * grid) ** 2) / (2 * path.sigma(t) ** 2))
        for mode, prior in ((None, density.sum(1)), (0, density[:, 0]), (2, density.sum(1))):
            expected = (grid * prior * likelihood).sum() / (prior * likelihood).sum()
            condition = None if mode is None else torch.tensor([mode])
            found = denoiser(torch.tensor([[x]]), t, condition)
            assert found.item() == pytest.approx(expected.item(), abs=2e-6)


def test_samples_have_the_moments_and_shares_of_the_mixture():
    mixture = ring(4, radius=2.0, std=0.3, weights=[0.4, 0.3, 0.2, 0.1])
    points, modes = sample_mixture(mixture, 40000, torch.Generator().manual_seed(0))
    assert torch.allclose(modes.bincount() / 40000, torch.tensor([0.4, 0.3, 0.2, 0.1]), atol=0.01)
    assert torch.allclose(points.mean(0), torch.tensor([2 * 0.2, 2 * 0.2]), atol=0.03)  # of (2,0) (0,2) (-2,0) (0,-2)
    assert (points - mixture.means[modes]).std().item() == pytest.approx(0.3, abs=0.005)


def test_measures_of_perfect_and_of_collapsed_samples():
    mixture = ring(8, std=0.05)
    shares = torch.full((8,), 0.125).double()
    points, modes = sample_mixture(mixture, 20000, torch.Generator().manual_seed(1))
    assert mass_inside(points, mixture.means, std=0.05).item() == pytest.approx(1 - math.exp(-4.5), abs=0.003)
    assert modes_covered(points, mixture.means, shares, std=0.05) == 8
    assert mode_total_variation(points, mixture.means, shares) < 0.02
    three = points[modes < 3]
    assert modes_covered(three, mixture.means, shares, std=0.05) == 3
    assert mode_total_variation(three, mixture.means, shares).item() == pytest.approx(5 / 8, abs=0.02)
    beside = points + 0.3  # 6 standard deviations in each direction
    assert mass_inside(beside, mixture.means, std=0.05) < 0.01
    assert modes_covered(beside, mixture.means, shares, std=0.05) == 0
    few = torch.cat([points[modes == 0], points[modes == 1][:20]])  # a sixteenth of what is due
    assert modes_covered(few, mixture.means, shares, std=0.05) == 1


def test_data_are_the_same_for_all_seeds_and_serve_modes_as_classes():
    def data(**kwargs):
        made = MixtureDataModule(ring(4), train_samples=64, eval_samples=32, batch_size=16, **kwargs)
        made.setup()
        return made

    one, other = data(seed=0), data(seed=1)
    assert torch.equal(one.part("train").images, other.part("train").images)
    assert not torch.equal(one.part("train").images, data(split_seed=1).part("train").images)
    assert not torch.equal(one.real("val", 32)[0], one.real("test", 32)[0])
    batch = next(iter(one.train_dataloader()))
    assert batch.images.shape == (16, 2)
    assert torch.equal(one.part("train").labels[batch.index], batch.labels)


def test_an_exact_teacher_is_described_in_yaml_and_trains_a_generator(trainer):
    spec = {
        "class_path": "lit_distill.diffusion.exact_denoiser",
        "init_args": {
            "mixture": {
                "class_path": "lit_distill.diffusion.ring",
                "init_args": {"modes": 4, "path": {"class_path": "lit_distill.diffusion.FlowPath"}},
            }
        },
    }
    teacher = instantiate(spec)
    module = ScoreDistiller(
        small(1), teacher, [1.0], fake=OwnNetwork(small(2)), evaluation=MixtureEvaluation(40, 40)
    )  # fmt: skip
    first = {name: value.clone() for name, value in module.student.state_dict().items()}
    data = MixtureDataModule(ring(4), train_samples=64, eval_samples=40, batch_size=16)
    fit = trainer()
    fit.fit(module, datamodule=data)
    assert any(not torch.equal(value, first[name]) for name, value in module.student.state_dict().items())
    fit.test(module, datamodule=data, verbose=False)
    assert {"test/modes", "test/inside", "test/tv", "test/mmd", "test/acc", "test/nfe"} <= set(fit.callback_metrics)


def test_a_perfect_generator_has_perfect_measures(trainer):
    """The exact denoiser, run through its probability flow."""
    from lit_distill.diffusion.methods.denoising import Denoising
    from lit_distill.diffusion.samplers import Heun

    mixture = ring(4, std=0.1, path=EDMPath(0.002, 20.0))
    module = Denoising(exact_denoiser(mixture), sampler=Heun(40, r_max=20.0), evaluation=MixtureEvaluation(400, 400))
    fit = trainer()
    fit.test(module, datamodule=MixtureDataModule(mixture, 64, 400), verbose=False)
    found = {name: float(value) for name, value in fit.callback_metrics.items()}
    assert found["test/modes"] == 4
    assert found["test/acc"] == 1
    assert found["test/tv"] < 0.01
    assert found["test/inside"] > 0.96
    assert abs(found["test/mmd"]) < 0.01
    assert found["test/std_ratio"] == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("kind", ["copy", "lora", "own"])
def test_a_fake_score_restarts_in_place(kind):
    teacher = small(0).requires_grad_(False)
    fake_score = {"copy": FullCopy(), "lora": LoRA(2, 2.0), "own": OwnNetwork(small(5))}[kind]
    first = small(5) if kind == "own" else teacher
    fake = fake_score.build(teacher)
    x, labels = torch.randn(6, 2), torch.arange(6) % 4
    parameters = [p for p in fake.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.3)
    assert not torch.allclose(fake(x, 0.5, labels), first(x, 0.5, labels))
    fake_score.restart(fake, teacher)
    assert torch.equal(fake(x, 0.5, labels), first(x, 0.5, labels))
    assert all(p is q for p, q in zip(parameters, (p for p in fake.parameters() if p.requires_grad), strict=True))
    assert torch.equal(teacher(x, 0.5, labels), small(0)(x, 0.5, labels))


def test_mistakes_are_told(trainer, digits):
    with pytest.raises(UsageError, match=r"ring.weights: 2 are given for 3 modes"):
        ring(3, weights=[0.5, 0.5])
    with pytest.raises(UsageError, match=r"model.fake: it is on EDMPath, the teacher on FlowPath"):
        OwnNetwork(small(path=EDMPath())).build(small())
    with pytest.raises(UsageError, match=r"GeneratorImages has no mixture; take GenerationEvaluation"):
        MixtureEvaluation()(None, digits, "test")
    data = MixtureDataModule(ring(4), 64, 32)
    with pytest.raises(UsageError, match=r"a mixture has no part 'pool'"):
        data.part("pool")
