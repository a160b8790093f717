"""Text-conditioned distillation: prompts, their embeddings, and published configurations on tiny pipelines."""

import copy
import json
import operator
import re
import shutil
from functools import reduce
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from score_methods import attach, check_score_method
from tiny_pipeline import (
    RESOLUTION,
    TOKENS,
    WIDTH,
    save_flux,
    save_lumina,
    save_pixart,
    save_sd3,
    save_sdxl,
    save_stable_diffusion,
    save_wan,
)

from lit_distill.cli import main
from lit_distill.core.errors import UsageError
from lit_distill.core.networks import instantiate
from lit_distill.diffusion.autoencoder import Autoencoder
from lit_distill.diffusion.denoiser import Denoiser
from lit_distill.diffusion.fake import LoRA
from lit_distill.diffusion.latents import GeneratorLatents
from lit_distill.diffusion.methods.dmd2 import DMD2
from lit_distill.diffusion.methods.snoopi import SNOOPI
from lit_distill.diffusion.methods.swiftbrush import SwiftBrush
from lit_distill.diffusion.networks import diffusers_network
from lit_distill.diffusion.paths import scheduler_path
from lit_distill.diffusion.text import PromptEvaluation, Prompts, TextEncoder
from lit_distill.experiment.export import save_student
from lit_distill.image import DigitsDataModule

ROOT = Path(__file__).parents[2]
PROMPTS = ["a cat", "a red dog", "a cat", "photo of a dog", "dog", "red"]
PUBLISHED = {
    "swiftbrush": "sd",
    "snoopi_sd15": "sd",
    "snoopi": "pixart",
    "dmd2_sd15": "sd",
    "dmd2_sdxl": "sdxl",
    "dmd2_sd3": "sd3",
    "decoupled_dmd_sdxl": "sdxl",
    "decoupled_dmd_lumina": "lumina",
    "phased_dmd_wan": "wan",
    "nitrofusion_sdxl": "sdxl",
}
# What a tiny network, a few batches and a few images ask for.
SMALLER = {
    "dmd2_sd3": {"taps": ["network.transformer_blocks.1.ff"], "guidance": 2.0},
    "phased_dmd_wan": {"phase_iterations": 2},
    "nitrofusion_sdxl": {
        "pool_size": 24,
        "heads": 1,
        "teacher_samples": 4,
        "stage_iterations": 1,
        "taps": ["network.conv_in", "network.mid_block"],
    },
}


