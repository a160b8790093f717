"""Head and loss of a language model, forward and backward: slices (`score_tokens`) against all logits at once.

    python benchmarks/llm_head.py [vocabulary] [loss ...]

Both sides have the same hidden states, heads and loss functions, so what differs is the way there; "trl" is TRL's tiled
divergence, where it is installed and has the loss. First the largest resident memory of one pass of 2,048 tokens beyond
its inputs, and its CPU time, each in a process of its own; then times of 512 tokens in turns, in one process, and how
far apart the two are. Vocabularies are SmolLM2's and Qwen's, or the one given. At Qwen's size all logits at once take 6
to 16 GB: they are measured with 512 tokens first, and where four times as much is not free, that is what is printed.
The second part is left out there.
"""

from timing import compare  # isort: skip  (before torch)

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_distill.llm.fused import score_tokens
from lit_distill.llm.losses import (
    adaptive_kl,
    forward_kl,
    generalized_jsd,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    taid,
    topk_kl,
    total_variation,
)
from lit_distill.llm.signals import HiddenSignal, Signal, TopK

TOKENS, TIMED_TOKENS, WIDTH = 2048, 512, 576
VOCABULARIES = {49_152: 0.25, 151_936: 0.10}  # and the share of memory wanted
ROUNDS, TARGET = 2, 1.15
SPARE = 1500  # MB that shall be left, of which inputs take a half
TIMED = 49_152  # largest vocabulary at which both are timed in turns
KEPT = 128  # tokens of a top-k target

LOSSES: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "generalized_jsd": generalized_jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "adaptive_kl": adaptive_kl,
    "total_variation": total_variation,
    "taid": partial(taid, t=0.5),
    "topk_kl": topk_kl,
}
TRL_BETA = {"forward_kl": 0.0, "generalized_jsd": 0.5, "reverse_kl": 1.0}

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def inputs(vocabulary: int, tokens: int) -> Inputs:
    """Hidden states and head of the student, and of the teacher."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(rows, WIDTH, generator=generator) for rows in (tokens, vocabulary, tokens, vocabulary)]
    for head in made[1::2]:
        head.div_(WIDTH**0.5)
    made[0].requires_grad_()
    made[1].requires_grad_()
    return tuple(made)  # type: ignore[return-value]  # four


def teacher(name: str, hidden: Tensor, weight: Tensor) -> Signal:
    """What the teacher says: its hidden states and head, or a few tokens as if they had been kept."""
    if name != "topk_kl":
        return HiddenSignal(hidden, weight)
    ids = torch.arange(len(hidden))[:, None] + torch.arange(KEPT) * (len(weight) // KEPT)  # no token twice in a row
    return TopK(ids % len(weight), hidden[:, :KEPT].log_softmax(-1) - 0.1)  # 0.9 of the probability


def dense(name: str, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    """All logits at once."""
    signal = teacher(name, teacher_hidden, teacher_weight)
    return LOSSES[name](hidden @ weight.T, signal[0 : len(hidden)]).sum() / TOKENS


def fused(name: str, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    """Ours."""
    labels = torch.zeros(len(hidden), dtype=torch.long)
    terms = {name: (lambda student, target, _: LOSSES[name](student, target), 1.0)}
    signal = teacher(name, teacher_hidden, teacher_weight)
    return score_tokens(hidden, weight, labels, signal, terms, scale=1 / TOKENS)[0]


def trl(name: str, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    """TRL's, on tiles of tokens and vocabulary."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    found, _ = ChunkedDivergenceFunction.apply(
        hidden, weight, None, teacher_hidden, teacher_weight, None, TRL_BETA[name]
    )
    return found.sum() / TOKENS


SIDES = {"dense": dense, "fused": fused, "trl": trl}


def sides(name: str) -> list[str]:
    """Which sides have the loss."""
    try:
        import trl.kernels.chunked_divergence  # noqa: F401
    except ImportError:
        return ["dense", "fused"]
    return ["dense", "fused", "trl"] if name in TRL_BETA else ["dense", "fused"]


def one_pass(side: str, name: str, made: Inputs) -> Tensor:
    """Forward and backward; returns the loss, and leaves gradients."""
    made[0].grad = made[1].grad = None
    loss = SIDES[side](name, *made)
    loss.backward()
    return loss.detach()


def report_peak(side: str, name: str, vocabulary: int, tokens: int) -> None:
    """Prints the MB that a pass takes beyond its inputs, and its seconds; for a process of its own."""
    made = inputs(vocabulary, tokens)
    if side == "trl":
        sides(name)  # imported before the count begins
    before, start = most_resident(), time.process_time()
    one_pass(side, name, made)
    print(most_resident() - before, time.process_time() - start)


def most_resident() -> float:
    """The most memory that this process has had, in MB."""
    # Not from getrusage: there a process begins with what its parent had.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def peak(side: str, name: str, vocabulary: int, tokens: int) -> list[float]:
    """Starts that process, and scales what it found up to all tokens."""
    command = [sys.executable, __file__, "--peak", side, name, str(vocabulary), str(tokens)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [float(number) * TOKENS / tokens for number in printed.split()]


def available() -> float:
    """Memory that is free, in MB."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 1024


def report(name: str, vocabulary: int) -> None:
    """Prints memory, equality and times."""
    print(f"\n{name}, {TOKENS} tokens, vocabulary {vocabulary}", flush=True)
    tokens = dict.fromkeys(sides(name), TOKENS)
    if vocabulary > TIMED and peak("dense", name, vocabulary, TIMED_TOKENS)[0] + SPARE > available():
        tokens["dense"] = TIMED_TOKENS
    peaks = {side: peak(side, name, vocabulary, tokens[side]) for side in tokens}
    for side, (size, seconds) in peaks.items():
        target = f"target {VOCABULARIES.get(vocabulary, '')}" if side == "fused" else ""
        note = f" (from {tokens[side]} tokens)" if tokens[side] < TOKENS else ""
        most, longest = peaks["dense"]
        print(f"{side:<8}{size:>8.0f} MB {size / most:>7.3f}, CPU {seconds / longest:>6.3f} {target}{note}", flush=True)

    if vocabulary > TIMED:
        return
    made = inputs(vocabulary, TIMED_TOKENS)
    found: dict[str, list[Any]] = {}

    def run(side: str) -> None:
        found[side] = [one_pass(side, name, made), made[0].grad, made[1].grad]

    compare({side: partial(run, side) for side in tokens}, "dense", ROUNDS, 0, "pass", fused=TARGET)
    for side in [side for side in tokens if side != "dense"]:
        apart = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found[side], found["dense"], strict=True)]
        print(f"{side} to dense: loss {apart[0]:.1e}, gradients {apart[1]:.1e}, {apart[2]:.1e} of the largest")


def main() -> None:
    """Prints a table for each vocabulary and loss."""
    if sys.argv[1:2] == ["--peak"]:
        report_peak(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
        return
    sizes = [int(x) for x in sys.argv[1:] if x.isdigit()] or list(VOCABULARIES)
    for vocabulary in sizes:
        for name in [x for x in sys.argv[1:] if not x.isdigit()] or LOSSES:
            report(name, vocabulary)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
