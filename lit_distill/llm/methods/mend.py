"""MEND: demonstrations, distilled into a few vectors that a frozen language model reads in their place."""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lit_distill.core.distiller import Distiller
from lit_distill.core.errors import UsageError, check_least
from lit_distill.core.networks import freeze, load_weights, read_weights, weights_file
from lit_distill.core.reference import Reference
from lit_distill.llm.demonstrations import DemonstrationBatch
from lit_distill.llm.distillation import adamw, shared_vocabulary
from lit_distill.llm.fused import Terms, score_tokens
from lit_distill.llm.losses import cross_entropy, forward_kl
from lit_distill.llm.network import CausalLM
from lit_distill.llm.options import OptionAccuracy, answer_facts, row_means
from lit_distill.llm.signals import HiddenSignal, Signal
from lit_distill.llm.soft_prompt import SoftPromptEncoder


class MEND(Distiller):
    r"""Vectors are learned that make a frozen language model say of a query what it says with the demonstrations.

    .. math:: L_\text{distill} = \frac{1}{N} \sum_{i \in [x; y]} \mathrm{KL}\big(p(\cdot \mid D, x_{\le i}) \Vert
        p(\cdot \mid S, x_{\le i})\big), \qquad
        L_\text{pred} = -\frac{1}{|y|} \sum_{i \in y} \log p(y_i \mid S, x, y_{<i})

    Pretraining descends the first on text (`TextDemonstrations`), fine-tuning `L_pred + lambda L_distill` on tasks
    (`TaskDemonstrations`). Gradients pass through the frozen model to the vectors; checkpoints hold it not.

    Logged in validation and test: `kl` to what the model says with the demonstrations, `kl_without` of the same model
    with neither demonstrations nor vectors, `ce` of answers (on text: of the query), `ce_context` and `ce_without`; and
    how many tokens the model reads for a query, `tokens` with the vectors and `tokens_context` with the demonstrations.
    Before the first query, the distiller reads the demonstrations once: `tokens_distiller`.

    Where questions come with their options (`FewShotTasks`), all this is of the right answers, and there is besides the
    share of questions of which the right answer has the least mean loss over its tokens: `acc`, `acc_context` (vanilla
    in-context learning) and `acc_without`.

    Args:
        student: The distiller g, such as the first layers of the teacher.
        teacher: The language model f that reads its vectors; it stays as it is.
        vectors: n.
        phase: "pretrain" or "finetune".
        distill_weight: lambda, in fine-tuning.
        weights: Run folder of the pretraining, or its `student/` folder, to go on from.
        kwargs: See `Distiller`.
    """

    reference = Reference(
        title="MEND: Meta dEmonstratioN Distillation for Efficient and Effective In-Context Learning",
        authors="Li, Ma, Lu, Lee, Liu, Guo",
        year=2024,
        arxiv="2403.06914",
    )
    asks_data: ClassVar[str] = "MEND asks the data module for demonstrations and queries"
    terms_have_gradients: ClassVar[bool] = False

    student: SoftPromptEncoder
    teacher: CausalLM

    def __init__(
        self,
        student: CausalLM,
        teacher: CausalLM,
        vectors: int = 100,
        phase: Literal["pretrain", "finetune"] = "pretrain",
        distill_weight: float = 1.0,
        weights: str | None = None,
        optimizer: OptimizerCallable = adamw,
        **kwargs: Any,
    ) -> None:
        super().__init__(SoftPromptEncoder(student, vectors), teacher, optimizer=optimizer, **kwargs)
        check_least("model", 1, vectors=vectors)
        check_least("model", 0, distill_weight=distill_weight)
        self.phase: Literal["pretrain", "finetune"] = phase
        self.distill_weight = distill_weight
        self.weights = weights

    def build(self) -> None:
        """Loads the networks, and makes placeholders and adapter.

        Raises:
            UsageError: The data module has no demonstrations, or a context is too short.
        """
        data = self._data()
        networks = [self.student.network, self.teacher]
        for network in networks:
            network.materialize()
            if getattr(data, "vocabulary", None) is not None:
                network.restrict(data.vocabulary)
            context = getattr(network.text_config, "max_position_embeddings", None)
            longest = data.max_length + self.student.vectors
            if context is not None and longest > context:
                raise UsageError(
                    f"data.max_length and model.vectors are {data.max_length} and {self.student.vectors}, more than "
                    f"the context of {context}; lower one of them"
                )
        freeze(self.teacher)
        self.vocab_size = shared_vocabulary(networks, data)
        self.student.fit_to(self.teacher.hidden_size)
        if self.weights is not None:
            load_weights(self.student, read_weights(weights_file(self.weights)), origin=self.weights)
        self.means = nn.ModuleDict({part: nn.ModuleDict() for part in ("val", "test")})
        self.choices = nn.ModuleDict({part: nn.ModuleDict() for part in ("val", "test")})
        for part in ("val", "test"):
            means, choices = self.means[part], self.choices[part]
            assert isinstance(means, nn.ModuleDict)
            assert isinstance(choices, nn.ModuleDict)
            means.update({name: MeanMetric() for name in _MEANS})
            choices.update({name: OptionAccuracy() for name in _CHOICES})

    # ---- training --------------------------------------------------------------------------------------------------

    def distill(self, batch: DemonstrationBatch) -> Float[Tensor, "b n h"]:
        """Returns the vectors that stand for the demonstrations."""
        width = batch.demonstrations.shape[1]
        return self.student(batch.demonstrations, batch.positions[:, :width], batch.lengths)

    @torch.no_grad()
    def with_context(self, batch: DemonstrationBatch) -> HiddenSignal:
        """Asks the language model about the queries, with the demonstrations before them."""
        hidden, weight = self.teacher(
            torch.cat([batch.demonstrations, batch.queries], 1),
            batch.positions,
            batch.places(batch.demonstrations.shape[1]),
            score=lambda hidden, weight: (hidden, weight),
        )
        return HiddenSignal(hidden, weight[: self.vocab_size])

    def with_vectors(
        self,
        batch: DemonstrationBatch,
        vectors: Float[Tensor, "b n h"] | None,
        signal: Signal | None,
        terms: Terms,
        scale: float,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Scores what the language model says of the queries, with vectors before them or with nothing."""
        return self.teacher(
            batch.queries,
            None,
            batch.places(0 if vectors is None else vectors.shape[1]),
            score=partial(self.score, labels=batch.labels, signal=signal, terms=terms, scale=scale),
            before=vectors,
        )

    def score(
        self, hidden: Tensor, weight: Tensor, *, labels: Tensor, signal: Signal | None, terms: Terms, scale: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the loss from hidden states (N, H) and the head (V, H), of which the shared part is taken."""
        return score_tokens(hidden, weight[: self.vocab_size], labels, signal, terms, scale=scale)

    def training_step(self, batch: DemonstrationBatch, batch_idx: int) -> Tensor:
        """Compares the language model with itself, and in fine-tuning with the answers."""
        terms: Terms = {}
        if self.phase == "finetune":
            # Scaled as if all tokens of the queries were answers; the mean is over those that are.
            terms["ce"] = (_ce, batch.total / max(batch.answered, 1))
        weight = 1.0 if self.phase == "pretrain" else self.distill_weight
        if weight:
            terms["distill"] = (_kl, weight)
        signal = self.with_context(batch) if weight else None
        scale = self.trainer.world_size * self.trainer.accumulate_grad_batches / max(batch.total, 1)
        loss, values = self.with_vectors(batch, self.distill(batch), signal, terms, scale)
        self.record({name: terms[name][1] * value for name, value in values.items()})
        return loss

    # ---- evaluation ------------------------------------------------------------------------------------------------

    def validation_step(self, batch: DemonstrationBatch, batch_idx: int) -> None:
        """Compares with demonstrations, with vectors and without."""
        self.evaluate(batch, "val")

    def test_step(self, batch: DemonstrationBatch, batch_idx: int) -> None:
        """Compares with demonstrations, with vectors and without."""
        self.evaluate(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Logs `val/*`."""
        self._log_means("val")

    def on_test_epoch_end(self) -> None:
        """Logs `test/*`."""
        self._log_means("test")

    @torch.no_grad()
    def evaluate(self, batch: DemonstrationBatch, part: str) -> None:
        """Adds a batch to the means of a part."""
        signal = self.with_context(batch)
        context = answer_facts(signal.hidden, signal.weight, batch.labels, None)
        ours = self.facts(batch, self.distill_questions(batch), signal)
        without = self.facts(batch, None, signal)
        row = batch.scored // batch.queries.shape[1]
        right, answer = batch.right[row], batch.labels >= 0
        self._add(part, {"kl": ours["kl"], "kl_without": without["kl"]}, right)
        losses = {"ce": ours["ce"], "ce_context": context["ce"], "ce_without": without["ce"]}
        self._add(part, losses, right & answer)
        queries = torch.bincount(row, minlength=len(batch))
        read = {
            "tokens": queries + self.student.vectors,
            "tokens_context": queries + batch.lengths,
            "tokens_distiller": batch.lengths + self.student.vectors,
        }
        self._add(part, read, batch.right)
        choices: Any = self.choices[part]
        for name, facts in zip(_CHOICES, (ours, context, without), strict=True):
            choices[name].update(row_means(facts["ce"], row, answer, len(batch)), batch.question, batch.right)

    def facts(
        self, batch: DemonstrationBatch, vectors: Float[Tensor, "b n h"] | None, signal: HiddenSignal
    ) -> dict[str, Tensor]:
        """Computes facts about each token of the queries, with vectors before them or with nothing."""
        return self.teacher(
            batch.queries,
            None,
            batch.places(0 if vectors is None else vectors.shape[1]),
            score=lambda hidden, weight: answer_facts(hidden, weight[: self.vocab_size], batch.labels, signal),
            before=vectors,
        )

    def distill_questions(self, batch: DemonstrationBatch) -> Float[Tensor, "b n h"]:
        """Returns the vectors of each row, once for each question: its options share the demonstrations."""
        _, place = batch.question.unique(return_inverse=True)
        rows = torch.arange(len(batch), device=place.device)
        first = rows.new_full((int(place.max()) + 1,), len(batch)).scatter_reduce(0, place, rows, "amin")
        width = batch.demonstrations.shape[1]
        vectors = self.student(batch.demonstrations[first], batch.positions[first, :width], batch.lengths[first])
        return vectors[place]

    def _add(self, part: str, values: Mapping[str, Tensor], counted: Bool[Tensor, " n"]) -> None:
        means: Any = self.means[part]
        for name, value in values.items():
            means[name].update(value.float(), weight=counted.float())

    def _log_means(self, part: str) -> None:
        means: Any = self.means[part]
        found = {name: mean.compute() for name, mean in means.items()}
        choices: Any = self.choices[part]
        for name, choice in choices.items():
            if choice.has_options():
                found[name] = choice.compute()
        self.log_dict({f"{part}/{name}": value for name, value in found.items()})
        for metric in (*means.values(), *choices.values()):
            metric.reset()


_MEANS = ("kl", "kl_without", "ce", "ce_context", "ce_without", "tokens", "tokens_context", "tokens_distiller")
_CHOICES = ("acc", "acc_context", "acc_without")


def _ce(logits: Tensor, _target: Any, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels)  # 0 where the label is -100


def _kl(logits: Tensor, target: Any, _labels: Tensor) -> Tensor:
    return forward_kl(logits, target)
