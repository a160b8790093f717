"""LADD, and what holds for all adversarial distillation: who moves, on which samples, and that a run resumes."""

import copy
import math

import pytest
import torch
from torch import nn

from lit_distill.core.errors import UsageError
from lit_distill.core.loading import derived_seed
from lit_distill.diffusion.denoiser import Denoiser
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.losses import gan_loss
from lit_distill.diffusion.methods.ladd import LADD
from lit_distill.diffusion.models import GaussianMixture
from lit_distill.diffusion.paths import EDMPath, FlowPath
from lit_distill.diffusion.samplers import Heun

TAPS = ["network.blocks.0", "network.blocks.1"]


@pytest.fixture
def build(make_denoiser, little):
    def make(base=LADD, **options):
        options = {"steps": [2.5], "taps": TAPS, "evaluation": little, **options}
        return base(make_denoiser(1), make_denoiser(0), **options)

    return make


def watched(base):
    class Watched(base):
        def optimize(self, loss, optimizer=0, *, clip_norm=None):
            roles = {name: getattr(self, name) for name in ("student", "head", "teacher")}
            before = {name: [p.detach().clone() for p in role.parameters()] for name, role in roles.items()}
            super().optimize(loss, optimizer, clip_norm=clip_norm)
            moved = {
                name
                for name, role in roles.items()
                if any(not torch.equal(new, old) for new, old in zip(role.parameters(), before[name], strict=True))
            }
            self.steps.append((self.iteration, moved))
            for role in roles.values():
                role.zero_grad()

    return Watched


def test_each_step_moves_its_role_alone(trainer, digits, build):
    module = build(watched(LADD), head_updates=3, r1_weight=1.0)
    module.steps = []
    trainer().fit(module, datamodule=digits)
    expected = []
    for iteration in range(6):
        expected += [(iteration, {"student"})] * (iteration % 3 == 0) + [(iteration, {"head"})]
    assert module.steps == expected


def test_an_iteration_is_the_one_written_by_hand(trainer, digits, build):
    module = build(optimizer=lambda p: torch.optim.SGD(p, lr=0.1), r1_weight=3.0, r1_std=0.2, clip_norm=None)
    g, f = copy.deepcopy(module.student), copy.deepcopy(module.teacher)
    fit = trainer(limit_train_batches=1)
    module.trainer, fit.datamodule = fit, digits
    digits.setup()
    module.configure_model()
    head = copy.deepcopy(module.head)
    fit.fit(module, datamodule=digits)

    batch = next(iter(digits.train_dataloader()))
    real, labels = batch.images, batch.labels
    draws = Draws(derived_seed("step", 0, 0))

    def times():
        return 0.002 + draws.uniform(8) * (80 - 0.002)

    def logits(x, t, eps):
        seen = []
        handles = [block.register_forward_hook(lambda _m, _a, out: seen.append(out)) for block in f.network.blocks]
        f(x + t.float().view(-1, 1, 1, 1) * eps, t, labels)
        for handle in handles:
            handle.remove()
        return torch.stack([own(feature) for own, feature in zip(head.heads, seen, strict=True)], 1)

    softplus = nn.functional.softplus
    x = g(2.5 * draws.normal(real.shape), 2.5, labels)
    loss = softplus(-logits(x, times(), draws.normal(x.shape))).mean()
    gradients = torch.autograd.grad(loss, list(g.parameters()))
    for old, gradient, new in zip(g.parameters(), gradients, module.student.parameters(), strict=True):
        torch.testing.assert_close(new, old - 0.1 * gradient, rtol=1e-3, atol=1e-6)
    t_made, t_real = times(), times()
    eps_made, eps_real, shake = (draws.normal(x.shape) for _ in range(3))
    true = logits(real, t_real, eps_real)
    loss = softplus(logits(x.detach(), t_made, eps_made)).mean() + softplus(-true).mean()
    loss = loss + 3.0 * (true - logits(real + 0.2 * shake, t_real, eps_real)).square().mean()
    gradients = torch.autograd.grad(loss, list(head.parameters()))
    for old, gradient, new in zip(head.parameters(), gradients, module.head.parameters(), strict=True):
        torch.testing.assert_close(new, old - 0.1 * gradient, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"r1_weight": 1.0}, {"gan_kind": "hinge", "teacher_samples": 30}, {"gan_kind": "rpgan", "steps": [2.5, 0.8]}],
)
def test_a_resumed_run_is_the_uninterrupted_one(check_resumed, build, options):
    check_resumed(lambda: build(head_updates=2, **options))


