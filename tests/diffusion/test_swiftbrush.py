import pytest
import torch
from score_methods import attach, check_score_method, weights

from lit_distill.core.errors import UsageError
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.fake import LoRA
from lit_distill.diffusion.methods.swiftbrush import SwiftBrush
from lit_distill.diffusion.paths import EDMPath, VPPath
from lit_distill.diffusion.rollout import Sample
from lit_distill.diffusion.times import Interval


def made(cls, make_denoiser, little, path=None, steps=(2.5,), **words):
    prediction = "edm" if path is None else "eps"
    networks = [make_denoiser(seed, path, prediction) for seed in (1, 0)]
    return cls(*networks, list(steps), fake=LoRA(4, 8.0), evaluation=little, **words)


def sample_of(seed=0, n=6):
    torch.manual_seed(seed)
    x = torch.randn(n, 1, 8, 8)
    return Sample(x, x, torch.full((n,), 2.5).double(), 0)


def disturb(module):
    """Moves the adapters away from zero."""
    torch.manual_seed(5)
    for name, parameter in module.fake.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)


def test_method(trainer, digits, make_denoiser, little, tmp_path):
    module = check_score_method(
        lambda cls: made(cls, make_denoiser, little, guidance=1.5), SwiftBrush, trainer, digits, tmp_path
    )
    trained = [name for name, parameter in module.fake.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name for name in trained)


def test_without_its_adapters_the_fake_score_is_the_teacher_bit_for_bit(trainer, digits, make_denoiser, little):
    module = made(SwiftBrush, make_denoiser, little)
    before = weights(module.teacher)
    trainer(limit_train_batches=3).fit(module, datamodule=digits)
    disturb(module)
    x, labels = torch.randn(5, 1, 8, 8), torch.arange(5)
    teacher = module.teacher(x, 1.0, labels)
    assert not torch.equal(module.fake(x, 1.0, labels), teacher)
    for part in module.fake.modules():
        if hasattr(part, "enable_adapters"):
            part.enable_adapters(False)
    assert torch.equal(module.fake(x, 1.0, labels), teacher)
    assert all(torch.equal(value, before[name]) for name, value in module.teacher.state_dict().items())


def test_at_first_nothing_moves_the_generator(trainer, digits, make_denoiser, little):
    module = attach(made(SwiftBrush, make_denoiser, little), trainer, digits)
    assert module.student_gradient(sample_of(), torch.arange(6), Draws(0)).abs().max() == 0
    disturb(module)
    assert module.student_gradient(sample_of(), torch.arange(6), Draws(0)).abs().max() > 0


@pytest.mark.parametrize("path", [None, VPPath()], ids=["edm", "vp"])
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_both_scores_are_guided_alike(trainer, digits, make_denoiser, little, path, guidance):
    """g = sigma alpha (D_fake - D_real) of a variance-preserving path, with each D guided by hand."""
    steps = (2.5,) if path is None else (999.0,)
    module = made(SwiftBrush, make_denoiser, little, path, steps, guidance=guidance)
    attach(module, trainer, digits)
    disturb(module)
    sample, labels = sample_of(), torch.arange(6)
    g = module.student_gradient(sample, labels, Draws(2))

    draws = Draws(2)
    t = module.student_times(6, module.path, draws)
    shape = (-1, 1, 1, 1)
    alpha, sigma = module.path.alpha(t).view(shape), module.path.sigma(t).view(shape)
    x_t = (alpha * sample.x0 + sigma * draws.normal(sample.x0.shape)).float()
    none = torch.full((6,), 10)
    with torch.no_grad():
        d = [
            (1 - guidance) * net(x_t, t, none) + guidance * net(x_t, t, labels) for net in (module.fake, module.teacher)
        ]
    r = sigma / alpha
    expected = r / (1 + r**2) * (d[0] - d[1]).double()
    torch.testing.assert_close(g.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_the_fake_score_learns_noise_times_alpha_and_now_and_then_without_conditions(
    trainer, digits, make_denoiser, little, dropout
):
    module = made(SwiftBrush, make_denoiser, little, VPPath(), (999.0,), condition_dropout=dropout)
    module.fake_times = Interval(300.0, 900.0)
    attach(module, trainer, digits)
    disturb(module)
    sample, labels = sample_of(), torch.arange(6)
    found = module.fake_loss(sample, labels, Draws(4))
    draws = Draws(4)
    t = module.fake_times(6, module.path, draws)
    eps = draws.normal(sample.x0.shape)
    alpha, sigma = module.path.alpha(t).float().view(-1, 1, 1, 1), module.path.sigma(t).float().view(-1, 1, 1, 1)
    shown = torch.full((6,), 10) if dropout else labels
    with torch.no_grad():
        out = module.fake.network(alpha * sample.x0 + sigma * eps, module.fake.network_time(t).float(), shown)
    assert found.item() == pytest.approx((alpha * out - alpha * eps).square().mean().item(), rel=1e-4)


def test_conditions_are_hidden_for_a_whole_batch_as_often_as_said(trainer, digits, make_denoiser, little):
    module = attach(made(SwiftBrush, make_denoiser, little, condition_dropout=0.25), trainer, digits)
    seen = []
    module.fake.forward = lambda x_t, t, condition: seen.append(condition) or x_t
    for seed in range(400):
        module.fake_loss(sample_of(n=3), torch.arange(3), Draws(seed))
    hidden = [bool((labels == 10).all()) for labels in seen]
    assert all(h or bool((labels != 10).all()) for h, labels in zip(hidden, seen, strict=True))
    assert sum(hidden) / 400 == pytest.approx(0.25, abs=0.07)  # three standard deviations


def test_published_times_are_whole_numbers_of_equal_chance():
    path = VPPath()
    times = Interval(19.5, 980.5)(200_000, path, Draws(0))
    assert (times.min().item(), times.max().item()) == (20, 980)
    counts = times.long().bincount()[20:]
    assert counts[0] / counts.double().mean() == pytest.approx(1, abs=0.25)
    assert counts[-1] / counts.double().mean() == pytest.approx(1, abs=0.25)


def test_mistakes_are_told(make_denoiser, little):
    with pytest.raises(UsageError, match=r"condition_dropout is 2\.0"):
        made(SwiftBrush, make_denoiser, little, condition_dropout=2.0)
    with pytest.raises(UsageError, match=r"model\.guidance needs a network that knows"):
        SwiftBrush(*(make_denoiser(i, EDMPath(), num_classes=None) for i in (1, 0)), [2.5])
