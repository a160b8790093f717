"""Metrics of classifiers: accuracy, calibration, likelihood."""

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

BINS = 15  # the field's usual number of confidence bins


class NegativeLogLikelihood(Metric):
    """Mean of -log p(label), in nats, which torchmetrics has only as perplexity of token sequences."""

    full_state_update = False
    higher_is_better = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds logits (B, K) and labels (B,)."""
        self.total += torch.nn.functional.cross_entropy(preds, target, reduction="sum")
        self.count += len(target)

    def compute(self) -> Tensor:
        """Returns the mean."""
        return self.total / self.count


def classification_metrics(num_classes: int, *, prefix: str) -> MetricCollection:
    """Builds `<prefix>acc`, `<prefix>ece` (15 equal-width bins, L1), `<prefix>nll`; logits (B, K) go in.

    Args:
        num_classes: K.
        prefix: "val/" or "test/".
    """
    return MetricCollection(
        {
            "acc": MulticlassAccuracy(num_classes, average="micro"),
            "ece": MulticlassCalibrationError(num_classes, n_bins=BINS, norm="l1"),
            "nll": NegativeLogLikelihood(),
        },
        prefix=prefix,
        compute_groups=False,  # the three share no state; looking for groups runs the first batch twice
    )


def reliability(metrics: MetricCollection) -> dict[str, list[float]]:
    """Returns the bins of a reliability diagram: mean confidence, accuracy and count of each, from the ECE's own state."""
    calibration = metrics["ece"]
    confidences = torch.cat([c.flatten() for c in calibration.confidences]).cpu()
    accuracies = torch.cat([a.flatten() for a in calibration.accuracies]).cpu().float()
    edges = torch.linspace(0, 1, BINS + 1)[1:-1]
    bins = torch.bucketize(confidences, edges)
    count = torch.bincount(bins, minlength=BINS).float()
    divisor = count.clamp(min=1)
    return {
        "confidence": (torch.bincount(bins, confidences, BINS) / divisor).tolist(),
        "accuracy": (torch.bincount(bins, accuracies, BINS) / divisor).tolist(),
        "count": count.tolist(),
    }
