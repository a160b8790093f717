"""Metrics of classifiers: accuracy, calibration, likelihood."""

from abc import abstractmethod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassConfusionMatrix
from torchmetrics.utilities import dim_zero_cat

BINS = 15  # the field's usual number of confidence bins
MOST_CONFUSED = 30  # classes; a larger matrix is no picture any more, and makes the summary long


class CalibrationError(MulticlassCalibrationError):
    """Calibration error of logits (B, K) over 15 bins of equal width, by torchmetrics.

    torchmetrics guesses whether it is given logits or probabilities, and puts a confidence of exactly 1, which float32
    softmax often gives, into a sixteenth bin. So it is given probabilities that stay below 1 by a rounding error.

    Args:
        num_classes: K.
        norm: "l1" for the expected error (ECE), "max" for the largest of a bin (MCE).
        temperature: Divides the logits.

    Reference: Guo, Pleiss, Sun, Weinberger, On Calibration of Modern Neural Networks, 2017, arXiv 1706.04599.
    """

    def __init__(self, num_classes: int, norm: Literal["l1", "max"] = "l1", temperature: float = 1.0) -> None:
        super().__init__(num_classes, n_bins=BINS, norm=norm)
        self.temperature = temperature

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds logits (B, K) and labels (B,)."""
        probabilities = (preds / self.temperature).softmax(-1)
        super().update(probabilities.clamp(max=1 - torch.finfo(torch.float32).eps), target)


class AdaptiveCalibrationError(CalibrationError):
    """Expected calibration error over 15 bins of equal mass: the samples in the order of their confidence, cut evenly.

    Equal confidences may be cut too; which of them fall into which bin is then up to the order of the data.

    Reference: Nguyen, O'Connor, Posterior calibration and exploratory analysis for natural language processing models,
    2015, arXiv 1508.05154.
    """

    def compute(self) -> Tensor:
        """Returns the error."""
        confidences, order = dim_zero_cat(self.confidences).sort(stable=True)
        gaps = dim_zero_cat(self.accuracies)[order] - confidences
        bins = torch.arange(len(gaps), device=gaps.device) * BINS // len(gaps)
        return gaps.new_zeros(BINS).index_add(0, bins, gaps).abs().sum() / len(gaps)


class ClasswiseCalibrationError(Metric):
    """Mean over classes of the expected calibration error of p_k as a forecast of "the label is k", 15 equal bins.

    Only the sum of p_k - 1[label is k] is kept of each class and bin: |mean - mean| * share is |sum| / N.

    Args:
        num_classes: K.

    Reference: Kull et al., Beyond temperature scaling: Obtaining well-calibrated multiclass probabilities with
    Dirichlet calibration, 2019, arXiv 1910.12656.
    """

    full_state_update = False
    higher_is_better = False
    gaps: Tensor
    count: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.add_state("gaps", torch.zeros(BINS, num_classes), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds logits (B, K) and labels (B,)."""
        probabilities = preds.softmax(-1)
        gaps = probabilities - F.one_hot(target, preds.shape[1])
        self.gaps = self.gaps.scatter_add(0, _bins(probabilities), gaps.to(self.gaps.dtype))
        self.count += len(target)

    def compute(self) -> Tensor:
        """Returns the error."""
        return self.gaps.abs().sum(0).mean() / self.count


class _SampleMean(Metric):
    """Mean of one value per sample."""

    full_state_update = False
    higher_is_better = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @abstractmethod
    def values(self, preds: Tensor, target: Tensor) -> Tensor:
        """Returns one value for each sample, (B,)."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds logits (B, K) and labels (B,)."""
        self.total += self.values(preds, target).sum()
        self.count += len(target)

    def compute(self) -> Tensor:
        """Returns the mean."""
        return self.total / self.count


class NegativeLogLikelihood(_SampleMean):
    """Mean of -log p(label), in nats, which torchmetrics has only as perplexity of token sequences."""

    def values(self, preds: Tensor, target: Tensor) -> Tensor:
        """Returns (B,)."""
        return F.cross_entropy(preds, target, reduction="none")


class BrierScore(_SampleMean):
    """Mean of the squared distance between the probabilities and the one-hot label, from 0 to 2.

    Reference: Brier, Verification of forecasts expressed in terms of probability, 1950.
    """

    def values(self, preds: Tensor, target: Tensor) -> Tensor:
        """Returns (B,)."""
        return (preds.softmax(-1) - F.one_hot(target, preds.shape[1])).square().sum(-1)


class BalancedAccuracy(MulticlassConfusionMatrix):
    """Mean over classes of the share of their samples that are decided rightly; classes without samples do not count.

    Its state is the confusion matrix: rows are labels, columns are decisions.

    Args:
        num_classes: K.
    """

    higher_is_better = True

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, validate_args=False)

    def compute(self) -> Tensor:
        """Returns the mean."""
        of_class = self.confmat.sum(1)
        right = self.confmat.diagonal() / of_class.clamp(min=1)
        return right.sum() / (of_class > 0).sum().clamp(min=1)


