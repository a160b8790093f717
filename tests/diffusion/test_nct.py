"""NCT: the diffusion of noise, linear generators in closed form, and who moves."""

import copy
import math
from typing import NamedTuple

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader

from lit_distill.core.errors import UsageError
from lit_distill.core.loading import derived_seed
from lit_distill.diffusion.control import (
    Adapter,
    BlockAdapter,
    ControlExtractor,
    ControlNetAdapter,
    Decoded,
    LowResolution,
)
from lit_distill.diffusion.denoiser import Denoiser
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.methods.nct import NCT, diffused_noise, noise_level, sample_distance
from lit_distill.diffusion.paths import VPPath

TAPS = {"blocks.0": 16, "blocks.1": 16}


def test_diffused_noise_stays_standard_normal_and_forgets_step_by_step():
    z, eps = torch.randn(400_000, 1), torch.randn(400_000, 1)
    for level in (3, 8, 16):
        sigma = noise_level(torch.full((400_000,), level), levels=16)
        z_k = diffused_noise(z, eps, sigma)
        assert z_k.var().item() == pytest.approx(1.0, abs=0.01)
        assert (z_k * z).mean().item() == pytest.approx(math.cos(math.pi * level / 32), abs=0.01)
    assert noise_level(torch.tensor([16]), levels=16).item() == 1.0


def test_at_level_0_it_is_the_noise_itself():
    z, eps = torch.randn(6, 1, 8, 8), torch.randn(6, 1, 8, 8)
    assert torch.equal(diffused_noise(z, eps, noise_level(torch.zeros(6, dtype=torch.long), levels=16)), z)


def test_distances():
    a, b = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True), torch.zeros(2, 2, requires_grad=True)
    loss = sample_distance(a, b)
    loss.backward()
    assert loss.item() == 6.25
    assert b.grad is None
    c = 0.00054 * math.sqrt(2)
    assert sample_distance(a, b, kind="huber").item() == pytest.approx((math.sqrt(25 + c * c) - c) / 2)


class Identity(nn.Module):
    """f(z) = z on a path that starts with noise of variance 1."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x, time, condition=None):
        return x


class Front(ControlExtractor):
    """The first half."""

    def __call__(self, samples):
        return samples[:, :2]


class FirstHalf(Adapter):
    """The conditional generator in closed form: the first half is the control, the second the noise's own."""

    def __init__(self, obey=True):
        super().__init__()
        self.weight, self.obey = nn.Parameter(torch.zeros(1)), obey

    def attached(self, network, control):
        raise AssertionError

    def forward(self, generator, x_t, t, condition, control):
        made = generator(x_t, t, condition)
        return torch.cat([control, made[:, 2:]], dim=1) if self.obey else made


@pytest.mark.parametrize(("obey", "share"), [(True, 0.5), (False, 1.0)])
def test_losses_of_linear_generators_in_closed_form(obey, share):
    """Control: the first half of the data. What follows it pays only for how the second half changes between levels.

    That is the step of consistency training itself, 4 sin^2(pi / 4N) for a number that is kept as it is.
    """
    path = VPPath(alphas_cumprod=torch.linspace(0.9, 0.0, 10).tolist())
    generator = Denoiser(Identity(), path, "x0", time_input="time")
    z, eps = torch.randn(100_000, 4), torch.randn(100_000, 4)
    for levels in (1, 4, 16):
        module = NCT(FirstHalf(obey), generator, Front(), 9.0, levels=levels)
        level = torch.arange(100_000) % levels
        consistency, bound = module.losses(z, eps, level, None)
        assert bound.item() == 0
        expected = share * 4 * math.sin(math.pi / (4 * levels)) ** 2
        assert consistency.item() == pytest.approx(expected, rel=0.02)


def adapter(seed=3, zero=True):
    torch.manual_seed(seed)
    made = BlockAdapter(TAPS, 4, flat=True, hidden=8)
    if not zero:
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=0.2)
    return made


@pytest.fixture
def build(make_denoiser, little):
    def make(zero=True, **options):
        return NCT(adapter(zero=zero), make_denoiser(0), LowResolution(2), 2.5, evaluation=little, **options)

    return make


def test_an_adapter_changes_nothing_at_first_and_leaves_no_hooks(build):
    module = build()
    z, labels = torch.randn(5, 1, 8, 8), torch.arange(5)
    consistency, bound = module.losses(z, torch.randn(z.shape), torch.arange(5), labels)
    assert bound.item() == 0
    assert consistency.item() > 0
    assert all(not part._forward_hooks for part in module.teacher.modules())


