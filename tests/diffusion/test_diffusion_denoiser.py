# ruff: noqa: C408 (arguments of classes read best as such)
import math

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import nn

from lit_distill.core.errors import UsageError
from lit_distill.core.taps import FeatureTaps
from lit_distill.diffusion.denoiser import Denoiser, chosen, guided, joined
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.models import GaussianMixture, ResidualMLP, small_unet
from lit_distill.diffusion.networks import diffusers_network
from lit_distill.diffusion.paths import EDMPath, FlowPath, TrigPath, VPPath
from lit_distill.diffusion.samplers import DDIM, Heun, Renoise


class Linear(nn.Module):
    """Output: (class + 1) times the input, so that each prediction can be told."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x, time, condition):
        self.calls += 1
        self.time = time
        return x * (condition.view(-1, 1) + 1.0)


def perturbed(network):
    """Away from initializations at zero."""
    torch.manual_seed(1)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network


def test_a_prediction_is_asked_for_and_the_path_converts_it():
    path, x, t = FlowPath(), torch.randn(3, 4), torch.tensor([0.2, 0.5, 1.0]).double()
    denoiser = Denoiser(Linear(), path, "u", num_classes=3, time_input="thousandths")
    u = x * torch.tensor([[1.0], [2.0], [3.0]])
    torch.testing.assert_close(denoiser(x, t, torch.arange(3), "u"), u)
    torch.testing.assert_close(denoiser(x, t, torch.arange(3)), x - t[:, None].float() * u)
    torch.testing.assert_close(denoiser.network.time, torch.tensor([200.0, 500.0, 1000.0]))


@pytest.mark.parametrize(
    "path", [FlowPath(), TrigPath(), VPPath(alphas_cumprod=[0.99, 0.5, 0.0])], ids=lambda path: type(path).__name__
)
def test_pure_noise_and_pure_data_have_a_log_noise_too(path, make_denoiser):
    x, labels = torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2])
    denoiser = make_denoiser(path=path)
    end = denoiser(x, path.t_max, labels)
    # c_skip is 0 there, c_out the data's std; the network sees the noise itself, of standard deviation 1.
    expected = 0.75 * denoiser.network(x, torch.full((3,), math.log(1e4) / 4), labels)
    torch.testing.assert_close(end, expected)
    torch.testing.assert_close(denoiser(x, path.t_max - 1e-6, labels), end, rtol=1e-2, atol=1e-2)
    for prediction in ("eps", "u", "score"):
        assert denoiser(x, path.t_max, labels, prediction).isfinite().all()
    if isinstance(path, FlowPath):
        assert torch.equal(denoiser(x, 0.0, labels), x)  # c_skip is 1, c_out is 0
    noise = torch.randn(3, 1, 8, 8)
    for sampler in (Renoise([path.t_max]), DDIM([path.t_max, path.t_max / 2]), Heun(3)):
        assert sampler(lambda x, t: denoiser(x, t, labels), path, noise, Draws(0)).isfinite().all()


def test_guidance_is_uncond_plus_scale_times_the_difference_in_one_call():
    path, x, t = EDMPath(), torch.randn(2, 4), torch.tensor([1.0, 2.0]).double()
    denoiser = Denoiser(Linear(), path, "x0", num_classes=3)
    labels = torch.tensor([0, 1])
    cond, uncond = denoiser(x, t, labels), denoiser(x, t, torch.tensor([3, 3]))
    torch.testing.assert_close(uncond, 4 * x)
    before = denoiser.network.calls
    torch.testing.assert_close(guided(denoiser, x, t, labels, 2.5), uncond + 2.5 * (cond - uncond))
    assert denoiser.network.calls == before + 1
    torch.testing.assert_close(guided(denoiser, x, t, labels, 1.0), cond)
    scales = torch.tensor([0.0, 3.0])
    mixed = guided(denoiser, x, t, labels, scales)
    torch.testing.assert_close(mixed[0], uncond[0])
    torch.testing.assert_close(mixed[1], uncond[1] + 3 * (cond[1] - uncond[1]))


def test_guidance_needs_a_null_condition():
    denoiser = Denoiser(Linear(), EDMPath(), "x0")
    with pytest.raises(UsageError, match="guidance needs a network that knows 'no condition'"):
        guided(denoiser, torch.zeros(1, 2), 1.0, torch.zeros(1).long(), 2.0)


def test_the_null_of_text_is_zeros_or_what_the_data_give_and_sizes_stay():
    text = {"encoder_hidden_states": torch.ones(2, 3, 4), "time_ids": torch.full((2, 6), 64.0)}
    zeros = Denoiser(Linear(), EDMPath(), "x0", no_condition="zeros").null_condition(text)
    assert not zeros["encoder_hidden_states"].any()
    torch.testing.assert_close(zeros["time_ids"], text["time_ids"])
    given = Denoiser(Linear(), EDMPath(), "x0")
    given.set_null({"encoder_hidden_states": torch.full((1, 3, 4), 7.0)})
    null = given.null_condition(text)
    torch.testing.assert_close(null["encoder_hidden_states"], torch.full((2, 3, 4), 7.0))
    torch.testing.assert_close(null["time_ids"], text["time_ids"])
    both = joined(text, null)
    assert both["time_ids"].shape == (4, 6)
    torch.testing.assert_close(chosen(both, torch.tensor([0, 3]))["encoder_hidden_states"][1], torch.full((3, 4), 7.0))


def test_features_can_be_had_without_the_rest_of_the_forward():
    network = perturbed(ResidualMLP(features=6, num_classes=3, width=8))
    denoiser = Denoiser(network, EDMPath(), num_classes=3)
    x, t, labels = torch.randn(2, 6), torch.tensor([1.0, 2.0]).double(), torch.tensor([0, 3])
    taps = FeatureTaps(denoiser, ["network.blocks.0", "network.blocks.1"])
    ran = []
    network.last.register_forward_hook(lambda *_: ran.append(1))
    out, whole = taps(x, t, labels)
    part = taps.features(x, t, labels)
    assert out.shape == x.shape
    assert len(ran) == 1
    for name in taps.names:
        assert torch.equal(part[name], whole[name])
    assert not any(module._forward_hooks for name, module in network.named_modules() if name != "last")


def test_a_tap_that_does_not_exist_names_its_neighbours():
    denoiser = Denoiser(ResidualMLP(features=6, width=8), EDMPath(), num_classes=10)
    with pytest.raises(UsageError, match=r"tap 'network.block.1' is not a module .*network.blocks.1"):
        FeatureTaps(denoiser, ["network.block.1"])


def test_sizes_of_the_small_networks_are_those_of_the_bench():
    sizes = [sum(p.numel() for p in n.parameters()) for n in (ResidualMLP(), small_unet(8))]
    assert sizes[0] == pytest.approx(0.39e6, rel=0.02)
    assert sizes[1] == pytest.approx(0.64e6, rel=0.05)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 16, 16)])
def test_a_small_unet_denoises(shape):
    denoiser = Denoiser(small_unet(shape[1]), EDMPath(), num_classes=10, time_input="saturating")
    x, t = torch.randn(2, *shape), torch.tensor([0.01, 80.0]).double()
    out = denoiser(x, t, torch.tensor([3, 10]))
    assert out.shape == x.shape
    # At almost no noise the preconditioning leaves the sample as it is.
    torch.testing.assert_close(out[0], x[0], atol=0.05, rtol=0.05)
    assert not torch.equal(denoiser(x, t, torch.tensor([3, 4]))[1], out[1])


TEXT = {"encoder_hidden_states": (5, 16)}
FAMILIES = {
    UNet2DModel: (
        dict(sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 8), norm_num_groups=4,
             down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, num_class_embeds=11),
        (3, 8, 8), VPPath(), "eps", "time", None,
    ),
    DiTTransformer2DModel: (
        dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
             num_embeds_ada_norm=10, norm_num_groups=4),
        (4, 8, 8), VPPath(), "eps", "time", None,
    ),
    UNet2DConditionModel: (
        dict(sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, cross_attention_dim=16, attention_head_dim=2,
             layers_per_block=1, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
             up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")),
        (4, 8, 8), VPPath(), "eps", "time", TEXT,
    ),
    SD3Transformer2DModel: (
        dict(sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
             joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=12, out_channels=4,
             pos_embed_max_size=8),
        (4, 8, 8), FlowPath(), "u", "thousandths", TEXT | {"pooled_projections": (12,)},
    ),
    FluxTransformer2DModel: (
        dict(patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
             num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=12, axes_dims_rope=(2, 2, 4)),
        (4, 8, 8), FlowPath(), "u", "time", TEXT | {"pooled_projections": (12,)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_networks_of_diffusers_denoise_and_heed_time_and_condition(family):
    config, shape, path, prediction, time_input, words = FAMILIES[family]
    network = perturbed(diffusers_network(family.__name__, config=config)).eval()
    assert type(network) is family
    denoiser = Denoiser(network, path, prediction, num_classes=None if words else 10, time_input=time_input)
    x = torch.randn(2, *shape)
    t = torch.tensor([0.3, 0.6]).double() * path.t_max
    t = t.round() if path.discrete else t
    condition = {k: torch.randn(2, *v) for k, v in words.items()} if words else torch.tensor([1, 10])
    other = {k: v + 1 for k, v in condition.items()} if words else torch.tensor([2, 3])
    out = denoiser(x, t, condition)
    assert out.shape == x.shape
    assert out.isfinite().all()
    raw = denoiser(x, t, condition, prediction)
    alpha, sigma = (c.float() for c in path.at(t, x)[:2])
    expected = (x - sigma * raw) / alpha if prediction == "eps" else x - t.float().view(-1, 1, 1, 1) * raw
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(denoiser(x, t, other, prediction), raw)
    assert not torch.equal(denoiser(x, t / 3, condition, prediction), raw)


def test_sdxl_is_given_pooled_text_and_sizes():
    config = FAMILIES[UNet2DConditionModel][0] | dict(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 12
    )
    network = perturbed(diffusers_network("UNet2DConditionModel", config=config)).eval()
    denoiser = Denoiser(network, VPPath(), "eps", time_input="time", no_condition="zeros")
    text = {
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "text_embeds": torch.randn(2, 12),
        "time_ids": torch.ones(2, 6),
    }
    x = torch.randn(2, 4, 8, 8)
    out = guided(denoiser, x, 500.0, text, 4.0)
    assert out.shape == x.shape
    assert not torch.equal(out, guided(denoiser, x, 500.0, text | {"time_ids": torch.zeros(2, 6)}, 4.0))


def test_flux_sees_each_square_of_latents_as_a_token():
    config, shape, *_ = FAMILIES[FluxTransformer2DModel]
    network = diffusers_network("FluxTransformer2DModel", config=config)
    seen = {}

    def keep(module, args, kwargs):
        seen.update(kwargs)
        return args, kwargs

    network.register_forward_pre_hook(keep, with_kwargs=True)
    x = torch.arange(4.0 * 8 * 8).view(1, *shape)
    condition = {"encoder_hidden_states": torch.zeros(1, 5, 16), "pooled_projections": torch.zeros(1, 12)}
    Denoiser(network, FlowPath(), "u", time_input="time")(x, 0.5, condition)
    from diffusers import FluxPipeline

    torch.testing.assert_close(seen["hidden_states"], FluxPipeline._pack_latents(x, 1, *shape))
    torch.testing.assert_close(
        seen["img_ids"], FluxPipeline._prepare_latent_image_ids(1, 4, 4, torch.device("cpu"), torch.float32)
    )


def test_a_network_says_that_samples_have_another_size(make_denoiser):
    with pytest.raises(UsageError, match=r"made for samples of 64 numbers, these have 256"):
        make_denoiser()(torch.zeros(2, 1, 16, 16), 1.0)


def test_text_networks_say_that_text_is_missing():
    network = diffusers_network("UNet2DConditionModel", config=FAMILIES[UNet2DConditionModel][0])
    with pytest.raises(UsageError, match="UNet2DConditionModel is conditioned on text, but the batch has none"):
        Denoiser(network, VPPath(), "eps", time_input="time")(torch.zeros(1, 4, 8, 8), 5.0, torch.zeros(1).long())


def test_networks_come_from_folders_and_nothing_is_downloaded(tmp_path):
    config = FAMILIES[UNet2DModel][0]
    made = diffusers_network("UNet2DModel", config=config)
    made.save_pretrained(tmp_path / "unet")
    again = diffusers_network("UNet2DModel", folder=str(tmp_path), subfolder="unet", dtype="bfloat16")
    torch.testing.assert_close(again.conv_in.weight.float(), made.conv_in.weight.bfloat16().float())
    with pytest.raises(UsageError, match="is not on this machine; nothing is downloaded"):
        diffusers_network("UNet2DModel", folder=str(tmp_path), subfolder="transformer")
    with pytest.raises(UsageError, match="either a folder with weights or a config"):
        diffusers_network("UNet2DModel")


def test_the_mixture_is_the_posterior_mean():
    """Against the mean of many samples of the joint distribution near x_t, on two paths."""
    means = [[-1.0, 0.5], [1.0, 0.0], [0.0, -1.5]]
    for path, t in ((EDMPath(), 0.7), (FlowPath(), 0.4)):
        denoiser = Denoiser(GaussianMixture(means, 0.3, path), path, "x0", num_classes=3, time_input="time")
        generator = torch.Generator().manual_seed(0)
        which = torch.randint(3, (2_000_000,), generator=generator)
        x0 = torch.tensor(means)[which] + 0.3 * torch.randn(len(which), 2, generator=generator)
        x_t = path.add_noise(x0, torch.randn(x0.shape, generator=generator), t)
        point = torch.tensor([[0.1, -0.3]])
        near = (x_t - point).norm(dim=1) < 0.05
        torch.testing.assert_close(denoiser(point, t)[0], x0[near].mean(0), atol=0.02, rtol=0)
        own = near & (which == 2)
        torch.testing.assert_close(denoiser(point, t, torch.tensor([2]))[0], x0[own].mean(0), atol=0.02, rtol=0)
        assert torch.equal(denoiser(point, t, torch.tensor([3])), denoiser(point, t))


def test_draws_on_two_processes_are_those_of_one():
    def drawn(rank, world):
        draws = Draws(5, rank=rank, world_size=world)
        each = 4 // world
        numbers = [draws.normal((each, 2)), draws.uniform(each), draws.integers(9, each), draws.gaussian(each)]
        return numbers, draws.shared_integer(1000)

    whole, shared = drawn(0, 1)
    parts = [drawn(rank, 2) for rank in range(2)]
    for position, value in enumerate(whole):
        assert torch.equal(value, torch.cat([part[0][position] for part in parts]))
    assert [part[1] for part in parts] == [shared, shared]
