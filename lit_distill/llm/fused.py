"""Head and losses in one: slices of tokens go through both, and logits of all tokens never exist."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


@runtime_checkable
class Sliced(Protocol):
    """What token losses are told beside logits and labels, of N tokens: a teacher's signal, or facts about samples."""

    def __getitem__(self, rows: slice, /) -> Any:
        """Returns what is known of some tokens."""


TokenLoss = Callable[[Tensor, Any, Tensor], Tensor]
"""(student_logits (n, V), target, labels (n,)) -> (n,); the target is a slice of the signal, or None without one."""

Terms = dict[str, tuple[TokenLoss, float]]
"""Token losses by name, with their weights."""

# Just above 32 MiB, from where on glibc gives each block back as soon as it is free: below, a pass takes half as much
# memory again and more, for what lies between blocks. Larger slices cost memory and were not reliably faster.
SLICE_BYTES = 33 * 2**20


def slices(tokens: int, vocabulary: int, chunk: int | None = None) -> Iterator[slice]:
    """Cuts tokens into slices whose logits are small.

    Args:
        tokens: How many there are; may be 0.
        vocabulary: Logits of each.
        chunk: Tokens in a slice. By default as many as make 33 MiB of logits in float32.

    Yields:
        Slices of rows, in order.
    """
    chunk = chunk or max(1, SLICE_BYTES // (4 * vocabulary))
    for start in range(0, tokens, chunk):
        yield slice(start, start + chunk)


def score_tokens(
    hidden: Float[Tensor, "n h"],
    weight: Float[Tensor, "v h"],
    labels: Int[Tensor, " n"],
    signal: Sliced | None,
    terms: Mapping[str, tuple[TokenLoss, float]],
    *,
    scale: float,
    chunk: int | None = None,
    parts: Iterable[slice] | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Computes token losses from hidden states, and their gradients in the same pass.

    The upstream gradient of a sum is one number, so that each slice of logits can be differentiated while it is there:
    nothing is computed twice, and any loss that autograd can differentiate will do. What remains in memory is the
    gradient of the head. The gradients are scaled in place in the backward pass, so it can run once only.

    Matrix products are in the type of the hidden states, or autocast's; losses see float32 (or float64), and the
    gradient of the head is summed in it.

    Args:
        hidden: (N, H) of the scored tokens; N may be 0.
        weight: (V, H) the head. If it is frozen, its gradient costs nothing.
        labels: (N,) tokens that are predicted.
        signal: What the teacher said about these N tokens, or what else losses want to know of them; None for losses
            that need labels alone.
        terms: Token losses by name, with weights. One of weight 0 is only reported.
        scale: Factor in front of all sums, such as 1 / tokens in the step.
        chunk: Tokens in a slice, see `slices`. In resident memory a pass takes some 7 (forward KL) to 13 (adaptive
            KL) times a slice's logits.
        parts: Slices of all tokens, in order, instead of those of `slices`: for losses of several tokens together.

    Returns:
        The weighted sum of all terms, scalar; and the sum over tokens of each, with `scale` but without its weight.
    """
    wants = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
    dtype, exact = _types(hidden)
    head = weight.detach().to(dtype)
    grad_hidden = torch.zeros_like(hidden, requires_grad=False) if wants[0] else None
    grad_weight = torch.zeros(weight.shape, dtype=exact, device=weight.device) if wants[1] else None
    sums = {name: torch.zeros((), dtype=exact, device=hidden.device) for name in terms}
    for rows in slices(len(hidden), len(weight), chunk) if parts is None else parts:
        states = hidden[rows].detach().to(dtype)
        with torch.no_grad():
            logits = F.linear(states, head).to(exact).requires_grad_(any(wants))
            target = None if signal is None else signal[rows]
        for name, (loss, factor) in terms.items():
            with torch.set_grad_enabled(any(wants) and factor != 0):
                value = loss(logits, target, labels[rows]).sum() * scale
            sums[name] += value.detach()
            if value.requires_grad:
                (value * factor).backward(inputs=[logits])
        if logits.grad is not None:
            grad_logits = logits.grad.to(dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ head
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits, states)
            del grad_logits
        del logits, target, value  # or they would still be there while those of the next slice are made
    total = torch.stack([factor * sums[name] for name, (_, factor) in terms.items()]).sum()
    if any(wants):
        total = _WithGradients.apply(total, hidden, weight, grad_hidden, grad_weight)
    return total, sums


@torch.no_grad()
def label_logprobs(
    hidden: Float[Tensor, "n h"], weight: Float[Tensor, "v h"], labels: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Computes log-probabilities of tokens, slice by slice, from the same logits as `score_tokens`.

    Args:
        hidden: (N, H).
        weight: (V, H) the head.
        labels: (N,) tokens.

    Returns:
        (N,), without a gradient.
    """
    dtype, exact = _types(hidden)
    head = weight.to(dtype)
    found = torch.empty(len(labels), dtype=exact, device=hidden.device)
    for rows in slices(len(labels), len(weight)):
        logits = F.linear(hidden[rows].to(dtype), head).to(exact)
        found[rows] = -F.cross_entropy(logits, labels[rows], reduction="none")
    return found


def _types(hidden: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Returns the types of products with the head, and of losses."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return dtype, torch.promote_types(dtype, torch.float32)


def _add_product(total: Tensor, grad_logits: Tensor, states: Tensor) -> None:
    """Adds a slice's share to the gradient of the head."""
    if total.dtype == states.dtype:
        total.addmm_(grad_logits.T, states)
    else:  # addmm_ takes no mixture of types; the product sums in float32 inside, and is rounded once
        total += grad_logits.T @ states


class _WithGradients(torch.autograd.Function):
    """Gives a number the gradients that are known already."""

    @staticmethod
    def forward(
        ctx: Any,
        total: Tensor,
        hidden: Tensor,
        weight: Tensor,
        grad_hidden: Tensor | None,
        grad_weight: Tensor | None,
    ) -> Tensor:
        """Keeps the gradients."""
        # Not by save_for_backward: what holds on to them is why autograd would copy them into `.grad`.
        ctx.gradients = grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Scales them in place and lets go of them: a copy of the head's would be the largest tensor of all."""
        if ctx.gradients is None:
            raise RuntimeError("score_tokens: gradients are used up by one backward pass; compute the loss again")
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        for grad in (grad_hidden, grad_weight):
            if grad is not None:
                grad.mul_(upstream)
        return None, grad_hidden, grad_weight, None, None