def test_the_adapter_adds_to_each_tapped_module(make_denoiser):
    generator, own = make_denoiser(0), adapter(zero=False)
    z, labels, control = torch.randn(3, 1, 8, 8), torch.arange(3), torch.randn(3, 1, 2, 2)
    found = own(generator, 2.5 * z, 2.5, labels, control)
    other = copy.deepcopy(generator)

    class With(nn.Module):
        def __init__(self, block, layers):
            super().__init__()
            self.block, self.layers = block, layers

        def forward(self, hidden, embedding):
            out = self.block(hidden, embedding)
            return out + self.layers(torch.cat([out, control.flatten(1)], 1))

    for number in range(2):
        other.network.blocks[number] = With(other.network.blocks[number], own.layers[number])
    torch.testing.assert_close(found, other(2.5 * z, 2.5, labels))


def test_controls_that_are_maps_meet_maps_of_features_place_by_place():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 1))
    own = BlockAdapter({"0": 3}, 1, hidden=5)
    nn.init.normal_(own.layers[0][2].weight)
    x, control = torch.randn(2, 2, 4, 4), torch.randn(2, 1, 2, 2)
    with own.attached(network, control):
        found = network(x)
    plain = network(x)
    near = control.repeat_interleave(2, 2).repeat_interleave(2, 3)
    for row, column in ((0, 0), (3, 1)):
        given = torch.cat([plain[:, :, row, column], near[:, :, row, column]], 1)
        expected = plain[:, :, row, column] + own.layers[0](given)
        torch.testing.assert_close(found[:, :, row, column], expected)


def test_a_step_is_the_one_written_by_hand_and_moves_the_adapter_alone(trainer, digits, build):
    module = build(zero=False, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), levels=5, multiplier=0.8)
    before, f = copy.deepcopy(module.student), copy.deepcopy(module.teacher)
    trainer(limit_train_batches=1).fit(module, datamodule=digits)
    draws = Draws(derived_seed("step", 0, 0))
    labels = draws.integers(10, 8)
    z, eps = draws.normal((8, 1, 8, 8)), draws.normal((8, 1, 8, 8))
    k = draws.integers(5, 8).view(-1, 1, 1, 1)
    x = f(2.5 * z, 2.5, labels).detach()
    c = nn.functional.avg_pool2d(x, 4)

    def controlled(noise):
        return before(f, 2.5 * noise, 2.5, labels, c)

    angle = math.pi * k / 10
    target = controlled(angle.cos() * z + angle.sin() * eps).detach()
    angle = math.pi * (k + 1) / 10
    bound = (controlled(z) - x).square().mean()
    loss = (controlled(angle.cos() * z + angle.sin() * eps) - target).square().mean() + 0.8 * bound
    gradients = torch.autograd.grad(loss, list(before.parameters()))
    for old, gradient, new in zip(before.parameters(), gradients, module.student.parameters(), strict=True):
        torch.testing.assert_close(new, old - 0.1 * gradient, rtol=1e-3, atol=1e-6)
    for old, new in zip(f.parameters(), module.teacher.parameters(), strict=True):
        assert torch.equal(old, new)
    assert module.multiplier.item() == pytest.approx(0.8 + 0.5 * (bound.item() - 0.01), rel=1e-4)


def test_the_multiplier_grows_above_the_boundary_falls_below_and_is_never_negative(trainer, digits, build):
    module = build(boundary=0.3, multiplier=0.2, multiplier_rate=0.5)
    trainer(limit_train_batches=0).fit(module, datamodule=digits)
    seen = []
    for bound in (0.5, 0.2, 0.0, 0.0, 0.4):
        module.ascend(torch.tensor(bound))
        seen.append(module.multiplier.item())
    assert seen == pytest.approx([0.3, 0.25, 0.1, 0.0, 0.05])


def test_a_resumed_run_is_the_uninterrupted_one(check_resumed, build):
    module = check_resumed(build)
    names = set(module.state_dict())
    assert "multiplier" in names
    assert module.multiplier.item() != 1.0