def test_the_best_logit_is_the_logarithm_of_the_ratio_of_densities():
    """Two Gaussians of equal variance: log(p_real / p_fake) is a line, that a linear head finds."""
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(20_000, 1, generator=generator) + mean for mean in (0.5, -0.5))
    line = nn.Linear(1, 1)
    optimizer = torch.optim.LBFGS(line.parameters(), max_iter=50)

    def closure():
        optimizer.zero_grad()
        loss = gan_loss(line(fake), line(real), kind="ns")
        loss.backward()
        return loss

    optimizer.step(closure)
    assert line.weight.item() == pytest.approx(1.0, abs=0.05)  # (m_r - m_f) / s^2
    assert line.bias.item() == pytest.approx(0.0, abs=0.05)


class Point(GaussianMixture):
    """One Gaussian around 0.3 in all 64 pixels, whatever the class."""

    def forward(self, x, time, condition=None):
        return super().forward(x, time)


def test_samples_of_the_teacher_stand_for_real_ones(build, trainer, digits):
    path = EDMPath()
    module = build(teacher_samples=300, teacher_sampler=Heun(60))
    trainer(limit_train_batches=0).fit(module, datamodule=digits)
    module.teacher = Denoiser(Point([[0.3] * 64], 0.5, path), path, "x0", 10, time_input="time")
    made, labels = module._make()
    assert made.shape == (300, 1, 8, 8)
    assert made.mean().item() == pytest.approx(0.3, abs=0.02)
    assert made.std().item() == pytest.approx(0.5, abs=0.02)
    assert set(labels.tolist()) == set(range(10))
    again, _ = module._make()
    assert torch.equal(made, again)
    module._made = made, labels
    digits.setup()
    batch = next(iter(digits.train_dataloader()))
    real, condition = module.real_samples(batch, Draws(1))
    index = Draws(1).integers(300, 8)
    assert torch.equal(real, made[index])
    assert torch.equal(condition, labels[index])


def test_a_transformer_of_stable_diffusion_3_learns_against_its_own_features(trainer, little):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)

    def denoiser():
        network = diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=4,
            num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=8, pooled_projection_dim=8,
            pos_embed_max_size=8,
        )  # fmt: skip
        return Denoiser(network, FlowPath(), "u", time_input="thousandths")

    module = LADD(denoiser(), denoiser(), [1.0], ["network.transformer_blocks.0.ff"], evaluation=little)
    words = {"encoder_hidden_states": torch.randn(2, 3, 8), "pooled_projections": torch.randn(2, 8)}
    module.classes_of = lambda labels: {k: v.repeat(len(labels) // 2, *(1,) * (v.ndim - 1)) for k, v in words.items()}

    class Latents(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return Batch(torch.randn(2, 4, 8, 8), torch.zeros(2, dtype=torch.long), torch.arange(2))

    data = module_of(Latents())
    before = copy.deepcopy(module.teacher)
    trainer(limit_train_batches=2).fit(module, datamodule=data)
    assert all(math.isfinite(float(value)) for value in module.terms.values())
    assert set(module.terms) == {"gan", "discriminator"}
    for old, new in zip(before.parameters(), module.teacher.parameters(), strict=True):
        assert torch.equal(old, new)


def module_of(dataset):
    from lightning.pytorch import LightningDataModule

    class Data(LightningDataModule):
        sample_shape = (4, 8, 8)

        def train_dataloader(self):
            return torch.utils.data.DataLoader(dataset, batch_size=None)

        def val_dataloader(self):
            return self.train_dataloader()

    return Data()


class Batch:
    def __init__(self, images, labels, index):
        self.images, self.labels, self.index = images, labels, index


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"taps": []}, "model.taps: none are given"),
        ({"r1_weight": -1.0}, r"model.r1_weight is -1\.0"),
        ({"head_updates": 0}, "model.head_updates is 0"),
        ({"steps": [0.5, 2.5]}, "does not decrease"),
    ],
)
def test_mistakes_are_told(build, options, message):
    with pytest.raises(UsageError, match=message):
        build(**options)
