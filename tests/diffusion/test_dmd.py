"""DMD: its steps, and the regression on pairs."""

import math

import pytest
import torch
from score_methods import check_score_method

from lit_distill.core.errors import UsageError
from lit_distill.diffusion.denoiser import Denoiser
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.fake import OwnNetwork
from lit_distill.diffusion.methods.dmd import DMD
from lit_distill.diffusion.models import GaussianMixture
from lit_distill.diffusion.paths import EDMPath
from lit_distill.diffusion.rollout import Sample


def test_method(trainer, digits, make_denoiser, little, tmp_path):
    def build(cls):
        return cls(make_denoiser(1), make_denoiser(0), [2.5], pairs=20, pair_steps=2, evaluation=little)

    check_score_method(build, DMD, trainer, digits, tmp_path)


class Point(GaussianMixture):
    """One Gaussian around 0.3 in all 64 pixels, whatever the class."""

    def forward(self, x, time, condition=None):
        return super().forward(x, time)


def exact(std=0.5, num_classes=10):
    path = EDMPath()
    return Denoiser(Point([[0.3] * 64], std, path), path, "x0", num_classes, time_input="time")


def test_pairs_are_what_the_exact_flow_makes_of_the_noise(trainer, digits, make_denoiser, little, tmp_path):
    file = tmp_path / "pairs.safetensors"

    def build(**options):
        return DMD(
            make_denoiser(1), exact(), [2.5], pairs=40, pair_steps=40, pair_file=str(file), evaluation=little,
            fake=OwnNetwork(make_denoiser(2)), **options,
        )  # fmt: skip

    module = build()
    trainer(limit_train_batches=1).fit(module, datamodule=digits)
    assert {"surrogate", "regression", "fake"} == set(module.terms)
    pairs = module._pairs(torch.arange(40))
    # The flow of N(0.3, 0.25) from noise level 2.5 to 0 is a scaling.
    expected = 0.3 + (2.5 * pairs["noise"] - 0.3) * 0.5 / math.sqrt(0.25 + 2.5**2)
    torch.testing.assert_close(pairs["x0"], expected, atol=5e-3, rtol=0)
    # The regression is the mean square over pairs that were drawn.
    value = module.extra_student_loss(
        Sample(torch.zeros(6, 1, 8, 8), torch.zeros(6, 1, 8, 8), torch.ones(6), 0), None, None, Draws(5)
    )["regression"]
    drawn = module._pairs(Draws(5).integers(40, 6))
    with torch.no_grad():
        made = module.student(2.5 * drawn["noise"], 2.5, drawn["labels"].long())
    assert value.item() == pytest.approx(0.25 * float((made - drawn["x0"]).square().mean()), rel=1e-5)
    trainer(limit_train_batches=1).fit(build(), datamodule=digits)  # reads the file
    with pytest.raises(UsageError, match=r"is stale: guidance was 1\.0, now 2\.0"):
        trainer(limit_train_batches=1).fit(build(guidance=2.0), datamodule=digits)


def test_pairs_are_for_one_step(make_denoiser):
    with pytest.raises(UsageError, match=r"pairs are for one step, 2 are given"):
        DMD(make_denoiser(), make_denoiser(), [2.5, 1.0])
