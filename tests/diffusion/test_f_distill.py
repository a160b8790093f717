import math

import pytest
import torch
from score_methods import attach, check_score_method

from lit_distill.core.errors import UsageError
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.methods.dmd2 import DMD2
from lit_distill.diffusion.methods.f_distill import FDistill
from lit_distill.diffusion.rollout import Sample

TAPS = ["network.blocks.1"]


def made(cls, make_denoiser, little, **words):
    words = {"taps": TAPS, "fake_updates": 2, **words}
    return cls(make_denoiser(1), make_denoiser(0), [2.5], evaluation=little, **words)


def test_method(trainer, digits, make_denoiser, little, tmp_path):
    module = check_score_method(
        lambda cls: made(cls, make_denoiser, little), FDistill, trainer, digits, tmp_path, critics=("fake", "head")
    )
    assert not torch.equal(module.ratio_means, torch.ones(10))  # and the resumed run has the same, see above


@pytest.mark.parametrize(
    "words", [{"divergence": "reverse_kl"}, {"divergence": "jeffreys", "ratio_range": (1.0, 1.0 + 1e-9)}]
)
@pytest.mark.parametrize("features", ["fake", "teacher"])
def test_equal_ratios_and_the_reverse_divergence_are_dmd2(trainer, digits, make_denoiser, little, words, features):
    torch.manual_seed(0)
    x = torch.randn(6, 1, 8, 8)
    sample = Sample(x, x, torch.full((6,), 2.5).double(), 0)
    found = []
    for cls, extra in ((FDistill, words), (DMD2, {})):
        module = attach(made(cls, make_denoiser, little, features=features, **extra), trainer, digits)
        with torch.no_grad():
            module.fake.network.last.weight.mul_(1.5)
        found.append(module.student_gradient(sample, torch.arange(6), Draws(1)))
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_the_gradient_is_weighted_by_the_ratio_of_the_same_noisy_samples(trainer, digits, make_denoiser, little):
    torch.manual_seed(0)
    x = torch.randn(6, 1, 8, 8)
    sample, labels = Sample(x, x, torch.full((6,), 2.5).double(), 0), torch.arange(6)
    module = attach(made(FDistill, make_denoiser, little, divergence="forward_kl", bins=0), trainer, digits)
    with torch.no_grad():
        module.fake.network.last.weight.mul_(1.5)
    for head in module.head.heads:
        head.layers[-1].weight.data.mul_(8)  # ratios that differ
    g = module.student_gradient(sample, labels, Draws(1))
    plain = DMD2.student_gradient(module, sample, labels, Draws(1))
    x_t, t = module.noised(x, module.student_times, Draws(1))
    r = module.logits(x_t, t, labels).mean(1).clamp(-10, 10).exp().clamp(0.1, 20).detach()
    assert r.std() > 0.05
    torch.testing.assert_close(g, (r / r.mean()).view(-1, 1, 1, 1) * plain, rtol=1e-4, atol=1e-6)


def test_ratios_are_clipped_divided_by_the_mean_of_their_noise_and_weights_have_mean_one(
    trainer, digits, make_denoiser, little
):
    module = made(FDistill, make_denoiser, little, divergence="forward_kl", ratio_decay=0.9)
    attach(module, trainer, digits)
    # r / (1 + r) of the noise: bins 0, 0, 5 and 9.
    t = torch.tensor([0.01, 0.05, 1.2, 50.0]).double()
    logits = torch.tensor([[math.log(2.0)], [math.log(4.0)], [30.0], [-30.0]])
    weight = module.weight(logits, t)
    means = torch.ones(10)
    means[0], means[5], means[9] = 0.9 + 0.1 * 3, 0.9 + 0.1 * 20, 0.9 + 0.1 * 0.1
    torch.testing.assert_close(module.ratio_means, means)
    ratio = torch.tensor([2 / 1.2, 4 / 1.2, 20 / 2.9, 0.1 / 0.91])
    torch.testing.assert_close(weight, ratio / ratio.mean())
    # Several heads: their mean logit.
    several = module.weight(torch.tensor([[1.0, 3.0], [2.0, 2.0]]), torch.tensor([1.0, 1.0]).double())
    torch.testing.assert_close(several, torch.ones(2))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"taps": []}, "model.taps: f-distill takes the ratio from a discriminator"),
        ({"gan_weight": 0.0}, "model.taps: f-distill takes the ratio from a discriminator"),
        ({"gan_kind": "hinge"}, "the logit of 'hinge' is no log ratio"),
        ({"ratio_range": (2.0, 1.0)}, "two positive numbers that grow"),
        ({"ratio_decay": 1.0}, "model.ratio_decay is 1.0"),
        ({"bins": -1}, "model.bins is -1"),
    ],
)
def test_mistakes_are_told(make_denoiser, little, words, message):
    with pytest.raises(UsageError, match=message):
        made(FDistill, make_denoiser, little, **words)
