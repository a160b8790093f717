"""Choosing among given answers: the one that a language model finds likeliest, token by token."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lit_distill.llm.fused import slices
from lit_distill.llm.losses import cross_entropy, forward_kl
from lit_distill.llm.signals import HiddenSignal


@torch.no_grad()
def answer_facts(
    hidden: Float[Tensor, "n h"], weight: Float[Tensor, "v h"], labels: Int[Tensor, " n"], signal: HiddenSignal | None
) -> dict[str, Tensor]:
    """Computes facts about each token, slice by slice.

    Args:
        hidden: (N, H) hidden states.
        weight: (V, H) the head.
        labels: (N,) the next token, -100 where it is not of an answer.
        signal: What the same model said with the demonstrations.

    Returns:
        (N,) each: "ce" in nats, 0 where there is no label; with a signal "kl" = KL(signal || hidden).
    """
    rows: list[dict[str, Tensor]] = []
    for part in slices(len(labels), len(weight)):
        logits = F.linear(hidden[part], weight.to(hidden.dtype)).float()
        facts = {"ce": cross_entropy(logits, labels[part])}
        if signal is not None:
            facts["kl"] = forward_kl(logits, signal[part])
        rows.append(facts)
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def row_means(
    values: Float[Tensor, " n"], row: Int[Tensor, " n"], counted: Bool[Tensor, " n"], rows: int
) -> Float[Tensor, " b"]:
    """Returns the mean of each row's values that count: length-normalized losses of answers.

    Args:
        values: (N,).
        row: (N,) the row of each value.
        counted: (N,) which of them count.
        rows: B.
    """
    sums = values.new_zeros(rows).index_add(0, row, values * counted)
    return sums / torch.bincount(row[counted], minlength=rows).clamp(min=1)


class OptionAccuracy(Metric):
    """Share of questions of which the right option has the least loss. Options that tie share the question."""

    full_state_update = False
    higher_is_better = True
    losses: list[Tensor]
    questions: list[Tensor]
    right: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("losses", "questions", "right"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, losses: Float[Tensor, " b"], questions: Int[Tensor, " b"], right: Bool[Tensor, " b"]) -> None:
        """Adds options: their losses, which question they belong to, whether they are right."""
        self.losses.append(losses)
        self.questions.append(questions)
        self.right.append(right)

    def has_options(self) -> bool:
        """Says whether there are other options than the right ones, here."""
        return any(not bool(right.all()) for right in self.right)

    def compute(self) -> Tensor:
        """Returns the share."""
        losses, right = dim_zero_cat(self.losses), dim_zero_cat(self.right).to(torch.float32)
        found, question = dim_zero_cat(self.questions).unique(return_inverse=True)
        least = losses.new_full((len(found),), torch.inf).scatter_reduce(0, question, losses, "amin")
        chosen = (losses == least[question]).to(torch.float32)
        zeros = chosen.new_zeros(len(found))
        hits = zeros.index_add(0, question, chosen * right) / zeros.index_add(0, question, chosen)
        return hits.mean()
