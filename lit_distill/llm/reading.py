"""Reading text step by step, with the memory of keys and values: what sampling by two networks at once is made of."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lit_distill.core.errors import UsageError
from lit_distill.llm.network import CausalLM


class Reader:
    """A network with its memory of keys and values."""

    def __init__(self, network: CausalLM) -> None:
        from transformers import DynamicCache

        self._network = network.network
        self._memory = DynamicCache()

    @torch.no_grad()
    def read(self, tokens: Int[Tensor, "b m"], visible: Bool[Tensor, "b l"], keep: int = 0) -> Float[Tensor, "b k v"]:
        """Reads some tokens more, and returns logits behind each.

        Args:
            tokens: (B, M).
            visible: (B, L) which tokens of the memory, these at its end, are part of the text.
            keep: How many tokens, the last ones, logits are wanted for; 0 for all.
        """
        positions = (visible.long().cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        return self._network(
            input_ids=tokens,
            attention_mask=visible.long(),
            position_ids=positions,
            past_key_values=self._memory,
            use_cache=True,
            logits_to_keep=keep,
        ).logits


def check_reading(network: CausalLM, length: int) -> None:
    """Checks that a network can read so many tokens step by step.

    Raises:
        UsageError: They are more than its context, or it has layers without attention to all that was written.
    """
    config = network.text_config
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and length > context:
        raise UsageError(
            f"rollout.max_new_tokens: a prompt and its answer come to {length} tokens, more than the context of "
            f"{context}; lower it, or data.max_length"
        )
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        raise UsageError(
            f"rollout: layers of {config.model_type} are {', '.join(sorted(kinds))}, and rollouts in which both "
            "networks write want attention to all that was written; take lit_distill.llm.OnPolicy"
        )


@contextmanager
def resting(network: CausalLM) -> Iterator[None]:
    """Puts a network into eval mode: no dropout, and no checkpoints of activations, which would forbid the memory."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
