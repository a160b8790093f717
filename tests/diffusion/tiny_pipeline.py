"""Pipelines of diffusers with random weights, small enough for tests, in the folders that published ones have."""

import json

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

WIDTH, TOKENS = 16, 8
RESOLUTION = 16  # latents 8 x 8


def autoencoder():
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=RESOLUTION,
        scaling_factor=0.5,
    )


def scheduler():
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def save_stable_diffusion(folder):
    torch.manual_seed(0)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    words = folder / "words"
    words.mkdir(parents=True)
    (words / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(words / "vocab.json"), str(words / "merges.txt"), model_max_length=TOKENS)
    text = CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=TOKENS, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=autoencoder(), text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet, scheduler=scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def save_pixart(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = ["<pad>", "</s>", "<unk>", "a", "cat", "dog", "red", "photo", "of"]
    model = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=120
    )
    text = T5EncoderModel(T5Config(vocab_size=len(words), d_model=WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=8,
        sample_size=8, caption_channels=WIDTH, use_additional_conditions=False,
    )  # fmt: skip
    PixArtAlphaPipeline(
        tokenizer=tokenizer, text_encoder=text, vae=autoencoder(), transformer=transformer, scheduler=scheduler()
    ).save_pretrained(folder)
