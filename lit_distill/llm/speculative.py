"""Interleaved sampling: the student writes, and the teacher replaces each token that it finds out of place."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from lit_distill.core.errors import UsageError, check_least
from lit_distill.llm.batch import TokenBatch
from lit_distill.llm.network import CausalLM, pad_left
from lit_distill.llm.reading import Reader, check_reading, resting
from lit_distill.llm.rollouts import Rollout, prompts_of, with_completions

if TYPE_CHECKING:
    from lit_distill.llm.distillation import TokenDistiller


class SpeculativeRollout(Rollout):
    """The student proposes each token; if it is not among the teacher's K likeliest, one of these is drawn instead.

    At K = 1 the completion is the teacher's greedy text, at K = V the student's own. The student proposes `draft`
    tokens at once, which the teacher judges in one pass. The first that it refuses is replaced by a draw from its own
    distribution over its K likeliest tokens, and what comes after that is proposed anew. Rows go on at their own pace:
    how well one does has no influence on another.

    Rows of the batch must hold one document each: what stands before the first scored token is the prompt.

    Args:
        k: K, the teacher's tokens that are let pass. All if it is more than there are.
        draft: Tokens that are proposed at once. It changes how long writing takes, not what is written.
        max_new_tokens: Longest completion.
        temperature: Of sampling, for both; the loss does not know it.

    Reference: Xu et al., Speculative Knowledge Distillation: Bridging the Teacher-Student Gap Through Interleaved
    Sampling, 2024, arXiv 2410.11325.
    """

    def __init__(self, k: int = 25, draft: int = 5, max_new_tokens: int = 128, temperature: float = 1.0) -> None:
        check_least("rollout", 1, k=k, draft=draft, max_new_tokens=max_new_tokens)
        if temperature <= 0:
            raise UsageError(f"rollout.temperature is {temperature}; it must be above 0")
        self.k = k
        self.draft = draft
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature

    def __call__(self, batch: TokenBatch, module: "TokenDistiller") -> TokenBatch:
        """Lets both write.

        Raises:
            UsageError: There is no teacher that runs, or its weights are sharded.
        """
        if module.teacher is None:
            raise UsageError("model.teacher is missing; speculative rollouts ask it while the student writes, give one")
        if isinstance(module.student, FSDPModule):
            raise UsageError(
                "rollout: speculative rollouts run on whole weights; train with --trainer.strategy ddp, or take "
                "lit_distill.llm.OnPolicy"
            )
        tokens, mask, _ = interleave(
            module.student,
            module.teacher,
            prompts_of(batch),
            k=self.k,
            draft=self.draft,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            vocab_size=module.vocab_size,
        )
        return with_completions(batch, tokens, mask, module)


@torch.no_grad()
def interleave(
    student: CausalLM,
    teacher: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    k: int,
    draft: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> tuple[Int[Tensor, "b n"], Bool[Tensor, "b n"], Bool[Tensor, "b n"]]:
    """Continues prompts by the student's tokens and the teacher's replacements, see `SpeculativeRollout`.

    Draws from torch's generator.

    Args:
        student: Proposes.
        teacher: Judges and replaces.
        prompts: Lists of tokens.
        k: The teacher's likeliest tokens, which pass.
        draft: Tokens that are proposed at once.
        max_new_tokens: Most tokens to add.
        temperature: Divides the logits of both before sampling.
        vocab_size: Tokens that may be written, those that both networks have; all of the student's if None.

    Returns:
        The tokens added (B, n), n = `max_new_tokens`; a mask that is True up to the first token that ends the answer,
        this one among them; and which of the tokens the teacher put there.

    Raises:
        UsageError: A prompt is empty or does not fit a context together with its answer; layers without attention to
            all that was written.
    """
    for network in (student, teacher):
        check_reading(network, max(map(len, prompts)) + max_new_tokens)
    vocab_size = student.vocab_size if vocab_size is None else vocab_size
    prompt, valid = (x.to(student.network.device) for x in pad_left(prompts))
    rows = torch.arange(len(prompt), device=prompt.device)
    ends = torch.tensor(_ends(student), dtype=torch.long, device=prompt.device)
    width = max_new_tokens + draft  # a row's last draft may stand over
    tokens, replaced = prompt.new_zeros(len(prompt), width), valid.new_zeros(len(prompt), width)
    count, done = rows.new_zeros(len(prompt)), valid.new_zeros(len(prompt))
    steps = torch.arange(draft, device=prompt.device)

    with resting(student), resting(teacher):
        # Both have read all but the last token. What was refused stays in their memory, where nothing looks at it:
        # so all rows' memories are of one length, however far each row has come.
        writers = [Reader(student), Reader(teacher)]
        seen, last = valid[:, :-1], prompt[:, -1:]
        if seen.shape[1]:
            for writer in writers:
                writer.read(prompt[:, :-1], seen, keep=1)
        while not bool(done.all()):
            given = [last]
            for step in range(draft):
                visible = torch.cat([seen, valid.new_ones(len(rows), step + 1)], 1)
                logits = writers[0].read(given[-1], visible)[:, -1, :vocab_size]
                given.append(torch.multinomial((logits.float() / temperature).softmax(-1), 1))
            proposed = torch.cat(given[1:], 1)
            visible = torch.cat([seen, valid.new_ones(len(rows), draft)], 1)
            judged = writers[1].read(torch.cat(given[:-1], 1), visible)[..., :vocab_size].float()
            passed = (judged > judged.gather(2, proposed[..., None])).sum(2) < k
            accepted = passed.long().cumprod(1).sum(1)  # the longest beginning that passes
            refused = accepted < draft
            place = accepted.clamp(max=draft - 1)
            instead = _draw_likely(judged[rows, place], k, temperature)
            proposed[rows, place] = torch.where(refused, instead, proposed[rows, place])
            # Behind a replaced token, what was proposed is written too, and written over in the next round.
            slots = (count[:, None] + steps).clamp(max=width - 1)
            tokens.scatter_(1, slots, torch.where(done[:, None], tokens.gather(1, slots), proposed))
            by_teacher = refused[:, None] & (steps == place[:, None])
            replaced.scatter_(1, slots, torch.where(done[:, None], replaced.gather(1, slots), by_teacher))
            seen = torch.cat([seen, steps <= place[:, None]], 1)
            last = proposed.gather(1, place[:, None])
            written = steps <= place[:, None]
            ended = (torch.isin(proposed, ends) & written).any(1)
            count = torch.where(done, count, count + place + 1)
            done = done | ended | (count >= max_new_tokens)

    tokens, replaced = tokens[:, :max_new_tokens], replaced[:, :max_new_tokens]
    closing = torch.isin(tokens, ends).int()
    inside = torch.arange(max_new_tokens, device=tokens.device) < count[:, None]
    return tokens, inside & (closing.cumsum(1) - closing == 0), replaced


def _draw_likely(logits: Float[Tensor, "b v"], k: int, temperature: float) -> Int[Tensor, " b"]:
    """Draws from the k likeliest tokens."""
    best, ids = logits.topk(min(k, logits.shape[1]))
    return ids.gather(1, torch.multinomial((best / temperature).softmax(-1), 1))[:, 0]


def _ends(network: CausalLM) -> list[int]:
    ends: Any = network.network.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
