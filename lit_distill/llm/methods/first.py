"""FIRST: a few of the teacher's most probable tokens, calibrated before the student learns them."""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_distill.core.errors import UsageError
from lit_distill.core.reference import Reference
from lit_distill.core.strategies import gathered
from lit_distill.llm.batch import TokenBatch
from lit_distill.llm.distillation import TokenDistiller
from lit_distill.llm.evaluation import TokenMetrics
from lit_distill.llm.fused import slices
from lit_distill.llm.losses import calibrate_topk, smooth_topk, topk_kl
from lit_distill.llm.network import CausalLM
from lit_distill.llm.signals import Signal, Target, TopK


class FIRST(TokenDistiller):
    r"""The student learns the teacher's k most probable tokens, made trustworthy by one number c found on validation.

    .. math:: \tilde p_j = \frac{\exp(p_j / c)}{\sum_{k \in S} \exp(p_k / c)}, \qquad
        D_i = \sum_{j \in S} \tilde p_j \log \frac{\tilde p_j}{q_j}

    c is the one in (0, 1] whose first choices have the least expected calibration error on the validation tokens (10
    bins): steps of 0.1, then of 0.02 around the best. The softmax is over probabilities, as published. Published is a c
    found on answers alone: with `ClassificationDataModule` nothing else is scored.

    Logged in the test besides: `teacher_acc` and `teacher_ece` of the teacher's first choices, `calibrated_ece` of what
    the student learned from, and `c`.

    Args:
        student: The language model to train.
        teacher: The language model to learn from, fine-tuned on the task. May be left out with a `source`.
        k: Tokens kept of each position; a source may have kept more.
        calibration: "trustworthy" as above, "smoothing" (a tenth of the first choice is shared among the others), or
            "none".
        c: c, if it is known; None finds it.
        support: What the student is compared on: "gathered" as published, "bucket" with the rest of the mass as one
            more token, "renormalized" or "both"; see `topk_kl`.
        kwargs: See `TokenDistiller`.
    """

    reference = Reference(
        title="FIRST: Teach A Reliable Large Language Model Through Efficient Trustworthy Distillation",
        authors="Shum, Xu, Zhang, Chen, Diao, Dong, Zhang, Raza",
        year=2024,
        arxiv="2408.12168",
    )

    def __init__(
        self,
        student: CausalLM,
        teacher: CausalLM | None = None,
        k: int = 5,
        calibration: Literal["trustworthy", "smoothing", "none"] = "trustworthy",
        c: float | None = None,
        support: Literal["bucket", "renormalized", "gathered", "both"] = "gathered",
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, **kwargs)
        if k < 2:
            raise UsageError(f"model.k is {k}; give 2 or more (published: 5)")
        if c is not None and c <= 0:
            raise UsageError(f"model.c is {c}; it must be above 0 (useful: 0.1 to 1)")
        self.k = k
        self.calibration = calibration
        self.c = c
        self.support: Literal["bucket", "renormalized", "gathered", "both"] = support

    def divergence(self, student_logits: Float[Tensor, "n v"], target: Target) -> Float[Tensor, " n"]:
        """Compares the student with the calibrated tokens."""
        return topk_kl(student_logits, self.calibrated(most_probable(target, self.k)), support=self.support)

    def calibrated(self, kept: TopK) -> TopK:
        """Returns the most probable tokens with the probabilities that the student learns."""
        if self.calibration == "trustworthy":
            assert self.c is not None
            return calibrate_topk(kept, c=self.c)
        return smooth_topk(kept) if self.calibration == "smoothing" else kept

    def build(self) -> None:
        """Adds metrics of the teacher."""
        super().build()
        self.teacher_metrics = TokenMetrics("test/teacher_", self.bins)
        self.calibrated_metrics = TokenMetrics("test/calibrated_", self.bins)

    def observe(self, signal: Signal, batch: TokenBatch, part: str) -> None:
        """Collects the teacher's first choices in the test, as they are and calibrated."""
        if part != "test" or (self.calibration == "trustworthy" and self.c is None):
            return
        for rows in slices(len(batch.targets), self.vocab_size):
            kept = most_probable(signal[rows], self.k)
            right = (kept.ids[:, 0] == batch.targets[rows]).float()
            for metrics, said in ((self.teacher_metrics, kept), (self.calibrated_metrics, self.calibrated(kept))):
                metrics.update({"acc": right, "confidence": said.logprobs[:, 0].exp()})

    def on_test_epoch_end(self) -> None:
        """Logs the teacher's figures beside the student's."""
        super().on_test_epoch_end()
        found = self.teacher_metrics.compute() | self.calibrated_metrics.compute()
        found.pop("test/calibrated_acc", None)  # no choice is another one
        if found and self.calibration == "trustworthy":
            found["test/c"] = torch.tensor(self.c)
        self.log_dict(found, sync_dist=True)
        self.teacher_metrics.reset()
        self.calibrated_metrics.reset()

    def on_train_start(self) -> None:
        """Finds c, if it is wanted and not known."""
        super().on_train_start()
        if self.calibration == "trustworthy" and self.c is None:
            self.c, before, after = self.find_c()
            rank_zero_info(f"c = {self.c:.2f}: the teacher's calibration error is {after:.4f}, and was {before:.4f}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds c."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["c"] = self.c

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes c back."""
        super().on_load_checkpoint(checkpoint)
        self.c = checkpoint.get("c", self.c)

    @torch.no_grad()
    def find_c(self) -> tuple[float, float, float]:
        """Searches c on the validation tokens.

        Returns:
            c, and the expected calibration error of the teacher's first choices before and after.
        """
        assert self.source is not None
        logprobs, right = [], []
        for batch in self._data().val_dataloader():
            batch = self.trainer.strategy.batch_to_device(batch)
            signal = self.source.signal(batch, "val")
            for rows in slices(len(batch.targets), self.vocab_size):
                kept = most_probable(signal[rows], self.k)
                logprobs.append(kept.logprobs.float())
                right.append(kept.ids[:, 0] == batch.targets[rows])
        if not logprobs:
            raise UsageError("data: there is no validation part to find model.c on; give one, or give model.c")
        # Each process has seen its share; c is that of all.
        parts = gathered((torch.cat(logprobs).cpu(), torch.cat(right).cpu()))
        stacked, hits = (torch.cat(found) for found in zip(*parts, strict=True))
        c = search_c(stacked, hits)
        return c, calibration_error(stacked[:, 0].exp(), hits), calibrated_error(stacked, hits, c)


def search_c(logprobs: Float[Tensor, "n k"], right: Bool[Tensor, " n"]) -> float:
    """Finds the c of least calibration error: steps of 0.1 in (0, 1], then of 0.02 around the best.

    Args:
        logprobs: (N, k) the most probable tokens' log-probabilities, the first choice first.
        right: (N,) whether the first choice is the text's.
    """
    coarse = min(range(1, 11), key=lambda tenth: calibrated_error(logprobs, right, tenth / 10))
    near = range(max(1, 5 * coarse - 5), min(50, 5 * coarse + 5) + 1)
    return min(near, key=lambda fiftieth: calibrated_error(logprobs, right, fiftieth / 50)) / 50


def calibrated_error(logprobs: Float[Tensor, "n k"], right: Bool[Tensor, " n"], c: float) -> float:
    """Computes the calibration error of first choices that are calibrated with c."""
    kept = TopK(torch.zeros_like(logprobs, dtype=torch.long), logprobs)
    return calibration_error(calibrate_topk(kept, c=c).logprobs[:, 0].exp(), right)


def most_probable(target: Target, k: int) -> TopK:
    """Returns the k most probable tokens, the first choice first.

    Raises:
        UsageError: Fewer were kept.
    """
    if isinstance(target, TopK):
        if target.ids.shape[1] < k:
            raise UsageError(f"model.k is {k}, but only {target.ids.shape[1]} tokens were kept; lower it, or keep more")
        logprobs, place = target.logprobs.topk(k)
        return TopK(target.ids.gather(1, place), logprobs)
    logprobs, ids = target.float().log_softmax(-1).topk(k)
    return TopK(ids, logprobs)


def calibration_error(confidence: Float[Tensor, " n"], right: Bool[Tensor, " n"], bins: int = 10) -> float:
    """Computes the expected calibration error of first choices over bins of equal width."""
    from torchmetrics.functional.classification import binary_calibration_error

    below_one = confidence.clamp(max=1 - torch.finfo(torch.float32).eps)
    return float(binary_calibration_error(below_one, right.long(), n_bins=bins, norm="l1"))
