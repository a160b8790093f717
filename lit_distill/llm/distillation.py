"""The base of token-level methods: labels and a teacher's word on each token, weighed and summed without any logits."""

import os
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from lit_distill.core.distiller import Distiller
from lit_distill.core.errors import UsageError, check_least
from lit_distill.core.loading import derived_seed
from lit_distill.core.metrics import BINS
from lit_distill.core.networks import freeze
from lit_distill.core.optimizers import MatrixDecayAdamW
from lit_distill.core.taps import FeatureTaps
from lit_distill.llm.batch import TokenBatch
from lit_distill.llm.evaluation import TokenMetrics, token_facts
from lit_distill.llm.fused import Sliced, Terms, score_tokens
from lit_distill.llm.losses import cross_entropy
from lit_distill.llm.network import CausalLM
from lit_distill.llm.rollouts import Rollout
from lit_distill.llm.signals import Signal, Target
from lit_distill.llm.teachers import OnlineTeacher, TeacherSource


def adamw(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Builds the default optimizer: AdamW, 1e-4, weight decay 0.01 on matrices."""
    return MatrixDecayAdamW(parameters, lr=1e-4)


class TokenDistiller(Distiller):
    r"""Trains a causal language model on tokens and, by one divergence, on what a teacher says of them.

    .. math:: L = \frac1N \sum_i \big( \gamma \, (-\log q_i(y_i)) + w \, D_i \big)

    The sum is over scored tokens, N is their number in the whole optimizer step (`TokenBatch.total`), so the loss and
    its gradient do not depend on how a step is cut into batches, rows and processes. A method defines `divergence`.

    The loss is computed inside the student's forward, slice by slice (`score_tokens`): no tensor of size tokens times
    vocabulary exists. Where student and teacher have vocabularies of different sizes but the same tokens, as in one
    family padded differently, both are cut to the shared part.

    Logged in validation and test: `ce` and `perplexity` of the text, `acc` (next token), `ece`, and against the
    teacher, if it is there or kept, `kl` = KL(teacher || student) and `agreement` of the first choice.

    Args:
        student: The language model to train.
        teacher: The language model to learn from. May be left out where `source` does without.
        teacher_weight: w.
        label_weight: gamma.
        source: Where the teacher's word comes from; None runs `teacher` on each batch.
        rollout: What replaces the batch's completions by generated ones; None trains on the data as they are.
        sample_tokens: Tokens of the continuations of three validation prompts that are kept as samples; 0 for none.
        bins: Bins of confidence in `ece` and in the reliability diagram.
        kwargs: See `Distiller`.
    """

    headline: ClassVar[str] = "test/perplexity"
    asks_data: ClassVar[str] = "language model methods ask the data module for tokens and a tokenizer"
    needs_teacher: ClassVar[bool] = True
    silent_without_weight: ClassVar[bool] = True  # whether `divergence` is all that the teacher teaches by
    terms_have_gradients: ClassVar[bool] = False

    student: CausalLM
    teacher: CausalLM | None

    def __init__(
        self,
        student: CausalLM,
        teacher: CausalLM | None = None,
        teacher_weight: float = 1.0,
        label_weight: float = 0.0,
        source: TeacherSource | None = None,
        rollout: Rollout | None = None,
        sample_tokens: int = 0,
        bins: int = BINS,
        optimizer: OptimizerCallable = adamw,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, optimizer=optimizer, **kwargs)
        has_teacher = teacher is not None or source is not None
        if self.needs_teacher and not has_teacher:
            raise UsageError("model.teacher is missing; give a language model, or model.source with kept outputs")
        if self.needs_teacher and (teacher_weight < 0 or (teacher_weight == 0 and self.silent_without_weight)):
            raise UsageError(
                f"model.teacher_weight is {teacher_weight}, so the teacher would be silent; give more than 0, or take "
                "lit_distill.llm.SupervisedFineTuning"
            )
        if label_weight < 0:
            raise UsageError(f"model.label_weight is {label_weight}; it must be 0 or more")
        self.teacher_weight = teacher_weight
        self.label_weight = label_weight
        self.source = source if source is not None else OnlineTeacher() if teacher is not None else None
        self.rollout = rollout
        self.sample_tokens = sample_tokens
        check_least("model", 1, bins=bins)
        self.bins = bins

    # ---- construction ----------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Loads the networks, and cuts them to the tokens that they and the data share."""
        for network in self.networks():
            network.materialize()
        if self.teacher is not None:
            freeze(self.teacher)
        self.vocab_size = self.fit_vocabularies(self._data())
        self.val_metrics = TokenMetrics("val/", self.bins)
        self.test_metrics = TokenMetrics("test/", self.bins)
        self.taps = FeatureTaps(self.student, ())  # a method may want to see more
        if self.source is not None:
            self.source.attach(self)
        if self.rollout is not None:
            self.rollout.attach(self)

    def fit_vocabularies(self, data: Any) -> int:
        """Brings networks and data to the same tokens, and returns how many these are."""
        if getattr(data, "vocabulary", None) is not None:
            for network in self.networks():
                network.restrict(data.vocabulary)
        return shared_vocabulary(self.networks(), data)

    def networks(self) -> list[CausalLM]:
        """Returns student and teacher, if there is one."""
        return [self.student] if self.teacher is None else [self.student, self.teacher]

    def example_inputs(self) -> tuple[Tensor, ...]:
        """One row of tokens, as long as rows may be."""
        tokens = torch.zeros((1, self._data().max_length), dtype=torch.long, device=self.device)
        return (tokens, torch.arange(tokens.shape[1], device=self.device)[None])

    # ---- training --------------------------------------------------------------------------------------------------

    def divergence(self, student_logits: Float[Tensor, "n v"], target: Target) -> Float[Tensor, " n"]:
        """Compares the student with the teacher, token by token."""
        raise AssertionError(f"{type(self).__name__} is a base class; a method defines divergence")

    def loss_terms(self) -> Terms:
        """Returns the terms of the loss with their weights."""
        terms: Terms = {}
        if self.label_weight:
            terms["ce"] = (lambda logits, _, labels: cross_entropy(logits, labels), self.label_weight)
        if self.source is not None and self.needs_teacher:
            terms["match"] = (lambda logits, target, _: self.divergence(logits, target), self.teacher_weight)
        return terms

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        """Scores the batch, or what the rollout makes of it."""
        if self.rollout is not None:
            batch = self.rollout(batch, self)
        terms = self.loss_terms()
        # The teacher first: what it used is free again before the student's activations are kept.
        signal = self.source.signal(batch, "train") if self.source is not None and "match" in terms else None
        loss, found = self.weigh(batch, signal, terms)
        self.record(found)
        return loss

    def weigh(self, batch: TokenBatch, signal: Sliced | None, terms: Terms) -> tuple[Tensor, dict[str, Tensor]]:
        """Runs the student on a batch, and returns its loss and the weighted terms of that.

        Args:
            batch: The batch.
            signal: What the terms are told of its scored tokens.
            terms: Token losses with their weights.
        """
        # Gradients are averaged over processes and accumulated batches afterwards; the sum is wanted.
        scale = self.trainer.world_size * self.trainer.accumulate_grad_batches / max(batch.total, 1)
        (loss, values), features = self.taps(
            batch.input_ids,
            batch.position_ids,
            batch.scored,
            score=partial(self.score, labels=batch.targets, signal=signal, terms=terms, scale=scale),
        )
        if isinstance(self.teacher, FSDPModule):
            self.teacher.reshard()  # embeddings and head, whole until here, take no memory in the backward pass
        inside = self.feature_terms(batch, features, scale)
        found = {name: terms[name][1] * value for name, value in values.items()} | inside
        return sum(inside.values(), start=loss), found

    def feature_terms(self, batch: TokenBatch, features: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
        """Returns weighted terms of what `taps` saw inside the student.

        Args:
            batch: The batch.
            features: What the tapped modules returned, by name.
            scale: Factor in front of sums over scored tokens.
        """
        return {}

    def step_seed(self, name: str) -> int:
        """Returns a seed that is the same in all processes, and another one in each step."""
        return derived_seed(name, int(os.environ.get("PL_GLOBAL_SEED", "0")), self.iteration)

    def on_fit_start(self) -> None:
        """Lets the source make what it keeps."""
        if self.source is not None:
            self.source.prepare()

    def on_test_start(self) -> None:
        """Lets the source make what it keeps."""
        if self.source is not None:
            self.source.prepare()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what the rollout remembers."""
        super().on_save_checkpoint(checkpoint)
        if self.rollout is not None:
            checkpoint["rollout"] = self.rollout.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Gives the rollout its memory back."""
        super().on_load_checkpoint(checkpoint)
        if self.rollout is not None:
            self.rollout.load_state_dict(checkpoint.get("rollout", {}))

    def score(
        self, hidden: Tensor, weight: Tensor, *, labels: Tensor, signal: Sliced | None, terms: Terms, scale: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the loss from hidden states (N, H) and the head (V, H), of which the shared part is taken."""
        return score_tokens(hidden, weight[: self.vocab_size], labels, signal, terms, scale=scale)

    # ---- evaluation ------------------------------------------------------------------------------------------------

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        """Collects facts about each token."""
        self.evaluate(batch, "val", self.val_metrics)

    def test_step(self, batch: TokenBatch, batch_idx: int) -> None:
        """Collects facts about each token."""
        self.evaluate(batch, "test", self.test_metrics)

    def evaluate(self, batch: TokenBatch, part: str, metrics: TokenMetrics) -> None:
        """Adds a batch to metrics."""
        signal = self.source.signal(batch, part) if self.source is not None else None
        if signal is not None:
            self.observe(signal, batch, part)
        facts: Mapping[str, Tensor] = self.student(
            batch.input_ids,
            batch.position_ids,
            batch.scored,
            score=lambda hidden, weight: token_facts(hidden, weight[: self.vocab_size], batch.targets, signal),
        )
        metrics.update(facts)

    def observe(self, signal: Signal, batch: TokenBatch, part: str) -> None:
        """Sees what the teacher says of a batch of validation or test, of which a method may keep facts."""

    def on_validation_epoch_end(self) -> None:
        """Logs `val/*`, and tells the rollout."""
        if self.rollout is not None and not self.trainer.sanity_checking:
            self.rollout.on_validation(float(self.val_metrics.compute()["val/ce"]))
        self._log_metrics(self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Logs `test/*`, and shows samples."""
        self.panels["reliability"] = self.test_metrics.reliability()
        self._log_metrics(self.test_metrics)
        if self.sample_tokens:
            self.panels["text"] = self.samples()

    def writers(self) -> list[CausalLM]:
        """Returns the networks that continue prompts in the data's tokens."""
        return self.networks()

    @torch.no_grad()
    def samples(self) -> list[dict[str, str]]:
        """Lets student and teacher continue three prompts of the validation part, word for word the likeliest."""
        data = self._data()
        prompts = data.prompts("val", 3)
        found = [{"prompt": data.decode(prompt)} for prompt in prompts]
        for name, network in zip(("student", "teacher"), self.writers(), strict=False):
            tokens, mask = network.generate(prompts, max_new_tokens=self.sample_tokens, greedy=True)
            for entry, row, kept in zip(found, tokens, mask, strict=True):
                entry[name] = data.decode(row[kept].tolist())
        return found


def shared_vocabulary(networks: list[CausalLM], data: Any) -> int:
    """Returns how many tokens all networks have, and says so once where they have not as many.

    Raises:
        UsageError: The data has tokens or rows that one of the networks cannot take, or one has another tokenizer.
    """
    sizes = [network.vocab_size for network in networks]
    shared = min(sizes)
    if data.vocab_size > shared:
        role = "student" if sizes[0] == shared else "teacher"
        raise UsageError(
            f"model.{role} has {shared} tokens, the tokenizer of the data {data.vocab_size}; give data.tokenizer the "
            "tokenizer of the networks, and networks that share one; for a teacher with another, take "
            "lit_distill.llm.ULD"
        )
    for role, network in zip(("student", "teacher"), networks, strict=False):
        context = getattr(network.text_config, "max_position_embeddings", None)
        if context is not None and data.max_length > context:
            raise UsageError(
                f"data.max_length is {data.max_length}, more than the context of model.{role}, {context}; lower it"
            )
        check_tokenizer(role, network, data)
    if max(sizes) > shared:
        rank_zero_info(f"vocabularies of {sizes[0]} and {sizes[-1]} tokens: the first {shared}, which both have, count")
    return shared


def check_tokenizer(role: str, network: CausalLM, data: Any, key: str = "tokenizer") -> None:
    """Compares the tokenizer that lies beside a network with that of the data; either may have more tokens.

    Raises:
        UsageError: A number stands for different tokens in them.
    """
    from tokenizers import Tokenizer
    from transformers.utils import cached_file

    tokenizer = getattr(data, "tokenizer", None)
    if network.name is None or tokenizer is None:
        return
    file = cached_file(
        network.name,
        "tokenizer.json",
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file is None:
        return
    ours = {number: token for token, number in tokenizer.get_vocab().items()}
    theirs = {number: token for token, number in Tokenizer.from_file(file).get_vocab().items()}
    for number in sorted(ours.keys() & theirs.keys()):
        if ours[number] == theirs[number]:
            continue
        if key == "tokenizer":
            remedy = (
                "losses compare token by token, so give networks of one tokenizer, and data.tokenizer the same; for a "
                f"teacher with another, take lit_distill.llm.ULD and give data.teacher_tokenizer {network.name}"
            )
        else:
            remedy = f"give the {role}'s own"
        raise UsageError(
            f"model.{role}: its token {number} is {theirs[number]!r}, that of data.{key} {ours[number]!r}; {remedy}"
        )
