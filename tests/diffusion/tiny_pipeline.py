"""Pipelines of diffusers with random weights, small enough for tests, in the folders that published ones have."""

import json

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

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


def clip_tokenizer(folder):
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    words = folder / "words"
    words.mkdir(parents=True)
    (words / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(words / "vocab.json"), str(words / "merges.txt"), model_max_length=TOKENS)


def clip_config(width=WIDTH, projection=WIDTH):
    return CLIPTextConfig(
        vocab_size=54, hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=TOKENS, bos_token_id=52, eos_token_id=53, pad_token_id=53, projection_dim=projection,
    )  # fmt: skip


def save_stable_diffusion(folder):
    torch.manual_seed(0)
    tokenizer, text = clip_tokenizer(folder), clip_config()
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=autoencoder(), text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet, scheduler=scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def save_sdxl(folder):
    torch.manual_seed(0)
    tokenizer = clip_tokenizer(folder)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH + 8, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 12,
    )  # fmt: skip
    StableDiffusionXLPipeline(
        vae=autoencoder(), text_encoder=CLIPTextModel(clip_config()), tokenizer=tokenizer, tokenizer_2=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip_config(8, 12)), unet=unet, scheduler=scheduler(),
    ).save_pretrained(folder)  # fmt: skip


def save_sd3(folder):
    torch.manual_seed(0)
    tokenizer, third = clip_tokenizer(folder), t5_tokenizer(512)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=WIDTH * 2, pooled_projection_dim=20,
    )  # fmt: skip
    nn.init.normal_(transformer.proj_out.weight, std=0.2)
    StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), autoencoder(),
        CLIPTextModelWithProjection(clip_config(WIDTH, 12)), tokenizer,
        CLIPTextModelWithProjection(clip_config(8, 8)), tokenizer, t5_encoder(third, WIDTH * 2), third,
    ).save_pretrained(folder)  # fmt: skip


def save_wan(folder):
    torch.manual_seed(0)
    tokenizer, width = t5_tokenizer(512), WIDTH
    text = UMT5EncoderModel(
        UMT5Config(vocab_size=tokenizer.vocab_size, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False], latents_mean=[0.5] * 4,
        latents_std=[2.0] * 4, scale_factor_spatial=2,
    )  # fmt: skip
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=width, freq_dim=8,
        ffn_dim=16, num_layers=1,
    )  # fmt: skip
    WanPipeline(
        tokenizer, text, vae, FlowMatchEulerDiscreteScheduler(shift=3.0), transformer=transformer
    ).save_pretrained(folder)


def save_flux(folder, guidance_embeds=True):
    torch.manual_seed(0)
    tokenizer, second = clip_tokenizer(folder), t5_tokenizer(512)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=12, guidance_embeds=guidance_embeds, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    nn.init.normal_(transformer.proj_out.weight, std=0.2)
    FluxPipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0), autoencoder(), CLIPTextModel(clip_config(12)), tokenizer,
        t5_encoder(second, WIDTH), second, transformer,
    ).save_pretrained(folder)  # fmt: skip


def save_lumina(folder):
    torch.manual_seed(0)
    tokenizer = t5_tokenizer(256)
    text = Gemma2Model(
        Gemma2Config(
            vocab_size=tokenizer.vocab_size, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        )
    )  # fmt: skip
    transformer = Lumina2Transformer2DModel(
        in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1,
        multiple_of=8, axes_dim_rope=(4, 4, 4), axes_lens=(300, 32, 32), cap_feat_dim=WIDTH, sample_size=8,
    )  # fmt: skip
    for parameter in transformer.parameters():
        if parameter.ndim > 1:  # some begin at zero
            nn.init.normal_(parameter, std=0.2)
    Lumina2Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(shift=6.0), autoencoder(), text, tokenizer
    ).save_pretrained(folder)


def t5_encoder(tokenizer, width):
    size = tokenizer.vocab_size
    return T5EncoderModel(T5Config(vocab_size=size, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def t5_tokenizer(length):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", "a", "cat", "dog", "red", "photo", "of"]
    model = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )


def save_pixart(folder):
    torch.manual_seed(0)
    tokenizer = t5_tokenizer(120)
    text = t5_encoder(tokenizer, WIDTH)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=8,
        sample_size=8, caption_channels=WIDTH, use_additional_conditions=False,
    )  # fmt: skip
    PixArtAlphaPipeline(
        tokenizer=tokenizer, text_encoder=text, vae=autoencoder(), transformer=transformer, scheduler=scheduler()
    ).save_pretrained(folder)
