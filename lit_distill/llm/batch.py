"""A batch of token rows, and which of their tokens are scored."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass
class TokenBatch:
    """Rows of tokens, padded on the right; a row may hold several documents one after another.

    Attributes:
        input_ids: (B, T) tokens.
        position_ids: (B, T) place in the document; a new document starts at 0. Padding counts on, so that rows of one
            document are plain rows to attention.
        scored: (N,) flat positions `b * T + i` whose hidden state predicts a token that counts: the shift by one is
            done here, and never crosses from one document into the next.
        targets: (N,) the tokens they predict.
        index: (B,) numbers of the rows among all rows, by which a teacher's outputs are stored. They stay in the main
            memory, where these are looked up: to read them from a device would be to wait for all it has still to do.
        total: Scored tokens in the whole optimizer step: of all processes, and of all batches whose gradients are
            accumulated. A loss is a sum over tokens, divided by this; so it is the same however a step is cut up.
    """

    input_ids: Int[Tensor, "b t"]
    position_ids: Int[Tensor, "b t"]
    scored: Int[Tensor, " n"]
    targets: Int[Tensor, " n"]
    index: Int[Tensor, " b"]
    total: int

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.input_ids)

    def to(self, device: torch.device | str, **_options: Any) -> "TokenBatch":
        """Returns the batch on a device, all but `index`. Lightning calls this."""
        names = ("input_ids", "position_ids", "scored", "targets")
        moved: dict[str, Any] = {name: sent(getattr(self, name), torch.device(device)) for name in names}
        return replace(self, **moved)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor to a device, and does not wait until it is there: a GPU fetches page-locked memory by itself."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
