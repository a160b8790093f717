"""Measures of samples, data for generators, and a generator of a closed-form teacher."""

import json

import numpy as np
import pytest
import scipy.linalg
import torch
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from lit_distill.core.errors import UsageError
from lit_distill.diffusion.data import GeneratorImages, RepeatedPermutation
from lit_distill.diffusion.denoiser import Denoiser
from lit_distill.diffusion.distillation import ScoreDistiller
from lit_distill.diffusion.evaluation import GenerationEvaluation
from lit_distill.diffusion.fake import FakeScore
from lit_distill.diffusion.methods.denoising import Denoising
from lit_distill.diffusion.metrics import (
    frechet_distance,
    nearest_train_ratio,
    precision_recall,
    relative_frechet_distance,
    squared_mmd,
)
from lit_distill.diffusion.models import GaussianMixture
from lit_distill.diffusion.paths import EDMPath
from lit_distill.diffusion.samplers import Heun
from lit_distill.diffusion.times import Uniform
from lit_distill.image import DigitsDataModule

# ---- measures -------------------------------------------------------------------------------------------------------


class Features(nn.Module):
    num_features = 5

    def forward(self, x):
        return x.flatten(1)[:, :5]


def test_frechet_distance_is_that_of_torchmetrics_and_scipy():
    first, second = torch.randn(300, 5), 0.5 * torch.randn(200, 5) @ torch.randn(5, 5) + 1
    theirs = FrechetInceptionDistance(feature=Features(), normalize=True, input_img_size=(1, 1, 5))
    theirs.update(first.view(-1, 1, 1, 5), real=False)
    theirs.update(second.view(-1, 1, 1, 5), real=True)
    found = frechet_distance(first, second)
    assert found.item() == pytest.approx(theirs.compute().item(), rel=1e-3)
    covariances = [np.cov(x.double().numpy().T) for x in (first, second)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    mean = float((first.double().mean(0) - second.double().mean(0)).square().sum())
    assert found.item() == pytest.approx(mean + np.trace(covariances[0] + covariances[1] - 2 * root), rel=1e-8)
    relative = relative_frechet_distance(3 * first, 3 * second)
    assert relative.item() == pytest.approx(found.item() / np.trace(covariances[1]), rel=1e-5)
    assert frechet_distance(first, first).item() == pytest.approx(0, abs=1e-9)


def test_precision_and_recall_on_a_line():
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    generated = torch.tensor([[0.5], [1.5], [5.0], [5.5]])
    # Radii to the nearest other (k = 1): real 1, 1, 1, 8; generated 1, 1, 0.5, 0.5.
    precision, recall = precision_recall(generated, real, k=1)
    assert (precision.item(), recall.item()) == (1.0, 0.75)  # 10 covers 5 and 5.5; no generated one reaches 10
    precision, recall = precision_recall(torch.full((4, 1), 0.5) + torch.arange(4.0)[:, None] * 1e-3, real, k=1)
    assert recall.item() == 0.0  # all in one place


def test_mmd_is_unbiased_and_sees_a_shift():
    generator = torch.Generator().manual_seed(0)
    draw = lambda shift=0.0: torch.randn(100, 2, generator=generator) + shift  # noqa: E731
    same = torch.stack([squared_mmd(draw(), draw()) for _ in range(60)])
    assert abs(same.mean()) < 3 * same.std() / 60**0.5
    assert squared_mmd(draw(), draw(1.0)) > 5 * same.std()
    # By hand: one kernel, two points each.
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [3.0]])
    k = lambda d: np.exp(-(d**2) / 2)  # noqa: E731
    expected = k(1) + k(3) - 2 * (k(0) + k(3) + k(1) + k(2)) / 4
    assert squared_mmd(x, y, widths=(1.0,)).item() == pytest.approx(expected)


def test_copies_of_training_samples_are_near_them():
    train, held_out = torch.randn(50, 3), torch.randn(50, 3)
    assert nearest_train_ratio(train[:20] + 1e-4, train, held_out) < 0.01
    assert nearest_train_ratio(held_out, train, held_out).item() == 1


# ---- data -----------------------------------------------------------------------------------------------------------


def test_an_epoch_is_one_permutation_after_another():
    sampler = RepeatedPermutation(10, 25, seed=3)
    order = sampler.order()
    assert len(sampler) == len(order) == 25
    assert sorted(order[:10].tolist()) == sorted(order[10:20].tolist()) == list(range(10))
    assert order[:10].tolist() != order[10:20].tolist()
    sampler.set_epoch(1)
    assert not torch.equal(sampler.order(), order)


def test_generators_see_images_between_minus_one_and_one_in_epochs_of_any_length():
    data = GeneratorImages(DigitsDataModule(mean=(0.5,), std=(0.5,)), epoch_batches=40, batch_size=64)
    data.setup()
    batches = list(data.train_dataloader())
    assert len(batches) == 40
    assert (batches[0].images.min().item(), batches[0].images.max().item()) == (-1, pytest.approx(1))
    assert (data.num_classes, data.sample_shape, len(data.classes)) == (10, (1, 8, 8), 10)
    real, labels = data.real("test", 50)
    assert len(real) == len(labels) == 50
    pixels, everything = data.source.part("test")
    torch.testing.assert_close(data.pixels(real), pixels[::6].float() / 255)
    assert torch.equal(labels, everything[::6])
    assert len(data.real("test", 5000)[0]) == 300


