"""A batch of token rows, and which of their tokens are scored."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor


@dataclass
class PairedTokens:
    """Rows once more in the tokens of a teacher that has another tokenizer, and which tokens cover the same text.

    A group is one or several scored tokens of the student one after another, and the teacher's for the same text.

    Attributes:
        input_ids: (B, T') tokens, with the documents of the student's rows in the same rows.
        position_ids: (B, T') place in the document, as in `TokenBatch`.
        scored: (M,) flat positions whose hidden state predicts a token of a group.
        targets: (M,) these tokens, group after group.
        begins: (G,) the first of the student's scored tokens in each group, rising.
        sizes: (G,) the number of its student tokens.
        teacher_sizes: (G,) the number of its teacher tokens; they sum to M.
        runs: (G,) equal where groups follow one another without a token between them.
    """

    input_ids: Int[Tensor, "b t"]
    position_ids: Int[Tensor, "b t"]
    scored: Int[Tensor, " m"]
    targets: Int[Tensor, " m"]
    begins: Int[Tensor, " g"]
    sizes: Int[Tensor, " g"]
    teacher_sizes: Int[Tensor, " g"]
    runs: Int[Tensor, " g"]

    def by_index(self) -> "PairedTokens":
        """Pairs tokens by number: in each run the first with the first, and so on until one side has no more."""
        _, counts = self.runs.unique_consecutive(return_counts=True)
        first = counts.cumsum(0) - counts
        run = torch.arange(len(counts)).repeat_interleave(counts)
        ours, theirs = (torch.zeros_like(counts).index_add(0, run, sizes) for sizes in (self.sizes, self.teacher_sizes))
        pairs = torch.minimum(ours, theirs)
        within = torch.arange(int(pairs.sum())) - (pairs.cumsum(0) - pairs).repeat_interleave(pairs)
        teacher = (self.teacher_sizes.cumsum(0) - self.teacher_sizes)[first].repeat_interleave(pairs) + within
        ones = torch.ones_like(within)
        return PairedTokens(
            self.input_ids,
            self.position_ids,
            self.scored[teacher],
            self.targets[teacher],
            begins=self.begins[first].repeat_interleave(pairs) + within,
            sizes=ones,
            teacher_sizes=ones,
            runs=self.runs[first].repeat_interleave(pairs),
        )


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
        paired: The same rows in the teacher's tokens, if the data were asked for them.
    """

    input_ids: Int[Tensor, "b t"]
    position_ids: Int[Tensor, "b t"]
    scored: Int[Tensor, " n"]
    targets: Int[Tensor, " n"]
    index: Int[Tensor, " b"]
    total: int
    paired: PairedTokens | None = None

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.input_ids)

    def to(self, device: torch.device | str, **_options: Any) -> "TokenBatch":
        """Returns the batch on a device, all but `index`. Lightning calls this."""
        names = ("input_ids", "position_ids", "scored", "targets")
        moved: dict[str, Any] = {name: sent(getattr(self, name), torch.device(device)) for name in names}
        return replace(self, **moved, paired=move_data_to_device(self.paired, torch.device(device)))

    def take(self, rows: Int[Tensor, " r"], total: int) -> tuple["TokenBatch", Bool[Tensor, " n"]]:
        """Takes some of the rows.

        Args:
            rows: (R,) their places, rising.
            total: Scored tokens in the optimizer step that they make.

        Returns:
            The rows, and which of the scored tokens (N,) are theirs.
        """
        length = self.input_ids.shape[1]
        owner = self.scored // length
        kept = torch.isin(owner, rows)
        scored = torch.searchsorted(rows, owner[kept]) * length + self.scored[kept] % length
        return TokenBatch(
            self.input_ids[rows],
            self.position_ids[rows],
            scored,
            self.targets[kept],
            self.index[rows.to(self.index.device)],
            total,
        ), kept


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor to a device, and does not wait until it is there: a GPU fetches page-locked memory by itself."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
