"""Images with captions, and what text encoders and autoencoders of published pipelines make of both."""

import json

import diffusers
import pytest
import torch
from PIL import Image
from tiny_pipeline import RESOLUTION, WIDTH, save_sd3, save_sdxl, save_stable_diffusion, save_wan

from lit_distill.core.errors import UsageError
from lit_distill.diffusion import Autoencoder, CaptionedImages, GeneratorLatents, TextEncoder
from lit_distill.diffusion.text import TextBatch

CAPTIONS = ["a cat", "a cat", "a red dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("captions")
    (root / "images").mkdir()
    for number, color in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255)]):
        Image.new("RGB", (24, 20), color).save(root / f"images/{number}.png")
    rows = [{"image": f"images/{number}.png", "caption": caption} for number, caption in enumerate(CAPTIONS)]
    (root / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    (root / "test.jsonl").write_text(json.dumps({"image": "images/2.png", "caption": "dog"}))
    save_stable_diffusion(root / "sd")
    return root


def test_images_come_with_their_captions_and_the_tests_captions_are_first(folder):
    data = CaptionedImages(str(folder / "train.jsonl"), str(folder / "test.jsonl"), 16, batch_size=3, num_workers=0)
    assert data.classes == ("dog", "a cat", "a red dog")
    (batch,) = data.train_dataloader()
    assert batch.images.shape == (3, 3, 16, 16)
    colors = torch.eye(3) * 2 - 1  # red, green and blue in [-1, 1]
    for image, label, index in zip(batch.images, batch.labels.tolist(), batch.index.tolist(), strict=True):
        assert data.classes[label] == CAPTIONS[index]
        torch.testing.assert_close(image.mean((1, 2)), colors[index])
    assert data.part("test").labels.tolist() == [0]
    alone = CaptionedImages(str(folder / "train.jsonl"), image_size=16, num_workers=0)
    assert alone.part("val").labels.tolist() == [0, 0, 1]


def test_batches_are_latents_with_embedded_captions_kept_in_a_file(folder, tmp_path):
    source = CaptionedImages(str(folder / "train.jsonl"), image_size=RESOLUTION, num_workers=0)
    coder, text = Autoencoder(str(folder / "sd")), TextEncoder(str(folder / "sd"))
    cache = tmp_path / "captions.safetensors"
    words = {"caption": "{}", "cache_file": str(cache), "epoch_batches": 1, "batch_size": 3, "seed": 0}
    data = GeneratorLatents(source, coder, text, **words)
    (batch,) = data.train_dataloader()
    batch = data.on_after_batch_transfer(batch, 0)
    assert isinstance(batch, TextBatch)
    assert data.caption_count == 2
    expected = text([CAPTIONS[number] for number in batch.index.tolist()])["encoder_hidden_states"]
    torch.testing.assert_close(batch.condition["encoder_hidden_states"], expected, rtol=1e-3, atol=1e-3)  # float16
    assert batch.images.shape == (3, 4, 8, 8)
    assert cache.is_file()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "lists no images; give a JSON object per line"),
        ('{"image": "1.png"}', r"line 1 of \S+ is not like"),
        ('{"image": "1.png", "caption": "a"}\nhello', r"line 2 of \S+ is not like"),
        ('["1.png", "a cat"]', r"line 1 of \S+ is not like"),
        (None, r"data\.captions: \S+ cannot be read as text"),
    ],
)
def test_mistakes_in_the_list_are_told(tmp_path, content, message):
    file = tmp_path / "list.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError, match=message):
        CaptionedImages(str(file)).setup()


# ---- text of published pipelines -------------------------------------------------------------------------------------


def test_sdxl_has_two_encoders_a_pooled_text_and_sizes(tmp_path):
    save_sdxl(tmp_path)
    found = TextEncoder(str(tmp_path), resolution=16)(["a cat", "a red dog"])
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path)
    with torch.no_grad():
        ids = pipe.tokenizer(["a cat"], padding="max_length", max_length=8, return_tensors="pt").input_ids
        first = pipe.text_encoder(ids, output_hidden_states=True)
        second = pipe.text_encoder_2(ids, output_hidden_states=True)
    joined = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    torch.testing.assert_close(found["encoder_hidden_states"][:1], joined, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["text_embeds"][:1], second.text_embeds, rtol=1e-4, atol=1e-5)
    expected = pipe._get_add_time_ids((16, 16), (0, 0), (16, 16), torch.float32, 12)
    assert torch.equal(found["time_ids"], expected.expand(2, -1))
    with pytest.raises(UsageError, match=r"data\.text\.resolution: Stable Diffusion XL is told the size"):
        TextEncoder(str(tmp_path))(["a cat"])


def test_sd3_has_three_encoders(tmp_path):
    save_sd3(tmp_path)
    found = TextEncoder(str(tmp_path))(["a cat"])
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path)
    with torch.no_grad():
        ids = pipe.tokenizer(["a cat"], padding="max_length", max_length=8, return_tensors="pt").input_ids
        ends = [encoder(ids) for encoder in (pipe.text_encoder, pipe.text_encoder_2)]
        third = pipe.tokenizer_3(["a cat"], padding="max_length", max_length=256, return_tensors="pt").input_ids
        words = pipe.text_encoder_3(third)[0]
    pooled = torch.cat([end.text_embeds for end in ends], dim=-1)
    torch.testing.assert_close(found["pooled_projections"], pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["encoder_hidden_states"][:, 8:], words, rtol=1e-4, atol=1e-5)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"text_encoder_3": [None, None]}))
    with pytest.raises(UsageError, match="has no text_encoder_3"):
        TextEncoder(str(tmp_path))(["a cat"])


def test_wan_is_a_video_of_one_frame(tmp_path):
    save_wan(tmp_path)
    found = TextEncoder(str(tmp_path))(["a cat"])["encoder_hidden_states"]
    assert found.shape == (1, 512, WIDTH)
    assert not found[:, 3:].any()  # beyond the prompt its pipeline has zeros
    coder = Autoencoder(str(tmp_path), batch_size=1)
    vae = diffusers.AutoencoderKLWan.from_pretrained(tmp_path, subfolder="vae").eval()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        latents = torch.cat([vae.encode(x[None, :, None]).latent_dist.mode() for x in images])
        decoded = torch.cat([vae.decode(z[None]).sample[:, :, 0] for z in latents])
    torch.testing.assert_close(coder.encode(images), (latents - 0.5) / 2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(coder.decode((latents - 0.5) / 2), decoded, rtol=1e-4, atol=1e-5)
    assert coder.shape(16) == coder.encode(images).shape[1:] == (4, 1, 8, 8)


def test_a_tiny_autoencoder_has_no_variance(tmp_path):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), scaling_factor=0.5,
    ).eval()  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    coder = Autoencoder(str(tmp_path), batch_size=2)
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(images).latents * 0.5
        decoded = vae.decode(latents / 0.5).sample
    torch.testing.assert_close(coder.encode(images), latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(coder.decode(latents), decoded, rtol=1e-4, atol=1e-5)
    assert coder.shape(16) == latents.shape[1:] == (4, 8, 8)
    (tmp_path / "vae/config.json").write_text('{"_class_name": "VQModel"}')
    with pytest.raises(UsageError, match="holds a VQModel; known are AutoencoderKL, AutoencoderTiny"):
        Autoencoder(str(tmp_path)).shape(16)
