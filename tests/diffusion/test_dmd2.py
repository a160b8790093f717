"""DMD2: an iteration from its formulas, and its discriminator."""

import copy

import pytest
import torch

from lit_distill.core.errors import UsageError
from lit_distill.core.loading import derived_seed
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.methods.dmd2 import DMD2
from lit_distill.diffusion.paths import EDMPath

TAPS = ["network.blocks.1"]


def by_hand(network, x_t, t, labels):
    """EDM's denoiser from its formulas."""
    s2, r = 0.75**2, t.float().view(-1, 1, 1, 1)
    out = network(x_t / (r**2 + s2).sqrt(), t.float().log() / 4, labels)
    return s2 / (r**2 + s2) * x_t + r * 0.75 / (r**2 + s2).sqrt() * out


def test_an_iteration_is_the_one_written_by_hand(trainer, digits, make_denoiser, little):
    """One iteration of DMD2 with guidance, against formulas: same draws, plain gradient descent."""
    student, teacher = make_denoiser(1), make_denoiser(0)
    module = DMD2(
        copy.deepcopy(student), copy.deepcopy(teacher), [2.5], fake_updates=5, taps=TAPS, gan_weight=0.7,
        discriminator_weight=0.3, guidance=1.5, evaluation=little, clip_norm=None,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    )  # fmt: skip
    fit = trainer(limit_train_batches=1)
    module.trainer = fit
    fit.datamodule = digits
    digits.setup()
    module.configure_model()
    head, fake = copy.deepcopy(module.head), copy.deepcopy(teacher)
    fit.fit(module, datamodule=digits)

    path, g, f, r = EDMPath(), student.network, fake.network, teacher.network
    draws = Draws(derived_seed("step", 0, 0))
    real = next(iter(digits.train_dataloader()))
    labels = draws.integers(10, 8)
    x = by_hand(g, 2.5 * draws.normal((8, 1, 8, 8)), torch.full((8,), 2.5), labels)
    # Student.
    t = module.student_times(8, path, draws)
    x_t = x.detach() + t.float().view(-1, 1, 1, 1) * draws.normal(x.shape)
    with torch.no_grad():
        none = torch.full_like(labels, 10)
        cond, uncond = by_hand(r, x_t, t, labels), by_hand(r, x_t, t, none)
        target = uncond + 1.5 * (cond - uncond)
        direction = by_hand(f, x_t, t, labels) - target
        direction = direction / (x - target).abs().mean((1, 2, 3), keepdim=True)

    def logits(x0, t, noise, labels):
        seen = []
        handle = f.blocks[1].register_forward_hook(lambda _m, _a, out: seen.append(out))
        by_hand(f, x0 + t.float().view(-1, 1, 1, 1) * noise, t, labels)
        handle.remove()
        return head.heads[0](seen[0])

    softplus = torch.nn.functional.softplus
    t = module.gan_times(8, path, draws)
    gan = softplus(-logits(x, t, draws.normal(x.shape), labels)).mean()
    loss = (x * direction).sum() / x.numel() + 0.7 * gan
    gradients = torch.autograd.grad(loss, list(g.parameters()))
    for parameter, gradient, new in zip(g.parameters(), gradients, module.student.network.parameters(), strict=True):
        torch.testing.assert_close(new, parameter - 0.1 * gradient, rtol=1e-4, atol=1e-6)
    # Fake score and head, on the same samples.
    x = x.detach()
    t = module.fake_times(8, path, draws)
    s = t.float().view(-1, 1, 1, 1)
    denoised = by_hand(f, x + s * draws.normal(x.shape), t, labels)
    loss = ((s**-2 + 0.75**-2) * (denoised - x) ** 2).mean()
    t_fake = module.gan_times(8, path, draws)
    fake_logits = logits(x, t_fake, draws.normal(x.shape), labels)
    t_real = module.gan_times(8, path, draws)
    real_logits = logits(real.images, t_real, draws.normal(x.shape), real.labels)
    loss = loss + 0.3 * (softplus(fake_logits).mean() + softplus(-real_logits).mean())
    parameters = [*f.parameters(), *head.parameters()]
    new = [*module.fake.network.parameters(), *module.head.parameters()]
    for parameter, gradient, found in zip(parameters, torch.autograd.grad(loss, parameters), new, strict=True):
        torch.testing.assert_close(found, parameter - 0.1 * gradient, rtol=2e-3, atol=1e-5)


def test_taps_of_a_discriminator_must_exist(trainer, digits, make_denoiser, little):
    module = DMD2(make_denoiser(1), make_denoiser(0), [2.5], taps=["network.mid"], evaluation=little)
    with pytest.raises(UsageError, match=r"tap 'network\.mid' is not a module of Denoiser"):
        trainer().fit(module, datamodule=digits)


def test_the_published_weight_of_the_gan_goes_with_the_size_of_samples(trainer, digits, make_denoiser, little):
    module = DMD2(make_denoiser(1), make_denoiser(0), [2.5], taps=TAPS, evaluation=little)
    trainer(limit_train_batches=1).fit(module, datamodule=digits)
    assert module.gan_weight == pytest.approx(3e-3 * 3 * 64 * 64 / 64)


def test_weights_of_the_gan_are_not_negative(make_denoiser):
    with pytest.raises(UsageError, match=r"model.gan_weight is -1.0"):
        DMD2(make_denoiser(), make_denoiser(), [2.5], gan_weight=-1.0)
