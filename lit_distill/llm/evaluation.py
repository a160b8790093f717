"""What is said of a language model token by token: likelihood, accuracy, calibration, closeness to the teacher."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import BinaryCalibrationError
from torchmetrics.utilities import dim_zero_cat

from lit_distill.core.metrics import BINS, reliability_bins
from lit_distill.llm.fused import slices
from lit_distill.llm.losses import forward_kl, topk_kl
from lit_distill.llm.signals import Signal, TopK

MEANS = ("ce", "acc", "kl", "agreement", "match")


@torch.no_grad()
def token_facts(
    hidden: Float[Tensor, "n h"], weight: Float[Tensor, "v h"], labels: Int[Tensor, " n"], signal: Signal | None = None
) -> dict[str, Tensor]:
    """Computes facts about each token, slice by slice.

    Args:
        hidden: (N, H) hidden states.
        weight: (V, H) the head.
        labels: (N,) the tokens of the text.
        signal: What the teacher said of them.

    Returns:
        (N,) each: "ce" in nats, "confidence" of the first choice, "acc" whether it is the text's; against a
        teacher "kl" = KL(teacher || student), of which a top-k teacher gives a lower bound, and "agreement" of the
        first choices.
    """
    rows: list[dict[str, Tensor]] = []
    for part in slices(len(labels), len(weight)):
        logits = F.linear(hidden[part], weight).float()
        logprobs = logits.log_softmax(-1)
        confidence, choice = logprobs.max(-1)
        facts = {
            "ce": -logprobs.gather(1, labels[part, None])[:, 0],
            "confidence": confidence.exp(),
            "acc": (choice == labels[part]).float(),
        }
        if signal is not None:
            target = signal[part]
            if isinstance(target, TopK):
                facts["kl"] = topk_kl(logits, target, support="bucket")
                first = target.ids.gather(1, target.logprobs.argmax(1, keepdim=True))[:, 0]
            else:
                target = target[:, : logits.shape[1]]
                facts["kl"] = forward_kl(logits, target)
                first = target.argmax(-1)
            facts["agreement"] = (choice == first).float()
        rows.append(facts)
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]} if rows else {}


class TokenMetrics(MetricCollection):
    """Means over tokens: `ce`, `perplexity`, `acc`, `ece` (bins of equal width), and `kl`, `agreement` if given.

    `match` is the mean over groups of tokens, where a teacher has another tokenizer.

    Args:
        prefix: "val/" or "test/", and perhaps the name of a network, such as "test/teacher_".
        bins: Bins of confidence.
    """

    def __init__(self, prefix: str, bins: int = BINS) -> None:
        means = {name: MeanMetric() for name in MEANS}
        super().__init__({**means, "ece": BinaryCalibrationError(bins, norm="l1")}, prefix=None, compute_groups=False)
        self.name = prefix
        self.bins = bins

    def update(self, facts: Mapping[str, Tensor]) -> None:  # type: ignore[override]  # one mapping, not one for each
        """Adds what `token_facts` returns."""
        if not facts:
            return
        for name in MEANS:
            if name in facts:
                self[name].update(facts[name])
        # A confidence of exactly 1 would fall into a bin of its own.
        confidence = facts["confidence"].clamp(max=1 - torch.finfo(torch.float32).eps)
        self["ece"].update(confidence, facts["acc"].long())

    def compute(self) -> dict[str, Tensor]:
        """Returns the means of what was given."""
        found = {name: metric.compute() for name, metric in self.items() if metric.update_called}
        if "ce" in found:
            found["perplexity"] = found["ce"].exp()
        return {f"{self.name}{name}": value for name, value in found.items()}

    def reliability(self) -> dict[str, list[float]]:
        """Returns the bins of a reliability diagram over all processes."""
        calibration: Any = self["ece"]
        with calibration.sync_context():
            return reliability_bins(
                dim_zero_cat(calibration.confidences), dim_zero_cat(calibration.accuracies), self.bins
            )
