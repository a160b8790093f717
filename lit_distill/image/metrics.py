"""Metrics of classifiers: accuracy, calibration, likelihood."""

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError
from torchmetrics.utilities import dim_zero_cat

BINS = 15  # the field's usual number of confidence bins


class CalibrationError(MulticlassCalibrationError):
    """Expected calibration error of logits (B, K) over 15 bins of equal width, by torchmetrics.

    torchmetrics guesses whether it is given logits or probabilities, and puts a confidence of exactly 1, which float32
    softmax often gives, into a sixteenth bin. So it is given probabilities that stay below 1 by a rounding error.

    Reference: Guo, Pleiss, Sun, Weinberger, On Calibration of Modern Neural Networks, 2017, arXiv 1706.04599.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, n_bins=BINS, norm="l1")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds logits (B, K) and labels (B,)."""
        super().update(preds.softmax(-1).clamp(max=1 - torch.finfo(torch.float32).eps), target)


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
            "ece": CalibrationError(num_classes),
            "nll": NegativeLogLikelihood(),
        },
        prefix=prefix,
        compute_groups=False,  # the three share no state; looking for groups runs the first batch twice
    )


def reliability(metrics: MetricCollection) -> dict[str, list[float]]:
    """Returns the bins of a reliability diagram over all processes: mean confidence, accuracy and count of each.

    Taken from the state of the calibration error, so that diagram and figure agree.
    """
    calibration = metrics["ece"]
    assert isinstance(calibration, MulticlassCalibrationError)
    with calibration.sync_context():
        confidences = dim_zero_cat(calibration.confidences).cpu()
        accuracies = dim_zero_cat(calibration.accuracies).cpu().float()
    bins = torch.bucketize(confidences, torch.linspace(0, 1, BINS + 1)[1:-1], right=True)
    count = torch.bincount(bins, minlength=BINS).float()
    divisor = count.clamp(min=1)
    return {
        "confidence": (torch.bincount(bins, confidences, BINS) / divisor).tolist(),
        "accuracy": (torch.bincount(bins, accuracies, BINS) / divisor).tolist(),
        "count": count.tolist(),
    }
