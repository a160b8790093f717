"""MiniLLM: the reverse KL of whole texts, by policy gradient, with what keeps its variance small."""

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from lit_distill.core.errors import UsageError, check_least
from lit_distill.core.reference import Reference
from lit_distill.llm.batch import TokenBatch
from lit_distill.llm.data import TokenDataModule
from lit_distill.llm.distillation import TokenDistiller
from lit_distill.llm.experience import Experience
from lit_distill.llm.fused import Terms, label_logprobs
from lit_distill.llm.losses import cross_entropy, forward_kl, reverse_kl
from lit_distill.llm.mixed import TeacherMixed
from lit_distill.llm.network import CausalLM
from lit_distill.llm.policy import clipped_policy, discounted_returns, importance_weights, log_ratio_rewards, whiten
from lit_distill.llm.reading import resting
from lit_distill.llm.signals import HiddenSignal


class MiniLLM(TokenDistiller):
    r"""Policy gradient of KL(student || teacher) of whole texts, on texts that student and teacher write together.

    Each batch of prompts is written to once (`rollout`); what was written is then learned from in `ppo_epochs` passes,
    each of one or several optimizer steps. With the return R and the weight w of `lit_distill.llm.policy`:

    .. math:: L = \frac1N \sum_t \Big( \max\big(-A_t \rho_t, -A_t \, \mathrm{clip}(\rho_t, 1 \pm \epsilon)\big)
        + \mathrm{KL}(q_t \Vert p_t) \Big) + \lambda \big( (1 - \kappa) L_{\text{ce}} + \kappa L_{\text{kl}} \big),
        \qquad A = \mathrm{whiten}(R), \quad \rho_t = w_t \, q_t(y_t) / q^{\text{old}}_t(y_t)

    The second part is on plain text, `corpus`, of which each optimizer step takes a batch; its :math:`L_{\text{kl}}` is
    KL(teacher || student), which has the gradient of the cross-entropy that the paper writes.

    The single step: the paper computes what a token itself earns exactly, over all tokens that might have come
    (`single_step="instead"`), and leaves to sampling what is behind it; without the other devices this is the gradient
    of the KL of whole texts. The public code, by which the published numbers were made, adds the exact term and lets
    returns begin with the token's own reward all the same ("added").

    Otherwise as in the public code, but for whitening: it is done once, over the real tokens of all that was written.
    The code takes padding along, and the texts of one optimizer step (in its published setting these are all). As
    there, the KL of a single step is not weighted by w. Sampling is at temperature 1.

    Lightning's `max_steps` counts optimizer steps, its epochs, intervals of validation and log count batches of
    prompts. Nothing is kept from one batch to the next.

    Args:
        student: The language model to train; it should be able to write already.
        teacher: The language model to learn from. It runs on what was written.
        rollout: How they write. None: 0.2 of the teacher, up to 128 tokens.
        reward_scaling: Divides log-ratios.
        reward_clip: Largest reward; None for no clip.
        discount: Of rewards further behind. Published text: 1; public code: 0.95.
        length_normalized: Whether returns are divided by the number of tokens they are of.
        whitened: Whether advantages have mean 0 and variance 1.
        ratio_clip: epsilon; None for no clip.
        single_step: What is done with KL(student || teacher) of each token: "added", "instead" of the token's own
            reward, or "none".
        ppo_epochs: Passes over what was written.
        minibatches: Optimizer steps of a pass; each takes that part of the texts.
        corpus: Data module of plain text, of the same tokenizer; None for none.
        corpus_weight: lambda.
        corpus_teacher_share: kappa, 0.5 as published.
        clip_norm: Largest gradient norm; None for no clipping.
        kwargs: See `TokenDistiller`. `teacher_weight` is in front of the first part.
    """

    reference = Reference(
        title="MiniLLM: Knowledge Distillation of Large Language Models",
        authors="Gu, Dong, Wei, Huang",
        year=2023,
        arxiv="2306.08543",
    )
    label_terms: ClassVar[frozenset[str]] = frozenset({"corpus_ce"})

    teacher: CausalLM
    rollout: TeacherMixed

    def __init__(
        self,
        student: CausalLM,
        teacher: CausalLM,
        rollout: TeacherMixed | None = None,
        reward_scaling: float = 0.5,
        reward_clip: float | None = 100.0,
        discount: float = 0.95,
        length_normalized: bool = True,
        whitened: bool = True,
        ratio_clip: float | None = 0.2,
        single_step: Literal["added", "instead", "none"] = "added",
        ppo_epochs: int = 4,
        minibatches: int = 1,
        corpus: TokenDataModule | None = None,
        corpus_weight: float = 1.0,
        corpus_teacher_share: float = 0.5,
        clip_norm: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, rollout=rollout or TeacherMixed(), **kwargs)
        if kwargs.get("source") is not None:
            raise UsageError(
                "model.source: what the student writes was never kept; leave it out, and give model.teacher"
            )
        if self.label_weight:
            raise UsageError(
                f"model.label_weight is {self.label_weight}, but labels here are the student's own words; leave it "
                "out, and give model.corpus"
            )
        check_least("model", 1, ppo_epochs=ppo_epochs, minibatches=minibatches)
        for name, value in (("reward_clip", reward_clip), ("ratio_clip", ratio_clip), ("clip_norm", clip_norm)):
            if value is not None and value <= 0:
                raise UsageError(f"model.{name} is {value}; it must be above 0, or null for no clip")
        if reward_scaling <= 0:
            raise UsageError(f"model.reward_scaling is {reward_scaling}; it must be above 0 (1 leaves rewards alone)")
        if not 0 <= discount <= 1:
            raise UsageError(f"model.discount is {discount}; give 0 to 1")
        if corpus_weight <= 0:
            raise UsageError(f"model.corpus_weight is {corpus_weight}; give more than 0, or leave model.corpus out")
        if not 0 <= corpus_teacher_share <= 1:
            raise UsageError(f"model.corpus_teacher_share is {corpus_teacher_share}; give 0 to 1")
        self.automatic_optimization = False
        self.reward_scaling, self.reward_clip = reward_scaling, reward_clip
        self.discount, self.length_normalized, self.whitened = discount, length_normalized, whitened
        self.ratio_clip = ratio_clip
        self.single_step: Literal["added", "instead", "none"] = single_step
        self.ppo_epochs, self.minibatches = ppo_epochs, minibatches
        self.corpus = corpus
        self.corpus_weight, self.corpus_teacher_share = corpus_weight, corpus_teacher_share
        self.clip_norm = clip_norm
        self._texts: Iterator[TokenBatch] | None = None

    # ---- what was written ------------------------------------------------------------------------------------------

    def collect(self, batch: TokenBatch) -> Experience:
        """Writes to the prompts of a batch, and judges each token."""
        batch = self.rollout(batch, self)
        assert self.source is not None
        teacher = self.source.signal(batch, "train")
        assert isinstance(teacher, HiddenSignal)
        said = label_logprobs(teacher.hidden, teacher.weight, batch.targets)
        with resting(self.student), torch.no_grad():
            own = self.student(
                batch.input_ids,
                batch.position_ids,
                batch.scored,
                score=lambda hidden, weight: label_logprobs(hidden, weight[: self.vocab_size], batch.targets),
            )
        weights = importance_weights(own, said, teacher_share=self.rollout.share)
        self.watch(said - own, len(batch))
        return Experience(batch, teacher, own, self.advantages(own, said, batch), weights)

    def advantages(self, own: Float[Tensor, " n"], said: Float[Tensor, " n"], batch: TokenBatch) -> Float[Tensor, " n"]:
        """Computes advantages of sampled tokens.

        Args:
            own: (N,) the student's log-probabilities of them.
            said: (N,) the teacher's.
            batch: The texts.
        """
        rewards = log_ratio_rewards(own, said, scaling=self.reward_scaling, clip=self.reward_clip)
        lengths = torch.bincount(batch.scored // batch.input_ids.shape[1], minlength=len(batch))
        mask = torch.arange(batch.input_ids.shape[1], device=rewards.device) < lengths[:, None]
        returns = discounted_returns(
            rewards.new_zeros(mask.shape).masked_scatter(mask, rewards),
            mask,
            discount=self.discount,
            own=self.single_step != "instead",
            length_normalized=self.length_normalized,
        )[mask]
        return whiten(returns, add=partial(self.trainer.strategy.reduce, reduce_op="sum")) if self.whitened else returns

    def parts(self, experience: Experience) -> Iterator[Experience]:
        """Yields what each optimizer step learns from.

        Raises:
            UsageError: There are fewer texts than steps.
        """
        batch = experience.batch
        if len(batch) < self.minibatches:
            raise UsageError(
                f"model.minibatches is {self.minibatches}, but a batch has {len(batch)} rows in this process; lower "
                "it, or raise data.batch_size"
            )
        if self.minibatches == 1:
            yield from [experience] * self.ppo_epochs
            return
        device = batch.scored.device
        chosen: list[Tensor] = []
        for epoch in range(self.ppo_epochs):
            order = torch.randperm(
                len(batch), generator=torch.Generator().manual_seed(self.step_seed(f"minibatches {epoch}"))
            )
            chosen += [rows.sort().values.to(device) for rows in order.tensor_split(self.minibatches)]
        lengths = torch.bincount(batch.scored // batch.input_ids.shape[1], minlength=len(batch))
        counts = torch.stack([lengths[rows].sum() for rows in chosen])
        for rows, total in zip(chosen, self.trainer.strategy.reduce(counts, reduce_op="sum").tolist(), strict=True):
            yield experience.take(rows, total)

    # ---- training --------------------------------------------------------------------------------------------------

    def loss_terms(self) -> Terms:
        """Returns the terms on what was written."""
        clip = self.ratio_clip
        terms: Terms = {
            "policy": (
                lambda logits, of, labels: clipped_policy(
                    logits, labels, of.logprobs, of.advantages, of.weights, clip=clip
                ),
                self.teacher_weight,
            )
        }
        if self.single_step != "none":
            terms["single_step"] = (lambda logits, of, _: reverse_kl(logits, of.logits), self.teacher_weight)
        return terms

    def corpus_terms(self) -> Terms:
        """Returns the terms on plain text."""
        share = self.corpus_teacher_share
        terms: Terms = {
            "corpus_ce": (lambda logits, _, labels: cross_entropy(logits, labels), self.corpus_weight * (1 - share)),
            "corpus_kl": (lambda logits, target, _: forward_kl(logits, target), self.corpus_weight * share),
        }
        return {name: term for name, term in terms.items() if term[1]}

    def training_step(self, batch: TokenBatch, batch_idx: int) -> None:  # type: ignore[override]  # steps by itself
        """Lets the prompts be written to, and learns from it in several steps."""
        assert self.source is not None
        steps: list[dict[str, Tensor]] = []
        for part in self.parts(self.collect(batch)):
            if 0 <= self.trainer.max_steps <= self.trainer.global_step:
                break
            if isinstance(self.teacher, FSDPModule):
                self.teacher.unshard()  # each step puts away the head that what was written is compared by
            loss, found = self.weigh(part.batch, part, self.loss_terms())
            if self.corpus is not None:
                text, terms = self.next_text(), self.corpus_terms()
                signal = self.source.signal(text, "train") if "corpus_kl" in terms else None
                more, beside = self.weigh(text, signal, terms)
                loss, found = loss + more, found | beside
            self.optimize(loss, clip_norm=self.clip_norm)
            steps.append(found)
        self.record({name: torch.stack([found[name] for found in steps]).mean() for name in steps[0]})

    def watch(self, log_ratios: Float[Tensor, " n"], rows: int) -> None:
        """Logs the mean of log p - log q of sampled tokens, which is to rise to 0, and the mean length of texts."""
        self.log("train/log_ratio", log_ratios.mean(), batch_size=rows)
        self.log("train/length", len(log_ratios) / rows, batch_size=rows)

    # ---- plain text ------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Reads the corpus."""
        super().on_fit_start()
        if self.corpus is None:
            return
        data = self._data()
        self.corpus.trainer = self.trainer
        self.corpus.setup("fit")
        ours, theirs = data.fingerprint(), self.corpus.fingerprint()
        for key, name in (("tokenizer", "tokenizer"), ("vocabulary", "restrict_vocabulary")):
            if ours[key] != theirs[key]:
                raise UsageError(
                    f"model.corpus.{name}: its tokens are not those of data ({key} {theirs[key]} and {ours[key]}); "
                    "give both the same tokenizer, and a restricted vocabulary only where both have the same text"
                )

    def next_text(self) -> TokenBatch:
        """Returns the next batch of the corpus."""
        if self._texts is None:
            self._texts = self.texts_from(self.iteration * self.ppo_epochs * self.minibatches)
        return self.transfer_batch_to_device(next(self._texts), self.device, 0)

    def texts_from(self, number: int) -> Iterator[TokenBatch]:
        """Yields batches of the corpus from some number on, epoch after epoch: a resumed run needs no other memory."""
        assert self.corpus is not None
        loader = self.corpus.train_dataloader()
        while True:
            epoch, position = divmod(number, len(loader))
            loader.sampler.set_epoch(epoch)
            loader.load_state_dict(loader.state_dict() | {"epoch": epoch, "position": position})
            for batch in loader:
                yield batch
                number += 1