# ---- evaluation -----------------------------------------------------------------------------------------------------


class Judge(nn.Module):
    """Finds the class in the first pixel, and has the pixels as features."""

    penultimate = "flat"

    def __init__(self):
        super().__init__()
        self.flat = nn.Flatten()

    def forward(self, x):
        wanted = (self.flat(x)[:, :1] * 10).round()
        return -(wanted - torch.arange(10)).abs()


class Labelled(nn.Module):
    """The data are noise around 0, with the class in the first pixel; half of the time of another class."""

    def forward(self, x, time, condition):
        x0 = x / 10
        wrong = (condition + 1) % 10
        shown = torch.where(torch.arange(len(x)) // 10 % 2 == 0, condition, wrong)
        x0[:, 0, 0, 0] = shown / 10
        return x0


def test_samples_are_measured_and_shown(trainer, digits, tmp_path):
    student = Denoiser(Labelled(), EDMPath(), "x0", 10, time_input="time")
    student.register_parameter("unused", nn.Parameter(torch.zeros(())))
    evaluation = GenerationEvaluation(Judge(), samples=200, val_samples=40, batch_size=100, real_samples=100)
    module = Denoising(student, evaluation=evaluation, sampler=Heun(1, r_max=80.0))
    fit = trainer(logger=CSVLogger(tmp_path, "x", "y"), limit_test_batches=1)
    (values,) = fit.test(module, datamodule=digits, verbose=False)
    assert values["test/acc"] == 0.5
    assert values["test/nfe"] == 1
    assert values["test/images_per_second"] > 0
    assert values["test/std_ratio"] > 1
    assert {"test/fd", "test/precision", "test/recall", "test/mmd", "test/nearest_train"} <= set(values)
    panel = module.panels["samples"]
    picture = Image.open(tmp_path / "x" / "y" / panel["file"])
    assert picture.size == (10 * 9 + 1, 10 * 9 + 1)
    assert json.loads(json.dumps(panel))["rows"][9] == ["9"]
    # The same noise every time.
    (again,) = fit.test(module, datamodule=digits, verbose=False)
    assert again["test/fd"] == values["test/fd"]


def test_evaluation_says_what_it_needs(trainer, digits, make_denoiser):
    with pytest.raises(UsageError, match="Flatten does not say which module's output is its feature"):
        GenerationEvaluation(nn.Flatten())
    with pytest.raises(UsageError, match="wrap it in lit_distill"):
        trainer(limit_val_batches=1).validate(Denoising(make_denoiser()), datamodule=DigitsDataModule(), verbose=False)


# ---- a generator of a closed-form teacher ---------------------------------------------------------------------------

RING = [[np.cos(a), np.sin(a)] for a in np.arange(8) * np.pi / 4]


class Points(GeneratorImages):
    """Batches of nothing in particular: the methods take no data."""

    sample_shape = (2,)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 2))

    def forward(self, x, time, condition=None):
        return self.layers(torch.cat([x, time[:, None]], 1))


class Own(FakeScore):
    """A network of its own, since a teacher in closed form cannot be trained on."""

    def build(self, teacher, sharded=False):
        torch.manual_seed(3)
        return Denoiser(Plain(), teacher.path, "edm", data_std=0.7)


class Ring(ScoreDistiller):
    def student_forward(self, batch, condition, draws):
        return self.rollout(self.student, draws.normal((256, 2)), None, draws)

    def conditions(self, batch, draws):
        return None

    def _evaluate(self, part):
        pass


@pytest.mark.slow
def test_a_one_step_generator_finds_the_modes_of_an_exact_teacher(trainer):
    torch.manual_seed(0)
    path = EDMPath(0.02, 5.0)
    teacher = Denoiser(GaussianMixture(RING, 0.1, path), path, "x0", time_input="time")
    student = Denoiser(Plain(), path, "edm", data_std=0.7)
    data = GeneratorImages(DigitsDataModule(mean=(0.5,), std=(0.5,)), epoch_batches=1200, batch_size=8)
    module = Ring(
        student, teacher, [5.0], fake=Own(), fake_updates=2, student_times=Uniform(0.0, 0.3),
        fake_times=Uniform(0.0, 0.4), optimizer=lambda p: torch.optim.Adam(p, lr=1e-3, betas=(0.0, 0.999)),
    )  # fmt: skip
    trainer().fit(module, datamodule=data)
    with torch.no_grad():
        made = student(5.0 * torch.randn(2000, 2), 5.0)
    distance, nearest = torch.cdist(made, torch.tensor(RING, dtype=made.dtype)).min(1)
    assert (distance < 0.3).float().mean() > 0.6
    assert (nearest.bincount(minlength=8) > 40).sum() >= 7