class TemperatureScaling(Metric):
    """The temperature T > 0 by which logits have to be divided for the labels to be likeliest.

    Found by L-BFGS over log T, in float64. Decisions stay what they are, confidences change.

    Reference: Guo, Pleiss, Sun, Weinberger, On Calibration of Modern Neural Networks, 2017, arXiv 1706.04599.
    """

    full_state_update = False
    logits: list[Tensor]
    labels: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("logits", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds logits (B, K) and labels (B,)."""
        self.logits.append(preds)
        self.labels.append(target)

    def compute(self) -> Tensor:
        """Returns T."""
        # Evaluation runs in inference mode, whose tensors no gradient may pass: these are copies.
        with torch.inference_mode(False), torch.enable_grad():
            logits, labels = dim_zero_cat(self.logits).double().clone(), dim_zero_cat(self.labels).clone()
            log_temperature = logits.new_zeros((), requires_grad=True)
            optimizer = torch.optim.LBFGS([log_temperature], max_iter=50, line_search_fn="strong_wolfe")

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(logits / log_temperature.exp(), labels)
                loss.backward()
                return loss

            optimizer.step(closure)
        return log_temperature.detach().exp()


def classification_metrics(num_classes: int, *, prefix: str) -> MetricCollection:
    """Builds `<prefix>acc`, `<prefix>ece` (15 equal-width bins, L1), `<prefix>nll`; logits (B, K) go in.

    For the test there are besides: `acc_balanced`, `mce` (the worst bin), `ece_adaptive` (bins of equal mass),
    `ece_classwise` and `brier`. One figure of calibration alone can be had by constant confidence.

    Args:
        num_classes: K.
        prefix: "val/" or "test/", and perhaps the name of a network, such as "test/teacher_".
    """
    metrics: dict[str, Metric | MetricCollection] = {
        "acc": MulticlassAccuracy(num_classes, average="micro"),
        "ece": CalibrationError(num_classes),
        "nll": NegativeLogLikelihood(),
    }
    if prefix.startswith("test/"):
        metrics |= {
            "acc_balanced": BalancedAccuracy(num_classes),
            "mce": CalibrationError(num_classes, norm="max"),
            "ece_adaptive": AdaptiveCalibrationError(num_classes),
            "ece_classwise": ClasswiseCalibrationError(num_classes),
            "brier": BrierScore(),
        }
    # No groups of metrics with a common state: looking for them runs the first batch twice.
    return MetricCollection(metrics, prefix=prefix, compute_groups=False)


def classifier_panels(metrics: MetricCollection, data: Any) -> dict[str, Any]:
    """Returns what the dashboard shows of a tested classifier, over all processes.

    Args:
        metrics: Those of the test, see `classification_metrics`.
        data: The data module; its `classes`, if it has some, are the names.

    Returns:
        "reliability", see `reliability`; and of up to 30 classes "confusion": `classes`, and `counts` (K, K), how many
        samples of each label (row) got each decision (column).
    """
    panels: dict[str, Any] = {"reliability": reliability(metrics)}
    balanced = metrics["acc_balanced"]
    assert isinstance(balanced, BalancedAccuracy)
    names = [str(name) for name in getattr(data, "classes", None) or range(len(balanced.confmat))]
    if len(names) == len(balanced.confmat) <= MOST_CONFUSED:
        with balanced.sync_context():
            panels["confusion"] = {"classes": names, "counts": balanced.confmat.tolist()}
    return panels


def reliability(metrics: MetricCollection) -> dict[str, list[float]]:
    """Returns the bins of a reliability diagram over all processes: mean confidence, accuracy and count of each.

    Taken from the state of the calibration error, so that diagram and figure agree.
    """
    calibration = metrics["ece"]
    assert isinstance(calibration, MulticlassCalibrationError)
    with calibration.sync_context():
        return reliability_bins(dim_zero_cat(calibration.confidences), dim_zero_cat(calibration.accuracies))


def reliability_bins(confidences: Tensor, accuracies: Tensor, bins: int = BINS) -> dict[str, list[float]]:
    """Returns the bins of a reliability diagram.

    Args:
        confidences: (N,) in [0, 1].
        accuracies: (N,) whether the decision was right.
        bins: How many, of equal width.
    """
    confidences, accuracies = confidences.cpu(), accuracies.cpu().float()
    place = _bins(confidences, bins)
    count = torch.bincount(place, minlength=bins).float()
    divisor = count.clamp(min=1)
    return {
        "confidence": (torch.bincount(place, confidences, bins) / divisor).tolist(),
        "accuracy": (torch.bincount(place, accuracies, bins) / divisor).tolist(),
        "count": count.tolist(),
    }


def _bins(probabilities: Tensor, bins: int = BINS) -> Tensor:
    edges = torch.linspace(0, 1, bins + 1, device=probabilities.device)[1:-1]
    return torch.bucketize(probabilities, edges, right=True)