def test_the_error_of_the_control_is_measured(trainer, digits, build):
    module = build()
    values = trainer(limit_val_batches=1).validate(module, datamodule=digits, verbose=False)[0]
    draws = Draws(0)
    noise, reference = draws.normal((20, 1, 8, 8)), draws.normal((20, 1, 8, 8))
    labels = torch.arange(20) % 10
    with torch.no_grad():
        pools = [nn.functional.avg_pool2d(module.teacher(2.5 * z, 2.5, labels), 4) for z in (noise, reference)]
    assert values["val/control_error"] == pytest.approx((pools[0] - pools[1]).abs().mean().item(), rel=1e-5)


# ---- Stable Diffusion with a ControlNet, tiny -----------------------------------------------------------------------


class Prompted(NamedTuple):
    condition: dict
    index: torch.Tensor


class Embeddings(LightningDataModule):
    sample_shape = (4, 8, 8)

    def train_dataloader(self):
        batches = [Prompted({"encoder_hidden_states": torch.randn(2, 5, 16)}, torch.arange(2)) for _ in range(2)]
        return DataLoader(batches, batch_size=None)

    def val_dataloader(self):
        return self.train_dataloader()


class Pixels(ControlExtractor):
    """Of twice the latents' size."""

    def __call__(self, samples):
        return nn.functional.interpolate(samples.mean(1, keepdim=True), scale_factor=2)


def test_a_controlnet_on_a_text_conditioned_generator(trainer, little):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes = {
        "in_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 16, "attention_head_dim": 4,
    }  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, out_channels=4, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **sizes
    )
    path = VPPath(schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    generator = Denoiser(unet, path, "eps", time_input="time")
    own = ControlNetAdapter(
        diffusers.ControlNetModel(conditioning_channels=1, conditioning_embedding_out_channels=(4, 8), **sizes)
    )

    module = NCT(own, generator, Pixels(), 999.0, evaluation=little, optimizer=lambda p: torch.optim.Adam(p, lr=0.01))
    before = copy.deepcopy(generator)
    trainer(limit_train_batches=1).fit(module, datamodule=Embeddings())
    assert float(module.terms["boundary"]) == 0  # zero convolutions
    assert float(module.terms["consistency"]) > 0
    for old, new in zip(before.parameters(), module.teacher.parameters(), strict=True):
        assert torch.equal(old, new)
    assert module.student.network.controlnet_mid_block.weight.abs().sum() > 0
    # It began with the encoder.
    fresh = ControlNetAdapter(diffusers.ControlNetModel.from_config(own.network.config))
    fresh.begin(generator)
    for name, weight in fresh.network.down_blocks.state_dict().items():
        assert torch.equal(weight, unet.down_blocks.state_dict()[name])
    other = diffusers.ControlNetModel(**{**sizes, "block_out_channels": (8, 8)})
    with pytest.raises(UsageError, match="down_blocks of the ControlNet is not the generator's"):
        ControlNetAdapter(other).begin(generator)


def test_controls_of_latents_are_those_of_decoded_images():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    autoencoder = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, scaling_factor=0.5,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    latents = torch.randn(2, 4, 4, 4)
    found = Decoded(autoencoder, LowResolution(2))(latents)
    with torch.no_grad():
        images = autoencoder.decode(2 * latents).sample
    assert images.shape == (2, 3, 8, 8)
    torch.testing.assert_close(found, nn.functional.avg_pool2d(images, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 100.0}, "model.start: .* leaves the times"),
        ({"start": 2.5, "levels": 0}, "model.levels is 0"),
        ({"start": 2.5, "boundary": -0.1}, r"model.boundary is -0\.1"),
        ({"start": 2.5, "sample_guidance": 2.0}, "model.sample_guidance"),
    ],
)
def test_mistakes_are_told(make_denoiser, options, message):
    with pytest.raises(UsageError, match=message):
        NCT(adapter(), make_denoiser(0), LowResolution(2), **options)


def test_mistakes_of_adapters_are_told(make_denoiser):
    x, labels, control = torch.randn(2, 1, 8, 8), torch.arange(2), torch.randn(2, 1, 2, 2)
    with pytest.raises(UsageError, match=r"ResidualMLP has no module 'blocks.9'"):
        BlockAdapter({"blocks.9": 16}, 4, flat=True)(make_denoiser(0), x, 2.5, labels, control)
    with pytest.raises(UsageError, match=r"'blocks.0' gives 16 channels and the control has 4; said are 8 and 4"):
        BlockAdapter({"blocks.0": 8}, 4, flat=True)(make_denoiser(0), x, 2.5, labels, control)
