"""Students in pipelines of diffusers: what these make is what the method's own sampler makes of the same noise."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from test_prompts import PROMPTS, published
from tiny_pipeline import RESOLUTION, autoencoder, save_stable_diffusion
from torch import nn

from lit_distill.cli import main
from lit_distill.core.errors import UsageError
from lit_distill.diffusion import FewStepScheduler
from lit_distill.diffusion.denoiser import Denoiser, pretrained
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.experts import EulerSteps
from lit_distill.diffusion.networks import diffusers_network
from lit_distill.diffusion.paths import CosinePath, EDMPath, FlowPath, TrigPath, VPPath
from lit_distill.diffusion.samplers import DDIM, Heun, Renoise
from lit_distill.diffusion.students import StudentRouter

ROOT = Path(__file__).parents[2]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
UNET = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "norm_num_groups": 4,
        "block_out_channels": (8, 8), "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2}  # fmt: skip
DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 1,
       "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10, "norm_num_groups": 4}  # fmt: skip
SD3 = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 1, "attention_head_dim": 8,
       "num_attention_heads": 2, "joint_attention_dim": 16, "caption_projection_dim": 16,
       "pooled_projection_dim": 12, "out_channels": 4}  # fmt: skip
FLUX = {"patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8,
        "num_attention_heads": 2, "joint_attention_dim": 16, "pooled_projection_dim": 12,
        "axes_dims_rope": (2, 2, 4)}  # fmt: skip


class Same(Draws):
    """Noise on the way from the generator that a pipeline has, too."""

    def __init__(self, generator=None):
        super().__init__(0)
        self.given = generator

    def normal(self, shape):
        return torch.randn(shape, generator=self.given)


def made(name, config, path, prediction, **options):
    torch.manual_seed(0)
    network = diffusers_network(name, config=config).eval()
    for parameter in network.parameters():
        if parameter.ndim > 1:  # some begin at zero
            nn.init.normal_(parameter, std=0.2)
    return Denoiser(network, path, prediction, **options)


def saved(denoiser, sampler, folder):
    denoiser.save_for_pipelines(folder, {"sampler": sampler.described(), "guidance": 1.0})
    part = "unet" if (folder / "unet").is_dir() else "transformer"
    network = type(denoiser.network).from_pretrained(folder / part).eval()
    return network, FewStepScheduler.from_pretrained(folder, subfolder="scheduler")


@torch.no_grad()
def sampled(denoiser, sampler, noise, condition=None, draws=None):
    return sampler(lambda x, t: denoiser(x, t, condition), denoiser.path, noise, draws or Same())


@pytest.mark.parametrize("steps", [[999.0], [999.0, 499.0, 249.0]], ids=len)
def test_ddpm_pipeline(tmp_path, steps):
    denoiser = made("UNet2DModel", UNET, VPPath(), "eps", time_input="time")
    network, scheduler = saved(denoiser, Renoise(steps), tmp_path)
    pipe = diffusers.DDPMPipeline(network, scheduler)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(2, generator=torch.Generator().manual_seed(1), num_inference_steps=7, output_type="pt").images
    generator = torch.Generator().manual_seed(1)
    # This pipeline begins with noise of standard deviation 1, where the path has sigma, 0.99998.
    noise = torch.randn(2, 1, 8, 8, generator=generator) / denoiser.path.sigma(999.0).float()
    expected = sampled(denoiser, Renoise(steps), noise, draws=Same(generator))
    torch.testing.assert_close(images, (expected / 2 + 0.5).clamp(0, 1), **CLOSE)
    assert 0.1 < images.std() < 0.6


def test_dit_pipeline(tmp_path):
    denoiser = made("DiTTransformer2DModel", DIT, VPPath(), "eps", num_classes=9, time_input="time")
    network, scheduler = saved(denoiser, Renoise([999.0, 499.0]), tmp_path)
    vae = autoencoder().eval()
    pipe = diffusers.DiTPipeline(network, vae, scheduler)
    pipe.set_progress_bar_config(disable=True)
    # Noise on the way comes from torch's own generator in this pipeline.
    torch.manual_seed(3)
    images = pipe([2, 7], 1.0, torch.Generator().manual_seed(1), output_type="np").images
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)) / denoiser.path.sigma(999.0).float()
    torch.manual_seed(3)
    latents = sampled(denoiser, Renoise([999.0, 499.0]), noise, torch.tensor([2, 7]))
    with torch.no_grad():
        expected = (vae.decode(latents / 0.5).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(torch.from_numpy(images).permute(0, 3, 1, 2), expected, **CLOSE)


def text(count=2):
    return {"encoder_hidden_states": torch.randn(count, 5, 16), "pooled_projections": torch.randn(count, 12)}


@pytest.mark.parametrize("sampler", [Renoise([1.0]), DDIM([1.0, 0.75, 0.25])], ids=lambda s: type(s).__name__)
def test_sd3_pipeline(tmp_path, sampler):
    denoiser = made("SD3Transformer2DModel", SD3, FlowPath(), "u", time_input="thousandths")
    network, scheduler = saved(denoiser, sampler, tmp_path)
    assert scheduler.timesteps.tolist() == [1000 * t for t in sampler.times]
    none = dict.fromkeys([f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")])
    pipe = diffusers.StableDiffusion3Pipeline(network, scheduler, autoencoder(), **none)
    pipe.set_progress_bar_config(disable=True)
    words, noise = text(), torch.randn(2, 4, 8, 8)
    given = {"prompt_embeds": words["encoder_hidden_states"], "pooled_prompt_embeds": words["pooled_projections"]}
    latents = pipe(**given, latents=noise, guidance_scale=1.0, output_type="latent", height=16, width=16).images
    torch.testing.assert_close(latents, sampled(denoiser, sampler, noise, words), **CLOSE)


def test_flux_pipeline(tmp_path):
    denoiser = made("FluxTransformer2DModel", FLUX, FlowPath(), "u", time_input="time")
    sampler = DDIM([1.0, 0.75, 0.5, 0.25])
    network, scheduler = saved(denoiser, sampler, tmp_path)
    pipe = diffusers.FluxPipeline(scheduler, autoencoder(), None, None, None, None, network)
    pipe.set_progress_bar_config(disable=True)
    words, noise = text(), torch.randn(2, 4, 8, 8)
    given = {"prompt_embeds": words["encoder_hidden_states"], "pooled_prompt_embeds": words["pooled_projections"]}
    packed = pipe._pack_latents(noise, 2, 4, 8, 8)
    size = 8 * pipe.vae_scale_factor
    latents = pipe(**given, latents=packed, output_type="latent", height=size, width=size).images
    unpacked = pipe._unpack_latents(latents, size, size, pipe.vae_scale_factor)
    torch.testing.assert_close(unpacked, sampled(denoiser, sampler, noise, words), **CLOSE)


@pytest.mark.parametrize(
    ("denoiser", "sampler"),
    [
        (("edm", EDMPath(), {"data_std": 0.75, "time_input": "saturating"}), Renoise([2.5])),
        (("edm", EDMPath(), {"data_std": 0.75, "time_input": "saturating"}), Renoise([80.0, 2.5, 0.6])),
        (("u", FlowPath(), {"time_input": "thousandths"}), EulerSteps([1.0, 0.5])),
        (("v", TrigPath(), {"time_input": "thousandths"}), DDIM([1.5, 0.7])),
        (("x0", CosinePath(), {"time_input": "thousandths"}), Renoise([0.9, 0.5])),
    ],
    ids=["edm", "edm_steps", "euler", "ddim", "cosine"],
)
def test_networks_without_a_pipeline_are_sampled_by_hand(tmp_path, denoiser, sampler):
    prediction, path, options = denoiser
    denoiser = made("UNet2DModel", UNET | {"num_class_embeds": 11}, path, prediction, num_classes=10, **options)
    network, scheduler = saved(denoiser, sampler, tmp_path)
    labels, noise = torch.tensor([3, 10]), torch.randn(2, 1, 8, 8)
    generator = torch.Generator().manual_seed(1)
    scheduler.set_timesteps()
    x = noise * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = network(scheduler.scale_model_input(x, t), t, class_labels=labels).sample
            x = scheduler.step(out, t, x, generator=generator).prev_sample
    expected = sampled(denoiser, sampler, noise, labels, Same(torch.Generator().manual_seed(1)))
    torch.testing.assert_close(x, expected, **CLOSE)
    assert x.std() > 0.1


def test_a_run_is_exported_into_stable_diffusion(tmp_path, capsys):
    save_stable_diffusion(tmp_path / "sd")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    words = published(ROOT / "configs/diffusion/swiftbrush.yaml", tmp_path, tmp_path)
    words += ["--trainer.max_epochs=1", "--model.init_args.optimizer.init_args.lr=0.01"]
    assert main([*words, "--model.init_args.evaluation.init_args.samples=2"]) == 0
    run, out = tmp_path / "default/x", tmp_path / "out"
    assert main(["export", str(run), "--to", str(out), "--format", "hf"]) == 0
    assert "call it with guidance_scale=1.0" in capsys.readouterr().out
    student = pretrained(str(run)).eval()
    parts = {
        "unet": diffusers.UNet2DConditionModel.from_pretrained(out / "unet"),
        "scheduler": FewStepScheduler.from_pretrained(out, subfolder="scheduler"),
    }
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "sd", safety_checker=None, **parts)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 4, 8, 8)
    size = {"height": RESOLUTION, "width": RESOLUTION, "output_type": "latent", "guidance_scale": 1.0}
    latents = pipe(["a cat", "a red dog"], latents=noise, **size).images
    embedded, _ = pipe.encode_prompt(["a cat", "a red dog"], "cpu", 1, False)
    expected = sampled(student, Renoise([999.0]), noise, {"encoder_hidden_states": embedded})
    torch.testing.assert_close(latents, expected, **CLOSE)
    teacher = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "sd/unet")
    assert not torch.equal(teacher.conv_in.weight, parts["unet"].conv_in.weight)
    # Diffusers' own scheduler does nearly the same: it begins with noise of standard deviation 1, here 0.998.
    pipe.scheduler = diffusers.LCMScheduler.from_pretrained(
        tmp_path / "sd/scheduler", original_inference_steps=1, timestep_scaling=1e6
    )
    scaled = noise * student.path.sigma(999.0).float()
    latents = pipe(["a cat", "a red dog"], latents=scaled, num_inference_steps=1, **size).images
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


def test_what_has_no_pipeline_is_told(tmp_path, make_denoiser):
    kept = {"sampler": Renoise([2.5]).described()}
    with pytest.raises(UsageError, match="the student is a ResidualMLP, for which diffusers has no pipeline"):
        make_denoiser().save_for_pipelines(tmp_path, kept)
    with pytest.raises(UsageError, match="the student is several networks"):
        StudentRouter(make_denoiser(), 2).save_for_pipelines(tmp_path, kept)
    denoiser = made("UNet2DModel", UNET, VPPath(), "eps", time_input="time")
    for sampler in ({"sampler": Heun(18).described()}, {}):
        with pytest.raises(UsageError, match=r"the student's sampler is (Heun|none), which is no list of steps"):
            denoiser.save_for_pipelines(tmp_path, sampler)


def test_a_file_of_a_scheduler_can_name_nothing_but_a_path(tmp_path):
    denoiser = made("UNet2DModel", UNET, VPPath(), "eps", time_input="time")
    saved(denoiser, Renoise([999.0]), tmp_path)
    file = tmp_path / "scheduler/scheduler_config.json"
    for name in ("UsageError", "torch", "none"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"path": {"class": name}}))
        with pytest.raises(UsageError, match=f"'{name}' is no path of lit_distill.diffusion.paths"):
            FewStepScheduler.from_pretrained(tmp_path, subfolder="scheduler")


def test_networks_in_bfloat16_see_times_in_full():
    denoiser = made("UNet2DModel", UNET, VPPath(), "eps", time_input="time")
    denoiser.network.bfloat16()
    seen = []
    denoiser.network.time_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    assert denoiser(torch.randn(2, 1, 8, 8), 999.0).isfinite().all()
    assert seen[0].tolist() == [999.0, 999.0]
