"""Distillation from a teacher that has another tokenizer: ULD and GOLD."""

from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lit_distill.core.errors import UsageError
from lit_distill.core.reference import Reference
from lit_distill.llm.batch import TokenBatch
from lit_distill.llm.data.alignment import token_texts
from lit_distill.llm.distillation import TokenDistiller, check_tokenizer
from lit_distill.llm.evaluation import TokenMetrics, token_facts
from lit_distill.llm.fused import Terms, score_tokens
from lit_distill.llm.network import CausalLM
from lit_distill.llm.pairing import MergedGroups, PairedSignal, PairedTeacher, prepare
from lit_distill.llm.signals import Signal
from lit_distill.llm.teachers import OnlineTeacher
from lit_distill.llm.vocabularies import TokenMatch, gold, match_tokens, merge_groups, sorted_l1


class ULD(TokenDistiller):
    r"""Universal logit distillation: probabilities are compared by their rank, not by their token.

    .. math:: L = \frac1N \Big( \gamma \sum_i -\log q_i(y_i) + w \sum_g \sum_r | q_{g,(r)} - p_{g,(r)} | \Big)

    The teacher reads the same documents in its own tokens; the data module makes them (`data.teacher_tokenizer`). N are
    the student's scored tokens, as everywhere. g are places at which both are compared:

    - `alignment="index"`, as published: token by token, the first of a text or an answer with the first, up to the end
      of the shorter. Both write the same text, but at different speed, so the places drift apart.
    - "text": groups of tokens that cover the same text, their probabilities merged by the chain rule.

    Logs `match`, the mean distance of a place, in validation and test; `kl` and `agreement` want one vocabulary and are
    left out. Samples are the student's alone.

    The published code takes the mean over the places of each text, then over texts. Here, as in all token losses, a sum
    is divided by N, of which there are more than places: the same w weighs less, the more tokens a place takes.

    Args:
        student: The language model to train.
        teacher: The language model to learn from, with `data.teacher_tokenizer`.
        teacher_weight: w.
        label_weight: gamma.
        alignment: "index" or "text".
        kwargs: See `TokenDistiller`, but for `source` and `rollout`: the teacher runs, on the data as they are.
    """

    reference = Reference(
        title="Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs",
        authors="Boizard, El Haddad, Hudelot, Colombo",
        year=2024,
        arxiv="2402.12030",
    )

    def __init__(
        self,
        student: CausalLM,
        teacher: CausalLM,
        teacher_weight: float = 1.5,
        label_weight: float = 1.0,
        alignment: Literal["index", "text"] = "index",
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, teacher_weight, label_weight, **kwargs)
        for key, given in (("source", type(self.source) is not OnlineTeacher), ("rollout", self.rollout is not None)):
            if given:
                raise UsageError(
                    f"model.{key}: {type(self).__name__} needs the teacher's own tokens of the data, which this does "
                    "not give; leave it out"
                )
        self.source = PairedTeacher()
        self.alignment = alignment

    def distance(
        self, student_logprobs: Float[Tensor, "g v"], teacher_logprobs: Float[Tensor, "g w"]
    ) -> Float[Tensor, " g"]:
        """Compares student and teacher at each place."""
        return sorted_l1(student_logprobs.exp(), teacher_logprobs.exp())

    # ---- two vocabularies ------------------------------------------------------------------------------------------

    def fit_vocabularies(self, data: Any) -> int:
        """Brings each network and its tokenizer to the same tokens.

        Raises:
            UsageError: A tokenizer is not that of its network.
        """
        assert self.teacher is not None
        for network, role, own, key in (
            (self.student, "student", data, "tokenizer"),
            (self.teacher, "teacher", data.teacher, "teacher_tokenizer"),
        ):
            check_tokenizer(role, network, own, key)
            if own.vocabulary is not None:
                network.restrict(own.vocabulary)
            if network.vocab_size < own.vocab_size:
                raise UsageError(
                    f"model.{role} has {network.vocab_size} tokens, data.{key} {own.vocab_size}; give data.{key} the "
                    f"tokenizer of the {role}"
                )
        return self.student.vocab_size

    def writers(self) -> list[CausalLM]:
        """Returns the student alone: prompts are in its tokens."""
        return [self.student]

    # ---- groups ----------------------------------------------------------------------------------------------------

    def on_before_batch_transfer(self, batch: TokenBatch, dataloader_idx: int) -> TokenBatch:
        """Groups and cuts tokens while they are in the main memory, so that no device waits."""
        assert self.teacher is not None
        assert batch.paired is not None
        paired = batch.paired.by_index() if self.alignment == "index" else batch.paired
        batch.paired = prepare(paired, len(batch.targets), self.vocab_size, self.teacher.vocab_size)
        return batch

    def loss_terms(self) -> Terms:
        """Returns the terms of the loss with their weights."""
        return super().loss_terms() | {"match": (self.compare, self.teacher_weight)}

    def compare(
        self, student_logits: Float[Tensor, "n v"], target: MergedGroups, labels: Int[Tensor, " n"]
    ) -> Float[Tensor, " g"]:
        """Computes the distances of the groups in a slice of tokens."""
        groups = target.student
        student = merge_groups(student_logits, labels, last=groups.last, earlier=groups.earlier)
        return self.distance(student, target.logprobs)

    def score(
        self, hidden: Tensor, weight: Tensor, *, labels: Tensor, signal: Signal | None, terms: Terms, scale: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the loss in slices that leave groups whole."""
        assert isinstance(signal, PairedSignal)
        parts = signal.paired.parts.student
        return score_tokens(hidden, weight[: self.vocab_size], labels, signal, terms, scale=scale, parts=parts)

    def evaluate(self, batch: TokenBatch, part: str, metrics: TokenMetrics) -> None:
        """Adds a batch to metrics."""
        assert self.source is not None
        signal = self.source.signal(batch, part)
        assert isinstance(signal, PairedSignal)
        metrics.update(
            self.student(
                batch.input_ids,
                batch.position_ids,
                batch.scored,
                score=partial(self.facts, labels=batch.targets, signal=signal),
            )
        )

    def facts(self, hidden: Tensor, weight: Tensor, *, labels: Tensor, signal: PairedSignal) -> Mapping[str, Tensor]:
        """Returns facts about each token, and "match", the distance of each group."""
        weight = weight[: self.vocab_size]
        found = token_facts(hidden, weight, labels)
        values = [
            self.compare(F.linear(hidden[rows], weight), signal[rows], labels[rows])
            for rows in signal.paired.parts.student
        ]
        return found | {"match": torch.cat(values)} if values else found


class GOLD(ULD):
    r"""General online logit distillation: tokens that both have are compared as they are, the rest by rank.

    .. math:: L = \frac1N \Big( \gamma \sum_i -\log q_i(y_i) + w \sum_g \big( s \, \mathrm{JSD}_\beta + (1 - s) \,
        \mathrm{ULD} \big) \Big)

    on groups of tokens that cover the same text, merged by the chain rule; s is the share of the teacher's vocabulary
    that the student has too. Tokens are the same if they stand for the same bytes, also between a byte-level and a
    SentencePiece tokenizer; the end of text is one with the other's.

    Here it learns on the data as they are. The public code can let the student write; that is not here.

    Args:
        student: The language model to train.
        teacher: The language model to learn from, with `data.teacher_tokenizer`.
        teacher_weight: w.
        label_weight: gamma.
        beta: Of the generalized Jensen-Shannon divergence, the teacher's share of the mixture.
        kwargs: See `ULD`, but for `alignment`.
    """

    reference = Reference(
        title="Unlocking On-Policy Distillation for Any Model Family",
        authors="Patiño, Rasul, Gallouédec, Burtenshaw, Paniego, Srivastav, Frere, Beeching, Tunstall, von Werra, Wolf",
        year=2025,
    )

    def __init__(
        self,
        student: CausalLM,
        teacher: CausalLM,
        teacher_weight: float = 1.0,
        label_weight: float = 0.0,
        beta: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, teacher_weight, label_weight, alignment="text", **kwargs)
        if not 0 <= beta <= 1:
            raise UsageError(f"model.beta is {beta}; give the teacher's share of the mixture, from 0 to 1")
        self.beta = beta

    def fit_vocabularies(self, data: Any) -> int:
        """Finds the tokens that both have, too.

        Raises:
            UsageError: There are none.
        """
        size = super().fit_vocabularies(data)
        assert self.teacher is not None
        match = match_tokens(own_texts(data), own_texts(data.teacher), size, self.teacher.vocab_size)
        if not len(match.student):
            raise UsageError(
                "data.teacher_tokenizer: it has no token in common with data.tokenizer; take lit_distill.llm.ULD"
            )
        for entry in fields(match):
            self.register_buffer(f"match_{entry.name}", getattr(match, entry.name).to(self.device), persistent=False)
        return size

    def distance(
        self, student_logprobs: Float[Tensor, "g v"], teacher_logprobs: Float[Tensor, "g w"]
    ) -> Float[Tensor, " g"]:
        """Compares student and teacher at each place."""
        match = TokenMatch(**{entry.name: getattr(self, f"match_{entry.name}") for entry in fields(TokenMatch)})
        return gold(student_logprobs, teacher_logprobs, match, teacher_weight=self.beta)


def own_texts(data: Any) -> dict[bytes | str, int]:
    """Returns the texts of tokens in the data's own numbers."""
    texts = token_texts(data.tokenizer)
    if data.vocabulary is None:
        return texts
    numbers = {old: new for new, old in enumerate(data.vocabulary.tolist())}
    return {text: numbers[number] for text, number in texts.items() if number in numbers}
