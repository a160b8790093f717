"""Texts that were sampled, with what a policy gradient has to know of each token."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from lit_distill.llm.batch import TokenBatch
from lit_distill.llm.signals import HiddenSignal


@dataclass
class Experience:
    """Texts that were sampled, and what is known of each token from then on.

    Attributes:
        batch: The texts, N sampled tokens.
        teacher: What the teacher says of them.
        logprobs: (N,) of the tokens, for the student that sampled them.
        advantages: (N,).
        weights: (N,) importance weights.
    """

    batch: TokenBatch
    teacher: HiddenSignal
    logprobs: Float[Tensor, " n"]
    advantages: Float[Tensor, " n"]
    weights: Float[Tensor, " n"]

    def take(self, rows: Tensor, total: int) -> "Experience":
        """Takes some of the texts, see `TokenBatch.take`."""
        batch, kept = self.batch.take(rows, total)
        teacher = HiddenSignal(self.teacher.hidden[kept], self.teacher.weight)
        return Experience(batch, teacher, self.logprobs[kept], self.advantages[kept], self.weights[kept])

    def __getitem__(self, rows: slice) -> "Moment":
        """Cuts out some tokens, for a token loss."""
        return Moment(self.teacher, rows, self.logprobs[rows], self.advantages[rows], self.weights[rows])


@dataclass
class Moment:
    """A slice of `Experience`; the teacher's logits of it are made if they are asked for."""

    teacher: HiddenSignal
    rows: slice
    logprobs: Float[Tensor, " n"]
    advantages: Float[Tensor, " n"]
    weights: Float[Tensor, " n"]

    @property
    def logits(self) -> Float[Tensor, "n v"]:
        """The teacher's logits."""
        return self.teacher[self.rows]