def sdxl_student(folder):
    network = {"class_name": "UNet2DConditionModel", "folder": folder, "subfolder": "unet"}
    return {
        "network": {"class_path": "lit_distill.diffusion.diffusers_network", "init_args": network},
        "path": {"class_path": "lit_distill.diffusion.scheduler_path", "init_args": {"folder": folder}},
        "prediction": "eps",
        "time_input": "time",
        "no_condition": "zeros",
    }


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    save_stable_diffusion(folder / "sd")
    save_pixart(folder / "pixart")
    save_sdxl(folder / "sdxl")
    save_sd3(folder / "sd3")
    save_wan(folder / "wan")
    save_flux(folder / "flux")
    save_lumina(folder / "lumina")
    spec = {"class_path": "lit_distill.diffusion.Denoiser", "init_args": sdxl_student(str(folder / "sdxl"))}
    for run in ("dmd2_1step", "dmd2_4steps"):
        save_student(instantiate(spec).state_dict(), spec, folder / run / "student")
    generator = torch.Generator().manual_seed(0)
    for number in range(6):
        pixels = torch.randint(256, (20, 24, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    rows = [json.dumps({"image": f"{number}.png", "caption": prompt}) for number, prompt in enumerate(PROMPTS)]
    (folder / "captions.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    (folder / "negative.txt").write_text("blurry\nlow quality\nred\n")
    return folder


@pytest.fixture
def prompts(pipelines):
    def build(**words):
        folder = str(pipelines / "sd")
        options = {"resolution": RESOLUTION, "batch_size": 2, "seed": 0, **words}
        return Prompts(
            str(pipelines / "prompts.txt"), TextEncoder(folder, batch_size=3), Autoencoder(folder), **options
        )

    return build


def denoiser(pipelines):
    folder = str(pipelines / "sd")
    network = diffusers_network("UNet2DConditionModel", folder, "unet")
    return Denoiser(network, scheduler_path(folder), "eps", time_input="time", no_condition="empty_prompt")


# ---- data -----------------------------------------------------------------------------------------------------------


def test_prompts_are_embedded_once_as_the_text_encoder_does(pipelines, prompts):
    data = prompts()
    data.setup()
    assert data.prompts == ["", *dict.fromkeys(PROMPTS)]
    assert data.sample_shape == (4, 8, 8)
    pipe = StableDiffusionPipeline.from_pretrained(pipelines / "sd", safety_checker=None)

    def embed(texts):
        words = {"padding": "max_length", "max_length": TOKENS, "truncation": True, "return_tensors": "pt"}
        with torch.no_grad():
            return pipe.text_encoder(pipe.tokenizer(texts, **words).input_ids).last_hidden_state

    seen = {}
    for batch in data.train_dataloader():
        assert batch.images is None
        assert batch.negative is None
        for index, value in zip(batch.index.tolist(), batch.condition["encoder_hidden_states"], strict=True):
            seen[index] = value
    assert sorted(seen) == list(range(6))
    found = torch.stack([seen[number] for number in range(6)])
    assert found.shape == (6, TOKENS, WIDTH)
    torch.testing.assert_close(found, embed(PROMPTS), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(data.null_condition()["encoder_hidden_states"], embed([""]), rtol=1e-4, atol=1e-5)
    assert torch.equal(found[0], found[2])


def test_embeddings_are_kept_in_a_file_and_refused_when_stale(pipelines, prompts, tmp_path):
    cache = tmp_path / "text.safetensors"
    data = prompts(cache_file=str(cache))
    data.setup()
    again = prompts(cache_file=str(cache))
    again.text.embed = None  # not asked
    again.setup()
    whole = prompts()
    rows = torch.arange(5)
    whole.setup()
    (value,), (kept,), (made,) = (d.table(rows).values() for d in (data, again, whole))
    assert torch.equal(value, kept)
    torch.testing.assert_close(kept, made, rtol=1e-3, atol=1e-3)  # float16
    other = prompts(cache_file=str(cache), test_prompts=str(pipelines / "negative.txt"))
    with pytest.raises(UsageError, match="is stale: prompts was"):
        other.setup()


def test_negative_prompts_are_drawn_for_each_sample_and_are_the_same_when_drawn_again(pipelines, prompts):
    def drawn(epoch):
        data = prompts(negative_prompts=str(pipelines / "negative.txt"))
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        found = []
        for batch in loader:
            table = data.table.embedded["encoder_hidden_states"]
            equal = (batch.negative["encoder_hidden_states"][:, None] == table).flatten(2).all(2)
            found += [data.prompts[row] for row in equal.int().argmax(1).tolist()]
        return found

    many = [drawn(epoch) for epoch in range(4)]
    assert {name for epoch in many for name in epoch} == {"blurry", "low quality", "red"}
    assert many[0] != many[1]
    assert drawn(1) == many[1]


def test_pixart_has_a_mask_besides(pipelines):
    found = TextEncoder(str(pipelines / "pixart"))(["a red cat", "dog"])
    assert found["encoder_hidden_states"].shape == (2, 120, WIDTH)
    assert found["encoder_attention_mask"][1].sum() < found["encoder_attention_mask"][0].sum() < 10


class CalledError(Exception):
    """Ends a pipeline at the first call of its network."""


# The network of a pipeline is told the same by its own pipeline and by ours.
@pytest.mark.parametrize(("kind", "told"), [("flux", {"guidance": 3.5}), ("lumina", {})])
def test_networks_are_told_what_their_pipelines_tell_them(pipelines, kind, told):
    folder, texts = str(pipelines / kind), ["a red cat", "dog"]
    pipe, calls = DiffusionPipeline.from_pretrained(folder), []

    def keep(module, args, words):
        calls.append(words)
        raise CalledError

    pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    pipe.set_progress_bar_config(disable=True)
    words = {"height": RESOLUTION, "width": RESOLUTION, "generator": torch.manual_seed(0), "num_inference_steps": 2}
    with pytest.raises(CalledError):
        pipe(texts, **words, guidance_scale=told.get("guidance", 1.0))
    condition = TextEncoder(folder, batch_size=1, **told)(texts)
    network = diffusers_network(type(pipe.transformer).__name__, folder, "transformer")
    network.register_forward_pre_hook(keep, with_kwargs=True)
    denoiser = Denoiser(network, scheduler_path(folder), "u", time_input="time")
    with pytest.raises(CalledError):
        denoiser(torch.randn(2, 4, 8, 8), 1.0, condition)
    theirs, ours = calls
    for name in {*theirs, *ours} - {"hidden_states", "return_dict"}:
        if torch.is_tensor(theirs.get(name)):
            torch.testing.assert_close(ours[name].float(), theirs[name].float(), rtol=1e-4, atol=1e-5)
            assert ours[name].dtype.is_floating_point == theirs[name].dtype.is_floating_point
        else:
            assert not theirs.get(name), name
            assert not ours.get(name), name


def test_flux_wants_to_be_told_its_guidance_where_it_learned_it(pipelines):
    folder = str(pipelines / "flux")
    network = diffusers_network("FluxTransformer2DModel", folder, "transformer")
    denoiser = Denoiser(network, scheduler_path(folder), "u", time_input="time")
    with pytest.raises(UsageError, match=r"data\.text\.guidance is missing; Flux\.1-dev is told a scale"):
        denoiser(torch.randn(1, 4, 8, 8), 1.0, TextEncoder(folder)(["a cat"]))


def test_latents_are_scaled_and_come_back(pipelines):
    folder = pipelines / "sd"
    coder = Autoencoder(str(folder), batch_size=2)
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").eval()
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        expected = vae.encode(images).latent_dist.mean * 0.5
        decoded = vae.decode(expected / 0.5).sample
    torch.testing.assert_close(coder.encode(images), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(coder.decode(expected), decoded, rtol=1e-4, atol=1e-5)
    assert (coder.factor, coder.shape(64)) == (2, (4, 32, 32))


# ---- methods --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [SwiftBrush, SNOOPI])
def test_a_text_conditioned_generator_is_trained_without_images(pipelines, prompts, trainer, tmp_path, method):
    words = {"nasa": True} if method is SNOOPI else {"guidance": 4.5}
    data = prompts(negative_prompts=str(pipelines / "negative.txt"))

    def build(cls):
        fake = LoRA(2, 4.0, ["to_q", "to_v"])
        return cls(
            denoiser(pipelines), denoiser(pipelines), [999.0], fake=fake, **words, evaluation=PromptEvaluation(2)
        )

    module = check_score_method(build, method, trainer, data, tmp_path, batches=3)
    null = data.null_condition()["encoder_hidden_states"]
    for network in (module.student, module.teacher, module.fake):
        hidden = network.null_condition({"encoder_hidden_states": torch.zeros(2, TOKENS, WIDTH)})
        assert torch.equal(hidden["encoder_hidden_states"], null.expand(2, -1, -1))


def test_images_with_captions_serve_methods_that_need_real_samples(pipelines, trainer, tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "grey"
    shutil.copytree(pipelines / "sd", folder)
    AutoencoderKL(
        in_channels=1, out_channels=1, block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",), norm_num_groups=4,
    ).save_pretrained(folder / "vae")  # fmt: skip
    source = DigitsDataModule(mean=(0.5,), std=(0.5,), train_size=40)
    data = GeneratorLatents(
        source, Autoencoder(str(folder)), TextEncoder(str(folder)), "digit {}", batch_size=4, epoch_batches=3, seed=0
    )

    data.setup()

    def build(cls):
        return cls(
            denoiser(pipelines),
            denoiser(pipelines),
            [999.0],
            fake_updates=2,
            taps=["network.mid_block"],
            gan_weight=1.0,
        )

    module = check_score_method(build, DMD2, trainer, data, tmp_path, critics=("fake", "head"), batches=2)
    assert data.sample_shape == (4, 8, 8)
    captions = TextEncoder(str(folder))([f"digit {name}" for name in data.classes])["encoder_hidden_states"]
    labels = torch.tensor([3, 0])
    torch.testing.assert_close(module.classes_of(labels)["encoder_hidden_states"], captions[labels])
    assert data.pixels(torch.randn(2, 4, 8, 8)).shape == (2, 1, 8, 8)


def published(path, pipelines, root, **changes):
    """A published file with another folder and prompts of ours."""
    text = path.read_text()
    (folder,) = set(re.findall(r"(?<!sub)folder: ([^,}\s]+)", text))
    text = text.replace(folder, str(pipelines / PUBLISHED[path.stem])).replace("runs/sdxl", str(pipelines))
    config = yaml.safe_load(text)
    config["model"]["init_args"] |= SMALLER.get(path.stem, {})
    data = config["data"]["init_args"]
    data["batch_size"] = 2
    if "source" in data:
        data |= {"cache_file": str(root / "captions.safetensors"), "epoch_batches": 3}
        data["source"]["init_args"] |= {
            "captions": str(pipelines / "captions.jsonl"),
            "image_size": RESOLUTION,
            "num_workers": 0,
        }
        config["model"]["init_args"]["evaluation"]["init_args"] |= {"val_samples": 4, "real_samples": 4}
    else:
        data |= {"prompts": str(pipelines / "prompts.txt"), "resolution": RESOLUTION}
        if "cache_file" in data:
            data["cache_file"] = str(root / "prompts.safetensors")
    if "resolution" in data["text"]["init_args"]:
        data["text"]["init_args"]["resolution"] = RESOLUTION
    if "negative_prompts" in data:
        data["negative_prompts"] = str(pipelines / "negative.txt")
    data |= changes
    file = root / path.name
    file.write_text(yaml.safe_dump(config))
    return ["fit", "-c", str(ROOT / "configs/trainer/cpu.yaml"), "-c", str(file), f"--run.root={root}", "--run.name=x",
            "--trainer.enable_progress_bar=false"]  # fmt: skip


def _weights(name):
    part = "unet" if PUBLISHED[name] in ("sd", "sdxl") else "transformer"
    return f"{part}/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_train_on_tiny_pipelines(name, pipelines, tmp_path):
    words = published(ROOT / f"configs/diffusion/{name}.yaml", pipelines, tmp_path)
    assert main([*words, "--trainer.max_epochs=1", "--model.init_args.evaluation.init_args.samples=2"]) == 0
    folder = tmp_path / "default/x"
    summary = json.loads((folder / "summary.json").read_text())
    model = yaml.safe_load((ROOT / f"configs/diffusion/{name}.yaml").read_text())["model"]["init_args"]
    one = name in ("swiftbrush", "snoopi", "snoopi_sd15", "dmd2_sd15")
    assert summary["metrics"]["test/nfe"] == (1 if one else 4)
    assert summary["metrics"]["test/std" if "Prompt" in str(model["evaluation"]) else "test/std_ratio"] > 0
    assert summary["panels"]["samples"]["rows"][:2] == [["a cat"], ["a red dog"]]
    assert (folder / "samples.png").stat().st_size > 100
    assert (folder / "student/model.safetensors").is_file()
    header = (folder / "metrics.csv").read_text().splitlines()[0]
    assert ("train/discriminator" if "taps" in model else "train/fake") in header
    before = load_file(pipelines / PUBLISHED[name] / _weights(name))
    after = load_file(folder / "student/model.safetensors")
    prefix = "network.0.network." if name == "phased_dmd_wan" else "network."
    assert any(not torch.equal(value, after[prefix + key]) for key, value in before.items())


NETWORK = "model.init_args.student.init_args.network.init_args"
NULLS = [f"model.init_args.{role}.init_args.no_condition" for role in ("student", "teacher")]
WRONG_CHANNELS = {
    "class_name": "UNet2DConditionModel",
    "config": {"in_channels": 3, "block_out_channels": [8], "down_block_types": ["DownBlock2D"],
               "up_block_types": ["UpBlock2D"], "norm_num_groups": 4, "cross_attention_dim": WIDTH},
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.init_args.resolution": 17}, "data.resolution: 17 pixels do not fit the autoencoder, which makes one"),
        ({"data.init_args.prompts": "none.txt"}, "data.prompts: none.txt cannot be read as text"),
        ({NETWORK: WRONG_CHANNELS}, "model.student: its network takes 3 channels, the data have 4; give data, or"),
        ({"scheduler": {"prediction_type": "v_prediction"}}, "it is 'eps', but the scheduler says 'v'; give that"),
        ({"scheduler": {"rescale_betas_zero_snr": True}}, "'eps' says nothing of the data at t = 999, where the path"),
        ({"without": "text_encoder"}, "has no text encoder, or no tokenizer for it; put both there"),
        (dict.fromkeys(NULLS), "model.guidance needs a network that knows 'no condition'; train it with label_dropout"),
        ({"model.init_args.steps": [499.0, 999.0]}, "model.steps: [499.0, 999.0] does not decrease; time grows with"),
    ],
    ids=["resolution", "prompts", "channels", "prediction", "zero_snr", "text_encoder", "null", "steps"],
)
def test_mistakes_give_one_line(change, message, pipelines, tmp_path, capsys):
    words = published(ROOT / "configs/diffusion/swiftbrush.yaml", pipelines, tmp_path)
    file = Path(words[4])
    if "scheduler" in change or "without" in change:
        folder = tmp_path / "sd"
        shutil.copytree(pipelines / "sd", folder)
        file.write_text(file.read_text().replace(str(pipelines / "sd"), str(folder)))
        config = folder / "scheduler/scheduler_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | change.get("scheduler", {})))
        if "without" in change:
            shutil.rmtree(folder / change["without"])
    else:
        config = yaml.safe_load(file.read_text())
        for key, value in change.items():
            *path, last = key.split(".")
            reduce(operator.getitem, path, config)[last] = value
        file.write_text(yaml.safe_dump(config))
    assert main(words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert message in lines[0]


def test_a_missing_text_encoder_is_told(pipelines, tmp_path):
    for part in ("text_encoder", "tokenizer"):
        folder = tmp_path / part
        shutil.copytree(pipelines / "sd", folder)
        shutil.rmtree(folder / part)
        with pytest.raises(UsageError, match="has no text encoder, or no tokenizer for it"):
            TextEncoder(str(folder))(["a cat"])
    with pytest.raises(UsageError, match=r"is no pipeline of diffusers on this machine"):
        TextEncoder(str(tmp_path))(["a cat"])
    with pytest.raises(UsageError, match="has no autoencoder in 'vae'"):
        Autoencoder(str(tmp_path)).shape(16)
    index = tmp_path / "text_encoder/model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "KolorsPipeline"))
    with pytest.raises(UsageError, match="the text of a KolorsPipeline is not known"):
        TextEncoder(str(tmp_path / "text_encoder"))(["a cat"])


def test_networks_of_other_channels_are_told(pipelines, prompts, trainer):
    wrong = denoiser(pipelines)
    wrong.network = UNet2DConditionModel(
        in_channels=3, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        norm_num_groups=4, cross_attention_dim=WIDTH, attention_head_dim=4,
    )  # fmt: skip
    module = SwiftBrush(denoiser(pipelines), wrong, [999.0], evaluation=PromptEvaluation())
    with pytest.raises(UsageError, match=r"model\.teacher: its network takes 3 channels, the data have 4"):
        attach(module, trainer, prompts())


def test_what_needs_more_than_prompts_is_told(pipelines, prompts, trainer, digits, make_denoiser):
    data = prompts()
    module = SNOOPI(denoiser(pipelines), denoiser(pipelines), [999.0], nasa=True, evaluation=PromptEvaluation())
    with pytest.raises(UsageError, match=r"data\.negative_prompts: model\.nasa learns from negative prompts"):
        trainer().fit(module, datamodule=copy.deepcopy(data))
    module = DMD2(denoiser(pipelines), denoiser(pipelines), [999.0], taps=["network.mid_block"], gan_weight=1.0)
    with pytest.raises(UsageError, match="data: it has prompts alone, and real samples are asked for"):
        trainer().fit(module, datamodule=copy.deepcopy(data))
    module = SwiftBrush(make_denoiser(1), make_denoiser(0), [2.5], evaluation=PromptEvaluation())
    with pytest.raises(UsageError, match=r"model\.evaluation: GeneratorImages has no prompts"):
        trainer(limit_val_batches=1).validate(module, datamodule=digits, verbose=False)
    with pytest.raises(UsageError, match=r"give mean and std 0\.5"):
        GeneratorLatents(DigitsDataModule(), Autoencoder(str(pipelines / "sd")))
    with pytest.raises(UsageError, match=r"data\.source: its images have 1 channels, the autoencoder takes 3"):
        GeneratorLatents(DigitsDataModule(mean=(0.5,), std=(0.5,)), Autoencoder(str(pipelines / "sd"))).setup()
