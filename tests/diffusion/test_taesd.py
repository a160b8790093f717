"""TAEF2, with random weights and, where they are at hand, its own; and a teacher on its latents."""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_image
from torch import nn

from lit_distill.cli import main
from lit_distill.core.errors import UsageError
from lit_distill.diffusion import TAEF2
from lit_distill.diffusion.taesd import Block, decoder, encoder

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared/models/taef2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("taef2")
    torch.manual_seed(0)
    save_file(encoder().state_dict(), folder / "encoder.safetensors")
    save_file(decoder().state_dict(), folder / "decoder.safetensors")
    return folder


def test_parts_are_those_of_the_published_files():
    states = encoder().state_dict(), decoder().state_dict()
    counts = [sum(weight.numel() for weight in state.values()) for state in states]
    assert counts == [1_338_528, 1_338_499]
    pooled = [{int(key.split(".")[0]) for key in state if ".pool." in key} for state in states]
    assert pooled == [{11, 12, 13}, {3, 4, 5}]
    assert "2.bias" not in states[0]
    assert "7.bias" not in states[1]


def test_a_block_is_what_it_is_by_hand():
    torch.manual_seed(0)
    block, x = Block(pooled=True), torch.randn(2, 64, 3, 3)
    with torch.no_grad():
        first, _, _, last = block.pool
        wide = F.conv2d(x, first.weight).view(2, 4, -1)  # four groups of 64 channels
        wide = (wide - wide.mean(2, keepdim=True)) / (wide.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
        inner = x + F.conv2d(wide.view(2, 256, 3, 3).clamp(min=0), last.weight)
        found = inner
        for number in (0, 2, 4):
            conv = block.conv[number]
            found = F.conv2d(found if number == 0 else found.clamp(min=0), conv.weight, conv.bias, padding=1)
        torch.testing.assert_close(block(x), (found + inner).clamp(min=0), rtol=1e-4, atol=1e-5)


def test_the_decoder_clamps_softly_and_repeats_pixels():
    layers = decoder()
    assert layers[0](torch.tensor([0.0, 3.0, -300.0])).tolist() == pytest.approx([0.0, 3 * np.tanh(1.0), -3.0])
    wider = [layer for layer in layers if isinstance(layer, nn.Upsample)]
    assert len(wider) == 3
    assert wider[0](torch.tensor([[[[1.0, 2.0]]]])).tolist() == [[[[1.0, 1.0, 2.0, 2.0]] * 2]]


def test_images_in_minus_one_to_one_become_latents_of_an_eighth_and_back(folder):
    coder, images = TAEF2(str(folder), batch_size=2), torch.rand(3, 3, 16, 24) * 2 - 1
    plain = encoder()
    plain.load_state_dict(load_file(folder / "encoder.safetensors"))
    latents = coder.encode(images)
    with torch.no_grad():
        torch.testing.assert_close(latents, plain((images + 1) / 2))  # pixels in [0, 1] are what it was made for
    assert latents.shape == (3, 32, 2, 3)
    assert coder.shape(32) == (32, 4, 4)
    plain = decoder()
    plain.load_state_dict(load_file(folder / "decoder.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(coder.decode(latents), 2 * plain(latents) - 1)
    with pytest.raises(UsageError, match=r"30 pixels do not fit .* give a multiple of 8"):
        coder.shape(30)


def test_a_folder_without_it_is_told(tmp_path, folder):
    with pytest.raises(UsageError, match=r"data\.autoencoder: \S+ has no encoder\.safetensors on this machine"):
        TAEF2(str(tmp_path)).encode(torch.zeros(1, 3, 8, 8))
    save_file(decoder().state_dict(), tmp_path / "encoder.safetensors")
    with pytest.raises(UsageError, match=r"encoder\.safetensors does not fit Sequential: 0\.weight is missing"):
        TAEF2(str(tmp_path)).encode(torch.zeros(1, 3, 8, 8))


@pytest.mark.skipif(not REAL.is_dir(), reason="the weights of TAEF2 are not at hand")
@pytest.mark.parametrize(("name", "published"), [("china.jpg", 26.5), ("flower.jpg", 31.4)])
def test_the_published_weights_give_photographs_back(name, published):
    image = Image.fromarray(load_sample_image(name))
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    image = image.crop((left, top, left + side, top + side)).resize((256, 256), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255
    coder = TAEF2(str(REAL))
    latents = coder.encode(2 * pixels - 1)
    again = (coder.decode(latents) / 2 + 0.5).clamp(0, 1)
    assert -10 * (again - pixels).square().mean().log10().item() == pytest.approx(published, abs=0.2)
    assert latents.std().item() == pytest.approx(0.8, abs=0.15)


def save_images(file):
    """An archive of noise in the format of CIFAR-10."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels.reshape(-1, 32, 3)).save(buffer, format="WEBP", lossless=True)
    strip = np.frombuffer(buffer.getvalue(), np.uint8)
    content = {"classes": np.array([f"class {k}" for k in range(10)])}
    for split in ("train", "test"):
        content[f"{split}_webp"], content[f"{split}_offsets"] = strip, np.array([0, len(strip)])
        content[f"{split}_labels"] = (np.arange(60) % 10).astype(np.uint8)
    np.savez(file, **content)


def test_a_flow_teacher_is_trained_on_its_latents(folder, tmp_path):
    weights = REAL if REAL.is_dir() else folder
    save_images(tmp_path / "cifar10.npz")
    words = [
        "fit",
        "-c",
        str(ROOT / "configs/trainer/cpu.yaml"),
        "-c",
        str(ROOT / "configs/diffusion/denoising_latents.yaml"),
    ]
    words += [f"--data.init_args.source.init_args.root={tmp_path}", "--data.init_args.source.init_args.val_size=20"]
    words += [f"--data.init_args.autoencoder.init_args.folder={weights}", "--data.init_args.batch_size=8"]
    words += ["--data.init_args.epoch_batches=3", "--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1"]
    words += [f"--model.init_args.evaluation.{key}=20" for key in ("samples", "val_samples", "real_samples")]
    words += [f"--run.root={tmp_path}", "--run.name=x", "--trainer.enable_progress_bar=false"]
    assert main(words) == 0
    run = tmp_path / "default/x"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["metrics"]["test/nfe"] == 25
    with Image.open(run / summary["panels"]["samples"]["file"]) as picture:
        assert picture.width % 32 < 12  # pixels, not latents of 4 x 4
    assert load_file(run / "student/model.safetensors")["network.last.weight"].any()
