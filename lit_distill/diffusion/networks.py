"""How networks of several families are called: a sample, a time, a condition; the output has the sample's shape.

A network of ours is called as `network(x, time, condition)`. Those of diffusers have words of their own, and are known
by the name of their class.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.core.networks import import_class

Condition = Tensor | Mapping[str, Tensor] | None  # class numbers (B,), or what a text encoder gives, by name


def call_network(network: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    """Runs a network of any known family.

    Args:
        network: The network.
        x: (B, ...) its input.
        time: (B,) the time, in the network's own units, float32: bfloat16 would make 1000 of 999.
        condition: Class numbers (B,); or tensors by name, which are given to the network as its own keywords.

    Returns:
        (B, ...) the output, of the shape of `x`.
    """
    if isinstance(condition, Mapping):  # text is kept in float32 or less, whatever the network is in
        condition = {name: v.to(x.dtype) if v.is_floating_point() else v for name, v in condition.items()}
    call = _CALLS.get(type(network).__name__.removeprefix("FSDP"), _plain)  # FSDP2 puts this before the name
    return call(network, x, time, condition)


def diffusers_network(
    class_name: str,
    folder: str | None = None,
    subfolder: str | None = None,
    config: dict[str, Any] | None = None,
    dtype: str | None = None,
) -> nn.Module:
    """Makes a network of diffusers, from a folder or anew, for YAML.

    Args:
        class_name: Name of the class in diffusers, such as UNet2DConditionModel.
        folder: A pipeline's folder, or its name where it is in the local cache. Nothing is downloaded.
        subfolder: The network in it, such as "unet" or "transformer".
        config: Arguments of the class, for a network with random weights, in place of a folder.
        dtype: Type of the weights, such as "bfloat16"; as they come if None.

    Raises:
        UsageError: There is no such class or folder, or neither or both of folder and config are given.
    """
    if (folder is None) == (config is None):
        raise UsageError(f"network: {class_name} needs either a folder with weights or a config for random ones")
    made = import_class(f"diffusers.{class_name}")
    if config is not None:
        network = made(**config)
    else:
        try:
            network = made.from_pretrained(folder, subfolder=subfolder, local_files_only=True)
        except (OSError, ValueError) as error:
            place = folder if subfolder is None else f"{folder}/{subfolder}"
            raise UsageError(f"network: {place} is not on this machine; nothing is downloaded") from error
    return network if dtype is None else network.to(getattr(torch, dtype))


def _plain(network: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    return network(x, time.to(x.dtype), condition)


def _class_unet(network: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    return network(x, time, class_labels=condition, return_dict=False)[0]


def _class_transformer(network: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    out = network(x, timestep=time, class_labels=condition, return_dict=False)[0]
    return out[:, : x.shape[1]]  # some predict a variance too


def _text_unet(network: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    words = _keywords(network, condition)
    text = words.pop("encoder_hidden_states")
    # SDXL: pooled text and sizes travel in a mapping of their own.
    return network(x, time, encoder_hidden_states=text, added_cond_kwargs=words or None, return_dict=False)[0]


def _text_transformer(network: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    return network(hidden_states=x, timestep=time, return_dict=False, **_keywords(network, condition))[0]


def _pixart(network: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    # The variant for 1024 pixels alone asks for sizes of the image.
    added: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
    words = {"timestep": time, "added_cond_kwargs": added, "return_dict": False, **_keywords(network, condition)}
    return network(x, **words)[0][:, : x.shape[1]]  # it predicts a variance too


def _flux(network: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    # Flux sees squares of 2 x 2 latents as tokens, with their positions.
    b, c, h, w = x.shape
    tokens = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)
    words = _keywords(network, condition)
    config: Any = network.config
    if config.guidance_embeds != ("guidance" in words):
        given = "is missing" if config.guidance_embeds else "is given"
        raise UsageError(
            f"data.text.guidance {given}; Flux.1-dev is told a scale (3.5 in its pipeline), schnell is not"
        )
    rows, columns = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).to(x)
    text = torch.zeros(words["encoder_hidden_states"].shape[1], 3).to(x)
    out = network(hidden_states=tokens, timestep=time, img_ids=places, txt_ids=text, return_dict=False, **words)[0]
    return out.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def _lumina(network: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    # Lumina counts time from noise to data, so its velocity has the other sign. It counts the words of its mask.
    words = _keywords(network, condition)
    words["encoder_attention_mask"] = words["encoder_attention_mask"].bool()
    return -_text_transformer(network, x, 1 - time, words)


def _qwen(network: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    # Qwen-Image packs as Flux does, and knows positions by the sizes of the images.
    b, c, h, w = x.shape
    tokens = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)
    words = _keywords(network, condition)
    sizes = [[(1, h // 2, w // 2)]] * b
    out = network(hidden_states=tokens, timestep=time, img_shapes=sizes, return_dict=False, **words)[0]
    return out.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def _keywords(network: nn.Module, condition: Condition) -> dict[str, Tensor]:
    if not isinstance(condition, Mapping) or "encoder_hidden_states" not in condition:
        raise UsageError(
            f"data: {type(network).__name__} is conditioned on text, but the batch has none; give data with a text "
            "encoder (encoder_hidden_states)"
        )
    return dict(condition)


_CALLS: dict[str, Callable[[nn.Module, Tensor, Tensor, Condition], Tensor]] = {
    "UNet2DModel": _class_unet,
    "DiTTransformer2DModel": _class_transformer,
    "UNet2DConditionModel": _text_unet,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _text_transformer,
    "FluxTransformer2DModel": _flux,
    "Lumina2Transformer2DModel": _lumina,
    "QwenImageTransformer2DModel": _qwen,
    "WanTransformer3DModel": _text_transformer,
}

_PACKED = ("FluxTransformer2DModel", "QwenImageTransformer2DModel")  # four pixels are one token


def channels_of(network: nn.Module) -> int | None:
    """Returns how many channels samples must have, None where the network does not say."""
    channels: int | None = getattr(getattr(network, "config", None), "in_channels", None)
    return channels // 4 if channels is not None and type(network).__name__ in _PACKED else channels
