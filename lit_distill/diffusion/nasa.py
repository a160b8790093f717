"""NASA: negative prompts for generators of few steps, by subtraction inside of cross-attention."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.diffusion.networks import Condition, call_network

_TOKENS = ("encoder_hidden_states", "encoder_attention_mask")  # what has one entry for each token of the text


class NASAAttnProcessor:
    r"""Attention of diffusers that subtracts what the negative prompt would have added.

    .. math:: Z = \text{softmax}(Q K_+^\top / \sqrt d) V_+ - a \, \text{softmax}(Q K_-^\top / \sqrt d) V_-

    Positive and negative tokens come as one text, the positive ones first (`with_negative`), so that the same layers
    project both. The difference is taken before the output layer.

    Attributes:
        scale: a, one for all or (B,). None leaves attention as it is, for text without negative tokens.

    Reference: Nguyen et al., SNOOPI: Supercharged One-step Diffusion Distillation with Proper Guidance, 2024, arXiv
    2412.02687.
    """

    def __init__(self) -> None:
        from diffusers.models.attention_processor import AttnProcessor2_0

        self.scale: float | Tensor | None = None
        self._plain = AttnProcessor2_0()

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "b queries width"],
        encoder_hidden_states: Float[Tensor, "b tokens text"] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Float[Tensor, "b queries width"]:
        """Computes the output of a layer; `attn` has its weights, the other words are diffusers'."""
        if self.scale is None or encoder_hidden_states is None:
            return self._plain(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        batch, tokens, _ = encoder_hidden_states.shape
        if tokens % 2:
            raise UsageError(f"NASA: {tokens} tokens are no positive and negative prompt; use with_negative")
        text = attn.norm_encoder_hidden_states(encoder_hidden_states) if attn.norm_cross else encoder_hidden_states

        def by_head(values: Tensor) -> Tensor:
            return values.view(batch, -1, attn.heads, values.shape[-1] // attn.heads).transpose(1, 2)

        query, key, value = by_head(attn.to_q(hidden_states)), by_head(attn.to_k(text)), by_head(attn.to_v(text))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        masks: tuple[Tensor | None, Tensor | None] = (None, None)
        if attention_mask is not None:
            mask = attn.prepare_attention_mask(attention_mask, tokens, batch)
            masks = mask.view(batch, attn.heads, -1, tokens).tensor_split(2, dim=-1)
        halves = zip(key.chunk(2, dim=2), value.chunk(2, dim=2), masks, strict=True)
        positive, negative = (F.scaled_dot_product_attention(query, k, v, attn_mask=mask) for k, v, mask in halves)
        scale = self.scale
        if isinstance(scale, Tensor):
            scale = scale.to(negative).reshape(-1, 1, 1, 1)
        out = (positive - scale * negative).transpose(1, 2).flatten(2)
        out = attn.to_out[1](attn.to_out[0](out))
        return (out + hidden_states if attn.residual_connection else out) / attn.rescale_output_factor


def install_nasa(network: nn.Module) -> NASAAttnProcessor:
    """Puts one processor into all cross-attention of a network; until its scale is set, nothing changes.

    Args:
        network: One of diffusers whose text is seen by cross-attention, such as UNet2DConditionModel or
            PixArtTransformer2DModel, or one that contains it.

    Raises:
        UsageError: It has no such layers. Where text and image attend to each other jointly (SD3, Flux) it has none.
    """
    from diffusers.models.attention_processor import Attention

    layers = [
        module
        for module in network.modules()
        if isinstance(module, Attention) and module.is_cross_attention and module.added_kv_proj_dim is None
    ]
    if not layers:
        raise UsageError(f"NASA: {type(network).__name__} has no cross-attention of diffusers; give one that has")
    processor = NASAAttnProcessor()
    for layer in layers:
        layer.set_processor(processor)  # type: ignore[arg-type]  # diffusers names its own classes alone
    return processor


@contextmanager
def subtracting(processor: NASAAttnProcessor, scale: float | Float[Tensor, " b"]) -> Iterator[None]:
    """Within it the network wants text `with_negative`, and subtracts `scale` times the negative part (NASA-I).

    A backward pass that computes activations anew belongs inside, too.
    """
    processor.scale = scale
    try:
        yield
    finally:
        processor.scale = None


def with_negative(condition: Condition, negative: Condition) -> Condition:
    """Puts what is wanted and what is not into one condition.

    Args:
        condition: Text by name, or class numbers (B,).
        negative: The same for what is not wanted.

    Returns:
        Text with the tokens of both, what is not by the token as in `condition`; or class numbers (B, 2).

    Raises:
        UsageError: One is text and the other is not.
    """
    if isinstance(condition, Mapping) and isinstance(negative, Mapping):
        return {
            name: torch.cat([value, negative[name]], dim=1) if name in _TOKENS else value
            for name, value in condition.items()
        }
    if isinstance(condition, Tensor) and isinstance(negative, Tensor):
        return torch.stack([condition, negative], dim=1)
    raise UsageError("NASA: positive and negative must both be text, or both class numbers")


class ClassTokens(nn.Module):
    """Gives class numbers to a network that is conditioned on text, as learned tokens.

    So small class-conditional generators have the cross-attention that negative prompts need.

    Args:
        network: Such as UNet2DConditionModel.
        num_classes: Classes; this number itself means no class.
        width: Width of its text (`cross_attention_dim`).
        tokens: Tokens of a class.
    """

    def __init__(self, network: nn.Module, num_classes: int, width: int, tokens: int = 2) -> None:
        super().__init__()
        self.network = network
        self.tokens = tokens
        self.classes = nn.Embedding(num_classes + 1, tokens * width)

    def forward(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """Computes the output (B, ...) for class numbers (B,), or (B, 2) for wanted and unwanted ones."""
        text = self.classes(condition).reshape(len(condition), self.tokens * (condition[:1].numel()), -1)
        return call_network(self.network, x, time, {"encoder_hidden_states": text})
