"""DATM: trajectory matching at epochs as hard as the set is large, with soft labels that are learned."""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.core.reference import Reference
from lit_distill.dataset.data.subset import check_per_class, in_memory
from lit_distill.dataset.methods.mtt import TrajectoryMatching
from lit_distill.dataset.synthetic import SyntheticSet
from lit_distill.dataset.unrolled import call_flat

BATCH = 500


class DifficultyAlignedTrajectoryMatching(TrajectoryMatching):
    r"""Matches early epochs for small sets and late ones for large sets, beginning with the easier of them.

    Differences from `TrajectoryMatching`:

    - Start epochs are drawn from `min_start` to below an upper bound that grows from `first_max_start` to `max_start`
      in `growth` iterations.
    - Labels are learned, as logits: the loss of a step is the cross-entropy to their softmax. They begin as the mean
      over those experts, at their last epoch, that classify the image correctly; and images begin as real ones that an
      expert classifies correctly.
    - No step is taken where the loss is above `threshold`.

    The published results have experts that were trained towards flat minima (FTD); here they are ordinary ones.

    Args:
        student: See `TrajectoryMatching`.
        experts: Likewise.
        min_start: The first start epoch.
        max_start: Start epochs are below this in the end.
        first_max_start: And below this at the beginning; None for `max_start` from the beginning.
        growth: Iterations from the one to the other.
        label_lr: Learning rate of the soft labels.
        label_momentum: Momentum of the soft labels.
        threshold: The largest loss that is descended.
        kwargs: See `TrajectoryMatching`.

    Attributes:
        soft_labels: The parameter (n, k), logits.
    """

    reference = Reference(
        title="Towards Lossless Dataset Distillation via Difficulty-Aligned Trajectory Matching",
        authors="Guo, Wang, Cazenavette, Li, Zhang, You",
        year=2023,
        arxiv="2310.05773",
    )

    soft_labels: nn.Parameter

    def __init__(
        self,
        student: nn.Module,
        experts: str,
        min_start: int = 0,
        max_start: int = 20,
        first_max_start: int | None = None,
        growth: int = 1000,
        label_lr: float = 2.0,
        label_momentum: float = 0.9,
        threshold: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, experts, max_start=max_start, init="real", **kwargs)
        first_max_start = max_start if first_max_start is None else first_max_start
        if not 0 <= min_start < first_max_start <= max_start:
            raise UsageError(
                f"model.min_start, model.first_max_start, model.max_start are {min_start}, {first_max_start}, "
                f"{max_start}; each range of epochs needs one at least, and the upper end must not fall"
            )
        for key, value in {"growth": growth, "label_lr": label_lr, "threshold": threshold}.items():
            if value <= 0:
                raise UsageError(f"model.{key} is {value}; it must be above 0")
        self.min_start = min_start
        self.first_max_start = first_max_start
        self.growth = growth
        self.label_lr = label_lr
        self.label_momentum = label_momentum
        self.threshold = threshold

    def build(self) -> None:
        """Makes images and labels to begin with."""
        super().build()
        self.soft_labels = nn.Parameter(self.first_labels())

    @torch.no_grad()
    def first_images(self) -> Float[Tensor, "n c h w"]:
        """Draws real images that the first expert classifies correctly; the next one is asked where there are too few.

        Raises:
            UsageError: All experts together have too few.
        """
        source = in_memory(self._data())
        pixels, labels = source.part("train")
        check_per_class(self.per_class, labels, self.num_classes, "model.per_class")
        order = torch.randperm(len(labels))
        right = torch.zeros(len(labels), dtype=torch.bool)
        for expert in range(len(self._experts)):
            for part in order.split(BATCH):
                logits = self.expert_logits(expert, source.normalize(pixels[part]))
                right[part] |= logits.argmax(1) == labels[part]
                if labels[right].bincount(minlength=self.num_classes).min() >= self.per_class:
                    known = order[right[order]]
                    chosen = [known[labels[known] == number][: self.per_class] for number in range(self.num_classes)]
                    return source.normalize(pixels[torch.cat(chosen)])
        counts = labels[right].bincount(minlength=self.num_classes)
        raise UsageError(
            f"model.experts: they classify {int(counts.min())} training images of class {int(counts.argmin())} "
            f"correctly, model.per_class is {self.per_class}; train them longer, or lower it"
        )

    @torch.no_grad()
    def first_labels(self) -> Float[Tensor, "n k"]:
        """Computes the mean of the logits of the experts that classify an image correctly."""
        logits = torch.stack([self.expert_logits(expert, self.images) for expert in range(len(self._experts))])
        right = (logits.argmax(2) == self.labels)[..., None].float()
        return (logits * right).sum(0) / right.sum(0)

    def expert_logits(self, expert: int, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Computes what an expert says after its last epoch."""
        (parameters,) = self._experts.read(expert, self._experts.epochs)
        return call_flat(self.student.eval(), parameters.to(images.device), images).float()

    # ---- training --------------------------------------------------------------------------------------------------

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Adds the labels."""
        labels = {"params": [self.soft_labels], "lr": self.label_lr, "momentum": self.label_momentum}
        return [*super().parameter_groups(), labels]

    def start_epochs(self) -> range:
        """Returns the epochs to start at in this iteration."""
        grown = (self.max_start - self.first_max_start) * self.iteration // self.growth
        return range(self.min_start, min(self.first_max_start + grown, self.max_start))

    def targets(self) -> Tensor:
        """Returns the soft labels."""
        return self.soft_labels

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Computes the gradient, and takes the step if the loss is small enough; momentum waits, too."""
        optimizer_closure()
        if self.terms["match"] <= self.threshold:
            super().optimizer_step(epoch, batch_idx, optimizer)

    def distilled(self) -> SyntheticSet:
        """Returns the set as it is now, with soft labels."""
        return replace(super().distilled(), soft_labels=self.soft_labels.detach().cpu().clone())
