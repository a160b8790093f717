"""Networks of the classes that Decoupled and Phased DMD were published with, tiny and random: they are called as their
pipelines call them, and both methods train them on what a text encoder would give."""

from typing import NamedTuple

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader

from lit_distill.diffusion.denoiser import Denoiser
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.experts import PhaseExperts
from lit_distill.diffusion.methods.decoupled_dmd import DecoupledDMD
from lit_distill.diffusion.methods.phased_dmd import PhasedDMD
from lit_distill.diffusion.networks import diffusers_network
from lit_distill.diffusion.paths import FlowPath, VPPath

WORDS = {"encoder_hidden_states": (5, 16)}
# Class, its configuration, a sample, path, prediction, what it takes as time, and its condition.
FAMILIES = {
    "WanTransformer3DModel": (
        {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
         "freq_dim": 8, "ffn_dim": 16, "num_layers": 1},
        (4, 1, 4, 4), FlowPath(), "u", "thousandths", WORDS,
    ),
    "QwenImageTransformer2DModel": (
        {"in_channels": 16, "out_channels": 4, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
         "joint_attention_dim": 16, "axes_dims_rope": (2, 2, 4)},
        (4, 4, 4), FlowPath(), "u", "time", WORDS,
    ),
    "Lumina2Transformer2DModel": (
        {"in_channels": 4, "hidden_size": 24, "num_layers": 1, "num_refiner_layers": 1, "num_attention_heads": 2,
         "num_kv_heads": 1, "multiple_of": 8, "axes_dim_rope": (4, 4, 4), "axes_lens": (32, 32, 32),
         "cap_feat_dim": 16},
        (4, 4, 4), FlowPath(), "u", "time", WORDS | {"encoder_attention_mask": (5,)},
    ),
    "UNet2DConditionModel": (
        {"sample_size": 4, "block_out_channels": (8, 8), "norm_num_groups": 4, "cross_attention_dim": 16,
         "attention_head_dim": 2, "layers_per_block": 1, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
         "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "addition_embed_type": "text_time",
         "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 6 * 4 + 12},
        (4, 4, 4), VPPath(), "eps", "time", WORDS | {"text_embeds": (12,), "time_ids": (6,)},
    ),
}  # fmt: skip


def made(name, seed=0):
    config, _, path, prediction, time_input, _ = FAMILIES[name]
    torch.manual_seed(seed)
    network = diffusers_network(name, config=config).eval()
    for parameter in network.parameters():
        if parameter.ndim > 1:  # some begin at zero
            nn.init.normal_(parameter, std=0.2)
    return Denoiser(network, path, prediction, time_input=time_input, no_condition="zeros")


def text(name, count):
    mask = "encoder_attention_mask"
    return {
        key: torch.ones(count, *shape).bool() if key == mask else torch.randn(count, *shape)
        for key, shape in FAMILIES[name][5].items()
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_they_denoise_and_heed_time_and_text(name):
    _, shape, path, _, _, _ = FAMILIES[name]
    denoiser = made(name)
    x, t, words = torch.randn(2, *shape), torch.tensor([0.25, 0.5]).double() * path.t_max, text(name, 2)
    t = t.round() if path.discrete else t
    out = denoiser(x, t, words)
    assert out.shape == x.shape
    assert out.isfinite().all()
    assert not torch.equal(denoiser(x, t, words | text(name, 2)), out)
    assert not torch.equal(denoiser(x, t / 2, words), out)


def test_lumina_is_called_as_its_pipeline_calls_it():
    denoiser = made("Lumina2Transformer2DModel")
    x, words, t = torch.randn(2, 4, 4, 4), text("Lumina2Transformer2DModel", 2), torch.tensor([0.2, 0.7])
    with torch.no_grad():
        out = denoiser.network(x, 1 - t, words["encoder_hidden_states"], words["encoder_attention_mask"])
        torch.testing.assert_close(denoiser(x, t.double(), words, "u"), -out.sample)


def test_qwen_sees_the_tokens_of_its_pipeline():
    from diffusers import QwenImagePipeline

    denoiser = made("QwenImageTransformer2DModel")
    x, words, t = torch.randn(2, 4, 4, 4), text("QwenImageTransformer2DModel", 2), torch.tensor([0.2, 0.7])
    with torch.no_grad():
        tokens = QwenImagePipeline._pack_latents(x, 2, 4, 4, 4)
        out = denoiser.network(tokens, words["encoder_hidden_states"], None, t, [[(1, 2, 2)]] * 2).sample
        expected = QwenImagePipeline._unpack_latents(out, 32, 32, 8)[:, :, 0]
        torch.testing.assert_close(denoiser(x, t.double(), words, "u"), expected)


class TextBatch(NamedTuple):
    condition: dict
    index: torch.Tensor


class Texts(LightningDataModule):
    """Conditions without samples: neither method needs any."""

    def __init__(self, name):
        super().__init__()
        self.name, self.sample_shape = name, FAMILIES[name][1]

    def train_dataloader(self):
        torch.manual_seed(0)
        return DataLoader([TextBatch(text(self.name, 2), torch.arange(2)) for _ in range(4)], batch_size=None)


def with_text(method):
    """The method on batches of text."""

    class OnText(method):
        def conditions(self, batch, draws):
            return batch.condition

        def student_forward(self, batch, condition, draws):
            if method is PhasedDMD:
                return super().student_forward(batch, condition, draws)
            return self.rollout(self.student, draws.normal((2, *self._data().sample_shape)), condition, draws)

        def _evaluate(self, part):
            pass

    return OnText


@pytest.mark.parametrize("name", FAMILIES)
def test_decoupled_dmd_trains_them(trainer, name):
    path = FAMILIES[name][2]
    module = with_text(DecoupledDMD)(made(name), made(name), [path.t_max, round(path.t_max / 2, 1)], fake_updates=2)
    first = {key: value.clone() for key, value in module.student.state_dict().items()}
    trainer(log_every_n_steps=1).fit(module, datamodule=Texts(name))
    assert module.iteration == 4
    assert any(not torch.equal(value, first[key]) for key, value in module.student.state_dict().items())
    assert all(value.isfinite().all() for value in module.student.state_dict().values())


@pytest.mark.parametrize("name", FAMILIES)
def test_phased_dmd_trains_them(trainer, name):
    path = FAMILIES[name][2]
    high, middle = path.t_max, round(path.t_max / 2, 1) if not path.discrete else path.t_max // 2
    student = PhaseExperts(made(name), [[high], [float(middle)]])
    module = with_text(PhasedDMD)(student, made(name), phase_iterations=2, fake_updates=1, guidance=3.0)
    first = [{k: v.clone() for k, v in expert.state_dict().items()} for expert in student.network]
    trainer(log_every_n_steps=1).fit(module, datamodule=Texts(name))
    assert (module.iteration, module.phase) == (4, 1)
    for expert, before in zip(student.network, first, strict=True):
        assert any(not torch.equal(value, before[key]) for key, value in expert.state_dict().items())
        assert all(value.isfinite().all() for value in expert.state_dict().values())
    noise = torch.randn(2, *FAMILIES[name][1])
    assert module.generate(text(name, 2), noise, Draws(0)).isfinite().all()
